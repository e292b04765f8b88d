"""Fuzzing of the door: payloads of good ones, bad ones and chance; each is answered, in little time and memory.

`Fuzz` gives payloads, `judge` hands them to an `Intake`, `through_broker` sends them to a whole daemon.
"""

import json
import random
import statistics
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_daemon import intake
from edge_daemon.clock import Clock
from edge_daemon.config import Config, Models, ModelSettings
from edge_daemon.errors import Rejected
from edge_daemon.intake import Intake, IntakeRules
from edge_daemon.messages import Accepted, Added, Incoming, Refused, Stored, Submission, TaskState
from edge_daemon.mqtt_bridge import Topics
from edge_daemon.sampling import OPTIONS
from tests import bad_input
from tests.daemon import DaemonProcess, N
from tests.fake_ollama import FakeModel, FakeOllama
from tests.faults.flood import Ledger
from tests.faults.table import Line, Options
from tests.mosquitto import Mosquitto
from tests.mqtt_client import MqttClient
from tests.waiting import wait_until

PAYLOADS = 100_000
THROUGH_BROKER = 20_000
TIMED = 2_000
WEIGHED = 200
SIZE = 65_536
MAX_P99_S = 0.05
MAX_MEMORY_BYTES = 10 * SIZE + 160 * intake.MAX_MEMBERS
"""Ten times the payload, and what as many members of JSON as are read at all take: an empty list has 56 bytes."""

TASKS: list[dict[str, Any]] = [
    {"prompt": "is 31 C hot?"},
    {
        "id": "evt-42",
        "prompt": "p",
        "priority": "high",
        "ttl_s": 60.5,
        "stream": True,
        "meta": {"room": [1, None, -0.5]},
    },
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hällo \U0001f600"}]},
    {"prompt": "p", "model": "small", "options": {"temperature": 0.5, "seed": 7, "stop": ["\n"], "num_predict": 9}},
    {"prompt": "p", "format": {"type": "object", "properties": {"a": {"enum": ["x", 1]}}, "required": ["a"]}},
    {"task_type": "sum", "model_name": "small", "prompt": "What is 2+2?", "reply_to": "reply/x", "system": "s"},
]
CORPUS = [*(json.dumps(task).encode() for task in TASKS), *(case.payload for case in bad_input.CASES)]
SPICE = [
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-0",
        b"9" * 400,
        b"1e-400",
        b"null",
        b"true",
        b'"',
        b"\\",
        b"\\ud800",
        b"\\u0000",
    ),
    *(
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\0",
        b"\x1b[2J",
        b"\r\n",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"[" * 500,
    ),
    *(
        b'"prompt":',
        b'"id":"a",',
        b'"options":{',
        b'"reply_to":"reply/',
        b'"format":{"type":',
        b"+/#",
        b"$SYS/",
        b"\xe2\x80\xae",
    ),
]

UNITS = [
    *(b"[", b"[],", b"[[]],", b'{"a":', b'"a":0,', b"1e-300,", b"\\u0041", b"\\ud83d\\ude00", b"\\", b" ", b"9", b"0,"),
    *(b'"",', b"word ", b'\\"'),
]
"""What makes a parser work hardest when there is much of it."""


class Fuzz:
    """Payloads that follow from a seed, none of them empty: an empty one is no task."""

    def __init__(self, seed: int | str) -> None:
        self._rng = random.Random(f"fuzz {seed}")  # noqa: S311  # reproducible on purpose

    def payloads(self, count: int) -> Iterator[bytes]:
        """So many of them."""
        makers = (
            self._mutated,
            self._mutated,
            self._mutated,
            self._structured,
            self._structured,
            self._noise,
            self._deep,
        )
        for _ in range(count):
            yield self._rng.choice(makers)() or b" "

    def large(self, size: int) -> bytes:
        """One of about `size` bytes, which is at its worst for a parser as often as it is ordinary."""
        rng = self._rng
        task = json.dumps(rng.choice(TASKS)).encode() + b","
        unit = rng.choice([*UNITS, task, rng.randbytes(9)])
        body = (unit * (size // len(unit) + 1))[: size - 30]
        return rng.choice([b'{"prompt":"%s"}', b'{"prompt":"p","meta":[%s0]}', b'{"prompt":"p",%s"z":0}', b"%s"]) % body

    def _mutated(self) -> bytes:
        """A known payload with a few bytes changed, cut, doubled, spiced or spliced with another."""
        rng = self._rng
        data = bytearray(rng.choice(CORPUS)[:4_000])
        for _ in range(rng.randint(1, 6)):
            at, length = rng.randint(0, len(data)), rng.randint(0, 8)
            match rng.randrange(5):
                case 0:
                    data[at : at + length] = rng.randbytes(length)
                case 1:
                    del data[at : at + length]
                case 2:
                    data[at:at] = data[at : at + 8 * length]
                case 3:
                    data[at:at] = rng.choice(SPICE)
                case _:
                    data[at:] = rng.choice(CORPUS)[:2_000][at:]
        return bytes(data)

    def _structured(self) -> bytes:
        """JSON with the keys of a task and values of any kind."""
        rng = self._rng
        keys = [*intake.FIELDS, "x", "__proto__"]
        data = {rng.choice(keys): self._value(3) for _ in range(rng.randint(0, 6))} | {"prompt": self._value(1)}
        return json.dumps(data, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")

    def _value(self, depth: int) -> Any:
        rng = self._rng
        kind = rng.randrange(8 if depth else 6)
        if kind < 3:
            return "".join(
                chr(rng.choice((rng.randrange(128), rng.randrange(0x11_0000)))) for _ in range(rng.randrange(12))
            )
        if kind == 3:
            return rng.choice([0, -1, 1, 2**31, 2**53, 2**63, -(2**70), 10**400, True, False, None])
        if kind == 4:
            return rng.choice([0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), rng.uniform(-9, 9)])
        if kind == 5:
            return rng.choice(["high", "json", "small", "reply/x", "a-1", "$SYS/x", "reply/#", "user"])
        if kind == 6:
            return [self._value(depth - 1) for _ in range(rng.randrange(4))]
        names = [*OPTIONS, "stop", "type", "role", "content", "enum", "properties"]
        return {rng.choice(names): self._value(depth - 1) for _ in range(rng.randrange(4))}

    def _noise(self) -> bytes:
        return self._rng.randbytes(self._rng.randrange(200))

    def _deep(self) -> bytes:
        rng = self._rng
        depth = rng.choice([10, 14, 15, 16, 17, 100, 990, 5_000])
        opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
        return b'{"prompt":"p","meta":' + opening * depth + b"1" + closing * rng.choice([depth, depth - 1]) + b"}"


def door() -> Intake:
    """The door with the shipped limits, and with a store that takes everything."""
    numbers = iter(range(1, 1 << 60))

    def take(batch: Sequence[Submission]) -> list[Added]:
        return [
            Added(
                outcome="new",
                stored=Stored(
                    seq=next(numbers), task=it.task, state=TaskState.QUEUED, attempt=0, preempted=0, accepted_at=0.0
                ),
                position=1,
            )
            for it in batch
        ]

    def check_model(name: str, _instead: Sequence[str] | None) -> tuple[str, ModelSettings]:
        if name not in ("default", "small"):
            raise Rejected("unknown_model", f"model: no {ascii(name)[:60]}")
        return name, ModelSettings(num_ctx=bad_input.NUM_CTX)

    rules = IntakeRules(
        config=Config(models=Models(default="default")),
        clock=Clock(),
        check_model=check_model,
        check_reply_to=lambda src, topic: Topics(N).check_reply_to(src, topic, ["reply/"]),
    )
    return Intake(rules, take, take)


def problem(door: Intake, payload: bytes) -> str | None:
    """What is wrong with the answer to one payload; None when it is one that can be published."""
    try:
        (answer,) = door.submit([Incoming(payload=payload, src="fuzz")])
        code = _code(answer)
        (answer.result if isinstance(answer, Refused) else answer.status).to_json().encode()
    except Exception as error:
        return f"{payload[:200]!r} raised {error!r}"
    good_id = intake.NAME.fullmatch(answer.address.id) is not None
    return None if code in bad_input.CODES | {"accepted"} and good_id else f"{payload[:200]!r} was told {code}"


def _code(answer: Accepted | Refused) -> str:
    if isinstance(answer, Accepted):
        return "accepted"
    return answer.result.error.code if answer.result.error else "nothing"


def judge(payloads: Iterator[bytes]) -> tuple[Counter[str], list[str]]:
    """How often each code was the answer, and everything that went wrong."""
    judge_of = door()
    told: Counter[str] = Counter()
    found = []
    for payload in payloads:
        wrong = problem(judge_of, payload)
        if wrong is not None:
            found.append(wrong)
        else:
            (answer,) = judge_of.submit([Incoming(payload=payload, src="fuzz")])
            told[_code(answer)] += 1
    return told, found


def times_s(payloads: Sequence[bytes], read: Callable[[bytes], object]) -> list[float]:
    """What it takes to read each of them, in order of size, without what others take meanwhile."""
    times = []
    for payload in payloads:
        began = time.thread_time()
        read(payload)
        times.append(time.thread_time() - began)
    return sorted(times)


def reader() -> Callable[[bytes], object]:
    """Reads a payload as one message of a sender."""
    of_one = door()
    return lambda payload: of_one.submit([Incoming(payload=payload, src="fuzz")])


def memory_bytes(payloads: Sequence[bytes]) -> list[int]:
    """The most memory that the reading of each of them takes at one time."""
    read = reader()
    peaks = []
    tracemalloc.start()
    try:
        for payload in payloads:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            read(payload)
            _, peak = tracemalloc.get_traced_memory()
            peaks.append(peak - before)
    finally:
        tracemalloc.stop()
    return peaks


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of payloads that went through a broker."""

    ends: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def through_broker(directory: Path, payloads: Sequence[bytes], *, protocol: str = "auto") -> Outcome:
    """Send each to a whole daemon under a sender's name of its own, and wait until all are answered."""
    outcome = Outcome()
    with ExitStack() as stack:
        broker = Mosquitto(directory, extra="max_queued_messages 0", verbose=False)
        broker.start()
        stack.callback(broker.kill)
        models = [FakeModel(name, size_bytes=10**6) for name in ("default", "small")]
        fake = stack.enter_context(FakeOllama(*models))
        ledger = stack.enter_context(Ledger(broker))
        device = stack.enter_context(MqttClient(broker.host, broker.port))
        daemon = DaemonProcess(
            directory,
            broker,
            ollama_url=fake.url,
            mqtt={"protocol": protocol},
            models={"default": "default", "defaults": {"num_ctx": bad_input.NUM_CTX}},
            queue={"max_tasks": 1_000_000},
        )
        stack.callback(daemon.kill)
        daemon.start(ready=False)
        assert ledger.online.wait(20), daemon.log()
        for number, payload in enumerate(payloads):
            device.send(f"{N}/task/fuzz-{number}", payload)
        device.publish(f"{N}/task/good/last", {"prompt": "a good one", "priority": "low"})
        wait_until(lambda: len(ledger.sources()) > len(payloads), timeout_s=60 + len(payloads) / 20)
        outcome.ends = Counter(ledger.ends.values())
        terminal = {state.value for state in TaskState if state.terminal} - {"rejected"}
        strange = {end: number for end, number in outcome.ends.items() if end not in bad_input.CODES | terminal}
        if strange:
            outcome.problems.append(f"answers that nobody may get: {strange}")
        if ledger.ends[("good", "last")] != "succeeded":
            outcome.problems.append("a good task after all of it was not served")
        if "Traceback" in daemon.log():
            outcome.problems.append(daemon.log()[daemon.log().index("Traceback") :][:2_000])
        if daemon.stop(60) != 0:
            outcome.problems.append("the daemon did not stop in good order")
    return outcome


def run(options: Options) -> Iterator[Line]:
    """Everything in its long form."""
    count = options.loops or PAYLOADS
    fuzz = Fuzz(options.seed)
    told, found = judge(fuzz.payloads(count))
    yield Line(fault=f"{count} fuzzed payloads at the door", result=_counts(told), violations=found)

    large = [fuzz.large(SIZE) for _ in range(TIMED)]
    times = times_s(large, reader())
    p99 = times[len(times) * 99 // 100]
    yield Line(
        fault=f"reading {TIMED} payloads of 64 kB",
        result=", ".join(
            f"{name} {time_s * 1e3:.1f} ms"
            for name, time_s in (("median", statistics.median(times)), ("p99", p99), ("worst", times[-1]))
        ),
        violations=[f"p99 is {p99 * 1e3:.1f} ms"] if p99 > MAX_P99_S else [],
    )
    peaks = sorted(memory_bytes(large[:WEIGHED]))
    yield Line(
        fault=f"the memory for reading {WEIGHED} of them",
        result=f"median {peaks[len(peaks) // 2] / SIZE:.1f} times the payload, worst {peaks[-1] / SIZE:.1f} times",
        violations=[f"{peaks[-1]} bytes for one payload"] if peaks[-1] > MAX_MEMORY_BYTES else [],
    )
    some = list(fuzz.payloads(min(count, THROUGH_BROKER)))
    for name, part in (("5", some[: len(some) // 2]), ("3.1.1", some[len(some) // 2 :])):
        (directory := options.directory / name).mkdir()
        outcome = through_broker(directory, part, protocol=name)
        yield Line(
            fault=f"{len(part)} fuzzed payloads through a broker, MQTT {name}",
            result=_counts(outcome.ends),
            violations=outcome.problems,
        )


def _counts(told: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in told.most_common())
