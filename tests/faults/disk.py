"""The n-th write, fsync or rename fails, for every n until none is left (F5, F6): strace does it to a real process.

The process uses a store and a log as the daemon does (`tests.faults.disk_life`), and tells what it would have promised.
Then the next start is judged: all that was promised is there, and the log is complete.
"""

import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from edge_daemon.store import Store
from tests import needs
from tests.daemon import ROOT
from tests.fakes import FakeClock
from tests.faults.disk_life import a_result, a_task, new_records
from tests.faults.oracle import read_log
from tests.faults.table import Line, Options

CALLS = {
    "pwrite64": "pwrite64",
    "write": "write",
    "fdatasync": "fdatasync",
    "fsync": "fsync",
    "ftruncate": "ftruncate",
    "rename": "?rename,?renameat,?renameat2",
    "unlink": "?unlink,?unlinkat",
    "open": "?open,openat",
}
ERRORS = ("EIO", "ENOSPC")
MOST = 1_000
"""More calls of one kind than any life makes."""
TASKS = 30
"""In a damaged file, and in one of an earlier version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """The n-th call fails, or all from then on."""

    life: str
    call: str
    error: str
    number: int
    persistent: bool

    def __str__(self) -> str:
        more = " and all after it" if self.persistent else ""
        return f"{self.life}: {self.call} {self.number}{more}: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How often the fault struck, what the process promised, and what is wrong."""

    strikes: int
    told: tuple[tuple[str, ...], ...]
    violations: tuple[str, ...]

    @property
    def end(self) -> str:
        """How the process ended: `whole`, or by what."""
        return next((kind for kind, *_ in self.told if kind in ("full", "failed", "raised")), "whole")


class Disk:
    """A process that lives where faults strike, and the places where it does so."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        self._strace = needs.tool("strace", package="strace")
        self._templates = {life: self._directory / f"template-{life}" for life in ("daily", "damaged", "earlier")}
        for template in self._templates.values():
            template.mkdir()
        _old_tasks(self._templates["damaged"])
        _damage(self._templates["damaged"])
        _old_tasks(self._templates["earlier"])
        _make_earlier(self._templates["earlier"])
        self._kept = {life: self._kept_by_a_start(template) for life, template in self._templates.items()}

    def __enter__(self) -> Self:
        self._helper = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.disk_life"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        return self

    def __exit__(self, *_: object) -> None:
        _pipe(self._helper.stdin).close()
        self._helper.wait(10)
        _pipe(self._helper.stdout).close()

    def strike(self, fault: Fault) -> Outcome:
        """Live with a fault, start again without, and judge."""
        with tempfile.TemporaryDirectory(dir=self._directory) as name:
            place = Path(name)
            shutil.copytree(self._templates[fault.life], place, dirs_exist_ok=True)
            trace = self._live(fault, place)
            text = (place / "told").read_text(encoding="utf-8")
            told = tuple(tuple(json.loads(line)) for line in text.splitlines())
            found = [*_broken_words(told), *_written_behind(trace), *judge(place, told, self._kept[fault.life])]
        strikes = len(re.findall(r"(?m)^(?!truncate).*\(INJECTED\)", trace))
        return Outcome(strikes=strikes, told=told, violations=tuple(f"{fault}: {text}" for text in found))

    def _live(self, fault: Fault, place: Path) -> str:
        """What strace saw of it."""
        print(fault.life, place, file=_pipe(self._helper.stdin), flush=True)
        child = int(_pipe(self._helper.stdout).readline())
        trace = self._directory / "trace"
        calls = CALLS[fault.call]
        when = f"{fault.number}{'+' if fault.persistent else ''}"
        paths = [word for path in _paths(place) for word in ("-P", str(path))]
        command = [self._strace, "-qq", "-y", "-o", str(trace), "-p", str(child), *paths]
        command += ["-e", f"trace=truncate,pwrite64,fsync,fdatasync,{calls}"]
        command += ["-e", "inject=truncate:error=EDOM", "-e", f"inject={calls}:error={fault.error}:when={when}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        status = int(_pipe(self._helper.stdout).readline())
        assert (done.returncode, status) == (0, 0), f"{fault}: {done.stderr}"
        return trace.read_text(encoding="utf-8", errors="replace")

    def _kept_by_a_start(self, template: Path) -> frozenset[str]:
        """The tasks that a start without a fault finds there."""
        with tempfile.TemporaryDirectory(dir=self._directory) as place:
            shutil.copytree(template, place, dirs_exist_ok=True)
            with closing(Store(Path(place) / "queue.db", clock=FakeClock())) as store:
                return frozenset(task_id for (task_id,) in store._db.execute("SELECT id FROM tasks"))


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _paths(place: Path) -> list[Path]:
    """Everything that a store or a log may touch."""
    database = ["", "-wal", "-journal", ".part", ".part-wal", ".part-journal", ".saved", ".v1", ".v1.part"]
    database += [".v1.part-journal", ".corrupt-1", ".corrupt-2", ".corrupt-1-wal", ".corrupt-2-wal"]
    logs = ["llm_metrics.csv", "llm_metrics.csv.torn", *(f"llm_metrics.{n}.csv" for n in range(1, 20))]
    return [place, place / "probe", *(place / f"queue.db{name}" for name in database), *(place / name for name in logs)]


def _old_tasks(place: Path) -> None:
    """A queue with tasks, every other one finished."""
    with closing(Store(place / "queue.db", clock=FakeClock())) as store:
        for n in range(TASKS):
            (added,) = store.add_many([a_task(f"old-{n}")])
            assert added.stored is not None
            if n % 2:
                store.finish(added.stored.seq, a_result(added.stored.task, "because " * 100))


def _damage(place: Path) -> None:
    """One page in the middle is zeros."""
    path = place / "queue.db"
    data = bytearray(path.read_bytes())
    middle = len(data) // 8192 * 4096
    data[middle : middle + 4096] = bytes(4096)
    path.write_bytes(data)


def _make_earlier(place: Path) -> None:
    """As version 1 had it: the ends of tasks in wall time."""
    with closing(Store(place / "queue.db", clock=FakeClock())) as store:
        store._db.execute("UPDATE tasks SET finished_at = 1600000000.0 WHERE finished_at IS NOT NULL")
        store._db.executescript("DROP TABLE boot; PRAGMA user_version = 1")


# -- what must hold


def _broken_words(told: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    """What no life may tell."""
    for kind, *words in told:
        if kind in ("raised", "used again"):
            yield f"{kind}: {' '.join(words)}"


def _written_behind(trace: str) -> Iterator[str]:
    """After an fsync that failed, nothing is written into the write-ahead log behind what may be lost."""
    failed = re.search(r"(?m)^(fsync|fdatasync)\(\d+<[^>]*queue\.db-wal>\).*INJECTED", trace)
    if failed and (again := re.search(r"(?m)^pwrite64\(\d+<[^>]*queue\.db-wal>.*", trace[failed.end() :])):
        yield f"written after an fsync that failed: {again[0][:80]}"


def judge(place: Path, told: tuple[tuple[str, ...], ...], kept: frozenset[str]) -> Iterator[str]:
    """Start again; what was promised and is not there, and what is wrong with the files."""
    with closing(Store(place / "queue.db", clock=FakeClock())) as store:
        rows = list(store._db.execute("SELECT id, attempt, result IS NOT NULL, logged FROM tasks"))
        stored = {task_id: (attempt, ended) for task_id, attempt, ended, _ in rows}
        before = {row["task_id"] for row in read_log(place / "llm_metrics.csv").tasks}
        yield from (
            f"{id_} is marked as logged and has no row" for id_, *_, logged in rows if logged and id_ not in before
        )
        yield from (f"{task_id} was there before and is lost" for task_id in kept - stored.keys())
        for kind, *words in told:
            yield from _missing(kind, words, stored)
        integrity = store._db.execute("PRAGMA integrity_check").fetchone()[0]
        if integrity != "ok":
            yield f"integrity_check says {integrity}"
        records = new_records(place, store, FakeClock())
        records.rebuild()
        records.close()
        log = read_log(place / "llm_metrics.csv")
        yield from log.problems
        counted = Counter(row["task_id"] for row in log.tasks)
        yield from (f"{id_} has {counted[id_]} rows" for id_, _, ended, _ in rows if counted[id_] != ended)


def _missing(kind: str, words: list[str], stored: dict[str, tuple[int, bool]]) -> Iterator[str]:
    if kind in ("accepted", "claimed", "finished"):
        attempt, ended = stored.get(words[0], (None, False))
        if attempt is None:
            yield f"{words[0]} was {kind} and is not in the store"
        elif kind == "claimed" and attempt < int(words[1]) - 1:
            yield f"{words[0]} was claimed for the attempt {words[1]} and has {attempt}"
        elif kind == "finished" and not ended:
            yield f"{words[0]} was finished and has no result"


# -- all of them


def enumerate_faults(
    disk: Disk, life: str, call: str, error: str, *, persistent: bool, step: int = 1
) -> Iterator[Outcome]:
    """Every n-th call, until the life goes through without a fault; `step` leaves some out."""
    for number in range(1, MOST, step):
        outcome = disk.strike(Fault(life=life, call=call, error=error, number=number, persistent=persistent))
        yield outcome
        if not outcome.strikes:
            return
    raise AssertionError(f"{life}: {call} has no end")


def run(options: Options) -> Iterator[Line]:
    """Every call of every life, with every error, once and for good."""
    logging.getLogger("edge_daemon").setLevel(logging.CRITICAL)  # a start on a damaged file tells of it each time
    with Disk(options.directory) as disk:
        for life in ("daily", "damaged", "earlier"):
            for call in CALLS:
                ends: Counter[str] = Counter()
                wrong: list[str] = []
                for error in ERRORS:
                    for persistent in (False, True):
                        for outcome in enumerate_faults(disk, life, call, error, persistent=persistent):
                            ends[outcome.end] += bool(outcome.strikes)
                            wrong += outcome.violations
                told = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
                print(f"{life}, {call}: {told}, {len(wrong)} violations", flush=True)
                yield Line(
                    fault=f"F5, F6: n-th {call}, {life}", result=f"{ends.total()} faults: {told}", violations=wrong
                )
