"""Giving up the work for a client that has hung up, whatever that work is waiting for."""

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator


class Cancelled(Exception):
    """The client has gone: nobody wants the answer any more."""


class Cancellation:
    """Set once, from any thread, when a request is to be given up; it then stops what the request waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._stop: Callable[[], None] | None = None

    def set(self) -> None:
        """Give the request up."""
        with self._lock:
            self._is_set = True
            if self._stop:
                self._stop()

    def check(self) -> None:
        """Raise Cancelled if the request has been given up."""
        if self._is_set:
            raise Cancelled

    @contextlib.contextmanager
    def stopping(self, stop: Callable[[], None]) -> Iterator[None]:
        """While the block runs, have `set` call `stop`, which must end the block's waiting, without waiting itself.

        Raises:
            Cancelled: instead of whatever the block raises or returns, if the request has been given up.
        """
        with self._lock:
            self.check()
            self._stop = stop
        try:
            yield
        finally:
            with self._lock:
                self._stop = None
                self.check()


class HangupWatch:
    """Sees clients hang up, also while the thread that serves them is busy: one thread watches all sockets."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, Cancellation] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="hangup-watch", daemon=True).start()

    @contextlib.contextmanager
    def watching(self, client: socket.socket) -> Iterator[Cancellation]:
        """A cancellation that is set if `client` hangs up before the block ends."""
        cancellation = Cancellation()
        handle = client.fileno()
        with self._lock:
            self._watched[handle] = cancellation
        self._epoll.register(handle, select.EPOLLRDHUP | select.EPOLLONESHOT)
        try:
            yield cancellation
        finally:
            self._epoll.unregister(handle)
            with self._lock:
                del self._watched[handle]

    def _run(self) -> None:
        while True:
            for handle, _event in self._epoll.poll():
                with self._lock:
                    cancellation = self._watched.get(handle)
                    if cancellation and _has_hung_up(handle):
                        cancellation.set()


def _has_hung_up(handle: int) -> bool:
    """Asked again, because by now another connection may have the same number."""
    poll = select.poll()
    poll.register(handle, select.POLLRDHUP)
    return bool(poll.poll(0))
