"""Task types: what the operator has said about a kind of task, laid under what a task says itself."""

from collections.abc import Iterator, Mapping
from string import Template
from typing import Any

from edge_daemon.config import TaskType
from edge_daemon.errors import Rejected, invalid_field, shown
from edge_daemon.messages import compact

PLAIN_TEXT = "text"
"""The placeholder that a payload of plain text fills."""

# What a task may not state when its type has locked a key; other keys stand for the field of their name.
_LOCKS = {"template": ("prompt", "messages"), "model": ("model", "model_name")}


def lay_under(
    name: str, kind: TaskType, stated: Mapping[str, Any], *, is_raw: bool, max_prompt_bytes: int
) -> dict[str, Any]:
    """The fields that ``kind`` adds to a task of this type, which states ``stated``.

    A raw reading, taken for the ``data`` of its type as it came, may hold more than the template asks for.

    Raises:
        Rejected: ``invalid_field``: the task states what is locked, or its ``data`` does not fit the template.
    """
    _check_locks(name, kind, stated)
    added: dict[str, Any] = {
        field: value
        for field in ("system", "format", "priority", "ttl_s")
        if stated.get(field) is None and (value := getattr(kind, field)) is not None
    }
    if kind.options and isinstance(options := stated.get("options") or {}, dict):
        added["options"] = {**kind.options, **options}
    if prompt := _prompt(name, kind, stated, is_raw=is_raw, max_bytes=max_prompt_bytes):
        added["prompt"] = prompt
    return added


def names(added: Mapping[str, Any], stated: Mapping[str, Any]) -> Iterator[str]:
    """What is in ``added`` and not ``stated``: fields, and single options as ``options.top_k``."""
    for field, value in added.items():
        if field == "options":
            yield from (f"options.{option}" for option in value if option not in (stated.get("options") or {}))
        else:
            yield field


def _check_locks(name: str, kind: TaskType, stated: Mapping[str, Any]) -> None:
    for key in kind.locked:
        for field in _LOCKS.get(key, (key,)):
            if stated.get(field) is not None:
                raise invalid_field(field, f"is set by the task type {name}")
    if "system" in kind.locked and isinstance(messages := stated.get("messages"), list):
        for number, message in enumerate(messages):
            if isinstance(message, dict) and message.get("role") == "system":
                raise invalid_field(f"messages[{number}].role", f"system is set by the task type {name}")
    options = stated.get("options")
    if "max_tokens" in kind.locked and isinstance(options, dict) and "num_predict" in options:
        raise invalid_field("options.num_predict", f"is set by the task type {name}")


def _prompt(name: str, kind: TaskType, stated: Mapping[str, Any], *, is_raw: bool, max_bytes: int) -> str | None:
    data = stated.get("data")
    own = stated.get("prompt") is not None or stated.get("messages") is not None
    if data is None and (own or kind.template is None):
        return None
    if own:
        raise invalid_field("data", "give prompt or data, not both")
    if kind.template is None:
        raise invalid_field("data", f"the task type {name} has no template to put it in")
    if not isinstance(data, dict):
        raise invalid_field("data", f"{shown(data)} is not an object of values for the template")
    return fill(kind.template, data, max_bytes=max_bytes, only=not is_raw)


def fill(template: str, data: Mapping[str, Any], *, max_bytes: int, only: bool = True) -> str:
    """``template`` with its placeholders replaced by ``data``; with ``only``, ``data`` may hold nothing else.

    Raises:
        Rejected: ``invalid_field``, naming what is missing, unknown or of the wrong type, or ``too_large``.
    """
    names = Template(template).get_identifiers()
    for name in names:
        if name not in data:
            raise invalid_field(f"data.{name}", "missing: the template of the task type asks for it")
    if only and (unknown := sorted(data.keys() - set(names))):
        known = ", ".join(names) or "nothing"
        raise invalid_field(f"data.{shown(unknown[0])[1:-1]}", f"unknown: the template asks for {known}"[:200])
    values = {name: _text(name, data[name]) for name in names}
    size = len(template.encode()) + sum(len(values[name].encode()) - len(place) for place, name in _places(template))
    if size > max_bytes:
        raise Rejected("too_large", f"data: makes a prompt of {size} bytes, the limit is {max_bytes}")
    return Template(template).substitute(values)


def _places(template: str) -> Iterator[tuple[str, str]]:
    """Every placeholder as it stands there, with its name."""
    for match in Template.pattern.finditer(template):
        if name := match["named"] or match["braced"]:
            yield match[0], name


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return compact(value)
    raise invalid_field(f"data.{name}", f"{shown(value)} is not a text, a number, true or false")
