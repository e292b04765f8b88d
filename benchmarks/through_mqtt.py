"""How fast tasks that come over MQTT are accepted, over the plainest loop that keeps the same promise.

The broker holds the tasks before the clock starts: the receiver is stopped while they are published, then let go. The
time ends when the last one is on the disk and said to be. The model takes for ever, as seen from here.
"""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client, MQTTMessage

from benchmarks import rig
from benchmarks.accept import PROMPT
from benchmarks.table import Line, at_least, per_second

BARE = "bare"


def run(directory: Path, repetitions: int, *, tasks: int = 500, windows: Sequence[int] = (20, 200)) -> list[Line]:
    """``tasks`` per repetition, with as many in flight as brokers send by default, and with more."""
    lines = []
    for window in windows:
        place = directory / str(window)
        place.mkdir()
        lines.append(_line(place, repetitions, tasks, window))
    return lines


def _line(directory: Path, repetitions: int, tasks: int, inflight: int) -> Line:
    """The daemon and the bare loop in turns; their first turn warms them up."""
    ours, theirs = [], []
    slow = {"name": "slow", "first_token_s": 3600}
    sections = {"models": {"default": "slow"}, "queue": {"max_tasks": 1_000_000}}
    bare_loop = rig.python("-m", "benchmarks.through_mqtt", str(directory / "bare.db"))
    with (
        rig.broker(directory, inflight=inflight) as port,
        rig.ollama(slow) as url,
        rig.daemon(directory, sections, port=port, ollama_url=url) as (daemon, _),
        rig.announced([*bare_loop, str(port)]) as (bare, _),
        rig.Watcher(port) as watcher,
    ):
        watcher.wait_for_daemon()
        for repetition in range(repetitions + 1):
            names = [f"{repetition}-{number}" for number in range(tasks)]
            ours.append(_daemon(watcher, daemon, names))
            theirs.append(_bare(watcher, bare, names))
        daemon.kill()
        daemon.wait(rig.PATIENCE_S)
    with closing(sqlite3.connect(directory / "data/queue.db")) as db:
        (accepted,) = db.execute("SELECT count(*) FROM tasks").fetchone()
    if accepted != tasks * (repetitions + 1):
        raise ValueError(f"{accepted} tasks are on the disk")
    return Line(
        name=f"durable accept rate over MQTT, {inflight} in flight",
        work=f"QoS 1 to PUBACK after the commit and status queued, {tasks} tasks of 300 bytes a time",
        against="paho, a row in SQLite (WAL, synchronous=FULL) and a PUBACK one by one",
        ours=ours[1:],
        theirs=theirs[1:],
        show=per_second,
        aim=at_least(2.0),
    )


def _daemon(watcher: rig.Watcher, process: subprocess.Popen[bytes], names: list[str]) -> float:
    last = f"{rig.TOPICS}/reply/bench/{names[-1]}/status"
    payload = json.dumps({"prompt": PROMPT}).encode()
    messages = [(f"{rig.TOPICS}/task/bench/{name}", payload) for name in names]
    return _rate(watcher, process, last, messages)


def _bare(watcher: rig.Watcher, process: subprocess.Popen[bytes], names: list[str]) -> float:
    payload = json.dumps({"prompt": PROMPT}).encode()
    messages = [*[(f"{BARE}/task", payload) for _ in names[1:]], (f"{BARE}/last", payload)]
    return _rate(watcher, process, f"{BARE}/done", messages)


def _rate(
    watcher: rig.Watcher, process: subprocess.Popen[bytes], last: str, messages: list[tuple[str, bytes]]
) -> float:
    """Messages a second, from the release of the stopped ``process`` until something comes on ``last``."""
    watcher.subscribe(last)
    process.send_signal(signal.SIGSTOP)
    watcher.publish_all(messages)
    began_at = time.perf_counter()
    process.send_signal(signal.SIGCONT)
    watcher.wait_for(last)
    return len(messages) / (time.perf_counter() - began_at)


# -- the bare loop, a process of its own -----------------------------------------------------------------------------


def bare_loop(path: str, port: int) -> None:
    """Commit what comes row by row, and acknowledge each after its commit."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE tasks (id INTEGER PRIMARY KEY, topic TEXT, payload BLOB)")

    def on_message(client: Client, _userdata: Any, message: MQTTMessage) -> None:
        db.execute("INSERT INTO tasks (topic, payload) VALUES (?, ?)", (message.topic, message.payload))
        client.ack(message.mid, message.qos)
        if message.topic == f"{BARE}/last":
            client.publish(f"{BARE}/done", b"", qos=1)

    client = rig.mqtt_client(port, client_id="bare", lasting=True)
    client.on_message = on_message
    rig.serve(client, f"{BARE}/task", f"{BARE}/last")


if __name__ == "__main__":
    bare_loop(sys.argv[1], int(sys.argv[2]))
