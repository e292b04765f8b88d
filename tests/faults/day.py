"""A compressed day (F35): 24 hours of a device at 50 times speed, with a fault every quarter of an hour or so.

The first half brings steady arrivals (T1), the second bursts (T2), at half of what the modelled board can do. The day
has four parts, and after each the oracle judges. In the last part nobody kills the daemon, so that a leak would show.
"""

import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.traces import BUDGETS, FLEET, Trace, bursty, steady
from tests.fake_ollama import FakeModel, Fault
from tests.faults.bench import Bench, repeated
from tests.faults.model_server import OllamaProcess
from tests.faults.oracle import Usage, growth, usage
from tests.faults.table import Line, Options

SPEED = 50.0
LOAD = 0.5
PARTS = 4
EVERY_S = 900.0
"""Of device time between two faults, in the mean."""
LOOK_S = 2.0
"""Between two looks at what the daemon takes."""
WARM_UP = 0.2
"""Of the last part: until then its daemon may still grow."""
SETTLE_S = 600.0
"""For a backlog of bursts, on a machine that may have much else to do."""
SMALLER = 10
"""The models take a tenth of the memory, so that the day can be had on a small machine."""

CSV_BYTES, CSV_KEEP = 1 << 20, 3
RETENTION_BYTES = 2 << 20
WAL_BYTES = 4 << 20
"""What SQLite's write-ahead log may keep on the disk; it may take as much again before it is cut."""
SETTINGS: dict[str, Any] = {
    "models": {"default": FLEET[0].name},
    "mqtt": {"keepalive_s": 5},
    "ollama": {
        "load_timeout_s": 900 / SPEED,
        "first_token_timeout_s": 300 / SPEED,
        "token_gap_timeout_s": 120 / SPEED,
        "task_timeout_s": 1800 / SPEED,
    },
    "pool": {"memory_budget_bytes": BUDGETS[2] // SMALLER, "model_timeout_s": 300 / SPEED},
    "scheduler": {"soft_wait_s": {"high": 60 / SPEED, "normal": 300 / SPEED, "low": 1800 / SPEED}},
    "csv": {"rotate_bytes": CSV_BYTES, "keep": CSV_KEEP},
    "queue": {"retention_bytes": RETENTION_BYTES, "retention_s": 3600},
}
RUDE = sorted(set(Fault) - {Fault.NONE, Fault.HUGE_LINE})


@dataclass(slots=True, kw_only=True)
class Looks:
    """What the daemon and its files took over time."""

    part: list[Usage] = field(default_factory=list)
    """Of the daemon, in the present part of the day."""
    store_bytes: int = 0
    """The most that it was."""
    log_bytes: int = 0

    def grown(self) -> list[str]:
        """I6: the last quarter of the part against the first, after a warm-up."""
        warm = self.part[int(len(self.part) * WARM_UP) :]
        quarter = max(1, len(warm) // 4)
        return growth(_typical(warm[:quarter]), _typical(warm[-quarter:]))

    def slope(self) -> str:
        """Of the resident memory, by least squares."""
        warm = self.part[int(len(self.part) * WARM_UP) :]
        hours = [n * LOOK_S * SPEED / 3600 for n in range(len(warm))]
        line = statistics.linear_regression(hours, [it.rss_bytes / 1024 for it in warm])
        return f"RSS {line.intercept / 1024:.1f} MiB {line.slope:+.1f} KiB an hour, {warm[0].fds} to {warm[-1].fds} fds"

    def too_large(self) -> list[str]:
        """Files beyond their bounds."""
        bounds = {
            "the store": (self.store_bytes, 2 * RETENTION_BYTES + 2 * WAL_BYTES),
            "the CSV log": (self.log_bytes, (CSV_KEEP + 1) * CSV_BYTES + CSV_BYTES),
        }
        return [f"{name} took {size} bytes of {limit}" for name, (size, limit) in bounds.items() if size > limit]


class Day:
    """One day, being lived through."""

    def __init__(self, bench: Bench, ollama: OllamaProcess, rng: random.Random) -> None:
        self.bench = bench
        self.ollama = ollama
        self.rng = rng
        self.faults: Counter[str] = Counter()
        self.looks = Looks()
        self._pause = threading.Event()

    def part(self, jobs: Trace, *, daemon_lives: bool) -> list[str]:
        """Play the jobs, with faults among them; what is wrong when all has settled."""
        self.looks.part.clear()
        self.bench.daemon.start(ready=False)
        with self._arriving(jobs) as over, repeated(self._look, lambda: LOOK_S):
            while not over.wait(self.rng.expovariate(SPEED / EVERY_S)):
                fault = self.rng.choice(self._choice(daemon_lives=daemon_lives))
                self.faults[fault.__name__.strip("_").replace("_", " ")] += 1
                fault()
                if not self.bench.daemon.is_alive():
                    return [f"the daemon ended by itself, with status {self.bench.daemon.wait()}"]
        grown = self.looks.grown() if daemon_lives else []
        return [*self.bench.verdict(SETTLE_S), *grown]

    def _choice(self, *, daemon_lives: bool) -> list[Callable[[], None]]:
        deaths = [] if daemon_lives else [self._kill_daemon, self._restart_daemon]
        return [
            *deaths,
            *(self._kill_broker, self._restart_broker, self._kill_ollama, self._block_loads, self._silence_ollama),
            *(self._busy_ollama, self._rude_model, self._stop_daemon, self._stop_broker, self._stop_ollama),
        ]

    def _wait(self, at_most_s: float) -> None:
        self._pause.wait(self.rng.uniform(0, at_most_s))

    @contextmanager
    def _arriving(self, jobs: Trace) -> Iterator[threading.Event]:
        """Publish the jobs in their time; the event is set when all have been."""
        over = threading.Event()

        def play() -> None:
            began = time.monotonic()
            for job in jobs:
                self._pause.wait(max(0.0, job.at_s / SPEED - (time.monotonic() - began)))
                words = " ".join(f"w{n}" for n in range(int(job.output_tokens)))
                form = self.rng.choices(["topic", "field", "nonsense"], [10, 10, 1])[0]
                self.bench.traffic.send(form=form, prompt=f"{job.seq} {job.at_s} {words}", model=job.model.name)
            over.set()

        thread = threading.Thread(target=play, name="trace", daemon=True)
        thread.start()
        yield over
        thread.join()

    def _look(self) -> None:
        daemon, looks = self.bench.daemon, self.looks
        with suppress(psutil.NoSuchProcess, AssertionError):  # it was killed under our eyes
            looks.part.append(usage(daemon.pid))
        looks.store_bytes = max(looks.store_bytes, _bytes(daemon.data_dir.glob("queue.db*")))
        looks.log_bytes = max(looks.log_bytes, _bytes(daemon.csv_path.parent.glob(f"{daemon.csv_path.stem}*.csv")))

    # -- faults; each has ended when it returns, or ends by itself

    def _kill_daemon(self) -> None:
        self.bench.daemon.kill()
        self._wait(5)
        self.bench.daemon.start(ready=False)

    def _restart_daemon(self) -> None:
        assert self.bench.daemon.stop(60) == 0
        self.bench.daemon.start(ready=False)

    def _kill_broker(self) -> None:
        self.bench.broker.kill()
        self._wait(5)
        self.bench.broker.start()

    def _restart_broker(self) -> None:
        self.bench.broker.stop()
        self._wait(5)
        self.bench.broker.start()

    def _kill_ollama(self) -> None:
        self.ollama.kill()
        self._wait(10)
        self.ollama.start()

    def _block_loads(self) -> None:
        self._switched("loads_hang", 30)

    def _silence_ollama(self) -> None:
        self._switched("quick_hang", 15)

    def _busy_ollama(self) -> None:
        self._switched("busy", 10)

    def _switched(self, switch: str, at_most_s: float) -> None:
        self.ollama.configure(**{switch: True})
        self._wait(at_most_s)
        self.ollama.configure(**{switch: False})

    def _rude_model(self) -> None:
        model, fault = self.rng.choice(FLEET).name, self.rng.choice(RUDE)
        self.ollama.configure(model=model, fault=fault)
        self._wait(15)
        self.ollama.configure(model=model, fault=Fault.NONE)

    def _stop_daemon(self) -> None:
        self._frozen(self.bench.daemon.signal)

    def _stop_broker(self) -> None:
        self._frozen(self.bench.broker.signal)

    def _stop_ollama(self) -> None:
        self._frozen(self.ollama.signal)

    def _frozen(self, send: Callable[[signal.Signals], None]) -> None:
        send(signal.SIGSTOP)
        self._wait(15)
        send(signal.SIGCONT)


def run(options: Options) -> Iterator[Line]:
    """The whole day, or as many hours as asked for."""
    part_h = options.hours / PARTS
    with _ollama() as ollama, Bench(options.directory, seed=options.seed, fake=ollama, **SETTINGS) as bench:
        bench.broker_may_lose = bench.store_may_prune = True
        day = Day(bench, ollama, random.Random(f"day {options.seed}"))  # noqa: S311
        found: list[str] = []
        for number in range(PARTS):
            # A trace of its own for each: the bursts of a longer one may all lie in one half of it.
            jobs = (steady if number < PARTS / 2 else bursty)(LOAD, PARTS * options.seed + number, hours=part_h)
            found += day.part(jobs, daemon_lives=number == PARTS - 1)
            print(f"part {number + 1}: {len(found)} violations, {dict(day.faults)}, {day.looks.slope()}", flush=True)
        yield _line(day, options.hours, [*found, *day.looks.too_large()])


def _ollama() -> OllamaProcess:
    models = [
        FakeModel(
            model.name,
            size_bytes=model.file_bytes // SMALLER,
            ram_bytes=model.size_bytes // SMALLER,
            load_s=model.load_s / SPEED,
            first_token_s=123 / model.prefill_tps / SPEED,
            token_s=1 / model.decode_tps / SPEED,
            dribble_s=1 / SPEED,
        )
        for model in FLEET
    ]
    return OllamaProcess(*models, memory_bytes=BUDGETS[2] // SMALLER)


def _line(day: Day, hours: float, found: list[str]) -> Line:
    evidence, looks = day.bench.evidence(), day.looks
    states = Counter(it[0]["state"] for it in evidence.results().values())
    faults = ", ".join(f"{count} {name}" for name, count in sorted(day.faults.items()))
    figures = (
        f"{len(evidence.accepted())} accepted",
        ", ".join(f"{count} {state}" for state, count in states.most_common()),
        f"{evidence.duplicates()} results again",
        f"lost by the broker: {len(evidence.lost_by_broker())} tasks, {len(evidence.unheard())} results",
        f"in the last part {looks.slope()}",
        f"store at most {looks.store_bytes / 1e6:.1f} MB, log {looks.log_bytes / 1e6:.1f} MB",
    )
    return Line(
        fault=f"F35: {hours:g} hours at {SPEED:g} times speed; {day.faults.total()} faults: {faults}",
        result="; ".join(figures),
        violations=found,
    )


def _typical(looks: list[Usage]) -> Usage:
    return Usage(
        rss_bytes=int(statistics.median(it.rss_bytes for it in looks)),
        fds=int(statistics.median(it.fds for it in looks)),
        threads=int(statistics.median(it.threads for it in looks)),
    )


def _bytes(paths: Any) -> int:
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # rotated away under our eyes
            continue
    return total
