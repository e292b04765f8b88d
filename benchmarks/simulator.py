"""One board in virtual time: a trace goes in, what happened to each task comes out.

The board does one thing at a time, a load or a generation, and knows no other clock than its own. Whoever decides is a
`Scheduler`: the product's own (`Product`), or one of the peers in `benchmarks/peers.py`.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.traces import FLEET, Job, Trace
from edge_daemon import scheduler
from edge_daemon.messages import Priority

MODELS = {model.name: model for model in FLEET}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Run ``job`` after unloading ``evict``; ``overhead_s`` passes besides loading and running.

    ``wait_s``: do nothing for so long, or until the next arrival. ``ask_again``: after a load, decide anew.
    """

    job: Job
    evict: tuple[str, ...] = ()
    reason: str = ""
    overhead_s: float = 0.0
    wait_s: float = 0.0
    ask_again: bool = False


@dataclass(slots=True)
class Board:
    """What is in memory, and since when it is idle."""

    budget_bytes: int
    now_s: float = 0.0
    resident: dict[str, float] = field(default_factory=dict)
    """Each resident model with the time it was last used."""

    def used_bytes(self) -> int:
        """Memory that models occupy."""
        return sum(MODELS[name].size_bytes for name in self.resident)

    def lru_for(self, model: str) -> tuple[str, ...]:
        """The least recently used models whose unloading makes room."""
        return self.first_for(model, sorted(self.resident, key=self.resident.__getitem__))

    def first_for(self, model: str, victims: list[str]) -> tuple[str, ...]:
        """As many of ``victims``, in their order, as make room for ``model``."""
        if model in self.resident:
            return ()
        excess = self.used_bytes() + MODELS[model].size_bytes - self.budget_bytes
        evict = []
        for victim in victims:
            if excess <= 0:
                break
            excess -= MODELS[victim].size_bytes
            evict.append(victim)
        return tuple(evict)


class Scheduler(Protocol):
    """Who decides. It is told of arrivals and of ends, in the order of time."""

    def arrived(self, job: Job) -> None:
        """``job`` waits from now on."""

    def step(self, board: Board) -> Step | None:
        """What to do now; None when nothing waits."""

    def done(self, step: Step, *, load_s: float, run_s: float, board: Board) -> None:
        """A load, a run, or both, are over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What happened to one job."""

    job: Job
    start_s: float
    end_s: float

    @property
    def flow_s(self) -> float:
        """From arrival to answer."""
        return self.end_s - self.job.at_s

    @property
    def wait_s(self) -> float:
        """From arrival to the start of the generation."""
        return self.start_s - self.job.at_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A whole run. ``log`` holds a line for each decision."""

    served: tuple[Served, ...]
    loads: int
    load_s: float
    makespan_s: float
    log: tuple[str, ...]

    @property
    def mean_flow_s(self) -> float:
        """Mean time from arrival to answer."""
        return sum(s.flow_s for s in self.served) / len(self.served)

    @property
    def worst_wait_s(self) -> float:
        """Longest time from arrival to start."""
        return max(s.wait_s for s in self.served)


def simulate(trace: Trace, deciding: Scheduler, budget_bytes: int) -> Outcome:
    """Run ``trace`` to its end."""
    board = Board(budget_bytes)
    coming = deque(trace)
    served: list[Served] = []
    log: list[str] = []
    loads, loading_s = 0, 0.0
    while len(served) < len(trace):
        while coming and coming[0].at_s <= board.now_s:
            deciding.arrived(coming.popleft())
        step = deciding.step(board)
        if step is None:
            board.now_s = coming[0].at_s
            continue
        name = step.job.model.name
        log.append(f"{board.now_s:.6f} {step.job.seq} {name} {step.reason} {'+'.join(step.evict) or '-'}")
        if step.wait_s:
            over_s = board.now_s + step.wait_s
            board.now_s = min(over_s, coming[0].at_s) if coming else over_s
            continue
        load_s = _make_resident(step, board)
        loads += load_s > 0
        loading_s += load_s
        if load_s and step.ask_again:
            deciding.done(step, load_s=load_s, run_s=0.0, board=board)
            continue
        board.now_s += step.overhead_s
        served.append(Served(job=step.job, start_s=board.now_s, end_s=board.now_s + step.job.run_s))
        board.now_s = board.resident[name] = served[-1].end_s
        deciding.done(step, load_s=load_s, run_s=step.job.run_s, board=board)
    return Outcome(served=tuple(served), loads=loads, load_s=loading_s, makespan_s=board.now_s, log=tuple(log))


def _make_resident(step: Step, board: Board) -> float:
    """Unload and load as the step says; how long the load took."""
    for victim in step.evict:
        del board.resident[victim]
    name = step.job.model.name
    if name in board.resident:
        return 0.0
    board.resident[name] = board.now_s
    assert board.used_bytes() <= board.budget_bytes, f"over budget: {sorted(board.resident)}"
    board.now_s += step.job.model.load_s
    return step.job.model.load_s


class Product:
    """The product's own scheduler, fed with what the daemon would know: estimates that it has learnt so far.

    ``history``: tasks of days before, whose rates of arrival it still remembers.
    """

    name = "edge-llm"

    def __init__(
        self, typical_output: Mapping[str, float], *, history: Trace = (), policy: scheduler.Policy | None = None
    ) -> None:
        self._policy = policy or scheduler.Policy()
        self._waiting: dict[tuple[str, Priority, int], deque[tuple[Job, float]]] = {}
        self._output = dict(typical_output)
        self._run_s = {name: MODELS[name].run_s(0, tokens) for name, tokens in typical_output.items()}
        self._rate = dict.fromkeys(MODELS, 0.0)
        self._rated_s = history[0].at_s - history[-1].at_s if history else 0.0
        self._turn: scheduler.Turn | None = None
        self._decision: scheduler.Decision | None = None
        self._ended_s = 0.0
        for job in history:
            self._count(job.model.name, job.at_s - history[-1].at_s)

    def arrived(self, job: Job) -> None:
        """Estimate its work, and put it into its class."""
        name = job.model.name
        estimate_s = job.model.run_s(job.prompt_tokens, self._output[name])
        key = (name, job.priority, math.frexp(estimate_s)[1])
        self._waiting.setdefault(key, deque()).append((job, estimate_s))
        self._count(name, job.at_s)

    def _count(self, arrived: str, at_s: float) -> None:
        for model, rate in self._rate.items():
            elapsed_s = at_s - self._rated_s
            self._rate[model] = scheduler.decayed_rate(rate, max(0.0, elapsed_s), arrivals=int(model == arrived))
        self._rated_s = at_s

    def step(self, board: Board) -> Step | None:
        """Ask the product."""
        self._decision = scheduler.choose(self.view(board))
        if self._decision is None:
            return None
        queue = next(q for q in self._waiting.values() if q and q[0][0].seq == self._decision.seq)
        return Step(
            job=queue[0][0],
            evict=self._decision.evict,
            reason=self._decision.reason,
            wait_s=self._decision.not_before_s,
            ask_again=True,
        )

    def done(self, step: Step, *, load_s: float, run_s: float, board: Board) -> None:
        """Learn from what was seen."""
        assert self._decision is not None
        idle_s = board.now_s - self._ended_s - load_s - run_s
        self._ended_s = board.now_s
        self._turn = scheduler.advance(
            self._turn, self._decision, load_s=load_s, run_s=run_s, idle_s=idle_s, policy=self._policy
        )
        if run_s:
            name = step.job.model.name
            next(q for q in self._waiting.values() if q and q[0][0] is step.job).popleft()
            self._output[name] += 0.1 * (step.job.output_tokens - self._output[name])
            self._run_s[name] += 0.1 * (run_s - self._run_s[name])

    def view(self, board: Board) -> scheduler.View:
        """All that the product's decision depends on."""
        heads = tuple(
            scheduler.Head(
                seq=queue[0][0].seq,
                model=model,
                priority=priority,
                waited_s=board.now_s - queue[0][0].at_s,
                run_s=queue[0][1],
                count=len(queue),
            )
            for (model, priority, _), queue in self._waiting.items()
            if queue
        )
        costs = {
            name: scheduler.Cost(
                load_s=model.load_s,
                size_bytes=model.size_bytes,
                run_s=self._run_s[name],
                rate_per_s=scheduler.decayed_rate(self._rate[name], board.now_s - self._rated_s, arrivals=0),
            )
            for name, model in MODELS.items()
        }
        resident = tuple(
            scheduler.Resident(model=name, size_bytes=MODELS[name].size_bytes, idle_s=board.now_s - used_s)
            for name, used_s in board.resident.items()
        )
        return scheduler.View(
            heads=heads,
            resident=resident,
            costs=costs,
            budget_bytes=board.budget_bytes,
            turn=self._turn,
            policy=self._policy,
        )
