"""What Ollama's requests may say: names, durations, options."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from edge_daemon.embedded.catalogue import Manner, Model
from edge_daemon.embedded.gguf import Header
from edge_daemon.embedded.names import canonical_name
from edge_daemon.embedded.wire import (
    ApiError,
    llama_options,
    parse_chat,
    parse_generate,
    parse_keep_alive,
    parse_object,
)

MODEL = Model(
    name="m:latest",
    path=Path("m.gguf"),
    digest="0" * 64,
    size_bytes=1,
    modified_at=datetime(2026, 1, 1, tzinfo=UTC),
    header=Header({"general.architecture": "llama", "llama.context_length": 8192}, 1),
    manner=Manner(license="", system="", repeat_penalty=1.0, stop=("END",)),
)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        (0, 0.0),
        (0.5, 0.5),
        (90, 90.0),
        (-1, math.inf),
        (-0.1, math.inf),
        ("0", 0.0),
        ("10m", 600.0),
        ("1m30s", 90.0),
        ("1.5h", 5400.0),
        ("500ms", 0.5),
        ("-1m", math.inf),
        ("+2s", 2.0),
    ],
)
def test_keep_alive_is_seconds_or_a_duration(value: Any, seconds: float | None) -> None:
    """Numbers are seconds, strings are durations with units, negative ones mean for ever."""
    assert parse_keep_alive(value) == seconds


@pytest.mark.parametrize("value", ["-1", "30", "", "5 m", "1d", "m", "1m30", True, [], {}])
def test_a_bad_keep_alive_is_refused(value: Any) -> None:
    """A string without a unit, or another type, is the caller's mistake."""
    with pytest.raises(ApiError) as refusal:
        parse_keep_alive(value)
    assert refusal.value.status == 400


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("smollm2", "smollm2:latest"),
        ("SmolLM2:135M", "smollm2:135m"),
        ("library/a:b", "a:b"),
        ("me/model", "me/model:latest"),
    ],
)
def test_equal_names_have_one_form(name: str, canonical: str) -> None:
    """Case does not count, and the tag `latest` is implied."""
    assert canonical_name(name) == canonical


@pytest.mark.parametrize("name", ["", " ", "a b", "a:b:c", "a/../b:", "x" * 400, ":tag", "ä"])
def test_names_that_no_model_can_have_are_refused(name: str) -> None:
    """A malformed name is told from one that is merely unknown."""
    with pytest.raises(ValueError, match="invalid model name"):
        canonical_name(name)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "hot"},
        {"num_ctx": "big"},
        {"num_ctx": True},
        {"stop": "."},
        {"stop": [1]},
        {"use_mmap": 1},
    ],
)
def test_an_option_of_a_wrong_type_is_an_error(options: dict[str, Any]) -> None:
    """Ollama answers 500 to these and names the option."""
    with pytest.raises(ApiError, match=next(iter(options))) as refusal:
        parse_generate({"model": "m", "prompt": "p", "options": options})
    assert refusal.value.status == 500


def test_options_are_sorted_into_those_of_the_runner_and_of_the_answer() -> None:
    """What forces a reload is told from what does not; unknown ones and nulls are ignored."""
    options = {"num_ctx": 512.0, "num_thread": 1, "top_k": 3, "colour": "red", "seed": None}
    request = parse_generate({"model": "m", "prompt": "p", "options": options})
    assert request.runner == {"num_ctx": 512, "num_thread": 1}
    assert request.sampling == {"top_k": 3}


@pytest.mark.parametrize("body", [b"[1]", b'"x"', b"{", b'{"a": NaN}', b"[" * 100_000, b"\xff"])
@pytest.mark.usefixtures("no_collection")
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    """Garbage is answered with 400, never with a crash."""
    with pytest.raises(ApiError, match="invalid JSON") as refusal:
        parse_object(body)
    assert refusal.value.status == 400


@pytest.mark.parametrize(
    "body",
    [
        {"messages": 1},
        {"messages": ["hi"]},
        {"messages": [{"role": "user", "content": 1}]},
        {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]},
        {"tools": [{"type": "function"}], "messages": []},
        {"format": "xml", "messages": []},
        {"options": [], "messages": []},
        {"stream": "no", "messages": []},
        {"think": 1, "messages": []},
    ],
)
def test_what_a_chat_cannot_be_is_refused(body: dict[str, Any]) -> None:
    """Wrong types and what these models cannot do are the caller's mistake."""
    with pytest.raises(ApiError) as refusal:
        parse_chat({"model": "m", **body})
    assert refusal.value.status == 400


def test_an_empty_prompt_with_keep_alive_zero_is_a_wish_to_unload() -> None:
    """Only exactly zero unloads; half a second does not."""
    assert parse_generate({"model": "m", "keep_alive": 0}).is_unload
    assert parse_generate({"model": "m", "keep_alive": "0s"}).is_unload
    assert not parse_generate({"model": "m", "keep_alive": 0.5}).is_unload
    assert not parse_generate({"model": "m", "keep_alive": 0, "prompt": "hi"}).is_unload
    assert parse_chat({"model": "m", "keep_alive": 0}).is_unload


@pytest.mark.parametrize(
    ("options", "bound"),
    [({}, 1000), ({"num_predict": -1}, 1000), ({"num_predict": 7}, 7), ({"num_predict": 5000}, 1000)],
)
def test_an_answer_is_never_longer_than_ten_contexts(options: dict[str, Any], bound: int) -> None:
    """`num_predict` is honoured, but neither its absence nor -1 means for ever."""
    request = parse_generate({"model": "m", "prompt": "p", "options": options})
    assert llama_options(request, MODEL, num_ctx=100)["n_predict"] == bound


def test_stop_strings_of_the_request_are_added_to_those_of_the_template() -> None:
    """A base model runs on without its template's own; raw prompts and formats have no use for these."""
    asked = {"model": "m", "prompt": "p", "options": {"stop": ["."]}}
    assert llama_options(parse_generate(asked), MODEL, num_ctx=100)["stop"] == ["END", "."]
    assert llama_options(parse_generate({**asked, "raw": True}), MODEL, num_ctx=100)["stop"] == ["."]
    assert llama_options(parse_generate({**asked, "format": "json"}), MODEL, num_ctx=100)["stop"] == ["."]


def test_the_context_is_bounded_by_what_the_model_was_trained_for() -> None:
    """A larger `num_ctx` is not an error; equal options compare equal, so that they need no reload."""
    large = parse_generate({"model": "m", "options": {"num_ctx": 1 << 30}}).runner_options(MODEL)
    trained = parse_generate({"model": "m", "options": {"num_ctx": 8192}}).runner_options(MODEL)
    assert large == trained
    assert large.num_ctx == 8192
    assert large != parse_generate({"model": "m", "shift": False, "options": {"num_ctx": 8192}}).runner_options(MODEL)


@pytest.mark.parametrize(("asked", "threads"), [(None, 4), (0, 4), (2, 2), (64, 4)])
def test_threads_never_exceed_the_cores(asked: int | None, threads: int) -> None:
    """`num_thread` may ask for fewer threads than there are cores, never for more."""
    request = parse_generate({"model": "m", "options": {"num_thread": asked}})
    assert request.runner_options(MODEL).threads(cores=4) == threads
