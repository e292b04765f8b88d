"""A client of the daemon that notes when each message came."""

import json
import threading
import time
from typing import Any, Self

from paho.mqtt.client import Client, MQTTMessage

from benchmarks import rig

PATIENCE_S = 600.0
"""Real models on a busy machine take their time."""


class TimedClient:
    """Sends tasks and hears everything of the node. Times are of ``time.perf_counter``."""

    def __init__(self, port: int) -> None:
        self._changed = threading.Condition()
        self._came: list[tuple[float, str, bytes]] = []
        self._client = rig.mqtt_client(port)
        self._client.on_connect = lambda client, *_: client.subscribe(f"{rig.TOPICS}/#", qos=1)
        self._client.on_message = self._on_message

    def __enter__(self) -> Self:
        self._client.loop_start()
        self.wait("/availability", wanted=b"online")
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def send(self, name: str, task: dict[str, Any]) -> float:
        """Publish a task. Returns when."""
        body = json.dumps(task).encode()
        sent_at = time.perf_counter()
        self._client.publish(f"{rig.TOPICS}/task/bench/{name}", body, qos=1)
        return sent_at

    def wait(self, end: str, *, wanted: bytes | None = None) -> tuple[float, bytes]:
        """The next message on a topic that ends so, which is then forgotten, and when it came."""
        give_up_at = time.perf_counter() + PATIENCE_S
        with self._changed:
            while True:
                for index, (came_at, topic, payload) in enumerate(self._came):
                    if topic.endswith(end) and wanted in (None, payload):
                        del self._came[index]
                        return came_at, payload
                if not self._changed.wait(give_up_at - time.perf_counter()):
                    raise TimeoutError(f"no message on .../{end} within {PATIENCE_S:g} s")

    def all(self, end: str) -> list[dict[str, Any]]:
        """What has come on topics that end so and was not waited for."""
        with self._changed:
            return [json.loads(payload) for _, topic, payload in self._came if topic.endswith(end)]

    def _on_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        with self._changed:
            self._came.append((time.perf_counter(), message.topic, bytes(message.payload)))
            self._changed.notify_all()
