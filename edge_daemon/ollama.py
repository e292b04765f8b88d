"""HTTP to Ollama: what it has, what is resident, load, unload, generate.

Nothing here decides anything or tries anything twice; the pool does. An answer is a success only with HTTP 200,
``done: true`` and no ``error`` on any line; all else becomes a ``ModelError``.

Every request runs in a helper thread, over a connection of its own, and hands over the answer line by line. So the
caller keeps its deadlines to the moment, can be interrupted at any time, and cuts the connection when it stops
listening: a closed connection is the only thing that makes Ollama stop working on a request.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Self
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ProtocolError

from edge_daemon.errors import (
    BadRequest,
    DeadlineExceeded,
    Incomplete,
    ModelBroken,
    ModelError,
    ModelMissing,
    NoMemory,
    OllamaBusy,
    OllamaDied,
    OllamaDown,
    Repetitive,
    RunnerDied,
)
from edge_daemon.messages import Message

MAX_LINE_BYTES = 1 << 20
"""A longer line is no answer of Ollama's; it is not read to its end."""

BEAT_S = 5.0
"""A waiting caller gives a sign of life at least this often."""

PULL_STALL_S = 300.0
"""Ollama retries a stalled download by itself; after this long without a word it is taken for stuck."""
PULL_LIMIT_S = 86_400.0
MAX_LOADED = 3
"""Models that Ollama keeps in memory if it is not told otherwise."""
REPEATS = 30
"""Ollama breaks an answer off that repeats a token more often."""

_EXCEPT_LAST = re.compile(r"\bnot\s+\(?\s*\$\w*last", re.IGNORECASE)
_MAX_NUMBER = 10**15
_MAX_ERROR_CHARS = 300
_READ_BYTES = 1 << 16
_CONNECTION_MARGIN_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTag:
    """A model that Ollama has on disk, its name as Ollama spells it: compare with `normalise`."""

    name: str
    size_bytes: int
    digest: str
    is_remote: bool = False
    """It runs in somebody's cloud: this Ollama only passes the prompts on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDetails:
    """What Ollama knows of a model without loading it."""

    capabilities: frozenset[str]
    """Such as ``completion``, ``thinking``, ``embedding``; empty on old versions."""
    family: str
    """The architecture, such as ``qwen2``; empty when Ollama does not say."""
    blob: str | None
    """Path of the weights: models with the same blob share one runner, and `running` names only one of them."""
    kv_bytes_per_token: int | None
    """Memory that one token of context takes, for a cache of 16-bit numbers."""
    context_length: int | None
    """Tokens that the model was made for."""
    continues: bool
    """It goes on with a last message of the role ``assistant``, instead of answering anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A model that Ollama lists as resident. Its runner may be dead: nothing notices before the next request."""

    name: str
    size_bytes: int
    digest: str
    context_length: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One request for an answer: either ``prompt`` or ``messages``.

    A last message of the role ``assistant`` is continued, and the answer is only what comes after it, if the model
    ``continues``; another one answers anew.
    """

    model: str
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    system: str | None = None
    options: Mapping[str, Any]
    """The model's runner options, the same as at its load (others reload it), sampling options, ``num_predict``."""
    format: Any = None
    """``"json"``, a JSON schema as a dict, or None for free text."""
    keep_alive_s: float
    truncate: bool = False
    """Whether the beginning of what is longer than the context may be left out, without a word; else it is refused.
    Versions before 0.12 leave it out all the same."""
    think: bool | str | None = None
    """Whether to think aloud, or how much. None does not mention it: a model that cannot think refuses to be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A finished answer. Metrics that Ollama did not give are 0."""

    text: str
    done_reason: str | None
    """``stop`` or ``length``; None on very old versions."""
    truncated: bool = False
    """It was stopped at the limit of bytes, and its metrics never came."""
    prompt_tokens: int
    output_tokens: int
    total_ns: int
    load_ns: int
    prompt_eval_ns: int
    eval_ns: int
    first_token_s: float | None
    """From the call to the first token, thinking included; None when there was none."""
    thought: bool = False
    """The model thought aloud, whatever it was told; the thoughts are not kept."""
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long one generation may take: to its first token, from token to token, in all."""

    first_token_s: float
    token_gap_s: float
    total_s: float


class Interrupted(Exception):
    """A call was interrupted. ``pieces`` is the text so far, as it came: a token each, as a rule."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.pieces: tuple[str, ...] = ()

    @property
    def partial(self) -> str:
        """The text so far."""
        return "".join(self.pieces)

    @property
    def tokens(self) -> int:
        """The number of pieces."""
        return len(self.pieces)


class Interrupt:
    """Stops a waiting `load` or `generate` from another thread. It is set once and stays set."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._wake: Callable[[str], None] | None = None
        self._lock = threading.Lock()

    def set(self, reason: str) -> None:
        """Stop the call that waits now, or else the next one; only the first reason counts."""
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
            wake = self._wake
        if wake:
            wake(reason)

    def wakes(self, wake: Callable[[str], None]) -> None:
        """Have ``wake(reason)`` called when it is set, which may be now, instead of what was to be called before."""
        with self._lock:
            self._wake = wake
            reason = self.reason
        if reason is not None:
            wake(reason)


class Ollama:
    """A client of the Ollama at ``url``; any number of threads may use it.

    Every method raises OllamaDown when nobody answers, and the ModelError that Ollama's own error stands for.

    Args:
        url: scheme, host and port.
        connect_timeout_s: how long a connection may take to be made.
        quick_timeout_s: how long Ollama may take over what needs no model: all but `load` and `generate`.
        max_result_bytes: an answer is stopped when its text has reached this length.
        beat: called by every waiting thread, at least every 5 s, as a sign of life.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout_s: float,
        quick_timeout_s: float = 10.0,
        max_result_bytes: int = 1 << 18,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._url = url.rstrip("/")
        self._connect_timeout_s = connect_timeout_s
        self._quick_timeout_s = quick_timeout_s
        self._max_result_bytes = max_result_bytes
        self._beat = beat

    def version(self) -> str:
        """The version of Ollama; that it answers at all shows that it is there."""
        return _string(self._ask("GET", "/api/version"), "version")

    def tags(self) -> tuple[ModelTag, ...]:
        """The models on disk."""
        return tuple(
            ModelTag(
                name=_string(it, "name"),
                size_bytes=_number(it, "size"),
                digest=_string(it, "digest"),
                is_remote=bool(it.get("remote_host")) or _string(it, "name").lower().endswith(("-cloud", ":cloud")),
            )
            for it in _listed(self._ask("GET", "/api/tags"))
        )

    def show(self, model: str) -> ModelDetails:
        """What is known of ``model``."""
        shown = self._ask("POST", "/api/show", {"model": model})
        capabilities = shown.get("capabilities")
        info = shown.get("model_info")
        info = info if isinstance(info, dict) else {}
        modelfile, details = _string(shown, "modelfile"), shown.get("details")
        return ModelDetails(
            family=_string(details, "family") if isinstance(details, dict) else "",
            capabilities=frozenset(map(str, capabilities)) if isinstance(capabilities, list) else frozenset(),
            blob=_from_modelfile(modelfile, "FROM"),
            kv_bytes_per_token=_kv_bytes_per_token(info),
            context_length=_number(info, f"{info.get('general.architecture')}.context_length") or None,
            continues=_from_modelfile(modelfile, "RENDERER") is None and _leaves_open(_string(shown, "template")),
        )

    def running(self) -> tuple[Running, ...]:
        """The models that are resident, as Ollama sees it. Those that are loading may be missing."""
        return tuple(
            Running(
                name=_string(it, "name"),
                size_bytes=_number(it, "size"),
                digest=_string(it, "digest"),
                context_length=_number(it, "context_length") or None,
            )
            for it in _listed(self._ask("GET", "/api/ps"))
        )

    def load(
        self,
        model: str,
        *,
        options: Mapping[str, Any],
        keep_alive_s: float,
        timeout_s: float,
        interrupt: Interrupt | None = None,
    ) -> float:
        """Make ``model`` resident, or renew its lease, and return the seconds that it took.

        Raises:
            DeadlineExceeded: the load took longer than ``timeout_s`` and was broken off.
            OllamaDied: the connection was lost meanwhile.
            Interrupted: by ``interrupt``; the load was broken off.
        """
        began = time.monotonic()
        body = {"model": model, "options": dict(options), "keep_alive": keep_alive_s, "stream": False}
        with self._exchange("POST", "/api/generate", body, timeout_s, interrupt, lost=OllamaDied) as exchange:
            line = exchange.next(began + timeout_s, lambda: DeadlineExceeded("load", timeout_s))
        _check_model(line, model)
        _check_done(line, "load")
        return time.monotonic() - began

    def unload(self, model: str) -> bool:
        """Have ``model`` unloaded as soon as it is idle; it is gone when `running` no longer lists it.

        False when Ollama has no such model: if it was deleted while resident, it stays until its lease ends.
        """
        try:
            self._ask("POST", "/api/generate", {"model": model, "keep_alive": 0, "stream": False})
        except ModelMissing:
            return False
        return True

    def pull(self, model: str, *, on_progress: Callable[[str, int, int], None], interrupt: Interrupt) -> None:
        """Have Ollama fetch ``model``, telling ``on_progress`` what it does and how many bytes of how many it has.

        What was fetched before an interruption is kept, and the next pull goes on from there.

        Raises:
            DeadlineExceeded: nothing was heard for ``PULL_STALL_S``.
            ModelMissing: there is no such model to fetch.
            Interrupted: by ``interrupt``.
        """
        late = partial(DeadlineExceeded, "pull", PULL_STALL_S)
        with self._exchange("POST", "/api/pull", {"model": model}, PULL_LIMIT_S, interrupt) as exchange:
            while (line := exchange.next(time.monotonic() + PULL_STALL_S, late)).get("status") != "success":
                on_progress(_string(line, "status"), _number(line, "completed"), _number(line, "total"))

    def generate(
        self, request: Generation, *, deadlines: Deadlines, on_text: Callable[[str], None], interrupt: Interrupt
    ) -> Answer:
        """Generate an answer, handing its text to ``on_text`` piece by piece.

        Raises:
            Interrupted: by ``interrupt``, with the text so far.
            ModelError: with the text so far as ``partial``.
        """
        reply = _Reply(model=request.model, deadlines=deadlines, room_bytes=self._max_result_bytes)
        try:
            with self._exchange("POST", *_asked(request), deadlines.total_s, interrupt) as exchange:
                while not reply.finished:
                    at, stage, limit_s = reply.deadline()
                    if text := reply.add(exchange.next(at, partial(DeadlineExceeded, stage, limit_s))):
                        on_text(text)
        except ModelError as error:
            error = reply.explained(error)
            error.partial = reply.text
            raise error from None
        except Interrupted as error:
            error.pieces = tuple(reply.pieces)
            raise
        return reply.answer()

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        limit_s = self._quick_timeout_s
        with self._exchange(method, path, body, limit_s, None) as exchange:
            return exchange.next(
                time.monotonic() + limit_s, lambda: OllamaDown(f"{path}: no answer within {limit_s:g} s")
            )

    def _exchange(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        limit_s: float,
        interrupt: Interrupt | None,
        *,
        lost: type[ModelError] = OllamaDown,
    ) -> "_Exchange":
        if interrupt and interrupt.reason is not None:
            raise Interrupted(interrupt.reason)
        # The read timeout only ends a thread whose caller has somehow failed to.
        timeout_s = (min(self._connect_timeout_s, limit_s), limit_s + _CONNECTION_MARGIN_S)
        exchange = _Exchange(method, self._url + path, body, timeout_s, self._beat, lost=lost)
        if interrupt:
            interrupt.wakes(exchange.interrupt)
        return exchange


def normalise(name: str) -> str:
    """A model's name in the form in which names compare: lower case, with its tag, without what goes without saying."""
    name = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


class _Exchange:
    """One request and its answer. Leaving the ``with`` block cuts the connection, whatever has come.

    ``lost`` is the error of a connection that was made, and ended before anything came back over it.
    """

    def __init__(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None,
        timeout_s: tuple[float, float],
        beat: Callable[[], None],
        *,
        lost: type[ModelError],
    ) -> None:
        self._lost = lost
        self._request = partial(
            requests.Session.request,
            method=method,
            url=url,
            data=None if body is None else json.dumps(body, allow_nan=False),
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
            timeout=timeout_s,
            allow_redirects=False,
            stream=True,
        )
        self._peer = urlsplit(url).netloc.rpartition("@")[2]
        self._beat = beat
        self._wire = _Wire()
        self._events: SimpleQueue[dict[str, Any] | Exception] = SimpleQueue()

    def __enter__(self) -> Self:
        threading.Thread(target=self._run, name="ollama-http", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wire.cut()

    def interrupt(self, reason: str) -> None:
        """Have `next` raise Interrupted; any thread may call it."""
        self._events.put(Interrupted(reason))

    def next(self, deadline_at: float, late: Callable[[], Exception]) -> dict[str, Any]:
        """The next line of the answer; raises what ended it, or ``late()`` at ``deadline_at``."""
        while True:
            self._beat()
            left_s = deadline_at - time.monotonic()
            try:  # what has come in time counts, however late it is looked at
                event = self._events.get(timeout=max(0.0, min(left_s, BEAT_S)))
            except Empty:
                if left_s <= 0:
                    raise late() from None
                continue
            if isinstance(event, Exception):
                raise event
            return event

    def _run(self) -> None:
        begun = False
        try:
            with requests.Session() as session:
                session.trust_env = False
                session.mount("http://", self._wire)
                session.mount("https://", self._wire)
                with self._request(session) as response:
                    for line in _lines(response):
                        self._events.put(_parsed(line))
                        begun = True
            self._events.put(Incomplete("the answer ended without done: true"))
        except ModelError as error:
            self._events.put(error)
        except Exception as error:  # the caller waits for whatever happens here
            kind = Incomplete if begun else self._lost if self._wire.was_made else OllamaDown
            self._events.put(kind(f"{self._peer}: {_escaped(_root_cause(error))}"))


class _Wire(HTTPAdapter):
    """Carries one request, never twice, over a connection that any thread may cut."""

    def __init__(self) -> None:
        super().__init__(max_retries=0)
        self.was_made = False
        self._lock = threading.Lock()
        self._handle: socket.socket | None = None
        self._is_cut = False
        self._pool: Any = None

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        """The pool that the request will take its connection from."""
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        kind = _TlsConnection if pool.scheme == "https" else _Connection
        pool.ConnectionCls = partial(kind, on_connect=self._hold)
        self._pool = pool
        return pool

    def close(self) -> None:
        """Close the connection at the end of the session; urllib3 alone would leave it to the garbage collector."""
        if self._pool:
            self._pool.close()
        super().close()

    def cut(self) -> None:
        """End the connection, or keep it from being made."""
        with self._lock:
            self._is_cut = True
            handle, self._handle = self._handle, None
        if handle:
            with handle, suppress(OSError):  # it may be closed already from the other side
                handle.shutdown(socket.SHUT_RDWR)

    def _hold(self, connected: socket.socket) -> None:
        # A handle of our own: the thread that reads may close its socket at any moment.
        with self._lock:
            if self._is_cut:
                raise ConnectionAbortedError("cut before it was made")
            self._handle = socket.socket(fileno=os.dup(connected.fileno()))
        self.was_made = True


class _Connection(HTTPConnection):
    def __init__(self, *args: Any, on_connect: Callable[[socket.socket], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_connect = on_connect

    def connect(self) -> None:
        super().connect()
        self._on_connect(self.sock)


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Reply:
    """An answer as it grows, line by line."""

    def __init__(self, *, model: str, deadlines: Deadlines, room_bytes: int) -> None:
        self.finished = False
        self.pieces: list[str] = []
        self._model = model
        self._deadlines = deadlines
        self._room_bytes = room_bytes
        self._truncated = False
        self._thought = False
        self._last_line: Mapping[str, Any] = {}
        self._began = time.monotonic()
        self._first_at: float | None = None
        self._last_at = self._began

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def deadline(self) -> tuple[float, str, float]:
        """The deadline that comes next: when, of which stage, and its length in seconds."""
        limits = self._deadlines
        if self._first_at is None:
            stage, limit_s = "first_token", limits.first_token_s
        else:
            stage, limit_s = "token_gap", limits.token_gap_s
        return min((self._last_at + limit_s, stage, limit_s), (self._began + limits.total_s, "task", limits.total_s))

    def add(self, line: Mapping[str, Any]) -> str:
        """Take a line in, and return the text that it brought."""
        _check_model(line, self._model)
        message = line.get("message") or {"content": line.get("response"), "thinking": line.get("thinking")}
        if not isinstance(message, dict):
            raise Incomplete("a message of the answer is no object")
        text = self._fitting(_string(message, "content"))
        is_thought = bool(_string(message, "thinking"))
        self._thought |= is_thought
        if text or is_thought:
            self.pieces.append(text)
            self._note_progress()
        if line.get("done") is True:
            _check_done(line, "stop", "length")
            self.finished = True
            self._last_line = line
        return text

    def explained(self, error: ModelError) -> ModelError:
        """What it really was: Ollama ends an answer that repeats one token for ever, older versions without a word."""
        last = self.pieces[-REPEATS:]
        if type(error) is Incomplete and len(last) == REPEATS and last[0] and len(set(last)) == 1:
            return Repetitive(f"the same token {REPEATS} times and more, then no end")
        return error

    def answer(self) -> Answer:
        last = self._last_line
        return Answer(
            text=self.text,
            done_reason="length" if self._truncated else last.get("done_reason") or None,
            truncated=self._truncated,
            prompt_tokens=_number(last, "prompt_eval_count"),
            output_tokens=_number(last, "eval_count") or len(self.pieces),
            total_ns=_number(last, "total_duration"),
            load_ns=_number(last, "load_duration"),
            prompt_eval_ns=_number(last, "prompt_eval_duration"),
            eval_ns=_number(last, "eval_duration"),
            first_token_s=None if self._first_at is None else self._first_at - self._began,
            thought=self._thought,
            wall_s=time.monotonic() - self._began,
        )

    def _fitting(self, text: str) -> str:
        encoded = text.encode("utf-8", "replace")  # half of a character, as a model may write it, is none
        if len(encoded) > self._room_bytes:
            encoded = encoded[: self._room_bytes]
            self._truncated = self.finished = True
        self._room_bytes -= len(encoded)
        return encoded.decode(errors="ignore")

    def _note_progress(self) -> None:
        self._last_at = time.monotonic()
        if self._first_at is None:
            self._first_at = self._last_at


def _asked(request: Generation) -> tuple[str, dict[str, Any]]:
    """The path and the body that ask for an answer.

    As a rule that is a chat. But of a model that could think, a chat heeds the ``format`` only when its thoughts are
    over, which never happens where it has been told not to think; a prompt of its own heeds it from the start.
    """
    messages = request.messages or (Message(role="user", content=request.prompt or ""),)
    body: dict[str, Any] = {
        "model": request.model,
        "options": dict(request.options),
        "keep_alive": request.keep_alive_s,
        "truncate": request.truncate,
        "stream": True,
    }
    if request.think is not None:
        body["think"] = request.think
    if request.format is not None:
        body["format"] = request.format
        if request.think is not None and [message.role for message in messages] == ["user"]:
            system = {} if request.system is None else {"system": request.system}
            return "/api/generate", body | {"prompt": messages[0].content} | system
    if request.system is not None:
        messages = (Message(role="system", content=request.system), *messages)
    return "/api/chat", body | {"messages": [message.to_dict() for message in messages]}


def _lines(response: requests.Response) -> Iterator[bytes]:
    """The lines of a good answer, each as soon as it is there. A whole document is one line."""
    if response.status_code != 200:
        raise _failure(response.status_code, response.raw.read(_READ_BYTES, decode_content=False))
    if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
        raise BadRequest(f"compressed answers are refused: {_escaped(encoding)}")
    pending = b""
    while piece := response.raw.read1(_READ_BYTES, decode_content=False):
        *lines, pending = (pending + piece).split(b"\n")
        yield from lines
        if len(pending) > MAX_LINE_BYTES:
            raise Incomplete(f"a line of more than {MAX_LINE_BYTES} bytes")
    if pending:
        yield pending


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise Incomplete(f"not a JSON object, {len(line)} bytes")  # not quoted: it may be part of an answer
    if "error" in parsed:
        raise _failure(200, line)
    return parsed


# What Ollama's words mean; they vary by version, and the first that is found counts. A model that was killed while it
# loaded was too large, whatever else is said; a stalled load and a runner that broke down are alike to us.
_MEANINGS: tuple[tuple[type[ModelError], tuple[str, ...]], ...] = (
    (
        NoMemory,
        (
            "requires more system memory",
            "signal: killed",
            "out-of-memory",
            "out of memory",
            "not enough memory",
            "cannot allocate memory",
            "cannot be allocated",
            "failed to allocate",
            "unable to allocate",
            "failed to commit memory",
            "bad_alloc",
        ),
    ),
    (BadRequest, ("required for format", "parse grammar", "initialize samplers")),  # a schema that it cannot use
    (
        ModelBroken,
        (
            "invalid file magic",
            "unable to load model",
            "unknown model architecture",
            "may be incompatible",
            "unexpectedly reached end",
        ),
    ),
    (Repetitive, ("token repeat limit",)),
    (
        BadRequest,
        (
            "does not support",
            "must be of type",
            "invalid model name",
            "invalid json schema",
            "exceeds the available context size",
            "exceeds the context length",
        ),
    ),
    (ModelMissing, ("file does not exist",)),  # what a pull says of a name that nobody knows
    (OllamaBusy, ("server busy", "no slots available", "unexpected server status")),
)
_STATUSES: Mapping[int, type[ModelError]] = {404: ModelMissing, 499: OllamaBusy, 502: OllamaBusy, 503: OllamaBusy}


def _failure(status: int, body: bytes) -> ModelError:
    """The error that an HTTP status and the text with it stand for."""
    text = _error_text(body)
    if status != 200 and (status < 500 or status in _STATUSES):
        kind = _STATUSES.get(status, BadRequest)
    else:
        words = text.lower()
        kind = next((kind for kind, signs in _MEANINGS if any(sign in words for sign in signs)), RunnerDied)
    return kind(_escaped(text) if status == 200 else f"HTTP {status}: {_escaped(text)}")


def _error_text(body: bytes) -> str:
    """The words of an error; those of llama.cpp come packed in another one."""
    text = body.decode(errors="replace")
    with suppress(ValueError, RecursionError, TypeError, KeyError):
        while not isinstance(error := json.loads(text)["error"], dict):
            text = str(error)
        text = str(error["message"])
    return text


def _escaped(text: str) -> str:
    """At most 300 characters that are safe in a log line."""
    cut = text.strip()[:_MAX_ERROR_CHARS]
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut)


def _root_cause(error: BaseException) -> str:
    """What lies at the bottom of it, in the system's words, without its number."""
    is_torn = False
    while inner := error.__cause__ or error.__context__:
        is_torn |= isinstance(error, ProtocolError)
        error = inner
    if is_torn and not isinstance(error, OSError):  # the words of a parser that found no more
        return "the connection ended in the middle of the answer"
    return str(getattr(error, "strerror", None) or error)


def _check_model(line: Mapping[str, Any], model: str) -> None:
    named = _string(line, "model")
    if named and normalise(named) != normalise(model):
        raise Incomplete(f"the answer is from another model: {_escaped(named)}")


def _check_done(line: Mapping[str, Any], *reasons: str) -> None:
    reason = line.get("done_reason") or None  # very old versions give none
    if line.get("done") is not True or reason not in (None, *reasons):
        raise Incomplete(f"done is {line.get('done')!r}, done_reason is {_escaped(str(reason))}")


def _listed(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models in the answer to /api/tags or /api/ps; an old server says null for none."""
    models = document.get("models") or []
    if not isinstance(models, list):
        raise Incomplete("the list of models is no list")
    return [model for model in models if isinstance(model, dict) and _string(model, "name")]


def _from_modelfile(modelfile: str, instruction: str) -> str | None:
    """What stands behind the first ``instruction``, such as the path of the weights behind FROM."""
    lines = (line.partition(" ") for line in modelfile.splitlines())
    return next((value.strip() for name, _, value in lines if name == instruction), None)


def _leaves_open(template: str) -> bool:
    """Whether a chat template leaves a last message of the assistant without an end.

    A Go template that goes through the messages has to see to it, and does so by a condition on the last of them.
    One without messages is cut by Ollama where the answer begins. Jinja, or no template at all, is for llama.cpp, which
    leaves that message open by itself. What a renderer does that is built into Ollama cannot be seen from outside.
    """
    if "{%" in template or ".Messages" not in template:
        return True
    return _EXCEPT_LAST.search(template) is not None


def _kv_bytes_per_token(info: Mapping[str, Any]) -> int | None:
    """Keys and values, 2 bytes each, of all layers and heads."""
    prefix = f"{info.get('general.architecture')}."

    def number(key: str) -> int:
        value = info.get(prefix + key)
        return max(map(_whole, value), default=0) if isinstance(value, list) else _whole(value)

    def heads_of_all_layers() -> int:
        of_layers = info.get(kv_key := prefix + "attention.head_count_kv")
        if isinstance(of_layers, list) and of_layers:
            return sum(map(_whole, of_layers))
        # Where the layers differ, Ollama keeps the list to itself. Such models share a head among four, as a rule.
        of_one = _whole(of_layers) or (-(-heads // 4) if kv_key in info else heads)
        return number("block_count") * of_one

    heads = number("attention.head_count")
    head_dim = number("embedding_length") // heads if heads else 0
    widths = (number("attention.key_length") or head_dim) + (number("attention.value_length") or head_dim)
    return 2 * heads_of_all_layers() * widths or None


def _number(record: Mapping[str, Any], key: str) -> int:
    return _whole(record.get(key))


def _whole(value: Any) -> int:
    """A number of Ollama's: absent and senseless ones are 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        return 0
    return min(max(value, 0), _MAX_NUMBER)


def _string(record: Mapping[str, Any], key: str) -> str:
    """A text of Ollama's, always fit to be encoded; absent ones are empty."""
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Incomplete(f"{key} of the answer is no text")
    return value.encode(errors="replace").decode()
