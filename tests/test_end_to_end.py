"""The whole daemon with real small models: what a user sees on the first day."""

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pandas as pd
import psutil
import pytest
import requests

from edge_daemon.config import Config
from edge_daemon.embedded import OllamaChild, start_ollama
from tests import needs
from tests.conftest import NewMosquitto
from tests.daemon import DaemonProcess, N, Watcher
from tests.embedded.needs_models import GEMMA3, SMOLLM2, need_model
from tests.mosquitto import Mosquitto
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, pytest.mark.models]

PATIENCE_S = 60.0
"""For an answer: other tests may keep the machine busy."""
LONG = {"prompt": "Count from 1 to 500.", "stream": True, "options": {"num_predict": 300, "seed": 1, "stop": []}}
FIRST_COLUMNS = [
    *("timestamp", "task_type", "model_name", "prompt", "task_latency_ns", "model_switching_time_ns", "result"),
    *("status", "model_load_state", "total_duration_ns", "load_duration_ns", "prompt_eval_count"),
    *("prompt_eval_duration_ns", "eval_count", "eval_duration_ns", "tokens_per_second"),
    *("cpu_usage_percent", "memory_usage_percent", "system_load_avg"),
]

NewDaemon = Callable[..., DaemonProcess]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models are put together, once."""
    need_model(SMOLLM2)
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def ollama(models: Path) -> Iterator[OllamaChild]:
    """The server of the real models."""
    with start_ollama(models) as server:
        yield server


@pytest.fixture
def broker(new_mosquitto: NewMosquitto) -> Mosquitto:
    """A broker that remembers everything over a stop."""
    return new_mosquitto(persistence=True)


@pytest.fixture
def client(broker: Mosquitto) -> Iterator[Watcher]:
    """Hears everything, also what comes before it is back after the broker."""
    with Watcher(broker, client_id="watcher", session_s=600) as watcher:
        yield watcher


@pytest.fixture
def new_daemon(tmp_path: Path, broker: Mosquitto, ollama: OllamaChild, client: Watcher) -> Iterator[NewDaemon]:
    """A daemon with the real models; it leaves none of them loaded."""
    with ExitStack() as stack:

        def new(**settings: Any) -> DaemonProcess:
            settings["models"] = {"default": SMOLLM2, "defaults": {"num_ctx": 1024}}
            daemon = DaemonProcess(tmp_path, broker, ollama_url=ollama.url, **settings)
            stack.callback(lambda: print(daemon.log()))
            stack.enter_context(daemon)
            return daemon

        yield new
    for model in resident(ollama.url):
        requests.post(f"{ollama.url}/api/generate", json={"model": model, "keep_alive": 0}, timeout=10)
    wait_until(lambda: resident(ollama.url) == [], timeout_s=30)


def resident(url: str) -> list[str]:
    """What `/api/ps` lists."""
    return [model["name"] for model in requests.get(f"{url}/api/ps", timeout=10).json()["models"]]


def runners(ollama: OllamaChild) -> list[psutil.Process]:
    """The processes that run models for this server."""
    children = psutil.Process(ollama.process.pid).children(recursive=True)
    return [child for child in children if any("edge_daemon.embedded.runner" in word for word in child.cmdline())]


def memory_comes_back(process: psutil.Process) -> bool:
    """Whether there is more memory right after the end of a process than right before; returns after its end."""
    free: list[int] = []
    own: list[int] = []  # a mapped file is no loss
    wait_until(lambda: not _measured(process, free, own), timeout_s=20)
    assert max(own) > 100_000_000
    try:
        wait_until(lambda: psutil.virtual_memory().available > min(free[-50:]) + max(own) / 2, timeout_s=1)
    except AssertionError:
        return False
    return True


def _measured(process: psutil.Process, free: list[int], own: list[int]) -> bool:
    available = psutil.virtual_memory().available
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    except OSError:
        return False
    if (anonymous := re.search(r"RssAnon:\s+([0-9]+) kB", status)) is not None:  # one that is ending has none
        free.append(available)
        own.append(int(anonymous[1]) * 1024)
    return True


# -- a first question ------------------------------------------------------------------------------------------------


def test_a_first_question(new_daemon: NewDaemon, broker: Mosquitto, client: Watcher) -> None:
    """`mosquitto_pub` and `mosquitto_rr`, as a user types them, get an answer with a 4 in it."""
    new_daemon()
    question = ["-p", str(broker.port), "-q", "1", "-t", f"{N}/task", "-m", "What is 2+2?"]
    subprocess.run([needs.tool("mosquitto_pub", package="mosquitto-clients"), *question], check=True, timeout=10)
    text = client.wait_for(lambda m: m.topic.startswith(f"{N}/reply/_/") and m.topic.endswith("/text"), PATIENCE_S)
    assert "4" in text.text
    asking = [needs.tool("mosquitto_rr", package="mosquitto-clients"), "-V", "5", "-e", "reply/me", "-W", "60"]
    answer = subprocess.run([*asking, *question], capture_output=True, check=True, timeout=PATIENCE_S)
    assert "4" in answer.stdout.decode()


def test_a_prompt_longer_than_it_looks(new_daemon: NewDaemon, client: Watcher) -> None:
    """Digits take more tokens than letters: what does not fit is refused by the model, not cut without a word."""
    new_daemon()
    numbers = " ".join(str(10_000 + 7 * number) for number in range(500))
    client.publish(f"{N}/task/meter/t1", {"prompt": f"Remember 777. {numbers} What is the number to remember?"})
    result = client.result("meter", "t1")
    assert (result["state"], result["error"]["code"]) == ("failed", "bad_request")
    assert "context" in result["error"]["message"]


def test_two_models_and_a_schema(new_daemon: NewDaemon, client: Watcher) -> None:
    """Two models answer side by side, one of them in the form of a JSON schema; the prior system's payload works."""
    need_model(GEMMA3)
    new_daemon()
    digit = {"type": "integer", "minimum": 0, "maximum": 9}
    schema = {"type": "object", "properties": {"sum": digit}, "required": ["sum"], "additionalProperties": False}
    client.publish(f"{N}/task/a/schema", {"prompt": "What is 2+2? Answer in JSON.", "format": schema})
    client.publish(
        f"{N}/task/b/gemma", {"prompt": "The capital of France is", "model": GEMMA3, "options": {"num_predict": 8}}
    )
    client.publish(
        f"{N}/task/c/prior", '{"task_type": "arithmetic", "model_name": "smollm2:135m", "prompt": "What is 2+2?"}'
    )
    parsed, other, prior = [
        client.result(*task, timeout_s=PATIENCE_S) for task in (("a", "schema"), ("b", "gemma"), ("c", "prior"))
    ]
    assert parsed["state"] == other["state"] == prior["state"] == "succeeded"
    assert isinstance(parsed["json"]["sum"], int)
    assert (other["model"], prior["task_type"]) == (GEMMA3, "arithmetic")
    assert other["output_tokens"] >= 1
    assert "4" in prior["text"]


def test_readings_become_something_to_act_on(new_daemon: NewDaemon, client: Watcher) -> None:
    """Twenty readings of the shipped type `classify`, some as raw JSON by the name of the device, are answered."""
    kind = Config().task_types["classify"]
    assert kind.format is not None
    new_daemon(task_types={"classify": asdict(kind) | {"topic_source": "kiln"}})
    for number in range(20):
        reading = {"temperature": 5 * number, "unit": "C"}
        raw = number % 4 == 0
        topic = f"{N}/task/{'kiln' if raw else 'oven'}/{number}"
        client.publish(topic, reading | {"battery": 80} if raw else {"task_type": "classify", "data": reading})
    for number in range(20):
        result = client.result("oven" if number % 4 else "kiln", str(number), timeout_s=PATIENCE_S)
        assert (result["state"], result["task_type"]) == ("succeeded", "classify")
        jsonschema.validate(result["json"], kind.format)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_unloading_is_real(new_daemon: NewDaemon, client: Watcher, ollama: OllamaChild) -> None:
    """After `model_timeout_s` the model's process, its listing and its memory are gone, and the CSV tells of it."""
    daemon = new_daemon(pool={"model_timeout_s": 2})
    for number in range(5):  # other programs may take what we give back, but not every time
        client.publish(f"{N}/task/door/{number}", "What is 2+2?")
        client.result("door", str(number), timeout_s=PATIENCE_S)
        (runner,) = runners(ollama)
        assert resident(ollama.url) == [SMOLLM2]
        came_back = memory_comes_back(runner)
        assert runners(ollama) == []
        assert resident(ollama.url) == []
        if came_back:
            break
    assert came_back
    wait_until(lambda: len(daemon.rows("model")) == 2 * (number + 1))
    loaded, unloaded = daemon.rows("model")[:2]
    assert (loaded["status"], unloaded["status"]) == ("loaded", "unloaded")
    assert loaded["swap_reason"]
    assert unloaded["swap_reason"] == "idle"
    assert int(loaded["model_switching_time_ns"]) > 10_000_000
    assert int(unloaded["model_switching_time_ns"]) > 0
    assert {row["model_name"] for row in (loaded, unloaded)} == {SMOLLM2}
    idle_s = (pd.Timestamp(unloaded["timestamp"]) - pd.Timestamp(daemon.rows("task")[0]["timestamp"])).total_seconds()
    assert 1.5 < idle_s < 10


# -- the log ---------------------------------------------------------------------------------------------------------


def test_the_log_over_a_restart(new_daemon: NewDaemon, client: Watcher) -> None:
    """Ten tasks, a restart and ten more: one header, the known columns first, twenty rows that pandas reads."""
    daemon = new_daemon()
    for number in range(20):
        if number == 10:
            daemon.stop()
            daemon.start()
        prompt = f'What is {number}+2?\nSay it, "in a word", please.'
        client.publish(f"{N}/task/door/{number}", {"prompt": prompt, "options": {"num_predict": 6}})
        assert client.result("door", str(number), timeout_s=PATIENCE_S)["state"] == "succeeded"
    assert daemon.stop() == 0
    text = daemon.csv_path.read_text(encoding="utf-8")
    assert text.count("timestamp,task_type,model_name") == 1
    assert text.splitlines()[0].split(",")[:19] == FIRST_COLUMNS
    rows = daemon.rows("task")
    assert [row["task_id"] for row in rows] == [str(number) for number in range(20)]
    durations = [name for name in FIRST_COLUMNS if name.endswith("_ns")]
    assert all(row[name].isdecimal() for row in rows for name in durations)
    assert all(int(row["eval_duration_ns"]) > 0 and int(row["task_latency_ns"]) > 0 for row in rows)
    assert [row["model_load_state"] for row in rows].count("loaded") == 2
    frame = pd.read_csv(daemon.csv_path)
    tasks = frame[frame["record"] == "task"]
    assert len(tasks) == 20
    assert (tasks["eval_count"] <= 6).all()
    assert (tasks["tokens_per_second"] > 0).all()
    assert tasks[durations].notna().all(axis=None)
    assert tasks["prompt"].iloc[3] == 'What is 3+2?\nSay it, "in a word", please.'


# -- what dies in mid-generation -------------------------------------------------------------------------------------


def ended_once(daemon: DaemonProcess, client: Watcher, *, attempt: int) -> None:
    """The task `door/1` has ended well, once for its sender, in the log and in the queue."""
    result = client.result("door", "1", timeout_s=PATIENCE_S)
    assert daemon.stop() == 0
    assert (result["state"], result["attempt"]) == ("succeeded", attempt)
    assert result["output_tokens"] >= 50
    assert Counter(m.json["id"] for m in client.of("door", "result")) == {"1": 1}
    assert [row["task_id"] for row in daemon.rows("task")] == ["1"]
    assert [(row.state, row.attempt, row.sent) for row in daemon.stored()] == [("succeeded", attempt, 1)]


def test_the_daemon_is_killed_in_mid_generation(new_daemon: NewDaemon, client: Watcher) -> None:
    """After `kill -9` of the daemon while a model generates, the task is finished once, at its second attempt."""
    daemon = new_daemon()
    client.publish(f"{N}/task/door/1", LONG)
    client.running("door", PATIENCE_S)
    daemon.restart()
    ended_once(daemon, client, attempt=2)


def test_the_broker_is_away_during_the_whole_run(new_daemon: NewDaemon, client: Watcher, broker: Mosquitto) -> None:
    """With the broker stopped while a model generates and started after that, the answer is delivered."""
    daemon = new_daemon()
    client.publish(f"{N}/task/door/1", LONG)
    client.running("door", PATIENCE_S)
    broker.stop()
    assert daemon.rows("task") == []
    wait_until(lambda: daemon.rows("task"), timeout_s=PATIENCE_S)
    broker.start()
    ended_once(daemon, client, attempt=1)


def test_ollama_is_killed_in_mid_generation(tmp_path: Path, models: Path, broker: Mosquitto, client: Watcher) -> None:
    """With the model server killed while it generates, and started again, the task is finished once."""
    with ExitStack() as stack:
        server = stack.enter_context(start_ollama(models))
        daemon = DaemonProcess(tmp_path, broker, ollama_url=server.url, models={"default": SMOLLM2})
        stack.enter_context(daemon)
        client.publish(f"{N}/task/door/1", LONG)
        client.running("door", PATIENCE_S)
        server.process.kill()
        client.wait_for(lambda m: m.topic == f"{N}/state" and m.json["state"] == "degraded", PATIENCE_S)
        server.stop()
        stack.enter_context(start_ollama(models, port=urlsplit(server.url).port or 0))
        ended_once(daemon, client, attempt=2)
