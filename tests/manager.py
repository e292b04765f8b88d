"""A systemd that listens: what the daemon tells it over its notification socket."""

import socket
import threading
import time

from tests.waiting import wait_until


class Manager:
    """What systemd is told, as it comes."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self._heard_at: dict[str, float] = {}  # when each message came last
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("")  # the kernel picks an abstract name
        self.address = "@" + self._socket.getsockname()[1:].decode()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while message := self._socket.recv(65536):
            self.heard.append(message.decode())
            self._heard_at[message.decode()] = time.monotonic()

    def close(self) -> None:
        """Hear no more."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", "\0" + self.address[1:])
        self._thread.join(10)
        self._socket.close()

    def times(self, told: str) -> int:
        """How often something that begins like this was told."""
        return sum(message.startswith(told) for message in self.heard)

    def silence_s(self, message: str) -> float:
        """For how long exactly this, which was told before, has not been told again."""
        return time.monotonic() - self._heard_at[message]

    def status(self) -> str:
        """The line that `systemctl status` shows."""
        lines = [line for message in self.heard for line in message.splitlines() if line.startswith("STATUS=")]
        return lines[-1] if lines else ""

    def wait(self, told: str, times: int) -> None:
        """Return once it was told so often."""
        wait_until(lambda: self.times(told) >= times)
