"""``config.yaml`` -> ``Config``: frozen, typed, with every limit in one place.

The classes below are the reference for the code, ``config.yaml`` is the same for people, and a test holds the two
together. A field's annotation says everything about it: its type, and in ``Annotated`` its rules. One generic
converter reads any section by them, so a new key is one line here and one entry in the file.
"""

import contextlib
import dataclasses
import difflib
import functools
import graphlib
import ipaddress
import json
import logging
import os
import re
import socket
import stat
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml

from edge_daemon import sampling, schema
from edge_daemon.errors import ConfigError, Rejected

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_NODES = 10_000
MAX_TEXT = 1024
MAX_PROSE = 8192
MAX_SOURCES = 1000
SOURCE = re.compile("[A-Za-z0-9_.:-]{1,64}")
PASSWORD_NAME = "mqtt_password"  # noqa: S105  # the name of the systemd credential, not a secret
PASSWORD_VARIABLE = "EDGE_LLM_MQTT_PASSWORD"  # noqa: S105  # the name of a variable, not a secret
TOKENS_NAME = "http_tokens"

Keys = tuple[str, ...]
"""The keys that lead to a value, from the top of the file."""

log = logging.getLogger(__name__)


# Rules: each takes a value of the right type and returns what is to be kept, or raises ValueError("must be ...").


@dataclass(frozen=True, slots=True)
class Within:
    """From ``low`` to ``high``, both included; of a text, a list or a map the length counts."""

    low: float
    high: float

    def __call__(self, value: Any) -> Any:
        """The value itself."""
        if isinstance(value, int | float):
            size, unit = value, ""
        else:
            size, unit = len(value), " characters" if isinstance(value, str) else " entries"
        if not self.low <= size <= self.high:  # so that NaN is refused too
            raise ValueError(f"must be {self.low} to {self.high}{unit}")
        return value


@dataclass(frozen=True, slots=True)
class Like:
    """The whole text matches ``pattern``, which ``meaning`` puts into words."""

    pattern: str
    meaning: str

    def __call__(self, value: str) -> str:
        """The text itself."""
        if not re.fullmatch(self.pattern, value):
            raise ValueError(f"must be {self.meaning}")
        return value


def _absolute(value: Path) -> Path:
    with contextlib.suppress(RuntimeError):  # no such user: it stays relative
        value = value.expanduser()
    if not value.is_absolute():
        raise ValueError("must be an absolute path")
    return value


def _without_parent(value: Path) -> Path:
    if ".." in value.parts:
        raise ValueError('must be a path without ".."')
    return value


def _ollama_url(value: str) -> str:
    """The address without a slash at its end; nothing in it may send requests elsewhere than it seems."""
    shape = re.fullmatch(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([1-9][0-9]{0,4}))?/?", value)
    if not shape or int(shape[2] or 80) > 65_535 or _leads_nowhere(shape[1].strip("[]")):
        raise ValueError("must be http://HOST:PORT or https://HOST:PORT of one machine, without user or path")
    return value.rstrip("/")


def _leads_nowhere(host: str) -> bool:
    """Whether it is an address that no Ollama can have, such as 0.0.0.0."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ":" in host
    return address.is_link_local or address.is_multicast or address.is_unspecified


SENDER = "<src>"
"""In a reply prefix: the name of the device that sent the task."""


def _prose(value: Any) -> str:
    """Text of several lines."""
    if not isinstance(value, str) or not (value.strip() and len(value) <= MAX_PROSE) or "\0" in value:
        raise ValueError(f"must be text in quotes of 1 to {MAX_PROSE} characters")
    return value


def _template(value: str) -> str:
    if not Template(value).is_valid():
        raise ValueError('must have a name behind every "$" ($temperature or ${temperature}), or another "$"')
    return value


def _options(value: Any) -> dict[str, Any]:
    try:
        return sampling.checked(_typed(dict, value))
    except Rejected as error:
        raise ValueError(f"must be sampling options ({error})") from None


def _format(value: Any) -> Any:
    if value != "json" and (fault := schema.malformed(_typed(dict, value))):
        raise ValueError(f'must be "json" or a JSON schema ({fault})')
    return value


def _sources(value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else _typed(list, value)
    if len(names) > MAX_SOURCES or not all(isinstance(one, str) and SOURCE.fullmatch(one) for one in names):
        raise ValueError(f"must be the name of a device, or a list of 0 to {MAX_SOURCES}")
    return tuple(names)


_CHARACTERS = "letters, digits, _ . and -"
_LEVEL = "[A-Za-z0-9_.-]+"
Seconds = Annotated[float, Within(0.1, 604_800)]
File = Annotated[Path, _absolute]
Level = Annotated[str, Within(1, 64), Like(_LEVEL, _CHARACTERS)]
Topic = Annotated[str, Within(1, 64), Like(f"{_LEVEL}(/{_LEVEL})*", f"levels of {_CHARACTERS}, joined by /")]
Prefix = Annotated[
    str,
    Within(2, 64),
    Like(
        f"({_LEVEL}/)+(({SENDER}|{_LEVEL})/)*",
        f"levels of {_CHARACTERS} or, not the first, {SENDER}, each with a / behind it",
    ),
]
Host = Annotated[str, Like(r"[A-Za-z0-9_.:%-]{1,253}", "a host name or an address")]
TypeName = Annotated[str, Within(1, 64), Like("[A-Za-z0-9_.:-]*", "letters, digits, _ . : and -")]
ModelName = Annotated[str, Within(1, 200), Like(r"[A-Za-z0-9][A-Za-z0-9_.:/-]*", "the name of a model")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Encryption to the broker; certificate and host name are always verified."""

    enabled: bool = False
    ca_file: File | None = None
    cert_file: File | None = None
    key_file: File | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mqtt:
    """The broker and how to talk to it."""

    host: Host = "127.0.0.1"
    port: Annotated[int, Within(1, 65_535)] = 1883
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    client_id: Level | None = None
    username: Annotated[str, Within(1, 256)] | None = None
    password_file: File | None = None
    keepalive_s: Annotated[int, Within(5, 3600)] = 30
    session_expiry_s: Annotated[int, Within(60, 4_294_967_295)] = 604_800
    max_packet_bytes: Annotated[int, Within(4096, 268_435_455)] = 2_000_000
    reply_prefixes: Annotated[tuple[Prefix, ...], Within(0, 16)] = ("reply/",)
    tls: Tls = field(default_factory=Tls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Http:
    """The gateway for those who speak HTTP."""

    enabled: bool = False
    host: Host = "127.0.0.1"
    port: Annotated[int, Within(1, 65_535)] = 5000
    tokens_file: File | None = None
    max_waiting: Annotated[int, Within(1, 256)] = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaConfig:
    """Where Ollama is, and how long each step may take."""

    url: Annotated[str, _ollama_url] = "http://127.0.0.1:11434"
    connect_timeout_s: Annotated[float, Within(0.1, 60)] = 5
    load_timeout_s: Seconds = 900
    first_token_timeout_s: Seconds = 300
    token_gap_timeout_s: Seconds = 60
    task_timeout_s: Seconds = 1800
    allow_pull: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """How much memory models may take, and how long they stay in it."""

    memory_budget_bytes: Annotated[int, Within(1 << 26, 1 << 40)] | None = None
    memory_reserve_bytes: Annotated[int, Within(0, 1 << 40)] | None = None
    model_timeout_s: Seconds = 300
    max_resident: Annotated[int, Within(1, 64)] | None = None
    prefetch: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """What is set for one model."""

    pinned: bool = False
    preload: bool = False
    fallback: Annotated[tuple[ModelName, ...], Within(0, 8)] = ()
    num_ctx: Annotated[int, Within(128, 1_048_576)] = 2048
    max_tokens: Annotated[int, Within(1, 1_048_576)] = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Which models may be asked for, and the settings of each."""

    default: ModelName = "qwen2.5:0.5b-instruct"
    only_listed: bool = False
    defaults: ModelSettings = field(default_factory=ModelSettings)
    settings: Annotated[Mapping[ModelName, ModelSettings], Within(0, 64)] = field(default_factory=dict)
    """Complete: what the file leaves out of an entry is taken from ``defaults``."""

    def for_model(self, name: str) -> ModelSettings:
        """The settings of ``name``, listed or not."""
        return self.settings.get(name, self.defaults)

    def allows(self, name: str) -> bool:
        """Whether a task may ask for ``name``."""
        return not self.only_listed or name in self.settings


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskType:
    """What holds for the tasks of one type where they state nothing else."""

    model: ModelName | None = None
    template: Annotated[Any, _prose, _template] | None = None
    system: Annotated[Any, _prose] | None = None
    options: Annotated[Any, _options] = field(default_factory=dict)
    format: Annotated[Any, _format] | None = None
    max_tokens: Annotated[int, Within(1, 1_048_576)] | None = None
    priority: Literal["urgent", "high", "normal", "low"] | None = None
    ttl_s: Annotated[float, Within(1, 604_800)] | None = None
    fallback: Annotated[tuple[ModelName, ...], Within(0, 8)] | None = None
    locked: tuple[
        Literal["model", "template", "system", "options", "format", "max_tokens", "priority", "ttl_s"], ...
    ] = ()
    topic_source: Annotated[Any, _sources] = ()


def _shipped_types() -> dict[str, TaskType]:
    """The examples of ``config.yaml``."""
    exact = {"temperature": 0}
    state = {"type": "string", "enum": ["normal", "warning", "alarm"]}
    text = {"type": "string", "maxLength": 40}
    return {
        "arithmetic": TaskType(template="What is $expression?", options=exact, max_tokens=64),
        "classify": TaskType(
            template="A machine reports a temperature of $temperature $unit.\n"
            "Below 60 C is normal, 60 to 80 C is a warning, above 80 C is an alarm. Which is it?",
            options=exact,
            format=_object_of(state=state),
            max_tokens=32,
        ),
        "summarize": TaskType(
            template="Summarize the following text in one sentence:\n$text", options=exact, max_tokens=96
        ),
        "extract": TaskType(
            template="What was measured, which value, which unit?\n$text",
            options=exact,
            format=_object_of(quantity=text, value={"type": "number"}, unit=text),
            max_tokens=64,
        ),
    }


def _object_of(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """How many tasks are kept, how large, for how long."""

    max_tasks: Annotated[int, Within(1, 1_000_000)] = 10_000
    urgent_reserve: Annotated[int, Within(0, 100_000)] = 100
    max_bytes: Annotated[int, Within(1 << 20, 1 << 36)] = 268_435_456
    max_payload_bytes: Annotated[int, Within(256, 16_777_216)] = 262_144
    max_result_bytes: Annotated[int, Within(1024, 16_777_216)] = 1_048_576
    max_attempts: Annotated[int, Within(1, 100)] = 3
    default_ttl_s: Annotated[float, Within(1, 31_536_000)] = 86_400
    per_source_rate: Annotated[float, Within(0.01, 100_000)] | None = None
    per_source_tasks: Annotated[int, Within(1, 1_000_000)] | None = None
    retention_s: Annotated[float, Within(60, 31_536_000)] = 604_800
    retention_bytes: Annotated[int, Within(1 << 20, 1 << 40)] = 268_435_456


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftWait:
    """Seconds after which a waiting task counts as overdue, by priority."""

    high: Seconds = 60
    normal: Seconds = 300
    low: Seconds = 1800


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler:
    """When to leave a resident model for another."""

    soft_wait_s: SoftWait = field(default_factory=SoftWait)
    urgent_swap_share: Annotated[float, Within(0, 1)] = 0.25
    preempt: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Csv:
    """The CSV log."""

    path: Annotated[Path, _without_parent] = Path("llm_metrics.csv")
    rotate_bytes: Annotated[int, Within(65_536, 1 << 30)] = 10_485_760
    keep: Annotated[int, Within(1, 1000)] = 10
    text: Literal["full", "cut", "off"] = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """The samples of the board's state."""

    interval_s: Annotated[float, Within(1, 86_400)] = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """The lines for the journal."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    prompts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of ``config.yaml``. ``Config()`` is the shipped file."""

    node: Level | None = None
    base_topic: Topic = "edge-llm"
    data_dir: File = Path("/var/lib/edge-llm")
    drain_timeout_s: Annotated[float, Within(0, 3600)] = 20
    mqtt: Mqtt = field(default_factory=Mqtt)
    http: Http = field(default_factory=Http)
    ollama: OllamaConfig = field(default_factory=OllamaConfig)
    pool: Pool = field(default_factory=Pool)
    models: Models = field(default_factory=Models)
    task_types: Annotated[Mapping[TypeName, TaskType], Within(0, 64)] = field(default_factory=_shipped_types)
    queue: Queue = field(default_factory=Queue)
    scheduler: Scheduler = field(default_factory=Scheduler)
    csv: Csv = field(default_factory=Csv)
    telemetry: Telemetry = field(default_factory=Telemetry)
    log: Log = field(default_factory=Log)

    @property
    def node_name(self) -> str:
        """The name of this node, one topic level: ``node``, or the host's name."""
        return self.node or _hostname()

    @property
    def models_named(self) -> tuple[str, ...]:
        """Every model that is named anywhere, as it is written there; the default comes first."""
        models, types = self.models, self.task_types.values()
        names = [models.default, *models.settings, *models.defaults.fallback]
        names += [name for settings in models.settings.values() for name in settings.fallback]
        names += [name for kind in types for name in (kind.model, *(kind.fallback or ())) if name]
        return tuple(dict.fromkeys(names))

    @property
    def topic_root(self) -> str:
        """``<base_topic>/<node>``, under which all topics of the daemon lie."""
        return f"{self.base_topic}/{self.node_name}"

    @property
    def ollama_is_here(self) -> bool:
        """Whether the models are in the memory of this machine."""
        return is_here(urlsplit(self.ollama.url).hostname or "")

    @property
    def csv_path(self) -> Path:
        """The CSV log; a relative ``csv.path`` lies in ``data_dir``."""
        return self.data_dir / self.csv.path


@cache  # a host that is renamed while we run must not split our topics in two
def _hostname() -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:64] or "node"


def load(path: Path | None, overrides: Mapping[str, object] | None = None) -> Config:
    """The configuration from a file, or the defaults when ``path`` is None.

    Args:
        path: a YAML file of at most ``MAX_FILE_BYTES``, UTF-8.
        overrides: values from the command line by dotted key, such as ``{"mqtt.port": 1884}``; they win over the file
            and are checked as strictly.

    Raises:
        ConfigError: one line that names the key, its problem and the limit, with file and line if it is in the file.
    """
    if path is None:
        return _build("", overrides or {})
    return _build(_read_config(path), overrides or {}, origin=f"{path}: ")


def parse(text: str) -> Config:
    """The configuration from the text of a file.

    Raises:
        ConfigError: as ``load`` does, without a file.
    """
    return _build(text, {})


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The dotted keys in which two configurations differ."""
    keys: list[str] = []
    for item in dataclasses.fields(old):
        before, after, key = getattr(old, item.name), getattr(new, item.name), prefix + item.name
        if dataclasses.is_dataclass(before):
            keys += changed_keys(before, after, f"{key}.")
        elif before != after:
            keys.append(key)
    return keys


def mqtt_password(config: Config) -> str | None:
    """The broker's password, or None: from the systemd credential, ``mqtt.password_file`` or the environment.

    Raises:
        ConfigError: the source is there but cannot be read, is empty or not UTF-8, or there is no user name to it.
    """
    if credential := _credential(PASSWORD_NAME):
        password = _secret_file(f"credential {PASSWORD_NAME}", credential)
    elif config.mqtt.password_file:
        password = _secret_file("mqtt.password_file", config.mqtt.password_file)
    elif PASSWORD_VARIABLE in os.environ:
        password = _secret(PASSWORD_VARIABLE, os.environb[PASSWORD_VARIABLE.encode()])
    else:
        return None
    if config.mqtt.username is None:
        raise ConfigError("mqtt.username: must be set, because there is a password")
    return password


def http_tokens(config: Config) -> Mapping[str, str]:
    """Who may come in over HTTP: names by token, from the systemd credential or ``http.tokens_file``.

    None at all means anybody on this machine, and is for a loopback address only.

    Raises:
        ConfigError: tokens are needed and there are none, or their file cannot be read, is open to others or wrong.
    """
    http = config.http
    if not http.enabled:
        return {}
    if credential := _credential(TOKENS_NAME):
        return _tokens(f"credential {TOKENS_NAME}", credential)
    if http.tokens_file:
        return _tokens("http.tokens_file", http.tokens_file)
    if not is_loopback(http.host):
        raise ConfigError(f"http.tokens_file: must be set, because http.host is {http.host} and not a loopback address")
    return {}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``, as far as its name says."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_here(host: str) -> bool:
    """Whether ``host`` is this machine, as far as its name says."""
    own = socket.gethostname().lower()
    return is_loopback(host) or host.lower() in (own, f"{own}.local")


def _tokens(source: str, path: Path) -> dict[str, str]:
    data, mode = _read(source, path)
    if mode & 0o037:
        raise ConfigError(f"{source}: {path}: others can read or change it; chmod 640 or stricter")
    tokens: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        entry = re.fullmatch(r"([A-Za-z0-9_.-]{1,64}):([!-~]{16,256})", line)
        if not entry:
            problem = (
                "must be NAME:TOKEN, a name of 1 to 64 letters, digits, _ . and -, a token of 16 to 256 characters"
            )
            raise ConfigError(f"{source}: {path}: line {number}: {problem}")
        if entry[2] in tokens:
            raise ConfigError(f"{source}: {path}: line {number}: this token stands there for the second time")
        tokens[entry[2]] = entry[1]
    if not tokens:
        raise ConfigError(f"{source}: {path}: there is no token in it")
    return tokens


def _credential(name: str) -> Path | None:
    """What systemd has laid ready for us under ``name``."""
    path = Path(os.environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent", name)
    return path if path.exists() else None


def _secret_file(source: str, path: Path) -> str:
    data, mode = _read(source, path)
    if mode & stat.S_IROTH:
        log.warning("%s: every user can read it; chmod 600 is advised", path)
    return _secret(source, data)


def _secret(source: str, data: bytes) -> str:
    """The text of a secret, without the newline that editors put at the end."""
    try:
        secret = data.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: the password is not UTF-8") from None
    if not secret:
        raise ConfigError(f"{source}: the password is empty")
    return secret


def _read(source: str, path: Path) -> tuple[bytes, int]:
    """What is in a file, and its mode."""
    try:
        with path.open("rb") as file:
            data, mode = file.read(MAX_FILE_BYTES + 1), os.fstat(file.fileno()).st_mode
    except OSError as error:
        hint = "; try sudo, or another file with --config" if isinstance(error, PermissionError) else ""
        raise ConfigError(f"{source}: {path}: {error.strerror}{hint if source == 'config' else ''}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{source}: {path}: must be at most {MAX_FILE_BYTES} bytes")
    return data, mode


def _read_config(path: Path) -> str:
    data, mode = _read("config", path)
    if mode & stat.S_IWOTH:
        raise ConfigError(f"config: {path}: every user can change it, and through it the daemon; chmod o-w it")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {line}: must be UTF-8") from None


# From data to records, by their annotations.


class _Wrong(ConfigError):
    """What is wrong, and with which key."""

    def __init__(self, keys: Keys, problem: str) -> None:
        dotted = ".".join(keys)[:120] or "config"
        super().__init__(f"{dotted if dotted.isprintable() else ascii(dotted)}: {problem}")
        self.keys = keys


def _build(text: str, overrides: Mapping[str, object], *, origin: str = "") -> Config:
    """The configuration; ``origin`` goes before a complaint about ``text``."""
    lines: dict[Keys, int] = {}
    try:
        config: Config = _section(Config(), _parse_yaml(text, lines), ())
        for dotted, value in overrides.items():
            keys = tuple(dotted.split("."))
            lines.pop(keys, None)  # a complaint about it is not one about the file
            nested = functools.reduce(lambda inner, key: {key: inner}, reversed(keys), value)
            config = _section(config, nested, ())
        _check_together(config)
    except _Wrong as wrong:
        if line := lines.get(wrong.keys):
            origin += f"line {line}: "
        elif wrong.keys:  # of the command line, or of several keys together
            origin = ""
        raise ConfigError(f"{origin}{wrong}") from None
    except ConfigError as error:  # it is not YAML
        raise ConfigError(f"{origin}{error}") from None
    return config


def _section(base: Any, data: object, keys: Keys) -> Any:
    """``base``, a record, with those fields replaced that ``data`` names."""
    if data is None:  # a section whose keys are all commented out
        return base
    if not isinstance(data, Mapping):
        raise _Wrong(keys, f"must be a section of keys, not {_kind(data)}")
    hints = _hints(base.__class__)
    for key in data:
        if key not in hints:
            raise _Wrong((*keys, str(key)), _unknown_key(str(key), list(hints)))
    for key, hint in hints.items():  # in this order, since a map of records builds on the ``defaults`` before it
        if key in data:
            base = dataclasses.replace(base, **{key: _value(hint, data[key], (*keys, key), base)})
    return base


def _value(hint: Any, data: Any, keys: Keys, owner: Any) -> Any:
    """``data`` as the type that ``hint`` says, by its rules. ``owner`` is the record that the value is for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _section(getattr(owner, keys[-1]), data, keys)
    if origin in (types.UnionType, typing.Union):
        return None if data is None else _value(arguments[0], data, keys, owner)
    try:
        if origin is Annotated:
            value = _value(arguments[0], data, keys, owner)
            return functools.reduce(lambda kept, rule: rule(kept), arguments[1:], value)
        if origin is tuple:
            return tuple(_value(arguments[0], item, keys, owner) for item in _typed(list, data))
        if origin is Mapping:
            names = {name: _value(arguments[0], name, keys, owner) for name in _typed(dict, data)}
            base = getattr(owner, "defaults", arguments[1]())
            return {name: _section(base, data[name], (*keys, name)) for name in names}
        if origin is Literal and data not in arguments:
            raise ValueError(f"must be one of {', '.join(map(_show, arguments))}")
        return data if origin is Literal or hint is Any else _typed(hint, data)
    except (ValueError, OverflowError) as error:
        raise _Wrong(keys, f"{error}, not {_kind(data)}") from None


@cache
def _hints(record: Any) -> dict[str, Any]:
    return typing.get_type_hints(record, include_extras=True)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "a section of keys"}


def _typed(kind: type, data: Any) -> Any:
    """``data`` if it is exactly of this type; a whole number also counts as a float, and text as a path."""
    if kind is float and type(data) is int:
        return float(data)
    if kind is Path and isinstance(data, str | Path):
        return Path(_typed(str, str(data)))
    if type(data) is not kind:
        raise ValueError(f"must be {_KINDS.get(kind, 'text in quotes')}")
    if isinstance(data, str) and not (0 < len(data) <= MAX_TEXT and data.isprintable()):
        raise ValueError(f"must be text of 1 to {MAX_TEXT} characters without control characters")
    return data


def _unknown_key(key: str, known: list[str]) -> str:
    """The complaint about ``key``, with what was probably meant: a near one beside it, or the same elsewhere."""
    elsewhere = [dotted for dotted in _all_keys(Config) if dotted.endswith(f".{key}")]
    if meant := difflib.get_close_matches(key[:64], known, n=1) or elsewhere:
        return f'unknown key, did you mean "{meant[0]}"?'
    return f"unknown key, known here are {', '.join(known)}"


def _all_keys(record: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in _hints(record).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(hint, f"{prefix}{name}.")


def _kind(data: object) -> str:
    """A value from outside in a few words, on one line."""
    if isinstance(data, list | tuple | Mapping):
        return f"a {'section' if isinstance(data, Mapping) else 'list'} of {len(data)}"
    return f"the text {_show(str(data))}" if isinstance(data, str | Path) else _show(data)


def _show(value: object) -> str:
    cut = value[:60] if isinstance(value, str) else value
    return json.dumps(cut, ensure_ascii=not str(cut).isprintable(), default=str)[:100]


def _check_together(config: Config) -> None:
    """What must hold between keys."""
    mqtt, tls, models, queue = config.mqtt, config.mqtt.tls, config.models, config.queue
    tree = f"{config.base_topic}/"
    fixed_parts = [prefix.partition(SENDER)[0] for prefix in mqtt.reply_prefixes]
    pinned = sum(settings.pinned for settings in models.settings.values())
    for key, is_wrong, problem in (
        ("mqtt.tls.key_file", tls.key_file and not tls.cert_file, "needs cert_file too"),
        ("mqtt.tls.enabled", not tls.enabled and (tls.ca_file or tls.cert_file), "is false, but a file for it is set"),
        ("mqtt.password_file", mqtt.password_file and not mqtt.username, "needs mqtt.username too"),
        (
            "mqtt.reply_prefixes",
            any(fixed.startswith(tree) or tree.startswith(fixed) for fixed in fixed_parts),
            f"must lie outside {tree}, or an answer could pass for a task",
        ),
        (
            "pool.memory_budget_bytes",
            config.pool.memory_budget_bytes is None and not config.ollama_is_here,
            "must be set, because ollama.url is another machine, whose memory cannot be seen from here",
        ),
        (
            "pool.max_resident",
            pinned > (config.pool.max_resident or pinned),
            f"must be at least {pinned}, for as many are pinned",
        ),
        ("models.default", not models.allows(models.default), "must be in models.settings, because of only_listed"),
        ("queue.urgent_reserve", queue.urgent_reserve >= queue.max_tasks, "must be less than max_tasks"),
        ("queue.max_payload_bytes", queue.max_payload_bytes > queue.max_bytes, "must not exceed max_bytes"),
        (
            "queue.max_result_bytes",
            queue.max_result_bytes > mqtt.max_packet_bytes,
            "must not exceed mqtt.max_packet_bytes",
        ),
    ):
        if is_wrong:
            raise _Wrong(tuple(key.split(".")), problem)
    _check_fallbacks(models)
    _check_types(config)


def _check_types(config: Config) -> None:
    owners: dict[str, str] = {}
    for name, kind in config.task_types.items():
        keys = ("task_types", name)
        for key, models in (("model", (kind.model,)), ("fallback", kind.fallback or ())):
            for model in models:
                if model is not None and not config.models.allows(model):
                    raise _Wrong((*keys, key), f"{model} must be in models.settings, because of only_listed")
        for source in kind.topic_source:
            if owners.setdefault(source, name) != name:
                raise _Wrong((*keys, "topic_source"), f"{source} belongs to task_types.{owners[source]}")
        if kind.template is None and "template" in kind.locked:
            raise _Wrong((*keys, "locked"), "template must be set before it can be locked")


def _check_fallbacks(models: Models) -> None:
    named = [models.defaults, *models.settings.values()]
    names = {models.default, *models.settings, *(name for settings in named for name in settings.fallback)}
    try:
        graphlib.TopologicalSorter({name: models.for_model(name).fallback for name in sorted(names)}).prepare()
    except graphlib.CycleError as error:
        cycle = " -> ".join(reversed(error.args[1]))
        raise _Wrong(("models", "settings"), f"a fallback must not lead back to its model: {cycle}") from None


# From text to data: a plain subset of YAML.


def _parse_yaml(text: str, lines: dict[Keys, int]) -> object:
    """The data in ``text``; the line of every key goes into ``lines``."""
    try:
        node = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}{error.problem}"[:200]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"line {line}: contains a character that YAML does not allow") from None
    except (ValueError, OverflowError):  # PyYAML lets these out for "\U00110000" and %YAML 1.9..9
        raise ConfigError("config: a number in it is out of range for YAML") from None
    return _plain(node, (), lines) if node else None


class _Loader(yaml.BaseLoader):
    """Takes only what a configuration needs, so that no file can cost much time, memory or stack."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node of the tree, once its first event has passed."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if problem := self._problem(event):
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self._depth += 1
        self._count += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _problem(self, event: Any) -> str | None:
        if isinstance(event, yaml.AliasEvent):
            return "aliases (*name) are not supported"
        if event.tag is not None:
            return "tags (!name) are not supported"
        if self._depth == MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH} levels"
        return f"more than {MAX_NODES} keys and values" if self._count == MAX_NODES else None


def _plain(node: Any, keys: Keys, lines: dict[Keys, int]) -> object:
    """The data of ``node``; the line of each key goes into ``lines``."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, keys, lines) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node.value) if node.style is None else node.value
    data: dict[str, object] = {}
    for key, value in node.value:
        line, name = key.start_mark.line + 1, key.value  # as it is written: `on:` is a key of that name
        if not isinstance(name, str):
            raise ConfigError(f"line {line}: a key must be text")
        lines[*keys, name] = line
        if name in data:
            raise _Wrong((*keys, name), "stands here for the second time")
        data[name] = _plain(value, (*keys, name), lines)
    return data


_WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null"), None),
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
}


def _scalar(text: str) -> object:
    """What a text without quotes means; numbers are decimal only, so 0100 and 1:30 stay text."""
    word = text.lower()
    if word in _WORDS:
        return _WORDS[word]
    if re.fullmatch(r"[-+]?(0|[1-9][0-9_]{0,17})", text):
        return int(text.replace("_", ""))
    return float(text) if re.fullmatch(r"[-+]?[0-9]{1,18}\.[0-9]{1,18}", text) else text
