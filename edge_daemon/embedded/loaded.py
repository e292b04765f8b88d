"""One loaded model: its process, and what can be asked of llama.cpp's server in it."""

import contextlib
import http.client
import json
import os
import socket
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edge_daemon.embedded.cancellation import Cancellation
from edge_daemon.embedded.catalogue import Model
from edge_daemon.embedded.process import Child
from edge_daemon.embedded.wire import ApiError, Json, RunnerOptions

_LOAD_TIMEOUT_S = 300.0
_PING_TIMEOUT_S = 5.0
_QUICK_TIMEOUT_S = 30.0
_UNEXPECTED_EOF = "an error was encountered while running the model: unexpected EOF"
_GONE = "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error"


class LoadedModel:
    """A child process that holds one model. `start`, then `wait_until_ready`, then any number of `complete`."""

    def __init__(self, model: Model, options: RunnerOptions) -> None:
        self.model = model
        self.options = options
        self.size_bytes = 0
        self._address = ""
        self._child = Child(_command(model, options))

    def wait_until_ready(self, cancellation: Cancellation) -> None:
        """Return once the model is loaded.

        Raises:
            ApiError: 500, the load failed.
            Cancelled: the client gave up; the load is broken off.
        """
        try:
            with cancellation.stopping(self.kill):
                self._address = self._read_address()
        except BaseException:
            self.stop()
            raise
        self.size_bytes = _resident_bytes(self._child.pid)

    def _read_address(self) -> str:
        try:
            line = self._child.read_line(_LOAD_TIMEOUT_S)
        except TimeoutError as error:
            raise ApiError(500, "timed out waiting for llama-server to start") from error
        if not line:
            raise ApiError(500, f"llama-server process has terminated: {self._child.exit_text()}")
        said = json.loads(line)
        if "error" in said:
            raise ApiError(500, said["error"])
        return str(urlsplit(said["address"]).netloc)

    def answers(self) -> bool:
        """Whether the process is there and responds."""
        if not self._child.is_alive():
            return False
        try:
            with contextlib.closing(self._connect(_PING_TIMEOUT_S)) as connection:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException, ApiError):
            return False

    def kill(self) -> None:
        """End the process at once, without waiting for its end."""
        self._child.kill()

    def stop(self) -> None:
        """End the process and wait until its memory is free."""
        self._child.stop()

    def prompt_of(self, messages: list[Json]) -> str:
        """The text that the chat template makes of `messages`, up to where the answer begins."""
        return str(self._ask("/apply-template", {"messages": messages})["prompt"])

    def tokens_of(self, text: str) -> list[int]:
        """`text` as the model reads it."""
        tokens = self._ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        return [int(token) for token in tokens]

    def complete(self, request: Json, cancellation: Cancellation) -> Generator[Json]:
        """Continue a prompt; yields llama.cpp's chunks, the last one with `stop` true.

        Raises:
            ApiError: the request is refused, or the process dies.
            Cancelled: the client gave up.
        """
        with contextlib.closing(self._connect()) as connection:
            client = connection.sock
            with cancellation.stopping(lambda: _shut(client)):
                # Reports of progress make llama.cpp notice, while it reads the prompt, that we have hung up.
                body = {**request, "stream": True, "return_progress": True}
                response = self._post(connection, "/completion", body)
            while True:
                with cancellation.stopping(lambda: _shut(client)):
                    chunk = _next_chunk(response)
                yield chunk
                if chunk.get("stop"):
                    return

    def come_to_rest(self) -> None:
        """Return once nothing is computed here any more; a process that does not come to rest is killed."""
        deadline = time.monotonic() + _QUICK_TIMEOUT_S
        try:
            while self._is_computing():
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(0.01)  # llama.cpp tells when asked, not when it happens
        except (OSError, http.client.HTTPException, ApiError):
            self.kill()

    def _is_computing(self) -> bool:
        with contextlib.closing(self._connect()) as connection:
            connection.request("GET", "/slots")
            return any(slot["is_processing"] for slot in json.loads(connection.getresponse().read()))

    def _ask(self, path: str, body: Json) -> Json:
        with contextlib.closing(self._connect()) as connection:
            answer: Json = json.loads(self._post(connection, path, body).read())
            return answer

    def _connect(self, timeout_s: float = _QUICK_TIMEOUT_S) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self._address, timeout=timeout_s)
        try:
            connection.connect()
        except OSError as error:
            raise ApiError(500, _GONE) from error
        return connection

    def _post(self, connection: http.client.HTTPConnection, path: str, body: Json) -> http.client.HTTPResponse:
        connection.sock.settimeout(None)  # a long prompt takes as long as it takes; its client may hang up
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(500, _UNEXPECTED_EOF) from error
        if response.status != 200:
            raise ApiError(400 if response.status < 500 else 500, _error_text(response.read()))
        return response


def _command(model: Model, options: RunnerOptions) -> list[str]:
    command = ["edge_daemon.embedded.runner", "--model", str(model.path)]
    command += ["--num-ctx", str(options.num_ctx), "--num-batch", str(options.num_batch)]
    command += ["--threads", str(options.threads(len(os.sched_getaffinity(0))))]
    command += ["--chat-template", model.manner.chat_template] if model.manner.chat_template else []
    command += ["--mmap"] if options.use_mmap else []
    return command + ([] if options.shift else ["--no-shift"])


def _next_chunk(response: http.client.HTTPResponse) -> Json:
    """The next event of llama.cpp's stream: lines `data: {...}` among empty ones."""
    line = b""
    try:
        while not line.strip():
            line = response.readline()
            if not line:
                raise ApiError(500, _UNEXPECTED_EOF)
        name, _, content = line.partition(b":")
        chunk: Json = json.loads(content)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ApiError(500, _UNEXPECTED_EOF) from error
    if name == b"error" or "error" in chunk:
        raise ApiError(500, _error_text(content))
    return chunk


def _error_text(body: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said: Any = json.loads(body)
        error = said.get("error", said)
        return str(error["message"])
    return body.decode(errors="replace")


def _shut(client: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may be closed already
        client.shutdown(socket.SHUT_RDWR)


def _resident_bytes(pid: int) -> int:
    """The memory that process `pid` really occupies."""
    with contextlib.suppress(FileNotFoundError):  # it has died in this moment: the next request finds that out
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0
