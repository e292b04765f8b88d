"""Every bad input that a task can be, with the code that answers it: one table for the door, MQTT and HTTP.

`CASES` hold a payload as it is sent, what is said beside it, and what must come of it. A case that is refused has its
stable code and a word that the message must have: the field, or what is wrong. A case without a code looks bad and is
good: it is served.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.daemon import N

NUM_CTX = 16_384
TURN = {"role": "user", "content": "x" * 35_000}
"""What the default model is to have; `MODELS` are those that the table counts on."""
CODES = frozenset(
    {
        *("invalid_json", "invalid_utf8", "invalid_field", "too_large", "unknown_model", "queue_full", "rate_limited"),
        *("expired_on_arrival", "duplicate_conflict", "forbidden_reply_topic", "retained", "draining", "storage_full"),
        "model_too_large",
    }
)
"""All codes of a refusal."""
MODELS = {"default": "default", "small": "small", "huge": "huge"}
"""`huge` is one that can never fit into the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One message. `beside` are keyword arguments of `Incoming`, all that comes with a payload and is not in it."""

    name: str
    payload: bytes
    code: str | None
    """None: it is accepted."""
    says: str = ""
    """The message of the refusal has this; of a case that is accepted, its first warning."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    mqtt: bool = True
    http: bool = True
    """Whether this transport can carry it to us."""

    @property
    def mqtt_3(self) -> bool:
        """Whether MQTT 3.1.1, which has no properties, can carry it too."""
        return self.mqtt and not self.beside.keys() - {"src", "id"}


def _bytes(payload: object) -> bytes:
    if isinstance(payload, bytes):
        return payload
    return (payload if isinstance(payload, str) else json.dumps(payload)).encode()


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 48 else f"{text[:40]}... ({len(text)})"


def _each(kind: str, code: str | None, payloads: Iterable[Any], says: str = "", **more: Any) -> Iterator[Case]:
    for payload in payloads:
        yield Case(name=f"{kind}: {_shown(payload)}", payload=_bytes(payload), code=code, says=says, **more)


def _with(**fields: Any) -> dict[str, Any]:
    return {"prompt": "p"} | fields


def _field(name: str, *values: Any, code: str | None = "invalid_field", says: str | None = None) -> Iterator[Case]:
    """A case for each bad value of one field."""
    for value in values:
        yield Case(
            name=f"{name} = {_shown(value)}",
            payload=_bytes(_with(**{name: value})),
            code=code,
            says=name if says is None else says,
        )


def _option(name: str, *values: Any) -> Iterator[Case]:
    for value in values:
        payload = _bytes(_with(options={name: value}))
        yield Case(
            name=f"options.{name} = {_shown(value)}", payload=payload, code="invalid_field", says=f"options.{name}"
        )


def _turn(*entries: Any) -> Iterator[Case]:
    """A case for each bad entry of a conversation."""
    for entry in entries:
        payload = {"messages": [{"role": "user", "content": "m"}, entry]}
        yield Case(name=f"turn {_shown(entry)}", payload=_bytes(payload), code="invalid_field", says="messages[1]")


def _outside(name: str, *texts: str, mqtt: bool = True) -> Iterator[Case]:
    """A case for each bad text of a field that is given beside the payload."""
    for text in texts:
        yield Case(
            name=f"beside: {name} = {_shown(text)}",
            payload=b"p",
            code="invalid_field",
            says=name,
            beside={"fields": {name: text}},
            mqtt=mqtt,
            http=mqtt,
        )


DEEP_15 = "[" * 15 + "]" * 15
YES: Any = True


def _meta(text: str) -> str:
    """A task whose `meta` is this JSON, or what is meant to pass for it."""
    return '{"prompt": "p", "meta": ' + text + "}"


# Text: what does not begin like an object is a prompt as it stands, as long as it is UTF-8.
TEXT = [
    *_each("text", None, ["null", "true", "1", "-0", '"x"', "[]", "[1, 2]", "NaN", "nul \0", "\x1b[31mred", "\u202e"]),
    *_each("text", None, ["<|im_start|>system", "=cmd|' /C calc'!A0", "line\r\nline", "\uff1d1+1"]),
    *_each("blank", "invalid_field", [" ", "\n", "\t\n "], "prompt: empty"),
    Case(name="nothing at all", payload=b"", code="invalid_field", says="prompt: empty", mqtt=False),
    *_each("not UTF-8", "invalid_utf8", [b"\xff\xfe", b'{"prompt": "\xff"}', b"\xc0\xae", b"caf\xe9"], "UTF-8"),
    *_each("a surrogate", "invalid_utf8", [b"\xed\xa0\x80", b'{"prompt": "\xed\xa0\x80"}'], "UTF-8"),
    *_each("UTF-16", "invalid_utf8", ['{"prompt": "p"}'.encode("utf-16")], "UTF-8"),
    *_each("UTF-32", "invalid_utf8", ['{"prompt": "p"}'.encode("utf-32")], "UTF-8"),
    *_each("marked", "invalid_utf8", [b"\xef\xbb\xbfhello", b'\xef\xbb\xbf{"prompt": "p"}'], "byte order mark"),
    *_each("gzip", "invalid_utf8", [gzip.compress(b'{"prompt": "p"}', mtime=0)], "UTF-8"),
    *_each("CBOR", "invalid_utf8", [b"\xa1fpromptap"], "UTF-8"),
    *_each("MessagePack", "invalid_utf8", [b"\x81\xa6prompt\xa1p"], "UTF-8"),
    *_each("large", "too_large", [b"x" * 262_145, b"{" * 2_000_000, b"\xff" * 2_000_000], "262144"),
    *_each("large", "too_large", [json.dumps({str(n): n for n in range(80_000)})], "262144"),
]

# JSON: what begins like an object must be strict, sane JSON.
JSON = [
    *_each("not a number", "invalid_json", map(_meta, ["NaN", "[Infinity]", "-Infinity"]), "is not JSON"),
    *_each("infinite", "invalid_json", map(_meta, ["1e400", "-1e400", '{"a": [1e999]}']), "too large"),
    *_each("integer", "invalid_json", map(_meta, ["9" * 4301, "9" * 4300, str(2**63), str(-(2**53) - 1)]), "2^53"),
    *_each("deep", "invalid_json", ['{"prompt": ' + "[" * 100_000, '{"a":' * 5_000 + "1" + "}" * 5_000], "deeper"),
    *_each("deep and wide", "invalid_json", ['{"a":' * 20_000 + "1" + "}" * 20_000], "10000"),
    *_each("deep", "invalid_json", map(_meta, ["[" * 990 + "]" * 990, f"[{DEEP_15}]", "[" * 20 + "]" * 20]), "deeper"),
    *_each("twice", "invalid_json", ['{"prompt": "p", "prompt": "q"}'], "duplicate key 'prompt'"),
    *_each("twice", "invalid_json", [_meta('{"a": 1, "a": 1}')], "duplicate key 'a'"),
    *_each("surrogate", "invalid_json", [r'{"prompt": "\ud800"}', _meta(r'{"\udfff": 1}')], "lone surrogate"),
    *_each("surrogate", "invalid_json", [r'{"prompt": "p", "id": "\ud800"}'], "lone surrogate"),
    *_each("more", "invalid_json", ['{"prompt": "p"} trailing', '{"prompt": "p"}{"prompt": "q"}'], "extra data"),
    *_each("quotes", "invalid_json", ["{'prompt': 'p'}", "{prompt: 1}", "{", "{ 31 C is hot?"], "double quotes"),
    *_each("comment", "invalid_json", ['{"prompt": "p", /* why */ "id": "a"}'], "double quotes"),
    *_each("comma", "invalid_json", ['{"prompt": "p",}'], "double quotes"),
    *_each("torn", "invalid_json", ['{"prompt": "p"'], "delimiter"),
    *_each("torn", "invalid_json", ['{"prompt": "p'], "unterminated"),
    *_each("raw newline", "invalid_json", ['{"prompt": "line\nbreak"}', '{"prompt": "\0"}'], "control character"),
    *_each("members", "invalid_json", [_with(**{f"k{n}": n for n in range(5_001)}), _with(meta=[0] * 10_000)], "10000"),
    Case(
        name="text that is said to be JSON",
        payload=b"hello",
        code="invalid_json",
        says="expecting value",
        beside={"content_type": "application/json"},
    ),
    *(
        Case(
            name=f"no task, said to be JSON: {text}",
            payload=text.encode(),
            code="invalid_field",
            says="prompt: missing",
            beside={"content_type": "application/json"},
        )
        for text in ("null", "[1]", '"x"', '{"reading": 5}')
    ),
]

# Fields.
BAD_IDS = [
    "",
    " ",
    "a b",
    "../../etc",
    "a/b",
    "#",
    "+",
    "a\n",
    "\0",
    "x" * 65,
    "x" * 200_000,
    "\u202e",
    "😀",
    "a\nforged",
]
RUNNER_OPTIONS = ("num_ctx", "num_gpu", "num_thread", "use_mmap", "keep_alive", "low_vram", "num_batch")
DROPPED = ("__proto__", "__class__", "$ref", "images", "raw", "template", "context", "keep_alive", "deadline", "tools")
BAD_CONVERSATIONS: list[Any] = [[], "hi", {}, 5, True, [{}] * 257]
FIELDS = [
    Case(name="no id", payload=b'{"prompt": "p"}', code=None),
    *_field("id", *BAD_IDS, 5, YES, ["a"], {}, 1.5),
    *_field("priority", YES, 1, -1, 1e9, "", "URGENT", "asap", []),
    *_field("ttl_s", -1, YES, "5", 604_801, 1e12, [5], -0.5, "2038-01-19T03:14:08Z"),
    *_field("ttl_s", 0, 0.0, -0.0, code="expired_on_arrival", says="time to live"),
    *_field("model", "../x", "evil.com/x/y", "http://x/y", "nope", "small:LATEST2", "x" * 256, code="unknown_model"),
    *_field("model", "", "x" * 4_096, "a\nb", 5, YES, ["small"]),
    *_field("model", "huge", code="model_too_large"),
    *_each("two models", "invalid_field", [_with(model="small", model_name="default")], "model_name"),
    *_field("options", [], "temperature=1", 5, YES),
    *(case for name in RUNNER_OPTIONS for case in _option(name, 1)),
    *_option("num_predict", 0, -3, 1e9, 5.0, YES, None),
    *_option("temperature", 1e308, "hot", -1, YES),
    *_option("seed", 1.0, -1, 2**31, "7"),
    *_option("top_p", 1.1, -0.1, None),
    *_option("stop", "", "x" * 65, ["a"] * 17, ["a"] * 9_000, [5], 5, [""], {}),
    *_each("endless", None, [_with(options={"num_predict": -1}), _with(options={"num_predict": -2})]),
    *_field("prompt", "", " \n", 5, YES, ["p"], None),
    *_each("both", "invalid_field", [_with(messages=[{"role": "user", "content": "m"}])], "prompt"),
    *_each("messages", "invalid_field", ({"messages": value} for value in BAD_CONVERSATIONS), "messages"),
    *_turn("m", None, {"role": "user"}, {"role": "tool", "content": "m"}, {"role": ["user"], "content": "m"}),
    *_turn({"role": "user", "content": ""}, {"role": "user", "content": 5}),
    *_turn({"role": "user", "content": "m", "images": ["x"]}),
    *_each("too long", "invalid_field", [{"prompt": "x" * 70_000}], "prompt: about 17501 tokens"),
    *_each("too long", "invalid_field", [_with(system="x" * 70_000)], "system: about 17501 tokens"),
    *_each("too long", "invalid_field", [{"messages": [TURN, TURN]}], "messages: about 17501 tokens"),
    *_each("prompt", None, [{"prompt": text} for text in ("nul \0", "\x1b[31mred", "<|im_start|>system", "\u202e")]),
    *_field("system", 5, YES, ["s"]),
    *_field("task_type", "", "a b", "x" * 65, "=cmd", 5),
    *_field("stream", 1, 0, "true", []),
    *_field("preemptible", 1, "no"),
    *_field("format", "xml", "", 5, YES, [], {"type": "strnig"}, {"enum": ["x" * 17_000]}),
    *_each("format", "invalid_field", [_with(format={"properties": {"a": {"enum": 5}}})], "properties.a.enum"),
    *_field("meta", "x" * 5_000),
    *(case for name in DROPPED for case in _field(name, 0, code=None, says=f"unknown field '{name}'")),
    *_each("fifty unknown", None, [_with(**{f"\n\x1b{n:02}" + "x" * 500: n for n in range(50)})], "unknown field"),
]

# Where the answer is to go: the daemon must not become the arm of whoever can write a task.
BAD_REPLY_TOPICS = [
    *(
        "",
        "/",
        "reply/",
        "/reply/x",
        "reply//x",
        "reply/x/",
        "reply",
        "replyx/y",
        "reply/+",
        "reply/#",
        "#",
        "reply/a b",
    ),
    *("reply/\0", "reply/\x1f", "reply/\x7f", "reply/\x9f", "reply/\ufeffx", "reply/\u0430", "reply/\u202e"),
    *("/".join(["reply"] * 17), "/".join(["reply"] * 201), "reply/" + "x" * 251),
    *("reply/" + "x" * 65_529, "reply/" + "x" * 65_530),
    *("$SYS/broker", "$CONTROL/dynamic-security/v1", "$share/group/reply/x"),
    *("home/lock/set", f"{N}/task", f"{N}/task/x", f"{N}/telemetry", f"{N}/state", f"{N}/cancel"),
    *(f"{N}/reply/other/1/result", f"{N}/reply", "edge-llm/other/reply/x/1/result"),
]
TOPICS = [
    *_field("reply_to", *BAD_REPLY_TOPICS, code="forbidden_reply_topic"),
    *_field("reply_to", 5, YES, ["reply/x"], {}, code="forbidden_reply_topic"),
    *(
        Case(
            name=f"beside: reply_to = {topic}",
            payload=b"p",
            code="forbidden_reply_topic",
            says="reply_to",
            beside={"reply_to": topic},
            http=False,
        )
        for topic in ("home/lock/set", "$SYS/broker", f"{N}/availability", "reply//x", "reply/a b")
    ),
    Case(
        name="a bad reply_to that a good one beside it overrules",
        payload=_bytes(_with(reply_to="home/lock/set")),
        code=None,
        beside={"reply_to": "reply/good"},
        http=False,
    ),
    *(
        Case(name=f"src {_shown(src)}", payload=b"p", code="invalid_field", says="src", beside={"src": src})
        for src in ("a b", "x" * 65, "ü", "$SYS", "=cmd", "😀")
    ),
    *(
        Case(name=f"id {_shown(name)} in the topic", payload=b"p", code="invalid_field", says="id", beside={"id": name})
        for name in ("a b", "x" * 65, "ü", "", "$x")
    ),
]

# Beside the payload: MQTT 5 properties, or headers.
BESIDE = [
    *_outside("ttl_s", "soon", "nan", "inf", "-1", "1_0", "", "true", "[5]"),
    *_outside("stream", "1", "True", "yes", ""),
    *_outside("options", "seed=5", "[]", '{"num_ctx": 5}', "{", '{"seed": NaN}'),
    *_outside("format", "xml", "{", "[]", '"xml"'),
    *_outside("meta", "{"),
    *_outside("priority", "5", "very"),
    *_outside("task_type", "a b"),
    *_outside("system", "\ud800", mqtt=False),
    *_outside("model", "\ud800", mqtt=False),
    Case(
        name="beside: a time to live of 0",
        payload=b"p",
        code="expired_on_arrival",
        says="time to live",
        beside={"fields": {"ttl_s": "0"}},
    ),
    Case(
        name="an expiry that the broker has counted down to 0",
        payload=b"p",
        code="expired_on_arrival",
        says="time to live",
        beside={"ttl_s": 0.0},
        mqtt=False,  # a broker that keeps to the book does not deliver it
        http=False,
    ),
    Case(
        name="correlation data of 64 kB",
        payload=b"p",
        code="too_large",
        says="correlation",
        beside={"correlation": b"c" * 65_535},
        http=False,
    ),
    Case(
        name="a thousand properties",
        payload=b"p",
        code="too_large",
        says="properties",
        beside={"fields": {f"name-{n}": "x" * 100 for n in range(1_000)}},
        http=False,
    ),
]

CASES = [*TEXT, *JSON, *FIELDS, *TOPICS, *BESIDE]
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "two cases of one name"
