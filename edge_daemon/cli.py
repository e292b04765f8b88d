"""The command ``edge-llm``: what a person or systemd starts. Each command imports only what it needs.

Exit status: 0 well; 1 not well; 2 a wrong argument; 69 the embedded broker or model server does not start;
75 the data directory or the port is in use; 78 the configuration is wrong; 130 interrupted.
"""

# ruff: noqa: PLC0415  # `check-config` need not load what `run` does, and `run` not what `demo` does

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from edge_daemon import __version__
from edge_daemon.errors import AlreadyRunning, ConfigError, EdgeError, PortInUse, StoreTooNew

if TYPE_CHECKING:
    from edge_daemon.config import Config

log = logging.getLogger(__name__)

SYSTEM_CONFIG = Path("/etc/edge-llm/config.yaml")
EMBEDDED_MODEL = "smollm2:135m"
MAX_LOADED = 64
"""More models than the embedded server could hold: which ones stay is for our own pool to decide."""
STATUS_WAIT_S = 1.0
INTERRUPTED = 130


class EmbeddedUnavailable(EdgeError):
    """The embedded broker or model server does not start."""


STATUSES: Mapping[type[EdgeError], int] = {
    ConfigError: os.EX_CONFIG,
    StoreTooNew: os.EX_CONFIG,
    AlreadyRunning: os.EX_TEMPFAIL,
    PortInUse: os.EX_TEMPFAIL,
    EmbeddedUnavailable: os.EX_UNAVAILABLE,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that ``arguments`` (default: those of the process) name; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options)
    except EdgeError as error:
        print(f"edge-llm: {error}", file=sys.stderr)
        return STATUSES.get(type(error), 1)
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


def _config_path(options: argparse.Namespace) -> Path | None:
    given: Path | None = options.config
    return given or (SYSTEM_CONFIG if SYSTEM_CONFIG.exists() else None)


def _overrides(options: argparse.Namespace) -> dict[str, object]:
    """What the command line says, by the keys of the configuration."""
    given = {"node": options.node, "mqtt.host": options.host, "mqtt.port": options.port}
    return {key: value for key, value in given.items() if value is not None}


# -- run -------------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    from edge_daemon import systemd
    from edge_daemon.config import load

    if options.exit_with_parent:
        _tie_to_parent()
    path, overrides = _config_path(options), _overrides(options) | _places(options)
    config = load(path, overrides)
    systemd.setup_logging(config.log.level)
    if not options.embedded:
        return _serve(config)
    if not options.data_dir:
        overrides["data_dir"] = _users_data_dir(config)
        config = load(path, overrides)
    with _embedded(config, options.alias) as pointers:
        config = load(path, overrides | pointers)
        _tell_how_to_ask(config)
        return _serve(config)


def _places(options: argparse.Namespace) -> dict[str, object]:
    """Where the command line says that data goes, by the keys of the configuration."""
    places: dict[str, object] = {}
    if options.data_dir:
        places["data_dir"] = options.data_dir.absolute()
    if options.csv:
        places["csv.path"] = options.csv.absolute()
    if options.node:
        places["mqtt.client_id"] = None  # the configured one is for the session of the configured node
    return places


def _tie_to_parent() -> None:
    from edge_daemon.embedded.process import die_with_parent

    die_with_parent(signal.SIGTERM)


def _serve(config: "Config") -> int:
    from edge_daemon.main import Daemon

    try:
        daemon = Daemon(config)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"data_dir: {error.filename}: {error.strerror}; choose another with --data-dir") from None
    return daemon.run()


def _users_data_dir(config: "Config") -> Path:
    """The folder that is configured; none is, one that needs no rights."""
    default: Path = type(config)().data_dir
    if config.data_dir != default:
        return config.data_dir
    state_home = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (state_home if state_home.is_absolute() else Path.home() / ".local/state") / "edge-llm"


# -- run --embedded --------------------------------------------------------------------------------------------------


@contextmanager
def _embedded(config: "Config", aliases: list[str]) -> Iterator[dict[str, object]]:
    """A broker and a model server for as long as the block lasts; gives what points the configuration at them.

    Raises:
        PortInUse: another program listens on ``mqtt.port``.
        EmbeddedUnavailable: one of the two does not start.
    """
    from edge_daemon.embedded import EmbeddedError, PortTaken
    from edge_daemon.main import SIGNALS

    # The daemon waits for these signals, so every thread has to block them, and here the first threads start.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with ExitStack() as children:
        try:
            pointers = _start_children(config, aliases, children)
        except PortTaken as error:
            raise PortInUse(f"{error}; choose another with --port") from None
        except EmbeddedError as error:
            raise EmbeddedUnavailable(str(error)) from None
        yield pointers


def _start_children(config: "Config", aliases: list[str], children: ExitStack) -> dict[str, object]:
    from edge_daemon.embedded import start_broker, start_ollama
    from edge_daemon.embedded.keeper import Keeper

    directory = config.data_dir / "embedded"
    start = partial(start_broker, config.mqtt.port, directory)
    broker = start()
    children.enter_context(Keeper("broker", broker, start))
    serve = partial(start_ollama, directory, aliases=aliases, max_loaded=MAX_LOADED)
    ollama = serve()
    children.enter_context(Keeper("model server", ollama, partial(serve, port=urlsplit(ollama.url).port or 0)))
    protocol = "3.1.1" if broker.kind == "amqtt" else config.mqtt.protocol  # it knows nothing newer: do not ask
    no_tls = {"enabled": False, "ca_file": None, "cert_file": None, "key_file": None}
    return {
        "mqtt": {"host": broker.host, "port": broker.port, "protocol": protocol, "tls": no_tls},
        "ollama.url": ollama.url,
        "models.default": _default_model(config, ollama.url),
    }


def _default_model(config: "Config", url: str) -> str:
    """The configured default, or an embedded model when the embedded server has no such thing."""
    from edge_daemon.ollama import Ollama, normalise

    names = [tag.name for tag in Ollama(url, connect_timeout_s=config.ollama.connect_timeout_s).tags()]
    if normalise(config.models.default) in names:
        return config.models.default
    return EMBEDDED_MODEL if EMBEDDED_MODEL in names else names[0]


def _tell_how_to_ask(config: "Config") -> None:
    port, root = config.mqtt.port, config.topic_root
    log.info("the broker listens on %s:%d; send tasks to %s/task, for example:", config.mqtt.host, port, root)
    log.info("  mosquitto_sub -p %d -t '%s/reply/#' -v", port, root)
    log.info("  mosquitto_pub -p %d -q 1 -t %s/task -m 'What is 2+2?'", port, root)
    names = f"--port {port} --base-topic {config.base_topic} --node {config.node_name}"
    log.info("  tools/publish_task.py %s --prompt 'What is 2+2?'", names)


# -- check-config, demo ----------------------------------------------------------------------------------------------


def _check_config(options: argparse.Namespace) -> int:
    from edge_daemon.config import load, mqtt_password

    mqtt_password(load(_config_path(options)))
    print("ok")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from edge_daemon import demo

    return demo.run_real(_config_path(options)) if options.real else demo.run_embedded()


# -- status ----------------------------------------------------------------------------------------------------------


def _status(options: argparse.Namespace) -> int:
    from edge_daemon.config import load

    config = load(_config_path(options), _overrides(options))
    try:
        told = _retained(config)
    except OSError as error:
        raise EdgeError(str(error)) from None
    for line in _page(config, told):
        print(line)
    ready = _mapping(told.get("state")).get("state") == "ready"
    return 0 if ready and told.get("availability") == "online" else 1


def _retained(config: "Config") -> dict[str, Any]:
    """What the broker keeps of the node, by the last level of the topic."""
    from edge_daemon.config import mqtt_password
    from edge_daemon.mqtt_bridge import Device

    names = ("availability", "state", "info", "queue", "models")
    told: dict[str, Any] = {}
    with Device(config, password=mqtt_password(config)) as device:
        for name in names:
            device.subscribe(f"{config.topic_root}/{name}")
        until = time.monotonic() + STATUS_WAIT_S
        while len(told) < len(names) and (message := device.get(until - time.monotonic())):
            text = message.payload.decode("utf-8", "replace")
            name = message.topic.rpartition("/")[2]
            told[name] = text if name == "availability" else _parsed(text)
    return told


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _page(config: "Config", told: Mapping[str, Any]) -> Iterator[str]:
    """The retained topics for a person; whatever they hold, it ends in lines of plain text."""
    from edge_daemon.systemd import printable

    mqtt = config.mqtt
    available = told.get("availability") or "nothing heard of this node; is that its name?"
    yield printable(f"{config.topic_root} at {mqtt.host}:{mqtt.port}: {available}")
    describe = {"state": _state_text, "info": _info_text, "queue": _queue_text, "models": _models_text}
    for name, text_of in describe.items():
        if name in told:
            yield printable(f"  {name:<8}{text_of(_mapping(told[name]))}")


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


def _megabytes(size_bytes: Any) -> str:
    return f"{size_bytes / 1e6:,.0f} MB" if isinstance(size_bytes, int | float) else "unknown"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


# -- arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-llm", description="Language models on small boards, driven by MQTT.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"edge-llm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_run, _add_demo, _add_check_config, _add_status):
        add(commands)
    return parser


def _add_run(commands: Any) -> None:
    parser = _command(commands, "run", _run, "serve tasks until told to stop")
    broker = parser.add_mutually_exclusive_group()
    _add_place(parser, broker)
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where the queue and the CSV log are")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where the CSV log is")
    broker.add_argument(
        "--embedded",
        action="store_true",
        help="bring a broker (on loopback) and small models along; data then goes to ~/.local/state/edge-llm",
    )
    parser.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="with --embedded: a further name for an embedded model, loaded for itself; may be repeated",
    )
    parser.add_argument("--exit-with-parent", action="store_true", help=argparse.SUPPRESS)  # the demo's


def _add_demo(commands: Any) -> None:
    parser = _command(commands, "demo", _demo, "show the main job on a broker and small models of its own")
    parser.add_argument("--real", action="store_true", help="use the configured broker and Ollama instead")


def _add_check_config(commands: Any) -> None:
    _command(commands, "check-config", _check_config, "say whether the configuration is right")


def _add_status(commands: Any) -> None:
    parser = _command(commands, "status", _status, "show how a node is; exit status 0 if it is ready")
    _add_place(parser, parser)


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str) -> Any:
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.set_defaults(command=run)
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"default: {SYSTEM_CONFIG} if there is one")
    return parser


def _add_place(parser: Any, broker: Any) -> None:
    """Which node, at which broker; ``broker`` is the group of arguments that the host belongs to."""
    parser.add_argument("--node", help="the node's name in all topics; default: this machine's")
    broker.add_argument("--host", help="the broker")
    parser.add_argument("--port", type=int, help="the broker's port, or the one to open with --embedded")
