"""The bench: a broker, a model server, a daemon, devices that ask and a recorder that hears everything.

with Bench(tmp_path, seed=1) as bench:
bench.daemon.start()
bench.traffic.send(30)
...                                  # whatever goes wrong
assert bench.verdict() == []         # all settles, a fresh task succeeds, the oracle finds nothing
"""

import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from paho.mqtt.client import Client, MQTTMessage

from tests.daemon import NODE, DaemonProcess, Listening, N, Watcher
from tests.fake_ollama import FakeModel, FakeOllama
from tests.faults.oracle import Evidence, Heard, Key, Sent, read_log, violations
from tests.mosquitto import Mosquitto
from tests.mqtt_client import V5, V311, MqttClient
from tests.waiting import wait_until

SETTLE_S = 60.0
DEVICES = 4
BROKER = "persistence true\nautosave_on_changes true\nautosave_interval 1\nmax_queued_messages 0"
"""What keeps a broker's promises over a kill, as far as it can."""
FORMS = {"topic": 8, "field": 4, "plain": 4, "anonymous": 4, "anonymous plain": 4, "nonsense": 1}
"""How a task may be published, with the weight of each: its id in the topic, a field, or nowhere; JSON or text."""
WORDS = " ".join(f"word{n}" for n in range(20))


def models() -> list[FakeModel]:
    """One that answers at once, one that has to be loaded, one that takes a fifth of a second."""
    return [
        FakeModel("small", size_bytes=10**6),
        FakeModel("other", size_bytes=10**6, load_s=0.1),
        FakeModel("slow", size_bytes=10**6, token_s=0.01, answer=WORDS),
    ]


@contextmanager
def repeated(act: Callable[[], None], pause_s: Callable[[], float]) -> Iterator[None]:
    """Do this in a thread of its own, after each of the pauses, while the block runs."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(pause_s()):
            act()

    thread = threading.Thread(target=repeat, name=act.__name__, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Recorder(Watcher):
    """Keeps every status and result, also over its own and the broker's absences."""

    def __init__(self, broker: Listening) -> None:
        self._heard: list[Heard] = []
        self._accepted: dict[Key, None] = {}
        self._ended: dict[Key, str] = {}
        self._events: list[str] = []
        self._queue: dict[str, Any] = {}
        super().__init__(broker, client_id="recorder", session_s=3600)

    @property
    def heard(self) -> list[Heard]:
        """Every status and result so far, in order."""
        with self._changed:
            return list(self._heard)

    @property
    def events(self) -> list[str]:
        """The types of all events so far."""
        with self._changed:
            return list(self._events)

    def end(self, key: Key) -> str | None:
        """The state in which a task has ended, as its result told."""
        return self._ended.get(key)

    def ended(self) -> int:
        """How many tasks have ended."""
        return len(self._ended)

    def has_begun(self, key: Key) -> bool:
        """Whether a task was said to run."""
        return any(it.key == key and it.data["state"] == "running" for it in self.heard)

    def is_idle(self) -> bool:
        """Whether the daemon said last that nothing waits, runs or is to be sent."""
        with self._changed:
            queue = self._queue
        return bool(queue) and not (any(queue["waiting"].values()) or queue["running"] or queue["unsent"])

    def open(self) -> set[Key]:
        """Tasks that were accepted and have no result yet."""
        with self._changed:
            return self._accepted.keys() - self._ended.keys()

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        levels = message.topic.removeprefix(f"{N}/").split("/")
        with self._changed:
            if levels == ["queue"]:
                self._queue = json.loads(message.payload)
            if levels[0] == "event":
                self._events.append(levels[1])
            if levels[0] == "reply" and levels[-1] in ("status", "result"):
                self._note(Heard(key=(levels[1], levels[2]), kind=levels[3], data=json.loads(message.payload)))
            self._changed.notify_all()

    def _note(self, heard: Heard) -> None:
        self._heard.append(heard)
        if heard.kind == "result":
            self._ended[heard.key] = heard.data["state"]
        elif heard.data["state"] == "queued":
            self._accepted[heard.key] = None
            if self._ended.get(heard.key) == "rejected":  # by a daemon that was stopping; it has come again since
                del self._ended[heard.key]


@dataclass(frozen=True, slots=True)
class _Posted:
    sent: Sent
    device: MqttClient
    number: int


class Traffic:
    """Devices that ask, by turns over MQTT 5 and 3.1.1, in every form that a task may have."""

    def __init__(self, broker: Listening, rng: random.Random) -> None:
        self._rng = rng
        self._posted: list[_Posted] = []
        self._devices = [
            MqttClient(broker.host, broker.port, client_id=f"device-{n}", session_s=3600, version=(V5, V311)[n % 2])
            for n in range(DEVICES)
        ]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for device in self._devices:
                stack.enter_context(device)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def send(self, count: int = 1, *, form: str | None = None, **fields: Any) -> None:
        """Publish so many tasks, in one of `FORMS` or in any; `fields` are those of a task in JSON.

        A `prompt` among them must be given to no other task.
        """
        for _ in range(count):
            self._post(form or self._rng.choices(list(FORMS), list(FORMS.values()))[0], fields)

    @contextmanager
    def flowing(self, per_s: float) -> Iterator[None]:
        """Publish tasks at random moments, so many a second in the mean, while the block runs."""
        with repeated(self.send, lambda: self._rng.expovariate(per_s)):
            yield

    def all_confirmed(self) -> bool:
        """Whether the broker has acknowledged all that was published."""
        return all(it.device.is_confirmed(it.number) for it in self._posted)

    def confirmed(self) -> list[Sent]:
        """The tasks that the broker has acknowledged."""
        return [it.sent for it in self._posted if it.device.is_confirmed(it.number)]

    def _post(self, form: str, fields: Mapping[str, Any]) -> None:
        number = len(self._posted)
        which = self._rng.randrange(DEVICES)
        src, task_id = f"device-{which}", f"t{number}"
        prompt = str(fields.get("prompt", f"reading {number}"))
        task: dict[str, Any] = {"prompt": prompt, "model": self._rng.choices(["small", "other", "slow"], [8, 1, 1])[0]}
        task |= {"priority": self._rng.choice(["urgent", "high", "normal", "low"]), **fields}
        topic, payload = {
            "topic": (f"{src}/{task_id}", json.dumps(task)),
            "field": (src, json.dumps(task | {"id": task_id})),
            "plain": (f"{src}/{task_id}", prompt),
            "anonymous": (src, json.dumps(task)),
            "anonymous plain": (src, prompt),
            "nonsense": (f"{src}/{task_id}", '{"prompt": ' + prompt),
        }[form]
        known_id = None if form.startswith("anonymous") else task_id
        sent = Sent(src=src, id=known_id, prompt=prompt, is_bad=form == "nonsense")
        device = self._devices[which]
        self._posted.append(_Posted(sent, device, device.send(f"{N}/task/{topic}", payload)))


class ModelServer(Protocol):
    """A stand-in for Ollama, in this process or in one of its own; a `with` block starts and stops it."""

    @property
    def url(self) -> str:
        """Where it listens."""

    def __enter__(self) -> object:
        """Start it."""

    def __exit__(self, *_: object) -> None:
        """Stop it."""


class Bench:
    """All of it, for as long as the `with` block lasts; the daemon is for its user to start.

    Args:
        directory: where the broker and the daemon keep their files.
        seed: what devices ask follows from it.
        broker: one that is running; else one of its own, with persistence.
        fake: a model server; else one of its own with `models`.
        env: more for the environment of the daemon.
        settings: sections and keys of `config.yaml`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        seed: int | str = 0,
        broker: Mosquitto | None = None,
        fake: ModelServer | None = None,
        env: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.rng = random.Random(f"bench {seed}")  # noqa: S311  # reproducible on purpose
        self.is_own_broker = broker is None
        self.broker = broker or Mosquitto(directory, persistence=True, extra=BROKER)
        self.fake: ModelServer = fake or FakeOllama(*models())
        self.broker_may_lose = False
        self.store_may_prune = False
        self._is_own_fake = fake is None
        self._probes = 0
        self._directory = directory
        self._env = env
        self._settings = settings

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self.is_own_broker:
                self.broker.start()
                stack.callback(self.broker.kill)
            self._open_session()
            if self._is_own_fake:
                stack.enter_context(self.fake)
            self.daemon = DaemonProcess(
                self._directory, self.broker, ollama_url=self.fake.url, env=self._env, **self._settings
            )
            stack.callback(self.daemon.kill)
            self.recorder = stack.enter_context(Recorder(self.broker))
            self.traffic = stack.enter_context(Traffic(self.broker, random.Random(self.rng.random())))  # noqa: S311
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open_session(self) -> None:
        """As if the daemon had been there before: what is published before its first start is kept for it."""
        with MqttClient(self.broker.host, self.broker.port, client_id=f"edge-llm-{NODE}", session_s=3600) as stand_in:
            stand_in.subscribe(f"{N}/task/#")

    def probe(self, timeout_s: float = SETTLE_S) -> None:
        """I5: a fresh task succeeds."""
        self._probes += 1
        key = ("probe", f"p{self._probes}")
        self.recorder.publish(f"{N}/task/{'/'.join(key)}", {"prompt": f"probe {self._probes}"})
        wait_until(lambda: self.recorder.end(key), timeout_s)
        assert self.recorder.end(key) == "succeeded", f"I5: a fresh task ended as {self.recorder.end(key)}"

    def settle(self, timeout_s: float = SETTLE_S) -> None:
        """Return when a fresh task has succeeded and all that was accepted has ended.

        The broker hands over in order: whatever it had confirmed before the fresh task has then arrived as well.
        """
        wait_until(self.traffic.all_confirmed, timeout_s)
        self.probe(timeout_s)
        wait_until(self._all_ended, timeout_s)

    def _all_ended(self) -> bool:
        return not self.recorder.open() or (self.broker_may_lose and self.recorder.is_idle())

    def _has_run(self, key: Key) -> bool:
        """Whether a task that is in the store has ended; a refusal came from a daemon that did not take it."""
        return self.recorder.end(key) not in (None, "rejected")

    def evidence(self) -> Evidence:
        """All that is known; only while the daemon does not run."""
        return Evidence(
            sent=self.traffic.confirmed(),
            heard=self.recorder.heard,
            stored=self.daemon.stored(),
            published=self._published(),
            integrity=self.daemon.integrity(),
            log=read_log(self.daemon.csv_path),
            broker_may_lose=self.broker_may_lose,
            store_may_prune=self.store_may_prune,
        )

    def _published(self) -> Counter[Key]:
        """What the broker says it got: it may deliver a message twice itself after it was killed."""
        by_daemon = rf"Received PUBLISH from edge-llm-{NODE} \(.*'{N}/reply/([^/]+)/([^/]+)/result'"
        return Counter((src, task_id) for src, task_id in re.findall(by_daemon, self.broker.log()))

    def verdict(self, timeout_s: float = SETTLE_S) -> list[str]:
        """Let all settle, stop the daemon in good order, and have the oracle judge."""
        found = []
        try:
            self.settle(timeout_s)
        except AssertionError as error:
            found.append(str(error))
        found += self._stop()
        # The status of a task may be lost to a kill, and then only the store knows that it waits.
        if unheard := {(row.src, row.id) for row in self.daemon.stored() if row.result is None}:
            self.daemon.start()
            with suppress(AssertionError):
                wait_until(lambda: all(map(self._has_run, unheard)), timeout_s)
            late = sorted(key for key in unheard if not self._has_run(key))
            found += [f"{src}/{task_id} has no end" for src, task_id in late]
            found += self._stop()
        return found + violations(self.evidence())

    def _stop(self) -> list[str]:
        status = self.daemon.stop()
        return [] if status == 0 else [f"the daemon stopped with status {status}"]
