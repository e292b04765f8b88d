"""What the daemon costs a board that has nothing to do: memory, wake-ups, writes; beside a bare MQTT subscriber.

The wake-ups are the daemon's own count from its telemetry, because threads that have ended are in it. The writes are
counted by strace at a second daemon that runs at the same time: to be traced costs wake-ups.
"""

import csv
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import footprint, rig
from benchmarks.table import Line, at_most, megabytes

SETTLED_S = 60.0
"""After a start there is something to do still."""
INTERVAL_S = 30.0
"""Of telemetry, as it is by default."""
LIMIT_PER_S = 2.0
"""Context switches of all threads of the daemon together."""
SYNCS = "fsync,fdatasync,sync_file_range,syncfs,sync,msync"
SUBSCRIBER = """
import sys
from benchmarks import rig
rig.serve(rig.mqtt_client(int(sys.argv[1])), "nothing/#")
"""


@dataclass(frozen=True, slots=True)
class _Counts:
    """Until some moment, ``at_s`` of the daemon's life."""

    at_s: float
    daemon_switches: int
    subscriber_switches: int
    traced_rows: int


def run(directory: Path, minutes: float, *, settled_s: float = SETTLED_S, interval_s: float = INTERVAL_S) -> list[Line]:
    """One quiet stretch for all of them, which begins ``settled_s`` after their starts."""
    sections = {"models": {"default": "small"}, "telemetry": {"interval_s": interval_s}}
    traced_directory, modules = directory / "traced", footprint.imported()
    traced_directory.mkdir()
    with (
        rig.broker(directory) as port,
        rig.ollama({"name": "small"}) as url,
        rig.announced(rig.python("-c", SUBSCRIBER, str(port))) as (subscriber, _),
        rig.announced(rig.python("-c", footprint.INTERPRETER, *modules)) as (interpreter, _),
        rig.daemon(traced_directory, {**sections, "node": "traced"}, port=port, ollama_url=url) as (traced, _),
        rig.daemon(directory, sections, port=port, ollama_url=url) as (daemon, _),
        rig.Watcher(port) as watcher,
    ):
        watcher.subscribe(f"{rig.TOPICS}/telemetry")

        def counts(after_s: float) -> _Counts:
            """At the first telemetry that is so old."""
            sample = {"uptime_s": -1.0}
            while sample["uptime_s"] < after_s:
                sample = json.loads(watcher.wait_for(f"{rig.TOPICS}/telemetry"))["daemon"]
            at_s, switches = sample["uptime_s"], int(sample["context_switches"])
            return _Counts(at_s, switches, _switches(subscriber.pid), _rows(traced_directory))

        began = counts(settled_s)
        with _traced(traced.pid, directory / "strace") as calls:
            ended = counts(began.at_s + minutes * 60)
        memory = [float(footprint.rss(process)) for process in (daemon, interpreter)]
    return _lines(began, ended, memory, syncs=len(calls), modules=len(modules))


def _lines(began: _Counts, ended: _Counts, memory: list[float], *, syncs: int, modules: int) -> list[Line]:
    passed_s = ended.at_s - began.at_s
    rate = (ended.daemon_switches - began.daemon_switches) / passed_s
    bare_rate = (ended.subscriber_switches - began.subscriber_switches) / passed_s
    rows = ended.traced_rows - began.traced_rows
    work = f"{passed_s / 60:.1f} minutes with nothing to do but {rows} samples of telemetry"
    switches = Line(
        name="idle context switches, all threads",
        work=work,
        against=f"{LIMIT_PER_S:g} a second",
        ours=[rate],
        theirs=[LIMIT_PER_S],
        show=_rate,
        aim=at_most(1.0),
    )
    return [
        Line(
            name="idle memory (RSS)",
            work=work,
            against=f"an interpreter that imports the same {modules} modules",
            ours=memory[:1],
            theirs=memory[1:],
            show=megabytes,
            aim=at_most(1.3),
        ),
        switches,
        replace(switches, against="a bare paho subscriber (loop_forever)", theirs=[bare_rate], aim=None),
        Line(
            name="idle fsyncs",
            work=work,
            against="the rows of telemetry, and the one before them, which may come to the disk in that time",
            ours=[syncs],
            theirs=[rows + 1],
            show=_count,
            aim=at_most(1.0),
        ),
    ]


def _switches(pid: int) -> int:
    """Of all threads that the process has now."""
    statuses = [(task / "status").read_text(encoding="utf-8") for task in Path(f"/proc/{pid}/task").iterdir()]
    lines = [line for status in statuses for line in status.splitlines() if "ctxt_switches" in line]
    return sum(int(line.split()[1]) for line in lines)


def _rows(directory: Path) -> int:
    """How often telemetry stands in the log."""
    with (directory / "data/llm_metrics.csv").open(newline="", encoding="utf-8") as file:
        return sum(row["record"] == "telemetry" for row in csv.DictReader(file))


@contextmanager
def _traced(pid: int, output: Path) -> Iterator[list[str]]:
    """The calls by which a process brings something to the disk; complete when the block has ended."""
    program = shutil.which("strace")
    if program is None:
        raise FileNotFoundError("strace is missing: apt-get install strace")
    calls: list[str] = []
    command = [program, "-f", "-qq", "-e", f"trace={SYNCS}", "-e", "signal=none", "-o", str(output), "-p", str(pid)]
    with rig.child(command, stderr=subprocess.DEVNULL) as tracer:
        yield calls
        tracer.send_signal(signal.SIGINT)
        tracer.wait(rig.PATIENCE_S)
        calls += [line for line in output.read_text(encoding="utf-8").splitlines() if "resumed>" not in line]


def _rate(rate: float) -> str:
    return f"{rate:.2f}/s"


def _count(count: float) -> str:
    return f"{count:.0f}"
