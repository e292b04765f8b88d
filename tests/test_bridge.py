"""The bridge on a real mosquitto, in both versions of MQTT; the rest of the daemon is a stand-in."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import MQTTMessage

from edge_daemon import mqtt_bridge, mqtt_connection
from edge_daemon.config import Config, Mqtt
from edge_daemon.errors import Rejected, StoreError
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
from edge_daemon.mqtt_bridge import Handlers, MqttBridge, Topics
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
        self.settled: list[set[int]] = []
        """What was marked as acknowledged together."""
        self.unacked: list[int] = []
        self.cancelled: list[tuple[str | None, str]] = []
        self.known_when_cancelled: list[list[str | None]] = []
        """The ids that had been handed over before each cancel."""
        self.asked = 0
        """How often `submit` was called."""
        self.beat: Callable[[], None] = lambda: None
        """What `submit` was given last, to show that it lives."""
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.failure: Exception | None = None
        """Raised by the next `submit`."""
        self.ended = False
        """What is accepted has a result already, which is not in the outbox."""
        self.open = threading.Event()
        """Cleared, `submit` waits."""
        self.open.set()

    def handlers(self) -> Handlers:
        """Itself, in the form that the bridge wants."""
        return Handlers(
            submit=self._submit,
            refuse=_refused,
            cancel=self._cancel,
            known=lambda src, task_id: task_id == "known",
            unsent=self._unsent,
            mark_sent=self._mark_sent,
            set_aside=self._set_aside,
            unacked=lambda: self.unacked,
            mark_acked=self._mark_acked,
            on_event=lambda *event: self.events.append(event),
        )

    def finish(self, *seqs: int, text: str = "done", **address: Any) -> None:
        """Put results into the outbox; the bridge must be told."""
        for seq in seqs:
            self.outbox[seq] = _finished(seq, text, **address)

    def dropped(self) -> int:
        """How many messages were dropped, as told."""
        return sum(data["count"] for type_, _, data in self.events if type_ == "messages_dropped")

    def event_types(self) -> list[str]:
        """What happened, in order."""
        return [type_ for type_, _, _ in self.events]

    def _cancel(self, src: str | None, task_id: str) -> bool:
        self.known_when_cancelled.append([incoming.id for incoming in self.incoming])
        self.cancelled.append((src, task_id))
        return task_id != "unknown"

    def _submit(self, batch: Sequence[Incoming], beat: Callable[[], None]) -> list[Accepted | Refused]:
        self.beat = beat
        self.asked += 1
        assert self.open.wait(SOON_S)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        answers: list[Accepted | Refused] = []
        for incoming in batch:
            self.incoming.append(incoming)
            code = {b"refuse me": "invalid_json", b"too late": "draining"}.get(incoming.payload)
            answers.append(_refused(incoming, code, "no") if code else self._accepted(incoming))
        return answers

    def _accepted(self, incoming: Incoming) -> Accepted:
        address = Address(src=incoming.src, id=incoming.id or f"id-{len(self.incoming)}")
        status = Status(id=address.id, src=address.src, state=TaskState.QUEUED, seq=1, ts=TS)
        return Accepted(
            address=address,
            seq=len(self.incoming),
            own_id=incoming.id is not None,
            model="m",
            status=status,
            result=_finished(1, "done").result if self.ended else None,
            in_outbox=not self.ended,
        )

    def _unsent(self, limit: int, skip: Iterable[int]) -> list[Stored]:
        passed = set(skip)
        return [stored for seq, stored in sorted(self.outbox.items()) if seq not in passed][:limit]

    def _mark_acked(self, seqs: Iterable[int]) -> None:
        self.settled.append(set(seqs))
        self.acked.extend(seqs)

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
    assert [replace(incoming, packet_id=0) for incoming in house.incoming] == [
        Incoming(payload=b"a", src="_"),
        Incoming(payload=b"b", src="door"),
        Incoming(payload=b"\xff", src="door", id="7"),
    ]
    assert len({incoming.packet_id for incoming in house.incoming} - {0}) == 3


def test_nothing_is_sent_again_at_qos_0(broker: Mosquitto, house: House, protocol: str) -> None:
    """A task at QoS 0 comes without a packet id, because no acknowledgement of it can be lost."""
    with running(house, broker.port, protocol=protocol), MqttClient(broker.host, broker.port) as client:
        client.publish(f"{N}/task", "a", qos=0)
        wait_until(lambda: house.incoming)
    assert [incoming.packet_id for incoming in house.incoming] == [0]


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
    assert replace(incoming, ttl_s=None, packet_id=0) == Incoming(
        payload=b"a",
        fields={"id": "7", "priority": "high"},
        content_type="text/plain",
        reply_to="reply/me",
        correlation=b"\x00\xff",
    )


def test_other_topics_are_passed_over(
    broker: Mosquitto, house: House, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An empty message and one with too many levels are acknowledged and only told; the next task is served."""
    caplog.set_level("DEBUG", mqtt_bridge.__name__)
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
    told = [(record.levelname, record.message) for record in caplog.records if "ignored" in record.message]
    assert told == [
        ("WARNING", f"ignored a message on '{N}/task/a/b/c': no such topic here"),
        ("DEBUG", f"ignored an empty message on '{N}/task/a'"),
        ("WARNING", f"ignored a message on '{N}/cancel/a': no such topic here"),
    ]


def test_a_cancel_of_nothing_is_told(broker: Mosquitto, house: House, caplog: pytest.LogCaptureFixture) -> None:
    """A cancel of a task that is unknown or has ended is a line in the journal, and no answer."""
    caplog.set_level("INFO", mqtt_bridge.__name__)
    with running(house, broker.port), watching(broker, f"{N}/reply/#") as client:
        for topic, payload in (("cancel/door/7", ""), ("cancel/door/unknown", ""), ("cancel", "unknown")):
            client.publish(f"{N}/{topic}", payload)
        wait_until(lambda: len(house.cancelled) == 3)
        assert heard(client) == []
    assert [record.message for record in caplog.records if "cancel" in record.message] == [
        f"a cancel on '{N}/cancel/door/unknown': no task 'unknown' waits or runs",
        f"a cancel on '{N}/cancel': no task 'unknown' waits or runs",
    ]


def test_cancel_topics(broker: Mosquitto, house: House, protocol: str) -> None:
    """A cancel names its task by topic or by payload; a retained one is ignored, or it would come again for ever."""
    with running(house, broker.port, protocol=protocol), MqttClient(broker.host, broker.port) as client:
        client.publish(f"{N}/cancel/door/7", "whatever")
        client.publish(f"{N}/cancel", " 8\n")
        wait_until(lambda: len(house.cancelled) == 2)
    assert house.cancelled == [("door", "7"), (None, "8")]


def test_a_cancel_follows_its_task(broker: Mosquitto, house: House, protocol: str) -> None:
    """A task and the cancel behind it, read together behind a slow commit, are handed over in the order they came."""
    with running(house, broker.port, protocol=protocol) as bridge, MqttClient(broker.host, broker.port) as client:
        inbox = bridge._shared.inbox
        house.open.clear()
        client.publish(f"{N}/task/door/1", "x")
        wait_until(lambda: house.asked == 1)
        for number in (2, 3):
            client.publish(f"{N}/task/door/{number}", "x")
            client.publish(f"{N}/cancel/door/{number}", "x")
        wait_until(lambda: inbox.qsize() >= 4)
        house.open.set()
        wait_until(lambda: len(house.cancelled) == 2)
    assert house.known_when_cancelled == [["1", "2"], ["1", "2", "3"]]


def test_a_slow_group_can_show_that_it_lives(broker: Mosquitto, house: House) -> None:
    """Whoever judges a group is given the beat of the thread that waits for it."""
    with running(house, broker.port) as bridge, MqttClient(broker.host, broker.port) as client:
        (intake,) = (thread for thread in bridge.threads if thread.name == "mqtt-intake")
        house.open.clear()
        client.publish(f"{N}/task/door/1", "x")
        wait_until(lambda: house.asked == 1)
        before = intake.beats
        house.beat()
        assert intake.beats == before + 1
        house.open.set()


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
    """A task whose acknowledgement is lost with the connection comes again, marked, and under the same packet id."""
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
    assert len({incoming.packet_id for incoming in house.incoming}) == 1


def test_what_comes_too_late_is_left_to_the_broker(broker: Mosquitto, house: House, protocol: str) -> None:
    """A task that meets a daemon that stops is neither refused nor acknowledged: it comes again at the next start."""
    with MqttClient(broker.host, broker.port) as client:
        client.subscribe(f"{N}/reply/#")
        with running(house, broker.port, protocol=protocol):
            client.publish(f"{N}/task/dev/in-time", "now")
            client.publish(f"{N}/task/dev/late", "too late")
            wait_until(lambda: len(house.incoming) == 2)
            client.publish(f"{N}/task/dev/lost", "too late", qos=0)
            client.wait_for(lambda m: m.topic == f"{N}/reply/dev/lost/result")
        with running(house, broker.port, protocol=protocol):
            wait_until(lambda: len(house.incoming) == 4)
        assert (house.incoming[3].id, house.incoming[3].redelivered) == ("late", True)
        assert [m.topic for m in client.messages if m.topic.endswith("/late/result")] == []


def test_what_a_lost_session_held_cannot_come_again(broker: Mosquitto, house: House, protocol: str) -> None:
    """A broker that does not know us has nothing of ours to send again: what was open is settled."""
    house.unacked = [50, 51]
    with running(house, broker.port, protocol=protocol):
        wait_until(lambda: {50, 51} in house.settled)  # with the first arrival, our own `online`


def test_what_did_not_come_first_cannot_come_again(broker: Mosquitto, house: House, protocol: str) -> None:
    """The broker sends again before anything new: what has come by then stays open, all else is settled."""
    with (
        Relay(broker.port) as relay,
        running(house, relay.port, protocol=protocol),
        MqttClient(broker.host, broker.port) as client,
    ):
        relay.hold_outgoing()
        client.publish(f"{N}/task", "once")
        wait_until(lambda: house.incoming)
        house.unacked = [1, 2, 50]  # the second is what the task becomes when it comes again
        relay.cut()
        relay.release()
        wait_until(lambda: len(house.incoming) == 2)
        client.publish(f"{N}/task", "new")
        wait_until(lambda: {1, 50} in house.settled)
    assert [incoming.redelivered for incoming in house.incoming] == [False, True, False]


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


def test_an_answer_that_no_outbox_holds(broker: Mosquitto, house: House, protocol: str) -> None:
    """A known result that could not be put into the outbox again goes out before its message is acknowledged."""
    house.ended = True
    with (
        Relay(broker.port) as relay,
        running(house, relay.port, protocol=protocol),
        watching(broker, f"{N}/reply/#") as client,
    ):
        relay.hold_outgoing()
        client.publish(f"{N}/task/door/1", "again")
        wait_until(lambda: house.incoming)
        relay.cut()
        relay.release()
        result = client.wait_for_topic(f"{N}/reply/door/1/result")
        wait_until(lambda: len(received(broker, "PUBACK")) >= 2)  # our own `online`, and the task
    assert result.json["text"] == "done"
    assert [incoming.redelivered for incoming in house.incoming] == [False, True]


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
    assert time.monotonic() - began < SOON_S
    assert len(received(broker, "PUBACK")) == 1  # of our own `online`
    if part == "publisher":  # no goodbye that nobody said: the will speaks
        wait_until(lambda: f"Client {CLIENT} closed its connection" in broker.log())


def _part_of(name: str) -> str:
    return {"mqtt-net": "network", "mqtt-intake": "intake", "mqtt-publisher": "publisher"}[name]


@pytest.mark.parametrize(
    ("prefixes", "topic", "allowed"),
    [
        (["reply/"], "reply/window", True),
        (["reply/<src>/"], "reply/door/1", True),
        (["reply/<src>/"], "reply/window/1", False),
        (["reply/<src>/"], "reply/doors/1", False),
        (["reply/<src>/"], "reply/<src>/1", False),
        (["a/<src>/b/", "c/"], "a/door/b/1", True),
        (["a/<src>/b/", "c/"], "c/window", True),
        ([], f"{N}/reply/door/x", True),
        ([], f"{N}/reply/window/x", False),
    ],
)
def test_where_answers_may_go(house: House, prefixes: list[str], topic: str, *, allowed: bool) -> None:
    """A reply topic lies in the sender's own tree or under a prefix, in which `<src>` is the sender's name."""
    bridge = MqttBridge(_config(reply_prefixes=tuple(prefixes)), house.handlers())
    if allowed:
        bridge.check_reply_to("door", topic)
        return
    with pytest.raises(Rejected, match="reply_to: "):
        bridge.check_reply_to("door", topic)


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
    with watching(broker, f"{N}/reply/#") as client, Relay(broker.port) as relay:
        waiting, house.outbox = house.outbox, {}
        with running(house, relay.port, protocol=protocol) as bridge:
            before = len(received(broker, "PUBLISH"))
            relay.hold_incoming()
            house.outbox = waiting
            bridge.results_waiting()
            wait_until(lambda: len(received(broker, "PUBLISH")) - before >= window)
            _send_what_may_be_sent(bridge)
            assert len(bridge._publisher._in_flight) == window
            assert len(received(broker, "PUBLISH")) - before == window
            relay.release()
            wait_until(lambda: len(house.sent) == 100)
            assert bridge.flush(SOON_S)
        topics = [m.topic for m in heard(client)]
    assert len(set(topics)) == len(topics) == 200


def _send_what_may_be_sent(bridge: MqttBridge) -> None:
    """Have the publisher go through a whole round: of two that end, the first may have begun before."""
    rounds = bridge._publisher.beats

    def has_been_round() -> bool:
        bridge.results_waiting()
        return bridge._publisher.beats >= rounds + 2

    wait_until(has_been_round)


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


def test_a_connection_that_ends_later_is_no_strike(
    broker: Mosquitto, house: House, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that goes away again and again before the broker can confirm a result only delays it."""
    monkeypatch.setattr(mqtt_bridge, "BLAME_S", 0.0)
    monkeypatch.setattr(mqtt_bridge._Network, "_pause", lambda *_: None)
    house.finish(1, text="UNLUCKY")
    with Relay(broker.port, cut_at=b"UNLUCKY") as relay, running(house, relay.port, protocol=protocol, wait=False):
        wait_until(lambda: house.event_types().count("broker_lost") > 2 * mqtt_bridge.STRIKES)
        relay.cut_at = b""
        wait_until(lambda: house.sent == [1])
    assert house.aside == []


class Wire:
    """A connection as the publisher knows it. Everything is confirmed but a result of `ends_at`, with which it ends."""

    window, max_packet_bytes = 20, 1 << 20
    resumed = True

    def __init__(self, *, ends_at: str = "", cut_off: bool = True) -> None:
        self.cut_off = cut_off
        self.version = "5"
        self.results: list[str] = []
        """What was sent, by task."""
        self._ends_at = ends_at
        self._confirmed = 0
        self._mids = 0
        self._open: list[int] = []

    def publish(self, topic: str, *_: Any, qos: int, **__: Any) -> int | None:
        """Take a message."""
        task_id, _slash, kind = topic.removeprefix(f"{N}/reply/_/").partition("/")
        if kind == "result":
            self.results.append(task_id)
        self._mids += bool(qos)
        if qos and task_id != self._ends_at:
            self._open.append(self._mids)
        return self._mids if qos else None

    def serve(self, publisher: Any, *, confirms: bool = True) -> "Wire":
        """From its first to its last moment."""
        connection: Any = self
        publisher._handle_mail(mqtt_bridge._Connected(connection, quietly=False))
        publisher._pump()
        while confirms and self._open:
            publisher._handle_mail(mqtt_bridge._Confirmed(connection, self._open.pop(0), None))
            publisher._pump()
        publisher._handle_mail(mqtt_bridge._Lost(connection))
        return self


@pytest.fixture
def publisher(house: House) -> Any:
    """One that does not run: a test does its steps."""
    return MqttBridge(_config(), house.handlers())._publisher


def test_only_quick_ends_over_one_result_are_strikes(house: House, publisher: Any) -> None:
    """Connections in a row that end as soon as a result was sent alone convict it, but not one that carried several."""
    house.finish(1, 2)
    for _ in range(mqtt_bridge.STRIKES):
        Wire(ends_at="t1").serve(publisher)
        assert house.aside == []
    Wire(ends_at="t1").serve(publisher)
    assert (house.aside, house.sent) == ([1], [2])


@pytest.mark.parametrize("flaw", ["told or silent", "late", "without it"])
def test_a_flapping_broker_convicts_nobody(
    house: House, publisher: Any, flaw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends that the broker gives a reason for, that come late, or between which it ends without the result, acquit."""
    if flaw == "late":
        monkeypatch.setattr(mqtt_bridge, "BLAME_S", -1.0)
    house.finish(1)
    for number in range(20):
        Wire(ends_at="t1", cut_off=flaw != "told or silent").serve(publisher)
        if flaw == "without it" and number % 3 == 2:
            Wire().serve(publisher, confirms=False)
    assert house.aside == []
    Wire().serve(publisher)
    assert house.sent == [1]


def test_a_suspect_goes_last_and_alone(house: House, publisher: Any) -> None:
    """What was on its way when a connection ended is sent after all others; what ended it alone, last of all."""
    house.finish(1, 2)
    assert Wire().serve(publisher, confirms=False).results == ["t1", "t2"]
    assert Wire(ends_at="t1").serve(publisher).results == ["t1"]
    house.finish(3, 4)
    assert Wire(ends_at="t1").serve(publisher).results == ["t3", "t4", "t2", "t1"]
    assert house.sent == [3, 4, 2]


@pytest.mark.parametrize(
    ("goodbye", "cut_off"),
    [(b"", True), (b"\xe0\x01\x95", True), (b"\xe0\x01\x8b", False), (b"\xe0\x01\x8e", False)],
    ids=["none", "packet too large", "shutting down", "another client"],
)
def test_a_goodbye_that_explains_the_end(house: House, goodbye: bytes, *, cut_off: bool) -> None:
    """A connection counts as cut off when it breaks without a word, or with one that may be about a message."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        config = _config(port=server.getsockname()[1])
        connection = MqttBridge(config, house.handlers())._network.new_connection()
        serving = threading.Thread(target=connection.run, args=(1.0,))
        serving.start()
        with server.accept()[0] as wire:
            wire.recv(4096)
            wire.sendall(b"\x20\x03\x00\x00\x00")  # CONNACK
            wait_until(lambda: connection.accepted)
            wire.recv(4096)
            wire.sendall(goodbye)
        serving.join(SOON_S)
    assert connection.ended
    assert connection.cut_off is cut_off


def test_a_result_that_the_broker_refuses_is_set_aside(new_mosquitto: NewMosquitto, house: House) -> None:
    """A result that the broker's access rules refuse is set aside with an event; the connection stays."""
    acl = f"topic readwrite {N}/availability\ntopic read {N}/task/#\ntopic read {N}/cancel/#\n"
    broker = new_mosquitto(acl=acl + f"topic readwrite {N}/reply/good/#\n")
    house.finish(1, src="bad")
    house.finish(2, src="good")
    with watching(broker, f"{N}/reply/good/#") as client, running(house, broker.port):
        wait_until(lambda: house.aside == [1] and house.sent == [2])
        client.wait_for_topic(f"{N}/reply/good/t2/result")
    assert ("poison_result", "error", {"seq": 1, "reason": "refused by the broker: Not authorized"}) in house.events
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


def test_what_is_too_large_for_the_broker_is_not_sent(
    new_mosquitto: NewMosquitto, house: House, caplog: pytest.LogCaptureFixture
) -> None:
    """A retained topic or a result that stays too large ends no connection: it is not sent, and said so once."""
    broker = new_mosquitto(extra="max_packet_size 2000")
    house.finish(1, src="door", reply_to="reply/" + "x" * 200, correlation=b"c" * 1500)
    house.outbox[1] = replace(house.outbox[1], result=_with_meta(house.outbox[1].result, "m" * 3000))
    with running(house, broker.port) as bridge, watching(broker) as client:
        for count in range(3):
            bridge.publish_state("models", {"available": ["m" * 100] * 100, "count": count})
        house.finish(2)
        bridge.results_waiting()
        wait_until(lambda: house.sent == [2])
        assert bridge.flush(SOON_S)
        topics = {m.topic for m in heard(client)}
    assert house.aside == [1]
    assert topics == {f"{N}/availability", f"{N}/reply/_/t2/result"}
    assert connects(broker) == 1
    assert len([r for r in caplog.records if "models is not sent: more than the 2000 bytes" in r.message]) == 1


def _with_meta(result: Result | None, meta: str) -> Result:
    assert result is not None
    return replace(result, meta=meta)


def test_many_refusals_at_once(
    new_mosquitto: NewMosquitto, house: House, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More refusals than are kept of what may be dropped: each is answered and then acknowledged."""
    monkeypatch.setattr(mqtt_bridge, "MAX_BACKLOG", 10)
    broker = new_mosquitto(extra="max_inflight_messages 0\nmax_queued_messages 0")
    with watching(broker, f"{N}/reply/#") as client:
        with running(house, broker.port, protocol=protocol):
            pass  # from now on the broker keeps what comes
        for number in range(200):
            client.publish(f"{N}/task/door/{number}", "refuse me")
        with running(house, broker.port, protocol=protocol):
            wait_until(lambda: len({message.topic for message in client.messages}) == 200)
            wait_until(lambda: len(received(broker, "PUBACK")) >= 201)
    assert "messages_dropped" not in house.event_types()


def test_many_refusals_that_nobody_waits_for(
    broker: Mosquitto, house: House, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of refused tasks at QoS 0 some are not answered when too many come at once; these are counted and told."""
    monkeypatch.setattr(mqtt_bridge, "MAX_BACKLOG", 10)
    with running(house, broker.port, protocol=protocol), watching(broker, f"{N}/reply/#") as client:
        house.open.clear()
        for number in range(200):
            client.publish(f"{N}/task/door/{number}", "refuse me", qos=0)
        client.publish(f"{N}/task/door/good", "good")
        house.open.set()
        client.wait_for_topic(f"{N}/reply/door/good/status")
        wait_until(lambda: len([m for m in client.messages if m.topic.endswith("/result")]) + house.dropped() == 200)
    assert house.dropped() > 0


def test_the_broker_may_not_flood_us(broker: Mosquitto, house: House) -> None:
    """On MQTT 5 the broker hands over no more than 20 tasks before the first of them is acknowledged."""
    with running(house, broker.port):
        pass
    with MqttClient(broker.host, broker.port) as client:
        for number in range(200):
            client.publish(f"{N}/task/door/{number}", "x")
    house.open.clear()
    with running(house, broker.port, wait=False):
        wait_until(lambda: broker.log().count(f"Sending PUBLISH to {CLIENT}") >= mqtt_connection.UNACKNOWLEDGED)
        sent = broker.log().count(f"Sending PUBLISH to {CLIENT}")
        house.open.set()
        wait_until(lambda: len({incoming.id for incoming in house.incoming}) == 200)
    assert sent <= mqtt_connection.UNACKNOWLEDGED + 2  # and our own `online` of both connections


def test_refusals_of_a_flood_share_a_line(
    broker: Mosquitto, house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first refusals have a line each, of the others the number is told."""
    monkeypatch.setattr(mqtt_bridge, "REFUSALS", 3)
    monkeypatch.setattr(mqtt_bridge, "REFUSALS_S", 0.2)
    caplog.set_level("INFO", mqtt_bridge.__name__)
    with running(house, broker.port), watching(broker, f"{N}/reply/#") as client:
        for number in range(50):
            client.publish(f"{N}/task/door/{number}", "refuse me", qos=0)

        def told() -> bool:
            client.publish(f"{N}/task/door/later", "refuse me", qos=0)
            return "more tasks within" in caplog.text

        wait_until(told)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("refused")]
    before = lines[: next(n for n, line in enumerate(lines) if "more" in line)]
    assert 1 <= len(before) <= 3


def test_a_broker_that_hands_over_too_much(house: House) -> None:
    """On MQTT 5, far more than the Receive Maximum is an overrun, unless it was acknowledged or comes at QoS 0."""
    for protocol, qos, acknowledged, overran in (
        ("5", 1, 0, True),
        ("5", 1, 1, False),
        ("5", 0, 0, False),
        ("3.1.1", 1, 0, False),
    ):
        shared = mqtt_bridge._Shared(
            config=_config(port=1, protocol=protocol),
            topics=Topics("edge-llm/n"),
            handlers=house.handlers(),
            password=None,
        )
        network = mqtt_bridge._Network(shared)
        connection = network.new_connection()
        connection._acknowledged = acknowledged
        for number in range(mqtt_bridge.OVERRUN + 1):
            message = MQTTMessage(number, f"{N}/task".encode())
            message.qos = qos
            connection._on_message(connection._client, None, message)
        assert bool(connection._given_up) is overran
        assert network.new_connection().receive_maximum == (1 if overran else mqtt_connection.UNACKNOWLEDGED)


def test_after_an_overrun(new_mosquitto: NewMosquitto, house: House) -> None:
    """A broker that hands over too much is told to hand over one at a time, once; nothing is lost."""
    broker = new_mosquitto(extra="max_queued_messages 0")
    with watching(broker, f"{N}/reply/#") as client, running(house, broker.port) as bridge:
        (network, *_) = bridge.threads
        assert isinstance(network, mqtt_bridge._Network)
        assert network._connection is not None
        network.slow_down(network._connection)
        client.publish(f"{N}/task/door/1", "one")
        wait_until(lambda: network._connection is not None and network._connection.receive_maximum == 1)
        for number in range(100):
            client.publish(f"{N}/task/door/{number}", "refuse me")
        wait_until(lambda: len({m.topic for m in client.messages if m.topic.endswith("/result")}) == 100)
    assert house.event_types().count("broker_lost") == 1


def test_a_backlog_that_is_refused(new_mosquitto: NewMosquitto, house: House) -> None:
    """Whatever a broker hands over at once is refused at once: answers do not pile up behind its confirmations."""
    broker = new_mosquitto(extra="max_queued_messages 0\nmax_inflight_messages 0")
    with running(house, broker.port, protocol="3.1.1"):
        pass
    count = 6 * mqtt_bridge.OVERRUN
    with watching(broker, f"{N}/reply/#") as client:
        for number in range(count):
            client.publish(f"{N}/task/door/{number}", "refuse me")
        house.open.clear()
        with running(house, broker.port, protocol="3.1.1", wait=False) as bridge:
            publisher = next(thread for thread in bridge.threads if isinstance(thread, mqtt_bridge._Publisher))
            wait_until(lambda: publisher.connection is not None)
            assert publisher.connection is not None
            connection = publisher.connection
            wait_until(lambda: connection.unacknowledged > mqtt_bridge.OVERRUN)
            house.open.set()
            longest = 0

            def all_answered() -> bool:
                nonlocal longest
                longest = max(longest, len(publisher._parts))
                return len({m.topic for m in client.messages if m.topic.endswith("/result")}) == count

            wait_until(all_answered)
    assert longest <= mqtt_bridge.OVERRUN + 2 * mqtt_bridge.GROUP


def test_messages_that_are_not_read_are_bounded(broker: Mosquitto, house: House, protocol: str) -> None:
    """While nobody reads, no more than a bounded number of bytes is taken from the broker, also at QoS 0."""
    size = 100_000
    with running(house, broker.port, protocol=protocol) as bridge, watching(broker, f"{N}/none") as client:
        house.open.clear()
        unread = bridge._shared.unread
        for number in range(40):
            client.publish(f"{N}/task/door/{number}", b"x" * size, qos=0)
        wait_until(lambda: unread._bytes > mqtt_bridge.UNREAD_BYTES)
        client.publish(f"{N}/none", "the broker has them all")
        assert unread._bytes <= mqtt_bridge.UNREAD_BYTES + size + mqtt_bridge.ARRIVAL_BYTES
        house.open.set()
        wait_until(lambda: len(house.incoming) == 40)
    assert unread._bytes == 0


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
    assert house.event_types()[:4] == ["broker_connected", "broker_lost", "broker_connected", "session_lost"]


def test_a_session_that_is_kept_is_not_reported(house: House, broker: Mosquitto, protocol: str) -> None:
    """After a connection that broke, to a broker that remembers us, nothing is said of a lost session."""
    with Relay(broker.port) as relay, running(house, relay.port, protocol=protocol):
        relay.cut()
        wait_until(lambda: house.event_types() == ["broker_connected", "broker_lost", "broker_connected"])


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
    monkeypatch.setattr(mqtt_connection, "ANSWER_S", 0.1)
    monkeypatch.setattr(mqtt_bridge, "BEAT_S", 0.1)
    with Relay(broker.port) as relay:
        relay.hold_incoming()
        with running(house, relay.port, protocol="3.1.1", wait=False) as bridge:
            wait_until(lambda: connects(broker) == 2)
            relay.release()
            wait_until(lambda: bridge.connected)


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set, it finds `broker.test` on this machine; until then it lets everybody wait who asks for that."""
    found, resolve = threading.Event(), socket.getaddrinfo

    def getaddrinfo(host: str, *where: Any, **what: Any) -> Any:
        if host == "broker.test":
            assert found.wait(30)
            host = "127.0.0.1"
        return resolve(host, *where, **what)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(mqtt_connection, "LOOK_S", 0.01)
    return found


def test_a_slow_resolver(
    broker: Mosquitto, house: House, resolver: threading.Event, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the resolver tries, the thread shows that it lives; that time is not taken from the broker's."""
    monkeypatch.setattr(mqtt_connection, "ANSWER_S", 0.5)
    with running(house, broker.port, host="broker.test", protocol=protocol, wait=False) as bridge:
        wait_until(lambda: bridge.threads[0].beats > 60)
        assert not bridge.connected
        resolver.set()
        wait_until(lambda: bridge.connected)
    assert connects(broker) == 1


def test_a_resolver_that_takes_too_long(
    broker: Mosquitto,
    house: House,
    resolver: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An attempt that takes too long is given up on and told; what it opens later is no second connection."""
    monkeypatch.setattr(mqtt_connection, "OPEN_S", 0.2)
    pauses: list[int] = []
    monkeypatch.setattr(mqtt_bridge._Network, "_pause", lambda network, _: _briefly(network, pauses))
    with running(house, broker.port, host="broker.test", wait=False) as bridge:
        wait_until(lambda: len(pauses) >= 3)
        resolver.set()
        wait_until(lambda: bridge.connected and not any(it.name == "mqtt-connect" for it in threading.enumerate()))
        assert bridge.flush(SOON_S)
    assert "broker.test" in caplog.records[0].message
    assert "not found or not reached within 0.2 s" in caplog.records[0].message
    assert connects(broker) == 1


def test_a_stop_does_not_wait_for_the_resolver(broker: Mosquitto, house: House, resolver: threading.Event) -> None:
    """A stop ends the threads although the resolver has not answered."""
    with running(house, broker.port, host="broker.test", wait=False) as bridge:
        wait_until(lambda: bridge.threads[0].beats > 5)
        began = time.monotonic()
    assert time.monotonic() - began < SOON_S
    assert [thread.is_alive() for thread in bridge.threads] == [False] * 3
    resolver.set()


def test_a_dead_connection_is_noticed(broker: Mosquitto, house: House, protocol: str) -> None:
    """A broker that falls silent is given up on: by one and a half times the keepalive, since paho takes two of its."""
    with Relay(broker.port) as relay, running(house, relay.port, protocol=protocol, keepalive_s=5):
        assert ", k3" in broker.log()
        relay.hold_incoming()
        relay.hold_outgoing()
        wait_until(lambda: "broker_lost" in house.event_types(), timeout_s=20)
        relay.cut()
        relay.release()
        wait_until(lambda: house.event_types()[-1] == "broker_connected")
    assert ("broker_lost", "warning", {"reason": "Keep alive timeout"}) in house.events


def test_another_client_with_our_id(
    broker: Mosquitto,
    house: House,
    protocol: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two clients with one id end each other's connections: we say so once, and come back ever more slowly."""
    pauses: list[int] = []
    monkeypatch.setattr(mqtt_bridge._Network, "_pause", lambda _, failures: pauses.append(failures))
    with running(house, broker.port, protocol=protocol):
        for lost in range(1, 10):
            with MqttClient(broker.host, broker.port, client_id=CLIENT):
                wait_until(lambda lost=lost: len(pauses) >= lost)  # type: ignore[misc]
            wait_until(lambda lost=lost: house.event_types().count("broker_connected") > lost)  # type: ignore[misc]
    assert pauses[:9] == [0, 0, 0, 0, 0, 0, 1, 2, 3]
    told = [r.message for r in caplog.records if r.levelname == "ERROR"]
    assert len(told) == 1
    assert f"does another client use the id {CLIENT}?" in told[0]
    assert house.event_types().count("connections_do_not_last") == 1
    warnings = Counter(record.msg for record in caplog.records if record.levelname == "WARNING")
    assert sorted(warnings.values()) == [5, 6]  # sessions and connections lost, until it was said what the matter is


@pytest.mark.parametrize("report_s", [0, 60])
def test_an_absence_is_told_once(
    new_mosquitto: NewMosquitto,
    house: House,
    report_s: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a broker one line is written; when the reason changes another one, though not more than one a minute."""
    monkeypatch.setattr(mqtt_bridge, "REPORT_S", report_s)
    pauses: list[int] = []
    monkeypatch.setattr(mqtt_bridge._Network, "_pause", lambda network, _: _briefly(network, pauses))
    broker = new_mosquitto(users={"edge": "other"})
    broker.stop()
    with running(house, broker.port, username="edge", password="secret", wait=False):
        wait_until(lambda: len(pauses) >= 10)
        broker.start()
        wait_until(lambda: broker.log().count("disconnected, not authorised") >= 10)
    told = [record.message for record in caplog.records]
    assert "refused" in told[0]
    assert ["Not authorized" in line for line in told] == [False] + [True] * (not report_s)
    assert not any("secret" in line for line in told)


def _briefly(network: Any, pauses: list[int]) -> None:
    pauses.append(1)
    network.shared.stopping.wait(0.02)


def test_an_exception_in_a_callback(
    broker: Mosquitto, house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception in a callback is told and ends the connection, so that what it should have noted comes again."""
    noted = mqtt_connection.Connection._on_message
    failures = [ValueError("nobody thought of this")]

    def fails_once(connection: Any, *message: Any) -> None:
        if failures and message[2].payload == b"x":
            raise failures.pop()
        noted(connection, *message)

    monkeypatch.setattr(mqtt_connection.Connection, "_on_message", fails_once)
    with running(house, broker.port), MqttClient(broker.host, broker.port) as client:
        client.publish(f"{N}/task/door/1", "x")
        wait_until(lambda: house.incoming)
    assert [incoming.payload for incoming in house.incoming] == [b"x"]
    assert connects(broker) == 2
    assert any("nobody thought of this" in record.message for record in caplog.records)


def test_nobody_there(house: House, broker: Mosquitto) -> None:
    """Without a broker nothing waits: a flush says no, a stop is quick, and results stay where they are."""
    broker.kill()
    house.finish(1)
    with running(house, broker.port, wait=False) as bridge:
        bridge.results_waiting()
        assert not bridge.flush(0.1)
        began = time.monotonic()
    assert time.monotonic() - began < SOON_S
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
        assert time.monotonic() - began < 2 * SOON_S
        assert not any(thread.is_alive() for thread in bridge.threads)
