"""What a model wrote, as it is sent, stored, continued and read."""

import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from edge_daemon import schema
from edge_daemon.messages import Address, Failure, Message, Stored, TaskState, compact
from edge_daemon.ollama import Answer

CHUNK_S = 0.25
"""Streamed text is sent about four times a second."""
MAX_JSON_DEPTH = 64
"""Levels of an answer in JSON. Who reads it later may have less of a stack left than we have."""


_ONLY_THOUGHTS = Failure(code="incomplete_output", message="the model thought aloud and came to no answer")
# Some models put what they were told to write as JSON between two lines of this.
_FENCED = re.compile(r"\s*```\w*\n(.*)```\s*", re.DOTALL)


class Stream:
    """Text on its way to a sender that wants to see it come."""

    def __init__(self, address: Address, send: Callable[[Address, dict[str, Any]], None], *, seq: int = 0) -> None:
        self._address = address
        self._send = send
        self._text = ""
        self._held = ""
        self._seq = seq
        self._sent_at = float("-inf")

    def add(self, text: str) -> None:
        """Send what has gathered, when it is time. White space waits for a word after it: it may be taken back."""
        self._held += text
        if text[-1:].isspace():
            return
        self._text, self._held = self._text + self._held, ""
        if time.monotonic() - self._sent_at >= CHUNK_S:
            self._flush()

    def take_back(self) -> None:
        """The text is interrupted, and will be continued from its last word, maybe after a restart: send up to it."""
        self._held = ""
        if self._text:
            self._flush()

    def send_rest(self) -> None:
        """No more text will come: send all of it."""
        self._text, self._held = self._text + self._held, ""
        if self._text:
            self._flush()

    def close(self) -> None:
        """Send the rest and say that it is the end."""
        self.send_rest()
        self._seq += 1
        self._send(self._address, {"seq": self._seq, "done": True})

    def _flush(self) -> None:
        self._seq += 1
        self._send(self._address, {"seq": self._seq, "text": self._text})
        self._text, self._sent_at = "", time.monotonic()


def clean(text: str) -> str:
    """Text that can be stored and sent: half of a character, as a model may write it, is none."""
    return text.encode("utf-8", "replace").decode("utf-8")


def kept(pieces: Sequence[str]) -> tuple[str, int]:
    """The text to continue from, and its tokens.

    It ends where a token does, and not in white space: that would be cut into other tokens when it is read again
    than it was when it was written.
    """
    count = len(pieces)
    while count and pieces[count - 1][-1:].isspace():
        count -= 1
    return clean("".join(pieces[:count])), count


def continued(messages: tuple[Message, ...], partial: str) -> tuple[Message, ...]:
    """The conversation with the text so far as the last thing that the model said."""
    if messages[-1].role == "assistant":  # the sender had begun the answer
        partial = messages[-1].content + partial
        messages = messages[:-1]
    return (*messages, Message(role="assistant", content=partial))


def outcome(stored: Stored, answer: Answer) -> dict[str, Any]:
    """The part of a result that the answer decides."""
    # The time to write begins with the first token: one alone has none.
    decode_s = answer.eval_ns / 1e9 if answer.output_tokens > 1 else 0.0
    fields: dict[str, Any] = {
        "state": TaskState.SUCCEEDED,
        "text": stored.partial + clean(answer.text),
        "done_reason": answer.done_reason,
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": stored.partial_tokens + answer.output_tokens,
        "tokens_per_s": round(answer.output_tokens / decode_s, 3) if decode_s > 0 else None,
        "truncated": answer.truncated,
    }
    if answer.thought and not answer.text.strip():
        return fields | {"state": TaskState.FAILED, "error": _ONLY_THOUGHTS}
    if stored.task.format is not None:
        fields |= _parsed(stored.task.format, answer)
    return fields


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _read_json(text: str) -> Any:
    """What can be stored, sent and read again, else ValueError: saying what stands in the way."""
    too_deep = ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise too_deep from None
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise too_deep
    compact(value).encode()  # a lone surrogate or an infinite number could be neither stored nor sent
    return value


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether there are values on more than ``limit`` levels, found without recursion."""
    level = [value]
    for _ in range(limit):
        lists = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [child for items in lists for child in items]
    return bool(level)


def _parsed(wanted: Any, answer: Answer) -> dict[str, Any]:
    """The answer as JSON, or why it is none."""
    fenced = _FENCED.fullmatch(answer.text)
    try:
        value = _read_json(fenced[1] if fenced else answer.text)
        problem = schema.problem(value, wanted) if wanted != "json" else None
    except ValueError as error:
        limit = "; it was cut at max_tokens" if answer.done_reason == "length" else ""
        value, problem = None, f"answer: not JSON ({error}){limit}"
    if problem is None:
        return {"json": value}
    return {"state": TaskState.FAILED, "error": Failure(code="invalid_output", message=problem, retryable=True)}
