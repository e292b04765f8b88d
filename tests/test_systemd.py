"""Talking to systemd, over the real kind of socket: what arrives, and that nothing ever raises."""

import logging
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_daemon import systemd

LOG_SOMETHING = """
import logging, sys
from edge_daemon import systemd
systemd.JOURNAL_SOCKET = sys.argv[1]
systemd.setup_logging("info")
log = logging.getLogger("edge_daemon.worker")
log.debug("too fine")
log.warning("two\\n<0>lines \\x1b[31m", extra={"fields": {"TASK_ID": "evt-42"}})
"""
ESCAPED = r"two\n<0>lines \x1b[31m"


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """A datagram socket with a path, as systemd and the journal have one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "socket"))
        receiver.settimeout(5)
        yield receiver


@pytest.fixture
def notified(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """The next thing that systemd is told."""
    monkeypatch.setenv("NOTIFY_SOCKET", listener.getsockname())
    return lambda: listener.recv(65536).decode()


def journal_fields(datagram: bytes) -> dict[str, str]:
    """Read the journal's wire form, as the journal does."""
    fields = {}
    while datagram:
        line, _, rest = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", rest[:8])
            value, end, rest = rest[8 : 8 + size], rest[8 + size : 9 + size], rest[9 + size :]
            assert end == b"\n"
        fields[name.decode()] = value.decode()
        datagram = rest
    return fields


@pytest.mark.parametrize(
    ("tell", "told"),
    [
        (systemd.ready, "READY=1"),
        (lambda: systemd.ready("up"), "READY=1\nSTATUS=up"),
        (lambda: systemd.status("3 queued"), "STATUS=3 queued"),
        (lambda: systemd.status("a\nREADY=1"), "STATUS=a\\nREADY=1"),
        (systemd.watchdog, "WATCHDOG=1"),
        (lambda: systemd.stopping("bye"), "STOPPING=1\nSTATUS=bye"),
        (lambda: systemd.extend_timeout(1.5), "EXTEND_TIMEOUT_USEC=1500000"),
    ],
)
def test_notifications(notified: Callable[[], str], tell: Callable[[], None], told: str) -> None:
    """Each call is one datagram in systemd's words, and a status cannot smuggle in another."""
    tell()
    assert notified() == told


def test_reloading_is_one_datagram(notified: Callable[[], str]) -> None:
    """The start of a reload and its moment, in systemd's own clock, come together."""
    before_us = time.monotonic_ns() // 1000
    systemd.reloading()
    match = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", notified())
    assert match is not None
    assert before_us <= int(match[1]) <= time.monotonic_ns() // 1000


def test_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that begins with @ is in the abstract namespace."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("")  # the kernel picks an abstract name
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + receiver.getsockname()[1:].decode())
        systemd.ready()
        assert receiver.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", [None, "", "/nowhere/socket", "@nobody", "/" + "x" * 200])
def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    """Outside systemd, or with an address that leads nowhere, every call does nothing."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.ready("text")
    systemd.status("lone \udcff surrogate")
    systemd.watchdog()
    systemd.reloading()
    systemd.extend_timeout(1)
    systemd.stopping()


@pytest.mark.parametrize(
    ("limit_us", "pid", "interval_s"),
    [
        ("60000000", None, 30.0),
        pytest.param("60000000", str(os.getpid()), 30.0, id="own process"),
        ("60000000", "1", None),
        ("0", None, None),
        ("soon", None, None),
        (None, None, None),
    ],
)
def test_watchdog_interval(
    monkeypatch: pytest.MonkeyPatch, limit_us: str | None, pid: str | None, interval_s: float | None
) -> None:
    """The interval is half of what systemd allows, and None when it does not watch this process."""
    for name, value in [("WATCHDOG_USEC", limit_us), ("WATCHDOG_PID", pid)]:
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert systemd.watchdog_interval_s() == interval_s


class Captured(logging.Handler):
    """Keeps what it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.records.append(record.getMessage())


class Journal:
    """A logger of one's own whose records go to the journal's socket, or to `lost` when it fails."""

    def __init__(self, listener: socket.socket) -> None:
        self.lost = Captured()
        self.handler = systemd.JournalHandler(fallback=self.lost)
        self.log = logging.Logger("edge_daemon.test", logging.DEBUG)  # noqa: LOG001  # not in the tree
        self.log.addHandler(self.handler)
        self._listener = listener

    def read(self) -> dict[str, str]:
        """The fields of the next record."""
        return journal_fields(self._listener.recv(1 << 20))


@pytest.fixture
def journal(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    """A journal that the test reads."""
    monkeypatch.setattr(systemd, "JOURNAL_SOCKET", listener.getsockname())
    made = Journal(listener)
    yield made
    made.handler.close()


def test_record_with_fields(journal: Journal) -> None:
    """A record reaches the journal with its priority, its logger and the fields given with it."""
    fields = {"TASK_ID": "evt-42", "SRC": "door7", "MODEL": None, "MESSAGE_ID": "8d45"}
    journal.log.info("task %s done", "ä", extra={"fields": fields})
    assert journal.read() == {
        "TASK_ID": "evt-42",
        "SRC": "door7",
        "MESSAGE_ID": "8d45",
        "MESSAGE": "task ä done",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "edge-llm",
        "LOGGER": "edge_daemon.test",
    }


def test_fields_cannot_forge(journal: Journal) -> None:
    """Values of several lines stay values; bad names are dropped and the record's own fields stand."""
    fields = {"SRC": "a\nPRIORITY=0\n", "bad": 1, "_PID": 1, "A=B": 1, "É": 1, "PRIORITY": 0, "X" * 65: 1}
    journal.log.error("text", extra={"fields": fields})
    read = journal.read()
    assert read.pop("SRC") == "a\nPRIORITY=0\n"
    assert read == {
        "MESSAGE": "text",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "edge-llm",
        "LOGGER": "edge_daemon.test",
    }


@pytest.mark.parametrize(
    ("level", "priority"),
    [("debug", "7"), ("info", "6"), ("warning", "4"), ("error", "3"), ("critical", "2")],
)
def test_priorities(journal: Journal, level: str, priority: str) -> None:
    """Each level has the number that syslog knows it by."""
    getattr(journal.log, level)("text")
    assert journal.read()["PRIORITY"] == priority


def test_traceback_is_marked(journal: Journal) -> None:
    """A traceback follows the message, every line marked, so that an exception's text cannot pose as a record."""
    try:
        raise ValueError("bad\n<0>forged\x07")
    except ValueError:
        journal.log.exception("failed")
    first, *others = journal.read()["MESSAGE"].split("\n")
    assert first == "failed"
    assert others[0] == "  | Traceback (most recent call last):"
    assert others[-1] == r"  | <0>forged\x07"
    assert all(line.startswith("  | ") for line in others)


def test_too_large_falls_back(journal: Journal) -> None:
    """A record that no datagram can hold goes to the fallback whole, and the next one to the journal."""
    journal.log.info("x" * 10_000_000)
    journal.log.info("small")
    assert [len(message) for message in journal.lost.records] == [10_000_000]
    assert journal.read()["MESSAGE"] == "small"


def test_no_journal_falls_back(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a journal at its socket, records go to the fallback."""
    monkeypatch.setattr(systemd, "JOURNAL_SOCKET", "/nowhere/socket")
    journal.log.info("kept")
    assert journal.lost.records == ["kept"]


def test_bad_arguments_do_not_raise(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    """A log call whose arguments do not fit is reported, and the caller goes on."""
    journal.log.info("%d tasks", "many")
    journal.log.info("next")
    assert "Logging error" in capsys.readouterr().err
    assert journal.read()["MESSAGE"] == "next"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ä 漢 🙂", "plain ä 漢 🙂"),
        ("a\r\nb\tc\0", r"a\r\nb\tc\x00"),
        ("\x1b[2J\x9b", r"\x1b[2J\x9b"),
        ("\u2028\u202e\udcff", r"\u2028\u202e\udcff"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    """Everything that could break a line, drive a terminal or turn the writing round is spelled out."""
    assert systemd.printable(text) == shown


def log_something(journal_socket: str, *, stream: Callable[[os.stat_result, os.stat_result], str], to: Path) -> str:
    """Run a process that logs, with JOURNAL_STREAM made by `stream(stdout, stderr)`; return its stderr."""
    with (to / "out").open("wb") as out, (to / "err").open("wb") as err:
        journal_stream = stream(os.fstat(out.fileno()), os.fstat(err.fileno()))
        subprocess.run(
            [sys.executable, "-c", LOG_SOMETHING, journal_socket],
            stdout=out,
            stderr=err,
            env=os.environ | {"JOURNAL_STREAM": journal_stream},
            check=True,
            timeout=30,
        )
    return (to / "err").read_text()


def test_journal_is_used_when_stderr_is_its(listener: socket.socket, tmp_path: Path) -> None:
    """Under systemd, records go to the journal with their fields, once, and not to standard error too."""
    err = log_something(listener.getsockname(), stream=lambda _, err: f"{err.st_dev}:{err.st_ino}", to=tmp_path)
    fields = journal_fields(listener.recv(65536))
    assert err == ""
    assert fields["MESSAGE"] == ESCAPED
    assert (fields["PRIORITY"], fields["TASK_ID"]) == ("4", "evt-42")


def test_stderr_takes_over_from_a_dead_journal(tmp_path: Path) -> None:
    """Under systemd, what the journal does not take is on standard error, with the priority in front."""
    err = log_something("/nowhere/socket", stream=lambda _, err: f"{err.st_dev}:{err.st_ino}", to=tmp_path)
    assert err == f"<4>{ESCAPED}\n"


def test_priority_prefix_when_only_stdout_is_the_journal(tmp_path: Path) -> None:
    """With only standard output in the journal, standard error carries the priority in front."""
    err = log_something("/nowhere/socket", stream=lambda out, _: f"{out.st_dev}:{out.st_ino}", to=tmp_path)
    assert err == f"<4>{ESCAPED}\n"


@pytest.mark.parametrize("stream", ["0:0", "", "garbage"])
def test_lines_for_people_elsewhere(tmp_path: Path, stream: str) -> None:
    """Outside systemd a record is one line with time, level and logger, and the level limit holds."""
    err = log_something("/nowhere/socket", stream=lambda *_: stream, to=tmp_path)
    time_and_level = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} warning  edge_daemon\.worker: "
    assert re.fullmatch(time_and_level + re.escape(ESCAPED) + "\n", err)
