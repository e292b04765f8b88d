"""How fast tasks are made durable, one by one and in groups, over the disk itself and over huey."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from huey import SqliteHuey

from benchmarks.table import Line, at_least, per_second
from edge_daemon.clock import Clock
from edge_daemon.messages import Submission, Task
from edge_daemon.store import Limits, Store

PROMPT = "Pump 3 runs at 31 C and 2.4 bar, its limits are 45 C and 6 bar. ".ljust(300, ".")
BLOCK = bytes(4096)
GROUP = 64


def run(directory: Path, repetitions: int, *, commits: int = 300) -> list[Line]:
    """``commits`` of each kind per repetition, in turns."""
    names = iter(range(1_000_000))
    raw, one_by_one, grouped, huey = [], [], [], []
    with open_store(directory / "queue.db") as store, open_huey(directory / "huey.db") as enqueue:
        for _ in range(repetitions):
            singles, groups = ([submission(f"t{next(names)}") for _ in range(commits)] for _ in range(2))
            raw.append(rate(commits, lambda: _append_and_sync(directory / "raw", commits)))
            one_by_one.append(rate(commits, lambda: _add(store, singles, 1)))  # noqa: B023
            grouped.append(rate(commits, lambda: _add(store, groups, GROUP)))  # noqa: B023
            huey.append(rate(commits, lambda: [enqueue(PROMPT) for _ in range(commits)]))
    return [
        Line(
            name="durable accept rate, one by one",
            work=f"Store.add_many of one task of 300 bytes, {commits} a time",
            against="4 KiB appended and fdatasync",
            ours=one_by_one,
            theirs=raw,
            show=per_second,
            aim=at_least(0.8),
        ),
        Line(
            name="durable accept rate, in groups",
            work=f"Store.add_many of {GROUP} tasks of 300 bytes, {commits} tasks a time",
            against="huey enqueuing in SQLite, as it comes",
            ours=grouped,
            theirs=huey,
            show=per_second,
            aim=at_least(2.0),
        ),
    ]


@contextmanager
def open_store(path: Path) -> Iterator[Store]:
    """A store with room for every measurement."""
    limits = Limits(max_tasks=1_000_000, max_bytes=1 << 40)
    with closing(Store(path, clock=Clock(), limits=limits)) as store:
        yield store


@contextmanager
def open_huey(path: Path) -> Iterator[Callable[[str], Any]]:
    """A function that enqueues a prompt in huey."""
    huey = SqliteHuey(filename=str(path))
    try:
        yield huey.task()(_answer)
    finally:
        huey.storage.close()


def submission(task_id: str, *, model: str = "small:latest", **fields: Any) -> Submission:
    """A task as the intake hands it to the store."""
    task = Task(
        id=task_id,
        src="bench",
        prompt=PROMPT,
        model=model,
        ttl_s=86_400.0,
        received_at=0.0,
        max_tokens=64,
        prompt_tokens=75,
        **fields,
    )
    return Submission(task=task)


def rate(count: int, work: Callable[[], object]) -> float:
    """How many a second, if ``work`` does ``count``."""
    began_at = time.perf_counter()
    work()
    return count / (time.perf_counter() - began_at)


def _append_and_sync(path: Path, count: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for _ in range(count):
        os.write(file, BLOCK)
        os.fdatasync(file)
    os.close(file)


def _add(store: Store, submissions: Sequence[Submission], group: int) -> None:
    for begin in range(0, len(submissions), group):
        store.add_many(submissions[begin : begin + group])


def _answer(_prompt: str) -> None:
    """What a consumer of huey would run; none does here."""
