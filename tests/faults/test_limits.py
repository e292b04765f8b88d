"""Every limit of the queue and the log is reached in a whole daemon, and has its reaction."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_daemon.config import Config
from tests import bad_input
from tests.conftest import NewMosquitto
from tests.daemon import ROOT, DaemonProcess, N, Watcher
from tests.fake_ollama import FakeModel, FakeOllama
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

Ask = Callable[..., Any]
DOCUMENT = ROOT / "docs" / "reliability.md"


class Lab:
    """A daemon with limits of its own; `ask` tells what became of a task: `queued`, or the code of its refusal."""

    def __init__(self, daemon: DaemonProcess, client: Watcher) -> None:
        self.daemon = daemon
        self.client = client
        self._count = 0

    def ask(self, src: str, prompt: str = "x", **fields: Any) -> str:
        """Send one task."""
        self._count += 1
        name = f"{N}/reply/{src}/{self._count}"
        self.client.publish(f"{N}/task/{src}/{self._count}", {"model": "slow", "prompt": prompt} | fields)
        first = self.client.wait_for(lambda m: m.topic in (f"{name}/status", f"{name}/result"))
        told: str = first.json["state"] if first.topic.endswith("/status") else first.json["error"]["code"]
        return told


@pytest.fixture
def new_lab(tmp_path: Path, new_mosquitto: NewMosquitto) -> Iterator[Callable[..., Lab]]:
    """Takes the sections of `config.yaml`; the model `slow` never ends within a test."""
    broker = new_mosquitto()
    words = [
        FakeModel("slow", size_bytes=10**6, first_token_s=60),
        FakeModel("long", size_bytes=10**6, answer="x" * 9_000),
    ]
    with FakeOllama(FakeModel("small", size_bytes=10**6), *words) as ollama, Watcher(broker) as client:
        daemons: list[DaemonProcess] = []

        def new(**settings: Any) -> Lab:
            settings["models"] = {"defaults": {"num_ctx": 1_000_000}}
            daemon = DaemonProcess(tmp_path, broker, ollama_url=ollama.url, **settings)
            daemons.append(daemon)
            daemon.start()
            return Lab(daemon, client)

        yield new
        for daemon in daemons:
            daemon.kill()


def test_places(new_lab: Callable[..., Lab]) -> None:
    """A device has its quota, all have the queue, and the last places are for urgent tasks."""
    lab = new_lab(queue={"max_tasks": 6, "urgent_reserve": 1, "per_source_tasks": 2})
    assert [lab.ask("flooder") for _ in range(4)] == ["queued", "queued", "queue_full", "queue_full"]
    assert [lab.ask("calm"), lab.ask("calm"), lab.ask("other")] == ["queued"] * 3
    assert lab.ask("late") == "queue_full"
    assert [lab.ask("late", priority="urgent"), lab.ask("later", priority="urgent")] == ["queued", "queue_full"]


def test_bytes(new_lab: Callable[..., Lab]) -> None:
    """All tasks together take no more than their bytes, of which urgent ones have a share."""
    lab = new_lab(queue={"max_tasks": 100, "urgent_reserve": 10, "max_bytes": 1 << 20})
    big = "x" * 250_000
    assert [lab.ask("a", big) for _ in range(4)] == ["queued", "queued", "queued", "queue_full"]
    assert lab.ask("a", "small") == "queued"
    assert lab.ask("b", big, priority="urgent") == "queued"
    assert lab.ask("c", "x" * 262_144) == "too_large"


def test_rate(new_lab: Callable[..., Lab]) -> None:
    """A device that sends too often is told so, and the others are served."""
    lab = new_lab(queue={"per_source_rate": 3})
    assert [lab.ask("flooder") for _ in range(5)] == ["queued"] * 3 + ["rate_limited"] * 2
    assert lab.ask("calm", model="small") == "queued"


def test_result_and_log(new_lab: Callable[..., Lab]) -> None:
    """An answer is cut at its limit; the log has no more files, and these no more bytes, than it may."""
    lab = new_lab(queue={"max_result_bytes": 1024}, csv={"rotate_bytes": 65_536, "keep": 1})
    assert lab.ask("a", model="long") == "queued"
    result = lab.client.result("a")
    assert (result["truncated"], len(result["text"])) == (True, 1024)
    for number in range(12):
        lab.client.publish(f"{N}/task/b/{number}", {"model": "small", "prompt": "y" * 20_000})
    wait_until(lambda: len(lab.client.of("b", "result")) == 12)
    assert lab.daemon.stop() == 0  # else a file may just be on its way to its new name
    files = sorted(lab.daemon.data_dir.glob("*.csv"))
    assert len(files) == 2
    assert all(file.stat().st_size <= 65_536 for file in files)


ROW = re.compile(r"^\| [^|]+ \| `(?P<key>[a-z_.]+)` \| (?P<default>[^|]+) \| (?P<reaction>[^|]+) \|$", re.MULTILINE)


def documented() -> dict[str, tuple[str, str]]:
    """Default and reaction of every limit in the table of the docs, by its key."""
    text = DOCUMENT.read_text(encoding="utf-8").partition("\n## Limits\n")[2].partition("\n## ")[0]
    return {row["key"]: (row["default"], row["reaction"]) for row in ROW.finditer(text)}


def test_limits_are_documented() -> None:
    """The table has every limit of the queue, with the default of the configuration and a code that there is."""
    limits = documented()
    unlimited = {"default_ttl_s", "retention_s"}  # times, not sizes
    assert {key.removeprefix("queue.") for key in limits if key.startswith("queue.")} == (
        set(Config().queue.__dataclass_fields__) - unlimited
    )
    for key, (default, reaction) in limits.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(Config(), section), name)
        assert default.replace(" ", "") == ("none" if value is None else str(value)), key
        assert set(re.findall(r"`(\w+_\w+)`", reaction)) <= bad_input.CODES, key
