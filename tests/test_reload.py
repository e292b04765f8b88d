"""SIGHUP: with a changed config the daemon starts anew, and loses nothing; a wrong config changes nothing."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_daemon import preflight
from edge_daemon.config import Config
from edge_daemon.main import Daemon
from edge_daemon.messages import Submission, Task
from tests.conftest import NewMosquitto
from tests.daemon import NODE, DaemonProcess, N, Watcher
from tests.fake_ollama import FakeModel, FakeOllama
from tests.manager import Manager
from tests.mosquitto import Mosquitto
from tests.waiting import wait_until

WORDS = " ".join(f"word{n}" for n in range(60))
NewDaemon = Callable[..., DaemonProcess]


@pytest.fixture
def ollama() -> Iterator[FakeOllama]:
    """A model that answers at once, one that takes three seconds, and one that takes as long to load."""
    with FakeOllama(
        FakeModel("small", size_bytes=1_000_000),
        FakeModel("other", size_bytes=1_000_000, answer="other"),
        FakeModel("slow", size_bytes=1_000_000, token_s=0.05, answer=WORDS),
        FakeModel("heavy", size_bytes=1_000_000, load_s=3.0),
    ) as server:
        yield server


@pytest.fixture
def broker(new_mosquitto: NewMosquitto) -> Mosquitto:
    """A broker of one's own."""
    return new_mosquitto()


@pytest.fixture
def manager() -> Iterator[Manager]:
    """A systemd that listens."""
    made = Manager()
    yield made
    made.close()


@pytest.fixture
def new_daemon(tmp_path: Path, broker: Mosquitto, ollama: FakeOllama, manager: Manager) -> Iterator[NewDaemon]:
    """A daemon under a systemd that listens."""
    daemons: list[DaemonProcess] = []

    def new(**settings: Any) -> DaemonProcess:
        env = {"NOTIFY_SOCKET": manager.address}
        daemons.append(DaemonProcess(tmp_path, broker, ollama_url=ollama.url, env=env, **settings))
        return daemons[-1]

    yield new
    for daemon in daemons:
        daemon.kill()
        print(daemon.log())


def reload(daemon: DaemonProcess, **settings: Any) -> None:
    """Change the config, have it read, and return once the new start has the broker's subscriptions."""
    before = daemon.subscriptions()
    daemon.configure(**settings)
    daemon.signal(signal.SIGHUP)
    daemon.wait_ready(before)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_task_in_mid_generation_goes_on(
    new_daemon: NewDaemon, broker: Mosquitto, manager: Manager, protocol: str
) -> None:
    """The running task is continued in the same process, with its whole text, and nobody is told that we were gone."""
    daemon = new_daemon(mqtt={"protocol": protocol})
    with Watcher(broker) as client, daemon:
        pid = daemon.pid
        client.publish(f"{N}/task/held/t", {"model": "slow", "prompt": "x", "stream": True})
        client.running("held")
        client.publish(f"{N}/task/next/t", {"model": "small", "prompt": "waits"})
        reload(daemon, log={"level": "debug"})
        client.publish(f"{N}/task/late/t", {"model": "small", "prompt": "after"})
        result = client.result("held", "t")
        assert (result["state"], result["text"], result["attempt"], result["preempted"]) == ("succeeded", WORDS, 1, 1)
        assert client.result("next", "t")["text"] == "echo: waits"
        assert client.result("late", "t")["text"] == "echo: after"
        chunks = [message.json for message in client.of("held", "stream")]
        assert "".join(chunk.get("text", "") for chunk in chunks) == WORDS
        assert [chunk["seq"] for chunk in chunks] == sorted({chunk["seq"] for chunk in chunks})
        told = [message.text for message in client.messages if message.topic == f"{N}/availability"]
        states = {message.json["state"] for message in client.messages if message.topic == f"{N}/state"}
        assert set(told) == {"online"}
        assert states <= {"ready"}
        assert daemon.pid == pid
        assert daemon.is_alive()
        assert manager.times("RELOADING=1\nMONOTONIC_USEC=") == 1
        assert manager.times("READY=1") == 2
        assert manager.times("STOPPING=1") == 0


def test_tasks_sent_meanwhile_are_answered(new_daemon: NewDaemon, broker: Mosquitto) -> None:
    """While tasks keep coming, three reloads lose none of them, and none is run twice."""
    daemon = new_daemon()
    with Watcher(broker) as client, daemon:
        for turn in range(3):
            for n in range(40):
                client.publish(f"{N}/task/flood/{turn}-{n}", {"model": "small", "prompt": "x"})
            reload(daemon, queue={"max_tasks": 1000 + turn})
        wait_until(lambda: len({m.topic for m in client.of("flood", "result")}) == 120, timeout_s=30)
        assert {m.json["state"] for m in client.of("flood", "result")} == {"succeeded"}
        assert daemon.stop() == 0
    assert len({row["task_id"] for row in daemon.rows("task")}) == len(daemon.rows("task")) == 120


def test_models_stay_loaded(new_daemon: NewDaemon, broker: Mosquitto, ollama: FakeOllama) -> None:
    """A reload costs no load: the model is in Ollama before and after it."""
    daemon = new_daemon()
    with Watcher(broker) as client, daemon:
        client.publish(f"{N}/task/a/1", "x")
        client.result("a", "1")
        reload(daemon, log={"level": "debug"})
        client.publish(f"{N}/task/a/2", "x")
        client.result("a", "2")
        assert daemon.stop() == 0
    assert [row["status"] for row in daemon.rows("model")] == ["loaded", "unloaded"]


def test_changed_keys_are_in_force(new_daemon: NewDaemon, broker: Mosquitto) -> None:
    """Whatever is changed counts after the reload: the log level, a limit of the queue, the default model, the node."""
    daemon = new_daemon(telemetry={"interval_s": 3600})
    with Watcher(broker) as client, daemon:
        assert "debug" not in daemon.log()
        queue = {"max_tasks": 1, "urgent_reserve": 0}
        reload(daemon, log={"level": "debug"}, queue=queue, models={"default": "other"})
        assert (
            "reloading, for a change of models.default, queue.max_tasks, queue.urgent_reserve, log.level"
            in daemon.log()
        )
        client.wait_for(lambda m: m.topic == f"{N}/info" and m.json["limits"]["tasks"] == 1)
        client.publish(f"{N}/task/a/1", "x")
        assert client.result("a", "1")["text"] == "other"
        client.publish(f"{N}/task/a/2", {"model": "slow", "prompt": "x", "stream": True})
        client.running("a")
        client.publish(f"{N}/task/a/3", "x")
        assert client.result("a", "3")["error"]["code"] == "queue_full"
        wait_until(lambda: " debug " in daemon.log())
        event = client.wait_for_topic(f"{N}/event/config_changed").json
        assert "log.level" in event["data"]["keys"]


WRONG = {
    "queue: {max_taks: 5}": "queue.max_taks",
    "queue: {max_tasks: 0}": "queue.max_tasks",
    "mqtt: {tls: {enabled: true, ca_file: /nowhere/ca.pem}}": "mqtt.tls.ca_file",
    "mqtt: {username: u, password_file: /nowhere/password}": "mqtt.password_file",
    "data_dir: /proc/none": "data_dir",
    "csv: {path: /nowhere/log.csv}": "csv.path",
    "\t": "line 1",
}


def test_a_wrong_config_is_kept_out(new_daemon: NewDaemon, broker: Mosquitto, manager: Manager) -> None:
    """A config that a start would refuse, or fail with, changes nothing; a line and the status name the key."""
    daemon = new_daemon()
    with Watcher(broker) as client, daemon:
        client.publish(f"{N}/task/held/t", {"model": "slow", "prompt": "x", "stream": True})
        client.running("held")
        connections = daemon.connections()
        wrong = {**WRONG, f"http: {{enabled: true, port: {broker.port}}}": "http.port"}
        for count, (text, key) in enumerate(wrong.items(), 1):
            daemon.write_config(text)
            daemon.signal(signal.SIGHUP)
            manager.wait("READY=1", count + 1)
            assert key in manager.status()
        lines = [line for line in daemon.log().splitlines() if "not reloaded" in line]
        assert len(lines) == len(wrong)
        assert all(key in line for key, line in zip(wrong.values(), lines, strict=True))
        assert lines[-1].endswith("--http-port")  # a taken port is told as at a start
        assert client.wait_for_topic(f"{N}/event/config_rejected").json["severity"] == "error"
        result = client.result("held", "t")
        assert (result["state"], result["preempted"], daemon.connections()) == ("succeeded", 0, connections)
        daemon.configure()
        daemon.signal(signal.SIGHUP)
        manager.wait("READY=1", len(wrong) + 2)
        assert "not in force" not in manager.status()
        assert "has not changed: nothing to reload" in daemon.log()
        assert manager.times("RELOADING=1") == len(wrong) + 1
        assert daemon.connections() == connections


def test_a_new_password_is_a_change(new_daemon: NewDaemon, tmp_path: Path) -> None:
    """The password is read again, although it is not in the config itself."""
    secret = tmp_path / "password"
    secret.write_text("old", encoding="utf-8")
    secret.chmod(0o600)
    daemon = new_daemon(mqtt={"username": "u", "password_file": str(secret)})
    with daemon:
        secret.write_text("new", encoding="utf-8")
        reload(daemon)
        assert "reloading, for a change of a password or token" in daemon.log()


def test_a_directory_in_use_is_kept_out(new_daemon: NewDaemon, tmp_path: Path, manager: Manager) -> None:
    """A data directory that another daemon has locked is refused before anything is given up."""
    taken = tmp_path / "taken"
    taken.mkdir()
    handle = preflight.lock(taken)
    with new_daemon() as daemon:
        daemon.configure(data_dir=str(taken))
        daemon.signal(signal.SIGHUP)
        manager.wait("READY=1", 2)
        assert "is in use by another edge-llm" in manager.status()
    os.close(handle)


def test_signals_in_quick_succession(new_daemon: NewDaemon, broker: Mosquitto, ollama: FakeOllama) -> None:
    """SIGHUP again and again, also while a model loads, harms nothing; a SIGTERM during a reload is not lost."""
    daemon = new_daemon()
    with Watcher(broker) as client, daemon:
        client.publish(f"{N}/task/a/1", {"model": "heavy", "prompt": "x"})
        wait_until(lambda: ollama.asked("/api/generate", model="heavy"))
        daemon.configure(log={"level": "debug"})
        for _ in range(3):
            daemon.signal(signal.SIGHUP)
        wait_until(lambda: "reloading, for" in daemon.log(), timeout_s=20)
        result = client.result("a", "1", timeout_s=20)
        assert (result["state"], result["attempt"]) == ("succeeded", 1)
        daemon.configure(log={"level": "info"})
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: daemon.log().count("reloading, for") == 2)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        client.wait_for(lambda m: m.topic == f"{N}/availability" and m.text == "offline")


def test_sighup_while_it_stops(new_daemon: NewDaemon, broker: Mosquitto) -> None:
    """A SIGHUP while the last task is being finished neither hurries nor stops the stop."""
    daemon = new_daemon()
    with Watcher(broker) as client, daemon:
        client.publish(f"{N}/task/a/1", {"model": "slow", "prompt": "x", "stream": True})
        client.running("a")
        daemon.configure(log={"level": "debug"})
        daemon.signal(signal.SIGTERM)
        client.wait_for(lambda m: m.topic == f"{N}/state" and m.json["state"] == "draining")
        daemon.signal(signal.SIGHUP)
        assert daemon.wait() == 0
        result = client.result("a", "1")
        assert (result["state"], result["preempted"]) == ("succeeded", 0)


def test_sighup_while_it_starts(new_daemon: NewDaemon, manager: Manager) -> None:
    """A SIGHUP before the daemon is ready is answered afterwards."""
    daemon = new_daemon()
    daemon.start(ready=False)
    wait_until(lambda: _blocks_sighup(daemon.pid))
    daemon.signal(signal.SIGHUP)
    manager.wait("READY=1", 2)
    assert "nothing to reload" in daemon.log()
    assert daemon.stop() == 0


def _blocks_sighup(pid: int) -> bool:
    """Whether SIGHUP waits until it is asked for: the first thing that the daemon sees to."""
    if b"edge_daemon" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        return False  # it is not yet the daemon, but the copy of us that becomes it
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    blocked = next(line for line in status.splitlines() if line.startswith("SigBlk"))
    return bool(int(blocked.split()[1], 16) & 1 << (signal.SIGHUP - 1))


def test_a_queue_that_is_left_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another data directory begins with an empty queue; what stays in the old one is told."""
    config = Config(node=NODE, data_dir=tmp_path / "old")
    daemon = Daemon(config, reread=lambda: replace(config, data_dir=tmp_path / "new"))
    text = {"id": "t", "src": "a", "prompt": "x", "model": "small:latest"}
    task = Task.from_dict({**text, "ttl_s": 60.0, "received_at": 0.0, "max_tokens": 1, "prompt_tokens": 1})
    daemon.store.add_many([Submission(task=task)])
    assert daemon._is_to_start_anew()
    assert f"1 tasks and answers stay in {tmp_path / 'old'}" in caplog.text
    daemon.store.close()


def test_embedded_is_not_reloaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a broker and models that would end with it, the daemon refuses to start anew and says what to do."""
    daemon = Daemon(Config(node=NODE, data_dir=tmp_path))
    assert not daemon._is_to_start_anew()
    assert "not reloaded" in caplog.text
    assert "--embedded" in caplog.text
    daemon.store.close()
