"""What the daemon adds to a task on a warm model, over the two things that nobody can do without.

Those are a message there and back through the broker, and a call of Ollama. Each message and each task is sent only
when the one before has been answered.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import requests
from paho.mqtt.client import Client, MQTTMessage

from benchmarks import rig
from benchmarks.accept import append_and_sync
from benchmarks.table import Line, at_most, milliseconds

PROMPT = "Pump 3 runs at 31 C, its limit is 45 C. Is that too hot? Answer with one word."
ANSWER = "No."
SLOW_S = 1.0
ECHO = "echo"
COMMITS = 3
"""How often a task has to be on the disk before the next step, between its coming and its answer."""


def run(directory: Path, repetitions: int, *, tasks: int = 40, slow_tasks: int = 2) -> list[Line]:
    """``tasks`` to a model that answers at once and ``slow_tasks`` to one that takes its time, per repetition."""
    models = ({"name": "quick", "answer": ANSWER}, {"name": "slow", "answer": ANSWER, "first_token_s": SLOW_S})
    sections = {"models": {"default": "quick"}}
    with (
        rig.broker(directory) as port,
        rig.ollama(*models) as url,
        rig.announced(rig.python("-m", "benchmarks.latency", str(port))),
        rig.daemon(directory, sections, port=port, ollama_url=url),
        rig.Watcher(port) as watcher,
    ):
        watcher.wait_for_daemon()
        watcher.subscribe(f"{rig.TOPICS}/reply/+/+/result")
        watcher.subscribe(f"{ECHO}/back")
        rounds = _Rounds(watcher, url, directory / "raw")
        return [
            *rounds.lines("quick", 0.0, repetitions, tasks),
            *rounds.lines("slow", SLOW_S, repetitions, slow_tasks),
        ]


class _Rounds:
    """Tasks, echoes, direct calls and writes to the disk in turns."""

    def __init__(self, watcher: rig.Watcher, url: str, raw: Path) -> None:
        self._watcher = watcher
        self._url = url
        self._raw = raw
        self._sent = 0

    def lines(self, model: str, own_s: float, repetitions: int, tasks: int) -> list[Line]:
        """Medians per repetition, less the ``own_s`` that the answer itself takes. The first round warms up."""
        added, parts, disk = [], [], []
        self._round(model)
        for _ in range(repetitions):
            rounds = [self._round(model) for _ in range(tasks)]
            task_s, echo_s, call_s, commits_s = (median(column) for column in zip(*rounds, strict=True))
            added.append(task_s - own_s)
            parts.append(echo_s + call_s - own_s)
            disk.append(commits_s)
        line = Line(
            name=f"added latency, the model takes {own_s:g} s",
            work=f"task published to result received, {tasks} a time, less the model's own time",
            against="a QoS 1 echo and requests.post(/api/chat)",
            ours=added,
            theirs=parts,
            show=milliseconds,
            aim=at_most(1.5),
        )
        against = f"the same and {COMMITS} times 4 KiB and fdatasync: accepted, begun, ended"
        both = [part + commits for part, commits in zip(parts, disk, strict=True)]
        return [line, replace(line, name=f"{line.name}, durably", against=against, theirs=both, aim=None)]

    def _round(self, model: str) -> tuple[float, float, float, float]:
        self._sent += 1
        task = json.dumps({"prompt": PROMPT, "model": model}).encode()
        return (
            _seconds(lambda: self._ask(f"client/{self._sent}", task)),
            _seconds(lambda: self._there_and_back(f"{ECHO}/to", f"{ECHO}/back", task)),
            _seconds(lambda: _call(self._url, model)),
            _seconds(lambda: append_and_sync(self._raw, COMMITS)),
        )

    def _ask(self, name: str, task: bytes) -> None:
        result = self._there_and_back(f"{rig.TOPICS}/task/{name}", f"{rig.TOPICS}/reply/{name}/result", task)
        if json.loads(result)["text"] != ANSWER:
            raise ValueError(f"not the answer: {result!r}")

    def _there_and_back(self, topic: str, back: str, payload: bytes) -> bytes:
        self._watcher.publish(topic, payload)
        return self._watcher.wait_for(back)


def _seconds(step: Callable[[], object]) -> float:
    began_at = time.perf_counter()
    step()
    return time.perf_counter() - began_at


def _call(url: str, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "stream": True}
    with requests.post(f"{url}/api/chat", json=body, stream=True, timeout=rig.PATIENCE_S) as response:
        lines = [json.loads(line) for line in response.iter_lines()]
    if not lines[-1]["done"]:
        raise ValueError(f"no whole answer: {lines}")


# -- the echo, a process of its own ----------------------------------------------------------------------------------


def echo(port: int) -> None:
    """Send back whatever comes."""

    def on_message(client: Client, _userdata: Any, message: MQTTMessage) -> None:
        client.publish(f"{ECHO}/back", message.payload, qos=1)

    client = rig.mqtt_client(port)
    client.on_message = on_message
    rig.serve(client, f"{ECHO}/to")


if __name__ == "__main__":
    echo(int(sys.argv[1]))
