"""The configuration: the shipped file is the reference, and every mistake is one line that names its key."""

import dataclasses
import logging
import re
import socket
import tracemalloc
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_daemon import config as config_module
from edge_daemon.config import (
    Config,
    Http,
    ModelSettings,
    Mqtt,
    Queue,
    TaskType,
    Within,
    http_tokens,
    load,
    mqtt_password,
    parse,
)
from edge_daemon.errors import ConfigError

SHIPPED = Path(__file__).parent.parent / "config.yaml"


def complaint(text: str) -> str:
    """What the error about a file says."""
    with pytest.raises(ConfigError) as error:
        parse(text)
    return str(error.value)


# -- the shipped file


def fields(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each dotted key of a record, with its annotation; sections and their keys."""
    for name, hint in typing.get_type_hints(record, include_extras=True).items():
        yield prefix + name, hint
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{prefix}{name}.")


def keys_of(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Each dotted key of parsed YAML."""
    for name, value in data.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{name}.")


def comments(text: str) -> dict[str, str]:
    """The comment directly above, or behind, each key of a file in block style."""
    found: dict[str, str] = {}
    above: list[str] = []
    parents: list[str] = []
    for line in text.splitlines():
        if key := re.match(r"( *)(\w+):[^#]*(#.*)?$", line):
            parents[len(key[1]) // 2 :] = [key[2]]
            found[".".join(parents)] = " ".join([*above, key[3] or ""]).strip()
        above = [*above, line.strip(" #")] if line.lstrip().startswith("#") else []
    return found


def limits(hint: Any) -> Iterator[str]:
    """The limits in an annotation, as messages and comments write them."""
    for one in typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,):
        for rule in getattr(one, "__metadata__", ()):
            if isinstance(rule, Within):
                yield f"{rule.low} to {rule.high}"


def test_shipped_file_is_the_defaults() -> None:
    """The shipped file, an empty one and none at all give the same configuration."""
    assert load(SHIPPED) == parse("") == load(None) == Config()


def test_shipped_file_has_every_key_and_no_other() -> None:
    """Each field of the code is a key in the file, and the other way round."""
    data = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    data["task_types"] = None  # its keys are names of types, see below
    assert set(keys_of(data)) == {key for key, _ in fields(Config)}


@pytest.mark.parametrize(("key", "hint"), list(fields(TaskType)))
def test_shipped_file_explains_every_key_of_a_type(key: str, hint: Any) -> None:
    """The keys of a task type stand in the comment above the types, each with its limits."""
    comment = SHIPPED.read_text(encoding="utf-8").partition("\ntask_types:")[0]
    entry = re.search(rf"\n#   {key}  +(.*(?:\n#    .*)*)", comment)
    assert entry is not None
    assert [limit for limit in limits(hint) if limit not in entry[1]] == []


def test_shipped_types_are_data() -> None:
    """The types of the shipped file are those of the code: a template, and a schema where an answer is to act upon."""
    types = load(SHIPPED).task_types
    assert [name for name, kind in types.items() if kind.template] == ["arithmetic", "classify", "summarize", "extract"]
    assert [name for name, kind in types.items() if kind.format] == ["classify", "extract"]


def test_shipped_example_is_valid() -> None:
    """The example of models.settings that stands in the comments can be taken as it is."""
    lines = SHIPPED.read_text(encoding="utf-8").split("For example:\n")[1].split("  settings: {}")[0]
    models = parse("models:\n" + lines.replace("#", " ")).models
    assert models.for_model("qwen2.5:0.5b-instruct").pinned
    assert models.for_model("llama3.2:1b").fallback == ("qwen2.5:0.5b-instruct",)


# -- what is read


def test_values_take_the_type_of_their_field() -> None:
    """A whole number becomes a float, a list a tuple, a text a path."""
    text = "data_dir: ~/edge\npool: {model_timeout_s: 60}\nmqtt: {reply_prefixes: [a/, b/c/], keepalive_s: 1_000}"
    config = parse(text)
    assert config.data_dir == Path.home() / "edge"
    assert isinstance(config.pool.model_timeout_s, float)
    assert config.mqtt.reply_prefixes == ("a/", "b/c/")
    assert config.mqtt.keepalive_s == 1000


@pytest.mark.parametrize(
    ("word", "value"), [("yes", True), ("on", True), ("True", True), ("no", False), ("OFF", False), ("false", False)]
)
def test_words_for_true_and_false(word: str, value: object) -> None:
    """All of YAML's words for true and false are understood where one of them is wanted."""
    assert parse(f"log: {{prompts: {word}}}").log.prompts is value


@pytest.mark.parametrize("section", ["mqtt:", "mqtt:\n  # host: 10.0.0.1", "mqtt: {}", "mqtt: ~", "\ufeff# nothing"])
def test_an_empty_section_is_the_default(tmp_path: Path, section: str) -> None:
    """A section with all of its keys commented out changes nothing."""
    file = tmp_path / "config.yaml"
    file.write_text(section, encoding="utf-8")
    assert load(file) == Config()


@pytest.mark.parametrize(
    "url", ["http://localhost:11434/", "https://[::1]:8443", "http://10.1.2.3", "http://pi.local:1"]
)
def test_ollama_url_loses_its_slash(url: str) -> None:
    """A host by name or address is taken, and a slash at the end goes, so that paths can be put behind it."""
    text = f"{{ollama: {{url: '{url}'}}, pool: {{memory_budget_bytes: 8000000000}}}}"
    assert parse(text).ollama.url == url.rstrip("/")


@pytest.mark.parametrize(
    ("host", "is_here"),
    [
        *((host, True) for host in ("localhost", "127.1.2.3", "[::1]", "Pi1", "pi1.local")),
        *((host, False) for host in ("pi2", "10.1.2.3", "pi1.lan")),
    ],
)
def test_the_memory_of_another_machine_must_be_told(host: str, is_here: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """Without a budget an Ollama elsewhere is refused by the key that is missing; this machine's memory is known."""
    monkeypatch.setattr(socket, "gethostname", lambda: "pi1")
    text = f"ollama: {{url: 'http://{host}:11434'}}"
    if is_here:
        assert parse(text).ollama_is_here
    else:
        with pytest.raises(ConfigError, match=r"pool\.memory_budget_bytes: must be set"):
            parse(text)


@pytest.mark.parametrize(
    ("path", "expected"), [("log.csv", "/d/log.csv"), ("logs/log.csv", "/d/logs/log.csv"), ("/x/log.csv", "/x/log.csv")]
)
def test_csv_path(path: str, expected: str) -> None:
    """A relative CSV path lies in the data directory, an absolute one where it says."""
    assert parse(f"data_dir: /d\ncsv: {{path: {path}}}").csv_path == Path(expected)


@pytest.mark.parametrize(
    ("host", "node"), [("pi1", "pi1"), ("küche/4+#$", "k-che-4---"), ("x" * 90, "x" * 64), ("", "node")]
)
def test_node_is_the_host_name_made_fit(monkeypatch: pytest.MonkeyPatch, host: str, node: str) -> None:
    """Without a node, the host's name is used, with what a topic level cannot have replaced."""
    monkeypatch.setattr("socket.gethostname", lambda: host)
    config_module._hostname.cache_clear()
    config = Config(base_topic="home/llm")
    assert (config.node_name, config.topic_root) == (node, f"home/llm/{node}")
    config_module._hostname.cache_clear()


def test_topic_root_of_a_named_node() -> None:
    """A node that is set wins over the host's name."""
    assert parse("node: pi-7").topic_root == "edge-llm/pi-7"


SETTINGS = """
models:
  settings:
    small: {pinned: true}
    large: {num_ctx: 8192, fallback: [small]}
    plain:
  defaults: {num_ctx: 4096, preload: true}
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("small", ModelSettings(num_ctx=4096, preload=True, pinned=True)),
        ("large", ModelSettings(num_ctx=8192, preload=True, fallback=("small",))),
        ("plain", ModelSettings(num_ctx=4096, preload=True)),
        ("unlisted", ModelSettings(num_ctx=4096, preload=True)),
    ],
)
def test_settings_lie_over_the_defaults(name: str, expected: ModelSettings) -> None:
    """A model has what its entry says, and for the rest the defaults of the same file, wherever they stand in it."""
    assert parse(SETTINGS).models.for_model(name) == expected


def test_only_listed_models_are_allowed() -> None:
    """With only_listed a task may ask for the models under settings, without it for any."""
    listed = parse("models: {only_listed: true, default: a, settings: {a: {}}}").models
    assert [listed.allows("a"), listed.allows("b")] == [True, False]
    assert parse("").models.allows("b")


# -- what is refused

WRONG_VALUES = [
    ("mqtt.port", '"1883"', 'a whole number, not the text "1883"'),
    ("mqtt.port", "true", "a whole number, not true"),
    ("mqtt.port", "1883.0", "a whole number, not 1883.0"),
    ("mqtt.port", "null", "a whole number, not null"),
    ("mqtt.port", "[1883]", "a whole number, not a list of 1"),
    ("mqtt.port", "{a: 1}", "a whole number, not a section of 1"),
    ("mqtt.port", "0", "1 to 65535, not 0"),
    ("mqtt.port", "65536", "1 to 65535, not 65536"),
    ("mqtt.port", "-1", "1 to 65535, not -1"),
    ("mqtt.port", "0123", 'a whole number, not the text "0123"'),
    ("mqtt.port", "0x75b", "a whole number"),
    ("mqtt.port", "31:23", "a whole number"),
    ("mqtt.port", "9" * 5000, "a whole number"),
    ("mqtt.host", "5", "text in quotes, not 5"),
    ("mqtt.host", "on", "text in quotes, not true"),
    ("mqtt.host", '""', "1 to 1024 characters"),
    ("mqtt.host", '"a b"', "a host name"),
    ("mqtt.host", "mqtt://broker", "a host name"),
    ("mqtt.username", '"a\\nb"', "without control characters"),
    ("mqtt.username", '"\\ud800"', "without control characters"),
    ("mqtt.username", "u" * 257, "1 to 256 characters"),
    ("mqtt.protocol", "5", 'one of "auto", "5", "3.1.1", not 5'),
    ("mqtt.client_id", "a/b", "letters, digits"),
    ("mqtt.password_file", "secret", "absolute"),
    ("mqtt.tls.enabled", "1", "true or false, not 1"),
    ("mqtt.tls.enabled", '"yes"', 'true or false, not the text "yes"'),
    ("mqtt.tls.ca_file", "~nobody-has-this-name/ca.crt", "absolute"),
    ("mqtt.reply_prefixes", "reply/", "a list, not the text"),
    ("mqtt.reply_prefixes", "[reply]", '/ behind it, not the text "reply"'),
    ("mqtt.reply_prefixes", "['#/']", "levels of"),
    ("mqtt.reply_prefixes", "[a/+/]", "levels of"),
    ("mqtt.reply_prefixes", "[$SYS/]", "levels of"),
    ("mqtt.reply_prefixes", "[/]", "2 to 64"),
    ("mqtt.reply_prefixes", "[/a/]", "levels of"),
    ("mqtt.reply_prefixes", "[<src>/]", "not the first, <src>"),
    ("mqtt.reply_prefixes", "[reply/x<src>/]", "levels of"),
    ("mqtt.reply_prefixes", "[reply/<src>]", "levels of"),
    ("mqtt.reply_prefixes", "[[a/]]", "text in quotes, not a list"),
    ("mqtt.reply_prefixes", str([f"p{n}/" for n in range(17)]), "0 to 16 entries"),
    ("mqtt.reply_prefixes", "[edge-llm/other/reply/]", "outside edge-llm/"),
    ("mqtt.reply_prefixes", "[edge-llm/]", "outside edge-llm/"),
    ("base_topic", "a/+/b", "levels of"),
    ("base_topic", "'#'", "levels of"),
    ("base_topic", "$SYS", "levels of"),
    ("base_topic", "a//b", "levels of"),
    ("base_topic", "a/", "levels of"),
    ("base_topic", '"a\\0"', "without control characters"),
    ("base_topic", "a" * 65, "1 to 64"),
    ("node", "a/b", "letters, digits"),
    ("node", "2026", "text in quotes, not 2026"),
    ("node", "2026.5", "text in quotes, not 2026.5"),
    ("data_dir", "here", "absolute"),
    ("data_dir", "../../etc", "absolute"),
    ("csv.path", "../../etc/passwd", 'without ".."'),
    ("csv.path", "/var/../etc/passwd", 'without ".."'),
    ("csv.text", "some", '"full", "cut", "off"'),
    ("csv.keep", "0", "1 to 1000"),
    ("ollama.url", "file:///etc/passwd", "http://HOST:PORT"),
    ("ollama.url", "ftp://127.0.0.1", "http://HOST:PORT"),
    ("ollama.url", "127.0.0.1:11434", "http://HOST:PORT"),
    ("ollama.url", "http://user:pw@host", "without user"),
    ("ollama.url", "http://localhost@evil.example", "without user"),
    ("ollama.url", "http://localhost/v1", "or path"),
    ("ollama.url", "http://localhost?x", "or path"),
    ("ollama.url", "http://localhost\\@evil.example", "http://HOST:PORT"),
    ("ollama.url", "http://", "http://HOST:PORT"),
    ("ollama.url", "http://:80", "http://HOST:PORT"),
    ("ollama.url", "http://a:0", "http://HOST:PORT"),
    ("ollama.url", "http://a:65536", "http://HOST:PORT"),
    ("ollama.url", "http://169.254.169.254/", "of one machine"),
    ("ollama.url", "http://0.0.0.0:11434", "of one machine"),
    ("ollama.url", "'http://[::]:11434'", "of one machine"),
    ("ollama.url", "'http://[fe80::1%eth0]:11434'", "http://HOST:PORT"),
    ("ollama.url", "'http://[::::1]:11434'", "of one machine"),
    ("ollama.connect_timeout_s", ".inf", "a number"),
    ("ollama.connect_timeout_s", ".nan", "a number"),
    ("ollama.connect_timeout_s", "60.1", "0.1 to 60, not 60.1"),
    ("ollama.load_timeout_s", "true", "a number, not true"),
    ("pool.memory_budget_bytes", "4 GB", 'a whole number, not the text "4 GB"'),
    ("models.default", "'bad name'", "the name of a model"),
    ("models.defaults.fallback", "[a, 5]", "text in quotes, not 5"),
    ("models.settings", "[a]", "a section of keys, not a list"),
    ("models.settings", str({f"m{n}": {} for n in range(65)}), "0 to 64 entries"),
    ("models.settings", "{'b b': {}}", "the name of a model"),
    ("models.settings.a", "5", "a section of keys, not 5"),
    ("models.settings.a.num_ctx", "64", "128 to 1048576, not 64"),
    ("task_types", str({f"t{n}": {} for n in range(65)}), "0 to 64 entries"),
    ("task_types.a.template", "'31 $ C'", 'a name behind every "$"'),
    ("task_types.a.template", "5", "text in quotes of 1 to 8192 characters, not 5"),
    ("task_types.a.template", f"'{'x' * 8193}'", "of 1 to 8192 characters"),
    ("task_types.a.system", "''", "of 1 to 8192 characters"),
    ("task_types.a.options", "{num_ctx: 5}", "options.num_ctx: not a sampling option"),
    ("task_types.a.options", "{temperature: hot}", "is not a number from 0 to 5"),
    ("task_types.a.options", "5", "a section of keys, not 5"),
    ("task_types.a.format", "yaml", "a section of keys"),
    ("task_types.a.format", "{type: 5}", "a JSON schema (schema.type"),
    ("task_types.a.max_tokens", "0", "1 to 1048576, not 0"),
    ("task_types.a.priority", "asap", '"urgent"'),
    ("task_types.a.locked", "[prompt]", '"template"'),
    ("task_types.a.topic_source", "a/b", "the name of a device"),
    ("queue.per_source_rate", "0", "0.01 to 100000, not 0"),
    ("scheduler.soft_wait_s", "60", "a section of keys, not 60"),
    ("scheduler.urgent_swap_share", "1.5", "0 to 1, not 1.5"),
    ("telemetry.interval_s", "0", "1 to 86400, not 0"),
    ("log.level", "INFO", '"info"'),
]


@pytest.mark.parametrize(("key", "value", "problem"), WRONG_VALUES)
def test_a_wrong_value_is_named_with_its_line(key: str, value: str, problem: str) -> None:
    """A value of the wrong type or outside its limits is one line: where, which key, what is allowed, what is there."""
    *sections, name = key.split(".")
    opening = "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections))
    text = f"# a comment\n{opening}{'  ' * len(sections)}{name}: {value}\n"
    said = complaint(text)
    assert said.startswith(f"line {2 + len(sections)}: {key}: must ")
    assert problem in said
    assert said.isprintable()
    assert len(said) < 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mqtt: {hots: x}", 'line 1: mqtt.hots: unknown key, did you mean "host"?'),
        ("\nmqqt: {host: x}", 'line 2: mqqt: unknown key, did you mean "mqtt"?'),
        ("port: 1883", 'line 1: port: unknown key, did you mean "mqtt.port"?'),
        ("models: {settings: {a: {ctx: 1}}}", 'line 1: models.settings.a.ctx: unknown key, did you mean "num_ctx"?'),
        ("log:\n  xyzzy: 1", "line 2: log.xyzzy: unknown key, known here are level, prompts"),
        ("on: yes", "line 1: on: unknown key, known here are node, "),
        ("1: 2", "line 1: 1: unknown key, known"),
        ("__class__: 2", "line 1: __class__: unknown key, known"),
        ("<<: {node: a}", "line 1: <<: unknown key"),
        ('"a\\nb": 2', r"line 1: 'a\nb': unknown key"),
        (f"? {'k' * 100_000}\n: 1", f"line 1: {'k' * 120}: unknown key"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(text: str, said: str) -> None:
    """A key that does not exist is an error that says which one was probably meant."""
    assert complaint(text).startswith(said)
    assert len(complaint(text)) < 300


BILLION_LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node: !!python/object/apply:os.system [id]", "line 1, column 7: tags"),
        ("node: !!str 5", "line 1, column 7: tags"),
        ("!!map {node: a}", "line 1, column 1: tags"),
        (BILLION_LAUGHS, "line 2, column 8: aliases"),
        ("a: &a {a: *a}", "line 1, column 11: aliases"),
        ("\tnode: a", r"line 1, column 1: found character '\t'"),
        ("mqtt:\n\tport: 1", r"line 2, column 1: found character '\t'"),
        ("mqtt:\n  port: 1\n  port: 2", "line 3: mqtt.port: stands here for the second time"),
        ("node: a\n'node': b", "line 2: node: stands here for the second time"),
        ("node: [", "line 1, column 8: "),
        ("node: 'a", "line 1, column 9: "),
        ("a: b: c", "line 1, column 5: mapping values"),
        ("node: a\n---\nnode: b", "line 2, column 1: but found another document"),
        ("x\n\0", "line 2: contains a character"),
        ("# \ud800", "line 1: contains a character"),
        ('node: "\\U00110000"', "config: a number in it is out of range"),
        (f"%YAML 1.{'9' * 5000}\n--- {{}}", "config: a number in it is out of range"),
        ("? [a]\n: b", "line 1: a key must be text"),
        ("[a]: b", "line 1: a key must be text"),
        ("- a", "config: must be a section of keys, not a list"),
        ("text", 'config: must be a section of keys, not the text "text"'),
        ("5", "config: must be a section of keys, not 5"),
        ("[" * 1_000_000, "line 1, column 17: nested deeper than 16 levels"),
        ("- " * 500_000, "line 1, column 33: nested deeper than 16 levels"),
    ],
)
def test_what_is_not_plain_yaml_is_refused(text: str, said: str) -> None:
    """Tags, aliases, tabs, repeated keys, depth and broken syntax are one line with the position."""
    assert complaint(text).startswith(said)
    assert complaint(text).isprintable()


def test_a_file_of_many_values_costs_little_memory() -> None:
    """A megabyte of values is given up on long before it is all in memory."""
    text = "a: [" + "1," * 500_000 + "]"
    tracemalloc.start()
    try:
        said = complaint(text)
        assert tracemalloc.get_traced_memory()[1] < 32 * len(text)
    finally:
        tracemalloc.stop()
    assert said.endswith("more than 10000 keys and values")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mqtt: {tls: {enabled: true, key_file: /k}}", "mqtt.tls.key_file: needs cert_file too"),
        ("mqtt: {tls: {ca_file: /c}}", "mqtt.tls.enabled: is false, but a file for it is set"),
        ("mqtt: {tls: {enabled: false, cert_file: /c}}", "mqtt.tls.enabled: is false, but a file for it is set"),
        ("mqtt: {password_file: /p}", "mqtt.password_file: needs mqtt.username too"),
        ("base_topic: reply", "mqtt.reply_prefixes: must lie outside reply/"),
        ("base_topic: reply/llm", "mqtt.reply_prefixes: must lie outside reply/llm/"),
        ("base_topic: a/b\nmqtt: {reply_prefixes: [a/<src>/]}", "mqtt.reply_prefixes: must lie outside a/b/"),
        (
            "pool: {max_resident: 1}\nmodels: {settings: {a: {pinned: true}, b: {pinned: true}}}",
            "pool.max_resident: must be at least 2",
        ),
        ("models: {only_listed: true}", "models.default: must be in models.settings"),
        ("queue: {max_tasks: 100}", "queue.urgent_reserve: must be less than max_tasks"),
        (
            "queue: {max_bytes: 1048576, max_payload_bytes: 1048577}",
            "queue.max_payload_bytes: must not exceed max_bytes",
        ),
        ("mqtt: {max_packet_bytes: 4096}", "queue.max_result_bytes: must not exceed mqtt.max_packet_bytes"),
        ("models: {settings: {a: {fallback: [a]}}}", "models.settings: a fallback must not lead back"),
        (
            "models: {settings: {a: {fallback: [b]}, b: {fallback: [c]}, c: {fallback: [a]}}}",
            "models.settings: a fallback must not lead back to its model: a -> b -> c -> a",
        ),
        (
            "models: {defaults: {fallback: [a]}, settings: {a: {fallback: [b]}}}",
            "models.settings: a fallback must not lead back to its model: a -> b -> a",
        ),
        ("models: {defaults: {fallback: [a]}}", "models.settings: a fallback must not lead back to its model: a -> a"),
        (
            "models: {only_listed: true, default: a, settings: {a: {}}}\ntask_types: {t: {model: b}}",
            "task_types.t.model: b must be in models.settings, because of only_listed",
        ),
        (
            "models: {only_listed: true, default: a, settings: {a: {}}}\ntask_types: {t: {fallback: [a, b]}}",
            "task_types.t.fallback: b must be in models.settings",
        ),
        (
            "task_types: {t: {topic_source: [a, b]}, u: {topic_source: b}}",
            "task_types.u.topic_source: b belongs to task_types.t",
        ),
        ("task_types: {t: {locked: [template]}}", "task_types.t.locked: template must be set"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(text: str, said: str) -> None:
    """What must hold between keys is checked, also when one of them is a default."""
    assert said in complaint(text)


@pytest.mark.parametrize(
    "text",
    [
        "mqtt: {tls: {enabled: true, cert_file: /c, key_file: /k}}",
        "mqtt: {tls: {enabled: true}}",
        "mqtt: {reply_prefixes: [reply/<src>/, a/<src>/b/]}",
        "models: {defaults: {fallback: [a]}, settings: {a: {fallback: []}}}",
        "models: {settings: {a: {fallback: [c, b]}, b: {fallback: [c]}}}",
        "pool: {max_resident: 1}\nmodels: {settings: {a: {pinned: true}}}",
        "base_topic: replying",
        "queue: {urgent_reserve: 0, max_tasks: 1}",
    ],
)
def test_keys_that_agree_are_taken(text: str) -> None:
    """What only comes near a contradiction is none."""
    assert isinstance(parse(text), Config)


# -- from a file and from the command line


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    """Values of the command line replace those of the file, and leave their neighbours alone."""
    file = tmp_path / "config.yaml"
    file.write_text("node: a\nmqtt: {port: 1, host: broker}", encoding="utf-8")
    config = load(file, {"mqtt.port": 1884, "node": "x", "data_dir": Path("/d"), "mqtt.tls.enabled": True})
    assert (config.mqtt.host, config.mqtt.port, config.mqtt.tls.enabled) == ("broker", 1884, True)
    assert (config.node, config.data_dir) == ("x", Path("/d"))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("mqtt.port", 99_999, "mqtt.port: must be 1 to 65535, not 99999"),
        ("mqtt.port", "1884", 'mqtt.port: must be a whole number, not the text "1884"'),
        ("mqtt.port", None, "mqtt.port: must be a whole number, not null"),
        ("mqtt.hots", "x", 'mqtt.hots: unknown key, did you mean "host"?'),
        ("node", "a/b", "node: must be letters, digits"),
        ("data_dir", Path("here"), "data_dir: must be an absolute path"),
        ("mqtt", 5, "mqtt: must be a section of keys, not 5"),
        ("models.settings", {5: {}}, "models.settings: must be text in quotes, not 5"),
        ("mqtt.max_packet_bytes", 4096, "queue.max_result_bytes: must not exceed"),
        ("ollama.load_timeout_s", float("nan"), "ollama.load_timeout_s: must be 0.1 to 604800, not NaN"),
        ("ollama.load_timeout_s", 10**400, "ollama.load_timeout_s: int too large"),
        ("", 1, "unknown key"),
    ],
)
def test_a_wrong_override_is_no_fault_of_the_file(tmp_path: Path, key: str, value: object, said: str) -> None:
    """An override is checked as strictly as the file, and no line of the file is blamed for it."""
    file = tmp_path / "config.yaml"
    file.write_text("node: a\nmqtt: {port: 1}\ndata_dir: /d", encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        load(file, {key: value})
    assert "line" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"#" * (1 << 20) + b"#", "must be at most 1048576 bytes"),
        (b"node: a\n# \xff", "line 2: must be UTF-8"),
        ("node: k\xfcche".encode("utf-16"), "line 1: must be UTF-8"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    """A file that is too large or not UTF-8 is a configuration error, not a crash."""
    file = tmp_path / "config.yaml"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=said):
        load(file)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\nmqtt: {prot: 1}", "line 2: mqtt.prot: unknown key"),
        (b"mqtt: {port: 0}", "line 1: mqtt.port: must be"),
        (b"mqtt:\n\tport: 1", "line 2, column 1: found"),
        (b"- a", "config: must be a section"),
        (b"\xff", "line 1: must be UTF-8"),
    ],
)
def test_a_complaint_begins_with_the_file(tmp_path: Path, data: bytes, said: str) -> None:
    """Whatever is wrong in the file, the line names the file before the place in it."""
    file = tmp_path / "config.yaml"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{file}: {said}')}"):
        load(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file and a folder in its place are configuration errors that name the path."""
    with pytest.raises(ConfigError, match=r"missing\.yaml: No such file"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=f"{tmp_path}: Is a directory"):
        load(tmp_path)


def test_a_file_of_others_comes_with_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The configuration of the service is not for everybody to read."""

    def denied(*_args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root is never denied anything
    with pytest.raises(ConfigError, match="Permission denied; try sudo, or another file with --config"):
        load(tmp_path / "config.yaml")


def test_an_endless_file_is_given_up_on() -> None:
    """A device in place of the file is read no further than the limit."""
    with pytest.raises(ConfigError, match="must be at most"):
        load(Path("/dev/zero"))


def test_a_file_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    """Who can write the configuration commands the daemon, so it must not be everybody."""
    file = tmp_path / "config.yaml"
    file.write_text("node: a", encoding="utf-8")
    file.chmod(0o666)
    with pytest.raises(ConfigError, match="chmod o-w"):
        load(file)
    file.chmod(0o664)
    assert load(file).node == "a"


# -- the password


@pytest.fixture(autouse=True)
def no_password_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment that the tests run in reaches them."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.delenv("EDGE_LLM_MQTT_PASSWORD", raising=False)


def with_user(password_file: Path | None = None) -> Config:
    """A configuration with a user name."""
    return Config(mqtt=Mqtt(username="pi", password_file=password_file))


def secret_file(path: Path, data: bytes, mode: int = 0o600) -> Path:
    """A file with a secret in it."""
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_no_password(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without any source there is no password, with a user name or not; a file that lies about is no source."""
    secret_file(tmp_path / "mqtt_password", b"s3cret")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "")
    assert mqtt_password(with_user()) is None
    assert mqtt_password(Config()) is None


def test_password_sources_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The systemd credential goes before the file, and the file before the environment."""
    file = secret_file(tmp_path / "password", b"from file\n")
    monkeypatch.setenv("EDGE_LLM_MQTT_PASSWORD", "from environment")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert mqtt_password(with_user()) == "from environment"
    assert mqtt_password(with_user(file)) == "from file"
    secret_file(tmp_path / "mqtt_password", b"from credential\n")
    assert mqtt_password(with_user(file)) == "from credential"


@pytest.mark.parametrize(
    ("data", "password"),
    [(b"s3", "s3"), (b"s3\n", "s3"), (b"s3\r\n", "s3"), (b"s3\n\n", "s3\n"), (b" s 3 ", " s 3 "), (b"\xc3\xbc", "ü")],
)
def test_one_newline_at_the_end_is_ignored(tmp_path: Path, data: bytes, password: str) -> None:
    """What an editor puts at the end of a file is not part of the password; all else is."""
    assert mqtt_password(with_user(secret_file(tmp_path / "password", data))) == password


@pytest.mark.parametrize(("data", "said"), [(b"", "empty"), (b"\n", "empty"), (b"\xff\xfe", "not UTF-8")])
def test_an_unusable_password_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: bytes, said: str
) -> None:
    """An empty password, or one that is not UTF-8, is named by its source, whichever that is."""
    file = secret_file(tmp_path / "mqtt_password", data)
    with pytest.raises(ConfigError, match=f"^mqtt.password_file: the password is {said}"):
        mqtt_password(with_user(file))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    with pytest.raises(ConfigError, match=f"^credential mqtt_password: the password is {said}"):
        mqtt_password(with_user())


def test_an_empty_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is set to nothing is a mistake, not the wish for no password."""
    monkeypatch.setenv("EDGE_LLM_MQTT_PASSWORD", "")
    with pytest.raises(ConfigError, match=r"^EDGE_LLM_MQTT_PASSWORD: the password is empty"):
        mqtt_password(with_user())


def test_a_password_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A password file that is missing is an error, not the lack of a password."""
    with pytest.raises(ConfigError, match=r"^mqtt.password_file: .*No such file"):
        mqtt_password(with_user(tmp_path / "missing"))


def test_a_password_needs_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """A password without a user name is refused here, since MQTT 3.1.1 cannot carry it."""
    monkeypatch.setenv("EDGE_LLM_MQTT_PASSWORD", "s3cret")
    with pytest.raises(ConfigError, match=r"^mqtt.username: must be set") as error:
        mqtt_password(Config())
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(("mode", "warnings"), [(0o600, 0), (0o640, 0), (0o604, 1), (0o644, 1)])
def test_a_password_that_everybody_can_read_is_warned_of(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, mode: int, warnings: int
) -> None:
    """A world-readable password file is used, with a warning that does not contain it."""
    config = with_user(secret_file(tmp_path / "password", b"s3cret", mode))
    with caplog.at_level(logging.DEBUG):
        assert mqtt_password(config) == "s3cret"
    assert len(caplog.records) == warnings
    assert "s3cret" not in caplog.text + repr(config)


# -- the tokens of the gateway

TOKEN = b"0123456789abcdef"


def with_http(tokens_file: Path | None = None, host: str = "127.0.0.1") -> Config:
    """A configuration with the gateway on."""
    return Config(http=Http(enabled=True, host=host, tokens_file=tokens_file))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_a_loopback_address_needs_no_tokens(host: str) -> None:
    """On an address of this machine alone anybody may come in."""
    assert http_tokens(with_http(host=host)) == {}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "pi1", "localhost.example"])  # noqa: S104
def test_any_other_address_needs_tokens(host: str, tmp_path: Path) -> None:
    """An address that others may reach is an error without tokens, and none with them."""
    with pytest.raises(ConfigError, match=rf"^http.tokens_file: must be set, because http.host is {host} "):
        http_tokens(with_http(host=host))
    assert http_tokens(Config(http=Http(host=host))) == {}  # it is off
    file = secret_file(tmp_path / "tokens", b"a:" + TOKEN)
    assert http_tokens(with_http(file, host)) == {TOKEN.decode(): "a"}


def test_tokens_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A name may have several tokens, a token may contain a colon; the systemd credential goes before the file."""
    text = b"# doors\n\ndoor7:" + TOKEN + b"\ndoor7:" + TOKEN + b":2\r\nk.i-t_1:" + b"!" * 256
    file = secret_file(tmp_path / "file", text, 0o640)
    assert list(http_tokens(with_http(file)).items()) == [
        ("0123456789abcdef", "door7"),
        ("0123456789abcdef:2", "door7"),
        ("!" * 256, "k.i-t_1"),
    ]
    secret_file(tmp_path / "http_tokens", b"pi:" + TOKEN)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert http_tokens(with_http(file)) == {TOKEN.decode(): "pi"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "there is no token in it"),
        (b"# nothing\n\n", "there is no token in it"),
        (TOKEN, "line 1: must be NAME:TOKEN"),
        (b"a:" + TOKEN + b"\nb:short", "line 2: must be NAME:TOKEN"),
        (b"a:" + b"x" * 257, "line 1: must be NAME:TOKEN"),
        (b"a b:" + TOKEN, "line 1: must be NAME:TOKEN"),
        (b"a/b:" + TOKEN, "line 1: must be NAME:TOKEN"),
        (b":" + TOKEN, "line 1: must be NAME:TOKEN"),
        (b"a:" + TOKEN + b" x", "line 1: must be NAME:TOKEN"),
        (b"a:" + TOKEN + b"\xff", "line 1: must be NAME:TOKEN"),
        (b"a:" + TOKEN + b"\nb:" + TOKEN, "line 2: this token stands there for the second time"),
    ],
)
def test_wrong_tokens_are_an_error(text: bytes, said: str, tmp_path: Path) -> None:
    """A line that is no token is named by its number, and never shown."""
    with pytest.raises(ConfigError, match=rf"^http.tokens_file: .*{said}") as error:
        http_tokens(with_http(secret_file(tmp_path / "tokens", text)))
    assert "0123" not in str(error.value)


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604, 0o650, 0o666])
def test_tokens_that_others_can_read_are_an_error(mode: int, tmp_path: Path) -> None:
    """Who can read the tokens can speak for all, and who can write them can come in: 0640 or stricter."""
    file = secret_file(tmp_path / "tokens", b"a:" + TOKEN, mode)
    with pytest.raises(ConfigError, match=r"^http.tokens_file: .*chmod 640 or stricter"):
        http_tokens(with_http(file))


# -- whatever comes


NAMES = sorted({part for key, _ in fields(Config) for part in key.split(".")} | {"a", "on", "<<", "\ud800", "\n"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)
PIECES = [
    "mqtt:",
    "port:",
    " ",
    "  ",
    "\n",
    "\t",
    "- ",
    "? ",
    ": ",
    "[",
    "]",
    "{",
    "}",
    ",",
    "&a ",
    "*a",
    "!!int ",
    "!",
]
PIECES += ["|\n", ">\n", "'", '"', "\\", "#", "%YAML ", "%TAG ", "---", "...", "0", "1e9", ".nan", "~", "<<", "\0", "é"]


def assert_config_or_one_line(text: str) -> None:
    """A text is a configuration, or an error of one line."""
    try:
        assert isinstance(parse(text), Config)
    except ConfigError as error:
        assert str(error).isprintable()  # noqa: PT017  # either outcome is right
        assert len(str(error)) < 500  # noqa: PT017


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_any_text_is_a_config_or_one_line(text: str) -> None:
    """No text makes the parser raise anything but a ConfigError of one printable line."""
    assert_config_or_one_line(text)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
def test_any_data_is_a_config_or_one_line(data: dict[str, Any]) -> None:
    """No YAML document, whatever stands under the known keys, raises anything else either."""
    assert_config_or_one_line(yaml.safe_dump(data, allow_unicode=False))


@settings(deadline=None)
@given(st.data())
def test_a_damaged_file_is_a_config_or_one_line(data: st.DataObject) -> None:
    """The shipped file with some of it cut out and something else put in its place does no harm."""
    text = SHIPPED.read_text(encoding="utf-8")
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 200)))
    assert_config_or_one_line(text[:start] + data.draw(st.text(max_size=8) | st.sampled_from(PIECES)) + text[end:])


@settings(deadline=None)
@given(st.sampled_from([key for key, _ in fields(Config)]), VALUES)
def test_any_override_is_a_config_or_one_line(key: str, value: object) -> None:
    """No value from the command line raises anything else either."""
    try:
        assert isinstance(load(None, {key: value}), Config)
    except ConfigError as error:
        assert str(error).isprintable()  # noqa: PT017  # either outcome is right


def test_records_are_frozen() -> None:
    """Nobody can change the configuration under the others."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Queue().max_tasks = 1  # type: ignore[misc]
