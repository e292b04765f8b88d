"""The clock: what the machine's own one promises, and that the fake one obeys."""

import ctypes
import re
import time
from pathlib import Path

import pytest

from edge_daemon import clock
from edge_daemon.clock import Clock, iso
from tests.fakes import FakeClock


def test_monotonic_is_the_boot_clock() -> None:
    """Monotonic time is the kernel's time since boot, suspend included, and never runs back."""
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    first, second = Clock().monotonic(), Clock().monotonic()
    assert before <= first <= second <= before + 5


def test_wall_is_epoch_seconds() -> None:
    """Wall time is the same epoch that the rest of Python uses."""
    assert Clock().wall() == pytest.approx(time.time(), abs=5)


def test_boot_id_is_one_uuid() -> None:
    """The boot id is the kernel's UUID, without a newline, the same at every call."""
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", Clock().boot_id())
    assert Clock().boot_id() == Clock().boot_id()


@pytest.mark.parametrize(
    ("marker", "kernel_state", "synced"),
    [(True, 5, True), (False, 0, True), (False, 1, True), (False, 5, False), (False, -1, False)],
)
def test_synced_by_marker_or_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, marker: bool, kernel_state: int, synced: bool
) -> None:
    """The clock counts as set when systemd's marker exists or the kernel says so; a refusal is a no."""
    path = tmp_path / "synchronized"
    if marker:
        path.touch()
    monkeypatch.setattr(clock, "SYNCED_MARKER", path)
    monkeypatch.setattr(clock, "_LIBC", FakeLibc(kernel_state))
    assert Clock().synced() is synced


def test_asking_the_kernel_works_here() -> None:
    """The real adjtimex accepts the buffer it is given and answers a state or a refusal."""
    state = clock._LIBC.adjtimex(ctypes.create_string_buffer(clock._TIMEX_BYTES))
    assert -1 <= state <= 5
    assert clock._kernel_says_synced() is (0 <= state < 5)


@pytest.mark.parametrize(
    ("wall_s", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1_700_000_000.25, "2023-11-14T22:13:20.250Z"),
        (1_700_000_000.9999, "2023-11-14T22:13:20.999Z"),
    ],
)
def test_iso_is_utc_with_milliseconds(wall_s: float, text: str) -> None:
    """Timestamps are UTC with exactly three decimals and a Z, so that they sort as text."""
    assert iso(wall_s) == text


def test_fake_clock_moves_only_when_told() -> None:
    """The fake clock stands still until advanced, stepped or rebooted, each in its own way."""
    fake = FakeClock(monotonic_s=10, wall_s=100)
    assert (fake.monotonic(), fake.wall()) == (10, 100)
    fake.advance(5)
    assert (fake.monotonic(), fake.wall()) == (15, 105)
    fake.step_wall(-50)
    assert (fake.monotonic(), fake.wall(), fake.boot_id()) == (15, 55, "boot-1")
    fake.reboot(off_s=20)
    assert (fake.monotonic(), fake.wall(), fake.boot_id()) == (0, 75, "boot-2")


class FakeLibc:
    """A C library whose adjtimex answers as told."""

    def __init__(self, state: int) -> None:
        self.state = state

    def adjtimex(self, buffer: object) -> int:
        """The state given to the constructor."""
        return self.state
