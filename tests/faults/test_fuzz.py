"""The short form of the fuzzing; `python -m tests.faults input` is the long one."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_daemon.errors import Rejected
from edge_daemon.mqtt_bridge import MAX_LEVELS, MAX_TOPIC_BYTES, Topics
from tests.daemon import N
from tests.faults.fuzz import MAX_MEMORY_BYTES, SIZE, UNITS, Fuzz, judge, memory_bytes, reader, through_broker, times_s

SEED = "short"
QUICK = settings(max_examples=300, deadline=None, derandomize=True)
TOPICS = st.lists(
    st.sampled_from(["reply", N, "edge-llm", "n", "src", "x", "", "+", "#", "$SYS"]) | st.text(max_size=4)
)


def test_any_payload_is_answered() -> None:
    """Whatever is made of good payloads, bad ones and chance is accepted or refused with a code, and nothing raises."""
    told, found = judge(Fuzz(SEED).payloads(4_000))
    assert found == []
    assert told.keys() >= {"accepted", "invalid_json", "invalid_utf8", "invalid_field", "forbidden_reply_topic"}


def worst(unit: bytes) -> bytes:
    """64 kB of it, where a task may have any JSON."""
    return b'{"prompt":"p","meta":[' + unit * (SIZE // len(unit)) + b"0]}"


@pytest.mark.parametrize("unit", UNITS)
def test_large_payloads_take_little(unit: bytes) -> None:
    """Reading 64 kB of the worst takes no more than a fixed multiple of the time of plain JSON, and bounded memory."""
    plain = json.dumps([{"name": f"sensor {n}", "value": n / 7, "on": True} for n in range(1_200)]).encode()
    least_s = times_s([plain] * 5, json.loads)[0]
    assert times_s([worst(unit)] * 5, reader())[0] < 100 * least_s
    assert memory_bytes([worst(unit)])[0] < MAX_MEMORY_BYTES


@pytest.mark.broker
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_any_payload_is_answered_through_a_broker(tmp_path: Path, protocol: str) -> None:
    """The whole daemon answers each of them, and serves a good task afterwards."""
    outcome = through_broker(tmp_path, list(Fuzz(f"{SEED} {protocol}").payloads(600)), protocol=protocol)
    assert outcome.problems == []
    assert outcome.ends.total() >= 601  # refusals may come twice, when the broker hands over too much


@QUICK
@given(topic=TOPICS.map("/".join) | st.text())
def test_reply_topics_are_confined(topic: str) -> None:
    """Any text is refused as a reply topic, or lies where its sender may have answers and can be published to."""
    try:
        Topics(N).check_reply_to("src", topic, ["reply/"])
    except Rejected:
        return
    assert topic.startswith((f"{N}/reply/src/", "reply/"))
    assert topic.isascii()
    assert not set(topic) & set("+#$ \0")
    assert len(topic) <= MAX_TOPIC_BYTES
    assert "" not in topic.split("/")
    assert topic.count("/") < MAX_LEVELS


@QUICK
@given(topic=TOPICS.map("/".join) | TOPICS.map(lambda levels: "/".join([N, "task", *levels])))
def test_any_topic_is_routed_or_ignored(topic: str) -> None:
    """A topic leads to one of three places with as many levels as that has, or nowhere."""
    route = Topics(N).route(topic)
    if route is not None:
        kind, levels = route
        assert topic == "/".join([N, kind, *levels])
        assert len(levels) in {"task": (0, 1, 2), "cancel": (0, 2), "availability": (0,)}[kind]
