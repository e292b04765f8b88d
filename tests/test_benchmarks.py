"""Every measurement in its smallest form: it runs, compares like with like, and says what came out."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from benchmarks import accept, dispatch, footprint, idle, latency, report, start, through_mqtt
from benchmarks.__main__ import BENCHES
from benchmarks.table import Line, at_least, at_most, megabytes, milliseconds, per_second, summary
from tests import needs

# Each with its smallest size, and the names of its lines.
SMALLEST: dict[str, tuple[Callable[[Path, int], list[Line]], list[str]]] = {
    "footprint": (footprint.run, ["idle memory (RSS)", "start to READY=1"]),
    "latency": (
        partial(latency.run, tasks=2, slow_tasks=1),
        [f"added latency, the model takes {s} s{durably}" for s in (0, 1) for durably in ("", ", durably")],
    ),
    "accept": (
        partial(accept.run, slices=1),
        ["durable accept rate, one by one", "durable accept rate, in groups"],
    ),
    "mqtt": (
        partial(through_mqtt.run, tasks=30, windows=(20,)),
        ["durable accept rate over MQTT, 20 in flight"],
    ),
    "dispatch": (
        partial(dispatch.run, sizes=(50, 200), picks=2),
        ["decision alone, 200 waiting", "pick, claim and finish, 200 waiting", "pick, claim and finish, 200 waiting"],
    ),
    "start": (partial(start.run, size=50), ["start to READY=1, 50 waiting"]),
    "report": (partial(report.run, rows=500), ["report", "report", "report, memory"]),
}
ON_A_BROKER = {"footprint", "latency", "mqtt", "start"}


def line(*ours: float, aim: float | None = 2.0) -> Line:
    """A line of `ours` over ones."""
    return Line(
        name="speed",
        work="running",
        against="walking",
        ours=ours,
        theirs=[1.0] * len(ours),
        show=per_second,
        aim=None if aim is None else at_least(aim),
    )


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.broker) for name in SMALLEST])
def test_bench(name: str, tmp_path: Path) -> None:
    """It ends, with every line that it should print, and figures of something that has really happened."""
    if name in ON_A_BROKER:
        needs.tool("mosquitto", package="mosquitto")
    run, names = SMALLEST[name]
    lines = run(tmp_path, 1)
    assert [line.name for line in lines] == names
    for found in lines:
        assert len(found.ours) == len(found.theirs) == 1
        assert min(*found.ours, *found.theirs) > 0
        assert found.name in str(found)
        assert f"{found.ratio:.2f}" in str(found)


@pytest.mark.broker
def test_idle(tmp_path: Path) -> None:
    """The long measurement, shortened: it sees the wake-ups of both, and no more fsyncs than rows of telemetry."""
    needs.tool("mosquitto", package="mosquitto")
    needs.tool("strace", package="strace")
    memory, switches, beside, syncs = idle.run(tmp_path, 0.03, settled_s=0.5, interval_s=1)
    assert memory.ours[0] > memory.theirs[0] > 1e6
    assert switches.ours == beside.ours
    assert min(*beside.ours, *beside.theirs) > 0
    assert syncs.ours[0] <= syncs.theirs[0]


def test_every_bench_is_tried_here() -> None:
    """A new quick one in the table of `__main__` belongs in the table above."""
    assert {name for name, bench in BENCHES.items() if bench.short} == SMALLEST.keys()


def test_ratios_are_taken_pair_by_pair() -> None:
    """And not between two medians: what slows both down at once is no difference."""
    pairs = Line(name="", work="", against="", ours=[1, 20, 300], theirs=[1, 10, 100], show=per_second)
    assert pairs.ratios == [1, 2, 3]
    assert pairs.ratio == 2


@pytest.mark.parametrize(("figures", "verdict"), [((1, 3, 2), "met"), ((1, 1.9, 3), "MISSED")])
def test_the_median_decides(figures: tuple[float, ...], verdict: str) -> None:
    """The spread is shown beside it."""
    assert line(*figures).verdict == f"aim >= 2: {verdict}"
    assert "(1.00 to 3.00, n = 3)" in str(line(*figures))


def test_a_line_of_one_repetition() -> None:
    """Its spread is none."""
    assert "(2.50 to 2.50, n = 1)" in str(line(2.5))


def test_an_aim_is_a_limit_from_one_side() -> None:
    """Costs from above, rates from below; the limit itself is good enough."""
    assert at_most(1.5).met_by(1.5)
    assert not at_most(1.5).met_by(1.51)
    assert at_least(2).met_by(2)
    assert not at_least(2).met_by(1.99)


def test_summary() -> None:
    """What has no aim is not counted."""
    assert summary([line(3), line(1), line(1, aim=None)]) == "1 of 2 aims met; missed: speed"
    assert summary([line(3)]) == "1 of 1 aims met"


def test_figures_have_units() -> None:
    """Three digits and a unit are read at a glance."""
    assert milliseconds(0.00123) == "1.23 ms"
    assert megabytes(41_234_567) == "41.2 MB"
    assert per_second(12345.6) == "12,346/s"
