"""The scheduler against its peers and against what is possible, in virtual time.

``python -m benchmarks.policy [TABLE ...]``; each table is Markdown, and the same on every run but for ``cost``.
"""

import argparse
import hashlib
import inspect
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from benchmarks import bounds, traces
from benchmarks.peers import Fifo, LoadedFirst, Ollama, PriorSystem
from benchmarks.simulator import Outcome, Product, Scheduler, simulate
from benchmarks.traces import BUDGETS, FLEET, Trace
from edge_daemon.messages import Priority
from edge_daemon.scheduler import Cost, Head, Resident, Turn, View, choose

PEERS: tuple[type[Fifo | LoadedFirst | Ollama], ...] = (PriorSystem, Fifo, Ollama, LoadedFirst)
EXACT_CELLS = [(memory, load, cv) for memory in BUDGETS for load in (0.3, 0.6, 0.9) for cv in (1, 3)]
LONG_CELLS = [(name, load, memory) for name in traces.LONG for load in (0.6, 0.85) for memory in BUDGETS]
RAMP = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95]
TYPICAL_OUTPUT = 23.0
"""Tokens of a mean answer on T1 and T2, as the first guess."""


def exact(seeds: int) -> list[str]:
    """T6: mean flow time over the exact optimum. Load, and coefficient of variation of the gaps, per column."""
    optima = {ahead: _optima(seeds, load_ahead=ahead) for ahead in (False, True)}
    lines = _heading(["", *(f"{m}m {load} cv{cv}" for m, load, cv in EXACT_CELLS), "mean", "worst", "ahead"])
    rows: list[tuple[str, Callable[[float, int, int], Scheduler]]] = [
        *((peer.name, lambda _load, _cv, _seed, peer=peer: peer()) for peer in PEERS),
        ("edge-llm, from nothing", lambda _load, _cv, _seed: _constant_product()),
        ("edge-llm", lambda load, cv, seed: _constant_product(traces.exact(load, cv, -1 - seed, count=200))),
    ]
    for name, make in rows:
        flows = {
            (memory, load, cv, seed): simulate(
                traces.exact(load, cv, seed), make(load, cv, seed), BUDGETS[memory]
            ).mean_flow_s
            for memory, load, cv in EXACT_CELLS
            for seed in range(seeds)
        }
        strict, ahead = (
            [fmean(flows[*cell, s] / optima[kind][*cell, s] for s in range(seeds)) for cell in EXACT_CELLS]
            for kind in (False, True)
        )
        lines.append(_row(name, [*strict, fmean(strict), max(strict), fmean(ahead)]))
    return lines


def long(seeds: int) -> list[str]:
    """T1 to T3: each cell is mean flow / p99 flow / worst wait in s; the worst is the mean over the seeds.

    The last columns are edge-llm over loaded-first, and loads per 100 tasks of the two.
    """
    lines = _heading(["trace, load, models in memory", *(p.name for p in PEERS), "edge-llm", "ratio", "loads"])
    for trace, load, memory in LONG_CELLS:
        runs = [traces.LONG[trace](load, seed) for seed in range(seeds)]
        totals = [_Total.of(runs, peer, memory) for peer in PEERS] + [_Total.of(runs, _varied_product, memory)]
        first, ours = totals[-2:]
        ratio = (
            f"{ours.mean_s / first.mean_s:.2f} / {ours.p99_s / first.p99_s:.2f} / {ours.worst_s / first.worst_s:.2f}"
        )
        loads = f"{first.loads:.1f} / {ours.loads:.1f}"
        lines.append(_row(f"{trace}, {load}, {memory}", [*totals, ratio, loads]))
    return lines


def backlog(_seeds: int) -> list[str]:
    """T4: makespan over its bound, and loads; the least for the order served is the bound for eviction alone."""
    lines = _heading(["models in memory", "", "makespan s", "over the bound", "loads", "least for this order"])
    trace = traces.backlog()
    for memory, budget in BUDGETS.items():
        bound_s = bounds.least_makespan_s(trace, budget)
        for make in (*PEERS, _constant_product):
            run = simulate(trace, make(), budget)
            least = bounds.least_loads([s.job.model for s in run.served], budget)
            cells = [_name(make), f"{run.makespan_s:.0f}", f"{run.makespan_s / bound_s:.4f}", run.loads, least]
            lines.append(_row(str(memory), cells))
    return lines


def starvation(seeds: int) -> list[str]:
    """T5: worst wait in s, of A B C by turns and of the two clients of the hog."""
    lines = _heading(["models in memory", "", "round robin", "hog: its own tasks", "hog: the others"])
    for memory, budget in BUDGETS.items():
        for make in (*PEERS, _constant_product):
            turns = simulate(traces.round_robin(), make(), budget)
            hogs = [simulate(traces.hog(seed), make(), budget) for seed in range(seeds)]
            own, others = (
                fmean(max(s.wait_s for s in run.served if (s.job.model == FLEET[0]) is its) for run in hogs)
                for its in (True, False)
            )
            lines.append(_row(str(memory), [_name(make), *(f"{s:.0f}" for s in (turns.worst_wait_s, own, others))]))
    return lines


def ramp(seeds: int, picture: Path | None = None) -> list[str]:
    """T1 with one model in memory, load rising: mean flow in s, and loads per 100 tasks. 4 h of arrivals each."""
    makes = (*PEERS, _varied_product)
    lines = _heading(["load", *map(_name, makes)])
    curves: dict[str, list[float]] = {_name(make): [] for make in makes}
    for load in RAMP:
        runs = [traces.steady(load, seed, hours=4) for seed in range(seeds)]
        totals = [_Total.of(runs, make, 1) for make in makes]
        for make, total in zip(makes, totals, strict=True):
            curves[_name(make)].append(total.mean_s)
        lines.append(_row(f"{load}", [f"{t.mean_s:.0f} ({t.loads:.0f})" for t in totals]))
    if picture is not None:
        _plot(curves, picture)
    return lines


def stable(seeds: int) -> list[str]:
    """T1 at a load of 0.9, one model in memory: mean flow in s as the hours go by; unstable is what keeps growing."""
    makes: tuple[Callable[[], Scheduler], ...] = (Fifo, Ollama, LoadedFirst, _varied_product)
    lines = _heading(["hours", *map(_name, makes)])
    for hours in (4, 8, 16):
        runs = [traces.steady(0.9, seed, hours=hours) for seed in range(seeds)]
        lines.append(_row(str(hours), [f"{_Total.of(runs, make, 1).mean_s:.0f}" for make in makes]))
    return lines


def cost(_seeds: int) -> list[str]:
    """One ``choose`` in ms, median of 300: 8 models of 3 priorities and 3 sizes, 2 of them resident.

    An urgent task would make it cheaper: it is decided by the first rule.
    """
    lines = _heading(["tasks waiting", "staying with a resident model", "planning the next load"])
    sizes = (100, 1_000, 10_000, 100_000)
    times: dict[tuple[int, bool], list[float]] = {}
    for _, waiting, idle in itertools.product(range(300), sizes, (False, True)):
        view = _full_view(waiting, idle=idle)
        began_at = time.perf_counter()
        choose(view)
        times.setdefault((waiting, idle), []).append(time.perf_counter() - began_at)
    for waiting in sizes:
        lines.append(_row(f"{waiting:,}", [f"{1e3 * median(times[waiting, idle]):.2f}" for idle in (False, True)]))
    return lines


def log(seeds: int) -> list[str]:
    """The decision log of each trace, made twice: equal, and its SHA-256."""
    lines = _heading(["trace", "decisions", "equal", "sha256"])
    for name, make in traces.LONG.items():
        for seed in range(min(seeds, 2)):
            first, second = (
                "\n".join(simulate(make(0.85, seed), _varied_product(), BUDGETS[1]).log).encode() for _ in range(2)
            )
            digest = hashlib.sha256(first).hexdigest()[:16]
            lines.append(_row(f"{name}, seed {seed}", [first.count(b"\n") + 1, first == second, digest]))
    return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class _Total:
    """Several runs of one scheduler, pooled."""

    mean_s: float
    p99_s: float
    worst_s: float
    loads: float

    @classmethod
    def of(cls, runs: Iterable[Trace], make: Callable[[], Scheduler], memory: int) -> "_Total":
        outcomes: list[Outcome] = [simulate(trace, make(), BUDGETS[memory]) for trace in runs]
        flows = sorted(s.flow_s for run in outcomes for s in run.served)
        return cls(
            mean_s=fmean(flows),
            p99_s=flows[math.ceil(0.99 * len(flows)) - 1],
            worst_s=fmean(run.worst_wait_s for run in outcomes),
            loads=100 * sum(run.loads for run in outcomes) / len(flows),
        )

    def __str__(self) -> str:
        return f"{self.mean_s:.0f} / {self.p99_s:.0f} / {self.worst_s:.0f}"


def _constant_product(history: Trace = ()) -> Product:
    output = {job.model.name: job.output_tokens for job in traces.backlog()}
    return Product(output, history=history)


def _varied_product() -> Product:
    return Product(dict.fromkeys((m.name for m in FLEET), TYPICAL_OUTPUT))


def _name(make: Callable[[], Scheduler]) -> str:
    return make.name if isinstance(make, type) and issubclass(make, Fifo | LoadedFirst | Ollama) else Product.name


def _optima(seeds: int, *, load_ahead: bool) -> dict[tuple[int, float, float, int], float]:
    return {
        (memory, load, cv, seed): bounds.optimal_mean_flow_s(
            traces.exact(load, cv, seed), BUDGETS[memory], load_ahead=load_ahead
        )
        for memory, load, cv in EXACT_CELLS
        for seed in range(seeds)
    }


def _full_view(waiting: int, *, idle: bool) -> View:
    """``waiting`` tasks spread over all classes; with ``idle`` the resident models have none."""
    names = [f"model-{i}" for i in range(8)]
    asked = names[2:] if idle else names
    classes = [(m, p, size) for m in asked for p in Priority if p is not Priority.URGENT for size in (3.0, 6.0, 12.0)]
    heads = tuple(
        Head(seq=i, model=m, priority=p, waited_s=30.0 + i % 7, run_s=s, count=max(1, waiting // len(classes)))
        for i, (m, p, s) in enumerate(classes)
    )
    costs = {m: Cost(load_s=10.0 + i, size_bytes=500 + 50 * i, run_s=5.0, rate_per_s=0.01) for i, m in enumerate(names)}
    resident = tuple(Resident(model=m, size_bytes=costs[m].size_bytes, idle_s=1.0) for m in names[:2])
    turn = Turn(model=names[0], used_s=50.0, picks=4, load_s=10.0)
    return View(heads=heads, resident=resident, costs=costs, budget_bytes=1_200, turn=turn)


def _plot(curves: Mapping[str, Sequence[float]], picture: Path) -> None:
    from matplotlib import pyplot as plt  # noqa: PLC0415  # only for this, and not needed for the tables

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, means in curves.items():
        axes.plot(RAMP, means, marker="o", markersize=3, label=name, linewidth=2 if name == Product.name else 1)
    axes.set(xlabel="load (work per second of time, loads not counted)", ylabel="mean flow time, s", yscale="log")
    axes.set_title("T1, one model in memory: who stays stable")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120, metadata={"Software": None})


def _heading(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |", "|" + " --- |" * len(cells)]


def _row(name: str, cells: Iterable[object]) -> str:
    shown = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells)
    return "| " + " | ".join([name, *shown]) + " |"


TABLES: Mapping[str, Callable[[int], list[str]]] = {
    table.__name__: table for table in (exact, long, backlog, starvation, ramp, stable, cost, log)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policy", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; all when none is given")
    parser.add_argument("--seeds", type=int, default=12, help="traces per cell (default 12)")
    parser.add_argument("--picture", type=Path, help="where to put the plot of the ramp, as PNG")
    options = parser.parse_args(arguments)
    for name in options.tables or TABLES:
        print(f"\n### {name}\n\n{inspect.getdoc(TABLES[name])}\n")
        lines = ramp(options.seeds, options.picture) if name == "ramp" else TABLES[name](options.seeds)
        print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
