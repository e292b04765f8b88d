"""Every named step of the source: the daemon is killed there, and nothing is lost (F2)."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.crash_points import Remains, crash, steps

pytestmark = pytest.mark.broker

AT_ONCE = 3
"""Most of a crash is waiting for processes."""


@pytest.fixture(scope="module")
def remains(tmp_path_factory: pytest.TempPathFactory) -> Remains:
    """What an earlier kill has left, for all of them."""
    return Remains(tmp_path_factory.mktemp("remains"))


@pytest.fixture(scope="module")
def crashes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, remains: Remains
) -> Iterator[dict[str, Future[list[str] | None]]]:
    """What each of the steps that are asked for has led to, tried a few at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            step: pool.submit(crash, step, tmp_path_factory.mktemp(step), remains)
            for step in steps()
            if any(item.name == f"test_a_kill_at_a_step[{step}]" for item in request.session.items)
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("step", steps())
def test_a_kill_at_a_step(step: str, crashes: dict[str, Future[list[str] | None]]) -> None:
    """The step is reached, the process ends there, and the next start makes everything good."""
    assert crashes[step].result() == []


@pytest.mark.parametrize("text", ["reached(name)", "reached()", "reached('a')\nreached('a')"])
def test_a_step_without_a_name_of_its_own(text: str) -> None:
    """A name that cannot be read from the source, or that stands at two places, is an error."""
    with pytest.raises(AssertionError):
        steps([text])
    assert steps(["reached('b')\nsteps.reached('a')"]) == ["a", "b"]


def test_a_step_that_is_not_reached(tmp_path: Path, remains: Remains) -> None:
    """A kill that never came is no success: it is seen by the exit status."""
    assert crash("no_such_step", tmp_path, remains) is None
