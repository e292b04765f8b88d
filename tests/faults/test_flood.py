"""Short floods; `python -m tests.faults flood` is the long form."""

from pathlib import Path

import pytest

from tests.faults.flood import dead_subscriber, flood

pytestmark = pytest.mark.broker


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_flood(tmp_path: Path, protocol: str) -> None:
    """Each task is accepted or answered `queue_full`, memory stays bounded, urgent tasks of others are served."""
    assert flood(tmp_path, tasks=5_000, max_tasks=200, protocol=protocol).problems() == []


def test_results_that_nobody_fetches(tmp_path: Path) -> None:
    """They wait in the broker, not in the daemon's memory, and all come when their subscriber does."""
    assert dead_subscriber(tmp_path, seconds=3, per_s=50).violations == []
