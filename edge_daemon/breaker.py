"""A circuit breaker per model: one that keeps failing costs its own tasks only, and is tried again now and then."""

from collections.abc import Iterable
from dataclasses import dataclass

FIRST_REST_S = 0.5
LONGEST_REST_S = 900.0
LONGEST_PAUSE_S = 30.0
"""As long as the breaker is closed."""
TRIPS_AFTER = 3
"""So many failures in a row open the breaker: until then, the rests are pauses between attempts."""


@dataclass(frozen=True, slots=True)
class _Record:
    tries: int
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
        before = self._records.get(model, _Record(0, 0, now))
        failures, tries = before.failures + weight, before.tries + max(1, weight)
        rest_s = FIRST_REST_S * 2.0 ** min(tries - 1, 16)
        rest_s = min(LONGEST_REST_S, 8 * rest_s) if failures >= TRIPS_AFTER else min(LONGEST_PAUSE_S, rest_s)
        self._records[model] = _Record(tries, failures, now + rest_s)
        return rest_s

    def succeeded(self, model: str) -> bool:
        """A try was good. Returns whether the breaker was open until now."""
        record = self._records.pop(model, None)
        return record is not None and record.failures >= TRIPS_AFTER

    def may_try(self, model: str, now: float) -> bool:
        """Whether it has rested long enough."""
        record = self._records.get(model)
        return record is None or record.rests_until <= now

    def is_open(self, model: str) -> bool:
        """Whether it has failed too often in a row; also while half open."""
        record = self._records.get(model)
        return record is not None and record.failures >= TRIPS_AFTER

    def next_try(self, models: Iterable[str], now: float) -> float | None:
        """Seconds until the first of ``models`` may be tried again; None when none of them rests."""
        rests = [record.rests_until - now for model in models if (record := self._records.get(model))]
        return min((rest for rest in rests if rest > 0), default=None)
