"""The long forms of the faults: `python -m tests.faults [--seed N] [--loops N] [--table FILE] [NAME ...]`."""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tests.faults import crash_points, day, disk, flood, fuzz, kills
from tests.faults.table import Line, Options, table

TORTURES: Mapping[str, Callable[[Options], Iterable[Line]]] = {
    "kills": kills.run,
    "crash-points": crash_points.run,
    "disk": disk.run,
    "input": fuzz.run,
    "flood": flood.run,
}
LONG: Mapping[str, Callable[[Options], Iterable[Line]]] = {"day": day.run}
"""Only on demand."""


def main() -> int:
    """Do what was asked for. Exit status 1 when anything was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, help="repeats the chances of an earlier run (default: a new one)")
    parser.add_argument("--loops", type=int, help="how often; fewer than usual for a first look")
    parser.add_argument("--hours", type=float, default=24.0, help="of the compressed day")
    parser.add_argument("--table", type=Path, help="write the table to this file too")
    known = {**TORTURES, **LONG}
    names = f"of {', '.join(known)}; without one, all but {', '.join(LONG)}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    asked = parser.parse_args()
    if unknown := set(asked.names) - known.keys():
        parser.error(f"no fault is named {min(unknown)}; known are {', '.join(known)}")
    seed = asked.seed if asked.seed is not None else time.time_ns() % 1_000_000
    print(f"seed {seed}", flush=True)
    lines: list[Line] = []
    for name in asked.names or TORTURES:
        # Here and not in /tmp, which may be memory: what is tried is a disk.
        with tempfile.TemporaryDirectory(prefix=f".torture-{name}-", dir=Path.cwd()) as directory:
            options = Options(directory=Path(directory), seed=seed, loops=asked.loops, hours=asked.hours)
            lines += known[name](options)
    text = f"seed {seed}\n\n{table(lines)}"
    print(f"\n{text}", flush=True)
    if asked.table:
        asked.table.write_text(text + "\n", encoding="utf-8")
    return int(any(line.violations for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
