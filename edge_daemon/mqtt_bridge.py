"""MQTT in and out: the only file that knows topics and paho.

Three threads. ``mqtt-net`` owns the socket: one paho client per connection, so that nothing of a lost connection
(packet ids, acknowledgements, paho's own queue) can leak into the next. ``mqtt-intake`` reads what arrived, commits it
in groups and acknowledges in the order of arrival. ``mqtt-publisher`` sends: at most a window of unconfirmed messages,
and only while connected; all else waits in the store's outbox. Callbacks of paho only put on a queue.
"""

import logging
import random
import re
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from queue import Empty, SimpleQueue
from socket import SHUT_RDWR
from typing import Any, Self

from paho.mqtt.client import MQTT_ERR_SUCCESS, Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_daemon.config import Config
from edge_daemon.errors import Rejected, StorageFull
from edge_daemon.messages import (
    ANONYMOUS,
    Accepted,
    Address,
    Event,
    Incoming,
    Refused,
    Result,
    Status,
    Stored,
    TaskState,
    compact,
)

log = logging.getLogger(__name__)

WINDOW = 20
"""Unconfirmed messages at most; a broker may allow fewer (Receive Maximum)."""
GROUP = 64
"""Tasks committed together at most."""
ANSWER_S = 5.0
"""How long a broker may take to answer a connection that it has let be made."""
BEAT_S = 5.0
"""The longest that a thread here waits before it shows that it lives."""
STRIKES = 3
"""A result whose sending ends the connection this often, sent alone, is set aside."""
MEMORY = 1000
"""Status messages and events kept for sending at most; results are kept by the store."""

UNSUPPORTED_VERSION = 132
"""The reason code of a broker that does not speak MQTT 5."""

LEVEL = re.compile(r"[A-Za-z0-9_.:-]+")
MAX_TOPIC_BYTES = 256
MAX_LEVELS = 16


class Topics:
    """The topics of one node."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.availability = f"{root}/availability"

    def reply(self, address: Address, kind: str) -> str:
        """``kind`` is status, stream, result or text."""
        return f"{self.root}/reply/{address.src}/{address.id}/{kind}"

    def route(self, topic: str) -> tuple[str, list[str]] | None:
        """What a message is (``task``, ``cancel`` or ``availability``), and the topic levels that follow."""
        if not topic.startswith(self.root + "/"):
            return None
        kind, *rest = topic[len(self.root) + 1 :].split("/")
        limits = {"task": (0, 1, 2), "cancel": (0, 2), "availability": (0,)}
        return (kind, rest) if len(rest) in limits.get(kind, ()) else None

    def check_reply_to(self, src: str, topic: str, prefixes: Iterable[str]) -> None:
        """Allow only the sender's own reply tree and the configured prefixes.

        The daemon publishes with its own rights: it must not become the arm of whoever can write a task.

        Raises:
            Rejected: ``forbidden_reply_topic``.
        """
        levels = topic.split("/")
        if len(topic.encode("utf-8", "replace")) > MAX_TOPIC_BYTES or len(levels) > MAX_LEVELS:
            problem = f"longer than {MAX_TOPIC_BYTES} bytes or {MAX_LEVELS} levels"
        elif not all(LEVEL.fullmatch(level) for level in levels):
            problem = "a level is empty or has a character outside A-Z a-z 0-9 _ . : -"
        elif not topic.startswith((f"{self.root}/reply/{src}/", *prefixes)):
            problem = f"allowed are {self.root}/reply/{src}/... and {', '.join(prefixes) or 'nothing else'}"
        else:
            return
        raise Rejected("forbidden_reply_topic", f"reply_to: {problem}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Handlers:
    """What the bridge asks of the rest of the daemon; it does not know who answers."""

    submit: Callable[[Sequence[Incoming]], list[Accepted | Refused]]
    refuse: Callable[[Incoming, str, str], Refused]
    cancel: Callable[[str | None, str], None]
    known: Callable[[str, str], bool]
    unsent: Callable[[int, Iterable[int]], list[Stored]]
    mark_sent: Callable[[int], None]
    set_aside: Callable[[int], None]
    mark_acked: Callable[[Iterable[int]], None]
    on_event: Callable[[str, str, dict[str, Any]], None]
    """Type, severity and data of something worth telling."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Delivery:
    """Publications that are confirmed together: the parts of one result."""

    done: Callable[[bool], None]
    seq: int | None = None
    parts: int = 0
    refused: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class _Publication:
    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    content_type: str | None = None
    correlation: bytes | None = None
    delivery: _Delivery | None = None
    vital: bool = True
    """A refusal by the broker counts against the delivery; a copy to ``reply_to`` does not."""
    proves: tuple[int, ...] = ()
    """Tasks whose PUBACK went out before it: when it is confirmed, they have arrived."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Arrival:
    """A message that came in, and what is still to be done before it may be acknowledged."""

    connection: "_Connection"
    mid: int
    qos: int
    topic: str
    payload: bytes
    retain: bool
    redelivered: bool
    properties: Properties | None
    answered: bool = False
    unacked_seq: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """What the three threads have in common."""

    config: Config
    topics: Topics
    handlers: Handlers
    password: str | None
    leaving: threading.Event = field(default_factory=threading.Event)
    """We have said goodbye: an ``offline`` from now on is our own."""
    stopping: threading.Event = field(default_factory=threading.Event)
    holding: threading.Event = field(default_factory=threading.Event)
    inbox: "SimpleQueue[_Arrival | _Wake]" = field(default_factory=SimpleQueue)
    """For the intake."""
    mail: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    """For the publisher."""


class MqttBridge:
    """The daemon's side of MQTT. Any thread may call it; only ``flush`` and ``stop`` wait for the network."""

    def __init__(self, config: Config, handlers: Handlers, *, password: str | None = None) -> None:
        self.topics = Topics(config.topic_root)
        shared = _Shared(config=config, topics=self.topics, handlers=handlers, password=password)
        self._shared = shared
        self._mail = shared.mail
        self._network = _Network(shared)
        self._publisher = _Publisher(shared)
        self.threads: tuple[_Thread, ...] = (self._network, _IntakeThread(shared), self._publisher)

    def start(self) -> None:
        """Connect in the background, and keep trying for as long as it takes."""
        for thread in self.threads:
            thread.start()

    def check_reply_to(self, src: str, topic: str) -> None:
        """Raises Rejected when ``src`` may not have answers sent to ``topic``."""
        self.topics.check_reply_to(src, topic, self._shared.config.mqtt.reply_prefixes)

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us."""
        return self._publisher.connection is not None

    @property
    def protocol(self) -> str | None:
        """``5`` or ``3.1.1`` of the present connection."""
        connection = self._publisher.connection
        return connection.protocol_name if connection else None

    # -- what others publish

    def publish_status(self, address: Address, status: Status) -> None:
        """Progress of a task; dropped while there is no connection."""
        self._mail.put(_json(self.topics.reply(address, "status"), status.to_dict()))

    def publish_stream(self, address: Address, chunk: dict[str, Any]) -> None:
        """Tokens of a task as they come, at most once."""
        self._mail.put(_json(self.topics.reply(address, "stream"), chunk, qos=0))

    def publish_state(self, name: str, data: Any) -> None:
        """A retained topic of this node: the last value is what a late subscriber sees."""
        self._mail.put(_json(f"{self.topics.root}/{name}", data, retain=True))

    def publish_telemetry(self, data: dict[str, Any]) -> None:
        """One sample, at most once."""
        self._mail.put(_json(f"{self.topics.root}/telemetry", data, qos=0))

    def publish_event(self, event: Event) -> None:
        """Something worth telling, at most once."""
        self._mail.put(_json(f"{self.topics.root}/event/{event.type}", event.to_dict(), qos=0))

    def results_waiting(self) -> None:
        """The outbox has something new."""
        self._mail.put(_Wake())

    # -- the end

    def hold(self) -> None:
        """Take no further tasks: the broker keeps them for the next start. Those at QoS 0 are refused."""
        self._shared.holding.set()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything that can be sent is confirmed. False when it took too long or nobody is there."""
        flushed = threading.Event()
        self._mail.put(_Flush(flushed))
        return flushed.wait(timeout_s)

    def stop(self, timeout_s: float) -> None:
        """Say goodbye (``offline``, retained), disconnect and end the threads; if we cannot say it, the will does."""
        self._shared.leaving.set()
        self._mail.put(_Publication(topic=self.topics.availability, payload=b"offline", retain=True))
        whole = self.connected and all(thread.is_alive() for thread in self.threads)
        said = whole and self.flush(timeout_s)
        self._shared.stopping.set()
        self._network.disconnect(cleanly=said)
        self._mail.put(_Wake())
        self._shared.inbox.put(_Wake())
        for thread in self.threads:
            thread.join(timeout_s)


def _json(topic: str, data: Any, *, qos: int = 1, retain: bool = False) -> _Publication:
    payload = compact(data).encode("utf-8", "replace")
    return _Publication(topic=topic, payload=payload, qos=qos, retain=retain, content_type="application/json")


class _Wake:
    """Look again."""


@dataclass(frozen=True, slots=True)
class _Flush:
    done: threading.Event


@dataclass(frozen=True, slots=True)
class _Connected:
    connection: "_Connection"


@dataclass(frozen=True, slots=True)
class _Lost:
    connection: "_Connection"


@dataclass(frozen=True, slots=True)
class _SubscriptionRefused:
    reason: str


@dataclass(frozen=True, slots=True)
class _Confirmed:
    connection: "_Connection"
    mid: int
    refusal: str | None


@dataclass(frozen=True, slots=True)
class _Acknowledged:
    """The PUBACK of this task, which has no id of its sender's, is on its way."""

    connection: "_Connection"
    seq: int


class _Thread(threading.Thread):
    """A thread whose death and whose silence are noticed by the watchdog of ``main``."""

    def __init__(self, name: str, shared: _Shared) -> None:
        super().__init__(name=name, daemon=True)
        self.shared = shared
        self.beats = 0

    def beat(self) -> None:
        """Show that it lives."""
        self.beats += 1

    def run(self) -> None:
        try:
            self.work()
        except Exception:
            # Nobody above could handle it: main sees the thread is gone and ends the process.
            log.exception("thread %s failed", self.name)

    def work(self) -> None:
        raise NotImplementedError


# -- thread mqtt-net: the socket -------------------------------------------------------------------------------------


class _Connection:
    """One connection to the broker, from CONNECT to its end. Never reused."""

    def __init__(self, shared: _Shared, protocol: MQTTProtocolVersion, beat: Callable[[], None]) -> None:
        self._shared = shared
        self._config = shared.config
        self._beat = beat
        self.is_v5 = protocol == MQTTProtocolVersion.MQTTv5
        self.protocol_name = "5" if self.is_v5 else "3.1.1"
        self.reached = False
        self.accepted = False
        self.ended = False
        self.refusal: ReasonCode | None = None
        self.window = WINDOW
        self.max_packet_bytes = self._config.mqtt.max_packet_bytes
        self.client = self._new_client(protocol)

    def _new_client(self, protocol: MQTTProtocolVersion) -> Client:
        mqtt = self._config.mqtt
        # The id is fixed: the broker keeps the session of this id, with what came in, while we are away.
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=mqtt.client_id or f"edge-llm-{self._config.node_name}",
            clean_session=None if self.is_v5 else False,
            protocol=protocol,
            manual_ack=True,
        )
        client.suppress_exceptions = True
        if mqtt.username is not None:
            client.username_pw_set(mqtt.username, self._shared.password)
        if mqtt.tls.enabled:
            client.tls_set_context(_tls_context(self._config))
        # A short break is not worth an alarm: with MQTT 5 the broker waits before it publishes the will.
        will = _properties(PacketTypes.WILLMESSAGE, WillDelayInterval=8) if self.is_v5 else None
        client.will_set(self._shared.topics.availability, b"offline", qos=1, retain=True, properties=will)
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        client.on_socket_open = _send_at_once
        # With this set, paho leaves all writing to the thread that calls loop().
        client.on_socket_register_write = _leave_it_to_the_loop
        return client

    def run(self) -> str:
        """Connect and serve until the connection ends. Returns why it ended."""
        try:
            self._connect()
            self.reached = True
            answer_by = time.monotonic() + ANSWER_S
            while (code := self.client.loop(timeout=BEAT_S)) == MQTT_ERR_SUCCESS and self.refusal is None:
                self._beat()
                if not self.accepted and time.monotonic() > answer_by:
                    return f"no answer within {ANSWER_S:g} s"
        except (OSError, ValueError) as error:
            return str(error)
        finally:
            self._end()
        return str(self.refusal) if self.refusal is not None else f"connection lost ({code.name.lower()})"

    def _end(self) -> None:
        self.ended = True
        self.client.disconnect()
        self.client.loop(timeout=0)
        # Without its callbacks nothing holds the client in a circle, and its sockets go with it.
        self.client.on_connect = self.client.on_message = self.client.on_publish = self.client.on_subscribe = None
        self._shared.mail.put(_Lost(self))

    def _connect(self) -> None:
        mqtt = self._config.mqtt
        if self.is_v5:
            lasting = _properties(PacketTypes.CONNECT, SessionExpiryInterval=mqtt.session_expiry_s)
            self.client.connect(mqtt.host, mqtt.port, mqtt.keepalive_s, clean_start=False, properties=lasting)
        else:
            self.client.connect(mqtt.host, mqtt.port, mqtt.keepalive_s)

    # Callbacks of paho: an exception here would end the network thread, so they hand over and return.

    def _on_connect(
        self, _client: Client, _userdata: Any, _flags: Any, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self.refusal = reason
            return
        self.accepted = True
        self.window = min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW))
        self.max_packet_bytes = min(self.max_packet_bytes, getattr(properties, "MaximumPacketSize", 1 << 28))
        self._subscribe()
        self._shared.mail.put(_Connected(self))

    def _subscribe(self) -> None:
        """Always, although the session remembers: a broker that lost it needs to be told again."""
        root = self._shared.topics.root
        filters = [f"{root}/task/#", f"{root}/cancel/#", f"{root}/availability"]
        if not self.is_v5:
            self.client.subscribe([(name, 1) for name in filters])
            return
        # A retained task must not run again at every connect: do not send it, and show the flag on live ones.
        options = SubscribeOptions(qos=1, retainAsPublished=True, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
        self.client.subscribe([(name, options) for name in filters])

    def _on_subscribe(
        self, _client: Client, _userdata: Any, _mid: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if refused:
            self._shared.mail.put(_SubscriptionRefused(refused[0]))

    def _on_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        arrival = _Arrival(
            connection=self,
            mid=message.mid,
            qos=message.qos,
            topic=topic,
            payload=bytes(message.payload),
            retain=message.retain,
            redelivered=message.dup,
            properties=message.properties if self.is_v5 else None,
        )
        self._shared.inbox.put(arrival)

    def _on_publish(self, _client: Client, _userdata: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        self._shared.mail.put(_Confirmed(self, mid, str(reason) if reason.is_failure else None))


def _send_at_once(_client: Client, _userdata: Any, opened: Any) -> None:
    """Else a status would wait up to 40 ms for the broker's word that the PUBACK before it has come."""
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _leave_it_to_the_loop(_client: Client, _userdata: Any, _socket: Any) -> None:
    pass


def _properties(packet: int, **values: Any) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


def _tls_context(config: Config) -> ssl.SSLContext:
    """Verified, always; a broker that cannot prove its name is not talked to."""
    tls = config.mqtt.tls
    context = ssl.create_default_context(cafile=str(tls.ca_file) if tls.ca_file else None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.cert_file:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    return context


class _Network(_Thread):
    """Keeps a connection up: one attempt after the other, with growing and jittered pauses."""

    def __init__(self, shared: _Shared) -> None:
        super().__init__("mqtt-net", shared)
        asked = shared.config.mqtt.protocol
        self._protocol = MQTTProtocolVersion.MQTTv311 if asked == "3.1.1" else MQTTProtocolVersion.MQTTv5
        self._may_fall_back = asked == "auto"
        self._only_tries = False  # 3.1.1, because the broker hung up without a word
        self._connection: _Connection | None = None

    def work(self) -> None:
        failures = 0
        while not self.shared.stopping.is_set():
            self._connection = connection = _Connection(self.shared, self._protocol, self.beat)
            reason = connection.run()
            if self.shared.stopping.is_set():
                return
            if self._fall_back(connection):
                continue
            failures = 0 if connection.accepted else failures + 1
            self._report(connection, reason, failures)
            self._pause(failures)

    def disconnect(self, *, cleanly: bool) -> None:
        """End the present connection, cleanly so that the broker does not publish the will."""
        if self._connection is None:
            return
        if cleanly:
            self._connection.client.disconnect()
            return
        wire: Any = self._connection.client.socket()
        if wire is not None:
            with suppress(OSError):
                wire.shutdown(SHUT_RDWR)

    def _fall_back(self, connection: _Connection) -> bool:
        """Whether the broker knows no MQTT 5, so that the next attempt speaks 3.1.1.

        Most brokers say so; some cannot even read the request and hang up, as one that is going down does too. So what
        was only tried after that does not last longer than its connection.
        """
        if self._only_tries:
            self._only_tries = False
            self._protocol = MQTTProtocolVersion.MQTTv5
            return False
        unsupported = connection.refusal is not None and connection.refusal.value == UNSUPPORTED_VERSION
        hung_up = connection.reached and not connection.accepted and connection.refusal is None
        if not (self._may_fall_back and connection.is_v5 and (unsupported or hung_up)):
            return False
        log.info("the broker does not speak MQTT 5: using 3.1.1")
        self._only_tries = hung_up
        self._protocol = MQTTProtocolVersion.MQTTv311
        return True

    def _report(self, connection: _Connection, reason: str, failures: int) -> None:
        """The edges only: lost once, unreachable once."""
        mqtt = self.shared.config.mqtt
        if connection.accepted:
            log.warning("broker %s:%d: %s", mqtt.host, mqtt.port, reason)
            self.shared.handlers.on_event("broker_lost", "warning", {"reason": reason})
        elif failures == 1:
            log.warning("broker %s:%d: %s; trying again until it answers", mqtt.host, mqtt.port, reason)

    def _pause(self, failures: int) -> None:
        seconds = min(30.0, 2.0 ** min(failures, 5)) * random.uniform(0.5, 1.0) if failures else 0.2  # noqa: S311
        while seconds > 0 and not self.shared.stopping.wait(min(seconds, BEAT_S)):
            self.beat()
            seconds -= BEAT_S


# -- thread mqtt-intake: tasks in ------------------------------------------------------------------------------------


class _IntakeThread(_Thread):
    """Groups arrivals, has them committed, and acknowledges in their order."""

    def __init__(self, shared: _Shared) -> None:
        super().__init__("mqtt-intake", shared)
        self._line: deque[_Arrival] = deque()  # not yet acknowledged, in order of arrival
        self._replays: set[bytes] = set()  # retained tasks already refused, by topic and content

    def work(self) -> None:
        while not self.shared.stopping.is_set():
            self.beat()
            group = self._next_group()
            if self.shared.holding.is_set():
                group = [arrival for arrival in group if not arrival.qos]
            if group:
                self._line += (arrival for arrival in group if arrival.qos)
                self._take(group)
            self._acknowledge()

    def _next_group(self) -> list[_Arrival]:
        group: list[_Arrival] = []
        try:
            item = self.shared.inbox.get(timeout=BEAT_S)
            while True:
                if isinstance(item, _Arrival):
                    group.append(item)
                if len(group) == GROUP:
                    break
                item = self.shared.inbox.get_nowait()
        except Empty:
            pass
        return group

    def _take(self, group: list[_Arrival]) -> None:
        tasks: list[tuple[_Arrival, Incoming]] = []
        for arrival in group:
            route = self.shared.topics.route(arrival.topic)
            if route is None:
                log.warning("ignored a message on %s: no such topic here", ascii(arrival.topic)[:100])
            if route is None or route[0] != "task" or not arrival.payload:  # an empty task clears a retained one
                arrival.answered = True
            if route is not None:
                self._dispatch(*route, arrival, tasks)
        if tasks:
            self._submit(tasks)

    def _dispatch(
        self, kind: str, levels: list[str], arrival: _Arrival, tasks: list[tuple[_Arrival, Incoming]]
    ) -> None:
        if kind == "availability":
            self._assert_online(arrival)
        elif kind == "cancel":
            self._cancel(levels, arrival)
        elif arrival.payload and arrival.retain:
            self._refuse_retained(arrival, _incoming(levels, arrival))
        elif arrival.payload:
            tasks.append((arrival, _incoming(levels, arrival)))

    def _assert_online(self, arrival: _Arrival) -> None:
        """The will of an earlier connection may come late and would leave us marked as gone."""
        if arrival.payload != b"online" and not self.shared.leaving.is_set():
            self.shared.mail.put(_online(self.shared.topics))

    def _cancel(self, levels: list[str], arrival: _Arrival) -> None:
        if arrival.retain:
            return
        if levels:
            self.shared.handlers.cancel(*levels)
        else:
            self.shared.handlers.cancel(None, arrival.payload.decode("utf-8", "replace").strip())

    def _refuse_retained(self, arrival: _Arrival, incoming: Incoming) -> None:
        """A retained task would come again at every connect: refuse it.

        MQTT 3.1.1 does replay it at every connect, and shows the flag only then: it is refused once, and not at all
        under the id of a task that is known, which has an answer of its own.
        """
        digest = sha256(arrival.topic.encode() + b"\0" + arrival.payload).digest()
        known = incoming.id is not None and self.shared.handlers.known(incoming.src, incoming.id)
        if known or (digest in self._replays and not arrival.connection.is_v5):
            arrival.answered = True
            return
        if len(self._replays) < MEMORY:
            self._replays.add(digest)
        refused = self.shared.handlers.refuse(incoming, "retained", "a task must not be retained; clear the topic")
        self._answer_refusal(refused, arrival)
        self.shared.handlers.on_event("retained_task_refused", "warning", {"topic": arrival.topic})

    def _submit(self, tasks: list[tuple[_Arrival, Incoming]]) -> None:
        try:
            answers = self.shared.handlers.submit([incoming for _, incoming in tasks])
        except StorageFull as error:
            log.error("refusing tasks: %s", error)  # noqa: TRY400
            refuse = self.shared.handlers.refuse
            answers = [refuse(incoming, "storage_full", "no room on the disk") for _, incoming in tasks]
        for (arrival, _), answer in zip(tasks, answers, strict=True):
            if isinstance(answer, Refused):
                self._answer_refusal(answer, arrival)
            else:
                self._answer_accepted(answer, arrival)

    def _answer_accepted(self, accepted: Accepted, arrival: _Arrival) -> None:
        arrival.answered = True
        arrival.unacked_seq = None if accepted.own_id else accepted.seq
        self.shared.mail.put(_json(self.shared.topics.reply(accepted.address, "status"), accepted.status.to_dict()))
        if accepted.result is not None:
            self.shared.mail.put(_Wake())

    def _answer_refusal(self, refused: Refused, arrival: _Arrival) -> None:
        """A refusal is stored nowhere: the message is acknowledged only when its answer has arrived."""
        log.info("refused %s/%s: %s", refused.address.src, refused.address.id, _reason(refused.result))

        def answered(_delivered: bool) -> None:  # noqa: FBT001
            arrival.answered = True
            self.shared.inbox.put(_Wake())

        self.shared.mail.put(_parts_of(self.shared.topics, refused.address, refused.result, _Delivery(done=answered)))

    def _acknowledge(self) -> None:
        """PUBACK in the order of arrival, as MQTT demands, as far as everything is answered."""
        while self._line and (self._line[0].answered or self._line[0].connection.ended):
            arrival = self._line.popleft()
            if arrival.answered:
                # On a connection that is gone this goes nowhere, and the broker sends the message again.
                arrival.connection.client.ack(arrival.mid, arrival.qos)
                if arrival.unacked_seq is not None:
                    self.shared.mail.put(_Acknowledged(arrival.connection, arrival.unacked_seq))


def _reason(result: Result) -> str:
    return f"{result.error.code}: {result.error.message}" if result.error else result.state.value


def _incoming(levels: list[str], arrival: _Arrival) -> Incoming:
    """What the topic, the payload and the MQTT 5 properties say together."""
    properties = arrival.properties
    fields = dict(getattr(properties, "UserProperty", ()))
    return Incoming(
        payload=arrival.payload,
        src=levels[0] if levels else ANONYMOUS,
        id=levels[1] if len(levels) == 2 else None,
        fields=fields,
        content_type=getattr(properties, "ContentType", None),
        ttl_s=getattr(properties, "MessageExpiryInterval", None),
        reply_to=getattr(properties, "ResponseTopic", None),
        correlation=getattr(properties, "CorrelationData", None),
        redelivered=arrival.redelivered,
    )


# -- thread mqtt-publisher: everything out ---------------------------------------------------------------------------


def _online(topics: Topics) -> _Publication:
    return _Publication(topic=topics.availability, payload=b"online", retain=True)


def _parts_of(topics: Topics, address: Address, result: Result, delivery: _Delivery) -> list[_Publication]:
    """A result in every form and place that its sender may look at."""
    data = result.to_dict()
    whole = _json(topics.reply(address, "result"), data)
    whole.delivery = delivery
    parts = [whole]
    text = (result.text or "").encode("utf-8", "replace")
    if result.state is not TaskState.SUCCEEDED:
        text = f"error: {_reason(result)}".encode("utf-8", "replace")
    if address.plain:
        parts.append(
            _Publication(
                topic=topics.reply(address, "text"), payload=text, content_type="text/plain", delivery=delivery
            )
        )
    if address.reply_to and address.reply_to != whole.topic:
        parts.append(
            _Publication(
                topic=address.reply_to,
                payload=text if address.plain else whole.payload,
                content_type="text/plain" if address.plain else whole.content_type,
                correlation=address.correlation,
                delivery=delivery,
                vital=False,
            )
        )
    delivery.parts = len(parts)
    return parts


class _Publisher(_Thread):
    """Sends within the window, first what somebody waits for."""

    def __init__(self, shared: _Shared) -> None:
        super().__init__("mqtt-publisher", shared)
        self.connection: _Connection | None = None
        self._parts: deque[_Publication] = deque(maxlen=MEMORY)  # of refusals and results that are on their way
        self._progress: deque[_Publication] = deque(maxlen=MEMORY)  # status, stream, telemetry, events
        self._retained: dict[str, _Publication] = {}  # the last value of each retained topic
        self._stale: dict[str, None] = {}  # retained topics to be sent, in order
        self._in_flight: dict[int, _Publication] = {}
        self._acknowledged: list[int] = []  # tasks whose PUBACK went out after the last publication
        self._delivering: dict[int, _Delivery] = {}  # results on their way, by seq
        self._strikes: dict[int, int] = {}
        self._outbox_may_have_more = True
        self._flushes: list[_Flush] = []

    def work(self) -> None:
        mail = self.shared.mail
        while not self.shared.stopping.is_set():
            self.beat()
            try:
                item = mail.get(timeout=BEAT_S)
                while True:
                    self._handle(item)
                    item = mail.get_nowait()
            except Empty:
                pass
            self._pump()
            self._answer_flushes()

    def _handle(self, item: Any) -> None:
        match item:
            case _Publication():
                self._keep(item)
            case list():
                self._keep_parts(item)
            case _Confirmed(connection, mid, refusal) if connection is self.connection:
                self._confirmed(mid, refusal)
            case _Acknowledged(connection, seq) if connection is self.connection:
                self._acknowledged.append(seq)
            case _Connected(connection):
                self._connected(connection)
            case _Lost(connection) if connection is self.connection:
                self._lost()
            case _SubscriptionRefused(reason):
                log.error("the broker refuses a subscription (%s): check its access rules", reason)
                self.shared.handlers.on_event("subscription_refused", "error", {"reason": reason})
            case _Wake():
                self._outbox_may_have_more = True
            case _Flush():
                self._flushes.append(item)

    def _keep(self, publication: _Publication) -> None:
        if publication.retain:
            self._retained[publication.topic] = publication
            self._stale.pop(publication.topic, None)
            self._stale[publication.topic] = None
        elif self.connection is not None:
            self._progress.append(publication)

    def _keep_parts(self, parts: list[_Publication]) -> None:
        """A refusal: without a connection it is dropped, because its message will come again."""
        if self.connection is not None:
            self._parts.extend(parts)

    def _connected(self, connection: _Connection) -> None:
        self.connection = connection
        if not self.shared.leaving.is_set():
            self._retained[self.shared.topics.availability] = _online(self.shared.topics)
        self._stale = dict.fromkeys(self._retained)
        self._outbox_may_have_more = True
        mqtt = self.shared.config.mqtt
        log.info("broker %s:%d: connected, MQTT %s", mqtt.host, mqtt.port, connection.protocol_name)
        self.shared.handlers.on_event("broker_connected", "info", {"protocol": connection.protocol_name})

    def _lost(self) -> None:
        self.connection = None
        self._count_strikes()
        for backlog in (self._parts, self._progress):
            backlog.clear()
        self._in_flight.clear()
        self._acknowledged.clear()
        self._delivering.clear()

    # -- sending

    def _pump(self) -> None:
        while self.connection is not None and len(self._in_flight) < self.connection.window:
            publication = self._next()
            if publication is None:
                return
            self._send(self.connection, publication)

    def _next(self) -> _Publication | None:
        for backlog in (self._parts, self._progress):
            if backlog:
                return backlog.popleft()
        if self._stale:
            topic = next(iter(self._stale))
            del self._stale[topic]
            return self._retained[topic]
        self._fetch_results()
        return self._parts.popleft() if self._parts else None

    def _send(self, connection: _Connection, publication: _Publication) -> None:
        properties = None
        if connection.is_v5:
            properties = _properties(PacketTypes.PUBLISH)
            if publication.content_type:
                properties.ContentType = publication.content_type
            if publication.correlation is not None:
                properties.CorrelationData = publication.correlation
        info = connection.client.publish(
            publication.topic, publication.payload, publication.qos, publication.retain, properties
        )
        if publication.qos and info.rc == MQTT_ERR_SUCCESS:
            publication.proves = tuple(self._acknowledged)
            self._acknowledged.clear()
            self._in_flight[info.mid] = publication

    def _confirmed(self, mid: int, refusal: str | None) -> None:
        publication = self._in_flight.pop(mid, None)
        if publication is None:
            return
        if publication.proves:
            self.shared.handlers.mark_acked(publication.proves)
        if refusal is not None:
            log.error("the broker refuses a message on %s: %s", publication.topic, refusal)
        delivery = publication.delivery
        if delivery is None:
            return
        delivery.refused |= refusal is not None and publication.vital
        delivery.parts -= 1
        if delivery.parts == 0:
            delivery.done(not delivery.refused)

    # -- results from the outbox

    def _fetch_results(self) -> None:
        if not self._outbox_may_have_more or self.connection is None:
            return
        suspect = next(iter(self._strikes), None)
        if suspect is not None and self._delivering:
            return  # a suspect is sent alone, so that the blame is certain
        limit = 1 if suspect is not None else self.connection.window
        batch = self.shared.handlers.unsent(limit, self._delivering)
        self._outbox_may_have_more = len(batch) == limit
        for stored in batch:
            self._begin(stored, self.connection.max_packet_bytes)

    def _begin(self, stored: Stored, max_packet_bytes: int) -> None:
        assert stored.result is not None  # noqa: S101
        result = _fitted(stored.result, max_packet_bytes - len(stored.task.correlation or b""))

        def done(delivered: bool) -> None:  # noqa: FBT001
            self._delivering.pop(stored.seq, None)
            self._strikes.pop(stored.seq, None)
            self._outbox_may_have_more = True
            if delivered:
                self.shared.handlers.mark_sent(stored.seq)
            else:
                self._give_up(stored.seq, "refused by the broker")

        delivery = _Delivery(done=done, seq=stored.seq)
        self._delivering[stored.seq] = delivery
        self._parts.extend(_parts_of(self.shared.topics, stored.task.address, result, delivery))

    def _count_strikes(self) -> None:
        """Note which results were on their way when the connection ended; give up on one that ends it every time."""
        for seq in self._delivering:
            self._strikes[seq] = self._strikes.get(seq, 0) + 1
            if self._strikes[seq] > STRIKES:
                del self._strikes[seq]
                self._give_up(seq, "its sending ended the connection every time")

    def _give_up(self, seq: int, why: str) -> None:
        log.error("result of task %d set aside: %s", seq, why)
        self.shared.handlers.set_aside(seq)
        self.shared.handlers.on_event("poison_result", "error", {"seq": seq, "reason": why})

    def _answer_flushes(self) -> None:
        idle = not (self._in_flight or self._parts or self._progress or self._stale or self._delivering)
        if self._flushes and self.connection is not None and idle and not self._outbox_may_have_more:
            for flush in self._flushes:
                flush.done.set()
            self._flushes.clear()


def _fitted(result: Result, max_packet_bytes: int) -> Result:
    """The result, its text cut if the broker would not take it whole."""
    room = max_packet_bytes - 4096
    excess = len(result.to_json().encode("utf-8", "replace")) - room
    if excess <= 0 or not result.text:
        return result
    kept = len(result.text.encode("utf-8", "replace")) - excess
    # JSON may need two bytes and more for one of text: a third of what is left is certain to fit.
    text = result.text.encode("utf-8", "replace")[: max(0, kept // 3)].decode("utf-8", "ignore")
    return replace(result, text=text, json=None, truncated=True)


# -- for the commands that a person runs -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One message as a ``Device`` got it. ``retain``: the broker had kept it."""

    topic: str
    payload: bytes
    retain: bool


class Device:
    """A connection for as long as its ``with`` block: it subscribes, sends and waits, all in the caller's thread.

    Every method raises OSError, in words for a person, when the broker is out of reach, refuses or falls silent.
    """

    def __init__(self, config: Config, *, password: str | None = None, timeout_s: float = 10.0) -> None:
        self.is_v5 = config.mqtt.protocol != "3.1.1"
        self._config = config
        self._password = password
        self._timeout_s = timeout_s
        self._messages: deque[Received] = deque()
        self._answers: dict[int, list[ReasonCode]] = {}  # to SUBSCRIBE and PUBLISH, by packet id
        self._welcome: ReasonCode | None = None
        self._name = f"broker {config.mqtt.host}:{config.mqtt.port}"

    def __enter__(self) -> Self:
        """Connect with MQTT 5, or with 3.1.1 when the broker knows nothing newer."""
        welcome = self._connect()
        if welcome.value == UNSUPPORTED_VERSION and self.is_v5 and self._config.mqtt.protocol == "auto":
            self.is_v5 = False
            welcome = self._connect()
        self._check(welcome, "the connection")
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()

    def subscribe(self, topic_filter: str) -> None:
        """Have all messages sent to us that match, at QoS 1; returns once the broker has agreed."""
        self._check(self._answer_to(self._client.subscribe(topic_filter, 1)[1]), f"to send {topic_filter}")

    def publish(
        self,
        topic: str,
        payload: bytes | str,
        *,
        retain: bool = False,
        response_topic: str | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> None:
        """Send at QoS 1; returns once the broker has it. MQTT 3.1.1 has neither response topic nor ``fields``."""
        properties = None
        if self.is_v5:
            properties = _properties(PacketTypes.PUBLISH, UserProperty=list((fields or {}).items()))
            if response_topic is not None:
                properties.ResponseTopic = response_topic
        sent = self._client.publish(topic, payload, 1, retain, properties)
        self._check(self._answer_to(sent.mid), f"a message on {topic}")

    def get(self, timeout_s: float) -> Received | None:
        """The next message, None when none has come within that time."""
        self._serve_until(lambda: bool(self._messages), timeout_s)
        return self._messages.popleft() if self._messages else None

    def _connect(self) -> ReasonCode:
        mqtt = self._config.mqtt
        self._client = client = Client(
            CallbackAPIVersion.VERSION2,
            protocol=MQTTProtocolVersion.MQTTv5 if self.is_v5 else MQTTProtocolVersion.MQTTv311,
        )
        client.connect_timeout = self._timeout_s
        if mqtt.username is not None:
            client.username_pw_set(mqtt.username, self._password)
        if mqtt.tls.enabled:
            client.tls_set_context(_tls_context(self._config))
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        return self._welcomed(client)

    def _welcomed(self, client: Client) -> ReasonCode:
        self._welcome = None
        try:
            client.connect(self._config.mqtt.host, self._config.mqtt.port)
        except OSError as error:
            raise ConnectionError(f"{self._name} does not answer: {error}") from error
        self._serve_until(lambda: self._welcome is not None, self._timeout_s)
        if self._welcome is None:
            raise TimeoutError(f"{self._name}: no answer within {self._timeout_s:g} s")
        return self._welcome

    def _answer_to(self, mid: int | None) -> ReasonCode:
        if mid is not None and self._serve_until(lambda: mid in self._answers, self._timeout_s):
            return self._answers.pop(mid)[0]
        raise TimeoutError(f"{self._name}: no answer within {self._timeout_s:g} s")

    def _serve_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Exchange packets until ``done()`` or the end of the time; whether it was done."""
        deadline = time.monotonic() + timeout_s
        while not done() and (left_s := deadline - time.monotonic()) > 0:
            if self._client.loop(min(left_s, 1.0)) != MQTT_ERR_SUCCESS and not done():
                raise ConnectionError(f"{self._name}: connection lost")
        return done()

    def _check(self, reason: ReasonCode, what: str) -> None:
        if reason.is_failure:
            raise ConnectionError(f"{self._name} refuses {what}: {reason}")

    def _on_connect(self, _client: Client, _userdata: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        self._welcome = reason

    def _on_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        self._messages.append(
            Received(topic=message.topic, payload=bytes(message.payload), retain=bool(message.retain))
        )

    def _on_subscribe(self, _client: Client, _userdata: Any, mid: int, reasons: list[ReasonCode], _: Any) -> None:
        self._answers[mid] = reasons

    def _on_publish(self, _client: Client, _userdata: Any, mid: int, reason: ReasonCode, _: Any) -> None:
        self._answers[mid] = [reason]
