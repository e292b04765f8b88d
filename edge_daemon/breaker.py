"""A circuit breaker per model: one that keeps failing costs its own tasks only, and is tried again now and then."""

from collections.abc import Iterable
from dataclasses import dataclass

FIRST_REST_S = 0.5
LONGEST_REST_S = 900.0
TRIPS_AFTER = 3
"""So many failures in a row open the breaker: until then, the rests are pauses between attempts."""


@dataclass(frozen=True, slots=True)
class _Record:
    failures: int
    rests_until: float


class Breakers:
    """Who may be tried. After each failure in a row a model rests twice as long; a success forgets them all.

    When the rest of an open breaker is over it is half open: one task is the probe, and the next failure closes the
    door again for longer. Times are monotonic seconds.
    """

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def failed(self, model: str, now: float, *, weight: int = 1) -> float:
        """A try has failed. Returns the seconds that the model rests.

        ``weight`` is the number of failures that it counts as; with 0 the model rests, but its breaker does not open.
        """
        before = self._records[model].failures if model in self._records else 0
        failures = before + weight if weight else max(before, min(before + 1, TRIPS_AFTER - 1))
        rest_s = min(LONGEST_REST_S, FIRST_REST_S * 2.0 ** min(failures - 1, 16))
        if failures >= TRIPS_AFTER:
            rest_s = min(LONGEST_REST_S, 8 * rest_s)
        self._records[model] = _Record(failures, now + rest_s)
        return rest_s

    def succeeded(self, model: str) -> bool:
        """A try was good. Returns whether the breaker was open until now."""
        record = self._records.pop(model, None)
        return record is not None and record.failures >= TRIPS_AFTER

    def may_try(self, model: str, now: float) -> bool:
        """Whether it has rested long enough."""
        return model not in self._records or self._records[model].rests_until <= now

    def is_open(self, model: str) -> bool:
        """Whether it has failed too often in a row; also while half open."""
        return model in self._records and self._records[model].failures >= TRIPS_AFTER

    def next_try(self, models: Iterable[str], now: float) -> float | None:
        """Seconds until the first of ``models`` may be tried again; None when none of them rests."""
        rests = [record.rests_until - now for model in models if (record := self._records.get(model))]
        return min((rest for rest in rests if rest > 0), default=None)
