"""The daemon as a service: what systemd is told from the start to the stop, whatever else is there or not."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import NewMosquitto
from tests.daemon import DaemonProcess, N, Watcher
from tests.fake_ollama import FakeModel, FakeOllama
from tests.manager import Manager
from tests.ports import free_port
from tests.waiting import wait_until

WORDS = " ".join(f"word{n}" for n in range(60))
CONFIG_IS_WRONG = 78


@pytest.fixture
def manager() -> Iterator[Manager]:
    """A systemd that listens."""
    made = Manager()
    yield made
    made.close()


def test_a_start_with_nobody_there(tmp_path: Path, new_mosquitto: NewMosquitto, manager: Manager) -> None:
    """Without broker and Ollama the daemon is READY all the same and says what is missing, until they are there."""
    broker = new_mosquitto()
    broker.stop()
    port = free_port()
    env = {"NOTIFY_SOCKET": manager.address}
    daemon = DaemonProcess(tmp_path, broker, ollama_url=f"http://127.0.0.1:{port}", env=env)
    daemon.start(ready=False)
    try:
        manager.wait("READY=1", 1)
        wait_until(lambda: "degraded (no broker, Ollama does not answer)" in manager.status(), timeout_s=20)
        broker.start()
        with FakeOllama(FakeModel("small", size_bytes=1_000_000), port=port), Watcher(broker) as client:
            daemon.wait_ready()
            client.publish(f"{N}/task/door/t", "x")
            assert client.result("door", "t", timeout_s=40)["state"] == "succeeded"
            wait_until(lambda: manager.status().startswith("STATUS=ready;"), timeout_s=20)
        assert manager.times("READY=1") == 1
        assert daemon.stop() == 0
    finally:
        daemon.kill()


def test_a_stop_in_mid_generation(tmp_path: Path, new_mosquitto: NewMosquitto, manager: Manager) -> None:
    """A stop says so, asks for the time that it may take, keeps what is written so far, and the next start goes on."""
    broker, env = new_mosquitto(persistence=True), {"NOTIFY_SOCKET": manager.address}
    with (
        FakeOllama(FakeModel("slow", size_bytes=1_000_000, token_s=0.05, answer=WORDS)) as ollama,
        DaemonProcess(tmp_path, broker, ollama_url=ollama.url, env=env, drain_timeout_s=0.1) as daemon,
        Watcher(broker) as client,
    ):
        client.publish(f"{N}/task/door/t", {"model": "slow", "prompt": "x", "stream": True})
        client.running("door")
        assert daemon.stop() == 0
        assert manager.times("STOPPING=1") == 1
        assert manager.times("EXTEND_TIMEOUT_USEC=") == 1
        (row,) = daemon.stored()
        assert (row.state, row.attempt) == ("queued", 0)
        daemon.start()
        result = client.result("door", "t")
        assert (result["text"], result["attempt"], result["preempted"]) == (WORDS, 1, 1)
        sent = ollama.asked("/api/chat", model="slow")[-1].body["messages"]
        assert sent[-1]["role"] == "assistant"
        assert sent[-1]["content"].startswith("word0")


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ("queue: {max_tasks: 0}", "queue.max_tasks"),
        ("data_dir: /proc/none", "data_dir"),
        ("csv: {path: /nowhere/log.csv}", "csv.path"),
        ("mqtt: {tls: {enabled: true, ca_file: /nowhere/ca.pem}}", "mqtt.tls.ca_file"),
    ],
)
def test_a_wrong_config(tmp_path: Path, new_mosquitto: NewMosquitto, config: str, key: str) -> None:
    """A config that cannot be used ends the start with 78, at which systemd does not try again, and names the key."""
    daemon = DaemonProcess(tmp_path, new_mosquitto(), ollama_url="http://127.0.0.1:9")
    if not config.startswith("data_dir"):
        config = f"data_dir: {tmp_path / 'data'}\n{config}"
    daemon.write_config(config)
    daemon.start(ready=False)
    assert daemon.wait() == CONFIG_IS_WRONG
    assert re.search(rf"^edge-llm: (\S+: (line \d+: )?)?{re.escape(key)}: ", daemon.log(), re.MULTILINE), daemon.log()
