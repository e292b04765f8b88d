"""What befalls the process, and what a task may do to it: suspend, signals, poison (F11, F24, F27, F32)."""

import signal
from collections import Counter
from pathlib import Path

import pytest

from edge_daemon.steps import CRASH_STATUS
from tests.daemon import N
from tests.fake_ollama import FakeModel, FakeOllama
from tests.faults.bench import WORDS, Bench
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

KEY = ("dev", "t")
TASK = f"{N}/task/dev/t"
DRAIN_S = 20.0


def slow() -> FakeOllama:
    """Its models are there at once, after five seconds, and after a while."""
    return FakeOllama(
        FakeModel("small", size_bytes=10**6),
        FakeModel("heavy", size_bytes=10**6, load_s=5.0),
        FakeModel("slow", size_bytes=10**6, token_s=0.1, answer=WORDS),
    )


def test_a_long_pause(tmp_path: Path) -> None:
    """Stopped until the broker has given it up, the daemon comes back, and what it ran is not run twice (F11)."""
    with slow() as fake, Bench(tmp_path, fake=fake, mqtt={"keepalive_s": 5}) as bench:
        bench.daemon.start()
        bench.recorder.publish(TASK, {"prompt": "x", "model": "slow"})
        wait_until(lambda: bench.recorder.has_begun(KEY))
        bench.daemon.signal(signal.SIGSTOP)
        wait_until(lambda: "Client edge-llm-n has exceeded timeout" in bench.broker.log(), 30)
        bench.daemon.signal(signal.SIGCONT)
        assert bench.verdict() == []
        assert bench.recorder.end(KEY) == "succeeded"
        assert len(fake.asked("/api/chat", model="slow")) == 1
        assert bench.recorder.events.count("broker_connected") == 2


def test_a_model_that_is_deleted_while_tasks_wait_for_it(tmp_path: Path) -> None:
    """Its tasks fail with that reason, those of other models do not (F24)."""
    with slow() as fake, Bench(tmp_path, fake=fake) as bench:
        bench.daemon.start()
        bench.recorder.publish(TASK, {"prompt": "x", "model": "slow"})
        wait_until(lambda: bench.recorder.has_begun(KEY))
        bench.recorder.publish(f"{N}/task/dev/gone", {"prompt": "y", "model": "heavy"})
        bench.recorder.publish(f"{N}/task/dev/here", {"prompt": "z", "model": "small"})
        wait_until(lambda: ("dev", "gone") in bench.recorder.open())
        del fake.models["heavy:latest"]
        assert bench.verdict() == []
        ends = {key[1]: bench.recorder.end(key) for key in (KEY, ("dev", "gone"), ("dev", "here"))}
        assert ends == {"t": "succeeded", "gone": "failed", "here": "succeeded"}
        (error,) = [row.result["error"] for row in bench.evidence().stored if row.id == "gone" and row.result]
        assert error["code"] == "model_missing"


def test_a_task_that_kills_the_daemon_each_time(tmp_path: Path) -> None:
    """It is begun so often and no more, then ended with that reason, and the queue goes on (F27)."""
    with slow() as fake, Bench(tmp_path, fake=fake) as bench:
        bench.recorder.publish(TASK, {"prompt": "poison"})
        for _ in range(3):
            bench.daemon.start(ready=False, env={"EDGE_LLM_CRASH_AT": "token_received"})
            assert bench.daemon.wait() == CRASH_STATUS
        bench.daemon.start()
        assert bench.verdict() == []
        (result,) = [row.result for row in bench.evidence().stored if row.id == "t"]
        assert result is not None
        assert (result["state"], result["attempt"], result["error"]["code"]) == ("failed", 3, "crash_loop")
        assert sum("poison" in str(seen.body) for seen in fake.asked("/api/chat")) == 3


def test_a_load_that_kills_the_daemon_each_time(tmp_path: Path) -> None:
    """Its task is begun so often and no more, and so is the load; the next start serves the others (F27)."""
    kills = {"EDGE_LLM_CRASH_AT": "load_due"}
    with slow() as fake, Bench(tmp_path, fake=fake) as bench:
        bench.recorder.publish(TASK, {"prompt": "poison", "model": "slow"})
        for _ in range(3):
            bench.daemon.start(ready=False, env=kills)
            assert bench.daemon.wait() == CRASH_STATUS
        bench.daemon.start(env=kills)
        wait_until(lambda: bench.recorder.end(KEY))
        assert bench.daemon.stop() == 0
        bench.daemon.start()
        assert bench.verdict() == []
        (result,) = [row.result for row in bench.evidence().stored if row.id == "t"]
        assert result is not None
        assert (result["state"], result["attempt"], result["error"]["code"]) == ("failed", 3, "crash_loop")
        assert (result["load_s"], result["error"]["retryable"]) == (None, False)


def test_a_preload_that_kills_the_daemon(tmp_path: Path) -> None:
    """It is not tried again at the next start, which serves (F27)."""
    kills = {"EDGE_LLM_CRASH_AT": "load_due"}
    with slow() as fake, Bench(tmp_path, fake=fake, models={"settings": {"slow": {"preload": True}}}) as bench:
        bench.daemon.start(ready=False, env=kills)
        assert bench.daemon.wait() == CRASH_STATUS
        bench.daemon.start(env={"EDGE_LLM_CRASH_AT": "load_due:2"})  # the one load is that of the fresh task
        assert bench.verdict() == []
        assert fake.loads == ["small:latest"]


def test_a_stop_while_a_model_loads(tmp_path: Path) -> None:
    """SIGTERM breaks the load off; its task waits for the next start, and no attempt counts (F32)."""
    with slow() as fake, Bench(tmp_path, fake=fake, drain_timeout_s=DRAIN_S) as bench:
        bench.daemon.start()
        bench.recorder.publish(TASK, {"prompt": "x", "model": "heavy"})
        wait_until(lambda: fake.asked("/api/generate", model="heavy"))
        assert bench.daemon.stop(DRAIN_S) == 0
        assert [(row.state, row.attempt) for row in bench.daemon.stored()] == [("queued", 0)]
        fake["heavy"].load_s = 0.0
        bench.daemon.start()
        assert bench.verdict() == []
        assert bench.recorder.end(KEY) == "succeeded"


def test_a_stop_while_the_log_is_rotated(tmp_path: Path) -> None:
    """SIGTERM amid results that fill file after file of the log: none loses its row (F32)."""
    with slow() as fake, Bench(tmp_path, fake=fake, csv={"rotate_bytes": 65_536, "keep": 1000}) as bench:
        fake["small"].answer = "x" * 50_000
        bench.daemon.start()
        bench.traffic.send(40, form="topic", model="small")
        wait_until(lambda: len(list(bench.daemon.data_dir.glob("llm_metrics.*.csv"))) > 3, 30)
        assert bench.daemon.stop() == 0
        bench.daemon.start()
        assert bench.verdict() == []
        assert len(bench.evidence().log.tasks) == 41


def test_a_kill_while_hundreds_of_tasks_expire(tmp_path: Path) -> None:
    """Killed when a part of them is told of, it has lost none, and each has one end and one row (F2)."""
    with slow() as fake, Bench(tmp_path, fake=fake) as bench:
        bench.daemon.start(env={"EDGE_LLM_CRASH_AT": "result_told:100"})
        bench.recorder.publish(TASK, {"prompt": "x", "model": "slow"})
        wait_until(lambda: bench.recorder.has_begun(KEY))
        bench.traffic.send(250, form="topic", model="slow", priority="low", ttl_s=1)
        assert bench.daemon.wait() == CRASH_STATUS
        bench.daemon.start()
        assert bench.verdict() == []
        ends = Counter(row.state for row in bench.evidence().stored)
        assert ends["expired"] >= 240
