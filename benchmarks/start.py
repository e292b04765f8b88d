"""How soon the daemon is ready when many tasks wait, over the imports that it cannot do without."""

from pathlib import Path

from benchmarks import footprint, rig
from benchmarks.accept import open_store, submission
from benchmarks.table import Line, at_most, milliseconds

FILL = 500
"""Tasks that are laid in together before the clock runs."""
NOBODY = "http://127.0.0.1:9"
"""Without Ollama all tasks go on waiting."""


def run(directory: Path, repetitions: int, *, size: int = 10_000) -> list[Line]:
    """Start the daemon on a queue of ``size`` tasks and the interpreter in turns; the first of both is not counted."""
    modules = footprint.imported()
    _fill(directory / "data", size)
    ours, theirs = [], []
    with rig.broker(directory) as port:
        for _ in range(repetitions + 1):
            ours.append(_daemon_s(directory, port))
            theirs.append(2 * footprint.interpreter(modules)[1] + 0.5)
    return [
        Line(
            name=f"start to READY=1, {size:,} waiting",
            work="the daemon, on a queue file with that many tasks of 300 bytes",
            against=f"twice the start of an interpreter that imports the same {len(modules)} modules, and 0.5 s",
            ours=ours[1:],
            theirs=theirs[1:],
            show=milliseconds,
            aim=at_most(1.0),
        )
    ]


def _fill(data_dir: Path, size: int) -> None:
    data_dir.mkdir()
    with open_store(data_dir / "queue.db") as store:
        for begin in range(0, size, FILL):
            store.add_many([submission(f"t{number}") for number in range(begin, min(begin + FILL, size))])


def _daemon_s(directory: Path, port: int) -> float:
    sections = {"telemetry": {"interval_s": 3600}}
    with rig.daemon(directory, sections, port=port, ollama_url=NOBODY) as (process, ready_s):
        rig.stop(process)
    return ready_s
