"""`edge-llm run --embedded` as a process, as a user starts it."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.mqtt_client import MqttClient
from tests.ports import free_port
from tests.processes import marked, new_mark
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 60.0


def environment(mark: Mapping[str, str]) -> dict[str, str]:
    """Where the package is found, and a mark to find the process by."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **mark}


class Embedded:
    """`edge-llm run --embedded` as a process with a mark."""

    def __init__(self, directory: Path, *more: str, config: Path | None = None) -> None:
        self.mark = new_mark()
        self.port = free_port()
        self.csv_path = directory / "data" / "llm_metrics.csv"
        self._log = directory / "daemon.log"
        arguments = [
            "run",
            "--embedded",
            "--node",
            "n1",
            "--port",
            str(self.port),
            "--data-dir",
            str(directory / "data"),
        ]
        arguments += [*more, *(["--config", str(config)] if config else [])]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edge_daemon", *arguments], stderr=log, env=environment(self.mark)
            )

    def log(self) -> str:
        """What it has said so far."""
        return self._log.read_text(encoding="utf-8")

    def await_log(self, text: str, count: int = 1) -> None:
        """Return once it has said this so many times."""

        def said() -> bool:
            assert self.process.poll() is None, self.log()
            return self.log().count(text) >= count

        wait_until(said, TIMEOUT_S)

    def kill(self, command: str) -> None:
        """Kill the one child whose command line has this in it."""
        (pid,) = marked(self.mark, command=command)
        os.kill(pid, signal.SIGKILL)

    def ask(self, task_id: str) -> dict[str, Any]:
        """The result of a task."""
        with MqttClient("127.0.0.1", self.port) as client:
            client.subscribe("edge-llm/n1/reply/#")
            client.publish(f"edge-llm/n1/task/test/{task_id}", "What is the capital of France?")
            result: dict[str, Any] = client.wait_for_topic(f"edge-llm/n1/reply/test/{task_id}/result", TIMEOUT_S).json
            return result
