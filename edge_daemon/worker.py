"""The loop: choose, load, run, finish. One thread, because one board runs one generation at a time.

It alone changes the model pool and runs tasks. What others ask of it (``cancel``, ``stop``, ``wake``) only sets flags
and interrupts; it acts on them at the next token.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from edge_daemon import answers
from edge_daemon.breaker import TRIPS_AFTER, Breakers
from edge_daemon.clock import Clock, iso
from edge_daemon.errors import (
    BadRequest,
    DaemonDied,
    DeadlineExceeded,
    ModelBroken,
    ModelError,
    ModelMissing,
    NoMemory,
    NoRoom,
    OllamaBusy,
    OllamaDied,
    OllamaDown,
    Repetitive,
    StorageFull,
)
from edge_daemon.estimates import Estimates
from edge_daemon.journal import Kind, about
from edge_daemon.messages import (
    Address,
    Failure,
    Message,
    Priority,
    Result,
    Status,
    Stored,
    Task,
    TaskState,
    status_seq,
)
from edge_daemon.model_pool import Ensured, ModelPool
from edge_daemon.ollama import Answer, Deadlines, Generation, Interrupt, Interrupted, Ollama, normalise
from edge_daemon.scheduler import (
    Cost,
    Decision,
    Head,
    Policy,
    Turn,
    View,
    advance,
    choose,
    credited,
    estimate_wait,
    lacks_room,
    preempts,
    prefetch,
)
from edge_daemon.steps import reached
from edge_daemon.store import Store, Waiting
from edge_daemon.telemetry import TaskMeter, TaskUsage

log = logging.getLogger(__name__)

T = TypeVar("T")

BEAT_S = 15.0
"""The longest that the loop waits for something to happen."""
LOOK_S = 1.0
"""How old the knowledge of what is resident may be when a decision is made."""
IDLE_LOOK_S = 60.0
"""The same while nothing waits: to ask Ollama wakes the board."""
FULL_DISK_PAUSE_S = 5.0
"""So often it is tried whether a full disk has room again."""
MAKES_WAY_AT_ONCE = 3
"""So many times a task makes way for urgent ones without delay; stops of the daemon and a busy Ollama count."""
LONGEST_PAUSE_S = 30.0
"""Ollama is asked again at least this often while it does not answer."""
EXPIRE_AT_ONCE = 200
"""At most so many tasks whose time is over are ended by one commit; then others get their turn."""
PREFETCH_UNLOAD_S = 1.0
"""How long the running answer may be left alone while room is made for the next model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A task that has ended, with how it went."""

    stored: Stored
    result: Result
    decision: Decision | None = None
    ensured: Ensured | None = None
    answer: Answer | None = None
    usage: TaskUsage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the worker tells others. None of these may raise or wait."""

    status: Callable[[Address, Status], None]
    stream: Callable[[Address, dict[str, Any]], None]
    finished: Callable[[Finished], None]
    ollama: Callable[[bool], None]
    """Whether Ollama answers, told when that changes."""
    event: Callable[[str, str, dict[str, Any]], None]
    """Type, severity and data of something worth telling."""
    ended: Callable[[], None] = lambda: None
    """The worker's thread has ended, in whatever way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRules:
    """How tasks are run."""

    deadlines: Deadlines
    max_attempts: int
    scheduler: Policy
    preempt: bool = True
    prefetch: bool = True
    think: Callable[[str], bool | str | None] = lambda _model: None
    """What to tell a model about thinking aloud (``Generation.think``)."""
    continues: Callable[[str], bool] = lambda _model: True
    """Whether a model can be given the beginning of its answer, to go on from there."""
    fallbacks: Callable[[str], Sequence[str]] = lambda _model: ()
    """The models that may answer for one that cannot, in this order."""


@dataclass(slots=True, kw_only=True)
class _Running:
    """The task at hand."""

    stored: Stored
    decision: Decision
    began_at: float
    ensured: Ensured | None
    """The load that it has waited for; None when its model could not be loaded."""
    meter: TaskMeter | None = None
    interrupt: Interrupt = field(default_factory=Interrupt)
    cancelled: bool = False
    """Its interrupt may have come too late, or for another reason first."""
    is_waited_for: bool = False
    """An urgent task waits for it to make way."""
    worth_it_at: float = float("inf")
    """When it will have been written for as long as its prompt was read."""


class Worker(threading.Thread):
    """Runs tasks until it is stopped.

    Args:
        store: where tasks wait and results go.
        pool: what is in memory.
        ollama: runs the generations.
        estimates: what is known of the models' speed.
        rules: how tasks are run.
        meter: measures the board while a task runs.
        preload: models to load at the start.
    """

    def __init__(
        self,
        *,
        store: Store,
        pool: ModelPool,
        ollama: Ollama,
        estimates: Estimates,
        rules: RunRules,
        meter: Callable[[], TaskMeter],
        clock: Clock,
        hooks: Hooks,
        preload: Iterable[str] = (),
    ) -> None:
        super().__init__(name="worker", daemon=True)
        self.beats = 0
        self._store = store
        self._pool = pool
        self._ollama = ollama
        self._estimates = estimates
        self._rules = rules
        self._meter = meter
        self._clock = clock
        self._hooks = hooks
        self._preload = [normalise(model) for model in preload]
        self._awake = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards _running, so that a cancel meets the task either waiting or running
        self._running: _Running | None = None
        self._turn: Turn | None = None
        self._ended_at = clock.monotonic()
        self._looked_at = float("-inf")
        self._ollama_up: bool | None = None
        self._unanswered = 0
        self._short_of_room = False
        self._breakers = Breakers()
        self._streams: dict[int, answers.Stream] = {}  # of tasks that have begun, by seq
        self._fresh: dict[str, Ensured] = {}  # loads that no task which waited for them has carried yet
        self._ordered: Decision | None = None  # what the load on its way is for; None when no task waits for it
        self._untold: dict[str, type[ModelError]] = {}  # how the last load of a model failed; told once
        self._alone: dict[str, str] = {}  # models whose next load finds all others unloaded, and why

    # -- asked by others

    def wake(self) -> None:
        """Something has changed: look again."""
        self._awake.set()

    def beat(self) -> None:
        """Show that the loop lives."""
        self.beats += 1

    def running(self) -> tuple[Task, float] | None:
        """The task at hand and the seconds since it was begun."""
        running = self._running
        return (running.stored.task, self._clock.monotonic() - running.began_at) if running else None

    def eta_s(self, tasks: Sequence[Task]) -> list[float | None]:
        """Seconds until each of ``tasks``, which are the newest, will have its answer if nothing else arrives."""
        running = self._running
        left_s = 0.0
        if running is not None:
            spent_s = self._clock.monotonic() - running.began_at
            left_s = max(0.0, self._pool.cost(running.decision.model).run_s - spent_s)
        view = self._view(self._store.heads(), also={task.model for task in tasks})
        newest = [self._newest(task) for task in tasks]
        waits_s = {head: estimate_wait(view, head) for head in set(newest)}  # tasks that are alike wait alike
        return [None if (wait_s := waits_s[head]) is None else round(wait_s + left_s, 1) for head in newest]

    def _newest(self, task: Task) -> Head:
        run_s = self._estimates.run_s(
            task.model, task_type=task.task_type, prompt_tokens=task.prompt_tokens, max_tokens=task.max_tokens
        )
        return Head(seq=1 << 62, model=task.model, priority=task.priority, waited_s=0.0, run_s=run_s, count=1)

    def cancel(self, src: str | None, task_id: str) -> bool:
        """End a task, whether it waits or runs; one that has ended or is not known is left alone.

        Returns whether there was one to end.
        """
        found = [self._store.find(src, task_id)] if src is not None else self._store.find_open(task_id)
        unfinished = [stored for stored in found if stored is not None and stored.result is None]
        for stored in unfinished:
            with suppress(StorageFull):  # it goes on, as if nobody had asked
                self._cancel(stored)
        return bool(unfinished)

    def _cancel(self, stored: Stored) -> None:
        with self._lock:
            if self._running is not None and self._running.stored.seq == stored.seq:
                self._running.cancelled = True
                self._running.interrupt.set("cancelled")
                return
            ended = self._end_waiting([stored], TaskState.CANCELLED)
        self._tell_ended(ended)

    def expire(self) -> bool:
        """End waiting tasks whose time to live has passed; any thread may ask, also while another task runs.

        Returns whether there are more of them than are ended by one commit.

        Raises:
            StorageFull: they still wait, and are found again at the next call.
        """
        with self._lock:
            ended = self._end_waiting(self._store.expired(EXPIRE_AT_ONCE), TaskState.EXPIRED)
        self._tell_ended(ended)
        expiry = self._store.next_expiry()
        return expiry is not None and expiry <= self._clock.monotonic()

    def stop(
        self, *, drain_s: float, patience_s: float = float("inf"), beat: Callable[[], None] = lambda: None
    ) -> None:
        """Take no further task; let the running one finish within ``drain_s``, else put it aside. Then return.

        That is waited for ``patience_s`` at most, and ``beat`` is called every second until then.
        """
        self._stopping.set()
        self._awake.set()
        if self._running is None:
            self._pool.interrupt_load("stopped")
        deadline = self._clock.monotonic() + drain_s
        while self.is_alive() and (now := self._clock.monotonic()) < deadline + patience_s:
            if now >= deadline:
                self.hurry()
            self.join(min(1.0, max(0.01, deadline - now)))
            beat()

    def hurry(self) -> None:
        """Put the running task aside now."""
        self._stopping.set()
        self._awake.set()
        self._pool.interrupt_load("stopped")
        with self._lock:
            if self._running is not None:
                self._running.interrupt.set("stopped")

    # -- the loop

    def run(self) -> None:
        """The thread."""
        try:
            self._count_deaths()
            while not self._stopping.is_set():
                self.beat()
                self._awake.clear()
                try:
                    pause_s = 0 if self.expire() else self._step()
                except StorageFull as error:
                    log.error("no task can be begun: %s", error)  # noqa: TRY400
                    pause_s = FULL_DISK_PAUSE_S
                if pause_s > 0:
                    self._awake.wait(min(pause_s, BEAT_S))
            self._break_off()
        except Exception:
            # Nobody above could handle it: main sees that the thread is gone and ends the process.
            log.exception("the worker failed")
        finally:
            self._hooks.ended()

    def _step(self) -> float:
        """Do one thing. Returns the seconds after which to look again if nothing happens, 0 for at once."""
        self._settle()
        if not self._look():
            return min(LONGEST_PAUSE_S, 2.0 ** min(self._unanswered, 5) / 2)
        self._keep_warm()
        waiting = self._store.heads()
        view = self._view(waiting)
        if self._pool.loading is not None:
            decision = self._choose_beside_load(view)
        else:
            decision = choose(view) if waiting else None
            if self._preload and (decision is None or decision.reason != "urgent"):
                self._load_ahead(self._preload[0])
                return 0
            self._room_is(short=decision is None and lacks_room(view))
        if decision is None:
            return self._idle(waiting)
        if decision.not_before_s > 0:
            return decision.not_before_s
        if decision.model == self._pool.loading:
            return 0  # it has come in this moment: take note of that first
        if self._pool.serves(decision.model):
            self._run(decision)
        else:
            self._load(decision)
        return 0

    def _look(self) -> bool:
        """See what is resident. False when Ollama does not answer."""
        is_idle = not (self._store.open_count() or self._preload)
        if self._clock.monotonic() - self._looked_at < (IDLE_LOOK_S if is_idle else LOOK_S):
            return True
        try:
            self._pool.refresh()
        except ModelError as error:
            self._unanswered += 1
            self._ollama_is(up=False, why=str(error))
            return False
        self._looked_at = self._clock.monotonic()
        self._unanswered = 0
        self._ollama_is(up=True)
        return True

    def _look_again(self) -> None:
        self._looked_at = float("-inf")

    def _ollama_is(self, *, up: bool, why: str = "") -> None:
        """The edges only: down once, up once."""
        if up == self._ollama_up:
            return
        if up:
            log.info("Ollama answers", extra=about(Kind.OLLAMA_UP))
        else:
            log.warning("Ollama does not answer (%s); tasks wait until it does", why, extra=about(Kind.OLLAMA_DOWN))
        self._ollama_up = up
        self._hooks.ollama(up)

    def _room_is(self, *, short: bool) -> None:
        """Whether tasks wait because nothing can be loaded for them: told when that changes."""
        if short == self._short_of_room:
            return
        if short:
            log.warning("no room in memory for any model that tasks wait for; they wait until there is")
        else:
            log.info("there is room in memory again")
        self._short_of_room = short
        severity = "warning" if short else "info"
        self._hooks.event(
            "memory_short" if short else "memory_enough", severity, {"room_bytes": self._pool.room_bytes()}
        )

    def _idle(self, waiting: tuple[Waiting, ...]) -> float:
        """Nothing can be run: unload what has been idle too long."""
        now = self._clock.monotonic()
        expiry = self._store.next_expiry()
        due = [None if expiry is None else expiry - now]
        due.append(self._breakers.next_try({head.model for head in waiting}, now))
        if self._pool.loading is None:
            try:
                due.append(self._pool.sweep(head.model for head in waiting))
            except ModelError as error:
                log.warning("could not unload: %s", error)
                self._look_again()
                return 1.0
        return max(0.01, min((seconds for seconds in due if seconds is not None), default=BEAT_S))

    def _count_deaths(self) -> None:
        """A load that was on its way when the daemon was killed, or the board went down, has failed like any other."""
        for model, seq in self._estimates.loads_that_ended_us().items():
            self._ordered = Decision(seq=seq, model=model, evict=(), reason="restart") if seq else None
            with suppress(StorageFull):  # until there is room, no load is begun
                self._load_failed(model, DaemonDied(self._estimates.facts(model).deaths))

    def _break_off(self) -> None:
        """At an orderly end: the load that is on its way did not end us."""
        self._pool.interrupt_load("stopped")
        with suppress(ModelError, Interrupted):
            self._pool.settle(wait=True)

    # -- choosing

    def _view(self, waiting: Iterable[Waiting], *, also: Iterable[str] = ()) -> View:
        """The world as the scheduler sees it. ``also``: models whose cost is wanted though no task waits for them."""
        now = self._clock.monotonic()
        resident = self._pool.resident()
        served = [(head, model) for head in waiting if (model := self._served_by(head, now))]
        models = {model for _, model in served} | {r.model for r in resident} | set(also)
        return View(
            heads=tuple(self._head(head, model, now) for head, model in served),
            resident=resident,
            costs={model: self._cost(model, now) for model in sorted(models)},
            budget_bytes=self._pool.room_bytes(),
            turn=self._turn and credited(self._turn, now - self._ended_at, policy=self._rules.scheduler),
            max_resident=self._pool.limits.max_resident,
            policy=self._rules.scheduler,
        )

    def _served_by(self, head: Waiting, now: float) -> str | None:
        """The model that is to answer for a class of tasks: theirs, or a fallback while it fails; None when it rests.

        A model on its way into memory takes no task before it is there, so that resident ones go on meanwhile.
        """
        model = self._stand_in(head.model, head.fallback)
        return model if self._breakers.may_try(model, now) and model != self._pool.awaited else None

    def _stand_in(self, model: str, fallback: Sequence[str] | None) -> str:
        """The first of ``model`` and what may answer instead that works, or may be tried anew; itself when none does.

        ``fallback`` is what the type of the task says; None leaves it to the settings of the model.
        """
        now = self._clock.monotonic()
        others = self._rules.fallbacks(model) if fallback is None else map(normalise, fallback)

        def works(name: str) -> bool:
            is_probed = name != self._pool.loading and self._breakers.may_try(name, now)
            return not self._pool.is_missing(name) and (is_probed or not self._breakers.is_open(name))

        return next(filter(works, (model, *others)), model)

    def _cost(self, model: str, now: float) -> Cost:
        cost = self._pool.cost(model)
        rate = self._estimates.rate_per_s(model, now)
        return replace(cost, rate_per_s=rate)

    def _head(self, waiting: Waiting, model: str, now: float) -> Head:
        run_s = self._estimates.run_s(
            model, task_type=waiting.task_type, prompt_tokens=waiting.prompt_tokens, max_tokens=waiting.max_tokens
        )
        return Head(
            seq=waiting.seq,
            model=model,
            priority=waiting.priority,
            waited_s=now - waiting.accepted_at,
            run_s=run_s,
            count=waiting.count,
            expires_in_s=waiting.expires_at - now,
        )

    def _choose_beside_load(self, view: View) -> Decision | None:
        """A task of a resident model, while another one loads; for an urgent task that load is broken off."""
        wanted = choose(self._for_urgent(view))
        if wanted is not None and wanted.reason == "urgent" and not self._is_there(wanted.model):
            self._pool.interrupt_load("urgent")
            return None
        return choose(self._without_loads(view))  # one load at a time: its end wakes us

    def _for_urgent(self, view: View) -> View:
        """What an urgent task can have: the room of a model that is on its way, unless that load is urgent as well."""
        model, ordered = self._pool.loading, self._ordered
        if model is None:
            return view
        waits = any(head.model == model and head.priority is Priority.URGENT for head in self._store.heads())
        if waits or (ordered is not None and ordered.reason == "urgent"):
            return self._without_loads(view)
        others = tuple(resident for resident in view.resident if resident.model != model)
        return replace(view, resident=others, budget_bytes=self._pool.room_without_load_bytes())

    def _without_loads(self, view: View) -> View:
        """The tasks that need no further load."""
        return replace(view, heads=tuple(head for head in view.heads if self._is_there(head.model)))

    def _is_there(self, model: str) -> bool:
        """Whether it can be given a task, at once or as soon as note is taken of its load."""
        return self._pool.serves(model) or (model == self._pool.loading and self._pool.awaited is None)

    # -- loading

    def _load(self, decision: Decision) -> None:
        """Begin to load the model of ``decision``. Resident ones go on meanwhile, and its end is decided upon anew."""
        model = decision.model
        if reason := self._alone.pop(model, None):
            decision = replace(decision, evict=self._pool.evictable(), reason=reason)
        elif self._pool.must_reload(model):
            decision = replace(decision, reason="context")
        self._ordered = decision
        try:
            reached("load_ordered")
            self._pool.start_loading(model, evict=decision.evict, reason=decision.reason, task=decision.seq)
        except ModelError as error:
            self._load_failed(model, error)
        except StorageFull:
            self._ordered = None
            raise

    def _load_ahead(self, model: str) -> None:
        if self._pool.serves(model):
            self._preload.remove(model)
            return
        try:
            self._pool.start_loading(model, reason="preload")
        except ModelError as error:
            log.warning("could not preload %s: %s", model, error)
            self._preload.remove(model)

    def _keep_warm(self) -> None:
        """Pinned models, and those that tasks wait for, must not run out of their lease while others work."""
        if self._pool.loading is None:
            try:
                self._pool.renew(head.model for head in self._store.heads())
            except ModelError as error:
                log.warning("could not renew a lease: %s", error)
                self._look_again()

    def _settle(self) -> None:
        """Take note of a load that has ended."""
        model = self._pool.loading or ""
        try:
            ensured = self._pool.settle()
        except Interrupted:
            self._ordered = None
            self._look_again()  # Ollama may still hold what it had read
            return
        except ModelError as error:
            self._load_failed(model, error)
            return
        if ensured is None:
            return
        self._loaded(ensured)
        ordered, self._ordered = self._ordered, None
        if ordered:
            self._advance(ordered, load_s=ensured.load_s)

    def _loaded(self, ensured: Ensured) -> None:
        self._untold.pop(ensured.model, None)
        reached("load_noted")
        if ensured.load_s > 0:
            self._fresh[ensured.model] = ensured

    def _load_failed(self, model: str, error: ModelError) -> None:
        """A failed load counts as an attempt of the task that it was for, unless another model answers for it now."""
        self._tell_failed_load(model, error)
        self._look_again()
        self._preload = [name for name in self._preload if name != model]  # that is tried once
        ordered, self._ordered = self._ordered, None
        if isinstance(error, DeadlineExceeded) and error.stage == "load":
            self._stuck(model, error)
        if isinstance(error, OllamaDied):
            self._alone[model] = "killed"  # as it may have been: the next load has all the memory
        was_alone = ordered is not None and ordered.reason == "killed"
        if isinstance(error, NoMemory) and not isinstance(error, NoRoom) and self._pool.evictable() and not was_alone:
            self._alone[model] = "killed"
            if ordered:
                self._load(ordered)
            return
        self._model_failed(model, error)
        if isinstance(error, NoRoom | OllamaBusy):
            return  # nothing was tried: the task keeps its place, and its model rests a little
        stored = self._store.get(ordered.seq) if ordered else None
        if ordered is None or stored is None or self._stand_in(model, stored.task.fallback) != model:
            return  # no task has lost anything by it
        running = self._claim(ordered)
        if running is not None and not self._is_poison(running):
            running.ensured = None
            self._conclude(running, self._failed(running, error))

    def _tell_failed_load(self, model: str, error: ModelError) -> None:
        """Once for each kind of failure until a load succeeds: it is tried again and again."""
        again = self._untold.get(model) is type(error)
        self._untold[model] = type(error)
        level, extra = logging.DEBUG if again else logging.WARNING, about(Kind.LOAD_REFUSED, model=model)
        log.log(level, "could not load %s: %s", model, error, extra=extra)

    def _stuck(self, model: str, error: DeadlineExceeded) -> None:
        """A load hangs. Ollama's own queue of loads may be blocked by a model that it could not unload.

        Nothing but loads shows that. The model rests; resident ones go on; its next load unloads all others first.
        """
        self._alone[model] = "stuck"
        self._hooks.event("ollama_stuck", "error", {"model": model, "after_s": error.limit_s})

    # -- running

    def _run(self, decision: Decision) -> None:
        running = self._claim(decision)
        if running is None or self._is_poison(running):
            return
        task, extra = running.stored.task, _about(Kind.TASK_BEGUN, running.stored, decision.model)
        log.debug("task %s/%s begins on %s (%s)", *task.key, decision.model, decision.reason, extra=extra)
        self._tell(running.stored, TaskState.RUNNING)
        reached("running_told")
        finished: Finished | None
        try:
            self._prefetch(decision.model)
            finished = self._attempt(running)
        except Interrupted as error:
            finished = self._interrupted(running, error)
        except ModelError as error:
            self._look_again()
            self._model_failed(decision.model, error)
            finished = self._failed(running, error)
        self._advance(decision, run_s=self._clock.monotonic() - running.began_at)
        self._conclude(running, finished)

    def _claim(self, decision: Decision) -> _Running | None:
        with self._lock:
            stored = self._store.claim(decision.seq)
            if stored is None:
                return None
            ensured = self._waited_for(decision.model, stored.accepted_at)
            began_at = self._clock.monotonic()
            self._running = _Running(stored=stored, decision=decision, began_at=began_at, ensured=ensured)
            return self._running

    def _waited_for(self, model: str, accepted_at: float) -> Ensured:
        """What a task that was accepted then has waited for of the last load of its model; one task carries it."""
        ensured = self._fresh.get(model, Ensured(model=model)).since(accepted_at)
        if ensured.load_s > 0:
            del self._fresh[model]
        return ensured

    def _is_poison(self, running: _Running) -> bool:
        """Whether all its attempts were spent by dying with us: such a task is ended, not tried for ever."""
        if running.stored.attempt <= self._rules.max_attempts:
            return False
        message = f"begun {self._rules.max_attempts} times without an end: it, or its model, kills what runs it"
        running.stored = replace(running.stored, attempt=self._rules.max_attempts)  # the one counted last is none
        result = self._result(running, state=TaskState.FAILED, error=Failure(code="crash_loop", message=message))
        self._conclude(running, self._finished(running, result))
        return True

    def _conclude(self, running: _Running, finished: Finished | None) -> None:
        with self._lock:
            self._running = None
            is_cancelled = finished is None and running.cancelled
        if finished is None and running.ensured is not None:
            self._loaded(running.ensured)  # it is the next attempt that has waited for the load
        if is_cancelled:
            finished = self._unrun(running.stored, TaskState.CANCELLED)
        if finished is not None:
            self._end(finished)

    def _prefetch(self, running: str) -> None:
        """Load the next model while this one works, if it needs only memory that nobody misses."""
        waiting = self._store.heads()
        if not waiting or not self._rules.prefetch or self._pool.loading is not None:
            return
        plan = prefetch(self._view(waiting), running)
        if plan is None or plan.model in self._alone:
            return
        try:
            self._pool.start_loading(
                plan.model, evict=plan.evict, reason="prefetch", unload_timeout_s=PREFETCH_UNLOAD_S
            )
        except (ModelError, StorageFull) as error:
            log.debug("no load ahead of %s: %s", plan.model, error)

    def _attempt(self, running: _Running) -> Finished:
        stored, model = running.stored, running.decision.model
        task = stored.task
        running.meter = self._meter()
        stream = self._stream(stored) if task.stream else None
        if stored.partial and not self._is_continued(running):  # another model had begun it
            stored = running.stored = replace(stored, partial="", partial_tokens=0)

        asked_at = self._clock.monotonic()

        def on_text(text: str) -> None:
            reached("token_received")
            if stream:
                stream.add(text)
            now = self._clock.monotonic()
            if not text[-1:].isspace():  # white space is not kept
                running.worth_it_at = min(running.worth_it_at, now + (now - asked_at))
            if self._awake.is_set() or (running.is_waited_for and now >= self._makes_way_at(running)):
                self._look_up(running)

        reached("generation_due")
        answer = self._ollama.generate(
            self._generation(stored, model),
            deadlines=self._deadlines(stored, model),
            on_text=on_text,
            interrupt=running.interrupt,
        )
        reached("generation_done")
        self._pool.used(model)
        if self._breakers.succeeded(model):
            self._hooks.event("breaker_closed", "info", {"model": model})
        self._learn(task, model, answer)
        result = self._result(running, **answers.outcome(stored, answer))
        return self._finished(running, result, answer)

    def _deadlines(self, stored: Stored, model: str) -> Deadlines:
        """Its first token may take twice as long as a prompt like this is expected to.

        A load is allowed for: Ollama lists a model as resident whose process was killed, and loads it again unasked.
        """
        limits = self._rules.deadlines
        prefill_s = self._estimates.prefill_s(model, stored.task.prompt_tokens + stored.partial_tokens)
        expected_s = self._estimates.load_s(model) + prefill_s
        return replace(limits, first_token_s=max(limits.first_token_s, 2 * expected_s))

    def _stream(self, stored: Stored) -> answers.Stream:
        """The same one over all runs of a task, so that its numbers go on rising."""
        if stored.seq not in self._streams:
            # The runs before a restart have sent no more chunks than tokens.
            self._streams[stored.seq] = answers.Stream(
                stored.task.address, self._hooks.stream, seq=stored.partial_tokens
            )
        return self._streams[stored.seq]

    def _look_up(self, running: _Running) -> None:
        """Something has arrived while a task runs: it may have to make way, or another model be loaded meanwhile."""
        self._awake.clear()
        if self._stopping.is_set():
            return
        running.is_waited_for = self._is_waited_for(running.stored.task)
        if running.is_waited_for and self._clock.monotonic() >= self._makes_way_at(running):
            running.interrupt.set("preempted")
        else:
            self._prefetch(running.decision.model)

    def _is_waited_for(self, task: Task) -> bool:
        if not (self._rules.preempt and task.preemptible and self._store.depth()[Priority.URGENT]):
            return False
        return preempts(self._for_urgent(self._view(self._store.heads())), task.priority)

    def _makes_way_at(self, running: _Running) -> float:
        """The time from which on a task may be interrupted for an urgent one.

        It makes way at once a few times. After that one that would begin anew never does, and one that is continued
        has to be worth the reading of its prompt, so that at least half of its time is of use.
        """
        if running.stored.preempted < MAKES_WAY_AT_ONCE:
            return float("-inf")
        return running.worth_it_at if self._is_continued(running) else float("inf")

    def _is_continued(self, running: _Running) -> bool:
        """Whether it goes on where it was interrupted. An answer in a format begins anew, and not every model can."""
        return running.stored.task.format is None and self._rules.continues(running.decision.model)

    def _generation(self, stored: Stored, model: str) -> Generation:
        task = stored.task
        num_predict = max(1, task.max_tokens - stored.partial_tokens)
        messages = task.messages or (Message(role="user", content=task.prompt or ""),)
        if stored.partial:
            messages = answers.continued(messages, stored.partial)
        return Generation(
            model=self._pool.catalogue.spelling(model),
            messages=messages,
            system=task.system,
            options={**self._pool.options(model), **task.options, "num_predict": num_predict},
            format=task.format,
            keep_alive_s=self._pool.lease_s(model),
            truncate=bool(stored.partial),  # what was begun is not given up for having grown
            think=self._rules.think(model),
        )

    def _learn(self, task: Task, model: str, answer: Answer) -> None:
        self._estimates.answered(
            model,
            task_type=task.task_type,
            prompt_tokens=answer.prompt_tokens,
            prefill_s=answer.prompt_eval_ns / 1e9,
            output_tokens=answer.output_tokens,
            decode_s=answer.eval_ns / 1e9,
            run_s=answer.wall_s,
        )

    def _advance(self, decision: Decision, *, load_s: float = 0.0, run_s: float = 0.0) -> None:
        """Take note of a load or a run that has ended now."""
        now = self._clock.monotonic()
        self._turn = advance(
            self._turn,
            decision,
            load_s=load_s,
            run_s=run_s,
            idle_s=now - self._ended_at - load_s - run_s,
            policy=self._rules.scheduler,
        )
        self._ended_at = now

    # -- ending

    def _interrupted(self, running: _Running, error: Interrupted) -> Finished | None:
        """It was cancelled, or has to wait: then what there is of it is kept, and continued later."""
        stored = running.stored
        self._look_again()
        if error.reason == "cancelled":
            text = stored.partial + answers.clean(error.partial)
            return self._finished(running, self._result(running, state=TaskState.CANCELLED, text=text or None))
        partial, tokens = self._kept(running, error)
        if stored.seq in self._streams:
            self._streams[stored.seq].take_back()
        waiting = self._stored(lambda: self._store.put_aside(stored.seq, partial=partial, partial_tokens=tokens))
        extra = _about(Kind.TASK_PUT_ASIDE, stored, running.decision.model)
        log.info("task %s/%s put aside (%s) after %d tokens", *stored.task.key, error.reason, tokens, extra=extra)
        self._hooks.event("task_put_aside", "info", self._put_aside_data(running, error, tokens))
        if waiting:
            self._tell(waiting, TaskState.QUEUED)
        return None

    def _kept(self, running: _Running, error: Interrupted) -> tuple[str, int]:
        """The text to continue from, and its tokens: one token at least is left to be written."""
        stored = running.stored
        if not self._is_continued(running):
            return "", 0
        text, tokens = answers.kept(error.pieces[: stored.task.max_tokens - stored.partial_tokens - 1])
        return stored.partial + text, stored.partial_tokens + tokens

    def _put_aside_data(self, running: _Running, error: Interrupted, kept: int) -> dict[str, Any]:
        stored = running.stored
        return {
            "id": stored.task.id,
            "src": stored.task.src,
            "model": running.decision.model,
            "reason": error.reason,
            "tokens": kept,
            "lost_tokens": stored.partial_tokens + error.tokens - kept,
            "run_s": round(self._clock.monotonic() - running.began_at, 3),
        }

    def _failed(self, running: _Running, error: ModelError) -> Finished | None:
        """Try again later, or end it."""
        stored, model = running.stored, running.decision.model
        if self._try_again(stored, model, error):
            counted = not isinstance(error, OllamaBusy)
            outlook = f"attempt {stored.attempt} of {self._rules.max_attempts}" if counted else "it keeps its place"
            extra = _about(Kind.TASK_RETRIED, stored, model)
            log.warning("task %s/%s on %s: %s; %s", *stored.task.key, model, error, outlook, extra=extra)
            if stored.seq in self._streams:  # so that no part of the stream is of two attempts
                self._streams[stored.seq].take_back()
            if waiting := self._stored(lambda: self._store.release(stored.seq, counted=counted)):
                self._tell(waiting, TaskState.QUEUED)
            return None
        state = TaskState.TIMED_OUT if isinstance(error, DeadlineExceeded) else TaskState.FAILED
        text = stored.partial + answers.clean(error.partial)
        return self._finished(running, self._result(running, state=state, text=text or None, error=Failure.of(error)))

    def _model_failed(self, model: str, error: ModelError) -> None:
        """Let it rest, and tell when its breaker opens."""
        if isinstance(error, BadRequest):
            return  # the task is to blame
        if isinstance(error, ModelMissing):
            self._pool.catalogue.forget(model)
        was_open = self._breakers.is_open(model)
        rest_s = self._breakers.failed(model, self._clock.monotonic(), weight=_weight(error))
        if self._breakers.is_open(model) and not was_open:
            extra = about(Kind.MODEL_RESTS, model=model)
            log.error("%s failed too often in a row: it rests for %.0f s", model, rest_s, extra=extra)
            self._hooks.event("breaker_opened", "error", {"model": model, "rest_s": rest_s, "error": str(error)})

    def _try_again(self, stored: Stored, model: str, error: ModelError) -> bool:
        if isinstance(error, OllamaBusy):
            return True
        if stored.attempt >= self._rules.max_attempts:
            return False
        if isinstance(error, DaemonDied) or (isinstance(error, DeadlineExceeded) and error.stage == "load"):
            return True
        return error.retryable or self._stand_in(stored.task.model, stored.task.fallback) != model

    def _unrun(self, stored: Stored, state: TaskState) -> Finished:
        """The end of a task that does not run."""
        waited_s = round(self._clock.monotonic() - stored.accepted_at, 6)
        result = self._terminal(stored, state=state, text=stored.partial or None, queued_s=waited_s, total_s=waited_s)
        return Finished(stored=stored, result=result)

    def _end_waiting(self, waiting: Sequence[Stored], state: TaskState) -> list[Finished]:
        """End tasks by one commit, with the lock held, and so without waiting for room. Returns what is to be told."""
        ends = {stored.seq: self._unrun(stored, state) for stored in waiting}
        ended = self._store.finish_many({seq: end.result for seq, end in ends.items()})
        return [ends[seq] for seq in ended]

    def _end(self, finished: Finished) -> None:
        """End the task that ran."""
        seq = finished.stored.seq
        if stream := self._streams.get(seq):
            stream.send_rest()
        if self._stored(lambda: self._store.finish(seq, finished.result)):
            self._tell_ended([finished])

    def _tell_ended(self, ended: Iterable[Finished]) -> None:
        """Only what is stored is told: until then the end may not come, and the text go on."""
        for finished in ended:
            if stream := self._streams.pop(finished.stored.seq, None):
                stream.close()
            self._hooks.finished(finished)
            reached("result_told")

    def _stored(self, change: Callable[[], T]) -> T:
        """What ``change`` in the store returns. On a full disk the worker waits for room, to lose nothing of a run.

        Nothing that others wait for may be held meanwhile: room may be long in coming.
        """
        while True:
            try:
                return change()
            except StorageFull as error:
                if self._stopping.is_set():
                    raise
                log.error("waiting for room to keep a result: %s", error)  # noqa: TRY400
            self._stopping.wait(FULL_DISK_PAUSE_S)
            self.beat()

    def _finished(self, running: _Running, result: Result, answer: Answer | None = None) -> Finished:
        return Finished(
            stored=running.stored,
            result=result,
            decision=running.decision,
            ensured=running.ensured,
            answer=answer,
            usage=running.meter.finish() if running.meter else None,
        )

    def _result(self, running: _Running, **fields: Any) -> Result:
        now = self._clock.monotonic()
        total_s = round(now - running.stored.accepted_at, 6)
        run_s = round(now - running.began_at, 6)
        load_s = round(running.ensured.load_s, 6) if running.ensured else None
        return self._terminal(
            running.stored,
            model=running.decision.model,
            swapped=bool(running.ensured and running.ensured.evicted),
            queued_s=round(max(0.0, total_s - (load_s or 0.0) - run_s), 6),
            load_s=load_s,
            run_s=run_s,
            total_s=total_s,
            **fields,
        )

    def _terminal(self, stored: Stored, *, state: TaskState, **fields: Any) -> Result:
        task = stored.task
        return Result(
            id=task.id,
            src=task.src,
            seq=status_seq(stored.runs, state),
            state=state,
            task_type=task.task_type,
            model_requested=task.model_requested,
            attempt=stored.attempt,
            preempted=stored.preempted,
            meta=task.meta,
            ts=iso(self._clock.wall()),
            **fields,
        )

    def _tell(self, stored: Stored, state: TaskState) -> None:
        status = Status(
            id=stored.task.id,
            src=stored.task.src,
            state=state,
            seq=status_seq(stored.runs, state),
            ts=iso(self._clock.wall()),
            attempt=stored.attempt,
        )
        self._hooks.status(stored.task.address, status)


def _about(kind: Kind, stored: Stored, model: str) -> dict[str, Any]:
    return about(kind, task_id=stored.task.id, src=stored.task.src, model=model)


def _weight(error: ModelError) -> int:
    """How much a failure speaks against the model that was to answer."""
    if isinstance(error, OllamaBusy | OllamaDown | NoRoom | Repetitive):
        return 0
    if isinstance(error, DaemonDied):
        return error.times
    return TRIPS_AFTER if isinstance(error, NoMemory | ModelBroken) else 1
