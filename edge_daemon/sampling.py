"""The options that change how an answer is sampled, and nothing else.

Runner options (``num_ctx`` and its like) would make Ollama load the model anew; they are no task's business.
"""

from collections.abc import Mapping
from typing import Any

from edge_daemon.errors import invalid_field, shown

OPTIONS: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 5),
    "top_k": (int, 0, 10_000),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "typical_p": (float, 0, 1),
    "seed": (int, 0, 2**31 - 1),
    "repeat_penalty": (float, 0, 10),
    "repeat_last_n": (int, -1, 32_768),
    "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2),
    "num_predict": (int, -2, 1_000_000),
}
"""Each with its type and its limits; ``stop`` is allowed beside them."""


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` as Ollama takes them.

    Raises:
        Rejected: ``invalid_field``, naming the option and its limits.
    """
    return {name: _stop(value) if name == "stop" else _number(name, value) for name, value in options.items()}


def _number(name: str, value: Any) -> Any:
    if name not in OPTIONS:
        raise invalid_field(f"options.{shown(name)[1:-1]}", "not a sampling option that a task may set")
    kind, low, high = OPTIONS[name]
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value <= high:
        number = "a number" if kind is float else "a whole number"
        raise invalid_field(f"options.{name}", f"{shown(value)} is not {number} from {low} to {high}")
    if name == "num_predict" and value == 0:
        raise invalid_field("options.num_predict", "0 would give no answer")
    return value


def _stop(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and 0 < len(text) <= 64 for text in texts):
        raise invalid_field("options.stop", "a text, or a list of texts, of 1 to 64 characters")
    if len(texts) > 16:
        raise invalid_field("options.stop", "at most 16 texts")
    return texts
