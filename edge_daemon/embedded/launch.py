"""Starts the broker and the model server as child processes, and stops them."""

import importlib.util
import json
import os
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from edge_daemon.embedded.errors import EmbeddedError, PortTaken
from edge_daemon.embedded.process import Child

BrokerKind = Literal["mosquitto", "amqtt"]

_HOST = "127.0.0.1"
_LARGEST_PORT = 65535
_START_TIMEOUT_S = 60.0
_STOP_GRACE_S = 5.0


class _Service:
    """A running child process; leaving the `with` block stops it."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self.process = child.process

    def stop(self) -> None:
        """End the process, and whatever it started, and wait until it is gone; may be called again."""
        self._child.stop(_STOP_GRACE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class BrokerChild(_Service):
    """A broker that accepts anonymous clients on `host` (loopback) and `port`; `kind` says which one it is."""

    def __init__(self, child: Child, *, port: int, kind: BrokerKind) -> None:
        super().__init__(child)
        self.host = _HOST
        self.port = port
        self.kind = kind


class OllamaChild(_Service):
    """A model server that speaks Ollama's API at `url`."""

    def __init__(self, child: Child, *, url: str) -> None:
        super().__init__(child)
        self.url = url


def start_broker(port: int, data_dir: Path, *, kind: BrokerKind | None = None) -> BrokerChild:
    """Start a broker on loopback and return once it accepts connections.

    Args:
        port: where it listens; 0 for a free one.
        data_dir: where mosquitto keeps sessions and messages over restarts. amqtt keeps nothing.
        kind: which broker; mosquitto where it is installed if None.

    Raises:
        PortTaken: another program listens there.
        EmbeddedError: no broker is installed, or it does not start.
    """
    kind, choice = _broker_program(kind)
    port = _free_port(port)
    child = Child(["edge_daemon.embedded.broker", "--port", str(port), "--data-dir", str(data_dir), *choice])
    try:
        _await_broker(child, kind)
    except BaseException:
        child.stop()
        raise
    child.log_output(kind)
    return BrokerChild(child, port=port, kind=kind)


def start_ollama(
    data_dir: Path,
    *,
    port: int = 0,
    aliases: Sequence[str] = (),
    max_loaded: int = 3,
    max_queue: int = 512,
    keep_alive: str = "5m",
) -> OllamaChild:
    """Start the model server on loopback and return once it answers. Models load when they are first asked for.

    Args:
        data_dir: where models are put together; about 250 MB, written once.
        port: where it listens; 0 for a free one.
        aliases: further names for models, each `NAME=MODEL`, each loaded for itself.
        max_loaded: how many models may be loaded at a time.
        max_queue: how many requests may wait for a load before others are refused.
        keep_alive: how long an idle model stays, such as "5m".

    Raises:
        PortTaken: another program listens there.
        EmbeddedError: the packages are missing, an alias is wrong, or it does not start.
    """
    arguments = ["edge_daemon.embedded.ollama_server", "--exit-with-parent", "--host", _HOST]
    arguments += ["--port", str(_free_port(port)), "--data-dir", str(data_dir)]
    arguments += ["--max-loaded", str(max_loaded), "--max-queue", str(max_queue), f"--keep-alive={keep_alive}"]
    child = Child([*arguments, *(f"--alias={alias}" for alias in aliases)])
    try:
        url = _await_url(child)
    except BaseException:
        child.stop()
        raise
    return OllamaChild(child, url=url)


def _broker_program(kind: BrokerKind | None) -> tuple[BrokerKind, list[str]]:
    """The broker to run, and how the child process is told."""
    # The directory where Debian has it is on root's PATH only.
    program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")
    if kind != "amqtt" and program:
        return "mosquitto", ["--mosquitto", program]
    if kind != "mosquitto" and importlib.util.find_spec("amqtt"):
        return "amqtt", ["--amqtt"]
    raise EmbeddedError("no MQTT broker: apt install mosquitto, or in a clone, pip install '.[embedded]'")


def _free_port(port: int) -> int:
    """`port` itself if nobody listens there, a free one for 0."""
    if not 0 <= port <= _LARGEST_PORT:
        raise EmbeddedError(f"{port} is no port: expected 0 to {_LARGEST_PORT}")
    try:
        with socket.create_server((_HOST, port)) as listener:
            return int(listener.getsockname()[1])
    except PermissionError as error:
        raise EmbeddedError(f"port {port} on {_HOST} may not be opened: {error.strerror}") from error
    except OSError as error:
        raise PortTaken(port, _HOST) from error


def _await_broker(child: Child, kind: BrokerKind) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    said = [""]
    while not said[-1].endswith("running"):
        try:
            said.append(child.read_line(deadline - time.monotonic()))
        except TimeoutError as error:
            raise EmbeddedError(f"{kind} did not start within {_START_TIMEOUT_S:g} s") from error
        if not said[-1]:
            raise EmbeddedError(f"{kind} ended with {child.exit_text()}: {' '.join(said).strip()}")


def _await_url(child: Child) -> str:
    try:
        line = child.read_line(_START_TIMEOUT_S)
    except TimeoutError as error:
        raise EmbeddedError(f"the model server did not start within {_START_TIMEOUT_S:g} s") from error
    if not line:
        raise EmbeddedError(f"the model server ended with {child.exit_text()}")
    said = json.loads(line)
    if "error" in said:
        raise EmbeddedError(said["error"])
    return str(said["url"])
