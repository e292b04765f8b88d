"""A few kills at random times; `make torture` does 500."""

from pathlib import Path

import pytest

from tests.faults.kills import Tally, play

pytestmark = pytest.mark.broker


@pytest.mark.parametrize("broker_too", [False, True])
def test_kills(tmp_path: Path, *, broker_too: bool) -> None:
    """Nothing that was accepted is lost, nothing ends twice, and the file stays whole."""
    tally = Tally()
    play(tmp_path, seed="short", kills=4, broker_too=broker_too, tally=tally)
    assert tally.violations == []
    assert tally.kills == tally.intact == 4
    assert tally.accepted > 0
