"""What is known of each model: measured when it could be, guessed from its size until then."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from edge_daemon.scheduler import decayed_rate

# Measured on a Pi 4B: an SD card gives 40 MB/s, decoding reads 3.4 GB/s of weights, prefill is nine times as fast.
GUESSED_READ_BYTES_PER_S = 40e6
GUESSED_DECODE_BYTES_PER_S = 3.4e9
PREFILL_OVER_DECODE = 9.0
GUESSED_OUTPUT_TOKENS = 64.0
BELIEVED_PREFILL_OVER_DECODE = 40.0
"""Versions of Ollama that count a cached prompt as read tell of speeds beyond all measure."""
TRUSTED_LOADS = 4
TRUSTED_EXCESS = 1.25
KILLED_EXCESS = 1.25
"""A load that the kernel killed is taken to need so many times what was thought."""
NEWEST_WEIGHT = 0.3
"""Weight of the newest measurement in a running mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Running means of one model; 0 where nothing has been measured."""

    size_bytes: int = 0
    """Memory that it takes when resident."""
    loads: int = 0
    drop_bytes: float = 0.0
    """By how much a load lessens the memory that is available; others who take or free memory meanwhile blur it."""
    num_ctx: int = 0
    """The context for which these are; another takes other memory. 0: not noted."""
    load_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    output_tokens: float = 0.0
    output_tokens_by_type: Mapping[str, float] | None = None
    run_s: float = 0.0
    load_for: int | None = None
    """A load of it is on its way, for the task of this number; 0 when no task waits for it, None when there is none."""
    deaths: int = 0
    """So many loads in a row have ended with the daemon, or with the whole board."""


class Estimates:
    """Facts by model. Any thread may ask; the worker alone tells.

    Args:
        known: facts from earlier runs, as ``remember`` was given them.
        remember: keeps the facts of a model for later runs, if no power cut comes soon.
        make_last: has all that is to be remembered outlive a power cut; raises when it cannot.
    """

    def __init__(
        self,
        known: Mapping[str, Mapping[str, Any]],
        remember: Callable[[str, dict[str, Any]], None],
        make_last: Callable[[], object] = lambda: None,
    ) -> None:
        self._lock = threading.Lock()  # guards all of these
        self._facts = {model: _facts(data) for model, data in known.items()}
        self._disk_bytes: dict[str, int] = {}
        self._rates: dict[str, tuple[float, float]] = {}  # arrivals per second, and when that was brought up to date
        self._remember = remember
        self._make_last = make_last

    # -- asking

    def facts(self, model: str) -> Facts:
        """What was measured of ``model``."""
        with self._lock:
            return self._facts.get(model, Facts())

    def load_s(self, model: str) -> float:
        """Seconds to load it."""
        return self.facts(model).load_s or self._size(model) / GUESSED_READ_BYTES_PER_S

    def run_s(self, model: str, *, task_type: str | None, prompt_tokens: int, max_tokens: int) -> float:
        """Seconds to answer one task on the resident model."""
        facts, decode = self.facts(model), self._decode_per_s(model)
        by_type = facts.output_tokens_by_type or {}
        expected = by_type.get(task_type or "") or facts.output_tokens or GUESSED_OUTPUT_TOKENS
        return self.prefill_s(model, prompt_tokens) + min(expected, max_tokens) / decode

    def prefill_s(self, model: str, prompt_tokens: int) -> float:
        """Seconds to read a prompt."""
        rate = self.facts(model).prefill_tokens_per_s or self._decode_per_s(model) * PREFILL_OVER_DECODE
        return prompt_tokens / rate

    def _decode_per_s(self, model: str) -> float:
        return self.facts(model).decode_tokens_per_s or GUESSED_DECODE_BYTES_PER_S / max(self._size(model), 1)

    def mean_run_s(self, model: str) -> float:
        """Seconds of its mean task."""
        return self.facts(model).run_s or self.run_s(model, task_type=None, prompt_tokens=32, max_tokens=1 << 20)

    def rate_per_s(self, model: str, now: float) -> float:
        """How often a task for it arrives, lately; ``now`` in monotonic seconds."""
        with self._lock:
            return self._rate(model, now, arrivals=0)

    def _rate(self, model: str, now: float, *, arrivals: int) -> float:
        rate, at = self._rates.get(model, (0.0, now))
        return decayed_rate(rate, max(0.0, now - at), arrivals=arrivals)

    def _size(self, model: str) -> int:
        with self._lock:
            return self._disk_bytes.get(model) or self._facts.get(model, Facts()).size_bytes or 500_000_000

    # -- telling

    def set_disk_size(self, model: str, size_bytes: int) -> None:
        """The size of its file, from which all else is guessed."""
        with self._lock:
            self._disk_bytes[model] = size_bytes

    def arrived(self, model: str, now: float) -> None:
        """A task for it was accepted."""
        with self._lock:
            self._rates[model] = (self._rate(model, now, arrivals=1), now)

    def load_begins(self, model: str, task: int | None) -> None:
        """A load is about to be asked for. It may end us: the next run is to know of it, whatever comes.

        Raises whatever ``make_last`` does; then nothing has begun.
        """
        known = self.facts(model)
        self._learn(model, replace(known, load_for=task or 0))
        try:
            self._make_last()
        except Exception:
            self._learn(model, known)
            raise

    def load_ended(self, model: str) -> None:
        """It has ended in some way, and we have not."""
        if self.facts(model).load_for is not None:
            self._learn(model, replace(self.facts(model), load_for=None))

    def loads_that_ended_us(self) -> dict[str, int]:
        """The models that an earlier run was loading when it ended, with the task of each or 0. They are told once."""
        with self._lock:
            found = {model: facts for model, facts in self._facts.items() if facts.load_for is not None}
        for model, facts in found.items():
            self._learn(model, replace(facts, load_for=None, deaths=facts.deaths + 1))
        return {model: facts.load_for or 0 for model, facts in found.items()}

    def loaded(
        self, model: str, *, seconds: float, told_bytes: int, drop_bytes: int | None, at_most: int, num_ctx: int
    ) -> int:
        """A load was measured. Returns the memory that the model takes, as far as is known now.

        Ollama's own account is believed, unless the board's memory has told another story for several loads.

        Args:
            model: its name.
            seconds: what the load took.
            told_bytes: its memory by Ollama's account.
            drop_bytes: by how much the available memory fell; None when that could not be read.
            at_most: what the drop is believed up to. It fits, as has just been seen.
            num_ctx: the context it was loaded with, which the memory is for.
        """
        facts = self.facts(model)
        if facts.num_ctx not in (0, num_ctx):
            facts = replace(facts, loads=0, drop_bytes=0.0)
        loads, drop = facts.loads, facts.drop_bytes
        if drop_bytes is not None:
            loads, drop = loads + 1, _mean(drop, max(0, drop_bytes))
        size = told_bytes
        if loads >= TRUSTED_LOADS and drop > TRUSTED_EXCESS * told_bytes:
            size = max(told_bytes, min(at_most, int(drop)))
        load_s = _mean(facts.load_s, seconds)
        known = replace(facts, load_s=load_s, size_bytes=size, loads=loads, drop_bytes=drop, num_ctx=num_ctx, deaths=0)
        self._learn(model, known)
        return size

    def killed(self, model: str, predicted_bytes: int, *, at_most: int, num_ctx: int) -> None:
        """It was taken to need ``predicted_bytes`` with this context, and did not fit: it needs more.

        ``at_most`` is the memory that it could have if nothing else had any.
        """
        size = max(predicted_bytes, min(at_most, int(predicted_bytes * KILLED_EXCESS)))
        self._learn(model, replace(self.facts(model), size_bytes=size, num_ctx=num_ctx))

    def answered(
        self,
        model: str,
        *,
        task_type: str | None,
        prompt_tokens: int,
        prefill_s: float,
        output_tokens: int,
        decode_s: float,
        run_s: float,
    ) -> None:
        """A generation was measured."""
        facts = self.facts(model)
        by_type = dict(facts.output_tokens_by_type or {})
        if task_type and (task_type in by_type or len(by_type) < 64):
            by_type[task_type] = _mean(by_type.get(task_type, 0.0), output_tokens)
        # A prompt that was cached, or an answer of one token, says nothing of the rate.
        prefill = prompt_tokens / prefill_s if prompt_tokens >= 8 and prefill_s > 0 else facts.prefill_tokens_per_s
        decode = output_tokens / decode_s if output_tokens >= 4 and decode_s > 0 else facts.decode_tokens_per_s
        if decode > 0:
            prefill = min(prefill, BELIEVED_PREFILL_OVER_DECODE * decode)
        self._learn(
            model,
            replace(
                facts,
                prefill_tokens_per_s=_mean(facts.prefill_tokens_per_s, prefill),
                decode_tokens_per_s=_mean(facts.decode_tokens_per_s, decode),
                output_tokens=_mean(facts.output_tokens, output_tokens),
                output_tokens_by_type=by_type,
                run_s=_mean(facts.run_s, run_s),
            ),
        )

    def _learn(self, model: str, facts: Facts) -> None:
        with self._lock:
            self._facts[model] = facts
        self._remember(model, asdict(facts))


def _mean(old: float, new: float) -> float:
    return new if old == 0 else old + NEWEST_WEIGHT * (new - old)


def _facts(data: Mapping[str, Any]) -> Facts:
    known = {field.name for field in fields(Facts)}
    return Facts(**{name: value for name, value in data.items() if name in known})
