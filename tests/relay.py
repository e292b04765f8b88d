"""A wire between a client and a broker that a test may hold or cut."""

import socket
import threading
from contextlib import suppress
from typing import Self


class Relay:
    """Passes every connection to its `port` on to `to_port`, both on loopback.

    `hold_outgoing` and `hold_incoming` stop what the client sends and what the broker sends; what is held comes
    later, unless the connection is cut. A client that sends `cut_at` has its connection cut each time.
    """

    def __init__(self, to_port: int, *, cut_at: bytes = b"") -> None:
        self.cut_at = cut_at
        self._to_port = to_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._outgoing = threading.Event()
        self._incoming = threading.Event()
        self._sockets: list[socket.socket] = []
        self.connections = 0
        """How many came in so far."""

    def __enter__(self) -> Self:
        self.release()
        threading.Thread(target=self._serve, name="relay", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        _close(self._listener)
        self.cut()
        self.release()

    def hold_outgoing(self) -> None:
        """Let nothing through from the client to the broker."""
        self._outgoing.clear()

    def hold_incoming(self) -> None:
        """Let nothing through from the broker to the client."""
        self._incoming.clear()

    def release(self) -> None:
        """Let everything through, also what was held."""
        self._outgoing.set()
        self._incoming.set()

    def cut(self) -> None:
        """End all connections; what is held is lost."""
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            _close(sock)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                broker = socket.create_connection(("127.0.0.1", self._to_port))
            except OSError:
                return
            self.connections += 1
            self._sockets += [client, broker]
            for way in ((client, broker, self._outgoing, self.cut_at), (broker, client, self._incoming, b"")):
                threading.Thread(target=_pump, args=way, name="relay-pump", daemon=True).start()


def _pump(source: socket.socket, target: socket.socket, gate: threading.Event, cut_at: bytes) -> None:
    with suppress(OSError):
        while (data := source.recv(65536)) and not (cut_at and cut_at in data):
            gate.wait()
            target.sendall(data)
        gate.wait()
    _close(source)
    _close(target)


def _close(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
