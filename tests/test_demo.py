"""`edge-llm demo`: what it shows, when it is content, and that it leaves no process behind."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edge_daemon import cli, demo
from edge_daemon.embedded import start_ollama
from edge_daemon.messages import Priority, compact
from edge_daemon.mqtt_connection import Received
from tests.embedded.needs_models import GEMMA3, SMOLLM2, need_model
from tests.mosquitto import Mosquitto
from tests.mqtt_client import MqttClient
from tests.ports import free_port
from tests.processes import marked, new_mark
from tests.waiting import wait_until

ROOT = Path(__file__).parent.parent
PATIENCE_S = 110.0
"""Other tests may keep the machine busy."""


class Demo:
    """One run of the demo in a directory of its own, with a mark on all its processes."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.mark = new_mark()
        self.directory = directory
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edge_daemon", "demo", *arguments],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "160", **self.mark},
            text=True,
        )

    def end(self) -> tuple[int, str]:
        """Its exit status and all that it has printed."""
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out

    def await_line(self, part: str) -> None:
        """Return once it has printed a line with this in it."""
        assert self.process.stdout is not None
        assert any(part in line for line in self.process.stdout), f"it ended without {part!r}"

    def log_rows(self) -> list[dict[str, str]]:
        """The rows of the CSV log that it keeps."""
        (path,) = self.directory.glob("demo-data/*/llm_metrics.csv")
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def run_demo(tmp_path: Path, interruptible: None) -> Iterator[Callable[..., Demo]]:
    """Start the demo; whatever is left of it at the end is killed."""
    runs: list[Demo] = []

    def start(*arguments: str) -> Demo:
        runs.append(Demo(tmp_path, *arguments))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.communicate()
        for pid in marked(run.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def models() -> None:
    """The packages that the demo needs."""
    need_model(SMOLLM2)
    need_model(GEMMA3)


@pytest.mark.models
@pytest.mark.usefixtures("models")
def test_the_demo(run_demo: Callable[..., Demo]) -> None:
    """Every task is in the table and succeeded, the log has them and a swap, and no process is left."""
    run = run_demo()
    status, out = run.end()
    assert status == 0, out
    lines = out.splitlines()
    for ask in demo.ASKS:
        assert any(line.split()[:1] == [ask.id] and " succeeded " in line for line in lines), ask.id
    assert f"{len(demo.ASKS)} of {len(demo.ASKS)} tasks succeeded." in lines
    assert any("Swaps" in line and not line.endswith(" 0.") for line in lines)
    assert "llm_metrics.csv" in lines[-1]
    rows = run.log_rows()
    assert {row["task_id"] for row in rows if row["record"] == "task"} == {ask.id for ask in demo.ASKS}
    assert {row["model_name"] for row in rows if row["record"] == "task"} == set(demo.EMBEDDED_MODELS)
    assert any(row["evicted_models"] for row in rows if row["record"] == "model")
    assert marked(run.mark) == set()


@pytest.mark.models
@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_demo(number: signal.Signals, status: int, run_demo: Callable[..., Demo]) -> None:
    """Ctrl-C, a stop and even a kill in the middle of its work leave no process behind."""
    run = run_demo()
    run.await_line("done | ")
    run.process.send_signal(number)
    got, out = run.end()
    assert got == status, out
    assert "Traceback" not in out
    wait_until(lambda: marked(run.mark) == set(), PATIENCE_S)


@pytest.mark.models
@pytest.mark.usefixtures("models")
def test_a_daemon_that_dies(run_demo: Callable[..., Demo]) -> None:
    """A daemon that ends by itself ends the demo with 1 and one line that says how it ended."""
    run = run_demo()
    run.await_line("done | ")
    (pid,) = marked(run.mark, command="--exit-with-parent\0--config")
    os.kill(pid, signal.SIGKILL)
    status, out = run.end()
    assert status == 1, out
    assert "edge-llm: the daemon ended with status -9" in out
    wait_until(lambda: marked(run.mark) == set(), PATIENCE_S)


@pytest.mark.broker
@pytest.mark.models
@pytest.mark.usefixtures("models")
def test_the_demo_on_ones_own_broker(
    run_demo: Callable[..., Demo], new_mosquitto: Callable[..., Mosquitto], tmp_path: Path
) -> None:
    """With --real the configured broker and Ollama do the work, and nothing stays on the broker."""
    broker = new_mosquitto()
    with start_ollama(tmp_path / "ollama") as ollama, socket.create_server(("127.0.0.1", 0)) as service:
        config = tmp_path / "config.json"
        http = {"enabled": True, "port": service.getsockname()[1]}  # the service has it
        config.write_text(json.dumps({"mqtt": {"port": broker.port}, "ollama": {"url": ollama.url}, "http": http}))
        run = run_demo("--real", "--config", str(config))
        status, out = run.end()
    assert status == 0, out
    assert {row["model_name"] for row in run.log_rows() if row["record"] == "task"} == {SMOLLM2, GEMMA3}
    with MqttClient(broker.host, broker.port) as client:
        client.subscribe("#")
        client.publish("the/end")
        client.wait_for_topic("the/end")
        assert [message.topic for message in client.messages] == ["the/end"]
    assert marked(run.mark) == set()


@pytest.mark.parametrize("reachable", ["neither", "ollama"])
def test_real_without_a_broker_or_ollama(
    reachable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who does not answer is named at once, before a daemon is started."""
    config = tmp_path / "config.json"
    port = free_port()
    config.write_text(json.dumps({"mqtt": {"port": port}, "ollama": {"url": f"http://127.0.0.1:{free_port()}"}}))
    if reachable == "ollama":
        monkeypatch.setattr(demo, "_smallest_models", lambda config: ["small:1b"])
    assert cli.main(["demo", "--real", "--config", str(config)]) == 1
    err = capsys.readouterr().err
    assert ("Ollama does not answer" if reachable == "neither" else f"127.0.0.1:{port} does not answer") in err
    assert err.count("\n") == 1


@pytest.mark.broker
def test_real_where_a_user_has_one_connection(
    new_mosquitto: Callable[..., Mosquitto],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A broker that ends the daemon's connection for ours is told by the setting that does it."""
    broker = new_mosquitto(users={"u": "secret"}, extra="use_username_as_clientid true")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"mqtt": {"port": broker.port, "username": "u"}}))
    monkeypatch.setenv("EDGE_LLM_MQTT_PASSWORD", "secret")
    monkeypatch.setattr(demo, "_smallest_models", lambda config: ["small:1b"])
    assert cli.main(["demo", "--real", "--config", str(config)]) == 1
    assert "use_username_as_clientid" in capsys.readouterr().err


# -- the parts -------------------------------------------------------------------------------------------------------

PLAIN, SCHEMA, COPIED = (
    next(ask for ask in demo.ASKS if ask.plain and not ask.own_topic),
    next(ask for ask in demo.ASKS if ask.schema),
    next(ask for ask in demo.ASKS if ask.own_topic),
)


def result(**fields: Any) -> dict[str, Any]:
    """The result of a task that went well, but for `fields`."""
    nothing = dict.fromkeys(("json", "error", "model_requested", "queued_s", "load_s", "run_s", "tokens_per_s"))
    return {**nothing, "state": "succeeded", "text": "yes", "model": "small:1b", **fields}


def message(topic: str, payload: Any) -> Received:
    """What a device hears."""
    return Received(topic=f"root/{topic}", payload=compact(payload).encode(), retain=False)


@pytest.fixture
def heard() -> demo._Heard:
    """All tasks have ended well, and every copy has come."""
    heard = demo._Heard("root")
    for ask in demo.ASKS:
        answer = dict.fromkeys(ask.schema["required"], 1) if ask.schema else None
        heard.take(message(f"reply/{ask.device}/{ask.id}/result", result(json=answer)))
        if ask.own_topic:
            heard.take(message(f"reply/{ask.device}/inbox-{ask.id}", "yes"))
    return heard


def test_the_tasks_are_worth_a_demo() -> None:
    """There are eight tasks and more, of several devices, on three models, plain and JSON, one of them urgent."""
    assert len(demo.ASKS) >= 8
    assert len({ask.id for ask in demo.ASKS}) == len(demo.ASKS)
    assert len({ask.device for ask in demo.ASKS}) >= 4
    assert {ask.model for ask in demo.ASKS} == {0, 1, 2}
    assert {ask.plain for ask in demo.ASKS} == {True, False}
    assert Priority.URGENT in {ask.priority for ask in demo.ASKS}


def test_all_is_well(heard: demo._Heard, capsys: pytest.CaptureFixture[str]) -> None:
    """With every result and copy there, the demo is complete and content."""
    assert heard.complete
    assert demo._report(heard)
    assert f"{len(demo.ASKS)} of {len(demo.ASKS)} tasks succeeded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ask", "change", "complaint"),
    [
        (PLAIN, {"state": "failed", "error": {"code": "ollama_down", "message": "gone"}}, "failed, ollama_down: gone"),
        (PLAIN, {"state": "expired"}, "expired"),
        (SCHEMA, {"json": None}, "not what its schema asks for"),
        (SCHEMA, {"json": {"other": 1}}, "not what its schema asks for"),
    ],
)
def test_what_is_not_well_is_told(
    ask: demo.Ask, change: dict[str, Any], complaint: str, heard: demo._Heard, capsys: pytest.CaptureFixture[str]
) -> None:
    """One task that did not succeed, or broke its schema, is named and makes the demo fail."""
    heard.take(message(f"reply/{ask.device}/{ask.id}/result", result(**change)))
    assert not demo._report(heard)
    assert f"{ask.id}: " in (problems := capsys.readouterr().out.split("\n\n")[-1])
    assert complaint in problems


def test_a_missing_copy_is_waited_for(heard: demo._Heard) -> None:
    """The demo is not complete before the copy on the device's own topic has come."""
    alone = demo._Heard("root")
    alone.results = heard.results
    assert not alone.complete
    for ask in demo.ASKS:
        if ask.own_topic:
            alone.take(message(f"reply/{ask.device}/inbox-{ask.id}", "yes"))
    assert alone.complete


def test_silence_ends_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a new answer for too long it gives up and says how many are missing."""
    heard = demo._Heard("root")
    monkeypatch.setattr(demo, "SILENCE_S", -1.0)
    with pytest.raises(TimeoutError, match=f"{len(demo.ASKS)} are missing"):
        _ = heard.complete


def test_progress() -> None:
    """The line tells what is done, waits, runs and is in memory, by what the topics say."""
    heard = demo._Heard("root")
    for ask, state in ((PLAIN, "queued"), (SCHEMA, "running"), (COPIED, "running")):
        heard.take(message(f"reply/{ask.device}/{ask.id}/status", {"state": state}))
    heard.take(message(f"reply/{COPIED.device}/{COPIED.id}/result", result()))
    heard.take(message("models", {"models": [{"name": "b"}, {"name": "a"}]}))
    assert heard.progress() == (
        f"1/{len(demo.ASKS)} done | waiting: 1 {PLAIN.priority} | running: {SCHEMA.id} | in memory: a, b"
    )


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_progress_line(
    is_terminal: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A terminal sees one line that changes; a file sees whole lines, not too many, and no control characters."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("COLUMNS", "20")
    with demo._ProgressLine() as line:
        for text in ("one", "one", "two", "a line that is too long"):
            line.show(text)
    out = capsys.readouterr().out
    if is_terminal:
        assert out == "\rone\x1b[K\rtwo\x1b[K\ra line that is t...\x1b[K\n"
    else:
        assert out == "one\n"


def test_the_table_is_as_wide_as_the_terminal(
    heard: demo._Heard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A long answer is cut, and what would disturb a terminal is spelled out."""
    monkeypatch.setenv("COLUMNS", "100")
    heard.take(message(f"reply/{PLAIN.device}/{PLAIN.id}/result", result(text="\x1b[2J" + "word\n" * 100)))
    demo._report(heard)
    out = capsys.readouterr().out
    table = out.split("\n\n")[0].splitlines()
    assert max(len(line) for line in table) == 100
    assert "\x1b" not in out
