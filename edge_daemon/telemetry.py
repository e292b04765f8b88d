"""What the board is doing: samples for MQTT and the log, and the cost of one task. The only user of psutil.

Nothing here blocks or fails: a share of the processor is the difference of two counters, and a sensor that is missing
or broken reads as None.
"""

import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from edge_daemon.messages import Record

T = TypeVar("T")

THROTTLE_FLAGS = ("under_voltage", "frequency_capped", "throttled", "soft_temperature_limit")
"""Of the Raspberry Pi's firmware: bit n of its word says "now", bit 16 + n "since boot"."""

HOT_C = 80.0
"""Where a Raspberry Pi begins to slow down."""

_THROTTLED = "devices/platform/soc/soc:firmware/get_throttled"
_OLLAMA_CGROUP = "fs/cgroup/system.slice/ollama.service"


def memory_available() -> int:
    """Bytes that can be had without swapping; none when nobody can tell, as when no more files can be opened."""
    try:
        return int(psutil.virtual_memory().available)
    except OSError:
        return 0


def memory_total() -> int:
    """Bytes of memory that the board has."""
    return int(psutil.virtual_memory().total)


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaState(Record):
    """What the pool knows of Ollama; telemetry hands it on."""

    reachable: bool
    version: str | None = None
    resident_models: tuple[str, ...] = ()
    resident_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskUsage(Record):
    """What one task cost the board. The fields are columns of the log; None is a sensor that failed."""

    cpu_usage_percent: float | None
    """Of all cores together, from the start to the end of the task."""
    memory_usage_percent: float | None
    """At the end of the task, with its model still in memory; so are the fields below without a note."""
    system_load_avg: float | None
    """Over the last minute."""
    runner_cpu_seconds: float | None = None
    """CPU time of the process that ran the model, over the task."""
    runner_rss_bytes: int | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] | None = None
    """The ``THROTTLE_FLAGS`` that hold; None on a board that does not tell."""
    memory_available_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Consumption:
    """CPU seconds since its start, and bytes of memory now, of one process or service."""

    cpu_s: float
    rss_bytes: int | None


class Board:
    """The sensors outside psutil. ``sys_root`` is ``/sys``, or a test's imitation of it."""

    def __init__(self, sys_root: Path = Path("/sys")) -> None:
        self._root = sys_root

    def temperature_c(self) -> float | None:
        """Of the hottest thermal zone."""
        zones = attempt(sorted, self._root.glob("class/thermal/thermal_zone*/temp"))
        readings = [attempt(_number, zone) for zone in zones or ()]
        hottest = max((reading for reading in readings if reading is not None), default=None)
        return None if hottest is None else hottest / 1000

    def throttling(self) -> dict[str, list[str]] | None:
        """``{"now": [...], "since_boot": [...]}`` with names of ``THROTTLE_FLAGS``; None on other boards than a Pi."""
        word = attempt(_number, self._root / _THROTTLED, 16)
        return None if word is None else {"now": _flags(word), "since_boot": _flags(word >> 16)}

    def ollama_service(self) -> Consumption | None:
        """Of Ollama's whole systemd service with its runners, visible where its processes are hidden from us.

        Its memory counts the model files that are mapped, and is None without the kernel's memory controller.
        """
        group = self._root / _OLLAMA_CGROUP
        cpu_us = attempt(_cpu_usec, group / "cpu.stat")
        memory = attempt(_number, group / "memory.current")
        return None if cpu_us is None else Consumption(cpu_us / 1e6, memory)


class Runners:
    """The processes in which Ollama runs models. To look for them is dear, so it is done once per change of residency.

    Args:
        is_runner: tells by a process's command line.
        board: asked instead when no such process can be seen, as under systemd's ``ProtectProc=invisible``.
    """

    def __init__(self, board: Board, is_runner: Callable[[Sequence[str]], bool] | None = None) -> None:
        self._board = board
        self._is_runner = is_runner or is_ollama_runner
        self._processes: tuple[psutil.Process, ...] = ()
        self.find()

    def find(self) -> None:
        """Look for them again. To be called after every load and unload, by any one thread."""
        found = attempt(_all_processes) or []
        self._processes = tuple(process for process in found if self._is_runner(process.info["cmdline"] or ()))

    def consumption(self) -> dict[int, Consumption]:
        """By process id; by 0 for the service as a whole when no runner is visible; empty when not even that is."""
        by_pid = {process.pid: attempt(_consumption, process) for process in self._processes}
        seen = {pid: used for pid, used in by_pid.items() if used is not None}
        if not seen and (service := self._board.ollama_service()):
            return {0: service}
        return seen


def is_ollama_runner(command: Sequence[str]) -> bool:
    """Whether this is the command line of one of Ollama's runners: it has had three kinds over the years."""
    program = Path(command[0]).name if command else ""
    return program in ("llama-server", "ollama_llama_server") or (program == "ollama" and command[1:2] == ["runner"])


class TaskMeter:
    """Measures one task, from the creation of the meter to ``finish``."""

    def __init__(self, board: Board, runners: Runners) -> None:
        self._board = board
        self._runners = runners
        self._runner_start = runners.consumption()
        self._cpu_start = attempt(_all_cores)

    def finish(self) -> TaskUsage:
        """What the task has cost."""
        memory = attempt(psutil.virtual_memory)
        throttling = self._board.throttling()
        runner_cpu_s, runner_rss = self._runner()
        return TaskUsage(
            cpu_usage_percent=_percent(self._cpu_start, attempt(_all_cores)),
            memory_usage_percent=memory and memory.percent,
            system_load_avg=attempt(_load_average),
            runner_cpu_seconds=runner_cpu_s,
            runner_rss_bytes=runner_rss,
            temperature_c=self._board.temperature_c(),
            throttled=None if throttling is None else tuple(throttling["now"]),
            memory_available_bytes=memory and memory.available,
        )

    def _runner(self) -> tuple[float | None, int | None]:
        """The runner of this task's model is the one that has worked most since the start."""
        worked = [
            (now.cpu_s - (self._runner_start[pid].cpu_s if pid in self._runner_start else 0), now.rss_bytes)
            for pid, now in self._runners.consumption().items()
        ]
        cpu_s, rss_bytes = max(worked, key=lambda pair: pair[0], default=(None, None))
        return cpu_s if cpu_s is None else round(cpu_s, 3), rss_bytes


class Sampler:
    """Takes the periodic sample; shares of the processor are since the sample before. For one thread."""

    def __init__(self, *, data_dir: Path, board: Board) -> None:
        self._data_dir = data_dir
        self._board = board
        self._self = psutil.Process()
        self._started = time.monotonic()
        self._cores = attempt(_cores) or []
        self._seq = 0

    def sample(
        self, ollama: OllamaState, *, ts: str, boot: str, clock_synced: bool, queue_depth: int, outbox: int
    ) -> dict[str, Any]:
        """One sample as plain JSON data, explained in docs/mqtt.md. Its ``seq`` begins at 1 with each start.

        Args:
            ollama: what the pool knows.
            ts: now, RFC 3339.
            boot: id of this boot.
            clock_synced: whether ``ts`` can be believed.
            queue_depth: tasks waiting.
            outbox: results not yet delivered.
        """
        self._seq += 1
        service = self._board.ollama_service()
        return {
            "seq": self._seq,
            "ts": ts,
            "boot": boot,
            "clock_synced": clock_synced,
            "cpu": self._cpu(),
            "memory": attempt(_memory),
            "load": attempt(psutil.getloadavg),
            "temperature_c": self._board.temperature_c(),
            "throttling": self._board.throttling(),
            "disk": attempt(self._disk),
            "network": attempt(_network),
            "ollama": {**ollama.to_dict(), "service_bytes": service and service.rss_bytes},
            "daemon": {**(attempt(self._daemon) or {}), "queue_depth": queue_depth, "outbox": outbox},
        }

    def _cpu(self) -> dict[str, Any] | None:
        before, self._cores = self._cores, attempt(_cores) or []
        if not before or not self._cores:
            return None
        per_core = [_percent(*pair) for pair in zip(before, self._cores, strict=False)]
        return {"percent": _percent(_summed(before), _summed(self._cores)), "per_core": per_core}

    def _disk(self) -> dict[str, int]:
        disk = psutil.disk_usage(str(self._data_dir))
        return {"total_bytes": disk.total, "free_bytes": disk.free}

    def _daemon(self) -> dict[str, Any]:
        with self._self.oneshot():
            own = _consumption(self._self)
            return {
                "rss_bytes": own.rss_bytes,
                "cpu_s": round(own.cpu_s, 2),
                "threads": self._self.num_threads(),
                "fds": self._self.num_fds(),
                "context_switches": _context_switches(),
                "uptime_s": round(time.monotonic() - self._started, 1),
            }


@dataclass(frozen=True, slots=True)
class _Ticks:
    """Seconds that processors have worked, out of those that have passed for them."""

    busy: float
    total: float


def _cores() -> list[_Ticks]:
    return [_ticks(times) for times in psutil.cpu_times(percpu=True)]


def _all_cores() -> _Ticks:
    return _ticks(psutil.cpu_times())


def _ticks(times: Any) -> _Ticks:
    total = sum(times) - times.guest - times.guest_nice  # the kernel counts guests as user and nice already
    return _Ticks(total - times.idle - times.iowait, total)


def _summed(cores: Iterable[_Ticks]) -> _Ticks:
    return _Ticks(sum(core.busy for core in cores), sum(core.total for core in cores))


def _percent(before: _Ticks | None, after: _Ticks | None) -> float | None:
    """The share that was busy; None when less than a tick of the kernel (10 ms) has passed."""
    if before is None or after is None or after.total <= before.total:
        return None
    return round(min(max(100 * (after.busy - before.busy) / (after.total - before.total), 0.0), 100.0), 1)


def _memory() -> dict[str, Any]:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return {
        "total_bytes": memory.total,
        "available_bytes": memory.available,
        "percent": memory.percent,
        "swap_total_bytes": swap.total,
        "swap_used_bytes": swap.used,
    }


def _network() -> dict[str, int]:
    """Since boot, without the loopback, over which MQTT and Ollama may run."""
    outside = [card for name, card in psutil.net_io_counters(pernic=True).items() if name != "lo"]
    return {
        "received_bytes": sum(card.bytes_recv for card in outside),
        "sent_bytes": sum(card.bytes_sent for card in outside),
    }


def _all_processes() -> list[psutil.Process]:
    return list(psutil.process_iter(["cmdline"]))


def _consumption(process: psutil.Process) -> Consumption:
    times = process.cpu_times()
    return Consumption(times.user + times.system, process.memory_info().rss)


def _context_switches() -> int:
    """Of this process since its start, threads that have ended included: how often it has woken the board."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_nvcsw + used.ru_nivcsw


def _load_average() -> float:
    """Over the last minute."""
    return psutil.getloadavg()[0]


def _flags(word: int) -> list[str]:
    return [name for bit, name in enumerate(THROTTLE_FLAGS) if word >> bit & 1]


def _number(path: Path, base: int = 10) -> int:
    return int(path.read_text(encoding="ascii"), base)


def _cpu_usec(path: Path) -> int:
    lines = path.read_text(encoding="ascii").splitlines()
    return int(dict(line.split() for line in lines)["usage_usec"])


def attempt(read: Callable[..., T], *args: Any) -> T | None:
    """What ``read(*args)`` gives, None when it fails: a sensor must never be why a task or a thread ends."""
    try:
        return read(*args)
    except Exception:
        return None
