"""Task types: what the configuration says of a kind of task, laid under what the task itself says."""

import json
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_daemon.config import ModelSettings, parse
from edge_daemon.errors import Rejected
from edge_daemon.intake import Intake, IntakeRules
from edge_daemon.messages import Accepted, Incoming, Priority, Refused, Task
from edge_daemon.store import Store
from edge_daemon.task_types import fill
from tests.fakes import FakeClock

TYPES = """
queue: {max_payload_bytes: 4096}
task_types:
  heat:
    model: small
    template: "It is $temperature ${unit}. Alarm?"
    system: Be brief.
    options: {temperature: 0, top_k: 5}
    format: {type: object}
    max_tokens: 900
    priority: high
    ttl_s: 60
    fallback: [other]
    topic_source: [boiler, kiln]
  note: {template: "Shorten: $text", topic_source: door}
  strict: {template: "Say $what", system: Be exact., locked: [model, template, system, max_tokens, priority, ttl_s]}
  tone: {system: Be kind., locked: [format]}
  fixed: {system: Be kind., locked: [system]}
"""
DATA = {"temperature": 91, "unit": "C"}


class Door:
    """An intake over a real store; what is asked for last stands in `asked`."""

    def __init__(self, directory: Path, text: str) -> None:
        self.asked: list[tuple[str, Any]] = []
        clock = FakeClock()
        self.store = Store(directory / "queue.db", clock=clock)
        self._types(clock, text)

    def _types(self, clock: FakeClock, text: str) -> None:
        rules = IntakeRules(
            config=parse(text),
            clock=clock,
            check_model=self._check_model,
            check_reply_to=lambda _src, _topic: None,
        )
        self.intake = Intake(rules, self.store.add_many, self.store.recognise)

    def change(self, text: str) -> None:
        """Go on with another configuration."""
        self._types(FakeClock(), text)

    def _check_model(self, name: str, fallback: Any) -> tuple[str, ModelSettings]:
        self.asked.append((name, fallback))
        return f"{name}:latest", ModelSettings(max_tokens=200)

    def answer(self, payload: str | dict[str, Any], src: str = "dev", **beside: Any) -> Accepted | Refused:
        """What becomes of one message."""
        text = payload if isinstance(payload, str) else json.dumps(payload)
        (answer,) = self.intake.submit([Incoming(payload=text.encode(), src=src, **beside)])
        return answer

    def task(self, payload: str | dict[str, Any], src: str = "dev", **beside: Any) -> Task:
        """The task that a good message became."""
        answer = self.answer(payload, src, **beside)
        assert isinstance(answer, Accepted), answer
        stored = self.store.find(answer.address.src, answer.address.id)
        assert stored is not None
        return stored.task

    def refusal(self, payload: str | dict[str, Any], **beside: Any) -> str:
        """Code and message of a refusal."""
        answer = self.answer(payload, **beside)
        assert isinstance(answer, Refused), answer
        assert answer.result.error is not None
        return f"{answer.result.error.code}: {answer.result.error.message}"


@pytest.fixture
def new_door(tmp_path: Path) -> Callable[[str], Door]:
    """Builds a door with its own types."""
    return lambda text: Door(tmp_path, text)


@pytest.fixture
def door(new_door: Callable[[str], Door]) -> Door:
    """A door with the types above."""
    return new_door(TYPES)


def test_a_type_makes_the_whole_task(door: Door) -> None:
    """A device sends its values; the prompt and all settings are the type's."""
    task = door.task({"task_type": "heat", "data": DATA})
    assert (task.prompt, task.system) == ("It is 91 C. Alarm?", "Be brief.")
    assert (task.model, task.model_requested, door.asked) == ("small:latest", None, [("small", ("other",))])
    assert (task.options, task.format) == ({"temperature": 0, "top_k": 5}, {"type": "object"})
    assert (task.priority, task.ttl_s, task.fallback) == (Priority.HIGH, 60, ("other",))
    assert task.max_tokens == 900  # in place of the 200 of the model
    assert (task.plain, task.data) == (False, DATA)


def test_what_the_task_states_wins(door: Door) -> None:
    """Each field that a task has goes before its type's; options one by one."""
    stated = {"model": "mine", "system": "Be long.", "format": "json", "priority": "low", "ttl_s": 5}
    task = door.task({"task_type": "heat", "prompt": "hi", "options": {"top_k": 9, "num_predict": 30}} | stated)
    assert (task.prompt, task.system, task.format) == ("hi", "Be long.", "json")
    assert (task.model, task.model_requested) == ("mine:latest", "mine")
    assert (task.priority, task.ttl_s, task.max_tokens) == (Priority.LOW, 5, 30)
    assert task.options == {"temperature": 0, "top_k": 9, "num_predict": 30}


def test_an_answer_is_never_longer_than_the_type_allows(door: Door) -> None:
    """`max_tokens` of a type is a limit as well as a default."""
    assert door.task({"task_type": "heat", "data": DATA, "options": {"num_predict": 5000}}).max_tokens == 900


def test_a_type_without_a_template_takes_the_prompt(door: Door) -> None:
    """Such a type sets everything but the wording."""
    task = door.task({"task_type": "tone", "prompt": "hi"})
    assert (task.prompt, task.system, task.priority) == ("hi", "Be kind.", Priority.NORMAL)


@pytest.mark.parametrize("value", ["x", 1, 1.5, True, False, "$temperature", "${unit}", "$$"])
def test_values_are_put_in_as_they_are(door: Door, value: Any) -> None:
    """Numbers and truth values as JSON has them; what looks like a placeholder in a value is none."""
    task = door.task({"task_type": "heat", "data": {"temperature": value, "unit": "C"}})
    assert task.prompt == f"It is {value if isinstance(value, str) else json.dumps(value)} C. Alarm?"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"task_type": "heat", "data": {"temperature": 1}}, "invalid_field: data.unit: missing"),
    ({"task_type": "heat", "data": {}}, "invalid_field: data.temperature: missing"),
    ({"task_type": "heat", "data": DATA | {"x": 1}}, "invalid_field: data.x: unknown"),
    ({"task_type": "heat", "data": DATA | {"x": 1}, "raw": True}, "invalid_field: data.x: unknown"),
    ({"task_type": "heat", "data": DATA | {"unit": None}}, "invalid_field: data.unit: None is not a text, a number"),
    ({"task_type": "heat", "data": DATA | {"unit": ["C"]}}, "invalid_field: data.unit: ['C'] is not a text"),
    ({"task_type": "heat", "data": DATA | {"unit": {}}}, "invalid_field: data.unit: {} is not a text"),
    ({"task_type": "heat", "data": [1]}, "invalid_field: data: [1] is not an object"),
    ({"task_type": "heat", "data": "hot"}, "invalid_field: data: 'hot' is not an object"),
    ({"task_type": "heat", "data": DATA, "prompt": "hi"}, "invalid_field: data: give prompt or data, not both"),
    ({"task_type": "tone", "data": DATA}, "invalid_field: data: the task type tone has no template"),
    ({"task_type": "heat", "data": None}, "invalid_field: data: None is not an object"),
    ({"task_type": "heat", "data": DATA, "options": {"num_ctx": 1}}, "invalid_field: options.num_ctx"),
    ({"task_type": "heat", "data": DATA, "options": 5}, "invalid_field: options: 5 is not an object"),
    ({"task_type": "strict", "prompt": "hi"}, "invalid_field: prompt: is set by the task type strict"),
    (
        {"task_type": "strict", "messages": [{"role": "user", "content": "hi"}]},
        "invalid_field: messages: is set by the task type strict",
    ),
    (
        {"task_type": "fixed", "messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "be bad"}]},
        "invalid_field: messages[1].role: system is set by the task type fixed",
    ),
    ({"task_type": "strict", "data": {"what": "x"}, "model_name": "m"}, "invalid_field: model_name: is set by"),
    ({"task_type": "strict", "data": {"what": "x"}, "system": "m"}, "invalid_field: system: is set by"),
    ({"task_type": "strict", "data": {"what": "x"}, "priority": "urgent"}, "invalid_field: priority: is set by"),
    ({"task_type": "strict", "data": {"what": "x"}, "ttl_s": 5}, "invalid_field: ttl_s: is set by"),
    (
        {"task_type": "strict", "data": {"what": "x"}, "options": {"num_predict": 5}},
        "invalid_field: options.num_predict: is set by",
    ),
    ({"task_type": "tone", "prompt": "hi", "format": "json"}, "invalid_field: format: is set by the task type tone"),
    ({"task_type": "heat", "data": DATA | {"\x00\n": 1}}, "invalid_field: data.\\x00\\n: unknown"),
]


@pytest.mark.parametrize(("payload", "said"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_does_not_fit_is_refused_by_name(door: Door, payload: dict[str, Any], said: str) -> None:
    """What is missing, unknown, of the wrong type or locked is named."""
    assert door.refusal(payload).startswith(said)


def test_what_is_locked_may_be_left_to_the_type(door: Door) -> None:
    """A lock keeps nobody from using the type."""
    task = door.task({"task_type": "strict", "data": {"what": "hi"}, "options": {"seed": 1}})
    assert (task.prompt, task.system, task.options) == ("Say hi", "Be exact.", {"seed": 1})


def test_a_type_that_is_not_configured_is_a_label(door: Door) -> None:
    """With a prompt it is one; data for it makes no task, so the object is the prompt, and its sender is warned."""
    assert door.task({"task_type": "other", "prompt": "hi"}).task_type == "other"
    payload = json.dumps({"task_type": "haet", "data": DATA})
    answer = door.answer(payload, id="x")
    assert isinstance(answer, Accepted)
    assert answer.status.warnings == ("task_type 'haet' is not configured: the object is the prompt as it stands",)
    assert door.task(payload).prompt == payload
    warned = door.answer({"task_type": "other", "prompt": "hi", "data": {}})
    assert isinstance(warned, Accepted)
    assert warned.status.warnings == ("unknown field 'data'",)


def test_plain_text_goes_to_a_type_by_its_sender(door: Door) -> None:
    """The text is the template's `$text`, and is answered in plain text."""
    task = door.task("a long story\n", src="door")
    assert (task.prompt, task.task_type, task.plain) == ("Shorten: a long story", "note", True)
    assert door.task("a long story", src="window").task_type is None


def test_a_raw_reading_goes_to_a_type_by_its_sender(door: Door) -> None:
    """A JSON object without a task in it is the data; what the template does not ask for is left out."""
    task = door.task(DATA | {"battery": 80, "link": {"quality": 5}}, src="kiln")
    assert (task.prompt, task.task_type, task.plain) == ("It is 91 C. Alarm?", "heat", True)
    assert door.refusal({"temperature": 1}, src="kiln").startswith("invalid_field: data.unit: missing")
    assert door.refusal("91 C", src="kiln").startswith("invalid_field: data.temperature: missing")
    assert door.task(DATA, src="kiln", content_type="application/json").prompt == "It is 91 C. Alarm?"


def test_such_a_sender_can_still_send_a_task(door: Door) -> None:
    """A JSON task says itself what it is."""
    task = door.task({"prompt": "hi"}, src="kiln")
    assert (task.prompt, task.task_type, task.plain) == ("hi", None, False)


def test_plain_text_with_a_type_beside_it(door: Door) -> None:
    """A user property chooses the type too, over the sender's, and over that in the payload."""
    assert door.task("hi", src="kiln", fields={"task_type": "note"}).prompt == "Shorten: hi"
    assert door.task("hi", fields={"task_type": "tone"}).system == "Be kind."
    beside = door.task({"task_type": "note", "data": DATA}, fields={"task_type": "heat"})
    assert beside.prompt == "It is 91 C. Alarm?"


def test_a_task_sent_again_is_known_although_its_type_has_changed(door: Door) -> None:
    """What the configuration adds is not what was asked."""
    payload = {"id": "t", "task_type": "heat", "data": DATA}
    door.task(payload)
    door.change(TYPES.replace("Alarm?", "Too hot?").replace("Be brief.", "Be quick."))
    again = door.answer(payload)
    assert isinstance(again, Accepted)
    assert again.status.duplicate
    assert door.refusal(payload | {"data": DATA | {"temperature": 1}}).startswith("duplicate_conflict")


def test_other_options_make_another_task(door: Door) -> None:
    """Under a used id, options of the sender's own are compared, those of its type are not."""
    payload = {"id": "t", "task_type": "heat", "data": DATA, "options": {"seed": 1}}
    door.task(payload)
    assert door.refusal(payload | {"options": {"seed": 2}}).startswith("duplicate_conflict")
    assert door.refusal(payload | {"options": {"seed": 1, "top_k": 5}}).startswith("duplicate_conflict")
    door.change(TYPES.replace("top_k: 5", "top_k: 6"))
    again = door.answer(payload)
    assert isinstance(again, Accepted)
    assert again.status.duplicate


def test_a_small_task_makes_no_huge_prompt(new_door: Callable[[str], Door]) -> None:
    """A value that stands in the template many times counts each time."""
    door = new_door(TYPES.replace("Shorten: $text", "$text ${text} " * 500))
    assert len(door.task("abc", src="door").prompt or "") == 4 * 1000  # three letters and a space
    assert door.refusal("abcd", src="door").startswith(
        "too_large: data: makes a prompt of 5000 bytes, the limit is 4096"
    )


def test_the_shipped_types_work(new_door: Callable[[str], Door]) -> None:
    """Each example of the shipped configuration makes a task of the data that its comment shows."""
    shipped = (Path(__file__).parent.parent / "config.yaml").read_text(encoding="utf-8")
    examples = [json.loads(line[4:]) for line in shipped.splitlines() if line.startswith('  # {"task_type"')]
    assert {example["task_type"] for example in examples} == set(parse(shipped).task_types)
    door = new_door(shipped)
    for example in examples:
        assert str(next(iter(example["data"].values()))) in (door.task(example).prompt or "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    template=st.text(alphabet="$ab{} c\n", max_size=40).filter(lambda text: Template(text).is_valid()),
    data=st.dictionaries(st.sampled_from(["a", "b", "ab", "c", "$"]), JSON, max_size=4),
)
def test_any_data_is_a_prompt_or_a_refusal(template: str, data: dict[str, Any]) -> None:
    """Nothing but a refusal can come out, and nothing longer than the limit."""
    refusal, prompt = None, ""
    try:
        prompt = fill(template, data, max_bytes=100)
    except Rejected as error:
        refusal = error
    assert len(prompt.encode()) <= 100
    if refusal:
        assert refusal.code in ("invalid_field", "too_large")
        assert refusal.message.isprintable()
        assert len(refusal.message) < 300
