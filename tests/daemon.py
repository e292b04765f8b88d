"""The whole daemon as a process of its own, as systemd would run it: started, killed, stopped, started again."""

import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from tests.mosquitto import Mosquitto
from tests.mqtt_client import TIMEOUT_S, MqttClient, Received
from tests.waiting import wait_until

NODE = "n"
N = f"edge-llm/{NODE}"
ROOT = Path(__file__).parent.parent
SECTIONS: dict[str, dict[str, Any]] = {
    "models": {"default": "small"},
    "telemetry": {"interval_s": 1},
}
"""What tests set otherwise than the defaults; what they give themselves is laid over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A task as the queue file has it."""

    seq: int
    src: str
    id: str
    state: str
    attempt: int
    sent: int
    prompt: str | None
    result: dict[str, Any] | None


class Listening(Protocol):
    """A broker, whichever it is."""

    host: str
    port: int


class DaemonProcess:
    """One daemon with its data directory, which stays over restarts.

    `settings` are sections and keys of `config.yaml`. With `port`, it reaches the broker there, by way of
    a `tests.relay.Relay` for example. Ending the `with` block kills it.
    """

    def __init__(
        self,
        directory: Path,
        broker: Listening,
        *,
        ollama_url: str,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.broker = broker
        self.data_dir = directory / "data"
        self._env = dict(env or {})
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        address = {"host": broker.host, "port": port or broker.port}
        outer = {"node": NODE, "data_dir": str(self.data_dir), "mqtt": address, "ollama": {"url": ollama_url}}
        self._settings = _laid_over(_laid_over(SECTIONS, outer), settings)
        self.configure()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """The process id of the running daemon."""
        assert self._process is not None, "not running"
        return self._process.pid

    def start(self, *, ready: bool = True, env: Mapping[str, str] | None = None) -> None:
        """Start, with more in its environment; with `ready` and a mosquitto, return once it has our subscriptions."""
        ready = ready and isinstance(self.broker, Mosquitto)
        before = self.subscriptions() if ready else 0
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edge_daemon", "run", "--exit-with-parent", "--config", str(self._config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path, **self._env, **(env or {})},
            )
        if ready:
            self.wait_ready(before)

    def wait_ready(self, before: int = 0) -> None:
        """Return once mosquitto has taken our subscriptions more than `before` times."""

        def subscribed() -> bool:
            assert self.is_alive(), f"the daemon has ended:\n{self.log()}"
            return self.subscriptions() > before

        wait_until(subscribed, timeout_s=60)

    def subscriptions(self) -> int:
        """How often mosquitto has taken our subscriptions."""
        return self._broker_log().count(f"Sending SUBACK to edge-llm-{NODE}\n")

    def connections(self) -> int:
        """How often mosquitto has seen us connect."""
        return self._broker_log().count(f" as edge-llm-{NODE} (")

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process is not None and self._process.poll() is None

    def configure(self, **settings: Any) -> None:
        """Write `config.yaml` as it was at first, with these settings laid over."""
        self.write_config(json.dumps(_laid_over(self._settings, settings)))

    def write_config(self, text: str) -> None:
        """Write `config.yaml` as it may be, right or wrong; a daemon that runs is not told."""
        self._config.write_text(text, encoding="utf-8")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None, "not running"
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a power cut would."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(10)

    def stop(self, timeout_s: float = 40.0) -> int:
        """Stop it in an orderly way and return its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 40.0) -> int:
        """Return its exit status once it has ended."""
        assert self._process is not None, "not running"
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the daemon did not end within {timeout_s} s:\n{self.log()}") from None

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()

    def log(self) -> str:
        """Everything that it has said since it was first started."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    @property
    def csv_path(self) -> Path:
        """The CSV log."""
        return self.data_dir / "llm_metrics.csv"

    def rows(self, record: str) -> list[dict[str, str]]:
        """The rows of one kind in the CSV log; none while it has not been begun."""
        if not self.csv_path.exists():
            return []
        with self.csv_path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if row["record"] == record]

    def stored(self) -> list[Row]:
        """The tasks in the queue file; only while the daemon does not run, since it locks the file."""
        columns = "seq, src, id, state, attempt, sent, task ->> 'prompt' AS prompt, result"
        with self._copied() as db:
            db.row_factory = sqlite3.Row
            rows = db.execute(f"SELECT {columns} FROM tasks ORDER BY seq").fetchall()  # noqa: S608
        return [Row(**dict(row) | {"result": _parsed(row["result"])}) for row in rows]

    def integrity(self) -> str:
        """What SQLite says of the queue file, as a kill or a stop has left it: `ok`, or what is wrong."""
        with self._copied() as db:
            return str(db.execute("PRAGMA integrity_check").fetchone()[0])

    @contextmanager
    def _copied(self) -> Iterator[sqlite3.Connection]:
        """A copy of the queue file: to open the file itself would tidy up what the daemon is to find."""
        assert not self.is_alive(), "the queue file is locked"
        with tempfile.TemporaryDirectory() as directory:
            for path in self.data_dir.glob("queue.db*"):
                shutil.copy(path, directory)
            with closing(sqlite3.connect(Path(directory) / "queue.db")) as db:
                yield db

    def _broker_log(self) -> str:
        assert isinstance(self.broker, Mosquitto), "only mosquitto tells"
        return self.broker.log()

    @property
    def _config(self) -> Path:
        return self._directory / "config.yaml"

    @property
    def _log(self) -> Path:
        return self._directory / "daemon.log"


class Watcher(MqttClient):
    """Hears everything of the node, and knows which messages belong to which sender."""

    def __init__(self, broker: Listening, **options: Any) -> None:
        super().__init__(broker.host, broker.port, **options)

    def __enter__(self) -> Self:
        super().__enter__()
        self.subscribe(f"{N}/#")
        self.subscribe("reply/#")
        return self

    def of(self, src: str, kind: str) -> list[Received]:
        """What went to the reply topics of `src` so far."""
        return [m for m in self.messages if m.topic.startswith(f"{N}/reply/{src}/") and m.topic.endswith(f"/{kind}")]

    def result(self, src: str, task_id: str | None = None, timeout_s: float = TIMEOUT_S) -> Any:
        """The terminal result of a task of `src`, once it is there."""
        end = f"/{task_id}/result" if task_id else "/result"
        found = self.wait_for(lambda m: m.topic.startswith(f"{N}/reply/{src}/") and m.topic.endswith(end), timeout_s)
        return found.json

    def running(self, src: str, timeout_s: float = TIMEOUT_S) -> None:
        """Return once a task of `src` has begun to run, for at least a few words."""
        self.wait_for(
            lambda m: m.topic.startswith(f"{N}/reply/{src}/") and m.topic.endswith("/stream") and b"text" in m.payload,
            timeout_s,
        )


def _parsed(text: str | None) -> Any:
    return json.loads(text) if text else None


def _laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the sections and keys of `over` in it."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _laid_over(merged[key], value) if both else value
    return merged
