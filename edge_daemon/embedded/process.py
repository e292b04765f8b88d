"""Child processes that end when their parent ends, however it ends.

Two ties hold a child to its parent: the kernel signals the child when the thread that started it ends
(PR_SET_PDEATHSIG), and the child's standard input, a pipe held by the parent, reaches its end.
"""

import contextlib
import ctypes
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_PROJECT_ROOT = Path(__file__).resolve().parents[2]
log = logging.getLogger(__name__)

# The kernel ties a child to the *thread* that started it, so all are started by one that lasts as long as we do.
_STARTER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="child-starter")


class Child:
    """One Python module run as a child process; its logs go to our standard error.

    `arguments` follow `python -m`. Close it with `stop()`; a child never outlives this process.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.process: subprocess.Popen[bytes] = _STARTER.submit(_spawn, arguments).result()
        self._unread = b""

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def read_line(self, timeout_s: float) -> str:
        """The next line of its output, "" once that has ended.

        Raises:
            TimeoutError: no whole line within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        output = _pipe(self.process.stdout).fileno()
        while b"\n" not in self._unread:
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"process {self.pid} said nothing for {timeout_s:g} s")
            received = os.read(output, 65536)
            if not received:
                return ""
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode(errors="replace")

    def log_output(self, name: str) -> None:
        """Hand every further line to the log, so that the child never blocks on a full pipe; what is fine, at debug."""
        threading.Thread(target=self._log_lines, args=(name,), name=f"{name}-log", daemon=True).start()

    def _log_lines(self, name: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the pipe is closed under us by stop()
            for line in _pipe(self.process.stdout):
                level = logging.WARNING if b"error" in line.lower() or b"warning" in line.lower() else logging.DEBUG
                log.log(level, "%s: %s", name, line.decode(errors="replace").rstrip())

    def exit_text(self) -> str:
        """How the ended process ended: "signal: killed", "exit status 1"."""
        code = self.process.wait()
        if code >= 0:
            return f"exit status {code}"
        return f"signal: {signal.strsignal(-code) or -code}".lower()

    def kill(self) -> None:
        """End the process at once; `stop()` still has to follow."""
        self.process.kill()

    def stop(self, grace_s: float = 0.0) -> None:
        """End the process, politely if `grace_s` seconds are given, and wait until it is gone."""
        if grace_s:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            _pipe(pipe).close()


def _spawn(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, (str(_PROJECT_ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        process_group=0,  # Ctrl-C is for the parent, which ends its children in its own order
    )


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise TypeError("this child was started without a pipe")
    return pipe


def die_with_parent(signal_number: signal.Signals) -> None:
    """Have the kernel send us `signal_number` when our parent dies; exit now if it has died already.

    It survives exec, but not a change of user. A parent that blocks signals to wait for them, and whose mask we have
    inherited, does not keep them from us.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number)
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLHUP)
    if poll.poll(0):
        sys.exit("the parent process has gone")


def on_stdin_end(then: Callable[[], None]) -> None:
    """Call `then`, in a thread of its own, once standard input reaches its end."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        then()

    threading.Thread(target=watch, name="stdin-end", daemon=True).start()
