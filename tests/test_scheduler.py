"""The rules of the scheduler one by one, and its promises on many random queues."""

import itertools
import math
import random
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import pytest

from edge_daemon.messages import Priority
from edge_daemon.scheduler import (
    FORGOTTEN_EVERY,
    SETTLE_SHARE,
    Cost,
    Decision,
    Head,
    Policy,
    Resident,
    Turn,
    View,
    advance,
    choose,
    credited,
    decayed_rate,
    estimate_wait,
    lacks_room,
    preempts,
    prefetch,
)

POLICY = Policy()
OVERDUE_S = POLICY.soft_wait_s[Priority.NORMAL] + 1
RANDOM_QUEUES = 10_000
PLAYED_QUEUES = 1_000
PLAYED_STEPS = (15, 15, 30, 30, 60, 150)


def head(seq: int, model: str, **fields: Any) -> Head:
    """A normal task that has waited 30 s and takes 5 s, unless told otherwise."""
    plain: dict[str, Any] = {"priority": Priority.NORMAL, "waited_s": 30.0, "run_s": 5.0, "count": 1}
    return Head(seq=seq, model=model, **(plain | fields))


def view(*heads: Head, resident: str = "", pinned: str = "", room: int = 1, **fields: Any) -> View:
    """Models ``a`` to ``f``, each of 100 bytes and 10 s to load; ``room`` of them fit."""
    given: dict[str, Any] = {
        "costs": {m: Cost(load_s=10.0, size_bytes=100, run_s=5.0, rate_per_s=0.01) for m in "abcdef"},
        "budget_bytes": 100 * room,
    }
    residents = tuple(Resident(model=m, size_bytes=100, idle_s=1.0, pinned=m in pinned) for m in resident)
    return View(heads=heads, resident=residents, **(given | fields))


def turn(model: str, used_s: float = 0.0, **fields: Any) -> Turn:
    """A turn whose load took 10 s and which has begun to serve its model, with the urgent credit full."""
    plain: dict[str, Any] = {"picks": 1, "load_s": 10.0, "urgent_credit_s": POLICY.urgent_burst_s}
    plain["served"] = ((model, fields.get("number", 0)),)
    return Turn(model=model, used_s=used_s, **(plain | fields))


def chosen(of: View) -> Decision:
    """The decision, which must be there."""
    decision = choose(of)
    assert decision is not None
    return decision


def test_an_empty_queue_has_no_decision() -> None:
    """Nothing waits, nothing is decided."""
    assert choose(view(resident="a")) is None


def test_a_resident_model_is_served_until_it_has_no_work() -> None:
    """The work of another model, however much, does not end a turn while nothing is overdue."""
    decision = chosen(view(head(1, "b", count=50), head(2, "a"), resident="a", turn=turn("a")))
    assert (decision.seq, decision.evict, decision.reason) == (2, (), "stay")


def test_the_plan_loads_what_frees_most_tasks_soonest() -> None:
    """Without work for resident models, three short tasks go before one, though it is older."""
    decision = chosen(view(head(1, "b"), head(2, "c", count=3), resident="a", turn=turn("a")))
    assert (decision.seq, decision.evict, decision.reason) == (2, ("a",), "plan")


def test_the_plan_keeps_in_memory_what_is_asked_for_often() -> None:
    """Two victims are equal but for the rate of their tasks: the rarer one goes."""
    plain = view(head(1, "c"), resident="ab", room=2, turn=turn("a"))
    for busy, rare in (("a", "b"), ("b", "a")):
        costs = {**plain.costs, rare: replace(plain.costs[rare], rate_per_s=0.001)}
        assert chosen(replace(plain, costs=costs)).evict == (rare,), busy


def test_the_plan_serves_what_fits_before_it_gives_up_a_model() -> None:
    """With room for both, nothing is unloaded."""
    assert chosen(view(head(1, "b"), resident="a", room=2, turn=turn("a"))).evict == ()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (300, {"c"}),  # one large model is enough, and spares the small ones
        (440, {"a", "c"}),
        (445, {"b", "c"}),  # a would be the first to go, and is not needed in the end
        (460, {"a", "b", "c"}),
    ],
)
def test_no_more_is_unloaded_than_needed(size: int, expected: set[str]) -> None:
    """Cheap models do not go in vain when a dear one has to go anyway."""
    sizes = {"a": 50, "b": 60, "c": 300}
    rates = {"a": 0.0, "b": 0.01, "c": 0.01, "d": 0.01}
    costs = {
        m: Cost(load_s=10.0, size_bytes=s, run_s=5.0, rate_per_s=rates[m]) for m, s in (sizes | {"d": size}).items()
    }
    residents = tuple(Resident(model=m, size_bytes=s, idle_s=1.0) for m, s in sizes.items())
    decision = chosen(View(heads=(head(1, "d"),), resident=residents, costs=costs, budget_bytes=500))
    assert set(decision.evict) == expected


def test_a_load_for_tasks_that_have_only_just_come_is_put_off() -> None:
    """A burst is seen whole before its first load begins, and a task that has waited is not put off again."""
    fresh = chosen(view(head(1, "b", waited_s=0.0), resident="a"))
    assert fresh.not_before_s == pytest.approx(SETTLE_SHARE * 10.0)
    assert chosen(view(head(1, "b", waited_s=1.0), resident="a")).not_before_s == 0
    assert chosen(view(head(1, "a", waited_s=0.0), resident="a")).not_before_s == 0


@pytest.mark.parametrize(
    ("used_s", "waited_s", "own_waited_s", "reason"),
    [
        (159.0, 9999.0, 0.0, "stay"),  # the load has not paid for itself
        (161.0, OVERDUE_S - 2, 0.0, "stay"),  # nothing is overdue
        (161.0, OVERDUE_S, 1.0, "overdue"),
        (161.0, 1000.0, 299.0, "stay"),  # not enough more overdue than the model's own
        (161.0, 1200.0, 299.0, "overdue"),
        (1279.0, 1000.0, 299.0, "stay"),
        (1281.0, 1000.0, 299.0, "overdue"),  # patience ends
    ],
)
def test_an_overdue_task_ends_a_turn_that_has_had_its_quantum(
    used_s: float, waited_s: float, own_waited_s: float, reason: str
) -> None:
    """A turn of 16 load times ends for a task that is 4 times as overdue, a turn of 128 for any that is overdue."""
    heads = head(1, "b", waited_s=waited_s), head(2, "a", waited_s=own_waited_s)
    decision = chosen(view(*heads, resident="a", turn=turn("a", used_s)))
    assert decision.reason == reason
    assert decision.evict == (("a",) if reason == "overdue" else ())


def test_in_a_deep_queue_a_little_more_overdue_is_enough() -> None:
    """With work of 40 load times waiting, a turn of 16 ends for a task that is 1.2 times as overdue."""
    late, own = head(1, "b", waited_s=2.6 * OVERDUE_S), head(2, "a", waited_s=2 * OVERDUE_S)
    for count, reason in ((70, "stay"), (80, "overdue")):  # of 5 s each; a load takes 10 s
        waiting = view(late, replace(own, count=count), resident="a", turn=turn("a", 161.0))
        assert chosen(waiting).reason == reason


@pytest.mark.parametrize(
    ("count", "priority", "waited_s", "reason"),
    [
        (100, Priority.NORMAL, 500.0, "stay"),
        (100, Priority.NORMAL, 510.0, "overdue"),
        (999, Priority.NORMAL, 4 * OVERDUE_S - 10, "stay"),
        (999, Priority.NORMAL, 4 * OVERDUE_S, "overdue"),  # four soft waits are the most
        (999, Priority.HIGH, 4 * OVERDUE_S - 10, "stay"),
        (999, Priority.LOW, OVERDUE_S, "overdue"),  # what comes later anyway makes nobody wait
    ],
)
def test_in_a_backlog_tasks_are_overdue_later(count: int, priority: Priority, waited_s: float, reason: str) -> None:
    """Not before they have waited for as long as the waiting work takes, that of higher priority included."""
    heads = head(1, "b", waited_s=waited_s), head(2, "a", waited_s=0.0, count=count, priority=priority)
    assert chosen(view(*heads, resident="a", turn=turn("a", 161.0))).reason == reason


def test_of_two_overdue_models_the_more_overdue_is_loaded() -> None:
    """But the one that was passed over for 8 turns goes first, and of two such the one that waits for longer."""
    heads = head(1, "b", waited_s=9000.0), head(2, "c", waited_s=OVERDUE_S)

    def loaded(**served: int) -> str:
        now = turn("a", number=9, served=tuple(sorted(served.items(), key=lambda item: item[1])))
        return chosen(view(*heads, resident="a", turn=now)).model

    assert loaded(c=2, b=8, a=9) == "b"
    assert loaded(c=1, b=8, a=9) == "c"
    assert loaded(c=0, b=1, a=9) == "c"
    assert loaded(b=1, a=9) == "c"  # it was never served


def test_a_loaded_model_first_serves_its_overdue_task() -> None:
    """What a load was forced for runs first, before shorter tasks of that or of another resident model."""
    heads = head(1, "b", waited_s=OVERDUE_S, run_s=60.0), head(2, "b", run_s=1.0), head(3, "a", waited_s=9000.0)
    for last, first in ((("b", 0), 1), (("b", 1), 3)):
        loaded = turn("b", picks=1, number=1, served=(("a", 0), last))
        assert chosen(view(*heads, resident="ab", room=2, turn=loaded)).seq == first


def test_every_second_pick_is_for_the_overdue() -> None:
    """Short tasks go before a long overdue one once, not twice."""
    plain = view(head(1, "a", waited_s=OVERDUE_S, run_s=90.0), head(2, "a", run_s=1.0), resident="a")
    picked = [chosen(replace(plain, turn=turn("a", picks=n))).seq for n in range(1, 7)]
    assert picked == [2, 1, 2, 1, 2, 1]


def test_every_ninth_pick_is_for_the_forgotten() -> None:
    """Of two resident models with overdue tasks, the younger ones are not starved by however many older ones."""
    heads = head(1, "a", waited_s=9000.0, count=999, run_s=1.0), head(2, "b", waited_s=4 * OVERDUE_S, run_s=90.0)
    plain = view(*heads, resident="ab", room=2)
    served = (("b", 0), ("a", 0))
    picked = [chosen(replace(plain, turn=turn("a", picks=n, served=served))).seq for n in range(1, 10)]
    assert picked == [1] * 8 + [2]
    assert chosen(replace(plain, turn=turn("a", picks=9, served=served[::-1]))).seq == 1


def test_within_a_model_short_important_and_old_tasks_go_first() -> None:
    """Aged weighted shortest first: each of the three can decide."""
    cases = [
        (head(1, "a", run_s=9.0), head(2, "a", run_s=3.0)),
        (head(1, "a"), head(2, "a", priority=Priority.HIGH)),
        (head(1, "a", priority=Priority.LOW), head(2, "a")),
        (head(1, "a", run_s=5.0), head(2, "a", run_s=9.0, waited_s=250.0)),
    ]
    for first, second in cases:
        assert chosen(view(first, second, resident="a", turn=turn("a"))).seq == 2


@pytest.mark.parametrize(
    ("credit_s", "expected"),
    [(10.0, (1, ("a",), "urgent")), (9.0, (2, (), "stay")), (-5.0, (2, (), "stay"))],
)
def test_an_urgent_task_may_swap_as_long_as_its_credit_pays(
    credit_s: float, expected: tuple[int, tuple[str, ...], str]
) -> None:
    """Without credit for a load of 10 s it waits for the quantum."""
    heads = head(1, "b", priority=Priority.URGENT, waited_s=0.0), head(2, "a")
    decision = chosen(view(*heads, resident="a", turn=turn("a", urgent_credit_s=credit_s)))
    assert (decision.seq, decision.evict, decision.reason) == expected


def test_an_urgent_task_of_a_resident_model_always_goes_first() -> None:
    """It needs no credit, and goes before an older urgent task that would have to load."""
    heads = head(1, "b", priority=Priority.URGENT), head(2, "a", priority=Priority.URGENT), head(3, "a", run_s=0.1)
    assert chosen(view(*heads, resident="a", turn=turn("a", urgent_credit_s=-9.0))).seq == 2


def test_an_urgent_task_without_credit_waits_for_the_quantum_only() -> None:
    """It is overdue from the start."""
    heads = head(1, "b", priority=Priority.URGENT, waited_s=0.0), head(2, "a")
    decision = chosen(view(*heads, resident="a", turn=turn("a", 161.0, urgent_credit_s=0.0)))
    assert (decision.seq, decision.reason) == (1, "overdue")


def test_urgent_tasks_without_credit_let_those_go_first_that_were_passed_over() -> None:
    """They are overdue from the start, and may come for ever; after a turn for the others they have theirs."""
    heads = head(1, "b", priority=Priority.URGENT), head(2, "c", waited_s=OVERDUE_S), head(3, "a")
    for last_of_c, model in ((1, "c"), (2, "b")):
        broke = turn("a", 161.0, number=9, served=(("c", last_of_c), ("a", 9)), urgent_credit_s=0.0)
        assert chosen(view(*heads, resident="a", turn=broke)).model == model


def test_a_load_longer_than_the_whole_credit_needs_all_of_it() -> None:
    """A large model is not shut out for ever, and its excess is owed."""
    plain = view(head(1, "b", priority=Priority.URGENT), head(2, "a"), resident="a")
    large = replace(plain, costs={**plain.costs, "b": Cost(load_s=200.0, size_bytes=100, run_s=5.0)})
    decision = chosen(replace(large, turn=turn("a")))
    assert decision.reason == "urgent"
    after = advance(turn("a"), decision, load_s=200.0, policy=POLICY)
    assert after.urgent_credit_s == POLICY.urgent_burst_s - 200.0
    assert chosen(replace(large, turn=turn("a", urgent_credit_s=59.0))).reason == "stay"


def test_urgent_swaps_take_their_share_of_time_and_no_more() -> None:
    """Whatever the queue, loads for urgent tasks stay within a quarter of the time and the saved-up burst."""
    now: Turn | None = None
    loading_s = total_s = 0.0
    resident = "a"
    for seq in range(400):
        other = "b" if resident == "a" else "a"
        heads = head(seq, other, priority=Priority.URGENT), head(1000 + seq, resident)
        decision = chosen(view(*heads, resident=resident, turn=now))
        load_s = 0.0 if decision.model == resident else 10.0
        now = advance(now, decision, load_s=load_s, run_s=5.0, policy=POLICY)
        loading_s += load_s if decision.reason == "urgent" else 0.0
        total_s += load_s + 5.0
        resident = decision.model
        assert loading_s <= POLICY.urgent_swap_share * total_s + POLICY.urgent_burst_s
    assert loading_s > 0.9 * POLICY.urgent_swap_share * total_s


def test_a_short_time_to_live_makes_a_task_overdue_at_half_of_it() -> None:
    """It gets the second pick while there is still time to run it."""
    plain = head(1, "a", waited_s=11.0, run_s=90.0, expires_in_s=10.0)
    shorter = head(2, "a", run_s=1.0, waited_s=0.0)
    assert chosen(view(plain, shorter, resident="a", turn=turn("a", picks=4))).seq == 1
    assert chosen(view(replace(plain, expires_in_s=50.0), shorter, resident="a", turn=turn("a", picks=4))).seq == 2


def test_a_task_that_expires_while_its_model_loads() -> None:
    """A load that can hardly help is not begun while there is other work, unless how long it takes is only guessed."""
    doomed, other = head(1, "b", expires_in_s=9.0), head(2, "a")
    assert chosen(view(doomed, other, resident="a")).model == "a"
    assert chosen(view(replace(doomed, priority=Priority.URGENT), other, resident="a")).model == "a"
    urgent = view(replace(doomed, priority=Priority.URGENT), other, resident="a")
    guessed = replace(urgent, costs={m: replace(cost, load_is_guess=True) for m, cost in urgent.costs.items()})
    assert chosen(guessed).model == "b"
    assert chosen(replace(urgent, heads=(replace(urgent.heads[0], count=2), other))).model == "b"
    assert chosen(replace(urgent, heads=(replace(urgent.heads[0], expires_in_s=11.0), other))).model == "b"


def test_a_task_that_may_expire_is_tried_when_there_is_nothing_else() -> None:
    """Or one slow load would keep its model from being tried again."""
    doomed = head(1, "b", expires_in_s=9.0)
    assert chosen(view(doomed, resident="a")).model == "b"


def test_a_lack_of_room_is_one_of_memory_not_of_time() -> None:
    """A model that nothing is loaded for since its task would expire meanwhile has room enough."""
    assert lacks_room(view(head(1, "b"), resident="a", pinned="a"))
    assert not lacks_room(view(head(1, "b", expires_in_s=9.0), resident="a"))
    assert not lacks_room(view(head(1, "a"), resident="a", room=0))


def test_a_pinned_model_is_never_unloaded() -> None:
    """A task that only a pinned model's room could serve is left alone, the rest goes on."""
    assert choose(view(head(1, "b"), resident="a", pinned="a")) is None
    assert chosen(view(head(1, "b", count=9), head(2, "a"), resident="a", pinned="a")).model == "a"
    assert chosen(view(head(1, "c"), resident="ab", pinned="a", room=2)).evict == ("b",)


def test_at_most_so_many_models_are_resident() -> None:
    """``max_resident`` counts like a lack of memory."""
    decision = chosen(view(head(1, "c"), resident="ab", room=9, max_resident=2))
    assert len(decision.evict) == 1


def test_a_model_that_another_client_loaded_is_given_up_first() -> None:
    """Nothing is known of it, so nothing is lost."""
    plain = view(head(1, "c"), resident="az", room=2)
    assert chosen(plain).evict == ("z",)


def test_prefetch_takes_only_the_room_of_idle_models() -> None:
    """Neither the running model, nor one with tasks waiting, nor a pinned one makes room."""
    waiting = head(1, "c"), head(2, "a")
    assert prefetch(view(*waiting, resident="a"), "a") is None
    assert prefetch(view(*waiting, head(3, "b"), resident="ab", room=2), "a") is None
    assert prefetch(view(*waiting, resident="ab", pinned="b", room=2), "a") is None
    found = prefetch(view(*waiting, resident="ab", room=2), "a")
    assert found is not None
    assert (found.model, found.evict) == ("c", ("b",))
    roomy = prefetch(view(*waiting, resident="a", room=2), "a")
    assert roomy is not None
    assert (roomy.model, roomy.evict) == ("c", ())


def test_nothing_is_loaded_on_a_guess() -> None:
    """Without a task waiting for it, no model is prefetched."""
    assert prefetch(view(head(1, "a"), resident="a", room=5), "a") is None


def test_only_an_urgent_task_that_may_run_preempts() -> None:
    """A running urgent task is left alone, and so is any when the swap cannot be paid."""
    urgent = head(1, "a", priority=Priority.URGENT)
    assert preempts(view(urgent, resident="a"), Priority.NORMAL)
    assert not preempts(view(urgent, resident="a"), Priority.URGENT)
    assert not preempts(view(head(1, "a", priority=Priority.HIGH), resident="a"), Priority.LOW)
    broke = view(replace(urgent, model="b"), resident="a", turn=turn("a", urgent_credit_s=0.0))
    assert not preempts(broke, Priority.NORMAL)


def test_the_estimate_counts_what_runs_before() -> None:
    """Work of the resident model, then one's own load, then shorter tasks of one's own model, then oneself."""
    waiting = view(head(1, "a", count=4), head(2, "b", run_s=1.0), resident="a", turn=turn("a"))
    assert estimate_wait(waiting, head(9, "b", waited_s=0.0, run_s=20.0)) == pytest.approx(4 * 5 + 10 + 1 + 20)
    assert estimate_wait(waiting, head(9, "a", waited_s=0.0, run_s=1.0)) == pytest.approx(1)
    assert estimate_wait(waiting, head(1, "a", count=2)) == pytest.approx(2 * 5)


def test_a_task_that_can_never_run_has_no_estimate() -> None:
    """Its model finds no room beside the pinned ones."""
    assert estimate_wait(view(resident="a", pinned="a"), head(1, "b")) is None


def test_a_turn_begins_with_a_load_and_grows_with_service() -> None:
    """The records after a load, a run, and both at once."""
    decision = Decision(seq=1, model="b", evict=(), reason="plan")
    loaded = advance(turn("a", 99.0, number=3, served=(("b", 2), ("a", 3))), decision, load_s=7.0, policy=POLICY)
    assert (loaded.model, loaded.used_s, loaded.picks, loaded.load_s) == ("b", 0.0, 1, 7.0)
    assert (loaded.number, loaded.served) == (4, (("b", 2), ("a", 3)))  # a load is no service yet
    ran = advance(loaded, decision, run_s=3.0, policy=POLICY)
    assert (ran.used_s, ran.picks, ran.load_s) == (3.0, 2, 7.0)
    assert (ran.number, ran.served) == (4, (("a", 3), ("b", 4)))
    at_once = advance(
        turn("a", 99.0, number=3, served=(("b", 2), ("a", 3))), decision, load_s=7.0, run_s=3.0, policy=POLICY
    )
    assert at_once == ran


def test_urgent_work_is_no_part_of_a_turn() -> None:
    """Swaps for urgent tasks neither begin a turn, which others would wait for, nor count as service."""
    before = turn("a", 99.0, number=3, served=(("b", 2), ("a", 3)))
    urgent = Decision(seq=1, model="b", evict=(), reason="urgent")
    after = advance(before, urgent, load_s=8.0, run_s=3.0, policy=POLICY)
    assert after == replace(before, used_s=102.0, urgent_credit_s=POLICY.urgent_burst_s - 8.0)


def test_urgent_credit_grows_while_nothing_is_done() -> None:
    """A turn brought forward has the credit that the time since its last advance has earned, up to the limit."""
    broke = turn("a", urgent_credit_s=-50.0)
    urgent = head(1, "b", priority=Priority.URGENT)
    for idle_s, is_enough in ((60.0, False), (3600.0, True)):
        rested = credited(broke, idle_s, policy=POLICY)
        assert rested.urgent_credit_s == min(POLICY.urgent_burst_s, -50.0 + 0.25 * idle_s)
        assert preempts(view(urgent, resident="a", turn=rested), Priority.NORMAL) is is_enough


def test_a_rate_forgets() -> None:
    """A steady stream is learnt as its own rate, and silence makes it fade."""
    rate = 0.0
    for _ in range(1000):
        rate = decayed_rate(rate, 20.0, arrivals=1)
    assert rate == pytest.approx(1 / 20, rel=0.02)
    assert decayed_rate(rate, 6000.0, arrivals=0) < rate / 1000


def random_view(rng: random.Random) -> View:
    """Any queue, any residency that keeps to its budget."""
    costs = {
        m: Cost(
            load_s=rng.uniform(1, 60),
            size_bytes=rng.randint(50, 300),
            run_s=rng.uniform(1, 30),
            rate_per_s=rng.choice([0.0, rng.uniform(0, 0.1)]),
        )
        for m in "abcdefgh"[: rng.randint(1, 8)]
    }
    budget = rng.randint(100, 900)
    residents: list[Resident] = []
    for model in rng.sample(sorted(costs), rng.randint(0, len(costs))):
        if sum(r.size_bytes for r in residents) + costs[model].size_bytes <= budget:
            pinned = rng.random() < 0.2
            residents.append(Resident(model=model, size_bytes=costs[model].size_bytes, idle_s=1.0, pinned=pinned))
    heads = tuple(
        Head(
            seq=seq,
            model=rng.choice(sorted(costs)),
            priority=rng.choice(list(Priority)),
            waited_s=rng.choice([0.0, rng.uniform(0, 4000)]),
            run_s=rng.uniform(0.1, 60),
            count=rng.randint(1, 50),
            expires_in_s=rng.choice([None, rng.uniform(0, 5000)]),
        )
        for seq in range(rng.randint(0, 12))
    )
    last = rng.choice(sorted(costs))
    begun = turn(last, rng.uniform(0, 5000), picks=rng.randint(0, 5), urgent_credit_s=rng.uniform(-50, 60))
    return View(
        heads=heads,
        resident=tuple(residents),
        costs=costs,
        budget_bytes=budget,
        turn=rng.choice([None, begun]),
        max_resident=rng.choice([None, max(1, len(residents)), len(residents) + 1]),
    )


def may_run(task: Head, of: View) -> bool:
    """Whether anything could be done for it: it is resident, or fits beside the pinned models."""
    if any(r.model == task.model for r in of.resident):
        return True
    pinned = [r for r in of.resident if r.pinned]
    room = of.budget_bytes - sum(r.size_bytes for r in pinned)
    if of.max_resident is not None and len(pinned) >= of.max_resident:
        return False
    return of.costs[task.model].size_bytes <= room


def test_promises_on_random_queues() -> None:
    """Pure, work-conserving, within budget, pinned models kept, no needless eviction, urgent first: 10,000 times."""
    rng = random.Random(3)  # noqa: S311
    for _ in range(RANDOM_QUEUES):
        of = random_view(rng)
        decision = choose(of)
        assert decision == choose(replace(of, costs={m: of.costs[m] for m in sorted(of.costs, reverse=True)}))
        runnable = [task for task in of.heads if may_run(task, of)]
        assert (decision is not None) == bool(runnable)
        if decision is None:
            continue
        assert any(task.seq == decision.seq and task.model == decision.model for task in of.heads)
        assert 0 <= decision.not_before_s <= SETTLE_SHARE * of.costs[decision.model].load_s
        check_room(of, decision.model, decision.evict)
        resident = {r.model for r in of.resident}
        urgent_now = [t for t in runnable if t.priority is Priority.URGENT and t.model in resident]
        assert not urgent_now or decision.seq in {task.seq for task in urgent_now}
        ahead = prefetch(of, decision.model)
        if ahead is not None and decision.model in resident:
            assert decision.model not in ahead.evict
            check_room(of, ahead.model, ahead.evict)


def check_room(of: View, model: str, evict: tuple[str, ...]) -> None:
    """``model`` fits after ``evict``, which are loose residents of which none could have stayed."""
    residents = {r.model: r for r in of.resident}
    assert set(evict) <= {m for m, r in residents.items() if not r.pinned}
    if model in residents:
        assert evict == ()
        return

    def fits(gone: set[str]) -> bool:
        stay = [r.size_bytes for m, r in residents.items() if m not in gone]
        few = of.max_resident is None or len(stay) < of.max_resident
        return few and sum(stay) + of.costs[model].size_bytes <= of.budget_bytes

    assert fits(set(evict))
    assert all(not fits(set(evict) - {victim}) for victim in evict)


@dataclass(slots=True)
class Waiting:
    """One task of a queue that is played."""

    seq: int
    model: str
    priority: Priority
    at_s: float
    run_s: float

    @property
    def key(self) -> tuple[str, Priority, int]:
        """Its class."""
        return self.model, self.priority, math.frexp(self.run_s)[1]


class Play:
    """A random queue that is worked off in virtual time: backlogs of any age and depth, and what comes meanwhile.

    Ages are real: a task that is older than another one stays so until it is run.
    """

    LONGEST_RUN_S = 20.0

    def __init__(self, rng: random.Random, policy: Policy) -> None:
        self.rng = rng
        self.policy = policy
        self.models = "abcde"[: rng.randint(2, 5)]
        self.room = rng.randint(1, min(3, len(self.models) - 1))
        self.costs = {m: Cost(load_s=rng.uniform(5, 20), size_bytes=100, run_s=5.0) for m in self.models}
        self.resident = rng.sample(self.models, self.room)
        self.now_s = 0.0
        self.queues: dict[tuple[str, Priority, int], deque[Waiting]] = {}
        self.state: Turn | None = None
        self.urgent_s = 0.0
        """Time that went into urgent tasks and the loads for them."""
        self.urgent_loads = 0
        self.overdue: dict[str, tuple[float, int, int]] = {}
        """Models with an overdue task: since when (without urgent time), in which turn, after how many urgent loads."""
        self.worst = 0.0
        """The longest wait of an overdue model as a share of its bound."""
        self.seqs = itertools.count()
        for model in self.models:
            oldest_s, longest_s = rng.choice([0.0, 600.0, 9_000.0]), rng.uniform(1, self.LONGEST_RUN_S)
            self.come(model, rng.choice([1, 3, 200]), since_s=oldest_s, longest_s=longest_s)
        self.hog = rng.choice([None, *self.models])
        """A model that is asked for more than can be done."""
        self.urgent_share = rng.choice([0.0, 0.3, 0.6])
        self.urgent_models = rng.choice([self.models, self.models[0]])

    def come(self, model: str, count: int, *, since_s: float, longest_s: float) -> None:
        """Tasks that came at any time since then."""
        priority = self.rng.choice([Priority.HIGH, Priority.NORMAL, Priority.LOW])
        for at_s in sorted(self.now_s - self.rng.uniform(0, since_s) for _ in range(count)):
            self.add(model, priority, at_s, self.rng.uniform(0.5, 1) * longest_s)

    def add(self, model: str, priority: Priority, at_s: float, run_s: float) -> None:
        """One task that came then."""
        task = Waiting(next(self.seqs), model, priority, at_s, run_s)
        self.queues.setdefault(task.key, deque()).append(task)

    def view(self) -> View:
        """What the scheduler sees."""
        heads = tuple(
            Head(seq=q[0].seq, model=m, priority=p, waited_s=self.now_s - q[0].at_s, run_s=q[0].run_s, count=len(q))
            for (m, p, _), q in self.queues.items()
            if q
        )
        residents = tuple(Resident(model=m, size_bytes=100, idle_s=1.0) for m in self.resident)
        return View(
            heads=heads,
            resident=residents,
            costs=self.costs,
            budget_bytes=100 * self.room,
            turn=self.state,
            policy=self.policy,
        )

    def step(self) -> None:
        """One decision, carried out."""
        view = self.view()
        self.note_overdue(view)
        decision = choose(view)
        if decision is None:
            self.now_s += 60.0
            return
        if decision.not_before_s:
            self.now_s += decision.not_before_s
            return
        load_s = run_s = 0.0
        if decision.model in self.resident:
            queue = next(q for q in self.queues.values() if q and q[0].seq == decision.seq)
            run_s = queue.popleft().run_s
        else:
            load_s = self.costs[decision.model].load_s
            self.resident = [m for m in self.resident if m not in decision.evict] + [decision.model]
        self.state = advance(self.state, decision, load_s=load_s, run_s=run_s, policy=self.policy)
        if self.hog:
            for _ in range(int((load_s + run_s) / 4)):
                self.add(self.hog, Priority.NORMAL, self.now_s, 5.0)
        self.now_s += load_s + run_s
        if decision.reason == "urgent":
            self.urgent_s += load_s + run_s
            self.urgent_loads += load_s > 0
        elif run_s:
            self.overdue.pop(decision.model, None)
        if self.rng.random() < self.urgent_share:
            self.add(self.rng.choice(self.urgent_models), Priority.URGENT, self.now_s, 2.0)

    def note_overdue(self, view: View) -> None:
        """Hold the bound against every model that has an overdue task and has had no service since."""
        turns = self.state.number if self.state else 0
        for h in view.heads:
            if h.priority is Priority.URGENT:
                continue
            if h.waited_s >= self.policy.deep_wait * self.policy.soft_wait_s[h.priority]:
                self.overdue.setdefault(h.model, (self.now_s - self.urgent_s, turns, self.urgent_loads))
        for model, (since_s, turn_then, swaps_then) in self.overdue.items():
            swaps = self.urgent_loads - swaps_then
            waited_s = self.now_s - self.urgent_s - since_s
            self.worst = max(self.worst, waited_s / self.bound_s(model, swaps))
            assert waited_s <= self.bound_s(model, swaps), "waits too long"
            assert turns - turn_then <= self.policy.passes + len(self.models) + swaps, "too many turns"

    def bound_s(self, model: str, urgent_swaps: int) -> float:
        """The turn that is on, as many as it may be passed over for, one of each other model, and its own load."""
        load_s = max(cost.load_s for cost in self.costs.values())
        served_s = load_s * self.policy.quantum_loads * self.policy.quanta + 2 * self.LONGEST_RUN_S
        turn_s = load_s + max(served_s, FORGOTTEN_EVERY * self.room * self.LONGEST_RUN_S)
        return turn_s * (self.policy.passes + len(self.models) + urgent_swaps) + self.costs[model].load_s


@pytest.mark.parametrize("part", range(10))
def test_the_starvation_bound_holds_on_random_queues(part: int) -> None:
    """From the moment that a model has an overdue task, it is served within the stated bound: 10,000 random queues.

    Each is played for 15 to 150 decisions, with short quanta, so that many turns fit into few steps.
    """
    rng = random.Random(f"queues {part}")  # noqa: S311
    for _ in range(PLAYED_QUEUES):
        policy = Policy(
            quantum_loads=rng.choice([0.5, 1.0, 2.0]),
            quanta=rng.choice([1.0, 2.0]),
            deep_loads=rng.choice([5.0, 50.0]),
            passes=rng.randint(1, 3),
        )
        play = Play(rng, policy)
        for _ in range(rng.choice(PLAYED_STEPS)):
            play.step()
