"""Models that Ollama has to fetch first: the whole daemon, with `ollama.allow_pull`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NewMosquitto
from tests.daemon import DaemonProcess, N, Watcher
from tests.fake_ollama import FakeModel, FakeOllama
from tests.mosquitto import Mosquitto
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

Start = Callable[..., DaemonProcess]


@pytest.fixture
def ollama() -> Iterator[FakeOllama]:
    """A model server that has one model and can fetch another."""
    far = FakeModel("far", size_bytes=10**6)
    with FakeOllama(FakeModel("small", size_bytes=10**6), pullable=[far]) as server:
        yield server


@pytest.fixture
def broker(new_mosquitto: NewMosquitto) -> Mosquitto:
    """A broker of one's own."""
    return new_mosquitto()


@pytest.fixture
def client(broker: Mosquitto) -> Iterator[Watcher]:
    """A device that hears everything."""
    with Watcher(broker) as watcher:
        yield watcher


@pytest.fixture
def start(tmp_path: Path, broker: Mosquitto, ollama: FakeOllama) -> Iterator[Start]:
    """Start a daemon that may fetch models, or else as told."""
    daemons: list[DaemonProcess] = []

    def start(**ollama_settings: Any) -> DaemonProcess:
        settings = {"allow_pull": True} | ollama_settings
        daemon = DaemonProcess(tmp_path, broker, ollama_url=ollama.url, ollama=settings, queue={"max_attempts": 2})
        daemons.append(daemon)
        daemon.start()
        return daemon

    yield start
    for daemon in daemons:
        daemon.kill()
        print(daemon.log())


def test_a_model_is_fetched_when_a_task_needs_it(start: Start, client: Watcher, ollama: FakeOllama) -> None:
    """It is fetched once, with events on the way, then loaded, and answers; the next task finds it there."""
    start()
    client.publish(f"{N}/task/door/1", {"prompt": "hello", "model": "far"})
    result = client.result("door", "1", timeout_s=20)
    client.publish(f"{N}/task/door/2", {"prompt": "again", "model": "far"})
    assert client.result("door", "2")["state"] == "succeeded"
    assert (result["state"], result["text"], result["model"]) == ("succeeded", "echo: hello", "far:latest")
    assert len(ollama.asked("/api/pull")) == 1
    told = [m.json["data"] for m in client.messages if m.topic == f"{N}/event/model_pulling"]
    fetched = [data["percent"] for data in told if data["status"].startswith("pulling ") and data["total_bytes"]]
    assert fetched == [0, 25, 50, 75, 100]


def test_unless_it_is_allowed_nothing_is_fetched(start: Start, client: Watcher, ollama: FakeOllama) -> None:
    """By default a task for a model that is not there is refused, and Ollama is not asked to fetch it."""
    start(allow_pull=False)
    client.publish(f"{N}/task/door/1", {"prompt": "hello", "model": "far"})
    assert client.result("door", "1")["error"]["code"] == "unknown_model"
    assert ollama.asked("/api/pull") == []


@pytest.mark.parametrize(
    ("model", "code"),
    [("nowhere", "model_missing"), ("far", "runner_died")],
)
def test_a_fetch_that_fails(start: Start, client: Watcher, ollama: FakeOllama, model: str, code: str) -> None:
    """A model that cannot be fetched fails its own tasks, with the reason, and no others."""
    ollama.pull_error = "max retries exceeded: unexpected EOF"
    start()
    client.publish(f"{N}/task/door/1", {"prompt": "hello", "model": model})
    client.publish(f"{N}/task/window/1", "hello")
    assert client.result("window", "1")["state"] == "succeeded"
    result = client.result("door", "1", timeout_s=30)
    assert (result["state"], result["error"]["code"]) == ("failed", code)
    said = "file does not exist" if model == "nowhere" else ollama.pull_error
    assert said in result["error"]["message"]


def test_a_fetch_while_others_are_served(start: Start, client: Watcher, ollama: FakeOllama) -> None:
    """While a model is being fetched, tasks for resident ones are answered, and its own can be cancelled at once."""
    start()
    client.publish(f"{N}/task/window/1", "hello")
    client.result("window", "1")
    ollama.pull_part_s = 30.0
    client.publish(f"{N}/task/door/1", {"prompt": "hello", "model": "far"})
    wait_until(lambda: ollama.asked("/api/pull"))
    client.publish(f"{N}/task/window/2", "hello")
    assert client.result("window", "2")["state"] == "succeeded"
    client.publish(f"{N}/cancel/door/1")
    assert client.result("door", "1")["state"] == "cancelled"


def test_a_connection_that_ends_during_a_fetch(start: Start, client: Watcher, ollama: FakeOllama) -> None:
    """When Ollama ends while it fetches, the task waits until it is back, and then the fetch goes on."""
    ollama.pull_part_s = 30.0
    start()
    client.publish(f"{N}/task/door/1", {"prompt": "hello", "model": "far"})
    wait_until(lambda: ollama.asked("/api/pull"))
    ollama.stop()
    ollama.pull_part_s = 0.0
    ollama.start()
    assert client.result("door", "1", timeout_s=30)["state"] == "succeeded"


def test_a_stop_during_a_fetch(start: Start, client: Watcher, ollama: FakeOllama) -> None:
    """A daemon that is stopped while a model is fetched ends in time, and does the task after its next start."""
    ollama.pull_part_s = 30.0
    daemon = start()
    client.publish(f"{N}/task/door/1", {"prompt": "hello", "model": "far"})
    wait_until(lambda: ollama.asked("/api/pull"))
    assert daemon.stop() == 0
    ollama.pull_part_s = 0.0
    daemon.start()
    assert client.result("door", "1", timeout_s=20)["state"] == "succeeded"
