"""MQTT in and out: the only file that knows topics.

Three threads. ``mqtt-net`` owns the connection, one after the other. ``mqtt-intake`` reads what arrived, commits it in
groups and acknowledges in the order of arrival. ``mqtt-publisher`` sends: at most a window of unconfirmed messages, and
only while connected; all else waits in the store's outbox. What the network thread hears it only puts on a queue.
"""

import logging
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from queue import Empty, SimpleQueue
from typing import Any

from edge_daemon.config import SENDER, Config
from edge_daemon.errors import ConfigError, Rejected, shown
from edge_daemon.journal import Kind, about
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
from edge_daemon.mqtt_connection import UNACKNOWLEDGED, Arrival, Connection, TooLarge, Version, check_tls
from edge_daemon.steps import reached

log = logging.getLogger(__name__)

GROUP = 64
"""Tasks committed together at most."""
OVERRUN = 300
"""So many unacknowledged messages show a broker that does not respect our Receive Maximum, and a flood."""
UNREAD_BYTES = 1 << 20
"""Messages that have come and are not read yet: beyond it we stop listening, and TCP makes the broker wait."""
ARRIVAL_BYTES = 1024
"""What a message takes besides its payload."""
BEAT_S = 15.0
"""The longest that a thread here waits before it shows that it lives."""
STRIKES = 4
"""A result is set aside when so many times in a row the broker ended the connection as soon as it was sent, alone."""
BLAME_S = 2.0
"""A broker that ends the connection over a message does so within this time."""
MAX_BACKLOG = 1000
"""Status messages, events and refusals of QoS 0 tasks kept for sending at most; results are kept by the store."""
MAX_REPLAYS = 1000
"""Retained tasks that are known to have been refused."""
REFUSALS, REFUSALS_S = 50, 10.0
"""So many refusals in so many seconds have a line each; of the others the number is told."""
STEADY_S = 10.0
"""A connection that lasted less is a short one."""
SHORT_ONES = 6
"""Short connections in a row before the pauses grow: finding a poisonous result takes a few."""
REPORT_S = 60.0
"""While there is no connection, a new reason for that is written at most this often."""

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
        elif not topic.startswith((own := f"{self.root}/reply/{src}/", *_of_sender(prefixes, src))):
            problem = f"allowed are {own}... and {', '.join(_of_sender(prefixes, src)) or 'nothing else'}"
        else:
            return
        raise Rejected("forbidden_reply_topic", f"reply_to: {problem}")


def _of_sender(prefixes: Iterable[str], src: str) -> tuple[str, ...]:
    return tuple(prefix.replace(SENDER, src) for prefix in prefixes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handlers:
    """What the bridge asks of the rest of the daemon; it does not know who answers."""

    submit: Callable[[Sequence[Incoming], Callable[[], None]], list[Accepted | Refused]]
    """Calls the second before it looks at each of the first: one may take long, and all of them much longer."""
    refuse: Callable[[Incoming, str, str], Refused]
    cancel: Callable[[str | None, str], bool]
    """Whether there was a task to end."""
    known: Callable[[str, str], bool]
    unsent: Callable[[int, Iterable[int]], list[Stored]]
    mark_sent: Callable[[int], None]
    set_aside: Callable[[int], None]
    unacked: Callable[[], list[int]]
    """Tasks without an id of their sender's that the broker may send again."""
    mark_acked: Callable[[Iterable[int]], None]
    """It will not."""
    on_event: Callable[[str, str, dict[str, Any]], None]
    """Type, severity and data of something worth telling."""
    on_end: Callable[[], None] = lambda: None
    """A thread of the bridge has ended, in whatever way."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Delivery:
    """Publications that are confirmed together: the parts of one result."""

    done: Callable[[str], None]
    """Told in the end why the broker does not have it; an empty text when it has."""
    seq: int | None = None
    parts: int = 0
    refusal: str = ""
    owed: bool = True
    """Somebody waits for it whom we have not acknowledged."""


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

    @property
    def is_owed(self) -> bool:
        """Part of an answer that is in no outbox, whose message is not acknowledged before."""
        return self.delivery is not None and self.delivery.owed and self.delivery.seq is None


@dataclass(slots=True, kw_only=True, eq=False)
class _Pending:
    """A message that has come, and what is still to be done before it may be acknowledged."""

    arrival: Arrival
    answered: bool = False
    unacked_seq: int | None = None


class _Backlog:
    """How much has come and is not read yet."""

    def __init__(self) -> None:
        self._bytes = 0
        self._changed = threading.Condition()

    def add(self, arrival: Arrival) -> None:
        with self._changed:
            self._bytes += len(arrival.payload) + ARRIVAL_BYTES

    def remove(self, arrivals: Iterable[Arrival]) -> None:
        with self._changed:
            self._bytes -= sum(len(arrival.payload) + ARRIVAL_BYTES for arrival in arrivals)
            self._changed.notify_all()

    def wait_for_room(self, timeout_s: float) -> bool:
        """Whether there is room by then."""
        with self._changed:
            return self._changed.wait_for(lambda: self._bytes <= UNREAD_BYTES, timeout_s)


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
    inbox: "SimpleQueue[Arrival | _Wake]" = field(default_factory=SimpleQueue)
    """For the intake."""
    unread: _Backlog = field(default_factory=_Backlog)
    """What is in the inbox."""
    mail: "SimpleQueue[_Mail]" = field(default_factory=SimpleQueue)
    """For the publisher."""


class MqttBridge:
    """The daemon's side of MQTT. Any thread may call it; only ``flush`` and ``stop`` wait for the network.

    Raises:
        ConfigError: a certificate or key of ``mqtt.tls`` cannot be used.
    """

    def __init__(self, config: Config, handlers: Handlers, *, password: str | None = None) -> None:
        check_tls(config)
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
        return connection.version if connection else None

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

    def stop(self, timeout_s: float, *, farewell: bool = True) -> None:
        """Say goodbye (``offline``, retained), disconnect and end the threads; if we cannot say it, the will does.

        Without ``farewell`` we stay marked as online, because we will be back at once.
        """
        if farewell:
            self._shared.leaving.set()
            self._mail.put(_Publication(topic=self.topics.availability, payload=b"offline", retain=True))
        whole = self.connected and self._network.is_alive() and self._publisher.is_alive()
        said = whole and self.flush(timeout_s)
        self._shared.stopping.set()
        self._network.disconnect(cleanly=said or (whole and not farewell))
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
    connection: Connection
    quietly: bool
    """Those before it did not last: it is not worth a line."""


@dataclass(frozen=True, slots=True)
class _Lost:
    connection: Connection


@dataclass(frozen=True, slots=True)
class _SubscriptionRefused:
    reason: str


@dataclass(frozen=True, slots=True)
class _Confirmed:
    connection: Connection
    mid: int
    refusal: str | None


@dataclass(frozen=True, slots=True)
class _Acknowledged:
    """The PUBACK of this task, which has no id of its sender's, is on its way."""

    connection: Connection
    seq: int


@dataclass(frozen=True, slots=True)
class _Answer:
    """A result that no outbox holds, such as a refusal."""

    parts: list[_Publication]


_Mail = _Publication | _Answer | _Confirmed | _Acknowledged | _Connected | _Lost | _SubscriptionRefused | _Wake | _Flush


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
        finally:
            self.shared.handlers.on_end()

    def work(self) -> None:
        raise NotImplementedError


# -- thread mqtt-net: the socket -------------------------------------------------------------------------------------


class _Network(_Thread):
    """Keeps a connection up: one attempt after the other, with growing and jittered pauses."""

    def __init__(self, shared: _Shared) -> None:
        super().__init__("mqtt-net", shared)
        asked = shared.config.mqtt.protocol
        self._version: Version = "3.1.1" if asked == "3.1.1" else "5"
        self._may_fall_back = asked == "auto"
        self._only_tries = False  # 3.1.1, because the broker hung up without a word
        self._connection: Connection | None = None
        self._receive_maximum = UNACKNOWLEDGED
        self._short_ones = 0
        """Connections in a row that were accepted and did not last."""
        self._reported = ("", -REPORT_S)
        """Why there is no connection, as it was last written, and when."""

    def work(self) -> None:
        failures = 0
        while not self.shared.stopping.is_set():
            reason, connection = self._attempt()
            if self.shared.stopping.is_set():
                return
            if connection is not None and self._fall_back(connection):
                continue
            if connection is not None and connection.accepted:
                failures = 0
                self._note_lost(connection, reason)
            else:
                failures += 1
                self._report(reason, first=failures == 1 and self._short_ones <= SHORT_ONES)
            self._pause(max(failures, self._short_ones - SHORT_ONES))

    def _attempt(self) -> tuple[str, Connection | None]:
        """Connect, and serve until the connection ends. Returns why it ended, or why there was none."""
        try:
            self._connection = connection = self.new_connection()
        except ConfigError as error:  # a certificate that was there at the start is being changed
            return str(error), None
        return connection.run(BEAT_S), connection

    def new_connection(self) -> Connection:
        """One that is not open yet."""
        root = self.shared.topics.root
        return Connection(
            self.shared.config,
            self,
            version=self._version,
            filters=(f"{root}/task/#", f"{root}/cancel/#", self.shared.topics.availability),
            will_topic=self.shared.topics.availability,
            password=self.shared.password,
            receive_maximum=self._receive_maximum,
        )

    def disconnect(self, *, cleanly: bool) -> None:
        """End the present connection, cleanly so that the broker does not publish the will."""
        if self._connection is not None:
            self._connection.close(cleanly=cleanly)

    # -- what the connection tells

    def connected(self, connection: Connection) -> None:
        self.shared.mail.put(_Connected(connection, quietly=self._short_ones >= SHORT_ONES))

    def arrived(self, arrival: Arrival) -> None:
        self.shared.unread.add(arrival)
        self.shared.inbox.put(arrival)
        if not self.shared.holding.is_set() and arrival.connection.unacknowledged > OVERRUN:
            self.slow_down(arrival.connection)
        # The intake never waits for us: there will be room.
        while not self.shared.unread.wait_for_room(BEAT_S) and not self.shared.stopping.is_set():
            self.beat()

    def confirmed(self, connection: Connection, mid: int, refusal: str | None) -> None:
        self.shared.mail.put(_Confirmed(connection, mid, refusal))

    def subscription_refused(self, reason: str) -> None:
        self.shared.mail.put(_SubscriptionRefused(reason))

    def lost(self, connection: Connection) -> None:
        self.shared.mail.put(_Lost(connection))

    def slow_down(self, connection: Connection) -> None:
        """The broker does not respect our Receive Maximum: connect anew and ask for one at a time, which helps.

        mosquitto before 2.0.12 hands over as many more as the maximum for every acknowledgement.
        """
        if connection.is_v5 and connection.receive_maximum > 1:
            self._receive_maximum = 1
            asked = connection.receive_maximum
            connection.give_up(f"it hands over more than {OVERRUN} messages at once, {asked} were agreed")

    # -- when it has ended

    def _fall_back(self, connection: Connection) -> bool:
        """Whether the broker knows no MQTT 5, so that the next attempt speaks 3.1.1.

        Most brokers say so; some cannot even read the request and hang up, as one that is going down does too. So what
        was only tried after that does not last longer than its connection.
        """
        if self._only_tries:
            self._only_tries = False
            self._version = "5"
            return False
        if not (self._may_fall_back and connection.is_v5 and (connection.unsupported or connection.hung_up)):
            return False
        log.info("the broker %s: trying MQTT 3.1.1", "hung up" if connection.hung_up else "does not speak MQTT 5")
        self._only_tries = connection.hung_up
        self._version = "3.1.1"
        return True

    def _note_lost(self, connection: Connection, reason: str) -> None:
        """A connection was lost. Two clients of one id end each other's for ever: say so once, and wait longer."""
        mqtt = self.shared.config.mqtt
        self._short_ones = self._short_ones + 1 if connection.lasted_s < STEADY_S else 0
        self.shared.handlers.on_event("broker_lost", "warning", {"reason": reason})
        if self._short_ones <= SHORT_ONES:
            log.warning("broker %s:%d: %s", mqtt.host, mqtt.port, reason, extra=about(Kind.BROKER_LOST))
        if self._short_ones == SHORT_ONES:
            log.error(
                "broker %s:%d: %d connections in a row were lost soon (%s): does another client use the id %s?"
                " From now on the pauses grow",
                *(mqtt.host, mqtt.port, SHORT_ONES, reason, connection.client_id),
            )
            self.shared.handlers.on_event(
                "connections_do_not_last", "error", {"reason": reason, "client_id": connection.client_id}
            )

    def _report(self, reason: str, *, first: bool) -> None:
        """Why there is no connection: once, and again when that changes."""
        mqtt = self.shared.config.mqtt
        text, at = self._reported
        now = time.monotonic()
        if first or (reason != text and now - at >= REPORT_S):
            extra = about(Kind.BROKER_LOST)
            log.warning("broker %s:%d: %s; trying again until it answers", mqtt.host, mqtt.port, reason, extra=extra)
            self._reported = (reason, now)

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
        self._line: deque[_Pending] = deque()  # not yet acknowledged, in order of arrival
        self._connection: Connection | None = None  # that of the newest arrival
        self._may_come_again: set[int] = set()  # tasks of earlier connections that the broker may still send again
        self._replays: set[bytes] = set()  # retained tasks already refused, by topic and content
        self._told = _RefusalLog()

    def work(self) -> None:
        while not self.shared.stopping.is_set():
            self.beat()
            group = self._next_group()
            arrived = [pending.arrival for pending in group]
            if self.shared.holding.is_set():
                group = [pending for pending in group if not pending.arrival.qos]
            if group:
                self._line += (pending for pending in group if pending.arrival.qos)
                self._take(group)
            self.shared.unread.remove(arrived)
            for arrival in arrived:
                arrival.forget_content()
            self._acknowledge()
            self._told.look()

    def _next_group(self) -> list[_Pending]:
        group: list[_Pending] = []
        try:
            item = self.shared.inbox.get(timeout=BEAT_S)
            while True:
                if isinstance(item, Arrival):
                    group.append(_Pending(arrival=item))
                if len(group) == GROUP:
                    break
                item = self.shared.inbox.get_nowait()
        except Empty:
            pass
        return group

    def _take(self, group: list[_Pending]) -> None:
        """Everything in the order of arrival: a cancel follows its task. Tasks in a row are submitted together."""
        reached("messages_received")
        tasks: list[tuple[_Pending, Incoming]] = []
        for pending in group:
            self.beat()  # a cancel is a commit of its own
            arrival = pending.arrival
            self._look_for_redelivery(arrival, tasks)
            route = self.shared.topics.route(arrival.topic)
            if route is None:
                log.warning("ignored a message on %s: no such topic here", ascii(arrival.topic)[:100])
            if route is None or route[0] != "task" or not arrival.payload:  # an empty task clears a retained one
                pending.answered = True
            if route is not None:
                self._dispatch(*route, pending, tasks)
        self._submit(tasks)

    def _look_for_redelivery(self, arrival: Arrival, tasks: list[tuple[_Pending, Incoming]]) -> None:
        """Note which tasks without an id of their sender's cannot come again any more.

        For a PUBACK may have arrived without our knowing, and such a task must not be taken for one with an equal text
        that comes much later. A broker that has lost our session sends nothing again. One that has kept it sends again
        first, in order, before anything new; if one does otherwise, a task runs twice, but none is lost.
        """
        if arrival.connection is not self._connection:
            self._submit(tasks)
            self._connection = arrival.connection
            self._may_come_again = set(self.shared.handlers.unacked())
        is_new = arrival.qos > 0 and not arrival.redelivered and not arrival.retain
        if self._may_come_again and (is_new or not arrival.connection.resumed):
            self._submit(tasks)
            self.shared.handlers.mark_acked(self._may_come_again)
            self._may_come_again = set()

    def _dispatch(
        self, kind: str, levels: list[str], pending: _Pending, tasks: list[tuple[_Pending, Incoming]]
    ) -> None:
        arrival = pending.arrival
        if kind == "availability":
            self._assert_online(arrival)
        elif kind == "cancel":
            self._submit(tasks)
            self._cancel(levels, arrival)
        elif arrival.payload and arrival.retain:
            self._submit(tasks)
            self._refuse_retained(pending, _incoming(levels, arrival))
        elif arrival.payload:
            tasks.append((pending, _incoming(levels, arrival)))
        else:
            log.debug("ignored an empty message on %s", shown(arrival.topic))

    def _assert_online(self, arrival: Arrival) -> None:
        """The will of an earlier connection may come late and would leave us marked as gone."""
        if arrival.payload != b"online" and not self.shared.leaving.is_set():
            self.shared.mail.put(_online(self.shared.topics))

    def _cancel(self, levels: list[str], arrival: Arrival) -> None:
        if arrival.retain:
            return
        if levels:
            src, task_id = levels
            found = self.shared.handlers.cancel(src, task_id)
        else:
            task_id = arrival.payload.decode("utf-8", "replace").strip()
            found = self.shared.handlers.cancel(None, task_id)
        if not found:
            log.info("a cancel on %s: no task %s waits or runs", shown(arrival.topic), shown(task_id))

    def _refuse_retained(self, pending: _Pending, incoming: Incoming) -> None:
        """A retained task would come again at every connect: refuse it.

        MQTT 3.1.1 does replay it at every connect, and shows the flag only then: it is refused once, and not at all
        under the id of a task that is known, which has an answer of its own.
        """
        arrival = pending.arrival
        digest = sha256(arrival.topic.encode() + b"\0" + arrival.payload).digest()
        known = incoming.id is not None and self.shared.handlers.known(incoming.src, incoming.id)
        if known or (digest in self._replays and not arrival.connection.is_v5):
            pending.answered = True
            return
        if len(self._replays) < MAX_REPLAYS:
            self._replays.add(digest)
        refused = self.shared.handlers.refuse(incoming, "retained", "a task must not be retained; clear the topic")
        self._answer_refusal(refused, pending)
        self.shared.handlers.on_event("retained_task_refused", "warning", {"topic": arrival.topic})

    def _submit(self, tasks: list[tuple[_Pending, Incoming]]) -> None:
        """Have these stored and answered; the list is empty then."""
        if not tasks:
            return
        answers = self.shared.handlers.submit([incoming for _, incoming in tasks], self.beat)
        for (pending, _), answer in zip(tasks, answers, strict=True):
            if pending.arrival.qos and _comes_too_late(answer):
                continue  # nobody acknowledges it: the broker keeps it for the next start
            if isinstance(answer, Refused):
                self._answer_refusal(answer, pending)
            else:
                self._answer_accepted(answer, pending)
        tasks.clear()

    def _answer_accepted(self, accepted: Accepted, pending: _Pending) -> None:
        pending.unacked_seq = None if accepted.own_id else accepted.seq
        self._may_come_again.discard(accepted.seq)  # it has: now it is one of this connection
        self.shared.mail.put(_json(self.shared.topics.reply(accepted.address, "status"), accepted.status.to_dict()))
        reached("queued_told")
        if accepted.result is not None and not accepted.in_outbox:
            self._answer_directly(accepted.address, accepted.result, pending)
            return
        pending.answered = True
        if accepted.result is not None:
            self.shared.mail.put(_Wake())

    def _answer_refusal(self, refused: Refused, pending: _Pending) -> None:
        self._told.note(refused)
        self._answer_directly(refused.address, refused.result, pending)
        reached("refusal_told")

    def _answer_directly(self, address: Address, result: Result, pending: _Pending) -> None:
        """An answer that no outbox holds: the message is acknowledged only when it has arrived."""

        def answered(_refusal: str) -> None:
            pending.answered = True
            self.shared.inbox.put(_Wake())

        delivery = _Delivery(done=answered, owed=pending.arrival.qos > 0)
        self.shared.mail.put(_Answer(_parts_of(self.shared.topics, address, result, delivery)))

    def _acknowledge(self) -> None:
        """PUBACK in the order of arrival, as MQTT demands, as far as everything is answered."""
        while self._line and (self._line[0].answered or self._line[0].arrival.connection.ended):
            pending = self._line.popleft()
            if pending.answered:
                connection = pending.arrival.connection
                reached("puback_due")
                connection.acknowledge(pending.arrival)
                reached("puback_handed_over")
                if pending.unacked_seq is not None:
                    self.shared.mail.put(_Acknowledged(connection, pending.unacked_seq))


class _RefusalLog:
    """A line for each refusal, and in a flood one line for all that come within ``REFUSALS_S``."""

    def __init__(self) -> None:
        self._since = -REFUSALS_S
        self._count = 0

    def note(self, refused: Refused) -> None:
        self.look()
        self._count += 1
        if self._count <= REFUSALS:
            why = refused.result.error.unquoting if refused.result.error else ""
            src, task_id = refused.address.src, refused.address.id
            extra = about(Kind.TASK_REFUSED, task_id=task_id, src=src)
            log.info("refused %s/%s: %s", src, task_id, why, extra=extra)

    def look(self) -> None:
        """Begin anew when the time is over, and say what was not told."""
        now = time.monotonic()
        if now - self._since < REFUSALS_S:
            return
        if self._count > REFUSALS:
            log.warning("refused %d more tasks within %.0f s", self._count - REFUSALS, now - self._since)
        self._since, self._count = now, 0


def _reason(result: Result) -> str:
    return f"{result.error.code}: {result.error.message}" if result.error else result.state.value


def _comes_too_late(answer: Accepted | Refused) -> bool:
    """Whether it was refused only because we are stopping."""
    return isinstance(answer, Refused) and answer.result.error is not None and answer.result.error.code == "draining"


def _incoming(levels: list[str], arrival: Arrival) -> Incoming:
    """What the topic, the payload and the MQTT 5 properties say together."""
    return Incoming(
        payload=arrival.payload,
        src=levels[0] if levels else ANONYMOUS,
        id=levels[1] if len(levels) == 2 else None,
        fields=arrival.fields,
        content_type=arrival.content_type,
        ttl_s=arrival.expiry_s,
        reply_to=arrival.response_topic,
        correlation=arrival.correlation,
        redelivered=arrival.redelivered,
        packet_id=arrival.mid,
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


@dataclass(slots=True)
class _Suspect:
    """A result that was on its way when a connection ended."""

    tries: int = 0
    """How often it was sent alone, and not confirmed."""
    strikes: int = 0
    """How often in a row that speaks against it, and not against the network or the broker."""


class _Publisher(_Thread):
    """Sends within the window, first what somebody waits for."""

    def __init__(self, shared: _Shared) -> None:
        super().__init__("mqtt-publisher", shared)
        self.connection: Connection | None = None
        self._parts: deque[_Publication] = deque()  # of refusals and results that are on their way
        self._progress: deque[_Publication] = deque()  # status, stream, telemetry, events
        self._dropped = 0  # of these, since there was last room
        self._refused: set[str] = set()  # retained topics, and kinds of other messages, that we may not send
        self._retained: dict[str, _Publication] = {}  # the last value of each retained topic
        self._stale: dict[str, None] = {}  # retained topics to be sent, in order
        self._in_flight: dict[int, _Publication] = {}
        self._acknowledged: list[int] = []  # tasks whose PUBACK went out after the last publication
        self._delivering: dict[int, _Delivery] = {}  # results on their way, by seq
        self._suspects: dict[int, _Suspect] = {}  # by seq
        self._alone: int | None = None  # the suspect that is on its way, with nothing beside it
        self._sent_at = 0.0  # when the last publication went out
        self._outbox_may_have_more = True
        self._flushes: list[_Flush] = []
        self._had_session = False

    def work(self) -> None:
        mail = self.shared.mail
        while not self.shared.stopping.is_set():
            self.beat()
            try:
                item = mail.get(timeout=BEAT_S)
                while True:
                    self._handle_mail(item)
                    item = mail.get_nowait()
            except Empty:
                pass
            self._relieve()
            self._pump()
            self._note_room()
            self._answer_flushes()

    def _handle_mail(self, item: _Mail) -> None:
        match item:
            case _Publication():
                self._keep(item)
            case _Answer(parts):
                self._keep_parts(parts)
            case _Confirmed(connection, mid, refusal) if connection is self.connection:
                self._confirmed(mid, refusal)
            case _Acknowledged(connection, seq) if connection is self.connection:
                self._acknowledged.append(seq)
            case _Connected(connection, quietly):
                self._connected(connection, quietly=quietly)
            case _Lost(connection) if connection is self.connection:
                self._lost(cut_off=connection.cut_off and not self.shared.stopping.is_set())
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
            if len(self._progress) > MAX_BACKLOG:
                self._progress.popleft()
                self._note_dropped()

    def _keep_parts(self, parts: list[_Publication]) -> None:
        """An answer: without a connection it is dropped, because its message will come again.

        At QoS 1 the broker hands over no more than its window before the first is answered. At QoS 0 nothing holds the
        senders back, and nothing was promised to them.
        """
        if self.connection is None:
            return
        delivery = parts[0].delivery
        if len(self._parts) < MAX_BACKLOG or (delivery is not None and delivery.owed):
            self._parts.extend(parts)
        else:
            self._note_dropped()

    def _note_dropped(self) -> None:
        self._dropped += 1
        if self._dropped == 1:
            log.warning("more than %d messages wait for the broker: status messages are dropped", MAX_BACKLOG)

    def _note_room(self) -> None:
        if self._dropped and len(self._parts) + len(self._progress) < MAX_BACKLOG // 2:
            log.warning("%d status messages, events or refusals were dropped", self._dropped)
            self.shared.handlers.on_event("messages_dropped", "warning", {"count": self._dropped})
            self._dropped = 0

    def _connected(self, connection: Connection, *, quietly: bool) -> None:
        self.connection = connection
        if not self.shared.leaving.is_set():
            self._retained[self.shared.topics.availability] = _online(self.shared.topics)
        if not quietly:  # some brokers end the connection over what they refuse
            self._refused.clear()
        self._stale = dict.fromkeys(topic for topic in self._retained if topic not in self._refused)
        self._outbox_may_have_more = True
        mqtt = self.shared.config.mqtt
        level = logging.DEBUG if quietly else logging.INFO
        extra = about(Kind.BROKER_UP)
        log.log(level, "broker %s:%d: connected, MQTT %s", mqtt.host, mqtt.port, connection.version, extra=extra)
        self.shared.handlers.on_event("broker_connected", "info", {"protocol": connection.version})
        if self._had_session and not connection.resumed:
            level = logging.DEBUG if quietly else logging.WARNING
            log.log(level, "the broker has lost our session, and the tasks in it that it had not handed over")
            self.shared.handlers.on_event("session_lost", "warning", {})
        self._had_session = True

    def _lost(self, *, cut_off: bool) -> None:
        self.connection = None
        self._look_for_the_cause(cut_off=cut_off)
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

    def _relieve(self) -> None:
        """Amid an overrun, let the answers to unacknowledged messages go without the broker's word for them.

        Its confirmations stand in line behind the flood, and to wait for them would keep every answer of it in memory.
        The broker reads in order, so it has the answer before it sees the message acknowledged. What that costs: at
        QoS 0, a subscriber that is away misses the answer.
        """
        connection = self.connection
        if connection is None or connection.unacknowledged <= OVERRUN:
            return
        for publication in self._in_flight.values():
            if publication.is_owed:
                self._settle(publication, "")
                publication.delivery = None
        parts, self._parts = self._parts, deque()
        for publication in parts:
            if publication.is_owed:
                publication.qos = 0
                self._send(connection, publication)
            else:
                self._parts.append(publication)

    def _next(self) -> _Publication | None:
        if self._alone is not None:
            is_part = self._parts and self._parts[0].delivery is self._delivering[self._alone]
            return self._parts.popleft() if is_part else None
        for backlog in (self._parts, self._progress):
            if backlog:
                return backlog.popleft()
        if self._stale:
            topic = next(iter(self._stale))
            del self._stale[topic]
            return self._retained[topic]
        self._fetch_results()
        return self._parts.popleft() if self._parts else None

    def _send(self, connection: Connection, publication: _Publication) -> None:
        try:
            mid = connection.publish(
                publication.topic,
                publication.payload,
                qos=publication.qos,
                retain=publication.retain,
                content_type=publication.content_type,
                correlation=publication.correlation,
            )
        except TooLarge as error:
            self._settle(publication, str(error))
            return
        self._sent_at = time.monotonic()
        if publication.delivery is not None:
            reached("result_published")
        if mid is not None:
            publication.proves = tuple(self._acknowledged)
            self._acknowledged.clear()
            self._in_flight[mid] = publication
        elif publication.qos == 0:
            self._settle(publication, "")

    def _confirmed(self, mid: int, refusal: str | None) -> None:
        publication = self._in_flight.pop(mid, None)
        if publication is None:
            return
        if publication.proves:
            self.shared.handlers.mark_acked(publication.proves)
        self._settle(publication, f"refused by the broker: {refusal}" if refusal else "")

    def _settle(self, publication: _Publication, refusal: str) -> None:
        """The broker has it, or will not have it: say so once for each kind of message, and end its delivery."""
        kind = publication.topic if publication.retain else publication.topic.rpartition("/")[2]
        if refusal and kind not in self._refused:
            self._refused.add(kind)
            log.error("a message on %s is not sent: %s", publication.topic, refusal)
        delivery = publication.delivery
        if delivery is None:
            return
        if publication.vital:
            delivery.refusal = delivery.refusal or refusal
        delivery.parts -= 1
        if delivery.parts == 0:
            delivery.done(delivery.refusal)

    # -- results from the outbox

    def _fetch_results(self) -> None:
        if not self._outbox_may_have_more or self.connection is None:
            return
        limit = self.connection.window
        batch = self.shared.handlers.unsent(limit, self._delivering.keys() | self._suspects.keys())
        self._outbox_may_have_more = len(batch) == limit or bool(self._suspects)
        for stored in batch:
            self._begin(stored, self.connection.max_packet_bytes)
        if not (batch or self._in_flight or self._delivering):
            self._try_suspect(self.connection.max_packet_bytes)

    def _try_suspect(self, max_packet_bytes: int) -> None:
        """Send a suspect: after all others, so that they go on, and alone, so that the blame is certain."""
        if not self._suspects:
            return
        chosen = min(self._suspects, key=lambda seq: self._suspects[seq].tries)
        batch = self.shared.handlers.unsent(1, self._suspects.keys() - {chosen})
        if not batch:
            del self._suspects[chosen]
        for stored in batch:
            self._begin(stored, max_packet_bytes)
            self._alone = stored.seq

    def _begin(self, stored: Stored, max_packet_bytes: int) -> None:
        assert stored.result is not None  # noqa: S101
        result = _fitted(stored.result, max_packet_bytes - len(stored.task.correlation or b""))

        def done(refusal: str) -> None:
            self._delivering.pop(stored.seq, None)
            self._suspects.pop(stored.seq, None)
            self._alone = None
            self._outbox_may_have_more = True
            reached("result_confirmed")
            if refusal:
                self._give_up(stored.seq, refusal)
            else:
                self.shared.handlers.mark_sent(stored.seq)
                reached("result_marked_sent")

        reached("result_taken")
        delivery = _Delivery(done=done, seq=stored.seq)
        self._delivering[stored.seq] = delivery
        self._parts.extend(_parts_of(self.shared.topics, stored.task.address, result, delivery))

    def _look_for_the_cause(self, *, cut_off: bool) -> None:
        """Suspect the results that were on their way when the connection ended; give up on one that ends it every time.

        Only one that was alone can be blamed, and only when the end came from the other side and at once. Any other end
        shows a network or a broker that comes and goes, and takes back what was held against a result before.
        """
        for seq in self._delivering:
            self._suspects.setdefault(seq, _Suspect())
        alone, self._alone = self._alone, None
        if alone is not None:
            self._suspects[alone].tries += 1
        if alone is None or not cut_off or time.monotonic() - self._sent_at > BLAME_S:
            for suspect in self._suspects.values():
                suspect.strikes = 0
            return
        self._suspects[alone].strikes += 1
        if self._suspects[alone].strikes >= STRIKES:
            del self._suspects[alone]
            self._give_up(alone, "its sending ended the connection every time")

    def _give_up(self, seq: int, why: str) -> None:
        log.error("result of task %d set aside until the next start: %s", seq, why)
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
