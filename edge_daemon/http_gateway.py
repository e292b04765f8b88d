"""HTTP in and out, for those who do not speak MQTT: routes, answers, and who may come in (the extra ``http``).

What comes in goes through the same door as a message of MQTT, and is answered there too. No other file knows Flask.
"""

import hmac
import ipaddress
import logging
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from flask import Flask, Request, Response, g, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from edge_daemon.config import Config
from edge_daemon.errors import Rejected
from edge_daemon.http_server import HttpServer
from edge_daemon.journal import Kind, about
from edge_daemon.messages import Accepted, Failure, Incoming, Refused, Stored, TaskState, compact, status_seq
from edge_daemon.metrics import Metrics

log = logging.getLogger(__name__)

SRC = "http"
"""The ``src`` of all tasks while there are no tokens."""
ADDED = "Task added to queue."
"""What the prior system answered, word for word: its clients may look for it."""
MAX_WAIT_S = 60
SERVING = 4
"""Threads beside those that wait: a request that does not wait finds one free."""
STATUSES = {
    **dict.fromkeys(("unauthorized",), 401),
    **dict.fromkeys(("forbidden",), 403),
    **dict.fromkeys(("unknown_model", "unknown_task"), 404),
    **dict.fromkeys(("duplicate_conflict", "already_ended"), 409),
    **dict.fromkeys(("too_large",), 413),
    **dict.fromkeys(("unsupported_media_type",), 415),
    **dict.fromkeys(("rate_limited",), 429),
    **dict.fromkeys(("queue_full", "draining", "storage_full", "too_many_waiting"), 503),
}
"""HTTP status by code; for all others it is 400."""
PAUSES_S = {
    "internal": 10,
    "rate_limited": 60,
    "storage_full": 60,
    "draining": 30,
    "queue_full": 10,
    "too_many_waiting": 1,
}
"""What Retry-After says."""

OPEN = frozenset({"/healthz", "/readyz"})
"""Paths that need no token: they tell nothing of tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What the gateway asks of the rest of the daemon; it does not know who answers."""

    submit: Callable[[Sequence[Incoming]], list[Accepted | Refused]]
    find: Callable[[str, str], Stored | None]
    cancel: Callable[[str, str], bool]
    state: Callable[[], tuple[str, str]]
    """The state of the daemon and its reason."""
    figures: Callable[[], Mapping[str, Any]]
    """How things are, as ``Metrics`` wants it."""


class HttpGateway:
    """The HTTP side of one daemon.

    Args:
        config: for the section ``http`` and the limit of a payload.
        backend: what the daemon does for it.
        tokens: names by token; empty: everybody on this machine may come in.

    Raises:
        PortInUse: another program listens there.
    """

    def __init__(self, config: Config, backend: Backend, *, tokens: Mapping[str, str]) -> None:
        http = config.http
        self.metrics = Metrics(backend.figures, node=config.node_name)
        self._waiting = _Waiting(http.max_waiting)
        self._server = HttpServer(
            _app(_Routes(backend, self._waiting, self.metrics), _Door(tokens)),
            host=http.host,
            port=http.port,
            threads=SERVING + http.max_waiting,
            max_body_bytes=config.queue.max_payload_bytes,
        )
        self.threads = (self._server,)

    def start(self) -> None:
        """Serve from now on."""
        self._server.start()

    def ended(self, src: str, task_id: str) -> None:
        """A task has its result: those who wait for it are answered. Any thread may tell."""
        self._waiting.ended((src, task_id))

    def stop(self, timeout_s: float) -> None:
        """Answer what is under way, then close everything."""
        self._waiting.release()
        self._server.stop(timeout_s)


# -- who may come in -------------------------------------------------------------------------------------------------


class _Door:
    """Tells who asks.

    A page in a browser on this machine can send requests here, and with a name of its own that points to 127.0.0.1
    even read the answers. No page is served here, so none has any business here.
    """

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self._tokens = [(token.encode(), name) for token, name in tokens.items()]

    def src(self, request: Request) -> str:
        """The name of the sender.

        Raises:
            Rejected: ``forbidden`` or ``unauthorized``.
        """
        site = request.headers.get("Sec-Fetch-Site", "none")
        if "Origin" in request.headers or site not in ("none", "same-origin"):
            raise Rejected("forbidden", "Origin: requests of web pages are not served")
        if not self._tokens:
            if not _is_local(request.headers.get("Host", "localhost")):
                raise Rejected("forbidden", "Host: must be localhost or a loopback address")
            return SRC
        if request.path in OPEN:
            return SRC
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "replace") if scheme.lower() == "bearer" else b""
        # All are compared, so that the time taken tells nothing.
        names = [name for known, name in self._tokens if hmac.compare_digest(known, given)]
        if not names:
            raise Rejected("unauthorized", "Authorization: must be Bearer and a token of http.tokens_file")
        return names[0]


def _is_local(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


# -- routes ----------------------------------------------------------------------------------------------------------


def _app(routes: "_Routes", door: _Door) -> Flask:
    app = Flask("edge_llm", static_folder=None)

    @app.before_request
    def admit() -> None:
        if not request.method:  # waitress 2 lets a first line through that is none of HTTP's
            raise Rejected("bad_request", "the first line is not one of HTTP")
        g.src = door.src(request)

    for path, method, view in (
        ("/perform_task", "POST", routes.perform_task),
        ("/tasks/<task_id>", "GET", routes.task),
        ("/tasks/<task_id>", "DELETE", routes.cancel),
        ("/healthz", "GET", routes.health),
        ("/readyz", "GET", routes.readiness),
        ("/metrics", "GET", routes.prometheus),
    ):
        app.add_url_rule(path, f"{method} {path}", view, methods=[method], provide_automatic_options=False)
    app.register_error_handler(Rejected, lambda error: _error(Failure.of(error)))
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _internal_error)
    return app


class _Routes:
    """One method per route; ``g.src`` is who asks."""

    def __init__(self, backend: Backend, waiting: "_Waiting", metrics: Metrics) -> None:
        self._backend = backend
        self._waiting = waiting
        self._metrics = metrics

    def perform_task(self) -> Response:
        """Take a task: 200 once it is on the disk."""
        if request.mimetype != "application/json":
            raise Rejected("unsupported_media_type", "Content-Type: must be application/json")
        incoming = Incoming(payload=request.get_data(), src=g.src, content_type="application/json")
        (answer,) = self._backend.submit([incoming])
        if isinstance(answer, Refused):
            return self._refused(answer)
        return self._accepted(answer)

    def _refused(self, refused: Refused) -> Response:
        failure = refused.result.error or Failure(code="internal", message="refused without a reason")
        extra = about(Kind.TASK_REFUSED, task_id=refused.address.id, src=refused.address.src)
        log.info("refused %s/%s: %s", refused.address.src, refused.address.id, failure.unquoting, extra=extra)
        result = refused.result
        return _error(failure, id=result.id, src=result.src, state=result.state, ts=result.ts)

    def _accepted(self, accepted: Accepted) -> Response:
        status = accepted.status
        message = "Task is known already." if status.duplicate else ADDED
        result = accepted.result.to_dict() if accepted.result else None
        told = {"message": message, **status.to_dict(), "result": result, "links": _links(status.id)}
        return _json(told, Location=_links(status.id)["self"])

    def task(self, task_id: str) -> Response:
        """How a task is; with ``?wait=SECONDS``, once it has ended or that time is over."""
        wait_s = _wait_s(request.args.get("wait", "0"))
        stored = self._find(task_id)
        if wait_s and stored.result is None:
            with self._waiting.on((g.src, task_id)) as ended:
                if self._find(task_id).result is None:  # it may have ended before we listened
                    ended.wait(wait_s)
            stored = self._find(task_id)
        return _json(_task(stored))

    def cancel(self, task_id: str) -> Response:
        """End a task. A running one stops at its next token, so it may still be ``running`` in the answer."""
        self._find(task_id)
        self._backend.cancel(g.src, task_id)
        stored = self._find(task_id)
        if stored.result is not None and stored.state is not TaskState.CANCELLED:
            raise Rejected("already_ended", f"the task has {stored.state} already")
        return _json(_task(stored), 200 if stored.result else 202)

    def health(self) -> Response:
        """The process lives and serves."""
        return _json({"status": "ok"})

    def readiness(self) -> Response:
        """Whether the state is ready."""
        state, reason = self._backend.state()
        return _json({"state": state, "reason": reason}, 200 if state == "ready" else 503)

    def prometheus(self) -> Response:
        """All metrics."""
        return Response(self._metrics.text(), content_type="text/plain; version=0.0.4; charset=utf-8")

    def _find(self, task_id: str) -> Stored:
        stored = self._backend.find(g.src, task_id)
        if stored is None:
            raise Rejected("unknown_task", f"{g.src} has no task of this id, or it is no longer kept")
        return stored


def _task(stored: Stored) -> dict[str, Any]:
    task, result = stored.task, stored.result
    return {
        "id": task.id,
        "src": task.src,
        "state": stored.state,
        "seq": result.seq if result else status_seq(stored.runs, stored.state),
        "attempt": stored.attempt,
        "result": result.to_dict() if result else None,
        "links": _links(task.id),
    }


def _links(task_id: str) -> dict[str, str]:
    return {"self": f"/tasks/{task_id}", "wait": f"/tasks/{task_id}?wait={MAX_WAIT_S}"}


def _wait_s(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,3})?", text) or float(text) > MAX_WAIT_S:
        raise Rejected("invalid_field", f"wait: must be 0 to {MAX_WAIT_S} seconds")
    return float(text)


# -- answers ---------------------------------------------------------------------------------------------------------


def _json(data: Mapping[str, Any], status: int = 200, **headers: str) -> Response:
    body = compact(data).encode("utf-8", "replace") + b"\n"
    return Response(body, status, headers, content_type="application/json")


def _error(failure: Failure, status: int | None = None, **more: Any) -> Response:
    """The same error as over MQTT, with what HTTP wants beside it."""
    response = _json({**more, "error": failure.to_dict()}, status or STATUSES.get(failure.code, 400))
    if failure.code in PAUSES_S:
        response.headers["Retry-After"] = str(PAUSES_S[failure.code])
    if failure.code == "unauthorized":
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _http_error(error: HTTPException) -> Response:
    """What Flask finds wrong, such as a path that there is not."""
    code = (error.name or "bad request").lower().replace(" ", "_")
    response = _error(Failure(code=code, message=f"{request.method} {request.path[:100]}: {code}"), error.code or 400)
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return response


def _internal_error(error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return _error(Failure(code="internal", message="see the journal of edge-llm", retryable=True), 500)


# -- waiting ---------------------------------------------------------------------------------------------------------


class _Waiting:
    """The requests that wait for a task to end, ``limit`` at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()  # guards all below
        self._events: defaultdict[tuple[str, str], list[threading.Event]] = defaultdict(list)
        self._count = 0
        self._released = False

    @contextmanager
    def on(self, key: tuple[str, str]) -> Iterator[threading.Event]:
        """An event that is set when the task of this key ends.

        Raises:
            Rejected: ``too_many_waiting``.
        """
        event = threading.Event()
        with self._lock:
            if self._count >= self._limit:
                limit = f"{self._limit} requests wait already (http.max_waiting)"
                raise Rejected("too_many_waiting", limit, retryable=True)
            self._count += 1
            self._events[key].append(event)
            if self._released:
                event.set()
        try:
            yield event
        finally:
            with self._lock:
                self._count -= 1
                self._events[key].remove(event)
                if not self._events[key]:
                    del self._events[key]

    def ended(self, key: tuple[str, str]) -> None:
        """Wake those who wait for this task."""
        with self._lock:
            for event in self._events.get(key, ()):
                event.set()

    def release(self) -> None:
        """Wake everybody, and let nobody wait any more."""
        with self._lock:
            self._released = True
            for event in (event for events in self._events.values() for event in events):
                event.set()
