"""The loop: choose, ensure, run, finish. One thread, because one board runs one generation at a time.

It alone changes the model pool and runs tasks. What others ask of it (``cancel``, ``stop``, ``wake``) only sets flags
and interrupts; it acts on them at the next token.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from edge_daemon import schema
from edge_daemon.clock import Clock, iso
from edge_daemon.errors import DeadlineExceeded, ModelError
from edge_daemon.estimates import Estimates
from edge_daemon.messages import (
    Address,
    Failure,
    Message,
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
from edge_daemon.scheduler import Decision, Head, Turn, View, advance, choose
from edge_daemon.scheduler import Policy as SchedulerPolicy
from edge_daemon.store import Store, Waiting
from edge_daemon.telemetry import TaskMeter, TaskUsage

log = logging.getLogger(__name__)

BEAT_S = 10.0
"""The longest that the loop waits for something to happen."""
LOOK_S = 1.0
"""How old the knowledge of what is resident may be when a decision is made."""
CHUNK_S = 0.25
"""Streamed text is sent about four times a second."""
MAX_HOLD_S = 60.0
"""A model that failed rests this long at most before it is tried again."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLimits:
    """Bounds of one run."""

    deadlines: Deadlines
    max_attempts: int


@dataclass(slots=True, kw_only=True)
class _Running:
    """The task at hand. A cancel stops its generation; a load serves others too, and stops only with the daemon."""

    stored: Stored
    decision: Decision
    began_at: float
    interrupt: Interrupt = field(default_factory=Interrupt)
    load_interrupt: Interrupt = field(default_factory=Interrupt)
    ensured: Ensured | None = None


class Worker(threading.Thread):
    """Runs tasks until it is stopped.

    Args:
        store: where tasks wait and results go.
        pool: what is in memory.
        ollama: runs the generations.
        estimates: what is known of the models' speed.
        scheduler: the policy of ``choose``.
        limits: deadlines and attempts.
        can_think: whether a model has to be told not to think aloud.
        meter: measures the board while a task runs.
    """

    def __init__(
        self,
        *,
        store: Store,
        pool: ModelPool,
        ollama: Ollama,
        estimates: Estimates,
        scheduler: SchedulerPolicy,
        limits: RunLimits,
        can_think: Callable[[str], bool],
        meter: Callable[[], TaskMeter],
        clock: Clock,
        hooks: Hooks,
        preload: tuple[str, ...] = (),
    ) -> None:
        super().__init__(name="worker", daemon=True)
        self.beats = 0
        self.turn: Turn | None = None
        self._store = store
        self._pool = pool
        self._ollama = ollama
        self._estimates = estimates
        self._scheduler = scheduler
        self._limits = limits
        self._can_think = can_think
        self._meter = meter
        self._clock = clock
        self._hooks = hooks
        self._preload = list(preload)
        self._awake = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards _running, so that a cancel meets the task either waiting or running
        self._running: _Running | None = None
        self._ended_at = clock.monotonic()
        self._looked_at = float("-inf")
        self._ollama_up: bool | None = None
        self._failures = 0
        self._holds: dict[str, tuple[float, float]] = {}  # models that failed: until when they rest, for how long

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

    def cancel(self, src: str | None, task_id: str) -> None:
        """End a task, whether it waits or runs; one that has ended or is not known is left alone."""
        found = [self._store.find(src, task_id)] if src is not None else self._store.find_open(task_id)
        for stored in found:
            if stored is not None and stored.result is None:
                self._cancel(stored)

    def _cancel(self, stored: Stored) -> None:
        with self._lock:
            if self._running is not None and self._running.stored.seq == stored.seq:
                self._running.interrupt.set("cancelled")
                return
            self._end_unrun(stored, TaskState.CANCELLED)

    def stop(self, *, drain_s: float) -> None:
        """Take no further task; let the running one finish within ``drain_s``, then set it back. Returns at the end."""
        self._stopping.set()
        self._awake.set()
        self.join(drain_s)
        self.hurry()
        self.join()

    def hurry(self) -> None:
        """Set the running task back now."""
        self._stopping.set()
        self._awake.set()
        with self._lock:
            if self._running is not None:
                self._running.load_interrupt.set("stopped")
                self._running.interrupt.set("stopped")

    # -- the loop

    def run(self) -> None:
        """The thread."""
        try:
            while not self._stopping.is_set():
                self.beat()
                self._awake.clear()
                pause_s = self._turn()
                if pause_s > 0:
                    self._awake.wait(min(pause_s, BEAT_S))
        except Exception:
            # Nobody above could handle it: main sees that the thread is gone and ends the process.
            log.exception("the worker failed")

    def _turn(self) -> float:
        """Do one thing. Returns the seconds after which to look again if nothing happens, 0 for at once."""
        self._expire()
        if not self._look():
            return min(30.0, 2.0 ** min(self._failures, 5) / 2)
        if self._preload:
            self._load_ahead(self._preload.pop(0))
            return 0
        waiting = self._store.heads()
        decision = choose(self._view(waiting))
        if decision is None:
            return self._idle(waiting)
        self._run(decision)
        return 0

    def _look(self) -> bool:
        """See what is resident. False when Ollama does not answer."""
        if self._clock.monotonic() - self._looked_at < LOOK_S:
            return True
        try:
            self._pool.refresh()
        except ModelError as error:
            self._failures += 1
            self._ollama_is(up=False, why=str(error))
            return False
        self._looked_at = self._clock.monotonic()
        self._failures = 0
        self._ollama_is(up=True)
        return True

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
        try:
            due = [self._pool.sweep(head.model for head in waiting)]
        except ModelError as error:
            log.warning("could not unload: %s", error)
            self._looked_at = float("-inf")
            return 1.0
        now = self._clock.monotonic()
        expiry = self._store.next_expiry()
        due.append(None if expiry is None else expiry - now)
        due += [until - now for until, _ in self._holds.values() if until > now]
        return max(0.01, min((seconds for seconds in due if seconds is not None), default=BEAT_S))

    def _load_ahead(self, model: str) -> None:
        try:
            self._pool.ensure(model, reason="preload")
        except ModelError as error:
            log.warning("could not preload %s: %s", model, error)

    # -- choosing

    def _view(self, waiting: tuple[Waiting, ...]) -> View:
        now = self._clock.monotonic()
        rested = [head for head in waiting if self._holds.get(head.model, (0.0, 0.0))[0] <= now]
        resident = self._pool.resident()
        models = {head.model for head in rested} | {r.model for r in resident}
        return View(
            heads=tuple(self._head(head, now) for head in rested),
            resident=resident,
            costs={model: self._pool.cost(model) for model in sorted(models)},
            budget_bytes=self._pool.room_bytes(),
            turn=self.turn,
            max_resident=self._pool.limits.max_resident,
            policy=self._scheduler,
        )

    def _head(self, waiting: Waiting, now: float) -> Head:
        run_s = self._estimates.run_s(
            waiting.model,
            task_type=waiting.task_type,
            prompt_tokens=waiting.prompt_tokens,
            max_tokens=waiting.max_tokens,
        )
        return Head(
            seq=waiting.seq,
            model=waiting.model,
            priority=waiting.priority,
            waited_s=now - waiting.accepted_at,
            run_s=run_s,
            count=waiting.count,
            expires_in_s=waiting.expires_at - now,
        )

    # -- running

    def _run(self, decision: Decision) -> None:
        running = self._claim(decision)
        if running is None:
            return
        log.debug("task %d begins on %s (%s)", decision.seq, decision.model, decision.reason)
        self._tell(running.stored, TaskState.RUNNING)
        finished: Finished | None
        try:
            finished = self._attempt(running)
        except Interrupted as error:
            finished = self._interrupted(running, error)
        except ModelError as error:
            finished = self._failed(running, error)
        self._advance(running)
        with self._lock:
            self._running = None
        if finished is not None:
            self._end(finished)

    def _claim(self, decision: Decision) -> _Running | None:
        with self._lock:
            stored = self._store.claim(decision.seq)
            if stored is None:
                return None
            self._running = _Running(stored=stored, decision=decision, began_at=self._clock.monotonic())
            if self._stopping.is_set():
                self._running.load_interrupt.set("stopped")
            return self._running

    def _attempt(self, running: _Running) -> Finished:
        task, decision = running.stored.task, running.decision
        running.ensured = self._pool.ensure(
            decision.model, evict=decision.evict, reason=decision.reason, interrupt=running.load_interrupt
        )
        meter = self._meter()
        stream = _Stream(task.address, self._hooks.stream) if task.stream else None
        answer = self._ollama.generate(
            self._generation(task, decision.model),
            deadlines=self._limits.deadlines,
            on_text=stream.add if stream else _ignore,
            interrupt=running.interrupt,
        )
        if stream:
            stream.close()
        self._pool.used(decision.model)
        self._holds.pop(decision.model, None)
        self._learn(task, decision.model, answer)
        result = self._result(running, **_outcome(task, answer))
        return self._finished(running, result, answer=answer, usage=meter.finish())

    def _generation(self, task: Task, model: str) -> Generation:
        options = {**self._pool.options(model), **task.options, "num_predict": task.max_tokens}
        messages = task.messages or (Message(role="user", content=task.prompt or ""),)
        return Generation(
            model=model,
            messages=messages,
            system=task.system,
            options=options,
            format=task.format,
            keep_alive_s=self._pool.lease_s(model),
            can_think=self._can_think(model),
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

    def _advance(self, running: _Running) -> None:
        now = self._clock.monotonic()
        load_s = running.ensured.load_s if running.ensured else 0.0
        self.turn = advance(
            self.turn,
            running.decision,
            load_s=load_s,
            run_s=max(0.0, now - running.began_at - load_s),
            idle_s=max(0.0, running.began_at - self._ended_at),
            policy=self._scheduler,
        )
        self._ended_at = now

    # -- ending

    def _interrupted(self, running: _Running, error: Interrupted) -> Finished | None:
        self._looked_at = float("-inf")
        if error.reason == "cancelled":
            result = self._result(running, state=TaskState.CANCELLED, text=_clean(error.partial) or None)
            return self._finished(running, result)
        self._store.release(running.stored.seq, forgive=True)
        self._tell(replace(running.stored, attempt=running.stored.attempt - 1), TaskState.QUEUED)
        return None

    def _failed(self, running: _Running, error: ModelError) -> Finished | None:
        """Try again later, or end it."""
        stored, model = running.stored, running.decision.model
        self._looked_at = float("-inf")
        if error.retryable and stored.attempt < self._limits.max_attempts:
            pause_s = min(MAX_HOLD_S, 2 * self._holds.get(model, (0.0, 0.25))[1])
            self._holds[model] = (self._clock.monotonic() + pause_s, pause_s)
            attempts = f"attempt {stored.attempt} of {self._limits.max_attempts}"
            log.warning("task %s/%s on %s: %s; %s", *stored.task.key, model, error, attempts)
            self._store.release(stored.seq)
            self._tell(stored, TaskState.QUEUED)
            return None
        state = TaskState.TIMED_OUT if isinstance(error, DeadlineExceeded) else TaskState.FAILED
        result = self._result(running, state=state, text=_clean(error.partial) or None, error=Failure.of(error))
        return self._finished(running, result)

    def _expire(self) -> None:
        for stored in self._store.expired():
            self._end_unrun(stored, TaskState.EXPIRED)

    def _end_unrun(self, stored: Stored, state: TaskState) -> None:
        waited_s = self._clock.monotonic() - stored.accepted_at
        result = self._terminal(stored, state=state, queued_s=round(waited_s, 6), total_s=round(waited_s, 6))
        self._end(Finished(stored=stored, result=result))

    def _end(self, finished: Finished) -> None:
        if self._store.finish(finished.stored.seq, finished.result):
            self._hooks.finished(finished)

    def _finished(self, running: _Running, result: Result, **how: Any) -> Finished:
        return Finished(stored=running.stored, result=result, decision=running.decision, ensured=running.ensured, **how)

    def _result(self, running: _Running, **fields: Any) -> Result:
        now = self._clock.monotonic()
        total_s = now - running.stored.accepted_at
        load_s = running.ensured.load_s if running.ensured else 0.0
        run_s = max(0.0, now - running.began_at - load_s)
        return self._terminal(
            running.stored,
            model=running.decision.model,
            swapped=bool(running.ensured and running.ensured.evicted),
            queued_s=round(max(0.0, total_s - load_s - run_s), 6),
            load_s=round(load_s, 6),
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
        self._seq = 0
        self._sent_at = time.monotonic()

    def add(self, text: str) -> None:
        """Send what has gathered, when it is time."""
        self._text += text
        if time.monotonic() - self._sent_at >= CHUNK_S:
            self._flush()

    def close(self) -> None:
        """Send the rest and say that it is the end."""
        if self._text:
            self._flush()
        self._seq += 1
        self._send(self._address, {"seq": self._seq, "done": True})

    def _flush(self) -> None:
        self._seq += 1
        self._send(self._address, {"seq": self._seq, "text": self._text})
        self._text, self._sent_at = "", time.monotonic()


def _ignore(_text: str) -> None:
    pass


def _clean(text: str) -> str:
    """Text that can be stored and sent: half of a character, as a model may write it, is none."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _outcome(task: Task, answer: Answer) -> dict[str, Any]:
    """The part of a result that the answer decides."""
    decode_s = answer.eval_ns / 1e9
    fields: dict[str, Any] = {
        "state": TaskState.SUCCEEDED,
        "text": _clean(answer.text),
        "done_reason": answer.done_reason,
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "tokens_per_s": round(answer.output_tokens / decode_s, 3) if decode_s > 0 else None,
        "truncated": answer.truncated,
    }
    if task.format is not None:
        fields |= _parsed(task.format, answer)
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
