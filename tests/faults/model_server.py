"""The stand-in for Ollama as a process of its own, to be killed, stopped and continued."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self
from urllib.request import Request, urlopen

from tests.fake_ollama import FakeModel, FakeOllama
from tests.ports import free_port

ROOT = Path(__file__).parent.parent.parent


class OllamaProcess:
    """One stand-in; its port and its models stay the same over restarts, what `configure` changed does not."""

    def __init__(self, *models: FakeModel, memory_bytes: int) -> None:
        self._port = free_port()
        self._options: Sequence[str] = (
            *("--port", str(self._port), "--memory-bytes", str(memory_bytes)),
            *(word for model in models for word in ("--model", json.dumps(asdict(model)))),
        )
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{FakeOllama.host}:{self._port}"

    def start(self) -> None:
        """Start, with no model loaded; returns once it listens."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fake_ollama", *self._options], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline(), "the stand-in did not start"

    def kill(self) -> None:
        """End it as the kernel does that is out of memory."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None, "not running"
        self._process.send_signal(number)

    def configure(self, **changes: Any) -> None:
        """Set switches of the server, or with `model` of that one."""
        urlopen(Request(f"{self.url}/fake", json.dumps(changes).encode(), method="POST"), timeout=10).close()
