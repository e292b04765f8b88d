"""What a model that always dies costs the tasks of the others: their 95th percentile, with and without it.

The product's worker, pool and store against a stand-in for Ollama whose loads and answers take the same time in every
run, so that what differs is the product's doing. Memory holds two of three models.
"""

import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles

from benchmarks.table import Line, at_most, milliseconds
from tests.fake_ollama import FakeModel, FakeOllama
from tests.rig import Rig

MB = 10**6
DIES = (500, "llama runner process has terminated: exit status 2")
LOAD_S = 0.15
WORD_S = 0.01
PROMPT = "five words for an answer"
GAP_S = 0.125
"""Between two tasks for the good models, in the mean; one takes 0.05 s."""


def run(directory: Path, repetitions: int, *, tasks: int = 400) -> list[Line]:
    """``tasks`` for two good models at random moments, and a quarter as many for a third: dying, good, or none."""
    waits: dict[str, list[float]] = {"dying": [], "good": [], "absent": []}
    for repetition in range(repetitions):
        for third, found in waits.items():
            found.append(_p95_s(directory / f"{third}-{repetition}.db", third, repetition, tasks))
    return [
        Line(
            name=f"p95 of others beside a dying model, over that {other}",
            work=f"{tasks} tasks for two models, {tasks // 4} for a third whose loads always die; memory holds two",
            against=peer,
            ours=waits["dying"],
            theirs=waits[key],
            show=milliseconds,
            aim=at_most(1.1),
        )
        for other, peer, key in (
            ("beside a good one", "the same tasks, and the third model loads and answers", "good"),
            ("without it", "the same tasks without those for the third model", "absent"),
        )
    ]


def _p95_s(path: Path, third: str, seed: int, tasks: int) -> float:
    chance = random.Random(f"breaker {seed}")
    moments = [(GAP_S * chance.expovariate(1), chance.choice("ab")) for _ in range(tasks)]
    models = [FakeModel(name, size_bytes=MB, ram_bytes=100 * MB, load_s=LOAD_S, token_s=WORD_S) for name in "abc"]
    with FakeOllama(*models, max_loaded=9) as fake:
        fake["c"].load_error = DIES if third == "dying" else None
        rig = Rig(path, fake)
        rig.start(budget_mb=250)
        try:
            return quantiles(_waits_s(rig, moments, third=third != "absent"), n=20)[-1]
        finally:
            rig.stop()


def _waits_s(rig: Rig, moments: Sequence[tuple[float, str]], *, third: bool) -> list[float]:
    clock, at_s = threading.Event(), time.monotonic()
    for number, (gap_s, model) in enumerate(moments):
        at_s += gap_s
        clock.wait(max(0.0, at_s - time.monotonic()))
        rig.submit(f"{number}", model=model, prompt=PROMPT)
        if third and number % 4 == 0:
            rig.submit(f"third-{number}", model="c", prompt=PROMPT)
    return [rig.result(f"{number}").total_s or 0.0 for number in range(len(moments))]
