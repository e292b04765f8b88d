"""The keeping of records: who is told of a row, whatever the disk does."""

import csv
import errno
import itertools
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from edge_daemon import records as records_module
from edge_daemon.logger import CsvLog, Row
from edge_daemon.messages import Event, Result, Stored, Submission, Task, TaskState
from edge_daemon.model_pool import Change
from edge_daemon.records import LONGEST_PAUSE_S, Records
from edge_daemon.store import Limits, Store
from edge_daemon.worker import Finished
from tests.fakes import FakeClock

TS = "2026-01-31T12:00:00.000Z"


def a_task(task_id: str) -> Task:
    """A task as it comes in."""
    return Task(id=task_id, prompt="p", model="m", ttl_s=60, received_at=0, max_tokens=1, prompt_tokens=1)


def ended_task(store: Store, task_id: str, *, ts: str = TS) -> Finished:
    """A task of the store that has ended."""
    task = a_task(task_id)
    (added,) = store.add_many([Submission(task=task)])
    assert added.stored is not None
    result = Result(id=task_id, src=task.src, seq=4, state=TaskState.CANCELLED, ts=ts)
    store.finish(added.stored.seq, result)
    return Finished(stored=added.stored, result=result)


def a_log(directory: Path, clock: FakeClock) -> CsvLog:
    """The log in this directory."""
    return CsvLog(directory / "log.csv", rotate_bytes=1 << 20, keep=1, text="full", clock=clock)


def rows_of(directory: Path, record: str | None = None) -> list[dict[str, str]]:
    """The rows of this kind in the log, or all of them."""
    with (directory / "log.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if record in (None, row["record"])]


def no_disk(*_: Any) -> None:
    """What a disk says that has gone."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("call", ["write", "fdatasync"])
def test_each_end_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A row that the disk loses is written again and told of once; one that a crash kept from it is only written."""
    clock = FakeClock()
    store = Store(tmp_path / "queue.db", clock=clock)

    def new_records() -> Records:
        return Records(a_log(tmp_path, clock), store, clock=clock, resident=tuple, on_row=told.append)

    told: list[Row] = []
    records = new_records()
    records.event(Event(type="daemon_started", ts=TS))
    records.sync()
    with monkeypatch.context() as broken:
        broken.setattr(os, call, no_disk)
        records.task(ended_task(store, "lost"))
        records.sync()
    assert records.is_behind
    clock.advance(LONGEST_PAUSE_S)
    records.sync()
    assert not records.is_behind
    ended_task(store, "killed")
    new_records().rebuild()
    assert [row["task_id"] for row in rows_of(tmp_path, "task")] == ["lost", "killed"]
    assert [row.get("task_id") for row in told] == [None, "lost"]
    store.close()


def test_a_start_that_cannot_open_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start on a disk without room for the log serves all the same, and the rows are written once there is room."""
    clock = FakeClock()
    store = Store(tmp_path / "queue.db", clock=clock)
    ended_task(store, "killed")
    records = Records(a_log(tmp_path, clock), store, clock=clock, resident=tuple)
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", no_disk)
        records.rebuild()
    assert records.is_behind
    clock.advance(LONGEST_PAUSE_S)
    records.sync()
    assert not records.is_behind
    assert [row["task_id"] for row in rows_of(tmp_path)] == ["killed"]
    store.close()


def test_a_failed_load_has_a_code(tmp_path: Path) -> None:
    """The row of a load that failed says why by a code, as a result does, and how many tasks wait."""
    clock = FakeClock()
    store = Store(tmp_path / "queue.db", clock=clock)
    store.add_many([Submission(task=a_task("a")), Submission(task=a_task("b"))])
    records = Records(a_log(tmp_path, clock), store, clock=clock, resident=tuple)
    error, code = "no_memory: the kernel killed it", "no_memory"
    records.model(Change(action="load", model="m", reason="oldest", seconds=1.5, error=error, error_code=code))
    (row,) = rows_of(tmp_path)
    assert (row["status"], row["error_code"], row["queue_depth"]) == ("load_failed", "no_memory", "2")
    store.close()


def test_a_log_that_cannot_be_written_costs_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While it cannot, the store is not read, attempts grow rare, and one line says so; then all rows are written."""
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    store = Store(tmp_path / "queue.db", clock=clock)
    monkeypatch.setattr(records_module, "WRITTEN_AT_ONCE", 2)
    monkeypatch.setattr(records_module, "LOOKED_FOR_AT_ONCE", 2)
    records = Records(a_log(tmp_path, clock), store, clock=clock, resident=tuple)
    read: list[int] = []
    tries: list[float] = []
    real_get, real_open = store.get, CsvLog.open

    def get(seq: int) -> Stored | None:
        read.append(seq)
        return real_get(seq)

    def open_log(log: CsvLog) -> None:
        tries.append(clock.monotonic())
        real_open(log)

    monkeypatch.setattr(store, "get", get)
    monkeypatch.setattr(CsvLog, "open", open_log)
    (tmp_path / "log.csv").mkdir()
    ended_task(store, "before")
    records.rebuild()
    for n in range(4):
        records.task(ended_task(store, str(n)))
    assert not records.unsynced, "nothing that is to be looked after now"
    for _ in range(2 * 300):
        clock.advance(0.5)
        records.sync()
    assert read == []
    assert [b - a for a, b in itertools.pairwise(tries)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    (tmp_path / "log.csv").rmdir()
    clock.advance(LONGEST_PAUSE_S)
    while records.unsynced:
        records.sync()
    assert [row["task_id"] for row in rows_of(tmp_path)] == ["before", "0", "1", "2", "3"]
    assert (store.unlogged(), records.is_behind) == ([], False)
    assert [line.levelname for line in caplog.records] == ["ERROR", "INFO"]
    store.close()


def test_a_trouble_is_over_when_a_row_is_on_the_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A log that can be opened need not be one that takes rows: only a row that lasts ends the trouble."""
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    store = Store(tmp_path / "queue.db", clock=clock)
    records = Records(a_log(tmp_path, clock), store, clock=clock, resident=tuple)
    (tmp_path / "log.csv").mkdir()
    for _ in range(5):
        records.event(Event(type="daemon_started", ts=TS))
        clock.advance(LONGEST_PAUSE_S)
        records.sync()
        assert records.is_behind
    (tmp_path / "log.csv").rmdir()
    records.event(Event(type="daemon_started", ts=TS))
    records.sync()
    assert not records.is_behind
    assert [line.levelname for line in caplog.records] == ["ERROR", "INFO"]
    store.close()


def test_an_id_that_is_used_again_has_a_row_of_its_own(tmp_path: Path) -> None:
    """When a task was deleted, another may have its id: the row of the first is none for the second."""
    clock = FakeClock()
    store = Store(tmp_path / "queue.db", clock=clock, limits=Limits(retention_s=600))
    records = Records(a_log(tmp_path, clock), store, clock=clock, resident=tuple)
    for task_id in ("again", "newest"):
        finished = ended_task(store, task_id)
        records.task(finished)
        store.mark_sent(finished.stored.seq)
    records.sync()
    clock.advance(700)
    assert store.prune() == 1
    ended_task(store, "again", ts="2026-01-31T12:11:40.000Z")  # the power is cut before its row
    Records(a_log(tmp_path, clock), store, clock=clock, resident=tuple).rebuild()
    assert [row["task_id"] for row in rows_of(tmp_path)] == ["again", "newest", "again"]
    assert store.unlogged() == []
    store.close()


def test_a_refusal_names_the_log_that_lacks_rows(tmp_path: Path) -> None:
    """At the limit it is said what the room is kept for: results that were not fetched, or rows without a log."""
    store = Store(tmp_path / "queue.db", clock=FakeClock(), limits=Limits(retention_bytes=1))
    finished = ended_task(store, "a")
    store.mark_logged([finished.stored.seq])
    assert [added.outcome for added in store.add_many([Submission(task=a_task("b"))])] == ["no_room"]
    store.close()
    store = Store(tmp_path / "other.db", clock=FakeClock(), limits=Limits(retention_bytes=1))
    finished = ended_task(store, "a")
    store.mark_sent(finished.stored.seq)
    assert [added.outcome for added in store.add_many([Submission(task=a_task("b"))])] == ["unlogged"]
    store.close()
