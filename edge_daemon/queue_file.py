"""The queue's file: opened, verified, brought up to date, and saved from when it is damaged.

A file that is damaged is never deleted: it is set aside as ``queue.db.corrupt-<n>``, and what can still be read of it
is carried over into a new one. Each step can be cut short by a loss of power and is then done again.
"""

import contextlib
import errno
import logging
import os
import sqlite3
import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from edge_daemon.clock import Clock
from edge_daemon.errors import StorageFull, StoreError, StoreTooNew
from edge_daemon.steps import reached

log = logging.getLogger(__name__)

Connection = sqlite3.Connection

SCHEMA_VERSION = 4
"""To be raised with every change of a table, and of the fields of what stands in one as JSON (``Task``, ``Result``):
an earlier version of the daemon would give up each row with a field that it does not know.
"""
SCHEMA = """
CREATE TABLE tasks (
    seq         INTEGER PRIMARY KEY,        -- order of acceptance
    src         TEXT NOT NULL,
    id          TEXT NOT NULL,
    hash        BLOB NOT NULL,              -- Task.content_hash
    state       TEXT NOT NULL,
    attempt     INTEGER NOT NULL DEFAULT 0, -- counted when an attempt begins, so that kills count too
    preempted   INTEGER NOT NULL DEFAULT 0,
    boot_id     TEXT NOT NULL,              -- up to which time off is counted: that of its acceptance, at first
    accepted_at REAL NOT NULL,              -- queue time
    synced      INTEGER NOT NULL,           -- 1: the wall clock was right then
    bytes       INTEGER NOT NULL,           -- of task and result
    unacked     INTEGER NOT NULL,           -- its packet id, while the broker may send it again and it has no other id
    task        TEXT NOT NULL,              -- Task.to_json
    partial     TEXT NOT NULL DEFAULT '',   -- the text of an interrupted generation
    partial_tokens INTEGER NOT NULL DEFAULT 0,
    result      TEXT,                       -- Result.to_json, once terminal
    finished_at REAL,                       -- queue time
    sent        INTEGER NOT NULL DEFAULT 0, -- 1: its result is confirmed by the broker, 2: set aside as undeliverable
    logged      INTEGER NOT NULL DEFAULT 0  -- 1: its CSV row is on the disk
);
CREATE UNIQUE INDEX tasks_by_key ON tasks (src, id);
CREATE INDEX tasks_open ON tasks (seq) WHERE result IS NULL;
CREATE INDEX tasks_unsent ON tasks (seq) WHERE result IS NOT NULL AND sent = 0;
CREATE INDEX tasks_unlogged ON tasks (seq) WHERE result IS NOT NULL AND logged = 0;
CREATE INDEX tasks_unacked ON tasks (unacked) WHERE unacked != 0;
CREATE INDEX tasks_finished ON tasks (finished_at) WHERE finished_at IS NOT NULL;
CREATE TABLE learnt (model TEXT PRIMARY KEY, facts TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE boot (boot_id TEXT PRIMARY KEY, began_at REAL NOT NULL) WITHOUT ROWID; -- one row: this boot, in queue time
"""
"""Queue time is seconds of ``Clock.monotonic`` that go on from boot to boot, but for the time off between them.

So no row has to be written anew because the machine was booted.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """From one version to the next. Statements may use ``:monotonic``, ``:wall`` and ``:boot_id`` of now.

    ``layout`` changes tables, ``rows`` what stands in them; the latter also mends what was saved from a damaged file of
    the old version.
    """

    layout: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


MIGRATIONS: tuple[Migration, ...] = (
    # To 2: a wall clock that is set forward must not end the retention, so the age counts in monotonic seconds.
    Migration(
        rows=(
            "UPDATE tasks SET finished_at = :monotonic - max(0, :wall - finished_at) WHERE finished_at IS NOT NULL",
            "UPDATE tasks SET boot_id = :boot_id, accepted_at = finished_at WHERE finished_at IS NOT NULL",
        )
    ),
    # To 3: all times in queue time, which begins with this boot. `synced` was 2 where time off was still to be
    # counted. What is no number of seconds is damage.
    Migration(
        layout=("CREATE TABLE IF NOT EXISTS boot (boot_id TEXT PRIMARY KEY, began_at REAL NOT NULL) WITHOUT ROWID",),
        rows=(
            """
            UPDATE tasks SET accepted_at = accepted_at + shift, finished_at = finished_at + shift
            FROM (
                SELECT boot_id AS earlier, :monotonic - max(seen_at) AS shift
                FROM (SELECT boot_id, max(accepted_at, coalesce(finished_at, accepted_at)) AS seen_at FROM tasks)
                WHERE seen_at < 1e12 GROUP BY boot_id
            )
            WHERE boot_id = earlier AND boot_id != :boot_id
            """,
            "UPDATE tasks SET boot_id = '', synced = 1 WHERE synced = 2",
            "INSERT OR REPLACE INTO boot VALUES (:boot_id, 0)",
        ),
    ),
    # To 4: a text that the broker sends again is known by its packet id, which was not kept.
    Migration(
        layout=(
            "DROP INDEX IF EXISTS tasks_unacked",
            "CREATE INDEX tasks_unacked ON tasks (unacked) WHERE unacked != 0",
        ),
        rows=("UPDATE tasks SET unacked = 0",),
    ),
)
"""The n-th leads from version n + 1 to n + 2."""

IMPLAUSIBLE_VERSION = 1_000_000
"""Not a later version of ours, but damage."""
MAX_PROBES = 100_000
"""Rows that are looked for one by one between two damaged places."""

_UNREADABLE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
"""What SQLite says of a damaged file; the last, of a table that is not there."""
_UNREADABLE_SECTOR = (sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ)
_TYPES: dict[str, type | tuple[type, ...]] = {"INTEGER": int, "REAL": (int, float), "TEXT": str, "BLOB": bytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What was wrong with a file, where it is now, and how many of its tasks were saved."""

    problem: str
    aside: str
    saved: int


def open_queue(path: Path, clock: Clock) -> tuple[Connection, Damage | None]:
    """The database at ``path``: made, if there is none; mended, if it is damaged; never a later version's.

    Raises:
        StoreTooNew: a later version has written it; not a byte of it is changed.
        StorageFull: there is no room to make or to mend it.
        StoreError: it cannot be opened.
    """
    saved = _beside(path, ".saved")
    with guard(path):
        if saved.exists():  # power was lost between the last two steps
            _replace(path, saved)
        damage = _set_aside_garbage(path)
        try:
            return _prepared(path, clock), damage
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter: SQLite quotes damage in its message
            if isinstance(error, sqlite3.Error) and not _is_damage(error):
                raise
            damage = _mend(path, clock, str(error))
        return _prepared(path, clock), damage


@contextlib.contextmanager
def guard(path: Path) -> Iterator[None]:
    """Errors of SQLite and of the file system as ours."""
    try:
        yield
    except OSError as error:
        kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
        raise kind(f"{path}: {error.strerror}") from error
    except sqlite3.Error as error:
        kind = StorageFull if _code(error) == sqlite3.SQLITE_FULL else StoreError
        raise kind(f"{path}: {error}") from error


@contextlib.contextmanager
def all_or_nothing(db: Connection) -> Iterator[None]:
    """A transaction."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def write_something(db: Connection) -> None:
    """Add a page to the write-ahead log that says nothing new."""
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def fold(db: Connection) -> None:
    """Copy the write-ahead log into the file, make that last, and begin the log anew."""
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def log_bytes(path: Path) -> int:
    """How long the write-ahead log is."""
    try:
        return _beside(path, "-wal").stat().st_size
    except FileNotFoundError:
        return 0


# -- opening ---------------------------------------------------------------------------------------------------------


def _connected(path: Path, *, mode: str = "rwc") -> Connection:
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False
    )
    db.text_factory = _text
    # One process owns the file: SQLite before 3.51.3 can corrupt a WAL that two connections write.
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    return db


def _prepared(path: Path, clock: Clock) -> Connection:
    db = _connected(path)
    try:
        version = _version(db)
        if SCHEMA_VERSION < version < IMPLAUSIBLE_VERSION:  # asked first: a later version's file is not touched
            raise StoreTooNew(f"{path}: written by a later version of edge-llm (schema {version}); install that one")
        if not 0 <= version <= SCHEMA_VERSION:
            raise _damaged(f"its version is {version}")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # NORMAL may lose a commit in a power cut
        db.execute("PRAGMA wal_autocheckpoint = 0")  # it would keep an fsync that failed to itself
        if version == 0:
            _make(db)
        _verify(db)
        if 0 < version < SCHEMA_VERSION:
            _migrate(db, path, version, clock)
        if _layout(db) != _layout_as_made():
            raise _damaged("its tables are not as they were made")
    except BaseException:
        db.close()
        raise
    return db


def _version(db: Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _make(db: Connection) -> None:
    if db.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise _damaged("it has tables and no version")
    db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    reached("schema_made")


def _verify(db: Connection) -> None:
    if _verdict(db) != "ok":
        with contextlib.suppress(sqlite3.DatabaseError):
            db.execute("REINDEX")  # the damage may be in an index alone: it can be made anew
    if (verdict := _verdict(db)) != "ok":
        raise _damaged(verdict)


def _verdict(db: Connection) -> str:
    """``ok``, or the first thing that is wrong; unlike ``quick_check`` this sees an index that belies its table."""
    return str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])


def _layout(db: Connection) -> list[tuple[str, ...]]:
    """Every index, and every column of every table."""
    columns = (
        "SELECT m.type, m.name, c.name FROM sqlite_master m LEFT JOIN pragma_table_info(m.name) c ORDER BY 1, 2, 3"
    )
    return list(db.execute(columns))


def _layout_as_made() -> list[tuple[str, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA)
        return _layout(db)


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


def _is_damage(error: sqlite3.Error) -> bool:
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _damaged(verdict: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(verdict)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


# -- bringing up to date ---------------------------------------------------------------------------------------------


def _migrate(db: Connection, path: Path, version: int, clock: Clock) -> None:
    """All steps in one transaction, after a copy of the old file was made; one such copy is kept."""
    backup = _beside(path, f".v{version}")
    _back_up(db, backup)
    for older in path.parent.glob(f"{path.name}.v*"):
        if older != backup:
            older.unlink()
    with all_or_nothing(db):
        for migration in MIGRATIONS[version - 1 :]:
            try:
                _run(db, (*migration.layout, *migration.rows), clock)
            except sqlite3.Error as error:
                if _code(error) == sqlite3.SQLITE_ERROR:  # a table or a column is not there
                    raise _damaged(str(error)) from error
                raise
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    log.info("%s: brought from version %d to %d; the old file is kept as %s", path, version, SCHEMA_VERSION, backup)


def _back_up(db: Connection, backup: Path) -> None:
    part = _beside(backup, ".part")
    part.unlink(missing_ok=True)
    db.execute("VACUUM INTO ?", (str(part),))
    _sync(part)
    part.replace(backup)
    _sync(backup.parent)


def _run(db: Connection, statements: tuple[str, ...], clock: Clock) -> None:
    now = {"monotonic": clock.monotonic(), "wall": clock.wall(), "boot_id": clock.boot_id()}
    for statement in statements:
        db.execute(statement, now)


# -- saving what can be saved ----------------------------------------------------------------------------------------


def _set_aside_garbage(path: Path) -> Damage | None:
    """Move away what cannot be a database or its log: SQLite would stop at the one and delete the other in silence."""
    wal = _beside(path, "-wal")
    if path.exists() and not path.is_file():
        return _told(Damage(problem="it is no file", aside=_set_aside(path), saved=0), path)
    if not wal.exists():
        return None
    if not wal.is_file() or not _is_sound_log(wal):
        return _told(Damage(problem="its write-ahead log is none", aside=_set_aside_log(path), saved=0), path)
    if wal.stat().st_size and not (path.exists() and path.stat().st_size):
        return _told(Damage(problem="only its write-ahead log is there", aside=_set_aside(path), saved=0), path)
    return None


def _mend(path: Path, clock: Clock, problem: str) -> Damage:
    """Carry over what can be read into a new file, and put that in the place of the damaged one."""
    part, saved = _beside(path, ".part"), _beside(path, ".saved")
    part.unlink(missing_ok=True)
    tasks = _carry_over(path, part, clock)
    _sync(part)
    part.replace(saved)
    return _told(Damage(problem=problem, aside=_replace(path, saved), saved=tasks), path)


def _told(damage: Damage, path: Path) -> Damage:
    message = "%s was damaged (%s): it is now %s, and the new one has %d of its tasks"
    log.error(message, path, damage.problem, damage.aside, damage.saved)
    return damage


def _carry_over(path: Path, new_path: Path, clock: Clock) -> int:
    """Make a file with every task and fact of a damaged one that can still be read. Returns the number of tasks."""
    with contextlib.closing(_connected(new_path)) as new, all_or_nothing(new):
        for statement in SCHEMA.split(";"):
            new.execute(statement)
        with contextlib.closing(_connected(path, mode="rw")) as old:
            list(_until_damage(old, "PRAGMA writable_schema = ON"))  # makes SQLite read on where the file is too short
            _copy(new, "learnt", _until_damage(old, "SELECT model, facts FROM learnt"))
            _copy(new, "boot", _until_damage(old, "SELECT boot_id, began_at FROM boot"))
            if columns := _common_columns(old, new):
                _copy(new, "tasks", _readable(old, columns), columns)
            (version,) = next(_until_damage(old, "PRAGMA user_version"), (0,))
            if 0 < version < SCHEMA_VERSION:
                for migration in MIGRATIONS[version - 1 :]:
                    _run(new, migration.rows, clock)
        new.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        (tasks,) = new.execute("SELECT count(*) FROM tasks").fetchone()
    return int(tasks)


def _common_columns(old: Connection, new: Connection) -> tuple[str, ...]:
    """The columns of ``tasks`` that both have, ``seq`` first."""
    there = {name for (name,) in _until_damage(old, "SELECT name FROM pragma_table_info('tasks')")}
    return tuple(name for (name,) in new.execute("SELECT name FROM pragma_table_info('tasks')") if name in there)


def _copy(new: Connection, table: str, rows: Generator[tuple[Any, ...]], columns: tuple[str, ...] = ()) -> None:
    """Insert those rows whose cells are of the right kind and whose key is not there yet."""
    kinds = dict(new.execute("SELECT name, type FROM pragma_table_info(?)", (table,)))
    names = columns or tuple(kinds)
    wanted = [_TYPES[kinds[name]] for name in names]
    marks = ", ".join("?" * len(names))
    statement = f"INSERT OR IGNORE INTO {table} ({', '.join(names)}) VALUES ({marks})"  # noqa: S608
    with contextlib.closing(rows):  # also when there is no room: while the old file is still open
        for row in rows:
            if all(cell is None or isinstance(cell, kind) for cell, kind in zip(row, wanted, strict=True)):
                new.execute(statement, row)


def _readable(db: Connection, columns: tuple[str, ...]) -> Generator[tuple[Any, ...]]:
    """Every task that can be reached: from both ends up to the damage, and one by one between."""
    select = f"SELECT {', '.join(columns)} FROM tasks"  # noqa: S608
    low, high = 0, None
    for row in _until_damage(db, f"{select} ORDER BY seq"):
        low = row[0]
        yield row
    for row in _until_damage(db, f"{select} WHERE seq > {low} ORDER BY seq DESC"):
        high = row[0]
        yield row
    for seq in islice(_between(db, low, high), MAX_PROBES):
        yield from _until_damage(db, f"{select} WHERE seq = {seq}")


def _between(db: Connection, low: int, high: int | None) -> Iterator[int]:
    """Where there may be more: all numbers between the ends, or what an index knows when there is only one end."""
    if high is not None:
        yield from range(low + 1, high)
    else:
        known = f"SELECT seq FROM tasks INDEXED BY tasks_by_key WHERE seq > {low}"  # noqa: S608
        yield from [seq for (seq,) in _until_damage(db, known)]


def _until_damage(db: Connection, query: str) -> Generator[tuple[Any, ...]]:
    """Its rows, as far as they can be read. That the file cannot be opened just now is no damage, and is raised."""
    try:
        yield from db.execute(query)
    except UnicodeDecodeError:  # SQLite quotes damage in its message
        pass
    except sqlite3.Error as error:
        if _code(error) not in _UNREADABLE and getattr(error, "sqlite_errorcode", None) not in _UNREADABLE_SECTOR:
            raise


def _is_sound_log(wal: Path) -> bool:
    """Whether a write-ahead log is empty, or begins as one; a power cut leaves zeros where its header never was."""
    with wal.open("rb") as file:
        header = file.read(32)
    if not header.strip(b"\0"):
        return True
    if len(header) < 32:
        return False
    magic, *_ = struct.unpack(">I", header[:4])
    words = struct.unpack(f"{'>' if magic & 1 else '<'}6I", header[:24])
    first = second = 0
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return magic & ~1 == 0x377F0682 and (first, second) == struct.unpack(">2I", header[24:])


def _replace(path: Path, saved: Path) -> str:
    """Set the damaged file aside and put ``saved`` in its place. Returns where the damaged one is."""
    aside = _set_aside(path)
    saved.rename(path)
    _sync(path.parent)
    return aside


def _set_aside(path: Path) -> str:
    """Rename the file and its companions; nothing is deleted."""
    aside = _free_name(path)
    for suffix in ("", "-wal", "-shm"):
        companion = _beside(path, suffix)
        if companion.exists():
            companion.rename(_beside(aside, suffix))
    return str(aside)


def _set_aside_log(path: Path) -> str:
    aside = _beside(_free_name(path), "-wal")
    _beside(path, "-wal").rename(aside)
    return str(aside)


def _free_name(path: Path) -> Path:
    names = (_beside(path, f".corrupt-{number}") for number in count(1))
    return next(name for name in names if not any(_beside(name, suffix).exists() for suffix in ("", "-wal")))


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _sync(path: Path) -> None:
    """Make a file, or the names in a directory, last."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
