"""``edge-llm demo``: pretend devices send tasks to a daemon that runs as a user would run it; a table tells the rest.

The daemon is a process of its own, with its data in a temporary directory. It ends with the demo, however that ends.
"""

import json
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from edge_daemon.config import Config, load, mqtt_password
from edge_daemon.errors import EdgeError, OllamaDown
from edge_daemon.messages import Priority, compact
from edge_daemon.mqtt_connection import Device, Received
from edge_daemon.ollama import Ollama
from edge_daemon.systemd import printable

START_S = 60.0
STOP_S = 30.0
SILENCE_S = 300.0
"""Without a new answer for so long the demo gives up."""
GRACE_S = 2.0
LOOK_S = 0.25
ONE_CONNECTION = (
    "the broker allows one connection per user (use_username_as_clientid), and the demo needs two: "
    "try another listener of it, with --config"
)
LINE_S = 1.0
"""Between two lines of progress where they cannot be overwritten."""

OPTIONS = {"temperature": 0, "num_predict": 32}
"""The likeliest words, and not too many: the same answers on every board."""

SMOL, GEMMA, SCRIBE = 0, 1, 2
EMBEDDED_MODELS = ("smollm2:135m", "gemma3:270m", "scribe:135m")
ALIAS = "scribe:135m=smollm2:135m"
# Two models fit, three are asked for: somebody has to go.
EMBEDDED_CONFIG = """\
drain_timeout_s: 1
pool: {max_resident: 2}
models: {default: "smollm2:135m"}
telemetry: {interval_s: 2}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One task of the demo. ``model`` counts in the models that the demo has; the first is the default."""

    id: str
    device: str
    model: int
    prompt: str
    priority: Priority = Priority.NORMAL
    plain: bool = False
    """As text, as a device without JSON would; what text cannot say goes into MQTT 5 user properties."""
    own_topic: bool = False
    """The answer is asked for on a topic of the device's own too."""
    task_type: str | None = None
    schema: dict[str, Any] | None = None


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


ASKS = (
    Ask(id="capital", device="hallway", model=SMOL, prompt="What is the capital of France?", plain=True),
    Ask(id="pump", device="greenhouse", model=GEMMA, prompt="The soil moisture is 12 %. Should the pump run?"),
    Ask(
        id="reading",
        device="greenhouse",
        model=SCRIBE,
        prompt="Turn this into JSON: the greenhouse is 31 degrees and the pump is off",
        schema=_object(temperature={"type": "integer"}, pump={"type": "string", "enum": ["on", "off"]}),
    ),
    Ask(
        id="tomatoes",
        device="greenhouse",
        model=SMOL,
        prompt="What do tomatoes need? Answer in one short sentence.",
        priority=Priority.LOW,
    ),
    Ask(
        id="rain",
        device="door7",
        model=GEMMA,
        prompt="The door is open and it rains. What should I do?",
        own_topic=True,
    ),
    Ask(
        id="entry",
        device="door7",
        model=SCRIBE,
        prompt="Turn this into JSON: door 7 is open and the light is on",
        schema=_object(door={"type": "integer"}, state={"type": "string", "enum": ["open", "closed"]}),
        priority=Priority.HIGH,
    ),
    Ask(
        id="night",
        device="door7",
        model=SMOL,
        prompt="Summarize in five words: The door of the garage was left open all night and it rained in.",
        priority=Priority.LOW,
    ),
    Ask(
        id="fridge",
        device="kitchen",
        model=GEMMA,
        prompt="The fridge is at 12 C. Is it too warm?",
        plain=True,
        own_topic=True,
    ),
    Ask(id="sum", device="calculator", model=GEMMA, prompt="What is 2+2?", task_type="arithmetic"),
    Ask(
        id="smoke",
        device="kitchen",
        model=GEMMA,
        prompt="Classify this reading as normal or alarm: smoke 90 %, limit 60 %",
        priority=Priority.URGENT,
    ),
)


def run_embedded() -> int:
    """Run the demo on a broker and models of its own; returns 0 when every task succeeded, else 1.

    Raises:
        EdgeError: it came to no end.
    """
    port = _free_port()
    with tempfile.NamedTemporaryFile("w", prefix="edge-llm-demo-", suffix=".yaml") as file:
        file.write(EMBEDDED_CONFIG)
        file.flush()
        config = load(Path(file.name), {"node": "demo", "mqtt.port": port})
        arguments = ["--config", file.name, "--embedded", "--alias", ALIAS, "--port", str(port)]
        return _run(config, EMBEDDED_MODELS, arguments)


def run_real(path: Path | None) -> int:
    """Run the demo on the broker and the Ollama of the configuration; returns 0 when every task succeeded, else 1.

    Raises:
        EdgeError: the broker or Ollama does not answer, the broker bears one connection only, no model can generate,
            or it came to no end.
    """
    # Without HTTP: the port is the service's, which may well be running.
    config = load(path, {"node": f"demo-{secrets.token_hex(3)}", "mqtt.client_id": None, "http.enabled": False})
    models = _smallest_models(config)
    _check_broker(config)
    try:
        return _run(config, models, ["--no-http", *(["--config", str(path)] if path else [])])
    finally:
        with suppress(OSError):
            _clear_retained(config)


def _smallest_models(config: Config) -> list[str]:
    """Up to three models that Ollama has on its disk and that can write."""
    ollama = Ollama(config.ollama.url, connect_timeout_s=config.ollama.connect_timeout_s)
    found: list[str] = []
    try:
        tags = sorted(ollama.tags(), key=lambda tag: tag.size_bytes)
    except OllamaDown as error:
        raise EdgeError(f"Ollama does not answer: {error}") from None
    for tag in tags:
        capabilities = ollama.show(tag.name).capabilities
        if not capabilities or "completion" in capabilities:
            found.append(tag.name)
        if len(found) == len(EMBEDDED_MODELS):
            break
    if not found:
        raise EdgeError(f"Ollama at {config.ollama.url} has no model that can write; try: ollama pull smollm2:135m")
    return found


def _check_broker(config: Config) -> None:
    """It must bear two connections, the daemon's and ours."""
    try:
        with _device(config) as ours, _device(config):
            try:
                ours.get(LOOK_S)
            except ConnectionError:
                raise EdgeError(ONE_CONNECTION) from None
    except OSError as error:
        raise EdgeError(str(error)) from None


def _clear_retained(config: Config) -> None:
    """Leave nothing on a broker that is not ours."""
    with _device(config) as device:
        device.subscribe(f"{config.topic_root}/#")
        while message := device.get(2 * LOOK_S):
            if message.retain and message.payload:
                device.publish(message.topic, b"", retain=True)


# -- from start to end -----------------------------------------------------------------------------------------------


def _run(config: Config, models: Sequence[str], arguments: Sequence[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # to clean up as after Ctrl-C
    began = time.monotonic()
    kept = _kept_directory()
    print(f"Starting a daemon; what it says goes to {kept / 'daemon.log'}", flush=True)
    with tempfile.TemporaryDirectory(prefix="edge-llm-demo-", ignore_cleanup_errors=True) as data_dir:
        places = ["--node", config.node_name, "--data-dir", data_dir, "--csv", str(kept / "llm_metrics.csv")]
        with _Node([*arguments, *places], kept / "daemon.log") as node:
            try:
                heard = _converse(config, models, node)
            except (ConnectionError, TimeoutError) as error:
                node.check(GRACE_S)  # a daemon that ends takes its broker along, and is the better explanation
                raise EdgeError(str(error)) from None
    succeeded = _report(heard)
    print(f"Took {time.monotonic() - began:.1f} s from start to end. The log: {kept / 'llm_metrics.csv'}")
    return 0 if succeeded else 1


def _converse(config: Config, models: Sequence[str], node: "_Node") -> "_Heard":
    """Send all tasks and listen until all are answered."""
    _await_broker(config, node)
    heard, line = _Heard(config.topic_root), _ProgressLine()
    with _device(config) as device, line:
        device.subscribe(f"{config.topic_root}/#")
        while not heard.ready:
            node.check()
            heard.take(device.get(LOOK_S))
        for ask in ASKS:
            _send(device, config.topic_root, ask, models[ask.model % len(models)])
        while not heard.complete:
            node.check()
            heard.take(device.get(LOOK_S))
            line.show(heard.progress())
    return heard


def _await_broker(config: Config, node: "_Node") -> None:
    deadline = time.monotonic() + START_S
    while True:
        node.check()
        try:
            with _device(config):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_S)


def _device(config: Config) -> Device:
    return Device(config, password=mqtt_password(config))


def _send(device: Device, root: str, ask: Ask, model: str) -> None:
    """Publish a task, as plain text where that can say everything."""
    topic = f"{root}/task/{ask.device}/{ask.id}"
    reply_to = _own_topic(root, ask) if ask.own_topic else None
    if ask.plain and (device.is_v5 or not (ask.own_topic or ask.model)):
        fields = {"model": model, "options": compact(OPTIONS)}
        device.publish(topic, ask.prompt, response_topic=reply_to, fields=fields)
        return
    task = {
        "prompt": ask.prompt,
        "model": model,
        "priority": ask.priority,
        "options": OPTIONS,
        "task_type": ask.task_type,
        "format": ask.schema,
        "reply_to": reply_to,
    }
    device.publish(topic, compact({key: value for key, value in task.items() if value is not None}))


def _own_topic(root: str, ask: Ask) -> str:
    return f"{root}/reply/{ask.device}/inbox-{ask.id}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _kept_directory() -> Path:
    """A new directory for what stays: under the current one, or under /tmp where we may not write."""
    directory = Path("demo-data", time.strftime("%Y%m%d-%H%M%S")).absolute()
    try:
        directory.mkdir(parents=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="edge-llm-demo-kept-"))
    return directory


class _Node:
    """The daemon as a process of its own. The end of the ``with`` block ends it; so does our own, whatever it is."""

    def __init__(self, arguments: Sequence[str], log_path: Path) -> None:
        self._command = [sys.executable, "-m", "edge_daemon", "run", "--exit-with-parent", *arguments]
        self._log_path = log_path

    def __enter__(self) -> Self:
        with self._log_path.open("ab") as log:
            # In a group of its own: Ctrl-C is for us, who end it in order. The pipe tells it that we are there.
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=log, stderr=log, process_group=0
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:
            print("\nInterrupted: stopping the daemon", flush=True)
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        finally:
            self._process.kill()
            self._process.wait()

    def check(self, wait_s: float = 0.0) -> None:
        """Raises EdgeError when the daemon has ended by itself, or does so within ``wait_s`` seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        if self._process.returncode is not None:
            last = self._log_path.read_text(encoding="utf-8", errors="replace").rpartition("\n")[0].rpartition("\n")[2]
            raise EdgeError(f"the daemon ended with status {self._process.returncode}: {last}")


# -- what the devices hear -------------------------------------------------------------------------------------------


class _Heard:
    """What has come of the tasks, and how the daemon says it is."""

    def __init__(self, root: str) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        """By task, in the order in which they came."""
        self.ready = False
        self.loads = 0
        self.swaps = 0
        self._root = root
        self._states: dict[str, str] = {}
        self._copies: set[str] = set()
        self._resident: list[str] = []
        self._silent_since = time.monotonic()

    @property
    def complete(self) -> bool:
        """Whether every task has its result, and its copy where one was asked for.

        Raises:
            TimeoutError: nothing new for too long.
        """
        if time.monotonic() - self._silent_since > SILENCE_S:
            raise TimeoutError(f"no new answer for {SILENCE_S:g} s; {len(ASKS) - len(self.results)} are missing")
        return all(ask.id in self.results and self.has_copy(ask) for ask in ASKS)

    def has_copy(self, ask: Ask) -> bool:
        """Whether the answer came on the device's own topic, if it was asked for there."""
        return not ask.own_topic or _own_topic(self._root, ask) in self._copies

    def take(self, message: Received | None) -> None:
        """Remember what a message says."""
        match message.topic.removeprefix(f"{self._root}/").split("/") if message else []:
            case ["reply", _, task_id, "result"]:
                self.results[task_id] = _read(message)
                self._silent_since = time.monotonic()
            case ["reply", _, task_id, "status"]:
                self._states[task_id] = _read(message)["state"]
            case ["reply", _, inbox] if message is not None and inbox.startswith("inbox-"):
                self._copies.add(message.topic)
            case ["event", "model_loaded"]:
                self.loads += 1
                self.swaps += bool(_read(message)["data"]["evicted"])
            case ["state"]:
                self.ready = _read(message)["state"] == "ready"
            case ["models"]:
                self._resident = sorted(model["name"] for model in _read(message)["models"])

    def progress(self) -> str:
        """One line: how many are done, what waits, what runs, which models are in memory."""
        unanswered = [ask for ask in ASKS if ask.id not in self.results]
        waiting = Counter(ask.priority for ask in unanswered if self._states.get(ask.id) == "queued")
        parts = {
            "waiting": [f"{waiting[priority]} {priority}" for priority in Priority if waiting[priority]],
            "running": [ask.id for ask in unanswered if self._states.get(ask.id) == "running"],
            "in memory": self._resident,
        }
        shown = [f"{name}: {', '.join(values) or 'none'}" for name, values in parts.items()]
        return " | ".join([f"{len(self.results)}/{len(ASKS)} done", *shown])


def _read(message: Received | None) -> Any:
    return json.loads(message.payload) if message else None


# -- what the user sees ----------------------------------------------------------------------------------------------


class _ProgressLine:
    """A line that is overwritten on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._shown = ""
        self._shown_at = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            print()

    def show(self, text: str) -> None:
        """Show the text, if it is new and it is time."""
        now = time.monotonic()
        if text == self._shown or (not self._is_terminal and now - self._shown_at < LINE_S):
            return
        self._shown, self._shown_at = text, now
        if self._is_terminal:
            print(f"\r{_cut(text, _columns() - 1)}\x1b[K", end="", flush=True)
        else:
            print(text, flush=True)


HEADINGS = ("id", "device", "model", "state", "queue s", "load s", "run s", "tokens/s", "answer")


def _report(heard: _Heard) -> bool:
    """Print what came of every task; whether all is well."""
    asks = {ask.id: ask for ask in ASKS}
    rows = [HEADINGS, *(_row(asks[task_id], result) for task_id, result in heard.results.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS) - 1)]
    print()
    for row in rows:
        cells = [
            cell.ljust(width) if column < 4 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        print(_cut("  ".join([*cells, row[-1]]), _columns()))
    print()
    problems = [problem for ask in ASKS for problem in _problems(ask, heard)]
    for problem in problems:
        print(problem)
    done = sum(result["state"] == "succeeded" for result in heard.results.values())
    print(f"{done} of {len(ASKS)} tasks succeeded.")
    print(f"Model loads: {heard.loads}. Swaps among them, where another model had to make room: {heard.swaps}.")
    return not problems


def _row(ask: Ask, result: dict[str, Any]) -> tuple[str, ...]:
    answer = compact(result["json"]) if ask.schema and result["json"] is not None else result["text"] or ""
    seconds = (_number(result[name], 2) for name in ("queued_s", "load_s", "run_s"))
    model = str(result["model"] or result["model_requested"])
    speed = _number(result["tokens_per_s"], 1)
    return (ask.id, ask.device, model, result["state"], *seconds, speed, printable(" ".join(answer.split())))


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _problems(ask: Ask, heard: _Heard) -> Iterator[str]:
    """What is not as it should be with one task, a sentence each."""
    result = heard.results[ask.id]
    if result["state"] != "succeeded":
        error = result["error"] or {}
        yield f"{ask.id}: {result['state']}, {error.get('code')}: {printable(str(error.get('message')))}"
    elif ask.schema and set(result["json"] or ()) != set(ask.schema["required"]):
        yield f"{ask.id}: the answer is not what its schema asks for"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(0, width - 3)]}..."


def _columns() -> int:
    return shutil.get_terminal_size((160, 24)).columns
