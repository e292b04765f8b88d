"""The daemon: build the parts, start them, keep watch, stop them.

Signals are not handled but waited for: the main thread blocks them all and asks for the next one at every look around,
so that no code of ours ever runs inside a signal handler.
"""

import fcntl
import logging
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_daemon import __version__, systemd
from edge_daemon.clock import Clock, iso
from edge_daemon.config import Config, ModelSettings, mqtt_password
from edge_daemon.errors import AlreadyRunning, ModelMissing, ModelTooLarge, Rejected
from edge_daemon.estimates import Estimates
from edge_daemon.intake import Intake, Rules
from edge_daemon.logger import CsvLog, Timings, event_row, model_row, task_row, telemetry_row
from edge_daemon.messages import Accepted, Address, Event, Priority, Result, Status, Task, compact
from edge_daemon.model_pool import Catalogue, Change, ModelPolicy, ModelPool, PoolLimits, memory_limits
from edge_daemon.mqtt_bridge import Handlers, MqttBridge
from edge_daemon.ollama import Answer, Deadlines, Ollama, normalise
from edge_daemon.scheduler import Policy
from edge_daemon.store import Limits, Store
from edge_daemon.telemetry import (
    Board,
    OllamaState,
    Runners,
    Sampler,
    TaskMeter,
    is_ollama_runner,
    memory_available,
    memory_total,
)
from edge_daemon.worker import Finished, Hooks, Worker
from edge_daemon.worker import Rules as WorkRules

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
BUSY_LOOK_S = 0.5
IDLE_LOOK_S = 5.0
SILENCE_S = 45.0
"""A thread that shows no sign of life for so long is taken for dead."""
PRUNE_S = 600.0
GOODBYE_S = 10.0
"""How long the last messages may take to be confirmed."""


class Daemon:
    """All parts of one running daemon.

    Raises:
        AlreadyRunning: another one uses the same ``data_dir``.
        StoreError: the queue file cannot be used.
    """

    def __init__(self, config: Config, *, clock: Clock | None = None) -> None:
        self.config = config
        self.clock = clock or Clock()
        self._lock = _lock(config.data_dir)
        self._state = ("starting", "")
        self._since = self._started = iso(self.clock.wall())
        self._pulled = ("", "", 0)
        self._broker_up = False
        self._ollama_up = True
        self._unsynced: deque[tuple[int, int]] = deque()  # (row, task) written to the CSV, not known to be on the disk
        self._state_lock = threading.RLock()  # guards _state, _since and _published: several threads tell
        self._csv_lock = threading.Lock()  # guards _unsynced and the order of rows in it
        self._published: dict[str, str] = {}
        self._settings = {normalise(name): config.models.for_model(name) for name in config.models.settings}
        self._build()

    # -- build

    def _build(self) -> None:
        config, clock = self.config, self.clock
        self._board = Board()
        self._runners = Runners(self._board, _is_runner)
        self.store = Store(config.data_dir / "queue.db", clock=clock, limits=_queue_limits(config))
        self.csv = CsvLog(
            config.csv_path,
            rotate_bytes=config.csv.rotate_bytes,
            keep=config.csv.keep,
            text=config.csv.text,
            clock=clock,
        )
        connect_timeout_s = config.ollama.connect_timeout_s
        self.ollama = Ollama(
            config.ollama.url,
            connect_timeout_s=connect_timeout_s,
            max_result_bytes=config.queue.max_result_bytes,
            beat=self._worker_beats,
        )
        self.estimates = Estimates(self.store.learnt(), self.store.learn)
        # The intake asks the catalogue: its waiting is no sign of life of the worker's.
        asking = Ollama(config.ollama.url, connect_timeout_s=connect_timeout_s)
        self.catalogue = Catalogue(asking, clock=clock, estimates=self.estimates, policy=self._policy)
        self.pool = self._build_pool()
        self.worker = self._build_worker()
        handlers = Handlers(
            submit=self._submit,
            refuse=lambda incoming, code, message: self.intake.refuse(
                incoming, code, message, retryable=code == "storage_full"
            ),
            cancel=self.worker.cancel,
            known=lambda src, task_id: self.store.find(src, task_id) is not None,
            unsent=lambda limit, skip: self.store.unsent(limit, skip=skip),
            mark_sent=self.store.mark_sent,
            set_aside=self.store.set_aside,
            mark_acked=self.store.mark_acked,
            on_event=self._on_bridge_event,
        )
        self.bridge = MqttBridge(config, handlers, password=mqtt_password(config))
        rules = Rules(
            config=config,
            clock=clock,
            check_model=self._check_model,
            check_reply_to=self.bridge.check_reply_to,
            eta_s=self._eta_s,
        )
        self.intake = Intake(rules, self.store.add_many)
        self.telemetry = _TelemetryThread(self)

    def _build_pool(self) -> ModelPool:
        config = self.config
        memory = memory_limits(
            total_bytes=memory_total(),
            budget_bytes=config.pool.memory_budget_bytes,
            reserve_bytes=config.pool.memory_reserve_bytes,
        )
        limits = PoolLimits(
            **memory,
            load_timeout_s=config.ollama.load_timeout_s,
            idle_timeout_s=config.pool.model_timeout_s,
            max_resident=config.pool.max_resident,
            allow_pull=config.ollama.allow_pull,
        )
        return ModelPool(
            self.ollama,
            limits=limits,
            policy=self._policy,
            catalogue=self.catalogue,
            estimates=self.estimates,
            clock=self.clock,
            available_bytes=memory_available,
            on_change=self._on_model_change,
            on_loaded=self._on_loaded,
            on_pull=self._on_pull,
            beat=self._worker_beats,
        )

    def _build_worker(self) -> Worker:
        config = self.config
        deadlines = Deadlines(
            first_token_s=config.ollama.first_token_timeout_s,
            token_gap_s=config.ollama.token_gap_timeout_s,
            total_s=config.ollama.task_timeout_s,
        )
        hooks = Hooks(
            status=self._on_status,
            stream=self._on_stream,
            finished=self._on_finished,
            ollama=self._on_ollama,
            event=self._on_worker_event,
        )
        rules = WorkRules(
            deadlines=deadlines,
            max_attempts=config.queue.max_attempts,
            scheduler=_scheduler_policy(config),
            preempt=config.scheduler.preempt,
            prefetch=config.pool.prefetch,
            can_think=self._can_think,
            fallbacks=self._fallbacks,
        )
        return Worker(
            store=self.store,
            pool=self.pool,
            ollama=self.ollama,
            estimates=self.estimates,
            rules=rules,
            meter=lambda: TaskMeter(self._board, self._runners),
            clock=self.clock,
            hooks=hooks,
            preload=tuple(name for name, settings in self._settings.items() if settings.preload),
        )

    # The worker and the bridge need each other: these are called only when both are there.

    def _worker_beats(self) -> None:
        self.worker.beat()

    def _on_loaded(self) -> None:
        self.worker.wake()

    def _on_pull(self, model: str, status: str, completed: int, total: int) -> None:
        """At most one event a percent, since Ollama tells of every block."""
        percent = 100 * completed // total if total else 0
        if (model, status, percent) != self._pulled:
            self._pulled = (model, status, percent)
            data = {"model": model, "status": status, "percent": percent, "total_bytes": total}
            self.bridge.publish_event(Event(type="model_pulling", ts=iso(self.clock.wall()), data=data))

    def _eta_s(self, tasks: Sequence[Task]) -> list[float | None]:
        return self.worker.eta_s(tasks)

    def _on_status(self, address: Address, status: Status) -> None:
        self.bridge.publish_status(address, status)

    def _on_stream(self, address: Address, chunk: dict[str, Any]) -> None:
        self.bridge.publish_stream(address, chunk)

    def _on_worker_event(self, type_: str, severity: str, data: dict[str, Any]) -> None:
        self._event(type_, severity=severity, data=data)

    def _fallbacks(self, model: str) -> tuple[str, ...]:
        return tuple(map(normalise, self._settings_of(model).fallback))

    def _settings_of(self, model: str) -> ModelSettings:
        return self._settings.get(model, self.config.models.defaults)

    def _policy(self, model: str) -> ModelPolicy:
        settings = self._settings_of(model)
        return ModelPolicy(num_ctx=settings.num_ctx, pinned=settings.pinned)

    def _can_think(self, model: str) -> bool:
        details = self.catalogue.details(model)
        return details is not None and "thinking" in details.capabilities

    # -- run

    def run(self) -> int:
        """Serve until SIGTERM. Returns the exit status: 0 after an orderly stop, 1 when a part has failed."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._start()
        failure = self._watch()
        self._shut_down(failure)
        return 1 if failure else 0

    def _start(self) -> None:
        config = self.config
        log.info("edge-llm %s starts: node %s, data in %s", __version__, config.node_name, config.data_dir)
        logging.getLogger("urllib3").setLevel(logging.INFO)  # it would tell of every request
        self._rebuild_rows()
        for thread in (self.worker, self.telemetry):
            thread.start()
        self.bridge.start()
        self._publish_info()
        self._set_state()
        self._publish_changed("queue", self._queue())
        self._publish_changed("models", self._models())
        self._event("daemon_started", data={"version": __version__, "queued": self.store.open_count()})
        systemd.ready(self._summary())
        log.info("ready: %d tasks in the queue", self.store.open_count())

    def _watch(self) -> str | None:
        """Look after everything until a signal (None) or a failure (which)."""
        beats = dict.fromkeys(self._threads(), (-1, 0.0))
        pruned_at = self.clock.monotonic()
        while True:
            got = signal.sigtimedwait(SIGNALS, BUSY_LOOK_S if self._busy() else IDLE_LOOK_S)
            # Python makes up a signal when the process was stopped for longer than the wait (SIGSTOP, SIGCONT).
            if got is not None and got.si_signo in (signal.SIGTERM, signal.SIGINT):
                log.info("stopping on %s", signal.Signals(got.si_signo).name)
                return None
            if failure := self._failed_thread(beats):
                log.critical("%s: ending, so that it can be started anew", failure)
                return failure
            systemd.watchdog()
            self._look_around()
            if self.clock.monotonic() - pruned_at > PRUNE_S:
                self.store.prune()
                pruned_at = self.clock.monotonic()

    def _threads(self) -> tuple[Any, ...]:
        return (self.worker, self.telemetry, *self.bridge.threads)

    def _failed_thread(self, beats: dict[Any, tuple[int, float]]) -> str | None:
        """The first thread that has ended or been silent for too long; ``beats`` is what was seen before."""
        now = self.clock.monotonic()
        for thread, (count, since) in beats.items():
            if not thread.is_alive():
                return f"thread {thread.name} has ended"
            if thread.beats != count:
                beats[thread] = (thread.beats, now)
            elif now - since > SILENCE_S:
                return f"thread {thread.name} hangs"
        return None

    def _busy(self) -> bool:
        return bool(self._unsynced) or self.store.open_count() > 0

    def _look_around(self) -> None:
        """What is done now and then: rows to the disk, retained topics and the status line kept current."""
        self._sync_csv()
        self.worker.expire()
        if not self._busy():
            self.store.flush()
        self._set_state()
        self._publish_changed("queue", self._queue())
        self._publish_changed("models", self._models())
        systemd.status(self._summary())

    # -- stop

    def _shut_down(self, failure: str | None) -> None:
        systemd.stopping("stopping")
        systemd.extend_timeout(self.config.drain_timeout_s + 3 * GOODBYE_S)
        self.intake.drain()
        self.bridge.hold()
        self._set_state("draining", failure or "")
        if failure is None:
            threading.Thread(target=self._hurry_on_signal, name="signals", daemon=True).start()
            self.worker.stop(drain_s=self.config.drain_timeout_s, beat=systemd.watchdog)
            if self._ollama_up:
                self.pool.unload_all("the daemon stops")
        self._event("daemon_stopping", severity="error" if failure else "info", data={"reason": failure or "asked"})
        self._set_state("stopped", failure or "")
        self.bridge.stop(GOODBYE_S)
        self.telemetry.stop()
        self._sync_csv()
        with suppress(OSError):  # what is not on the disk is rebuilt from the store at the next start
            self.csv.close()
        self.store.close()
        log.info("stopped")

    def _hurry_on_signal(self) -> None:
        """A second SIGTERM: do not wait for the running task."""
        signal.sigwait(SIGNALS)
        self.worker.hurry()

    # -- tasks

    def _submit(self, batch: Any) -> Any:
        answers = self.intake.submit(batch)
        now = self.clock.monotonic()
        for answer in answers:
            if isinstance(answer, Accepted) and not answer.status.duplicate:
                self.estimates.arrived(answer.model, now)
        self.worker.wake()
        return answers

    def _check_model(self, name: str) -> tuple[str, ModelSettings]:
        model = normalise(name)
        if self.config.models.only_listed and model not in {*self._settings, normalise(self.config.models.default)}:
            raise Rejected("unknown_model", f"model: {model} is not listed in the configuration")
        failure: Rejected | None = None
        for candidate in (model, *self._fallbacks(model)):
            try:
                self.pool.check(candidate)
            except ModelMissing as error:
                failure = failure or Rejected("unknown_model", f"model: {error}")
            except ModelTooLarge as error:
                failure = failure or Rejected("model_too_large", f"model: {error}")
            else:
                return model, self._settings_of(model)
        assert failure is not None  # noqa: S101
        raise failure

    def _on_finished(self, finished: Finished) -> None:
        result = finished.result
        self.bridge.results_waiting()  # first, because somebody waits for it
        self._append(self._task_row(finished), task_seq=finished.stored.seq)
        fields = {"TASK_ID": result.id, "SRC": result.src, "MODEL": result.model or ""}
        log.info("task %s/%s %s%s", result.src, result.id, result.state, _summary(result), extra={"fields": fields})
        if self.config.log.prompts:
            task = finished.stored.task
            log.info("task %s/%s asked %r, answered %r", *task.key, task.prompt or task.messages, result.text)

    def _task_row(self, finished: Finished) -> dict[str, object]:
        ensured, decision = finished.ensured, finished.decision
        loaded = ensured is not None and ensured.load_s > 0
        return task_row(
            finished.stored.task,
            finished.result,
            finished.usage,
            _timings(finished.answer) if finished.answer else None,
            evicted_models=ensured.evicted if ensured else (),
            swap_reason=decision.reason if decision and loaded else None,
            predicted_load_ns=int(ensured.predicted_s * 1e9) if ensured and loaded else None,
            queue_depth=sum(self.store.depth().values()),
            resident_models=self._resident(),
        )

    def _resident(self) -> tuple[str, ...]:
        return tuple(state.name for state in self.pool.states)

    def _rebuild_rows(self) -> None:
        """Write the rows that a crash kept from the log."""
        missing = self.store.unlogged()
        present = self.csv.contains({stored.task.key for stored in missing})
        for stored in missing:
            if stored.task.key not in present and stored.result is not None:
                self._append(self._task_row(Finished(stored=stored, result=stored.result)), task_seq=stored.seq)
        self.store.mark_logged(stored.seq for stored in missing if stored.task.key in present)
        self._sync_csv()

    # -- the log

    def _append(self, row: dict[str, object], task_seq: int | None = None) -> None:
        """A row for the log; one that cannot be written now is rebuilt from the store at the next start."""
        with self._csv_lock:
            try:
                last = self.csv.append([row])
            except OSError as error:
                log.error("cannot write the log: %s", error)  # noqa: TRY400
                return
            if task_seq is not None:
                self._unsynced.append((last, task_seq))

    def _sync_csv(self) -> None:
        try:
            durable = self.csv.sync()
        except OSError as error:
            log.error("cannot write the log to the disk: %s", error)  # noqa: TRY400
            with self._csv_lock:
                self._unsynced.clear()  # those rows are cut off again; the next start rebuilds them
            return
        with self._csv_lock:
            logged = []
            while self._unsynced and self._unsynced[0][0] <= durable:
                logged.append(self._unsynced.popleft()[1])
        self.store.mark_logged(logged)

    def _event(self, type_: str, *, severity: str = "info", data: dict[str, Any] | None = None) -> None:
        event = Event(type=type_, ts=iso(self.clock.wall()), severity=severity, data=data or {})
        self._append(event_row(event))
        self.bridge.publish_event(event)

    # -- what is told to the outside

    def _on_bridge_event(self, type_: str, severity: str, data: dict[str, Any]) -> None:
        if type_ in ("broker_connected", "broker_lost"):
            self._broker_up = type_ == "broker_connected"
            self._publish_info()
            self._set_state()
        self._event(type_, severity=severity, data=data)

    def _on_ollama(self, up: bool) -> None:  # noqa: FBT001
        self._ollama_up = up
        self._set_state()
        self._event("ollama_up" if up else "ollama_down", severity="info" if up else "warning")

    def _on_model_change(self, change: Change) -> None:
        self._runners.find()
        outcome = change.outcome
        row = model_row(
            change.model,
            status=outcome,
            reason=change.reason,
            duration_ns=int(change.seconds * 1e9),
            evicted_models=change.evicted,
            predicted_load_ns=None if change.predicted_s is None else int(change.predicted_s * 1e9),
            runner_rss_bytes=change.size_bytes or None,
            memory_available_bytes=memory_available(),
            resident_models=self._resident(),
            error_code=change.error,
        )
        self._append(row)
        level, severity = (logging.WARNING, "warning") if change.error else (logging.INFO, "info")
        result = change.error or f"{change.seconds:.2f} s"
        fields = {"MODEL": change.model}
        log.log(level, "%s %s (%s): %s", change.model, outcome, change.reason, result, extra={"fields": fields})
        event = Event(type=f"model_{outcome}", ts=iso(self.clock.wall()), severity=severity, data=_change_data(change))
        self.bridge.publish_event(event)
        self._publish_changed("models", self._models())

    def _set_state(self, state: str | None = None, reason: str = "") -> None:
        """Tell how we are: ``state`` when it is said, else ready or what is missing."""
        with self._state_lock:
            if state is None and self._state[0] in ("draining", "stopped"):
                return
            if state is None:
                troubles = [] if self._broker_up else ["no broker"]
                troubles += [] if self._ollama_up else ["Ollama does not answer"]
                state, reason = ("degraded", ", ".join(troubles)) if troubles else ("ready", "")
            if (state, reason) != self._state:
                self._state, self._since = (state, reason), iso(self.clock.wall())
            # Told under the lock, which costs a put on a queue: an older state must not follow a newer one.
            self._publish_changed("state", {"state": state, "since": self._since, "reason": reason})

    def _queue(self) -> dict[str, Any]:
        running = self.worker.running()
        return {
            "waiting": {str(priority): count for priority, count in self.store.depth().items()},
            "running": {"id": running[0].id, "src": running[0].src, "model": running[0].model} if running else None,
            "unsent": self.store.unsent_count(),
        }

    def _models(self) -> dict[str, Any]:
        states = [state.to_dict() for state in self.pool.states]
        for state in states:
            del state["idle_s"]  # would change at every look
        return {
            "models": states,
            "resident_bytes": sum(state["size_bytes"] for state in states),
            "budget_bytes": self.pool.limits.budget_bytes,
            "available": list(self.catalogue.names()),
            "default": normalise(self.config.models.default),
        }

    def _publish_info(self) -> None:
        queue = self.config.queue
        info = {
            "version": __version__,
            "api": 1,
            "node": self.config.node_name,
            "host": socket.gethostname(),
            "boot": self.clock.boot_id(),
            "mqtt": self.bridge.protocol,
            "started": self._started,
            "limits": {
                "payload_bytes": queue.max_payload_bytes,
                "tasks": queue.max_tasks,
                "ttl_s": queue.default_ttl_s,
                "attempts": queue.max_attempts,
            },
        }
        self._publish_changed("info", info)

    def _publish_changed(self, name: str, data: dict[str, Any]) -> None:
        """A retained topic, sent only when it says something new."""
        text = compact(data)
        with self._state_lock:
            if self._published.get(name) == text:
                return
            self._published[name] = text
            self.bridge.publish_state(name, data)

    def _summary(self) -> str:
        """One line for ``systemctl status``."""
        state, reason = self._state
        depth = sum(self.store.depth().values())
        parts = [f"{state} ({reason})" if reason else state, f"{depth} queued"]
        if running := self.worker.running():
            task, seconds = running
            parts.append(f"running {task.model} for {seconds:.0f} s")
        return "; ".join(parts)

    def sample(self) -> None:
        """Take one sample of the board and tell it."""
        states = self.pool.states
        sample = self.telemetry.sampler.sample(
            OllamaState(
                reachable=self._ollama_up,
                resident_models=tuple(state.name for state in states),
                resident_bytes=sum(state.size_bytes for state in states),
            ),
            ts=iso(self.clock.wall()),
            boot=self.clock.boot_id(),
            clock_synced=self.clock.synced(),
            queue_depth=sum(self.store.depth().values()),
            outbox=self.store.unsent_count(),
        )
        self._append(telemetry_row(sample))
        self.bridge.publish_telemetry(sample)


class _TelemetryThread(threading.Thread):
    """A sample of the board at every interval."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(name="telemetry", daemon=True)
        self.beats = 0
        self.sampler = Sampler(data_dir=daemon.config.data_dir, board=Board())
        self._daemon = daemon
        self._interval_s = daemon.config.telemetry.interval_s
        self._stopping = threading.Event()

    def run(self) -> None:
        left_s = 0.0
        while not self._stopping.wait(min(left_s, SILENCE_S / 3)):
            self.beats += 1
            left_s -= SILENCE_S / 3
            if left_s <= 0:
                self._daemon.sample()
                left_s = self._interval_s

    def stop(self) -> None:
        self._stopping.set()
        self.join(GOODBYE_S)


def _lock(data_dir: Path) -> int:
    """One daemon per data directory: two would write one queue, and fight for one client id."""
    data_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
    handle = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise AlreadyRunning(f"{data_dir} is in use by another edge-llm; give this one its own --data-dir") from None
    return handle


def _is_runner(command: Sequence[str]) -> bool:
    return is_ollama_runner(command) or "edge_daemon.embedded.runner" in command


def _queue_limits(config: Config) -> Limits:
    queue = config.queue
    return Limits(
        max_tasks=queue.max_tasks,
        max_bytes=queue.max_bytes,
        max_tasks_per_src=queue.per_source_tasks,
        urgent_reserve=queue.urgent_reserve,
        retention_s=queue.retention_s,
        retention_bytes=queue.retention_bytes,
    )


def _scheduler_policy(config: Config) -> Policy:
    soft = config.scheduler.soft_wait_s
    return Policy(
        soft_wait_s={Priority.HIGH: soft.high, Priority.NORMAL: soft.normal, Priority.LOW: soft.low},
        urgent_swap_share=config.scheduler.urgent_swap_share,
    )


def _timings(answer: Answer) -> Timings:
    return Timings(
        total_duration_ns=answer.total_ns,
        load_duration_ns=answer.load_ns,
        prompt_eval_count=answer.prompt_tokens,
        prompt_eval_duration_ns=answer.prompt_eval_ns,
        eval_count=answer.output_tokens,
        eval_duration_ns=answer.eval_ns,
    )


def _change_data(change: Change) -> dict[str, Any]:
    return {
        "model": change.model,
        "reason": change.reason,
        "seconds": round(change.seconds, 3),
        "predicted_s": change.predicted_s,
        "size_bytes": change.size_bytes,
        "predicted_bytes": change.predicted_bytes,
        "evicted": list(change.evicted),
        "error": change.error,
    }


def _summary(result: Result) -> str:
    """The figures of a task for its one line in the journal."""
    parts = [f" on {result.model}"] if result.model else []
    for name, value in (("queued", result.queued_s), ("load", result.load_s), ("run", result.run_s)):
        if value is not None:
            parts.append(f", {name} {value:.2f} s")
    if result.tokens_per_s:
        parts.append(f", {result.output_tokens} tokens at {result.tokens_per_s:.1f}/s")
    if result.error:
        parts.append(f": {result.error.code}: {result.error.message}")
    return "".join(parts)
