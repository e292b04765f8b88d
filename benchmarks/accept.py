"""How fast tasks are made durable, one by one and in groups, over the disk itself and over huey."""

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
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


def run(directory: Path, repetitions: int, *, slices: int = 5) -> list[Line]:
    """Per repetition ``slices`` times a group of each kind: all meet the same weather on the disk."""
    with open_store(directory / "queue.db") as store, open_huey(directory / "huey.db") as huey:
        enqueue = huey.task()(_answer)
        works = {
            "raw": lambda: append_and_sync(directory / "raw", GROUP),
            "one by one": lambda: _add(store, 1),
            "grouped": lambda: _add(store, GROUP),
            "huey": lambda: [enqueue(PROMPT) for _ in range(GROUP)],
        }
        rates = [_rates(works, slices) for _ in range(repetitions)]
    return [
        Line(
            name="durable accept rate, one by one",
            work=f"Store.add_many of one task of 300 bytes, {slices * GROUP} a time",
            against="4 KiB appended and fdatasync",
            ours=[rate["one by one"] for rate in rates],
            theirs=[rate["raw"] for rate in rates],
            show=per_second,
            aim=at_least(0.8),
        ),
        Line(
            name="durable accept rate, in groups",
            work=f"Store.add_many of {GROUP} tasks of 300 bytes, {slices} times",
            against="huey enqueuing in SQLite, as it comes",
            ours=[rate["grouped"] for rate in rates],
            theirs=[rate["huey"] for rate in rates],
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
def open_huey(path: Path) -> Iterator[SqliteHuey]:
    """Open huey on SQLite as it comes: its commits wait for the disk."""
    huey = SqliteHuey(filename=str(path))
    with closing(huey.storage):
        yield huey


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


def _rates(works: Mapping[str, Callable[[], object]], slices: int) -> dict[str, float]:
    """How many a second each of ``works`` does, which does a group at a call."""
    spent_s = dict.fromkeys(works, 0.0)
    for _ in range(slices):
        for name, work in works.items():
            began_at = time.perf_counter()
            work()
            spent_s[name] += time.perf_counter() - began_at
    return {name: slices * GROUP / seconds for name, seconds in spent_s.items()}


def append_and_sync(path: Path, count: int) -> None:
    """Bring ``count`` blocks to the disk one by one, as fast as it goes."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for _ in range(count):
        os.write(file, BLOCK)
        os.fdatasync(file)
    os.close(file)


def _add(store: Store, together: int) -> None:
    submissions = [submission(secrets.token_hex(8)) for _ in range(GROUP)]
    for begin in range(0, GROUP, together):
        store.add_many(submissions[begin : begin + together])


def _answer(_prompt: str) -> None:
    """What a consumer of huey would run; none does here."""
