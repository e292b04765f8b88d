"""The command edge-llm: arguments, exit statuses, status of a node, and the embedded default."""

import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from edge_daemon import __version__, cli
from tests.conftest import NewMosquitto
from tests.embedded.daemon import TIMEOUT_S, Embedded, environment
from tests.embedded.needs_models import SMOLLM2, need_model
from tests.mosquitto import Mosquitto
from tests.mqtt_client import MqttClient
from tests.ports import free_port
from tests.processes import marked
from tests.waiting import wait_until

Watching = Callable[..., subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def no_system_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration but the test's own."""
    monkeypatch.setattr(cli, "SYSTEM_CONFIG", tmp_path / "none.yaml")


@pytest.fixture(autouse=True)
def own_process_as_before() -> Iterator[None]:
    """`run` sets signals and modes of its process, here ours: daemons that later tests start would inherit them."""
    signals, modes = signal.pthread_sigmask(signal.SIG_BLOCK, ()), os.umask(0o022)
    os.umask(modes)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    os.umask(modes)


def edge_llm(*arguments: str) -> tuple[int, str, str]:
    """Run the command to its end: exit status, output, errors."""
    done = subprocess.run(
        [sys.executable, "-m", "edge_daemon", *arguments],
        env=environment({}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def written(path: Path, text: str) -> Path:
    """A file with this text."""
    path.write_text(text, encoding="utf-8")
    return path


# -- arguments and configuration -------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--version says which one it is and ends with 0."""
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"edge-llm {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run", "--port", "http"],
        ["run", "--embedded", "--host", "pi1"],
        ["run", "--vers"],
        ["status", "x"],
    ],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong argument ends with 2 and a usage line."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("usage: edge-llm")


@pytest.mark.parametrize(
    "arguments", [["run", "--embeded"], ["status", "x"], ["install-service", "--x"], ["-x", "demo"]]
)
def test_an_unknown_argument_has_the_usage_of_its_command(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever mistypes an option of a command is shown those of that command."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    command = next(argument for argument in arguments if argument in ("run", "status", "install-service", "demo"))
    err = capsys.readouterr().err
    assert err.startswith(f"usage: edge-llm {command} ")
    assert "unrecognized arguments" in err


def test_check_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A right configuration, or none, is ok."""
    file = written(tmp_path / "config.yaml", "node: pi1\n")
    assert cli.main(["check-config"]) == 0
    assert cli.main(["check-config", "--config", str(file)]) == 0
    assert capsys.readouterr().out == "ok\nok\n  node: pi1\n"


def test_check_config_shows_what_is_no_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By dotted key, each on a line; never what is in a secret file."""
    secret = written(tmp_path / "password", "hush")
    text = (
        f"mqtt: {{username: pi, password_file: {secret}, reply_prefixes: []}}\nmodels: {{settings: {{small: {{}}}}}}\n"
    )
    file = written(tmp_path / "config.yaml", text)
    secret.chmod(0o600)
    assert cli.main(["check-config", "--config", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "ok",
        "  mqtt.username: pi",
        f"  mqtt.password_file: {secret}",
        "  mqtt.reply_prefixes: none",
        "  models.settings: small",
    ]


def test_the_system_config_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --config the file in /etc counts when there is one."""
    monkeypatch.setattr(cli, "SYSTEM_CONFIG", written(tmp_path / "system.yaml", "nodes: pi1\n"))
    assert cli.main(["check-config"]) == 78
    assert "nodes" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check-config", "run", "status"])
def test_a_wrong_config_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong configuration ends every command with 78 and one line that names the key."""
    file = written(tmp_path / "config.yaml", "mqtt: {prot: 1}\n")
    assert cli.main([command, "--config", str(file)]) == 78
    out, err = capsys.readouterr()
    assert out == ""
    assert "mqtt.prot" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "key"),
    [(["--port", "99999"], "mqtt.port"), (["--node", "a/b"], "node"), (["--host", ""], "mqtt.host")],
)
def test_the_command_line_is_checked_as_strictly(
    arguments: list[str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value on the command line has the limits of its key."""
    assert cli.main(["run", *arguments]) == 78
    assert key in capsys.readouterr().err


def test_a_password_without_a_user(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """check-config sees what is wrong outside of the file too."""
    monkeypatch.setenv("EDGE_LLM_MQTT_PASSWORD", "x")
    assert cli.main(["check-config"]) == 78
    assert "mqtt.username" in capsys.readouterr().err


# -- run: what keeps it from starting --------------------------------------------------------------------------------


def test_a_data_dir_in_use(tmp_path: Path) -> None:
    """A second daemon on one data directory ends with 75 and says how to give it its own."""
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, err = edge_llm("run", "--data-dir", str(tmp_path))
    assert status == 75
    assert "--data-dir" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_queue_of_a_later_version(tmp_path: Path) -> None:
    """A queue file of a later version ends it with 78 and stays as it is."""
    with sqlite3.connect(tmp_path / "queue.db") as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA user_version = 9999")
    db.close()
    before = (tmp_path / "queue.db").read_bytes()
    status, _, err = edge_llm("run", "--data-dir", str(tmp_path))
    assert status == 78
    assert "later version" in err.splitlines()[-1]
    assert (tmp_path / "queue.db").read_bytes() == before


def test_a_data_dir_that_is_none(tmp_path: Path) -> None:
    """A data directory that cannot be one ends it with 78 and names --data-dir."""
    file = written(tmp_path / "file", "")
    status, _, err = edge_llm("run", "--data-dir", str(file))
    assert status == 78
    assert str(file) in err
    assert "--data-dir" in err
    assert "Traceback" not in err


@pytest.mark.broker
def test_a_port_in_use(mosquitto: Mosquitto, tmp_path: Path) -> None:
    """A port that another program has ends the embedded default with 75 and names --port."""
    status, _, err = edge_llm("run", "--embedded", "--port", str(mosquitto.port), "--data-dir", str(tmp_path))
    assert status == 75
    assert f"port {mosquitto.port}" in err
    assert "--port" in err


def test_a_wrong_alias(tmp_path: Path) -> None:
    """What the embedded server does not take ends the run with 69 and its reason."""
    arguments = ["--embedded", "--port", str(free_port()), "--data-dir", str(tmp_path), "--alias", "nothing"]
    status, _, err = edge_llm("run", *arguments)
    assert status == 69
    assert "NAME=MODEL" in err.splitlines()[-1]


# -- status ----------------------------------------------------------------------------------------------------------

READY: dict[str, Any] = {
    "availability": "online",
    "state": {"state": "ready", "since": "2026-01-01T00:00:00Z", "reason": ""},
    "info": {"version": "1.2.3", "host": "pi", "mqtt": "5"},
    "queue": {
        "waiting": {"urgent": 1, "high": 0, "normal": 2, "low": 0},
        "running": {"id": "t1", "src": "door7", "model": "small:1b"},
        "unsent": 4,
    },
    "models": {
        "models": [{"name": "small:1b", "residency": "resident", "size_bytes": 2_000_000_000}],
        "budget_bytes": 3_000_000_000,
        "available": ["large:7b", "small:1b"],
        "default": "small:1b",
    },
}


def retained(broker: Mosquitto, node: str, topics: Mapping[str, Any]) -> None:
    """What a node has told its broker."""
    with MqttClient(broker.host, broker.port) as client:
        for name, payload in topics.items():
            client.publish(f"edge-llm/{node}/{name}", payload, retain=True)


def status_of(broker: Mosquitto, node: str, *arguments: str) -> int:
    """The exit status of `edge-llm status`."""
    return cli.main(["status", "--host", broker.host, "--port", str(broker.port), "--node", node, *arguments])


@pytest.mark.broker
def test_status_of_a_ready_node(mosquitto: Mosquitto, unique_node: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The page of a ready node has everything a person asks for, and the exit status is 0."""
    retained(mosquitto, unique_node, READY)
    assert status_of(mosquitto, unique_node) == 0
    page = capsys.readouterr().out
    for part in ("online", "ready", "1.2.3", "1 urgent, 2 normal", "door7/t1 on small:1b", "4 answers", "2,000 MB"):
        assert part in page
    assert "\n          available: large:7b, small:1b\n" in page


@pytest.mark.broker
def test_status_of_a_node_with_many_models(
    mosquitto: Mosquitto, unique_node: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """However many models there are, they take one line."""
    names = [f"model{n}:1b" for n in range(100)]
    retained(mosquitto, unique_node, READY | {"models": {"available": names}})
    assert status_of(mosquitto, unique_node) == 0
    page = capsys.readouterr().out
    assert "available: model0:1b, model1:1b, " in page
    assert "model11:1b and 88 more\n" in page


@pytest.mark.broker
@pytest.mark.parametrize(
    "change",
    [
        {"availability": "offline"},
        {"state": {"state": "degraded", "since": "x", "reason": "Ollama does not answer"}},
        {"state": "not json"},
        {"state": "[1]"},
    ],
    ids=["offline", "degraded", "not-json", "not-an-object"],
)
def test_status_of_a_node_that_is_not_ready(
    change: dict[str, Any], mosquitto: Mosquitto, unique_node: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node that is offline, degraded or incomprehensible gives a page too, and 1."""
    retained(mosquitto, unique_node, READY | change)
    assert status_of(mosquitto, unique_node) == 1
    assert unique_node in capsys.readouterr().out


@pytest.mark.broker
def test_status_of_nobody(mosquitto: Mosquitto, unique_node: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A node that nobody has heard of gives 1 and the question whether that is its name."""
    assert status_of(mosquitto, unique_node) == 1
    assert "is that its name?" in capsys.readouterr().out


@pytest.mark.broker
@pytest.mark.parametrize(
    "topics",
    [
        {
            "queue": '{"waiting": 3, "running": [], "unsent": {}}',
            "models": '{"models": 5, "budget_bytes": "much", "available": 5}',
        },
        {"models": '{"models": [{"size_bytes": 1%s}], "budget_bytes": NaN}' % ("0" * 400)},
        {"queue": '{"waiting": {"urgent": "\\u001b[2J"}}', "models": '{"models": [7, {}]}', "info": "null"},
    ],
)
def test_status_of_a_strange_node(
    topics: dict[str, Any], mosquitto: Mosquitto, unique_node: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the topics hold, the page is plain text."""
    retained(mosquitto, unique_node, READY | topics)
    assert status_of(mosquitto, unique_node) == 0
    assert capsys.readouterr().out.replace("\n", "").isprintable()


@pytest.mark.broker
def test_status_for_a_program(mosquitto: Mosquitto, unique_node: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--json gives one line with everything that the broker keeps, under the names of the topics."""
    retained(mosquitto, unique_node, READY)
    assert status_of(mosquitto, unique_node, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"topic": f"edge-llm/{unique_node}", "ready": True, **READY}


@pytest.fixture
def watching(mosquitto: Mosquitto, unique_node: str, interruptible: None) -> Iterator[Watching]:
    """Starts `edge-llm status --watch` on the test's node; ends it with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        place = ["--host", mosquitto.host, "--port", str(mosquitto.port), "--node", unique_node]
        process = subprocess.Popen(
            [sys.executable, "-m", "edge_daemon", "status", "--watch", *place, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=environment({}),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.broker
def test_watching_a_node(mosquitto: Mosquitto, unique_node: str, watching: Watching) -> None:
    """--watch tells each change, also what is told only once, until it is interrupted."""
    retained(mosquitto, unique_node, READY)
    process = watching("--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["ready"] is True
    root = f"edge-llm/{unique_node}"
    with MqttClient(mosquitto.host, mosquitto.port) as client:
        client.publish(f"{root}/telemetry", {"temperature_c": 61.2})
        assert json.loads(process.stdout.readline())["telemetry"] == {"temperature_c": 61.2}
        client.publish(f"{root}/reply/door7/evt-42/result", {"id": "evt-42", "state": "succeeded"})
        assert json.loads(process.stdout.readline())["last_results"] == [{"id": "evt-42", "state": "succeeded"}]
        client.publish(f"{root}/availability", "offline", retain=True)
        assert json.loads(process.stdout.readline())["ready"] is False
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == cli.INTERRUPTED


def test_what_has_not_changed_is_not_told_again(capsys: pytest.CaptureFixture[str]) -> None:
    """The same message twice is one page."""
    from edge_daemon import status
    from edge_daemon.config import parse
    from edge_daemon.mqtt_connection import Received

    online = Received(topic="edge-llm/n1/availability", payload=b"online", retain=True)
    script = [online, None, online, None, None]

    class Scripted:
        def get(self, timeout_s: float) -> Received | None:
            if not script:
                raise KeyboardInterrupt
            return script.pop(0)

    device: Any = Scripted()
    with pytest.raises(KeyboardInterrupt):
        status._repeat(status._Node(parse("node: n1")), device, as_json=True)
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.broker
def test_the_page_of_a_watched_node(mosquitto: Mosquitto, unique_node: str, watching: Watching) -> None:
    """Board and last tasks have lines of their own, and no control character gets through."""
    process = watching()
    assert process.stdout is not None
    assert "is that its name?" in process.stdout.readline()
    sample = {
        "cpu": {"percent": 35.5},
        "memory": {"percent": 52, "available_bytes": 1_900_000_000},
        "disk": {"free_bytes": 7_000_000_000},
        "temperature_c": 61.2,
        "throttling": {"now": ["under_voltage"]},
    }
    result = {"ts": "12:00", "src": "door7", "id": "\x1b[2J", "state": "failed", "error": {"code": "no_memory"}}
    with MqttClient(mosquitto.host, mosquitto.port) as client:
        client.publish(f"edge-llm/{unique_node}/telemetry", sample)
        client.publish(f"edge-llm/{unique_node}/reply/door7/x/result", result)
        page = ""
        while "no_memory" not in page:
            page += process.stdout.readline()
    assert (
        "processor 35.5 %; memory 52 %, 1,900 MB available; disk 7,000 MB free; 61.2 C; THROTTLED: under_voltage"
        in page
    )
    assert "12:00 door7/\\x1b[2J failed (no_memory)" in page
    assert "\x1b" not in page


def test_status_without_a_broker(capsys: pytest.CaptureFixture[str]) -> None:
    """No broker gives 1 and one line that says where none is."""
    port = free_port()
    assert cli.main(["status", "--port", str(port)]) == 1
    err = capsys.readouterr().err
    assert f"127.0.0.1:{port} does not answer" in err
    assert err.count("\n") == 1


@pytest.mark.broker
def test_status_at_a_broker_that_shuts_us_out(new_mosquitto: NewMosquitto, capsys: pytest.CaptureFixture[str]) -> None:
    """A broker that wants a password gives 1 and its own reason."""
    broker = new_mosquitto(users={"somebody": "secret"})
    assert status_of(broker, "pi1") == 1
    assert "Not authorized" in capsys.readouterr().err


# -- the embedded default --------------------------------------------------------------------------------------------


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Embedded]:
    """The embedded default, connected to its broker."""
    need_model(SMOLLM2)
    daemon = Embedded(tmp_path)
    try:
        daemon.await_log(": connected, MQTT")
        yield daemon
    finally:
        daemon.process.kill()
        daemon.process.wait()


@pytest.mark.broker
@pytest.mark.models
def test_embedded_from_start_to_end(embedded: Embedded) -> None:
    """It says how to ask, answers with an embedded model, ends with 0 on SIGTERM and leaves no process."""
    assert f"mosquitto_pub -p {embedded.port} -q 1 -t edge-llm/n1/task" in embedded.log()
    result = embedded.ask("t1")
    assert (result["state"], result["model"]) == ("succeeded", SMOLLM2)
    embedded.process.terminate()
    assert embedded.process.wait(TIMEOUT_S) == 0
    assert marked(embedded.mark) == set()


@pytest.mark.broker
@pytest.mark.models
def test_children_that_die_are_started_again(embedded: Embedded) -> None:
    """After the death of the broker and of the model server tasks are answered on the same port."""
    embedded.kill("mosquitto.conf")
    embedded.kill("embedded.ollama_server")
    embedded.await_log(": connected, MQTT", count=2)
    result = embedded.ask("t1")
    assert result["state"] == "succeeded", (result, embedded.log())
    assert "the broker has died" in embedded.log()
    assert "the model server has died" in embedded.log()


@pytest.mark.broker
@pytest.mark.models
def test_no_child_outlives_a_killed_daemon(embedded: Embedded) -> None:
    """A daemon that is killed takes its broker, model server and loaded models along."""
    embedded.ask("t1")
    embedded.process.kill()
    embedded.process.wait()
    wait_until(lambda: marked(embedded.mark) == set(), TIMEOUT_S)


@pytest.mark.parametrize(
    ("configured", "state_home", "expected"),
    [
        ("", "/var/state", "/var/state/edge-llm"),
        ("", "relative", "{home}/.local/state/edge-llm"),
        ("data_dir: /srv/llm\n", "/var/state", "/srv/llm"),
    ],
)
def test_where_embedded_data_goes(
    configured: str, state_home: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data goes where the file says, else where this user may write without any rights."""
    from edge_daemon.config import parse

    monkeypatch.setenv("XDG_STATE_HOME", state_home)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli._users_data_dir(parse(configured)) == Path(expected.format(home=tmp_path))
