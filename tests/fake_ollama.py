"""A rude stand-in for Ollama: real HTTP, real timers, memory that runs out, and every fault that a client must survive.

In a test:

    with FakeOllama(FakeModel("small"), FakeModel("large", load_s=0.2), memory_bytes=3 * GB) as fake:
        fake["large"].fault = Fault.EOF          # the next answer of this model breaks off
        fake.loads_hang = True                   # Ollama's scheduler deadlock: only loaded models answer
        fake.stop(); fake.start()                # refuses connections, comes back empty on the same port
        fake.requests                            # everything that was asked, and whether the client hung up

As a process: `python -m tests.fake_ollama --port 0 --model '{"name": "small", "load_s": 1}'` prints `{"url": ...}` and
runs until it is ended. `POST /fake {"model": "small", "fault": "eof"}` changes a model, and without `model` the server.

What a model says follows from what it is asked, so that tests can expect it: see `FakeModel.answer`.
"""

import argparse
import gzip
import json
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from tests.ports import free_port

GB = 10**9
POLL_S = 0.005

KILLED = "llama-server process has terminated: signal: killed"
BUSY = "server busy, please try again.  maximum pending requests exceeded"
RUNNER_GONE = "an error was encountered while running the model: unexpected EOF"


OPEN_TEMPLATE = (
    "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}[{{ .Role }}]{{ .Content }}"
    '{{ if not $last }}[end]{{ else if ne .Role "assistant" }}[end][assistant]{{ end }}{{ end }}'
)
"""A chat template that leaves a last message of the assistant open."""
CLOSED_TEMPLATE = "{{ range .Messages }}[{{ .Role }}]{{ .Content }}[end]{{ end }}[assistant]"
"""One that ends every message, and has a new one begun."""


class Fault(StrEnum):
    """What goes wrong with the answers of a model. Faults of the stream strike after `fault_after` tokens."""

    NONE = "none"
    ERROR_STATUS = "error_status"  # an HTTP error of `error_status` with `error_text`
    ERROR_FIRST = "error_first"  # the same text as the first line of a 200, as old versions do
    ERROR_LATER = "error_later"  # an error line in the middle
    EOF = "eof"  # the answer ends in good order, without done
    RESET = "reset"  # the connection breaks
    DONE_FALSE = "done_false"  # a last object with done: false
    HANG_HEADERS = "hang_headers"
    HANG_FIRST = "hang_first"  # headers, then nothing
    HANG_LATER = "hang_later"
    DRIBBLE = "dribble"  # a byte every `dribble_s`
    THINKING = "thinking"  # all tokens are thoughts, until the length is used up
    THINKING_EOF = "thinking_eof"  # thoughts, then the connection ends
    NO_METRICS = "no_metrics"
    NEGATIVE = "negative"  # metrics below zero and above all sense
    LONG_LINE = "long_line"  # one token of 100 KB, which is legal
    HUGE_LINE = "huge_line"  # one line of 50 MB, which is not
    ENDLESS = "endless"  # tokens for ever, whatever num_predict says
    BROKEN_LINE = "broken_line"  # `broken_line` as it stands
    GZIP = "gzip"
    REDIRECT = "redirect"
    WRONG_MODEL = "wrong_model"
    LOAD_REASON = "load_reason"  # done, but only for having loaded


@dataclass
class FakeModel:
    """One model, and how it behaves; all of it may be changed at any time."""

    name: str
    size_bytes: int = GB
    """On disk."""
    ram_bytes: int | None = None
    """When loaded; None: as on disk."""
    load_s: float = 0.0
    load_error: tuple[int, str] | None = None
    """Status and text that every load ends in, after `load_s`."""
    kills_ollama: bool = False
    """Each load, after `load_s`, ends all models and the connection, as when systemd stops Ollama for it."""
    answer: str | None = None
    """What it says; None: `echo: ` and the last thing that a user said."""
    template: str = OPEN_TEMPLATE
    """With `CLOSED_TEMPLATE` an answer that was begun is answered anew, else it is continued."""
    first_token_s: float = 0.0
    token_s: float = 0.0
    edition: int = 0
    """Another one when the model was made or fetched anew."""
    family: str = "fake"
    capabilities: tuple[str, ...] = ("completion",)
    context_length: int = 2048
    blob: str | None = None
    """Models with the same blob share a runner; None: one of its own."""
    model_info: dict[str, Any] = field(default_factory=dict)
    """More for the `model_info` of `/api/show`."""
    fault: Fault = Fault.NONE
    fault_after: int = 1
    error_status: int = 500
    error_text: str = RUNNER_GONE
    broken_line: str = '{"message": {"content": "tr'
    dribble_s: float = 1.0

    def __post_init__(self) -> None:
        self.name = tagged(self.name)
        self.ram_bytes = self.size_bytes if self.ram_bytes is None else self.ram_bytes
        self.blob = self.blob or f"/models/blobs/sha256-{self.digest}"

    @property
    def digest(self) -> str:
        """64 hex digits."""
        return f"{self.edition or ''}{self.name.encode().hex()}".ljust(64, "0")[:64]


@dataclass
class Seen:
    """A request that was made. `aborted`: the client hung up before it was answered."""

    method: str
    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    lines: int = 0
    """So many have been sent of an answer that comes in lines."""
    aborted: bool = False
    finished: bool = False


@dataclass
class Runner:
    """A loaded model."""

    model: FakeModel
    num_ctx: int
    keep_alive_s: float
    expires_at: float
    users: int = 0
    gone_at: float | None = None
    """Unloading: when it will be gone."""
    killed: bool = False
    """Dead, but nobody has noticed."""


class Aborted(Exception):
    """The client has hung up, or the server stops."""


class Refused(Exception):
    """An error as Ollama reports it."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


def tagged(name: str) -> str:
    """`name` with its tag."""
    return name if ":" in name else f"{name}:latest"


class FakeOllama:
    """The server and all its switches. A `with` block starts and stops it."""

    host = "127.0.0.1"

    def __init__(
        self,
        *models: FakeModel,
        pullable: Iterable[FakeModel] = (),
        port: int = 0,
        host: str = "127.0.0.1",
        memory_bytes: int = 100 * GB,
        max_loaded: int = 3,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.models = {model.name: model for model in models}
        self.memory_bytes = memory_bytes
        self.max_loaded = max_loaded
        self.version = "0.33.0"
        self.default_keep_alive_s = 300.0
        self.unload_s = 0.0
        """How long an unloaded model stays in `/api/ps` and in memory."""
        self.busy = False
        """Answer 503 to every request for a model."""
        self.loads_hang = False
        """No load ever ends, while everything else is fine."""
        self.quick_hang = False
        """`/api/version`, `tags`, `ps` and `show` never answer."""
        self.pullable = {tagged(model.name): model for model in pullable}
        """Models that are not there and can be fetched."""
        self.pull_parts = 4
        """In so many parts a model is fetched, each taking `pull_part_s`."""
        self.pull_part_s = 0.0
        self.pull_error = ""
        """What a pull ends in, after a 200 and half of its parts."""
        self.hides_context = False
        """`/api/ps` says nothing of the context, as old versions."""
        self.tells_context: Callable[[int], int] = int
        """What `/api/ps` says of a context, which it may round."""
        self.requests: list[Seen] = []
        self.loads: list[str] = []
        """Names of the models in the order in which they were loaded."""
        self.evictions: list[str] = []
        self._now = now
        self._runners: dict[str, Runner] = {}
        self._changed = threading.Condition(threading.RLock())
        self._loading = threading.Lock()
        self._stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._port = port or free_port()
        self._host = host
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __getitem__(self, name: str) -> FakeModel:
        return self.models[tagged(name)]

    @property
    def url(self) -> str:
        """Where it listens; the same over stops and starts."""
        return f"http://{self.host}:{self._port}"

    def start(self) -> None:
        """Listen, with no model loaded."""
        self._stopping = threading.Event()
        self._runners = {}
        self._loading = threading.Lock()
        self._server = _Server(self, self._host, self._port)
        threading.Thread(target=self._server.serve_forever, args=(POLL_S,), daemon=True).start()

    def stop(self) -> None:
        """Stop as if killed: every connection breaks, and new ones are refused until the next start."""
        server, self._server = self._server, None
        if server is None:
            return
        self._stopping.set()
        server.shutdown()
        server.server_close()
        with self._changed:
            for connection in self._connections:
                _break(connection)

    def resident(self) -> list[str]:
        """The names of the models that take memory now; a killed one takes none, though `/api/ps` shows it."""
        with self._changed:
            self._tidy()
            return [runner.model.name for runner in self._runners.values() if not runner.killed]

    def used_bytes(self) -> int:
        """Memory that the loaded models take."""
        with self._changed:
            self._tidy()
            return sum(_ram(runner) for runner in self._runners.values())

    def kill_runner(self, name: str) -> None:
        """Kill the process of a loaded model, as the kernel does: `/api/ps` goes on to show it."""
        with self._changed:
            self._runners[self[name].blob or ""].killed = True

    def asked(self, path: str, *, model: str | None = None) -> list[Seen]:
        """The requests to `path`, or those of them for `model`."""
        return [
            seen
            for seen in list(self.requests)
            if seen.path == path and (model is None or tagged(str(seen.body.get("model"))) == tagged(model))
        ]

    def configure(self, changes: Mapping[str, Any]) -> None:
        """Set switches of the model that `changes["model"]` names, or else of the server."""
        changes = dict(changes)
        target: Any = self[changes.pop("model")] if "model" in changes else self
        for name, value in changes.items():
            if not hasattr(target, name):
                raise Refused(400, f"no switch {name!r}")
            setattr(target, name, Fault(value) if name == "fault" else value)

    # What follows is for the handler.

    def pause(self, seconds: float, connection: socket.socket) -> None:
        """Let time pass, unless the client hangs up or the server stops."""
        until = time.monotonic() + seconds
        while True:
            if self._stopping.is_set() or _hung_up(connection):
                raise Aborted
            left_s = until - time.monotonic()
            if left_s <= 0:
                return
            self._stopping.wait(min(left_s, POLL_S))

    def hang(self, connection: socket.socket) -> None:
        """Wait for the client to hang up."""
        while True:
            self.pause(1.0, connection)

    def use(self, body: Mapping[str, Any], connection: socket.socket) -> Runner:
        """A loaded runner for the model that `body` names, counted as used until `release`."""
        model = self._known(body)
        if self.busy:
            raise Refused(503, BUSY)
        keep_alive_s = _seconds(body.get("keep_alive"))
        num_ctx = body.get("options", {}).get("num_ctx")
        runner = self._take(model, num_ctx)
        while runner is None:
            runner = self._queue_for_load(model, num_ctx, keep_alive_s, connection)
        with self._changed:
            if keep_alive_s is not None:
                runner.keep_alive_s = keep_alive_s
        return runner

    def release(self, runner: Runner) -> None:
        """The request is over: the timer of its model starts again."""
        with self._changed:
            runner.users -= 1
            runner.expires_at = self._now() + runner.keep_alive_s
            self._tidy()
            self._changed.notify_all()

    def expire(self, body: Mapping[str, Any]) -> None:
        """Unload the model that `body` names as soon as it is idle."""
        runner = self._runners.get(self._known(body).blob or "")
        if runner is not None:
            with self._changed:
                runner.keep_alive_s = 0.0
                runner.expires_at = self._now()
                self._tidy()

    def show(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to `/api/show`."""
        model = self._known(body)
        info = {
            "general.architecture": "fake",
            "fake.block_count": 4,
            "fake.context_length": 8192,
            "fake.embedding_length": 64,
            "fake.attention.head_count": 8,
            "fake.attention.head_count_kv": 2,
        }
        return {
            "modelfile": f"# Modelfile\n# FROM {model.name}\n\nFROM {model.blob}\nTEMPLATE {model.template}\n",
            "template": model.template,
            "details": {"family": model.family},
            "model_info": info | model.model_info,
            "capabilities": list(model.capabilities),
        }

    def tags(self) -> dict[str, Any]:
        """The answer to `/api/tags`."""
        return {"models": [_listing(model) | {"size": model.size_bytes} for model in self.models.values()]}

    def ps(self) -> dict[str, Any]:
        """The answer to `/api/ps`."""
        with self._changed:
            self._tidy()
            runners = sorted(self._runners.values(), key=lambda runner: -runner.expires_at)
        context = [
            {} if self.hides_context else {"context_length": self.tells_context(runner.num_ctx)} for runner in runners
        ]
        return {
            "models": [
                _listing(runner.model) | {"size": runner.model.ram_bytes, "size_vram": 0} | more
                for runner, more in zip(runners, context, strict=True)
            ]
        }

    def _known(self, body: Mapping[str, Any]) -> FakeModel:
        name = str(body.get("model", ""))
        by_lower = {known.lower(): model for known, model in self.models.items()}
        if tagged(name).lower() not in by_lower:
            raise Refused(404, f"model '{name}' not found")
        return by_lower[tagged(name).lower()]

    def _take(self, model: FakeModel, num_ctx: int | None) -> Runner | None:
        """The runner of `model` if it can serve at once."""
        with self._changed:
            self._tidy()
            runner = self._runners.get(model.blob or "")
            if runner is None or runner.gone_at is not None:
                return None
            if runner.killed:
                del self._runners[model.blob or ""]
                return None
            if num_ctx not in (None, runner.num_ctx):
                return None
            runner.users += 1
            return runner

    def _queue_for_load(
        self, model: FakeModel, num_ctx: int | None, keep_alive_s: float | None, connection: socket.socket
    ) -> Runner | None:
        """Load when it is this request's turn; None when the model must be looked at again."""
        while not self._loading.acquire(timeout=POLL_S):
            self.pause(0, connection)
        try:
            if runner := self._take(model, num_ctx):
                return runner
            self._make_room(model, connection)
            return self._load(model, num_ctx or model.context_length, keep_alive_s, connection)
        finally:
            self._loading.release()

    def _make_room(self, model: FakeModel, connection: socket.socket) -> None:
        """Wait until `model` has no runner and fewer than `max_loaded` others do, unloading one after another."""
        while True:
            self.pause(0, connection)
            with self._changed:
                self._tidy()
                victim = self._victim(model)
                if victim is None:
                    return
                if victim.gone_at is None and not victim.users:
                    self.evictions.append(victim.model.name)
                    victim.gone_at = self._now() + self.unload_s
                self._changed.wait(POLL_S)

    def _victim(self, model: FakeModel) -> Runner | None:
        """Who has to go: one that goes already, then idle ones by the shortest keep-alive, then by path."""
        if own := self._runners.get(model.blob or ""):
            return own
        if len(self._runners) < self.max_loaded:
            return None
        return min(
            self._runners.values(), key=lambda it: (it.gone_at is None, it.users, it.keep_alive_s, it.model.blob)
        )

    def _load(self, model: FakeModel, num_ctx: int, keep_alive_s: float | None, connection: socket.socket) -> Runner:
        if self.loads_hang:
            self.hang(connection)
        self.pause(model.load_s, connection)
        if model.load_error:
            raise Refused(*model.load_error)
        if model.kills_ollama:
            with self._changed:
                self._runners.clear()
            _break(connection)
            raise Aborted
        if self.used_bytes() + (model.ram_bytes or 0) > self.memory_bytes:
            raise Refused(500, KILLED)
        lease_s = self.default_keep_alive_s if keep_alive_s is None else keep_alive_s
        runner = Runner(model, num_ctx, lease_s, self._now() + lease_s, users=1)
        with self._changed:
            self._runners[model.blob or ""] = runner
            self.loads.append(model.name)
        return runner

    def _tidy(self) -> None:
        """Do what timers would have done since the last look."""
        now = self._now()
        for blob, runner in list(self._runners.items()):
            if runner.gone_at is None and not runner.users and now >= runner.expires_at:
                runner.gone_at = runner.expires_at + self.unload_s
            if runner.gone_at is not None and now >= runner.gone_at:
                del self._runners[blob]

    def track(self, connection: socket.socket, *, there: bool) -> None:
        """Note that a connection is there, or no longer."""
        with self._changed:
            (self._connections.add if there else self._connections.discard)(connection)


def _ram(runner: Runner) -> int:
    return 0 if runner.killed else runner.model.ram_bytes or 0


def _listing(model: FakeModel) -> dict[str, Any]:
    return {"name": model.name, "model": model.name, "digest": model.digest}


def _seconds(keep_alive: Any) -> float | None:
    if keep_alive is None:
        return None
    if isinstance(keep_alive, str):
        raise Refused(400, "the stand-in takes keep_alive in seconds only")
    return float("inf") if keep_alive < 0 else float(keep_alive)


def _hung_up(connection: socket.socket) -> bool:
    """Whether the other side has closed. All of the request has been read before."""
    try:
        readable, _, _ = select.select([connection], [], [], 0)
        return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True


def _break(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, fake: FakeOllama, host: str, port: int) -> None:
        self.fake = fake
        super().__init__((host, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell of every error but a broken connection: those are what it is for."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.fake = self.server.fake
        self.fake.track(self.connection, there=True)

    def finish(self) -> None:
        self.fake.track(self.connection, there=False)
        super().finish()

    def log_message(self, *_: Any) -> None:
        """Nothing: tests look at `FakeOllama.requests`."""

    def do_GET(self) -> None:
        self._serve({"/api/version": self._version, "/api/tags": self._tags, "/api/ps": self._ps})

    def do_POST(self) -> None:
        self._serve(
            {
                "/api/generate": self._generate,
                "/api/chat": self._generate,
                "/api/show": self._show,
                "/api/pull": self._pull,
                "/fake": self._configure,
            }
        )

    def _serve(self, routes: Mapping[str, Callable[[], None]]) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.body: dict[str, Any] = json.loads(body) if body else {}
        self.begun = False
        self.seen = seen = Seen(self.command, self.path, self.body, dict(self.headers))
        self.fake.requests.append(seen)
        try:
            self._answer(routes.get(self.path, self._unknown))
        except (Aborted, OSError):
            seen.aborted = True
            self.close_connection = True
        seen.finished = True

    def _answer(self, route: Callable[[], None]) -> None:
        try:
            route()
        except Refused as error:
            self._refuse(error)

    def _unknown(self) -> None:
        self.send(404, b"404 page not found", "text/plain")

    def _version(self) -> None:
        self._quick({"version": self.fake.version})

    def _tags(self) -> None:
        self._quick(self.fake.tags())

    def _ps(self) -> None:
        self._quick(self.fake.ps())

    def _show(self) -> None:
        self._quick(self.fake.show(self.body))

    def _pull(self) -> None:
        """Lines of progress; only the last one, `success`, is one, and errors come after a 200."""
        fake, name = self.fake, tagged(str(self.body.get("model")))
        self.begin()
        self.line(_ndjson({"status": "pulling manifest"}))
        model = fake.pullable.get(name)
        if model is None:
            raise Refused(200, "pull model manifest: file does not exist")
        layer = {
            "status": f"pulling {model.digest[:12]}",
            "digest": f"sha256:{model.digest}",
            "total": model.size_bytes,
        }
        self.line(_ndjson(layer))  # Ollama leaves `completed` out while it is 0
        for part in range(1, fake.pull_parts + 1):
            fake.pause(fake.pull_part_s, self.connection)
            if fake.pull_error and 2 * part > fake.pull_parts:
                raise Refused(200, fake.pull_error)
            self.line(_ndjson(layer | {"completed": part * model.size_bytes // fake.pull_parts}))
        for status in ("verifying sha256 digest", "writing manifest"):
            self.line(_ndjson({"status": status}))
        fake.models[name] = model
        self.end(_ndjson({"status": "success"}))

    def _configure(self) -> None:
        self.fake.configure(self.body)
        self._quick({})

    def _quick(self, document: Mapping[str, Any]) -> None:
        if self.fake.quick_hang and self.path != "/fake":
            self.fake.hang(self.connection)
        self.send(200, json.dumps(document).encode())

    def _generate(self) -> None:
        empty = not self.body.get("messages") and not self.body.get("prompt")
        if empty and self.body.get("keep_alive") == 0:
            self.fake.expire(self.body)
            self.send(200, json.dumps(self.record("", done=True, done_reason="unload")).encode())
            return
        began = time.monotonic_ns()
        runner = self.fake.use(self.body, self.connection)
        try:
            if empty:
                self.send(200, json.dumps(self.record("", done=True, done_reason="load")).encode())
            else:
                _Answering(self, runner, time.monotonic_ns() - began).run()
        finally:
            self.fake.release(runner)

    def record(self, text: str, *, thinking: str = "", done: bool = False, **more: Any) -> dict[str, Any]:
        thoughts = {"thinking": thinking} if thinking else {}
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text} | thoughts}
        if self.path == "/api/generate":
            said = {"response": text} | thoughts
        return {"model": self.body.get("model"), "created_at": "2026-01-01T00:00:00Z"} | said | {"done": done} | more

    def _refuse(self, error: Refused) -> None:
        body = json.dumps({"error": error.text}).encode()
        if self.begun:
            self.end(body + b"\n")
        else:
            self.send(error.status, body)

    def send(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def begin(self) -> None:
        self.begun = True
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def line(self, data: bytes) -> None:
        self.wfile.write(_chunk(data))
        self.seen.lines += 1

    def end(self, last_line: bytes = b"") -> None:
        # In one piece: whoever has read the last line may hang up without having aborted anything.
        self.wfile.write((_chunk(last_line) if last_line else b"") + b"0\r\n\r\n")


class _Answering:
    """One answer of a loaded model, with the model's fault."""

    def __init__(self, handler: _Handler, runner: Runner, load_ns: int) -> None:
        self._handler = handler
        self._body = handler.body
        self._runner = runner
        self._model = runner.model
        self._load_ns = load_ns
        self._fault = runner.model.fault

    def run(self) -> None:
        """Answer, as far as the fault lets it."""
        if self._spoils_the_start():
            return
        began = time.monotonic_ns()
        self._pause(self._model.first_token_s)
        prompt_ns = time.monotonic_ns() - began
        tokens, reason = self._tokens()
        self._handler.begin()
        count = 0
        for token in tokens:
            if count == self._model.fault_after and self._spoils_the_middle():
                return
            self._pause(self._model.token_s)
            if self._runner.killed:
                raise Refused(500, RUNNER_GONE)
            self._say(token)
            count += 1
        if count <= self._model.fault_after and self._spoils_the_middle():
            return
        self._finish(reason, count, prompt_ns, time.monotonic_ns() - began - prompt_ns)

    def _pause(self, seconds: float) -> None:
        self._handler.fake.pause(seconds, self._handler.connection)

    def _hang(self) -> None:
        self._handler.fake.hang(self._handler.connection)

    def _spoils_the_start(self) -> bool:
        """Do what the fault does before or instead of the stream; whether that was all."""
        handler = self._handler
        match self._fault:
            case Fault.ERROR_STATUS:
                raise Refused(self._model.error_status, self._model.error_text)
            case Fault.HANG_HEADERS:
                self._hang()
            case Fault.ERROR_FIRST:
                handler.begin()
                raise Refused(200, self._model.error_text)
            case Fault.HANG_FIRST:
                handler.begin()
                self._hang()
            case Fault.REDIRECT:
                handler.send(307, b"", Location="/api/version")
            case Fault.GZIP:
                whole = json.dumps(handler.record("squeezed", done=True, done_reason="stop")).encode()
                handler.send(200, gzip.compress(whole), Content_Encoding="gzip")
            case _:
                return False
        return True

    def _spoils_the_middle(self) -> bool:
        """Do what the fault does in the stream; whether that was the end of it."""
        handler = self._handler
        match self._fault:
            case Fault.ERROR_LATER:
                raise Refused(500, self._model.error_text)
            case Fault.EOF | Fault.THINKING_EOF:
                handler.end()
            case Fault.RESET:
                _break(handler.connection)
                handler.close_connection = True
            case Fault.DONE_FALSE:
                handler.end(_ndjson(handler.record("")))
            case Fault.HANG_LATER:
                self._hang()
            case Fault.HUGE_LINE:
                self._say("x" * 50_000_000)
            case Fault.LONG_LINE:
                self._say("x" * 100_000)
                return False
            case Fault.BROKEN_LINE:
                handler.end(self._model.broken_line.encode() + b"\n")
            case _:
                return False
        return True

    def _tokens(self) -> tuple[Iterable[str], str]:
        """What is said, and why it ends."""
        words = re.findall(r"\s*\S+", self._text())
        if self._fault is Fault.ENDLESS:
            return _for_ever(words), "stop"
        limit = self._body.get("options", {}).get("num_predict", -1)
        if 0 <= limit < len(words):
            return words[:limit], "length"
        return words, "length" if self._fault is Fault.THINKING else "stop"

    def _text(self) -> str:
        """The whole answer, or what is left of it after the part that the request ends with."""
        messages = self._body.get("messages") or [{"role": "user", "content": self._body.get("prompt")}]
        asked = [message["content"] for message in messages if message["role"] == "user"]
        text = f"echo: {asked[-1] if asked else ''}" if self._model.answer is None else self._model.answer
        is_begun = messages[-1]["role"] == "assistant" and self._model.template != CLOSED_TEMPLATE
        return text.removeprefix(messages[-1]["content"]) if is_begun else text

    def _say(self, token: str) -> None:
        handler = self._handler
        is_thought = self._fault in (Fault.THINKING, Fault.THINKING_EOF)
        line = _ndjson(handler.record("", thinking=token) if is_thought else handler.record(token))
        if self._fault is Fault.WRONG_MODEL:
            line = _ndjson(handler.record(token) | {"model": "another:latest"})
        if self._fault is Fault.DRIBBLE:
            for byte in line:
                self._pause(self._model.dribble_s)
                handler.line(bytes([byte]))
        else:
            handler.line(line)

    def _finish(self, reason: str, count: int, prompt_ns: int, eval_ns: int) -> None:
        metrics: dict[str, Any] = {
            "total_duration": self._load_ns + prompt_ns + eval_ns,
            "load_duration": self._load_ns,
            "prompt_eval_count": len(json.dumps(self._body.get("messages", "")).split()),
            "prompt_eval_duration": prompt_ns,
            "eval_count": count,
            "eval_duration": eval_ns,
        }
        if self._fault is Fault.NO_METRICS:
            metrics = {}
        if self._fault is Fault.NEGATIVE:
            metrics |= {"total_duration": -5, "load_duration": 10**30, "eval_duration": -1, "eval_count": -3}
        if self._fault is Fault.LOAD_REASON:
            reason = "load"
        self._handler.end(_ndjson(self._handler.record("", done=True, done_reason=reason, **metrics)))


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _ndjson(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _for_ever(words: list[str]) -> Iterator[str]:
    while True:
        yield from words


def main() -> None:
    """Run one as a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.fake_ollama", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--memory-bytes", type=int, default=100 * GB)
    parser.add_argument("--max-loaded", type=int, default=3)
    known = ", ".join(it.name for it in fields(FakeModel))
    parser.add_argument("--model", type=json.loads, action="append", help=f"a JSON object of: {known}")
    options = parser.parse_args()
    models = [_from_json(record) for record in options.model or [{"name": "small"}]]
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    with FakeOllama(
        *models, port=options.port, memory_bytes=options.memory_bytes, max_loaded=options.max_loaded
    ) as fake:
        print(json.dumps({"url": fake.url}), flush=True)
        signal.sigwait(ends)


def _from_json(record: dict[str, Any]) -> FakeModel:
    return FakeModel(**record | {"fault": Fault(record.get("fault", "none"))})


if __name__ == "__main__":
    main()
