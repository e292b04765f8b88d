"""What no scheduler can beat: exact optima and lower bounds for a trace that is known in advance."""

import itertools
from collections.abc import Sequence

from benchmarks.traces import Model, Trace

Counts = tuple[int, ...]
Label = tuple[float, float]
"""(time, sum of flow times so far) of one way to get to a state."""


def optimal_mean_flow_s(trace: Trace, budget_bytes: int, *, load_ahead: bool) -> float:
    """The least mean flow time of ``trace``, whose work is constant per model.

    Order and idling are free. ``load_ahead`` also allows a load to start before a task for that model waits, which only
    a clairvoyant can do well. Dynamic programming over (tasks served per model, resident set): with constant work the
    tasks of one model are best served in their order (exchange argument), so the state need not say which ones. Of the
    ways to one state only those are kept that no other beats in both time and cost.
    """
    models = sorted({job.model for job in trace}, key=lambda model: model.name)
    releases = [[job.at_s for job in trace if job.model == model] for model in models]
    work_s = [next(job.run_s for job in trace if job.model == model) for model in models]
    load_s = [model.load_s for model in models]
    after = _residents_after(models, budget_bytes)
    layer: dict[tuple[Counts, int], list[Label]] = {((0,) * len(models), 0): [(0.0, 0.0)]}
    for _ in trace:
        following: dict[tuple[Counts, int], list[Label]] = {}
        for (served, mask), labels in layer.items():
            kept = _pareto(labels)
            for m, release in enumerate(releases):
                if served[m] == len(release):
                    continue
                released_s = release[served[m]]
                served_then = (*served[:m], served[m] + 1, *served[m + 1 :])
                setup_s = 0.0 if mask >> m & 1 else load_s[m]
                waits_s = released_s - (setup_s if load_ahead else 0.0)
                span_s = setup_s + work_s[m]
                ends = [(max(time_s, waits_s) + span_s, cost_s) for time_s, cost_s in kept]
                reached = [(end_s, cost_s + end_s - released_s) for end_s, cost_s in ends]
                for mask_then in after[mask, m]:
                    following.setdefault((served_then, mask_then), []).extend(reached)
        layer = following
    return min(cost_s for labels in layer.values() for _, cost_s in labels) / len(trace)


def least_makespan_s(trace: Trace, budget_bytes: int) -> float:
    """LB-c: from any moment on, what arrives later must be run, and all but what fits in memory loaded first.

    At the first moment memory is empty: everything is loaded once.
    """
    bound_s = 0.0
    for first, job in enumerate(trace):
        later = trace[first:]
        families = {j.model for j in later}
        best_kept_s = max(
            sum(model.load_s for model in kept)
            for size in range(len(families) + 1)
            for kept in itertools.combinations(sorted(families, key=lambda m: m.name), size)
            if sum(model.size_bytes for model in kept) <= budget_bytes and (first or not kept)
        )
        loads_s = sum(model.load_s for model in families) - best_kept_s
        bound_s = max(bound_s, job.at_s + sum(j.run_s for j in later) + loads_s)
        if first + 1 < len(trace) and trace[first + 1].at_s == trace[-1].at_s == job.at_s:
            break  # a backlog: no later moment can say more
    return bound_s


def least_loads(order: Sequence[Model], budget_bytes: int) -> int:
    """LB-e: the fewest loads for this very order of tasks, by dynamic programming over resident sets."""
    models = sorted(set(order), key=lambda model: model.name)
    after = _residents_after(models, budget_bytes)
    index = {model: i for i, model in enumerate(models)}
    loads = {0: 0}
    for model in order:
        following: dict[int, int] = {}
        for mask, count in loads.items():
            cost = count + (not mask >> index[model] & 1)
            for mask_then in after[mask, index[model]]:
                following[mask_then] = min(cost, following.get(mask_then, cost))
        loads = following
    return min(loads.values())


def _residents_after(models: Sequence[Model], budget_bytes: int) -> dict[tuple[int, int], list[int]]:
    """For each resident set and model: the sets that may be resident once the model is, none given up needlessly."""
    sizes = [model.size_bytes for model in models]

    def size(mask: int) -> int:
        return sum(s for i, s in enumerate(sizes) if mask >> i & 1)

    after = {}
    for mask, m in itertools.product(range(1 << len(models)), range(len(models))):
        if mask >> m & 1:
            after[mask, m] = [mask]
            continue
        fitting = [sub for sub in range(mask + 1) if sub & ~mask == 0 and size(sub | 1 << m) <= budget_bytes]
        after[mask, m] = [sub | 1 << m for sub in fitting if not any(sub != o and sub & ~o == 0 for o in fitting)]
    return after


def _pareto(labels: list[Label]) -> list[Label]:
    """The labels that no other one beats in both time and cost."""
    kept: list[Label] = []
    least_s = float("inf")
    for label in sorted(labels):
        if label[1] < least_s:
            kept.append(label)
            least_s = label[1]
    return kept
