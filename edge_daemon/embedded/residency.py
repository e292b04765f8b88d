"""Which models are loaded: one queue of loads, room made by unloading, and the timers that unload idle models."""

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

from edge_daemon.embedded.cancellation import Cancellation
from edge_daemon.embedded.catalogue import Model
from edge_daemon.embedded.loaded import LoadedModel
from edge_daemon.embedded.wire import ApiError, RunnerOptions, expiry_time

_BUSY = "server busy, please try again.  maximum pending requests exceeded"


@dataclass(eq=False)
class Resident:
    """A loaded model and who uses it. `leaving`: takes no new requests and is unloaded once idle."""

    loaded: LoadedModel
    keep_alive_s: float
    users: int = 0
    leaving: bool = False
    expires_on: float = field(init=False)  # on the monotonic clock
    expires_at: datetime = field(init=False)

    def __post_init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Start the keep-alive period anew."""
        self.expires_on = time.monotonic() + self.keep_alive_s
        self.expires_at = expiry_time(self.keep_alive_s)

    @property
    def is_due(self) -> bool:
        """Whether it is to be unloaded now."""
        return not self.users and (self.leaving or self.expires_on <= time.monotonic())

    @property
    def eviction_order(self) -> tuple[bool, float, str]:
        """Sorts first what is unloaded first: the idle, then the shortest keep-alive, then by path."""
        return (self.users > 0, self.keep_alive_s, str(self.loaded.model.path))


class Residency:
    """The loaded models; any number of threads may use it.

    Args:
        max_loaded: how many models may be loaded at a time.
        max_queue: how many requests may wait behind the one that loads.
        keep_alive_s: how long a model stays when its request does not say.
    """

    def __init__(self, *, max_loaded: int, max_queue: int, keep_alive_s: float) -> None:
        self._max_loaded = max_loaded
        self._max_queue = max_queue
        self._keep_alive_s = keep_alive_s
        self._changed = threading.Condition()
        self._residents: dict[str, Resident] = {}
        self._queue: deque[object] = deque()
        self._closed = False
        self._unloader = threading.Thread(target=self._unload_due, name="unloader", daemon=True)
        self._unloader.start()

    def list(self) -> list[Resident]:
        """The loaded models, those that expire last first; not those still loading."""
        with self._changed:
            return sorted(self._residents.values(), key=lambda it: it.expires_at, reverse=True)

    @contextlib.contextmanager
    def use(
        self, model: Model, options: RunnerOptions, keep_alive_s: float | None, cancellation: Cancellation
    ) -> Iterator[LoadedModel]:
        """`model`, loaded for as long as the block runs; waits and loads as needed.

        Raises:
            ApiError: 503, too many wait; 500, the load failed.
            Cancelled: the client gave up while it waited.
        """
        resident = self._acquire(model, options, keep_alive_s, cancellation)
        try:
            yield resident.loaded
        finally:
            self._release(resident)

    def unload(self, model: Model) -> None:
        """Have `model` unloaded as soon as it is idle; does not wait for that."""
        with self._changed:
            resident = self._residents.get(model.name)
            if resident:
                resident.keep_alive_s = 0
                resident.renew()
                self._changed.notify_all()

    def close(self) -> None:
        """Unload everything at once, whoever uses it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._unloader.join()
        for resident in self.list():
            resident.loaded.stop()

    def _acquire(
        self, model: Model, options: RunnerOptions, keep_alive_s: float | None, cancellation: Cancellation
    ) -> Resident:
        with self._changed:
            resident = self._usable(model, options)
            if resident:
                return self._take(resident, keep_alive_s)
            turn = self._join_queue()
        try:
            return self._load_in_turn(turn, model, options, keep_alive_s, cancellation)
        finally:
            with self._changed:
                self._queue.remove(turn)
                self._changed.notify_all()

    def _usable(self, model: Model, options: RunnerOptions) -> Resident | None:
        """The resident of `model` if this request can share it; one that cannot serve it any more has to leave."""
        resident = self._residents.get(model.name)
        if resident is None or resident.leaving:
            return None
        return resident if resident.loaded.options == options and resident.loaded.answers() else None

    def _take(self, resident: Resident, keep_alive_s: float | None) -> Resident:
        resident.users += 1
        if keep_alive_s is not None:
            resident.keep_alive_s = keep_alive_s
        return resident

    def _release(self, resident: Resident) -> None:
        with self._changed:
            resident.users -= 1
            if not resident.users:
                resident.renew()
            self._changed.notify_all()

    def _join_queue(self) -> object:
        if len(self._queue) > self._max_queue:  # the first in it is not waiting but loading
            raise ApiError(503, _BUSY)
        turn = object()
        self._queue.append(turn)
        return turn

    def _load_in_turn(
        self,
        turn: object,
        model: Model,
        options: RunnerOptions,
        keep_alive_s: float | None,
        cancellation: Cancellation,
    ) -> Resident:
        with cancellation.stopping(self._wake), self._changed:
            self._wait_for(lambda: self._queue[0] is turn, cancellation)
            resident = self._usable(model, options)
            if resident:  # one before us in the queue has loaded it
                return self._take(resident, keep_alive_s)
            self._wait_for(lambda: self._has_room_for(model), cancellation)
        loaded = LoadedModel(model, options)
        loaded.wait_until_ready(cancellation)
        resident = Resident(loaded, self._keep_alive_s)
        with self._changed:
            self._residents[model.name] = resident
            return self._take(resident, keep_alive_s)

    def _has_room_for(self, model: Model) -> bool:
        """Whether `model` can be loaded now; if not, one resident is made to leave."""
        outdated = self._residents.get(model.name)
        if outdated is None and len(self._residents) < self._max_loaded:
            return True
        if not any(resident.leaving for resident in self._residents.values()):
            victim = outdated or min(self._residents.values(), key=lambda it: it.eviction_order)
            victim.leaving = True
            self._changed.notify_all()
        return False

    def _wait_for(self, condition: Callable[[], bool], cancellation: Cancellation) -> None:
        while not condition():
            self._changed.wait()
            cancellation.check()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _unload_due(self) -> None:
        while True:
            with self._changed:
                due = self._wait_for_due()
            if due is None:
                return
            due.loaded.stop()
            with self._changed:
                del self._residents[due.loaded.model.name]
                self._changed.notify_all()

    def _wait_for_due(self) -> Resident | None:
        """The next model to unload, None when all is closed."""
        while not self._closed:
            for resident in self._residents.values():
                if resident.is_due:
                    resident.leaving = True
                    return resident
            expiries = [it.expires_on for it in self._residents.values() if not it.users]
            left_s = min(expiries, default=math.inf) - time.monotonic()
            self._changed.wait(max(0.0, left_s) if left_s < threading.TIMEOUT_MAX else None)
        return None
