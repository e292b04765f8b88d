"""The common oracle: what must hold after every fault, I1 to I7 of docs/reliability.md.

    evidence = Evidence(sent=..., heard=..., stored=..., integrity=..., log=read_log(daemon.csv_path))
    assert violations(evidence) == []

I1 to I4 follow from what was sent, heard, stored and logged. I5 (a fresh task succeeds) is `Bench.settle`'s to try;
I6 (nothing grows) is `growth`, I7 (the fault was told of) is `Recorder.events`.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from edge_daemon.logger import COLUMNS, older_files
from tests.daemon import Row

TERMINAL = frozenset({"succeeded", "failed", "timed_out", "cancelled", "expired", "rejected"})
MAX_ATTEMPTS = 3

Key = tuple[str, str]
"""Sender and id of a task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A task that was published. Its prompt is its own, so that it is found again also without an `id`."""

    src: str
    id: str | None
    prompt: str
    is_bad: bool = False
    """It can only be rejected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A status or a result as it came."""

    key: Key
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """All of the CSV log: its `task` rows, and what is wrong with its files.

    `since` is empty, or the moment from which on all rows must be there, when older files have been deleted.
    """

    tasks: Sequence[Mapping[str, str]] = ()
    problems: Sequence[str] = ()
    since: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known when the faults are over, all has settled and the daemon has stopped.

    `sent` holds what the broker has confirmed. `broker_may_lose`: the broker was killed, so what it had confirmed and
    not yet delivered may be gone; what the daemon has accepted may not. `store_may_prune`: its bounds are so tight that
    tasks that have ended and were sent leave it.
    """

    sent: Sequence[Sent] = ()
    heard: Sequence[Heard] = ()
    stored: Sequence[Row] = ()
    published: Counter[Key] | None = None
    """How often the broker got each result; None when it does not tell, and then what was heard counts."""
    integrity: str = "ok"
    log: Log = field(default_factory=Log)
    broker_may_lose: bool = False
    store_may_prune: bool = False
    max_attempts: int = MAX_ATTEMPTS

    def accepted(self) -> set[Key]:
        """The tasks that were promised an end: status `queued` was seen."""
        return {it.key for it in self.heard if it.kind == "status" and it.data["state"] == "queued"}

    def results(self) -> dict[Key, list[dict[str, Any]]]:
        """What came as results, by task, in order."""
        found: dict[Key, list[dict[str, Any]]] = defaultdict(list)
        for it in self.heard:
            if it.kind == "result":
                found[it.key].append(it.data)
        return found

    def answered(self) -> set[Key]:
        """The tasks with a result; a refusal is none, since a daemon that was stopping may have said it."""
        return {key for key, told in self.results().items() if any(it["state"] != "rejected" for it in told)}

    def duplicates(self) -> int:
        """Results that the daemon published again though nobody asked again."""
        published = self.published or Counter({key: len(results) for key, results in self.results().items()})
        asked = Counter(it.key for it in self.heard if it.kind == "status" and it.data.get("duplicate"))
        return sum(max(0, count - 1 - asked[key]) for key, count in published.items())

    def unheard(self) -> set[Key]:
        """Tasks that were accepted and whose result the broker took and did not deliver."""
        return self.accepted() - self.answered()

    def lost_by_broker(self) -> list[Sent]:
        """Tasks that the broker confirmed and nobody has heard or stored anything of."""
        stored = {row.prompt for row in self.stored}
        answered = self.results().keys()
        return [it for it in self.sent if it.prompt not in stored and (it.src, it.id) not in answered]


def violations(evidence: Evidence) -> list[str]:
    """Everything that must not be, in words; an empty list is what is hoped for."""
    return [
        *_lost(evidence),
        *_not_ended_once(evidence),
        *([] if evidence.integrity == "ok" else [f"I3: integrity_check says {evidence.integrity}"]),
        *_log_is_wrong(evidence),
    ]


def _lost(evidence: Evidence) -> Iterator[str]:
    """I1: what was accepted is in the store and has been answered; what the broker confirmed has come to something."""
    stored = {(row.src, row.id): row for row in evidence.stored}
    answered = evidence.answered()
    for key in sorted(evidence.accepted()):
        if key in answered and (key in stored or evidence.store_may_prune):
            continue
        if key not in stored:
            yield f"I1: {_name(key)} was accepted and is not in the store"
        elif not (evidence.broker_may_lose and stored[key].sent == 1):
            yield f"I1: {_name(key)} was accepted and its result never came"
    if not evidence.broker_may_lose:
        yield from (f"I1: {it.src}/{it.id} {it.prompt!r} came to nothing" for it in evidence.lost_by_broker())


def _not_ended_once(evidence: Evidence) -> Iterator[str]:
    """I2: one terminal record per task, the same in the store and on the wire, within the attempts allowed."""
    results = evidence.results()
    keys = Counter((row.src, row.id) for row in evidence.stored)
    yield from (f"I2: {_name(key)} is stored {count} times" for key, count in keys.items() if count > 1)
    for row in evidence.stored:
        name = f"{row.src}/{row.id}"
        if row.result is None or row.state not in TERMINAL or row.result["state"] != row.state:
            yield f"I2: {name} is {row.state}, with the result {row.result}"
            continue
        if row.result["attempt"] > evidence.max_attempts:
            yield f"I2: {name} was attempted {row.result['attempt']} times"
        others = [it for it in results.get((row.src, row.id), ()) if it != row.result and it["state"] != "rejected"]
        yield from (f"I2: {name} is stored as {row.result} and was told as {other}" for other in others)
    yield from _run_twice(evidence)


def _run_twice(evidence: Evidence) -> Iterator[str]:
    """A task without an id that was delivered again must be known again, unless the broker itself forgot it."""
    if evidence.broker_may_lose:
        return
    prompts = Counter(row.prompt for row in evidence.stored)
    for it in evidence.sent:
        if prompts[it.prompt] > 1:
            yield f"I2: {it.src}/{it.id} {it.prompt!r} became {prompts[it.prompt]} tasks"


def _log_is_wrong(evidence: Evidence) -> Iterator[str]:
    """I4: every file parses, and each task that has ended has one row."""
    yield from (f"I4: {problem}" for problem in evidence.log.problems)
    rows = Counter((row["src"], row["task_id"]) for row in evidence.log.tasks)
    yield from (f"I4: {_name(key)} has {count} rows" for key, count in rows.items() if count > 1)
    since = evidence.log.since
    ended = ((row.src, row.id) for row in evidence.stored if row.result is not None and row.result["ts"] >= since)
    yield from (f"I4: {_name(key)} has ended and has no row" for key in ended if key not in rows)


def _name(key: Key) -> str:
    return "/".join(key)


# -- the log


def read_log(path: Path) -> Log:
    """The CSV log at `path` with its rotated files, oldest first."""
    rotated = sorted(older_files(path).items())
    files = [file for _, file in rotated] + ([path] if path.exists() else [])
    tasks: list[dict[str, str]] = []
    problems: list[str] = []
    last_seq = 0
    for file in files:
        rows, found = _read(file)
        problems += found
        for row in rows:
            if int(row["seq"]) <= last_seq:
                problems.append(f"{file.name}: row {row['seq']} follows row {last_seq}")
            last_seq = int(row["seq"])
        tasks += (row for row in rows if row["record"] == "task")
    return Log(tasks=tasks, problems=problems, since=_since(rotated[0][1]) if rotated and rotated[0][0] > 1 else "")


def _since(oldest: Path) -> str:
    """A row of a task may be written late, after a crash; all others tell when their file was written."""
    rows, _ = _read(oldest)
    return next((row["timestamp"] for row in rows if row["record"] != "task"), "9")


def _read(file: Path) -> tuple[list[dict[str, str]], list[str]]:
    text = file.read_text(encoding="utf-8")
    header, *rows = list(csv.reader(text.splitlines(keepends=True), strict=True)) or [[]]
    problems = [] if tuple(header) == COLUMNS else [f"{file.name}: its header is {header}"]
    if not text.endswith("\n"):
        problems.append(f"{file.name}: its last row is torn")
    whole = [row for row in rows if len(row) == len(COLUMNS)]
    if len(whole) < len(rows):
        problems.append(f"{file.name}: {len(rows) - len(whole)} rows have not {len(COLUMNS)} cells")
    return [dict(zip(COLUMNS, row, strict=True)) for row in whole], problems


# -- what the process takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a process takes at one moment."""

    rss_bytes: int
    fds: int
    threads: int


def usage(pid: int) -> Usage:
    """Look at a running process."""
    process = psutil.Process(pid)
    return Usage(rss_bytes=process.memory_info().rss, fds=process.num_fds(), threads=process.num_threads())


def growth(before: Usage, after: Usage, *, tolerance: float = 0.1) -> list[str]:
    """I6: what has grown by more than `tolerance` of itself (and by more than two, where things are counted)."""
    pairs = {
        "RSS": (before.rss_bytes, after.rss_bytes, 0),
        "file descriptors": (before.fds, after.fds, 2),
        "threads": (before.threads, after.threads, 2),
    }
    return [
        f"I6: {name} went from {old} to {new}"
        for name, (old, new, spare) in pairs.items()
        if new > old * (1 + tolerance) + spare
    ]


def told(heard: Iterable[str], *expected: str) -> list[str]:
    """I7: the events that should have told of the fault and did not come."""
    missing = set(expected) - set(heard)
    return [f"I7: no event {name}" for name in sorted(missing)]
