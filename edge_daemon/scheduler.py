"""Which task next, and which models to unload for it.

``choose`` is a pure function of a ``View``: no clock, no log, no I/O. The same view gives the same decision, which is
what lets the simulator in ``benchmarks/`` drive the product's own scheduler.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edge_daemon.messages import Priority


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A model that is in memory."""

    model: str
    size_bytes: int
    idle_s: float
    pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The model that ran last, and the seconds of service it has had since it was switched to."""

    model: str
    used_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that a decision depends on."""

    heads: tuple[Head, ...]
    resident: tuple[Resident, ...]
    costs: Mapping[str, Cost]
    budget_bytes: int
    turn: Turn | None = None
    max_resident: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Run task ``seq`` on ``model`` after unloading ``evict``, in that order; ``reason`` is for the log."""

    seq: int
    model: str
    evict: tuple[str, ...]
    reason: str


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
