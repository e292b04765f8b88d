"""What the measurements need around them: a broker, a stand-in for Ollama, the daemon, and a client to watch with.

All are processes of their own, as they would be on a board, and end with their ``with`` block.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from socket import IPPROTO_TCP, TCP_NODELAY
from typing import Any, Self

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
NODE = "bench"
TOPICS = f"edge-llm/{NODE}"
PATIENCE_S = 60.0
"""Whatever takes longer than this has failed."""


@contextmanager
def child(arguments: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as the block lasts."""
    with subprocess.Popen(arguments, cwd=ROOT, stdin=subprocess.DEVNULL, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def python(*arguments: str) -> list[str]:
    """A command for the interpreter that runs us."""
    return [sys.executable, *arguments]


@contextmanager
def broker(directory: Path, *, inflight: int = 20) -> Iterator[int]:
    """A mosquitto of our own; gives its port. ``inflight``: unacknowledged messages that it sends to one client."""
    program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise FileNotFoundError("mosquitto is missing: apt-get install mosquitto")
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
    config = directory / f"mosquitto-{port}.conf"
    lines = (
        *(f"listener {port} {HOST}", "allow_anonymous true", "log_type error", "set_tcp_nodelay true"),
        *(f"max_inflight_messages {inflight}", "max_queued_messages 0"),
    )
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with child([program, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        _wait_for_port(port)
        yield port


def _wait_for_port(port: int) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection((HOST, port), 1).close()
        except OSError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.01)
        else:
            return


@contextmanager
def ollama(*models: Mapping[str, Any]) -> Iterator[str]:
    """A stand-in for Ollama with these models (see ``FakeModel`` in ``tests/fake_ollama.py``); gives its address."""
    arguments = [part for model in models for part in ("--model", json.dumps({"size_bytes": 10_000_000, **model}))]
    with child(python("-m", "tests.fake_ollama", *arguments), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        url: str = json.loads(process.stdout.readline())["url"]
        yield url


def serve(client: Client, *topics: str) -> None:
    """Subscribe, say so, and answer what comes, for ever; in a child."""

    def on_connect(*_: Any) -> None:
        client.subscribe([(topic, 1) for topic in topics])

    def on_subscribe(*_: Any) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0"))

    client.on_connect = on_connect
    client.on_subscribe = on_subscribe
    client.loop_forever()


def mqtt_client(port: int, *, client_id: str = "", lasting: bool = False) -> Client:
    """A client that sends at once what it has to send: waiting for company would cost 40 ms a message.

    ``lasting``: it acknowledges by hand, and the broker keeps its session.
    """
    client = Client(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5, manual_ack=lasting)
    client.on_socket_open = _send_at_once
    client.max_inflight_messages_set(1000)
    session = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    session.SessionExpiryInterval = 3600 if lasting else 0
    client.connect(HOST, port, clean_start=not lasting, properties=session)
    return client


def _send_at_once(_client: Client, _userdata: Any, opened: Any) -> None:
    opened.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)


@contextmanager
def announced(command: Sequence[str], **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """A child, and the seconds from its start until it has said ``READY=1``, as a service tells systemd."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as listener:
        listener.bind("")  # the kernel gives it a name
        address = "@" + listener.getsockname()[1:].decode()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": address}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed is compiled, and so are the peers
        began_at = time.perf_counter()
        with child(command, env=environment, **options) as process:
            _wait_for_ready(listener, process)
            ready_s = time.perf_counter() - began_at
            listener.close()  # nobody listens to what else it has to say
            yield process, ready_s


def _wait_for_ready(listener: socket.socket, process: subprocess.Popen[bytes]) -> None:
    listener.settimeout(0.5)
    while process.poll() is None:
        with suppress(TimeoutError):
            if b"READY=1" in listener.recv(4096).split(b"\n"):
                return
    raise ChildProcessError(f"ended with {process.returncode}: {process.args!r}")


@contextmanager
def daemon(
    directory: Path, sections: Mapping[str, Any], *, port: int, ollama_url: str
) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """The daemon, and how long it took to be ready. ``sections`` are parts of its ``config.yaml``."""
    config = {
        "node": NODE,
        "data_dir": str(directory / "data"),
        "mqtt": {"host": HOST, "port": port},
        "ollama": {"url": ollama_url},
        **sections,
    }
    path = directory / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    with (directory / "daemon.log").open("ab") as log:
        command = python("-m", "edge_daemon", "run", "--config", str(path))
        with announced(command, stdout=log, stderr=log) as started:
            yield started


def stop(process: subprocess.Popen[bytes]) -> None:
    """Have a process end in an orderly way, and wait for it."""
    process.send_signal(signal.SIGTERM)
    process.wait(PATIENCE_S)


class Watcher:
    """A client of the broker that sends, and waits for what comes back."""

    def __init__(self, port: int) -> None:
        self._arrived: SimpleQueue[tuple[str, bytes]] = SimpleQueue()
        self._subscribed = threading.Event()
        self._client = mqtt_client(port)
        self._client.on_message = self._on_message
        self._client.on_subscribe = lambda *_: self._subscribed.set()

    def __enter__(self) -> Self:
        self._client.loop_start()
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def subscribe(self, topic_filter: str) -> None:
        """Have what matches sent to us."""
        self._subscribed.clear()
        self._client.subscribe(topic_filter, qos=1)
        if not self._subscribed.wait(PATIENCE_S):
            raise TimeoutError(f"no SUBACK for {topic_filter}")

    def wait_for_daemon(self) -> None:
        """Return once the daemon is there: it says so after its subscriptions."""
        self.subscribe(f"{TOPICS}/availability")
        while self.wait_for(f"{TOPICS}/availability") != b"online":
            pass

    def publish(self, topic: str, payload: bytes) -> None:
        """Send at QoS 1, without waiting."""
        self._client.publish(topic, payload, qos=1)

    def publish_all(self, messages: Sequence[tuple[str, bytes]]) -> None:
        """Send at QoS 1, and wait until the broker has all."""
        sent = [self._client.publish(topic, payload, qos=1) for topic, payload in messages]
        for info in sent:
            info.wait_for_publish(PATIENCE_S)

    def wait_for(self, topic: str) -> bytes:
        """The payload of the next message on ``topic``; what comes on others is passed over."""
        while True:
            came_on, payload = self._arrived.get(timeout=PATIENCE_S)
            if came_on == topic:
                return payload

    def _on_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        self._arrived.put((message.topic, bytes(message.payload)))
