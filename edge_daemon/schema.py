"""Whether a value is what a JSON schema asks for.

Ollama already holds a model to the schema while it writes; this is the check that a device can rely on. It knows the
keywords that such schemas use; one that it does not know is not checked, as the JSON Schema standard has it. Patterns
are among those: a regular expression from outside could keep the daemon busy for ever.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

MAX_NAME_CHARS = 60
"""So much of a key's name is quoted: a model that goes wrong writes names without end."""

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


def malformed(schema: Any, path: str = "schema") -> str | None:
    """What is wrong with ``schema`` itself, naming the place; None when ``problem`` can work with it."""
    if isinstance(schema, bool):
        return None
    if not isinstance(schema, Mapping):
        return f"{path}: a schema is an object"
    for keyword, fits in _SHAPES.items():
        if keyword in schema and not fits(schema[keyword]):
            return f"{path}.{keyword}: not of the form that JSON Schema gives it"
    return _first(malformed(inner, f"{path}.{name}") for name, inner in _inner(schema))


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas within a schema, with where they stand."""
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield keyword, schema[keyword]
    for keyword in ("anyOf", "oneOf", "allOf"):
        yield from ((f"{keyword}[{index}]", inner) for index, inner in enumerate(schema.get(keyword, ())))
    yield from ((f"properties.{name}", inner) for name, inner in schema.get("properties", {}).items())


def problem(value: Any, schema: Any, path: str = "answer") -> str | None:
    """What is wrong with ``value``, naming the place; None when it is valid."""
    if schema is True or not isinstance(schema, Mapping):
        return f"{path}: nothing is allowed here" if schema is False else None
    for keyword, check in _CHECKS.items():
        if keyword in schema and (found := check(value, schema[keyword], schema, path)):
            return found
    return None


def _type(value: Any, names: Any, _schema: Mapping[str, Any], path: str) -> str | None:
    wanted = [names] if isinstance(names, str) else names
    if any(_is(value, name) for name in wanted):
        return None
    return f"{path}: not of type {' or '.join(map(str, wanted))}"


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(name, ()))


def _enum(value: Any, allowed: Any, _schema: Mapping[str, Any], path: str) -> str | None:
    return None if any(_same(value, item) for item in allowed) else f"{path}: not one of the allowed values"


def _const(value: Any, wanted: Any, _schema: Mapping[str, Any], path: str) -> str | None:
    return None if _same(value, wanted) else f"{path}: not the one allowed value"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)  # True is not 1 in JSON


def _required(value: Any, names: Any, _schema: Mapping[str, Any], path: str) -> str | None:
    missing = [name for name in names if name not in value] if isinstance(value, dict) else []
    return f"{path}: {missing[0][:MAX_NAME_CHARS]} is missing" if missing else None


def _properties(value: Any, schemas: Any, _schema: Mapping[str, Any], path: str) -> str | None:
    if not isinstance(value, dict):
        return None
    known = ((name, schema) for name, schema in schemas.items() if name in value)
    return _first(problem(value[name], schema, _below(path, name)) for name, schema in known)


def _additional(value: Any, extra: Any, schema: Mapping[str, Any], path: str) -> str | None:
    if not isinstance(value, dict) or "patternProperties" in schema:  # which names it leaves over is not known here
        return None
    known = schema.get("properties", {})
    return _first(problem(item, extra, _below(path, name)) for name, item in value.items() if name not in known)


def _items(value: Any, schema: Any, whole: Mapping[str, Any], path: str) -> str | None:
    if not isinstance(value, list) or "prefixItems" in whole:  # the same
        return None
    return _first(problem(item, schema, f"{path}[{index}]") for index, item in enumerate(value))


def _any_of(value: Any, schemas: Any, _schema: Mapping[str, Any], path: str) -> str | None:
    return None if any(problem(value, schema) is None for schema in schemas) else f"{path}: fits none of the forms"


def _all_of(value: Any, schemas: Any, _schema: Mapping[str, Any], path: str) -> str | None:
    return _first(problem(value, schema, path) for schema in schemas)


def _limit(kind: type | tuple[type, ...], measure: Callable[[Any], Any], *, low: bool) -> Callable[..., str | None]:
    def check(value: Any, bound: Any, _schema: Mapping[str, Any], path: str) -> str | None:
        if isinstance(value, bool) or not isinstance(value, kind):
            return None
        size = measure(value)
        return f"{path}: beyond the limit of {bound}" if (size < bound if low else size > bound) else None

    return check


def _below(path: str, name: str) -> str:
    return f"{path}.{name[:MAX_NAME_CHARS]}"


def _first(problems: Any) -> str | None:
    return next((found for found in problems if found), None)


def _itself(value: Any) -> Any:
    return value


_CHECKS: dict[str, Callable[[Any, Any, Mapping[str, Any], str], str | None]] = {
    "type": _type,
    "enum": _enum,
    "const": _const,
    "required": _required,
    "properties": _properties,
    "additionalProperties": _additional,
    "items": _items,
    "anyOf": _any_of,
    "oneOf": _any_of,  # what tells the forms apart may be a keyword that is not checked here
    "allOf": _all_of,
    "minimum": _limit((int, float), _itself, low=True),
    "maximum": _limit((int, float), _itself, low=False),
    "minLength": _limit(str, len, low=True),
    "maxLength": _limit(str, len, low=False),
    "minItems": _limit(list, len, low=True),
    "maxItems": _limit(list, len, low=False),
}


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _type_names(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in _TYPES for name in names)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list(value: Any) -> bool:
    return isinstance(value, list)


def _forms(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _object(value: Any) -> bool:
    return isinstance(value, Mapping)


_SHAPES: dict[str, Callable[[Any], bool]] = {
    "type": _type_names,
    "required": _names,
    "properties": _object,
    "enum": _list,
    **dict.fromkeys(("anyOf", "oneOf", "allOf"), _forms),
    **dict.fromkeys(("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"), _number),
}
