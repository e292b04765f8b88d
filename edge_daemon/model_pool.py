"""Which models are in memory. ``ModelPool`` alone changes that, for the worker, and for ``main`` at the end.

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
from edge_daemon.errors import BadRequest, ModelError, ModelMissing, ModelTooLarge, NoMemory, NoRoom, OllamaDown
from edge_daemon.estimates import Estimates
from edge_daemon.messages import ModelState
from edge_daemon.ollama import Interrupt, Interrupted, ModelDetails, Ollama, Running, normalise
from edge_daemon.scheduler import Cost, Resident
from edge_daemon.steps import reached

log = logging.getLogger(__name__)

MIB = 1 << 20
ALIAS_LOAD_S = 0.05
"""To load a model that is in memory under another name is one request."""
UNLOAD_TIMEOUT_S = 30.0
IDLE_UNLOAD_S = 1.0
"""How long an unload may keep its caller when nothing waits for the memory: a task may come meanwhile."""
LEASE_MARGIN_S = 60.0
PINNED_LEASE_S = 3600.0
RENEWAL_TIMEOUT_S = 10.0
"""Ollama renews a lease at once. What takes longer is a load, which is not meant."""
RUNNER_BYTES, BUFFERS_BYTES = 64 << 20, 256 << 20
"""What a runner takes beside weights and context, until that has been measured: itself, and the buffers for computing,
which with a large vocabulary are a few hundred MB, but not more than half of a small model."""
BEAT_S = 5.0
KILLED_SHARE = 0.95
"""A model that was killed for want of memory is taken to need this share of all there is at most, so that it can be
tried again alone."""
CATALOGUE_PAUSE_S = 5.0
"""Ollama is asked for its list of models at most this often, however many tasks name unknown ones."""
ASKED_ALREADY_S = 1.0
"""How long one who wants to know of a model waits while a slow Ollama is asked by another."""


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
    """A load or an unload, as it went. ``error`` is set when it failed, and ``error_code`` says how in one word."""

    action: str
    model: str
    reason: str
    seconds: float
    predicted_s: float | None = None
    size_bytes: int = 0
    predicted_bytes: int = 0
    evicted: tuple[str, ...] = ()
    error: str | None = None
    error_code: str | None = None

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
    ended_at: float = 0.0
    """When the load ended, in monotonic seconds; it may be noted much later."""

    def since(self, accepted_at: float) -> "Ensured":
        """What a task that was accepted then has waited for: the part of the load after that, if there is one."""
        load_s = min(self.load_s, self.ended_at - accepted_at)
        return replace(self, load_s=load_s) if load_s > 0 else Ensured(model=self.model)


class Catalogue:
    """The models that Ollama has on disk, and what they will need. Any thread may ask.

    ``written`` are names as a person wrote them: a model that is to be fetched may not be found in lower case.
    """

    def __init__(
        self,
        ollama: Ollama,
        *,
        clock: Clock,
        estimates: Estimates,
        policy: Callable[[str], ModelPolicy],
        written: Iterable[str] = (),
    ) -> None:
        self._written = {normalise(name): name for name in written}
        self._ollama = ollama
        self._clock = clock
        self._estimates = estimates
        self._policy = policy
        # Held while Ollama is asked, so that one asks for all. What it guards is replaced whole, and read without it:
        # nobody who asks for what is known waits for an Ollama that is silent.
        self._lock = threading.Lock()
        self._disk_bytes: dict[str, int] | None = None
        self._digests: dict[str, str] = {}
        self._spellings: dict[str, str] = {}
        self._details: dict[str, ModelDetails] = {}
        self._asked_at = self._failed_at = -CATALOGUE_PAUSE_S

    def refresh(self) -> None:
        """Ask Ollama anew."""
        with self._lock:
            self._refresh()

    def spelling(self, model: str) -> str:
        """The name as Ollama spells it: older versions know a model under no other. One it lacks, as it is written."""
        name = normalise(model)
        return self._spellings.get(name) or self._written.get(name, name)

    def forget(self, model: str) -> None:
        """It turned out to be missing: ask anew before it is believed to be there."""
        with self._lock:
            if self._disk_bytes is not None:
                gone = normalise(model)
                self._disk_bytes = {name: size for name, size in self._disk_bytes.items() if name != gone}

    def see(self, model: str, digest: str) -> None:
        """A model is resident with this digest. If it is not the one we know, it was fetched or made anew."""
        if self._digests.get(normalise(model)) not in (None, digest):
            with self._lock:
                self._refresh_if_due()

    def names(self) -> tuple[str, ...]:
        """Every model on disk, as far as it has been asked."""
        return tuple(sorted(self._disk_bytes or ()))

    def has(self, model: str) -> bool | None:
        """Whether Ollama has ``model``; None when it cannot be asked, or somebody else is waiting for its answer."""
        name = normalise(model)
        if name not in (self._disk_bytes or ()):
            if not self._lock.acquire(timeout=ASKED_ALREADY_S):
                return None
            try:
                self._refresh_if_due()
            finally:
                self._lock.release()
        known = self._disk_bytes
        return None if known is None else name in known

    def details(self, model: str) -> ModelDetails | None:
        """What ``/api/show`` says; None when it cannot be asked."""
        name = normalise(model)
        if name not in self._details:
            with self._lock:
                if self._disk_bytes is None:
                    self._refresh_if_due()
                if name not in self._details and name in (self._disk_bytes or ()):
                    self._ask_for_details(name)
        return self._details.get(name)

    def size_bytes(self, model: str) -> int:
        """Memory that ``model`` takes, or is expected to take, when it is resident."""
        name = normalise(model)
        facts, num_ctx = self._estimates.facts(name), self._policy(name).num_ctx
        if facts.size_bytes and facts.num_ctx in (0, num_ctx):
            return facts.size_bytes
        details = self.details(name)
        weights = (self._disk_bytes or {}).get(name, 0)
        cache = (details.kv_bytes_per_token or 0) * num_ctx if details else 0
        return weights + cache + RUNNER_BYTES + min(BUFFERS_BYTES, weights // 2)

    def _ask_for_details(self, name: str) -> None:
        """A silent Ollama is asked once in a while, and not once for each model."""
        if self._clock.monotonic() - self._failed_at < CATALOGUE_PAUSE_S:
            return
        try:
            self._details = self._details | {name: self._ollama.show(self._spellings[name])}
        except ModelError as error:
            if isinstance(error, OllamaDown):
                self._failed_at = self._clock.monotonic()
            log.debug("no details of %s: %s", name, error)

    def _refresh_if_due(self) -> None:
        if self._clock.monotonic() - max(self._asked_at, self._failed_at) >= CATALOGUE_PAUSE_S:
            try:
                self._refresh()
            except ModelError as error:
                self._failed_at = self._clock.monotonic()
                log.debug("no list of models: %s", error)

    def _refresh(self) -> None:
        try:
            listed = self._ollama.tags()
        finally:
            self._asked_at = self._clock.monotonic()  # it may have taken long to be silent
        tags = [tag for tag in listed if not tag.is_remote]  # nothing leaves the board
        self._spellings = {normalise(tag.name): tag.name for tag in tags}
        self._disk_bytes = {normalise(tag.name): tag.size_bytes for tag in tags}
        digests = {normalise(tag.name): tag.digest for tag in tags}
        self._details = {
            name: details for name, details in self._details.items() if digests.get(name) == self._digests.get(name)
        }
        self._digests = digests
        for name, size in self._disk_bytes.items():
            self._estimates.set_disk_size(name, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """A resident model as we keep it between two looks at ``/api/ps``."""

    size_bytes: int
    used_at: float
    leased_at: float
    """When it was last asked for by us, so that its lease runs; of models that others loaded nobody knows."""
    ours: bool
    context_length: int | None = None


class _Loading(threading.Thread):
    """A load on its way, in a thread of its own, so that a resident model can work meanwhile."""

    def __init__(
        self, model: str, load: Callable[[Interrupt], float], *, clock: Clock, on_end: Callable[[], None]
    ) -> None:
        super().__init__(name=f"load-{model}", daemon=True)
        self.model = model
        self.interrupt = Interrupt()
        self.seconds: float | None = None
        self.ended_at = 0.0
        self.error: Exception | None = None
        self._load = load
        self._clock = clock
        self._on_end = on_end

    @property
    def ended(self) -> bool:
        """Whether it is known how the load went."""
        return self.seconds is not None or self.error is not None

    def run(self) -> None:
        try:
            seconds = self._load(self.interrupt)
            self.ended_at, self.seconds = self._clock.monotonic(), seconds
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
        self._contexts: dict[str, int] = {}  # what Ollama says of the context after a load of ours
        self._order: _Order | None = None
        self._pause = threading.Event()  # never set: a pause that does not depend on the clock handed in
        self.states: tuple[ModelState, ...] = ()
        """What is resident, replaced whole at every change: any thread may read it."""
        self.ollama_version: str | None = None
        """As Ollama told it when it was last found; None while it does not answer. Any thread may read it."""
        self._has_come = True

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
            self.ollama_version, self._has_come = None, True
            self._publish()
            raise
        for name, running in listed.items():
            self.catalogue.see(name, running.digest)
        if self._has_come:  # for the first time, or again: it may be another version now
            self._has_come = False
            with suppress(ModelError):  # nothing depends on it
                self.ollama_version = self._ollama.version()
        now = self._clock.monotonic()
        aliases = {name for name in set(self._models) - set(listed) if self._alias_of(name, listed)}
        for name in set(self._models) - set(listed) - aliases:
            log.info("%s is no longer resident: Ollama or another client unloaded it", name)
        models = {name: self._seen(name, running, now) for name, running in listed.items()}
        self._models = models | {name: replace(self._models[name], size_bytes=0) for name in aliases}
        self._before = {}
        self._publish()

    def _seen(self, name: str, running: Running, now: float) -> _Loaded:
        # A pinned model is kept whoever loaded it, such as we ourselves before a restart.
        new = _Loaded(size_bytes=0, used_at=now, leased_at=float("-inf"), ours=self._policy(name).pinned)
        known = self._models.get(name) or self._before.get(name) or new
        size = running.size_bytes or self.catalogue.size_bytes(name)
        if running.context_length == known.context_length:
            size = max(size, known.size_bytes)  # what a load was seen to take may be more than Ollama knows of
        return replace(known, size_bytes=size, context_length=running.context_length)

    def _alias_of(self, name: str, others: Iterable[str]) -> str | None:
        """One of ``others`` that is the same file with the same context.

        Ollama runs all names of a file in one process, and lists the one that it was loaded under. The other names are
        kept as models that take no memory.
        """
        details = self.catalogue.details(name)
        if details is None or details.blob is None:
            return None
        for other in others:
            known = self.catalogue.details(other) if other != name else None
            if known and known.blob == details.blob and self._policy(other).options == self._policy(name).options:
                return other
        return None

    def _names_of(self, name: str) -> list[str]:
        """The resident names of one file, this one first; none when it is not resident."""
        if name not in self._models:
            return []
        return [name, *(other for other in list(self._models) if other != name and self._alias_of(other, [name]))]

    def _is_pinned(self, name: str) -> bool:
        """Whether it is to stay, under this name or another."""
        return any(self._policy(other).pinned for other in self._names_of(name) or [name])

    def serves(self, model: str) -> bool:
        """Whether it is resident, so that a task can be given to it at once."""
        return normalise(model) in self._models and not self.must_reload(model)

    def must_reload(self, model: str) -> bool:
        """Whether it is in memory with another context than ours: Ollama would load it again for a request of ours.

        Somebody else has asked for it, or the configuration has changed.
        """
        name = normalise(model)
        seen = self._models[name].context_length if name in self._models else None
        if seen is None:
            return False
        if name in self._contexts:
            return seen != self._contexts[name]
        details, num_ctx = self.catalogue.details(name), self._policy(name).num_ctx
        trained = details.context_length if details else None
        return seen not in (num_ctx, min(num_ctx, trained or num_ctx))  # some versions tell what was asked for

    def resident(self) -> tuple[Resident, ...]:
        """The resident models, for the scheduler."""
        now = self._clock.monotonic()
        residents = [
            Resident(
                model=name,
                size_bytes=loaded.size_bytes,
                idle_s=now - loaded.used_at,
                pinned=self._is_pinned(name),
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
        name, run_s = normalise(model), self._estimates.mean_run_s(normalise(model))
        loaded = self._models.get(name)
        if loaded is None and self._alias_of(name, list(self._models)):
            return Cost(load_s=ALIAS_LOAD_S, size_bytes=0, run_s=run_s)
        size = loaded.size_bytes if loaded else self.catalogue.size_bytes(name)
        return Cost(load_s=self._estimates.load_s(name), size_bytes=size, run_s=run_s)

    def room_bytes(self) -> int:
        """What resident models may take in all, now: the budget, less when others use the board's memory."""
        return min(self.limits.budget_bytes, self._used_bytes() + self._available_bytes() - self.limits.reserve_bytes)

    def room_without_load_bytes(self) -> int:
        """The same if the load on its way were broken off: what has gone since it began would come back."""
        taken = max(0, self._order.free_before - self._available_bytes()) if self._order else 0
        return min(self.limits.budget_bytes, self.room_bytes() + taken)

    def _used_bytes(self) -> int:
        return sum(loaded.size_bytes for loaded in list(self._models.values()))

    def _pinned_bytes(self) -> int:
        return sum(loaded.size_bytes for name, loaded in self._models.items() if self._is_pinned(name))

    def is_missing(self, model: str) -> bool:
        """Whether Ollama is known not to have ``model``, and may not fetch it."""
        return not self.limits.allow_pull and self.catalogue.has(model) is False

    def check(self, model: str) -> None:
        """Raises ModelMissing, ModelTooLarge or BadRequest for a model that can never answer. Any thread may ask."""
        if self.is_missing(model):
            raise ModelMissing(f"Ollama has no model {model}")
        size = self.catalogue.size_bytes(model)
        if size > self.limits.budget_bytes:
            need, have = size // MIB, self.limits.budget_bytes // MIB
            raise ModelTooLarge(f"{model} needs about {need} MiB, the memory budget is {have} MiB")
        details = self.catalogue.details(model)
        if details and details.capabilities and "completion" not in details.capabilities:
            raise BadRequest(f"{model} makes no text: it is for {', '.join(sorted(details.capabilities))}")

    def evictable(self) -> tuple[str, ...]:
        """Every resident model that is not pinned, whoever loaded it."""
        return tuple(name for name in self._models if not self._is_pinned(name))

    # -- changing

    def start_loading(
        self,
        model: str,
        *,
        evict: Iterable[str] = (),
        reason: str,
        task: int | None = None,
        unload_timeout_s: float = UNLOAD_TIMEOUT_S,
    ) -> None:
        """Begin to load ``model`` after unloading ``evict``; ``settle`` ends it. One load at a time.

        A model that is resident with another context is unloaded first, as Ollama itself would. ``task``: the number of
        the task that is to answer for it if the load ends the daemon.

        Raises:
            NoRoom: it would break the budget; nothing was loaded.
            ModelError: it cannot be loaded here, or an unload failed.
            StorageFull: it cannot be noted that the load has begun; nothing was loaded.
        """
        name = normalise(model)
        self.check(name)
        if name in self._models and not self.unload(name, reason="context", timeout_s=unload_timeout_s):
            raise NoRoom(f"{name} is in use by another client, with another context")
        gone = tuple(
            victim
            for victim in map(normalise, evict)
            if self.unload(victim, reason=f"room for {name}", timeout_s=unload_timeout_s)
        )
        need = self._admitted(name)
        if need:  # else it is another name of what is there
            self._estimates.load_begins(name, task)
        thread = _Loading(
            name, lambda interrupt: self._load(name, interrupt), clock=self._clock, on_end=self._on_loaded
        )
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
        if self._alias_of(name, self._models):
            return 0
        need, room = self.catalogue.size_bytes(name), self.room_bytes() - self._used_bytes()
        if need > room:
            raise NoRoom(f"{name} needs about {need // MIB} MiB, {max(0, room) // MIB} MiB are free for it")
        return need

    def _load(self, name: str, interrupt: Interrupt) -> float:
        if self.limits.allow_pull and self.catalogue.has(name) is False:
            self._pull(name, interrupt)
        reached("load_due")
        return self._ask_for(name, interrupt, timeout_s=self.limits.load_timeout_s)

    def _ask_for(self, name: str, interrupt: Interrupt, *, timeout_s: float) -> float:
        """The request that loads a model, or renews its lease."""
        return self._ollama.load(
            self.catalogue.spelling(name),
            options=self._policy(name).options,
            keep_alive_s=self.lease_s(name),
            timeout_s=timeout_s,
            interrupt=interrupt,
        )

    def _pull(self, name: str, interrupt: Interrupt) -> None:
        """Fetch a model, then judge it anew: its size is known only now."""
        log.info("fetching %s", name)
        self._ollama.pull(
            self.catalogue.spelling(name),
            on_progress=lambda *progress: self._on_pull(name, *progress),
            interrupt=interrupt,
        )
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
        self._estimates.load_ended(order.thread.model)
        if order.thread.error is not None:
            self._settle_failure(order, order.thread.error)
        return self._settle_success(order, order.thread.seconds or 0.0)

    def _settle_failure(self, order: _Order, error: Exception) -> None:
        if isinstance(error, NoMemory) and not isinstance(error, NoRoom):
            name = order.thread.model
            self._estimates.killed(
                name,
                max(order.predicted_bytes, self.catalogue.size_bytes(name)),  # a model fetched meanwhile had no size
                at_most=int(KILLED_SHARE * (self.room_bytes() - self._pinned_bytes())),
                num_ctx=self._policy(name).num_ctx,
            )
        self._publish()
        self._report(order, self._clock.monotonic() - order.began_at, error=error)
        raise error

    def _settle_success(self, order: _Order, seconds: float) -> Ensured:
        name, now = order.thread.model, self._clock.monotonic()
        if order.predicted_bytes == 0:
            self._models[name] = _Loaded(size_bytes=0, used_at=now, leased_at=now, ours=True)
            self._publish()
            return Ensured(model=name, predicted_s=order.predicted_s, evicted=order.evicted)
        available, told = self._available_bytes(), self._told(name)
        size = self._estimates.loaded(
            name,
            seconds=seconds,
            told_bytes=told.size_bytes if told and told.size_bytes else self.catalogue.size_bytes(name),
            drop_bytes=order.free_before - available if available else None,
            at_most=self.limits.budget_bytes,
            num_ctx=self._policy(name).num_ctx,
        )
        context = told.context_length if told else None
        if context is not None:
            self._contexts[name] = context
        self._models[name] = _Loaded(size_bytes=size, used_at=now, leased_at=now, ours=True, context_length=context)
        self._publish()
        self._report(order, seconds, size=size)
        return Ensured(
            model=name,
            load_s=seconds,
            predicted_s=order.predicted_s,
            evicted=order.evicted,
            ended_at=order.thread.ended_at,
        )

    def _report(self, order: _Order, seconds: float, *, size: int = 0, error: Exception | None = None) -> None:
        change = Change(
            action="load",
            model=order.thread.model,
            reason=order.reason,
            seconds=seconds,
            predicted_s=order.predicted_s,
            size_bytes=size,
            predicted_bytes=order.predicted_bytes,
            evicted=order.evicted,
            error=None if error is None else f"{_code(error)}: {error}",
            error_code=None if error is None else _code(error),
        )
        self._on_change(change)

    def _told(self, name: str) -> Running | None:
        """Ollama's account of a model that it has just loaded."""
        with suppress(ModelError):  # the load was good; what is wrong now will be seen at the next look
            return next((running for running in self._ollama.running() if normalise(running.name) == name), None)
        return None

    def unload(self, model: str, *, reason: str, timeout_s: float = UNLOAD_TIMEOUT_S) -> bool:
        """Unload ``model`` and wait until it is gone. False when it would not go in time: its memory still counts.

        Raises:
            OllamaDown: nobody answers.
        """
        name = normalise(model)
        if name not in self._models:
            return False
        if not self._models[name].size_bytes:
            del self._models[name]  # another name of a model that stays
            return True
        began, size = self._clock.monotonic(), self._models[name].size_bytes
        self._publish(unloading=name)
        reached("unload_due")
        goes = self._ollama.unload(self.catalogue.spelling(name))
        gone = self._await_gone(name, timeout_s if goes else 0.0)
        if gone:
            self._models = {other: it for other, it in self._models.items() if it.size_bytes and other != name}
        self._publish()
        seconds = self._clock.monotonic() - began
        change = Change(action="unload", model=name, reason=reason, seconds=seconds, size_bytes=size)
        if not gone:
            change = replace(change, error=f"still resident after {seconds:.0f} s", error_code="still_resident")
        self._on_change(change)
        return gone

    def _await_gone(self, name: str, timeout_s: float) -> bool:
        """Ollama unloads when it finds the time: ask until the model has left its list."""
        deadline = self._clock.monotonic() + timeout_s
        pause = 0.01
        while True:
            if name not in {normalise(running.name) for running in self._ollama.running()}:
                return True
            if self._clock.monotonic() >= deadline:
                log.warning("%s is still resident %g s after its unload", name, timeout_s)
                return False
            self._pause.wait(pause)
            self._beat()
            pause = min(2 * pause, 1.0)

    def used(self, model: str) -> None:
        """Note a use of ``model``: idle time counts from here, and it is ours now whoever loaded it."""
        now = self._clock.monotonic()
        for name in self._names_of(normalise(model)):
            self._models[name] = replace(self._models[name], used_at=now, leased_at=now, ours=True)

    def options(self, model: str) -> Mapping[str, int]:
        """The runner options of ``model``, to be sent with every request."""
        return self._policy(normalise(model)).options

    def lease_s(self, model: str) -> float:
        """The keep-alive to send with every request: finite, so that a dead daemon leaves no memory taken.

        It doubles as Ollama's order of eviction, should it ever come to that: the longest lease goes last.
        """
        lease_s = self.limits.idle_timeout_s + LEASE_MARGIN_S
        return max(PINNED_LEASE_S, lease_s + LEASE_MARGIN_S) if self._is_pinned(normalise(model)) else lease_s

    def sweep(self, wanted: Iterable[str] = ()) -> float | None:
        """Unload models that have been idle too long.

        One that does not go is in use by another client, and is left to it until we use it again.

        Args:
            wanted: models that tasks wait for; they stay.

        Returns:
            Seconds until it, or `renew`, should be called again; None when there is nothing to come.
        """
        keep = {name for model in wanted for name in self._names_of(normalise(model))}
        due: list[float] = []
        now = self._clock.monotonic()
        for name, loaded in [(name, loaded) for name, loaded in self._models.items() if loaded.ours]:
            if name in keep or self._is_pinned(name):
                due.append(max(0.0, loaded.leased_at + self.lease_s(name) / 2 - now))
            elif now - loaded.used_at < self.limits.idle_timeout_s:
                due.append(loaded.used_at + self.limits.idle_timeout_s - now)
            elif not self.unload(name, reason="idle", timeout_s=IDLE_UNLOAD_S) and name in self._models:
                self._models[name] = replace(self._models[name], ours=False)
                self._publish()
                return 0.0  # that took its time: what has come meanwhile goes before other idle models
        return min(due, default=None)

    def renew(self, wanted: Iterable[str] = ()) -> None:
        """Renew the leases of pinned models, and of those that tasks wait for, when half of their time is over.

        Raises:
            ModelError: Ollama did not do it at once.
        """
        keep = {name for model in wanted for name in self._names_of(normalise(model))}
        now = self._clock.monotonic()
        for name, loaded in list(self._models.items()):
            is_kept = loaded.ours and (name in keep or self._is_pinned(name)) and not self.must_reload(name)
            if is_kept and now - loaded.leased_at >= self.lease_s(name) / 2:
                # Noted first: what cannot be done now is not tried again at once.
                self._models[name] = replace(loaded, leased_at=now)
                self._ask_for(name, Interrupt(), timeout_s=RENEWAL_TIMEOUT_S)

    def unload_all(self, reason: str) -> None:
        """Leave the memory as we found it: unload all that is ours, as far as Ollama answers."""
        self.interrupt_load(reason)
        with suppress(ModelError, Interrupted):
            self.settle(wait=True)
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


def _code(error: Exception) -> str:
    """How a load failed, in one word."""
    return error.code if isinstance(error, ModelError) else "interrupted"


def memory_limits(*, total_bytes: int | None, budget_bytes: int | None, reserve_bytes: int | None) -> Mapping[str, int]:
    """Budget and reserve of a board with ``total_bytes``, where the configuration leaves them open.

    The reserve keeps the system, the broker and Ollama itself alive: an eighth of the memory, 384 MiB at least. No
    ``total_bytes`` means another machine, of which nothing is known but the budget.
    """
    if total_bytes is None:
        return {"budget_bytes": budget_bytes or 0, "reserve_bytes": 0}
    reserve = max(384 * MIB, total_bytes // 8) if reserve_bytes is None else reserve_bytes
    budget = total_bytes - reserve if budget_bytes is None else budget_bytes
    return {"budget_bytes": max(0, min(budget, total_bytes - reserve)), "reserve_bytes": reserve}
