"""The queue's file: an earlier version is brought up to date, and mending a damaged one never makes it worse."""

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path

import pytest

from edge_daemon.errors import StoreError
from edge_daemon.messages import Failure, Message, Result, Task
from edge_daemon.queue_file import SCHEMA_VERSION
from edge_daemon.store import Limits, Store
from tests.fakes import FakeClock
from tests.test_store import DAY_S, accept, finish, waiting_ids

RETENTION_S = 7 * DAY_S
LIMIT_BYTES = 3 << 20

BEFORE_4 = "DROP INDEX tasks_unacked; CREATE INDEX tasks_unacked ON tasks (hash) WHERE unacked = 1;"


def an_earlier_file(path: Path, clock: FakeClock) -> None:
    """A file of version 1, which counted the age of results in wall time and kept no packet ids."""
    with closing(Store(path, clock=clock)) as store:
        old, new, _ = accept(store, "old", "new", "waits")
        for task in (old, new):
            finish(store, task)
            store.mark_sent(task.seq)
        store.mark_logged([old.seq, new.seq])
        store.flush()
        for task, age_s in ((old, 10 * DAY_S), (new, 100.0)):
            store._db.execute("UPDATE tasks SET finished_at = ? WHERE seq = ?", (clock.wall() - age_s, task.seq))
        store._db.execute("UPDATE tasks SET unacked = 1 WHERE id = 'waits'")
        store._db.executescript(f"{BEFORE_4} DROP TABLE boot; PRAGMA user_version = 1")


def a_file_of_version_2(path: Path, clock: FakeClock) -> None:
    """One whose times are those of the boots that it names, and where a task's time off was still to be counted."""
    with closing(Store(path, clock=clock)) as store:
        accept(store, "carried", ttl_s=5_000, received_at=clock.wall() - 4_000)
        clock.advance(100)
        (ended,) = accept(store, "ended")
        finish(store, ended)
        store.mark_sent(ended.seq)
        store.mark_logged([ended.seq])
        clock.advance(100)
        accept(store, "waits", ttl_s=1_000, received_at=clock.wall())
        accept(store, "damaged")
        store._db.execute("UPDATE tasks SET accepted_at = 9e999 WHERE id = 'damaged'")
        store._db.execute("UPDATE tasks SET synced = 2 WHERE id = 'carried'")
        store._db.executescript(f"{BEFORE_4} DROP TABLE boot; PRAGMA user_version = 2")


def version(path: Path) -> int:
    """Of a file that nobody has open."""
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


@pytest.fixture
def clock() -> FakeClock:
    """Of a machine that has been on for a month."""
    return FakeClock(monotonic_s=30 * DAY_S)


def test_an_earlier_version_is_brought_up_to_date(tmp_path: Path, clock: FakeClock) -> None:
    """All tasks are there, results keep their age in the new unit, and the old file is kept beside, one such only."""
    path = tmp_path / "queue.db"
    an_earlier_file(path, clock)
    (tmp_path / "queue.db.v0").touch()
    with closing(Store(path, clock=clock, limits=Limits(retention_s=RETENTION_S))) as store:
        assert store.damage is None
        assert waiting_ids(store) == ["waits"]
        assert store.unacked() == []
        assert store.prune() == 1
        assert store.find("_", "old") is None
        clock.advance(RETENTION_S - 101)
        assert store.prune() == 0
        clock.advance(2)
        assert store.prune() == 1
    assert (version(path), version(tmp_path / "queue.db.v1")) == (SCHEMA_VERSION, 1)
    assert not (tmp_path / "queue.db.v0").exists()


def test_version_2_is_brought_up_to_date(tmp_path: Path, clock: FakeClock) -> None:
    """After a boot, all have the ages that they were seen to have, and time off counts when the clock is right."""
    path = tmp_path / "queue.db"
    a_file_of_version_2(path, clock)
    clock.reboot(off_s=300)
    clock.is_synced = False
    with closing(Store(path, clock=clock, limits=Limits(retention_s=1_000))) as store:
        assert version(tmp_path / "queue.db.v2") == 2
        assert store.next_expiry() == 1_000
        clock.advance(899)
        assert store.prune() == 0
        clock.advance(2)
        assert store.prune() == 1
        clock.is_synced = True
        assert [it.task.id for it in store.expired(9)] == ["carried", "waits"]
    assert version(path) == SCHEMA_VERSION


def test_version_2_in_the_same_boot(tmp_path: Path, clock: FakeClock) -> None:
    """Times that are of this boot stay as they are; what was carried into it has its time off counted."""
    path = tmp_path / "queue.db"
    a_file_of_version_2(path, clock)
    with closing(Store(path, clock=clock)) as store:
        assert [it.accepted_at for it in store.find_open("waits")] == [clock.monotonic()]
        assert [it.task.id for it in store.expired(9)] == []
        assert [it.accepted_at for it in store.find_open("carried")] == [clock.monotonic() - 4_200]


@pytest.mark.parametrize("number", [1, 2])
def test_a_version_that_it_is_not(tmp_path: Path, clock: FakeClock, number: int) -> None:
    """A file that is taken for an earlier version than it is, or lacks a table of it, does not stop the start."""
    path = tmp_path / "queue.db"
    for change in ("", "DROP TABLE tasks; "):
        with closing(Store(path, clock=clock)) as store:
            accept(store, f"before {change}")
            store._db.executescript(f"{change}PRAGMA user_version = {number}")
        with closing(Store(path, clock=clock)) as store:
            assert store.open_count() == (0 if change else 1)
            accept(store, f"after {change}")
        path.unlink()


def test_the_fields_of_a_version() -> None:
    """A field of a stored record that comes or goes is a new version of the file.

    An earlier daemon would give up each row with a field that it does not know. Raise `SCHEMA_VERSION`, with a
    migration (it may be empty), and write the fields down here.
    """
    names = {record: " ".join(field.name for field in fields(record)) for record in (Task, Message, Result, Failure)}
    assert (SCHEMA_VERSION, names) == (
        4,
        {
            Task: "id src prompt messages system task_type data from_type fallback model model_requested priority ttl_s"
            " options format stream preemptible plain reply_to correlation meta received_at max_tokens prompt_tokens",
            Message: "role content",
            Result: "id src seq state task_type model model_requested text json error done_reason attempt queued_s"
            " load_s run_s total_s prompt_tokens output_tokens tokens_per_s swapped preempted truncated meta ts",
            Failure: "code message retryable",
        },
    )


def test_a_damaged_file_of_an_earlier_version(tmp_path: Path, clock: FakeClock) -> None:
    """What is saved of it is brought up to date as well."""
    path = tmp_path / "queue.db"
    an_earlier_file(path, clock)
    with path.open("ab") as file:
        file.write(bytes(4096 * 3))
    data = bytearray(path.read_bytes())
    data[28:32] = (len(data) // 4096).to_bytes(4, "big")  # pages that nothing leads to
    path.write_bytes(data)
    with closing(Store(path, clock=clock, limits=Limits(retention_s=RETENTION_S))) as store:
        assert store.damage is not None
        assert store.damage.saved == 3
        assert store.prune() == 1
        assert store.find("_", "old") is None
    assert version(path) == SCHEMA_VERSION


@contextmanager
def files_limited() -> Iterator[None]:
    """While the block runs, no file grows beyond the limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_mending_that_cannot_be_written(tmp_path: Path, clock: FakeClock) -> None:
    """A damaged file stays where it is until all that can be read of it is in the new one."""
    path = tmp_path / "queue.db"
    with closing(Store(path, clock=clock)) as store:
        accept(store, *(f"t{n}" for n in range(60)), prompt="x" * 100_000)
    data = bytearray(path.read_bytes())
    middle = len(data) // 8192 * 4096
    data[middle : middle + 4096] = bytes(4096)
    path.write_bytes(data)
    with files_limited(), pytest.raises(StoreError):
        Store(path, clock=clock)
    assert list(tmp_path.glob("*corrupt*")) == []
    with closing(Store(path, clock=clock)) as store:
        assert store.damage is not None
        assert store.damage.saved >= 59
        assert store.open_count() >= 59


def test_a_folder_in_its_place(tmp_path: Path, clock: FakeClock) -> None:
    """What is no file at all is moved away with what is in it, and a new queue begun."""
    path = tmp_path / "queue.db"
    path.mkdir()
    (path / "kept").touch()
    with closing(Store(path, clock=clock)) as store:
        assert store.damage is not None
        accept(store, "a")
    assert (tmp_path / "queue.db.corrupt-1/kept").exists()


@pytest.mark.parametrize("left", [None, b""])
def test_a_write_ahead_log_without_its_file(tmp_path: Path, clock: FakeClock, left: bytes | None) -> None:
    """Where the file is gone or empty, its log is set aside; SQLite would delete it without a word."""
    path, wal = tmp_path / "queue.db", tmp_path / "queue.db-wal"
    with closing(Store(path, clock=clock)) as store:
        accept(store, "a")
        log = wal.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    wal.write_bytes(log)
    with closing(Store(path, clock=clock)) as store:
        assert store.damage is not None
        accept(store, "a")
    assert (tmp_path / "queue.db.corrupt-1-wal").read_bytes() == log


def test_a_flipped_bit_in_the_header_of_the_log(tmp_path: Path, clock: FakeClock) -> None:
    """SQLite would pass over all of such a log in silence: it is set aside and told of."""
    path, wal = tmp_path / "queue.db", tmp_path / "queue.db-wal"
    with closing(Store(path, clock=clock)) as store:
        accept(store, "a")
        database, log = path.read_bytes(), bytearray(wal.read_bytes())
    log[17] ^= 1
    path.write_bytes(database)
    wal.write_bytes(log)
    with closing(Store(path, clock=clock)) as store:
        assert store.damage is not None
    assert (tmp_path / "queue.db.corrupt-1-wal").read_bytes() == log
