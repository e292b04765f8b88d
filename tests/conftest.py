"""Fixtures that every test may use: real brokers and a name of one's own."""

import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.mosquitto import Mosquitto

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
def unique_node(request: pytest.FixtureRequest) -> str:
    """A node name from the test's own, so that tests share a broker without meeting each other."""
    test_id: str = request.node.nodeid
    readable = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name.removeprefix("test_")).strip("-")
    return f"{readable[:40]}-{zlib.crc32(test_id.encode()):08x}"
