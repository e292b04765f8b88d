"""Fixtures that every test may use: real brokers, a name, a worker with what it works with, and some conditions."""

import gc
import os
import re
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.fake_ollama import FakeModel, FakeOllama
from tests.mosquitto import Mosquitto
from tests.rig import MB, Rig

if "CI" not in os.environ:  # there hypothesis does the same by itself, and takes the same examples each time
    settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("shared machine")

# Takes the options of `Mosquitto`.
NewMosquitto = Callable[..., Mosquitto]


@pytest.fixture(scope="session")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """One broker for all tests that only need some broker; do not stop it, use `unique_node`."""
    broker = Mosquitto(tmp_path_factory.mktemp("mosquitto"))
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def new_mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewMosquitto]:
    """Start brokers of one's own, to configure, stop, kill and start again."""
    brokers: list[Mosquitto] = []

    def new(**options: Any) -> Mosquitto:
        broker = Mosquitto(tmp_path_factory.mktemp("mosquitto"), **options)
        brokers.append(broker)
        broker.start()
        return broker

    yield new
    for broker in brokers:
        broker.kill()


@pytest.fixture
def no_collection() -> Iterator[None]:
    """For JSON that is nested to the end of the stack: what garbage of other tests had still to do would fail there."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Undo for child processes what a shell does to those in the background: there Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def unique_node(request: pytest.FixtureRequest) -> str:
    """A node name from the test's own, so that tests share a broker without meeting each other."""
    test_id: str = request.node.nodeid
    readable = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name.removeprefix("test_")).strip("-")
    return f"{readable[:40]}-{zlib.crc32(test_id.encode()):08x}"


@pytest.fixture
def fake() -> Iterator[FakeOllama]:
    """Models of 100 MB whose files are small, so that a load is not put off for long."""
    models = [FakeModel(name, size_bytes=40 * MB, ram_bytes=100 * MB) for name in "abc"]
    with FakeOllama(*models, max_loaded=9) as server:
        yield server


@pytest.fixture
def rig(tmp_path: Path, fake: FakeOllama) -> Iterator[Rig]:
    """A worker that is not started yet."""
    rig = Rig(tmp_path / "queue.db", fake)
    yield rig
    rig.stop()
