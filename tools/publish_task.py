#!/usr/bin/env python3
"""Send one task to an edge-llm node over MQTT, wait, and print the answer.

This file works alone: copy it anywhere that has Python 3.11 and venv.

    python3 -m venv ~/paho && ~/paho/bin/pip install 'paho-mqtt>=2.1'
    ~/paho/bin/python publish_task.py --host pi1.local --node pi1 --prompt 'Is 31 C hot?'

Exit status: 0 succeeded; 1 failed or rejected; 2 a wrong argument; 3 no broker, or no answer in time; 130 interrupted.
The environment variable EDGE_LLM_PASSWORD holds the password unless --password-file is given.
"""

import argparse
import io
import json
import os
import queue
import re
import secrets
import shlex
import socket
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from paho.mqtt.client import Client, MQTTMessage
    from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties
    from paho.mqtt.reasoncodes import ReasonCode
except ImportError:
    print(
        f"publish_task.py: {sys.executable} has no paho-mqtt 2. An environment that has it:\n"
        "  python3 -m venv ~/paho && ~/paho/bin/pip install 'paho-mqtt>=2.1'\n"
        f"  ~/paho/bin/python {shlex.quote(sys.argv[0])} ...",
        file=sys.stderr,
    )
    sys.exit(2)

SUCCEEDED, FAILED, USAGE, NO_ANSWER, INTERRUPTED = 0, 1, 2, 3, 130

PRIORITIES = ("urgent", "high", "normal", "low")
NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
V5 = MQTTProtocolVersion.MQTTv5
V311 = MQTTProtocolVersion.MQTTv311
UNSUPPORTED_VERSION = 132
SIGN_OF_LIFE_S = 2.0
KEEPALIVE_S = 30


class NoAnswerError(Exception):
    """The broker is out of reach, or the node did not answer in time."""


class VersionRefusedError(Exception):
    """The broker does not speak this version of MQTT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """Where the broker is and how to get in."""

    host: str
    port: int
    username: str | None
    password: str | None
    tls: ssl.SSLContext | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A task, the topics that belong to it, and how long to wait for it."""

    node: str
    task_topic: str
    reply_topic: str
    availability_topic: str
    payload: bytes
    ttl_s: int | None
    wait_s: float


class Terminal:
    """Standard output for the answer, standard error for everything about it."""

    def __init__(self, *, stream: bool, verbose: bool) -> None:
        self._stream = stream
        self._verbose = verbose or sys.stderr.isatty()
        self._streamed = ""
        self._next_chunk: int | None = None

    def progress(self, text: str) -> None:
        """Tell a person who watches how far it is."""
        if self._verbose:
            self.note(text)

    def note(self, text: str) -> None:
        """Say what the user must know in any case."""
        print(text, file=sys.stderr, flush=True)

    def chunk(self, seq: Any, text: Any) -> None:
        """Print a piece of the answer; one that is repeated, or comes after a gap, is left to `answer`."""
        if not self._stream or not isinstance(seq, int) or not isinstance(text, str):
            return
        if self._next_chunk not in (None, seq):
            return
        self._next_chunk = seq + 1
        self._streamed += text
        print(text, end="", flush=True)

    def answer(self, text: str) -> None:
        """Print what of the answer has not been printed; all of it when it went another way since."""
        if text.startswith(self._streamed):
            print(text.removeprefix(self._streamed))
        else:
            print(f"\n{text}")

    def end_stream(self) -> None:
        """End the line of an answer that will not be completed."""
        if self._streamed:
            print()


class Conversation:
    """One task sent over one connection, and its answer.

    paho's thread only puts events into the inbox; all else happens in the caller's thread. After a lost
    connection the task is sent again under its own id: a node answers a known id from its store, so
    whatever was lost meanwhile comes again, and nothing runs twice.
    """

    def __init__(self, broker: Broker, request: Request, terminal: Terminal, version: MQTTProtocolVersion) -> None:
        self._broker = broker
        self._request = request
        self._terminal = terminal
        self._version = version
        self._inbox: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = queue.SimpleQueue()
        self._result: dict[str, Any] | None = None
        self._last_state = "the broker did not answer"
        self._last_seq = -1
        self._node_seen = False
        self._client = self._new_client()

    def run(self) -> dict[str, Any]:
        """Send the task and return its result.

        Raises:
            NoAnswerError: no broker, no permission, or no answer within the time to wait.
            VersionRefusedError: try again with another version.
        """
        deadline = time.monotonic() + self._request.wait_s
        self._connect()
        self._client.loop_start()
        try:
            self._handle_events(until=min(deadline, time.monotonic() + SIGN_OF_LIFE_S))
            if self._last_state == "sent" and not self._node_seen:
                self._terminal.note(f"nothing heard from node {self._request.node}: is that its name?")
            self._handle_events(until=deadline)
        finally:
            self._client.disconnect()
            self._client.loop_stop()
        if self._result is None:
            raise NoAnswerError(f"no answer within {self._request.wait_s:g} s ({self._last_state})")
        return self._result

    def _handle_events(self, *, until: float) -> None:
        while self._result is None:
            try:
                handle, arguments = self._inbox.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return
            handle(*arguments)

    def _new_client(self) -> Client:
        client = Client(CallbackAPIVersion.VERSION2, protocol=self._version)
        client.username_pw_set(self._broker.username, self._broker.password)
        if self._broker.tls is not None:
            client.tls_set_context(self._broker.tls)
        client.reconnect_delay_set(1, 5)
        client.on_connect = self._later(self._on_connect)
        client.on_disconnect = self._later(self._on_disconnect)
        client.on_subscribe = self._later(self._on_subscribe)
        client.on_publish = self._later(self._on_publish)
        client.on_message = self._later(self._on_message)
        return client

    def _later(self, handle: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments: self._inbox.put((handle, arguments))

    def _connect(self) -> None:
        broker = self._broker
        try:
            self._client.connect(broker.host, broker.port, KEEPALIVE_S)
        except OSError as error:
            raise NoAnswerError(f"no broker at {broker.host}:{broker.port}: {error}") from error

    def _on_connect(self, _client: Client, _userdata: Any, _flags: Any, reason: ReasonCode, _: Any) -> None:
        if reason.value == UNSUPPORTED_VERSION and self._version == V5:
            raise VersionRefusedError
        self._check(reason, "the connection")
        self._client.subscribe([(f"{self._request.reply_topic}/#", 1), (self._request.availability_topic, 1)])

    def _on_disconnect(self, *_: Any) -> None:
        self._last_state = "connection lost"
        self._terminal.progress("connection lost, trying again")

    def _on_subscribe(self, _client: Client, _userdata: Any, _mid: int, reasons: list[ReasonCode], _: Any) -> None:
        # The second is only for the user's information; a broker may keep it from us.
        self._check(reasons[0], "to tell us the answer")
        self._client.publish(self._request.task_topic, self._request.payload, 1, properties=self._properties())
        self._last_state = "sent"

    def _on_publish(self, _client: Client, _userdata: Any, _mid: int, reason: ReasonCode, _: Any) -> None:
        self._check(reason, "the task")

    def _on_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        self._node_seen = True
        if message.topic == self._request.availability_topic:
            if message.payload == b"offline":
                self._terminal.note(f"node {self._request.node} is offline; the task waits for it")
            return
        handlers = {"status": self._on_status, "stream": self._on_chunk, "result": self._on_result}
        handle = handlers.get(message.topic.rpartition("/")[2])
        body = parsed_object(message.payload)
        if handle is not None and body is not None:
            handle(body)

    def _on_status(self, status: dict[str, Any]) -> None:
        seq = status.get("seq")
        if not isinstance(seq, int) or seq <= self._last_seq:
            return  # QoS 1 may repeat, and a repeat may come late
        self._last_seq = seq
        self._last_state = str(status.get("state"))
        self._terminal.progress(progress_text(status))

    def _on_chunk(self, chunk: dict[str, Any]) -> None:
        self._terminal.chunk(chunk.get("seq"), chunk.get("text"))

    def _on_result(self, result: dict[str, Any]) -> None:
        self._result = result

    def _properties(self) -> Properties | None:
        """On MQTT 5 the broker, too, drops the task when its time is over."""
        if self._version != V5 or self._request.ttl_s is None:
            return None
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.MessageExpiryInterval = self._request.ttl_s
        return properties

    def _check(self, reason: ReasonCode, what: str) -> None:
        if reason.is_failure:
            raise NoAnswerError(f"the broker refused {what}: {reason}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # an answer may hold what this terminal cannot show
    parser = argument_parser()
    options = parser.parse_args(arguments)
    try:
        broker, request = broker_from(options), request_from(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    terminal = Terminal(stream=options.stream and not options.json, verbose=options.verbose)
    try:
        return report(converse(broker, request, terminal, options), terminal, as_json=options.json)
    except NoAnswerError as error:
        terminal.end_stream()
        terminal.note(str(error))
        return NO_ANSWER
    except KeyboardInterrupt:
        terminal.end_stream()
        terminal.note("interrupted; the node still has the task")
        return INTERRUPTED


def converse(broker: Broker, request: Request, terminal: Terminal, options: argparse.Namespace) -> dict[str, Any]:
    """Talk MQTT 5, or 3.1.1 when asked to or when the broker knows nothing newer."""
    try:
        return Conversation(broker, request, terminal, V311 if options.v311 else V5).run()
    except VersionRefusedError:
        terminal.progress("the broker has no MQTT 5, using 3.1.1")
        return Conversation(broker, request, terminal, V311).run()


def report(result: dict[str, Any], terminal: Terminal, *, as_json: bool) -> int:
    """Print a terminal result; return the exit status that it means."""
    succeeded = result.get("state") == "succeeded"
    if as_json:
        print(json.dumps(result, ensure_ascii=False, indent=2))
    elif succeeded:
        terminal.answer(str(result.get("text") or ""))
        if cut := cut_text(result):
            terminal.note(cut)
    else:
        terminal.end_stream()
    if not succeeded:
        terminal.note(reason_text(result))
    return SUCCEEDED if succeeded else FAILED


def reason_text(result: dict[str, Any]) -> str:
    """Why there is no answer: `error.code: message`, or just the state."""
    error = result.get("error")
    if isinstance(error, dict):
        return f"{error.get('code')}: {error.get('message')}"
    return str(result.get("state"))


def cut_text(result: dict[str, Any]) -> str | None:
    """Where an answer was cut; None for one that is whole."""
    if result.get("truncated") is True:
        return f"cut at {len(str(result.get('text') or '').encode(errors='replace')):,} bytes"
    if result.get("done_reason") == "length":
        return f"cut at max_tokens ({result.get('output_tokens')} tokens)"
    return None


def progress_text(status: dict[str, Any]) -> str:
    """A status for people: `queued, position 3, about 20 s`."""
    words = [str(status.get("state"))]
    if isinstance(position := status.get("position"), int):
        words.append(f"position {position}")
    if isinstance(eta_s := status.get("eta_s"), int | float):
        words.append(f"about {eta_s:.0f} s")
    if isinstance(attempt := status.get("attempt"), int) and attempt > 1:
        words.append(f"attempt {attempt}")
    return ", ".join(words)


def parsed_object(payload: bytes | bytearray) -> dict[str, Any] | None:
    """The JSON object in a payload; None for anything else."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def broker_from(options: argparse.Namespace) -> Broker:
    """Read the password and the certificates.

    Raises:
        OSError: a file cannot be read, or is no certificate.
    """
    password = os.environ.get("EDGE_LLM_PASSWORD")
    if options.password_file is not None:
        password = options.password_file.read_text(encoding="utf-8").rstrip("\r\n")
    tls = None
    if options.tls or options.ca_file is not None:
        certificates = None if options.ca_file is None else options.ca_file.read_text(encoding="ascii")
        tls = ssl.create_default_context(cadata=certificates)
    port = options.port or (8883 if tls else 1883)
    return Broker(host=options.host, port=port, username=options.username, password=password, tls=tls)


def request_from(options: argparse.Namespace) -> Request:
    """Build the task and its topics.

    Raises:
        OSError: the schema file cannot be read.
        ValueError: it is not JSON, or the prompt is not text.
    """
    root = f"{options.base_topic}/{options.node}"
    whose = f"{options.src}/{options.id}"
    return Request(
        node=options.node,
        task_topic=f"{root}/task/{whose}",
        reply_topic=f"{root}/reply/{whose}",
        availability_topic=f"{root}/availability",
        payload=json.dumps(task_from(options), ensure_ascii=False).encode(),
        ttl_s=options.ttl,
        wait_s=options.wait,
    )


def task_from(options: argparse.Namespace) -> dict[str, Any]:
    """The JSON task: the prompt and only what was given besides."""
    optional = {
        "system": options.system,
        "model": options.model,
        "task_type": options.task_type,
        "priority": options.priority,
        "ttl_s": options.ttl,
        "stream": (options.stream and not options.json) or None,
        "format": None if options.format is None else output_format(options.format),
        "options": dict(options.option) or None,
    }
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    return {"prompt": prompt} | {key: value for key, value in optional.items() if value is not None}


def output_format(text: str) -> Any:
    """`json`, or the JSON schema in the file of that name."""
    if text == "json":
        return text
    try:
        return json.loads(Path(text).read_bytes())
    except ValueError as error:
        raise ValueError(f"{text} is not JSON: {error}") from error


def argument_parser() -> argparse.ArgumentParser:
    """Every flag, as --help shows them."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    hostname = socket.gethostname()
    add("--prompt", required=True, help="what to ask; - reads standard input")
    add("--system", help="the system prompt")
    add("--model", help="which model; the node has a default")
    add("--task-type", help="a kind of task that the node knows, or a label")
    add("--priority", choices=PRIORITIES)
    add("--ttl", type=whole_seconds, metavar="SECONDS", help="drop the task if it has not begun by then")
    add("--format", metavar="json|FILE", help="answer in JSON, or by the JSON schema in FILE")
    add("--option", type=key_value, action="append", default=[], metavar="KEY=VALUE", help="sampling option")
    add("--stream", action="store_true", help="print the answer as it comes")
    add("--wait", type=seconds, default=300.0, metavar="SECONDS", help="for the answer (default 300)")
    add("--json", action="store_true", help="print the whole result object")
    add("-v", "--verbose", action="store_true", help="show progress, also when not on a terminal")
    add("--node", type=topic_part, default=hostname, help="(default: this machine's name)")
    add("--base-topic", type=topic_part, default="edge-llm", help="(default: edge-llm)")
    add("--src", type=name, default=default_src(hostname), help="the sender's name (default: %(default)s)")
    add("--id", type=name, default=secrets.token_hex(8), help="repeat it to get the same answer, not a new run")
    add("--host", type=host, default="127.0.0.1", help="the broker (default: this machine)")
    add("--port", type=port, help="(default: 1883, with TLS 8883)")
    add("--username")
    add("--password-file", type=Path, metavar="FILE")
    add("--tls", action="store_true", help="encrypt; the broker's certificate must be known to this machine")
    add("--ca-file", type=Path, metavar="FILE", help="encrypt; the certificate must be signed by this one")
    add("--v311", action="store_true", help="talk MQTT 3.1.1 without trying 5 first")
    return parser


def default_src(hostname: str) -> str:
    """`cli-<hostname>`, as far as a name may have its letters."""
    return re.sub(r"[^A-Za-z0-9_.:-]", "-", f"cli-{hostname}")[:64]


def name(text: str) -> str:
    """A sender's or task's name."""
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError("use 1 to 64 of A-Z a-z 0-9 _ . : -")
    return text


def topic_part(text: str) -> str:
    """Levels of a topic."""
    if not text or set(text) & set("+#\0"):
        raise argparse.ArgumentTypeError("must not be empty and must not contain + or #")
    return text


def host(text: str) -> str:
    """A host's name or address, of which a name server could be asked."""
    try:
        labels = text.encode("idna")
    except UnicodeError:
        labels = b""
    if not labels:
        raise argparse.ArgumentTypeError("use a host name or an address")
    return text


def port(text: str) -> int:
    """A TCP port."""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError("use 1 to 65535")
    return int(text)


def seconds(text: str) -> float:
    """A time to wait."""
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError("use a number of seconds above 0")
    return value


def whole_seconds(text: str) -> int:
    """A time to live; MQTT counts whole seconds."""
    if not text.isdecimal() or not 0 < int(text) < 2**32:
        raise argparse.ArgumentTypeError("use a whole number of seconds above 0")
    return int(text)


def key_value(text: str) -> tuple[str, Any]:
    """`KEY=VALUE`, the value as JSON when it is, else as text."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError("use KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


if __name__ == "__main__":
    sys.exit(main())
