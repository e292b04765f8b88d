"""Crash points: the daemon ends at each named step of its source, starts again, and the oracle judges (F2).

The names are read from the source, so a new step is tried as soon as it is written. All are reached in one run:
it begins with what an earlier kill has left (`Remains`), asks for everything that leads through a step, and stops.
"""

import ast
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import edge_daemon
from edge_daemon.logger import COLUMNS
from edge_daemon.steps import CRASH_STATUS
from tests.daemon import N
from tests.fake_ollama import FakeModel, FakeOllama
from tests.faults.bench import WORDS, Bench
from tests.faults.table import Line, Options
from tests.waiting import wait_until

SOURCES = sorted(Path(edge_daemon.__file__).parent.glob("*.py"))
LONG = "x" * 340_000
"""Three such answers are what the store keeps; a fourth is one too many."""
SETTINGS: dict[str, Any] = {
    "pool": {"max_resident": 1},
    "queue": {"retention_bytes": 1 << 20},
    "csv": {"rotate_bytes": 65_536, "keep": 2},
}
"""Limits so small that a few tasks have models unloaded, the log rotated and the store pruned."""
PASSINGS = 4
"""So often each step is tried in the long form."""
FRESH = {"schema_made"}
"""Reached only where nothing was before."""


def named_in(text: str) -> Iterator[str]:
    """The name of every step in a source text; one that is not written out is an error."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "reached":
            match node.args:
                case [ast.Constant(value=str(name))]:
                    yield name
                case _:
                    raise AssertionError(f"write the name of the step out: {ast.unparse(node)}")


def steps(texts: Iterable[str] | None = None) -> list[str]:
    """The names of all steps of the daemon; a name that stands at two places is an error."""
    if texts is None:
        texts = (path.read_text(encoding="utf-8") for path in SOURCES)
    names = Counter(name for text in texts for name in named_in(text))
    twice = sorted(name for name, count in names.items() if count > 1)
    assert not twice, f"these steps stand at two places: {twice}"
    return sorted(names)


def models() -> FakeOllama:
    """One model that answers at once, one whose words take their time, one that says too much."""
    return FakeOllama(
        FakeModel("small", size_bytes=10**6),
        FakeModel("slow", size_bytes=10**6, token_s=0.02, answer=WORDS),
        FakeModel("long", size_bytes=10**6, answer=LONG),
    )


class Remains:
    """What a daemon leaves that was killed while it ran a task: a full store, a large log, and a torn row in it."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "remains"
        with models() as fake, Bench(directory, fake=fake, **SETTINGS) as bench:
            bench.daemon.start()
            for number in range(3):
                bench.recorder.publish(f"{N}/task/before/{number}", {"prompt": f"before {number}", "model": "long"})
                wait_until(lambda number=number: bench.recorder.end(("before", str(number))))  # type: ignore[misc]
            bench.recorder.publish(f"{N}/task/before/slow", {"prompt": "before slow", "model": "slow"})
            wait_until(lambda: bench.recorder.has_begun(("before", "slow")))
            bench.daemon.kill()
            with bench.daemon.csv_path.open("a", encoding="utf-8") as log:
                log.write(f'{"," * (len(COLUMNS) // 2)}"torn')
            shutil.copytree(bench.daemon.data_dir, self._path)

    def lay_out(self, data_dir: Path) -> None:
        """Put a copy where a daemon will find it."""
        shutil.copytree(self._path, data_dir)


def crash(step: str, directory: Path, remains: Remains, *, passing: int = 1) -> list[str] | None:
    """End the daemon at a step, start it again, let all settle; what is wrong then. None: it did not come by."""
    with models() as fake, Bench(directory, seed=step, fake=fake, **SETTINGS) as bench:
        bench.store_may_prune = True
        if step not in FRESH:
            remains.lay_out(bench.daemon.data_dir)
        bench.daemon.start(ready=False, env={"EDGE_LLM_CRASH_AT": f"{step}:{passing}"})
        _lead_through_all(bench)
        status = bench.daemon.wait()
        if status == 0:
            return None
        if status != CRASH_STATUS:
            return [f"{step}: the daemon ended with status {status}"]
        bench.daemon.start()
        return bench.verdict()


def _lead_through_all(bench: Bench) -> None:
    """Ask for everything that leads through a step, until the daemon ends or all is done; then stop it."""

    def wait(done: Callable[[], object]) -> None:
        wait_until(lambda: done() or not bench.daemon.is_alive(), 30)

    def all_answered() -> bool:
        return all(bench.recorder.end((it.src, it.id or "")) for it in bench.traffic.confirmed())

    bench.traffic.send(form="plain")
    bench.traffic.send(form="nonsense")
    bench.traffic.send(form="field", model="long")
    wait(lambda: bench.traffic.all_confirmed() and all_answered())
    bench.traffic.send(form="topic", model="slow", priority="low")
    wait(lambda: any(bench.recorder.has_begun((it.src, "t3")) for it in bench.traffic.confirmed()))
    bench.traffic.send(form="field", model="small", priority="urgent")
    wait(lambda: bench.traffic.all_confirmed() and all_answered())
    bench.daemon.signal(signal.SIGTERM)


def run(options: Options) -> Iterator[Line]:
    """Every step, at its first passings as far as one run comes by."""
    remains = Remains(options.directory)
    reached: Counter[str] = Counter()
    wrong: list[str] = []
    for step in steps():
        for passing in range(1, (options.loops or PASSINGS) + 1):
            directory = options.directory / f"{step}-{passing}"
            directory.mkdir()
            found = crash(step, directory, remains, passing=passing)
            if found is None:
                break
            reached[step] += 1
            wrong += found
        print(f"{step}: {reached[step]} kills", flush=True)
    missed = [f"{step} was not reached" for step in steps() if not reached[step]]
    yield Line(
        fault=f"F2: kills at each of {len(steps())} steps",
        result=f"{len(reached)} steps reached, {reached.total()} kills, at up to {PASSINGS} passings of each",
        violations=[*missed, *wrong],
    )
