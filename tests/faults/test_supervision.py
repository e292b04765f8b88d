"""A thread that dies or hangs does not leave a daemon that is deaf and alive (F29, F30)."""

import linecache
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from edge_daemon.config import Config, Http
from edge_daemon.main import BUSY_LOOK_S, Daemon
from tests.conftest import NewMosquitto
from tests.daemon import NODE, ROOT, DaemonProcess, N, Watcher
from tests.fake_ollama import FakeModel, FakeOllama
from tests.faults.bench import WORDS, Bench
from tests.manager import Manager
from tests.ports import free_port
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

INJECTED = Path(__file__).parent / "injected"
MAIN_IN_STORE = re.compile(r'first\):\n  File "([^"]+/store\.py)", line (\d+) in \w+\n(?:  File .*\n)*?.* in _watch\n')
"""In what the daemon says on SIGUSR2: the line of the store that main is at."""
THREADS = ["worker", "telemetry", "mqtt-net", "mqtt-intake", "mqtt-publisher", "http"]


def fault(how: str, thread: str, trigger: Path) -> dict[str, str]:
    """The environment in which this fault strikes once the file is there."""
    path = os.pathsep.join(filter(None, (str(INJECTED), str(ROOT), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "EDGE_LLM_TEST_FAULT": f"{how}:{thread}", "EDGE_LLM_TEST_TRIGGER": str(trigger)}


def test_all_threads_are_here(tmp_path: Path) -> None:
    """The list of threads is that of the daemon: a new one has to be tried too."""
    daemon = Daemon(Config(node=NODE, data_dir=tmp_path, http=Http(enabled=True, port=free_port())))
    assert sorted(thread.name for thread in daemon._threads()) == sorted(THREADS)
    assert daemon.gateway is not None
    daemon.gateway.stop(1)
    daemon.store.close()


def struck(thread: str, directory: Path) -> list[str]:
    """What is wrong after a daemon has met an error in this thread, and another one its silence."""
    trigger = directory / "now"
    with Bench(directory, seed=thread, http={"enabled": True, "port": free_port()}) as bench:
        for how, said in (("raise", "has ended"), ("hang", "hangs")):
            bench.daemon.start(env=fault(how, thread, trigger))
            bench.traffic.send(3)
            wait_until(bench.traffic.all_confirmed, 30)
            trigger.touch()
            assert bench.daemon.wait(90) == 1
            assert f"thread {thread} {said}" in bench.daemon.log()
            trigger.unlink()
        bench.daemon.start()
        return bench.verdict()


@pytest.fixture(scope="module")
def strikes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[list[str]]]]:
    """All of them at once: they mostly wait."""
    with ThreadPoolExecutor(len(THREADS)) as pool:
        yield {thread: pool.submit(struck, thread, tmp_path_factory.mktemp(thread)) for thread in THREADS}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("thread", THREADS)
def test_a_thread_that_dies_or_hangs(thread: str, strikes: dict[str, Future[list[str]]]) -> None:
    """The process ends with status 1 and names the thread; the next start loses nothing."""
    assert strikes[thread].result() == []


@pytest.mark.parametrize(("thread", "left"), [("telemetry", ("queued", 0)), ("worker", ("running", 1))])
def test_an_attempt_counts_only_where_the_worker_fails(
    new_mosquitto: NewMosquitto, tmp_path: Path, thread: str, left: tuple[str, int]
) -> None:
    """When another part fails, the running task is put aside; when the worker does, its task may be to blame."""
    trigger, broker = tmp_path / "now", new_mosquitto()
    with (
        FakeOllama(FakeModel("small", size_bytes=10**6, token_s=0.1, answer=10 * WORDS)) as ollama,
        DaemonProcess(tmp_path, broker, ollama_url=ollama.url, env=fault("raise", thread, trigger)) as daemon,
        Watcher(broker) as client,
    ):
        client.publish(f"{N}/task/door/1", {"prompt": "x", "stream": True})
        client.running("door")
        trigger.touch()
        assert daemon.wait() == 1
        assert [(row.state, row.attempt) for row in daemon.stored()] == [left]


def test_a_deadlock(tmp_path: Path) -> None:
    """With the store's lock never given back, main hangs too and feeds the watchdog no more: systemd may kill it."""
    trigger, manager = tmp_path / "now", Manager()
    env = {**fault("lock", "worker", trigger), "NOTIFY_SOCKET": manager.address}

    def main_waits_for_lock() -> bool:
        bench.daemon.signal(signal.SIGUSR2)
        places = MAIN_IN_STORE.findall(bench.daemon.log()[begun:])
        return any("with self._lock" in linecache.getline(path, int(line)) for path, line in places)

    with Bench(tmp_path) as bench:
        bench.daemon.start(env=env)
        bench.traffic.send(3)
        manager.wait("WATCHDOG=1", 2)
        trigger.touch()
        wait_until(lambda: not trigger.exists(), 60)
        begun = len(bench.daemon.log())
        wait_until(main_waits_for_lock, 60)
        wait_until(lambda: manager.silence_s("WATCHDOG=1") > 4 * BUSY_LOOK_S, 60)
        bench.daemon.kill()
        bench.daemon.start()
        assert bench.verdict() == []
    manager.close()
