"""The door: what a message must be to become a task, the same for every transport.

``Intake.submit`` takes a group of messages as they came, reads each strictly, commits the good ones with one fsync and
says for each what to tell its sender. Nothing that comes from outside can raise out of it but a failing store.
"""

import json
import logging
import math
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edge_daemon import sampling, schema, task_types
from edge_daemon.clock import Clock, iso
from edge_daemon.config import Config, ModelSettings, TaskType
from edge_daemon.errors import Rejected, StorageFull, invalid_field, shown
from edge_daemon.messages import (
    ANONYMOUS,
    Accepted,
    Added,
    Address,
    Failure,
    Incoming,
    Message,
    Priority,
    Refused,
    Result,
    Status,
    Submission,
    Task,
    TaskState,
    compact,
    status_seq,
)
from edge_daemon.steps import reached

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
# A string, or what begins as one and has no end; possessive, so that nothing is looked at twice.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
MAX_DEPTH = 16
MAX_MEMBERS = 10_000
MAX_INTEGER = 2**53
MAX_TTL_S = 604_800
MAX_CORRELATION_BYTES = 4_096
MAX_PROPERTIES = 65_536
BYTES_PER_TOKEN = 4
MAX_SENDERS = 10_000

_BEFORE_TEXT = b" \t\r\n\0\xef\xbb\xbf\xff\xfe"
"""What may stand before the first character of a text: blanks, and the marks of UTF-8 and UTF-16."""

TASK_KEYS = {"prompt", "messages"}
FIELDS = TASK_KEYS | {
    *("id", "task_type", "model", "model_name", "priority", "ttl_s", "reply_to", "stream", "format", "options"),
    *("system", "meta", "preemptible"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeRules:
    """What a task is judged by.

    ``check_model`` returns the canonical name of a model and its settings; it raises Rejected for one that cannot serve
    here, nor any of those that are to answer instead (None: those of its settings). ``check_reply_to(src, topic)``
    raises it for a reply topic that ``src`` may not use. ``eta_s`` tells the seconds until each of the newest tasks
    will be answered, if that is known.
    """

    config: Config
    clock: Clock
    check_model: Callable[[str, Sequence[str] | None], tuple[str, ModelSettings]]
    check_reply_to: Callable[[str, str], None]
    eta_s: Callable[[Sequence[Task]], list[float | None]] = lambda tasks: [None] * len(tasks)


class Intake:
    """Reads, judges and stores tasks.

    ``add_many`` is the store's group commit; ``recognise`` tells, on a full disk, which of a group are known already.
    """

    def __init__(
        self,
        rules: IntakeRules,
        add_many: Callable[[Sequence[Submission]], list[Added]],
        recognise: Callable[[Sequence[Submission]], list[Added]],
    ) -> None:
        self._rules = rules
        self._add_many = add_many
        self._recognise = recognise
        self._rates = _Rates(rules.config.queue.per_source_rate)
        self._draining = False

    def drain(self) -> None:
        """From now on, refuse everything that is not known already with ``draining``."""
        self._draining = True

    def submit(self, batch: Sequence[Incoming], beat: Callable[[], None] = lambda: None) -> list[Accepted | Refused]:
        """Judge a group of messages; one answer each, in order.

        ``beat`` is called before each: Ollama may have to be asked about its model.

        Raises:
            StoreError: nothing of the group was stored.
        """
        drafts = []
        for incoming in batch:
            beat()
            drafts.append(self._draft(incoming))
        good = [draft for draft in drafts if draft.refusal is None]
        if good:
            reached("tasks_judged")
            try:
                self._store(good)
            except StorageFull as error:
                log.error("refusing tasks: %s", error)  # noqa: TRY400
                self._do_without_room(good)
        return [draft.answer() for draft in drafts]

    def _store(self, drafts: Sequence["_Draft"]) -> None:
        added = self._add_many([draft.submission for draft in drafts])
        new = [one.stored.task for one in added if one.stored and one.outcome == "new"]
        etas = iter(self._rules.eta_s(new))
        for draft, outcome in zip(drafts, added, strict=True):
            draft.settle(outcome, eta_s=next(etas) if outcome.outcome == "new" else None)

    def _do_without_room(self, drafts: Sequence["_Draft"]) -> None:
        for draft, outcome in zip(drafts, self._recognise([draft.submission for draft in drafts]), strict=True):
            draft.obstacle = Rejected("storage_full", "no room on the disk", retryable=True)
            draft.settle(outcome, in_outbox=False)

    def refuse(self, incoming: Incoming, code: str, message: str, *, retryable: bool = False) -> Refused:
        """A refusal for a reason that only the transport knows, sent where its sender looks for it."""
        draft = _Draft(incoming, self._rules)
        with suppress(Rejected):
            draft.read_address()
            draft.read_payload()
        draft.refusal = Rejected(code, message, retryable=retryable)
        return draft.refused()

    def _draft(self, incoming: Incoming) -> "_Draft":
        draft = _Draft(incoming, self._rules)
        try:
            # Where to answer comes first, so that a refusal reaches its sender.
            draft.read_address()
            try:
                draft.read_payload()
            finally:  # whoever sends nonsense is limited too
                draft.obstacle = self._obstacle(incoming.src)
            draft.read_task()
        except Rejected as error:
            draft.refusal = draft.obstacle or error
        return draft

    def _obstacle(self, src: str) -> Rejected | None:
        """Why no task of this sender is taken now, if that is so."""
        limited = self._rates.refusal(src, self._rules.clock.monotonic())
        if limited is None and self._draining:
            return Rejected("draining", "the daemon is stopping; send it again later", retryable=True)
        return limited


def read_json(text: str) -> Any:
    """Strict JSON: no NaN, no duplicate keys, no lone surrogates, bounded depth, size and numbers.

    Raises:
        Rejected: ``invalid_json``, saying what is wrong.
    """
    _check_members(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
    except RecursionError:
        raise Rejected("invalid_json", f"nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise Rejected("invalid_json", str(error)) from None
    _check_shape(value)
    return value


def _check_members(text: str) -> None:
    """Bound the number of objects that parsing makes, each of which takes twenty times its text, before they are made.

    A value in a list or an object has a comma before or behind it, and a key a colon, but for the one on its own.
    """
    if text.count(",") + text.count(":") <= MAX_MEMBERS:
        return  # even if none of them stands in a string
    bare = _STRING.sub("", text)
    if bare.count(",") + bare.count(":") > MAX_MEMBERS:
        raise Rejected("invalid_json", f"more than {MAX_MEMBERS} members")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Rejected("invalid_json", f"duplicate key {shown(twice)}")
    return result


def _no_constant(name: str) -> float:
    raise Rejected("invalid_json", f"{name} is not JSON")


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else math.inf
    if not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise Rejected("invalid_json", "an integer is beyond 2^53")
    return int(value)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Rejected("invalid_json", "a number is too large")
    return value


def _check_shape(value: Any) -> None:
    """Depth, number of members and text, without recursion."""
    todo = [(value, 1)]
    for item, depth in todo:  # it grows while it is walked
        if len(todo) > MAX_MEMBERS:
            raise Rejected("invalid_json", f"more than {MAX_MEMBERS} members")
        if depth > MAX_DEPTH:
            raise Rejected("invalid_json", f"nested deeper than {MAX_DEPTH}")
        if isinstance(item, str):
            _check_text(item)
        elif isinstance(item, dict):
            todo += [(child, depth + 1) for pair in item.items() for child in pair]
        elif isinstance(item, list):
            todo += [(child, depth + 1) for child in item]


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Rejected("invalid_json", "a lone surrogate in a text") from None


class _Rates:
    """A bucket of tasks per sender: it holds as many as a minute brings, and fills at that rate."""

    def __init__(self, per_minute: float | None) -> None:
        self._per_minute = per_minute
        self._lock = threading.Lock()  # guards _buckets: tasks come in by several threads
        self._buckets: dict[str, tuple[float, float]] = {}  # tasks left, and when that was so

    def refusal(self, src: str, now: float) -> Rejected | None:
        """``rate_limited`` when ``src`` has sent too many; else one more is counted."""
        if self._per_minute is None:
            return None
        size = max(1.0, self._per_minute)
        with self._lock:
            left, at = self._buckets.get(src, (size, now))
            left = min(size, left + (now - at) * self._per_minute / 60)
            if left < 1:
                limit = f"at most {self._per_minute:g} tasks a minute from one sender"
                return Rejected("rate_limited", limit, retryable=True)
            self._buckets.pop(src, None)
            self._buckets[src] = (left - 1, now)
            if len(self._buckets) > MAX_SENDERS:
                del self._buckets[next(iter(self._buckets))]  # nobody has been silent for longer
        return None


class _Draft:
    """One message on its way through the door."""

    def __init__(self, incoming: Incoming, rules: IntakeRules) -> None:
        self.refusal: Rejected | None = None
        self.obstacle: Rejected | None = None
        """Why it cannot be taken now, unless it was taken before: then it has its answer in the store."""
        self._incoming = incoming
        self._rules = rules
        self._config = rules.config
        self._types = rules.config.task_types
        self._media_type = (incoming.content_type or "").partition(";")[0].strip().lower()
        self._plain = self._is_text()
        """Its sender looks for a bare answer."""
        self._data: dict[str, Any] = {}
        self._kind = TaskType()
        self._from_type: tuple[str, ...] = ()
        self._id: str | None = None
        self._reply_to: str | None = None
        self._warnings: tuple[str, ...] = ()
        self._added: Added | None = None
        self._eta_s: float | None = None
        self._in_outbox = True

    # -- reading

    def read_address(self) -> None:
        """Who sent it and where the answer goes, as far as the payload need not be read for that."""
        given = (self._incoming.id, self._incoming.fields.get("id"))
        self._address(next((name for name in given if name is not None), None), self._incoming.reply_to)
        self._check_beside()

    def read_payload(self) -> None:
        """The fields of the payload, and from them what ``read_address`` has not found."""
        self._data = self._fields(self._text())
        inner = self._data.get("id")
        if None not in (inner, self._id) and inner != self._id:
            self._warnings += (f"id {shown(inner)} in the payload is not used: the task has one beside it",)
        self._address(self._id or self._data.get("id"), self._reply_to or self._data.get("reply_to"))

    def read_task(self) -> None:
        """The whole task."""
        if self.obstacle:
            self._hinder(self.obstacle)
        self._data |= self._outside_fields()
        self._apply_type()
        self.submission = Submission(
            task=self._task(),
            own_id=self._id is not None,
            redelivered=self._incoming.redelivered,
            packet_id=self._incoming.packet_id,
            only_known=self.obstacle is not None,
        )

    def _hinder(self, obstacle: Rejected) -> None:
        """It cannot be taken now: that is the end, but for a task that may be known."""
        if self._id is None and not self._incoming.redelivered:
            raise obstacle
        self.obstacle = self.obstacle or obstacle

    def _address(self, task_id: Any, reply_to: Any) -> None:
        try:
            self._identify(task_id)
        finally:  # a refusal for the id alone still finds its way
            self._answer_to(reply_to)

    def _identify(self, task_id: Any) -> None:
        if not NAME.fullmatch(self._incoming.src):
            raise invalid_field("src", "1 to 64 of A-Z a-z 0-9 _ . : -")
        if task_id is None:
            return
        if not isinstance(task_id, str) or not NAME.fullmatch(task_id):
            raise invalid_field("id", f"{shown(task_id)} is not 1 to 64 of A-Z a-z 0-9 _ . : -")
        self._id = task_id

    def _answer_to(self, reply_to: Any) -> None:
        if reply_to is None:
            return
        if not isinstance(reply_to, str):
            raise Rejected("forbidden_reply_topic", f"reply_to: {shown(reply_to)} is not a topic")
        self._rules.check_reply_to(self._incoming.src, reply_to)
        self._reply_to = reply_to

    def _check_beside(self) -> None:
        """Bound what comes beside the payload: it is kept with the task, or copied."""
        correlation = len(self._incoming.correlation or b"")
        if correlation > MAX_CORRELATION_BYTES:
            raise Rejected("too_large", f"correlation of {correlation} bytes, the limit is {MAX_CORRELATION_BYTES}")
        properties = sum(len(name) + len(text) for name, text in self._incoming.fields.items())
        if properties > MAX_PROPERTIES:
            raise Rejected("too_large", f"properties of {properties} characters, the limit is {MAX_PROPERTIES}")

    def _is_text(self) -> bool:
        """Whether this can be no JSON object, as far as that is seen without reading it: it may not be readable."""
        begins = self._incoming.payload.lstrip(_BEFORE_TEXT)[:1]
        return self._media_type == "text/plain" or (self._media_type != "application/json" and begins != b"{")

    def _text(self) -> str:
        limit = self._config.queue.max_payload_bytes
        if len(self._incoming.payload) > limit:
            raise Rejected("too_large", f"payload of {len(self._incoming.payload)} bytes, the limit is {limit}")
        try:
            text = self._incoming.payload.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Rejected("invalid_utf8", f"byte {error.start} of the payload is not UTF-8") from None
        if text.startswith("\ufeff"):
            raise Rejected("invalid_utf8", "the payload begins with a byte order mark")
        return text

    def _fields(self, text: str) -> dict[str, Any]:
        """The payload's fields: of a JSON object, or a prompt as it stands."""
        kind = self._media_type
        value: Any = None
        if kind == "application/json" or (kind != "text/plain" and text.lstrip().startswith("{")):
            self._plain = False
            value = read_json(text)
        if isinstance(value, dict) and self._is_task(value):
            unknown = value.keys() - (FIELDS | {"data"} if self._named_type(value) in self._types else FIELDS)
            self._warnings = tuple(f"unknown field {shown(name)}" for name in sorted(unknown)[:8])
            return value
        return self._plain_fields(text, value, must_be_task=kind == "application/json")

    def _is_task(self, value: dict[str, Any]) -> bool:
        return bool(TASK_KEYS & value.keys()) or ("data" in value and self._named_type(value) in self._types)

    def _named_type(self, value: dict[str, Any]) -> str:
        name = self._incoming.fields.get("task_type", value.get("task_type"))
        return name if isinstance(name, str) else ""

    def _plain_fields(self, text: str, value: Any, *, must_be_task: bool) -> dict[str, Any]:
        """A payload that is no JSON task: the data of its type if that has a template, else the prompt as it stands."""
        self._plain = True
        name = self._incoming.fields.get("task_type") or self._type_of_source()
        text = text.removesuffix("\n")
        if name and name in self._types and self._types[name].template is not None:
            data = value if isinstance(value, dict) else {task_types.PLAIN_TEXT: text}
            return {"task_type": name, "data": data}
        if must_be_task:
            raise invalid_field("prompt", "missing: a JSON task has prompt, messages, or the data of a configured type")
        if isinstance(value, dict) and "data" in value and (unknown := self._named_type(value)):
            self._warnings = (f"task_type {shown(unknown)} is not configured: the object is the prompt as it stands",)
        elif isinstance(value, dict) and value.keys() & FIELDS - {"id"}:  # an id is in many a reading
            self._warnings = ("no prompt or messages: the object is the prompt as it stands",)
        return {"prompt": text} | ({"task_type": name} if name else {})

    def _type_of_source(self) -> str | None:
        """The type that plain text from this sender belongs to."""
        src = self._incoming.src
        return next((name for name, kind in self._types.items() if src in kind.topic_source), None)

    def _apply_type(self) -> None:
        name = self._of("task_type", str)
        if name not in self._types:
            return
        self._kind = self._types[name]
        limit = self._config.queue.max_payload_bytes
        added = task_types.lay_under(name, self._kind, self._data, is_raw=self._plain, max_prompt_bytes=limit)
        self._from_type = tuple(sorted(task_types.names(added, self._data)))
        self._data |= added

    def _outside_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, text in self._incoming.fields.items():
            if name in _OUTSIDE:
                fields[name] = _OUTSIDE[name](name, text)
        if self._incoming.ttl_s is not None:
            fields["ttl_s"] = self._incoming.ttl_s
        unknown = self._incoming.fields.keys() - _OUTSIDE.keys() - {"id"}
        self._warnings += tuple(f"unknown property {shown(name)}" for name in sorted(unknown)[:8])
        return fields

    def _task(self) -> Task:
        model_requested = self._model_requested()
        wanted = model_requested or self._kind.model or self._config.models.default
        model, settings = self._check_model(wanted)
        options = sampling.checked(self._of("options", dict) or {})
        task = Task(
            id=self._id or secrets.token_hex(8),
            src=self._incoming.src,
            prompt=self._prompt(),
            messages=self._messages(),
            system=self._of("system", str),
            task_type=self._task_type(),
            data=self._data.get("data") if "prompt" in self._from_type else None,
            from_type=self._from_type,
            fallback=self._kind.fallback,
            model=model,
            model_requested=model_requested,
            priority=self._priority(),
            ttl_s=self._ttl_s(),
            options=options,
            format=self._format(),
            stream=self._of("stream", bool) or False,
            preemptible=self._of("preemptible", bool) is not False,
            plain=self._plain,
            reply_to=self._reply_to,
            correlation=self._incoming.correlation,
            meta=self._meta(),
            received_at=self._rules.clock.wall(),
            max_tokens=_max_tokens(options, self._kind.max_tokens or settings.max_tokens),
            prompt_tokens=self._prompt_tokens(),
        )
        if task.prompt_tokens > settings.num_ctx:
            limit = f"the context of {model} holds {settings.num_ctx}"
            self._hinder(invalid_field(self._longest_text(), f"about {task.prompt_tokens} tokens in all, {limit}"))
        return task

    def _check_model(self, wanted: str) -> tuple[str, ModelSettings]:
        try:
            return self._rules.check_model(wanted, self._kind.fallback)
        except Rejected as error:
            self._hinder(error)
            return wanted, self._config.models.defaults

    def _of(self, name: str, kind: type) -> Any:
        value = self._data.get(name)
        if value is not None and not isinstance(value, kind):
            raise invalid_field(name, f"{shown(value)} is not {_KINDS[kind]}")
        return value

    def _model_requested(self) -> str | None:
        names = {name for key in ("model", "model_name") if (name := self._of(key, str)) is not None}
        if len(names) > 1:
            raise invalid_field("model", "differs from model_name, its alias")
        name = next(iter(names), None)
        if name is not None and not (0 < len(name) <= 256 and name.isprintable()):
            raise invalid_field("model", "1 to 256 printable characters")
        return name

    def _prompt(self) -> str | None:
        prompt = self._of("prompt", str)
        if prompt is None:
            return None
        if self._data.get("messages") is not None:
            raise invalid_field("prompt", "give prompt or messages, not both")
        if not prompt.strip():
            # Ollama takes an empty prompt as a command to load or unload.
            raise invalid_field("prompt", "empty")
        return str(prompt)

    def _messages(self) -> tuple[Message, ...]:
        entries = self._of("messages", list)
        if entries is None:
            if self._data.get("prompt") is None:
                raise invalid_field("prompt", "missing")
            return ()
        if not 1 <= len(entries) <= 256:
            raise invalid_field("messages", "1 to 256 of them")
        return tuple(_message(index, entry) for index, entry in enumerate(entries))

    def _text_bytes(self) -> dict[str, int]:
        """What each field adds to the text that the model reads."""
        texts = {name: [self._data.get(name) or ""] for name in ("prompt", "system")}
        texts["messages"] = [entry["content"] for entry in self._data.get("messages") or ()]
        return {name: sum(len(text.encode()) for text in parts) for name, parts in texts.items()}

    def _prompt_tokens(self) -> int:
        return sum(self._text_bytes().values()) // BYTES_PER_TOKEN + 1

    def _longest_text(self) -> str:
        sizes = self._text_bytes()
        return max(sizes, key=sizes.__getitem__)

    def _task_type(self) -> str | None:
        name = self._of("task_type", str)
        if name is not None and not NAME.fullmatch(name):
            raise invalid_field("task_type", f"{shown(name)} is not 1 to 64 of A-Z a-z 0-9 _ . : -")
        return str(name) if name is not None else None

    def _priority(self) -> Priority:
        value = self._data.get("priority")
        if value is None:
            return Priority.NORMAL
        if not isinstance(value, str) or value not in set(Priority):
            raise invalid_field("priority", f"{shown(value)} is not one of {', '.join(Priority)}")
        return Priority(value)

    def _ttl_s(self) -> float:
        value = self._data.get("ttl_s")
        if value is None:
            return self._config.queue.default_ttl_s
        if value == 0 and not isinstance(value, bool):
            raise Rejected("expired_on_arrival", "its time to live was over when it arrived")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_TTL_S:
            raise invalid_field("ttl_s", f"{shown(value)} is not a number of seconds above 0, at most {MAX_TTL_S}")
        return float(value)

    def _format(self) -> Any:
        value = self._data.get("format")
        if value is None or value == "json":
            return value
        if not isinstance(value, dict):
            raise invalid_field("format", f'{shown(value)} is neither "json" nor a JSON schema')
        if len(compact(value)) > 16_384:
            raise invalid_field("format", "a schema of at most 16384 characters")
        if fault := schema.malformed(value):
            raise invalid_field("format", fault)
        return value

    def _meta(self) -> Any:
        value = self._data.get("meta")
        if value is not None and len(compact(value)) > 4_096:
            raise invalid_field("meta", "at most 4096 characters of JSON")
        return value

    # -- answering

    def settle(self, added: Added, *, eta_s: float | None = None, in_outbox: bool = True) -> None:
        """Take note of what the store did with it, and of when it will be answered."""
        self._added = added
        self._eta_s = eta_s
        self._in_outbox = in_outbox
        if added.outcome == "unknown":
            self.refusal = self.obstacle
        if added.outcome in _OUTCOMES:
            code, message = _OUTCOMES[added.outcome]
            told = message.format(queue=self._config.queue)
            self.refusal = Rejected(code, told, retryable=code != "duplicate_conflict")

    def answer(self) -> Accepted | Refused:
        """What to tell the sender."""
        if self.refusal is not None or self._added is None or self._added.stored is None:
            return self.refused()
        stored, known = self._added.stored, self._added.outcome == "known"
        status = Status(
            id=stored.task.id,
            src=stored.task.src,
            state=stored.state,
            seq=status_seq(stored.runs, stored.state),
            ts=self._now(),
            position=self._added.position,
            eta_s=self._eta_s,
            attempt=stored.attempt,
            warnings=self._warnings,
            duplicate=known,
        )
        return Accepted(
            address=stored.task.address,
            seq=stored.seq,
            model=stored.task.model,
            own_id=self.submission.own_id,
            status=status,
            result=stored.result,
            in_outbox=self._in_outbox,
        )

    def refused(self) -> Refused:
        """The terminal result of a task that was never queued."""
        address = Address(
            src=self._incoming.src if NAME.fullmatch(self._incoming.src) else ANONYMOUS,
            id=self._id or secrets.token_hex(8),
            plain=self._plain,
            reply_to=self._reply_to,
            correlation=self._incoming.correlation,
        )
        result = Result(
            id=address.id,
            src=address.src,
            seq=status_seq(0, TaskState.REJECTED),
            state=TaskState.REJECTED,
            error=Failure.of(self.refusal) if self.refusal else None,
            ts=self._now(),
        )
        return Refused(address=address, result=result)

    def _now(self) -> str:
        return iso(self._rules.clock.wall())


def _max_tokens(options: dict[str, Any], limit: int) -> int:
    """-1 and -2 mean "without end" to Ollama; here the limit is the end."""
    num_predict = int(options.get("num_predict", -1))
    return min(num_predict, limit) if num_predict > 0 else limit


def _message(index: int, entry: Any) -> Message:
    name = f"messages[{index}]"
    if not isinstance(entry, dict) or entry.keys() != {"role", "content"}:
        raise invalid_field(name, "an object of role and content")
    if entry["role"] not in ("system", "user", "assistant"):
        raise invalid_field(name, f"role {shown(entry['role'])} is not system, user or assistant")
    if not isinstance(entry["content"], str) or not entry["content"].strip():
        raise invalid_field(name, "content is not a text, or empty")
    return Message(role=entry["role"], content=entry["content"])


def _as_text(name: str, text: str) -> str:
    try:
        _check_text(text)
    except Rejected as error:
        raise invalid_field(name, error.message) from None
    return text


def _as_flag(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise invalid_field(name, f"{shown(text)} is not true or false")
    return text == "true"


def _as_json(name: str, text: str) -> Any:
    try:
        return read_json(text)
    except Rejected as error:
        raise invalid_field(name, error.message) from None


def _as_format(name: str, text: str) -> Any:
    return text if text == "json" else _as_json(name, text)


_OUTSIDE: dict[str, Callable[[str, str], Any]] = {
    **dict.fromkeys(("task_type", "model", "model_name", "priority", "system"), _as_text),
    **dict.fromkeys(("stream", "preemptible"), _as_flag),
    **dict.fromkeys(("options", "meta", "ttl_s"), _as_json),
    "format": _as_format,
}
_OUTCOMES = {
    "conflict": ("duplicate_conflict", "this id was used before for another task"),
    "full": (
        "queue_full",
        "queue.max_tasks: {queue.max_tasks}, of which {queue.urgent_reserve} are for urgent tasks; send it again later",
    ),
    "full_of_bytes": (
        "queue_full",
        "queue.max_bytes: {queue.max_bytes}, of which a share is for urgent tasks; send it again later",
    ),
    "full_for_src": ("queue_full", "queue.per_source_tasks: {queue.per_source_tasks}; send it again later"),
    "no_room": (
        "storage_full",
        "queue.retention_bytes: {queue.retention_bytes}, taken by results that nobody fetches; send it again later",
    ),
    "unlogged": (
        "storage_full",
        "csv.path cannot be written, and tasks that lack a row take queue.retention_bytes; send it again later",
    ),
}
_KINDS: dict[type, str] = {str: "a text", bool: "true or false", list: "a list", dict: "an object"}
