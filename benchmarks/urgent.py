"""How soon an urgent task is served while a long one is written, over the same on an idle daemon.

    python -m benchmarks.urgent [--tries 25]

The whole daemon, over MQTT, on the embedded model server with a real model. The long answer is one of 300 tokens at
temperature 0; it is interrupted at a random place, continued, and compared with the same answer left alone. The
urgent prompts are fresh ones of more than 50 tokens, so nothing of them has been read before.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import rig
from benchmarks.client import TimedClient
from benchmarks.table import Line, at_least, at_most, milliseconds
from edge_daemon.embedded import start_ollama

MODEL, OTHER = "smollm2:135m", "smollm2:other"
LONG_TOKENS = 300
URGENT_TOKENS = 4
STORIES = (
    "Write a long story about a lighthouse keeper and the sea.",
    "Explain in detail how a greenhouse is kept warm in winter, step by step.",
    "Write a long report on a storm in a small harbour town.",
    "Write a long letter of a sailor to his family about a year at sea.",
    "Tell the history of a small village in the mountains, with many names and dates.",
)
URGENT = (
    "Pump {a} runs at {b} C and its limit is {c} C, the tank beside it is {d} % full, the flow is {e} litres a minute,"
    " the valve to the second tank is closed and the alarm of the first one has been on for {f} minutes."
    " What should be done now?"
)
BUDGET_BYTES = 2 << 30
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class _Sent:
    name: str
    at: float


@dataclass(slots=True)
class Found:
    """What the tries gave. Times are from publishing to the first word."""

    idle_s: list[float] = field(default_factory=list)
    busy_s: list[float] = field(default_factory=list)
    cold_s: list[float] = field(default_factory=list)
    loads_s: list[float] = field(default_factory=list)
    equal: list[bool] = field(default_factory=list)
    token_shares: list[float] = field(default_factory=list)


def run(directory: Path, repetitions: int) -> list[Line]:
    """So many tries with the model resident, and a fifth as many with it out of memory."""
    return _lines(measure(directory, warm=repetitions, cold=max(2, repetitions // 5)))


def measure(directory: Path, *, warm: int, cold: int, tokens: int = LONG_TOKENS) -> Found:
    """``warm`` tries with the model of the urgent task resident, ``cold`` ones with it out of memory."""
    with (
        rig.broker(directory) as port,
        start_ollama(directory, aliases=[f"{OTHER}={MODEL}"], max_loaded=2) as server,
        rig.daemon(directory, _sections(), port=port, ollama_url=server.url),
        TimedClient(port) as client,
    ):
        bench = _Bench(client, tokens)
        for number in range(warm):
            bench.warm_try(STORIES[number % len(STORIES)])
        for number in range(cold):
            bench.cold_try(STORIES[number % len(STORIES)])
    return bench.found


def _sections() -> dict[str, Any]:
    limits = {"max_tokens": LONG_TOKENS, "num_ctx": 2048}
    # One model at a time: the model of the urgent task has to take the place of the one that is at work.
    return {
        "models": {"default": MODEL, "defaults": limits},
        "pool": {"memory_budget_bytes": BUDGET_BYTES, "memory_reserve_bytes": 0, "max_resident": 1},
    }


class _Bench:
    """The client's side."""

    def __init__(self, client: TimedClient, tokens: int) -> None:
        self.found = Found()
        self._tokens = tokens
        self._client = client
        self._random = random.Random(1)
        self._number = 0
        self._whole: dict[str, dict[str, Any]] = {}

    def warm_try(self, story: str) -> None:
        """Idle, then busy, both with the model resident."""
        if story not in self._whole:
            self._whole[story] = self._result(self._long(story))
        self.found.idle_s.append(self._first_word_s(self._urgent(MODEL)))
        interrupted = self._long(story)
        self._await_words(interrupted, self._random.randrange(20, self._tokens - 60))
        self.found.busy_s.append(self._first_word_s(self._urgent(MODEL)))
        self._compare(self._whole[story], self._result(interrupted))

    def cold_try(self, story: str) -> None:
        """Busy with another model than the urgent task asks for."""
        interrupted = self._long(story)
        self._await_words(interrupted, self._random.randrange(20, self._tokens - 60))
        urgent = self._urgent(OTHER)
        self.found.cold_s.append(self._first_word_s(urgent))
        self.found.loads_s.append(self._result(urgent)["load_s"])
        self._result(interrupted)

    def _long(self, story: str) -> _Sent:
        return self._send({"prompt": story, "options": {"temperature": 0, "num_predict": self._tokens}})

    def _urgent(self, model: str) -> _Sent:
        numbers = {key: self._random.randrange(100, 1000) for key in "abcdef"}
        options = {"temperature": 0, "num_predict": URGENT_TOKENS}
        return self._send(
            {"prompt": URGENT.format(**numbers), "model": model, "priority": "urgent", "options": options}
        )

    def _send(self, task: dict[str, Any]) -> _Sent:
        self._number += 1
        name = f"t{self._number}"
        return _Sent(name, self._client.send(name, {"stream": True, **task}))

    def _first_word_s(self, sent: _Sent) -> float:
        came_at, _ = self._client.wait(f"/{sent.name}/stream")
        return came_at - sent.at

    def _await_words(self, sent: _Sent, tokens: int) -> None:
        """Return when about ``tokens`` of it have come."""
        text = ""
        while len(text) < CHARACTERS_PER_TOKEN * tokens:
            text += json.loads(self._client.wait(f"/{sent.name}/stream")[1])["text"]

    def _result(self, sent: _Sent) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self._client.wait(f"/{sent.name}/result")[1])
        return result

    def _compare(self, whole: dict[str, Any], result: dict[str, Any]) -> None:
        if result["preempted"] != 1:
            raise AssertionError(f"{result['id']} was not interrupted")
        put_aside = [event["data"] for event in self._client.all("/event/task_put_aside")]
        lost = sum(data["lost_tokens"] for data in put_aside if data["id"] == result["id"])
        self.found.equal.append(result["text"] == whole["text"])
        self.found.token_shares.append((result["output_tokens"] + lost) / whole["output_tokens"])


def _lines(found: Found) -> list[Line]:
    tries = len(found.busy_s)
    return [
        Line(
            name="urgent while a long answer is written",
            work=f"published to first word, {tries} fresh prompts of 50 tokens or more, model resident",
            against="the same on an idle daemon",
            ours=found.busy_s,
            theirs=found.idle_s,
            show=milliseconds,
            aim=at_most(2.0),
        ),
        Line(
            name="urgent, its model not resident",
            work="the same with another model at work, which has to leave memory",
            against="its load, and the first word on an idle daemon with the model resident",
            ours=found.cold_s,
            theirs=[load_s + median(found.idle_s) for load_s in found.loads_s],
            show=milliseconds,
            aim=at_most(1.0),
        ),
        Line(
            name="tokens generated for the interrupted task",
            work=f"at {tries} random places, those thrown away included",
            against="the same answer left alone",
            ours=found.token_shares,
            theirs=[1.0] * tries,
            show=lambda share: f"{share:.3f}",
            aim=at_most(1.05),
        ),
        Line(
            name="interrupted answers equal to those left alone",
            work=f"temperature 0, {LONG_TOKENS} tokens, {sum(found.equal)} of {tries}",
            against="all",
            ours=[sum(found.equal) / tries],
            theirs=[1.0],
            show=lambda share: f"{share:.0%}",
            aim=at_least(0.9),
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.urgent", description=__doc__)
    parser.add_argument("--tries", type=int, default=25)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as directory:
        for line in run(Path(directory), parser.parse_args(arguments).tries):
            print(line)


if __name__ == "__main__":
    main()
