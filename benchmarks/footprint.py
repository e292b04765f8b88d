"""How much memory the idle daemon takes and how soon it is ready, over an interpreter with the same imports."""

import subprocess
from pathlib import Path

import psutil

from benchmarks import rig
from benchmarks.table import Line, at_most, megabytes, milliseconds

OURS = "edge_daemon"
LISTED = f"""
import sys
import {OURS}.cli, {OURS}.config, {OURS}.main
found = {{name: module for name, module in sys.modules.items() if getattr(module, "__spec__", None)}}
print(*(name for name in found if name.partition(".")[0] != "{OURS}"))
"""
INTERPRETER = """
import os, signal, socket, sys
from importlib import import_module
for name in sys.argv[1:]:
    import_module(name)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
    sender.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\\0"))
signal.pause()
"""


def run(directory: Path, repetitions: int) -> list[Line]:
    """Start the daemon and the interpreter in turns; the first start of both is not counted."""
    modules = imported()
    ours, theirs = [], []
    with rig.broker(directory) as port, rig.ollama({"name": "small"}) as url:
        for _ in range(repetitions + 1):
            ours.append(_daemon(directory, port, url))
            theirs.append(interpreter(modules))
    against = f"an interpreter that imports the same {len(modules)} modules"
    return [
        Line(
            name="idle memory (RSS)",
            work="the daemon, connected, after its first telemetry",
            against=against,
            ours=[size_bytes for size_bytes, _ in ours[1:]],
            theirs=[size_bytes for size_bytes, _ in theirs[1:]],
            show=megabytes,
            aim=at_most(1.3),
        ),
        Line(
            name="start to READY=1",
            work="the daemon, on the queue file of the run before",
            against=against,
            ours=[ready_s for _, ready_s in ours[1:]],
            theirs=[ready_s for _, ready_s in theirs[1:]],
            show=milliseconds,
            aim=at_most(2.0),
        ),
    ]


def imported() -> list[str]:
    """The modules of others that the daemon imports at its start, in the order of their import."""
    listed = subprocess.run(rig.python("-c", LISTED), cwd=rig.ROOT, check=True, capture_output=True, text=True)
    return listed.stdout.split()


def _daemon(directory: Path, port: int, url: str) -> tuple[int, float]:
    sections = {"models": {"default": "small"}, "telemetry": {"interval_s": 1}}
    with (
        rig.daemon(directory, sections, port=port, ollama_url=url) as (process, ready_s),
        rig.Watcher(port) as watcher,
    ):
        watcher.subscribe(f"{rig.TOPICS}/telemetry")
        watcher.wait_for(f"{rig.TOPICS}/telemetry")
        size_bytes = rss(process)
        rig.stop(process)
    return size_bytes, ready_s


def interpreter(modules: list[str]) -> tuple[int, float]:
    """The memory of an interpreter that has imported ``modules``, in bytes, and the seconds that it took to start."""
    with rig.announced(rig.python("-c", INTERPRETER, *modules)) as (process, ready_s):
        return rss(process), ready_s


def rss(process: subprocess.Popen[bytes]) -> int:
    """Its memory in bytes."""
    size_bytes: int = psutil.Process(process.pid).memory_info().rss
    return size_bytes
