"""Floods: more tasks than can be taken, as fast as a broker hands them over, and results that nobody fetches.

figures = flood(directory, tasks=5_000, max_tasks=500)
assert figures.problems() == []
"""

import json
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self

from paho.mqtt.client import Client, MQTTMessage

from tests import needs
from tests.daemon import DaemonProcess, Listening, N
from tests.fake_ollama import FakeModel, FakeOllama
from tests.faults.oracle import usage
from tests.faults.table import Line, Options
from tests.mosquitto import Mosquitto
from tests.mqtt_client import MqttClient
from tests.waiting import wait_until

TASKS = 200_000
MAX_TASKS = 10_000
DEAD_S = 600.0
"""How long results have no subscriber."""
DEAD_PER_S = 10.0
MAX_GROWTH = 0.1
PAYLOAD_BYTES = 4_096
PUBLISHERS = 4
TASK_S = 2.0
"""How long a task of the flood runs."""
WORDS = 40
SAMPLE_S = 0.2
PAUSE_S = 0.5
"""Between two tasks of a device that is no part of the flood."""
MAX_RSS_FACTOR = 2.0
MAX_TWICE = 0.05
"""Refusals that may come twice, of all tasks: the connection is ended once when the broker hands over too much."""

BROKER = "max_queued_messages 0"

Key = tuple[str, str]
"""Sender and id of a task."""


class Ledger(MqttClient):
    """What became of each task, and how long the urgent ones beside the flood took."""

    def __init__(self, broker: Listening, **options: Any) -> None:
        self.ends: dict[Key, str] = {}
        """The state in which a task has ended, or the code of its refusal."""
        self.results: Counter[Key] = Counter()
        self.results_aside: dict[str, tuple[float, dict[str, Any]]] = {}
        """By id, those of the device that is no part of the flood: when heard, and what. Status messages may be dropped
        in a flood, results never."""
        self.online = threading.Event()
        super().__init__(broker.host, broker.port, **options)

    def sources(self) -> set[str]:
        """The senders of whom a task has ended."""
        return {src for src, _ in list(self.ends)}

    def __enter__(self) -> Self:
        super().__enter__()
        self.subscribe(f"{N}/reply/#")
        self.subscribe(f"{N}/availability")
        return self

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        levels = message.topic.removeprefix(f"{N}/").split("/")
        if message.topic == f"{N}/availability" and message.payload == b"online":
            self.online.set()
        if levels[0] != "reply" or levels[-1] not in ("status", "result"):
            return
        data = json.loads(message.payload)
        key = (levels[1], levels[2])
        if not _is_flood(key) and levels[-1] == "result":
            self.results_aside[key[1]] = (time.monotonic(), data)
        if levels[-1] == "result":
            self.ends[key] = data["error"]["code"] if data["state"] == "rejected" else data["state"]
            self.results[key] += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Aside:
    """An urgent task of a device that is no part of the flood."""

    state: str
    """In which it has ended."""
    accepted_s: float
    """From its publication until the daemon had accepted it, behind all that the broker had queued before it."""
    started_s: float
    """From its acceptance until it ran."""


@dataclass(slots=True, kw_only=True)
class Figures:
    """What a flood did."""

    tasks: int
    published_s: float = 0.0
    handled_s: float = 0.0
    """Until the last of them was answered or accepted."""
    ends: Counter[str] = field(default_factory=Counter)
    stored: int = 0
    answered_twice: int = 0
    idle_rss_bytes: int = 0
    peak_rss_bytes: int = 0
    asides: list[Aside] = field(default_factory=list)

    @property
    def rss_factor(self) -> float:
        """The highest RSS, in that of the idle daemon."""
        return self.peak_rss_bytes / self.idle_rss_bytes

    def problems(self) -> list[str]:
        """What must not be, in words."""
        accepted, refused = self.ends["succeeded"], self.ends["queue_full"]
        late = [aside.started_s for aside in self.asides if aside.started_s > TASK_S]
        failed = [aside.state for aside in self.asides if aside.state != "succeeded"]
        checks = [
            (accepted + refused != self.tasks, f"{self.tasks} tasks ended as {dict(self.ends)}"),
            (accepted != self.stored, f"{accepted} tasks succeeded, and {self.stored} are in the store"),
            (self.answered_twice > MAX_TWICE * self.tasks, f"{self.answered_twice} tasks were answered more than once"),
            (not refused, "nothing was refused: it was no flood"),
            (not self.asides, "no urgent task was tried"),
            (failed, f"{len(failed)} of {len(self.asides)} urgent tasks ended as {failed}"),
            (late, f"{len(late)} of {len(self.asides)} urgent tasks waited longer than a task runs: {late}"),
            (self.rss_factor > MAX_RSS_FACTOR, f"RSS rose to {self.rss_factor:.2f} times idle"),
        ]
        return [problem for wrong, problem in checks if wrong]

    def line(self, protocol: str) -> Line:
        """As a line of the table."""
        figures = "; ".join(f"{name}: {value}" for name, value in self.table()[1:])
        name = f"F18: a flood of {self.tasks} tasks of {PAYLOAD_BYTES} bytes, MQTT {protocol}"
        return Line(fault=name, result=figures, violations=self.problems())

    def table(self) -> list[tuple[str, str]]:
        """Names and values, for a person."""
        started = [aside.started_s for aside in self.asides] or [0.0]
        accepted = [aside.accepted_s for aside in self.asides] or [0.0]
        return [
            ("tasks", f"{self.tasks} of {PAYLOAD_BYTES} bytes, published in {self.published_s:.0f} s"),
            ("handled", f"in {self.handled_s:.0f} s, {self.tasks / self.handled_s:.0f} a second"),
            ("ends", ", ".join(f"{name}: {number}" for name, number in self.ends.most_common())),
            ("answered twice", str(self.answered_twice)),
            ("RSS idle, highest", f"{self.idle_rss_bytes / 1e6:.1f} MB, {self.peak_rss_bytes / 1e6:.1f} MB"),
            ("of idle", f"{self.rss_factor:.2f}"),
            ("urgent tasks meanwhile", str(len(self.asides))),
            ("from acceptance to start", f"median {statistics.median(started):.3f} s, worst {max(started):.3f} s"),
            ("in the broker before", f"median {statistics.median(accepted):.2f} s, worst {max(accepted):.2f} s"),
        ]


def flood(directory: Path, *, tasks: int, max_tasks: int, protocol: str = "5", qos: int = 1) -> Figures:
    """Send `tasks` from several processes at once to a daemon that takes `max_tasks`, and urgent ones beside them."""
    figures = Figures(tasks=tasks)
    with ExitStack() as stack:
        broker = Mosquitto(directory, extra=BROKER, verbose=False)
        broker.start()
        stack.callback(broker.kill)
        slow = FakeModel("slow", size_bytes=10**6, token_s=TASK_S / WORDS, answer=" ".join(["word"] * WORDS))
        fake = stack.enter_context(FakeOllama(FakeModel("small", size_bytes=10**6), slow))
        ledger = stack.enter_context(Ledger(broker))
        device = stack.enter_context(MqttClient(broker.host, broker.port))
        daemon = DaemonProcess(
            directory,
            broker,
            ollama_url=fake.url,
            mqtt={"protocol": protocol},
            queue={"max_tasks": max_tasks, "urgent_reserve": max(1, max_tasks // 100)},
        )
        stack.callback(daemon.kill)
        daemon.start(ready=False)
        assert ledger.online.wait(20), daemon.log()
        _ask(device, ledger, "first", "small")
        wait_until(lambda: ledger.ends.get(("aside", "first")))
        figures.idle_rss_bytes = usage(daemon.pid).rss_bytes
        with _sampled(daemon.pid) as rss, _asides(device, ledger) as asides:
            began = time.monotonic()
            _publish(broker, tasks, qos)
            figures.published_s = time.monotonic() - began
            _ask(device, ledger, "last", "small")
            wait_until(lambda: ledger.ends.get(("aside", "last")), timeout_s=60 + tasks / 100)
            figures.handled_s = time.monotonic() - began
        figures.asides = asides
        slow.token_s = 0.0
        wait_until(lambda: _ended(ledger) >= tasks, timeout_s=60 + max_tasks / 10)
        figures.peak_rss_bytes = max(rss)
        figures.ends = Counter(end for key, end in ledger.ends.items() if _is_flood(key))
        figures.answered_twice = sum(number > 1 for key, number in ledger.results.items() if _is_flood(key))
        assert daemon.stop(60) == 0
        figures.stored = sum(_is_flood((row.src, row.id)) for row in daemon.stored())
    return figures


def dead_subscriber(directory: Path, *, seconds: float, per_s: float) -> Line:
    """Have tasks answered while the one who reads the answers is away, and see whether it gets them all later."""
    with ExitStack() as stack:
        broker = Mosquitto(directory, extra="max_queued_messages 0", verbose=False)
        broker.start()
        stack.callback(broker.kill)
        fake = stack.enter_context(FakeOllama(FakeModel("small", size_bytes=10**6)))
        ledger = stack.enter_context(Ledger(broker))
        device = stack.enter_context(MqttClient(broker.host, broker.port))
        reader = Ledger(broker, client_id="reader", session_s=86_400)
        with reader:
            pass  # from now on the broker keeps what comes for it
        daemon = DaemonProcess(directory, broker, ollama_url=fake.url)
        stack.callback(daemon.kill)
        daemon.start(ready=False)
        assert ledger.online.wait(20), daemon.log()
        pause, began = threading.Event(), time.monotonic()
        sent = 0
        with _sampled(daemon.pid) as rss:
            while time.monotonic() < began + seconds:
                device.publish(f"{N}/task/flood/{sent}", "x" * PAYLOAD_BYTES)
                sent += 1
                pause.wait(max(0.0, began + sent / per_s - time.monotonic()))
            wait_until(lambda: _ended(ledger) == sent, timeout_s=60)
        heard_before = len(reader.ends)
        with Ledger(broker, client_id="reader", session_s=86_400) as late:
            with suppress(AssertionError):
                wait_until(lambda: _ended(late) == sent, timeout_s=60)
            delivered = _ended(late)
        assert daemon.stop(60) == 0
    first, last = rss[len(rss) // 10 : len(rss) // 5], rss[-len(rss) // 10 :]
    growth = statistics.median(last) / statistics.median(first) - 1
    checks = [
        (heard_before, f"{heard_before} results were heard before: the subscriber was not away"),
        (delivered != sent, f"{delivered} of {sent} results were delivered later"),
        (growth > MAX_GROWTH, f"RSS grew by {growth:.1%}"),
    ]
    return Line(
        fault=f"F18: results without a subscriber for {seconds / 60:.1f} minutes",
        result=f"{sent} results, {delivered} delivered later; RSS {statistics.median(first) / 1e6:.1f} MB, "
        f"at the end {statistics.median(last) / 1e6:.1f} MB ({growth:+.1%})",
        violations=[problem for wrong, problem in checks if wrong],
    )


def run(options: Options) -> Iterator[Line]:
    """Everything in its long form."""
    tasks = options.loops or TASKS
    share = tasks / TASKS
    for protocol in ("5", "3.1.1"):
        (directory := options.directory / protocol).mkdir()
        yield flood(directory, tasks=tasks, max_tasks=max(200, int(MAX_TASKS * share)), protocol=protocol).line(
            protocol
        )
    (directory := options.directory / "dead").mkdir()
    yield dead_subscriber(directory, seconds=max(5.0, DEAD_S * share), per_s=DEAD_PER_S)


def _is_flood(key: Key) -> bool:
    return key[0] != "aside"


def _ended(ledger: Ledger) -> int:
    return sum(map(_is_flood, list(ledger.ends)))


def _publish(broker: Mosquitto, tasks: int, qos: int) -> None:
    """Have every publisher send its share, a line each, and return when the broker has all."""
    threads = [
        threading.Thread(target=_feed, args=(broker, name, range(name, tasks, PUBLISHERS), qos))
        for name in range(PUBLISHERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _feed(broker: Mosquitto, name: int, numbers: range, qos: int) -> None:
    command = [needs.tool("mosquitto_pub", package="mosquitto-clients"), "-V", "5", "-q", str(qos), "-l"]
    address = ["-h", broker.host, "-p", str(broker.port), "-t", f"{N}/task/flood-{name}"]
    publisher = subprocess.Popen([*command, *address], stdin=subprocess.PIPE)
    assert publisher.stdin is not None
    with publisher.stdin as lines:
        for number in numbers:
            head = f'{{"id": "{number}", "model": "slow", "prompt": "'
            lines.write(f'{head}{"x" * (PAYLOAD_BYTES - len(head) - 2)}"}}\n'.encode())
    assert publisher.wait(600) == 0


def _ask(device: MqttClient, ledger: Ledger, name: str, model: str) -> Key:
    device.publish(f"{N}/task/aside/{name}", {"prompt": name, "model": model, "priority": "urgent"})
    return ("aside", name)


@contextmanager
def _asides(device: MqttClient, ledger: Ledger) -> Iterator[list[Aside]]:
    """Urgent tasks of another device, one after the other, while the block runs."""
    over = threading.Event()
    found: list[Aside] = []

    def ask() -> None:
        for number in count():
            if over.wait(PAUSE_S):
                return
            began = time.monotonic()
            key = _ask(device, ledger, str(number), "small")
            wait_until(partial(ledger.ends.get, key), timeout_s=600)
            ended_at, result = ledger.results_aside[key[1]]
            accepted_s = ended_at - result.get("total_s", 0.0) - began
            found.append(Aside(state=result["state"], accepted_s=accepted_s, started_s=result.get("queued_s", 0.0)))

    thread = threading.Thread(target=ask, name="asides", daemon=True)
    thread.start()
    yield found
    over.set()
    thread.join(60)


@contextmanager
def _sampled(pid: int) -> Iterator[list[int]]:
    """The RSS of a process, again and again, while the block runs."""
    over = threading.Event()
    samples = [usage(pid).rss_bytes]

    def sample() -> None:
        while not over.wait(SAMPLE_S):
            samples.append(usage(pid).rss_bytes)

    thread = threading.Thread(target=sample, name="sampler", daemon=True)
    thread.start()
    yield samples
    over.set()
    thread.join()
