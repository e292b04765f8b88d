"""What systemd gives a service: a word about its state, a watchdog, and a journal with fields.

All of it is plain datagrams, so no library. Outside systemd every function here does nothing, or the
next best thing, and none ever raises: a daemon must not fail over telling how it is.

Log with fields, and `journalctl TASK_ID=evt-42` shows the life of one task:

    log.info("task finished", extra={"fields": {"TASK_ID": task.id, "SRC": task.src}})
"""

import contextlib
import logging
import os
import re
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping

IDENTIFIER = "edge-llm"
JOURNAL_SOCKET = "/run/systemd/journal/socket"

# A manager or journal that hangs must not hang us.
_SEND_TIMEOUT_S = 2.0
_FIELD_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_STDOUT, _STDERR = 1, 2
BURST = 20
"""So many lines of one kind are written within ``PERIOD_S``."""
PERIOD_S = 300.0
KINDS = 1000
"""So many kinds are told apart at most."""
# The priorities of syslog, for levels from this one up.
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG_PRIORITY = 7


def ready(text: str = "") -> None:
    """Say that the daemon serves, after a start or a reload, with a status line if given."""
    _notify("READY=1", *_status(text))


def status(text: str) -> None:
    """Set the line that `systemctl status` shows."""
    _notify(*_status(text))


def watchdog() -> None:
    """Say that everything is alive; call it every `watchdog_interval_s()`."""
    _notify("WATCHDOG=1")


def stopping(text: str = "") -> None:
    """Say that the daemon is on its way out."""
    _notify("STOPPING=1", *_status(text))


def reloading() -> None:
    """Say that a reload begins; `ready()` ends it."""
    # Both in one datagram: systemd ignores the first without the second.
    now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    _notify("RELOADING=1", f"MONOTONIC_USEC={now_us}")


def extend_timeout(seconds: float) -> None:
    """Ask for this much more time, from now, to start or stop."""
    _notify(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")


def watchdog_interval_s() -> float | None:
    """How often to call `watchdog()`: half the time systemd allows. None when nobody watches us."""
    limit_us = os.environ.get("WATCHDOG_USEC", "")
    watched_pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not limit_us.isdecimal() or int(limit_us) == 0 or watched_pid != str(os.getpid()):
        return None
    return int(limit_us) / 1_000_000 / 2


def setup_logging(level: str) -> None:
    """Send all log records from `level` (debug, info, warning, error) up to one place.

    That is the journal, with fields, when standard error is connected to it; else standard error, for
    syslog-like readers when the journal has only standard output, and for people otherwise.

    Raises:
        ValueError: there is no such level.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    journal_stream = os.environ.get("JOURNAL_STREAM")
    if journal_stream is not None and journal_stream == _stream_id(_STDERR):
        handler.setFormatter(PriorityFormatter())
        handler = JournalHandler(fallback=handler)
    elif journal_stream is not None and journal_stream == _stream_id(_STDOUT):
        handler.setFormatter(PriorityFormatter())
    else:
        handler.setFormatter(HumanFormatter())
    handler.addFilter(Flood())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)


class JournalHandler(logging.Handler):
    """Writes records with their fields to the journal; what it does not take goes to `fallback`."""

    def __init__(self, *, fallback: logging.Handler) -> None:
        super().__init__()
        self._fallback = fallback
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(_SEND_TIMEOUT_S)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one datagram."""
        try:
            datagram = encoded(fields_of(record))
        except Exception:  # arguments that do not fit the text: logging's own way is to say so and go on
            self.handleError(record)
            return
        try:
            self._socket.sendto(datagram, JOURNAL_SOCKET)
        except OSError:  # no journal, or too large for a datagram
            self._fallback.handle(record)

    def close(self) -> None:
        """Release the socket."""
        self._socket.close()
        super().close()


class Flood(logging.Filter):
    """Of records that differ in their values alone, lets pass ``BURST`` within ``PERIOD_S``.

    The first one after that says how many were left out. Records of level debug were asked for, and those with a true
    ``record.each`` have each something to say: all of these pass.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._since: dict[tuple[str, str], float] = {}
        self._seen: Counter[tuple[str, str]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it passes."""
        if record.levelno < logging.INFO or getattr(record, "each", False):
            return True
        kind, now = (record.name, str(record.msg)), self._clock()
        if now - self._since.get(kind, -PERIOD_S) >= PERIOD_S:
            if len(self._since) >= KINDS:  # a library that puts values into its texts makes a kind of each
                self._since.clear()
                self._seen.clear()
            left_out = self._seen.pop(kind, 0) - BURST
            self._since[kind] = now
            if left_out > 0:
                record.msg = f"{record.getMessage()} (and {left_out} more such lines before)"
                record.args = ()
        self._seen[kind] += 1
        return self._seen[kind] <= BURST


class PriorityFormatter(logging.Formatter):
    """Lines with the priority in front, as a reader that knows syslog takes them: `<4>text`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line for the message, more for a traceback."""
        prefix = f"<{priority(record)}>"
        return "\n".join(prefix + line for line in lines_of(record))


class HumanFormatter(logging.Formatter):
    """Lines for people: local time, level, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        """One line for the message, more for a traceback."""
        text = "\n".join(lines_of(record))
        return f"{self.formatTime(record)} {record.levelname.lower():<8} {record.name}: {text}"


def fields_of(record: logging.LogRecord) -> dict[str, str]:
    """The journal's fields: those given with the record, those that every record has on top."""
    given = record.__dict__.get("fields") or {}
    named = {name: str(value) for name, value in given.items() if value is not None}
    return {name: value for name, value in named.items() if _FIELD_NAME.fullmatch(name)} | {
        "MESSAGE": "\n".join(lines_of(record)),
        "PRIORITY": str(priority(record)),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        "LOGGER": record.name,
    }


def encoded(fields: Mapping[str, str]) -> bytes:
    """The journal's wire form: `NAME=value`, or for more than one line the name, length and data."""
    parts = []
    for name, value in fields.items():
        data = value.encode("utf-8", "backslashreplace")
        separator = b"\n" + struct.pack("<Q", len(data)) if b"\n" in data else b"="
        parts.append(name.encode("ascii") + separator + data + b"\n")
    return b"".join(parts)


def lines_of(record: logging.LogRecord) -> list[str]:
    """The message on one line, then a traceback's lines, marked as such: nothing can pose as a record."""
    trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
    return [printable(record.getMessage()), *(f"  | {printable(line)}" for line in trace.splitlines())]


def printable(text: str) -> str:
    """The text with control characters, line ends and marks of writing direction spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def priority(record: logging.LogRecord) -> int:
    """A record's level in syslog's numbers: 2 critical to 7 debug."""
    return next((number for level, number in _PRIORITIES if record.levelno >= level), _DEBUG_PRIORITY)


def _status(text: str) -> list[str]:
    return [f"STATUS={printable(text)}"] if text else []


def _notify(*assignments: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]
    message = "\n".join(assignments).encode("utf-8", "backslashreplace")
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(_SEND_TIMEOUT_S)
        sender.connect(address)  # else a full queue at the other end is asked again and again, without a pause
        sender.send(message)


def _stream_id(descriptor: int) -> str | None:
    """A stream in the form of JOURNAL_STREAM; None when it is closed."""
    with contextlib.suppress(OSError):
        stat = os.fstat(descriptor)
        return f"{stat.st_dev}:{stat.st_ino}"
    return None
