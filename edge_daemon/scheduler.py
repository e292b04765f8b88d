"""Which task next, and which models to unload for it.

``choose`` is a pure function of a ``View``: no clock, no log, no I/O. The same view gives the same decision, which is
what lets the simulator in ``benchmarks/`` drive the product's own scheduler. What must be remembered from one decision
to the next is a ``Turn``, and ``advance`` makes the next one.

The caller's loop: ask. When the answer has ``not_before_s``, wait that long or for the next arrival, and ask again.
When its model is not resident, load it, ``advance`` with the load, and ask again, since tasks may have come or gone
meanwhile. Else run the task, and ``advance`` with the run.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from edge_daemon.messages import Priority

WEIGHT = {Priority.URGENT: 16.0, Priority.HIGH: 4.0, Priority.NORMAL: 1.0, Priority.LOW: 0.25}
"""What a second of waiting costs."""
RATE_WINDOW_S = 600.0
"""How long an arrival counts towards the rate of its model, in the mean."""
SETTLE_SHARE = 0.04
"""A load for tasks that have only just come is put off by this share of its length, to see the rest of a burst."""
TICK_S = 0.001
"""A shorter wait is none."""
HEAD_OF_LINE_EVERY = 3
"""Each so many picks go to the task that is overdue most, so that short ones cannot starve a long one."""
AGEING = 4.0
"""An overdue task goes before a fresh one of this many times less work, and once more."""
SEARCH_MODELS = 4
"""Orders of so many models are compared exactly; a search over more would cost more than it finds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a person may set (``scheduler`` in config.yaml)."""

    soft_wait_s: Mapping[Priority, float] = field(
        default_factory=lambda: {Priority.HIGH: 60.0, Priority.NORMAL: 300.0, Priority.LOW: 1800.0}
    )
    """After this wait a task is overdue. An urgent one is at once."""
    urgent_swap_share: float = 0.25
    """The share of time that may go into loads for urgent tasks."""
    urgent_burst_s: float = 60.0
    """How much of that share can be saved up. A longer load needs all of it, and is owed for."""
    quantum_loads: float = 16.0
    """A loaded model works this many times its load time before an overdue task may force another load."""
    patience: float = 4.0
    """That task must also be overdue so many times more than those of the resident models ..."""
    quanta: float = 8.0
    """... or wait for so many quanta. Both keep a backlog that is overdue as a whole from being served in its order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The oldest waiting task of one class: one model, one priority, one size of work (``size_class``)."""

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
    """How often a task for it arrives, lately (``decayed_rate``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A model that is in memory."""

    model: str
    size_bytes: int
    idle_s: float
    pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the past means for the next decision: the turn that began with the last load."""

    model: str
    """The model that was loaded or ran last."""
    used_s: float
    """Seconds of service since the last load."""
    picks: int = 0
    """Tasks run since the last load."""
    load_s: float = 0.0
    """Seconds that the last load took."""
    recent: tuple[str, ...] = ()
    """Every model that has had service, the longest ago first."""
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
    """Run task ``seq`` on ``model`` after unloading ``evict``, in that order; ``reason`` is for the log.

    ``not_before_s``: seconds from now that a load is better put off; an arrival ends the wait.
    """

    seq: int
    model: str
    evict: tuple[str, ...]
    reason: str
    not_before_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetch:
    """Load ``model`` after unloading ``evict``, while another model generates."""

    model: str
    evict: tuple[str, ...]


def choose(view: View) -> Decision | None:
    """The next task, or None when none waits (or none can be given room). The first rule that applies decides.

    1. Urgent: a resident model's urgent task; another's while the urgent credit pays for the load.
    2. Turn: each third pick goes to an overdue task of a resident model, the first of a turn to the one just loaded.
    3. Overdue: once the last load has paid for itself (``_turn_is_over``), or no resident model has work, a model out
       of memory with an overdue task is loaded.
    4. Stay: resident models are served until they have no work.
    5. Plan: the model to load that costs least waiting, as far as is known now.

    Rules 2 and 3 take the model that has been without service for longest, and its most overdue task. So no model gets
    two turns while another has an overdue task, which waits, urgent work aside, for the turn that is on and one of each
    other model at most. A turn is a load, quantum_loads * quanta times as long of service at most, and one task over.
    """
    desk = _Desk(view)
    for rule in (_urgent, _turn, _overdue, _stay, _plan):
        decision = rule(desk)
        if decision is not None:
            return decision
    return None


def advance(
    turn: Turn | None,
    decision: Decision,
    *,
    load_s: float = 0.0,
    run_s: float = 0.0,
    idle_s: float = 0.0,
    policy: Policy,
) -> Turn:
    """The turn after a load, a run, or both, of what ``choose`` returned; the first turn is made from None.

    Args:
        turn: the one before.
        decision: what was carried out.
        load_s: seconds of the load, if there was one.
        run_s: seconds of the generation, if there was one; a preempted or failed one counts with what it used.
        idle_s: seconds before, in which nothing was loaded or run.
        policy: as in the view.
    """
    before = turn or Turn(model="", used_s=0.0, urgent_credit_s=policy.urgent_burst_s)
    earned_s = policy.urgent_swap_share * (load_s + run_s + idle_s)
    spent_s = load_s if decision.reason == "urgent" else 0.0
    new = load_s > 0
    return Turn(
        model=decision.model,
        used_s=run_s if new else before.used_s + run_s,
        picks=(0 if new else before.picks) + (run_s > 0),
        load_s=load_s if new else before.load_s,
        recent=(*(m for m in before.recent if m != decision.model), decision.model),
        urgent_credit_s=min(policy.urgent_burst_s, before.urgent_credit_s + earned_s) - spent_s,
    )


def preempts(view: View, running: Priority) -> bool:
    """Whether an urgent task waits that should stop the running generation between two tokens."""
    return running is not Priority.URGENT and _urgent(_Desk(view)) is not None


def prefetch(view: View, running: str) -> Prefetch | None:
    """The model to load while ``running`` generates: the next of the plan that needs only the room of idle models."""
    desk = _Desk(view)
    keep = desk.pinned | {running, *desk.queues}
    for model, _ in desk.plan(desk.outside):
        for evict in desk.evictions(model, desk.resident, keep, frozenset()):
            return Prefetch(model=model, evict=tuple(sorted(evict)))
    return None


def estimate_wait(view: View, head: Head) -> float | None:
    """Seconds until ``head`` has its answer if nothing else arrives; None when its model can be given no room.

    ``head`` need not be in the view. Its ``count`` is its place in its class, itself included.
    """
    others = tuple(h for h in view.heads if (h.model, h.priority, h.seq) != (head.model, head.priority, head.seq))
    desk = _Desk(replace(view, heads=(*others, head)))
    wait_s = 0.0
    for model, _ in (*desk.plan(desk.ready), *desk.plan(desk.outside)):
        if model in desk.outside:
            wait_s += view.costs[model].load_s
        if model == head.model:
            key = desk.pick_key(head)
            return wait_s + sum(h.run_s * h.count for h in desk.queues[model] if desk.pick_key(h) <= key)
        wait_s += desk.work_s[model]
    return None


def decayed_rate(rate_per_s: float, elapsed_s: float, *, arrivals: int) -> float:
    """An arrival rate brought forward by ``elapsed_s``, at the end of which ``arrivals`` tasks came."""
    return rate_per_s * math.exp(-elapsed_s / RATE_WINDOW_S) + arrivals / RATE_WINDOW_S


def _urgent(desk: "_Desk") -> Decision | None:
    turn, burst_s = desk.view.turn, desk.view.policy.urgent_burst_s
    credit_s = burst_s if turn is None else turn.urgent_credit_s
    affordable = [m for m in desk.outside if min(desk.view.costs[m].load_s, burst_s) <= credit_s]
    for models in (desk.ready, affordable):
        urgent = [h for model in models for h in desk.queues[model] if h.priority is Priority.URGENT]
        if urgent:
            head = min(urgent, key=lambda h: h.seq)
            return desk.decide(head.model, "urgent", head)
    return None


def _turn(desk: "_Desk") -> Decision | None:
    turn = desk.view.turn
    if turn is None or turn.picks % HEAD_OF_LINE_EVERY:
        return None
    return desk.relieve("turn", desk.ready if turn.picks else [m for m in desk.ready if m == turn.model])


def _overdue(desk: "_Desk") -> Decision | None:
    late = [m for m in desk.outside if desk.most_overdue(m)]
    if not late or (desk.ready and not _turn_is_over(desk, late)):
        return None
    return desk.relieve("overdue", [*late, *desk.ready])


def _turn_is_over(desk: "_Desk", late: list[str]) -> bool:
    turn, policy = desk.view.turn, desk.view.policy
    if turn is None:
        return True
    quantum_s = policy.quantum_loads * turn.load_s
    if turn.used_s < quantum_s:
        return False
    return desk.age_of(late) >= policy.patience * desk.age_of(desk.ready) or turn.used_s >= policy.quanta * quantum_s


def _stay(desk: "_Desk") -> Decision | None:
    return desk.decide(desk.plan(desk.ready)[0][0], "stay") if desk.ready else None


def _plan(desk: "_Desk") -> Decision | None:
    if not desk.outside:
        return None
    model, evict = desk.plan(desk.outside)[0]
    oldest_s = max(h.waited_s for m in desk.outside for h in desk.queues[m])
    settle_s = SETTLE_SHARE * desk.view.costs[model].load_s - oldest_s
    return desk.decide(model, "plan", evict=evict, not_before_s=settle_s if settle_s > TICK_S else 0.0)


class _Desk:
    """A view, laid out for one decision."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.resident = frozenset(r.model for r in view.resident)
        self.pinned = frozenset(r.model for r in view.resident if r.pinned)
        self.sizes = {m: cost.size_bytes for m, cost in view.costs.items()} | {
            r.model: r.size_bytes for r in view.resident
        }
        self.queues: dict[str, list[Head]] = {}
        for head in view.heads:
            if not self._expires_in_load(head):
                self.queues.setdefault(head.model, []).append(head)
        self.ready = [m for m in self.queues if m in self.resident]
        self.outside = [m for m in self.queues if m not in self.resident and self._fits(self.pinned | {m})]
        self.work_s = {m: sum(h.run_s * h.count for h in heads) for m, heads in self.queues.items()}
        self.weight = {m: sum(self._weight(h) for h in heads) for m, heads in self.queues.items()}
        total = sum(cost.rate_per_s for cost in view.costs.values()) or 1.0
        # The load that the next arrival will cost, in the mean, if the model is not resident by then.
        self.reload_s = {m: cost.load_s * cost.rate_per_s / total for m, cost in view.costs.items()}

    def decide(
        self,
        model: str,
        reason: str,
        head: Head | None = None,
        *,
        evict: frozenset[str] | None = None,
        not_before_s: float = 0.0,
    ) -> Decision:
        """The decision for a task of ``model``, by default the best of its heads and the cheapest eviction."""
        waiting = frozenset(self.queues)
        if evict is None:
            evict = self.evictions(model, self.resident, self.pinned, waiting)[0]
        head = head or min(self.queues[model], key=self.pick_key)
        victims = tuple(sorted(evict, key=lambda m: (self.worth(m, waiting), m)))
        return Decision(seq=head.seq, model=model, evict=victims, reason=reason, not_before_s=not_before_s)

    def age(self, head: Head) -> float:
        """1 when overdue. A task with a short time to live is overdue at half of it."""
        if head.priority is Priority.URGENT:
            return math.inf
        limit_s = self.view.policy.soft_wait_s[head.priority]
        if head.expires_in_s is not None:
            limit_s = min(limit_s, (head.waited_s + head.expires_in_s) / 2)
        return head.waited_s / max(limit_s, TICK_S)

    def age_of(self, models: Iterable[str]) -> float:
        """The greatest age in these models."""
        return max(self.age(head) for model in models for head in self.queues[model])

    def most_overdue(self, model: str) -> Head | None:
        """The head of ``model`` that is overdue most, if any is."""
        overdue = [head for head in self.queues[model] if self.age(head) >= 1]
        return max(overdue, key=lambda h: (self.age(h), -h.seq), default=None)

    def relieve(self, reason: str, models: Iterable[str]) -> Decision | None:
        """The decision for the most overdue task of that model, of those with one, without service for longest."""
        overdue = {model: head for model in models if (head := self.most_overdue(model))}
        if not overdue:
            return None
        recent = self.view.turn.recent if self.view.turn else ()
        model = min(overdue, key=lambda m: (recent.index(m) if m in recent else -1, m))
        return self.decide(model, reason, overdue[model])

    def pick_key(self, head: Head) -> tuple[float, int]:
        """Aged weighted shortest first."""
        return (head.run_s / (WEIGHT[head.priority] * (1 + AGEING * min(1.0, self.age(head)))), head.seq)

    def _weight(self, head: Head) -> float:
        """What a second costs the tasks of a class. From a third of its limit on, the oldest counts more and more."""
        return WEIGHT[head.priority] * (head.count + (3 * min(1.0, self.age(head))) ** 4)

    def plan(self, models: Iterable[str]) -> list[tuple[str, frozenset[str]]]:
        """Models with their evictions, in the order of service that costs least weighted waiting."""

        def index(model: str) -> tuple[float, str]:
            load_s = 0.0 if model in self.resident else self.view.costs[model].load_s
            return (-self.weight[model] / max(load_s + self.work_s[model], TICK_S), model)

        ranked = sorted(models, key=index)
        waiting, resident = frozenset(ranked[:SEARCH_MODELS]), self.resident
        memo: _Memo = {}
        steps = []
        while waiting:
            _, model, evict = self._search(waiting, resident, memo)
            steps.append((model, evict))
            waiting, resident = waiting - {model}, resident - evict | {model}
        for model in ranked[SEARCH_MODELS:]:
            _, _, evict = self._search(frozenset([model]), resident, memo)
            steps.append((model, evict))
            resident = resident - evict | {model}
        return steps

    def _search(self, waiting: frozenset[str], resident: frozenset[str], memo: "_Memo") -> "_Best":
        """Exact: of all orders and evictions the least cost, with the first model to serve and whom to evict for it.

        Cost is weighted waiting: while a model is loaded and served, all tasks behind it wait. A model's own tasks
        wait for one another in every order alike, so that does not count. At the end stands what the next arrival
        will have to wait for its load: that keeps models in memory that are asked for often.
        """
        if not waiting:
            return (-sum(self.reload_s.get(m, 0.0) for m in resident), "", frozenset())
        known = memo.get((waiting, resident))
        if known:
            return known
        everyone = sum(self.weight[m] for m in waiting)
        best: _Best = (math.inf, "", frozenset())
        for model in sorted(waiting):
            behind = waiting - {model}
            delay = self.work_s[model] * (everyone - self.weight[model])
            if model not in resident:
                delay += self.view.costs[model].load_s * everyone
            for evict in self.evictions(model, resident, self.pinned, behind):
                cost = delay + self._search(behind, resident - evict | {model}, memo)[0]
                if cost < best[0]:
                    best = (cost, model, evict)
        memo[waiting, resident] = best
        return best

    def evictions(
        self, model: str, resident: frozenset[str], keep: frozenset[str], waiting: frozenset[str]
    ) -> list[frozenset[str]]:
        """Ways to make room: any single model that is enough, else the cheapest models until it is enough."""
        if model in resident or self._fits(resident | {model}):
            return [frozenset()]
        victims = sorted(resident - keep, key=lambda m: (self.worth(m, waiting), m))
        single = [frozenset([v]) for v in victims if self._fits(resident - {v} | {model})]
        if single:
            return single
        for count in range(2, len(victims) + 1):
            evict = frozenset(victims[:count])
            if self._fits(resident - evict | {model}):
                for victim in reversed(victims[:count]):  # the dearest first: the last one may have made it needless
                    if self._fits(resident - (evict - {victim}) | {model}):
                        evict -= {victim}
                return [evict]
        return []

    def worth(self, model: str, waiting: frozenset[str]) -> float:
        """What is lost per byte when ``model`` is unloaded: tasks that wait or will come, times its load."""
        cost = self.view.costs.get(model)
        if cost is None:  # another client's: nobody here asks for it
            return 0.0
        tasks = self.weight[model] if model in waiting else 0.0
        return (tasks + cost.rate_per_s * cost.load_s) * cost.load_s / self.sizes[model]

    def _expires_in_load(self, head: Head) -> bool:
        """Whether it cannot be helped: it would be over before its model is there, and is the only one of its class."""
        if head.expires_in_s is None or head.model in self.resident or head.count > 1:
            return False
        return head.expires_in_s < self.view.costs[head.model].load_s

    def _fits(self, models: Iterable[str]) -> bool:
        models = frozenset(models)
        if self.view.max_resident is not None and len(models) > self.view.max_resident:
            return False
        return sum(self.sizes[m] for m in models) <= self.view.budget_bytes


_Best = tuple[float, str, frozenset[str]]
_Memo = dict[tuple[frozenset[str], frozenset[str]], _Best]
