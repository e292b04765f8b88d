"""The loop: choose, load, run, finish. One thread, because one board runs one generation at a time.

It alone changes the model pool and runs tasks. What others ask of it (``cancel``, ``stop``, ``wake``) only sets flags
and interrupts; it acts on them at the next token.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from edge_daemon import schema
from edge_daemon.breaker import TRIPS_AFTER, Breakers
from edge_daemon.clock import Clock, iso
from edge_daemon.errors import (
    BadRequest,
    DeadlineExceeded,
    ModelBroken,
    ModelError,
    ModelMissing,
    NoMemory,
    NoRoom,
    OllamaBusy,
    OllamaDown,
    StorageFull,
)
from edge_daemon.estimates import Estimates
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
    compact,
    status_seq,
)
from edge_daemon.model_pool import Ensured, ModelPool
from edge_daemon.ollama import Answer, Deadlines, Generation, Interrupt, Interrupted, Ollama
from edge_daemon.scheduler import (
    Cost,
    Decision,
    Head,
    Policy,
    Turn,
    View,
    advance,
    choose,
    estimate_wait,
    preempts,
    prefetch,
)
from edge_daemon.store import Store, Waiting
from edge_daemon.telemetry import TaskMeter, TaskUsage

log = logging.getLogger(__name__)

T = TypeVar("T")

BEAT_S = 15.0
"""The longest that the loop waits for something to happen."""
LOOK_S = 1.0
"""How old the knowledge of what is resident may be when a decision is made."""
CHUNK_S = 0.25
"""Streamed text is sent about four times a second."""
FULL_DISK_PAUSE_S = 5.0
"""So often it is tried whether a full disk has room again."""
LONGEST_PAUSE_S = 30.0
"""Ollama is asked again at least this often while it does not answer."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How tasks are run."""

    deadlines: Deadlines
    max_attempts: int
    scheduler: Policy
    preempt: bool = True
    prefetch: bool = True
    can_think: Callable[[str], bool] = lambda _model: False
    """Whether a model has to be told not to think aloud."""
    fallbacks: Callable[[str], Sequence[str]] = lambda _model: ()
    """The models that may answer for one that cannot, in this order."""


@dataclass(slots=True, kw_only=True)
class _Running:
    """The task at hand."""

    stored: Stored
    decision: Decision
    began_at: float
    ensured: Ensured | None
    """The load that was done for it; None when its model could not be loaded."""
    meter: TaskMeter | None = None
    interrupt: Interrupt = field(default_factory=Interrupt)
    cancelled: bool = False
    """Its interrupt may have come too late, or for another reason first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ordered:
    """A load on its way, that a task waits for."""

    decision: Decision
    began_at: float


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
        rules: Rules,
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
        self._preload = list(preload)
        self._awake = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards _running, so that a cancel meets the task either waiting or running
        self._running: _Running | None = None
        self._turn: Turn | None = None
        self._ended_at = clock.monotonic()
        self._looked_at = float("-inf")
        self._ollama_up: bool | None = None
        self._unanswered = 0
        self._breakers = Breakers()
        self._streams: dict[int, _Stream] = {}  # of tasks that have begun, by seq
        self._fresh: dict[str, Ensured] = {}  # loads that no task has made use of yet
        self._ordered: _Ordered | None = None
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

    def cancel(self, src: str | None, task_id: str) -> None:
        """End a task, whether it waits or runs; one that has ended or is not known is left alone."""
        found = [self._store.find(src, task_id)] if src is not None else self._store.find_open(task_id)
        for stored in found:
            if stored is not None and stored.result is None:
                with suppress(StorageFull):  # it goes on, as if nobody had asked
                    self._cancel(stored)

    def _cancel(self, stored: Stored) -> None:
        with self._lock:
            if self._running is not None and self._running.stored.seq == stored.seq:
                self._running.cancelled = True
                self._running.interrupt.set("cancelled")
                return
            self._end_unrun(stored, TaskState.CANCELLED)

    def expire(self) -> None:
        """End the waiting tasks whose time to live has passed; any thread may ask, also while another task runs."""
        with self._lock, suppress(StorageFull):  # they are found again
            for stored in self._store.expired():
                self._end_unrun(stored, TaskState.EXPIRED)

    def stop(self, *, drain_s: float, beat: Callable[[], None] = lambda: None) -> None:
        """Take no further task; let the running one finish within ``drain_s``, else put it aside. Then return.

        ``beat`` is called every second while that takes.
        """
        self._stopping.set()
        self._awake.set()
        if self._running is None:
            self._pool.interrupt_load("stopped")
        deadline = self._clock.monotonic() + drain_s
        while self.is_alive():
            if self._clock.monotonic() >= deadline:
                self.hurry()
            self.join(min(1.0, max(0.01, deadline - self._clock.monotonic())))
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
            while not self._stopping.is_set():
                self.beat()
                self._awake.clear()
                try:
                    pause_s = self._step()
                except StorageFull as error:
                    log.error("no task can be begun: %s", error)  # noqa: TRY400
                    pause_s = FULL_DISK_PAUSE_S
                if pause_s > 0:
                    self._awake.wait(min(pause_s, BEAT_S))
        except Exception:
            # Nobody above could handle it: main sees that the thread is gone and ends the process.
            log.exception("the worker failed")

    def _step(self) -> float:
        """Do one thing. Returns the seconds after which to look again if nothing happens, 0 for at once."""
        self.expire()
        self._settle()
        if not self._look():
            return min(LONGEST_PAUSE_S, 2.0 ** min(self._unanswered, 5) / 2)
        if self._preload:
            self._load_ahead(self._preload.pop(0))
            return 0
        waiting = self._store.heads()
        decision = choose(self._view(waiting)) if waiting else None
        if decision is None:
            return self._idle(waiting)
        if decision.not_before_s > 0:
            return decision.not_before_s
        if decision.model == self._pool.loading:
            return 0  # it has come in this moment: take note of that first
        if any(resident.model == decision.model for resident in self._pool.resident()):
            self._run(decision)
            return 0
        if self._pool.loading is not None:
            # One load at a time; the end of this one wakes us.
            if decision.reason == "urgent" and not (self._ordered and self._ordered.decision.reason == "urgent"):
                self._pool.interrupt_load("urgent")
            return BEAT_S
        self._load(decision)
        return 0

    def _look(self) -> bool:
        """See what is resident. False when Ollama does not answer."""
        if self._clock.monotonic() - self._looked_at < LOOK_S:
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
            log.info("Ollama answers")
        else:
            log.warning("Ollama does not answer (%s); tasks wait until it does", why)
        self._ollama_up = up
        self._hooks.ollama(up)

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

    # -- choosing

    def _view(self, waiting: Iterable[Waiting], *, also: Iterable[str] = ()) -> View:
        """The world as the scheduler sees it. ``also``: models whose cost is wanted though no task waits for them."""
        now = self._clock.monotonic()
        resident = self._pool.resident()
        served = [(head, model) for head in waiting if (model := self._served_by(head.model, now))]
        models = {model for _, model in served} | {r.model for r in resident} | set(also)
        return View(
            heads=tuple(self._head(head, model, now) for head, model in served),
            resident=resident,
            costs={model: self._cost(model, now) for model in sorted(models)},
            budget_bytes=self._pool.room_bytes(),
            turn=self._turn,
            max_resident=self._pool.limits.max_resident,
            policy=self._rules.scheduler,
        )

    def _served_by(self, model: str, now: float) -> str | None:
        """The model that is to answer for ``model``: itself, or a fallback while it fails; None when it has to rest.

        A model on its way into memory takes no task before it is there, so that resident ones go on meanwhile.
        """
        model = self._stand_in(model)
        return model if self._breakers.may_try(model, now) and model != self._pool.awaited else None

    def _stand_in(self, model: str) -> str:
        """The first of ``model`` and its fallbacks that works, or may be tried anew; itself when none does."""
        now = self._clock.monotonic()

        def works(name: str) -> bool:
            is_probed = name != self._pool.loading and self._breakers.may_try(name, now)
            return not self._pool.is_missing(name) and (is_probed or not self._breakers.is_open(name))

        return next(filter(works, (model, *self._rules.fallbacks(model))), model)

    def _cost(self, model: str, now: float) -> Cost:
        cost = self._pool.cost(model)
        rate = self._estimates.rate_per_s(model, now)
        return Cost(load_s=cost.load_s, size_bytes=cost.size_bytes, run_s=cost.run_s, rate_per_s=rate)

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

    # -- loading

    def _load(self, decision: Decision) -> None:
        """Begin to load the model of ``decision``. Resident ones go on meanwhile, and its end is decided upon anew."""
        model = decision.model
        if reason := self._alone.pop(model, None):
            decision = replace(decision, evict=self._pool.evictable(), reason=reason)
        self._ordered = _Ordered(decision=decision, began_at=self._clock.monotonic())
        try:
            self._pool.start_loading(model, evict=decision.evict, reason=decision.reason)
        except ModelError as error:
            self._load_failed(model, error)

    def _load_ahead(self, model: str) -> None:
        try:
            self._loaded(self._pool.ensure(model, reason="preload"))
        except (ModelError, Interrupted) as error:
            log.warning("could not preload %s: %s", model, error)

    def _settle(self) -> None:
        """Take note of a load that has ended."""
        model = self._pool.loading or ""
        try:
            ensured = self._pool.settle()
        except Interrupted:
            self._ordered = None
            return
        except ModelError as error:
            self._load_failed(model, error)
            return
        if ensured is None:
            return
        self._loaded(ensured)
        ordered, self._ordered = self._ordered, None
        if ordered:
            self._advance(ordered.decision, load_s=ensured.load_s, began_at=ordered.began_at)

    def _loaded(self, ensured: Ensured) -> None:
        if ensured.load_s > 0:
            self._fresh[ensured.model] = ensured

    def _load_failed(self, model: str, error: ModelError) -> None:
        """A failed load counts as an attempt of the task that it was for, unless another model answers for it now."""
        log.warning("could not load %s: %s", model, error)
        self._look_again()
        ordered, self._ordered = self._ordered, None
        if isinstance(error, DeadlineExceeded) and error.stage == "load":
            self._stuck(model, error)
        if isinstance(error, NoMemory) and not isinstance(error, NoRoom) and self._pool.evictable():
            self._alone[model] = "killed"
            if ordered:
                self._load(ordered.decision)
            return
        self._model_failed(model, error)
        if ordered is None or self._stand_in(model) != model:
            return  # no task has lost anything by it
        running = self._claim(ordered.decision)
        if running is not None and not self._is_poison(running):
            running.ensured = None
            self._conclude(running, self._failed(running, error))

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
        log.debug("task %d begins on %s (%s)", decision.seq, decision.model, decision.reason)
        self._tell(running.stored, TaskState.RUNNING)
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
        self._advance(decision, began_at=running.began_at)
        self._conclude(running, finished)

    def _claim(self, decision: Decision) -> _Running | None:
        with self._lock:
            stored = self._store.claim(decision.seq)
            if stored is None:
                return None
            ensured = self._fresh.pop(decision.model, None) or Ensured(model=decision.model)
            began_at = self._clock.monotonic()
            self._running = _Running(stored=stored, decision=decision, began_at=began_at, ensured=ensured)
            return self._running

    def _is_poison(self, running: _Running) -> bool:
        """Whether all its attempts were spent by dying with us: such a task is ended, not tried for ever."""
        if running.stored.attempt <= self._rules.max_attempts:
            return False
        message = f"begun {self._rules.max_attempts} times without an end: it, or its model, kills what runs it"
        result = self._result(running, state=TaskState.FAILED, error=Failure(code="crash_loop", message=message))
        self._conclude(running, self._finished(running, result))
        return True

    def _conclude(self, running: _Running, finished: Finished | None) -> None:
        with self._lock:
            self._running = None
            if finished is None and running.cancelled:
                self._end_unrun(running.stored, TaskState.CANCELLED)
        if finished is not None:
            self._end(finished)
        elif running.ensured is not None:
            self._loaded(running.ensured)  # the next attempt is the one that the load was for

    def _prefetch(self, running: str) -> None:
        """Load the next model while this one works, if it needs only memory that nobody misses."""
        waiting = self._store.heads()
        if not waiting or not self._rules.prefetch or self._pool.loading is not None:
            return
        plan = prefetch(self._view(waiting), running)
        if plan is None or plan.model in self._alone:
            return
        try:
            self._pool.start_loading(plan.model, evict=plan.evict, reason="prefetch")
        except ModelError as error:
            log.debug("no load ahead of %s: %s", plan.model, error)

    def _attempt(self, running: _Running) -> Finished:
        stored, model = running.stored, running.decision.model
        task = stored.task
        running.meter = self._meter()
        stream = self._stream(stored) if task.stream else None

        def on_text(text: str) -> None:
            if stream:
                stream.add(text)
            if self._awake.is_set():
                self._look_up(running)

        answer = self._ollama.generate(
            self._generation(stored, model),
            deadlines=self._rules.deadlines,
            on_text=on_text,
            interrupt=running.interrupt,
        )
        self._pool.used(model)
        if self._breakers.succeeded(model):
            self._hooks.event("breaker_closed", "info", {"model": model})
        self._learn(task, model, answer)
        result = self._result(running, **_outcome(stored, answer))
        return self._finished(running, result, answer)

    def _stream(self, stored: Stored) -> "_Stream":
        """The same one over all runs of a task, so that its numbers go on rising."""
        if stored.seq not in self._streams:
            self._streams[stored.seq] = _Stream(stored.task.address, self._hooks.stream)
        return self._streams[stored.seq]

    def _look_up(self, running: _Running) -> None:
        """Something has arrived while a task runs: it may have to make way, or another model be loaded meanwhile."""
        self._awake.clear()
        if self._stopping.is_set():
            return
        if self._is_to_make_way(running.stored.task):
            running.interrupt.set("preempted")
        else:
            self._prefetch(running.decision.model)

    def _is_to_make_way(self, task: Task) -> bool:
        if not (self._rules.preempt and task.preemptible and self._store.depth()[Priority.URGENT]):
            return False
        return preempts(self._view(self._store.heads()), task.priority)

    def _generation(self, stored: Stored, model: str) -> Generation:
        task = stored.task
        num_predict = max(1, task.max_tokens - stored.partial_tokens)
        messages = task.messages or (Message(role="user", content=task.prompt or ""),)
        if stored.partial:
            messages = (*messages, Message(role="assistant", content=stored.partial))
        return Generation(
            model=self._pool.catalogue.spelling(model),
            messages=messages,
            system=task.system,
            options={**self._pool.options(model), **task.options, "num_predict": num_predict},
            format=task.format,
            keep_alive_s=self._pool.lease_s(model),
            can_think=self._rules.can_think(model),
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

    def _advance(self, decision: Decision, *, began_at: float, load_s: float = 0.0) -> None:
        now = self._clock.monotonic()
        self._turn = advance(
            self._turn,
            decision,
            load_s=load_s,
            run_s=max(0.0, now - began_at - load_s),
            idle_s=max(0.0, began_at - self._ended_at),
            policy=self._rules.scheduler,
        )
        self._ended_at = now

    # -- ending

    def _interrupted(self, running: _Running, error: Interrupted) -> Finished | None:
        """It was cancelled, or has to wait: then what there is of it is kept, and continued later."""
        stored = running.stored
        self._look_again()
        if error.reason == "cancelled":
            text = stored.partial + _clean(error.partial)
            return self._finished(running, self._result(running, state=TaskState.CANCELLED, text=text or None))
        partial, tokens = self._kept(running, error)
        if stored.seq in self._streams:
            self._streams[stored.seq].take_back()
        waiting = self._stored(lambda: self._store.put_aside(stored.seq, partial=partial, partial_tokens=tokens))
        log.info("task %s/%s put aside (%s) after %d tokens", *stored.task.key, error.reason, tokens)
        self._hooks.event("task_put_aside", "info", self._put_aside_data(running, error, tokens))
        if waiting:
            self._tell(waiting, TaskState.QUEUED)
        return None

    def _kept(self, running: _Running, error: Interrupted) -> tuple[str, int]:
        """The text to continue from, and its tokens.

        It ends where a token does, and not in white space: that would be cut into other tokens when it is read again
        than it was when it was written. An answer in a format, or of a model that thinks, cannot be continued.
        """
        stored = running.stored
        if stored.task.format is not None or self._rules.can_think(running.decision.model):
            return "", 0
        pieces = list(error.pieces[: stored.task.max_tokens - stored.partial_tokens - 1])
        while pieces and pieces[-1][-1:].isspace():
            pieces.pop()
        return stored.partial + _clean("".join(pieces)), stored.partial_tokens + len(pieces)

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
            attempts = f"attempt {stored.attempt} of {self._rules.max_attempts}"
            log.warning("task %s/%s on %s: %s; %s", *stored.task.key, model, error, attempts)
            if waiting := self._stored(lambda: self._store.release(stored.seq)):
                self._tell(waiting, TaskState.QUEUED)
            return None
        state = TaskState.TIMED_OUT if isinstance(error, DeadlineExceeded) else TaskState.FAILED
        text = stored.partial + _clean(error.partial)
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
            log.error("%s failed too often in a row: it rests for %.0f s", model, rest_s)
            self._hooks.event("breaker_opened", "error", {"model": model, "rest_s": rest_s, "error": str(error)})

    def _try_again(self, stored: Stored, model: str, error: ModelError) -> bool:
        if stored.attempt >= self._rules.max_attempts:
            return False
        if isinstance(error, DeadlineExceeded) and error.stage == "load":
            return True
        return error.retryable or self._stand_in(stored.task.model) != model

    def _end_unrun(self, stored: Stored, state: TaskState) -> None:
        waited_s = round(self._clock.monotonic() - stored.accepted_at, 6)
        result = self._terminal(stored, state=state, text=stored.partial or None, queued_s=waited_s, total_s=waited_s)
        self._end(Finished(stored=stored, result=result))

    def _end(self, finished: Finished) -> None:
        if stream := self._streams.pop(finished.stored.seq, None):
            stream.close()
        if self._stored(lambda: self._store.finish(finished.stored.seq, finished.result)):
            self._hooks.finished(finished)

    def _stored(self, change: Callable[[], T]) -> T:
        """What ``change`` in the store returns. On a full disk the worker waits for room, to lose nothing of a run."""
        while True:
            try:
                return change()
            except StorageFull as error:
                if threading.current_thread() is not self or self._stopping.is_set():
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
        total_s = now - running.stored.accepted_at
        run_s = now - running.began_at
        load_s = running.ensured.load_s if running.ensured else 0.0
        return self._terminal(
            running.stored,
            model=running.decision.model,
            swapped=bool(running.ensured and running.ensured.evicted),
            queued_s=round(max(0.0, total_s - load_s - run_s), 6),
            load_s=round(load_s, 6) if running.ensured else None,
            run_s=round(run_s, 6),
            total_s=round(total_s, 6),
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


class _Stream:
    """Text on its way to a sender that wants to see it come."""

    def __init__(self, address: Address, send: Callable[[Address, dict[str, Any]], None]) -> None:
        self._address = address
        self._send = send
        self._text = ""
        self._held = ""
        self._seq = 0
        self._sent_at = float("-inf")

    def add(self, text: str) -> None:
        """Send what has gathered, when it is time. White space waits for a word after it: it may be taken back."""
        self._held += text
        if text[-1:].isspace():
            return
        self._text, self._held = self._text + self._held, ""
        if time.monotonic() - self._sent_at >= CHUNK_S:
            self._flush()

    def take_back(self) -> None:
        """The text is interrupted, and will be continued from its last word."""
        self._held = ""

    def close(self) -> None:
        """Send the rest and say that it is the end."""
        self._text, self._held = self._text + self._held, ""
        if self._text:
            self._flush()
        self._seq += 1
        self._send(self._address, {"seq": self._seq, "done": True})

    def _flush(self) -> None:
        self._seq += 1
        self._send(self._address, {"seq": self._seq, "text": self._text})
        self._text, self._sent_at = "", time.monotonic()


def _weight(error: ModelError) -> int:
    """How much a failure speaks against the model that was to answer."""
    if isinstance(error, OllamaBusy | OllamaDown | NoRoom):
        return 0
    return TRIPS_AFTER if isinstance(error, NoMemory | ModelBroken) else 1


def _clean(text: str) -> str:
    """Text that can be stored and sent: half of a character, as a model may write it, is none."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _outcome(stored: Stored, answer: Answer) -> dict[str, Any]:
    """The part of a result that the answer decides."""
    decode_s = answer.eval_ns / 1e9
    fields: dict[str, Any] = {
        "state": TaskState.SUCCEEDED,
        "text": stored.partial + _clean(answer.text),
        "done_reason": answer.done_reason,
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": stored.partial_tokens + answer.output_tokens,
        "tokens_per_s": round(answer.output_tokens / decode_s, 3) if decode_s > 0 else None,
        "truncated": answer.truncated,
    }
    if stored.task.format is not None:
        fields |= _parsed(stored.task.format, answer)
    return fields


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _parsed(wanted: Any, answer: Answer) -> dict[str, Any]:
    """The answer as JSON, or why it is none."""
    try:
        value = json.loads(answer.text, parse_constant=_no_constant)
        compact(value).encode()  # a lone surrogate or an infinite number could be neither stored nor sent
        problem = schema.problem(value, wanted) if wanted != "json" else None
    except (ValueError, RecursionError) as error:
        limit = "; it was cut at max_tokens" if answer.done_reason == "length" else ""
        value, problem = None, f"answer: not JSON ({error}){limit}"
    if problem is None:
        return {"json": value}
    return {"state": TaskState.FAILED, "error": Failure(code="invalid_output", message=problem, retryable=True)}
