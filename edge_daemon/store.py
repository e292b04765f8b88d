"""The durable queue and outbox: one SQLite file, one connection, one lock.

A task is a row from its acceptance until its retention ends; states change, rows are never moved. What is committed
survives ``kill -9`` and a power cut (WAL with ``synchronous=FULL``). The waiting tasks are also indexed in memory, so
that a decision costs the same with ten tasks queued as with a hundred thousand.

Times are seconds of ``Clock.monotonic`` in the boot that ``boot_id`` names; they are carried over at the next boot.
"""

import contextlib
import heapq
import json
import logging
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_daemon.clock import Clock
from edge_daemon.errors import StorageFull, StoreError, StoreTooNew
from edge_daemon.messages import Added, Priority, Result, Stored, Submission, Task, TaskState, compact

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE tasks (
    seq         INTEGER PRIMARY KEY,        -- order of acceptance
    src         TEXT NOT NULL,
    id          TEXT NOT NULL,
    hash        BLOB NOT NULL,              -- Task.content_hash
    state       TEXT NOT NULL,
    attempt     INTEGER NOT NULL DEFAULT 0, -- counted when an attempt begins, so that kills count too
    preempted   INTEGER NOT NULL DEFAULT 0,
    boot_id     TEXT NOT NULL,
    accepted_at REAL NOT NULL,              -- monotonic seconds of that boot
    synced      INTEGER NOT NULL,           -- 1: the wall clock was right then, 2: and time off is still to be counted
    bytes       INTEGER NOT NULL,           -- of task and result
    unacked     INTEGER NOT NULL,           -- 1: no id of its sender's, and its PUBACK is not known to be out
    task        TEXT NOT NULL,              -- Task.to_json
    partial     TEXT NOT NULL DEFAULT '',   -- the text of an interrupted generation
    partial_tokens INTEGER NOT NULL DEFAULT 0,
    result      TEXT,                       -- Result.to_json, once terminal
    finished_at REAL,                       -- wall clock
    sent        INTEGER NOT NULL DEFAULT 0, -- 1: its result is confirmed by the broker, 2: set aside as undeliverable
    logged      INTEGER NOT NULL DEFAULT 0  -- 1: its CSV row is on the disk
);
CREATE UNIQUE INDEX tasks_by_key ON tasks (src, id);
CREATE INDEX tasks_open ON tasks (seq) WHERE result IS NULL;
CREATE INDEX tasks_unsent ON tasks (seq) WHERE result IS NOT NULL AND sent = 0;
CREATE INDEX tasks_unlogged ON tasks (seq) WHERE result IS NOT NULL AND logged = 0;
CREATE INDEX tasks_unacked ON tasks (hash) WHERE unacked = 1;
CREATE INDEX tasks_finished ON tasks (finished_at) WHERE finished_at IS NOT NULL;
CREATE TABLE learnt (model TEXT PRIMARY KEY, facts TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """The oldest waiting task of one class, and the number of tasks in that class."""

    seq: int
    model: str
    priority: Priority
    task_type: str | None
    prompt_tokens: int
    max_tokens: int
    accepted_at: float
    expires_at: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of the queue; ``urgent_reserve`` of ``max_tasks`` are places that only urgent tasks may take."""

    max_tasks: int = 10_000
    max_bytes: int = 268_435_456
    max_tasks_per_src: int | None = None
    urgent_reserve: int = 100
    retention_s: float = 604_800.0
    retention_bytes: int = 268_435_456
    """What finished tasks may take; those that are delivered make room, those that are not never do."""


class Store:
    """All state that must survive. Every method may be called from any thread.

    Raises:
        StoreTooNew: the file was written by a later version.
        StorageFull: nothing was changed, because the disk is full.
        StoreError: any other failure of the file; nothing was changed.
    """

    def __init__(self, path: Path, *, clock: Clock, limits: Limits | None = None) -> None:
        self._path = path
        self._clock = clock
        self._boot_id = clock.boot_id()
        self._limits = limits or Limits()
        self._lock = threading.RLock()  # guards everything below
        self._db = _open(path)
        self._ready = _ReadyIndex()
        self._open: dict[int, tuple[str, int]] = {}  # src and size of each open task
        self._open_bytes = 0
        self._open_by_src: Counter[str] = Counter()
        self._finished_bytes = 0
        # Marks that may be lost: a crash then costs one repetition, not a task. They ride on the next commit.
        self._marks: dict[str, set[int]] = {"sent": set(), "logged": set(), "acked": set()}
        self._learnt: dict[str, str] = {}  # facts of models: the same
        self._before_boot: set[int] = set()  # accepted in an earlier boot, time switched off not yet counted
        with self._guard():
            self._recover()

    # -- intake

    def add_many(self, submissions: Sequence[Submission]) -> list[Added]:
        """Commit a group of tasks with one fsync. The answers are in the order of ``submissions``."""
        added: list[int] = []
        with self._lock:
            if self._finished_bytes > self._limits.retention_bytes:
                self.prune()
            try:
                with self._transaction():
                    return [self._add(submission, added) for submission in submissions]
            except BaseException:
                for seq in added:
                    self._forget(seq)
                raise

    def _add(self, submission: Submission, added: list[int]) -> Added:
        task, digest = submission.task, submission.task.content_hash()
        if submission.redelivered and not submission.own_id:
            twin = self._row("hash = ? AND unacked = 1 AND src = ?", (digest, task.src))
            if twin:
                return Added(outcome="known", stored=twin)
        if known := self._row("src = ? AND id = ?", task.key):
            return self._known(known, task, digest)
        text = task.to_json()
        size = len(text.encode())
        if limit := self._full(task, size):
            return Added(outcome=limit)
        now = self._clock.monotonic()
        seq = self._insert(submission, digest, text, size, now)
        stored = Stored(seq=seq, task=task, state=TaskState.QUEUED, attempt=0, preempted=0, accepted_at=now)
        self._remember(stored, size)
        added.append(seq)
        return Added(outcome="new", stored=stored, position=self._ready.position(task.priority))

    def _insert(self, submission: Submission, digest: bytes, text: str, size: int, now: float) -> int:
        task = submission.task
        cursor = self._db.execute(
            "INSERT INTO tasks (src, id, hash, state, boot_id, accepted_at, synced, bytes, unacked, task)"
            " VALUES (?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?)",
            (*task.key, digest, self._boot_id, now, self._clock.synced(), size, not submission.own_id, text),
        )
        return int(cursor.lastrowid or 0)

    def _known(self, known: Stored, task: Task, digest: bytes) -> Added:
        (stored_hash,) = self._db.execute("SELECT hash FROM tasks WHERE seq = ?", (known.seq,)).fetchone()
        if stored_hash != digest:
            return Added(outcome="conflict", stored=known)
        if (task.reply_to, task.correlation) != (known.task.reply_to, known.task.correlation):
            # The sender asks again from elsewhere: the answer goes where it listens now.
            moved = replace(known.task, reply_to=task.reply_to, correlation=task.correlation)
            known = replace(known, task=moved)
            self._db.execute("UPDATE tasks SET task = ? WHERE seq = ?", (moved.to_json(), known.seq))
        if known.result is not None:
            self._db.execute("UPDATE tasks SET sent = 0 WHERE seq = ?", (known.seq,))
        return Added(outcome="known", stored=known)

    def _full(self, task: Task, size: int) -> str | None:
        """Which limit stands in the way of ``task``, if one does."""
        limits = self._limits
        reserve = 0 if task.priority is Priority.URGENT else limits.urgent_reserve
        if len(self._open) >= limits.max_tasks - reserve or self._open_bytes + size > limits.max_bytes:
            return "full"
        if limits.max_tasks_per_src is not None and self._open_by_src[task.src] >= limits.max_tasks_per_src:
            return "full_for_src"
        return "no_room" if self._finished_bytes > limits.retention_bytes else None

    def mark_acked(self, seqs: Iterable[int]) -> None:
        """The PUBACK of these tasks is out: an equal text from now on is another task."""
        self._mark("acked", seqs)

    # -- the worker's side

    def heads(self) -> tuple[Waiting, ...]:
        """The oldest waiting task of each class (model, priority, size), in no particular order."""
        with self._lock:
            return self._ready.heads()

    def claim(self, seq: int) -> Stored | None:
        """Begin an attempt: the task is ``running`` and the attempt is counted, before it starts.

        Returns None when the task is no longer waiting (cancelled or expired meanwhile).
        """
        with self._lock:
            if seq not in self._ready:
                return None
            with self._transaction():
                self._db.execute("UPDATE tasks SET state = 'running', attempt = attempt + 1 WHERE seq = ?", (seq,))
            self._ready.discard(seq)
            return self._row("seq = ?", (seq,))

    def release(self, seq: int) -> Stored | None:
        """Set a running task back to waiting, in its old place, after an attempt that failed."""
        return self._set_back("UPDATE tasks SET state = 'queued' WHERE seq = ? AND state = 'running'", (seq,))

    def put_aside(self, seq: int, *, partial: str, partial_tokens: int) -> Stored | None:
        """Set a running task back to waiting because something else comes first: that is no failed attempt.

        ``partial`` is its text so far, of ``partial_tokens`` tokens, to continue from.
        """
        return self._set_back(
            "UPDATE tasks SET state = 'queued', attempt = attempt - 1, preempted = preempted + 1,"
            " partial = ?, partial_tokens = ? WHERE seq = ? AND state = 'running'",
            (partial, partial_tokens, seq),
        )

    def _set_back(self, statement: str, values: tuple[object, ...]) -> Stored | None:
        seq = values[-1]
        with self._lock:
            with self._transaction():
                if not self._db.execute(statement, values).rowcount:
                    return None
            stored = self._row("seq = ?", (seq,))
            if stored:
                self._ready.add(stored)
            return stored

    def finish(self, seq: int, result: Result) -> bool:
        """End a task: its one terminal record is stored, to be sent and logged. False when it has ended already."""
        text = result.to_json()
        size = len(text.encode())
        with self._lock:
            with self._transaction():
                cursor = self._db.execute(
                    "UPDATE tasks SET state = ?, result = ?, finished_at = ?, partial = '', bytes = bytes + ?"
                    " WHERE seq = ? AND result IS NULL",
                    (result.state.value, text, self._clock.wall(), size, seq),
                )
            if cursor.rowcount == 1:
                self._finished_bytes += size + self._open.get(seq, ("", 0))[1]
            self._forget(seq)
            return cursor.rowcount == 1

    def expired(self) -> list[Stored]:
        """Waiting tasks whose time to live has passed; the caller finishes them."""
        with self._lock:
            if self._before_boot and self._clock.synced():
                self._count_time_off()
            return [s for seq in self._ready.expired(self._clock.monotonic()) if (s := self._row("seq = ?", (seq,)))]

    def next_expiry(self) -> float | None:
        """The monotonic time at which the next waiting task expires, None when none waits."""
        with self._lock:
            return self._ready.next_expiry()

    # -- looking up

    def find(self, src: str, task_id: str) -> Stored | None:
        """The task of this sender with this id."""
        with self._lock:
            return self._row("src = ? AND id = ?", (src, task_id))

    def find_open(self, task_id: str) -> list[Stored]:
        """Every unfinished task with this id, whoever sent it."""
        with self._lock:
            return list(self._rows("result IS NULL AND id = ? ORDER BY seq", (task_id,)))

    def depth(self) -> dict[Priority, int]:
        """The number of waiting tasks by priority."""
        with self._lock:
            return self._ready.depth()

    def open_count(self) -> int:
        """Tasks that wait or run."""
        with self._lock:
            return len(self._open)

    # -- the outbox

    def unsent(self, limit: int, *, skip: Iterable[int] = ()) -> list[Stored]:
        """Up to ``limit`` finished tasks whose result is not confirmed by the broker, oldest first."""
        with self._lock:
            passed = set(skip) | self._marks["sent"]
            rows = self._rows("result IS NOT NULL AND sent = 0 ORDER BY seq LIMIT ?", (limit + len(passed),))
            return [stored for stored in rows if stored.seq not in passed][:limit]

    def unsent_count(self) -> int:
        """How many results wait to be delivered."""
        with self._lock, self._guard():
            (count,) = self._db.execute("SELECT count(*) FROM tasks WHERE result IS NOT NULL AND sent = 0").fetchone()
            marked = self._marks["sent"]
            waiting = "SELECT 1 FROM tasks WHERE seq = ? AND result IS NOT NULL AND sent = 0"
            return int(count) - sum(self._db.execute(waiting, (seq,)).fetchone() is not None for seq in marked)

    def mark_sent(self, seq: int) -> None:
        """The broker has confirmed this result."""
        self._mark("sent", (seq,))

    def set_aside(self, seq: int) -> None:
        """This result cannot be delivered; it stays readable in the store and the log."""
        with self._lock, self._transaction():
            self._db.execute("UPDATE tasks SET sent = 2 WHERE seq = ?", (seq,))

    # -- the CSV log

    def unlogged(self) -> list[Stored]:
        """Finished tasks without a row on the disk, as far as is known."""
        with self._lock:
            rows = self._rows("result IS NOT NULL AND logged = 0 ORDER BY seq", ())
            return [stored for stored in rows if stored.seq not in self._marks["logged"]]

    def mark_logged(self, seqs: Iterable[int]) -> None:
        """The rows of these tasks are on the disk."""
        self._mark("logged", seqs)

    # -- what was learnt of models

    def learnt(self) -> dict[str, dict[str, Any]]:
        """Facts by model name, as ``learn`` stored them."""
        with self._lock:
            with self._guard():
                rows = self._db.execute("SELECT model, facts FROM learnt").fetchall()
            known = {}
            for model, facts in rows:
                with contextlib.suppress(ValueError):  # damaged: it will be learnt anew
                    known[model] = json.loads(facts)
            return known

    def learn(self, model: str, facts: dict[str, Any]) -> None:
        """Replace the facts of one model, with the next commit."""
        with self._lock:
            self._learnt[model] = compact(facts)

    # -- housekeeping

    def flush(self) -> None:
        """Commit the marks that wait for company."""
        with self._lock:
            if self._learnt or any(self._marks.values()):
                with self._transaction():
                    pass

    def prune(self) -> int:
        """Delete finished tasks that were sent and logged. Returns the number deleted.

        Those go that were kept for ``retention_s``, and the oldest of the rest while all take more than
        ``retention_bytes``. The newest row stays, because its ``seq`` must never be given again.
        """
        with self._lock, self._guard():
            self.flush()
            doomed, freed = self._doomed()
            if doomed:
                with self._transaction():
                    self._db.executemany("DELETE FROM tasks WHERE seq = ?", [(seq,) for seq in doomed])
                self._finished_bytes -= freed
            return len(doomed)

    def _doomed(self) -> tuple[list[int], int]:
        """The tasks to delete, and what they take."""
        oldest = self._clock.wall() - self._limits.retention_s
        doomed, freed = [], 0
        rows = self._db.execute(
            "SELECT seq, bytes, finished_at FROM tasks WHERE finished_at IS NOT NULL AND sent != 0 AND logged = 1"
            " AND seq < (SELECT max(seq) FROM tasks) ORDER BY finished_at"
        )
        for seq, size, finished_at in rows:
            if finished_at >= oldest and self._finished_bytes - freed <= self._limits.retention_bytes:
                break
            doomed.append(seq)
            freed += size
        return doomed, freed

    def close(self) -> None:
        """Commit what waits and fold the write-ahead log into the file."""
        with self._lock:
            self.flush()
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.close()

    # -- inside

    def _mark(self, kind: str, seqs: Iterable[int]) -> None:
        with self._lock:
            self._marks[kind].update(seqs)

    def _write_marks(self) -> None:
        columns = {"sent": "sent = 1", "logged": "logged = 1", "acked": "unacked = 0"}
        for kind, seqs in self._marks.items():
            statement = f"UPDATE tasks SET {columns[kind]} WHERE seq = ?"  # noqa: S608
            self._db.executemany(statement, [(seq,) for seq in seqs])
        self._db.executemany("INSERT OR REPLACE INTO learnt (model, facts) VALUES (?, ?)", self._learnt.items())

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Errors of SQLite as ours."""
        try:
            yield
        except sqlite3.Error as error:
            kind = StorageFull if _code(error) == sqlite3.SQLITE_FULL else StoreError
            raise kind(f"{self._path}: {error}") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing. The caller holds the lock."""
        with self._guard():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._write_marks()
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        for seqs in self._marks.values():
            seqs.clear()
        self._learnt.clear()

    def _row(self, where: str, values: tuple[object, ...]) -> Stored | None:
        return next(self._rows(f"{where} LIMIT 1", values), None)

    def _rows(self, where: str, values: tuple[object, ...]) -> Iterator[Stored]:
        with self._guard():
            rows = self._db.execute(
                "SELECT seq, task, state, attempt, preempted, accepted_at, partial, partial_tokens, result"  # noqa: S608
                f" FROM tasks WHERE {where}",
                values,
            ).fetchall()
        for row in rows:
            try:
                stored = _stored_from_row(row)
            except (ValueError, TypeError) as error:
                self._take_out(row[0], error)
            else:
                yield stored

    def _take_out(self, seq: int, error: Exception) -> None:
        """A row that a damaged disk has made unreadable leaves all queues, so that the others can be served."""
        log.error("task %d cannot be read from the queue file and is given up: %s", seq, error)
        with self._guard():
            self._db.execute(
                "UPDATE tasks SET src = '', id = seq, state = 'failed', result = '', finished_at = ?, sent = 2,"
                " logged = 1, unacked = 0 WHERE seq = ?",
                (self._clock.wall(), seq),
            )

    def _remember(self, stored: Stored, size: int) -> None:
        src = stored.task.src
        self._ready.add(stored)
        self._open[stored.seq] = (src, size)
        self._open_bytes += size
        self._open_by_src[src] += 1

    def _forget(self, seq: int) -> None:
        self._ready.discard(seq)
        self._before_boot.discard(seq)
        if seq in self._open:
            src, size = self._open.pop(seq)
            self._open_bytes -= size
            self._open_by_src[src] -= 1
            if not self._open_by_src[src]:
                del self._open_by_src[src]

    def _recover(self) -> None:
        """Carry open tasks over from before: what ran waits again, with its attempt counted."""
        earlier = "SELECT 1 FROM tasks WHERE result IS NULL AND boot_id != ? LIMIT 1"
        if self._db.execute(earlier, (self._boot_id,)).fetchone():
            self._carry_over()
        if self._db.execute("SELECT 1 FROM tasks WHERE result IS NULL AND state = 'running' LIMIT 1").fetchone():
            with self._transaction():
                self._db.execute("UPDATE tasks SET state = 'queued' WHERE result IS NULL AND state = 'running'")
        for stored in self._rows("result IS NULL ORDER BY seq", ()):
            self._remember(stored, len(stored.task.to_json().encode()))
        carried = self._db.execute("SELECT seq FROM tasks WHERE result IS NULL AND synced = 2")
        self._before_boot = {seq for (seq,) in carried}
        (finished,) = self._db.execute("SELECT total(bytes) FROM tasks WHERE finished_at IS NOT NULL").fetchone()
        self._finished_bytes = int(finished)

    def _carry_over(self) -> None:
        """Express waiting times of earlier boots in this boot's clock, as far as the machine was seen to be on."""
        now = self._clock.monotonic()
        last_seen = dict(self._db.execute("SELECT boot_id, max(accepted_at) FROM tasks GROUP BY boot_id"))
        rows = self._db.execute(
            "SELECT seq, boot_id, accepted_at, synced FROM tasks WHERE result IS NULL AND boot_id != ?",
            (self._boot_id,),
        ).fetchall()
        with self._transaction():
            for seq, row_boot, accepted_at, synced in rows:
                waited = last_seen[row_boot] - accepted_at
                self._db.execute(
                    "UPDATE tasks SET boot_id = ?, accepted_at = ?, synced = ? WHERE seq = ?",
                    (self._boot_id, now - waited, 2 if synced else 0, seq),
                )

    def _count_time_off(self) -> None:
        """The wall clock is right now: the time that the machine was off counts after all."""
        now, wall = self._clock.monotonic(), self._clock.wall()
        carried = [stored for seq in self._before_boot if (stored := self._row("seq = ?", (seq,)))]
        with self._transaction():
            for stored in carried:
                accepted_at = min(stored.accepted_at, now - (wall - stored.task.received_at))
                self._db.execute(
                    "UPDATE tasks SET accepted_at = ?, synced = 1 WHERE seq = ?", (accepted_at, stored.seq)
                )
                if stored.seq in self._ready:
                    self._ready.discard(stored.seq)
                    self._ready.add(replace(stored, accepted_at=accepted_at))
        self._before_boot.clear()


def _open(path: Path) -> sqlite3.Connection:
    """The database, created or checked; a file that is no database is set aside and a new one begun."""
    try:
        return _prepared(path)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter: SQLite quotes damage in its message
        if isinstance(error, sqlite3.Error) and _code(error) not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise StoreError(f"{path}: {error}") from error
        aside = _set_aside(path)
        log.error("the queue file was damaged (%s): moved to %s, starting with an empty queue", error, aside)  # noqa: TRY400
        return _prepared(path)


def _prepared(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.text_factory = _text
    try:
        # One process owns the file: SQLite before 3.51.3 can corrupt a WAL that two connections write.
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:  # asked first: a later version's file is not touched
            raise StoreTooNew(f"{path}: written by a later version of edge-llm (schema {version}); install that one")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # NORMAL may lose a commit in a power cut
        db.execute("PRAGMA journal_size_limit = 4194304")
        if version == 0:
            db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        if _verdict(db) != "ok":
            with contextlib.suppress(sqlite3.DatabaseError):
                db.execute("REINDEX")  # the damage may be in an index alone: it can be made anew
        if (verdict := _verdict(db)) != "ok":
            raise _damaged(verdict)
        if _layout(db) != _layout_as_made():
            raise _damaged("its tables are not as they were made")
    except BaseException:
        db.close()
        raise
    return db


def _text(data: bytes) -> str:
    """Text of the file; what a damaged disk has made undecodable reads as empty."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


def _code(error: sqlite3.Error) -> int | None:
    """SQLite's primary code; None when the error is Python's own, such as a closed connection."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _verdict(db: sqlite3.Connection) -> str:
    """``ok``, or the first thing that is wrong; unlike ``quick_check`` this sees an index that belies its table."""
    return str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])


def _layout(db: sqlite3.Connection) -> list[tuple[str, ...]]:
    """Every index, and every column of every table."""
    columns = (
        "SELECT m.type, m.name, c.name FROM sqlite_master m LEFT JOIN pragma_table_info(m.name) c ORDER BY 1, 2, 3"
    )
    return list(db.execute(columns))


def _layout_as_made() -> list[tuple[str, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA)
        return _layout(db)


def _damaged(verdict: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(verdict)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _set_aside(path: Path) -> Path:
    """Rename the file and its companions; nothing is deleted."""
    number = next(n for n in range(1, 1_000_000) if not path.with_name(f"{path.name}.corrupt-{n}").exists())
    for suffix in ("", "-wal", "-shm"):
        companion = path.with_name(path.name + suffix)
        if companion.exists():
            companion.rename(path.with_name(f"{path.name}.corrupt-{number}{suffix}"))
    return path.with_name(f"{path.name}.corrupt-{number}")


def _stored_from_row(row: tuple[Any, ...]) -> Stored:
    """The only place that turns a row into a record."""
    seq, task, state, attempt, preempted, accepted_at, partial, partial_tokens, result = row
    return Stored(
        seq=seq,
        task=Task.from_dict(json.loads(task)),
        state=TaskState(state),
        attempt=attempt,
        preempted=preempted,
        accepted_at=accepted_at,
        partial=partial,
        partial_tokens=partial_tokens,
        result=Result.from_dict(json.loads(result)) if result is not None else None,
    )


ClassKey = tuple[str, Priority, int]
SLACK = 64
"""So many entries of tasks that no longer wait are always borne with."""


class _ReadyIndex:
    """The waiting tasks in memory, by class; everything costs at most O(log n)."""

    def __init__(self) -> None:
        self._live: dict[int, tuple[ClassKey, Waiting]] = {}
        self._heaps: dict[ClassKey, list[int]] = {}  # may hold tasks that no longer wait; skipped when met
        self._counts: Counter[ClassKey] = Counter()
        self._expiries: list[tuple[float, int]] = []  # the same

    def __contains__(self, seq: int) -> bool:
        return seq in self._live

    def add(self, stored: Stored) -> None:
        task = stored.task
        # Tasks whose work differs by less than a factor of two are alike to the scheduler.
        work = task.prompt_tokens // 8 + task.max_tokens
        key = (task.model, task.priority, work.bit_length())
        entry = Waiting(
            seq=stored.seq,
            model=task.model,
            priority=task.priority,
            task_type=task.task_type,
            prompt_tokens=task.prompt_tokens,
            max_tokens=task.max_tokens,
            accepted_at=stored.accepted_at,
            expires_at=stored.accepted_at + task.ttl_s,
            count=0,
        )
        self._live[stored.seq] = (key, entry)
        self._counts[key] += 1
        heapq.heappush(self._heaps.setdefault(key, []), stored.seq)
        heapq.heappush(self._expiries, (entry.expires_at, stored.seq))
        self._tidy(key)

    def _tidy(self, key: ClassKey) -> None:
        """Rebuild what holds more of the past than of the present."""
        if len(self._heaps[key]) > 2 * self._counts[key] + SLACK:
            self._heaps[key] = sorted({seq for seq in self._heaps[key] if seq in self._live})
        if len(self._expiries) > 2 * len(self._live) + SLACK:
            self._expiries = sorted((entry.expires_at, seq) for seq, (_, entry) in self._live.items())

    def discard(self, seq: int) -> None:
        if seq not in self._live:
            return
        key, _ = self._live.pop(seq)
        self._counts[key] -= 1
        if not self._counts[key]:
            del self._counts[key], self._heaps[key]

    def heads(self) -> tuple[Waiting, ...]:
        return tuple(replace(self._head(key), count=count) for key, count in self._counts.items())

    def _head(self, key: ClassKey) -> Waiting:
        heap = self._heaps[key]
        while heap[0] not in self._live or self._live[heap[0]][0] != key:
            heapq.heappop(heap)
        return self._live[heap[0]][1]

    def position(self, priority: Priority) -> int:
        """The place of the newest task of ``priority``: how many wait that may go before it, itself included."""
        return sum(count for key, count in self._counts.items() if key[1].rank <= priority.rank)

    def depth(self) -> dict[Priority, int]:
        depth = dict.fromkeys(Priority, 0)
        for (_, priority, _), count in self._counts.items():
            depth[priority] += count
        return depth

    def next_expiry(self) -> float | None:
        while self._expiries:
            at, seq = self._expiries[0]
            if seq in self._live and self._live[seq][1].expires_at == at:
                return at
            heapq.heappop(self._expiries)
        return None

    def expired(self, now: float) -> list[int]:
        """Waiting tasks whose time has passed; they stay in the index until they are discarded."""
        due: set[int] = set()
        while (at := self.next_expiry()) is not None and at <= now:
            due.add(heapq.heappop(self._expiries)[1])
        for seq in due:
            heapq.heappush(self._expiries, (self._live[seq][1].expires_at, seq))
        return sorted(due)
