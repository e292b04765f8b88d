"""The door: what a message must be to become a task, the same for every transport.

``Intake.submit`` takes a group of messages as they came, reads each strictly, commits the good ones with one fsync and
says for each what to tell its sender. Nothing that comes from outside can raise out of it but a failing store.
"""

import json
import math
import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edge_daemon import schema
from edge_daemon.clock import Clock, iso
from edge_daemon.config import Config, ModelSettings
from edge_daemon.errors import Rejected
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

NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
MAX_DEPTH = 16
MAX_MEMBERS = 10_000
MAX_INTEGER = 2**53
MAX_TTL_S = 604_800
BYTES_PER_TOKEN = 4
MAX_SENDERS = 10_000

# Sampling options and their limits. Runner options (num_ctx and its like) would force a reload and are not for tasks.
OPTIONS: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 5),
    "top_k": (int, 0, 10_000),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "typical_p": (float, 0, 1),
    "seed": (int, 0, 2**31 - 1),
    "repeat_penalty": (float, 0, 10),
    "repeat_last_n": (int, -1, 32_768),
    "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2),
    "num_predict": (int, -2, 1_000_000),
}
TASK_KEYS = {"prompt", "messages"}
FIELDS = TASK_KEYS | {
    *("id", "task_type", "model", "model_name", "priority", "ttl_s", "reply_to", "stream", "format", "options"),
    *("system", "meta", "preemptible"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a task is judged by.

    ``check_model`` returns the canonical name of a model and its settings, and raises Rejected for one that cannot
    serve here; ``check_reply_to(src, topic)`` raises it for a reply topic that ``src`` may not use; ``eta_s`` tells
    the seconds until each of the newest tasks will be answered, if that is known.
    """

    config: Config
    clock: Clock
    check_model: Callable[[str], tuple[str, ModelSettings]]
    check_reply_to: Callable[[str, str], None]
    eta_s: Callable[[Sequence[Task]], list[float | None]] = lambda tasks: [None] * len(tasks)


class Intake:
    """Reads, judges and stores tasks; ``add_many`` is the store's group commit."""

    def __init__(self, rules: Rules, add_many: Callable[[Sequence[Submission]], list[Added]]) -> None:
        self._rules = rules
        self._add_many = add_many
        self._rates = _Rates(rules.config.queue.per_source_rate)
        self._draining = False

    def drain(self) -> None:
        """From now on, refuse everything with ``draining``."""
        self._draining = True

    def submit(self, batch: Sequence[Incoming]) -> list[Accepted | Refused]:
        """Judge a group of messages; one answer each, in order.

        Raises:
            StoreError: nothing of the group was stored.
        """
        drafts = [self._draft(incoming) for incoming in batch]
        good = [draft for draft in drafts if draft.refusal is None]
        if good:
            added = self._add_many([draft.submission for draft in good])
            new = [one.stored.task for one in added if one.stored and one.outcome == "new"]
            etas = iter(self._rules.eta_s(new))
            for draft, outcome in zip(good, added, strict=True):
                draft.settle(outcome, next(etas) if outcome.outcome == "new" else None)
        return [draft.answer() for draft in drafts]

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
                self._admit(incoming.src)
            draft.read_task()
        except Rejected as error:
            draft.refusal = error
        return draft

    def _admit(self, src: str) -> None:
        self._rates.check(src, self._rules.clock.monotonic())
        if self._draining:
            raise Rejected("draining", "the daemon is stopping; send it again later", retryable=True)


def read_json(text: str) -> Any:
    """Strict JSON: no NaN, no duplicate keys, no lone surrogates, bounded depth, size and numbers.

    Raises:
        Rejected: ``invalid_json``, saying what is wrong.
    """
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Rejected("invalid_json", f"duplicate key {_shown(twice)}")
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


def _shown(value: Any) -> str:
    """A value from outside for an error message: short, on one line, without control characters."""
    return ascii(value)[:60]


def _invalid(name: str, problem: str) -> Rejected:
    return Rejected("invalid_field", f"{name}: {problem}")


class _Rates:
    """A bucket of tasks per sender: it holds as many as a minute brings, and fills at that rate."""

    def __init__(self, per_minute: float | None) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}  # tasks left, and when that was so

    def check(self, src: str, now: float) -> None:
        """Raises Rejected, ``rate_limited``, when ``src`` has sent too many."""
        if self._per_minute is None:
            return
        size = max(1.0, self._per_minute)
        left, at = self._buckets.get(src, (size, now))
        left = min(size, left + (now - at) * self._per_minute / 60)
        if left < 1:
            limit = f"at most {self._per_minute:g} tasks a minute from one sender"
            raise Rejected("rate_limited", limit, retryable=True)
        self._buckets.pop(src, None)
        self._buckets[src] = (left - 1, now)
        if len(self._buckets) > MAX_SENDERS:
            del self._buckets[next(iter(self._buckets))]  # nobody has been silent for longer


class _Draft:
    """One message on its way through the door."""

    def __init__(self, incoming: Incoming, rules: Rules) -> None:
        self.refusal: Rejected | None = None
        self._incoming = incoming
        self._rules = rules
        self._config = rules.config
        self._plain = False
        self._data: dict[str, Any] = {}
        self._id: str | None = None
        self._reply_to: str | None = None
        self._warnings: tuple[str, ...] = ()
        self._added: Added | None = None
        self._eta_s: float | None = None

    # -- reading

    def read_address(self) -> None:
        """Who sent it and where the answer goes, as far as the payload need not be read for that."""
        self._address(self._incoming.id or self._incoming.fields.get("id"), self._incoming.reply_to)

    def read_payload(self) -> None:
        """The fields of the payload, and from them what ``read_address`` has not found."""
        self._data = self._fields(self._text())
        self._address(self._id or self._data.get("id"), self._reply_to or self._data.get("reply_to"))

    def read_task(self) -> None:
        """The whole task."""
        self._data |= self._outside_fields()
        self.submission = Submission(
            task=self._task(), own_id=self._id is not None, redelivered=self._incoming.redelivered
        )

    def _address(self, task_id: Any, reply_to: Any) -> None:
        try:
            self._identify(task_id)
        finally:  # a refusal for the id alone still finds its way
            self._answer_to(reply_to)

    def _identify(self, task_id: Any) -> None:
        if not NAME.fullmatch(self._incoming.src):
            raise _invalid("src", "1 to 64 of A-Z a-z 0-9 _ . : -")
        if task_id is None:
            return
        if not isinstance(task_id, str) or not NAME.fullmatch(task_id):
            raise _invalid("id", f"{_shown(task_id)} is not 1 to 64 of A-Z a-z 0-9 _ . : -")
        self._id = task_id

    def _answer_to(self, reply_to: Any) -> None:
        if reply_to is None:
            return
        if not isinstance(reply_to, str):
            raise Rejected("forbidden_reply_topic", f"reply_to: {_shown(reply_to)} is not a topic")
        self._rules.check_reply_to(self._incoming.src, reply_to)
        self._reply_to = reply_to

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
        kind = (self._incoming.content_type or "").partition(";")[0].strip().lower()
        data: dict[str, Any] | None = None
        if kind == "application/json" or (kind != "text/plain" and text.lstrip().startswith("{")):
            data = read_json(text)
            if kind == "application/json" and not (isinstance(data, dict) and TASK_KEYS & data.keys()):
                raise _invalid("prompt", "missing: a JSON task has prompt or messages")
        if data is None or not TASK_KEYS & data.keys():
            self._plain = True
            data = {"prompt": text.removesuffix("\n")}
        self._warnings = tuple(f"unknown field {_shown(name)}" for name in sorted(data.keys() - FIELDS)[:8])
        return data

    def _outside_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, text in self._incoming.fields.items():
            if name in _OUTSIDE:
                fields[name] = _OUTSIDE[name](name, text)
        if self._incoming.ttl_s is not None:
            fields["ttl_s"] = self._incoming.ttl_s
        return fields

    def _task(self) -> Task:
        model_requested = self._model_requested()
        model, settings = self._rules.check_model(model_requested or self._config.models.default)
        options, num_predict = self._options()
        task = Task(
            id=self._id or secrets.token_hex(8),
            src=self._incoming.src,
            prompt=self._prompt(),
            messages=self._messages(),
            system=self._of("system", str),
            task_type=self._task_type(),
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
            max_tokens=min(num_predict or settings.max_tokens, settings.max_tokens),
            prompt_tokens=self._prompt_tokens(),
        )
        if task.prompt_tokens > settings.num_ctx:
            limit = f"the context of {model} holds {settings.num_ctx}"
            raise _invalid("prompt", f"about {task.prompt_tokens} tokens, {limit}")
        return task

    def _of(self, name: str, kind: type) -> Any:
        value = self._data.get(name)
        if value is not None and not isinstance(value, kind):
            raise _invalid(name, f"{_shown(value)} is not {_KINDS[kind]}")
        return value

    def _model_requested(self) -> str | None:
        names = {name for key in ("model", "model_name") if (name := self._of(key, str)) is not None}
        if len(names) > 1:
            raise _invalid("model", "differs from model_name, its alias")
        name = next(iter(names), None)
        if name is not None and not (0 < len(name) <= 256 and name.isprintable()):
            raise _invalid("model", "1 to 256 printable characters")
        return name

    def _prompt(self) -> str | None:
        prompt = self._of("prompt", str)
        if prompt is None:
            return None
        if self._data.get("messages") is not None:
            raise _invalid("prompt", "give prompt or messages, not both")
        if not prompt.strip():
            # Ollama takes an empty prompt as a command to load or unload.
            raise _invalid("prompt", "empty")
        return str(prompt)

    def _messages(self) -> tuple[Message, ...]:
        entries = self._of("messages", list)
        if entries is None:
            if self._data.get("prompt") is None:
                raise _invalid("prompt", "missing")
            return ()
        if not 1 <= len(entries) <= 256:
            raise _invalid("messages", "1 to 256 of them")
        return tuple(_message(index, entry) for index, entry in enumerate(entries))

    def _prompt_tokens(self) -> int:
        texts = [self._data.get("prompt") or "", self._data.get("system") or ""]
        texts += [entry["content"] for entry in self._data.get("messages") or ()]
        return sum(len(text.encode()) for text in texts) // BYTES_PER_TOKEN + 1

    def _task_type(self) -> str | None:
        name = self._of("task_type", str)
        if name is not None and not NAME.fullmatch(name):
            raise _invalid("task_type", f"{_shown(name)} is not 1 to 64 of A-Z a-z 0-9 _ . : -")
        return str(name) if name is not None else None

    def _priority(self) -> Priority:
        value = self._data.get("priority")
        if value is None:
            return Priority.NORMAL
        if not isinstance(value, str) or value not in set(Priority):
            raise _invalid("priority", f"{_shown(value)} is not one of {', '.join(Priority)}")
        return Priority(value)

    def _ttl_s(self) -> float:
        value = self._data.get("ttl_s")
        if value is None:
            return self._config.queue.default_ttl_s
        if value == 0 and not isinstance(value, bool):
            raise Rejected("expired_on_arrival", "its time to live was over when it arrived")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_TTL_S:
            raise _invalid("ttl_s", f"{_shown(value)} is not a number of seconds above 0, at most {MAX_TTL_S}")
        return float(value)

    def _format(self) -> Any:
        value = self._data.get("format")
        if value is None or value == "json":
            return value
        if not isinstance(value, dict):
            raise _invalid("format", f'{_shown(value)} is neither "json" nor a JSON schema')
        if len(compact(value)) > 16_384:
            raise _invalid("format", "a schema of at most 16384 characters")
        if fault := schema.malformed(value):
            raise _invalid("format", fault)
        return value

    def _meta(self) -> Any:
        value = self._data.get("meta")
        if value is not None and len(compact(value)) > 4_096:
            raise _invalid("meta", "at most 4096 characters of JSON")
        return value

    def _options(self) -> tuple[dict[str, Any], int | None]:
        options = dict(self._of("options", dict) or {})
        stop = options.pop("stop", None)
        for name, value in options.items():
            _check_option(name, value)
        # -1 and -2 mean "without end" to Ollama; here the model's own limit is the end.
        num_predict = options.get("num_predict")
        if num_predict == 0:
            raise _invalid("options.num_predict", "0 would give no answer")
        if stop is not None:
            options["stop"] = _stop(stop)
        return options, num_predict if num_predict and num_predict > 0 else None

    # -- answering

    def settle(self, added: Added, eta_s: float | None) -> None:
        """Take note of what the store did with it, and of when it will be answered."""
        self._added = added
        self._eta_s = eta_s
        if added.outcome in _OUTCOMES:
            code, message = _OUTCOMES[added.outcome]
            self.refusal = Rejected(code, message, retryable=code != "duplicate_conflict")

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


def _message(index: int, entry: Any) -> Message:
    name = f"messages[{index}]"
    if not isinstance(entry, dict) or entry.keys() != {"role", "content"}:
        raise _invalid(name, "an object of role and content")
    if entry["role"] not in ("system", "user", "assistant"):
        raise _invalid(name, f"role {_shown(entry['role'])} is not system, user or assistant")
    if not isinstance(entry["content"], str) or not entry["content"].strip():
        raise _invalid(name, "content is not a text, or empty")
    return Message(role=entry["role"], content=entry["content"])


def _check_option(name: str, value: Any) -> None:
    if name not in OPTIONS:
        raise _invalid(f"options.{_shown(name)[1:-1]}", "not a sampling option that a task may set")
    kind, low, high = OPTIONS[name]
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value <= high:
        number = "a number" if kind is float else "a whole number"
        raise _invalid(f"options.{name}", f"{_shown(value)} is not {number} from {low} to {high}")


def _stop(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and 0 < len(text) <= 64 for text in texts):
        raise _invalid("options.stop", "a text, or a list of texts, of 1 to 64 characters")
    if len(texts) > 16:
        raise _invalid("options.stop", "at most 16 texts")
    return texts


def _as_text(name: str, text: str) -> str:
    try:
        _check_text(text)
    except Rejected as error:
        raise _invalid(name, error.message) from None
    return text


def _as_flag(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise _invalid(name, f"{_shown(text)} is not true or false")
    return text == "true"


def _as_json(name: str, text: str) -> Any:
    try:
        return read_json(text)
    except Rejected as error:
        raise _invalid(name, error.message) from None


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
    "full": ("queue_full", "the queue is full; send it again later"),
    "full_for_src": ("queue_full", "too many tasks of this sender wait; send it again later"),
    "no_room": ("storage_full", "results that nobody has fetched take all the room; send it again later"),
}
_KINDS: dict[type, str] = {str: "a text", bool: "true or false", list: "a list", dict: "an object"}
