"""What can happen to the broker and on the way to it, to the whole daemon (F12 to F17); more in test_bridge.py."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NewMosquitto
from tests.daemon import NODE, DaemonProcess, N, Watcher
from tests.fake_ollama import FakeModel, FakeOllama
from tests.faults.bench import BROKER, Bench, models
from tests.faults.oracle import growth, usage
from tests.mosquitto import Mosquitto
from tests.mqtt_client import MqttClient
from tests.relay import Relay
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

NewDaemon = Callable[..., DaemonProcess]


@pytest.fixture(params=["5", "3.1.1"])
def protocol(request: pytest.FixtureRequest) -> str:
    """Both versions of MQTT."""
    version: str = request.param
    return version


@pytest.fixture
def new_daemon(tmp_path: Path) -> Iterator[NewDaemon]:
    """Daemons with a model server of their own; takes a broker and the settings of `DaemonProcess`."""
    daemons: list[DaemonProcess] = []
    with FakeOllama(FakeModel("small", size_bytes=10**6)) as ollama:

        def new(broker: Mosquitto, **settings: Any) -> DaemonProcess:
            daemons.append(DaemonProcess(tmp_path, broker, ollama_url=ollama.url, **settings))
            return daemons[-1]

        yield new
        for daemon in daemons:
            daemon.kill()
            print(daemon.log())


def told(daemon: DaemonProcess, event: str) -> int:
    """How often an event is in the log of the daemon."""
    return sum(row["task_type"] == event for row in daemon.rows("event"))


@pytest.mark.parametrize("persistence", [True, False])
def test_a_broker_that_is_killed(new_mosquitto: NewMosquitto, tmp_path: Path, *, persistence: bool) -> None:
    """F12: a broker is killed three times while tasks flow; the daemon is there again each time, and loses nothing."""
    broker = new_mosquitto(persistence=persistence, extra=BROKER if persistence else "")
    with Bench(tmp_path, seed=12, broker=broker) as bench:
        bench.broker_may_lose = True  # even with persistence: a PUBACK goes out a moment before the file is written
        bench.daemon.start()
        with bench.traffic.flowing(per_s=20):
            for _ in range(3):
                ended = len(bench.daemon.rows("task"))
                wait_until(lambda ended=ended: len(bench.daemon.rows("task")) > ended + 5)  # type: ignore[misc]
                before = bench.daemon.subscriptions()
                broker.kill()
                broker.start()
                bench.daemon.wait_ready(before)
        assert bench.verdict() == []
        assert told(bench.daemon, "broker_lost") >= 3
        assert (told(bench.daemon, "session_lost") > 0) is not persistence


def test_a_broker_that_is_absent_at_boot(new_mosquitto: NewMosquitto, tmp_path: Path) -> None:
    """F14: without a broker, stored tasks are done all the same, with one line about it; their results come later."""
    broker = new_mosquitto(persistence=True, extra=BROKER)
    ollama = FakeOllama(*models())
    with ollama, Bench(tmp_path, seed=14, broker=broker, fake=ollama) as bench:
        ollama.stop()
        bench.daemon.start()
        bench.traffic.send(20, form="topic")
        wait_until(lambda: len(bench.recorder.open()) == 20)
        bench.daemon.kill()
        broker.stop()
        ollama.start()
        before = len(bench.daemon.log())
        bench.daemon.start(ready=False)
        wait_until(lambda: len(bench.daemon.rows("task")) == 20, timeout_s=30)
        lines = [line for line in bench.daemon.log()[before:].splitlines() if "mqtt_bridge" in line]
        broker.start()
        assert bench.verdict() == []
    assert len(lines) == 1
    assert "refused" in lines[0]


def test_a_broker_that_falls_silent(new_mosquitto: NewMosquitto, tmp_path: Path) -> None:
    """F13: a broker that is stopped without closing its connections is noticed; afterwards all results come."""
    broker = new_mosquitto(persistence=True, extra=BROKER)
    with Bench(tmp_path, seed=13, broker=broker, mqtt={"keepalive_s": 5}) as bench:
        bench.daemon.start()
        bench.traffic.send(40)
        with broker.frozen():
            wait_until(lambda: told(bench.daemon, "broker_lost"), timeout_s=30)
        assert bench.verdict() == []
        lost = next(row for row in bench.daemon.rows("event") if row["task_type"] == "broker_lost")
    assert "Keep alive timeout" in lost["result"]


def test_another_client_with_the_daemons_id(new_mosquitto: NewMosquitto, tmp_path: Path) -> None:
    """F15: a client with the daemon's id ends its connections for a while: one clear line, and a recovery after it."""
    broker = new_mosquitto(persistence=True, extra=BROKER)
    with Bench(tmp_path, seed=15, broker=broker) as bench:
        bench.broker_may_lose = True  # the other one takes the session, and what is in it
        bench.daemon.start()
        with MqttClient(broker.host, broker.port, client_id=f"edge-llm-{NODE}"):
            wait_until(lambda: told(bench.daemon, "connections_do_not_last"), timeout_s=30)
        subscribed = f"Sending SUBACK to edge-llm-{NODE}\n"  # which the other one never does
        wait_until(lambda: subscribed in broker.log().rpartition(f" as edge-llm-{NODE} (")[2], timeout_s=20)
        bench.traffic.send(5)
        assert bench.verdict() == []
    lines = [line for line in bench.daemon.log().splitlines() if "does another client use the id" in line]
    assert len(lines) == 1
    assert len([line for line in bench.daemon.log().splitlines() if "mqtt_bridge" in line]) < 30


def test_a_wrong_password_that_is_put_right(
    new_mosquitto: NewMosquitto, new_daemon: NewDaemon, tmp_path: Path, protocol: str
) -> None:
    """F16: with a wrong password the daemon says so once and waits; with the right one and SIGHUP it serves."""
    broker = new_mosquitto(users={"edge": "the right one", "watcher": "w"})
    file = tmp_path / "password"
    file.touch(mode=0o600)
    file.write_text("a wrong one", encoding="utf-8")
    daemon = new_daemon(broker, mqtt={"username": "edge", "password_file": str(file), "protocol": protocol})
    daemon.start(ready=False)
    refused = "Not authorized" if protocol == "5" else "not authorized"
    wait_until(lambda: refused.lower() in daemon.log().lower())
    wait_until(lambda: broker.log().count("not authorised") >= 2)
    lines = [line for line in daemon.log().splitlines() if "mqtt_bridge" in line]
    file.write_text("the right one", encoding="utf-8")
    daemon.signal(signal.SIGHUP)
    daemon.wait_ready()
    with Watcher(broker, username="watcher", password="w") as client:
        client.publish(f"{N}/task/door/1", "x")
        assert client.result("door", "1")["state"] == "succeeded"
    assert len(lines) == 1
    assert "one" not in {word for word in daemon.log().split() if word in ("one", "wrong", "right")}


def test_one_topic_that_is_refused(new_mosquitto: NewMosquitto, new_daemon: NewDaemon, protocol: str) -> None:
    """F16: answers that the broker's rights refuse hold up nobody else, and come when they are asked for again.

    On MQTT 5 the refusal is told; on 3.1.1 nobody can know of it.
    """
    broker = new_mosquitto(acl=f"topic readwrite #\ntopic deny {N}/reply/door/#\n")
    daemon = new_daemon(broker, mqtt={"protocol": protocol})
    with Watcher(broker) as client, daemon:
        client.publish(f"{N}/task/door/1", "refused")
        client.publish(f"{N}/task/window/1", "allowed")
        assert client.result("window", "1")["state"] == "succeeded"
        wait_until(lambda: len(daemon.rows("task")) == 2)
        if protocol == "5":
            wait_until(lambda: told(daemon, "poison_result"))
        broker.set_acl("topic readwrite #\n")
        client.publish(f"{N}/task/door/1", "refused")
        assert client.result("door", "1")["text"] == "echo: refused"
        assert daemon.connections() == 1
        assert daemon.stop() == 0
    assert [row.sent for row in daemon.stored()] == [1, 1]
    is_told = "a message on edge-llm/n/reply/door/1/status is not sent: refused by the broker: Not authorized"
    assert (is_told in daemon.log()) is (protocol == "5")
    assert told(daemon, "poison_result") == (protocol == "5")


def test_what_was_set_aside_comes_after_the_next_start(new_mosquitto: NewMosquitto, new_daemon: NewDaemon) -> None:
    """F16: an answer that the broker's rights refuse is sent once more when the daemon starts again."""
    broker = new_mosquitto(acl=f"topic readwrite #\ntopic deny {N}/reply/door/#\n")
    daemon = new_daemon(broker)
    with Watcher(broker) as client:
        with daemon:
            client.publish(f"{N}/task/door/1", "refused")
            wait_until(lambda: told(daemon, "poison_result"))
            assert daemon.stop() == 0
        broker.set_acl("topic readwrite #\n")
        with daemon:
            assert client.result("door", "1")["text"] == "echo: refused"
            assert daemon.stop() == 0
    assert [row.sent for row in daemon.stored()] == [1]


def test_a_subscriber_that_does_not_listen(new_mosquitto: NewMosquitto, new_daemon: NewDaemon) -> None:
    """F17: one subscriber is away, another does not read; the daemon does not grow, and both get every result later."""
    broker = new_mosquitto(extra="max_queued_messages 100000")
    away = {"client_id": "away", "session_s": 600}
    with Watcher(broker, **away):
        pass
    with (
        Relay(broker.port) as relay,
        MqttClient(broker.host, relay.port) as deaf,
        MqttClient(broker.host, broker.port) as door,
        new_daemon(broker) as daemon,
    ):
        deaf.subscribe(f"{N}/reply/+/+/result")
        relay.hold_incoming()
        for number in range(400):
            door.publish(f"{N}/task/door/{number}", "x" * 2000)
            if number == 100:
                wait_until(lambda: len(daemon.rows("task")) == 101, timeout_s=30)
                before = usage(daemon.pid)
        wait_until(lambda: len(daemon.rows("task")) == 400, timeout_s=60)
        after = usage(daemon.pid)
        relay.release()
        with Watcher(broker, **away) as back:
            wait_until(lambda: len(back.of("door", "result")) == 400, timeout_s=30)
        wait_until(lambda: len(deaf.messages) == 400, timeout_s=30)
    assert growth(before, after) == []
