"""The whole daemon as a process, on a real mosquitto and a model server that can be made to fail, in both MQTTs."""

import json
import math
import resource
import signal
import subprocess
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_daemon.config import Config, Models, ModelSettings, load
from edge_daemon.embedded import start_broker
from edge_daemon.main import BUSY_LOOK_S, GOODBYE_S, IDLE_LOOK_S, SILENCE_S, Daemon, _Ending, _Pulse
from edge_daemon.steps import CRASH_STATUS
from tests import needs
from tests.conftest import NewMosquitto
from tests.daemon import NODE, DaemonProcess, N, Watcher
from tests.fake_ollama import FakeModel, FakeOllama
from tests.fakes import FakeClock
from tests.mosquitto import Mosquitto
from tests.mqtt_client import V311
from tests.relay import Relay
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

VERSIONS = ["5", "3.1.1"]
SMALL = 10**6
SLOW_WORDS = 30
TERMINAL = {"succeeded", "failed", "timed_out", "cancelled", "expired", "rejected"}

NewDaemon = Callable[..., DaemonProcess]


def model_server() -> FakeOllama:
    """Models that answer at once, in a second and a half, and in nine, unless they are told to hurry."""
    words = " ".join(f"word{n}" for n in range(SLOW_WORDS))
    return FakeOllama(
        FakeModel("small", size_bytes=SMALL),
        FakeModel("smollm2:135m", size_bytes=SMALL, answer="4"),
        FakeModel("slow", size_bytes=SMALL, token_s=0.05, answer=words),
        FakeModel("slower", size_bytes=SMALL, token_s=0.3, answer=words),
    )


@dataclass(frozen=True, kw_only=True)
class Lab:
    """What most tests share: a broker, a model server and a daemon that nobody may stop."""

    protocol: str
    broker: Mosquitto
    ollama: FakeOllama
    daemon: DaemonProcess
    client: Watcher


@pytest.fixture(scope="module", params=VERSIONS)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One laboratory for each version of MQTT."""
    directory = tmp_path_factory.mktemp("lab")
    broker = Mosquitto(directory)
    broker.start()
    try:
        with (
            model_server() as ollama,
            DaemonProcess(directory, broker, ollama_url=ollama.url, mqtt={"protocol": request.param}) as daemon,
            Watcher(broker) as client,
        ):
            yield Lab(protocol=request.param, broker=broker, ollama=ollama, daemon=daemon, client=client)
    finally:
        broker.kill()


@pytest.fixture(params=VERSIONS)
def protocol(request: pytest.FixtureRequest) -> str:
    """Both versions of MQTT, for tests with a daemon of their own."""
    version: str = request.param
    return version


@pytest.fixture
def ollama() -> Iterator[FakeOllama]:
    """A model server of one's own."""
    with model_server() as server:
        yield server


@pytest.fixture
def broker(new_mosquitto: NewMosquitto) -> Mosquitto:
    """A broker of one's own that remembers everything over a stop."""
    return new_mosquitto(persistence=True, extra="max_queued_messages 0")


@pytest.fixture
def new_daemon(tmp_path: Path, broker: Mosquitto, ollama: FakeOllama) -> Iterator[NewDaemon]:
    """Daemons of one's own, to stop and kill; takes the settings of `DaemonProcess`."""
    daemons: list[DaemonProcess] = []

    def new(protocol: str = "auto", **settings: Any) -> DaemonProcess:
        settings["mqtt"] = {"protocol": protocol, **settings.get("mqtt", {})}
        daemon = DaemonProcess(tmp_path, broker, ollama_url=ollama.url, **settings)
        daemons.append(daemon)
        return daemon

    yield new
    for daemon in daemons:
        daemon.kill()
        print(daemon.log())


@pytest.fixture
def src(request: pytest.FixtureRequest) -> str:
    """A sender's name of the test's own."""
    test_id: str = request.node.nodeid
    return f"src-{zlib.crc32(test_id.encode()):08x}"


# -- tasks in, answers out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", ["{src}", "{src}/evt-42"])
def test_plain_text_is_answered_in_plain_text(lab: Lab, src: str, topic: str) -> None:
    """Plain text gets queued with its position, running, one result and the bare answer; the statuses' seq rises."""
    lab.client.publish(f"{N}/task/{topic.format(src=src)}", "is 31 C hot?\n")
    text = lab.client.wait_for(lambda m: m.topic.startswith(f"{N}/reply/{src}/") and m.topic.endswith("/text"))
    result = lab.client.result(src)
    statuses = [m.json for m in lab.client.of(src, "status")]
    assert text.text == result["text"] == "echo: is 31 C hot?"
    assert [status["state"] for status in statuses] == ["queued", "running"]
    assert statuses[0]["position"] == 1
    seqs = [status["seq"] for status in statuses] + [result["seq"]]
    assert seqs == sorted(set(seqs))
    assert (result["state"], result["src"], result["attempt"]) == ("succeeded", src, 1)
    assert text.topic == f"{N}/reply/{src}/{result['id']}/text"
    if "/" in topic:
        assert result["id"] == "evt-42"
    assert len(lab.client.of(src, "result")) == 1


def test_plain_text_of_nobody(lab: Lab) -> None:
    """Plain text on the bare task topic is answered under `_`."""
    lab.client.publish(f"{N}/task", "who am I?")
    text = lab.client.wait_for(lambda m: m.topic.startswith(f"{N}/reply/_/") and m.text == "echo: who am I?")
    assert text.topic.endswith("/text")


def test_a_json_task(lab: Lab, src: str) -> None:
    """A JSON task is answered in JSON, in its topic and at its `reply_to`, with what it sent along, and not as text."""
    reply_to = f"reply/{src}"
    task = {"id": "j-1", "prompt": "hi", "priority": "high", "meta": {"room": [1, None]}, "reply_to": reply_to, "x": 1}
    lab.client.publish(f"{N}/task/{src}", task)
    result = lab.client.result(src, "j-1")
    copy = lab.client.wait_for_topic(reply_to)
    assert copy.json == result
    assert (result["state"], result["text"], result["meta"]) == ("succeeded", "echo: hi", {"room": [1, None]})
    assert lab.client.of(src, "status")[0].json["warnings"] == ["unknown field 'x'"]
    assert lab.client.of(src, "text") == []


def test_a_reading_is_a_prompt(lab: Lab, src: str) -> None:
    """A JSON object without a task's keys, such as a sensor's reading, is a prompt as it stands."""
    lab.client.publish(f"{N}/task/{src}", '{"temperature": 31.5}')
    assert lab.client.result(src)["text"] == 'echo: {"temperature": 31.5}'
    wait_until(lambda: lab.client.of(src, "text"))


def test_the_prior_system_payload(lab: Lab, src: str) -> None:
    """What devices sent to the prior system works as it is."""
    payload = '{"task_type": "arithmetic", "model_name": "smollm2:135m", "prompt": "What is 2+2?"}'
    lab.client.publish(f"{N}/task/{src}", payload)
    result = lab.client.result(src)
    assert (result["state"], result["task_type"], result["model"]) == ("succeeded", "arithmetic", "smollm2:135m")
    assert "4" in result["text"]


def test_mqtt_5_properties(lab: Lab, src: str) -> None:
    """What MQTT 5 carries beside the payload counts: fields, the form, where to answer and the correlation."""
    if lab.protocol == "3.1.1":
        pytest.skip("MQTT 3.1.1 has no properties")
    properties = {
        "ContentType": "text/plain",
        "ResponseTopic": f"reply/{src}",
        "CorrelationData": b"\x00\xff",
        "MessageExpiryInterval": 60,
        "UserProperty": [("id", "p-1"), ("model", "smollm2:135m"), ("priority", "urgent"), ("task_type", "sum")],
    }
    lab.client.publish(f"{N}/task/{src}", '{"prompt": "this is text"}', properties=properties)
    answer = lab.client.wait_for_topic(f"reply/{src}")
    result = lab.client.result(src, "p-1")
    assert answer.text == "4"
    assert answer.properties == {"ContentType": "text/plain", "CorrelationData": b"\x00\xff"}
    assert (result["task_type"], result["model"], result["state"]) == ("sum", "smollm2:135m", "succeeded")


def test_a_stream(lab: Lab, src: str) -> None:
    """A task that asks for it sees its answer come: chunks with a rising seq, then done, together the result's text."""
    lab.client.publish(f"{N}/task/{src}/s", {"prompt": "x", "model": "slow", "stream": True})
    result = lab.client.result(src, "s")
    chunks = [m.json for m in lab.client.of(src, "stream")]
    assert "".join(chunk.get("text", "") for chunk in chunks) == result["text"]
    assert [chunk["seq"] for chunk in chunks] == list(range(1, len(chunks) + 1))
    assert len(chunks) >= 3
    assert chunks[-1].get("done")


def test_a_repeated_id(lab: Lab, src: str) -> None:
    """A task sent again is answered again from the store, with the same seq, and not run again."""
    lab.client.publish(f"{N}/task/{src}/r", f"repeat {src}")
    first = lab.client.result(src, "r")
    lab.client.publish(f"{N}/task/{src}/r", f"repeat {src}")
    wait_until(lambda: len(lab.client.of(src, "result")) == 2)
    assert [m.json for m in lab.client.of(src, "result")] == [first, first]
    assert lab.client.of(src, "status")[-1].json["duplicate"]
    assert asked(lab.ollama, f"repeat {src}") == 1


def test_cancel(lab: Lab, src: str) -> None:
    """A running and a waiting task end when they are cancelled; the text so far is kept."""
    lab.client.publish(f"{N}/task/{src}/running", {"prompt": "x", "model": "slow", "stream": True})
    lab.client.publish(f"{N}/task/{src}/waiting", {"prompt": "x", "model": "slow"})
    lab.client.running(src)
    lab.client.publish(f"{N}/cancel/{src}/waiting")
    assert lab.client.result(src, "waiting")["state"] == "cancelled"
    lab.client.publish(f"{N}/cancel", "running")
    cancelled = lab.client.result(src, "running")
    assert cancelled["state"] == "cancelled"
    assert cancelled["text"].startswith("word0")


def test_expiry_while_another_task_runs(lab: Lab, src: str) -> None:
    """A waiting task ends when its time is over, although the worker has its hands full."""
    if lab.protocol == "3.1.1":
        pytest.skip("not about the protocol")
    lab.client.publish(f"{N}/task/{src}/running", {"prompt": "x", "model": "slower"})
    wait_until(lambda: [m.json["state"] for m in lab.client.of(src, "status")][1:] == ["running"])
    lab.client.publish(f"{N}/task/{src}/expiring", "x", properties={"MessageExpiryInterval": 1})
    assert lab.client.result(src, "expiring")["state"] == "expired"
    wait_until(lambda: [m.text for m in lab.client.of(src, "text")] == ["error: expired"])
    lab.client.publish(f"{N}/cancel/{src}/running")
    assert lab.client.result(src, "running")["state"] == "cancelled"


@pytest.mark.parametrize("version", ["5", "311"])
def test_mosquitto_pub(lab: Lab, src: str, version: str) -> None:
    """The command that a user types gets its bare answer."""
    publish(lab, "-V", version, "-t", f"{N}/task/{src}", "-m", "What is 2+2?")
    text = lab.client.wait_for(lambda m: m.topic.startswith(f"{N}/reply/{src}/") and m.topic.endswith("/text"))
    assert text.text == "echo: What is 2+2?"


def test_mosquitto_rr(lab: Lab, src: str) -> None:
    """`mosquitto_rr` prints the answer, on a broker that lets the daemon see its response topic."""
    if lab.protocol == "3.1.1":
        pytest.skip("MQTT 3.1.1 has no response topic")
    answer = subprocess.run(
        [
            *(needs.tool("mosquitto_rr", package="mosquitto-clients"), "-V", "5", "-q", "1"),
            *("-h", lab.broker.host, "-p", str(lab.broker.port), "-t", f"{N}/task", "-e", f"reply/{src}"),
            *("-m", "What is 2+2?", "-W", "10"),
        ],
        capture_output=True,
        timeout=15,
        check=True,
    )
    assert answer.stdout == b"echo: What is 2+2?\n"


def publish(lab: Lab, *arguments: str) -> None:
    """Run `mosquitto_pub` at QoS 1."""
    command = [needs.tool("mosquitto_pub", package="mosquitto-clients"), "-q", "1"]
    subprocess.run([*command, "-h", lab.broker.host, "-p", str(lab.broker.port), *arguments], check=True, timeout=10)


def asked(ollama: FakeOllama, prompt: str) -> int:
    """How often a generation was asked for with this prompt."""
    return sum(prompt in json.dumps(seen.body) for seen in ollama.asked("/api/chat"))


# -- bad input; all the rest of it is in tests/faults/test_bad_input.py ------------------------------------------------


def test_another_task_under_a_used_id(lab: Lab, src: str) -> None:
    """A used id with other content is refused under that id, and the first task keeps its answer."""
    lab.client.publish(f"{N}/task/{src}/d", "the first")
    first = lab.client.result(src, "d")
    lab.client.publish(f"{N}/task/{src}/d", "another")
    wait_until(lambda: len(lab.client.of(src, "result")) == 2)
    second = lab.client.of(src, "result")[1].json
    assert (second["state"], second["error"]["code"]) == ("rejected", "duplicate_conflict")
    lab.client.publish(f"{N}/task/{src}/d", "the first")
    wait_until(lambda: len(lab.client.of(src, "result")) == 3)
    assert lab.client.of(src, "result")[2].json == first


def test_a_retained_task_on_mqtt_5(lab: Lab, src: str) -> None:
    """On MQTT 5 a task with the retain flag is refused while it is live."""
    if lab.protocol == "3.1.1":
        pytest.skip("MQTT 3.1.1 shows the flag on a replay only")
    lab.client.publish(f"{N}/task/{src}/kept", "again and again", retain=True)
    result = lab.client.result(src, "kept")
    lab.client.publish(f"{N}/task/{src}/kept", b"", retain=True)
    lab.client.publish(f"{N}/task/{src}/good", "a good one")
    assert lab.client.result(src, "good")["state"] == "succeeded"
    assert (result["state"], result["error"]["code"]) == ("rejected", "retained")
    assert len(lab.client.of(src, "result")) == 2


def test_a_retained_task_on_mqtt_3(new_daemon: NewDaemon, broker: Mosquitto, ollama: FakeOllama) -> None:
    """On MQTT 3.1.1 a retained task is run when it is sent, and refused when it is replayed, as often as that is."""
    daemon = new_daemon("3.1.1")
    with Watcher(broker) as client, daemon:
        client.publish(f"{N}/task/door", "again and again", retain=True)
        assert client.result("door")["state"] == "succeeded"
        client.publish(f"{N}/task/door/id", "with an id", retain=True)
        assert client.result("door", "id")["state"] == "succeeded"
        daemon.restart()
        client.publish(f"{N}/task/other/good", "good")
        assert client.result("other", "good")["state"] == "succeeded"
        wait_until(lambda: any(m.json["state"] == "rejected" for m in client.of("door", "result")))
    # The result before the kill may come twice, as it was.
    results = {m.json["id"]: m.json["error"] and m.json["error"]["code"] for m in client.of("door", "result")}
    assert list(results.values()) == [None, None, "retained"]
    assert asked(ollama, "again and again") == asked(ollama, "with an id") == 1


# -- what is told about the node -------------------------------------------------------------------------------------


def test_what_a_late_subscriber_sees(lab: Lab) -> None:
    """Who comes late sees from the retained topics that the node is there, what it is, has and does."""
    lab.client.publish(f"{N}/task/late/1", "something")
    lab.client.result("late", "1")
    with Watcher(lab.broker) as late:
        kept = {
            name: late.wait_for_topic(f"{N}/{name}") for name in ("availability", "state", "info", "models", "queue")
        }
    assert all(message.retain and message.qos == 1 for message in kept.values())
    assert kept["availability"].text == "online"
    state = kept["state"].json
    assert (state.keys(), state["state"], state["reason"]) == ({"state", "since", "reason"}, "ready", "")
    info = kept["info"].json
    assert (info["api"], info["node"], info["mqtt"]) == (1, NODE, lab.protocol)
    assert {"version", "host", "boot", "started", "limits"} <= info.keys()
    assert info["limits"]["payload_bytes"] == 262_144
    models = kept["models"].json
    assert {"slow:latest", "slower:latest", "small:latest", "smollm2:135m"} == set(models["available"])
    assert "small:latest" in [model["name"] for model in models["models"] if model["residency"] == "resident"]
    assert models["budget_bytes"] > models["resident_bytes"] > 0
    assert set(kept["queue"].json["waiting"]) == {"urgent", "high", "normal", "low"}


def test_telemetry(lab: Lab) -> None:
    """Samples come at every interval, not retained, with a rising seq and every part of the board."""
    topic = f"{N}/telemetry"
    wait_until(lambda: len([m for m in lab.client.messages if m.topic == topic]) >= 2)
    first, second, *_ = [m for m in lab.client.messages if m.topic == topic]
    assert (first.qos, first.retain) == (0, False)
    assert second.json["seq"] == first.json["seq"] + 1
    parts = {"cpu", "memory", "load", "temperature_c", "throttling", "disk", "network", "ollama", "daemon"}
    assert parts | {"seq", "ts", "boot", "clock_synced"} == second.json.keys()
    assert second.json["ollama"]["reachable"]
    assert second.json["ollama"]["version"] == "0.33.0"
    assert second.json["memory"]["available_bytes"] > 0
    assert {"rss_bytes", "cpu_s", "queue_depth", "outbox"} <= second.json["daemon"].keys()


def test_events(lab: Lab) -> None:
    """A load is told as an event with its reason and its time."""
    lab.client.publish(f"{N}/task/events/1", {"prompt": "x", "model": "smollm2:135m"})
    lab.client.result("events", "1")
    event = lab.client.wait_for(lambda m: m.topic == f"{N}/event/model_loaded" and b"smollm2" in m.payload)
    assert not event.retain
    assert event.json.keys() == {"type", "ts", "severity", "data"}
    assert event.json["data"]["reason"]
    assert event.json["data"]["seconds"] >= 0


def test_the_state_follows_ollama(new_daemon: NewDaemon, broker: Mosquitto, ollama: FakeOllama) -> None:
    """Without Ollama the state is degraded with a reason, tasks wait; with it again it is ready, they are answered."""
    ollama.stop()
    with Watcher(broker) as client, new_daemon():
        client.wait_for(lambda m: m.topic == f"{N}/state" and m.json["state"] == "degraded" and "Ollama" in m.text)
        client.publish(f"{N}/task/door/1", "wait for it")
        client.wait_for_topic(f"{N}/reply/door/1/status")
        ollama.start()
        assert client.result("door", "1", timeout_s=20)["state"] == "succeeded"
        client.wait_for(lambda m: m.topic == f"{N}/state" and m.json["state"] == "ready")


# -- failure ---------------------------------------------------------------------------------------------------------


def test_killed_in_mid_generation(new_daemon: NewDaemon, broker: Mosquitto, ollama: FakeOllama, protocol: str) -> None:
    """A task whose daemon is killed while it runs is run again after the start and ends once, at the second attempt."""
    daemon = new_daemon(protocol)
    with Watcher(broker) as client, daemon:
        client.publish(f"{N}/task/door/1", {"prompt": "x", "model": "slower", "stream": True})
        client.running("door")
        daemon.kill()
        ollama["slower"].token_s = 0.0
        daemon.start()
        result = client.result("door", "1")
        client.publish(f"{N}/task/door/2", "next")
        client.result("door", "2")
        assert daemon.stop() == 0
    assert (result["state"], result["attempt"]) == ("succeeded", 2)
    assert result["text"].endswith(f"word{SLOW_WORDS - 1}")
    assert len([m for m in client.of("door", "result") if m.json["id"] == "1"]) == 1
    seqs = [m.json["seq"] for m in client.of("door", "status") if m.json["id"] == "1"]
    assert seqs == sorted(set(seqs))
    assert result["seq"] > seqs[-1]
    assert [(row.id, row.state, row.attempt, row.sent) for row in daemon.stored()] == [
        ("1", "succeeded", 2, 1),
        ("2", "succeeded", 1, 1),
    ]
    assert [row["task_id"] for row in daemon.rows("task")] == ["1", "2"]


def test_broker_stopped_while_a_task_runs(
    new_daemon: NewDaemon, broker: Mosquitto, ollama: FakeOllama, protocol: str
) -> None:
    """A task whose broker is away during its whole run is answered once the broker is back."""
    daemon = new_daemon(protocol)
    with Watcher(broker, client_id="watcher", session_s=600) as client, daemon:
        client.publish(f"{N}/task/door/0", {"prompt": "x", "model": "slower", "stream": True})
        client.publish(f"{N}/task/door/1", {"prompt": "y", "model": "slower"})
        client.running("door")
        broker.stop()
        ollama["slower"].token_s = 0.0
        wait_until(lambda: [row["task_id"] for row in daemon.rows("task")] == ["0", "1"], timeout_s=15)
        broker.start()
        result = client.result("door", "1", timeout_s=20)
        assert client.result("door", "0")["state"] == "succeeded"
    assert (result["state"], result["attempt"]) == ("succeeded", 1)
    assert Counter(m.json["id"] for m in client.of("door", "result")) == {"0": 1, "1": 1}


def test_ollama_killed_in_mid_generation(new_daemon: NewDaemon, broker: Mosquitto, ollama: FakeOllama) -> None:
    """A task whose Ollama is killed while it runs is finished when Ollama is back, with one terminal result."""
    daemon = new_daemon()
    with Watcher(broker) as client, daemon:
        client.publish(f"{N}/task/door/1", {"prompt": "x", "model": "slower", "stream": True})
        client.running("door")
        ollama.stop()
        client.wait_for(lambda m: m.topic == f"{N}/state" and m.json["state"] == "degraded")
        ollama["slower"].token_s = 0.0
        ollama.start()
        result = client.result("door", "1", timeout_s=30)
        assert daemon.stop() == 0
    assert (result["state"], result["text"].split()[-1]) == ("succeeded", f"word{SLOW_WORDS - 1}")
    assert len(client.of("door", "result")) == 1
    assert len(daemon.rows("task")) == 1


def test_killed_before_the_acknowledgement(
    new_daemon: NewDaemon, broker: Mosquitto, ollama: FakeOllama, protocol: str
) -> None:
    """A task that was stored, but not acknowledged when the daemon was killed, stays one task when it comes again."""
    with Relay(broker.port) as relay, Watcher(broker) as client:
        daemon = new_daemon(protocol, port=relay.port)
        with daemon:
            relay.hold_outgoing()
            client.publish(f"{N}/task/door", {"prompt": "no id"})
            client.publish(f"{N}/task/door/own", {"prompt": "own id"})
            wait_until(lambda: asked(ollama, "no id"))
            daemon.kill()
            relay.cut()
            relay.release()
            daemon.start()
            client.result("door", "own", timeout_s=20)
            client.publish(f"{N}/task/door/last", "mark")
            client.result("door", "last")
            assert daemon.stop() == 0
    # A result that was out before the broker gave its task again may come twice, as it was.
    results = {json.dumps(m.json, sort_keys=True): m.json for m in client.of("door", "result")}.values()
    assert [(r["state"], r["id"] in ("own", "last")) for r in results] == [
        ("succeeded", False),
        ("succeeded", True),
        ("succeeded", True),
    ]
    assert len(daemon.stored()) == 3


def test_killed_among_equal_texts(new_daemon: NewDaemon, broker: Mosquitto, protocol: str) -> None:
    """Equal texts without an id that were sent to a daemon, of which some are stored at its end, are each run once."""
    texts = 60
    daemon = new_daemon(protocol)
    with daemon:
        assert daemon.stop() == 0
        with Watcher(broker) as client:
            for _ in range(texts):
                client.publish(f"{N}/task/door", "is it hot?")
            daemon.start(ready=False, env={"EDGE_LLM_CRASH_AT": "puback_handed_over:10"})
            assert daemon.wait() == CRASH_STATUS
            daemon.start()
            wait_until(lambda: len({m.topic for m in client.of("door", "result")}) >= texts, 30)
            client.publish(f"{N}/task/door/last", "mark")
            client.result("door", "last")
            assert daemon.stop() == 0
    assert len(daemon.stored()) == texts + 1


@pytest.mark.parametrize("reached", [False, True], ids=["before the result is out", "before it is confirmed"])
def test_killed_around_the_publication(
    new_daemon: NewDaemon, broker: Mosquitto, ollama: FakeOllama, protocol: str, *, reached: bool
) -> None:
    """A task finished when the daemon is killed is not run again; its result comes, if twice then with the same seq."""

    def results() -> list[Any]:  # that of the first task may come again too, if its mark was not on the disk yet
        return [m.json for m in client.of("door", "result") if m.json["id"] == "2"]

    with Relay(broker.port) as relay, Watcher(broker) as client:
        daemon = new_daemon(protocol, port=relay.port)
        with daemon:
            client.publish(f"{N}/task/door/1", "the question")
            client.result("door", "1")
            client.publish(f"{N}/task/door/2", {"prompt": "x", "model": "slower", "stream": True})
            client.running("door")
            (relay.hold_incoming if reached else relay.hold_outgoing)()
            ollama["slower"].token_s = 0.0
            wait_until(lambda: len(daemon.rows("task")) == 2)
            if reached:
                client.result("door", "2")
            daemon.kill()
            relay.cut()
            relay.release()
            daemon.start()
            wait_until(lambda: len(results()) == 1 + reached)
            assert daemon.stop() == 0
    results_of_2 = results()
    assert len(results_of_2) == 1 + reached
    assert all(result == results_of_2[0] for result in results_of_2)
    assert len(ollama.asked("/api/chat", model="slower")) == 1
    assert Counter(row["task_id"] for row in daemon.rows("task")) == {"1": 1, "2": 1}


def test_tasks_sent_while_it_is_down(new_daemon: NewDaemon, broker: Mosquitto, protocol: str) -> None:
    """Two hundred tasks sent while the daemon is down are all answered, each once, when it is up again."""
    daemon = new_daemon(protocol)
    with Watcher(broker) as client, daemon:
        daemon.kill()
        for number in range(200):
            client.publish(f"{N}/task/door/{number}", f"task {number}")
        daemon.start()
        wait_until(lambda: len(client.of("door", "result")) >= 200, timeout_s=30)
        client.publish(f"{N}/task/door/last", "mark")
        client.result("door", "last")
    results = {m.json["id"]: m.json["text"] for m in client.of("door", "result")}
    assert len(client.of("door", "result")) == 201
    assert results == {str(n): f"echo: task {n}" for n in range(200)} | {"last": "echo: mark"}


def test_a_broker_that_forgets(new_mosquitto: NewMosquitto, tmp_path: Path, ollama: FakeOllama, protocol: str) -> None:
    """After a broker without persistence was killed, tasks are taken again and answers come."""
    broker = new_mosquitto()
    with (
        Watcher(broker) as client,
        DaemonProcess(tmp_path, broker, ollama_url=ollama.url, mqtt={"protocol": protocol}) as daemon,
    ):
        before = daemon.subscriptions()
        broker.kill()
        broker.start()
        daemon.wait_ready(before)
        wait_until(lambda: broker.log().rpartition(" starting")[2].count("Received SUBSCRIBE") >= 3)
        client.publish(f"{N}/task/door/1", "are you there?")
        assert client.result("door", "1")["state"] == "succeeded"


def test_the_will(new_daemon: NewDaemon, broker: Mosquitto, protocol: str) -> None:
    """A killed daemon is shown offline, on MQTT 5 after its delay; one that comes back is shown online."""
    daemon = new_daemon(protocol)
    availability = f"{N}/availability"
    with daemon:
        with Watcher(broker) as client:
            client.wait_for(lambda m: (m.topic, m.text) == (availability, "online"))
            began = time.monotonic()
            daemon.kill()
            client.wait_for(lambda m: (m.topic, m.text) == (availability, "offline"), timeout_s=20)
            waited_s = time.monotonic() - began
        daemon.start()
        with Watcher(broker) as client:
            client.wait_for(lambda m: (m.topic, m.text) == (availability, "online"))
    assert waited_s < 4 if protocol == "3.1.1" else waited_s > 4


def test_one_daemon_per_directory(new_daemon: NewDaemon) -> None:
    """A second daemon on the same data directory ends with 75 and one line; the first is not disturbed."""
    first, second = new_daemon(), new_daemon()
    with first:
        second.start(ready=False)
        assert second.wait() == 75
        assert first.is_alive()
        assert first.connections() == 1
    assert "in use" in second.log().splitlines()[-1]


def test_a_disk_that_is_broken(new_daemon: NewDaemon, broker: Mosquitto) -> None:
    """A daemon whose queue cannot be written ends with status 1; the task that came then is answered after a start."""
    daemon = new_daemon()
    with Watcher(broker) as client, daemon:
        written = (daemon.data_dir / "queue.db-wal").stat().st_size
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (written, resource.RLIM_INFINITY))
        client.publish(f"{N}/task/door/1", "x" * 5000)
        assert daemon.wait() == 1
        daemon.start()
        assert client.result("door", "1")["state"] == "succeeded"


# -- stopping --------------------------------------------------------------------------------------------------------


def test_a_stop_when_idle(new_daemon: NewDaemon, broker: Mosquitto, protocol: str) -> None:
    """SIGTERM ends an idle daemon with 0 and waits for nothing, stopped and offline, its models unloaded."""
    daemon = new_daemon(protocol)
    with Watcher(broker) as client, daemon:
        client.publish(f"{N}/task/door/1", "load something")
        client.result("door", "1")
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < GOODBYE_S / 2
        with Watcher(broker) as late:
            assert late.wait_for_topic(f"{N}/availability").text == "offline"
            assert late.wait_for_topic(f"{N}/state").json["state"] == "stopped"
    assert [m.json["state"] for m in client.messages if m.topic == f"{N}/state"][-3:] == [
        "ready",
        "draining",
        "stopped",
    ]
    assert [row["status"] for row in daemon.rows("model")] == ["loaded", "unloaded"]


def test_a_stop_lets_a_task_finish(new_daemon: NewDaemon, broker: Mosquitto, ollama: FakeOllama) -> None:
    """SIGTERM in mid-generation: the task is finished and answered; those that wait and come are answered later."""
    daemon = new_daemon()
    with Watcher(broker) as client, daemon:
        client.publish(f"{N}/task/door/1", {"prompt": "x", "model": "slower", "stream": True})
        client.publish(f"{N}/task/door/2", {"prompt": "y", "model": "slower"})
        client.running("door")
        daemon.signal(signal.SIGTERM)
        client.wait_for(lambda m: m.topic == f"{N}/state" and m.json["state"] == "draining")
        client.publish(f"{N}/task/door/3", "meanwhile")
        ollama["slower"].token_s = 0.0
        assert daemon.wait() == 0
        assert client.result("door", "1")["state"] == "succeeded"
        assert [(row.id, row.state) for row in daemon.stored()] == [("1", "succeeded"), ("2", "queued")]
        daemon.start()
        assert client.result("door", "2")["attempt"] == 1
        assert client.result("door", "3")["state"] == "succeeded"


@pytest.mark.parametrize("hurried", [False, True], ids=["the time is up", "a second signal"])
def test_a_stop_sets_a_task_back(
    new_daemon: NewDaemon, broker: Mosquitto, ollama: FakeOllama, *, hurried: bool
) -> None:
    """A task that does not end in time, or not before a second SIGTERM, waits for the next start; no attempt counts."""
    daemon = new_daemon(drain_timeout_s=20 if hurried else 0.2)
    with Watcher(broker) as client, daemon:
        client.publish(f"{N}/task/door/1", {"prompt": "x", "model": "slower", "stream": True})
        client.running("door")
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        if hurried:
            client.wait_for(lambda m: m.topic == f"{N}/state" and m.json["state"] == "draining")
            daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert time.monotonic() - began < 8
        assert client.of("door", "result") == []
        assert [(row.state, row.attempt) for row in daemon.stored()] == [("queued", 0)]
        ollama["slower"].token_s = 0.0
        daemon.start()
        result = client.result("door", "1")
    assert (result["state"], result["attempt"]) == ("succeeded", 1)
    assert len(result["text"].split()) == SLOW_WORDS


class _Thread:
    """What the daemon looks at."""

    name = "worker"

    def __init__(self) -> None:
        self.alive = True
        self.beats = 0

    def is_alive(self) -> bool:
        return self.alive


def test_a_dead_or_silent_thread_is_noticed() -> None:
    """A thread that has ended, or has shown no sign of life for too long, is a failure; a beating one is not."""
    clock = FakeClock()
    thread = _Thread()
    pulse = _Pulse([thread], clock=clock)
    for _ in range(5):
        clock.advance(IDLE_LOOK_S)
        thread.beats += 1
        assert pulse.failure(IDLE_LOOK_S) is None
    while clock.monotonic() <= 1_000 + 5 * IDLE_LOOK_S + SILENCE_S:
        assert pulse.failure(IDLE_LOOK_S) is None
        clock.advance(IDLE_LOOK_S)
    assert pulse.failure(IDLE_LOOK_S) == _Ending(failure="thread worker hangs", culprit=thread)
    thread.alive = False
    assert pulse.failure(IDLE_LOOK_S) == _Ending(failure="thread worker has ended", culprit=thread)


def test_a_pause_of_all_is_no_silence_of_one() -> None:
    """After a suspend main may run before the others: their silence counts anew, and one that goes on is noticed."""
    clock = FakeClock()
    thread = _Thread()
    pulse = _Pulse([thread], clock=clock)
    assert pulse.failure(IDLE_LOOK_S) is None
    clock.advance(10 * SILENCE_S)
    looks = 0
    while (failure := pulse.failure(IDLE_LOOK_S)) is None:
        clock.advance(IDLE_LOOK_S)
        looks += 1
    assert failure.failure == "thread worker hangs"
    assert looks > SILENCE_S / IDLE_LOOK_S


def test_an_idle_daemon_wakes_up(new_daemon: NewDaemon, broker: Mosquitto) -> None:
    """A task that comes after long quiet is at once shown as running, although main looks around seldom by then."""
    daemon = new_daemon()
    with Watcher(broker) as client, daemon:
        client.wait_for(lambda m: m.topic == f"{N}/queue")
        client.publish(f"{N}/task/door/t", {"model": "slow", "prompt": "x"})
        client.wait_for(lambda m: m.topic == f"{N}/queue" and m.json["running"] is not None, timeout_s=IDLE_LOOK_S / 2)


@pytest.mark.parametrize(("limit_us", "look_s"), [("4000000", 2.0), ("60000000", IDLE_LOOK_S), (None, IDLE_LOOK_S)])
def test_the_watchdog_is_fed_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_us: str | None, look_s: float
) -> None:
    """However seldom an idle daemon looks around, it does so twice within the time that systemd allows."""
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    if limit_us:
        monkeypatch.setenv("WATCHDOG_USEC", limit_us)
    daemon = Daemon(Config(node=NODE, data_dir=tmp_path))
    assert daemon._look_s() == look_s
    daemon.store.close()


@pytest.mark.parametrize(
    ("models", "preloaded"),
    [
        (Models(default="a", defaults=ModelSettings(preload=True)), ["a:latest"]),
        (Models(default="a", settings={"b": ModelSettings(preload=True), "a": ModelSettings()}), ["b:latest"]),
        (Models(default="A", settings={"a:latest": ModelSettings(preload=True)}), ["a:latest"]),
        (Models(default="a"), []),
    ],
)
def test_what_is_preloaded(tmp_path: Path, models: Models, preloaded: list[str]) -> None:
    """The listed models that are to be, and the default one where its settings or those of all say so, each once."""
    daemon = Daemon(Config(node=NODE, data_dir=tmp_path, models=models))
    assert daemon.worker._preload == preloaded
    daemon.store.close()


def test_ollama_on_another_machine(tmp_path: Path) -> None:
    """Its memory is what the configuration says, more than this board has, and nothing that runs here takes of it."""
    settings = {"node": NODE, "data_dir": tmp_path, "ollama.url": "http://192.0.2.1:11434"}
    daemon = Daemon(load(None, settings | {"pool.memory_budget_bytes": 1 << 40}))
    assert daemon.pool.limits.budget_bytes == daemon.pool.room_bytes() == 1 << 40
    daemon.store.close()


# -- a broker that speaks MQTT 3.1.1 only ----------------------------------------------------------------------------


def test_a_broker_without_mqtt_5(tmp_path: Path, ollama: FakeOllama) -> None:
    """With amqtt, which speaks MQTT 3.1.1 only, the daemon falls back by itself, says so, and answers."""
    with (
        start_broker(0, tmp_path, kind="amqtt") as amqtt,
        DaemonProcess(tmp_path, amqtt, ollama_url=ollama.url) as daemon,
        Watcher(amqtt, version=V311) as client,
    ):
        client.wait_for(lambda m: m.topic == f"{N}/state" and m.json["state"] == "ready")
        client.publish(f"{N}/task/door", "plain text")
        client.publish(f"{N}/task/door/j", {"prompt": "JSON", "reply_to": "reply/me"})
        assert client.wait_for_topic("reply/me").json["text"] == "echo: JSON"
        text = client.wait_for(lambda m: m.topic.endswith("/text"))
        assert text.text == "echo: plain text"
        assert client.wait_for(lambda m: m.topic == f"{N}/info" and m.json["mqtt"]).json["mqtt"] == "3.1.1"
        assert daemon.stop() == 0
        client.wait_for(lambda m: (m.topic, m.text) == (f"{N}/availability", "offline"))


def test_a_pause_of_the_process_is_no_signal(new_daemon: NewDaemon, broker: Mosquitto, ollama: FakeOllama) -> None:
    """A daemon that was stopped for longer than it waits for signals goes on as if nothing had been."""
    daemon = new_daemon()
    with Watcher(broker) as client, daemon:
        client.publish(f"{N}/task/pause/held", {"model": "slower", "prompt": "x", "stream": True})
        client.running("pause")  # while it is busy, it looks around every half second
        daemon.signal(signal.SIGSTOP)
        (answer,) = ollama.asked("/api/chat")
        before, words = answer.lines, math.ceil(2 * BUSY_LOOK_S / ollama["slower"].token_s)
        wait_until(lambda: answer.lines > before + words)
        daemon.signal(signal.SIGCONT)
        client.publish(f"{N}/cancel/pause/held")
        assert client.result("pause", "held")["state"] == "cancelled"
        assert daemon.is_alive()
