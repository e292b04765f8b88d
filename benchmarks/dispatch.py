"""What it costs to pick the next task, begin it and end it, however many wait, over huey taking one from its queue.

Each task that was taken is replaced by its like, so that the queues keep their length and their mixture.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter

from huey import SqliteHuey

from benchmarks.accept import PROMPT, open_huey, open_store, submission
from benchmarks.table import Aim, Line, at_most, milliseconds
from edge_daemon import scheduler
from edge_daemon.clock import Clock
from edge_daemon.messages import Priority, Result, Submission, TaskState
from edge_daemon.scheduler import Cost, Decision, Head, Resident, Turn, View
from edge_daemon.store import Store, Waiting

MODELS = tuple(f"model-{number}:latest" for number in range(8))
SIZE_BYTES = 10**9
COSTS = {model: Cost(load_s=10.0, size_bytes=SIZE_BYTES, run_s=5.0, rate_per_s=0.01) for model in MODELS}
RESIDENT = tuple(Resident(model=model, size_bytes=SIZE_BYTES, idle_s=1.0) for model in MODELS[:2])
TURN = Turn(
    model=MODELS[0], used_s=20.0, picks=4, load_s=10.0, number=1, served=tuple((model, 1) for model in MODELS[:2])
)
FLAT = at_most(1.5)
FILL = 1000
"""Tasks that are laid in together before the clock runs."""


def run(
    directory: Path, repetitions: int, *, sizes: tuple[int, ...] = (100, 10_000, 100_000), picks: int = 20
) -> list[Line]:
    """``picks`` per repetition from each queue in turns; huey's queue is as long as the longest."""
    with ExitStack() as opened:
        queues = [_Queue(opened.enter_context(open_store(directory / f"{size}.db")), size) for size in sizes]
        huey = _Huey(opened.enter_context(open_huey(directory / "huey.db")), sizes[-1])
        steps = [*(queue.decide for queue in queues), *(queue.cycle for queue in queues), huey.dequeue]
        medians = [_medians_s(steps, picks) for _ in range(repetitions)]
    columns = [list(column) for column in zip(*medians, strict=True)]
    decide, cycle, dequeue = columns[: len(sizes)], columns[len(sizes) : -1], columns[-1]
    few = f"the same with {sizes[0]} tasks waiting"
    lines = []
    for index, size in list(enumerate(sizes))[1:]:
        lines.append(_line("decision alone", size, few, decide[index], decide[0]))
        lines.append(_line("pick, claim and finish", size, few, cycle[index], cycle[0]))
    lines.append(
        _line("pick, claim and finish", sizes[-1], "huey's dequeue with as many", cycle[-1], dequeue, aim=None)
    )
    return lines


def _line(
    name: str, size: int, against: str, ours: list[float], theirs: list[float], *, aim: Aim | None = FLAT
) -> Line:
    return Line(
        name=f"{name}, {size:,} waiting",
        work=f"tasks for {len(MODELS)} models in {len(Priority)} priorities",
        against=against,
        ours=ours,
        theirs=theirs,
        show=milliseconds,
        aim=aim,
    )


def _medians_s(steps: Sequence[Callable[[], float]], picks: int) -> list[float]:
    """Of each step, when all take turns, in another order each time: what comes before matters to caches."""
    orders = random.Random(0)
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(picks):
        for index in orders.sample(range(len(steps)), len(steps)):
            times[index].append(steps[index]())
    return [median(those) for those in times]


class _Queue:
    """A store with ``size`` tasks waiting. Its methods return the seconds that they took."""

    def __init__(self, store: Store, size: int) -> None:
        self._store = store
        self._clock = Clock()
        self._names = itertools.count()
        classes = itertools.cycle(itertools.product(MODELS, Priority))
        tasks = [self._new(model, priority) for model, priority in itertools.islice(classes, size)]
        for begin in range(0, size, FILL):
            store.add_many(tasks[begin : begin + FILL])

    def _new(self, model: str, priority: Priority) -> Submission:
        return submission(f"t{next(self._names)}", model=model, priority=priority)

    def decide(self) -> float:
        """Choose among what is not urgent: all rules have to be gone through."""
        began_at = perf_counter()
        decision = self._choose(Priority.URGENT)
        took_s = perf_counter() - began_at
        assert decision is not None
        return took_s

    def cycle(self) -> float:
        """Choose, begin the task and end it."""
        began_at = perf_counter()
        decision = self._choose()
        assert decision is not None
        stored = self._store.claim(decision.seq)
        assert stored is not None
        task = stored.task
        self._store.finish(
            stored.seq, Result(id=task.id, src=task.src, seq=3, state=TaskState.SUCCEEDED, text=PROMPT, ts="")
        )
        took_s = perf_counter() - began_at
        self._store.add_many([self._new(task.model, task.priority)])
        return took_s

    def _choose(self, *without: Priority) -> Decision | None:
        now = self._clock.monotonic()
        heads = tuple(_head(waiting, now) for waiting in self._store.heads() if waiting.priority not in without)
        view = View(heads=heads, resident=RESIDENT, costs=COSTS, budget_bytes=2 * SIZE_BYTES, turn=TURN)
        return scheduler.choose(view)


def _head(waiting: Waiting, now: float) -> Head:
    return Head(
        seq=waiting.seq,
        model=waiting.model,
        priority=waiting.priority,
        waited_s=now - waiting.accepted_at,
        run_s=5.0,
        count=waiting.count,
        expires_in_s=waiting.expires_at - now,
    )


class _Huey:
    """huey with ``size`` tasks waiting."""

    def __init__(self, huey: SqliteHuey, size: int) -> None:
        self._storage = huey.storage
        rows = [(huey.name, PROMPT.encode(), 0)] * size
        with self._storage.db(commit=True) as cursor:  # one by one, each would wait for the disk
            cursor.executemany("INSERT INTO task (queue, data, priority) VALUES (?, ?, ?)", rows)

    def dequeue(self) -> float:
        """Take the next one, which deletes it."""
        began_at = perf_counter()
        data = self._storage.dequeue()
        took_s = perf_counter() - began_at
        self._storage.enqueue(data)
        return took_s
