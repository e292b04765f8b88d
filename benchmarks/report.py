"""``edge-llm report`` on a log of 100,000 rows: how long it takes, and how much memory."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from random import Random

from benchmarks import rig
from benchmarks.table import Line, at_most, megabytes
from edge_daemon.clock import Clock, iso
from edge_daemon.logger import CsvLog, Row, Timings, model_row, task_row
from edge_daemon.messages import Failure, Priority, Result, Task, TaskState
from tests.fakes import FakeClock

ROWS = 100_000
SEED = 20260131
LIMIT_S = 10.0
LIMIT_BYTES = 300e6
BATCH = 2000
# A Pi 4B: tokens a second, and seconds to load from an SD card.
MODELS = {"qwen2.5:0.5b-instruct": (6.5, 10.0), "smollm2:360m": (8.1, 9.9), "llama3.2:1b": (4.3, 20.2)}
DEVICES = [f"device-{n}" for n in range(24)]
TYPES = ("classify", "summarise", "extract", None)
MEASURE = """
import json, resource, sys, time
from edge_daemon.cli import main
began = time.monotonic()
main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([time.monotonic() - began, used.ru_maxrss * 1024]), file=sys.stderr)
"""
READ = """
import csv, json, sys, time
began = time.monotonic()
for path in sys.argv[1:]:
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            pass
print(json.dumps([time.monotonic() - began]), file=sys.stderr)
"""


def run(directory: Path, repetitions: int, *, rows: int = ROWS) -> list[Line]:
    """Write the log once; report on it, page and plots included, and read it with csv alone, in turns."""
    path = directory / "llm_metrics.csv"
    generate(path, rows)
    files = sorted(map(str, directory.glob("llm_metrics*.csv")))
    reports, reads = [], []
    for _ in range(repetitions):
        reports.append(_told(MEASURE, "report", "--csv", str(path), "--html", str(directory / "report.html")))
        reads.append(_told(READ, *files)[0])
    work = f"edge-llm report --html on {rows:,} rows in {len(files)} files"
    seconds, sizes = [took for took, _ in reports], [size for _, size in reports]
    limits = [LIMIT_S] * repetitions, [LIMIT_BYTES] * repetitions
    return [
        _line("report", work, "the limit", seconds, limits[0], aim=True),
        _line("report", work, "csv.reader on the same files", seconds, reads),
        replace(_line("report, memory", work, "the limit", sizes, limits[1], aim=True), show=megabytes),
    ]


def _line(name: str, work: str, against: str, ours: list[float], theirs: list[float], *, aim: bool = False) -> Line:
    limit = at_most(1.0) if aim else None
    return Line(name=name, work=work, against=against, ours=ours, theirs=theirs, show=_seconds, aim=limit)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s"


def _told(program: str, *arguments: str) -> list[float]:
    done = subprocess.run(
        rig.python("-c", program, *arguments),
        cwd=rig.ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    figures: list[float] = json.loads(done.stderr.splitlines()[-1])
    return figures


def generate(path: Path, rows: int, *, seed: int = SEED) -> None:
    """Write a log of so many rows as four busy weeks leave it: tasks by day, loads, telemetry all the time."""
    random, clock = Random(seed), FakeClock(wall_s=1_767_225_600.0)
    log = CsvLog(path, rotate_bytes=10_485_760, keep=100, text="full", clock=clock)
    step_s = 28 * 86_400 / rows
    for begin in range(0, rows, BATCH):
        batch = []
        for _ in range(min(BATCH, rows - begin)):
            clock.advance(step_s * 2 * random.random())
            batch.append(_row(random, clock))
        log.append(batch)
    log.close()


def _row(random: Random, clock: Clock) -> Row:
    busy = 0.5 + 0.4 * ((clock.wall() / 86_400 % 1) > 0.3)  # fewer tasks at night
    kind = random.random()
    if kind < busy:
        return _task(random, clock)
    return _load(random) if kind < busy + 0.03 else _sample(random, clock, busy)


def _task(random: Random, clock: Clock) -> Row:
    model = random.choice([*MODELS])
    speed, load_s = MODELS[model]
    tokens = random.randrange(4, 120)
    run_s, wait_s = tokens / speed, random.expovariate(1 / 20)
    task = Task(
        id=f"t{random.getrandbits(40):x}",
        src=random.choice(DEVICES),
        prompt="Temperature 41 C, limit 30 C: alarm or normal? " * random.randrange(1, 4),
        priority=random.choice([*Priority]),
        task_type=random.choice(TYPES),
        model=model,
        ttl_s=86_400,
        received_at=clock.wall(),
        max_tokens=512,
        prompt_tokens=12,
    )
    failed = random.random() < 0.03
    result = Result(
        id=task.id,
        src=task.src,
        seq=1,
        state=TaskState.FAILED if failed else TaskState.SUCCEEDED,
        model=model,
        text=None if failed else "It is an alarm: 41 is above 30. " * 3,
        error=Failure(code=random.choice(["no_memory", "runner_died"]), message="", retryable=True) if failed else None,
        attempt=1,
        queued_s=wait_s,
        load_s=load_s if random.random() < 0.05 else 0.0,
        run_s=run_s,
        total_s=wait_s + run_s,
        output_tokens=tokens,
        ts=iso(clock.wall()),
    )
    noise = random.gauss(1, 0.08)
    return task_row(task, result, None, Timings(eval_count=tokens, eval_duration_ns=int(run_s * noise * 1e9)))


def _load(random: Random) -> Row:
    model = random.choice([*MODELS])
    evicted = [name for name in MODELS if name != model][: random.randrange(2)]
    took_ns = int(MODELS[model][1] * random.gauss(1, 0.1) * 1e9)
    return model_row(model, status="loaded", reason="plan", duration_ns=took_ns, evicted_models=evicted)


def _sample(random: Random, clock: Clock, busy: float) -> Row:
    return {
        "record": "telemetry",
        "timestamp": iso(clock.wall()),
        "memory_usage_percent": round(30 + 40 * busy + random.gauss(0, 4), 1),
        "memory_available_bytes": int(4e9 * (0.7 - 0.4 * busy)),
        "temperature_c": round(45 + 30 * busy + random.gauss(0, 3), 1),
        "throttled": ["under_voltage"] if random.random() < 0.001 else [],
    }
