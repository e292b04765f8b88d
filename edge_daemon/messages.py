"""The records that pass between threads and over wires: frozen, plain data, no behaviour beyond conversion.

``to_dict`` and ``from_dict`` are strict inverses of each other; what comes from outside is checked in ``intake``
before it becomes a record.
"""

import base64
import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Hashable, Mapping
from enum import StrEnum
from functools import cache
from typing import Any, Self

from edge_daemon.errors import ModelError, Rejected

ANONYMOUS = "_"
"""The ``src`` of a task whose sender gave no name."""


class Priority(StrEnum):
    """How soon a task is wanted. The order of the members is the order of service."""

    URGENT = "urgent"
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def rank(self) -> int:
        """0 for the most urgent."""
        return _RANKS[self]


_RANKS = {priority: rank for rank, priority in enumerate(Priority)}


class TaskState(StrEnum):
    """``queued -> running -> succeeded | failed | timed_out | cancelled | expired``; ``rejected`` was never queued."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    REJECTED = "rejected"

    @property
    def terminal(self) -> bool:
        """Whether nothing can follow it."""
        return self not in (TaskState.QUEUED, TaskState.RUNNING)


class Record:
    """Conversion to and from plain JSON data, shared by all records."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dumps`` takes as it is; bytes become base64 text."""
        names = _hints(type(self))  # type: ignore[arg-type]  # the same as below
        return {name: _plain(getattr(self, name)) for name in names}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The record that ``to_dict`` made ``data`` of.

        Raises:
            ValueError: a field is missing, unknown or not of its type.
        """
        hints = _hints(cls)  # type: ignore[arg-type]  # classes are hashable; mypy is unsure of Self
        if not isinstance(data, Mapping):
            raise ValueError(f"{cls.__name__}: {data!r} is not an object")
        if unknown := set(data) - set(hints):
            raise ValueError(f"{cls.__name__}: unknown field {min(unknown)!r}")
        fitting = _fitting(cls)  # type: ignore[arg-type]  # the same
        try:
            return cls(
                **{
                    name: value if type(value) in fitting[name] else _typed(value, hints[name])
                    for name, value in data.items()
                }
            )
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from error

    def to_json(self) -> str:
        """The record as one line of compact JSON."""
        return compact(self.to_dict())


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def compact(value: Any) -> str:
    """JSON without spaces, with non-ASCII text as it is."""
    return _ENCODER.encode(value)


@cache
def _hints(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _plain(value: Any) -> Any:
    if value is None or type(value) in _AS_IT_IS:
        return value
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


@cache
def _parts(hint: Hashable) -> tuple[bool, Any, Any]:
    """Whether None is allowed, the type of anything else, and that type without its parameters."""
    optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    if optional:
        hint = next(member for member in typing.get_args(hint) if member is not type(None))
    return optional, hint, typing.get_origin(hint) or hint


@cache
def _fitting(cls: Hashable) -> dict[str, frozenset[type]]:
    """The types that the value of each field may have as it came from JSON, with nothing to convert or to look at."""
    return {name: _types_as_they_are(hint) for name, hint in _hints(cls).items()}


def _types_as_they_are(hint: Any) -> frozenset[type]:
    if hint is Any:
        return _AS_IT_IS | {list, type(None)}
    optional, _, origin = _parts(hint)
    return frozenset(({origin} & _AS_IT_IS) | ({type(None)} if optional else set()))


def _typed(value: Any, hint: Any) -> Any:
    """``value``, as it came from JSON, in the type of its field."""
    optional, hint, origin = _parts(hint)
    if hint is Any or (optional and value is None):
        return value
    allowed: Any = _JSON_TYPES.get(origin, object)
    if not isinstance(value, allowed) or (isinstance(value, bool) and origin is not bool):
        raise ValueError(f"{value!r} is not {origin.__name__}")
    if origin is tuple:
        return tuple(_typed(item, typing.get_args(hint)[0]) for item in value)
    if origin is bytes:
        return base64.b64decode(value, validate=True)
    if origin is float:
        return float(value)
    if issubclass(origin, Record):
        return origin.from_dict(value)
    return origin(value) if issubclass(origin, StrEnum) else value


_AS_IT_IS = frozenset({str, int, float, bool, dict})
# What JSON has for a type of ours.
_JSON_TYPES: dict[type, type | tuple[type, ...]] = {
    **{kind: kind for kind in (str, int, bool, dict)},
    tuple: list,
    bytes: str,
    float: (int, float),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Message(Record):
    """One turn of a conversation."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where answers to a task go, and in which form."""

    src: str
    id: str
    plain: bool = False
    reply_to: str | None = None
    correlation: bytes | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task(Record):
    """A task as it was accepted. Exactly one of ``prompt`` and ``messages`` is set.

    It is stored: a field that comes or goes is a new ``queue_file.SCHEMA_VERSION``. The same holds for ``Result``.
    """

    id: str
    src: str = ANONYMOUS
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    system: str | None = None
    task_type: str | None = None
    data: dict[str, Any] | None = None
    """What the template of its type was filled with."""
    from_type: tuple[str, ...] = ()
    """The fields that its type has set, and of the options each of its own: ``options.top_k``."""
    fallback: tuple[str, ...] | None = None
    """The models that may answer instead, by its type; None leaves it to the model's settings."""
    model: str
    """The model that is to answer, as configured or asked for."""
    model_requested: str | None = None
    """What the sender asked for, None when it left the choice to us."""
    priority: Priority = Priority.NORMAL
    ttl_s: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    format: Any = None
    """``"json"``, a JSON schema as a dict, or None for free text."""
    stream: bool = False
    preemptible: bool = True
    plain: bool = False
    """The sender wrote plain text and is answered in plain text."""
    reply_to: str | None = None
    correlation: bytes | None = None
    meta: Any = None
    received_at: float
    """Wall-clock seconds since 1970; a label, never used for scheduling."""
    max_tokens: int
    prompt_tokens: int
    """An estimate: a token is about four bytes of text."""

    @property
    def address(self) -> Address:
        """Where its answers go."""
        return Address(src=self.src, id=self.id, plain=self.plain, reply_to=self.reply_to, correlation=self.correlation)

    @property
    def key(self) -> tuple[str, str]:
        """What makes it the same task: its sender and its id."""
        return (self.src, self.id)

    def content_hash(self) -> bytes:
        """32 bytes, equal for two submissions that ask for the same thing.

        Where to answer and how long to wait are not part of what is asked: a retry may differ in both. Neither is what
        the configuration adds, which may have changed since.
        """
        data = self.to_dict()
        for name in _NOT_CONTENT:
            del data[name]
        data |= {name: _UNSTATED[name] for name in self.from_type if name in _UNSTATED}
        data["options"] = {
            name: value for name, value in data["options"].items() if f"options.{name}" not in self.from_type
        }
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).digest()


_NOT_CONTENT = (
    *("id", "src", "ttl_s", "reply_to", "correlation", "received_at"),
    *("model", "max_tokens", "prompt_tokens", "from_type", "fallback"),
)
_UNSTATED: dict[str, Any] = {"prompt": None, "system": None, "format": None, "priority": "normal"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failure(Record):
    """Why a task has no answer. ``retryable``: the same task may succeed if it is sent again later."""

    code: str
    message: str
    retryable: bool = False

    @classmethod
    def of(cls, error: Rejected | ModelError) -> Self:
        """The failure that ``error`` stands for."""
        return cls(code=error.code, message=str(error), retryable=error.retryable)

    @property
    def unquoting(self) -> str:
        """For a log line: the message where it is Ollama's or ours, else the code, and the field if we named it.

        All else may quote what the sender wrote, such as a prompt, or what the model did.
        """
        if self.code in _UNQUOTING:
            return f"{self.code}: {self.message}"
        field, is_named, _ = self.message.partition(": ")
        return f"{self.code} ({field})" if is_named and self.code == "invalid_field" else self.code


def _codes(kind: type[ModelError]) -> set[str]:
    return {kind.code}.union(*map(_codes, kind.__subclasses__()))


_UNQUOTING = {"crash_loop"} | _codes(ModelError)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result(Record):
    """The one terminal record of a task. Durations in seconds; None means that it never came to that."""

    id: str
    src: str
    seq: int
    state: TaskState
    task_type: str | None = None
    model: str | None = None
    """The model that answered; differs from ``model_requested`` when a default or a fallback did."""
    model_requested: str | None = None
    text: str | None = None
    json: Any = None
    error: Failure | None = None
    done_reason: str | None = None
    attempt: int = 0
    queued_s: float | None = None
    load_s: float | None = None
    run_s: float | None = None
    total_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    tokens_per_s: float | None = None
    swapped: bool = False
    preempted: int = 0
    truncated: bool = False
    meta: Any = None
    ts: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Status(Record):
    """Progress of a task. ``seq`` rises within a task, so that a late or repeated status can be told."""

    id: str
    src: str
    state: TaskState
    seq: int
    ts: str
    position: int | None = None
    eta_s: float | None = None
    attempt: int = 0
    warnings: tuple[str, ...] = ()
    duplicate: bool = False


def status_seq(runs: int, state: TaskState) -> int:
    """A number that rises over the life of a task, also over a crash: queued 1, running 2, queued again 3 ...

    Args:
        runs: how often the task has begun to run, this run included.
        state: the state that is announced.
    """
    if state is TaskState.QUEUED:
        return 2 * runs + 1
    return 2 * runs if state is TaskState.RUNNING else 2 * runs + 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelState(Record):
    """A model as the pool sees it."""

    name: str
    residency: str
    """``loading``, ``resident``, ``unloading`` or ``external`` (loaded by another client of the same Ollama)."""
    size_bytes: int
    pinned: bool = False
    idle_s: float | None = None
    context_length: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event(Record):
    """Something worth telling: ``type`` is ``noun_verbed``, ``severity`` info, warning or error."""

    type: str
    ts: str
    severity: str = "info"
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A task on its way in. ``own_id``: its sender chose the id; ``redelivered``: the broker sends it again.

    ``packet_id``: under which the broker sends it again until it has our PUBACK; 0: it will not.
    ``only_known``: it could not be taken now, but may be one that was taken before.
    """

    task: Task
    own_id: bool = True
    redelivered: bool = False
    packet_id: int = 0
    only_known: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One task with all that the store knows of it."""

    seq: int
    task: Task
    state: TaskState
    attempt: int
    preempted: int
    accepted_at: float
    result: Result | None = None
    partial: str = ""
    """The text of a generation that was put aside, of ``partial_tokens`` tokens."""
    partial_tokens: int = 0

    @property
    def runs(self) -> int:
        """How often it has begun to run, for ``status_seq``."""
        return self.attempt + self.preempted


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """What became of a submission.

    ``new``, ``known`` (the same content), ``conflict`` (other content), ``unknown`` (and only a known one was wanted),
    or a limit: ``full``, ``full_of_bytes``, ``full_for_src``, ``no_room`` (results that nobody fetched), ``unlogged``
    (no row in the log).
    """

    outcome: str
    stored: Stored | None = None
    position: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A message as a transport received it. What is given beside the payload wins over the payload's own fields."""

    payload: bytes
    src: str = ANONYMOUS
    id: str | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Task fields given outside the payload, as text (MQTT 5 user properties)."""
    content_type: str | None = None
    ttl_s: float | None = None
    reply_to: str | None = None
    correlation: bytes | None = None
    redelivered: bool = False
    packet_id: int = 0
    """Under which the broker sends it again until it has our PUBACK; 0: it will not."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The task is on the disk. ``result``: it is an old acquaintance and has its answer already.

    ``in_outbox``: the store's outbox holds that answer; if not, there was no room to note that it is wanted again.
    """

    address: Address
    seq: int
    model: str
    own_id: bool
    status: Status
    result: Result | None = None
    in_outbox: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The task is not accepted; ``result`` is what its sender is told."""

    address: Address
    result: Result
