"""Which task next, and which models to unload for it.

``choose`` is a pure function of a ``View``: no clock, no log, no I/O. The same view gives the same decision, which is
what lets the simulator in ``benchmarks/`` drive the product's own scheduler. What must be remembered from one decision
to the next is a ``Turn``, and ``advance`` makes the next one.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from edge_daemon.messages import Priority

RATE_WINDOW_S = 600.0
"""How long an arrival counts towards the rate of its model, in the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a person may set (``scheduler`` in config.yaml)."""

    soft_wait_s: Mapping[Priority, float] = field(
        default_factory=lambda: {Priority.HIGH: 60.0, Priority.NORMAL: 300.0, Priority.LOW: 1800.0}
    )
    """After this wait a task is overdue. Urgent tasks never are: they go first anyway."""
    urgent_swap_share: float = 0.25
    """The share of time that may go into loads for urgent tasks."""
    urgent_burst_s: float = 60.0
    """How much of that share can be saved up."""
    quantum_loads: float = 8.0
    """An overdue task of another model waits until the current one has worked this many times its load time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The oldest waiting task of one class: one model, one priority, one size of work."""

    seq: int
    model: str
    priority: Priority
    waited_s: float
    run_s: float
    """Estimated seconds to run it on a resident model."""
    count: int
    """How many tasks wait in its class, itself included."""
    expires_in_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What is known, or guessed, of one model."""

    load_s: float
    size_bytes: int
    run_s: float
    """Mean seconds of one task."""
    rate_per_s: float = 0.0
    """How often a task for it arrives, lately; see ``decayed_rate``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A model that is in memory."""

    model: str
    size_bytes: int
    idle_s: float
    pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the past means for the next decision. The first one is made by ``advance(None, ...)``."""

    model: str
    """The model that ran last."""
    used_s: float
    """Seconds of service since it was switched to."""
    picks: int = 0
    """Tasks run in this turn."""
    recent: tuple[str, ...] = ()
    """Every model that has had a turn, the longest ago first."""
    urgent_credit_s: float = 0.0
    """Seconds of loading that urgent tasks may still cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that a decision depends on."""

    heads: tuple[Head, ...]
    resident: tuple[Resident, ...]
    costs: Mapping[str, Cost]
    budget_bytes: int
    turn: Turn | None = None
    max_resident: int | None = None
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Run task ``seq`` on ``model`` after unloading ``evict``, in that order; ``reason`` is for the log."""

    seq: int
    model: str
    evict: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetch:
    """Load ``model`` after unloading ``evict``, while another model generates."""

    model: str
    evict: tuple[str, ...]


def choose(view: View) -> Decision | None:
    """The next task, or None when none waits (or none can be given room).

    1. The highest priority counts first.
    2. Within it, a task of the model that ran last, then of any resident model, then of any other.
    3. Within that, the oldest.
    """
    resident = {r.model for r in view.resident}
    current = view.turn.model if view.turn else None

    def rank(head: Head) -> tuple[int, bool, bool, int]:
        return (head.priority.rank, head.model != current, head.model not in resident, head.seq)

    for head in sorted(view.heads, key=rank):
        evict = evict_for(head.model, view)
        if evict is not None:
            reason = "resident" if head.model in resident else "oldest"
            return Decision(seq=head.seq, model=head.model, evict=evict, reason=reason)
    return None


def advance(
    turn: Turn | None, decision: Decision, *, load_s: float, run_s: float, idle_s: float, policy: Policy
) -> Turn:
    """The turn after ``decision`` was carried out.

    Args:
        turn: the one before.
        decision: what ``choose`` returned.
        load_s: seconds that the load took, 0 when the model was resident.
        run_s: seconds of the generation; a preempted or failed one counts with what it used.
        idle_s: seconds since the end of the step before, in which nothing ran.
        policy: as in the view.
    """
    credit_s = policy.urgent_burst_s if turn is None else turn.urgent_credit_s
    credit_s = min(policy.urgent_burst_s, credit_s + policy.urgent_swap_share * (load_s + run_s + idle_s))
    if decision.reason == "urgent":
        credit_s -= load_s
    if turn is not None and turn.model == decision.model and load_s == 0:
        return Turn(
            model=turn.model,
            used_s=turn.used_s + run_s,
            picks=turn.picks + 1,
            recent=turn.recent,
            urgent_credit_s=credit_s,
        )
    recent = () if turn is None else tuple(m for m in turn.recent if m != decision.model)
    return Turn(
        model=decision.model,
        used_s=run_s,
        picks=1,
        recent=(*recent, decision.model),
        urgent_credit_s=credit_s,
    )


def preempts(view: View, running: Priority) -> bool:
    """Whether an urgent task waits that should stop the running generation between two tokens."""
    if running is Priority.URGENT:
        return False
    decision = choose(view)
    return decision is not None and decision.reason == "urgent"


def prefetch(view: View, running: str) -> Prefetch | None:
    """The model to load while ``running`` generates: one with tasks waiting, at the cost of idle models only."""
    return None


def estimate_wait(view: View, head: Head) -> float:
    """Seconds until ``head`` has its answer, if nothing else arrives."""
    return 0.0


def size_class(run_s: float) -> int:
    """The class of work of a task: tasks of one class differ by less than a factor of two."""
    return math.floor(math.log2(max(run_s, 0.1)))


def decayed_rate(rate_per_s: float, elapsed_s: float, *, arrivals: int) -> float:
    """An arrival rate brought forward by ``elapsed_s``, at whose end ``arrivals`` came."""
    return rate_per_s * math.exp(-elapsed_s / RATE_WINDOW_S) + arrivals / RATE_WINDOW_S


def evict_for(model: str, view: View) -> tuple[str, ...] | None:
    """The models to unload, cheapest to lose first, so that ``model`` fits; None when even that is not enough.

    A pinned model is never given up. A model with waiting tasks is given up after one without.
    """
    if any(r.model == model for r in view.resident):
        return ()
    need = view.costs[model].size_bytes
    used = sum(r.size_bytes for r in view.resident)
    count = len(view.resident)
    evicted: list[str] = []
    victims = _by_loss((r for r in view.resident if not r.pinned), view)
    while used + need > view.budget_bytes or (view.max_resident is not None and count >= view.max_resident):
        if not victims:
            return None
        victim = victims.pop(0)
        evicted.append(victim.model)
        used -= victim.size_bytes
        count -= 1
    return tuple(evicted)


def _by_loss(residents: Iterable[Resident], view: View) -> list[Resident]:
    """Models in the order in which they are best given up."""
    waiting: dict[str, int] = {}
    for head in view.heads:
        waiting[head.model] = waiting.get(head.model, 0) + head.count

    def loss(resident: Resident) -> tuple[bool, float, str]:
        return (resident.model in waiting, -resident.idle_s, resident.model)

    return sorted(residents, key=loss)
