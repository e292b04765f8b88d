"""``edge-llm report``: the CSV log and its older files, read row by row and summed up in tables.

Of a row only its figures are kept, 8 bytes each, so that a log of a million rows takes some tens of megabytes.
"""

import csv
import re
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from heapq import nlargest
from math import isfinite
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TypeVar

from edge_daemon.errors import EdgeError
from edge_daemon.logger import older_files, original
from edge_daemon.messages import Priority
from edge_daemon.systemd import printable

TOP = 15
"""Rows of a table at most: anybody can invent device names and task types."""
MAX_NAME = 60
_UNITS_S = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}
REFUSED = "Tasks that were refused are not in the log: the journal and /metrics tell of them."
_WITHDRAWN = ("cancelled", "expired")
"""States of tasks that have no answer because nobody wanted it any more; nothing has failed."""
_KINDS = ("task", "model", "telemetry", "event")


class Row(NamedTuple):
    """The cells of a row that count here, as they stand in the file; a column that the file lacks is empty."""

    timestamp: str
    record: str
    task_type: str
    model_name: str
    status: str
    model_load_state: str
    model_switching_time_ns: str
    task_latency_ns: str
    queue_wait_ns: str
    tokens_per_second: str
    eval_count: str
    memory_usage_percent: str
    memory_available_bytes: str
    temperature_c: str
    throttled: str
    evicted_models: str
    priority: str
    src: str
    error_code: str
    clock_synced: str


def figures() -> "array[float]":
    """A list of numbers that takes 8 bytes for each."""
    return array("d")


@dataclass(slots=True)
class Tally:
    """Tasks that have something in common, and how long they took."""

    tasks: int = 0
    succeeded: int = 0
    wait_s: "array[float]" = field(default_factory=figures)
    total_s: "array[float]" = field(default_factory=figures)


T = TypeVar("T", bound=Tally)


@dataclass(slots=True)
class ModelTally(Tally):
    """The tasks and the loads of one model."""

    tokens: float = 0.0
    tokens_per_s: "array[float]" = field(default_factory=figures)
    load_s: "array[float]" = field(default_factory=figures)
    failed_loads: int = 0
    swaps: int = 0
    """Loads that evicted another."""


@dataclass(slots=True)
class Course:
    """What happened when: columns of equal length, NaN where nothing was measured.

    ``at`` is in seconds since the epoch.
    """

    at: "array[float]" = field(default_factory=figures)
    values: dict[str, "array[float]"] = field(default_factory=lambda: defaultdict(figures))

    def add(self, at: float, **values: float) -> None:
        """A row; every one has the same names."""
        self.at.append(at)
        for name, value in values.items():
            self.values[name].append(value)


@dataclass(slots=True)
class Summary:
    """All that the report tells."""

    path: Path
    files: int = 0
    foreign_files: int = 0
    rows: int = 0
    skipped: int = 0
    """Rows that are torn or make no sense."""
    first_at: float = float("inf")
    last_at: float = float("-inf")
    states: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    priorities: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    types: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    devices: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    models: dict[str, ModelTally] = field(default_factory=lambda: defaultdict(ModelTally))
    throttled: Counter[str] = field(default_factory=Counter)
    tasks: Course = field(default_factory=Course)
    samples: Course = field(default_factory=Course)
    unsynced_tasks: Course = field(default_factory=Course)
    """Of times when the clock was not known to be right, as are such samples; in no plot, if there are others."""
    unsynced_samples: Course = field(default_factory=Course)
    never_synced: bool = False
    """None was of another time, so all are in the plots."""

    @property
    def unsynced(self) -> int:
        """Tasks and samples that are in no plot."""
        return len(self.unsynced_tasks.at) + len(self.unsynced_samples.at)

    @property
    def task_count(self) -> int:
        """All tasks that ended."""
        return self.states.total()


@dataclass(frozen=True, slots=True)
class Table:
    """A title, and rows of texts; the first column is a name, the others are figures."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


# -- reading ---------------------------------------------------------------------------------------------------------


def since(text: str) -> float:
    """Seconds since the epoch, of a time (``2026-01-31T12:00``, in UTC) or of so long ago (``7d``).

    Raises:
        ValueError: it is neither.
    """
    if ago := re.fullmatch(r"([0-9]{1,6})([mhdw])", text):
        return time.time() - int(ago[1]) * _UNITS_S[ago[2]]
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def read(path: Path, since_s: float | None = None) -> Summary:
    """Sum up the log at ``path`` and the files that were rotated away from it, from ``since_s`` on.

    Raises:
        EdgeError: there is no such file, or it may not be read.
    """
    summary = Summary(path)
    try:
        files = [*reversed(older_files(path).values()), path]
        for file in files:
            if file.exists():
                _read_file(file, summary, since_s)
    except PermissionError as error:
        raise EdgeError(f"{error.filename}: permission denied; try sudo, or: sudo adduser $USER edge-llm") from None
    except OSError as error:
        raise EdgeError(f"{error.filename}: {error.strerror}") from None
    if not summary.files and not summary.foreign_files:
        raise EdgeError(f"{path}: no such log; name another with --csv")
    if summary.unsynced and not summary.tasks.at and not summary.samples.at:
        summary.tasks, summary.unsynced_tasks = summary.unsynced_tasks, Course()
        summary.samples, summary.unsynced_samples = summary.unsynced_samples, Course()
        summary.never_synced = True
    return summary


def _read_file(path: Path, summary: Summary, since_s: float | None) -> None:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.reader(file)
        columns = next(_rows(reader, summary), [])
        if "record" not in columns or "timestamp" not in columns:
            summary.foreign_files += 1
            return
        summary.files += 1
        width = len(columns)
        pick = itemgetter(*(columns.index(name) if name in columns else width for name in Row._fields))
        for cells in _rows(reader, summary):
            if len(cells) != width:
                summary.skipped += 1
                continue
            cells.append("")  # for the columns that this file lacks
            _take(Row._make(pick(cells)), summary, since_s)


def _rows(reader: Iterator[list[str]], summary: Summary) -> Iterator[list[str]]:
    """What csv can read; what it cannot is skipped."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            summary.skipped += 1


def _take(row: Row, summary: Summary, since_s: float | None) -> None:
    at = _moment(row.timestamp)
    if at is None or row.record not in _KINDS:
        summary.skipped += 1
        return
    if since_s is not None and at < since_s:
        return
    summary.rows += 1
    summary.first_at, summary.last_at = min(summary.first_at, at), max(summary.last_at, at)
    if row.record == "task":
        _take_task(row, at, summary)
    elif row.record == "model":
        _take_load(row, summary)
    elif row.record == "telemetry":
        _take_sample(row, at, summary)


def _take_task(row: Row, at: float, summary: Summary) -> None:
    wait_s, total_s = _seconds(row.queue_wait_ns), _seconds(row.task_latency_ns)
    succeeded, withdrawn = row.status == "succeeded", row.status in _WITHDRAWN
    summary.states[_name(row.status)] += 1
    if not succeeded and not withdrawn:
        summary.errors[_name(row.error_code or row.status)] += 1
    model = summary.models[_name(row.model_name)]
    model.tokens += _number(row.eval_count) or 0
    if speed := _number(row.tokens_per_second):
        model.tokens_per_s.append(speed)
    kinds = (
        summary.priorities[_name(row.priority)],
        summary.types[_name(row.task_type)],
        summary.devices[_name(row.src)],
    )
    for tally in (model, *kinds):
        tally.tasks += 1
        tally.succeeded += succeeded
        tally.wait_s.append(wait_s)
        tally.total_s.append(total_s)
    course = summary.unsynced_tasks if row.clock_synced == "false" else summary.tasks
    course.add(at, wait_s=wait_s, succeeded=succeeded, withdrawn=withdrawn)


def _take_load(row: Row, summary: Summary) -> None:
    model = summary.models[_name(row.model_name)]
    if row.status == "loaded":
        model.load_s.append(_seconds(row.model_switching_time_ns))
        model.swaps += bool(row.evicted_models)
    elif row.status == "load_failed":
        model.failed_loads += 1


def _take_sample(row: Row, at: float, summary: Summary) -> None:
    summary.throttled.update(row.throttled.split())
    course = summary.unsynced_samples if row.clock_synced == "false" else summary.samples
    cells = {
        "temperature_c": row.temperature_c,
        "memory_percent": row.memory_usage_percent,
        "available_bytes": row.memory_available_bytes,
    }
    measured = {name: _number(cell) for name, cell in cells.items()}
    course.add(at, **{name: float("nan") if it is None else it for name, it in measured.items()})


def _moment(text: str) -> float | None:
    try:
        moment = datetime.fromisoformat(text)
        return moment.timestamp() if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if isfinite(number) else None


def _seconds(nanoseconds: str) -> float:
    return (_number(nanoseconds) or 0.0) / 1e9


@lru_cache(maxsize=4096)  # a log names the same few again and again
def _name(cell: str) -> str:
    """A name from outside, short enough for a table."""
    return shortened(printable(original(cell)), MAX_NAME)


def shortened(name: str, length: int) -> str:
    """A name in ``length`` characters at most, without its middle: long names differ at their ends."""
    if len(name) <= length:
        return name
    end = length * 2 // 3
    return f"{name[: length - end - 1]}…{name[-end:]}"


# -- telling ---------------------------------------------------------------------------------------------------------


def headline(summary: Summary) -> list[str]:
    """What was read, one sentence a line."""
    older = f" and {counted(summary.files - 1, 'older file')}" if summary.files > 1 else ""
    lines = [f"{summary.path}{older}: {counted(summary.rows, 'row')}"]
    if summary.rows:
        lines[0] += f", {_minute(summary.first_at)} to {_minute(summary.last_at)} UTC"
    if summary.skipped:
        lines.append(f"{counted(summary.skipped, 'row')} skipped: torn, or not of this log.")
    if summary.foreign_files:
        lines.append(f"{counted(summary.foreign_files, 'file')} skipped: not of this log.")
    if summary.unsynced:
        lines.append(f"In no plot: {counted(summary.unsynced, 'row')} from before the clock was set.")
    if summary.never_synced:
        lines.append("The clock was never known to be right: see what edge-llm doctor says of it.")
    lines.append(REFUSED)
    return lines


def counted(count: int, thing: str) -> str:
    """So many of them."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def tables(summary: Summary) -> list[Table]:
    """The figures; a table without rows is left out."""
    made = (
        _states(summary),
        _priorities(summary),
        _models(summary),
        _tallies("Task types", "type", summary.types),
        _counts("Failures", "code", summary.errors),
        _tallies("Devices", "device", summary.devices),
        _board(summary),
    )
    return [table for table in made if table.rows]


def _states(summary: Summary) -> Table:
    total = summary.task_count
    rows = [[state, f"{count:,}", f"{100 * count / total:.1f} %"] for state, count in summary.states.most_common(TOP)]
    return Table("Tasks", ("state", "tasks", "share"), rows)


def _priorities(summary: Summary) -> Table:
    known = [str(priority) for priority in Priority]
    names = [name for name in known if name in summary.priorities]
    names += [name for name in summary.priorities if name not in known][:TOP]
    rows = []
    for name in names:
        tally = summary.priorities[name]
        waits, totals = sorted(tally.wait_s), sorted(tally.total_s)
        quantiles = [
            quantile(waits, 0.5),
            quantile(waits, 0.95),
            waits[-1],
            quantile(totals, 0.5),
            quantile(totals, 0.95),
        ]
        rows.append([name, f"{tally.tasks:,}", *map(duration, quantiles)])
    headers = ("priority", "tasks", "wait median", "wait p95", "wait max", "total median", "total p95")
    return Table("Waiting", headers, rows)


def _models(summary: Summary) -> Table:
    rows = []
    for name, model in _largest(summary.models):
        speeds, loads = sorted(model.tokens_per_s), sorted(model.load_s)
        rows.append(
            [
                name,
                f"{model.tasks:,}",
                f"{model.succeeded:,}",
                f"{quantile(speeds, 0.5):.1f}" if speeds else "",
                f"{model.tokens:,.0f}",
                f"{len(loads):,}",
                f"{model.swaps:,}",
                f"{model.failed_loads:,}",
                duration(quantile(loads, 0.5)) if loads else "",
                duration(sum(loads)) if loads else "",
            ]
        )
    headers = ("model", "tasks", "succeeded", "tokens/s", "tokens", "loads", "swaps", "failed loads")
    return Table("Models", (*headers, "load median", "loading total"), _with_rest(rows, len(summary.models)))


def _tallies(title: str, kind: str, tallies: Mapping[str, Tally]) -> Table:
    rows = []
    for name, tally in _largest(tallies):
        totals = sorted(tally.total_s)
        quantiles = [quantile(sorted(tally.wait_s), 0.5), quantile(totals, 0.5), quantile(totals, 0.95)]
        rows.append([name or "(none)", f"{tally.tasks:,}", f"{tally.succeeded:,}", *map(duration, quantiles)])
    headers = (kind, "tasks", "succeeded", "wait median", "total median", "total p95")
    return Table(title, headers, _with_rest(rows, len(tallies)))


def _counts(title: str, kind: str, counts: Counter[str]) -> Table:
    rows = [[name, f"{count:,}"] for name, count in counts.most_common(TOP)]
    return Table(title, (kind, "tasks"), _with_rest(rows, len(counts)))


def _board(summary: Summary) -> Table:
    values, more = summary.samples.values, summary.unsynced_samples.values
    rows = [
        _spread("temperature, °C", values["temperature_c"] + more["temperature_c"], 1, ".1f"),
        _spread("memory in use, %", values["memory_percent"] + more["memory_percent"], 1, ".1f"),
        _spread("memory available, MB", values["available_bytes"] + more["available_bytes"], 1e6, ",.0f"),
        *([f"samples that were: {flag}", "", "", f"{count:,}"] for flag, count in summary.throttled.most_common(TOP)),
    ]
    return Table("Board", ("measured", "least", "median", "most"), [row for row in rows if row])


def _spread(name: str, column: Sequence[float], unit: float, form: str) -> list[str]:
    measured = sorted(value / unit for value in column if isfinite(value))
    if not measured:
        return []
    return [name, *(format(value, form) for value in (measured[0], quantile(measured, 0.5), measured[-1]))]


def _largest(tallies: Mapping[str, T]) -> list[tuple[str, T]]:
    return nlargest(TOP, tallies.items(), key=lambda item: item[1].tasks)


def _with_rest(rows: list[list[str]], count: int) -> list[list[str]]:
    return [*rows, [f"and {count - TOP:,} more"]] if count > TOP else rows


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the sorted values lie; there is at least one."""
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def duration(seconds: float) -> str:
    """Seconds in three digits and the unit that suits them."""
    for limit, size, unit in ((1, 1e-3, "ms"), (100, 1, "s"), (6000, 60, "min"), (360_000, 3600, "h")):
        if seconds < limit:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 100 and value % 1 and unit != "ms" else f"{value:.0f} {unit}"
    return f"{seconds / 86_400:,.0f} d"


def _minute(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")


def lines(table: Table) -> Iterator[str]:
    """The table for a terminal, columns aligned."""
    rows = [table.headers, *table.rows]
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(table.headers))]
    yield f"{table.title}:"
    for row in rows:
        cells = [
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        yield f"  {'  '.join(cells).rstrip()}"
