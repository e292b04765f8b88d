"""The bridge on a real mosquitto, in both versions of MQTT; the rest of the daemon is a stand-in."""

import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_daemon import mqtt_bridge
from edge_daemon.config import Config, Mqtt
from edge_daemon.errors import StorageFull, StoreError
from edge_daemon.messages import (
    Accepted,
    Address,
    Event,
    Failure,
    Incoming,
    Refused,
    Result,
    Status,
    Stored,
    Task,
    TaskState,
)
from edge_daemon.mqtt_bridge import Handlers, MqttBridge
from tests.conftest import NewMosquitto
from tests.mosquitto import Mosquitto
from tests.mqtt_client import MqttClient, Received
from tests.relay import Relay
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

TS = "2026-01-01T00:00:00.000Z"
NODE = "n"
N = f"edge-llm/{NODE}"
CLIENT = f"edge-llm-{NODE}"
SOON_S = 5.0


class House:
    """The rest of the daemon: it accepts everything but a payload of `refuse me`, and remembers all it is told."""

    def __init__(self) -> None:
        self.incoming: list[Incoming] = []
        self.outbox: dict[int, Stored] = {}
        self.sent: list[int] = []
        self.aside: list[int] = []
        self.acked: list[int] = []
        self.cancelled: list[tuple[str | None, str]] = []
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.failure: Exception | None = None
        """Raised by the next `submit`."""

    def handlers(self) -> Handlers:
        """Itself, in the form that the bridge wants."""
        return Handlers(
            submit=self._submit,
            refuse=_refused,
            cancel=lambda src, task_id: self.cancelled.append((src, task_id)),
            known=lambda src, task_id: task_id == "known",
            unsent=self._unsent,
            mark_sent=self._mark_sent,
            set_aside=self._set_aside,
            mark_acked=self.acked.extend,
            on_event=lambda *event: self.events.append(event),
        )

    def finish(self, *seqs: int, text: str = "done", **address: Any) -> None:
        """Put results into the outbox; the bridge must be told."""
        for seq in seqs:
            self.outbox[seq] = _finished(seq, text, **address)

    def event_types(self) -> list[str]:
        """What happened, in order."""
        return [type_ for type_, _, _ in self.events]

    def _submit(self, batch: Sequence[Incoming]) -> list[Accepted | Refused]:
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        answers: list[Accepted | Refused] = []
        for incoming in batch:
            self.incoming.append(incoming)
            refuse = incoming.payload == b"refuse me"
            answers.append(_refused(incoming, "invalid_json", "no") if refuse else self._accepted(incoming))
        return answers

    def _accepted(self, incoming: Incoming) -> Accepted:
        address = Address(src=incoming.src, id=incoming.id or f"id-{len(self.incoming)}")
        status = Status(id=address.id, src=address.src, state=TaskState.QUEUED, seq=1, ts=TS)
        return Accepted(
            address=address, seq=len(self.incoming), own_id=incoming.id is not None, model="m", status=status
        )

    def _unsent(self, limit: int, skip: Iterable[int]) -> list[Stored]:
        passed = set(skip)
        return [stored for seq, stored in sorted(self.outbox.items()) if seq not in passed][:limit]

    def _mark_sent(self, seq: int) -> None:
        del self.outbox[seq]
        self.sent.append(seq)

    def _set_aside(self, seq: int) -> None:
        del self.outbox[seq]
        self.aside.append(seq)


def _refused(incoming: Incoming, code: str, message: str) -> Refused:
    address = Address(src=incoming.src, id=incoming.id or "generated")
    failure = Failure(code=code, message=message)
    result = Result(id=address.id, src=address.src, seq=2, state=TaskState.REJECTED, error=failure, ts=TS)
    return Refused(address=address, result=result)


def _finished(seq: int, text: str, **address: Any) -> Stored:
    task = Task(id=f"t{seq}", prompt="?", model="m", ttl_s=60, received_at=0, max_tokens=1, prompt_tokens=1, **address)
    result = Result(id=task.id, src=task.src, seq=4, state=TaskState.SUCCEEDED, text=text, ts=TS)
    return Stored(
        seq=seq,
        task=task,
        state=result.state,
        attempt=1,
        preempted=0,
        accepted_at=0,
        partial="",
        result=result,
    )


def _config(**mqtt: Any) -> Config:
    return Config(node=NODE, data_dir=Path("/nonexistent"), mqtt=Mqtt(**mqtt))


@contextmanager
def running(
    house: House, port: int, *, password: str | None = None, wait: bool = True, **mqtt: Any
) -> Iterator[MqttBridge]:
    """A bridge that is connected, unless told not to wait for that."""
    bridge = MqttBridge(_config(port=port, **mqtt), house.handlers(), password=password)
    bridge.start()
    try:
        if wait:
            wait_until(lambda: bridge.connected)
            assert bridge.flush(SOON_S)
        yield bridge
    finally:
        bridge.stop(SOON_S)


@pytest.fixture(params=["5", "3.1.1"])
def protocol(request: pytest.FixtureRequest) -> str:
    """Both versions of MQTT."""
    version: str = request.param
    return version


@pytest.fixture
def broker(new_mosquitto: NewMosquitto) -> Mosquitto:
    """A plain broker of one's own."""
    return new_mosquitto()


@pytest.fixture
def house() -> House:
    """An empty one."""
    return House()


@contextmanager
def watching(broker: Mosquitto, topic_filter: str = f"{N}/#", **options: Any) -> Iterator[MqttClient]:
    """A client that hears everything from now on."""
    with MqttClient(broker.host, broker.port, **options) as client:
        client.subscribe(topic_filter)
        yield client


def heard(client: MqttClient) -> list[Received]:
    """All that has come by now, whatever is still on its way included."""
    mark = f"{N}/reply/mark/{len(client.messages)}"
    client.publish(mark, "x")
    client.wait_for_topic(mark)
    return [message for message in client.messages if not message.topic.startswith(f"{N}/reply/mark/")]


def connects(broker: Mosquitto) -> int:
    """How often the bridge has been let in."""
    return broker.log().count(f" as {CLIENT} (")


def received(broker: Mosquitto, packet: str) -> list[str]:
    """The lines of the broker's log about packets of this kind from the bridge."""
    return [line for line in broker.log().splitlines() if f"Received {packet} from {CLIENT}" in line]


# -- in --------------------------------------------------------------------------------------------------------------


def test_a_task_is_handed_over_with_its_topic(broker: Mosquitto, house: House, protocol: str) -> None:
    """A message on each of the three task topics arrives with the sender and the id that its topic names."""
    with running(house, broker.port, protocol=protocol), MqttClient(broker.host, broker.port) as client:
        client.publish(f"{N}/task", "a")
        client.publish(f"{N}/task/door", "b")
        client.publish(f"{N}/task/door/7", b"\xff")
        wait_until(lambda: len(house.incoming) == 3)
    assert house.incoming == [
        Incoming(payload=b"a", src="_"),
        Incoming(payload=b"b", src="door"),
        Incoming(payload=b"\xff", src="door", id="7"),
    ]


def test_properties_are_handed_over(broker: Mosquitto, house: House) -> None:
    """What MQTT 5 says beside the payload arrives with it, the expiry as the time that is left."""
    properties = {
        "ContentType": "text/plain",
        "ResponseTopic": "reply/me",
        "CorrelationData": b"\x00\xff",
        "MessageExpiryInterval": 60,
        "UserProperty": [("id", "7"), ("priority", "high")],
    }
    with running(house, broker.port), MqttClient(broker.host, broker.port) as client:
        client.publish(f"{N}/task", "a", properties=properties)
        wait_until(lambda: house.incoming)
    (incoming,) = house.incoming
    assert incoming.ttl_s is not None
    assert 58 <= incoming.ttl_s <= 60
    assert replace(incoming, ttl_s=None) == Incoming(
        payload=b"a",
        fields={"id": "7", "priority": "high"},
        content_type="text/plain",
        reply_to="reply/me",
        correlation=b"\x00\xff",
    )


def test_other_topics_are_passed_over(broker: Mosquitto, house: House, protocol: str) -> None:
    """An empty message and one with too many levels are acknowledged and otherwise ignored; the next task is served."""
    with running(house, broker.port, protocol=protocol), MqttClient(broker.host, broker.port) as client:
        client.publish(f"{N}/task/a/b/c", "x")
        client.publish(f"{N}/task/a", b"")
        client.publish(f"{N}/cancel/a", "x")
        client.publish(f"{N}/task/a", "good")
        # Four of the client's, and our own `online`, which the bridge listens to as well.
        wait_until(lambda: len(received(broker, "PUBACK")) == 5)
    assert [incoming.payload for incoming in house.incoming] == [b"good"]
    assert house.cancelled == []
    assert connects(broker) == 1


def test_cancel_topics(broker: Mosquitto, house: House, protocol: str) -> None:
    """A cancel names its task by topic or by payload; a retained one is ignored, or it would come again for ever."""
    with running(house, broker.port, protocol=protocol), MqttClient(broker.host, broker.port) as client:
        client.publish(f"{N}/cancel/door/7", "whatever")
        client.publish(f"{N}/cancel", " 8\n")
        wait_until(lambda: len(house.cancelled) == 2)
    assert house.cancelled == [("door", "7"), (None, "8")]


def test_acknowledged_once_accepted(broker: Mosquitto, house: House, protocol: str) -> None:
    """An accepted task is acknowledged and its status goes out; without an id that is noted once it is certain."""
    with (
        running(house, broker.port, protocol=protocol) as bridge,
        watching(broker, f"{N}/reply/#") as client,
    ):
        client.publish(f"{N}/task/door/7", "own id")
        client.publish(f"{N}/task", "no id")
        status = client.wait_for_topic(f"{N}/reply/door/7/status")
        wait_until(lambda: len(received(broker, "PUBACK")) == 3)
        bridge.publish_state("queue", {})  # confirmed after it, and so is proof that it arrived
        wait_until(lambda: house.acked)
    assert status.json["state"] == "queued"
    assert house.acked == [2]


def test_a_task_that_was_not_acknowledged_comes_again(broker: Mosquitto, house: House, protocol: str) -> None:
    """A task whose acknowledgement is lost with the connection comes again, and is marked as redelivered."""
    with (
        Relay(broker.port) as relay,
        running(house, relay.port, protocol=protocol),
        MqttClient(broker.host, broker.port) as client,
    ):
        relay.hold_outgoing()
        client.publish(f"{N}/task", "once")
        wait_until(lambda: house.incoming)
        relay.cut()
        assert house.acked == []
        relay.release()
        wait_until(lambda: len(house.incoming) == 2)
        wait_until(lambda: len(received(broker, "PUBACK")) >= 2)
    assert [incoming.redelivered for incoming in house.incoming] == [False, True]


def test_a_refusal_is_answered_before_it_is_acknowledged(broker: Mosquitto, house: House, protocol: str) -> None:
    """A refusal is stored nowhere: if the connection ends before its answer is confirmed, the message comes again."""
    with (
        Relay(broker.port) as relay,
        running(house, relay.port, protocol=protocol),
        watching(broker, f"{N}/reply/#") as client,
    ):
        relay.hold_outgoing()
        client.publish(f"{N}/task/door/1", "refuse me")
        client.publish(f"{N}/task/door/2", "good")
        wait_until(lambda: len(house.incoming) == 2)
        assert received(broker, "PUBACK") == received(broker, "PUBACK")[:1]
        relay.cut()
        relay.release()
        result = client.wait_for_topic(f"{N}/reply/door/1/result")
        client.wait_for_topic(f"{N}/reply/door/2/status")
    assert result.json["error"]["code"] == "invalid_json"
    assert [incoming.redelivered for incoming in house.incoming] == [False, False, True, True]


def test_acknowledged_in_order(broker: Mosquitto, house: House, protocol: str) -> None:
    """Acknowledgements go out in the order of arrival, although some must wait for an answer to be confirmed."""
    payloads = ["refuse me" if n % 3 == 0 else "good" for n in range(18)]
    with running(house, broker.port, protocol=protocol), MqttClient(broker.host, broker.port) as client:
        for payload in payloads:
            client.publish(f"{N}/task/door", payload)
        wait_until(lambda: len(received(broker, "PUBACK")) == len(payloads) + 1)
    mids = [int(line.partition("Mid: ")[2].partition(",")[0]) for line in received(broker, "PUBACK")]
    assert mids == sorted(mids)


def test_a_retained_task_is_refused(broker: Mosquitto, house: House) -> None:
    """On MQTT 5 a retained task is refused each time it is sent, and not replayed at the next connection."""
    with MqttClient(broker.host, broker.port) as client:
        client.publish(f"{N}/task/door/old", "kept from before", retain=True)
    with Relay(broker.port) as relay, running(house, relay.port), watching(broker, f"{N}/reply/#") as client:
        client.publish(f"{N}/task/door/1", "again and again", retain=True)
        result = client.wait_for_topic(f"{N}/reply/door/1/result")
        wait_until(lambda: len(received(broker, "PUBACK")) == 2)  # our own `online`, and the task
        relay.cut()
        wait_until(lambda: connects(broker) == 2)
        client.publish(f"{N}/task/door/2", "good")
        client.wait_for_topic(f"{N}/reply/door/2/status")
        topics = [m.topic for m in heard(client)]
    assert result.json["error"]["code"] == "retained"
    assert topics == [result.topic, f"{N}/reply/door/2/status"]
    assert house.event_types().count("retained_task_refused") == 1


def test_a_replayed_task_is_refused(broker: Mosquitto, house: House) -> None:
    """On MQTT 3.1.1 a retained task is refused when it is replayed, once, and not at all when its id is known."""
    with MqttClient(broker.host, broker.port) as client:
        client.publish(f"{N}/task/door/1", "kept", retain=True)
        client.publish(f"{N}/task/door/known", "kept, and answered before", retain=True)
    with (
        watching(broker, f"{N}/reply/#") as client,
        Relay(broker.port) as relay,
        running(house, relay.port, protocol="3.1.1"),
    ):
        result = client.wait_for_topic(f"{N}/reply/door/1/result")
        wait_until(lambda: len(received(broker, "PUBACK")) == 3)  # our own `online`, and both tasks
        relay.cut()
        wait_until(lambda: connects(broker) == 2)
        client.publish(f"{N}/task/door/2", "good")
        client.wait_for_topic(f"{N}/reply/door/2/status")
        topics = [m.topic for m in heard(client)]
    assert result.json["error"]["code"] == "retained"
    assert topics == [result.topic, f"{N}/reply/door/2/status"]


def test_a_full_disk_is_answered(broker: Mosquitto, house: House, protocol: str) -> None:
    """Tasks that cannot be stored are refused with `storage_full`, and the next one is accepted."""
    house.failure = StorageFull("no room")
    with running(house, broker.port, protocol=protocol), watching(broker, f"{N}/reply/#") as client:
        client.publish(f"{N}/task/door/1", "lost")
        refusal = client.wait_for_topic(f"{N}/reply/door/1/result")
        client.publish(f"{N}/task/door/2", "stored")
        client.wait_for_topic(f"{N}/reply/door/2/status")
    assert refusal.json["error"]["code"] == "storage_full"


@pytest.mark.parametrize("part", ["intake", "publisher", "network"])
def test_a_broken_thread_is_seen(broker: Mosquitto, house: House, part: str) -> None:
    """A thread that meets an error nobody can handle ends, for all to see, and loses no task over it."""
    with running(house, broker.port) as bridge, MqttClient(broker.host, broker.port) as client:
        thread = next(thread for thread in bridge.threads if _part_of(thread.name) == part)
        if part == "intake":
            house.failure = StoreError("broken")
            client.publish(f"{N}/task", "x")
        elif part == "publisher":
            house.outbox = None  # type: ignore[assignment]
            bridge.results_waiting()
        else:
            house.events = None  # type: ignore[assignment]
            broker.kill()
        wait_until(lambda: not thread.is_alive())
        house.events, house.outbox = [], {}
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert len(received(broker, "PUBACK")) == 1  # of our own `online`
    if part != "network":  # no goodbye that nobody said: the will speaks
        wait_until(lambda: f"Client {CLIENT} closed its connection" in broker.log())


def _part_of(name: str) -> str:
    return {"mqtt-net": "network", "mqtt-intake": "intake", "mqtt-publisher": "publisher"}[name]


# -- out -------------------------------------------------------------------------------------------------------------


def test_what_goes_out(broker: Mosquitto, house: House, protocol: str) -> None:
    """Each kind of message goes to its topic with its quality of service; only the node's state is retained."""
    address = Address(src="door", id="7")
    with running(house, broker.port, protocol=protocol) as bridge, watching(broker) as client:
        bridge.publish_status(address, Status(id="7", src="door", state=TaskState.RUNNING, seq=2, ts=TS))
        bridge.publish_stream(address, {"seq": 1, "text": "ä"})
        bridge.publish_state("queue", {"waiting": 1})
        bridge.publish_telemetry({"seq": 1})
        bridge.publish_event(Event(type="model_loaded", ts=TS))
        assert bridge.flush(SOON_S)
        messages = heard(client)
    seen = {m.topic.removeprefix(f"{N}/"): (m.qos, m.retain) for m in messages}
    content = [m.properties.get("ContentType") for m in messages if m.topic != f"{N}/availability"]
    assert seen == {
        "availability": (1, True),
        "reply/door/7/status": (1, False),
        "reply/door/7/stream": (0, False),
        "queue": (1, True),
        "telemetry": (0, False),
        "event/model_loaded": (0, False),
    }
    assert content == ["application/json" if protocol == "5" else None] * 5


def test_the_forms_of_a_result(broker: Mosquitto, house: House, protocol: str) -> None:
    """A result goes to its topic, as bare text too when the task was plain, and in the form asked to `reply_to`."""
    house.finish(1, text="ja", src="door", reply_to="reply/json", correlation=b"\x01")
    house.finish(2, text="nein", src="door", plain=True, reply_to="reply/plain", correlation=b"\x02")
    with watching(broker, f"{N}/reply/#") as client:
        client.subscribe("reply/#")
        with running(house, broker.port, protocol=protocol):
            assert house.sent == [1, 2]
        messages = heard(client)
    by_topic = {m.topic: m for m in messages}
    assert len(messages) == len(by_topic) == 5
    assert by_topic[f"{N}/reply/door/t1/result"].json == by_topic["reply/json"].json
    assert by_topic["reply/json"].json["text"] == "ja"
    assert by_topic[f"{N}/reply/door/t2/result"].json["text"] == "nein"
    assert by_topic[f"{N}/reply/door/t2/text"].text == by_topic["reply/plain"].text == "nein"
    if protocol == "5":
        assert by_topic["reply/json"].properties == {"ContentType": "application/json", "CorrelationData": b"\x01"}
        assert by_topic["reply/plain"].properties == {"ContentType": "text/plain", "CorrelationData": b"\x02"}


@pytest.mark.parametrize(("protocol", "limit", "window"), [("5", 5, 5), ("5", 100, 20), ("3.1.1", 20, 20)])
def test_the_window_is_kept(new_mosquitto: NewMosquitto, house: House, protocol: str, limit: int, window: int) -> None:
    """Unconfirmed messages never exceed twenty, or what the broker allows; all come once it confirms again."""
    broker = new_mosquitto(extra=f"max_inflight_messages {limit}\nmax_queued_messages 0")
    house.finish(*range(1, 101), plain=True)
    begun = threading.Event()
    with watching(broker, f"{N}/reply/#") as client, Relay(broker.port) as relay:
        waiting, house.outbox = house.outbox, {}
        with running(house, relay.port, protocol=protocol) as bridge:
            before = len(received(broker, "PUBLISH"))
            relay.hold_incoming()
            house.outbox = waiting
            bridge.results_waiting()
            wait_until(lambda: len(received(broker, "PUBLISH")) - before >= window)
            begun.wait(0.3)  # time to do wrong
            assert len(received(broker, "PUBLISH")) - before == window
            relay.release()
            wait_until(lambda: len(house.sent) == 100)
            assert bridge.flush(SOON_S)
        topics = [m.topic for m in heard(client)]
    assert len(set(topics)) == len(topics) == 200


@pytest.mark.parametrize(
    ("text", "correlation"),
    [("x" * 50_000, b""), ("ä" * 30_000, b""), ("\x01" * 20_000, b""), ("x" * 12_000, b"c" * 10_000)],
    ids=["long", "two bytes each", "escaped", "with much correlation data"],
)
def test_a_result_that_is_too_large_is_cut(
    new_mosquitto: NewMosquitto, house: House, protocol: str, text: str, correlation: bytes
) -> None:
    """A result beyond the broker's limit, told or configured, is delivered with its text cut, on one connection."""
    broker = new_mosquitto(extra="max_packet_size 20000")
    house.finish(1, text=text, correlation=correlation, reply_to="reply/me")
    limit: dict[str, Any] = {} if protocol == "5" else {"max_packet_bytes": 20_000}
    with watching(broker, f"{N}/reply/#") as client, running(house, broker.port, protocol=protocol, **limit):
        result = client.wait_for_topic(f"{N}/reply/_/t1/result").json
    assert result["truncated"]
    assert text.startswith(result["text"])
    assert house.sent == [1]
    assert connects(broker) == 1


def test_a_poisonous_result_is_set_aside(broker: Mosquitto, house: House, protocol: str) -> None:
    """A result whose sending ends the connection every time is set aside; the others are delivered."""
    house.finish(1, 3, text="good")
    house.finish(2, text="POISON")
    with (
        watching(broker, f"{N}/reply/#") as client,
        Relay(broker.port, cut_at=b"POISON") as relay,
        running(house, relay.port, protocol=protocol, wait=False) as bridge,
    ):
        wait_until(lambda: house.aside and len(house.sent) == 2)
        assert bridge.flush(SOON_S)
        topics = {m.topic for m in heard(client)}
    assert house.aside == [2]
    assert topics == {f"{N}/reply/_/t1/result", f"{N}/reply/_/t3/result"}
    assert [data["seq"] for type_, _, data in house.events if type_ == "poison_result"] == [2]
    assert connects(broker) <= 6


def test_a_result_that_the_broker_refuses_is_set_aside(new_mosquitto: NewMosquitto, house: House) -> None:
    """A result that the broker's access rules refuse is set aside with an event; the connection stays."""
    acl = f"topic readwrite {N}/availability\ntopic read {N}/task/#\ntopic read {N}/cancel/#\n"
    broker = new_mosquitto(acl=acl + f"topic readwrite {N}/reply/good/#\n")
    house.finish(1, src="bad")
    house.finish(2, src="good")
    with watching(broker, f"{N}/reply/good/#") as client, running(house, broker.port):
        wait_until(lambda: house.aside == [1] and house.sent == [2])
        client.wait_for_topic(f"{N}/reply/good/t2/result")
    assert ("poison_result", "error", {"seq": 1, "reason": "refused by the broker"}) in house.events
    assert connects(broker) == 1


def test_a_refused_copy_does_not_hold_the_result(new_mosquitto: NewMosquitto, house: House) -> None:
    """A result counts as delivered when the broker refuses only its copy to `reply_to`."""
    broker = new_mosquitto(acl=f"topic readwrite {N}/#\n")
    house.finish(1, reply_to="reply/elsewhere")
    with running(house, broker.port):
        wait_until(lambda: house.sent == [1])
    assert house.aside == []


def test_a_refused_subscription_is_told(
    new_mosquitto: NewMosquitto, house: House, protocol: str, tmp_path: Path
) -> None:
    """A broker whose access rules keep the tasks from us is an event, told once for each connection."""
    plugin = next(Path("/usr/lib").glob("*/mosquitto_dynamic_security.so"), None)
    if plugin is None:
        pytest.skip("mosquitto came without its dynamic security plugin")
    kinds = {"publishClientSend": True, "publishClientReceive": True, "subscribe": False, "unsubscribe": True}
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"defaultACLAccess": kinds}), encoding="utf-8")
    broker = new_mosquitto(extra=f"plugin {plugin}\nplugin_opt_config_file {rules}")
    with running(house, broker.port, protocol=protocol):
        wait_until(lambda: "subscription_refused" in house.event_types())
    assert house.event_types().count("subscription_refused") == 1


# -- the connection --------------------------------------------------------------------------------------------------


def test_a_session_that_is_lost_is_made_anew(new_mosquitto: NewMosquitto, house: House, protocol: str) -> None:
    """After a broker came back with nothing, the bridge is subscribed again, and what was retained is there again."""
    broker = new_mosquitto()
    with running(house, broker.port, protocol=protocol) as bridge, watching(broker, f"{N}/queue") as client:
        bridge.publish_state("queue", {"waiting": 1})
        client.wait_for_topic(f"{N}/queue")
        broker.kill()
        wait_until(lambda: not bridge.connected)
        bridge.publish_state("queue", {"waiting": 2})
        house.finish(1)
        bridge.results_waiting()
        broker.start()
        wait_until(lambda: house.sent == [1], timeout_s=15)
        assert bridge.flush(SOON_S)
        with watching(broker) as late:
            late.publish(f"{N}/task", "after")
            wait_until(lambda: house.incoming)
            assert late.wait_for_topic(f"{N}/queue").json == {"waiting": 2}
            assert late.wait_for_topic(f"{N}/availability").text == "online"
    assert house.event_types()[:3] == ["broker_connected", "broker_lost", "broker_connected"]


def test_a_late_will_is_answered(broker: Mosquitto, house: House, protocol: str) -> None:
    """`offline` from an earlier connection does not stand while the bridge is there."""
    with running(house, broker.port, protocol=protocol), watching(broker, f"{N}/availability") as client:
        client.wait_for(lambda m: m.text == "online")
        client.publish(f"{N}/availability", "offline", retain=True)
        wait_until(lambda: [m.text for m in client.messages][-2:] == ["offline", "online"])
        with watching(broker, f"{N}/availability") as late:
            assert late.wait_for_topic(f"{N}/availability").text == "online"


def test_a_clean_stop_is_offline(broker: Mosquitto, house: House, protocol: str) -> None:
    """After a stop the retained availability is `offline`, said once, by us and not by the will."""
    with watching(broker, f"{N}/availability") as client:
        with running(house, broker.port, protocol=protocol):
            pass
        wait_until(lambda: f"Client {CLIENT} disconnected" in broker.log())
        client.publish(f"{N}/availability", "mark")
        client.wait_for(lambda m: m.text == "mark")
    assert [m.text for m in client.messages] == ["online", "offline", "mark"]


def test_a_wrong_password_is_no_hot_loop(new_mosquitto: NewMosquitto, house: House, protocol: str) -> None:
    """With a wrong password the attempts come ever more slowly, and succeed once the broker knows the password."""
    broker = new_mosquitto(users={"edge": "other"})
    refused = "disconnected, not authorised"
    with running(house, broker.port, password="secret", username="edge", protocol=protocol, wait=False) as bridge:
        wait_until(lambda: broker.log().count(refused) == 1)
        began = time.monotonic()
        wait_until(lambda: broker.log().count(refused) == 2)
        assert time.monotonic() - began >= 0.9
        assert not bridge.connected
        broker.stop()
        broker._password_file({"edge": "secret"})
        broker.start()
        wait_until(lambda: bridge.connected, timeout_s=15)
    assert house.event_types() == ["broker_connected"]


def test_a_broker_that_hangs_up_on_mqtt_5(broker: Mosquitto, house: House) -> None:
    """A broker that hangs up without a word is spoken to in MQTT 3.1.1, for as long as that connection lasts."""
    with Relay(broker.port, cut_at=b"\x04MQTT\x05") as relay, running(house, relay.port) as bridge:
        assert bridge.protocol == "3.1.1"
        relay.cut_at = b""
        relay.cut()
        wait_until(lambda: bridge.protocol == "5")


def test_a_broker_that_does_not_answer(broker: Mosquitto, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that takes the connection and says nothing is given up on after a time, and tried again."""
    monkeypatch.setattr(mqtt_bridge, "ANSWER_S", 0.1)
    monkeypatch.setattr(mqtt_bridge, "BEAT_S", 0.1)
    with Relay(broker.port) as relay:
        relay.hold_incoming()
        with running(house, relay.port, protocol="3.1.1", wait=False) as bridge:
            wait_until(lambda: connects(broker) == 2)
            relay.release()
            wait_until(lambda: bridge.connected)


def test_nobody_there(house: House, broker: Mosquitto) -> None:
    """Without a broker nothing waits: a flush says no, a stop is quick, and results stay where they are."""
    broker.kill()
    house.finish(1)
    with running(house, broker.port, wait=False) as bridge:
        bridge.results_waiting()
        assert not bridge.flush(0.1)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert house.sent == []
    assert [thread.is_alive() for thread in bridge.threads] == [False] * 3


def test_a_stop_that_cannot_be_confirmed_ends(broker: Mosquitto, house: House, protocol: str) -> None:
    """A broker that says nothing any more does not hold up the stop beyond the time given."""
    with Relay(broker.port) as relay:
        bridge = MqttBridge(_config(port=relay.port, protocol=protocol), house.handlers())
        bridge.start()
        wait_until(lambda: bridge.connected)
        relay.hold_incoming()
        began = time.monotonic()
        bridge.stop(0.5)
        assert time.monotonic() - began < 3
        assert not any(thread.is_alive() for thread in bridge.threads)
