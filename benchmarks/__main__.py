"""All measurements: ``python -m benchmarks [--full] [NAME ...]``."""

import argparse
import os
import platform
import sqlite3
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import accept, dispatch, footprint, latency, policy, through_mqtt
from benchmarks.table import Line, summary

# Each is given a place on the disk and the number of repetitions.
BENCHES: Mapping[str, Callable[[Path, int], list[Line]]] = {
    "footprint": footprint.run,
    "latency": latency.run,
    "accept": accept.run,
    "mqtt": through_mqtt.run,
    "dispatch": dispatch.run,
}
# These print tables of their own and take their time: only by name, or with --full.
TABLES: Mapping[str, Callable[[Sequence[str]], int]] = {"policy": policy.main}
SHORT, FULL = 5, 15


def main() -> None:
    """Run what was asked for and print it line by line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--full", action="store_true", help=f"{FULL} repetitions instead of {SHORT}, and all tables")
    known = ", ".join((*BENCHES, *TABLES))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {known}; without a name, all that are quick")
    options = parser.parse_args()
    names = options.names or (*BENCHES, *(TABLES if options.full else ()))
    if unknown := set(names) - BENCHES.keys() - TABLES.keys():
        parser.error(f"no bench is named {min(unknown)}; known are {known}")
    measured = [name for name in names if name in BENCHES]
    if measured:
        _measure(measured, FULL if options.full else SHORT)
    for name in names:
        if name in TABLES:
            TABLES[name]([])


def _measure(names: Sequence[str], repetitions: int) -> None:
    began_at = time.monotonic()
    print(_conditions(), flush=True)
    lines: list[Line] = []
    # Here and not in /tmp, which may be memory: what is measured is a disk.
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as directory:
        for name in names:
            place = Path(directory, name)
            place.mkdir()
            for line in BENCHES[name](place, repetitions):
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
