"""The keeping of the CSV log: what goes into a row, and which tasks are known to have theirs on the disk."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from heapq import nsmallest
from typing import Any

from edge_daemon.clock import Clock
from edge_daemon.logger import CsvLog, Row, Timings, event_row, model_row, task_key, task_row, telemetry_row
from edge_daemon.messages import Event
from edge_daemon.model_pool import Change
from edge_daemon.ollama import Answer
from edge_daemon.steps import reached
from edge_daemon.store import Store
from edge_daemon.telemetry import memory_available
from edge_daemon.worker import Finished

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
"""A log that cannot be written is tried again at least this often."""
LOOKED_FOR_AT_ONCE = 5_000
"""The rows that one pass over all files of the log looks for; to look takes seconds on a slow card."""
WRITTEN_AT_ONCE = 1_000
"""The lost rows that one ``sync`` writes: whoever calls it has other things to do."""


class Records:
    """Writes rows, and marks a task as logged once its row is durable. Nothing raises for a log that cannot be written.

    Any thread may bring rows; ``rebuild``, ``sync`` and ``close`` are for one.

    Args:
        csv: the log.
        store: knows which tasks lack a row.
        clock: for the pauses between attempts.
        resident: the models in memory now.
        on_row: told of every row once, when what it records has happened, whether or not the disk takes it now.
    """

    def __init__(
        self,
        csv: CsvLog,
        store: Store,
        *,
        clock: Clock,
        resident: Callable[[], tuple[str, ...]],
        on_row: Callable[[Row], None] = lambda _row: None,
    ) -> None:
        self._csv = csv
        self._store = store
        self._resident = resident
        self._on_row = on_row
        self._clock = clock
        self._doubtful: set[int] = set()  # tasks whose row may be in the log; of the thread that calls `sync`
        self._lock = threading.Lock()  # guards all below, and the order of rows in _unsynced
        self._unsynced: deque[tuple[int, int]] = deque()  # (row, task) written, not known to be on the disk
        self._lost: set[int] = set()  # tasks whose row is not in the log
        self._trouble: OSError | None = None  # why the log cannot be written
        self._proof: int | None = None  # the first row since; once it is on the disk, the trouble is over
        self._pause_s = 0.0
        self._retry_at = 0.0

    @property
    def unsynced(self) -> bool:
        """Whether ``sync`` has rows of tasks to make durable now."""
        return bool(self._unsynced or self._lost or self._doubtful) and not self._is_resting()

    @property
    def is_behind(self) -> bool:
        """Whether the log cannot be written."""
        return self._trouble is not None

    def task(self, finished: Finished) -> None:
        """The row of a task that has ended."""
        self._record(self._task_row(finished), task_seq=finished.stored.seq)

    def model(self, change: Change) -> None:
        """The row of a load or unload."""
        row = model_row(
            change.model,
            status=change.outcome,
            reason=change.reason,
            duration_ns=int(change.seconds * 1e9),
            evicted_models=change.evicted,
            predicted_load_ns=None if change.predicted_s is None else int(change.predicted_s * 1e9),
            runner_rss_bytes=change.size_bytes or None,
            memory_available_bytes=memory_available(),
            resident_models=self._resident(),
            queue_depth=sum(self._store.depth().values()),
            error_code=change.error_code,
        )
        self._record(row)

    def event(self, event: Event) -> None:
        """The row of an event."""
        self._record(event_row(event))

    def telemetry(self, sample: Mapping[str, Any]) -> None:
        """The row of a sample of the board."""
        self._record(telemetry_row(sample))

    def rebuild(self) -> None:
        """Write the rows that a crash kept from the log, as many as ``sync`` writes at once."""
        self._doubtful.update(self._store.unlogged())
        self._sync()

    def sync(self) -> None:
        """Make all rows so far durable, by one fsync; of those that were lost before, some are written again.

        A log that cannot be written is tried again after pauses that double up to ``LONGEST_PAUSE_S``.
        """
        if not self._is_resting():
            self._sync()

    def close(self) -> None:
        """Make the rows durable and let go of the file."""
        self._sync()
        with suppress(OSError):  # what is not on the disk is rebuilt from the store at the next start
            self._csv.close()

    # -- inside

    def _sync(self) -> None:
        try:
            self._write_lost()
            reached("rows_rebuilt")
            durable = self._csv.sync()
        except OSError as error:
            with self._lock:  # those rows are cut off again
                self._fail(error)
                self._doubtful.update(seq for _, seq in self._unsynced)
                self._unsynced.clear()
            return
        with self._lock:
            logged = []
            while self._unsynced and self._unsynced[0][0] <= durable:
                logged.append(self._unsynced.popleft()[1])
            if self._proof is not None and self._proof <= durable:
                self._trouble = self._proof = None
                self._pause_s = 0.0
                log.info("the CSV log can be written again")
        self._store.mark_logged(logged)
        reached("rows_marked_logged")

    def _write_lost(self) -> None:
        """Write again what the log lacks, with one task in memory at a time."""
        if not self._doubtful and not self._lost:
            return
        self._csv.open()  # before the store is read for nothing
        self._look_for_doubtful()
        with self._lock:
            lost = nsmallest(WRITTEN_AT_ONCE, self._lost)
        for seq in lost:
            row = self._rebuilt_row(seq)
            with self._lock:
                if row is not None:
                    self._append(row, seq)
                self._lost.discard(seq)

    def _rebuilt_row(self, seq: int) -> Row | None:
        """From what the store has; None when a damaged disk has made that unreadable."""
        stored = self._store.get(seq)
        if stored is None or stored.result is None:
            return None
        return self._task_row(Finished(stored=stored, result=stored.result))

    def _look_for_doubtful(self) -> None:
        """Those whose row is in the log are logged, the others are lost."""
        some = nsmallest(LOOKED_FOR_AT_ONCE, self._doubtful)
        ended = ((seq, stored.result) for seq in some if (stored := self._store.get(seq)))
        keys = {seq: task_key(result) for seq, result in ended if result is not None}
        present = self._csv.contains(set(keys.values())) if keys else set()
        self._doubtful.difference_update(some)
        with self._lock:
            self._lost.update(seq for seq, key in keys.items() if key not in present)
        self._store.mark_logged(seq for seq, key in keys.items() if key in present)

    def _record(self, row: Row, task_seq: int | None = None) -> None:
        """A row for the log; that of a task, if it cannot be written now, is rebuilt from the store later."""
        with self._lock:
            try:
                self._append(row, task_seq)
            except OSError as error:
                self._fail(error)
                if task_seq is not None:
                    self._lost.add(task_seq)
        self._on_row(row)

    def _append(self, row: Row, task_seq: int | None) -> None:
        """The caller holds the lock."""
        last = self._csv.append([row])
        if task_seq is not None:
            self._unsynced.append((last, task_seq))
        if self._trouble is not None and self._proof is None:
            self._proof = last

    def _fail(self, error: OSError) -> None:
        """The log cannot be written: told once, and tried again after a pause. The caller holds the lock."""
        if self._trouble is None:
            log.error("the CSV log (csv.path) cannot be written: %s; rows of tasks are written when it can", error)
        if not self._is_resting():
            self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
            self._retry_at = self._clock.monotonic() + self._pause_s
        self._trouble, self._proof = error, None

    def _is_resting(self) -> bool:
        return self._trouble is not None and self._clock.monotonic() < self._retry_at

    def _task_row(self, finished: Finished) -> Row:
        ensured, decision = finished.ensured, finished.decision
        loaded = ensured is not None and ensured.load_s > 0
        return task_row(
            finished.stored.task,
            finished.result,
            finished.usage,
            _timings(finished.answer) if finished.answer else None,
            evicted_models=ensured.evicted if ensured else (),
            swap_reason=decision.reason if decision and loaded else None,
            predicted_load_ns=int(ensured.predicted_s * 1e9) if ensured and loaded else None,
            queue_depth=sum(self._store.depth().values()),
            resident_models=self._resident(),
        )


def _timings(answer: Answer) -> Timings:
    return Timings(
        total_duration_ns=answer.total_ns,
        load_duration_ns=answer.load_ns,
        prompt_eval_count=answer.prompt_tokens,
        prompt_eval_duration_ns=answer.prompt_eval_ns,
        eval_count=answer.output_tokens,
        eval_duration_ns=answer.eval_ns,
    )
