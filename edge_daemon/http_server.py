"""A WSGI application on a socket: the only file that knows waitress (the extra ``http``).

One thread, ``http``, owns the sockets; each request is served in one of a fixed number of threads of waitress.
"""

import logging
import threading
import time
from contextlib import suppress
from typing import Any

from waitress import create_server, wasyncore
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask, WSGITask

from edge_daemon import preflight
from edge_daemon.messages import Failure, compact

log = logging.getLogger(__name__)

CONNECTIONS = 64
"""Open at once; further ones wait in the kernel's queue."""
SILENCE_S = 30
"""A connection on which nothing comes for so long is closed."""
MAX_HEADER_BYTES = 16_384
BEAT_S = 15.0
LAST_S = 5.0
"""How long answers under way may take at the end."""


class HttpServer(threading.Thread):
    """Listens from the beginning, so that a taken port is known before anything is begun; serves from ``start`` on.

    Args:
        app: the WSGI application.
        host: the address to listen on.
        port: the port.
        threads: requests that are served at once.
        max_body_bytes: a body of this size reaches ``app``, and somewhat more, so that ``app`` can refuse it.

    Raises:
        PortInUse: another program listens there, or the address is not ours.
    """

    def __init__(self, app: Any, *, host: str, port: int, threads: int, max_body_bytes: int) -> None:
        super().__init__(name="http", daemon=True)
        self.beats = 0
        self._app = app
        self._place = f"{host}:{port}"
        self._threads = threads
        self._max_body_bytes = max_body_bytes
        self._socket = preflight.listen(host, port)
        self._server: Any = None
        self._stopping = threading.Event()

    def run(self) -> None:
        """The thread."""
        try:
            self._serve()
        except Exception:
            # Nobody above could handle it: main sees that the thread is gone and ends the process.
            log.exception("the HTTP server failed")

    def stop(self, timeout_s: float) -> None:
        """Answer what is under way, then close everything."""
        self._stopping.set()
        if self._server is not None:
            with suppress(OSError):  # it has seen that it is to stop, and ended
                self._server.pull_trigger()
        if self.is_alive():
            self.join(timeout_s)
        self._socket.close()

    def _serve(self) -> None:
        sockets: dict[int, Any] = {}
        self._server = server = create_server(
            self._app,
            map=sockets,
            sockets=[self._socket],
            threads=self._threads,
            connection_limit=CONNECTIONS,
            channel_timeout=SILENCE_S,
            cleanup_interval=SILENCE_S // 3,
            max_request_header_size=MAX_HEADER_BYTES,
            max_request_body_size=2 * self._max_body_bytes + (1 << 16),
            clear_untrusted_proxy_headers=True,
            log_socket_errors=False,  # clients may go as they like
            ident="edge-llm",
        )
        server.channel_class = _channel(self._max_body_bytes)
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # that requests queue up is nothing to warn of
        log.info("HTTP on %s", self._place)
        while not self._stopping.is_set():
            self.beats += 1
            wasyncore.loop(BEAT_S, use_poll=True, map=sockets, count=1)
        wasyncore.dispatcher.close(server)  # the listening one alone: answers still need the server's own wake-up
        until = time.monotonic() + LAST_S
        while any(map(_is_busy, server.active_channels.values())) and time.monotonic() < until:
            wasyncore.loop(0.1, use_poll=True, map=sockets, count=1)
        server.task_dispatcher.shutdown(timeout=1)
        wasyncore.close_all(sockets)


def _is_busy(channel: Any) -> bool:
    return bool(channel.requests or channel.total_outbufs_len)


def _channel(limit_bytes: int) -> type:
    """Connections of one request each, which is refused in our own form when waitress cannot take it."""
    messages = {
        413: f"payload, the limit is {limit_bytes} bytes",
        431: f"headers, the limit is {MAX_HEADER_BYTES} bytes",
    }

    class Unreadable:
        def __init__(self, error: Any) -> None:
            self._error = error

        def to_response(self, _ident: str | None = None) -> tuple[str, list[tuple[str, str]], bytes]:
            number = self._error.code
            code = "too_large" if number in messages else "internal" if number == 500 else "bad_request"
            message = messages.get(number, str(self._error.body)[:200])
            body = compact({"error": Failure(code=code, message=message).to_dict()}).encode("utf-8", "replace") + b"\n"
            return f"{number} {self._error.reason}", [("Content-Type", "application/json")], body

    class RefusalTask(ErrorTask):  # type: ignore[misc]  # waitress has no types
        def execute(self) -> None:
            self.request.error = Unreadable(self.request.error)
            super().execute()

    class OneTask(WSGITask):  # type: ignore[misc]  # the same
        def execute(self) -> None:
            self.request.headers["CONNECTION"] = "close"  # else idle clients would hold all connections
            super().execute()

    class Channel(HTTPChannel):  # type: ignore[misc]  # the same
        task_class = OneTask
        error_task_class = RefusalTask

    return Channel
