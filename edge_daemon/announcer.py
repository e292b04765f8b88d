"""What the daemon tells of itself: retained topics, events, the journal, and the line of ``systemctl status``."""

import logging
import socket
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from edge_daemon import __version__, systemd
from edge_daemon.clock import Clock, iso
from edge_daemon.config import Config
from edge_daemon.journal import Kind, about
from edge_daemon.messages import Event, Result, compact
from edge_daemon.model_pool import Change, ModelPool
from edge_daemon.mqtt_bridge import MqttBridge
from edge_daemon.ollama import normalise
from edge_daemon.records import Records
from edge_daemon.store import Store
from edge_daemon.telemetry import OllamaState, Sampler
from edge_daemon.worker import Finished, Worker

log = logging.getLogger(__name__)


class Announcer:
    """Tells what has changed, and nothing twice. Any thread may call it; nothing here waits for the network."""

    def __init__(
        self,
        config: Config,
        *,
        clock: Clock,
        store: Store,
        records: Records,
        bridge: MqttBridge,
        worker: Worker,
        pool: ModelPool,
        sampler: Sampler,
    ) -> None:
        self._config = config
        self._clock = clock
        self._store = store
        self._records = records
        self._bridge = bridge
        self._worker = worker
        self._pool = pool
        self._sampler = sampler
        self._lock = threading.RLock()  # guards _state, _since and _published: several threads tell
        self._state = ("starting", "")
        self._since = self._started = self._now()
        self._published: dict[str, str] = {}
        self._pulled = ("", "", 0)
        self._broker_up = False
        self._ollama_up = True
        self._refused_config = ""
        self._is_full = False
        self._untold_damage = store.damage

    # -- how we are

    @property
    def ollama_up(self) -> bool:
        """Whether Ollama answered when it was last asked."""
        return self._ollama_up

    def standing(self) -> tuple[str, str]:
        """Our state and its reason, at once."""
        return self._state

    def figures(self) -> dict[str, Any]:
        """How things are in numbers, for whoever asks; may wait for the store."""
        return {
            "state": self._state[0],
            "broker_up": self._broker_up,
            "ollama_up": self._ollama_up,
            "queue": self._queue(),
            "models": self._models(),
        }

    def state(self, state: str | None = None, reason: str = "") -> None:
        """Tell how we are: ``state`` when it is said, else ready or what is missing."""
        with self._lock:
            if state is None and self._state[0] in ("draining", "stopped"):
                return
            if state is None:
                troubles = self._troubles()
                state, reason = ("degraded", ", ".join(troubles)) if troubles else ("ready", "")
            has_changed = (state, reason) != self._state
            if has_changed:
                self._state, self._since = (state, reason), self._now()
            # Told under the lock, which costs a put on a queue: an older state must not follow a newer one.
            self._publish("state", {"state": state, "since": self._since, "reason": reason})
        if has_changed:
            systemd.status(self.summary())

    def _troubles(self) -> list[str]:
        """What is not as it should be. A queue file that was damaged stays one until a person has seen to it."""
        found = {
            "no broker": not self._broker_up,
            "Ollama does not answer": not self._ollama_up,
            "no room on the disk": self._store.is_full,
            "the CSV log cannot be written": self._records.is_behind,
            "the queue file was damaged": self._store.damage is not None,
        }
        return [trouble for trouble, is_so in found.items() if is_so]

    def look(self) -> None:
        """Bring the retained topics up to date."""
        if self._is_full != self._store.is_full:
            self._is_full = self._store.is_full
            self.event("storage_full" if self._is_full else "storage_ok", "warning" if self._is_full else "info")
        self.state()
        self._publish("queue", self._queue())
        self._publish("models", self._models())

    def summary(self) -> str:
        """One line for ``systemctl status``."""
        state, reason = self._state
        depth = sum(self._store.depth().values())
        parts = [f"{state} ({reason})" if reason else state, f"{depth} queued"]
        if running := self._worker.running():
            task, seconds = running
            parts.append(f"running {task.model} for {seconds:.0f} s")
        if self._refused_config:
            parts.append(f"the changed config is not in force: {self._refused_config}")
        return "; ".join(parts)

    def info(self) -> None:
        """Tell who we are."""
        boot, protocol = self._clock.boot_id(), self._bridge.protocol
        self._publish("info", birth_certificate(self._config, boot=boot, mqtt=protocol, started=self._started))

    # -- what happens

    def event(self, type_: str, severity: str = "info", data: dict[str, Any] | None = None) -> None:
        """Something worth telling."""
        event = Event(type=type_, ts=self._now(), severity=severity, data=data or {})
        self._records.event(event)
        self._bridge.publish_event(event)

    def bridge_event(self, type_: str, severity: str, data: dict[str, Any]) -> None:
        """Something that the bridge has to tell, which may be that the broker came or went."""
        if type_ in ("broker_connected", "broker_lost"):
            self._broker_up = type_ == "broker_connected"
            self.info()
            self.state()
        self.event(type_, severity, data)
        if self._broker_up and self._untold_damage is not None:
            self.event("queue_damaged", "error", asdict(self._untold_damage))
            self._untold_damage = None

    def config_rejected(self, why: str) -> None:
        """The configuration was changed for one that cannot be used: the old one stays in force."""
        self._refused_config = why
        log.error("not reloaded, the configuration before stays in force: %s", why, extra=about(Kind.CONFIG_REJECTED))
        self.event("config_rejected", "error", {"error": why})

    def config_accepted(self, changed: Sequence[str]) -> None:
        """The configuration can be used; ``changed`` are the keys in which it differs from the one in force."""
        self._refused_config = ""
        if not changed:
            log.info("the configuration has not changed: nothing to reload")
            return
        log.info("reloading, for a change of %s", ", ".join(changed), extra=about(Kind.CONFIG_CHANGED))
        self.event("config_changed", data={"keys": list(changed)})

    def ollama(self, up: bool) -> None:  # noqa: FBT001
        """Ollama has come or gone."""
        self._ollama_up = up
        self.state()
        self.event("ollama_up" if up else "ollama_down", severity="info" if up else "warning")

    def model_changed(self, change: Change) -> None:
        """A load or unload has ended."""
        outcome = change.outcome
        self._records.model(change)
        level, severity = (logging.WARNING, "warning") if change.error else (logging.INFO, "info")
        result = change.error or f"{change.seconds:.2f} s"
        extra = about(Kind.MODEL_CHANGED, model=change.model)
        log.log(level, "%s %s (%s): %s", change.model, outcome, change.reason, result, extra=extra)
        event = Event(type=f"model_{outcome}", ts=self._now(), severity=severity, data=_change_data(change))
        self._bridge.publish_event(event)
        self._publish("models", self._models())

    def model_pulling(self, model: str, status: str, completed: int, total: int) -> None:
        """At most one event a percent, since Ollama tells of every block."""
        percent = 100 * completed // total if total else 0
        if (model, status, percent) != self._pulled:
            self._pulled = (model, status, percent)
            data = {"model": model, "status": status, "percent": percent, "total_bytes": total}
            self._bridge.publish_event(Event(type="model_pulling", ts=self._now(), data=data))

    def task_finished(self, finished: Finished) -> None:
        """A task has ended: its row and its one line in the journal."""
        result = finished.result
        self._records.task(finished)
        extra = about(Kind.TASK_ENDED, task_id=result.id, src=result.src, model=result.model)
        figures = _figures(result, quoting=self._config.log.prompts)
        log.info("task %s/%s %s%s", result.src, result.id, result.state, figures, extra=extra)
        if self._config.log.prompts:
            task = finished.stored.task
            log.info(
                "task %s/%s asked %r, answered %r", *task.key, task.prompt or task.messages, result.text, extra=extra
            )

    def sample(self) -> None:
        """Take one sample of the board and tell it."""
        states = self._pool.states
        sample = self._sampler.sample(
            OllamaState(
                reachable=self._ollama_up,
                version=self._pool.ollama_version,
                resident_models=tuple(state.name for state in states),
                resident_bytes=sum(state.size_bytes for state in states),
            ),
            ts=self._now(),
            boot=self._clock.boot_id(),
            clock_synced=self._clock.synced(),
            queue_depth=sum(self._store.depth().values()),
            outbox=self._store.unsent_count(),
        )
        self._records.telemetry(sample)
        self._bridge.publish_telemetry(sample)

    # -- inside

    def _now(self) -> str:
        return iso(self._clock.wall())

    def _queue(self) -> dict[str, Any]:
        running = self._worker.running()
        return {
            "waiting": {str(priority): count for priority, count in self._store.depth().items()},
            "running": {"id": running[0].id, "src": running[0].src, "model": running[0].model} if running else None,
            "unsent": self._store.unsent_count(),
        }

    def _models(self) -> dict[str, Any]:
        states = [state.to_dict() for state in self._pool.states]
        for state in states:
            del state["idle_s"]  # would change at every look
        return {
            "models": states,
            "resident_bytes": sum(state["size_bytes"] for state in states),
            "budget_bytes": self._pool.limits.budget_bytes,
            "available": list(self._pool.catalogue.names()),
            "default": normalise(self._config.models.default),
        }

    def _publish(self, name: str, data: dict[str, Any]) -> None:
        """A retained topic, sent only when it says something new."""
        text = compact(data)
        with self._lock:
            if self._published.get(name) == text:
                return
            self._published[name] = text
            self._bridge.publish_state(name, data)


def birth_certificate(config: Config, *, boot: str, mqtt: str | None, started: str) -> dict[str, Any]:
    """What N/info says; docs/mqtt.md explains it."""
    queue = config.queue
    return {
        "version": __version__,
        "api": 1,
        "node": config.node_name,
        "host": socket.gethostname(),
        "boot": boot,
        "mqtt": mqtt,
        "started": started,
        "limits": {
            "payload_bytes": queue.max_payload_bytes,
            "tasks": queue.max_tasks,
            "ttl_s": queue.default_ttl_s,
            "attempts": queue.max_attempts,
        },
    }


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


def _figures(result: Result, *, quoting: bool) -> str:
    """The figures of a task for its one line in the journal; ``quoting`` allows for what its sender or model wrote."""
    parts = [f" on {result.model}"] if result.model else []
    for name, value in (("queued", result.queued_s), ("load", result.load_s), ("run", result.run_s)):
        if value is not None:
            parts.append(f", {name} {value:.2f} s")
    if result.tokens_per_s:
        parts.append(f", {result.output_tokens} tokens at {result.tokens_per_s:.1f}/s")
    if error := result.error:
        parts.append(f": {error.code}: {error.message}" if quoting else f": {error.unquoting}")
    return "".join(parts)
