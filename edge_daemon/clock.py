"""The time, as one object that is handed around, so that a test can hold it still.

Scheduling uses `monotonic()`; wall time is a label for people, and is wrong on a board without a
real-time clock until the network has set it.
"""

import ctypes
import time
from datetime import UTC, datetime
from pathlib import Path

SYNCED_MARKER = Path("/run/systemd/timesync/synchronized")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_TIMEX_BYTES = 512  # generous: struct timex has 128 or 208, by word size
_LIBC = ctypes.CDLL(None)


class Clock:
    """The machine's own clocks. It has no state."""

    __slots__ = ()

    def monotonic(self) -> float:
        """Seconds since boot; suspend counts, and all processes of one boot see the same."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        """Seconds since the epoch, as far as this machine knows."""
        return time.time()

    def synced(self) -> bool:
        """Whether the wall clock has been set from outside since boot."""
        return SYNCED_MARKER.exists() or _kernel_says_synced()

    def boot_id(self) -> str:
        """A UUID that changes with every boot: `monotonic()` compares only within one."""
        return BOOT_ID.read_text(encoding="ascii").strip()


def iso(wall_s: float) -> str:
    """RFC 3339 in UTC with milliseconds, such as `2026-01-31T12:00:00.250Z`."""
    moment = datetime.fromtimestamp(wall_s, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _kernel_says_synced() -> bool:
    """Ask the kernel, for a machine where chrony or ntpd sets the clock.

    An all-zero `struct timex` means "change nothing". A sandbox may forbid even that (-1): not synced.
    """
    state: int = _LIBC.adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    return 0 <= state < _TIME_ERROR
