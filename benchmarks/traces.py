"""Arrival traces T1 to T6: what is asked of which model, when. The same arguments give the same trace.

Times of work and of loading follow published measurements on a Raspberry Pi 4B: weights are read at about 40 MB/s from
the SD card, and each model has its rate of reading a prompt (prefill) and of writing an answer (decode).
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from edge_daemon.messages import Priority

READ_BYTES_PER_S = 40e6
LOAD_FLOOR_S = 0.05
RUNTIME_BYTES = 250_000_000
"""What a resident model needs beside its weights: context and compute buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A language model on the modelled board."""

    name: str
    file_bytes: int
    prefill_tps: float
    decode_tps: float

    @property
    def load_s(self) -> float:
        """Seconds of a cold load."""
        return self.file_bytes / READ_BYTES_PER_S + LOAD_FLOOR_S

    @property
    def size_bytes(self) -> int:
        """Memory while resident."""
        return self.file_bytes + RUNTIME_BYTES

    def run_s(self, prompt_tokens: float, output_tokens: float) -> float:
        """Seconds of one generation on the resident model."""
        return prompt_tokens / self.prefill_tps + output_tokens / self.decode_tps


FLEET = (
    Model(name="smollm2:360m", file_bytes=386_000_000, prefill_tps=58.0, decode_tps=8.07),
    Model(name="qwen2.5:0.5b", file_bytes=531_000_000, prefill_tps=56.0, decode_tps=6.55),
    Model(name="granite3-moe:1b", file_bytes=822_000_000, prefill_tps=24.0, decode_tps=11.39),
    Model(name="llama3.2:1b", file_bytes=808_000_000, prefill_tps=18.4, decode_tps=4.28),
)
BUDGETS = {1: 1_200_000_000, 2: 2_200_000_000}
"""Bytes for models, such that exactly one, or any two, of the fleet fit."""

_ZIPF = [rank**-1.2 for rank in range(1, len(FLEET) + 1)]
_CONSTANT_WORK_S = dict(zip((m.name for m in FLEET), (4.7, 5.5, 6.3, 11.0), strict=True))
_OUTPUT_CAP = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One task of a trace. The scheduler is told the prompt's length, never the answer's."""

    seq: int
    at_s: float
    model: Model
    prompt_tokens: float
    output_tokens: float
    priority: Priority = Priority.NORMAL

    @property
    def run_s(self) -> float:
        """Seconds that it will take once its model is resident."""
        return self.model.run_s(self.prompt_tokens, self.output_tokens)


Trace = tuple[Job, ...]


def steady(load: float, seed: int, *, hours: float = 2.0) -> Trace:
    """T1: gamma arrivals of shape 0.871, models by Zipf 1.2, lengths log-normal."""
    rng = random.Random(f"T1 {seed}")
    jobs = [_drawn(rng, model) for model in _models(rng, _count(load, hours))]
    return _paced(jobs, itertools.accumulate(rng.gammavariate(0.871, 1.0) for _ in jobs), load)


def bursty(load: float, seed: int, *, hours: float = 2.0) -> Trace:
    """T2: bursts of 20 tasks in the mean, heavy-tailed pauses; a task repeats its predecessor's model with 0.7."""
    rng = random.Random(f"T2 {seed}")
    jobs = [_drawn(rng, model) for model in _models(rng, _count(load, hours), sticky=0.7)]
    pause_s = 20 * _mean_work(jobs) / load / 6  # a Pareto of shape 1.2 has the mean 6 times its minimum

    def gap() -> float:
        return pause_s * rng.paretovariate(1.2) if rng.random() < 1 / 20 else rng.lognormvariate(-4.05, 1.5)

    return _paced(jobs, itertools.accumulate(gap() for _ in jobs), load)


def storm(load: float, seed: int, *, hours: float = 2.0) -> Trace:
    """T3: 40 devices, each with one model; all speak within 10 s of an event each 15 minutes, else alone."""
    rng = random.Random(f"T3 {seed}")
    devices = list(_models(rng, 40))
    horizon_s = 3600 * hours
    storms = [
        (event_s + 10 * rng.betavariate(3, 4), model)
        for event_s in range(450, int(horizon_s), 900)
        for model in devices
    ]
    mean_s = sum(m.run_s(30, 20) for m in devices) / len(devices)
    beats = max(0, round(load * horizon_s / mean_s) - len(storms))
    alone = [(rng.uniform(0, horizon_s), rng.choice(devices)) for _ in range(beats)]
    arrivals = sorted(storms + alone, key=lambda arrival: arrival[0])
    jobs = [_job(model, rng.randint(20, 40), rng.randint(8, 32)) for _, model in arrivals]
    return _paced(jobs, (at_s for at_s, _ in arrivals), load)


def backlog(seed: int = 0) -> Trace:  # noqa: ARG001  # same shape as the others; nothing here is random
    """T4: 200 tasks at once, four models by turns, constant work."""
    return tuple(replace(_constant(FLEET[i % 4]), seq=i + 1) for i in range(200))


def round_robin(seed: int = 0) -> Trace:  # noqa: ARG001
    """T5a: A B C A B C, each a load time after the one before: whoever follows the order loads for every task."""
    at_s = itertools.accumulate(FLEET[i % 3].load_s for i in range(300))
    return _numbered((_constant(FLEET[i % 3]) for i in range(300)), at_s)


def hog(seed: int) -> Trace:
    """T5b: for an hour one client asks model A for 1.2 times what the board can do; B gets one task a minute."""
    rng = random.Random(f"T5 {seed}")
    step_s = _CONSTANT_WORK_S[FLEET[0].name] / 1.2
    arrivals = [(i * step_s, FLEET[0]) for i in range(int(3600 / step_s))]
    arrivals += [(60.0 * i + rng.random(), FLEET[1]) for i in range(60)]
    arrivals.sort(key=lambda arrival: arrival[0])
    return _numbered((_constant(model) for _, model in arrivals), (at_s for at_s, _ in arrivals))


def exact(load: float, cv: float, seed: int, *, count: int = 28) -> Trace:
    """T6: few tasks of constant work per model, gamma gaps of the given coefficient of variation."""
    rng = random.Random(f"T6 {seed} {load} {cv}")
    jobs = [_constant(model) for model in _models(rng, count)]
    mean_gap_s = sum(w * s for w, s in zip(_ZIPF, _CONSTANT_WORK_S.values(), strict=True)) / sum(_ZIPF) / load
    shape = cv**-2
    return _numbered(jobs, itertools.accumulate(rng.gammavariate(shape, mean_gap_s / shape) for _ in jobs))


LONG: dict[str, Callable[[float, int], Trace]] = {"T1": steady, "T2": bursty, "T3": storm}
"""The traces that take a load and a seed."""


def _models(rng: random.Random, count: int, *, sticky: float = 0.0) -> Iterator[Model]:
    model = None
    for _ in range(count):
        if model is None or rng.random() >= sticky:
            model = rng.choices(FLEET, _ZIPF)[0]
        yield model


def _drawn(rng: random.Random, model: Model) -> Job:
    output = min(_OUTPUT_CAP, math.ceil(rng.lognormvariate(2.79, 0.847)))
    return _job(model, math.ceil(rng.lognormvariate(4.33, 0.985)), output)


def _constant(model: Model) -> Job:
    return _job(model, 0, _CONSTANT_WORK_S[model.name] * model.decode_tps)


def _job(model: Model, prompt_tokens: float, output_tokens: float) -> Job:
    return Job(seq=0, at_s=0.0, model=model, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def _count(load: float, hours: float) -> int:
    """How many tasks of mean length make ``load`` over the time given."""
    mean_s = sum(w * m.run_s(123, 23) for w, m in zip(_ZIPF, FLEET, strict=True)) / sum(_ZIPF)
    return int(load * hours * 3600 / mean_s + 0.5)


def _mean_work(jobs: list[Job]) -> float:
    return sum(job.run_s for job in jobs) / len(jobs)


def _paced(jobs: list[Job], at: Iterable[float], load: float) -> Trace:
    """The jobs at these times, stretched so that the work over the time is exactly ``load``."""
    at_s = list(at)
    stretch = sum(job.run_s for job in jobs) / load / at_s[-1]
    return _numbered(jobs, (moment * stretch for moment in at_s))


def _numbered(jobs: Iterable[Job], at: Iterable[float]) -> Trace:
    return tuple(replace(job, seq=i, at_s=at_s) for i, (job, at_s) in enumerate(zip(jobs, at, strict=True), start=1))
