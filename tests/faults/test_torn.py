"""Power cuts: whatever part of the last writes reached the disk, the files open and hold what was promised."""

import bisect
import csv
import hashlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_daemon.config import Config
from edge_daemon.logger import HEADER, CsvLog
from edge_daemon.main import Daemon
from edge_daemon.messages import Submission
from edge_daemon.records import Records
from edge_daemon.store import Limits, Store
from tests.fakes import FakeClock
from tests.test_store import a_result, submission

SECTOR = 512
"""Bytes that a disk writes as a whole."""


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory in memory, where thousands of files are opened and synced in seconds."""
    shared_memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as directory:
        yield Path(directory)


# -- the write-ahead log ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Commit:
    """What was in the store after a commit, and how long its write-ahead log was then."""

    wal_bytes: int
    digest: str


def digest(store: Store) -> str:
    """All that a start must find again: a task that ran waits again, so both read the same."""
    tasks = store._db.execute(
        "SELECT seq, src, id, hash, replace(state, 'running', 'queued'), attempt, preempted, accepted_at, bytes,"
        " unacked, task, partial, result, sent, logged FROM tasks ORDER BY seq"
    )
    learnt = store._db.execute("SELECT * FROM learnt ORDER BY model")
    return hashlib.sha256(repr([*tasks, *learnt]).encode()).hexdigest()


def a_life(store: Store) -> Iterator[None]:
    """What a store is used for in the course of some tasks; each step is one commit."""
    dice = random.Random(4)  # noqa: S311
    for n in range(6):
        group = [_some_task(f"{n}-{i}", dice) for i in range(1 + n % 3)]
        first, *_ = [added.stored for added in store.add_many(group) if added.stored]
        yield
        assert store.claim(first.seq)
        yield
        if n % 4 == 1:
            store.put_aside(first.seq, partial="so far " * 50, partial_tokens=100)
            yield
            assert store.claim(first.seq)
            yield
        text = "because " * dice.randrange(1_000)
        assert store.finish(first.seq, a_result(first.task, text))
        yield
        store.mark_sent(first.seq)  # rides on the next commit
        store.mark_logged([first.seq])
        store.learn("m", {"load_s": n})
    store.flush()
    yield
    assert store.prune()
    yield


def _some_task(task_id: str, dice: random.Random) -> Submission:
    return submission(task_id, src="cam", prompt="why? " * dice.randrange(1_200))


def a_store(path: Path, clock: FakeClock) -> Store:
    """The store as the daemon opens it; retention is over at once, so that there is something to prune."""
    return Store(path, clock=clock, limits=Limits(retention_s=-1))


def test_every_torn_write_ahead_log(disk: Path) -> None:
    """Cut at every sector, with nothing, noise or zeros behind it, the queue has exactly the commits before the cut."""
    path, clock = disk / "queue.db", FakeClock()
    with closing(a_store(path, clock)) as earlier:
        earlier.add_many([submission(f"old-{n}", prompt="x" * 2_000) for n in range(5)])
    store, wal = a_store(path, clock), disk / "queue.db-wal"
    commits = [Commit(0, digest(store)), *(Commit(wal.stat().st_size, digest(store)) for _ in a_life(store))]
    ends = [commit.wal_bytes for commit in commits]
    assert ends == sorted(set(ends)), "each step is one commit, and none of them began the log anew"
    database, log = path.read_bytes(), wal.read_bytes()
    store.close()
    noise = random.Random(5).randbytes(len(log))  # noqa: S311
    tried = 0
    for cut in range(0, len(log), SECTOR):
        zeros = len(log) - len(log[cut:].lstrip(b"\0"))  # up to here, it is zeros anyway
        for tail, whole in ((b"", cut), (noise[cut:], cut), (bytes(len(log) - cut), zeros)):
            path.write_bytes(database)
            wal.write_bytes(log[:cut] + tail)
            with closing(a_store(path, clock)) as torn:
                assert digest(torn) == commits[bisect.bisect_right(ends, whole) - 1].digest, (cut, tail[:4])
                assert torn._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            tried += 1
    aside = [path.name for path in disk.glob("*corrupt*")]
    assert aside == ["queue.db.corrupt-1-wal"], "only a log that is noise from its first byte is none of ours"
    assert tried > 2_000
    print(f"torn write-ahead log: {tried} states of {len(commits)} commits, 0 violations")


def test_the_daemon_starts_on_a_torn_log(disk: Path) -> None:
    """All parts can be built, and all rows rebuilt, on a queue that a power cut left with half a transaction."""
    config = Config(node="n", data_dir=disk)
    store = a_store(disk / "queue.db", FakeClock())
    ends = [(disk / "queue.db-wal").stat().st_size for _ in a_life(store)]
    database, log = (disk / "queue.db").read_bytes(), (disk / "queue.db-wal").read_bytes()
    store.close()
    for end in ends:
        for old in disk.iterdir():
            old.unlink()
        (disk / "queue.db").write_bytes(database)
        (disk / "queue.db-wal").write_bytes(log[: end - SECTOR])
        daemon = Daemon(config, clock=FakeClock())
        daemon.records.rebuild()
        assert daemon.store.unlogged() == []
        daemon.records.close()
        daemon.store.close()
        os.close(daemon._lock)


# -- the CSV log -----------------------------------------------------------------------------------------------------


class Board:
    """A data directory: a queue, a log, and the tasks that have ended there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = FakeClock()
        self.store = Store(directory / "queue.db", clock=self.clock)
        self.log = directory / "llm_metrics.csv"
        self.ended: list[str] = []

    def start(self, rotate_bytes: int = 1 << 20) -> Records:
        """The keeping of records as a start of the daemon brings it up, with what is missing rebuilt."""
        csv_log = CsvLog(self.log, rotate_bytes=rotate_bytes, keep=9, text="full", clock=self.clock)
        records = Records(csv_log, self.store, clock=self.clock, resident=lambda: ())
        records.rebuild()
        return records

    def end_tasks(self, count: int) -> None:
        """Accept and finish some; their answers have quotes and line breaks."""
        for _ in range(count):
            task_id = str(len(self.ended))
            (added,) = self.store.add_many([submission(task_id, src="cam", prompt='said "why",\nthen')])
            assert added.stored is not None
            text = 'because\r\nit "is" ' * (len(self.ended) % 4 * 30)
            self.store.finish(added.stored.seq, a_result(added.stored.task, text))
            self.ended.append(task_id)

    def rows(self) -> list[dict[str, str]]:
        """All rows of all files, oldest first; each file has its header and each row all its cells."""
        rotated = sorted(self.directory.glob("llm_metrics.*.csv"), key=lambda path: int(path.name.split(".")[1]))
        found = []
        for path in [*rotated, self.log]:
            assert path.read_bytes().startswith(HEADER), path
            with path.open(newline="", encoding="utf-8") as file:
                found += list(csv.DictReader(file))
        assert all(None not in row and None not in row.values() for row in found)
        return found

    def check(self) -> None:
        """Every task that ended has one row, and the numbers of rows rise."""
        rows = self.rows()
        assert sorted(row["task_id"] for row in rows) == sorted(self.ended)
        seqs = [int(row["seq"]) for row in rows]
        assert seqs == sorted(set(seqs))

    def forget_rows(self) -> None:
        """As if no mark `logged` had been committed before the power was cut."""
        with self.store._transaction():
            self.store._db.execute("UPDATE tasks SET logged = 0")


@pytest.fixture
def board(disk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    """A board of the test's own; its disk is memory, so fsync can be left out."""
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    monkeypatch.setattr(os, "fdatasync", lambda _fd: None)
    board = Board(disk)
    yield board
    board.store.close()


def _nothing(_cut: int) -> bytes:
    return b""


def _zeros(cut: int) -> bytes:
    return bytes(cut % 700 + 1)


def _noise(cut: int) -> bytes:
    return random.Random(cut).randbytes(cut % 700 + 1)  # noqa: S311


@pytest.mark.parametrize(("tail", "step"), [(_nothing, 1), (_zeros, 5), (_noise, 5)])
def test_every_torn_log_is_healed_and_completed(board: Board, tail: Callable[[int], bytes], step: int) -> None:
    """Cut in its last 4096 bytes, with anything behind the cut, the log gets back each row it lost, and none twice."""
    board.end_tasks(7)
    board.start().close()
    whole = board.log.read_bytes()
    assert len(whole) > 4096
    cuts = range(len(whole) - 4096, len(whole), step)
    for cut in cuts:
        for old in board.directory.glob("llm_metrics*"):
            old.unlink()
        board.log.write_bytes(whole[:cut] + tail(cut))
        board.forget_rows()
        board.start().close()
        board.check()
    print(f"torn CSV log, {tail.__name__[1:]} behind the cut: {len(cuts)} states, 0 violations")


def _lost_new(board: Board) -> None:
    board.log.unlink()


def _lost_rename(board: Board) -> None:
    """The rename of the full file did not last, and the new one was never there."""
    (board.directory / "llm_metrics.1.csv").replace(board.log)


def _both_names(board: Board) -> None:
    """The full file stands under both names, as a file system that copies for a rename leaves it."""
    board.log.write_bytes((board.directory / "llm_metrics.1.csv").read_bytes())


def _empty_new(board: Board) -> None:
    board.log.write_bytes(b"")


def _half_header(board: Board) -> None:
    board.log.write_bytes(HEADER[:40])


def _zeros_new(board: Board) -> None:
    board.log.write_bytes(bytes(300))


@pytest.mark.parametrize("fault", [_lost_new, _lost_rename, _empty_new, _half_header, _zeros_new])
def test_every_torn_rotation_is_completed(board: Board, fault: Callable[[Board], None]) -> None:
    """A rotation that a power cut has left half done on the disk costs no row and doubles none."""
    board.end_tasks(8)
    board.start(rotate_bytes=1 << 20).close()
    size = board.log.stat().st_size
    board.end_tasks(3)
    board.start(rotate_bytes=size).close()
    assert (board.directory / "llm_metrics.1.csv").exists()
    fault(board)
    board.forget_rows()
    board.start().close()
    rows = [row for row in board.rows() if row["task_id"]]
    assert sorted(row["task_id"] for row in rows) == sorted(board.ended)
