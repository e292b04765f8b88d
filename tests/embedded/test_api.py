"""Ollama's HTTP API, with a real model behind it."""

import contextlib
import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import requests

from edge_daemon.embedded import start_ollama
from tests.embedded.client import COLD, LONG_TEXT, TIMEOUT_S, Client
from tests.embedded.needs_models import GEMMA3, SMOLLM2, need_model

pytestmark = pytest.mark.models

FEW = {"num_predict": 2}
QUESTION = "What is the capital of France?"
METRICS = [
    "total_duration",
    "load_duration",
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
]


@pytest.fixture(scope="module")
def ollama(data_dir: Path) -> Iterator[Client]:
    """A server with the model and an alias of it."""
    need_model(SMOLLM2)
    with start_ollama(data_dir, aliases=[f"Api-Alias={SMOLLM2}"]) as server:
        yield Client(server, data_dir)


def test_root_and_version_answer_get_and_head(ollama: Client) -> None:
    """A client can find out that somebody who speaks Ollama's API is there."""
    assert ollama.get("/").text == "Ollama is running"
    assert ollama.get("/api/version").json()["version"]
    for path in ("/", "/api/version", "/api/tags"):
        head = requests.head(ollama.url + path, timeout=TIMEOUT_S)
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["Content-Length"]) > 0


def test_unknown_paths_and_methods_are_plain_text_errors(ollama: Client) -> None:
    """404 and 405 come from the web server, not from the API."""
    for response, status in ((ollama.get("/api/nothing"), 404), (ollama.get("/api/chat"), 405)):
        assert response.status_code == status
        assert response.headers["Content-Type"].startswith("text/plain")


def test_a_foreign_host_is_refused(ollama: Client) -> None:
    """A web page whose name has been pointed at loopback gets nothing."""
    assert ollama.get("/api/tags", headers={"Host": "example.com"}).status_code == 403
    assert ollama.get("/api/tags", headers={"Host": "localhost:1"}).status_code == 200


def test_tags_list_models_with_the_size_of_their_files(ollama: Client) -> None:
    """Each name has a digest of its own, also when the content is the same."""
    tags = {tag["name"]: tag for tag in ollama.get("/api/tags").json()["models"]}
    assert {SMOLLM2, "api-alias:latest"} <= set(tags)
    assert tags[SMOLLM2]["size"] == ollama.alias_path("api-alias").stat().st_size
    assert tags[SMOLLM2]["details"]["quantization_level"] == "Q4_1"
    assert len({tag["digest"] for tag in tags.values()}) == len(tags)
    assert all(len(tag["digest"]) == 64 for tag in tags.values())


def test_show_tells_what_a_size_estimate_needs(ollama: Client) -> None:
    """Layers, heads and widths come from the model file itself."""
    info = ollama.post("/api/show", model=SMOLLM2).json()["model_info"]
    assert info["general.architecture"] == "llama"
    assert info["general.parameter_count"] == 134_515_008
    assert info["llama.block_count"] == 30
    assert info["llama.context_length"] == 8192
    assert info["llama.embedding_length"] == 576
    assert (info["llama.attention.head_count"], info["llama.attention.head_count_kv"]) == (9, 3)


def test_show_tells_models_apart_by_their_file(ollama: Client) -> None:
    """An alias has a FROM line of its own, and nothing claims what the models cannot do."""
    shown = [ollama.post("/api/show", model=name).json() for name in (SMOLLM2, "api-alias")]
    assert all(it["capabilities"] == ["completion"] for it in shown)
    assert len({it["modelfile"].splitlines()[0] for it in shown}) == 2


def test_generate_streams_lines_and_ends_with_the_metrics(ollama: Client) -> None:
    """Streaming is the default: pieces of text, then one object with done, the reason and all durations."""
    stream = ollama.stream("/api/generate", model=SMOLLM2, prompt=QUESTION, options=COLD)
    assert stream.response.headers["Content-Type"] == "application/x-ndjson"
    assert stream.response.headers["Transfer-Encoding"] == "chunked"
    *pieces, final = stream.rest()
    assert all(list(it) == ["model", "created_at", "response", "done"] and not it["done"] for it in pieces)
    assert "Paris" in "".join(it["response"] for it in pieces)
    assert (final["done"], final["response"], final["done_reason"]) == (True, "", "stop")
    assert all(type(final[key]) is int and final[key] > 0 for key in METRICS)
    assert final["eval_duration"] + final["prompt_eval_duration"] + final["load_duration"] <= final["total_duration"]
    assert final["eval_count"] == len(pieces) + 1  # the end of the answer is a token too


def test_without_a_stream_there_is_one_object_with_the_same_text(ollama: Client) -> None:
    """`stream: false` changes the form of an answer, not the answer."""
    stream = ollama.stream("/api/generate", model=SMOLLM2, prompt=QUESTION, options=COLD)
    response = ollama.post("/api/generate", model=SMOLLM2, prompt=QUESTION, options=COLD, stream=False)
    assert response.headers["Content-Type"] == "application/json; charset=utf-8"
    assert response.json()["response"] == "".join(it["response"] for it in stream.rest())
    assert response.json()["done"] is True
    assert {"done_reason", *METRICS} <= set(response.json())


def test_chat_carries_text_in_messages(ollama: Client) -> None:
    """A chat answers in `message` where generate answers in `response`."""
    messages = [{"role": "user", "content": QUESTION}]
    *pieces, final = ollama.stream("/api/chat", model=SMOLLM2, messages=messages, options=COLD).rest()
    assert "Paris" in "".join(it["message"]["content"] for it in pieces)
    assert final["message"] == {"role": "assistant", "content": ""}
    assert "response" not in final


def test_times_are_utc_with_a_z(ollama: Client) -> None:
    """`created_at` can be parsed and is now."""
    text = ollama.generate(SMOLLM2)["created_at"]
    assert text.endswith("Z")
    created_at = datetime.fromisoformat(text)
    assert abs(datetime.now(created_at.tzinfo) - created_at) < timedelta(seconds=TIMEOUT_S)


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
@pytest.mark.parametrize("stream", [True, False])
def test_nothing_to_answer_means_load(ollama: Client, path: str, *, stream: bool) -> None:
    """An empty request loads and is answered with one object, even as a stream, and without durations."""
    response = ollama.post(path, model=SMOLLM2, stream=stream)
    answer = response.json()
    assert response.headers["Content-Type"].startswith("application/json")
    assert (answer["done"], answer["done_reason"]) == (True, "load")
    assert not set(METRICS) & set(answer)
    assert SMOLLM2 in ollama.ps()


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/api/generate", {"model": "nobody", "prompt": "x"}, 404, "model 'nobody' not found"),
        ("/api/generate", {"prompt": "x"}, 404, "model '' not found"),
        ("/api/generate", {"model": "a b", "prompt": "x"}, 400, "invalid model name"),
        ("/api/generate", {"model": 1}, 400, "model"),
        ("/api/generate", {"model": SMOLLM2, "keep_alive": "30"}, 400, "invalid duration"),
        ("/api/generate", {"model": SMOLLM2, "prompt": "x", "think": True}, 400, "does not support thinking"),
        ("/api/generate", {"model": SMOLLM2, "prompt": "x", "suffix": "y"}, 400, "does not support insert"),
        ("/api/generate", {"model": SMOLLM2, "prompt": "x", "options": {"seed": "y"}}, 500, "seed"),
        ("/api/generate", {"model": "nobody", "keep_alive": 0}, 404, "not found"),
        ("/api/chat", {"messages": []}, 400, "model is required"),
        ("/api/chat", {"model": "nobody", "messages": []}, 404, "not found"),
        ("/api/show", {}, 400, "model is required"),
        ("/api/show", {"model": "nobody"}, 404, "not found"),
        ("/api/embed", {"model": SMOLLM2, "input": "x"}, 501, "does not support embeddings"),
        ("/api/embed", {"model": "nobody", "input": "x"}, 404, "not found"),
    ],
)
def test_errors_have_a_status_and_one_text(
    ollama: Client, path: str, body: dict[str, Any], status: int, text: str
) -> None:
    """An error before the first piece of text is a status and `{"error": text}`, even for a stream."""
    response = ollama.post(path, **body)
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert text in response.json()["error"]


def test_a_missing_body_is_named(ollama: Client) -> None:
    """An empty body and one that is no JSON are both refused with 400."""
    for body in (b"", b"hello"):
        response = requests.post(f"{ollama.url}/api/generate", data=body, timeout=TIMEOUT_S)
        assert response.status_code == 400
        assert response.json()["error"].startswith("missing request body" if not body else "invalid JSON")


def test_a_connection_serves_request_after_request(ollama: Client) -> None:
    """An error, an answer and a stream leave the connection in order for the next request."""
    with contextlib.closing(HTTPConnection(ollama.url.removeprefix("http://"), timeout=TIMEOUT_S)) as connection:
        connection.connect()
        socket = connection.sock
        for model, status in (("nobody", 404), (SMOLLM2, 200), (SMOLLM2, 200)):
            connection.request("POST", "/api/generate", json.dumps({"model": model, "prompt": "Hi", "options": FEW}))
            response = connection.getresponse()
            assert (response.status, bool(response.read())) == (status, True)
        assert connection.sock is socket


@pytest.mark.parametrize("name", ["SMOLLM2:135M", "library/smollm2:135m", "API-alias", "api-alias:latest"])
def test_names_are_compared_as_ollama_does(ollama: Client, name: str) -> None:
    """Case does not count and `latest` is implied; the answer repeats the name as it was given."""
    assert ollama.generate(name)["model"] == name


def test_num_predict_bounds_the_answer(ollama: Client) -> None:
    """An answer cut at its bound says so."""
    answer = ollama.generate(SMOLLM2, "Count to one hundred.", options={"num_predict": 5})
    assert (answer["eval_count"], answer["done_reason"]) == (5, "length")


def test_stop_strings_end_the_answer_before_them(ollama: Client) -> None:
    """`stop` cuts the answer, and its text is not part of it."""
    answer = ollama.generate(SMOLLM2, QUESTION, options={**COLD, "stop": [" of"]})
    assert (answer["response"], answer["done_reason"]) == ("The capital", "stop")


def test_a_seed_makes_chance_repeatable(ollama: Client) -> None:
    """The same seed gives the same answer, another one gives another."""
    told = [
        ollama.generate(SMOLLM2, "Tell a story.", options={"seed": seed, "temperature": 2.0, "num_predict": 6})
        for seed in (1, 2, 1)
    ]
    assert told[0]["response"] == told[2]["response"] != told[1]["response"]


def test_a_schema_shapes_the_answer(ollama: Client) -> None:
    """With a JSON schema as `format` the answer parses and has the fields that it asks for."""
    schema = {
        "type": "object",
        "properties": {"hot": {"type": "boolean"}, "degrees": {"type": "integer"}},
        "required": ["hot", "degrees"],
        "additionalProperties": False,
    }
    answer = ollama.generate(SMOLLM2, "It is 31 C. Is it hot?", format=schema, options={**COLD, "num_predict": 80})
    parsed = json.loads(answer["response"])
    assert set(parsed) == {"hot", "degrees"}
    assert (type(parsed["hot"]), type(parsed["degrees"])) == (bool, int)


def test_format_json_gives_an_object(ollama: Client) -> None:
    """The answer to `format: "json"` begins an object, whatever the prompt asks for."""
    answer = ollama.generate(SMOLLM2, "Say hello.", format="json", options={**COLD, "num_predict": 12})
    assert answer["response"].lstrip().startswith("{")


def test_an_answer_is_continued_where_it_was_cut(ollama: Client) -> None:
    """A last message of the assistant is a beginning: only its continuation comes, and the two join into one."""
    asked = {"role": "user", "content": QUESTION}
    whole = ollama.post("/api/chat", model=SMOLLM2, messages=[asked], options=COLD, stream=False)
    text = whole.json()["message"]["content"]
    begun = text[: text.index(" France")]
    messages = [asked, {"role": "assistant", "content": begun}]
    rest = ollama.post("/api/chat", model=SMOLLM2, messages=messages, options=COLD, stream=False)
    assert begun + rest.json()["message"]["content"] == text


def test_raw_leaves_the_prompt_as_it_is(ollama: Client) -> None:
    """A raw prompt is continued without any template: it counts only its own tokens."""
    answer = ollama.generate(SMOLLM2, "The capital of France is", raw=True, options={**COLD, "num_predict": 2})
    assert answer["prompt_eval_count"] == 5
    assert answer["response"].startswith(" Paris")


def test_a_system_text_takes_the_place_of_the_models_own(ollama: Client) -> None:
    """`system` reaches the model, and generate and chat mean the same by it."""
    system = "You only ever say: beep. " * 5
    answer = ollama.generate(SMOLLM2, "Hi", system=system, options={**COLD, "num_predict": 4})
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]
    chat = ollama.post("/api/chat", model=SMOLLM2, messages=messages, options={**COLD, "num_predict": 4}, stream=False)
    assert answer["prompt_eval_count"] > 40
    assert chat.json()["message"]["content"] == answer["response"]


def test_a_prompt_longer_than_the_context_is_cut_unless_that_is_forbidden(ollama: Client) -> None:
    """By default room is made for an answer; with `truncate: false` the request is refused."""
    options = {"num_ctx": 256, "num_predict": 4}
    answer = ollama.generate("api-alias", LONG_TEXT, options=options)
    assert answer["done"]
    assert 150 < answer["prompt_eval_count"] < 256
    refusal = ollama.post("/api/generate", model="api-alias", prompt=LONG_TEXT, options=options, truncate=False)
    assert refusal.status_code == 400
    assert "context length" in refusal.json()["error"]


def test_pull_succeeds_only_for_what_is_there(ollama: Client) -> None:
    """A failed pull is a 200 whose last line is an error; only `success` is success."""
    *_, last = ollama.stream("/api/pull", model=SMOLLM2).rest()
    assert last == {"status": "success"}
    stream = ollama.stream("/api/pull", model="nobody")
    *_, last = stream.rest()
    assert (stream.response.status_code, list(last)) == (200, ["error"])
    assert ollama.post("/api/pull", model="nobody", stream=False).status_code == 500
    assert ollama.post("/api/pull", model=SMOLLM2, stream=False).json() == {"status": "success"}


def test_models_cannot_be_deleted(ollama: Client) -> None:
    """What came as a package stays; a model that is not there is 404."""
    for model, status in ((SMOLLM2, 400), ("nobody", 404)):
        response = requests.delete(f"{ollama.url}/api/delete", json={"model": model}, timeout=TIMEOUT_S)
        assert response.status_code == status
    assert ollama.post("/api/show", model=SMOLLM2).status_code == 200


def test_the_base_model_answers_briefly(ollama: Client) -> None:
    """Gemma, which was never taught to answer, answers a short question, stops, and can be continued."""
    need_model(GEMMA3)
    answer = ollama.generate(GEMMA3, QUESTION, options=COLD)
    assert answer["response"].startswith("Paris")
    assert answer["done_reason"] == "stop"
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "The capital of France is"}]
    rest = ollama.post("/api/chat", model=GEMMA3, messages=messages, options=COLD, stream=False, keep_alive=0)
    assert rest.json()["message"]["content"].startswith(" Paris")
