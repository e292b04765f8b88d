"""Ollama's JSON: what a request may say, and how times, durations and errors are written."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from edge_daemon.embedded.catalogue import Model

Json = dict[str, Any]
Value = TypeVar("Value")

_DEFAULT_NUM_CTX = 4096
_DEFAULT_NUM_BATCH = 512
_LONGEST_ANSWER_CONTEXTS = 10  # num_predict never goes beyond so many times num_ctx
_FOR_EVER = timedelta(days=292 * 365)
_DURATION_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}

# Options that only shape an answer, in Ollama's names, with its defaults where llama.cpp has others.
_SAMPLING: Mapping[str, type] = {
    "frequency_penalty": float,
    "min_p": float,
    "num_keep": int,
    "num_predict": int,
    "presence_penalty": float,
    "repeat_last_n": int,
    "repeat_penalty": float,
    "seed": int,
    "stop": list,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "typical_p": float,
}
_SAMPLING_DEFAULTS: Mapping[str, Any] = {
    "num_predict": -1,
    "top_p": 0.9,
    "min_p": 0.0,
}
# Options of the loaded model itself: a change means loading it anew.
_RUNNER: Mapping[str, type] = {
    "main_gpu": int,
    "num_batch": int,
    "num_ctx": int,
    "num_gpu": int,
    "num_thread": int,
    "use_mmap": bool,
}
_TYPE_NAMES = {int: "integer", float: "float32", bool: "boolean", list: "array"}
_CONTINUED = "assistant"


class ApiError(Exception):
    """An answer other than success: an HTTP status and the text under `error`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True)
class RunnerOptions:
    """What a model is loaded with; two requests with equal ones can share it."""

    num_ctx: int
    num_batch: int
    shift: bool
    others: tuple[tuple[str, Any], ...]

    @property
    def use_mmap(self) -> bool:
        """Whether the file is to be mapped instead of read."""
        return bool(dict(self.others).get("use_mmap"))

    def threads(self, cores: int) -> int:
        """The number of computing threads: all cores unless fewer are asked for."""
        asked = int(dict(self.others).get("num_thread") or cores)
        return max(1, min(asked, cores))


@dataclass(frozen=True)
class CompletionRequest:
    """A request to generate, chat, load or unload.

    `keep_alive_s` is None when the request leaves it open and infinity for "never unload"; `messages` are those of
    a chat, or the prompt and the system text in that form; with `raw`, `prompt` goes to the model as it is.
    """

    model: str
    messages: list[Json]
    prompt: str
    raw: bool
    stream: bool
    truncate: bool
    keep_alive_s: float | None
    format: Any
    think: bool
    runner: Json = field(default_factory=dict)
    sampling: Json = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to answer: a wish to load or to unload."""
        return not self.prompt and not self.messages

    @property
    def is_unload(self) -> bool:
        """Whether the model is to be unloaded."""
        return self.is_empty and self.keep_alive_s == 0

    @property
    def partial_answer(self) -> str | None:
        """The answer's beginning, when the last message is the assistant's and is to be continued."""
        last = self.messages[-1] if self.messages else {}
        return str(last["content"]) if last.get("role") == _CONTINUED else None

    def runner_options(self, model: Model) -> RunnerOptions:
        """What `model` has to be loaded with for this request."""
        known = dict(self.runner)
        num_ctx = known.pop("num_ctx", 0) or _DEFAULT_NUM_CTX
        return RunnerOptions(
            num_ctx=max(4, min(num_ctx, model.context_length)),
            num_batch=max(1, known.pop("num_batch", 0) or _DEFAULT_NUM_BATCH),
            shift=bool(known.pop("shift", True)),
            others=tuple(sorted(known.items())),
        )


def parse_object(body: bytes) -> Json:
    """The JSON object in `body`; ApiError 400 if there is none."""
    if not body.strip():
        raise ApiError(400, "missing request body")
    try:
        parsed = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"invalid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ApiError(400, "invalid JSON: expected an object")
    return parsed


def parse_generate(body: Json) -> CompletionRequest:
    """The request in the body of /api/generate."""
    prompt, system = get(body, "prompt", ""), get(body, "system", "")
    raw = get(body, "raw", default=False)
    if raw and any(body.get(key) for key in ("template", "system", "context")):
        raise ApiError(400, "raw mode does not support template, system, or context")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": prompt}]
    return _parse_common(body, messages=messages if prompt and not raw else [], prompt=prompt, raw=raw)


def parse_chat(body: Json) -> CompletionRequest:
    """The request in the body of /api/chat."""
    if not get(body, "model", ""):
        raise ApiError(400, "model is required")
    given: list[Any] = get(body, "messages", [])
    messages = [_parse_message(message) for message in given]
    return _parse_common(body, messages=messages, prompt="", raw=False)


def _parse_message(message: Any) -> Json:
    if not isinstance(message, dict):
        raise ApiError(400, "invalid messages: expected objects")
    _refuse(message, {"images": "vision", "tool_calls": "tools"})
    return {"role": get(message, "role", ""), "content": get(message, "content", "")}


def _parse_common(body: Json, *, messages: list[Json], prompt: str, raw: bool) -> CompletionRequest:
    _refuse(body, {"images": "vision", "suffix": "insert", "tools": "tools", "template": "template"})
    _refuse(body, {"context": "context"})
    runner, sampling = _parse_options(get(body, "options", {}))
    if not get(body, "shift", default=True):
        runner["shift"] = False
    return CompletionRequest(
        model=get(body, "model", ""),
        messages=messages,
        prompt=prompt,
        raw=raw,
        stream=get(body, "stream", default=True),
        truncate=get(body, "truncate", default=True),
        keep_alive_s=parse_keep_alive(body.get("keep_alive")),
        format=_parse_format(body.get("format")),
        think=_parse_think(body.get("think")),
        runner=runner,
        sampling=sampling,
    )


def get(body: Json, key: str, default: Value) -> Value:
    """`body[key]`, or `default` if it is missing or null; ApiError 400 unless it has the type of `default`."""
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, type(default)):
        raise ApiError(400, f"invalid JSON: {key} must be of type {type(default).__name__}")
    return value


def _refuse(body: Json, unsupported: Mapping[str, str]) -> None:
    for key, capability in unsupported.items():
        if body.get(key):
            raise ApiError(400, f"{json.dumps(body.get('model') or 'model')} does not support {capability}")


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON value")


def _parse_format(value: Any) -> Any:
    """A JSON schema, or None: "json" is the schema of any object."""
    if value is None or value == "":
        return None
    if value == "json":
        return {}
    if not isinstance(value, dict):
        raise ApiError(400, f'invalid format: {json.dumps(value)}; expected "json" or a JSON schema')
    return value


def _parse_think(value: Any) -> bool:
    if value is not None and not isinstance(value, bool | str):
        raise ApiError(400, "invalid think: expected a boolean or a level")
    return bool(value)


def _parse_options(options: Json) -> tuple[Json, Json]:
    """Runner options and sampling options; unknown ones are ignored, those of a wrong type are an error."""
    given = {key: value for key, value in options.items() if value is not None}
    runner = {key: _typed(key, given[key], wanted) for key, wanted in _RUNNER.items() if key in given}
    sampling = {key: _typed(key, given[key], wanted) for key, wanted in _SAMPLING.items() if key in given}
    return runner, sampling


def _typed(key: str, value: Any, wanted: type) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted in (int, float) and is_number and math.isfinite(value):
        return wanted(value)
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is list and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ApiError(500, f'option "{key}" must be of type {_TYPE_NAMES[wanted]}')


def llama_options(request: CompletionRequest, model: Model, num_ctx: int) -> Json:
    """The sampling options in llama.cpp's names, with Ollama's defaults and the model's own."""
    manner = model.manner
    own = {"repeat_penalty": manner.repeat_penalty, "temperature": manner.temperature}
    options = {**_SAMPLING_DEFAULTS, **own, **request.sampling}
    longest = _LONGEST_ANSWER_CONTEXTS * num_ctx
    asked = options.pop("num_predict")
    options["n_predict"] = asked if 0 <= asked <= longest else longest
    options["n_keep"] = options.pop("num_keep", 4)
    # A format's grammar knows where the answer ends; the template's stop strings could cut it short.
    template_stop = () if request.raw or request.format is not None else model.manner.stop
    options["stop"] = [*template_stop, *options.pop("stop", [])]
    if request.format is not None:
        options["json_schema"] = request.format
    return options


def parse_keep_alive(value: Any) -> float | None:
    """Seconds from a number or a duration such as "1m30s"; infinity if negative, None if absent.

    Raises:
        ApiError: 400, it is neither.
    """
    if value is None:
        return None
    if isinstance(value, str):
        seconds = _duration_s(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        raise ApiError(400, "invalid keep_alive: expected a number of seconds or a duration")
    return math.inf if seconds < 0 else seconds


def _duration_s(text: str) -> float:
    unsigned = text[1:] if text[:1] in ("+", "-") else text
    if unsigned == "0":
        return 0.0
    parts = list(_DURATION_PART.finditer(unsigned))
    if not parts or "".join(part[0] for part in parts) != unsigned:
        raise ApiError(400, f"time: invalid duration {json.dumps(text)}: expected such as 30s, 1m30s or 1.5h")
    seconds = sum(float(part[1]) * _UNIT_S[part[2]] for part in parts)
    return -seconds if text.startswith("-") else seconds


def now_utc() -> str:
    """The time, as `created_at` has it: RFC 3339, UTC, with Z."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def expiry_time(after_s: float) -> datetime:
    """The local time `after_s` seconds from now; some 292 years ahead stands for never."""
    wait = timedelta(seconds=after_s) if after_s < _FOR_EVER.total_seconds() else _FOR_EVER
    return datetime.now().astimezone() + wait


def without_zeros(metrics: Mapping[str, int]) -> dict[str, int]:
    """The metrics as Ollama sends them: those that are zero are left out."""
    return {key: value for key, value in metrics.items() if value}
