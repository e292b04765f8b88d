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
HEAD_OF_LINE_EVERY = 2
"""Each so many picks go to the task that is overdue most, so that short ones cannot starve a long one."""
FORGOTTEN_EVERY = 9
"""Each so many go to the overdue model that had no service for longest, so that old ones cannot starve a young one."""
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
    deep_wait: float = 4.0
    """In a backlog it is overdue after as long as the waiting work takes, at the latest after so many such waits."""
    urgent_swap_share: float = 0.25
    """The share of time that may go into loads for urgent tasks."""
    urgent_burst_s: float = 60.0
    """How much of that share can be saved up. A longer load needs all of it, and is owed for."""
    quantum_loads: float = 16.0
    """A loaded model works this many times its load time before an overdue task may force another load."""
    patience: float = 4.0
    """That task must also be overdue so many times more than those of the resident models ..."""
    deep_loads: float = 40.0
    """... or, with work of so many load times waiting, beside which a load hardly counts, ..."""
    deep_patience: float = 1.2
    """... so many times more, ..."""
    quanta: float = 8.0
    """... or wait for so many quanta. Both keep a backlog that is overdue as a whole from being served in its order."""
    passes: int = 8
    """After so many turns without service, a model with an overdue task goes before older tasks of others."""


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
    load_is_guess: bool = False
    """It was never loaded."""
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
    """What the past means for the next decision: the turn that began with the last load.

    Urgent tasks, and the loads for them, are no part of it: they may come at any time, and as often as they like.
    """

    model: str
    """The model that was loaded last."""
    used_s: float
    """Seconds of service since then, that of urgent tasks included."""
    picks: int = 0
    """Tasks run so far."""
    load_s: float = 0.0
    """Seconds that the last load took."""
    number: int = 0
    """Loads so far."""
    served: tuple[tuple[str, int], ...] = ()
    """Every model that has had service, with the number of the turn in which it last had; the latest comes last."""
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
    2. Turn: each second pick goes to an overdue task of a resident model, and so does the first of the one just loaded.
    3. Overdue: once the last load has paid for itself (``_turn_is_over``), or no resident model has work, a model out
       of memory with an overdue task is loaded.
    4. Stay: resident models are served until they have no work.
    5. Plan: the model to load that costs least waiting, as far as is known now.

    Rules 2 and 3 take the most overdue task, but a model that had no service for as many turns as ``passes`` goes
    first, and at each ninth pick the resident model that had none for longest. So a model with a task that stays
    overdue, as any does after deep_wait soft waits, waits, urgent work aside, at most for the turn that is on,
    ``passes`` more, one of each other model, and its own load. A turn is a load, and then quantum_loads * quanta times
    as long of service and two tasks over at most, or nine tasks for each resident model if that is longer. Each swap
    for an urgent task may cost one turn more.
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
        idle_s: seconds before, in which nothing was loaded or run; below 0 when runs beside the load were counted.
        policy: as in the view.
    """
    before = turn or Turn(model="", used_s=0.0, urgent_credit_s=policy.urgent_burst_s)
    after = credited(before, load_s + run_s + idle_s, policy=policy)
    if decision.reason == "urgent":
        return replace(after, used_s=after.used_s + run_s, urgent_credit_s=after.urgent_credit_s - load_s)
    if load_s > 0:
        after = replace(after, model=decision.model, number=after.number + 1, used_s=0.0, load_s=load_s)
    if run_s > 0:
        others = (last for last in after.served if last[0] != decision.model)
        served = (*others, (decision.model, after.number))
        after = replace(after, used_s=after.used_s + run_s, picks=after.picks + 1, served=served)
    return after


def credited(turn: Turn, elapsed_s: float, *, policy: Policy) -> Turn:
    """The turn ``elapsed_s`` later, whatever was done in that time: urgent tasks have earned their share of it."""
    earned_s = policy.urgent_swap_share * elapsed_s
    return replace(turn, urgent_credit_s=min(policy.urgent_burst_s, turn.urgent_credit_s + earned_s))


def lacks_room(view: View) -> bool:
    """Whether the model of a waiting task could not be loaded even if all others but the pinned ones were unloaded."""
    return _Desk(view).lacks_room()


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
    if turn is None:
        return None
    models = [m for m in desk.ready if desk.most_overdue(m)]
    if turn.picks % FORGOTTEN_EVERY == 0:
        models = sorted(models, key=desk.last_served)[:1]
    elif turn.picks % HEAD_OF_LINE_EVERY:
        models = [m for m in models if m == turn.model and (m, turn.number) not in turn.served]
    return desk.relieve("turn", models)


def _overdue(desk: "_Desk") -> Decision | None:
    late = [m for m in desk.outside if desk.most_overdue(m)]
    if not late or (desk.ready and not _turn_is_over(desk, late)):
        return None
    return desk.relieve("overdue", late)


def _turn_is_over(desk: "_Desk", late: list[str]) -> bool:
    turn, policy = desk.view.turn, desk.view.policy
    if turn is None:
        return True
    quantum_s = policy.quantum_loads * turn.load_s
    if turn.used_s < quantum_s:
        return False
    is_deep = sum(desk.work_s.values()) >= policy.deep_loads * turn.load_s
    patience = policy.deep_patience if is_deep else policy.patience
    return desk.age_of(late) >= patience * desk.age_of(desk.ready) or turn.used_s >= policy.quanta * quantum_s


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
        self._lay_out(head for head in view.heads if not self._expires_in_load(head))
        if not (self.ready or self.outside):  # what is left is tried all the same: loads can be faster than expected
            self._lay_out(view.heads)
        self.work_s = {m: sum(h.run_s * h.count for h in heads) for m, heads in self.queues.items()}
        self.limit_s = self._limits()
        self.weight = {m: sum(self._weight(h) for h in heads) for m, heads in self.queues.items()}
        total = sum(cost.rate_per_s for cost in view.costs.values()) or 1.0
        # The load that the next arrival will cost, in the mean, if the model is not resident by then.
        self.reload_s = {m: cost.load_s * cost.rate_per_s / total for m, cost in view.costs.items()}

    def _lay_out(self, heads: Iterable[Head]) -> None:
        self.queues: dict[str, list[Head]] = {}
        for head in heads:
            self.queues.setdefault(head.model, []).append(head)
        self.ready = [m for m in self.queues if m in self.resident]
        self.outside = [m for m in self.queues if m not in self.resident and self._fits(self.pinned | {m})]

    def lacks_room(self) -> bool:
        """Whether a model that tasks wait for finds no room beside the pinned ones."""
        wanted = {head.model for head in self.view.heads} - self.resident
        return any(not self._fits(self.pinned | {model}) for model in wanted)

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
        limit_s = self.limit_s[head.priority]
        if head.expires_in_s is not None:
            limit_s = min(limit_s, (head.waited_s + head.expires_in_s) / 2)
        return head.waited_s / max(limit_s, TICK_S)

    def _limits(self) -> dict[Priority, float]:
        """The wait after which a task of each priority is overdue.

        In a backlog none is late before it has waited for as long as the work takes that waits of its priority and
        above: whatever the order, somebody waits that long.
        """
        policy = self.view.policy
        work_s = dict.fromkeys(WEIGHT, 0.0)
        for heads in self.queues.values():
            for head in heads:
                work_s[head.priority] += head.run_s * head.count
        limits, before_s = {}, 0.0
        for priority in WEIGHT:
            before_s += work_s[priority]
            soft_s = policy.soft_wait_s.get(priority, 0.0)
            limits[priority] = max(soft_s, min(before_s, policy.deep_wait * soft_s))
        return limits

    def age_of(self, models: Iterable[str]) -> float:
        """The greatest age in these models."""
        return max(self.age(head) for model in models for head in self.queues[model])

    def most_overdue(self, model: str) -> Head | None:
        """The head of ``model`` that is overdue most, if any is."""
        overdue = [head for head in self.queues[model] if self.age(head) >= 1]
        return max(overdue, key=lambda h: (self.age(h), -h.seq), default=None)

    def relieve(self, reason: str, models: Iterable[str]) -> Decision | None:
        """The decision for the most overdue task; one of a model that was passed over too often goes before it."""
        overdue = {model: head for model in models if (head := self.most_overdue(model))}
        if not overdue:
            return None
        turn = self.view.turn or Turn(model="", used_s=0.0)
        last = dict(turn.served)
        patient = {m for m in overdue if any(map(self._is_patient, self.queues[m]))}
        passed_over = [m for m in patient if turn.number - last.get(m, 0) >= self.view.policy.passes]
        if passed_over:
            model = min(passed_over, key=self.last_served)
        else:
            model = max(overdue, key=lambda m: (self.age(overdue[m]), m))
        return self.decide(model, reason, overdue[model])

    def _is_patient(self, head: Head) -> bool:
        """Whether it became overdue by waiting: urgent tasks are so from the start, and would go first for ever."""
        return head.priority is not Priority.URGENT and self.age(head) >= 1

    def last_served(self, model: str) -> tuple[int, str]:
        """A rank by last service: the model that has gone without it for longest comes first."""
        order = [m for m, _ in self.view.turn.served] if self.view.turn else []
        return (order.index(model) if model in order else -1, model)

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
        size_bytes = max(1, self.sizes[model])  # nothing is won by unloading another name of a model
        return (tasks + cost.rate_per_s * cost.load_s) * cost.load_s / size_bytes

    def _expires_in_load(self, head: Head) -> bool:
        """Whether a load would hardly help: it is the only one of its class, and over before its model is there.

        A guess does not decide that, or a model that loads faster than guessed would never be tried.
        """
        if head.expires_in_s is None or head.model in self.resident or head.count > 1:
            return False
        cost = self.view.costs[head.model]
        return not cost.load_is_guess and head.expires_in_s < cost.load_s

    def _fits(self, models: Iterable[str]) -> bool:
        models = frozenset(models)
        if self.view.max_resident is not None and len(models) > self.view.max_resident:
            return False
        return sum(self.sizes[m] for m in models) <= self.view.budget_bytes


_Best = tuple[float, str, frozenset[str]]
_Memo = dict[tuple[frozenset[str], frozenset[str]], _Best]
