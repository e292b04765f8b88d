"""Ports for servers that may be down for a while: nobody else gets them meanwhile.

The kernel gives none of them to an outgoing connection, as it does with those that one gets by binding to port 0: then
the server could not come back, or a client that looks for it could be connected to itself.
"""

import itertools
import os
import random
import socket
from pathlib import Path

HOST = "127.0.0.1"
MANY = 10_000
LEAST_ABOVE = 20_000
"""Where outgoing connections may take nearly any port."""


def _of_this_worker() -> list[int]:
    """The ports below those of outgoing connections; of several pytest workers each has its own, in some order."""
    outgoing = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
    above = max(LEAST_ABOVE, int(outgoing[0]))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = list(range(above - MANY + worker, above, workers))
    random.Random(os.getpid()).shuffle(ports)  # noqa: S311  # another run on this machine tries others first
    return ports


_PORTS = itertools.cycle(_of_this_worker())


def free_port() -> int:
    """A TCP port on loopback that nobody listens on, and that is given to nobody else soon."""
    return next(filter(_is_free, _PORTS))


def _is_free(port: int) -> bool:
    try:
        socket.create_server((HOST, port)).close()
    except OSError:
        return False
    return True
