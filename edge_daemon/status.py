"""``edge-llm status``: how a node is, told by what its broker keeps of it; from any machine that reaches the broker."""

import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from edge_daemon.config import Config, mqtt_password
from edge_daemon.errors import EdgeError
from edge_daemon.mqtt_connection import BrokerRefuses, Device, Received
from edge_daemon.systemd import printable

RETAINED = ("availability", "state", "info", "queue", "models")
WAIT_S = 1.0
"""What a broker keeps, it sends at once; what has not come by then is not there."""
REFRESH_S = 0.5
"""Between two pages at least, however much happens."""
IDLE_S = 30.0
RETRY_S = 3.0
LAST_TASKS = 8
NAMES = 12
"""Models in a line at most."""
CLEAR = "\x1b[H\x1b[J"


def show(config: Config, *, as_json: bool) -> int:
    """Print how the node is. Returns 0 when it is ready, else 1.

    Raises:
        EdgeError: the broker is out of reach or refuses.
    """
    node = _Node(config)
    try:
        with _device(config) as device:
            node.subscribe(device)
            node.listen(device, WAIT_S)
    except OSError as error:
        raise EdgeError(str(error)) from None
    print(node.as_json() if as_json else "\n".join(node.page()))
    return 0 if node.ready else 1


def watch(config: Config, *, as_json: bool) -> NoReturn:
    """Print how the node is whenever that changes, for ever; a broker that was lost is tried again.

    Raises:
        EdgeError: the broker is out of reach at the start.
    """
    node = _Node(config)
    connected = False
    while True:
        try:
            with _device(config) as device:
                connected = True
                node.follow(device)
                _repeat(node, device, as_json=as_json)
        except OSError as error:
            if not connected:
                raise EdgeError(str(error)) from None
            print(f"{printable(str(error))}; trying again", file=sys.stderr)
            time.sleep(RETRY_S)


def _repeat(node: "_Node", device: Device, *, as_json: bool) -> NoReturn:
    before, wait_s = "", WAIT_S
    while True:
        node.listen(device, wait_s)
        text = node.as_json() if as_json else "\n".join([*node.page(), *node.live_lines()])
        if text != before:
            before = text
            redrawn = sys.stdout.isatty() and not as_json
            print(f"{CLEAR}{text}" if redrawn else text, flush=True)
        node.wait(device, IDLE_S)
        wait_s = REFRESH_S


def _device(config: Config) -> Device:
    return Device(config, password=mqtt_password(config))


class _Node:
    """What was heard of one node, and how that reads."""

    def __init__(self, config: Config) -> None:
        self._root = config.topic_root
        self._broker = f"{config.mqtt.host}:{config.mqtt.port}"
        self._told: dict[str, Any] = {}
        self._results: deque[Mapping[str, Any]] = deque(maxlen=LAST_TASKS)

    @property
    def ready(self) -> bool:
        """Whether it is there and says that it is ready."""
        return self._told.get("availability") == "online" and _mapping(self._told.get("state")).get("state") == "ready"

    # -- hearing

    def subscribe(self, device: Device) -> None:
        """Have what the broker keeps of it sent."""
        for name in RETAINED:
            device.subscribe(f"{self._root}/{name}")

    def follow(self, device: Device) -> None:
        """The same, and what it tells as it goes on; whoever may not hear that does without."""
        self.subscribe(device)
        for live in ("telemetry", "reply/+/+/result"):
            with suppress(BrokerRefuses):
                device.subscribe(f"{self._root}/{live}")

    def listen(self, device: Device, seconds: float) -> None:
        """Take what comes within that time; a first look ends as soon as everything kept is there."""
        until = time.monotonic() + seconds
        first_look = not self._complete
        while not (first_look and self._complete) and (message := device.get(until - time.monotonic())):
            self._take(message)

    @property
    def _complete(self) -> bool:
        return self._told.keys() >= set(RETAINED)

    def wait(self, device: Device, seconds: float) -> None:
        """Take the next message, if one comes within that time."""
        if message := device.get(seconds):
            self._take(message)

    def _take(self, message: Received) -> None:
        text = message.payload.decode("utf-8", "replace")
        name = message.topic.rpartition("/")[2]
        if name == "result":
            self._results.append(_mapping(_parsed(text)))
        else:
            self._told[name] = text if name == "availability" else _parsed(text)

    # -- telling

    def as_json(self) -> str:
        """All of it, by the last level of the topic, as one line."""
        results = {"last_results": [*self._results]} if self._results else {}
        return json.dumps({"topic": self._root, "ready": self.ready, **self._told, **results})

    def page(self) -> Iterator[str]:
        """The retained topics for a person; whatever they hold, it ends in lines of plain text."""
        available = self._told.get("availability") or "nothing heard of this node; is that its name?"
        yield printable(f"{self._root} at {self._broker}: {available}")
        describe = {"state": _state_text, "info": _info_text, "queue": _queue_text, "models": _models_text}
        for name, text_of in describe.items():
            if name in self._told:
                yield printable(f"  {name:<8}{text_of(_mapping(self._told[name]))}")
        if names := _mapping(self._told.get("models")).get("available"):
            yield printable(f"  {'':<8}available: {_names_text(names)}")

    def live_lines(self) -> Iterator[str]:
        """What only a follower hears: the board, and the last tasks, the newest first."""
        if "telemetry" in self._told:
            yield printable(f"  board   {_board_text(_mapping(self._told['telemetry']))}")
        for count, result in enumerate(reversed(self._results)):
            yield printable(f"  {'' if count else 'tasks':<8}{_result_text(result)}")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=lambda _: None)  # NaN is none of JSON
    except (ValueError, RecursionError):
        return None


def _state_text(state: Mapping[str, Any]) -> str:
    reason = f" ({state['reason']})" if state.get("reason") else ""
    return f"{state.get('state')}{reason} since {state.get('since')}"


def _info_text(info: Mapping[str, Any]) -> str:
    return f"edge-llm {info.get('version')} on {info.get('host')}, MQTT {info.get('mqtt')}"


def _queue_text(queue: Mapping[str, Any]) -> str:
    waiting = {name: count for name, count in _mapping(queue.get("waiting")).items() if count}
    text = ", ".join(f"{count} {name}" for name, count in waiting.items()) or "nothing"
    running = _mapping(queue.get("running"))
    at_work = f"; running {running.get('src')}/{running.get('id')} on {running.get('model')}" if running else ""
    return f"{text} waiting{at_work}; {queue.get('unsent')} answers on their way"


def _models_text(models: Mapping[str, Any]) -> str:
    listed = models.get("models")
    states = [_mapping(state) for state in listed] if isinstance(listed, list) else []
    texts = [f"{s.get('name')} {s.get('residency')}, {_megabytes(s.get('size_bytes'))}" for s in states]
    budget = _megabytes(models.get("budget_bytes"))
    return f"{'; '.join(texts) or 'none resident'}; budget {budget}; default {models.get('default')}"


def _names_text(names: Any) -> str:
    if not isinstance(names, list):
        return "unknown"
    rest = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(map(str, names[:NAMES])) + rest


def _board_text(sample: Mapping[str, Any]) -> str:
    memory, cpu = _mapping(sample.get("memory")), _mapping(sample.get("cpu"))
    disk = _mapping(sample.get("disk"))
    throttling = _mapping(sample.get("throttling")).get("now")
    parts = [
        f"processor {cpu.get('percent')} %",
        f"memory {memory.get('percent')} %, {_megabytes(memory.get('available_bytes'))} available",
        f"disk {_megabytes(disk.get('free_bytes'))} free",
    ]
    if (temperature_c := sample.get("temperature_c")) is not None:
        parts.append(f"{temperature_c} C")
    if isinstance(throttling, list) and throttling:
        parts.append(f"THROTTLED: {' '.join(map(str, throttling))}")
    return "; ".join(parts)


def _result_text(result: Mapping[str, Any]) -> str:
    error = _mapping(result.get("error")).get("code")
    reason = f" ({error})" if error else ""
    total_s = result.get("total_s")
    took = f", {total_s:.2f} s" if isinstance(total_s, int | float) else ""
    on = f" on {result.get('model')}" if result.get("model") else ""
    return f"{result.get('ts')} {result.get('src')}/{result.get('id')} {result.get('state')}{reason}{on}{took}"


def _megabytes(size_bytes: Any) -> str:
    try:
        return f"{float(size_bytes) / 1e6:,.0f} MB"
    except (TypeError, ValueError, OverflowError):
        return "unknown"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
