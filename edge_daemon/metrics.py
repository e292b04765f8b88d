"""What Prometheus is told: counters fed by the rows of the CSV log, so that the two agree, and gauges read when asked.

The counters begin at 0 with the daemon, as is usual; the log goes on from where it was.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily

from edge_daemon import __version__
from edge_daemon.messages import Priority, TaskState

WAITS_S = (0.1, 0.5, 1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 14_400)
LOADS_S = (0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)


class Metrics:
    """All metrics of one daemon, in a registry of its own. Any thread may call it.

    Args:
        figures: how things are now: ``queue`` and ``models`` as on the topics of these names, ``broker_up``,
            ``ollama_up`` and ``state``.
    """

    def __init__(self, figures: Callable[[], Mapping[str, Any]], *, node: str) -> None:
        self._registry = _Registry()
        self._figures = figures
        Info("edge_llm_build", "Version and node.", registry=self._registry).info(
            {"version": __version__, "node": node}
        )
        self._tasks = self._counter("tasks", "Tasks that have ended, by the state in which they did.", "state")
        self._errors = self._counter("task_errors", "Tasks that have ended with an error, by its code.", "code")
        self._rejected = self._counter("rejected", "Tasks refused at the door, by code; they have no row.", "code")
        self._preempted = self._counter("preemptions", "Times that a task was set back without a failed attempt.")
        self._waits = self._histogram("queue_wait_seconds", "From accepted to the last begin.", WAITS_S, "priority")
        self._latency = self._histogram("task_seconds", "From accepted to ended.", WAITS_S)
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens read.", "model")
        self._output_tokens = self._counter("output_tokens", "Tokens written.", "model")
        self._generating = self._counter("generation_seconds", "Time spent writing tokens.", "model")
        self._speed = Gauge(
            "edge_llm_tokens_per_second", "Speed of the model's last answer.", ["model"], registry=self._registry
        )
        self._loads = self._counter("model_loads", "Models loaded.", "model")
        self._failed_loads = self._counter("model_load_failures", "Loads that failed.", "model")
        self._unloads = self._counter("model_unloads", "Models unloaded, for whatever reason.", "model")
        self._swaps = self._counter("swaps", "Loads for which another model had to go.")
        self._evictions = self._counter("evictions", "Models that had to go for a load.", "model")
        self._load_s = self._histogram("model_load_seconds", "How long loads took.", LOADS_S)
        self._events = self._counter("events", "Events, by type.", "type")
        for state in TaskState:
            if state.terminal and state is not TaskState.REJECTED:
                self._tasks.labels(state)
        for priority in Priority:
            self._waits.labels(priority)
        ProcessCollector(namespace="edge_llm", registry=self._registry)
        self._registry.register(_Now(self._gauges))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"edge_llm_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"edge_llm_{name}", text, labels, buckets=buckets, registry=self._registry)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def refused(self, code: str) -> None:
        """A task was refused."""
        self._rejected.labels(code).inc()

    def count(self, row: Mapping[str, Any]) -> None:
        """A row was added to the CSV log."""
        match row["record"]:
            case "task":
                self._count_task(row)
            case "model":
                self._count_model(row)
            case "event":
                self._events.labels(row["task_type"]).inc()

    def _count_task(self, row: Mapping[str, Any]) -> None:
        self._tasks.labels(row["status"]).inc()
        if row["error_code"]:
            self._errors.labels(row["error_code"]).inc()
        self._preempted.inc(row["preemptions"])
        self._waits.labels(row["priority"]).observe(row["queue_wait_ns"] / 1e9)
        self._latency.observe(row["task_latency_ns"] / 1e9)
        model = row["model_name"]
        if (
            row["eval_count"] or row["prompt_eval_count"]
        ):  # else it never came to that, and the name is only what somebody wished
            self._prompt_tokens.labels(model).inc(row["prompt_eval_count"])
            self._output_tokens.labels(model).inc(row["eval_count"])
            self._generating.labels(model).inc(row["eval_duration_ns"] / 1e9)
            self._speed.labels(model).set(row["tokens_per_second"])

    def _count_model(self, row: Mapping[str, Any]) -> None:
        counters = {"loaded": self._loads, "load_failed": self._failed_loads, "unloaded": self._unloads}
        if counter := counters.get(row["status"]):
            counter.labels(row["model_name"]).inc()
        if row["status"] == "loaded":
            self._load_s.observe(row["model_switching_time_ns"] / 1e9)
            self._swaps.inc(bool(row["evicted_models"]))
        for model in row["evicted_models"]:
            self._evictions.labels(model).inc()

    def _gauges(self) -> Iterator[GaugeMetricFamily]:
        now = self._figures()
        queue, models = now["queue"], now["models"]
        yield _gauge("queue_depth", "Tasks that wait, by priority.", queue["waiting"], "priority")
        yield _gauge("running", "Whether a task is running.", bool(queue["running"]))
        yield _gauge("outbox", "Results that the broker has not confirmed.", queue["unsent"])
        sizes = {model["name"]: model["size_bytes"] for model in models["models"]}
        yield _gauge("resident_bytes", "Memory of the models that are loaded.", sizes, "model")
        yield _gauge("memory_budget_bytes", "What all models together may take.", models["budget_bytes"])
        yield _gauge("broker_up", "Whether the broker is connected.", now["broker_up"])
        yield _gauge("ollama_up", "Whether Ollama answers.", now["ollama_up"])
        yield _gauge("ready", "Whether the state is ready.", now["state"] == "ready")


class _Registry(CollectorRegistry):
    """Without the time at which each counter was made: it doubles the text and tells only when this process began."""

    def collect(self) -> Iterator[Metric]:
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class _Now:
    """What is read when somebody asks."""

    def __init__(self, gauges: Callable[[], Iterator[GaugeMetricFamily]]) -> None:
        self._gauges = gauges

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing in advance: the parts need not be there when this is registered."""
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        return self._gauges()


def _gauge(name: str, text: str, value: float | Mapping[str, float], label: str | None = None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"edge_llm_{name}", text, labels=[label] if label else None)
    for key, number in value.items() if isinstance(value, Mapping) else ((None, value),):
        family.add_metric([key] if key else [], number)
    return family
