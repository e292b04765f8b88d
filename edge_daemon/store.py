"""The durable queue and outbox: one SQLite file, one connection, one lock.

A task is a row from its acceptance until its retention ends; states change, rows are never moved. What is committed
survives ``kill -9`` and a power cut (WAL with ``synchronous=FULL``). The waiting tasks are also indexed in memory, so
that a decision costs the same with ten tasks queued as with a hundred thousand.

Times in the file are queue time, which goes on from boot to boot; all others are seconds of ``Clock.monotonic``.
"""

import heapq
import json
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from edge_daemon import queue_file
from edge_daemon.clock import Clock
from edge_daemon.errors import StorageFull, StoreError
from edge_daemon.messages import Added, Priority, Result, Stored, Submission, Task, TaskState, compact
from edge_daemon.steps import reached

log = logging.getLogger(__name__)

FOLD_AT_BYTES = 4 << 20
"""A write-ahead log of this length is folded into the file."""
PRUNED_SHARE = 0.9
"""What is left of ``retention_bytes`` when it was exceeded, so that not every task has to make room for itself."""
LAST_SEEN = """
SELECT max(at) FROM (
    SELECT max(began_at) AS at FROM boot WHERE began_at < 1e12
    UNION ALL SELECT max(accepted_at) FROM tasks WHERE result IS NULL AND accepted_at < 1e12
    UNION ALL SELECT max(finished_at) FROM tasks WHERE finished_at < 1e12
)
"""
"""The last moment, in queue time, at which the machine was seen to be on. What is no number of seconds is damage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """The oldest waiting task of one class, and the number of tasks in that class."""

    seq: int
    model: str
    priority: Priority
    task_type: str | None
    fallback: tuple[str, ...] | None
    prompt_tokens: int
    max_tokens: int
    accepted_at: float
    expires_at: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of the queue; ``urgent_reserve`` of ``max_tasks`` are places that only urgent tasks may take.

    Of ``max_bytes``, the same share is theirs.
    """

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
        StoreError: any other failure of the file. Nobody knows what of the last change is on the disk, so from then on
            every call fails: the process is to end, and the next start believes only what it finds.
    """

    def __init__(self, path: Path, *, clock: Clock, limits: Limits | None = None) -> None:
        self._path = path
        self._clock = clock
        self._boot_id = clock.boot_id()
        self._began_at = 0.0  # this boot, in queue time
        self._limits = limits or Limits()
        self._lock = threading.RLock()  # guards everything below
        self._db, self._damage = queue_file.open_queue(path, clock)
        self._failure: str | None = None
        self._is_full = False
        self._is_folded = False
        self._ready = _ReadyIndex()
        self._open: dict[int, tuple[str, int]] = {}  # src and size of each open task
        self._open_bytes = 0
        self._open_by_src: Counter[str] = Counter()
        self._finished_bytes = 0
        self._may_free = True  # whether there may be more to delete than the last time that nothing was
        # Marks that may be lost: a crash then costs one repetition, not a task. They ride on the next commit.
        self._marks: dict[str, set[int]] = {"sent": set(), "aside": set(), "logged": set(), "acked": set()}
        self._learnt: dict[str, str] = {}  # facts of models: the same
        self._asked_again: set[int] = set()  # results to be sent once more, though one copy may be on its way
        self._before_boot: set[int] = set()  # accepted in an earlier boot, time switched off not yet counted
        with suppress(StorageFull):
            self._fold()
        self._recover()

    # -- how the file is

    @property
    def damage(self) -> queue_file.Damage | None:
        """What was wrong with the file when it was opened."""
        return self._damage

    @property
    def failure(self) -> str | None:
        """Why nothing works any more, if that is so."""
        return self._failure

    @property
    def is_full(self) -> bool:
        """Whether the last attempt to write failed for want of room."""
        return self._is_full

    # -- intake

    def add_many(self, submissions: Sequence[Submission]) -> list[Added]:
        """Commit a group of tasks with one fsync. The answers are in the order of ``submissions``."""
        added: list[int] = []
        with self._lock:
            if self._finished_bytes > self._limits.retention_bytes and self._may_free:
                self.prune()
            try:
                with self._transaction():
                    answers = [self._add(submission, added) for submission in submissions]
                    reached("tasks_inserted")
            except BaseException:
                for seq in added:
                    self._forget(seq)
                raise
            reached("tasks_committed")
            return answers

    def recognise(self, submissions: Sequence[Submission]) -> list[Added]:
        """What is known of these, with nothing written: ``known``, ``conflict`` or ``unknown``."""
        with self._lock:
            return [self._recognised(submission) or Added(outcome="unknown") for submission in submissions]

    def _add(self, submission: Submission, added: list[int]) -> Added:
        task = submission.task
        if found := self._recognised(submission):
            return self._asked_for(found, task)
        if submission.only_known:
            return Added(outcome="unknown")
        if limit := self._full(task):
            return Added(outcome=limit)
        text = task.to_json()
        size = len(text.encode())
        # Of the bytes the same share is kept for urgent tasks as of the places.
        if self._open_bytes + size > self._limits.max_bytes * self._places(task) // self._limits.max_tasks:
            return Added(outcome="full_of_bytes")
        now = self._clock.monotonic()
        seq = self._insert(submission, text, size, now)
        stored = Stored(seq=seq, task=task, state=TaskState.QUEUED, attempt=0, preempted=0, accepted_at=now)
        self._remember(stored, size)
        added.append(seq)
        return Added(outcome="new", stored=stored, position=self._ready.position(task.priority))

    def _insert(self, submission: Submission, text: str, size: int, now: float) -> int:
        task, digest = submission.task, submission.task.content_hash()
        unacked = 0 if submission.own_id else submission.packet_id
        accepted = (self._began_at + now, self._clock.synced())
        cursor = self._db.execute(
            "INSERT INTO tasks (src, id, hash, state, boot_id, accepted_at, synced, bytes, unacked, task)"
            " VALUES (?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?)",
            (*task.key, digest, self._boot_id, *accepted, size, unacked, text),
        )
        return int(cursor.lastrowid or 0)

    def _recognised(self, submission: Submission) -> Added | None:
        """What is there of it already: the task itself, or another one with its id."""
        if twin := self._twin(submission):
            return Added(outcome="known", stored=twin)
        known = self._row("src = ? AND id = ?", submission.task.key)
        if known is None:
            return None
        task = submission.task
        if "options" in known.task.from_type:  # stored by a version that hashed no options beside those of a type
            task = replace(task, options={})
        with self._guard():
            (stored_hash,) = self._db.execute("SELECT hash FROM tasks WHERE seq = ?", (known.seq,)).fetchone()
        return Added(outcome="known" if stored_hash == task.content_hash() else "conflict", stored=known)

    def _twin(self, submission: Submission) -> Stored | None:
        """The task without an id of its sender's that the broker sends again in ``submission``.

        An equal text alone proves nothing: it may be another one that never came here. But the broker must send a
        message again under the same packet id, and may give that to another only when it has our PUBACK. What remains
        is a broker that at once gives a freed id to an equal text with the same address, and a connection that ends
        between the two: the second is then taken for the first. mosquitto counts through all 65,535 ids first.
        """
        if submission.own_id or not submission.redelivered:
            return None
        task = submission.task
        twin = self._row(
            # The first term is for the index; of two, the newer one's message came after the other's PUBACK.
            "unacked != 0 AND unacked = ? AND src = ? AND hash = ? ORDER BY seq DESC",
            (submission.packet_id, task.src, task.content_hash()),
        )
        if twin is None or twin.seq in self._marks["acked"]:
            return None
        return twin if (twin.task.reply_to, twin.task.correlation) == (task.reply_to, task.correlation) else None

    def _asked_for(self, found: Added, task: Task) -> Added:
        """Have the answer sent again, when it is the sender that asks again."""
        known = found.stored
        if found.outcome != "known" or known is None or known.task.key != task.key:
            return found
        if (task.reply_to, task.correlation) != (known.task.reply_to, known.task.correlation):
            # The sender asks again from elsewhere: the answer goes where it listens now.
            moved = replace(known.task, reply_to=task.reply_to, correlation=task.correlation)
            known = replace(known, task=moved)
            self._db.execute("UPDATE tasks SET task = ? WHERE seq = ?", (moved.to_json(), known.seq))
        if known.result is not None:
            self._db.execute("UPDATE tasks SET sent = 0 WHERE seq = ?", (known.seq,))
            self._asked_again.add(known.seq)
        return Added(outcome="known", stored=known)

    def _places(self, task: Task) -> int:
        """How many open tasks there may be with this one."""
        return self._limits.max_tasks - (0 if task.priority is Priority.URGENT else self._limits.urgent_reserve)

    def _full(self, task: Task) -> str | None:
        """Which limit stands in the way of ``task``, whatever its size, if one does."""
        limits = self._limits
        if len(self._open) >= self._places(task):
            return "full"
        if limits.max_tasks_per_src is not None and self._open_by_src[task.src] >= limits.max_tasks_per_src:
            return "full_for_src"
        return self._kept_for() if self._finished_bytes > limits.retention_bytes else None

    def _kept_for(self) -> str:
        """What most of the finished tasks wait for, that cannot be deleted to make room."""
        counts = "SELECT count(*) FROM tasks WHERE result IS NOT NULL AND "
        (unsent,), (unlogged,) = (self._db.execute(counts + column).fetchone() for column in ("sent = 0", "logged = 0"))
        return "no_room" if unsent >= unlogged else "unlogged"

    def unacked(self) -> list[int]:
        """Tasks without an id of their sender's that the broker may send again, as far as is known."""
        with self._lock, self._guard():
            return [seq for (seq,) in self._db.execute("SELECT seq FROM tasks WHERE unacked != 0")]

    def mark_acked(self, seqs: Iterable[int]) -> None:
        """The broker will not send these tasks again: an equal text from now on is another task."""
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
                reached("attempt_counted")
            reached("attempt_committed")
            self._ready.discard(seq)
            return self._row("seq = ?", (seq,))

    def release(self, seq: int, *, counted: bool = True) -> Stored | None:
        """Set a running task back to waiting, in its old place, after an attempt that failed.

        ``counted`` is False for one that was turned away before anything was tried. It counts as put aside then, since
        the task has begun to run and was told to (``Stored.runs``).
        """
        return self._set_back(
            "UPDATE tasks SET state = 'queued', attempt = attempt - ?, preempted = preempted + ?"
            " WHERE seq = ? AND state = 'running'",
            (not counted, not counted, seq),
        )

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
                reached("set_back_written")
            reached("set_back_committed")
            stored = self._row("seq = ?", (seq,))
            if stored:
                self._ready.add(stored)
            return stored

    def finish(self, seq: int, result: Result) -> bool:
        """End a task: its one terminal record is stored, to be sent and logged. False when it has ended already."""
        return bool(self.finish_many({seq: result}))

    def finish_many(self, results: Mapping[int, Result]) -> list[int]:
        """End tasks by one commit. Returns the ``seq`` of those that had not ended already."""
        if not results:
            return []
        texts = {seq: result.to_json() for seq, result in results.items()}
        sizes = {seq: len(text.encode()) for seq, text in texts.items()}
        with self._lock:
            with self._transaction():
                ended = [seq for seq in results if self._end(seq, results[seq].state, texts[seq], sizes[seq])]
                reached("result_written")
            reached("result_committed")
            for seq in ended:
                self._finished_bytes += sizes[seq] + self._open.get(seq, ("", 0))[1]
            for seq in results:
                self._forget(seq)
            return ended

    def _end(self, seq: int, state: TaskState, result: str, size: int) -> bool:
        cursor = self._db.execute(
            "UPDATE tasks SET state = ?, result = ?, finished_at = ?, partial = '', bytes = bytes + ?"
            " WHERE seq = ? AND result IS NULL",
            (state.value, result, self._now(), size, seq),
        )
        return cursor.rowcount == 1

    def expired(self, limit: int) -> list[Stored]:
        """Waiting tasks whose time to live has passed, those first whose time passed first; the caller finishes them.

        They are ``limit`` at most, and no more than a write-ahead log is to hold: finishing writes them anew.
        """
        with self._lock:
            if self._before_boot and self._clock.synced():
                self._count_time_off(limit)
            due = self._ready.expired(self._clock.monotonic(), limit)
            return [stored for seq in self._one_log_full(due) if (stored := self._row("seq = ?", (seq,)))]

    def _one_log_full(self, seqs: Iterable[int]) -> Iterator[int]:
        left = FOLD_AT_BYTES
        for seq in seqs:
            if left <= 0:
                return
            left -= self._open[seq][1]
            yield seq

    def next_expiry(self) -> float | None:
        """The monotonic time at which it is worth to ask for expired tasks, None when none waits."""
        with self._lock:
            if self._before_boot and self._clock.synced():
                return self._clock.monotonic()
            return self._ready.next_expiry()

    # -- looking up

    def find(self, src: str, task_id: str) -> Stored | None:
        """The task of this sender with this id."""
        with self._lock:
            return self._row("src = ? AND id = ?", (src, task_id))

    def get(self, seq: int) -> Stored | None:
        """The task with this number, None when it was deleted or cannot be read."""
        with self._lock:
            return self._row("seq = ?", (seq,))

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
            passed = set(skip) | self._marks["sent"] | self._marks["aside"]
            with self._guard():  # there may be thousands of marks: those are passed without being read
                seqs = self._db.execute("SELECT seq FROM tasks WHERE result IS NOT NULL AND sent = 0 ORDER BY seq")
                wanted = list(islice((seq for (seq,) in seqs if seq not in passed), limit))
            found = [stored for seq in wanted if (stored := self._row("seq = ?", (seq,)))]
            self._asked_again.difference_update(stored.seq for stored in found)
            return found

    def unsent_count(self) -> int:
        """How many results wait to be delivered."""
        with self._lock, self._guard():
            (count,) = self._db.execute("SELECT count(*) FROM tasks WHERE result IS NOT NULL AND sent = 0").fetchone()
            marked = self._marks["sent"] | self._marks["aside"]
            waiting = "SELECT 1 FROM tasks WHERE seq = ? AND result IS NOT NULL AND sent = 0"
            return int(count) - sum(self._db.execute(waiting, (seq,)).fetchone() is not None for seq in marked)

    def mark_sent(self, seq: int) -> None:
        """The broker has confirmed this result; one that was asked for again since it was taken is still unsent."""
        with self._lock:
            if seq not in self._asked_again:
                self._mark("sent", (seq,))

    def set_aside(self, seq: int) -> None:
        """This result cannot be delivered; it stays readable in the store and the log."""
        self._mark("aside", (seq,))

    def offer_again(self) -> int:
        """Put what was set aside back into the outbox. Returns the number of results.

        Raises:
            StorageFull: they stay where they are.
        """
        aside = "sent = 2 AND result != ''"  # a row that is damaged has an empty one
        with self._lock:
            with self._guard():
                (count,) = self._db.execute(f"SELECT count(*) FROM tasks WHERE {aside}").fetchone()  # noqa: S608
            if count:
                with self._transaction():
                    self._db.execute(f"UPDATE tasks SET sent = 0 WHERE {aside}")  # noqa: S608
            return int(count)

    # -- the CSV log

    def unlogged(self) -> list[int]:
        """The ``seq`` of each finished task without a row on the disk, as far as is known; there may be many."""
        with self._lock, self._guard():
            rows = self._db.execute("SELECT seq FROM tasks WHERE result IS NOT NULL AND logged = 0 ORDER BY seq")
            return [seq for (seq,) in rows if seq not in self._marks["logged"]]

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
                with suppress(ValueError):  # damaged: it will be learnt anew
                    known[model] = json.loads(facts)
            return known

    def learn(self, model: str, facts: dict[str, Any]) -> None:
        """Replace the facts of one model, with the next commit."""
        with self._lock:
            self._learnt[model] = compact(facts)

    # -- housekeeping

    def flush(self) -> None:
        """Commit the marks that wait for company; when the disk was full, see whether it still is."""
        with self._lock:
            if self._is_full or self._learnt or any(self._marks.values()):
                with self._transaction():
                    if self._is_full:
                        queue_file.write_something(self._db)
                    reached("marks_flushing")
                reached("marks_flushed")

    def prune(self) -> int:
        """Delete finished tasks that were sent and logged. Returns the number deleted.

        Those go that were kept for ``retention_s``, and when all take more than ``retention_bytes``, the oldest of the
        rest until they take a tenth less. The newest row stays, because its ``seq`` must never be given again.
        """
        with self._lock, self._guard():
            self.flush()
            doomed, freed = self._doomed()
            if doomed:
                with self._transaction():
                    self._db.executemany("DELETE FROM tasks WHERE seq = ?", [(seq,) for seq in doomed])
                    reached("prune_written")
                reached("prune_committed")
                self._finished_bytes -= freed
            self._may_free = bool(doomed)
            return len(doomed)

    def _doomed(self) -> tuple[list[int], int]:
        """The tasks to delete, and what they take."""
        oldest = self._now() - self._limits.retention_s
        limit = self._limits.retention_bytes
        wanted = self._finished_bytes - limit * PRUNED_SHARE if self._finished_bytes > limit else 0
        doomed, freed = [], 0
        rows = self._db.execute(
            "SELECT seq, bytes, finished_at FROM tasks WHERE finished_at IS NOT NULL AND sent != 0 AND logged = 1"
            " AND seq < (SELECT max(seq) FROM tasks) ORDER BY finished_at"
        )
        for seq, size, finished_at in rows:
            if finished_at >= oldest and freed >= wanted:
                break
            doomed.append(seq)
            freed += size
        return doomed, freed

    def close(self) -> None:
        """Commit what waits and fold the write-ahead log into the file."""
        with self._lock:
            try:
                if self._failure is None:
                    with suppress(StorageFull):  # it is done at the next start
                        self.flush()
                        reached("checkpoint_due")
                        self._fold()
                        reached("checkpoint_made")
            finally:
                self._failure = f"{self._path}: closed"
                self._db.close()

    # -- inside

    def _now(self) -> float:
        """Queue time."""
        return self._began_at + self._clock.monotonic()

    def _mark(self, kind: str, seqs: Iterable[int]) -> None:
        with self._lock:
            self._marks[kind].update(seqs)
            self._may_free = True

    def _write_marks(self) -> None:
        columns = {"sent": "sent = 1", "aside": "sent = 2", "logged": "logged = 1", "acked": "unacked = 0"}
        for kind, seqs in self._marks.items():
            statement = f"UPDATE tasks SET {columns[kind]} WHERE seq = ?"  # noqa: S608
            self._db.executemany(statement, [(seq,) for seq in seqs])
        self._db.executemany("INSERT OR REPLACE INTO learnt (model, facts) VALUES (?, ?)", self._learnt.items())

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Errors of SQLite as ours; but for a full disk, the first one is the last."""
        if self._failure is not None:
            raise StoreError(self._failure)
        try:
            with queue_file.guard(self._path):
                yield
        except StorageFull:
            self._is_full = True
            raise
        except StoreError as error:
            self._failure = str(error)
            raise

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing. The caller holds the lock."""
        if not self._is_folded:
            self._fold()
        with self._guard(), queue_file.all_or_nothing(self._db):
            self._write_marks()
            yield
        self._is_full = False
        for seqs in self._marks.values():
            seqs.clear()
        self._learnt.clear()
        if queue_file.log_bytes(self._path) > FOLD_AT_BYTES:
            with suppress(StorageFull):  # what was committed is: the log grows for as long as there is room for it
                self._fold()

    def _fold(self) -> None:
        """Empty the write-ahead log into the file.

        What an earlier process left in the log may be in the page cache alone: after an fsync that failed, the kernel
        takes lost pages for written ones. Folding writes all of it anew, before anything is added behind it.
        """
        with self._guard():
            queue_file.fold(self._db)
        self._is_folded = True

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
                stored = _stored_from_row(row, self._began_at)
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                self._take_out(row[0], error)
            else:
                yield stored

    def _take_out(self, seq: int, error: Exception) -> None:
        """A row that a damaged disk has made unreadable leaves all queues, so that the others can be served."""
        log.error("task %d cannot be read from the queue file and is given up: %s", seq, error)
        self._forget(seq)
        with self._guard():
            self._db.execute(
                "UPDATE tasks SET src = '', id = seq, state = 'failed', result = '', finished_at = ?, sent = 2,"
                " logged = 1, unacked = 0 WHERE seq = ?",
                (self._now(), seq),
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
        """Carry tasks over from before: what ran waits again, with its attempt counted."""
        is_new_boot = self._take_up_time()
        with suppress(StorageFull), self._transaction():  # on a full disk they wait all the same
            if is_new_boot:
                self._db.execute("DELETE FROM boot")
                self._db.execute("INSERT INTO boot VALUES (?, ?)", (self._boot_id, self._began_at))
            self._db.execute("UPDATE tasks SET state = 'queued' WHERE result IS NULL AND state = 'running'")
            reached("running_recovered")
        with self._guard():
            sizes = dict(self._db.execute("SELECT seq, bytes FROM tasks WHERE result IS NULL"))
        for stored in self._rows("result IS NULL ORDER BY seq", ()):
            self._remember(stored, sizes[stored.seq])
        with self._guard():
            earlier = "SELECT seq FROM tasks WHERE result IS NULL AND synced = 1 AND boot_id != ?"
            self._before_boot = {seq for (seq,) in self._db.execute(earlier, (self._boot_id,))}
            (finished,) = self._db.execute("SELECT total(bytes) FROM tasks WHERE finished_at IS NOT NULL").fetchone()
        self._finished_bytes = int(finished)

    def _take_up_time(self) -> bool:
        """Have queue time go on; in a new boot, from when the machine was last seen on. Returns whether it is new."""
        with self._guard():
            boot = "SELECT began_at FROM boot WHERE boot_id = ? AND began_at BETWEEN -1e12 AND 1e12"
            known = self._db.execute(boot, (self._boot_id,)).fetchone()
            (last_seen,) = self._db.execute(LAST_SEEN).fetchone()
        if known:
            (self._began_at,) = known
        elif last_seen is not None:
            self._began_at = last_seen - self._clock.monotonic()
        return known is None

    def _count_time_off(self, limit: int) -> None:
        """The wall clock is right now: the time that the machine was off counts after all, for some tasks at a time."""
        now, wall = self._clock.monotonic(), self._clock.wall()
        portion = list(self._one_log_full(islice(self._before_boot, limit)))
        carried = [stored for seq in portion if (stored := self._row("seq = ?", (seq,)))]
        with self._transaction():
            for stored in carried:
                accepted_at = min(stored.accepted_at, now - (wall - stored.task.received_at))
                counted = (self._began_at + accepted_at, self._boot_id, stored.seq)
                self._db.execute("UPDATE tasks SET accepted_at = ?, boot_id = ? WHERE seq = ?", counted)
                if stored.seq in self._ready:
                    self._ready.discard(stored.seq)
                    self._ready.add(replace(stored, accepted_at=accepted_at))
        self._before_boot.difference_update(portion)


def _stored_from_row(row: tuple[Any, ...], began_at: float) -> Stored:
    """The only place that turns a row into a record. ``began_at``: this boot, in queue time."""
    seq, task, state, attempt, preempted, accepted_at, partial, partial_tokens, result = row
    return Stored(
        seq=seq,
        task=Task.from_dict(json.loads(task)),
        state=TaskState(state),
        attempt=int(attempt),
        preempted=int(preempted),
        accepted_at=float(accepted_at) - began_at,
        partial=partial,
        partial_tokens=int(partial_tokens),
        result=Result.from_dict(json.loads(result)) if result is not None else None,
    )


ClassKey = tuple[str, Priority, int, tuple[str, ...] | None]
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
        key = (task.model, task.priority, work.bit_length(), task.fallback)
        entry = Waiting(
            seq=stored.seq,
            model=task.model,
            priority=task.priority,
            task_type=task.task_type,
            fallback=task.fallback,
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
        for (_, priority, *_), count in self._counts.items():
            depth[priority] += count
        return depth

    def next_expiry(self) -> float | None:
        while self._expiries:
            at, seq = self._expiries[0]
            if seq in self._live and self._live[seq][1].expires_at == at:
                return at
            heapq.heappop(self._expiries)
        return None

    def expired(self, now: float, limit: int) -> list[int]:
        """Waiting tasks whose time has passed, at most ``limit``; they stay in the index until they are discarded."""
        due: set[int] = set()
        while len(due) < limit and (at := self.next_expiry()) is not None and at <= now:
            due.add(heapq.heappop(self._expiries)[1])
        for seq in due:
            heapq.heappush(self._expiries, (self._live[seq][1].expires_at, seq))
        return sorted(due)
