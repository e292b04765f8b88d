"""From a request to the objects of Ollama's answer: generate and chat, load and unload."""

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator

from edge_daemon.embedded.cancellation import Cancellation
from edge_daemon.embedded.catalogue import Model
from edge_daemon.embedded.loaded import LoadedModel
from edge_daemon.embedded.residency import Residency
from edge_daemon.embedded.turns import Turns
from edge_daemon.embedded.wire import ApiError, CompletionRequest, Json, llama_options, now_utc, without_zeros

_ROOM_FOR_ANSWER = 4  # a prompt that is too long is cut so that this part of the context is left to the answer

Shape = Callable[[str], Json]


def in_response(text: str) -> Json:
    """How /api/generate carries text."""
    return {"response": text}


def in_message(text: str) -> Json:
    """How /api/chat carries text."""
    return {"message": {"role": "assistant", "content": text}}


class Completions:
    """Answers requests with the loaded models; only one of them computes at a time, with all cores."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._turns = Turns()

    def answer(
        self, model: Model, request: CompletionRequest, shape: Shape, cancellation: Cancellation
    ) -> Generator[Json]:
        """The objects of the answer, in order; the last one has `done` true.

        Raises:
            ApiError: the request failed.
            Cancelled: the client gave up.
        """
        if request.is_unload:
            self._residency.unload(model)
            yield _object(request, shape(""), done=True, done_reason="unload")
            return
        began = time.monotonic_ns()
        options = request.runner_options(model)
        with self._residency.use(model, options, request.keep_alive_s, cancellation) as loaded:
            if request.is_empty:
                yield _object(request, shape(""), done=True, done_reason="load")
                return
            load_ns = time.monotonic_ns() - began
            final: Json = {}
            for text, final in self._texts(loaded, request, cancellation):  # noqa: B007 - the last one counts
                if text:
                    yield _object(request, shape(text), done=False)
            total_ns = time.monotonic_ns() - began
            times = {"total_duration": total_ns, "load_duration": load_ns}
            yield _object(request, shape(""), done=True, **_ending(final), **without_zeros(times), **_metrics(final))

    def _texts(
        self, loaded: LoadedModel, request: CompletionRequest, cancellation: Cancellation
    ) -> Iterator[tuple[str, Json]]:
        """Each piece of text with llama.cpp's object that brought it; the last of these ends the answer."""
        body = llama_options(request, loaded.model, loaded.options.num_ctx)
        body["prompt"] = _fitting(loaded, _prompt(loaded, request), body, request)
        lead = "" if request.raw or request.partial_answer is not None else loaded.model.manner.answer_lead
        with self._turns.turn(cancellation):
            chunks = loaded.complete(body, cancellation)
            try:
                with contextlib.closing(chunks):
                    for chunk in chunks:
                        text = chunk["content"]
                        if text:
                            text, lead = text.removeprefix(lead), ""
                        yield text, chunk
            finally:
                loaded.come_to_rest()


def _prompt(loaded: LoadedModel, request: CompletionRequest) -> str:
    if request.raw:
        return request.prompt
    manner, messages = loaded.model.manner, request.messages
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": manner.system}, *messages]
    begun = request.partial_answer
    if begun is None:
        return loaded.prompt_of(messages)
    return loaded.prompt_of(messages[:-1]) + manner.answer_lead + begun


def _fitting(loaded: LoadedModel, prompt: str, body: Json, request: CompletionRequest) -> str | list[int]:
    """The prompt, with tokens taken out after the first `n_keep` when it is longer than the context."""
    num_ctx = loaded.options.num_ctx
    if len(prompt.encode()) < num_ctx - 1:  # a token has at least one byte; one more may mark the beginning
        return prompt
    tokens = loaded.tokens_of(prompt)
    if len(tokens) < num_ctx:
        return tokens
    if not request.truncate:
        raise ApiError(400, "the input length exceeds the context length")
    keep = max(0, min(body["n_keep"], num_ctx // 2))
    end = num_ctx - num_ctx // _ROOM_FOR_ANSWER - keep
    return tokens[:keep] + tokens[-end:]


def _object(request: CompletionRequest, content: Json, **rest: object) -> Json:
    return {"model": request.model, "created_at": now_utc(), **content, **rest}


def _ending(final: Json) -> Json:
    return {"done_reason": "length" if final["stop_type"] == "limit" else "stop"}


def _metrics(final: Json) -> dict[str, int]:
    """Counts, and durations in nanoseconds, from llama.cpp's timings in milliseconds."""
    timings = final["timings"]
    return without_zeros(
        {
            "prompt_eval_count": timings["prompt_n"] + timings["cache_n"],
            "prompt_eval_duration": round(timings["prompt_ms"] * 1e6),
            "eval_count": timings["predicted_n"],
            "eval_duration": round(timings["predicted_ms"] * 1e6),
        }
    )


def merged(objects: Iterator[Json], shape: Shape) -> Json:
    """All objects of an answer as one, for a request that does not want a stream."""
    texts = []
    last: Json = {}
    for last in objects:
        texts.append(last["response"] if "response" in last else last["message"]["content"])
    return {**last, **shape("".join(texts))}


def line(content: Json) -> bytes:
    """One object as a line of a stream."""
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"
