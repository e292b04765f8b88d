"""The CSV log on real files: what it writes, what it heals, and what a crash or a full disk leaves."""

import csv
import errno
import json
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_daemon import logger
from edge_daemon.clock import iso
from edge_daemon.logger import (
    COLUMNS,
    CUT_TEXT,
    HEADER,
    MAX_CELL,
    CsvLog,
    Row,
    TaskKey,
    Timings,
    event_row,
    load_state,
    model_row,
    task_row,
    telemetry_row,
)
from edge_daemon.messages import Event, Failure, Message, Result, Task, TaskState
from edge_daemon.telemetry import TaskUsage
from tests.fakes import FakeClock
from tests.needs import tool

PRIOR_COLUMNS = (
    "timestamp, task_type, model_name, prompt, task_latency_ns, model_switching_time_ns, result, status, "
    "model_load_state, total_duration_ns, load_duration_ns, prompt_eval_count, prompt_eval_duration_ns, eval_count, "
    "eval_duration_ns, tokens_per_second, cpu_usage_percent, memory_usage_percent, system_load_avg"
)
OUR_COLUMNS = (
    "seq, record, task_id, src, priority, attempt, queue_wait_ns, evicted_models, swap_reason, predicted_load_ns, "
    "preemptions, model_requested, runner_cpu_seconds, runner_rss_bytes, temperature_c, throttled, "
    "memory_available_bytes, queue_depth, resident_models, error_code, boot_id, clock_synced"
)
# Takes a directory and the options of `CsvLog`.
NewLog = Callable[..., CsvLog]

TS = iso(FakeClock().wall())
NASTY = 'said "hi",\nthen\r\nleft\rfor\t"good"'


def row(task_id: str, *, prompt: str = NASTY, src: str = "cam") -> Row:
    """A small `task` row."""
    return {"record": "task", "task_id": task_id, "src": src, "prompt": prompt}


def keys(*task_ids: str, src: str = "cam") -> set[TaskKey]:
    """By what such rows are looked for."""
    return {(src, task_id, TS) for task_id in task_ids}


def files(directory: Path) -> list[Path]:
    """All files of the log, oldest first."""
    rotated = sorted(directory.glob("llm_metrics.*.csv"), key=lambda path: int(path.name.split(".")[1]))
    return [*rotated, directory / "llm_metrics.csv"]


def read(path: Path) -> list[dict[str, str]]:
    """The rows of one file, by Python's own csv module without options; each row is complete."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(None not in row and None not in row.values() for row in rows)
    return rows


def read_all(directory: Path) -> list[dict[str, str]]:
    """The rows of all files; each file begins with the header."""
    assert all(path.read_bytes().startswith(HEADER) for path in files(directory))
    return [row for path in files(directory) for row in read(path)]


def bare(cell: str) -> str:
    """The text that was logged, without the apostrophe that keeps a spreadsheet from running it."""
    return re.sub("^'('*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20])", r"\1", cell)


@pytest.fixture
def new_log() -> Iterator[NewLog]:
    """Open the log of a directory, as a start of the daemon does. What is open at the end of the test is closed."""
    logs: list[CsvLog] = []

    def new(directory: Path, *, rotate_bytes: int = 1 << 20, keep: int = 3, text: Any = "full") -> CsvLog:
        path = directory / "llm_metrics.csv"
        logs.append(CsvLog(path, rotate_bytes=rotate_bytes, keep=keep, text=text, clock=FakeClock()))
        return logs[-1]

    yield new
    for log in logs:
        log.close()


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do without fsync, where a test opens thousands of files and is not about it."""
    monkeypatch.setattr(os, "fsync", lambda _fd: None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    mount = tool("mount", package="mount")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


# -- what is in the file


def test_columns_are_the_agreed_ones() -> None:
    """The header is the list of the design, in its order: notebooks depend on it."""
    assert ", ".join(COLUMNS) == f"{PRIOR_COLUMNS}, {OUR_COLUMNS}"
    assert len(PRIOR_COLUMNS.split()) == 19


def test_every_column_is_documented() -> None:
    """docs/csv.md has a table row for each column, in the order of the file, and for nothing else."""
    text = (Path(__file__).parent.parent / "docs/csv.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == COLUMNS


def test_rows_are_stamped(tmp_path: Path, new_log: NewLog) -> None:
    """What every row has: a number, the time in UTC, the boot, and whether the clock can be believed."""
    new_log(tmp_path).append([row("1"), {**row("2"), "timestamp": "2026-01-31T12:00:00.250Z", "boot_id": "earlier"}])
    first, second = read_all(tmp_path)
    assert (first["seq"], first["boot_id"], first["clock_synced"]) == ("1", "boot-1", "true")
    assert first["timestamp"] == "2023-11-14T22:13:20.000Z"
    assert (second["seq"], second["boot_id"], second["timestamp"]) == ("2", "earlier", "2026-01-31T12:00:00.250Z")


def test_values_become_cells(tmp_path: Path, new_log: NewLog) -> None:
    """Numbers are plain and never empty for being 0, lists are joined by spaces, what is not known is empty."""
    values = {
        "queue_depth": 0,
        "attempt": -1,
        "temperature_c": 51.5,
        "cpu_usage_percent": float("nan"),
        "clock_synced": False,
        "evicted_models": ("a:1b", "b"),
        "resident_models": [],
        "error_code": None,
    }
    new_log(tmp_path).append([{"record": "task", **values}])
    (found,) = read_all(tmp_path)
    assert [found[name] for name in values] == ["0", "-1", "51.5", "", "false", "a:1b b", "", ""]


def test_unknown_column_is_refused(tmp_path: Path, new_log: NewLog) -> None:
    """A slip in a column's name is an error, not a value that vanishes; the good rows beside it are not written."""
    log = new_log(tmp_path)
    with pytest.raises(ValueError, match="task_latency"):
        log.append([row("1"), {"record": "task", "task_latency": 5}])
    assert read_all(tmp_path) == []


@pytest.mark.parametrize(
    "formula", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1", "\uff0b1", "\uff0d1", "\uff20a"]
)
@pytest.mark.parametrize("column", ["prompt", "result", "task_id", "src", "error_code", "resident_models"])
def test_formulas_are_defused(tmp_path: Path, formula: str, column: str, new_log: NewLog) -> None:
    """No text cell begins with what makes a spreadsheet calculate."""
    new_log(tmp_path).append([{"record": "task", column: [formula] if column == "resident_models" else formula}])
    assert read_all(tmp_path)[0][column] == "'" + formula


def test_formula_behind_a_nul_is_defused(tmp_path: Path, new_log: NewLog) -> None:
    """The defence looks at what is left after cleaning."""
    new_log(tmp_path).append([row("1", prompt="\0=1+1")])
    assert read_all(tmp_path)[0]["prompt"] == "'=1+1"


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(text=st.text(alphabet=st.characters(exclude_categories=())), label=st.text(alphabet="'=+-@\t\r\n\",\0x"))
def test_any_text_comes_back(tmp_path: Path, fast_disk: None, text: str, label: str, new_log: NewLog) -> None:
    """Whatever a model writes is read back the same, but for NUL and halves of surrogate pairs."""
    path = tmp_path / "llm_metrics.csv"
    path.unlink(missing_ok=True)
    log = new_log(tmp_path)
    log.append([row("1", prompt=text, src=label)])
    log.close()
    (found,) = read_all(tmp_path)
    assert bare(found["prompt"]) == text.replace("\0", "").encode("utf-8", "replace").decode()
    assert bare(found["src"]) == label.replace("\0", "")


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path, new_log: NewLog) -> None:
    """Half a character, as a model may write it, does not stop the log."""
    new_log(tmp_path).append([row("1", prompt="a\ud83d")])
    assert read_all(tmp_path)[0]["prompt"] == "a?"


@pytest.mark.parametrize(
    ("option", "shown"), [("full", "x" * 300), ("cut", "x" * CUT_TEXT + "…"), ("off", "")], ids=["full", "cut", "off"]
)
def test_text_option(tmp_path: Path, option: Literal["full", "cut", "off"], shown: str, new_log: NewLog) -> None:
    """Prompts and results are written whole, in part or not at all; an event's data is no such text."""
    long = "x" * 300
    event = Event(type="e", ts="2026-01-31T12:00:00.000Z", data={"a": long})
    new_log(tmp_path, text=option).append([{**row("1", prompt=long), "result": long}, event_row(event)])
    task, told = read_all(tmp_path)
    assert (task["prompt"], task["result"]) == (shown, shown)
    assert json.loads(told["result"]) == {"a": long}


def test_long_cell_stays_readable(tmp_path: Path, new_log: NewLog) -> None:
    """A huge answer is cut to what Python's csv module agrees to read."""
    new_log(tmp_path).append([row("1", prompt="=" + "x" * 200_000)])
    assert len(read_all(tmp_path)[0]["prompt"]) == MAX_CELL + 2


def test_pandas_reads_it_without_options(tmp_path: Path, new_log: NewLog) -> None:
    """Pandas finds numbers, truth values, times and untouched texts by itself."""
    log = new_log(tmp_path)
    log.append([{**row(f"t{n}"), "task_latency_ns": 10**18 + n, "tokens_per_second": 1.5} for n in range(10)])
    table = pd.read_csv(tmp_path / "llm_metrics.csv")
    assert list(table.columns) == list(COLUMNS)
    assert table.task_latency_ns.tolist() == [10**18 + n for n in range(10)]
    assert table.tokens_per_second.sum() == 15.0
    assert table.clock_synced.all()
    assert set(table.prompt) == {NASTY}
    assert pd.to_datetime(table.timestamp)[0] == pd.Timestamp("2023-11-14T22:13:20Z")


# -- restart, rotation, other people's hands


def test_ten_tasks_a_restart_and_ten_more(tmp_path: Path, new_log: NewLog) -> None:
    """A restart goes on in the same file: one header, and the numbers rise."""
    for start in range(2):
        log = new_log(tmp_path)
        for n in range(10):
            log.append([row(f"{start}-{n}")])
        log.close()
    assert (tmp_path / "llm_metrics.csv").read_bytes().count(HEADER) == 1
    assert [found["seq"] for found in read_all(tmp_path)] == [str(n) for n in range(1, 21)]


def test_rotation(tmp_path: Path, new_log: NewLog) -> None:
    """Files stay below the limit, the newest `keep` old ones are kept, and no row between them is missing."""
    log = new_log(tmp_path, rotate_bytes=2000, keep=3)
    for n in range(100):
        log.append([row(str(n))])
    assert len(files(tmp_path)) == 4
    assert all(path.stat().st_size <= 2000 for path in files(tmp_path))
    seqs = [int(found["seq"]) for found in read_all(tmp_path)]
    assert seqs == list(range(seqs[0], 101))
    assert files(tmp_path)[0].name > "llm_metrics.3.csv"


@pytest.mark.parametrize("call", [lambda log: log.append([row("next")]), lambda log: log.contains(keys("1"))])
def test_a_file_that_cannot_be_opened_just_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[CsvLog], object], new_log: NewLog
) -> None:
    """While a process has too many files open, no number of a row is given twice, and no row is taken for missing."""
    log = new_log(tmp_path)
    log.append([row("1")])
    log.close()

    def no_file(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    again = new_log(tmp_path)
    with monkeypatch.context() as short:
        short.setattr(Path, "open", no_file)
        with pytest.raises(OSError, match="Too many open files"):
            call(again)
    assert again.contains(keys("1")) == keys("1")
    assert again.append([row("2")]) == 2


def test_numbers_rise_over_a_restart_after_rotation(tmp_path: Path, new_log: NewLog) -> None:
    """A file that has no row yet takes the last number from the one before it."""
    log = new_log(tmp_path)
    log.append([row("1"), row("2")])
    log.close()
    (tmp_path / "llm_metrics.csv").rename(tmp_path / "llm_metrics.7.csv")
    assert new_log(tmp_path, rotate_bytes=1500).append([row("3")]) == 3
    assert new_log(tmp_path, rotate_bytes=10).append([row("4")]) == 4
    assert [path.name for path in files(tmp_path)][:2] == ["llm_metrics.7.csv", "llm_metrics.8.csv"]


@pytest.mark.parametrize(
    "foreign", [b"timestamp,task_type,model_name\n1,2,3\n", b"\0hello" * 999, b"hello", b'"' * 999]
)
def test_foreign_file_is_put_aside_untouched(tmp_path: Path, foreign: bytes, new_log: NewLog) -> None:
    """A file with other columns, such as the prior system's, keeps its content and is never deleted."""
    (tmp_path / "llm_metrics.csv").write_bytes(foreign)
    log = new_log(tmp_path, rotate_bytes=10, keep=1)
    for n in range(5):
        log.append([row(str(n))])
    assert (tmp_path / "llm_metrics.1.csv").read_bytes() == foreign
    assert [path.name for path in files(tmp_path)[1:]] == ["llm_metrics.5.csv", "llm_metrics.csv"]
    assert log.contains(keys("4", "5")) == keys("4")


def test_rows_of_an_older_version_are_found(tmp_path: Path, new_log: NewLog) -> None:
    """After an upgrade that adds columns, the old file still says what is logged, and the numbers go on from it."""
    (tmp_path / "llm_metrics.csv").write_bytes(
        f"record,seq,task_id,src,timestamp\ntask,9\ntask,41,a,cam,{TS}\ntask,42,b,cam,{TS}\n".encode()
    )
    log = new_log(tmp_path)
    assert log.contains(keys("a", "c")) == keys("a")
    assert log.append([row("c")]) == 43


def test_directory_in_the_way(tmp_path: Path, new_log: NewLog) -> None:
    """What has the name of an old file but cannot be read, stops nothing and keeps its name."""
    (tmp_path / "llm_metrics.4.csv").mkdir()
    log = new_log(tmp_path, rotate_bytes=10, keep=1)
    for n in range(4):
        log.append([row(str(n))])
    assert log.contains(keys("2", "gone")) == keys("2")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "llm_metrics.4.csv",
        "llm_metrics.7.csv",
        "llm_metrics.csv",
    ]


def test_logrotate_moves_the_file(tmp_path: Path, new_log: NewLog) -> None:
    """A file that was moved away is noticed before the next row, and a new one with a header begun."""
    log = new_log(tmp_path)
    log.append([row("1")])
    (tmp_path / "llm_metrics.csv").rename(tmp_path / "moved")
    log.append([row("2")])
    assert [found["task_id"] for found in read(tmp_path / "moved")] == ["1"]
    assert [(found["task_id"], found["seq"]) for found in read_all(tmp_path)] == [("2", "2")]


@pytest.mark.parametrize("left", [b"", HEADER[:50], HEADER + b"half a row"])
def test_file_changed_under_us(tmp_path: Path, left: bytes, new_log: NewLog) -> None:
    """When someone empties or damages the open file (logrotate's copytruncate), the next row mends it first."""
    log = new_log(tmp_path)
    log.append([row("1")])
    (tmp_path / "llm_metrics.csv").write_bytes(left)
    log.append([row("2")])
    assert [found["task_id"] for found in read_all(tmp_path)] == ["2"]


# -- what is known to be on the disk


def test_sync_tells_what_is_safe(tmp_path: Path, new_log: NewLog) -> None:
    """A row counts only after a sync; a start counts what an earlier process has written."""
    log = new_log(tmp_path)
    assert not log.dirty
    assert log.append([row("1"), row("2")]) == 2
    assert log.dirty
    assert log.sync() == 2
    assert not log.dirty
    log.append([row("3")])
    log.close()
    assert not log.dirty
    again = new_log(tmp_path)
    assert again.contains(keys("3")) == keys("3")
    assert not again.dirty
    assert again.sync() == 3


def test_contains_looks_into_all_files(tmp_path: Path, new_log: NewLog) -> None:
    """Only complete `task` rows of that very sender and id count, in whichever file they are."""
    log = new_log(tmp_path, rotate_bytes=1500, keep=9)
    for n in range(20):
        log.append([row(f"-{n}", src="=cam")])
    log.append([{"record": "model", "task_id": "m", "src": "=cam"}])
    wanted = keys("-0", "-19", "m", "1", src="=cam") | keys("-1", src="other")
    assert new_log(tmp_path).contains(wanted) == keys("-0", "-19", src="=cam")
    assert new_log(tmp_path).contains(set()) == set()


def test_contains_stops_early(tmp_path: Path, new_log: NewLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old files are not read for rows that the newest one has."""
    log = new_log(tmp_path, rotate_bytes=1000)
    for n in range(20):
        log.append([row(str(n))])
    real = logger._task_keys
    newest_only = {tmp_path / "llm_metrics.csv": real(tmp_path / "llm_metrics.csv")}
    monkeypatch.setattr(logger, "_task_keys", newest_only.__getitem__)
    assert log.contains(keys("19")) == keys("19")


def test_failed_sync_cuts_what_may_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_log: NewLog) -> None:
    """After a failed fsync the rows in doubt are gone for certain, so that writing them again makes no duplicate."""
    log = new_log(tmp_path)
    log.append([row("1")])
    log.sync()
    log.append([row("2")])
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            log.sync()
    assert log.append([row("2"), row("3")]) > 2
    log.sync()
    assert [found["task_id"] for found in read_all(tmp_path)] == ["1", "2", "3"]


def test_failed_rotation_is_told_to_the_next_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_log: NewLog
) -> None:
    """The thread that syncs learns of a loss also when it was another thread's row that met it."""
    log = new_log(tmp_path, rotate_bytes=1000)
    log.append([row("1")])
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            log.append([row("big", prompt="x" * 1000)])
    log.append([row("2")])
    with pytest.raises(OSError, match="Input/output"):
        log.sync()
    last = log.append([row("1"), row("2")])
    assert log.sync() == last
    assert [found["task_id"] for found in read_all(tmp_path)] == ["1", "2"]


# -- crashes


def test_every_torn_end_is_healed(tmp_path: Path, fast_disk: None, new_log: NewLog) -> None:
    """Wherever within its last 4 kB a file is torn, all rows before stay and the rest is put into quarantine."""
    log, path = new_log(tmp_path), tmp_path / "llm_metrics.csv"
    ends = [len(HEADER)]
    while ends[-1] < 5000:
        log.append([row(str(len(ends)), prompt=NASTY * (len(ends) % 5))])
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in range(len(whole) - 4096, len(whole)):
        for old in tmp_path.iterdir():
            old.unlink()
        path.write_bytes(whole[:cut])
        kept = max((end for end in ends if end <= cut), default=len(HEADER))
        healed = new_log(tmp_path)
        assert healed.append([]) == max(0, sum(end <= cut for end in ends) - 1)
        healed.close()
        assert path.read_bytes() == whole[:kept]
        torn = tmp_path / "llm_metrics.csv.torn"
        assert (torn.read_bytes() if torn.exists() else b"") == whole[kept:cut]


@pytest.mark.parametrize("block", [1, 2, 7, 100])
def test_records_end_where_they_end_in_any_block(
    tmp_path: Path, new_log: NewLog, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file is read in blocks, and it does not matter where one ends."""
    log, path = new_log(tmp_path), tmp_path / "llm_metrics.csv"
    ends = [len(HEADER)]
    for n in range(20):
        log.append([row(str(n), prompt=NASTY * (n % 3))])
        ends.append(path.stat().st_size)
    monkeypatch.setattr(logger, "_BLOCK", block)
    for torn in (b"", b"half", b'"\n'):
        with path.open("ab") as file:
            file.write(torn)
        with path.open("rb") as file:
            assert [*logger._record_ends(file)] == [*reversed(ends), 0]
        os.truncate(path, ends[-1])


@pytest.mark.parametrize("cut", range(0, len(HEADER), 7))
def test_torn_header_is_healed(tmp_path: Path, cut: int, new_log: NewLog) -> None:
    """A file that was torn while it was begun, an empty one too, gets its header and nothing is put aside."""
    (tmp_path / "llm_metrics.csv").write_bytes(HEADER[:cut])
    new_log(tmp_path).append([row("1")])
    assert [found["task_id"] for found in read_all(tmp_path)] == ["1"]
    assert [path.name for path in tmp_path.iterdir()] == ["llm_metrics.csv"]


@pytest.mark.parametrize(
    "tail",
    [b"\0" * 100, b'"open quote\n\n', b"1,2,3", 'é"'.encode()[:1], b"\xb9\n", b"1,2,3\n\n", HEADER[:-1] + b"\0\n"],
)
def test_garbage_at_the_end_is_put_aside(tmp_path: Path, tail: bytes, new_log: NewLog) -> None:
    """What a power cut may leave behind the last row: zeros, an open quote, half a character, noisy lines."""
    new_log(tmp_path).append([row("1")])
    with (tmp_path / "llm_metrics.csv").open("ab") as file:
        file.write(tail)
    assert new_log(tmp_path).append([row("2")]) == 2
    assert [found["task_id"] for found in read_all(tmp_path)] == ["1", "2"]
    assert (tmp_path / "llm_metrics.csv.torn").read_bytes() == tail


class Crash(BaseException):
    """The end of the process, at a point of the test's choice."""


def crash_at(step: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the process end before the `step`-th call that touches the disk. Returns the calls, filled as they come."""
    calls: list[str] = []
    places: list[tuple[Any, str]] = [(os, name) for name in ("open", "write", "fsync", "ftruncate", "close")]
    for owner, name in [*places, (Path, "rename"), (Path, "unlink")]:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name), calls, step))
    return calls


def counted(real: Any, calls: list[str], step: int) -> Any:
    """The function `real`, noted in `calls`, until there are `step` of them."""

    def call(*args: Any) -> Any:
        if len(calls) >= step:
            raise Crash
        calls.append(real.__name__)
        return real(*args)

    return call


def failing(number: int) -> Any:
    """A function that fails as the kernel does with `number`."""

    def call(*args: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def test_crash_at_every_step_of_a_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_log: NewLog) -> None:
    """Whatever step a rotation ends at, the next start loses no row, doubles none and goes on counting."""
    for step in range(100):
        directory = tmp_path / str(step)
        directory.mkdir()
        log = new_log(directory, rotate_bytes=1000, keep=2)
        acknowledged = [str(n) for n in range(8)]
        for task_id in acknowledged:
            log.append([row(task_id)])
        expected = [found["task_id"] for found in read_all(directory)]
        finished = False
        with monkeypatch.context() as crashing:
            calls = crash_at(step, crashing)
            try:
                log.append([row("big", prompt="x" * 900)])
                finished = True
            except Crash:
                pass
        after_crash(directory, expected, new_log)
        if finished:
            assert {"fsync", "rename", "unlink", "write"} <= set(calls)
            return
    pytest.fail("the rotation never came to its end")


def after_crash(directory: Path, expected: list[str], new_log: NewLog) -> None:
    """Start again, write one row, and compare; only the file that was due may have been deleted."""
    log = new_log(directory, rotate_bytes=10_000, keep=2)
    log.append([row("next")])
    rows = read_all(directory)
    found = [row["task_id"] for row in rows if row["task_id"] not in ("big", "next")]
    assert found == expected[-len(found) :]
    assert found[-1] == expected[-1]
    assert len(found) >= len(expected) - 3
    assert rows[-1]["task_id"] == "next"
    seqs = [int(row["seq"]) for row in rows]
    assert seqs == sorted(set(seqs))
    assert log.contains(keys(*found)) == keys(*found)


# -- disks that refuse


def fill(log: CsvLog, text: str) -> list[str]:
    """Append rows until the disk is full. Returns the ids of those that were taken."""
    taken: list[str] = []
    while len(taken) < 1000:
        try:
            log.append([row(str(len(taken)), prompt=text)])
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EFBIG):
                return taken
            raise
        taken.append(str(len(taken)))
    pytest.fail("the disk never became full")


def test_full_disk(small_disk: Path, new_log: NewLog) -> None:
    """A row that does not fit leaves no trace, the file stays readable, and with room again writing goes on."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 30_000)
    log = new_log(small_disk, rotate_bytes=1 << 20)
    taken = fill(log, "x" * 1000)
    assert [found["task_id"] for found in read_all(small_disk)] == taken
    ballast.unlink()
    log.append([row("later")])
    assert [found["task_id"] for found in read_all(small_disk)] == [*taken, "later"]
    assert [found["seq"] for found in read_all(small_disk)] == [str(n + 1) for n in range(len(taken) + 1)]


def test_start_on_a_full_disk(small_disk: Path, new_log: NewLog) -> None:
    """A start without room for the header fails as a write does, and works once there is room."""
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(b"x" * 100_000)
    log = new_log(small_disk)
    with pytest.raises(OSError, match="No space"):
        log.append([row("1")])
    ballast.unlink()
    assert log.append([row("1")]) == 1
    assert len(read_all(small_disk)) == 1


def test_file_size_limit(tmp_path: Path, new_log: NewLog) -> None:
    """A write that is taken in part is cut off again."""
    log, before = new_log(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        taken = fill(log, "x" * 3000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(taken) > 3
    assert [found["task_id"] for found in read_all(tmp_path)] == taken


def test_partial_write_that_cannot_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_log: NewLog) -> None:
    """When not even the cut works, the file is healed before the next row."""
    log, real = new_log(tmp_path), os.write
    log.append([row("1")])
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", lambda fd, data: real(fd, data[:9]) if len(data) > 99 else failing(errno.EIO)())
        broken.setattr(os, "ftruncate", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            log.append([row("torn")])
    assert log.append([row("2")]) == 2
    assert [found["task_id"] for found in read_all(tmp_path)] == ["1", "2"]


# -- the rows


TASK = Task(
    id="t1",
    src="cam",
    prompt="What is 2+2?",
    task_type="arithmetic",
    model="qwen2.5:0.5b",
    model_requested="qwen2.5",
    ttl_s=60,
    received_at=1_700_000_000.0,
    max_tokens=512,
    prompt_tokens=3,
)
RESULT = Result(
    id="t1",
    src="cam",
    seq=4,
    state=TaskState.SUCCEEDED,
    model="qwen2.5:0.5b",
    text="4",
    attempt=1,
    queued_s=0.25,
    load_s=1.5,
    run_s=2.0,
    total_s=3.75,
    prompt_tokens=11,
    output_tokens=45,
    tokens_per_s=15.0,
    swapped=True,
    preempted=1,
    ts="2026-01-31T12:00:00.250Z",
)
# Of the part after the interruption.
TIMINGS = Timings(
    total_duration_ns=3_400_000_000,
    load_duration_ns=5,
    prompt_eval_count=12,
    prompt_eval_duration_ns=6,
    eval_count=30,
    eval_duration_ns=2_000_000_000,
)
USAGE = TaskUsage(
    cpu_usage_percent=97.5,
    memory_usage_percent=61.0,
    system_load_avg=3.9,
    runner_cpu_seconds=7.25,
    runner_rss_bytes=400,
    temperature_c=66.2,
    throttled=("under_voltage", "throttled"),
    memory_available_bytes=900,
)


def logged(new_log: NewLog, directory: Path, *rows: Row) -> list[dict[str, str]]:
    """What of `rows` stands in the file, empty cells left out."""
    new_log(directory).append(rows)
    return [{name: cell for name, cell in found.items() if cell != ""} for found in read_all(directory)]


def test_task_row(tmp_path: Path, new_log: NewLog) -> None:
    """Every column of a task that was measured in all respects: its value and its unit."""
    full = task_row(
        TASK,
        RESULT,
        USAGE,
        TIMINGS,
        evicted_models=("a", "b:1b"),
        swap_reason="overdue",
        predicted_load_ns=1_400_000_000,
        queue_depth=3,
        resident_models=["qwen2.5:0.5b"],
    )
    (found,) = logged(new_log, tmp_path, full)
    assert found == {
        "timestamp": "2026-01-31T12:00:00.250Z",
        "task_type": "arithmetic",
        "model_name": "qwen2.5:0.5b",
        "prompt": "What is 2+2?",
        "task_latency_ns": "3750000000",
        "model_switching_time_ns": "1500000000",
        "result": "4",
        "status": "succeeded",
        "model_load_state": "swapped",
        "total_duration_ns": "3400000000",
        "load_duration_ns": "5",
        "prompt_eval_count": "12",
        "prompt_eval_duration_ns": "6",
        "eval_count": "45",
        "eval_duration_ns": "3000000000",
        "tokens_per_second": "15.0",
        "cpu_usage_percent": "97.5",
        "memory_usage_percent": "61.0",
        "system_load_avg": "3.9",
        "seq": "1",
        "record": "task",
        "task_id": "t1",
        "src": "cam",
        "priority": "normal",
        "attempt": "1",
        "queue_wait_ns": "250000000",
        "evicted_models": "a b:1b",
        "swap_reason": "overdue",
        "predicted_load_ns": "1400000000",
        "preemptions": "1",
        "model_requested": "qwen2.5",
        "runner_cpu_seconds": "7.25",
        "runner_rss_bytes": "400",
        "temperature_c": "66.2",
        "throttled": "under_voltage throttled",
        "memory_available_bytes": "900",
        "queue_depth": "3",
        "resident_models": "qwen2.5:0.5b",
        "boot_id": "boot-1",
        "clock_synced": "true",
    }


NUMBERS = [name for name in PRIOR_COLUMNS.split(", ") if re.search("_ns|_count|_per|_avg", name)]


def test_task_that_never_ran_has_numbers(tmp_path: Path, new_log: NewLog) -> None:
    """An expired task, and one rebuilt after a crash, has a number wherever the prior system had one."""
    expired = Result(id="t1", src="cam", seq=2, state=TaskState.EXPIRED, queued_s=60.0, total_s=60.0, ts="now")
    broken = TaskUsage(cpu_usage_percent=None, memory_usage_percent=None, system_load_avg=None)
    for found in logged(
        new_log, tmp_path, task_row(TASK, expired), task_row(TASK, RESULT), task_row(TASK, RESULT, broken)
    ):
        assert [name for name in NUMBERS if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", found.get(name, ""))] == []
    assert len(NUMBERS) == 12
    assert task_row(TASK, expired)["task_latency_ns"] == 60_000_000_000


def test_the_tokens_of_a_whole_answer() -> None:
    """Measured, preempted or rebuilt: the tokens are those of the result, and by their time they give its speed."""
    columns = ("eval_count", "eval_duration_ns", "tokens_per_second")
    whole = replace(TIMINGS, eval_count=45, eval_duration_ns=3_000_000_001)
    rows = [task_row(TASK, RESULT, None, timings) for timings in (whole, TIMINGS, None)]
    assert [tuple(row[name] for name in columns) for row in rows] == [
        (45, 3_000_000_001, 15.0),
        (45, 3_000_000_000, 15.0),
        (45, 3_000_000_000, 15.0),
    ]
    unmeasured = replace(RESULT, tokens_per_s=None)
    assert [task_row(TASK, unmeasured)[name] for name in columns] == [45, 0, 0]
    one = task_row(
        TASK, replace(unmeasured, output_tokens=1), None, replace(TIMINGS, eval_count=1, eval_duration_ns=1000)
    )
    assert [one[name] for name in columns] == [1, 1000, 0]


def test_rows_survive_json() -> None:
    """A row is plain data: it can be kept in the store until it is logged."""
    whole = task_row(TASK, RESULT, USAGE, TIMINGS, evicted_models=("a",))
    assert json.loads(json.dumps(whole)) == {**whole, "evicted_models": ["a"]}


def test_conversation_is_logged_as_json(tmp_path: Path, new_log: NewLog) -> None:
    """A task of several turns has them all in `prompt`."""
    turns = (Message(role="user", content="hi"), Message(role="assistant", content="yes?"))
    chat = Task(id="c", messages=turns, model="m", ttl_s=1, received_at=0, max_tokens=1, prompt_tokens=1)
    (found,) = logged(new_log, tmp_path, task_row(chat, RESULT))
    assert json.loads(found["prompt"]) == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({}, "not_loaded"),
        ({"error": Failure(code="no_memory", message="")}, "load_failed"),
        ({"load_s": 0.0}, "already_loaded"),
        ({"load_s": 2.0}, "loaded"),
        ({"load_s": 2.0, "swapped": True}, "swapped"),
        ({"load_s": 2.0, "error": Failure(code="runner_died", message="")}, "loaded"),
    ],
)
def test_load_state(fields: dict[str, Any], state: str) -> None:
    """How a task found its model can be told from its result alone."""
    assert load_state(Result(id="i", src="s", seq=1, state=TaskState.FAILED, ts="now", **fields)) == state


def test_model_row(tmp_path: Path, new_log: NewLog) -> None:
    """A load and an unload say what, why and how long."""
    load = model_row("m", status="loaded", reason="oldest", duration_ns=7, evicted_models=("a",))
    unload = model_row("m", status="unloaded", reason="idle", duration_ns=3, error_code=None)
    first, second = logged(new_log, tmp_path, load, unload)
    assert (first["record"], first["model_name"], first["model_switching_time_ns"]) == ("model", "m", "7")
    assert (first["swap_reason"], first["evicted_models"]) == ("oldest", "a")
    assert (second["status"], second["swap_reason"], second["model_switching_time_ns"]) == ("unloaded", "idle", "3")
    assert "task_latency_ns" not in first


def sample(**changes: Any) -> dict[str, Any]:
    """A telemetry sample, with some sections changed."""
    whole = {
        "seq": 9,
        "ts": "2026-01-31T12:00:00.000Z",
        "boot": "boot-1",
        "clock_synced": False,
        "cpu": {"percent": 12.5, "per_core": [10.0, 15.0]},
        "memory": {"percent": 40.0, "available_bytes": 800},
        "load": [0.5, 0.4, 0.3],
        "temperature_c": 48.3,
        "throttling": {"now": ["throttled"], "since_boot": []},
        "ollama": {"resident_models": ["m"]},
        "daemon": {"queue_depth": 2},
    }
    return {**whole, **changes}


def test_telemetry_row(tmp_path: Path, new_log: NewLog) -> None:
    """A sample fills the columns that it has a value for; its own `seq` is not the log's."""
    (found,) = logged(new_log, tmp_path, telemetry_row(sample()))
    assert found == {
        "timestamp": "2026-01-31T12:00:00.000Z",
        "seq": "1",
        "record": "telemetry",
        "cpu_usage_percent": "12.5",
        "memory_usage_percent": "40.0",
        "system_load_avg": "0.5",
        "temperature_c": "48.3",
        "throttled": "throttled",
        "memory_available_bytes": "800",
        "queue_depth": "2",
        "resident_models": "m",
        "boot_id": "boot-1",
        "clock_synced": "false",
    }


def test_telemetry_row_without_sensors(tmp_path: Path, new_log: NewLog) -> None:
    """Sensors that failed leave empty cells."""
    (found,) = logged(
        new_log, tmp_path, telemetry_row(sample(cpu=None, memory=None, load=None, temperature_c=None, throttling=None))
    )
    assert not {"cpu_usage_percent", "memory_usage_percent", "system_load_avg", "throttled"} & set(found)


def test_event_row(tmp_path: Path, new_log: NewLog) -> None:
    """An event says what, how bad, and the rest as JSON."""
    event = Event(type="broker_lost", ts="2026-01-31T12:00:00.000Z", severity="warning", data={"why": "gone"})
    (found,) = logged(new_log, tmp_path, event_row(event))
    assert (found["task_type"], found["status"], found["result"]) == ("broker_lost", "warning", '{"why":"gone"}')
