"""The daemon: build the parts, start them, keep watch, stop them.

Signals are not handled but waited for: the main thread blocks them all and asks for the next one at every look around,
so that no code of ours ever runs inside a signal handler.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_daemon import __version__, preflight, systemd
from edge_daemon.announcer import Announcer
from edge_daemon.clock import Clock
from edge_daemon.config import Config, ModelSettings, changed_keys
from edge_daemon.errors import (
    BadRequest,
    ConfigError,
    EdgeError,
    ModelMissing,
    ModelTooLarge,
    Rejected,
    StorageFull,
    StoreError,
)
from edge_daemon.estimates import Estimates
from edge_daemon.intake import Intake, IntakeRules
from edge_daemon.journal import Kind, about
from edge_daemon.logger import CsvLog, Row
from edge_daemon.messages import Accepted, Address, Incoming, Priority, Refused, Status, Stored, Task
from edge_daemon.model_pool import Catalogue, Change, ModelPolicy, ModelPool, PoolLimits, memory_limits
from edge_daemon.mqtt_bridge import Handlers, MqttBridge
from edge_daemon.ollama import MAX_LOADED, Deadlines, Ollama, normalise
from edge_daemon.records import Records
from edge_daemon.scheduler import Policy
from edge_daemon.steps import reached
from edge_daemon.store import Limits, Store
from edge_daemon.telemetry import (
    Board,
    Runners,
    Sampler,
    TaskMeter,
    is_ollama_runner,
    memory_available,
    memory_total,
)
from edge_daemon.worker import Finished, Hooks, RunRules, Worker

if TYPE_CHECKING:
    from edge_daemon.http_gateway import HttpGateway

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOK_SIGNAL = signal.SIGUSR1
"""Our own threads wake ``main`` by it."""
SIGNALS = (*STOP_SIGNALS, signal.SIGHUP, LOOK_SIGNAL)
BUSY_LOOK_S = 0.5
IDLE_LOOK_S = 15.0
SILENCE_S = 45.0
"""A thread that shows no sign of life for so long is taken for dead."""
PRUNE_S = 600.0
GOODBYE_S = 10.0
"""How long the last messages may take to be confirmed."""
HAND_OVER_S = 2.0
"""The same before a new start: what is not confirmed by then is sent again by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ending:
    """Why we end: a part has failed, or a new start is wanted, or else a signal has asked for it."""

    failure: str | None = None
    culprit: Any = None
    """The thread that has failed, if it was one."""
    anew: bool = False


class Daemon:
    """All parts of one running daemon. ``reread`` gives the configuration as it stands now; None: it cannot be changed.

    Raises:
        AlreadyRunning: another one uses the same ``data_dir``.
        StoreError: the queue file cannot be used.
        PortInUse: ``http.port`` is taken.
        ConfigError: a file or folder that the configuration names cannot be used, or the gateway lacks its extra.
    """

    def __init__(
        self, config: Config, *, clock: Clock | None = None, reread: Callable[[], Config] | None = None
    ) -> None:
        self.config = config
        self.clock = clock or Clock()
        self._reread = reread
        self._lock = preflight.lock(config.data_dir)
        self._secrets = preflight.check(config, held=config)
        self._settings = {normalise(name): config.models.for_model(name) for name in config.models.settings}
        self._build()

    # -- build

    def _build(self) -> None:
        """All parts, each after those that it is given."""
        config, clock = self.config, self.clock
        self._board = Board()
        self._runners = Runners(self._board, _is_runner)
        self.store = Store(config.data_dir / preflight.QUEUE_FILE, clock=clock, limits=_queue_limits(config))
        self.records = Records(self._build_log(), self.store, clock=clock, resident=self._resident, on_row=self._on_row)
        self.estimates = Estimates(self.store.learnt(), self.store.learn, self.store.flush)
        self.ollama = self._build_ollama()
        self.catalogue = self._build_catalogue()
        self.pool = self._build_pool()
        self.worker = self._build_worker()
        self.bridge = self._build_bridge()
        self.intake = self._build_intake()
        self.announcer = self._build_announcer()
        self.telemetry = _TelemetryThread(self.announcer.sample, interval_s=config.telemetry.interval_s)
        self.gateway = self._build_gateway()

    def _build_log(self) -> CsvLog:
        csv = self.config.csv
        return CsvLog(
            self.config.csv_path, rotate_bytes=csv.rotate_bytes, keep=csv.keep, text=csv.text, clock=self.clock
        )

    def _build_ollama(self) -> Ollama:
        ollama = self.config.ollama
        return Ollama(
            ollama.url,
            connect_timeout_s=ollama.connect_timeout_s,
            max_result_bytes=self.config.queue.max_result_bytes,
            beat=self._worker_beats,
        )

    def _build_catalogue(self) -> Catalogue:
        ollama = self.config.ollama
        # The intake asks the catalogue: its waiting is no sign of life of the worker's.
        asking = Ollama(ollama.url, connect_timeout_s=ollama.connect_timeout_s)
        return Catalogue(
            asking,
            clock=self.clock,
            estimates=self.estimates,
            policy=self._policy,
            written=self.config.models_named,
        )

    def _build_bridge(self) -> MqttBridge:
        handlers = Handlers(
            submit=self._submit,
            refuse=self._refuse,
            cancel=self.worker.cancel,
            known=lambda src, task_id: self.store.find(src, task_id) is not None,
            unsent=self._unsent,
            mark_sent=self.store.mark_sent,
            set_aside=self.store.set_aside,
            unacked=self.store.unacked,
            mark_acked=self.store.mark_acked,
            on_event=self._on_bridge_event,
            on_end=_look_now,
        )
        return MqttBridge(self.config, handlers, password=self._secrets.password)

    def _build_intake(self) -> Intake:
        rules = IntakeRules(
            config=self.config,
            clock=self.clock,
            check_model=self._check_model,
            check_reply_to=self.bridge.check_reply_to,
            eta_s=self._eta_s,
        )
        return Intake(rules, self.store.add_many, self.store.recognise)

    def _build_announcer(self) -> Announcer:
        return Announcer(
            self.config,
            clock=self.clock,
            store=self.store,
            records=self.records,
            bridge=self.bridge,
            worker=self.worker,
            pool=self.pool,
            sampler=Sampler(data_dir=self.config.data_dir, board=self._board),
        )

    def _build_gateway(self) -> "HttpGateway | None":
        if not self.config.http.enabled:
            return None
        try:
            from edge_daemon.http_gateway import Backend, HttpGateway  # noqa: PLC0415  # an extra
        except ModuleNotFoundError as error:
            raise preflight.http_needs(error.name) from None
        backend = Backend(
            submit=self._submit,
            find=self.store.find,
            cancel=self.worker.cancel,
            state=self.announcer.standing,
            figures=self.announcer.figures,
        )
        return HttpGateway(self.config, backend, tokens=self._secrets.tokens)

    def _build_pool(self) -> ModelPool:
        config = self.config
        memory = memory_limits(
            total_bytes=memory_total() if config.ollama_is_here else None,
            budget_bytes=config.pool.memory_budget_bytes,
            reserve_bytes=config.pool.memory_reserve_bytes,
        )
        pinned = sum(settings.pinned for settings in config.models.settings.values())
        limits = PoolLimits(
            **memory,
            load_timeout_s=config.ollama.load_timeout_s,
            idle_timeout_s=config.pool.model_timeout_s,
            max_resident=config.pool.max_resident or max(MAX_LOADED, pinned),
            allow_pull=config.ollama.allow_pull,
        )
        return ModelPool(
            self.ollama,
            limits=limits,
            policy=self._policy,
            catalogue=self.catalogue,
            estimates=self.estimates,
            clock=self.clock,
            available_bytes=memory_available if config.ollama_is_here else _plenty,
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
            ended=_look_now,
        )
        rules = RunRules(
            deadlines=deadlines,
            max_attempts=config.queue.max_attempts,
            scheduler=_scheduler_policy(config),
            preempt=config.scheduler.preempt,
            prefetch=config.pool.prefetch,
            think=self._think,
            continues=self._continues,
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
            preload=self._preload(),
        )

    # The parts need each other: these are called only when all are there.

    def _worker_beats(self) -> None:
        self.worker.beat()

    def _on_loaded(self) -> None:
        self.worker.wake()

    def _on_pull(self, model: str, status: str, completed: int, total: int) -> None:
        self.announcer.model_pulling(model, status, completed, total)

    def _on_ollama(self, up: bool) -> None:  # noqa: FBT001
        self.announcer.ollama(up)

    def _on_bridge_event(self, type_: str, severity: str, data: dict[str, Any]) -> None:
        self.announcer.bridge_event(type_, severity, data)

    def _on_worker_event(self, type_: str, severity: str, data: dict[str, Any]) -> None:
        self.announcer.event(type_, severity, data)

    def _on_model_change(self, change: Change) -> None:
        self._runners.find()
        self.announcer.model_changed(change)

    def _eta_s(self, tasks: Sequence[Task]) -> list[float | None]:
        return self.worker.eta_s(tasks)

    def _on_status(self, address: Address, status: Status) -> None:
        self.bridge.publish_status(address, status)

    def _on_stream(self, address: Address, chunk: dict[str, Any]) -> None:
        self.bridge.publish_stream(address, chunk)

    def _fallbacks(self, model: str) -> tuple[str, ...]:
        return tuple(map(normalise, self._settings_of(model).fallback))

    def _settings_of(self, model: str) -> ModelSettings:
        return self._settings.get(model, self.config.models.defaults)

    def _preload(self) -> tuple[str, ...]:
        names = dict.fromkeys((*self._settings, normalise(self.config.models.default)))
        return tuple(name for name in names if self._settings_of(name).preload)

    def _policy(self, model: str) -> ModelPolicy:
        settings = self._settings_of(model)
        return ModelPolicy(num_ctx=settings.num_ctx, pinned=settings.pinned)

    def _think(self, model: str) -> bool | str | None:
        """Not to think, to a model that could: on a board its thoughts take minutes. Some only think less or more."""
        details = self.catalogue.details(model)
        if details is None or "thinking" not in details.capabilities:
            return None
        return "low" if details.family.startswith(("gptoss", "gpt-oss")) else False

    def _continues(self, model: str) -> bool:
        details = self.catalogue.details(model)
        return details is not None and details.continues and "thinking" not in details.capabilities

    # -- run

    def run(self) -> int | None:
        """Serve until SIGTERM. Returns the exit status: 0 after an orderly stop, 1 when a part has failed.

        None: everything was left so that this process can start anew at once, with a configuration that has changed.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._start()
        ending = self._watch()
        if ending.anew:
            self._hand_over()
            return None
        self._shut_down(ending)
        return 1 if ending.failure else 0

    def _start(self) -> None:
        config = self.config
        log.info("edge-llm %s starts: node %s, data in %s", __version__, config.node_name, config.data_dir)
        logging.getLogger("urllib3").setLevel(logging.INFO)  # it would tell of every request
        self.records.rebuild()
        with suppress(StorageFull):  # at the next start, then
            if again := self.store.offer_again():
                log.info("%d results that were set aside are sent once more", again)
        for thread in (self.worker, self.telemetry):
            thread.start()
        self.bridge.start()
        if self.gateway:
            self.gateway.start()
        self.announcer.info()
        self.announcer.look()
        self.announcer.event("daemon_started", data={"version": __version__, "queued": self.store.open_count()})
        systemd.ready(self.announcer.summary())
        log.info("ready: %d tasks in the queue", self.store.open_count(), extra=about(Kind.DAEMON_READY))

    def _watch(self) -> "_Ending":
        """Look after everything until there is a reason to end."""
        pulse = _Pulse(self._threads(), clock=self.clock)
        pruned_at = self.clock.monotonic()
        while True:
            got = signal.sigtimedwait(SIGNALS, look_s := self._look_s())
            # Python makes up a signal when the process was stopped for longer than the wait (SIGSTOP, SIGCONT).
            if got is not None and got.si_signo in STOP_SIGNALS:
                patience = f"{self.config.drain_timeout_s:g} s for the running answer; a second signal ends the wait"
                outlook = f": up to {patience}" if self.worker.running() else ""
                log.info("stopping on %s%s", signal.Signals(got.si_signo).name, outlook)
                return _Ending()
            if got is not None and got.si_signo == signal.SIGHUP and self._is_to_start_anew():
                return _Ending(anew=True)
            if failed := self._store_failure() or pulse.failure(look_s):
                why, extra = failed.failure, about(Kind.DAEMON_FAILED)
                log.critical("%s: ending, so that it can be started anew", why, extra=extra)
                return failed
            systemd.watchdog()
            with suppress(StoreError):  # a full disk is told of, and passes; any other failure is seen at the next look
                self._look_around()
                if self.clock.monotonic() - pruned_at > PRUNE_S:
                    pruned_at = self.clock.monotonic()
                    self.store.prune()

    def _look_s(self) -> float:
        """How long to wait before the next look."""
        if self._busy():
            return BUSY_LOOK_S
        return min(IDLE_LOOK_S, systemd.watchdog_interval_s() or IDLE_LOOK_S)

    def _threads(self) -> tuple[Any, ...]:
        http = self.gateway.threads if self.gateway else ()
        return (self.worker, self.telemetry, *self.bridge.threads, *http)

    def _store_failure(self) -> "_Ending | None":
        return _Ending(failure=self.store.failure) if self.store.failure else None

    def _busy(self) -> bool:
        return self.records.unsynced or self.store.open_count() > 0

    def _look_around(self) -> None:
        """What is done now and then: rows to the disk, retained topics and the status line kept current."""
        self.records.sync()
        with suppress(StorageFull):  # they still wait
            self.worker.expire()
        if self.store.is_full or not self._busy():
            with suppress(StorageFull):
                self.store.flush()
        self.announcer.look()
        systemd.status(self.announcer.summary())

    # -- reload

    def _is_to_start_anew(self) -> bool:
        """Whether the configuration has changed, and for a good one; else everything stays as it is."""
        systemd.reloading()
        try:
            changed = self._changed_keys()
        except EdgeError as error:
            self.announcer.config_rejected(str(error))
        else:
            self.announcer.config_accepted(changed)
            if changed:
                return True
        systemd.ready(self.announcer.summary())
        return False

    def _changed_keys(self) -> list[str]:
        """What a new start would change. Raises EdgeError when it would not come to that."""
        if self._reread is None:
            raise ConfigError("the broker and the models of --embedded would end too: stop and start instead")
        config = self._reread()
        keys = changed_keys(self.config, config)
        if preflight.check(config, held=self.config) != self._secrets:
            keys.append("a password or token")
        left = self.store.open_count() + self.store.unsent_count()
        if left and "data_dir" in keys:
            where = self.config.data_dir
            log.warning("data_dir: %d tasks and answers stay in %s until that is configured again", left, where)
        return keys

    def _hand_over(self) -> None:
        """Leave everything as a new start wants to find it: the running task put aside, models loaded, no goodbye."""
        systemd.watchdog()
        self.bridge.hold()
        self.worker.stop(drain_s=0.0, beat=systemd.watchdog)
        if self.gateway:
            self.gateway.stop(HAND_OVER_S)
        self.bridge.stop(HAND_OVER_S, farewell=False)
        self._close()

    # -- stop

    def _shut_down(self, ending: "_Ending") -> None:
        failure = ending.failure
        systemd.stopping("stopping")
        systemd.extend_timeout(self.config.drain_timeout_s + 4 * GOODBYE_S)
        self.bridge.hold()
        self.intake.drain()
        self.announcer.state("draining", failure or "")
        reached("draining_told")
        if failure is None:
            threading.Thread(target=self._hurry_on_signal, name="signals", daemon=True).start()
            self.worker.stop(drain_s=self.config.drain_timeout_s, beat=systemd.watchdog)
            if self.announcer.ollama_up:
                self.pool.unload_all("the daemon stops")
        elif ending.culprit is not self.worker:  # else its task may be what made it fail: then the attempt counts
            self.worker.stop(drain_s=0.0, patience_s=GOODBYE_S, beat=systemd.watchdog)
        self.announcer.event(
            "daemon_stopping", severity="error" if failure else "info", data={"reason": failure or "asked"}
        )
        reached("drained")
        self.announcer.state("stopped", failure or "")
        if self.gateway:
            self.gateway.stop(GOODBYE_S)
        self.bridge.stop(GOODBYE_S)
        self._close()
        log.info("stopped", extra=about(Kind.DAEMON_STOPPED))

    def _close(self) -> None:
        self.telemetry.stop()
        self.records.close()
        self.store.close()

    def _hurry_on_signal(self) -> None:
        """A second SIGTERM: do not wait for the running task."""
        signal.sigwait(STOP_SIGNALS)
        self.worker.hurry()

    # -- tasks

    def _submit(self, batch: Sequence[Incoming], beat: Callable[[], None] = lambda: None) -> list[Accepted | Refused]:
        idle = not self._busy()
        answers = self.intake.submit(batch, beat)
        now = self.clock.monotonic()
        for answer in answers:
            if isinstance(answer, Refused):
                self._on_refused(answer)
            elif not answer.status.duplicate:
                self.estimates.arrived(answer.model, now)
                src, task_id = answer.address.src, answer.address.id
                extra = about(Kind.TASK_QUEUED, task_id=task_id, src=src, model=answer.model)
                log.debug("task %s/%s queued for %s", src, task_id, answer.model, extra=extra)
        self.worker.wake()
        if idle and self._busy():
            _look_now()
        return answers

    def _refuse(self, incoming: Incoming, code: str, message: str) -> Refused:
        refused = self.intake.refuse(incoming, code, message)
        self._on_refused(refused)
        return refused

    def _on_refused(self, refused: Refused) -> None:
        if self.gateway and refused.result.error:
            self.gateway.metrics.refused(refused.result.error.code)

    def _on_row(self, row: Row) -> None:
        if self.gateway:
            self.gateway.metrics.count(row)

    def _unsent(self, limit: int, skip: Iterable[int]) -> list[Stored]:
        """Results to send; none from a queue file that has failed, so that the bridge can still say so."""
        with suppress(StoreError):
            return self.store.unsent(limit, skip=skip)
        return []

    def _check_model(self, name: str, fallback: Sequence[str] | None) -> tuple[str, ModelSettings]:
        model = normalise(name)
        if self.config.models.only_listed and model not in {*self._settings, normalise(self.config.models.default)}:
            raise Rejected("unknown_model", f"model: {model} is not listed in the configuration")
        failure: Rejected | None = None
        for candidate in (model, *(self._fallbacks(model) if fallback is None else map(normalise, fallback))):
            try:
                self.pool.check(candidate)
            except (ModelMissing, BadRequest) as error:
                failure = failure or Rejected("unknown_model", f"model: {error}")
            except ModelTooLarge as error:
                failure = failure or Rejected("model_too_large", f"model: {error}")
            else:
                return model, self._settings_of(model)
        assert failure is not None  # noqa: S101
        raise failure

    def _on_finished(self, finished: Finished) -> None:
        self.bridge.results_waiting()  # first, because somebody waits for it
        if self.gateway:
            self.gateway.ended(*finished.stored.task.key)
        self.announcer.task_finished(finished)

    def _resident(self) -> tuple[str, ...]:
        return tuple(state.name for state in self.pool.states)


class _Pulse:
    """The signs of life of all threads, as they were last felt."""

    def __init__(self, threads: Iterable[Any], *, clock: Clock) -> None:
        self._clock = clock
        self._beats = dict.fromkeys(threads, (-1, 0.0))
        self._felt_at = clock.monotonic()

    def failure(self, waited_s: float) -> _Ending | None:
        """The first thread that has ended or been silent for too long; we meant to wait ``waited_s`` before this."""
        now = self._clock.monotonic()
        if now - self._felt_at > waited_s + SILENCE_S / 3:
            # We were held for longer (suspend, SIGSTOP), and the others with us: they have yet to get their turn.
            self._beats = dict.fromkeys(self._beats, (-1, 0.0))
        self._felt_at = now
        for thread, (count, since) in self._beats.items():
            if not thread.is_alive():
                return _Ending(failure=f"thread {thread.name} has ended", culprit=thread)
            if thread.beats != count:
                self._beats[thread] = (thread.beats, now)
            elif now - since > SILENCE_S:
                return _Ending(failure=f"thread {thread.name} hangs", culprit=thread)
        return None


class _TelemetryThread(threading.Thread):
    """A sample of the board at every interval."""

    def __init__(self, sample: Callable[[], None], *, interval_s: float) -> None:
        super().__init__(name="telemetry", daemon=True)
        self.beats = 0
        self._sample = sample
        self._interval_s = interval_s
        self._stopping = threading.Event()

    def run(self) -> None:
        try:
            self._work()
        finally:
            _look_now()

    def _work(self) -> None:
        left_s = 0.0
        while not self._stopping.wait(min(left_s, SILENCE_S / 3)):
            self.beats += 1
            left_s -= SILENCE_S / 3
            if left_s <= 0:
                self._sample()
                left_s = self._interval_s

    def stop(self) -> None:
        self._stopping.set()
        self.join(GOODBYE_S)


def _look_now() -> None:
    """Have ``main`` look around at once; it waits for nothing but signals."""
    os.kill(os.getpid(), LOOK_SIGNAL)


def _plenty() -> int:
    """What is free on another machine, which cannot be seen: nothing but the budget holds there."""
    return 1 << 62


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
