"""The door: every bad message has its stable code and says what is wrong; every good one is on the disk."""

import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_daemon import intake
from edge_daemon.clock import iso
from edge_daemon.config import Config, Models, ModelSettings, Queue
from edge_daemon.errors import Rejected, StorageFull
from edge_daemon.intake import Intake, Rules, read_json
from edge_daemon.messages import Accepted, Added, Incoming, Message, Priority, Refused, Task, TaskState
from edge_daemon.mqtt_bridge import Topics
from edge_daemon.store import Limits, Store
from tests.fakes import FakeClock

ROOT = "edge-llm/pi1"
NAMES = {"default:latest", "small:latest"}
CODES = {
    *("invalid_json", "invalid_utf8", "invalid_field", "too_large", "unknown_model", "queue_full", "rate_limited"),
    *("expired_on_arrival", "duplicate_conflict", "forbidden_reply_topic", "retained", "draining", "storage_full"),
    "model_too_large",
}


def check_model(name: str) -> tuple[str, ModelSettings]:
    """Two small models and one that does not fit."""
    full = name.lower() if ":" in name else f"{name.lower()}:latest"
    if full == "huge:latest":
        raise Rejected("model_too_large", f"model: {full} needs more than there is")
    if full not in NAMES:
        raise Rejected("unknown_model", f"model: Ollama has no model {ascii(full)[:60]}")
    return full, ModelSettings(num_ctx=16_384, max_tokens=200)


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

    def refusal(self, payload: bytes | str | dict[str, Any], **beside: Any) -> tuple[str, str]:
        """Code and message of a refusal; it is checked for what every refusal must be."""
        answer = self.one(payload, **beside)
        assert isinstance(answer, Refused), answer
        result = answer.result
        assert (result.state, result.id, result.src) == (TaskState.REJECTED, answer.address.id, answer.address.src)
        assert result.ts == iso(self.clock.wall())
        assert result.error is not None
        assert result.error.code in CODES
        assert len(result.error.message) < 300
        assert result.error.message.isprintable()
        return result.error.code, result.error.message


@pytest.fixture
def new_door(tmp_path: Path) -> Callable[..., Door]:
    """Builds a door with its own configuration of the queue, over one store."""
    clock = FakeClock()
    store = Store(tmp_path / "queue.db", clock=clock, limits=Limits(max_tasks=1_000_000, urgent_reserve=0))
    store._db.execute("PRAGMA synchronous = OFF")

    def new(**queue: Any) -> Door:
        config = Config(models=Models(default="default"), queue=Queue(**queue))
        rules = Rules(
            config=config,
            clock=clock,
            check_model=check_model,
            check_reply_to=lambda src, topic: Topics(ROOT).check_reply_to(src, topic, ["reply/"]),
            eta_s=lambda tasks: [1.5 for _ in tasks],
        )
        return Door(Intake(rules, store.add_many), store, clock)

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


@pytest.mark.parametrize("odd", ["nul \u0000", "\x1b[31mred", "<|im_start|>system", "line\r\nline", "😀", "\u202e"])
def test_odd_characters_are_data(door: Door, odd: str) -> None:
    """Control characters, escapes and template tokens in a prompt are forwarded as they are."""
    assert door.task({"prompt": odd}).prompt == odd
    assert door.task(f"x{odd}").prompt == f"x{odd}"


@pytest.mark.parametrize(
    "key", ["__proto__", "__class__", "$ref", "images", "raw", "template", "context", "keep_alive"]
)
def test_unknown_fields_are_told_and_dropped(door: Door, key: str) -> None:
    """A field that is not known has no effect, and the sender is warned of it by name."""
    answer = door.one({"prompt": "p", key: 0})
    assert isinstance(answer, Accepted)
    assert answer.status.warnings == (f"unknown field '{key}'",)
    stored = door.store.find("dev", answer.address.id)
    assert stored is not None
    assert key not in stored.task.to_json()


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


@pytest.mark.parametrize("payload", ["", " ", "\n", "\t\n "])
def test_an_empty_text_is_no_task(door: Door, payload: str) -> None:
    """Ollama takes an empty prompt as a command to load or unload: it is never forwarded."""
    assert door.refusal(payload) == ("invalid_field", "prompt: empty")


# -- the JSON layer

DEEP_15 = "[" * 15 + "]" * 15


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ('{"prompt": "p", "meta": NaN}', "NaN is not JSON"),
        ('{"prompt": "p", "meta": [Infinity]}', "Infinity is not JSON"),
        ('{"prompt": "p", "meta": -Infinity}', "-Infinity is not JSON"),
        ('{"prompt": "p", "meta": 1e400}', "too large"),
        ('{"prompt": "p", "meta": -1e400}', "too large"),
        ('{"prompt": "p", "meta": ' + "9" * 4301 + "}", "2^53"),
        ('{"prompt": "p", "meta": ' + "9" * 4300 + "}", "2^53"),
        (f'{{"prompt": "p", "meta": {2**63}}}', "2^53"),
        (f'{{"prompt": "p", "meta": {-(2**53) - 1}}}', "2^53"),
        ('{"prompt": ' + "[" * 100_000, "nested deeper"),
        ('{"prompt": "p", "meta": ' + "[" * 990 + "]" * 990 + "}", "nested deeper"),
        ('{"prompt": "p", "meta": ' + "[" + DEEP_15 + "]}", "nested deeper"),
        ('{"a":' * 20_000 + "1" + "}" * 20_000, "nested deeper"),
        ('{"prompt": "p", "prompt": "q"}', "duplicate key 'prompt'"),
        ('{"prompt": "p", "meta": {"a": 1, "a": 1}}', "duplicate key 'a'"),
        (r'{"prompt": "\ud800"}', "lone surrogate"),
        (r'{"prompt": "p", "meta": {"\udfff": 1}}', "lone surrogate"),
        (r'{"prompt": "p", "id": "\ud800"}', "lone surrogate"),
        ('{"prompt": "p"} trailing', "Extra data"),
        ('{"prompt": "p"}{"prompt": "q"}', "Extra data"),
        ("{'prompt': 'p'}", "double quotes"),
        ('{"prompt": "p", /* why */ "id": "a"}', "double quotes"),
        ('{"prompt": "p",}', "double quotes"),
        ('{"prompt": "p"', "delimiter"),
        ('{"prompt": "line\nbreak"}', "control character"),
        ("{", "double quotes"),
        ("{ 31 C is hot?", "double quotes"),
        (json.dumps({"prompt": "p"} | {f"k{n}": n for n in range(5_001)}), "members"),
        (json.dumps({"prompt": "p", "meta": list(range(10_000))}), "members"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_bad_json_is_refused(door: Door, payload: str, says: str) -> None:
    """What begins like a JSON object and is not strict, sane JSON is `invalid_json`, and the message says why."""
    code, message = door.refusal(payload)
    assert code == "invalid_json"
    assert says.lower() in message.lower()


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b"\xc0\xae",
        b"caf\xe9",
        '{"prompt": "p"}'.encode("utf-16"),
        '{"prompt": "p"}'.encode("utf-32"),
        b"\xef\xbb\xbf" + b'{"prompt": "p"}',
        b"\xef\xbb\xbfhello",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff",
        b"\xa1fpromptap\xff",
        b"\xed\xa0\x80",
    ],
    ids=lambda value: ascii(value[:12]),
)
def test_what_is_not_utf8_is_refused(door: Door, payload: bytes) -> None:
    """Other encodings, byte order marks, overlong forms and binary formats are `invalid_utf8`."""
    assert door.refusal(payload)[0] == "invalid_utf8"


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


# -- the field layer


def fields(**values: Any) -> dict[str, Any]:
    """A task with these fields."""
    return {"prompt": "p"} | values


Case = tuple[dict[str, Any], str, str]


def bad(name: str, *values: Any, code: str = "invalid_field") -> list[Case]:
    """A case for each bad value of the field `name`."""
    return [(fields(**{name: value}), code, name) for value in values]


def bad_option(name: str, *values: Any) -> list[Case]:
    """A case for each bad value of the option `name`."""
    return [(fields(options={name: value}), "invalid_field", f"options.{name}") for value in values]


def bad_message(*entries: Any) -> list[Case]:
    """A case for each bad entry of a conversation."""
    good = {"role": "user", "content": "m"}
    return [({"messages": [good, entry]}, "invalid_field", "messages[1]") for entry in entries]


RUNNER_OPTIONS = ("num_ctx", "num_gpu", "num_thread", "use_mmap", "keep_alive", "low_vram", "num_batch")
YES: Any = True
NO_MESSAGES: list[Any] = [[], "hi", {}, 5, True, [{}] * 257]
BAD_FIELDS: list[Case] = [
    *bad("id", "", "a b", "../../etc", "a/b", "#", "+", "a\n", "\0", "x" * 65, "\u202e", "😀", 5, YES, ["a"], {}, 1.5),
    *bad("priority", YES, 1, -1, 1e9, "", "URGENT", "asap", []),
    *bad("ttl_s", -1, YES, "5", 604_801, 1e12, [5], -0.5),
    *((fields(ttl_s=zero), "expired_on_arrival", "time to live") for zero in (0, 0.0, -0.0)),
    *bad("model", "../x", "evil.com/x/y", "http://x/y", "nope", code="unknown_model"),
    *bad("model", "", "x" * 4_096, "a\nb", 5, YES, ["small"]),
    *bad("model", "huge", code="model_too_large"),
    (fields(model="small", model_name="default"), "invalid_field", "model_name"),
    *bad("options", [], "temperature=1", 5, YES),
    *(case for name in RUNNER_OPTIONS for case in bad_option(name, 1)),
    *bad_option("num_predict", 0, -3, 1e9, 5.0, YES, None),
    *bad_option("temperature", 1e308, "hot", -1, YES),
    *bad_option("seed", 1.0, -1, 2**31, "7"),
    *bad_option("top_p", 1.1, -0.1, None),
    *bad_option("stop", "", "x" * 65, ["a"] * 17, ["a"] * 9_000, [5], 5, [""], {}),
    *bad("prompt", "", " \n", 5, YES, ["p"], None),
    (fields(messages=[{"role": "user", "content": "m"}]), "invalid_field", "prompt"),
    *(({"messages": value}, "invalid_field", "messages") for value in NO_MESSAGES),
    *bad_message("m", None, {"role": "user"}, {"role": "tool", "content": "m"}, {"role": ["user"], "content": "m"}),
    *bad_message({"role": "user", "content": ""}, {"role": "user", "content": 5}),
    *bad_message({"role": "user", "content": "m", "images": ["x"]}),
    *bad("system", 5, YES, ["s"]),
    *bad("task_type", "", "a b", "x" * 65, "=cmd", 5),
    *bad("stream", 1, 0, "true", []),
    *bad("preemptible", 1, "no"),
    *bad("format", "xml", "", 5, YES, [], {"type": "strnig"}, {"enum": ["x" * 17_000]}),
    (fields(format={"properties": {"a": {"enum": 5}}}), "invalid_field", "properties.a.enum"),
    *bad("meta", "x" * 5_000),
    *bad(
        "reply_to",
        5,
        YES,
        ["reply/x"],
        {},
        "",
        "reply/+",
        "reply/#",
        "reply/\0",
        "reply/\x1f",
        "$SYS/x",
        "reply/",
        "home/lock/set",
        "reply//x",
        "/".join(["reply"] * 200),
        "reply/" + "x" * 70_000,
        f"{ROOT}/task",
        f"{ROOT}/reply/other/x/result",
        "$share/g/reply/x",
        "$CONTROL/dynamic-security/v1",
        "reply/\ufeffx",
        code="forbidden_reply_topic",
    ),
    ({"prompt": "x" * 70_000}, "invalid_field", "prompt"),
    ({"prompt": "p", "system": "x" * 70_000}, "invalid_field", "prompt"),
]


@pytest.mark.parametrize(("payload", "code", "names"), BAD_FIELDS, ids=[json.dumps(it[0])[:60] for it in BAD_FIELDS])
def test_bad_fields_are_refused(door: Door, payload: dict[str, Any], code: str, names: str) -> None:
    """Each bad field has its stable code, and the message names the field."""
    got, message = door.refusal(payload)
    assert (got, names in message) == (code, True), message
    assert door.store.open_count() == 0


def test_an_option_with_a_bad_name_is_escaped(door: Door) -> None:
    """The name of an option that is not known comes back in one printable line."""
    code, message = door.refusal(fields(options={"x\n\x1b[31m" + "y" * 500: 1}))
    assert code == "invalid_field"
    assert message.startswith("options.x\\n\\x1b")


def test_stop_texts_at_their_limits(door: Door) -> None:
    """Sixteen texts of 64 characters are fine."""
    texts = [f"{n:064}" for n in range(16)]
    assert door.task(fields(options={"stop": texts})).options == {"stop": texts}


# -- ids, and who wins


def test_an_id_is_made_when_there_is_none(door: Door) -> None:
    """A task without an id gets one of its own that fits a topic, and is known as not its sender's."""
    first, second = (door.one("the same") for _ in range(2))
    assert isinstance(first, Accepted)
    assert isinstance(second, Accepted)
    assert first.address.id != second.address.id
    assert re.fullmatch(r"[0-9a-f]{16}", first.address.id)
    assert not first.own_id
    again = door.one("the same", redelivered=True)
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
    task = door.task(fields(**inner), fields=beside, reply_to="reply/outer")
    assert (task.prompt, task.task_type, task.model, task.priority) == ("p", "outer", "small:latest", Priority.URGENT)
    assert (task.system, task.stream, task.preemptible, task.options) == ("outer", True, False, {"seed": 5})
    assert (task.meta, task.format, task.ttl_s, task.reply_to) == (["outer"], {"type": "array"}, 50.0, "reply/outer")
    assert door.task(fields(ttl_s=5), ttl_s=7.0, fields={"ttl_s": "6"}).ttl_s == 7.0


def test_plain_text_takes_outside_fields(door: Door) -> None:
    """A sender of plain text may say the rest beside it."""
    task = door.task("why?", fields={"priority": "high", "format": "json"}, reply_to="reply/x", ttl_s=9.0)
    assert (task.prompt, task.plain, task.priority, task.format) == ("why?", True, Priority.HIGH, "json")
    assert (task.reply_to, task.ttl_s) == ("reply/x", 9.0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("ttl_s", text) for text in ("soon", "nan", "inf", "-1", "1_0", "", "true", "[5]")),
        *(("stream", text) for text in ("1", "True", "yes", "")),
        *(("options", text) for text in ("seed=5", "[]", '{"num_ctx": 5}', "{", '{"seed": NaN}')),
        *(("format", text) for text in ("xml", "{", "[]", '"xml"')),
        ("meta", "{"),
        ("priority", "5"),
        ("system", "\ud800"),
        ("model", "\ud800"),
        ("task_type", "a b"),
    ],
)
def test_bad_outside_fields_are_refused(door: Door, name: str, text: str) -> None:
    """Text beside the payload is read as strictly as the payload, and the field is named."""
    code, message = door.refusal({"id": "mine", "prompt": "p"}, fields={name: text})
    assert code == "invalid_field"
    assert name in message


def test_expiry_of_zero_is_expired_on_arrival(door: Door) -> None:
    """A message whose expiry the broker has counted down to nothing is refused as such."""
    assert door.refusal("hello", ttl_s=0.0)[0] == "expired_on_arrival"
    assert door.refusal("hello", fields={"ttl_s": "0"})[0] == "expired_on_arrival"


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
    ("outcome", "code"), [("full", "queue_full"), ("full_for_src", "queue_full"), ("no_room", "storage_full")]
)
def test_a_full_queue_is_told_as_retryable(door: Door, outcome: str, code: str) -> None:
    """Where the queue has no room, the sender is told to come again."""
    full = Intake(door.intake._rules, lambda batch: [Added(outcome=outcome) for _ in batch])
    (answer,) = full.submit([Incoming(payload=b"hello")])
    assert isinstance(answer, Refused)
    assert answer.result.error is not None
    assert (answer.result.error.code, answer.result.error.retryable) == (code, True)


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

    def full(_batch: object) -> list[Added]:
        raise StorageFull("no room")

    failing = Intake(door.intake._rules, full)
    with pytest.raises(StorageFull):
        failing.submit([Incoming(payload=b"hello")])
    (refused,) = failing.submit([Incoming(payload=b"")])  # nothing to store: nothing can fail
    assert isinstance(refused, Refused)


# -- draining and rates


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
    JUNK | st.dictionaries(st.sampled_from([*intake.OPTIONS, "stop", "type", "role", "content"]), JUNK, max_size=3),
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
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def answer_of(door: Door, payload: bytes, beside: dict[str, Any]) -> None:
    """Submit, and look that the answer is one that can be published and stored."""
    (answer,) = door.intake.submit([Incoming(payload=payload, **beside)])
    assert intake.NAME.fullmatch(answer.address.id)
    assert intake.NAME.fullmatch(answer.address.src)
    if isinstance(answer, Refused):
        assert answer.result.error is not None
        assert answer.result.error.code in CODES
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
    assert used <= CODES
