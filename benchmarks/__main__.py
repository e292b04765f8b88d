"""All measurements: ``python -m benchmarks [--full] [NAME ...]``."""

import argparse
import os
import platform
import sqlite3
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import (
    accept,
    breaker,
    dispatch,
    footprint,
    idle,
    latency,
    policy,
    real,
    report,
    start,
    through_mqtt,
    urgent,
)
from benchmarks.table import Line, summary


@dataclass(frozen=True, slots=True)
class Bench:
    """A measurement, given a place on the disk and so many repetitions; without ``short`` it is a long one."""

    run: Callable[[Path, int], list[Line]]
    full: int = 15
    short: int | None = 5

    def repetitions(self, *, full: bool) -> int:
        """How many to do."""
        return self.full if full or self.short is None else self.short


BENCHES: Mapping[str, Bench] = {
    "footprint": Bench(footprint.run, short=9),
    "latency": Bench(latency.run),
    "accept": Bench(accept.run),
    "mqtt": Bench(through_mqtt.run),
    "dispatch": Bench(dispatch.run),
    "report": Bench(report.run, full=5, short=3),
    "breaker": Bench(breaker.run, full=3, short=None),
    "start": Bench(start.run, short=9),
    "idle": Bench(idle.run, full=10, short=None),  # so many minutes
    "urgent": Bench(urgent.run, full=25, short=None),
    "real": Bench(real.run, full=3, short=None),
}
# These print tables of their own.
TABLES: Mapping[str, Callable[[Sequence[str]], int]] = {"policy": policy.main}


def main() -> None:
    """Run what was asked for and print it line by line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--full", action="store_true", help="everything, and more repetitions")
    parser.add_argument("--minutes", type=int, help="of idle; default: 10")
    known = ", ".join((*BENCHES, *TABLES))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}; without a name, all that are quick")
    options = parser.parse_args()
    if unknown := set(options.names) - BENCHES.keys() - TABLES.keys():
        parser.error(f"no bench is named {min(unknown)}; known are {known}")
    quick = [name for name, bench in BENCHES.items() if bench.short]
    names: list[str] = options.names
    if not names:
        names = [*BENCHES, *TABLES] if options.full else quick
    repetitions = {name: BENCHES[name].repetitions(full=options.full) for name in names if name in BENCHES}
    if options.minutes and "idle" in repetitions:
        repetitions["idle"] = options.minutes
    if repetitions:
        _measure(repetitions)
    for name in names:
        if name in TABLES:
            TABLES[name]([])


def _measure(repetitions: Mapping[str, int]) -> None:
    began_at = time.monotonic()
    print(_conditions(), flush=True)
    lines: list[Line] = []
    # Here and not in /tmp, which may be memory: what is measured is a disk.
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as directory:
        for name, times in repetitions.items():
            place = Path(directory, name)
            place.mkdir()
            for line in BENCHES[name].run(place, times):
                lines.append(line)
                print(f"\n{line}", flush=True)
    print(f"\n{summary(lines)}; {time.monotonic() - began_at:.0f} s, {_load()}", flush=True)


def _conditions() -> str:
    versions = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    return f"{platform.machine()}, {os.cpu_count()} cores, {versions}, {_load()}"


def _load() -> str:
    return f"load average {os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    main()
