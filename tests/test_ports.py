"""The ports that tests give to their servers."""

import socket

import pytest

from tests import ports
from tests.ports import HOST, LEAST_ABOVE, MANY, free_port


def test_a_port_is_lent_once() -> None:
    """Ports are given one after the other, none of them one that the kernel gives to outgoing connections."""
    given = [free_port() for _ in range(100)]
    assert len(set(given)) == 100
    with socket.create_server((HOST, 0)) as listener, socket.create_connection(listener.getsockname()) as outgoing:
        assert max(given) < max(LEAST_ABOVE, outgoing.getsockname()[1])


def test_each_worker_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pytest workers that run side by side are given is never the same, and it is all that there is."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "3")
    shares = []
    for worker in ("gw0", "gw1", "gw2"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        shares.append(set(ports._of_this_worker()))
    assert sum(map(len, shares)) == len(set.union(*shares)) == MANY


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that somebody listens on is not given."""
    free = free_port()
    with socket.create_server((HOST, 0)) as listener:
        monkeypatch.setattr(ports, "_PORTS", iter([listener.getsockname()[1], free]))
        assert free_port() == free
