"""One at a time, in the order of arrival."""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

from edge_daemon.embedded.cancellation import Cancellation


class Turns:
    """A lock that is handed on in the order of arrival, and whose waiting can be given up."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @contextlib.contextmanager
    def turn(self, cancellation: Cancellation) -> Iterator[None]:
        """Run the block when all that came before have ended.

        Raises:
            Cancelled: the client gave up while it waited.
        """
        mine = object()
        with self._changed:
            self._queue.append(mine)
        try:
            with cancellation.stopping(self._wake), self._changed:
                while self._queue[0] is not mine:
                    self._changed.wait()
                    cancellation.check()
            yield
        finally:
            with self._changed:
                self._queue.remove(mine)
                self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
