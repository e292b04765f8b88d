"""Writes, fsyncs and renames that fail, some of them: all of them take `python -m tests.faults disk` (F5, F6)."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.disk import CALLS, Disk, Fault, enumerate_faults

STEPS = {"pwrite64": 31, "fdatasync": 17, "fsync": 7, "ftruncate": 7, "open": 13}
"""Of these calls only some are tried here, so far apart."""


@pytest.fixture(scope="module")
def disk() -> Iterator[Disk]:
    """A place in memory: what is tried is not how long an fsync takes."""
    shared_memory = Path("/dev/shm")  # noqa: S108
    where = shared_memory if shared_memory.is_dir() else None
    with tempfile.TemporaryDirectory(dir=where) as directory, Disk(Path(directory)) as disk:
        yield disk


def test_every_sync_that_fails(disk: Disk) -> None:
    """After each fsync of the queue that may fail, nothing is written behind it, and nothing that was told is lost."""
    found = list(enumerate_faults(disk, "daily", "fdatasync", "EIO", persistent=False))
    assert [text for outcome in found for text in outcome.violations] == []
    assert {outcome.end for outcome in found} == {"failed", "whole"}
    print(f"{len(found) - 1} failed fsyncs, 0 violations")


@pytest.mark.parametrize(("error", "persistent"), [("EIO", False), ("ENOSPC", True)])
@pytest.mark.parametrize("call", CALLS)
def test_calls_that_fail(disk: Disk, call: str, error: str, *, persistent: bool) -> None:
    """Whichever call fails in daily use, once or for good, what was promised is there after the next start."""
    step = STEPS.get(call, 3)
    found = list(enumerate_faults(disk, "daily", call, error, persistent=persistent, step=step))
    assert [text for outcome in found for text in outcome.violations] == []
    assert len(found) > 1


@pytest.mark.parametrize("life", ["damaged", "earlier"])
@pytest.mark.parametrize("call", ["pwrite64", "fsync", "rename", "open"])
def test_calls_that_fail_at_a_start(disk: Disk, life: str, call: str) -> None:
    """Whichever call fails while a file is mended or brought up to date, the next start has all that can be had."""
    found = list(enumerate_faults(disk, life, call, "EIO", persistent=False, step=STEPS.get(call, 1)))
    assert [text for outcome in found for text in outcome.violations] == []
    assert len(found) > 1


@pytest.mark.parametrize("number", range(1, 13))
def test_a_damaged_file_that_cannot_be_opened_just_now(disk: Disk, number: int) -> None:
    """While it is mended, every open may fail: its tasks are saved then, or at the next start."""
    outcome = disk.strike(Fault(life="damaged", call="open", error="EIO", number=number, persistent=False))
    assert (outcome.strikes, outcome.violations) == (1, ())


def test_a_fault_that_does_not_strike(disk: Disk) -> None:
    """A life without a fault promises something, and is seen to have had none."""
    outcome = disk.strike(Fault(life="daily", call="rename", error="EIO", number=900, persistent=False))
    assert (outcome.strikes, outcome.end, outcome.violations) == (0, "whole", ())
    assert {kind for kind, *_ in outcome.told} == {"accepted", "claimed", "finished"}
