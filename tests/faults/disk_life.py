"""What a store and a log are used for, in a process whose system calls can be made to fail: `tests.faults.disk`.

A helper imports everything once. For each line `LIFE DIRECTORY` of its input it forks a child, writes the child's
number, and when the child has ended, a line with its status. The child waits until it is traced, does what
its life is, and writes down in `DIRECTORY/told` what it would have promised to somebody, line by line.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge_daemon import store as store_module
from edge_daemon.errors import StorageFull, StoreError
from edge_daemon.logger import CsvLog
from edge_daemon.messages import Result, Stored, Submission, Task, TaskState
from edge_daemon.records import LONGEST_PAUSE_S, Records
from edge_daemon.store import Store
from edge_daemon.worker import Finished
from tests.fakes import FakeClock

PATIENCE_S = 20.0
ROUNDS = 3
ROTATE_BYTES = 1_600
"""A few rows of the log."""
FOLD_AT_BYTES = 30_000
"""A few commits have the write-ahead log folded into the file."""
_ANY_TRACER = -1
_PR_SET_PTRACER = 0x59616D61


class Life:
    """A queue and a log in a directory, used as the daemon does, and what was promised of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._clock = FakeClock()
        self._told = os.open(directory / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(self, *words: Any) -> None:
        """Promise something."""
        os.write(self._told, (json.dumps(words) + "\n").encode())

    def start(self) -> None:
        """Begin as the daemon does: the store is opened and missing rows are rebuilt."""
        self.store = Store(self._directory / "queue.db", clock=self._clock)
        self.records = new_records(self._directory, self.store, self._clock)
        self.records.rebuild()

    def stop(self) -> None:
        """End as the daemon does."""
        self.records.close()
        self.store.close()

    def run(self, rounds: range) -> None:
        """Lead tasks from their acceptance to their row."""
        for number in rounds:
            self._lead_one(number)
        patiently(self.store.flush)
        self._sync()

    def _lead_one(self, number: int) -> None:
        """Two tasks are accepted and one of them is run, with a break or without."""
        group = [a_task(f"{number}-{i}") for i in range(2)]
        added = patiently(lambda: self.store.add_many(group))
        for one in added:
            self.tell("accepted", one.stored.task.id)
        first: Stored = added[0].stored
        self._claim(first.seq)
        if number % 2:
            patiently(lambda: self.store.put_aside(first.seq, partial="so far", partial_tokens=2))
            self._claim(first.seq)
        self._finish(first, number)
        self._sync()
        self.store.mark_sent(first.seq)
        self.store.learn("m", {"load_s": number})

    def _sync(self) -> None:
        """So late that a log which could not be written is tried again."""
        self._clock.advance(LONGEST_PAUSE_S)
        self.records.sync()

    def _claim(self, seq: int) -> None:
        claimed = patiently(lambda: self.store.claim(seq))
        self.tell("claimed", claimed.task.id, claimed.attempt)

    def _finish(self, stored: Stored, number: int) -> None:
        result = a_result(stored.task, "because " * (100 * number))
        patiently(lambda: self.store.finish(stored.seq, result))
        self.tell("finished", stored.task.id)
        self.records.task(Finished(stored=stored, result=result))


def patiently(step: Callable[[], Any]) -> Any:
    """Do it again when there was no room; the second time it counts."""
    try:
        return step()
    except StorageFull:
        return step()


def a_task(task_id: str) -> Submission:
    """A task whose row has quotes and line breaks."""
    prompt = 'said "why",\nthen ' + "x" * 300
    task = Task(id=task_id, prompt=prompt, model="m", ttl_s=60, received_at=0, max_tokens=9, prompt_tokens=9)
    return Submission(task=task)


def a_result(task: Task, text: str) -> Result:
    """Its end."""
    return Result(id=task.id, src=task.src, seq=4, state=TaskState.SUCCEEDED, text=text, ts="2026-01-01T00:00:00.000Z")


def new_records(directory: Path, store: Store, clock: FakeClock) -> Records:
    """A log that is rotated after every few rows."""
    path = directory / "llm_metrics.csv"
    log = CsvLog(path, rotate_bytes=ROTATE_BYTES, keep=99, text="full", clock=clock)
    return Records(log, store, clock=clock, resident=tuple)


def daily(life: Life) -> None:
    """Two starts, with some tasks each."""
    for part in range(2):
        life.start()
        life.run(range(part * ROUNDS, (part + 1) * ROUNDS))
        life.stop()


def start(life: Life) -> None:
    """One start, on what is there: a damaged file, or one of an earlier version."""
    life.start()
    life.stop()


LIVES = {"daily": daily, "damaged": start, "earlier": start}


def live(name: str, directory: Path) -> None:
    """One life; a failure of the store ends it, as it ends the daemon."""
    life = Life(directory)
    try:
        LIVES[name](life)
    except StoreError as error:
        life.tell("full" if isinstance(error, StorageFull) else "failed", str(error))
        if hasattr(life, "store"):
            for promise in _promises_of_a_failed(life.store):
                life.tell("used again", promise)
            with suppress(StoreError):
                life.stop()
    except BaseException as error:  # whatever it is, the daemon would have ended by it
        life.tell("raised", repr(error))


def _promises_of_a_failed(store: Store) -> Iterator[str]:
    """What a store still does after it has failed; it should be nothing."""
    if store.failure is None:
        return
    for use in (store.unsent_count, store.learnt, store.prune, lambda: store.add_many([a_task("late")])):
        with suppress(StoreError):
            yield repr(use())


def _wait_for_the_tracer(probe: Path) -> None:
    """Return once system calls are made to fail: that of `truncate` is."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_long(_ANY_TRACER), 0, 0, 0)
    deadline = time.monotonic() + PATIENCE_S
    with suppress(OSError):
        while time.monotonic() < deadline:
            os.truncate(probe, 0)
        os._exit(1)


def main() -> None:
    """Fork a child for each line."""
    store_module.FOLD_AT_BYTES = FOLD_AT_BYTES
    for line in sys.stdin:
        name, directory = line.rstrip("\n").split(" ", 1)
        probe = Path(directory) / "probe"
        probe.touch()
        child = os.fork()
        if child == 0:
            _wait_for_the_tracer(probe)
            live(name, Path(directory))
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
