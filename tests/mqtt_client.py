"""A small MQTT client for tests: it sends, collects what arrives, and waits for what must come."""

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from paho.mqtt.client import Client, ConnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

TIMEOUT_S = 30.0
V5 = MQTTProtocolVersion.MQTTv5
V311 = MQTTProtocolVersion.MQTTv311


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One message as it came; MQTT 5 properties by their names without spaces, such as `ResponseTopic`."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    properties: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The payload as text."""
        return self.payload.decode()

    @property
    def json(self) -> Any:
        """The payload, parsed."""
        return json.loads(self.payload)


class MqttClient:
    """Connected inside its `with` block; after a broker's restart it comes back and subscribes again.

    On MQTT 5 it subscribes with Retain As Published, so `Received.retain` is what the sender set. On 3.1.1
    the flag is only set on messages that the broker had kept. With `session_s` and a `client_id`, the
    broker keeps the session that long after a disconnect: what is published meanwhile is not lost.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        version: MQTTProtocolVersion = V5,
        client_id: str = "",
        session_s: int = 0,
        username: str | None = None,
        password: str | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.version = version
        self._timeout_s = timeout_s
        self._received: list[Received] = []
        self._changed = threading.Condition()
        self._connected = False
        self._filters: dict[str, int] = {}
        self._acked: dict[int, list[ReasonCode]] = {}
        self._confirmed: set[int] = set()
        clean = None if version == V5 else not session_s
        self._paho = Client(CallbackAPIVersion.VERSION2, client_id, clean, protocol=version)
        self._paho.username_pw_set(username, password)
        self._paho.reconnect_delay_set(1, 1)
        self._paho.on_connect = self._on_connect
        self._paho.on_disconnect = self._on_disconnect
        self._paho.on_subscribe = self._on_subscribe
        self._paho.on_message = self._on_message
        self._paho.on_publish = self._on_publish
        if version == V5:
            session = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            session.SessionExpiryInterval = session_s
            self._paho.connect_async(host, port, clean_start=not session_s, properties=session)
        else:
            self._paho.connect_async(host, port)

    def __enter__(self) -> Self:
        self._paho.loop_start()
        try:
            self._wait(lambda: self._connected, self._timeout_s, "no connection")
        except AssertionError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._paho.disconnect()
        self._paho.loop_stop()

    @property
    def messages(self) -> list[Received]:
        """All that has come so far, in order."""
        with self._changed:
            return list(self._received)

    def subscribe(self, topic_filter: str, qos: int = 1) -> None:
        """Subscribe and wait for the SUBACK; fail when the broker refuses."""
        mid = self._send_subscribe(topic_filter, qos)
        self._wait(lambda: mid in self._acked, TIMEOUT_S, f"no SUBACK for {topic_filter}")
        refused = [str(code) for code in self._acked[mid] if code.is_failure]
        assert not refused, f"{topic_filter}: {refused}"
        self._filters[topic_filter] = qos

    def publish(
        self,
        topic: str,
        payload: str | bytes | Mapping[str, Any] = b"",
        *,
        qos: int = 1,
        retain: bool = False,
        properties: Mapping[str, Any] | None = None,
    ) -> None:
        """Publish (a mapping as JSON) when connected and, at QoS 1 or 2, wait until the broker has it.

        `properties` are MQTT 5 ones by paho's names: `ResponseTopic`, `CorrelationData`,
        `MessageExpiryInterval`, `ContentType`, `UserProperty` (a list of pairs).
        """
        body = json.dumps(payload) if isinstance(payload, Mapping) else payload
        self._wait(lambda: self._connected, TIMEOUT_S, "no connection")
        sent = self._paho.publish(topic, body, qos, retain, _publish_properties(properties))
        sent.wait_for_publish(TIMEOUT_S)
        assert sent.is_published(), f"no acknowledgement for {topic}"

    def send(self, topic: str, payload: str | bytes) -> int:
        """Publish at QoS 1 without waiting; without a connection it goes out with the next one.

        Returns a number for `is_confirmed`; it is given again after 65,535 messages.
        """
        return self._paho.publish(topic, payload, 1).mid

    def is_confirmed(self, number: int) -> bool:
        """Whether the broker has acknowledged what `send` gave this number."""
        return number in self._confirmed

    def wait_for(self, predicate: Callable[[Received], bool], timeout_s: float = TIMEOUT_S) -> Received:
        """The first message, past ones included, for which `predicate` is true."""
        found: list[Received] = []

        def matched() -> bool:
            found[:] = [message for message in self._received if predicate(message)]
            return bool(found)

        self._wait(matched, timeout_s, "no such message")
        return found[0]

    def wait_for_topic(self, topic: str, timeout_s: float = TIMEOUT_S) -> Received:
        """The first message on exactly this topic, past ones included."""
        return self.wait_for(lambda message: message.topic == topic, timeout_s)

    def _wait(self, condition: Callable[[], bool], timeout_s: float, complaint: str) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, timeout_s):
                came = "\n".join(f"  {m.topic} {m.payload[:200]!r}" for m in self._received)
                raise AssertionError(f"{complaint} within {timeout_s} s; this came:\n{came}")

    def _send_subscribe(self, topic_filter: str, qos: int) -> int:
        if self.version == V5:
            options = SubscribeOptions(qos=qos, retainAsPublished=True)
            _, mid = self._paho.subscribe(topic_filter, options=options)
        else:
            _, mid = self._paho.subscribe(topic_filter, qos)
        assert mid is not None, f"not connected: {topic_filter}"
        return mid

    def _on_connect(
        self, client: Client, userdata: Any, flags: ConnectFlags, reason: ReasonCode, properties: Any
    ) -> None:
        if reason.is_failure:
            return
        for topic_filter, qos in list(self._filters.items()):
            self._send_subscribe(topic_filter, qos)
        self._set_connected(connected=True)

    def _on_disconnect(self, *_: Any) -> None:
        self._set_connected(connected=False)

    def _set_connected(self, *, connected: bool) -> None:
        with self._changed:
            self._connected = connected
            self._changed.notify_all()

    def _on_subscribe(
        self, client: Client, userdata: Any, mid: int, reasons: list[ReasonCode], properties: Any
    ) -> None:
        with self._changed:
            self._acked[mid] = reasons
            self._changed.notify_all()

    def _on_publish(self, client: Client, userdata: Any, mid: int, reason: ReasonCode, properties: Any) -> None:
        self._confirmed.add(mid)

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        received = Received(
            topic=message.topic,
            payload=bytes(message.payload),
            qos=message.qos,
            retain=message.retain,
            properties=_as_dict(message.properties),
        )
        with self._changed:
            self._received.append(received)
            self._changed.notify_all()


def _publish_properties(values: Mapping[str, Any] | None) -> Properties | None:
    if not values:
        return None
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


def _as_dict(properties: Properties | None) -> dict[str, Any]:
    names = [] if properties is None else [name.replace(" ", "") for name in properties.names]
    return {name: getattr(properties, name) for name in names if hasattr(properties, name)}
