"""What is known of models: guesses until something has been measured, and then the measurements."""

import json
from typing import Any

import pytest

from edge_daemon.errors import StorageFull
from edge_daemon.estimates import TRUSTED_LOADS, Estimates, Facts
from edge_daemon.scheduler import RATE_WINDOW_S


def answered(estimates: Estimates, model: str = "m", **measured: Any) -> None:
    """A generation of 100 tokens at 10 a second, after a prompt of 50 at 100 a second."""
    usual: dict[str, Any] = {"task_type": None, "prompt_tokens": 50, "prefill_s": 0.5, "output_tokens": 100}
    estimates.answered(model, **usual | {"decode_s": 10.0, "run_s": 10.5} | measured)


def run_s(estimates: Estimates, model: str = "m", **task: Any) -> float:
    """The estimate for a task with a prompt of 50 tokens."""
    return estimates.run_s(model, **{"task_type": None, "prompt_tokens": 50, "max_tokens": 1_000} | task)


@pytest.fixture
def estimates() -> Estimates:
    """Nothing measured, nothing remembered."""
    return Estimates({}, lambda _model, _facts: None)


def test_guesses_grow_with_the_size(estimates: Estimates) -> None:
    """Of a model that was never used, load and run times are guessed from the size of its file."""
    estimates.set_disk_size("small", 400_000_000)
    estimates.set_disk_size("large", 4_000_000_000)
    assert estimates.load_s("large") == pytest.approx(10 * estimates.load_s("small"))
    assert run_s(estimates, "large") == pytest.approx(10 * run_s(estimates, "small"))
    assert estimates.mean_run_s("large") == pytest.approx(10 * estimates.mean_run_s("small"))


def test_everything_unknown_is_still_a_number(estimates: Estimates) -> None:
    """Even of a model that nobody has heard of there are positive, finite estimates."""
    for seconds in (estimates.load_s("?"), run_s(estimates, "?"), estimates.mean_run_s("?")):
        assert 0 < seconds < 1_000
    estimates.set_disk_size("empty", 0)
    assert run_s(estimates, "empty") > 0
    assert estimates.facts("?") == Facts()


def test_measurements_replace_guesses(estimates: Estimates) -> None:
    """After one load and one answer, the estimates are what was measured."""
    estimates.set_disk_size("m", 4_000_000_000)
    assert estimates.loaded("m", seconds=2.5, told_bytes=900, drop_bytes=100, at_most=10**6, num_ctx=2048) == 900
    answered(estimates)
    assert estimates.load_s("m") == 2.5
    assert estimates.facts("m").size_bytes == 900
    assert run_s(estimates) == pytest.approx(50 / 100 + 100 / 10)
    assert estimates.mean_run_s("m") == 10.5


def test_means_follow_slowly(estimates: Estimates) -> None:
    """One odd measurement moves an estimate a little, many move it there."""
    for seconds in (10.0, 20.0):
        estimates.loaded("m", seconds=seconds, told_bytes=1, drop_bytes=0, at_most=10**6, num_ctx=2048)
    assert estimates.load_s("m") == pytest.approx(13.0)
    for _ in range(30):
        estimates.loaded("m", seconds=20.0, told_bytes=1, drop_bytes=0, at_most=10**6, num_ctx=2048)
    assert estimates.load_s("m") == pytest.approx(20.0, rel=0.01)


def test_a_drop_that_could_not_be_read(estimates: Estimates) -> None:
    """Loads of which the drop is not known, or which were with another context, do not count for it."""
    for num_ctx, drop_bytes in ((1, 3_000), (1, 3_000), (1, 3_000), (1, None), (2, 3_000)):
        size = estimates.loaded("m", seconds=1, told_bytes=1_000, drop_bytes=drop_bytes, at_most=10**6, num_ctx=num_ctx)
        assert size == 1_000
    assert estimates.facts("m").loads == 1


def test_killed_for_want_of_memory(estimates: Estimates) -> None:
    """It needs more than was thought; not more than there is, and never less than was thought."""
    for at_most, size_bytes in ((10_000, 1_250), (1_100, 1_100), (900, 1_000)):
        estimates.killed("m", 1_000, at_most=at_most, num_ctx=2_048)
        assert estimates.facts("m").size_bytes == size_bytes


def test_one_drop_of_memory_is_not_believed(estimates: Estimates) -> None:
    """What Ollama tells is the size, until several loads have plainly cost more; one coincidence does not stick."""
    assert estimates.loaded("m", seconds=1, told_bytes=1_000, drop_bytes=50_000, at_most=10**6, num_ctx=2048) == 1_000
    for _ in range(TRUSTED_LOADS):
        size = estimates.loaded("n", seconds=1, told_bytes=1_000, drop_bytes=3_000, at_most=10**6, num_ctx=2048)
    assert size == estimates.facts("n").size_bytes == 3_000
    for _ in range(50):
        size = estimates.loaded("n", seconds=1, told_bytes=1_000, drop_bytes=900, at_most=10**6, num_ctx=2048)
    assert size == 1_000
    noisy = [
        estimates.loaded("o", seconds=1, told_bytes=1_000, drop_bytes=9_000, at_most=1_500, num_ctx=1) for _ in "1234"
    ]
    assert noisy == [1_000, 1_000, 1_000, 1_500]  # it fits: that has just been seen
    assert (
        estimates.loaded("grew", seconds=1, told_bytes=1_000, drop_bytes=-5_000, at_most=10**6, num_ctx=2048) == 1_000
    )


def test_output_length_is_known_by_type(estimates: Estimates) -> None:
    """A type of task with short answers is estimated as short, other types by the mean of all."""
    for _ in range(20):
        answered(estimates, task_type="yes-no", output_tokens=5, decode_s=0.5)
    answered(estimates, task_type="essay", output_tokens=500, decode_s=50.0)
    assert run_s(estimates, task_type="yes-no") == pytest.approx(0.5 + 0.5)
    assert run_s(estimates, task_type="essay") == pytest.approx(0.5 + 50.0)
    assert (
        run_s(estimates, task_type="yes-no") < run_s(estimates, task_type="new") < run_s(estimates, task_type="essay")
    )


def test_max_tokens_bounds_the_estimate(estimates: Estimates) -> None:
    """A task that allows few tokens takes no longer than those."""
    answered(estimates)
    assert run_s(estimates, max_tokens=10) == pytest.approx(0.5 + 1.0)


@pytest.mark.parametrize(
    "useless",
    [
        {"prompt_tokens": 3, "prefill_s": 60.0},
        {"prompt_tokens": 50, "prefill_s": 0.0},
        {"output_tokens": 1, "decode_s": 60.0},
        {"output_tokens": 0, "decode_s": 0.0},
    ],
)
def test_useless_measurements_leave_the_rates(estimates: Estimates, useless: dict[str, Any]) -> None:
    """Too few tokens, or times of zero, say nothing of the speed."""
    answered(estimates)
    before = estimates.facts("m")
    answered(estimates, **useless)
    after = estimates.facts("m")
    assert after.prefill_tokens_per_s == before.prefill_tokens_per_s
    assert after.decode_tokens_per_s == before.decode_tokens_per_s


def test_types_are_bounded(estimates: Estimates) -> None:
    """Senders that make up types cannot make the facts grow without end; known types go on being learnt."""
    for n in range(200):
        answered(estimates, task_type=f"type-{n}")
    by_type = estimates.facts("m").output_tokens_by_type
    assert by_type is not None
    assert len(by_type) == 64
    answered(estimates, task_type="type-0", output_tokens=0)
    assert (estimates.facts("m").output_tokens_by_type or {})["type-0"] == pytest.approx(70)


def test_facts_survive_a_restart() -> None:
    """What is handed out to be remembered, and comes back through JSON, gives the same estimates."""
    kept: dict[str, str] = {}
    first = Estimates({}, lambda model, facts: kept.update({model: json.dumps(facts)}))
    first.loaded("m", seconds=3, told_bytes=7, drop_bytes=9, at_most=10**6, num_ctx=2048)
    answered(first, task_type="q")
    again = Estimates({model: json.loads(facts) for model, facts in kept.items()}, lambda _model, _facts: None)
    assert again.facts("m") == first.facts("m")
    assert run_s(again, task_type="q") == run_s(first, task_type="q")


def test_facts_of_other_versions_are_read() -> None:
    """Facts with fields that are not known, or without some that are, are of use as far as they go."""
    estimates = Estimates({"m": {"load_s": 4.0, "from the future": [1]}}, lambda _model, _facts: None)
    assert estimates.load_s("m") == 4.0


def test_a_load_that_ended_us_is_told_once() -> None:
    """It is made to last before it is asked for, counted by the next run, and forgiven by a load that is good."""
    kept: dict[str, Any] = {}
    lasts: list[dict[str, Any]] = []

    def run() -> Estimates:
        return Estimates(dict(kept), lambda model, facts: kept.update({model: facts}), lambda: lasts.append(dict(kept)))

    for deaths in (1, 2):
        run().load_begins("m", 7)
        assert lasts[-1]["m"]["load_for"] == 7
        estimates = run()
        assert estimates.loads_that_ended_us() == {"m": 7}
        assert estimates.facts("m").deaths == deaths
        assert run().loads_that_ended_us() == {}
    estimates.load_begins("m", None)
    estimates.load_ended("m")
    assert run().loads_that_ended_us() == {}
    assert estimates.facts("m").deaths == 2
    estimates.loaded("m", seconds=3, told_bytes=7, drop_bytes=9, at_most=10**6, num_ctx=2048)
    assert run().facts("m").deaths == 0


def test_a_load_that_cannot_be_noted_has_not_begun() -> None:
    """Then nothing of it is remembered, by the next commit either."""
    kept: dict[str, Any] = {}

    def full() -> None:
        raise StorageFull("no room")

    estimates = Estimates({}, lambda model, facts: kept.update({model: facts}), full)
    with pytest.raises(StorageFull):
        estimates.load_begins("m", 7)
    assert kept["m"]["load_for"] is None


def test_the_rate_of_arrivals_rises_and_decays(estimates: Estimates) -> None:
    """Tasks raise a model's rate, silence lets it fall, and other models are not touched."""
    assert estimates.rate_per_s("m", 0.0) == 0
    for second in range(10):
        estimates.arrived("m", float(second))
    busy = estimates.rate_per_s("m", 10.0)
    assert busy == pytest.approx(10 / RATE_WINDOW_S, rel=0.05)
    assert estimates.rate_per_s("m", 10.0 + RATE_WINDOW_S) == pytest.approx(busy / 2.718, rel=0.01)
    assert estimates.rate_per_s("other", 10.0) == 0
    assert estimates.rate_per_s("m", 5.0) == pytest.approx(10 / RATE_WINDOW_S, rel=0.05)  # asked with an older time
