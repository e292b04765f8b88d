"""Which models are in memory. ``ModelPool.ensure`` is the only way to change that; the worker alone calls it.

Ollama is the executor, all decisions are made here: one load at a time, an explicit unload confirmed by ``/api/ps``
before the next load, and never a request to a model that is being evicted. Ollama's own scheduler thus never has to
choose, and the ways in which it can get stuck are not reached.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from edge_daemon.clock import Clock
from edge_daemon.errors import ModelError, ModelMissing, ModelTooLarge, NoMemory, NoRoom
from edge_daemon.estimates import Estimates
from edge_daemon.messages import ModelState
from edge_daemon.ollama import Interrupt, ModelDetails, Ollama, Running, normalise
from edge_daemon.scheduler import Cost, Resident

log = logging.getLogger(__name__)

MIB = 1 << 20
UNLOAD_TIMEOUT_S = 30.0
LEASE_MARGIN_S = 60.0
PINNED_LEASE_S = 3600.0
BEAT_S = 5.0
CATALOGUE_PAUSE_S = 5.0
"""Ollama is asked for its list of models at most this often, however many tasks name unknown ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """Bounds of the pool, in bytes and seconds. ``budget_bytes`` is what all models together may take."""

    budget_bytes: int
    reserve_bytes: int
    load_timeout_s: float
    idle_timeout_s: float
    max_resident: int | None = None
    allow_pull: bool = False
    """A model that Ollama does not have is fetched when a task needs it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPolicy:
    """What the configuration says of one model."""

    num_ctx: int
    pinned: bool = False

    @property
    def options(self) -> dict[str, int]:
        """The runner options: the same on every request, since another value would reload the model."""
        return {"num_ctx": self.num_ctx}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A load or an unload, as it went. ``error`` is set when it failed."""

    action: str
    model: str
    reason: str
    seconds: float
    predicted_s: float | None = None
    size_bytes: int = 0
    predicted_bytes: int = 0
    evicted: tuple[str, ...] = ()
    error: str | None = None

    @property
    def outcome(self) -> Literal["loaded", "unloaded", "load_failed", "unload_failed"]:
        """The change in one word."""
        if self.action == "load":
            return "load_failed" if self.error else "loaded"
        return "unload_failed" if self.error else "unloaded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensured:
    """A model is resident: ``load_s`` is 0 when it was before."""

    model: str = ""
    load_s: float = 0.0
    predicted_s: float = 0.0
    evicted: tuple[str, ...] = ()


class Catalogue:
    """The models that Ollama has on disk, and what they will need. Any thread may ask."""

    def __init__(
        self, ollama: Ollama, *, clock: Clock, estimates: Estimates, policy: Callable[[str], ModelPolicy]
    ) -> None:
        self._ollama = ollama
        self._clock = clock
        self._estimates = estimates
        self._policy = policy
        self._lock = threading.Lock()  # guards all below; held while Ollama is asked, so that one asks for all
        self._disk_bytes: dict[str, int] | None = None
        self._spellings: dict[str, str] = {}
        self._details: dict[str, ModelDetails] = {}
        self._asked_at = -CATALOGUE_PAUSE_S

    def refresh(self) -> None:
        """Ask Ollama anew."""
        with self._lock:
            self._refresh()

    def spelling(self, model: str) -> str:
        """The name as Ollama spells it: older versions know a model under no other."""
        name = normalise(model)
        with self._lock:
            return self._spellings.get(name, name)

    def forget(self, model: str) -> None:
        """It turned out to be missing: ask anew before it is believed to be there."""
        with self._lock:
            if self._disk_bytes is not None:
                self._disk_bytes.pop(normalise(model), None)

    def names(self) -> tuple[str, ...]:
        """Every model on disk, as far as it has been asked."""
        with self._lock:
            return tuple(sorted(self._disk_bytes or ()))

    def has(self, model: str) -> bool | None:
        """Whether Ollama has ``model``; None when it cannot be asked."""
        name = normalise(model)
        with self._lock:
            if self._disk_bytes is None or name not in self._disk_bytes:
                self._refresh_if_due()
            return None if self._disk_bytes is None else name in self._disk_bytes

    def details(self, model: str) -> ModelDetails | None:
        """What ``/api/show`` says; None when it cannot be asked."""
        name = normalise(model)
        with self._lock:
            if name not in self._details and self._disk_bytes and name in self._disk_bytes:
                try:
                    self._details[name] = self._ollama.show(self._spellings[name])
                except ModelError as error:
                    log.debug("no details of %s: %s", model, error)
            return self._details.get(name)

    def size_bytes(self, model: str) -> int:
        """Memory that ``model`` takes, or is expected to take, when it is resident."""
        measured = self._estimates.facts(normalise(model)).size_bytes
        if measured:
            return measured
        details = self.details(model)
        with self._lock:
            weights = (self._disk_bytes or {}).get(normalise(model), 0)
        cache = (details.kv_bytes_per_token or 0) * self._policy(model).num_ctx if details else 0
        # The rest is compute buffers and the runner itself; the first load puts a measurement in place of this.
        return weights + cache + weights // 10 + 64 * MIB

    def _refresh_if_due(self) -> None:
        if self._clock.monotonic() - self._asked_at >= CATALOGUE_PAUSE_S:
            try:
                self._refresh()
            except ModelError as error:
                log.debug("no list of models: %s", error)

    def _refresh(self) -> None:
        self._asked_at = self._clock.monotonic()
        tags = self._ollama.tags()
        self._disk_bytes = {normalise(tag.name): tag.size_bytes for tag in tags}
        self._spellings = {normalise(tag.name): tag.name for tag in tags}
        self._details = {name: details for name, details in self._details.items() if name in self._disk_bytes}
        for name, size in self._disk_bytes.items():
            self._estimates.set_disk_size(name, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """A resident model as we keep it between two looks at ``/api/ps``."""

    size_bytes: int
    used_at: float
    ours: bool
    context_length: int | None = None


class _Loading(threading.Thread):
    """A load on its way, in a thread of its own, so that a resident model can work meanwhile."""

    def __init__(self, model: str, load: Callable[[Interrupt], float], on_end: Callable[[], None]) -> None:
        super().__init__(name=f"load-{model}", daemon=True)
        self.model = model
        self.interrupt = Interrupt()
        self.seconds: float | None = None
        self.error: Exception | None = None
        self._load = load
        self._on_end = on_end

    @property
    def ended(self) -> bool:
        """Whether it is known how the load went."""
        return self.seconds is not None or self.error is not None

    def run(self) -> None:
        try:
            self.seconds = self._load(self.interrupt)
        except Exception as error:  # raised again where the load is settled
            self.error = error
        self._on_end()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What a load was started with, to be reported when it ends."""

    thread: _Loading
    reason: str
    evicted: tuple[str, ...]
    predicted_s: float
    predicted_bytes: int
    free_before: int
    began_at: float


class ModelPool:
    """The single writer to Ollama's memory.

    Args:
        ollama: the client.
        limits: the budget and the deadlines.
        policy: what the configuration says of a model, by name.
        catalogue: sizes of models that are not resident.
        estimates: learns from every load.
        available_bytes: memory that could be used now without swapping.
        on_change: told of every load and unload; must not raise.
        on_loaded: told when a load that was started has ended either way, from its own thread.
        on_pull: told how a model is being fetched: its name, what is done, bytes so far, bytes in all.
        beat: called by a thread that waits here, at least every 5 s.
    """

    def __init__(
        self,
        ollama: Ollama,
        *,
        limits: PoolLimits,
        policy: Callable[[str], ModelPolicy],
        catalogue: Catalogue,
        estimates: Estimates,
        clock: Clock,
        available_bytes: Callable[[], int],
        on_change: Callable[[Change], None],
        on_loaded: Callable[[], None] = lambda: None,
        on_pull: Callable[[str, str, int, int], None] = lambda *_: None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.limits = limits
        self.catalogue = catalogue
        self._ollama = ollama
        self._policy = policy
        self._estimates = estimates
        self._clock = clock
        self._available_bytes = available_bytes
        self._on_change = on_change
        self._on_loaded = on_loaded
        self._on_pull = on_pull
        self._beat = beat
        self._models: dict[str, _Loaded] = {}
        self._before: dict[str, _Loaded] = {}  # what was resident when Ollama was last heard of
        self._order: _Order | None = None
        self._pause = threading.Event()  # never set: a pause that does not depend on the clock handed in
        self.states: tuple[ModelState, ...] = ()
        """What is resident, replaced whole at every change: any thread may read it."""

    # -- looking

    def refresh(self) -> None:
        """Believe ``/api/ps``: models may have been loaded, evicted or killed behind our back.

        Raises:
            OllamaDown: it cannot be asked; what was resident is unknown and forgotten.
        """
        try:
            listed = {normalise(running.name): running for running in self._ollama.running()}
            listed.pop(self.loading or "", None)  # older versions list it before it is there
        except ModelError:
            self._before, self._models = self._before | self._models, {}
            self._publish()
            raise
        now = self._clock.monotonic()
        for name in set(self._models) - set(listed):
            log.info("%s is no longer resident: Ollama or another client unloaded it", name)
        self._models = {name: self._seen(name, running, now) for name, running in listed.items()}
        self._before = {}
        self._publish()

    def _seen(self, name: str, running: Running, now: float) -> _Loaded:
        # A pinned model is kept whoever loaded it, such as we ourselves before a restart.
        new = _Loaded(size_bytes=0, used_at=now, ours=self._policy(name).pinned)
        known = self._models.get(name) or self._before.get(name) or new
        size = running.size_bytes or self.catalogue.size_bytes(name)
        return replace(known, size_bytes=size, context_length=running.context_length)

    def resident(self) -> tuple[Resident, ...]:
        """The resident models, for the scheduler."""
        now = self._clock.monotonic()
        residents = [
            Resident(
                model=name,
                size_bytes=loaded.size_bytes,
                idle_s=now - loaded.used_at,
                pinned=self._policy(name).pinned,
            )
            for name, loaded in list(self._models.items())
        ]
        if order := self._order:
            # Its memory is spoken for, and nothing may push it out before it has been of use.
            arriving = Resident(model=order.thread.model, size_bytes=order.predicted_bytes, idle_s=0.0, pinned=True)
            residents.append(arriving)
        return tuple(residents)

    @property
    def awaited(self) -> str | None:
        """The model of a load that has not come to a good end: no task can be given to it yet."""
        order = self._order
        return None if order is None or order.thread.seconds is not None else order.thread.model

    @property
    def loading(self) -> str | None:
        """The model of a load that is on its way."""
        return self._order.thread.model if self._order else None

    def cost(self, model: str) -> Cost:
        """What it would take to have and to use ``model``, for the scheduler."""
        name = normalise(model)
        size = self._models[name].size_bytes if name in self._models else self.catalogue.size_bytes(name)
        return Cost(load_s=self._estimates.load_s(name), size_bytes=size, run_s=self._estimates.mean_run_s(name))

    def room_bytes(self) -> int:
        """What resident models may take in all, now: the budget, less when others use the board's memory."""
        return min(self.limits.budget_bytes, self._used_bytes() + self._available_bytes() - self.limits.reserve_bytes)

    def _used_bytes(self) -> int:
        return sum(loaded.size_bytes for loaded in list(self._models.values()))

    def is_missing(self, model: str) -> bool:
        """Whether Ollama is known not to have ``model``, and may not fetch it."""
        return not self.limits.allow_pull and self.catalogue.has(model) is False

    def check(self, model: str) -> None:
        """Raises ModelMissing or ModelTooLarge for a model that can never run here. Any thread may ask."""
        if self.is_missing(model):
            raise ModelMissing(f"Ollama has no model {model}")
        size = self.catalogue.size_bytes(model)
        if size > self.limits.budget_bytes:
            need, have = size // MIB, self.limits.budget_bytes // MIB
            raise ModelTooLarge(f"{model} needs about {need} MiB, the memory budget is {have} MiB")

    def evictable(self) -> tuple[str, ...]:
        """Every resident model that is not pinned, whoever loaded it."""
        return tuple(name for name in self._models if not self._policy(name).pinned)

    # -- changing

    def ensure(self, model: str, *, evict: Iterable[str] = (), reason: str) -> Ensured:
        """Make ``model`` resident, after unloading ``evict``. Does nothing when it is resident.

        Raises:
            NoRoom: it would break the budget; nothing was loaded.
            ModelError: the load failed.
            Interrupted: by ``interrupt_load``.
        """
        name = normalise(model)
        if self.loading not in (None, name):
            self.settle(wait=True)
        if self.loading is None:
            if name in self._models:
                return Ensured()
            self.start_loading(name, evict=evict, reason=reason)
        return self.settle(wait=True) or Ensured()

    def start_loading(self, model: str, *, evict: Iterable[str] = (), reason: str) -> None:
        """Begin to load ``model`` after unloading ``evict``; ``settle`` ends it. One load at a time.

        Raises:
            NoRoom: it would break the budget; nothing was loaded.
            ModelError: it cannot be loaded here, or an unload failed.
        """
        name = normalise(model)
        self.check(name)
        gone = tuple(victim for victim in map(normalise, evict) if self.unload(victim, reason=f"room for {name}"))
        need = self._admitted(name)
        thread = _Loading(name, lambda interrupt: self._load(name, interrupt), self._on_loaded)
        self._order = _Order(
            thread=thread,
            reason=reason,
            evicted=gone,
            predicted_s=self._estimates.load_s(name),
            predicted_bytes=need,
            free_before=self._available_bytes(),
            began_at=self._clock.monotonic(),
        )
        self._publish()
        thread.start()

    def _admitted(self, name: str) -> int:
        """The bytes that ``name`` needs; raises NoRoom when they are not there."""
        if self.catalogue.has(name) is None:
            self.catalogue.refresh()  # nobody knows what the load would take, and it may be there by now
        need, room = self.catalogue.size_bytes(name), self.room_bytes() - self._used_bytes()
        if need > room:
            raise NoRoom(f"{name} needs about {need // MIB} MiB, {max(0, room) // MIB} MiB are free for it")
        return need

    def _load(self, name: str, interrupt: Interrupt) -> float:
        if self.limits.allow_pull and self.catalogue.has(name) is False:
            self._pull(name, interrupt)
        return self._ollama.load(
            self.catalogue.spelling(name),
            options=self._policy(name).options,
            keep_alive_s=self.lease_s(name),
            timeout_s=self.limits.load_timeout_s,
            interrupt=interrupt,
        )

    def _pull(self, name: str, interrupt: Interrupt) -> None:
        """Fetch a model, then judge it anew: its size is known only now."""
        log.info("fetching %s", name)
        self._ollama.pull(name, on_progress=lambda *progress: self._on_pull(name, *progress), interrupt=interrupt)
        self.catalogue.refresh()
        self.check(name)
        self._admitted(name)

    def interrupt_load(self, reason: str) -> None:
        """Break off the load that is on its way, if there is one. Any thread may ask."""
        if order := self._order:
            order.thread.interrupt.set(reason)

    def settle(self, *, wait: bool = False) -> Ensured | None:
        """Take note of a load that has ended; None when there is none, or it still goes on and we do not wait.

        Raises:
            ModelError: the load failed.
            Interrupted: it was broken off.
        """
        order = self._order
        if order is None or not (wait or order.thread.ended):
            return None
        while order.thread.is_alive():
            order.thread.join(BEAT_S)
            self._beat()
        self._order = None
        if order.thread.error is not None:
            self._settle_failure(order, order.thread.error)
        return self._settle_success(order, order.thread.seconds or 0.0)

    def _settle_failure(self, order: _Order, error: Exception) -> None:
        if isinstance(error, NoMemory) and not isinstance(error, NoRoom):
            self._estimates.killed(order.thread.model, order.predicted_bytes, at_most=self.limits.budget_bytes)
        self._publish()
        self._report(order, self._clock.monotonic() - order.began_at, error=_named(error))
        raise error

    def _settle_success(self, order: _Order, seconds: float) -> Ensured:
        name = order.thread.model
        drop = order.free_before - self._available_bytes()
        size = self._estimates.loaded(name, seconds=seconds, told_bytes=self._told_bytes(name), drop_bytes=drop)
        self._models[name] = _Loaded(size_bytes=size, used_at=self._clock.monotonic(), ours=True)
        self._publish()
        self._report(order, seconds, size=size)
        return Ensured(model=name, load_s=seconds, predicted_s=order.predicted_s, evicted=order.evicted)

    def _report(self, order: _Order, seconds: float, *, size: int = 0, error: str | None = None) -> None:
        change = Change(
            action="load",
            model=order.thread.model,
            reason=order.reason,
            seconds=seconds,
            predicted_s=order.predicted_s,
            size_bytes=size,
            predicted_bytes=order.predicted_bytes,
            evicted=order.evicted,
            error=error,
        )
        self._on_change(change)

    def _told_bytes(self, name: str) -> int:
        """The size by Ollama's account."""
        listed: dict[str, int] = {}
        with suppress(ModelError):  # the load was good; what is wrong now will be seen at the next look
            listed = {normalise(running.name): running.size_bytes for running in self._ollama.running()}
        return listed.get(name) or self.catalogue.size_bytes(name)

    def unload(self, model: str, *, reason: str) -> bool:
        """Unload ``model`` and wait until it is gone. False when it would not go in time: its memory still counts.

        Raises:
            OllamaDown: nobody answers.
        """
        name = normalise(model)
        if name not in self._models:
            return False
        began, size = self._clock.monotonic(), self._models[name].size_bytes
        self._publish(unloading=name)
        self._ollama.unload(self.catalogue.spelling(name))
        gone = self._await_gone(name)
        if gone:
            del self._models[name]
        self._publish()
        seconds = self._clock.monotonic() - began
        error = None if gone else f"still resident after {UNLOAD_TIMEOUT_S:g} s"
        self._on_change(
            Change(action="unload", model=name, reason=reason, seconds=seconds, size_bytes=size, error=error)
        )
        return gone

    def _await_gone(self, name: str) -> bool:
        """Ollama unloads when it finds the time: ask until the model has left its list."""
        deadline = self._clock.monotonic() + UNLOAD_TIMEOUT_S
        pause = 0.01
        while True:
            if name not in {normalise(running.name) for running in self._ollama.running()}:
                return True
            if self._clock.monotonic() >= deadline:
                log.warning("%s is still resident %g s after its unload", name, UNLOAD_TIMEOUT_S)
                return False
            self._pause.wait(pause)
            self._beat()
            pause = min(2 * pause, 1.0)

    def used(self, model: str) -> None:
        """Note a use of ``model``: idle time counts from here, and it is ours now whoever loaded it."""
        name = normalise(model)
        if name in self._models:
            self._models[name] = replace(self._models[name], used_at=self._clock.monotonic(), ours=True)

    def options(self, model: str) -> Mapping[str, int]:
        """The runner options of ``model``, to be sent with every request."""
        return self._policy(normalise(model)).options

    def lease_s(self, model: str) -> float:
        """The keep-alive to send with every request: finite, so that a dead daemon leaves no memory taken.

        It doubles as Ollama's order of eviction, should it ever come to that: the longest lease goes last.
        """
        return PINNED_LEASE_S if self._policy(model).pinned else self.limits.idle_timeout_s + LEASE_MARGIN_S

    def sweep(self, wanted: Iterable[str] = ()) -> float | None:
        """Unload models that have been idle too long, renew the leases of pinned ones.

        Args:
            wanted: models that tasks wait for; they stay.

        Returns:
            Seconds until it should be called again, None when there is nothing to come.
        """
        keep = set(map(normalise, wanted))
        due: list[float] = []
        now = self._clock.monotonic()
        for name, idle_s in [(name, now - loaded.used_at) for name, loaded in self._models.items() if loaded.ours]:
            limit = PINNED_LEASE_S / 2 if self._policy(name).pinned else self.limits.idle_timeout_s
            if idle_s < limit:
                due.append(limit - idle_s)
            elif self._policy(name).pinned:
                self._renew(name)
                due.append(limit)
            elif name not in keep:
                self.unload(name, reason="idle")
        return min(due, default=None)

    def _renew(self, name: str) -> None:
        self._load(name, Interrupt())
        self.used(name)

    def unload_all(self, reason: str) -> None:
        """Leave the memory as we found it: unload all that is ours, as far as Ollama answers."""
        for name in [name for name, loaded in self._models.items() if loaded.ours]:
            try:
                self.unload(name, reason=reason)
            except ModelError as error:
                log.warning("could not unload %s: %s", name, error)
                return

    def _publish(self, unloading: str | None = None) -> None:
        now = self._clock.monotonic()
        states = [
            ModelState(
                name=name,
                residency="unloading" if name == unloading else "resident" if loaded.ours else "external",
                size_bytes=loaded.size_bytes,
                pinned=self._policy(name).pinned,
                idle_s=round(now - loaded.used_at, 1),
                context_length=loaded.context_length,
            )
            for name, loaded in self._models.items()
        ]
        if order := self._order:
            arriving = ModelState(name=order.thread.model, residency="loading", size_bytes=order.predicted_bytes)
            states.append(arriving)
        self.states = tuple(states)


def _named(error: Exception) -> str:
    """An error as the log shows it: its code first."""
    return f"{error.code}: {error}" if isinstance(error, ModelError) else f"interrupted: {error}"


def memory_limits(*, total_bytes: int, budget_bytes: int | None, reserve_bytes: int | None) -> Mapping[str, int]:
    """Budget and reserve of a board with ``total_bytes``, where the configuration leaves them open.

    The reserve keeps the system, the broker and Ollama itself alive: an eighth of the memory, 384 MiB at least.
    """
    reserve = max(384 * MIB, total_bytes // 8) if reserve_bytes is None else reserve_bytes
    budget = total_bytes - reserve if budget_bytes is None else budget_bytes
    return {"budget_bytes": max(0, min(budget, total_bytes - reserve)), "reserve_bytes": reserve}
