"""The records: each goes through JSON unharmed, and what is not quite one is refused."""

import dataclasses
import inspect
import json
import types
import typing
from enum import StrEnum
from typing import Any

import pytest

from edge_daemon import messages
from edge_daemon.errors import BadRequest, ModelError, Rejected, RunnerDied
from edge_daemon.messages import (
    Failure,
    Message,
    Priority,
    Record,
    Result,
    Status,
    Stored,
    Task,
    TaskState,
    compact,
    status_seq,
)

RECORDS = [it for _, it in inspect.getmembers(messages, inspect.isclass) if issubclass(it, Record) and it is not Record]
EXAMPLES: dict[type, Any] = {
    str: "ä\u0000 {",
    int: 7,
    float: 1.5,
    bool: True,
    bytes: b"\x00\xff",
    dict: {"a": [1, None]},
}
WRONG: dict[type, list[Any]] = {
    str: [5, True, ["x"]],
    int: ["5", 5.5, True],
    float: ["5", True, []],
    bool: [1, "true"],
    bytes: [5, "not base64!", "aG!k="],
    dict: [[], "x", 5],
    tuple: ["ab", {"0": 1}, 5],
}


def example(hint: Any, *, full: bool) -> Any:
    """A value of the type `hint`; `full` decides whether what may be None is."""
    origin = typing.get_origin(hint) or hint
    if hint is Any:
        return {"deep": [1, {"x": None}]} if full else None
    if origin in (types.UnionType, typing.Union):
        return example(typing.get_args(hint)[0], full=True) if full else None
    if origin is tuple:
        return tuple(example(typing.get_args(hint)[0], full=full) for _ in range(2 if full else 0))
    if issubclass(origin, Record):
        return built(origin, full=full)
    return list(origin)[-1] if issubclass(origin, StrEnum) else EXAMPLES[origin]


def built(kind: type[Record], *, full: bool) -> Record:
    """A record with every field given."""
    return kind(**{name: example(hint, full=full) for name, hint in typing.get_type_hints(kind).items()})


def wrong_values(hint: Any) -> list[Any]:
    """Values, as JSON has them, that a field of the type `hint` must not take."""
    origin = typing.get_origin(hint) or hint
    if hint is Any:
        return []
    if origin in (types.UnionType, typing.Union):
        return wrong_values(typing.get_args(hint)[0])
    if issubclass(origin, Record):
        return [5, "x", [], {"no": "such field"}]
    if issubclass(origin, StrEnum):
        return ["no such member", 5, True]
    inner = [[value] for value in wrong_values(typing.get_args(hint)[0])] if origin is tuple else []
    return [*WRONG[origin], *inner]


def test_the_walk_finds_the_records() -> None:
    """Every kind of record is found by looking, so that a new one cannot arrive untested."""
    assert {Task, Result, Status, Failure, Message} <= set(RECORDS)
    assert all(dataclasses.is_dataclass(kind) for kind in RECORDS)


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("full", [True, False], ids=["full", "sparse"])
def test_every_record_goes_through_json(kind: type[Record], *, full: bool) -> None:
    """A record comes back from JSON equal to itself, types included, full ones and those full of None."""
    record = built(kind, full=full)
    again = kind.from_dict(json.loads(record.to_json()))
    assert again == record
    for name in typing.get_type_hints(kind):
        assert type(getattr(again, name)) is type(getattr(record, name))
    assert json.loads(record.to_json()) == record.to_dict()


@pytest.mark.parametrize("kind", RECORDS)
def test_defaults_may_be_left_out(kind: type[Record]) -> None:
    """A record is read from its required fields alone, and only from all of them."""
    data = built(kind, full=False).to_dict()
    required = [
        it.name
        for it in dataclasses.fields(kind)  # type: ignore[arg-type]
        if it.default is dataclasses.MISSING and it.default_factory is dataclasses.MISSING
    ]
    kind.from_dict({name: data[name] for name in required})
    for missing in required:
        with pytest.raises(ValueError, match=missing):
            kind.from_dict({name: value for name, value in data.items() if name != missing})


@pytest.mark.parametrize("kind", RECORDS)
def test_unknown_fields_are_refused(kind: type[Record]) -> None:
    """A field that the record does not have is an error that names it."""
    with pytest.raises(ValueError, match="surplus"):
        kind.from_dict(built(kind, full=True).to_dict() | {"surplus": 1})


@pytest.mark.parametrize("kind", RECORDS)
def test_wrong_types_are_refused(kind: type[Record]) -> None:
    """No field takes a value of another type: nothing is converted by guess, and a bool is not a number."""
    data = built(kind, full=True).to_dict()
    for name, hint in typing.get_type_hints(kind).items():
        for value in wrong_values(hint):
            with pytest.raises(ValueError):
                kind.from_dict(data | {name: value})


@pytest.mark.parametrize("data", [None, 5, "text", [], [["id", "x"]], True])
def test_only_an_object_is_a_record(data: Any) -> None:
    """JSON that is not an object is no record."""
    with pytest.raises(ValueError):
        Task.from_dict(data)


def test_a_whole_number_is_a_float() -> None:
    """JSON knows one kind of number: 5 is a fine value for seconds."""
    task = Task.from_dict(built(Task, full=True).to_dict() | {"ttl_s": 5})
    assert isinstance(task.ttl_s, float)


def test_compact_is_strict() -> None:
    """No spaces, no escapes that are not needed, and nothing that is not JSON."""
    assert compact({"a": ["ä", 1.5, None]}) == '{"a":["ä",1.5,null]}'
    with pytest.raises(ValueError):
        compact(float("nan"))


# -- content


A_TASK = Task(
    id="a",
    src="dev",
    prompt="why?",
    system="be brief",
    task_type="q",
    model="m:latest",
    model_requested="m",
    priority=Priority.HIGH,
    ttl_s=60.0,
    options={"temperature": 0.5},
    format={"type": "object"},
    stream=True,
    preemptible=False,
    plain=False,
    reply_to="reply/a",
    correlation=b"1",
    meta={"k": 1},
    received_at=1.0,
    max_tokens=100,
    prompt_tokens=3,
)
NOT_CONTENT: dict[str, Any] = {
    "id": "b",
    "src": "other",
    "ttl_s": 5.0,
    "reply_to": None,
    "correlation": None,
    "received_at": 2.0,
    "model": "resolved-otherwise",
    "max_tokens": 5,
    "prompt_tokens": 4,
    "fallback": ("other",),
}
CONTENT: dict[str, Any] = {
    "prompt": "why not?",
    "messages": (Message(role="user", content="hi"),),
    "system": None,
    "task_type": "r",
    "model_requested": None,
    "priority": Priority.LOW,
    "options": {"temperature": 0.6},
    "format": "json",
    "stream": False,
    "preemptible": True,
    "plain": True,
    "meta": None,
    "data": {"temperature": 31},
}


def test_every_field_is_content_or_not() -> None:
    """A new field of a task has to be put on one side."""
    assert NOT_CONTENT.keys() | CONTENT.keys() | {"from_type"} == typing.get_type_hints(Task).keys()


@pytest.mark.parametrize("name", NOT_CONTENT)
def test_content_ignores_where_and_when_to_answer(name: str) -> None:
    """Who asks, where the answer goes, how long it may take and what the configuration adds is not what is asked."""
    changed = dataclasses.replace(A_TASK, **{name: NOT_CONTENT[name]})
    assert changed.content_hash() == A_TASK.content_hash()


@pytest.mark.parametrize("name", CONTENT)
def test_content_is_all_else(name: str) -> None:
    """Whatever else differs makes it another task."""
    changed = dataclasses.replace(A_TASK, **{name: CONTENT[name]})
    assert changed.content_hash() != A_TASK.content_hash()


def test_content_ignores_what_a_task_type_adds() -> None:
    """A task that is sent again after its type was changed is still the same task."""
    plain = dataclasses.replace(A_TASK, prompt="why?", system=None, options={}, format=None, priority=Priority.NORMAL)
    added = {"system": "be brief", "options": {"seed": 1}, "format": "json", "priority": Priority.LOW}
    by_type = ("ttl_s", "system", "options.seed", "format", "priority")
    typed = dataclasses.replace(plain, **added, from_type=by_type)  # type: ignore[arg-type]
    assert typed.content_hash() == plain.content_hash()
    one = dataclasses.replace(typed, data={"x": 1}, prompt="x is 1", from_type=("prompt", *by_type))
    other = dataclasses.replace(one, data={"x": 2})
    assert dataclasses.replace(one, prompt="is x 1?").content_hash() == one.content_hash() != other.content_hash()


def test_content_is_what_a_sender_states_beside_its_type() -> None:
    """Options of the sender's own count, whatever its type adds to them."""
    one = dataclasses.replace(A_TASK, options={"seed": 1, "top_k": 5}, from_type=("options.top_k",))
    other = dataclasses.replace(one, options={"seed": 2, "top_k": 5})
    assert other.content_hash() != one.content_hash()
    assert dataclasses.replace(one, options={"seed": 1, "top_k": 9}).content_hash() == one.content_hash()


def test_content_does_not_depend_on_order() -> None:
    """Two spellings of the same JSON object ask for the same thing; the hash outlives the process."""
    one = dataclasses.replace(A_TASK, meta={"a": 1, "b": {"c": 2, "d": 3}})
    two = dataclasses.replace(A_TASK, meta={"b": {"d": 3, "c": 2}, "a": 1})
    assert one.content_hash() == two.content_hash()
    assert len(one.content_hash()) == 32
    through_json = Task.from_dict(json.loads(one.to_json()))
    assert through_json.content_hash() == one.content_hash()


# -- states


def test_rank_is_the_order_of_service() -> None:
    """Urgent comes first, low last."""
    assert [priority.rank for priority in (Priority.URGENT, Priority.HIGH, Priority.NORMAL, Priority.LOW)] == [
        0,
        1,
        2,
        3,
    ]


def test_only_two_states_are_not_the_end() -> None:
    """All states but queued and running are terminal."""
    assert {state for state in TaskState if not state.terminal} == {TaskState.QUEUED, TaskState.RUNNING}


def stored(*, attempt: int = 0, preempted: int = 0) -> Stored:
    """What the store would say of a task after so many attempts and preemptions."""
    return Stored(
        seq=1, task=A_TASK, state=TaskState.QUEUED, attempt=attempt, preempted=preempted, accepted_at=0.0, result=None
    )


@pytest.mark.parametrize("end", [state for state in TaskState if state.terminal])
def test_status_seq_rises_over_a_life(end: TaskState) -> None:
    """Through retries, kills and preemptions every announced state has a higher number than the one before."""
    queued, running = TaskState.QUEUED, TaskState.RUNNING
    life = [
        (stored(), queued),
        (stored(attempt=1), running),
        (stored(attempt=1), queued),  # failed, or killed
        (stored(attempt=2), running),
        (stored(attempt=1, preempted=1), queued),  # put aside: the attempt is forgiven
        (stored(attempt=2, preempted=1), running),
        (stored(attempt=2, preempted=1), end),
    ]
    numbers = [status_seq(it.runs, state) for it, state in life]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize("runs", range(4))
def test_an_end_comes_after_whatever_was_said(runs: int) -> None:
    """A task can end while it waits or while it runs, and that is always the highest number."""
    for end in (TaskState.CANCELLED, TaskState.EXPIRED, TaskState.FAILED):
        assert status_seq(runs, end) > max(status_seq(runs, TaskState.QUEUED), status_seq(runs, TaskState.RUNNING))


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (RunnerDied("HTTP 500: it crashed"), "runner_died: HTTP 500: it crashed"),
        (BadRequest("HTTP 400: no"), "bad_request: HTTP 400: no"),
        (Rejected("crash_loop", "begun 3 times"), "crash_loop: begun 3 times"),
        (Rejected("invalid_output", "answer.my secret: not of type string"), "invalid_output"),
        (Rejected("invalid_field", "prompt: my secret"), "invalid_field (prompt)"),
        (Rejected("invalid_json", "my secret: twice"), "invalid_json"),
        (Rejected("to come", "nobody knows: my secret"), "to come"),
    ],
)
def test_a_log_line_quotes_nobody(error: Rejected | ModelError, logged: str) -> None:
    """Of what may quote a sender or a model a log line has the code alone; the words of Ollama and our own are told."""
    assert Failure.of(error).unquoting == logged


def test_a_failure_says_what_the_error_says() -> None:
    """Code, message and whether to try again are those of the error."""
    assert Failure.of(RunnerDied("gone")) == Failure(code="runner_died", message="gone", retryable=True)
    assert Failure.of(BadRequest("no")) == Failure(code="bad_request", message="no", retryable=False)
    assert Failure.of(Rejected("queue_full", "later", retryable=True)).retryable
