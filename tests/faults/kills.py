"""`kill -9` at random times while devices ask (F1), in every fifth round of the broker too (F12).

The rounds in which only the daemon is killed are judged strictly: whatever the broker confirmed has come to something.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.bench import Bench
from tests.faults.table import Line, Options

LOOPS = 500
ROUND = 25
"""Kills between two judgements; each round has a broker, a store and a log of its own."""
LONGEST_S = 3.0
"""A daemon lives at most so long."""
BROKER_AWAY_S = 0.5
PER_S = 12.0
"""Tasks that devices send, in the mean."""
SETTLE_S = 180.0
DUPLICATES = 0.05
"""Results that may come again, of all."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What many rounds have come to."""

    kills: int = 0
    broker_kills: int = 0
    sent: int = 0
    accepted: int = 0
    results: int = 0
    published: int = 0
    duplicates: int = 0
    intact: int = 0
    unheard: int = 0
    lost_by_broker: int = 0
    violations: list[str] = field(default_factory=list)

    def line(self) -> Line:
        """As a line of the table."""
        share = self.duplicates / max(1, self.published)
        too_many = [f"{share:.1%} of the results came again"] if share > DUPLICATES else []
        with_broker = f", {self.broker_kills} of them with the broker" if self.broker_kills else ""
        return Line(
            fault=f"F1: {self.kills} kills of the daemon{with_broker}",
            result=f"{self.sent} tasks sent, {self.accepted} accepted, {self.results} results heard, "
            f"{self.published} published, {self.duplicates} of them again ({share:.1%}), "
            f"integrity ok {self.intact} times, "
            f"lost by the broker: {self.lost_by_broker} tasks, {self.unheard} results",
            violations=[*self.violations, *too_many],
        )


def run(options: Options) -> Iterator[Line]:
    """All rounds; one line for those of the daemon alone, one for those with the broker."""
    loops = options.loops or LOOPS
    alone, together = Tally(), Tally()
    for number in range(-(-loops // ROUND)):
        tally = together if number % 5 == 4 else alone
        directory = options.directory / f"round-{number}"
        directory.mkdir()
        kills = min(ROUND, loops - number * ROUND)
        play(directory, seed=f"{options.seed} {number}", kills=kills, broker_too=tally is together, tally=tally)
        print(f"round {number + 1}: {tally.line()}", *tally.violations, sep="\n", flush=True)
    for tally in (alone, together):
        if tally.kills:
            yield tally.line()


def play(directory: Path, *, seed: str, kills: int, broker_too: bool, tally: Tally) -> None:
    """One round: so many kills while devices ask, then the judgement."""
    with Bench(directory, seed=seed) as bench:
        bench.broker_may_lose = broker_too
        with bench.traffic.flowing(PER_S):
            for _ in range(kills):
                _kill_once(bench, broker_too=broker_too)
                tally.kills += 1
                tally.broker_kills += broker_too
                tally.intact += bench.daemon.integrity() == "ok"
        bench.daemon.start(ready=False)
        tally.violations += bench.verdict(SETTLE_S)
        evidence = bench.evidence()
    results = evidence.results()
    tally.sent += len(evidence.sent)
    tally.accepted += len(evidence.accepted())
    tally.results += sum(map(len, results.values()))
    tally.published += (evidence.published or Counter()).total()
    tally.duplicates += evidence.duplicates()
    tally.unheard += len(evidence.unheard())
    tally.lost_by_broker += len(evidence.lost_by_broker())


def _kill_once(bench: Bench, *, broker_too: bool) -> None:
    """Start the daemon and kill it at a random time, and in between the broker, which comes back."""
    moments: list[tuple[float, Callable[[], None]]] = [(bench.rng.uniform(0, LONGEST_S), bench.daemon.kill)]
    if broker_too:
        at_s = bench.rng.uniform(0, LONGEST_S)
        moments += [(at_s, bench.broker.kill), (at_s + bench.rng.uniform(0, BROKER_AWAY_S), bench.broker.start)]
    bench.daemon.start(ready=False)
    passed_s, pause = 0.0, threading.Event()
    for moment_s, act in sorted(moments, key=lambda it: it[0]):
        pause.wait(moment_s - passed_s)
        passed_s = moment_s
        act()
