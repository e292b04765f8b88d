"""A client of the model server: one request at a time, streams, and what its processes are doing."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import psutil
import requests

from edge_daemon.embedded import OllamaChild
from tests.waiting import wait_until

TIMEOUT_S = 60.0
LONG_TEXT = "word " * 1500  # some seconds of reading for the model
COLD: dict[str, Any] = {"temperature": 0}


class Client:
    """Talks to one server with plain requests; every body is a JSON object."""

    def __init__(self, server: OllamaChild, data_dir: Path) -> None:
        self.server = server
        self.url = server.url
        self._data_dir = data_dir

    def get(self, path: str, **options: Any) -> requests.Response:
        """The answer to a GET."""
        return requests.get(self.url + path, timeout=TIMEOUT_S, **options)

    def post(self, path: str, **body: Any) -> requests.Response:
        """The answer to a POST of `body`."""
        return requests.post(self.url + path, json=body, timeout=TIMEOUT_S)

    def generate(self, model: str, prompt: str = "", **body: Any) -> dict[str, Any]:
        """The one object that answers /api/generate without a stream."""
        response = self.post("/api/generate", model=model, prompt=prompt, stream=False, **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def load(self, model: str, **body: Any) -> psutil.Process:
        """Load `model`; returns its process."""
        before = set(self.processes())
        assert self.generate(model, **body)["done_reason"] == "load"
        (process,) = set(self.processes()) - before
        return process

    def stream(self, path: str, **body: Any) -> "Stream":
        """A streamed answer, to be read line by line or given up."""
        return Stream(requests.post(self.url + path, json=body, stream=True, timeout=TIMEOUT_S))

    def later(self, path: str, **body: Any) -> "Future[requests.Response]":
        """The answer to a POST that is made in a thread of its own."""
        future: Future[requests.Response] = Future()

        def run() -> None:
            try:
                future.set_result(self.post(path, **body))
            except requests.RequestException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def send_only(self, path: str, **body: Any) -> socket.socket:
        """Send a POST and return its connection, the answer unread."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        content = json.dumps(body).encode()
        connection = socket.create_connection((host, int(port)), TIMEOUT_S)
        connection.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\n" % path.encode())
        connection.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(content), content))
        return connection

    def ps(self) -> dict[str, dict[str, Any]]:
        """What /api/ps lists, by name."""
        return {entry["name"]: entry for entry in self.get("/api/ps").json()["models"]}

    def unload_all(self) -> None:
        """Unload every model and wait until all are gone."""
        for name in self.ps():
            self.generate(name, keep_alive=0)
        wait_until(lambda: not self.ps())

    def processes(self) -> list[psutil.Process]:
        """The processes of the models, loaded and loading."""
        return psutil.Process(self.server.process.pid).children()

    def is_computing(self, process: psutil.Process) -> int | None:
        """The number of the task that llama.cpp in `process` works at, None if it has nothing to do."""
        (listener,) = [it for it in process.net_connections() if it.status == psutil.CONN_LISTEN]
        (slot,) = requests.get(f"http://127.0.0.1:{listener.laddr.port}/slots", timeout=TIMEOUT_S).json()
        return int(slot["id_task"]) if slot["is_processing"] else None

    def make_endless(self, alias: str) -> None:
        """From now on loading `alias` never ends: its file becomes a pipe that nobody writes to."""
        path = self.alias_path(alias)
        path.unlink()
        os.mkfifo(path)

    def alias_path(self, alias: str) -> Path:
        """The file that `alias` is loaded from."""
        return self._data_dir / "models" / f"{alias}_latest.gguf"

    def start_endless_load(self, alias: str, **body: Any) -> tuple[socket.socket, psutil.Process]:
        """Have a model that never finishes loading be loaded; returns the connection and the process."""
        before = set(self.processes())
        connection = self.send_only("/api/generate", model=alias, **body)
        wait_until(lambda: set(self.processes()) - before)
        (process,) = set(self.processes()) - before
        return connection, process


class Stream:
    """A streamed answer that has begun."""

    def __init__(self, response: requests.Response) -> None:
        self.response = response
        self._lines = response.iter_lines(chunk_size=1)

    def next(self) -> dict[str, Any]:
        """The next object."""
        answer: dict[str, Any] = json.loads(next(self._lines))
        return answer

    def rest(self) -> Iterator[dict[str, Any]]:
        """All further objects."""
        return map(json.loads, self._lines)

    def hang_up(self) -> None:
        """Close the connection, whatever is still to come."""
        self.response.close()


def answer_on(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """The status and the one object of the answer that comes on `connection`."""
    response = HTTPResponse(connection)
    response.begin()
    answer: dict[str, Any] = json.loads(response.read())
    return response.status, answer


def has_ended(process: psutil.Process) -> bool:
    """Whether a process is gone, and not only dead."""
    return not process.is_running()
