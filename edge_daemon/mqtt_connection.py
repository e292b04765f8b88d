"""Connections to a broker: the only file that knows paho.

A ``Connection`` is the daemon's. It lasts from CONNECT to its end and is never used again, so that nothing of a lost
connection (packet ids, acknowledgements, paho's own queue) can leak into the next. A ``Device`` is a short one, for the
commands that a person runs.
"""

import logging
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from socket import SHUT_RDWR
from threading import Thread
from typing import Any, Literal, Protocol, Self

from paho.mqtt.client import MQTT_ERR_SUCCESS, Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_daemon.config import Config
from edge_daemon.errors import ConfigError

Version = Literal["5", "3.1.1"]

WINDOW = 20
"""Unconfirmed messages of ours at most; a broker may allow fewer (Receive Maximum)."""
UNACKNOWLEDGED = 20
"""Messages that a broker may hand over before the first of them is acknowledged; with MQTT 3.1.1 the broker decides."""
OPEN_S = 120.0
"""How long it may take to find the broker by its name and to reach it: a resolver may try for a minute and more."""
ANSWER_S = 5.0
"""How long a broker may take to answer a connection that it has let be made."""
LOOK_S = 1.0
"""How often one looks after a connection that is being made."""
MAX_INCOMING_BYTES = 16 << 20
"""An MQTT 5 broker keeps a message larger than this, and than twice the largest task, from us."""
WILL_DELAY_S = 8
"""With MQTT 5 the broker waits so long before it publishes the will: a short break is not worth an alarm."""

UNSUPPORTED_VERSION = 132
"""The reason code of a broker that does not speak MQTT 5."""
NOT_OVER_A_MESSAGE = frozenset({137, 139, 141, 142, 152, 156, 157, 159, 160})
"""Reason codes of a broker that ends the connection because it is busy, goes down, hears nothing, has another client of
our id, or was told to."""

_PROTOCOLS: dict[Version, MQTTProtocolVersion] = {
    "5": MQTTProtocolVersion.MQTTv5,
    "3.1.1": MQTTProtocolVersion.MQTTv311,
}


class TooLarge(ValueError):
    """The broker takes no message of this size; the text says how large one may be."""


@dataclass(slots=True, kw_only=True, eq=False)
class Arrival:
    """A message that came in. ``fields`` (user properties) and what follows it are of MQTT 5."""

    connection: "Connection"
    mid: int
    qos: int
    topic: str
    payload: bytes
    retain: bool
    redelivered: bool
    fields: Mapping[str, str] = field(default_factory=dict)
    content_type: str | None = None
    expiry_s: int | None = None
    response_topic: str | None = None
    correlation: bytes | None = None

    def forget_content(self) -> None:
        """It is read, and may have to wait long for its acknowledgement."""
        self.payload, self.fields, self.correlation = b"", {}, None


class Listener(Protocol):
    """Is told what happens on a connection, in the thread that runs it. An exception ends the connection."""

    def beat(self) -> None:
        """The connection lives."""

    def connected(self, connection: "Connection") -> None:
        """The broker has let us in."""

    def arrived(self, arrival: Arrival) -> None:
        """A message; for as long as this takes, nothing more is read, and TCP makes the broker wait."""

    def confirmed(self, connection: "Connection", mid: int, refusal: str | None) -> None:
        """The broker's word on what was published under this packet id."""

    def subscription_refused(self, reason: str) -> None:
        """We may not hear what we asked for."""

    def lost(self, connection: "Connection") -> None:
        """It has ended, accepted or not."""


class Connection:
    """One connection to the broker, from CONNECT to its end.

    Raises:
        ConfigError: a certificate or key of ``mqtt.tls`` cannot be used.
    """

    def __init__(
        self,
        config: Config,
        listener: Listener,
        *,
        version: Version,
        filters: Sequence[str],
        will_topic: str,
        password: str | None = None,
        receive_maximum: int = UNACKNOWLEDGED,
    ) -> None:
        self.version = version
        self.receive_maximum = receive_maximum
        """How many unacknowledged messages we have asked for; MQTT 3.1.1 cannot ask."""
        self.client_id = config.mqtt.client_id or f"edge-llm-{config.node_name}"
        self.accepted = False
        self.resumed = False
        """The broker has kept our session."""
        self.ended = False
        self.cut_off = False
        """The other side has ended it, and may have done so over something that we sent."""
        self.lasted_s = 0.0
        """How long it has served, once it has ended."""
        self.window = WINDOW
        self.max_packet_bytes = config.mqtt.max_packet_bytes
        self._config = config
        self._listener = listener
        self._filters = filters
        self._reached = False
        self._refusal: ReasonCode | None = None
        self._goodbye: ReasonCode | None = None  # what the broker said at the end (with MQTT 5), or that it fell silent
        self._given_up = ""
        self._closing = False
        self._received = self._acknowledged = 0  # messages of QoS 1, each counted by one thread
        self._errors = _PahoErrors()
        # paho notices a dead connection after up to two of its keepalives, each a little longer by what a look takes.
        self._keepalive_s = max(1, config.mqtt.keepalive_s * 3 // 5)
        self._client = self._new_client(will_topic, password)

    def _new_client(self, will_topic: str, password: str | None) -> Client:
        mqtt = self._config.mqtt
        # The id is fixed: the broker keeps the session of this id, with what came in, while we are away.
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.client_id,
            clean_session=None if self.is_v5 else False,
            protocol=_PROTOCOLS[self.version],
            manual_ack=True,
        )
        client.suppress_exceptions = True
        client.enable_logger(self._errors.logger)
        if mqtt.username is not None:
            client.username_pw_set(mqtt.username, password)
        if mqtt.tls.enabled:
            client.tls_set_context(_tls_context(self._config))
        will = _properties(PacketTypes.WILLMESSAGE, WillDelayInterval=WILL_DELAY_S) if self.is_v5 else None
        client.will_set(will_topic, b"offline", qos=1, retain=True, properties=will)
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_socket_open = _send_at_once
        # With this set, paho leaves all writing to the thread that calls loop().
        client.on_socket_register_write = _leave_it_to_the_loop
        return client

    @property
    def is_v5(self) -> bool:
        """Whether it speaks MQTT 5."""
        return self.version == "5"

    @property
    def unsupported(self) -> bool:
        """The broker has said that it does not know this version."""
        return self._refusal is not None and self._refusal.value == UNSUPPORTED_VERSION

    @property
    def hung_up(self) -> bool:
        """The broker has let the connection be made, and ended it without a word."""
        return self._reached and not self.accepted and self._refusal is None

    @property
    def unacknowledged(self) -> int:
        """Messages of QoS 1 that have come and are not acknowledged yet."""
        return self._received - self._acknowledged

    def run(self, longest_wait_s: float) -> str:
        """Connect and serve until the connection ends. Returns why it ended.

        The listener hears a beat at least every ``longest_wait_s``.
        """
        began = time.monotonic()
        wait_s = min(longest_wait_s, self._keepalive_s / 4)
        try:
            if failure := self._open():
                return failure
            began = time.monotonic()
            self._reached = True
            while (code := self._client.loop(timeout=wait_s if self.accepted else LOOK_S)) == MQTT_ERR_SUCCESS:
                if self._refusal is not None:
                    break
                self._listener.beat()
                if given_up := self._errors.of_callback or self._given_up:
                    return given_up
                if not self.accepted and time.monotonic() > began + ANSWER_S:
                    return f"no answer within {ANSWER_S:g} s"
            self.cut_off = self.accepted and (self._goodbye is None or self._goodbye.value not in NOT_OVER_A_MESSAGE)
        except (OSError, ValueError) as error:
            return str(error)
        finally:
            self.lasted_s = time.monotonic() - began
            self._end()
        return str(self._refusal or self._goodbye or self._errors.last or f"connection lost ({code.name.lower()})")

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int,
        retain: bool = False,
        content_type: str | None = None,
        correlation: bytes | None = None,
    ) -> int | None:
        """Send. Returns the packet id that will be confirmed, None if none will: at QoS 0, or on a lost connection.

        Raises:
            TooLarge: the broker would not take it.
        """
        if _packet_bytes(topic, payload, content_type, correlation) > self.max_packet_bytes:
            raise TooLarge(f"more than the {self.max_packet_bytes} bytes that the broker takes")
        properties = _beside(content_type, correlation) if self.is_v5 else None
        sent = self._client.publish(topic, payload, qos, retain, properties)
        return sent.mid if qos and sent.rc == MQTT_ERR_SUCCESS else None

    def acknowledge(self, arrival: Arrival) -> None:
        """PUBACK. On a connection that is gone this goes nowhere, and the broker sends the message again."""
        self._client.ack(arrival.mid, arrival.qos)
        self._acknowledged += 1

    def give_up(self, reason: str) -> None:
        """Have ``run`` end the connection for this reason."""
        self._given_up = reason

    def close(self, *, cleanly: bool) -> None:
        """End it from another thread, cleanly so that the broker does not publish the will."""
        self._closing = True
        if cleanly:
            self._client.disconnect()
            return
        wire: Any = self._client.socket()
        if wire is not None:
            with suppress(OSError):
                wire.shutdown(SHUT_RDWR)

    def _open(self) -> str:
        """Reach the broker, in a thread of its own: a resolver cannot be told to hurry. Returns why that did not work.

        One that is given up on ends when the resolver lets it, and what it has opened is closed.
        """
        outcome: SimpleQueue[Exception | None] = SimpleQueue()
        Thread(target=self._connect_late, args=(outcome,), name="mqtt-connect", daemon=True).start()
        deadline = time.monotonic() + OPEN_S
        while not self._closing and time.monotonic() < deadline:
            self._listener.beat()
            with suppress(Empty):
                failure = outcome.get(timeout=LOOK_S)
                if failure is not None:
                    raise failure
                return ""
        return "closed" if self._closing else f"not found or not reached within {OPEN_S:g} s"

    def _connect_late(self, outcome: "SimpleQueue[Exception | None]") -> None:
        try:
            self._connect()
        except Exception as error:  # whatever it is: it is raised again where somebody waits
            outcome.put(error)
        else:
            outcome.put(None)
        finally:
            if self.ended:
                self.close(cleanly=False)

    def _connect(self) -> None:
        mqtt = self._config.mqtt
        if self.is_v5:
            lasting = _properties(
                PacketTypes.CONNECT,
                SessionExpiryInterval=mqtt.session_expiry_s,
                ReceiveMaximum=self.receive_maximum,
                MaximumPacketSize=max(MAX_INCOMING_BYTES, 2 * self._config.queue.max_payload_bytes),
            )
            self._client.connect(mqtt.host, mqtt.port, self._keepalive_s, clean_start=False, properties=lasting)
        else:
            self._client.connect(mqtt.host, mqtt.port, self._keepalive_s)

    def _end(self) -> None:
        self.ended = True
        self._client.disconnect()
        self._client.loop(timeout=0)
        # Without its callbacks nothing holds the client in a circle, and its sockets go with it.
        self._client.on_connect = self._client.on_message = self._client.on_publish = self._client.on_subscribe = None
        self._client.on_disconnect = None
        self._listener.lost(self)

    def _subscribe(self) -> None:
        """Always, although the session remembers: a broker that lost it needs to be told again."""
        if not self.is_v5:
            self._client.subscribe([(name, 1) for name in self._filters])
            return
        # A retained task must not run again at every connect: do not send it, and show the flag on live ones.
        options = SubscribeOptions(qos=1, retainAsPublished=True, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
        self._client.subscribe([(name, options) for name in self._filters])

    # -- callbacks of paho: they hand over and return

    def _on_connect(
        self, _client: Client, _userdata: Any, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._refusal = reason
            return
        self.accepted = True
        self.resumed = flags.session_present
        self.window = min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW))
        self.max_packet_bytes = min(self.max_packet_bytes, getattr(properties, "MaximumPacketSize", 1 << 28))
        self._subscribe()
        self._listener.connected(self)

    def _on_subscribe(
        self, _client: Client, _userdata: Any, _mid: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if refused:
            self._listener.subscription_refused(refused[0])

    def _on_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        self._received += message.qos > 0
        properties = message.properties if self.is_v5 else None
        arrival = Arrival(
            connection=self,
            mid=message.mid,
            qos=message.qos,
            topic=topic,
            payload=bytes(message.payload),
            retain=message.retain,
            redelivered=message.dup,
            fields=dict(getattr(properties, "UserProperty", ())),
            content_type=getattr(properties, "ContentType", None),
            expiry_s=getattr(properties, "MessageExpiryInterval", None),
            response_topic=getattr(properties, "ResponseTopic", None),
            correlation=getattr(properties, "CorrelationData", None),
        )
        self._listener.arrived(arrival)

    def _on_publish(self, _client: Client, _userdata: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        self._listener.confirmed(self, mid, str(reason) if reason.is_failure else None)

    def _on_disconnect(
        self, _client: Client, _userdata: Any, flags: DisconnectFlags, reason: ReasonCode, _properties: Any
    ) -> None:
        if flags.is_disconnect_packet_from_server or reason == "Keep alive timeout":
            self._goodbye = reason


@lru_cache(maxsize=8)
def _beside(content_type: str | None, correlation: bytes | None) -> Properties:
    """The properties of a publication, which paho only reads; to make them takes as long as to send a message."""
    properties = _properties(PacketTypes.PUBLISH)
    if content_type:
        properties.ContentType = content_type
    if correlation is not None:
        properties.CorrelationData = correlation
    return properties


def _packet_bytes(topic: str, payload: bytes, content_type: str | None, correlation: bytes | None) -> int:
    """What it takes on the wire, or a few bytes more."""
    return 32 + len(topic.encode()) + len(payload) + len((content_type or "").encode()) + len(correlation or b"")


class _PahoErrors(logging.Handler):
    """What paho knows of an error and tells only its logger, such as the words in which TLS was refused."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last = ""
        self.of_callback = ""
        """An exception in a callback of ours: something that arrived is lost, so the connection must be made anew."""
        self.logger = logging.Logger("paho", logging.ERROR)  # noqa: LOG001  # nobody's child: it is heard here only
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("Caught exception"):
            self.of_callback = text
        elif not text.startswith("Client is not connected"):  # which is the consequence, not the reason
            self.last = text


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


def check_tls(config: Config) -> None:
    """Raises ConfigError when a file of ``mqtt.tls`` cannot be used; its key is named."""
    if config.mqtt.tls.enabled:
        _tls_context(config)


def _tls_context(config: Config) -> ssl.SSLContext:
    """Verified, always; a broker that cannot prove its name is not talked to."""
    tls = config.mqtt.tls
    try:
        context = ssl.create_default_context(cafile=str(tls.ca_file) if tls.ca_file else None)
    except OSError as error:
        raise _unusable("ca_file", tls.ca_file, error) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.cert_file:
        try:
            # A key with a passphrase is refused: OpenSSL would ask for it on a terminal that nobody sits at.
            context.load_cert_chain(tls.cert_file, tls.key_file, password="")
        except OSError as error:
            key = "key_file" if tls.key_file else "cert_file"
            key = key if _is_readable(tls.cert_file) else "cert_file"
            raise _unusable(key, getattr(tls, key), error) from None
    return context


def _is_readable(path: Path) -> bool:
    try:
        ssl.create_default_context(cafile=str(path))
    except OSError:
        return False
    return True


def _unusable(key: str, path: Path | None, error: OSError) -> ConfigError:
    problem = error.strerror
    if isinstance(error, ssl.SSLError):
        is_stranger = error.reason == "KEY_VALUES_MISMATCH"
        problem = "is not the key of cert_file" if is_stranger else "not in PEM form, or locked with a passphrase"
    return ConfigError(f"mqtt.tls.{key}: {path}: {problem}")


# -- for the commands that a person runs -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One message as a ``Device`` got it. ``retain``: the broker had kept it."""

    topic: str
    payload: bytes
    retain: bool


class BrokerRefuses(ConnectionError):
    """The broker does not let us in, or not do that; the message says what, and why."""


class Device:
    """A connection for as long as its ``with`` block: it subscribes, sends and waits, all in the caller's thread.

    Every method raises OSError, in words for a person, when the broker is out of reach, refuses or falls silent; a
    refusal is a BrokerRefuses.
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
            raise ConnectionError(f"{self._name} does not answer: {error.strerror or error}") from error
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
            raise BrokerRefuses(f"{self._name} refuses {what}: {reason}")

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
