"""The CSV log: rows that outlive crashes, full disks and other people's log rotation. docs/csv.md is its manual.

Lines end in LF: csv and pandas read LF and CRLF alike, but tail, grep and awk would see a CR in the last column.
"""

import csv
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import isfinite
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypedDict, Unpack

from edge_daemon.clock import Clock, iso
from edge_daemon.messages import Event, Record, Result, Task, compact
from edge_daemon.steps import reached

HEADER = (
    b"timestamp,task_type,model_name,prompt,task_latency_ns,model_switching_time_ns,result,status,model_load_state,"
    b"total_duration_ns,load_duration_ns,prompt_eval_count,prompt_eval_duration_ns,eval_count,eval_duration_ns,"
    b"tokens_per_second,cpu_usage_percent,memory_usage_percent,system_load_avg,"
    b"seq,record,task_id,src,priority,attempt,queue_wait_ns,evicted_models,swap_reason,predicted_load_ns,preemptions,"
    b"model_requested,runner_cpu_seconds,runner_rss_bytes,temperature_c,throttled,memory_available_bytes,queue_depth,"
    b"resident_models,error_code,boot_id,clock_synced\n"
)
COLUMNS = tuple(HEADER.decode("ascii").strip().split(","))
_KNOWN_COLUMNS = frozenset(COLUMNS)

MAX_CELL = 131_000
"""Characters. Python's csv module refuses to read a cell of more than 131,072."""

CUT_TEXT = 200
"""Characters that ``text: cut`` leaves of a prompt or a result."""

_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NEEDS_QUOTES = re.compile('[",\r\n]')
_BLOCK = 1 << 20  # bytes read at once: a file may be larger than what is left of the memory
_NOT_FOR_US = (FileNotFoundError, IsADirectoryError, PermissionError)
"""Reasons why a file cannot be opened that last; after any other, what is in it is not known yet."""
_FILE_MODE = 0o640  # prompts are nobody else's business

Row = dict[str, Any]
"""Column name -> None, bool, int, float, str or a sequence of str: plain data that ``json.dumps`` takes too."""

TaskKey = tuple[str, str, str]
"""``src``, ``task_id`` and ``timestamp`` of a ``task`` row: once a task was deleted, its id may be used for another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings(Record):
    """What Ollama says of one answer, of its last part if it was interrupted. The fields are columns of the log."""

    total_duration_ns: int = 0
    load_duration_ns: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration_ns: int = 0
    eval_count: int = 0
    eval_duration_ns: int = 0


@dataclass(slots=True, kw_only=True)
class _File:
    """The log as it is open now. ``size`` ends its last complete row, ``durable_size`` the last one that was synced."""

    fd: int
    size: int
    durable_size: int

    def is_at(self, path: Path) -> bool:
        """Whether ``path`` still names this file, as we left it: nobody moved it, cut it or added to it."""
        try:
            there, ours = path.stat(), os.fstat(self.fd)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino, there.st_size) == (ours.st_dev, ours.st_ino, self.size)


class CsvLog:
    """An append-only CSV file, which any thread may append to; the thread that needs rows to last calls ``sync``.

    The first call opens and heals the file, so a disk that is full at start is an error of that call alone.
    Every call may raise OSError and may be repeated: no failure leaves the file unreadable.
    """

    def __init__(
        self, path: Path, *, rotate_bytes: int, keep: int, text: Literal["full", "cut", "off"], clock: Clock
    ) -> None:
        self._path = path
        self._rotate_bytes = rotate_bytes
        self._keep = keep
        self._text = text
        self._clock = clock
        self._boot_id = clock.boot_id()
        # Guards all below. Not held over the fsync of `sync`, which may take seconds on an SD card;
        # held over that of a rotation, since no row may go to the next file before this one is safe.
        self._lock = threading.Lock()
        self._file: _File | None = None
        self._seq = 0
        self._durable_seq = 0
        self._lost: OSError | None = None

    @property
    def dirty(self) -> bool:
        """Whether ``sync`` has something to do."""
        return self._lost is not None or self._seq != self._durable_seq

    def append(self, rows: Iterable[Mapping[str, object]]) -> int:
        """Add rows in one write; they last from the next ``sync`` on.

        Returns:
            The ``seq`` of the last row, to be compared with what ``sync`` returns.

        Raises:
            OSError: none of these rows is in the log; append them again later.
            ValueError: a row has a column that the log does not have.
        """
        with self._lock:
            file = self._current()
            lines = self._lines(rows)
            data = "".join(lines).encode()
            if file.size > len(HEADER) and file.size + len(data) > self._rotate_bytes:
                file = self._rotate(file)
            self._write(file, data)
            reached("row_written")
            self._seq += len(lines)
            return self._seq

    def sync(self) -> int:
        """Make all rows last that are in the log now.

        Returns:
            The highest ``seq`` that is known to be on the disk.

        Raises:
            OSError: the rows since the last successful ``sync`` are cut off again; append them again.
        """
        with self._lock:
            self._tell_lost()
            if not self.dirty:
                return self._durable_seq
            file = self._current()
            size, seq = file.size, self._seq
            fd = os.dup(file.fd)  # a rotation may close the original meanwhile
        reached("rows_syncing")
        try:
            os.fdatasync(fd)
        except OSError:
            with self._lock:
                self._lose(file)
            raise
        finally:
            os.close(fd)
        reached("rows_synced")
        with self._lock:
            file.durable_size = size
            self._durable_seq = max(self._durable_seq, seq)
            return self._durable_seq

    def open(self) -> None:
        """Open and heal the file now, to see whether that can be done; else the first call that needs it does so."""
        with self._lock:
            self._current()

    def contains(self, keys: set[TaskKey]) -> set[TaskKey]:
        """Those of ``keys`` that have a complete and durable ``task`` row, in this or an older file.

        Reads the newest files first, and no more than needed.
        """
        with self._lock:
            self._current()
            files = [self._path, *older_files(self._path).values()]
        missing = {(_harmless(src), _harmless(task_id), ts): (src, task_id, ts) for src, task_id, ts in keys}
        for file in files:
            for key in _task_keys(file):
                missing.pop(key, None)
                if not missing:
                    return keys
        return keys - set(missing.values())

    def close(self) -> None:
        """Make the rows last and let go of the file. A later call would open it again."""
        with self._lock:
            if self._file is not None:
                self._retire(self._file)

    # -- below here the lock is held ----------------------------------------------------------------------------

    def _lines(self, rows: Iterable[Mapping[str, object]]) -> list[str]:
        stamp = {
            "timestamp": iso(self._clock.wall()),
            "boot_id": self._boot_id,
            "clock_synced": self._clock.synced(),
        }
        return [self._line({**stamp, **row, "seq": seq}) for seq, row in enumerate(rows, self._seq + 1)]

    def _line(self, row: Row) -> str:
        if unknown := row.keys() - _KNOWN_COLUMNS:
            raise ValueError(f"not a column of the log: {min(unknown)}")
        if row.get("record") == "task":
            row = {**row, "prompt": self._shown(row.get("prompt")), "result": self._shown(row.get("result"))}
        return ",".join(_quoted(_cell(row.get(column))) for column in COLUMNS) + "\n"

    def _shown(self, text: str | None) -> str | None:
        """What ``text: full | cut | off`` leaves of what people and models wrote."""
        if text is None or self._text == "off":
            return None
        return text if self._text == "full" else _shortened(text, CUT_TEXT)

    def _write(self, file: _File, data: bytes) -> None:
        try:
            _write_all(file.fd, data)
        except OSError:
            self._cut(file, file.size)
            raise
        file.size += len(data)

    def _cut(self, file: _File, size: int) -> None:
        """Go back to ``size``; when not even that works, the next call opens the file anew and heals it."""
        try:
            os.ftruncate(file.fd, size)
            file.size = size
        except OSError:
            self._drop(file)

    def _lose(self, file: _File) -> None:
        """After a failed fsync nobody knows which rows are on the disk, and a second one would lie: keep none."""
        if self._file is file:
            self._cut(file, file.durable_size)

    def _tell_lost(self) -> None:
        """Whoever met the failure was not the one who waits for his rows; keep the promise of ``sync`` to him."""
        if self._lost is not None:
            error, self._lost = self._lost, None
            if self._file is not None:
                self._lose(self._file)
            raise error

    def _drop(self, file: _File) -> None:
        if self._file is file:
            self._file = None
            os.close(file.fd)

    def _retire(self, file: _File) -> None:
        """Make its rows last and close it."""
        try:
            os.fsync(file.fd)
            self._durable_seq = self._seq
        except OSError as error:
            self._lost = error
            self._lose(file)
            raise
        finally:
            self._drop(file)

    def _current(self) -> _File:
        """The open file, opened anew when another one has its name now, or when someone else wrote into it."""
        if self._file is not None and not self._file.is_at(self._path):
            self._retire(self._file)
        if self._file is None:
            self._file = self._open()
        return self._file

    def _open(self) -> _File:
        head = _head(self._path)
        if _is_torn(head):
            self._path.replace(self._torn_path)
        elif not HEADER.startswith(head):  # half a header is ours, and healed
            self._set_aside()
        fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
        try:
            size = self._heal(fd)
            os.fsync(fd)  # what an earlier process left in the page cache counts as logged from here on
            _sync_directory(self._path.parent)
            if self._seq == 0:
                self._seq = next(filter(None, map(_last_seq, (self._path, *older_files(self._path).values()))), 0)
        except BaseException:
            os.close(fd)
            raise
        self._durable_seq = self._seq
        return _File(fd=fd, size=size, durable_size=size)

    def _heal(self, fd: int) -> int:
        """Move a torn end aside, write the header if there is none, and return the size."""
        with self._path.open("rb") as file:
            end = _sound_end(file)
        size = os.fstat(fd).st_size
        if 0 < end < size:
            with suppress(OSError):  # on a full disk it is better to go on without half a row
                _save(self._torn_path, os.pread(fd, size - end, end))
        reached("torn_row_saved")
        os.ftruncate(fd, end)
        reached("log_cut")
        if end == 0:
            _write_all(fd, HEADER)
            reached("header_written")
        return end or len(HEADER)

    @property
    def _torn_path(self) -> Path:
        """Where a torn end is put: the last one only, so that a board that loses power daily does not fill its card."""
        return self._path.with_name(self._path.name + ".torn")

    def _rotate(self, file: _File) -> _File:
        self._retire(file)
        reached("log_retired")
        self._set_aside()
        self._prune()
        self._file = self._open()
        reached("log_begun")
        return self._file

    def _set_aside(self) -> None:
        """Give the file the next number. Numbers, not times: a clock that is set back must not overwrite a file."""
        number = max(older_files(self._path), default=0) + 1
        self._path.rename(self._path.with_name(f"{self._path.stem}.{number}{self._path.suffix}"))
        reached("log_renamed")
        _sync_directory(self._path.parent)

    def _prune(self) -> None:
        """Delete the oldest beyond ``keep``; files that are not ours stay."""
        with suppress(OSError):  # it can wait for the next rotation; the rows cannot
            ours = [path for path in older_files(self._path).values() if "record" in _columns(path)]
            for path in ours[self._keep :]:
                path.unlink()
                reached("log_pruned")


def older_files(path: Path) -> dict[int, Path]:
    """The files that were rotated away from ``path``, by their number, newest first."""
    name = re.compile(rf"{re.escape(path.stem)}\.([0-9]+){re.escape(path.suffix)}")
    numbers = {int(m[1]): file for file in path.parent.iterdir() if (m := name.fullmatch(file.name))}
    return dict(sorted(numbers.items(), reverse=True))


class Around(TypedDict, total=False):
    """What went on around a task or a load, as far as it is known; the keys are columns."""

    evicted_models: Sequence[str]
    swap_reason: str | None
    predicted_load_ns: int | None
    queue_depth: int | None
    resident_models: Sequence[str]
    runner_rss_bytes: int | None
    memory_available_bytes: int | None
    error_code: str | None


# A notebook that does arithmetic on the prior system's columns must not meet an empty cell in a task row.
_NOTHING_MEASURED = {"cpu_usage_percent": 0, "memory_usage_percent": 0, "system_load_avg": 0}


def task_row(
    task: Task, result: Result, usage: Record | None = None, timings: Timings | None = None, **around: Unpack[Around]
) -> Row:
    """The row of a task that has ended. What a crash leaves, ``task`` and ``result``, is enough to rebuild it.

    Args:
        task: as it was accepted.
        result: its terminal record; ``load_s`` is 0 when the model was resident already, None when it never was.
        usage: a ``telemetry.TaskUsage``, whose fields are columns; None when nothing was measured.
        timings: Ollama's own figures of the last part; None when it gave none.
        around: of the moment when the task ended.
    """
    timings = _of_the_whole(timings or Timings(prompt_eval_count=result.prompt_tokens or 0), result)
    return {
        **_NOTHING_MEASURED,
        **(_known(usage.to_dict()) if usage else {}),
        **timings.to_dict(),
        "error_code": result.error.code if result.error else None,
        **around,
        "record": "task",
        "timestamp": result.ts,
        "task_type": task.task_type,
        "model_name": result.model or task.model,
        "prompt": task.prompt if task.prompt is not None else compact([turn.to_dict() for turn in task.messages]),
        "task_latency_ns": _ns(result.total_s),
        "model_switching_time_ns": _ns(result.load_s),
        "result": result.text,
        "status": result.state,
        "model_load_state": load_state(result),
        "tokens_per_second": _tokens_per_second(result, timings),
        "task_id": task.id,
        "src": task.src,
        "priority": task.priority,
        "attempt": result.attempt,
        "queue_wait_ns": _ns(result.queued_s),
        "preemptions": result.preempted,
        "model_requested": task.model_requested,
    }


def model_row(
    model: str,
    *,
    status: Literal["loaded", "unloaded", "load_failed", "unload_failed"],
    reason: str,
    duration_ns: int,
    **around: Unpack[Around],
) -> Row:
    """The row of a load or unload that has ended."""
    return {
        **around,
        "record": "model",
        "model_name": model,
        "model_switching_time_ns": duration_ns,
        "status": status,
        "swap_reason": reason,
    }


def telemetry_row(sample: Mapping[str, Any]) -> Row:
    """The row of one ``telemetry.Sampler.sample``; a sensor that failed leaves its cell empty."""
    memory, load, throttling = sample["memory"] or {}, sample["load"] or [None], sample["throttling"]
    return {
        "record": "telemetry",
        "timestamp": sample["ts"],
        "boot_id": sample["boot"],
        "clock_synced": sample["clock_synced"],
        "cpu_usage_percent": (sample["cpu"] or {}).get("percent"),
        "memory_usage_percent": memory.get("percent"),
        "memory_available_bytes": memory.get("available_bytes"),
        "system_load_avg": load[0],
        "temperature_c": sample["temperature_c"],
        "throttled": throttling and throttling["now"],
        "queue_depth": sample["daemon"]["queue_depth"],
        "resident_models": sample["ollama"]["resident_models"],
    }


def event_row(event: Event) -> Row:
    """The row of an event: its type as ``task_type``, its severity as ``status``, its data as JSON in ``result``."""
    return {
        "record": "event",
        "timestamp": event.ts,
        "task_type": event.type,
        "status": event.severity,
        "result": compact(event.data) if event.data else None,
    }


def task_key(result: Result) -> TaskKey:
    """By what its row is found again."""
    return result.src, result.id, result.ts


def load_state(result: Result) -> str:
    """How the task found its model: not_loaded, load_failed, already_loaded, loaded or swapped."""
    if result.load_s is None:
        return "load_failed" if result.error else "not_loaded"
    if result.swapped:
        return "swapped"
    return "loaded" if result.load_s else "already_loaded"


def _known(figures: Row) -> Row:
    return {name: value for name, value in figures.items() if value is not None}


def _ns(seconds: float | None) -> int:
    return round((seconds or 0) * 1e9)


def _of_the_whole(timings: Timings, result: Result) -> Timings:
    """With the tokens of all parts of an answer, where Ollama has told of its last part, or a crash has kept nothing.

    What was not timed is taken to have been written at the speed of the last part: tokens by time remain a true speed.
    """
    tokens, speed = result.output_tokens, result.tokens_per_s
    if tokens is None or tokens == timings.eval_count:
        return timings
    duration_ns = round(tokens / speed * 1e9) if speed else timings.eval_duration_ns
    return replace(timings, eval_count=tokens, eval_duration_ns=duration_ns)


def _tokens_per_second(result: Result, timings: Timings) -> float:
    if timings.eval_duration_ns and timings.eval_count > 1:
        return round(timings.eval_count / timings.eval_duration_ns * 1e9, 3)
    return result.tokens_per_s or 0


def _cell(value: Any) -> str:
    """A value as text. Only text from outside can be a formula: numbers are written by us."""
    if value is None or (isinstance(value, float) and not isfinite(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return _harmless(value if isinstance(value, str) else " ".join(value))


def _harmless(text: str) -> str:
    """Text that no spreadsheet runs and every reader reads: an apostrophe before what looks like a formula.

    Also before text that would look as if it had been given one, so that taking it away again is always right.
    """
    text = _shortened(text.replace("\0", "").encode("utf-8", "replace").decode(), MAX_CELL)
    return "'" + text if _FORMULA.match(text) else text


def original(cell: str) -> str:
    """The text of a cell without the apostrophe that it may have been given."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


def _quoted(cell: str) -> str:
    """By hand, since Python 3.11's csv.writer leaves a lone CR unquoted when lines end in LF."""
    return '"' + cell.replace('"', '""') + '"' if _NEEDS_QUOTES.search(cell) else cell


def _write_all(fd: int, data: bytes) -> None:
    """One write, unless the disk takes only a part: then the rest is tried, so that the reason is raised."""
    while data:
        data = data[os.write(fd, data) :]


def _save(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _FILE_MODE)
    try:
        _write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _head(path: Path) -> bytes:
    """As much of the beginning as the header takes."""
    try:
        with path.open("rb") as file:
            return file.read(len(HEADER))
    except FileNotFoundError:
        return b""


def _is_torn(head: bytes) -> bool:
    """Whether a file was begun by us and lost to a power cut: zeros where the header, or the rest of it, should be."""
    return head.endswith(b"\0") and HEADER.startswith(head.rstrip(b"\0"))


def _record_ends(file: BinaryIO) -> Iterator[int]:
    """Where the complete records of a file end, from the last one backwards, and at last its beginning.

    A line break ends a record only when the quotes before it are even in number: a quote inside a cell is doubled.
    """
    quotes = sum(block.count(b'"') for block in iter(partial(file.read, _BLOCK), b""))
    for start in range((file.tell() - 1) // _BLOCK * _BLOCK, -1, -_BLOCK):
        file.seek(start)
        block = file.read(_BLOCK)
        position = len(block)
        while (line_break := block.rfind(b"\n", 0, position)) >= 0:
            quotes -= block.count(b'"', line_break, position)
            if quotes % 2 == 0:
                yield start + line_break + 1
            position = line_break
        quotes -= block.count(b'"', 0, position)
    yield 0


def _sound_end(file: BinaryIO) -> int:
    """Where the last row ends that is whole; noise behind it may hold line breaks as well."""
    ends = _record_ends(file)
    end = next(ends)
    for begin in ends:
        file.seek(begin)
        if begin == 0 or _is_row(file.read(end - begin)):
            return end
        end = begin
    return end


def _is_row(record: bytes) -> bool:
    """Whether it is a row as we write them."""
    try:
        (cells,) = csv.reader([record.decode()], strict=True)
    except (csv.Error, ValueError):
        return False
    return len(cells) == len(COLUMNS) and b"\0" not in record


def _last_seq(path: Path) -> int:
    """The ``seq`` of the last row, 0 when there is none or it cannot be read."""
    columns = _columns(path)
    if "seq" not in columns:
        return 0
    with path.open("rb") as file:
        end, begin, *_ = *islice(_record_ends(file), 2), 0
        file.seek(begin)
        last = file.read(end - begin).decode("utf-8", "replace")
    seq = dict(zip(columns, _first_record([last]), strict=False)).get("seq", "")
    return int(seq) if seq.isdecimal() else 0


def _columns(path: Path) -> list[str]:
    try:
        file = path.open(newline="", encoding="utf-8", errors="replace")
    except _NOT_FOR_US:
        return []
    with file, suppress(OSError):
        return _first_record(file)
    return []


def _first_record(lines: Iterable[str]) -> list[str]:
    """Its cells; none when it is nothing that csv can read."""
    try:
        return next(csv.reader(lines), [])
    except csv.Error:
        return []


def _task_keys(path: Path) -> Iterator[TaskKey]:
    """The key of every complete ``task`` row, as its cells stand in the file. Foreign files have none."""
    try:
        file = path.open(newline="", encoding="utf-8", errors="replace")
    except _NOT_FOR_US:
        return
    with file, suppress(csv.Error, OSError):
        rows = csv.reader(file)
        columns = next(rows, [])
        wanted = ("record", "src", "task_id", "timestamp")
        if not set(wanted) <= set(columns):
            return
        pick = itemgetter(*map(columns.index, wanted))
        for row in rows:
            if len(row) == len(columns):
                record, src, task_id, timestamp = pick(row)
                if record == "task":
                    yield src, task_id, timestamp
