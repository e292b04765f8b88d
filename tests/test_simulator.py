"""The simulator, its bounds, and what the product's scheduler must keep to on its traces."""

import itertools
import random
from dataclasses import replace

import pytest

from benchmarks import bounds, policy, traces
from benchmarks.peers import Fifo, LoadedFirst, Ollama, PriorSystem
from benchmarks.simulator import Board, Outcome, Product, Step, simulate
from benchmarks.traces import BUDGETS, FLEET, Model, Trace


def product() -> Product:
    """The product's scheduler with a first guess of the length of answers."""
    return Product(dict.fromkeys((m.name for m in FLEET), 23.0))


def mean_flow_s(trace: Trace, order: tuple[Model, ...], *, load_ahead: bool) -> float:
    """The mean flow time of serving models in this very order, with one model in memory."""
    queues = {model: [job for job in trace if job.model == model] for model in FLEET}
    now_s, total_s, resident = 0.0, 0.0, None
    for model in order:
        job = queues[model].pop(0)
        load_s = 0.0 if model == resident else model.load_s
        began_s = max(now_s, job.at_s - load_s if load_ahead else job.at_s)
        now_s, resident = began_s + load_s + job.run_s, model
        total_s += now_s - job.at_s
    return total_s / len(trace)


@pytest.mark.parametrize("load_ahead", [False, True])
def test_the_optimum_is_the_best_of_all_orders(load_ahead: bool) -> None:  # noqa: FBT001
    """On traces small enough to try every order, dynamic programming finds exactly the best."""
    for seed in range(5):
        trace = traces.exact(0.6, 1, seed, count=6)
        orders = set(itertools.permutations([job.model for job in trace]))
        best_s = min(mean_flow_s(trace, order, load_ahead=load_ahead) for order in orders)
        assert bounds.optimal_mean_flow_s(trace, BUDGETS[1], load_ahead=load_ahead) == pytest.approx(best_s)


@pytest.mark.parametrize("memory", BUDGETS)
def test_nobody_beats_the_bounds(memory: int) -> None:
    """Mean flow, makespan and loads of every scheduler stay above what is proved to be least."""
    budget = BUDGETS[memory]
    for seed in range(3):
        trace = traces.exact(0.6, 3, seed)
        ahead_s, optimum_s = (bounds.optimal_mean_flow_s(trace, budget, load_ahead=kind) for kind in (True, False))
        assert ahead_s <= optimum_s
        for deciding in (PriorSystem(), Fifo(), Ollama(), LoadedFirst()):
            run = simulate(trace, deciding, budget)
            assert run.mean_flow_s >= optimum_s - 1e-9
            assert run.makespan_s >= bounds.least_makespan_s(trace, budget) - 1e-9
            assert run.loads >= bounds.least_loads([s.job.model for s in run.served], budget)


def test_least_loads_is_what_clairvoyant_eviction_needs() -> None:
    """Worked by hand: with room for two, A B C A B C takes four loads."""
    a, b, c = FLEET[:3]
    assert bounds.least_loads([a, b, c, a, b, c], BUDGETS[2]) == 4
    assert bounds.least_loads([a, a, b, b, a], BUDGETS[1]) == 3


def test_the_makespan_of_a_backlog_is_its_work_and_one_load_each() -> None:
    """All tasks come at once, so every model is loaded once, whatever the memory."""
    trace = traces.backlog()
    expected_s = sum(job.run_s for job in trace) + sum(model.load_s for model in FLEET)
    for budget in BUDGETS.values():
        assert bounds.least_makespan_s(trace, budget) == pytest.approx(expected_s)


@pytest.mark.parametrize("name", traces.LONG)
def test_a_trace_has_the_load_that_it_says(name: str) -> None:
    """Work over time is the load, and the same seed gives the same trace."""
    trace = traces.LONG[name](0.6, 1)
    assert sum(job.run_s for job in trace) / trace[-1].at_s == pytest.approx(0.6)
    assert trace == traces.LONG[name](0.6, 1)
    assert trace != traces.LONG[name](0.6, 2)


@pytest.mark.parametrize("memory", BUDGETS)
@pytest.mark.parametrize("name", traces.LONG)
def test_the_product_needs_no_more_loads_than_first_in_first_out(name: str, memory: int) -> None:
    """Fewer loads and a shorter mean than FIFO with the model kept; every task is served once."""
    trace = traces.LONG[name](0.6, 1)
    ours, fifo = simulate(trace, product(), BUDGETS[memory]), simulate(trace, Fifo(), BUDGETS[memory])
    assert ours.loads < fifo.loads
    assert ours.mean_flow_s < fifo.mean_flow_s
    assert sorted(s.job.seq for s in ours.served) == [job.seq for job in trace]


def test_the_same_trace_gives_the_same_decisions() -> None:
    """The decision log is equal, line by line."""
    trace = traces.bursty(0.85, 3)
    first, second = (simulate(trace, product(), BUDGETS[2]) for _ in range(2))
    assert first.log == second.log
    assert len(first.log) >= len(trace)


def test_no_load_is_over_budget_in_a_thousand_mixes() -> None:
    """The simulator refuses a step beyond the budget, and the product never tries one."""
    rng = random.Random(5)  # noqa: S311
    for seed in range(1000):
        budget = rng.randint(max(m.size_bytes for m in FLEET), sum(m.size_bytes for m in FLEET))
        run = simulate(traces.exact(rng.uniform(0.3, 2.0), 3, seed, count=12), product(), budget)
        assert len(run.served) == 12


def test_a_step_over_budget_is_refused() -> None:
    """The accounting that the test above trusts can fail."""

    class Careless(Fifo):
        """Never unloads."""

        def step(self, board: Board) -> Step | None:
            step = super().step(board)
            return step and replace(step, evict=())

    with pytest.raises(AssertionError, match="over budget"):
        simulate(traces.backlog(), Careless(), BUDGETS[1])


def test_a_backlog_is_drained_close_to_its_bound() -> None:
    """T4: at most 1.05 of the least makespan."""
    trace = traces.backlog()
    for budget in BUDGETS.values():
        assert simulate(trace, product(), budget).makespan_s <= 1.05 * bounds.least_makespan_s(trace, budget)


def test_a_hog_cannot_keep_others_out() -> None:
    """T5: the worst wait is at most 0.8 of that of a scheduler that serves loaded models first."""
    for budget in BUDGETS.values():
        ours, theirs = (simulate(traces.hog(1), deciding, budget) for deciding in (product(), LoadedFirst()))
        assert ours.worst_wait_s <= 0.8 * theirs.worst_wait_s


def test_close_to_the_optimum() -> None:
    """T6: mean flow time at most 1.2 of the exact optimum over a few traces of each cell, and below loaded-first."""
    ours, theirs = [], []
    for (memory, load, cv), seed in itertools.product(policy.EXACT_CELLS, range(4)):
        trace = traces.exact(load, cv, seed)
        optimum_s = bounds.optimal_mean_flow_s(trace, BUDGETS[memory], load_ahead=False)
        runs: list[Outcome] = [simulate(trace, d, BUDGETS[memory]) for d in (product(), LoadedFirst())]
        ours.append(runs[0].mean_flow_s / optimum_s)
        theirs.append(runs[1].mean_flow_s / optimum_s)
    assert sum(ours) / len(ours) <= 1.21
    assert sum(ours) < 0.97 * sum(theirs)


@pytest.mark.parametrize("table", ["backlog", "starvation", "cost", "log"])
def test_the_tables_can_be_made(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command prints a Markdown table."""
    assert policy.main([table, "--seeds", "1"]) == 0
    assert "| --- |" in capsys.readouterr().out
