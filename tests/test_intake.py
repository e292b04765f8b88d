"""The door: every bad message has its stable code and says what is wrong; every good one is on the disk."""

import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_daemon import intake, sampling
from edge_daemon.clock import iso
from edge_daemon.config import Config, Models, ModelSettings, Queue
from edge_daemon.errors import Rejected, StoreError
from edge_daemon.intake import Intake, IntakeRules, read_json
from edge_daemon.messages import (
    Accepted,
    Added,
    Incoming,
    Message,
    Priority,
    Refused,
    Result,
    Submission,
    Task,
    TaskState,
)
from edge_daemon.mqtt_bridge import Topics
from edge_daemon.store import Limits, Store
from tests import bad_input
from tests.daemon import N
from tests.fakes import FakeClock

NAMES = {"default:latest", "small:latest"}


def check_model(name: str, fallback: Sequence[str] | None = None) -> tuple[str, ModelSettings]:
    """Two small models and one that does not fit."""
    full = name.lower() if ":" in name else f"{name.lower()}:latest"
    if full == "huge:latest":
        raise Rejected("model_too_large", f"model: {full} needs more than there is")
    if full not in NAMES:
        raise Rejected("unknown_model", f"model: Ollama has no model {ascii(full)[:60]}")
    return full, ModelSettings(num_ctx=bad_input.NUM_CTX, max_tokens=200)


@dataclass
class Door:
    """An intake over a real store."""

    intake: Intake
    store: Store
    clock: FakeClock

    def one(self, payload: bytes | str | dict[str, Any], **beside: Any) -> Accepted | Refused:
        """What becomes of one message."""
        if isinstance(payload, dict):
            payload = json.dumps(payload)
        raw = payload.encode() if isinstance(payload, str) else payload
        (answer,) = self.intake.submit([Incoming(payload=raw, **{"src": "dev"} | beside)])
        return answer

    def task(self, payload: bytes | str | dict[str, Any], **beside: Any) -> Task:
        """The task that a good message became, as the store has it."""
        answer = self.one(payload, **beside)
        assert isinstance(answer, Accepted), answer
        stored = self.store.find(answer.address.src, answer.address.id)
        assert stored is not None
        return stored.task

    def finish(self, accepted: Accepted | Refused) -> None:
        """End a task with a result."""
        assert isinstance(accepted, Accepted)
        assert self.store.claim(accepted.seq)
        address = accepted.address
        result = Result(id=address.id, src=address.src, seq=4, state=TaskState.SUCCEEDED, text="done", ts="")
        assert self.store.finish(accepted.seq, result)

    def refusal(self, payload: bytes | str | dict[str, Any], **beside: Any) -> tuple[str, str]:
        """Code and message of a refusal; it is checked for what every refusal must be."""
        answer = self.one(payload, **beside)
        assert isinstance(answer, Refused), answer
        result = answer.result
        assert (result.state, result.id, result.src) == (TaskState.REJECTED, answer.address.id, answer.address.src)
        assert result.ts == iso(self.clock.wall())
        assert result.error is not None
        assert result.error.code in bad_input.CODES
        assert len(result.error.message) < 300
        assert result.error.message.isprintable()
        return result.error.code, result.error.message


def codes(answers: Sequence[Accepted | Refused]) -> list[str | None]:
    """Of each answer, why it is a refusal, if it is one."""
    return [one.result.error.code if isinstance(one, Refused) and one.result.error else None for one in answers]


def nothing_known(batch: Sequence[Submission]) -> list[Added]:
    """As of a store that is empty."""
    return [Added(outcome="unknown") for _ in batch]


@pytest.fixture
def new_door(tmp_path: Path) -> Callable[..., Door]:
    """Builds a door with its own configuration of the queue, over one store."""
    clock = FakeClock()
    store = Store(tmp_path / "queue.db", clock=clock, limits=Limits(max_tasks=1_000_000, urgent_reserve=0))
    store._db.execute("PRAGMA synchronous = OFF")

    def new(**queue: Any) -> Door:
        config = Config(models=Models(default="default"), queue=Queue(**queue))
        rules = IntakeRules(
            config=config,
            clock=clock,
            check_model=check_model,
            check_reply_to=lambda src, topic: Topics(N).check_reply_to(src, topic, ["reply/"]),
            eta_s=lambda tasks: [1.5 for _ in tasks],
        )
        return Door(Intake(rules, store.add_many, store.recognise), store, clock)

    return new


@pytest.fixture
def door(new_door: Callable[..., Door]) -> Door:
    """A door with the shipped configuration."""
    return new_door()


# -- good messages


def test_a_full_task_is_read_whole(door: Door) -> None:
    """Every field of a JSON task arrives in the store as it was sent."""
    sent = {
        "id": "job-1",
        "prompt": "why?",
        "system": "be brief",
        "task_type": "q",
        "model": "small",
        "priority": "high",
        "ttl_s": 60,
        "options": {"temperature": 0, "stop": "\n", "seed": 7, "num_predict": 50},
        "format": {"type": "object"},
        "stream": True,
        "preemptible": False,
        "reply_to": "reply/here",
        "meta": {"k": [1, None]},
    }
    assert door.task(sent, correlation=b"\x00c") == Task(
        id="job-1",
        src="dev",
        prompt="why?",
        system="be brief",
        task_type="q",
        model="small:latest",
        model_requested="small",
        priority=Priority.HIGH,
        ttl_s=60.0,
        options={"temperature": 0, "stop": ["\n"], "seed": 7, "num_predict": 50},
        format={"type": "object"},
        stream=True,
        preemptible=False,
        reply_to="reply/here",
        correlation=b"\x00c",
        meta={"k": [1, None]},
        received_at=door.clock.wall(),
        max_tokens=50,
        prompt_tokens=4,
    )


def test_an_accepted_task_is_told(door: Door) -> None:
    """The answer to a good task has its position, ETA, model and a status that says queued."""
    door.one({"prompt": "first"})
    answer = door.one({"id": "b", "prompt": "second"})
    assert isinstance(answer, Accepted)
    status = answer.status
    assert (status.state, status.seq, status.position, status.eta_s) == (TaskState.QUEUED, 1, 2, 1.5)
    assert (status.id, status.src, status.duplicate, answer.result) == ("b", "dev", False, None)
    assert (answer.model, answer.own_id) == ("default:latest", True)


def test_null_is_as_good_as_absent(door: Door) -> None:
    """A client that writes all its optional fields, with null for what it does not use, is served."""
    nothing = dict.fromkeys(sorted(intake.FIELDS - {"prompt"}))
    assert door.task({"prompt": "p", **nothing}).prompt == "p"
    assert door.task({"messages": [{"role": "user", "content": "m"}], "prompt": None}).prompt is None


def test_messages_instead_of_a_prompt(door: Door) -> None:
    """A conversation is a task too."""
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    assert door.task({"messages": turns}).messages == tuple(Message(**turn) for turn in turns)


def test_the_alias_of_the_prior_system_works(door: Door) -> None:
    """Its payload is taken as it is; the two names of the model may be given together when they agree."""
    task = door.task({"task_type": "arithmetic", "model_name": "small:latest", "prompt": "What is 2+2?"})
    assert (task.model, task.model_requested, task.task_type) == ("small:latest", "small:latest", "arithmetic")
    assert door.task({"prompt": "p", "model": "small", "model_name": "small"}).model == "small:latest"


@pytest.mark.parametrize(
    ("num_predict", "max_tokens"), [(None, 200), (50, 50), (200, 200), (1_000_000, 200), (-1, 200), (-2, 200)]
)
def test_output_never_exceeds_the_models_limit(door: Door, num_predict: int | None, max_tokens: int) -> None:
    """Whatever a task asks for, and be it endless output, the model's own limit holds."""
    options = {} if num_predict is None else {"num_predict": num_predict}
    assert door.task({"prompt": "p", "options": options}).max_tokens == max_tokens


def test_how_much_is_asked_for_is_content(door: Door) -> None:
    """The same id with another num_predict is another task."""
    door.task({"id": "a", "prompt": "p", "options": {"num_predict": 5}})
    assert door.refusal({"id": "a", "prompt": "p", "options": {"num_predict": 50}})[0] == "duplicate_conflict"


def test_warnings_are_few_and_printable(door: Door) -> None:
    """However many unknown fields there are, and whatever they are called, warnings stay short."""
    answer = door.one({"prompt": "p"} | {f"\n\x1b{n}" + "x" * 500: n for n in range(50)})
    assert isinstance(answer, Accepted)
    assert len(answer.status.warnings) == 8
    assert all(len(warning) < 100 and warning.isprintable() for warning in answer.status.warnings)


# -- plain text


@pytest.mark.parametrize(
    ("payload", "content_type", "prompt", "plain"),
    [
        ("is 31 C hot?", None, "is 31 C hot?", True),
        ("with a newline\n", None, "with a newline", True),
        ("two\n\n", None, "two\n", True),
        ("  spaces stay ", None, "  spaces stay ", True),
        ("null", None, "null", True),
        ("true", None, "true", True),
        ("42", None, "42", True),
        ('"text"', None, '"text"', True),
        ("[1, 2]", None, "[1, 2]", True),
        ("NaN", None, "NaN", True),
        ('{"temperature": 31, "id": "x"}', None, '{"temperature": 31, "id": "x"}', True),
        ("{}", None, "{}", True),
        ('{"prompt": "p"}', None, "p", False),
        (' \n\t{"prompt": "p"}\n', None, "p", False),
        ('{"prompt": "p"}', "text/plain", '{"prompt": "p"}', True),
        ("{ no JSON", "text/plain; charset=utf-8", "{ no JSON", True),
        ('{"prompt": "p"}', "application/json", "p", False),
        ('{"prompt": "p"}', "Application/JSON; charset=utf-8", "p", False),
        ("hello", "application/octet-stream", "hello", True),
        ('{"prompt": "p"}', "application/octet-stream", "p", False),
    ],
)
def test_plain_text_or_json(door: Door, payload: str, content_type: str | None, prompt: str, *, plain: bool) -> None:
    """What begins like an object is JSON, an object without a task is a prompt as it stands, all else is a prompt."""
    task = door.task(payload, content_type=content_type)
    assert (task.prompt, task.plain) == (prompt, plain)


@pytest.mark.parametrize(
    ("payload", "is_told"),
    [
        ({"promt": "Say hi", "priority": "high"}, True),
        ({"text": "Say hi", "ttl_s": 60}, True),
        ({"temperature": 31, "id": 7}, False),
        ({}, False),
    ],
)
def test_an_object_that_looks_like_a_task_is_told(door: Door, payload: dict[str, Any], *, is_told: bool) -> None:
    """An object without a prompt that has fields of a task runs as it stands, and its sender is told."""
    answer = door.one(payload)
    assert isinstance(answer, Accepted)
    warning = "no prompt or messages: the object is the prompt as it stands"
    assert answer.status.warnings == ((warning,) if is_told else ())


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        ("[1]", "invalid_field"),
        ("null", "invalid_field"),
        ('{"reading": 5}', "invalid_field"),
        ("hello", "invalid_json"),
        ("", "invalid_json"),
    ],
)
def test_who_says_json_must_send_a_json_task(door: Door, payload: str, code: str) -> None:
    """With the content type of JSON, nothing is taken for plain text."""
    assert door.refusal(payload, content_type="application/json")[0] == code


# -- the JSON layer

DEEP_15 = "[" * 15 + "]" * 15


def test_the_limits_themselves_are_fine(door: Door) -> None:
    """Depth 16, 2^53 and a payload of exactly the limit are taken."""
    task = door.task('{"prompt": "p", "meta": ' + DEEP_15[:14] + str(2**53) + "]" * 14 + "}")
    assert str(2**53) in json.dumps(task.meta)
    assert door.task(json.dumps({"prompt": "p", "meta": [1] * 1_000})).meta == [1] * 1_000


def test_a_large_payload_is_refused_unread(new_door: Callable[..., Door]) -> None:
    """A payload above the limit is `too_large` whatever is in it, one of exactly the limit is read."""
    door = new_door(max_payload_bytes=1_000)
    assert door.task("x" * 1_000).prompt == "x" * 1_000
    for payload in (b"x" * 1_001, b"{" * 1_001, b"\xff" * 2_000_000):
        code, message = door.refusal(payload)
        assert code == "too_large"
        assert "1000" in message


# -- bad input


@pytest.mark.parametrize("case", bad_input.CASES, ids=[case.name for case in bad_input.CASES])
def test_bad_input(door: Door, case: bad_input.Case) -> None:
    """Each bad input has its stable code and a message that says what is wrong; what only looks bad is stored."""
    if case.code is not None:
        code, message = door.refusal(case.payload, **case.beside)
        assert (code, case.says.lower() in message.lower()) == (case.code, True), message
        assert door.store.open_count() == 0
        return
    answer = door.one(case.payload, **case.beside)
    assert isinstance(answer, Accepted), answer
    assert case.says in "".join(answer.status.warnings[:1])
    assert door.store.open_count() == 1


def test_unknown_fields_are_dropped(door: Door) -> None:
    """Nothing of a field that is not known is stored."""
    assert all(key not in door.task({"prompt": "p", key: 0}).to_json() for key in bad_input.DROPPED)


def test_odd_characters_are_data(door: Door) -> None:
    """Control characters, escapes and template tokens in a prompt are forwarded as they are."""
    odd = "nul \u0000 \x1b[31mred <|im_start|>system\r\n 😀 \u202e"
    assert door.task({"prompt": odd}).prompt == odd
    assert door.task(f"x{odd}").prompt == f"x{odd}"


def test_an_option_with_a_bad_name_is_escaped(door: Door) -> None:
    """The name of an option that is not known comes back in one printable line."""
    code, message = door.refusal({"prompt": "p", "options": {"x\n\x1b[31m" + "y" * 500: 1}})
    assert code == "invalid_field"
    assert message.startswith("options.x\\n\\x1b")


def test_stop_texts_at_their_limits(door: Door) -> None:
    """Sixteen texts of 64 characters are fine."""
    texts = [f"{n:064}" for n in range(16)]
    assert door.task({"prompt": "p", "options": {"stop": texts}}).options == {"stop": texts}


# -- ids, and who wins


def test_an_id_is_made_when_there_is_none(door: Door) -> None:
    """A task without an id gets one of its own that fits a topic, and is known as not its sender's."""
    first, second = (door.one("the same", packet_id=number) for number in (1, 2))
    assert isinstance(first, Accepted)
    assert isinstance(second, Accepted)
    assert first.address.id != second.address.id
    assert re.fullmatch(r"[0-9a-f]{16}", first.address.id)
    assert not first.own_id
    again = door.one("the same", redelivered=True, packet_id=1)
    assert isinstance(again, Accepted)
    assert again.status.duplicate
    assert again.address.id == first.address.id


@pytest.mark.parametrize(
    ("beside", "payload_id", "wanted"),
    [
        ({"id": "topic"}, "payload", "topic"),
        ({"id": "topic", "fields": {"id": "property"}}, "payload", "topic"),
        ({"fields": {"id": "property"}}, "payload", "property"),
        ({}, "payload", "payload"),
        ({"id": "topic"}, 5, "topic"),
    ],
)
def test_the_outer_id_wins(door: Door, beside: dict[str, Any], payload_id: Any, wanted: str) -> None:
    """Topic before user property before payload."""
    assert door.task({"prompt": "p", "id": payload_id}, **beside).id == wanted


@pytest.mark.parametrize(
    ("payload_id", "warnings"),
    [
        ("payload", ("id 'payload' in the payload is not used: the task has one beside it",)),
        (5, ("id 5 in the payload is not used: the task has one beside it",)),
        ("topic", ()),
        (None, ()),
    ],
)
def test_an_inner_id_that_is_not_used_is_told(door: Door, payload_id: Any, warnings: tuple[str, ...]) -> None:
    """The id of the topic holds, and who gave another in the payload is told."""
    answer = door.one({"prompt": "p", "id": payload_id, "odd": 1}, id="topic")
    assert isinstance(answer, Accepted)
    assert answer.status.warnings == ("unknown field 'odd'", *warnings)


def test_outside_fields_win(door: Door) -> None:
    """What is said beside the payload, as user properties or MQTT 5 properties, wins over what is in it."""
    beside = {
        "task_type": "outer",
        "model": "small",
        "priority": "urgent",
        "system": "outer",
        "stream": "true",
        "preemptible": "false",
        "options": '{"seed": 5}',
        "meta": '["outer"]',
        "format": '{"type": "array"}',
        "ttl_s": "50",
        "unknown": "ignored",
        "reply_to": "home/lock/set",
        "prompt": "ignored",
    }
    inner = {
        "task_type": "inner",
        "priority": "low",
        "system": 5,
        "stream": False,
        "options": {"num_ctx": 1},
        "meta": "inner",
        "format": "json",
        "ttl_s": -1,
        "reply_to": "home/lock/set",
    }
    task = door.task({"prompt": "p"} | inner, fields=beside, reply_to="reply/outer")
    assert (task.prompt, task.task_type, task.model, task.priority) == ("p", "outer", "small:latest", Priority.URGENT)
    assert (task.system, task.stream, task.preemptible, task.options) == ("outer", True, False, {"seed": 5})
    assert (task.meta, task.format, task.ttl_s, task.reply_to) == (["outer"], {"type": "array"}, 50.0, "reply/outer")
    assert door.task({"prompt": "p", "ttl_s": 5}, ttl_s=7.0, fields={"ttl_s": "6"}).ttl_s == 7.0


def test_unknown_properties_are_told(door: Door) -> None:
    """A user property that is not read is named, as an unknown field is; so is one that only a payload may have."""
    beside = {"prompt": "other", "traceparent": "00-1", "id": "a", "priority": "high"}
    answer = door.one({"prompt": "p", "promt": "q"}, fields=beside)
    assert isinstance(answer, Accepted)
    assert answer.status.warnings == (
        "unknown field 'promt'",
        "unknown property 'prompt'",
        "unknown property 'traceparent'",
    )
    many = door.one("p", fields={f"x{number}": "" for number in range(20)})
    assert isinstance(many, Accepted)
    assert len(many.status.warnings) == 8


def test_plain_text_takes_outside_fields(door: Door) -> None:
    """A sender of plain text may say the rest beside it."""
    task = door.task("why?", fields={"priority": "high", "format": "json"}, reply_to="reply/x", ttl_s=9.0)
    assert (task.prompt, task.plain, task.priority, task.format) == ("why?", True, Priority.HIGH, "json")
    assert (task.reply_to, task.ttl_s) == ("reply/x", 9.0)


# -- refusals find their sender


@pytest.mark.parametrize(
    ("payload", "beside"),
    [
        ({"id": "mine", "reply_to": "reply/me", "prompt": ""}, {}),
        ({"id": "mine", "reply_to": "reply/me", "prompt": "p"}, {"fields": {"priority": "asap"}}),
        ({"id": "mine", "reply_to": "reply/me", "prompt": "p", "model": "nope"}, {}),
        ("{broken", {"id": "mine", "reply_to": "reply/me"}),
        (b"\xff", {"fields": {"id": "mine"}, "reply_to": "reply/me"}),
        (b"x" * 300_000, {"id": "mine", "reply_to": "reply/me"}),
        ("", {"id": "mine", "reply_to": "reply/me"}),
    ],
)
def test_refusals_carry_id_and_reply_address(door: Door, payload: Any, beside: dict[str, Any]) -> None:
    """Whatever is wrong, a readable id and an allowed reply topic are in the refusal, with the correlation data."""
    answer = door.one(payload, correlation=b"c", **beside)
    assert isinstance(answer, Refused)
    assert (answer.address.src, answer.address.id, answer.address.reply_to) == ("dev", "mine", "reply/me")
    assert answer.address.correlation == b"c"


def test_a_bad_id_does_not_hide_the_reply_topic(door: Door) -> None:
    """The refusal of a bad id goes to the reply topic, under an id of our own; and the other way round."""
    for answer in (
        door.one({"prompt": "p", "id": "a b", "reply_to": "reply/me"}),
        door.one("hi", id="a b", reply_to="reply/me"),
    ):
        assert isinstance(answer, Refused)
        assert answer.address.reply_to == "reply/me"
        assert intake.NAME.fullmatch(answer.address.id)
    answer = door.one({"prompt": "p", "id": "mine", "reply_to": "home/lock"})
    assert isinstance(answer, Refused)
    assert (answer.address.id, answer.address.reply_to) == ("mine", None)


@pytest.mark.parametrize("src", ["", "a b", "x" * 65, "a/b", "ü"])
def test_a_sender_without_a_good_name_is_anonymous(door: Door, src: str) -> None:
    """A name that does not fit a topic is refused, and the answer goes to the anonymous place."""
    answer = door.one("hello", src=src)
    assert isinstance(answer, Refused)
    assert (answer.result.src, answer.address.src) == ("_", "_")
    assert answer.result.error is not None
    assert answer.result.error.message.startswith("src: ")


def test_plain_senders_are_refused_in_plain(door: Door) -> None:
    """Whether the sender wrote plain text is known to whoever publishes the refusal."""
    for payload, plain in (("", True), ({"prompt": ""}, False)):
        answer = door.one(payload)
        assert isinstance(answer, Refused)
        assert answer.address.plain is plain


@pytest.mark.parametrize(
    ("payload", "beside", "plain"),
    [
        (b"x" * 300_000, {}, True),
        (b"{" + b"x" * 300_000, {}, False),
        (b"{" + b"x" * 300_000, {"content_type": "text/plain"}, True),
        (b"[" + b"x" * 300_000, {"content_type": "application/json"}, False),
        (b"caf\xe9", {}, True),
        (b'\n {"prompt": "caf\xe9"}', {}, False),
        (b'\xef\xbb\xbf{"prompt": "p"}', {}, False),
        ('{"prompt": "p"}'.encode("utf-16"), {}, False),
        ('\u3000{"prompt": ""}'.encode(), {}, False),
        (b"hello", {"src": "a device"}, True),
        (b'{"prompt": "p"}', {"src": "a device"}, False),
        (b"hello", {"id": "an id"}, True),
        (b"hello", {"reply_to": "elsewhere"}, True),
        (b"hello", {"correlation": b"x" * 5_000}, True),
    ],
)
def test_an_early_refusal_is_plain_too(door: Door, payload: bytes, beside: dict[str, Any], *, plain: bool) -> None:
    """What is refused before it is read is answered in plain text when it cannot have been JSON."""
    answer = door.one(payload, **beside)
    assert isinstance(answer, Refused)
    assert answer.address.plain is plain


def test_a_transport_can_refuse(door: Door) -> None:
    """What only the transport knows is refused the same way, to the same places, and nothing is stored."""
    incoming = Incoming(payload=b'{"id": "mine", "reply_to": "reply/me", "prompt": "p"}', src="dev", correlation=b"c")
    refused = door.intake.refuse(incoming, "retained", "no retained tasks")
    assert refused.result.error is not None
    assert (refused.result.error.code, refused.result.error.retryable) == ("retained", False)
    assert (refused.address.id, refused.address.reply_to) == ("mine", "reply/me")
    by_topic = door.intake.refuse(
        replace(incoming, payload=b"\xff", id="topic"), "storage_full", "later", retryable=True
    )
    assert by_topic.address.id == "topic"
    assert by_topic.result.error is not None
    assert by_topic.result.error.retryable
    assert door.store.open_count() == 0


# -- what the store says


def test_a_known_task_is_known_although_its_model_is_gone(door: Door) -> None:
    """What was accepted is answered from the store, not refused for what is no longer there."""
    sent: tuple[Incoming, ...] = (
        Incoming(payload=b'{"prompt": "hi", "model": "small"}', src="dev", id="a"),
        Incoming(payload=b"hi", src="dev", redelivered=True, packet_id=7),
    )
    before = door.intake.submit(sent)

    def gone(name: str, _fallback: object) -> tuple[str, ModelSettings]:
        raise Rejected("unknown_model", f"model: {name} is gone")

    later = Intake(replace(door.intake._rules, check_model=gone), door.store.add_many, door.store.recognise)
    again = later.submit(sent)
    assert all(isinstance(answer, Accepted) for answer in before + again), again
    assert [answer.address for answer in again] == [answer.address for answer in before]
    others = later.submit([replace(one, payload=b"other", id=one.id and "b") for one in sent])
    assert [one.result.error.code for one in others if isinstance(one, Refused) and one.result.error] == [
        "unknown_model",
        "unknown_model",
    ]
    (changed,) = later.submit([replace(sent[0], payload=b"other")])
    assert isinstance(changed, Refused)
    assert changed.result.error is not None
    assert changed.result.error.code == "duplicate_conflict"


def test_a_known_task_is_not_new(door: Door) -> None:
    """The same id with the same content is the same task; its result comes along once there is one."""
    first = door.one({"id": "a", "prompt": "p", "ttl_s": 50})
    again = door.one({"id": "a", "prompt": "p", "reply_to": "reply/new"})
    assert isinstance(first, Accepted)
    assert isinstance(again, Accepted)
    assert (again.seq, again.status.duplicate, again.status.position) == (first.seq, True, None)
    assert again.address.reply_to == "reply/new"


def test_the_same_id_for_something_else_is_a_conflict(door: Door) -> None:
    """Another content under a used id is refused for good; the first task is untouched."""
    door.task({"id": "a", "prompt": "p"})
    answer = door.one({"id": "a", "prompt": "q"})
    assert isinstance(answer, Refused)
    assert answer.result.error is not None
    assert (answer.result.error.code, answer.result.error.retryable) == ("duplicate_conflict", False)
    stored = door.store.find("dev", "a")
    assert stored is not None
    assert stored.task.prompt == "p"


@pytest.mark.parametrize(
    ("outcome", "code", "limit"),
    [
        ("full", "queue_full", "queue.max_tasks: 10000, of which 100 "),
        ("full_of_bytes", "queue_full", "queue.max_bytes: 268435456, "),
        ("full_for_src", "queue_full", "queue.per_source_tasks: 7; "),
        ("no_room", "storage_full", "queue.retention_bytes: 268435456, "),
    ],
)
def test_a_full_queue_is_told_as_retryable(new_door: Callable[..., Door], outcome: str, code: str, limit: str) -> None:
    """Where the queue has no room, the sender is told which limit stands in the way, and to come again."""
    rules = new_door(per_source_tasks=7).intake._rules
    full = Intake(rules, lambda batch: [Added(outcome=outcome) for _ in batch], nothing_known)
    (answer,) = full.submit([Incoming(payload=b"hello")])
    assert isinstance(answer, Refused)
    assert answer.result.error is not None
    assert (answer.result.error.code, answer.result.error.retryable) == (code, True)
    assert answer.result.error.message.startswith(limit)


def test_every_message_of_a_group_is_a_sign_of_life(door: Door) -> None:
    """However long each takes, a group does not look like a thread that hangs: there is a beat before each."""
    seen: list[str] = []

    def check(name: str, fallback: Sequence[str] | None) -> tuple[str, ModelSettings]:
        seen.append("asked")
        return check_model(name, fallback)

    intake = Intake(replace(door.intake._rules, check_model=check), door.store.add_many, door.store.recognise)
    intake.submit([Incoming(payload=b"one"), Incoming(payload=b"two")], lambda: seen.append("beat"))
    assert seen == ["beat", "asked", "beat", "asked"]


def test_a_batch_is_answered_in_order(door: Door) -> None:
    """Good and bad messages of one group are each answered at their place, and one commit stores the good ones."""
    commits: list[str] = []
    door.store._db.set_trace_callback(lambda text: commits.append(text) if text == "COMMIT" else None)
    payloads = [b"one", b"{bad", b'{"id": "two", "prompt": "p"}', b'{"id": "two", "prompt": "q"}', b"\xff", b"three"]
    answers = door.intake.submit([Incoming(payload=payload) for payload in payloads])
    kinds = [type(answer) for answer in answers]
    assert kinds == [Accepted, Refused, Accepted, Refused, Refused, Accepted]
    assert len(commits) == 1
    assert door.store.open_count() == 3
    assert door.intake.submit([]) == []


def test_a_failing_store_is_the_only_exception(door: Door) -> None:
    """When the store cannot write, the caller is told, since then nothing of the group was stored."""

    def broken(_batch: object) -> list[Added]:
        raise StoreError("damaged")

    failing = Intake(door.intake._rules, broken, nothing_known)
    with pytest.raises(StoreError):
        failing.submit([Incoming(payload=b"hello")])
    (refused,) = failing.submit([Incoming(payload=b"")])  # nothing to store: nothing can fail
    assert isinstance(refused, Refused)


def test_a_full_disk_refuses_only_what_is_new(door: Door) -> None:
    """Without room for one task, the others of its group that are known have their answers all the same."""
    waits = Incoming(payload=b"hi", src="dev", id="waits")
    ended = Incoming(payload=b"ho", src="dev", id="ended")
    first = door.intake.submit([waits, ended])
    door.finish(first[1])
    (pages,) = door.store._db.execute("PRAGMA page_count").fetchone()
    door.store._db.execute(f"PRAGMA max_page_count = {pages}")
    large = Incoming(payload=b"x" * 50_000, src="dev", id="large")
    conflict = replace(waits, payload=b"other")
    answers = door.intake.submit([waits, large, ended, conflict])
    assert codes(answers) == [None, "storage_full", None, "duplicate_conflict"]
    assert isinstance(answers[0], Accepted)
    assert isinstance(answers[2], Accepted)
    assert (answers[0].status.duplicate, answers[0].result) == (True, None)
    assert answers[2].result is not None
    assert not answers[2].in_outbox
    door.store._db.execute("PRAGMA max_page_count = 1000000")
    assert codes(door.intake.submit([waits, large, ended])) == [None, None, None]


# -- draining and rates


@pytest.mark.parametrize("limit", ["rate_limited", "draining", "queue_full"])
def test_a_known_task_is_answered_whatever_the_limits(new_door: Callable[..., Door], limit: str) -> None:
    """What the broker sends again, or its sender, is not refused under an id that waits for its answer."""
    door = new_door(per_source_rate=3)
    sent = [Incoming(payload=b"hello", src="dev", id=str(number)) for number in range(3)]
    before = door.intake.submit(sent)
    if limit == "draining":
        door.intake.drain()
    if limit == "queue_full":
        door.clock.advance(120)
        door.store._limits = Limits(max_tasks=1, urgent_reserve=0)
    new = Incoming(payload=b"hello", src="dev", id="new")
    changed = replace(sent[0], payload=b"other")
    answers = door.intake.submit([replace(sent[0], redelivered=True), sent[1], new])
    assert codes(answers) == [None, None, "rate_limited" if limit == "draining" else limit]
    assert [answer.address for answer in answers[:2]] == [answer.address for answer in before[:2]]
    assert codes(door.intake.submit([changed])) == ["duplicate_conflict"]


@pytest.mark.parametrize("old", [{"prompt": "x" * 900}, {"messages": [{"role": "user", "content": "x" * 900}]}])
def test_a_known_task_may_be_too_long_by_now(door: Door, old: dict[str, Any]) -> None:
    """A task that fitted the context when it was accepted has its answer, though the context is smaller now."""
    sent = Incoming(payload=json.dumps(old).encode(), src="dev", id="a")
    door.intake.submit([sent])

    def smaller(name: str, _fallback: object) -> tuple[str, ModelSettings]:
        return name, ModelSettings(num_ctx=200)

    rules = replace(door.intake._rules, check_model=smaller)
    later = Intake(rules, door.store.add_many, door.store.recognise)
    assert codes(later.submit([sent, replace(sent, id="b")])) == [None, "invalid_field"]


def test_draining_refuses_everything_readably(door: Door) -> None:
    """While the daemon stops, each task is refused as retryable, to where its sender looks."""
    door.intake.drain()
    answer = door.one({"id": "mine", "prompt": "p", "reply_to": "reply/me"})
    assert isinstance(answer, Refused)
    assert answer.result.error is not None
    assert (answer.result.error.code, answer.result.error.retryable) == ("draining", True)
    assert (answer.address.id, answer.address.reply_to) == ("mine", "reply/me")
    assert door.refusal("{bad")[0] == "draining"
    assert door.store.open_count() == 0


def test_a_sender_has_a_rate(new_door: Callable[..., Door]) -> None:
    """A sender may send a minute's worth at once and then at its rate; nonsense counts, and others are not affected."""
    door = new_door(per_source_rate=3)
    for payload in ("one", "{bad", "three"):
        door.one(payload)
    assert door.refusal({"id": "mine", "prompt": "p"})[0] == "rate_limited"
    assert door.one({"id": "mine", "prompt": "p"}).address.id == "mine"
    assert isinstance(door.one("hi", src="other"), Accepted)
    door.clock.advance(20)
    assert isinstance(door.one("four"), Accepted)
    assert door.refusal("five")[0] == "rate_limited"
    door.clock.advance(1_000)
    assert sum(isinstance(door.one(f"late {n}"), Accepted) for n in range(9)) == 3
    for step_s in (1e8, -2e8):  # setting the wall clock gives nobody more or less
        door.clock.step_wall(step_s)
        assert door.refusal("stepped")[0] == "rate_limited"
    door.clock.advance(20)
    assert isinstance(door.one("in time"), Accepted)


def test_senders_are_remembered_within_bounds(new_door: Callable[..., Door], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many names are made up, the memory for rates is bounded, and those who send still are still limited."""
    monkeypatch.setattr(intake, "MAX_SENDERS", 10)
    door = new_door(per_source_rate=2)
    for n in range(100):
        door.one("{bad", src=f"made-up-{n}")
        if n % 5 == 0:
            door.one("{bad", src="busy")
    assert len(door.intake._rates._buckets) == 10
    assert door.refusal("hi", src="busy")[0] == "rate_limited"


# -- anything at all

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["json", "high", "small", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
TASKISH = st.dictionaries(
    st.sampled_from(sorted(intake.FIELDS)) | st.text(max_size=5),
    JUNK | st.dictionaries(st.sampled_from([*sampling.OPTIONS, "stop", "type", "role", "content"]), JUNK, max_size=3),
    max_size=6,
)
BESIDE = st.fixed_dictionaries(
    {},
    optional={
        "src": st.text(max_size=5) | st.just("dev"),
        "id": st.none() | st.text(max_size=5),
        "fields": st.dictionaries(st.sampled_from([*sorted(intake.FIELDS), "x"]), st.text(max_size=8), max_size=4),
        "content_type": st.none() | st.sampled_from(["application/json", "text/plain", "", ";"]) | st.text(max_size=5),
        "ttl_s": st.none() | st.floats(),
        "reply_to": st.none() | st.text(max_size=8) | st.just("reply/x"),
        "correlation": st.none() | st.binary(max_size=4),
        "redelivered": st.booleans(),
    },
)
QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def answer_of(door: Door, payload: bytes, beside: dict[str, Any]) -> None:
    """Submit, and look that the answer is one that can be published and stored."""
    (answer,) = door.intake.submit([Incoming(payload=payload, **beside)])
    assert intake.NAME.fullmatch(answer.address.id)
    assert intake.NAME.fullmatch(answer.address.src)
    if isinstance(answer, Refused):
        assert answer.result.error is not None
        assert answer.result.error.code in bad_input.CODES
        answer.result.to_json().encode()
    else:
        answer.status.to_json().encode()


@QUICK
@given(
    payload=st.binary(max_size=60) | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")), beside=BESIDE
)
def test_any_bytes_get_an_answer(door: Door, payload: bytes, beside: dict[str, Any]) -> None:
    """Whatever arrives, the answer is an acceptance or a refusal with a stable code, never an exception."""
    answer_of(door, payload, beside)


@QUICK
@given(payload=TASKISH, beside=BESIDE)
def test_any_object_gets_an_answer(door: Door, payload: dict[str, Any], beside: dict[str, Any]) -> None:
    """The same for whatever looks like a task."""
    answer_of(door, json.dumps(payload).encode(), beside)


@QUICK
@given(value=JUNK)
def test_sane_json_is_read_as_it_is(value: Any) -> None:
    """Strict reading gives what the standard library reads, or refuses."""
    text = json.dumps(value)
    with suppress(Rejected):
        assert read_json(text) == json.loads(text)


# -- time

NASTY = {
    "deep": "[" * 65_536,
    "deep objects": '{"a":' * 13_000,
    "many keys": "{" + ",".join(f'"{n}":0' for n in range(7_000)) + "}",
    "many members": "[" + "0," * 32_000 + "0]",
    "empty lists": "[" + "[]," * 21_000 + "[]]",
    "long integer": "9" * 65_536,
    "long fraction": "0." + "9" * 65_500,
    "long exponent": "1e" + "9" * 65_500,
    "many floats": "[" + "1e-300," * 9_000 + "0]",
    "escapes": '"' + r"\u0041" * 10_900 + '"',
    "surrogates": '"' + r"\ud83d\ude00" * 5_400 + '"',
    "duplicate keys": "{" + '"a":0,' * 10_000 + '"a":0}',
    "backslashes": '"' + "\\" * 65_534,
    "spaces": " " * 65_536,
}
PLAIN = json.dumps([{"name": f"sensor {n}", "value": n / 7, "on": True} for n in range(1_200)])


def fastest_s(job: Callable[[], object]) -> float:
    """The least time of several runs, which is what the job takes when nobody disturbs it."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        job()
        times.append(time.perf_counter() - began)
    return min(times)


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
@pytest.mark.usefixtures("no_collection")
def test_nasty_json_takes_no_longer_than_plain(text: str) -> None:
    """No 64 kB of JSON keep us busy for more than a fixed multiple of what ordinary 64 kB take to parse."""

    def read() -> None:
        with suppress(Rejected):
            read_json(text)

    assert len(text) == pytest.approx(len(PLAIN), rel=0.6)
    assert fastest_s(read) < 100 * fastest_s(lambda: json.loads(PLAIN))


def test_the_table_of_codes_is_whole() -> None:
    """Every code that the door can give is one of the stable ones."""
    source = Path(intake.__file__).read_text(encoding="utf-8")
    used = set(re.findall(r'Rejected\(\s*"(\w+)"', source)) | {code for code, _ in intake._OUTCOMES.values()}
    assert used <= bad_input.CODES
