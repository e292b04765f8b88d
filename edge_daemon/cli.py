"""The command ``edge-llm``: what a person or systemd starts. Each command imports only what it needs.

Exit status: 0 well; 1 not well; 2 a wrong argument; 69 the embedded broker or model server does not start;
75 the data directory or the port is in use; 78 the configuration is wrong; 130 interrupted.
"""

# ruff: noqa: PLC0415  # `check-config` need not load what `run` does, and `run` not what `demo` does

import argparse
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from edge_daemon import __version__
from edge_daemon.errors import AlreadyRunning, ConfigError, EdgeError, PortInUse, StoreTooNew

if TYPE_CHECKING:
    from edge_daemon.config import Config
    from edge_daemon.report import Summary, Table

log = logging.getLogger(__name__)

SYSTEM_CONFIG = Path("/etc/edge-llm/config.yaml")
EMBEDDED_MODEL = "smollm2:135m"
MAX_LOADED = 64
"""More models than the embedded server could hold: which ones stay is for our own pool to decide."""
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
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:  # argparse itself would complain with the usage of all commands, not with that of this one
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        status: int = options.command(options)
    except EdgeError as error:
        print(f"edge-llm: {error}", file=sys.stderr)
        return STATUSES.get(type(error), 1)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read it, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be written goes there
        return 1
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
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # it asks to reload, and must not end us before we can
    os.umask(0o027)  # as the unit does: what is written holds prompts and answers, and is not for everybody
    path, overrides = _config_path(options), _overrides(options) | _places(options) | _gateway(options)
    config = load(path, overrides)
    systemd.setup_logging(config.log.level)
    if not options.embedded:
        return _serve(config, partial(load, path, overrides))
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


def _gateway(options: argparse.Namespace) -> dict[str, object]:
    """What the command line says of HTTP; whoever names its port wants it."""
    if options.http_port is not None:
        return {"http.enabled": options.http is not False, "http.port": options.http_port}
    return {} if options.http is None else {"http.enabled": options.http}


def _tie_to_parent() -> None:
    from edge_daemon.embedded.process import die_with_parent

    die_with_parent(signal.SIGTERM)


def _serve(config: "Config", reread: "Callable[[], Config] | None" = None) -> int:
    from edge_daemon.main import Daemon

    status = Daemon(config, reread=reread).run()
    return _start_anew() if status is None else status


def _start_anew() -> int:
    """Become a new process with the same id and arguments: so every key takes effect, and systemd sees no restart.

    Signals stay blocked, and one that comes meanwhile waits for the new one.
    """
    # What --exit-with-parent has arranged survives, and would let waiting signals through if it were done again.
    arguments = [argument for argument in sys.orig_argv[1:] if argument != "--exit-with-parent"]
    logging.shutdown()
    try:
        os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606  # the arguments are our own
    except OSError as error:
        log.critical("cannot start anew: %s", error)
        return 1


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
    if broker.kind == "amqtt":
        log.info("the broker is amqtt, MQTT 3.1.1 only; where mosquitto is installed it is mosquitto, and MQTT 5")
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
    publish = shutil.which("edge-llm-publish") or f"{sys.executable} tools/publish_task.py"
    log.info("  %s %s --prompt 'What is 2+2?'", publish, names)
    if config.http.enabled:
        address = f"http://{config.http.host}:{config.http.port}/perform_task"
        log.info('  curl %s -H "Content-Type: application/json" -d \'{"prompt": "What is 2+2?"}\'', address)


# -- check-config, demo ----------------------------------------------------------------------------------------------


def _check_config(options: argparse.Namespace) -> int:
    from edge_daemon.config import Config, changed_keys, load
    from edge_daemon.preflight import check_packages, secrets
    from edge_daemon.systemd import printable

    config = load(_config_path(options))
    secrets(config)
    check_packages(config)
    print("ok")
    for key in changed_keys(Config(), config):
        print(printable(f"  {key}: {_shown(attrgetter(key)(config))}"))
    return 0


def _shown(value: object) -> str:
    """A value on one line, the names of the entries of a map."""
    return ", ".join(map(str, value)) or "none" if isinstance(value, Mapping | tuple) else str(value)


def _demo(options: argparse.Namespace) -> int:
    from edge_daemon import demo

    return demo.run_real(_config_path(options)) if options.real else demo.run_embedded()


# -- status ----------------------------------------------------------------------------------------------------------


def _status(options: argparse.Namespace) -> int:
    from edge_daemon import status
    from edge_daemon.config import load

    config = load(_config_path(options), _overrides(options))
    if options.watch:
        status.watch(config, as_json=options.json)
    return status.show(config, as_json=options.json)


# -- doctor, install-service -----------------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> int:
    from edge_daemon import doctor

    if options.yes and not options.fix:
        options.refuse("argument --yes: only with --fix")
    return doctor.run(
        _config_path(options),
        fix=options.fix,
        assume_yes=options.yes,
        verbose=options.verbose,
        as_json=options.json,
        broker=options.broker,
    )


def _install_service(options: argparse.Namespace) -> int:
    from edge_daemon.install import install

    install(user=options.user, prefix=options.prefix, dry_run=options.dry_run)
    return 0


# -- report ----------------------------------------------------------------------------------------------------------


def _report(options: argparse.Namespace) -> int:
    from edge_daemon import report
    from edge_daemon.config import load
    from edge_daemon.systemd import printable

    path = options.csv or load(_config_path(options)).csv_path
    summary = report.read(path, options.since)
    tables = report.tables(summary)
    written = _write_page(options.html, summary, tables) if options.html else ()
    for line in (*report.headline(summary), *(line for table in tables for line in ("", *report.lines(table)))):
        print(printable(line))
    for line in written:
        print(line)
    return 0


def _write_page(path: Path, summary: "Summary", tables: "list[Table]") -> list[str]:
    """Write it; gives what there is to be said of it."""
    from edge_daemon import report_page

    plots = _plots(summary)
    try:
        path.write_text(report_page.page(summary, tables, plots), encoding="utf-8", errors="replace")
    except OSError as error:
        raise EdgeError(f"{path}: {error.strerror}") from None
    return ["", f"The same as a page: {path}", *([report_page.NO_PLOTS] if plots is None else [])]


def _plots(summary: "Summary") -> list[str] | None:
    """The plots, None without the extra that draws them."""
    try:
        from edge_daemon import plots
    except ImportError:
        return None
    return [plot.svg for plot in plots.draw(summary)]


def _since(text: str) -> float:
    from edge_daemon.report import since

    try:
        return since(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a time such as 2026-01-31, 90m, 24h or 7d: {text!r}") from None


# -- arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-llm", description="Language models on small boards, driven by MQTT.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"edge-llm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_run, _add_demo, _add_check_config, _add_status, _add_doctor, _add_report, _add_install_service):
        add(commands)
    return parser


def _add_run(commands: Any) -> None:
    parser = _command(commands, "run", _run, "serve tasks until told to stop")
    broker = parser.add_mutually_exclusive_group()
    _add_place(parser, broker)
    http = argparse.BooleanOptionalAction
    parser.add_argument("--http", action=http, help="serve HTTP too, or not; what that needs is told if it is missing")
    parser.add_argument("--http-port", type=int, metavar="PORT", help="serve HTTP on this port; default: 5000")
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
    _command(
        commands,
        "check-config",
        _check_config,
        "say whether the configuration is right, and what in it differs from the defaults",
    )


def _add_status(commands: Any) -> None:
    parser = _command(commands, "status", _status, "show how a node is; exit status 0 if it is ready")
    parser.add_argument("--watch", action="store_true", help="go on, and show each change, until interrupted")
    parser.add_argument("--json", action="store_true", help="one line of JSON for a program, instead of a page")
    _add_place(parser, parser)


def _add_doctor(commands: Any) -> None:
    parser = _command(commands, "doctor", _doctor, "say what is wrong with this machine, and what mends it")
    parser.set_defaults(refuse=parser.error)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--fix", action="store_true", help="mend what is safe to mend, after asking for each")
    parser.add_argument("--yes", action="store_true", help="with --fix: do not ask")
    parser.add_argument("--verbose", action="store_true", help="tell of what is well, too")
    parser.add_argument(
        "--broker", action="store_true", help="try the broker, even if that may end the daemon's connection"
    )
    form.add_argument("--json", action="store_true", help="all findings as one line of JSON, for a program")


def _add_report(commands: Any) -> None:
    parser = _command(commands, "report", _report, "sum up the CSV log, its older files included")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the log; default: the configured one")
    parser.add_argument("--since", type=_since, metavar="TIME", help="only from then on: 2026-01-31, 90m, 24h, 7d")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it as a page with plots, too")


def _add_install_service(commands: Any) -> None:
    summary = "set up the systemd service of this installation"
    parser = commands.add_parser("install-service", help=summary, description=f"{summary.capitalize()}.")
    parser.set_defaults(command=_install_service, parser=parser)
    parser.add_argument("--user", default="edge-llm", help="as whom it runs; created if missing; default: %(default)s")
    parser.add_argument("--prefix", type=Path, metavar="DIR", help="write the files below DIR, and change nothing else")
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be done")


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str) -> Any:
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.set_defaults(command=run, parser=parser)
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"default: {SYSTEM_CONFIG} if there is one")
    return parser


def _add_place(parser: Any, broker: Any) -> None:
    """Which node, at which broker; ``broker`` is the group of arguments that the host belongs to."""
    parser.add_argument("--node", help="the node's name in all topics; default: this machine's")
    broker.add_argument("--host", help="the broker")
    parser.add_argument("--port", type=int, help="the broker's port, or the one to open with --embedded")
