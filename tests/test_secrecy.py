"""What must not get out: the password anywhere, prompts and answers into the journal, requests beside Ollama."""

import ast
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NewMosquitto
from tests.daemon import ROOT, DaemonProcess, N, Watcher
from tests.fake_ollama import FakeModel, FakeOllama, Fault
from tests.relay import Relay
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

PASSWORD = "open-sesame-4711"
PRIVATE = "pumpernickel"
"""Stands in every prompt and so, said back, in every answer."""
ALLOWED = {"generate", "chat", "show", "ps", "tags", "version", "embed", "pull"}
"""All of Ollama's API that is ever used, the last only when it is switched on."""


@pytest.fixture
def ollama() -> Iterator[FakeOllama]:
    """A model server: one model says back what it is told, one can be made to fail, one writes a key of its own."""
    small = FakeModel("small", size_bytes=10**6)
    broken = FakeModel("broken", size_bytes=10**6, broken_line=f'{{"message": {{"content": "{PRIVATE}"')
    keys = FakeModel("keys", size_bytes=10**6, answer=f'{{"{PRIVATE}": 1}}')
    with FakeOllama(small, broken, keys) as server:
        yield server


def credential(directory: Path, word: str) -> tuple[dict[str, str], dict[str, str]]:
    """By systemd: the environment of the daemon, and what its configuration says of it."""
    path = directory / "credentials"
    path.mkdir()
    (path / "mqtt_password").write_text(word + "\n", encoding="utf-8")
    return {"CREDENTIALS_DIRECTORY": str(path)}, {}


def file(directory: Path, word: str) -> tuple[dict[str, str], dict[str, str]]:
    """The same, by a file."""
    path = directory / "password"
    path.touch(mode=0o600)
    path.write_text(word + "\n", encoding="utf-8")
    return {}, {"password_file": str(path)}


def variable(_directory: Path, word: str) -> tuple[dict[str, str], dict[str, str]]:
    """The same, by the environment."""
    return {"EDGE_LLM_MQTT_PASSWORD": word}, {}


SOURCES: Mapping[str, Callable[[Path, str], tuple[dict[str, str], dict[str, str]]]] = {
    "credential": credential,
    "file": file,
    "variable": variable,
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_the_password_gets_out_nowhere(
    new_mosquitto: NewMosquitto, ollama: FakeOllama, tmp_path: Path, source: str, *, right: bool
) -> None:
    """Wherever it comes from, and however connections fail: the password is in no log, message, row or command line."""
    broker = new_mosquitto(users={"edge": PASSWORD if right else "another", "watcher": "w"})
    env, mqtt = SOURCES[source](tmp_path, PASSWORD)
    daemon = DaemonProcess(
        tmp_path,
        broker,
        ollama_url=ollama.url,
        env=env,
        mqtt={"username": "edge"} | mqtt,
        log={"level": "debug"},
    )
    with Watcher(broker, username="watcher", password="w") as client, ExitStack() as stack:
        stack.callback(daemon.kill)
        daemon.start(ready=right)
        if right:
            client.publish(f"{N}/task/door/1", "x")
            client.result("door", "1")
            broker.kill()
            wait_until(lambda: "refused" in daemon.log())
        else:
            wait_until(lambda: broker.log().count("not authorised") >= 2)
        arguments = Path(f"/proc/{daemon.pid}/cmdline").read_bytes()
        environment = Path(f"/proc/{daemon.pid}/environ").read_bytes()
        daemon.stop()
    words = [client.messages, daemon.log(), arguments, daemon.csv_path.read_text(), *_commands(tmp_path, env)]
    assert not [text for text in map(str, words) if PASSWORD in text]
    # Its own user and root can read the environment of a process: this is why the other two ways are advised.
    assert (PASSWORD.encode() in environment) is (source == "variable")


def test_no_start_wrong_password_is_told(tmp_path: Path) -> None:
    """Where the password cannot be used, the message names its source and not what is in it."""
    env, mqtt = file(tmp_path, "")
    config = tmp_path / "config.yaml"
    config.write_text(f"mqtt: {{username: edge, password_file: {mqtt['password_file']}}}", encoding="utf-8")
    for word, said in ((b"\n", "is empty"), (PASSWORD.encode() + b"\xff", "is not UTF-8")):
        Path(mqtt["password_file"]).write_bytes(word)
        out = "".join(_commands(tmp_path, env))
        assert f"mqtt.password_file: the password {said}" in out
        assert PASSWORD not in out


def _commands(directory: Path, env: Mapping[str, str]) -> list[str]:
    """What the commands say that a person runs with the daemon's configuration."""
    said = []
    for command in ("check-config", "status"):
        done = subprocess.run(
            [sys.executable, "-m", "edge_daemon", command, "--config", str(directory / "config.yaml")],
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        said += [done.stdout, done.stderr]
    return said


TASKS: Mapping[str, Any] = {
    "plain": PRIVATE,
    "json": {"prompt": PRIVATE, "system": PRIVATE, "meta": PRIVATE, "stream": True},
    "messages": {"messages": [{"role": "user", "content": PRIVATE}]},
    "urgent": {"prompt": PRIVATE, "priority": "urgent"},
    "schema": {"prompt": PRIVATE, "format": {"type": "object", "required": ["x"]}},
    "enum": {"prompt": f'"{PRIVATE}"', "format": {"enum": ["a"]}},
    "own key": {"prompt": PRIVATE, "model": "keys", "format": {"type": "object", "additionalProperties": False}},
    "cut json": '{"prompt": "' + PRIVATE,
    "wrong type": {"prompt": [PRIVATE]},
    "wrong role": {"messages": [{"role": PRIVATE, "content": PRIVATE}]},
    "wrong option": {"prompt": PRIVATE, "options": {"temperature": 99, "stop": PRIVATE}},
    "too large": PRIVATE * 30_000,
    "latin 1": PRIVATE.encode() + b"\xe9",
    "broken answer": {"prompt": PRIVATE, "model": "broken"},
}


@pytest.mark.parametrize("asked_for", [False, True])
def test_prompts_and_answers_stay_out_of_the_journal(
    new_mosquitto: NewMosquitto, ollama: FakeOllama, tmp_path: Path, *, asked_for: bool
) -> None:
    """Through tasks that succeed, fail and are refused, at debug level, no text is in a log line, unless asked for."""
    ollama["broken"].fault = Fault.BROKEN_LINE
    broker = new_mosquitto()
    settings: dict[str, Any] = {
        "log": {"level": "debug", "prompts": asked_for},
        "csv": {"text": "off"},
        "queue": {"max_attempts": 1},
    }
    with Watcher(broker) as client, DaemonProcess(tmp_path, broker, ollama_url=ollama.url, **settings) as daemon:
        for name, task in TASKS.items():
            client.publish(f"{N}/task/door/{name.replace(' ', '-')}", task)
        for name in TASKS:
            client.result("door", name.replace(" ", "-"), timeout_s=20)
        daemon.kill()
        daemon.start()
        assert daemon.stop() == 0
    lines = [line for line in daemon.log().splitlines() if PRIVATE in line]
    assert bool(lines) is asked_for, lines
    if not asked_for:
        assert PRIVATE not in daemon.csv_path.read_text(encoding="utf-8")


def test_files_are_not_for_everybody(new_mosquitto: NewMosquitto, ollama: FakeOllama, tmp_path: Path) -> None:
    """What the daemon writes, prompts and answers among it, others than its user and group cannot read."""
    broker = new_mosquitto()
    before = os.umask(0o022)  # a usual one; the unit sets 0027
    try:
        with Watcher(broker) as client, DaemonProcess(tmp_path, broker, ollama_url=ollama.url) as daemon:
            client.publish(f"{N}/task/door/1", "x")
            client.result("door", "1")
    finally:
        os.umask(before)
    modes = {path.name: stat.filemode(path.stat().st_mode) for path in [daemon.data_dir, *daemon.data_dir.iterdir()]}
    assert {name: mode for name, mode in modes.items() if mode[-3:] != "---"} == {}


def test_only_what_is_needed_of_ollama_is_asked(
    new_mosquitto: NewMosquitto, ollama: FakeOllama, tmp_path: Path
) -> None:
    """Over a whole run, with a proxy in the environment, Ollama is asked directly, and for nothing that changes it."""
    broker = new_mosquitto()
    with Relay(broker.port) as proxy:
        names = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        env = dict.fromkeys(names, f"http://127.0.0.1:{proxy.port}")
        daemon = DaemonProcess(tmp_path, broker, ollama_url=ollama.url, env=env, pool={"model_timeout_s": 0.5})
        with Watcher(broker) as client, daemon:
            for name, task in TASKS.items():
                client.publish(f"{N}/task/door/{name.replace(' ', '-')}", task)
            client.publish(f"{N}/task/door/missing", {"prompt": "x", "model": "evil.example/x/y"})
            client.result("door", "missing", timeout_s=20)
            client.result("door", "json", timeout_s=20)
            wait_until(lambda: not ollama.resident())
            assert daemon.stop() == 0
        assert proxy.connections == 0
    asked = {seen.path for seen in ollama.requests}
    assert asked >= {"/api/tags", "/api/ps", "/api/show", "/api/generate", "/api/chat"}
    assert asked <= {f"/api/{name}" for name in ALLOWED - {"pull"}}


def test_no_other_path_of_ollama_is_in_the_source() -> None:
    """No text of the daemon's source, whatever it is for, names another part of Ollama's API."""
    named: set[str] = set()
    for path in (ROOT / "edge_daemon").rglob("*.py"):
        if "embedded" in path.parts:
            continue  # the server's side
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named |= set(re.findall(r"/api/([a-z]+)", node.value))
                assert not re.search(r"\bblobs?/|/v1/", node.value), path
    assert named <= ALLOWED
