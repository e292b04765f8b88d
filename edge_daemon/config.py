"""``config.yaml`` -> ``Config``: frozen, typed, with every limit in one place.

The classes below are the reference for the code, ``config.yaml`` is the same for people, and a test holds the two
together. A field's annotation says everything about it: its type, and in ``Annotated`` its rules. One generic
converter reads any section by them, so a new key is one line here and one entry in the file.
"""

import dataclasses
import difflib
import functools
import graphlib
import ipaddress
import json
import logging
import math
import os
import re
import socket
import stat
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

import yaml

from edge_daemon.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_NODES = 10_000
PASSWORD_NAME = "mqtt_password"  # noqa: S105  # the name of the systemd credential, not a secret
PASSWORD_VARIABLE = "EDGE_LLM_MQTT_PASSWORD"  # noqa: S105  # the name of a variable, not a secret

Path_ = tuple[str, ...]
"""The keys that lead to a value."""
Lines = dict[Path_, int]
"""Where each key stands in the file, from 1."""

log = logging.getLogger(__name__)


# Rules: each takes a value of the right type, and returns what is to be kept or raises ValueError with the problem.


@dataclass(frozen=True, slots=True)
class Within:
    """From ``low`` to ``high``, both included; of a text, a list or a map the length counts."""

    low: float
    high: float

    def __call__(self, value: Any) -> Any:
        """The value itself."""
        size = len(value) if isinstance(value, str | tuple | dict) else value
        if self.low <= size <= self.high:  # false for NaN too
            return value
        subject = f"{_show(value)} must be" if size is value else "must have"
        unit = "" if size is value else " characters" if isinstance(value, str) else " entries"
        raise ValueError(f"{subject} {self}{unit}")

    def __str__(self) -> str:
        return f"{self.low} to {self.high}"


@dataclass(frozen=True, slots=True)
class Like:
    """The whole text matches ``pattern``, which ``meaning`` puts into words."""

    pattern: str
    meaning: str

    def __call__(self, value: str) -> str:
        """The text itself."""
        if not re.fullmatch(self.pattern, value):
            raise ValueError(f"{_show(value)} must be {self.meaning}")
        return value


def _absolute(value: Path) -> Path:
    try:
        path = value.expanduser()
    except RuntimeError:
        raise ValueError(f"{_show(str(value))}: there is no such home directory") from None
    if not path.is_absolute():
        raise ValueError(f"{_show(str(value))} must be an absolute path")
    return path


def _inside_or_absolute(value: Path) -> Path:
    if ".." in value.parts:
        raise ValueError(f'{_show(str(value))} must not contain ".."')
    return value


def _ollama_url(value: str) -> str:
    """``scheme://host[:port]`` without anything that could send requests elsewhere than it seems."""
    shape = re.fullmatch(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?/?", value)
    if not shape:
        raise ValueError(f"{_show(value)} must be http://HOST:PORT or https://HOST:PORT, without user or path")
    try:
        parts = urlsplit(value)
        usable = parts.port != 0
    except ValueError:
        usable = False
    if not usable or not _is_reachable(shape[1].strip("[]")):
        raise ValueError(f"{_show(value)} must name a host and a port that can be connected to")
    return value.rstrip("/")


def _is_reachable(host: str) -> bool:
    """Whether one Ollama can live there: any name, and any address but link-local, multicast and "any"."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return not re.fullmatch(r"[0-9a-fA-Fx.:]*[0-9:]", host)  # 0x7f.1 and 2130706433 are addresses in disguise
    return not (address.is_link_local or address.is_multicast or address.is_unspecified)


_LEVEL = "[A-Za-z0-9_.-]+"
Seconds = Annotated[float, Within(0.1, 604_800)]
File = Annotated[Path, _absolute]
TopicName = Annotated[str, Within(1, 64), Like(_LEVEL, "letters, digits, _ . and - only")]
TopicTree = Annotated[str, Within(1, 64), Like(f"{_LEVEL}(/{_LEVEL})*", "levels of letters, digits, _ . and -")]
ReplyPrefix = Annotated[
    str, Within(2, 64), Like(f"({_LEVEL}/)+", 'levels of letters, digits, _ . and -, each with "/"')
]
Host = Annotated[str, Like(r"[A-Za-z0-9_.:%-]{1,253}", "a host name or an address")]
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
    client_id: TopicName | None = None
    username: Annotated[str, Within(1, 256)] | None = None
    password_file: File | None = None
    keepalive_s: Annotated[int, Within(5, 3600)] = 30
    session_expiry_s: Annotated[int, Within(60, 4_294_967_295)] = 604_800
    max_packet_bytes: Annotated[int, Within(4096, 268_435_455)] = 2_000_000
    reply_prefixes: Annotated[tuple[ReplyPrefix, ...], Within(0, 16)] = ("reply/",)
    tls: Tls = field(default_factory=Tls)


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

    path: Annotated[Path, _inside_or_absolute] = Path("llm_metrics.csv")
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

    node: TopicName | None = None
    base_topic: TopicTree = "edge-llm"
    data_dir: File = Path("/var/lib/edge-llm")
    drain_timeout_s: Annotated[float, Within(0, 3600)] = 20
    mqtt: Mqtt = field(default_factory=Mqtt)
    ollama: OllamaConfig = field(default_factory=OllamaConfig)
    pool: Pool = field(default_factory=Pool)
    models: Models = field(default_factory=Models)
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
    def topic_root(self) -> str:
        """``<base_topic>/<node>``, under which all topics of the daemon lie."""
        return f"{self.base_topic}/{self.node_name}"

    @property
    def client_id(self) -> str:
        """The MQTT client id, the same at every start: the broker keeps our session under it."""
        return self.mqtt.client_id or f"edge-llm-{self.node_name}"

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
        ConfigError: one line that names the key, its problem and the limit, with the line number if it is in the file.
    """
    return _build("" if path is None else _read(path), overrides or {})


def parse(text: str) -> Config:
    """The configuration from the text of a file.

    Raises:
        ConfigError: as ``load`` does.
    """
    return _build(text, {})


def mqtt_password(config: Config) -> str | None:
    """The broker's password, or None: from the systemd credential, ``mqtt.password_file`` or the environment.

    Raises:
        ConfigError: the source is there but cannot be read, is empty or not UTF-8, or there is no user name to it.
    """
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    credential = Path(credentials, PASSWORD_NAME) if credentials else None
    if credential and credential.exists():
        password = _secret(f"credential {PASSWORD_NAME}", _read_secret(credential))
    elif config.mqtt.password_file:
        password = _secret("mqtt.password_file", _read_secret(config.mqtt.password_file))
    elif PASSWORD_VARIABLE in os.environ:
        password = _secret(PASSWORD_VARIABLE, os.fsencode(os.environ[PASSWORD_VARIABLE]))
    else:
        return None
    if config.mqtt.username is None:
        raise ConfigError("mqtt.username: must be set, because there is a password")
    return password


def _read_secret(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                log.warning("%s: every user can read it; chmod 600 is advised", path)
            return file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"mqtt.password_file: {path}: {error.strerror}") from None


def _secret(source: str, data: bytes) -> str:
    """The text of a secret, without the newline that editors put at the end."""
    try:
        secret = data.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: the password is not UTF-8") from None
    if not secret:
        raise ConfigError(f"{source}: the password is empty")
    return secret


# From data to records. A path is the tuple of the keys that lead to a value.


class _Wrong(ConfigError):
    """What is wrong, and with which key."""

    def __init__(self, path: tuple[str, ...], problem: str) -> None:
        super().__init__(f"{'.'.join(map(_name, path))}: {problem}" if path else problem)
        self.path = path


def _build(text: str, overrides: Mapping[str, object]) -> Config:
    data, lines = _parse_yaml(text)
    try:
        config = _section(Config(), data, ())
        for key, value in overrides.items():
            names = tuple(key.split("."))
            lines.pop(names, None)
            nested = functools.reduce(lambda inner, name: {name: inner}, reversed(names), value)
            config = _section(config, nested, ())
        _check_together(config)
    except _Wrong as wrong:
        line = lines.get(wrong.path)
        raise ConfigError(f"line {line}: {wrong}" if line else str(wrong)) from None
    return config


def _section(base: Any, data: object, path: Path_) -> Any:
    """``base``, a record, with the fields that ``data`` names replaced."""
    if data is None:  # all its keys are commented out
        return base
    if not isinstance(data, Mapping):
        raise _Wrong(path, f"must be a section of keys, not {_kind(data)}")
    hints = _hints(type(base))
    for name in data:
        if name not in hints:
            raise _Wrong((*path, str(name)), _unknown_key(str(name), path, list(hints)))
    for name, hint in hints.items():  # in this order, for a map of records stands on the ``defaults`` before it
        if name in data:
            base = dataclasses.replace(base, **{name: _value(hint, data[name], base, (*path, name))})
    return base


def _value(hint: Any, data: object, owner: Any, path: Path_) -> Any:
    """``data`` as the type that ``hint`` says, with its rules kept."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _section(getattr(owner, path[-1]), data, path)
    try:
        if origin is Annotated:
            value = _value(arguments[0], data, owner, path)
            return functools.reduce(lambda kept, rule: rule(kept), arguments[1:], value)
        if origin in (types.UnionType, typing.Union):
            return None if data is None else _value(arguments[0], data, owner, path)
        if origin is tuple:
            return tuple(_value(arguments[0], item, owner, path) for item in _typed(list, data))
        if origin is Mapping:
            names, record = arguments
            return {
                _value(names, name, owner, (*path, str(name))): _section(owner.defaults, item, (*path, str(name)))
                for name, item in _typed(dict, data).items()
            }
        if origin is Literal:
            return _one_of(arguments, data)
        return _typed(hint, data)
    except ValueError as error:
        raise _Wrong(path, str(error)) from None


@cache
def _hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record, include_extras=True)


def _typed(kind: type, data: object) -> Any:
    """``data`` if it is exactly of this type; an integer also counts as a float, and text as a path."""
    if kind is float and type(data) is int:
        return float(data)
    if kind is Path and isinstance(data, str | Path):
        return Path(_typed(str, str(data)))
    if type(data) is not kind:
        hint = "; put it in quotes" if kind is str and isinstance(data, int | float) else ""
        raise ValueError(f"must be {_KINDS[kind]}, not {_kind(data)}{hint}")
    if kind is str and not (str(data).isprintable() and data):
        raise ValueError(f"must not be empty or contain control characters: {_show(data)}")
    return data


def _one_of(choices: tuple[str, ...], data: object) -> object:
    if data not in choices:
        raise ValueError(f"must be one of {', '.join(map(_show, choices))}, not {_kind(data)}")
    return data


def _unknown_key(name: str, path: Path_, known: list[str]) -> str:
    """The complaint about ``name``, with the key that was probably meant: a near one here, or the same elsewhere."""
    if near := difflib.get_close_matches(name[:64], known, n=1):
        return f'unknown key, did you mean "{near[0]}"?'
    if elsewhere := [key for key in _all_keys(Config) if key.split(".")[-1] == name]:
        return f'unknown key, did you mean "{elsewhere[0]}"?'
    return f"unknown key; known here are {', '.join(known)}"


def _all_keys(record: type, prefix: str = "") -> Iterator[str]:
    for name, hint in _hints(record).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(hint, f"{prefix}{name}.")


# What must hold between keys: the key to blame, the condition, the complaint.
_TOGETHER: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    ("mqtt.tls.key_file", lambda c: not c.mqtt.tls.key_file or bool(c.mqtt.tls.cert_file), "needs cert_file too"),
    (
        "mqtt.tls.enabled",
        lambda c: c.mqtt.tls.enabled or not (c.mqtt.tls.ca_file or c.mqtt.tls.cert_file),
        "is false, but ca_file or cert_file is set: set it to true, or remove them",
    ),
    ("mqtt.password_file", lambda c: not c.mqtt.password_file or bool(c.mqtt.username), "needs mqtt.username too"),
    (
        "mqtt.reply_prefixes",
        lambda c: not any(_overlap(prefix, f"{c.base_topic}/") for prefix in c.mqtt.reply_prefixes),
        "must lie outside base_topic, or an answer could pass for a task",
    ),
    (
        "pool.memory_reserve_bytes",
        lambda c: (c.pool.memory_reserve_bytes or 0) < (c.pool.memory_budget_bytes or math.inf),
        "must be less than pool.memory_budget_bytes",
    ),
    ("models.default", lambda c: c.models.allows(c.models.default), "must be in models.settings with only_listed"),
    ("queue.urgent_reserve", lambda c: c.queue.urgent_reserve < c.queue.max_tasks, "must be less than max_tasks"),
    ("queue.max_payload_bytes", lambda c: c.queue.max_payload_bytes <= c.queue.max_bytes, "must not exceed max_bytes"),
    (
        "queue.max_result_bytes",
        lambda c: c.queue.max_result_bytes <= min(c.queue.max_bytes, c.mqtt.max_packet_bytes),
        "must not exceed max_bytes, nor mqtt.max_packet_bytes",
    ),
    (
        "pool.max_resident",
        lambda c: sum(m.pinned for m in c.models.settings.values()) <= (c.pool.max_resident or math.inf),
        "must not be less than the number of pinned models",
    ),
)


def _overlap(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


def _check_together(config: Config) -> None:
    for key, holds, problem in _TOGETHER:
        if not holds(config):
            raise _Wrong(tuple(key.split(".")), problem)
    models = config.models
    names = {models.default, *models.settings, *models.defaults.fallback}
    try:
        graphlib.TopologicalSorter({name: models.for_model(name).fallback for name in names}).prepare()
    except graphlib.CycleError as error:
        cycle = " -> ".join(reversed(error.args[1]))
        raise _Wrong(("models", "settings"), f"the fallback of a model must not lead back to it: {cycle}") from None


# From text to data: a plain subset of YAML.


def _read(path: Path) -> str:
    """The text of a regular file that not everybody may write."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: must be at most {MAX_FILE_BYTES} bytes")
    if status.st_mode & stat.S_IWOTH:
        raise ConfigError(f"{path}: every user can change it; take that away: chmod o-w {path}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"line {line}: {path}: must be UTF-8") from None


class _Loader(yaml.SafeLoader):
    """YAML without what a configuration does not need: tags, aliases, depth, octal and base-60 numbers, dates."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node, as long as it keeps to the subset."""
        event = self.peek_event()
        self._depth += 1
        self._nodes += 1
        for refused, what in (
            (isinstance(event, yaml.AliasEvent), "an alias (*name) is not supported"),
            (getattr(event, "tag", None) is not None, "a tag (!name) is not supported"),
            (self._depth > MAX_DEPTH, f"more than {MAX_DEPTH} levels"),
            (self._nodes > MAX_NODES, f"more than {MAX_NODES} keys and values"),
        ):
            if refused:
                raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def plain(self, node: yaml.Node, path: Path_, lines: Lines) -> object:
        """The data of ``node``; the line of each key goes into ``lines``."""
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, path, lines) for item in node.value]
        if not isinstance(node, yaml.MappingNode):
            return self.construct_object(node)
        data: dict[str, object] = {}
        for key, value in node.value:
            name = key.value  # as written: `on:` is a key called on
            line = key.start_mark.line + 1
            if not isinstance(name, str):
                raise ConfigError(f"line {line}: a key must be text")
            if name in data:
                raise ConfigError(f"line {line}: {_Wrong((*path, name), 'is there twice')}")
            lines[*path, name] = line
            data[name] = self.plain(value, (*path, name), lines)
        return data


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"(?i:true|false|yes|no|on|off)", list("tTfFyYnNoO")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]{0,17})", list("-+0123456789")),
    ("float", r"[-+]?(?:0|[1-9][0-9_]*)\.[0-9]+", list("-+0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def _parse_yaml(text: str) -> tuple[object, Lines]:
    """The data in ``text``, and the line of every key."""
    lines: Lines = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"[:200]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"line {line}: a character that is not allowed in YAML: {error.character!r}") from None
    except (ValueError, OverflowError):  # PyYAML lets these out for \U00110000 and for %YAML 1.9..9
        raise ConfigError("not YAML: a number or an escape is out of range") from None
    return (loader.plain(node, (), lines) if node else None), lines


# How things are called in messages, which are always one line.

_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    list: "a list",
    dict: "a section of keys",
}


def _kind(data: object) -> str:
    """A value in words, short."""
    if isinstance(data, list | tuple):
        return "a list"
    if isinstance(data, Mapping):
        return "a section of keys"
    if data is None or isinstance(data, bool):
        return {None: "null", True: "true", False: "false"}[data]
    return f"the number {data}"[:60] if isinstance(data, int | float) else f"the text {_show(data)}"


def _show(value: object) -> str:
    """A text in double quotes, cut and escaped as needed; a number as it is."""
    return json.dumps(value if not isinstance(value, str) else value[:60], ensure_ascii=not str(value).isprintable())


def _name(key: str) -> str:
    return key[:80] if key[:80].isprintable() else ascii(key[:80])
