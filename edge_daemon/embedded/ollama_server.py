"""A server that speaks Ollama's HTTP API over llama.cpp, with the models that come as packages.

    python -m edge_daemon.embedded.ollama_server --port 11434 --data-dir DIR

Says `{"url": ..., "pid": ...}` in one line on standard output once it answers.
"""

import argparse
import contextlib
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

from edge_daemon.embedded.cancellation import Cancelled, HangupWatch
from edge_daemon.embedded.catalogue import Model, check_llama_cpp, load_catalogue
from edge_daemon.embedded.completion import Completions, Shape, in_message, in_response, line, merged
from edge_daemon.embedded.errors import EmbeddedError
from edge_daemon.embedded.names import canonical_name
from edge_daemon.embedded.process import die_with_parent, on_stdin_end
from edge_daemon.embedded.residency import Residency, Resident
from edge_daemon.embedded.wire import (
    ApiError,
    CompletionRequest,
    Json,
    get,
    parse_chat,
    parse_generate,
    parse_keep_alive,
    parse_object,
)

log = logging.getLogger(__name__)

_VERSION = "0.33.0"  # the Ollama whose behaviour this server has
_MAX_BODY_BYTES = 64 << 20
_CAPABILITIES = ["completion"]
_JSON = "application/json; charset=utf-8"
_LINES = "application/x-ndjson"
_TEXT = "text/plain; charset=utf-8"


class OllamaServer(ThreadingHTTPServer):
    """The listening socket and what its handlers share."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, address: tuple[str, int], models: dict[str, Model], residency: Residency) -> None:
        self.models = models
        self.residency = residency
        self.completions = Completions(residency)
        self.hangups = HangupWatch()
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        """Where to send requests."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def server_bind(self) -> None:
        """Bind, without the look-up of a host name that the base class does."""
        socket_address = self.server_address
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(socket_address)
        self.server_address = self.socket.getsockname()

    def handle_error(self, _request: Any, client_address: Any) -> None:
        """Log what a handler did not expect; a client that has hung up is nothing to tell."""
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            log.error("request from %s failed", client_address, exc_info=error)

    def model(self, name: str) -> Model:
        """The model called `name`; ApiError 400 or 404 if there is none."""
        try:
            canonical = canonical_name(name) if name else ""
        except ValueError as error:
            raise ApiError(400, "invalid model name") from error
        if canonical not in self.models:
            raise ApiError(404, f"model '{name}' not found")
        return self.models[canonical]


class _Handler(BaseHTTPRequestHandler):
    """One connection: finds the route, answers, turns errors into Ollama's."""

    server: OllamaServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer a GET."""
        self._answer()

    def do_HEAD(self) -> None:
        """Answer a HEAD: as GET, without the body."""
        self._answer()

    def do_POST(self) -> None:
        """Answer a POST."""
        self._answer()

    def do_DELETE(self) -> None:
        """Answer a DELETE."""
        self._answer()

    do_PUT = do_PATCH = do_OPTIONS = do_DELETE  # noqa: N815 - names that the base class looks up

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the base class
        """Access logs are for those who look for them."""
        log.debug(format, *args)

    def _answer(self) -> None:
        try:
            self._body = self._read_body()
            self._route()
        except ApiError as error:
            self._send_json({"error": error.message}, error.status)
        except Cancelled:
            self.close_connection = True
            with contextlib.suppress(OSError):  # it has only hung up its own side, or else nobody reads this
                self._send_json({"error": "request canceled"}, 499)

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if self.headers.get("Transfer-Encoding") or not length.isdecimal() or int(length) > _MAX_BODY_BYTES:
            self.close_connection = True  # where the next request begins is not known
            raise ApiError(400, f"expected a Content-Length of at most {_MAX_BODY_BYTES}")
        return self.rfile.read(int(length))

    def _route(self) -> None:
        path = self.path.partition("?")[0]
        method = "GET" if self.command == "HEAD" and path in _HEAD_TOO else self.command
        if not _is_own_host(self.headers.get("Host", "")):
            self._send(403, b"", _TEXT)
        elif (method, path) in _ROUTES:
            _ROUTES[method, path](self)
        elif any(path == known for _, known in _ROUTES):
            self._send(405, b"405 method not allowed", _TEXT)
        else:
            self._send(404, b"404 page not found", _TEXT)

    def _send(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, content: Json, status: int = 200) -> None:
        self._send(status, json.dumps(content, ensure_ascii=False).encode(), _JSON)

    def _send_lines(self, objects: Iterator[Json]) -> None:
        """A stream of objects; the status waits for the first of them, a later error becomes a line."""
        first = next(objects)
        self.send_response(200)
        self.send_header("Content-Type", _LINES)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for content in chain([first], objects):
                self._write_chunk(line(content))
        except ApiError as error:
            self._write_chunk(line({"error": error.message}))
        self.wfile.write(b"0\r\n\r\n")

    def _write_chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

    def root(self) -> None:
        self._send(200, b"Ollama is running", _TEXT)

    def version(self) -> None:
        self._send_json({"version": _VERSION})

    def tags(self) -> None:
        self._send_json({"models": [_tag(model) for model in self.server.models.values()]})

    def ps(self) -> None:
        self._send_json({"models": [_running(resident) for resident in self.server.residency.list()]})

    def show(self) -> None:
        self._send_json(_shown(self._named_model()))

    def generate(self) -> None:
        self._complete(parse_generate(parse_object(self._body)), in_response)

    def chat(self) -> None:
        self._complete(parse_chat(parse_object(self._body)), in_message)

    def embed(self) -> None:
        self._named_model()
        raise ApiError(501, "this model does not support embeddings")

    def pull(self) -> None:
        body = parse_object(self._body)
        lines = _pulled(lambda: self.server.model(_name(body)))
        if get(body, "stream", default=True):
            self._send_lines(lines)
            return
        for last in lines:
            content = last
        self._send_json(content)

    def delete(self) -> None:
        self._named_model()
        raise ApiError(400, "the models of this server come as packages and cannot be deleted here")

    def _named_model(self) -> Model:
        return self.server.model(_name(parse_object(self._body)))

    def _complete(self, request: CompletionRequest, shape: Shape) -> None:
        model = self.server.model(request.model)
        if request.think:
            raise ApiError(400, f"{json.dumps(request.model)} does not support thinking")
        with (
            self.server.hangups.watching(self.connection) as cancellation,
            contextlib.closing(self.server.completions.answer(model, request, shape, cancellation)) as objects,
        ):
            if request.stream and not request.is_empty:
                self._send_lines(objects)
            else:
                self._send_json(merged(objects, shape))


_ROUTES: dict[tuple[str, str], Callable[[_Handler], None]] = {
    ("GET", "/"): _Handler.root,
    ("GET", "/api/version"): _Handler.version,
    ("GET", "/api/tags"): _Handler.tags,
    ("GET", "/api/ps"): _Handler.ps,
    ("POST", "/api/show"): _Handler.show,
    ("POST", "/api/generate"): _Handler.generate,
    ("POST", "/api/chat"): _Handler.chat,
    ("POST", "/api/embed"): _Handler.embed,
    ("POST", "/api/embeddings"): _Handler.embed,
    ("POST", "/api/pull"): _Handler.pull,
    ("DELETE", "/api/delete"): _Handler.delete,
}
_HEAD_TOO = {"/", "/api/version", "/api/tags"}


def _is_own_host(host: str) -> bool:
    """Whether a request was meant for this machine: a web page elsewhere must not reach a loopback server."""
    name = host.rsplit(":", 1)[0].strip("[]").lower()
    if not name or name in ("localhost", socket.gethostname().lower()):
        return True
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name.endswith((".localhost", ".local", ".internal"))


def _name(body: Json) -> str:
    """The model that a request is about; `name` is what old clients say."""
    name = get(body, "model", "") or get(body, "name", "")
    if not name:
        raise ApiError(400, "model is required")
    return name


def _tag(model: Model) -> Json:
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": model.modified_at.isoformat(),
        "size": model.size_bytes,
        "digest": model.digest,
        "details": model.details,
        "capabilities": _CAPABILITIES,
    }


def _running(resident: Resident) -> Json:
    model = resident.loaded.model
    return {
        "name": model.name,
        "model": model.name,
        "size": resident.loaded.size_bytes,
        "digest": model.digest,
        "details": model.details,
        "expires_at": resident.expires_at.isoformat(),
        "size_vram": 0,
        "context_length": resident.loaded.options.num_ctx,
    }


def _shown(model: Model) -> Json:
    manner = model.manner
    numbers = [f"repeat_penalty {manner.repeat_penalty}", f"temperature {manner.temperature}"]
    parameters = [*numbers, *(f"stop {json.dumps(text)}" for text in manner.stop)]
    return {
        "license": manner.license,
        "modelfile": f"FROM sha256-{model.digest}\nSYSTEM {manner.system}\n",
        "parameters": "\n".join(parameters),
        "system": manner.system,
        "template": model.template,
        "details": model.details,
        "model_info": model.info,
        "capabilities": _CAPABILITIES,
        "modified_at": model.modified_at.isoformat(),
    }


def _pulled(find: Callable[[], Model]) -> Iterator[Json]:
    """What Ollama says while it pulls: all at once for a model that is here, an error for any other."""
    yield {"status": "pulling manifest"}
    try:
        model = find()
    except ApiError as error:
        raise ApiError(500, f"pull model manifest: {error.message}: this server has only its own models") from error
    size = model.size_bytes
    yield {"status": f"pulling {model.digest[:12]}", "digest": model.digest, "total": size, "completed": size}
    yield from ({"status": status} for status in ("verifying sha256 digest", "writing manifest", "success"))


def main() -> None:
    """Serve until told to stop, or until the parent ends."""
    arguments = _parser().parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="ollama-server: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if arguments.exit_with_parent:
        die_with_parent(signal.SIGKILL)
        on_stdin_end(stop.set)
    try:
        _serve(arguments, stop)
    except (EmbeddedError, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        raise SystemExit(1) from error


def _serve(arguments: argparse.Namespace, stop: threading.Event) -> None:
    models = load_catalogue(arguments.data_dir, arguments.alias)
    check_llama_cpp()
    residency = Residency(
        max_loaded=arguments.max_loaded, max_queue=arguments.max_queue, keep_alive_s=arguments.keep_alive
    )
    with OllamaServer((arguments.host, arguments.port), models, residency) as server:
        threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
        print(json.dumps({"url": server.url, "pid": os.getpid()}), flush=True)
        stop.wait()
        residency.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge_daemon.embedded.ollama_server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--data-dir", type=Path, required=True, help="where models are put together")
    parser.add_argument("--alias", action="append", default=[], metavar="NAME=MODEL", help="one more model")
    parser.add_argument("--max-loaded", type=_positive, default=3, metavar="N")
    parser.add_argument("--max-queue", type=int, default=512, metavar="N", help="requests that may wait to load")
    parser.add_argument("--keep-alive", type=_keep_alive, default="5m", metavar="TIME", help="such as 5m, 30s, -1s")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when standard input does")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _keep_alive(text: str) -> float:
    try:
        return parse_keep_alive(text) or 0.0
    except ApiError as error:
        raise argparse.ArgumentTypeError(error.message) from error


if __name__ == "__main__":
    main()
