"""The check of JSON answers, with `jsonschema` as the judge of what is valid."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_daemon import schema
from edge_daemon.schema import malformed, problem


def judged_valid(value: Any, its_schema: Any) -> bool:
    """What the reference says."""
    return bool(jsonschema.Draft202012Validator(its_schema).is_valid(value))


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 5, 10**15, 0.0, 1.0, 1.5, -0.5, 5.0, 1e300),
    *("", "a", "ab", "abcdef", "😀", "5", "true"),
    *([], [1], [1, "a"], [1, 2, 3], [True], [1.0], [[1]], [None], [{}], [{"a": 1}]),
    *({}, {"a": 1}, {"a": "x"}, {"b": 1}, {"a": 1, "b": 2}, {"a": {"a": 1}}, {"a": True}, {"a": None}, {"a": [1]}),
]
SCHEMAS: dict[str, Any] = {
    **{f"type {name}": {"type": name} for name in schema._TYPES},
    "types": {"type": ["integer", "null"]},
    "enum": {"enum": [1, "a", None, [1], {"a": 1}]},
    "enum of bools": {"enum": [True, [False]]},
    "empty enum": {"enum": []},
    "const 1": {"const": 1},
    "const true": {"const": True},
    "const deep": {"const": {"a": [1, {"b": True}]}},
    "const list": {"const": [1]},
    "const null": {"const": None},
    "required": {"required": ["a"]},
    "required two": {"required": ["a", "b"]},
    "properties": {"properties": {"a": {"type": "integer"}}},
    "properties deep": {"properties": {"a": {"properties": {"a": {"minimum": 2}}}}},
    "closed": {"properties": {"a": True}, "additionalProperties": False},
    "closed alone": {"additionalProperties": False},
    "others typed": {"properties": {"a": {}}, "additionalProperties": {"type": "string"}},
    "items": {"items": {"type": "integer"}},
    "items never": {"items": False},
    "items deep": {"items": {"items": {"type": "string"}}},
    "anyOf": {"anyOf": [{"type": "string"}, {"minimum": 2}]},
    "allOf": {"allOf": [{"type": "number"}, {"minimum": 1}, {"maximum": 5}]},
    "oneOf apart": {"oneOf": [{"type": "string"}, {"type": "array"}]},
    "minimum": {"minimum": 1},
    "minimum fraction": {"minimum": 0.5},
    "maximum": {"maximum": 1},
    "minLength": {"minLength": 1},
    "maxLength": {"maxLength": 2},
    "minItems": {"minItems": 1},
    "maxItems": {"maxItems": 1},
    "true": True,
    "false": False,
    "empty": {},
    "all at once": {
        "type": "object",
        "required": ["a"],
        "properties": {"a": {"type": ["string", "integer"], "maxLength": 3}},
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("its_schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_every_keyword_agrees_with_the_reference(its_schema: Any) -> None:
    """For each keyword, of many values exactly those pass that the standard lets pass."""
    assert malformed(its_schema) is None
    for value in VALUES:
        assert (problem(value, its_schema) is None) == judged_valid(value, its_schema), value


def test_every_keyword_is_tried() -> None:
    """No keyword is checked that the table above leaves out."""
    text = json.dumps(list(SCHEMAS.values()))
    assert [keyword for keyword in schema._CHECKS if f'"{keyword}"' not in text] == []


LEAVES = st.none() | st.booleans() | st.integers(-3, 6) | st.sampled_from([0.5, 1.0, 2.0]) | st.text("ab😀", max_size=3)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    count = st.integers(0, 3)
    forms = st.lists(inner, min_size=1, max_size=3)
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(sorted(schema._TYPES)) | st.just(["array", "object"]),
            "enum": st.lists(JSON, max_size=3),
            "const": JSON,
            "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
            "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
            "additionalProperties": inner,
            "items": inner,
            "anyOf": forms,
            "allOf": forms,
            **dict.fromkeys(("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"), count),
        },
    )


GOOD_SCHEMAS: st.SearchStrategy[Any] = st.recursive(st.booleans() | st.just({}), _objects, max_leaves=6)


@settings(max_examples=120, deadline=None)
@given(value=JSON, its_schema=GOOD_SCHEMAS)
@example(value=[True], its_schema={"const": [1]})
@example(value={"a": 1.0}, its_schema={"enum": [{"a": 1}]})
def test_any_schema_agrees_with_the_reference(value: Any, its_schema: Any) -> None:
    """However keywords are combined, valid and invalid are what the standard says."""
    assert malformed(its_schema) is None
    assert (problem(value, its_schema) is None) == judged_valid(value, its_schema)


@settings(max_examples=120, deadline=None)
@given(
    value=JSON,
    its_schema=st.recursive(
        JSON, lambda inner: st.dictionaries(st.sampled_from(sorted(schema._CHECKS)), inner, max_size=3), max_leaves=8
    ),
)
def test_nothing_raises(value: Any, its_schema: Any) -> None:
    """Whatever stands in a schema, it is called malformed or can be worked with."""
    if malformed(its_schema) is None:
        problem(value, its_schema)


@pytest.mark.parametrize(
    ("its_schema", "place"),
    [
        (None, "schema"),
        ("object", "schema"),
        ([], "schema"),
        (5, "schema"),
        ({"type": "strnig"}, "schema.type"),
        ({"type": 5}, "schema.type"),
        ({"type": []}, "schema.type"),
        ({"type": ["string", None]}, "schema.type"),
        ({"type": [["string"]]}, "schema.type"),
        ({"enum": "abc"}, "schema.enum"),
        ({"required": "a"}, "schema.required"),
        ({"required": [1]}, "schema.required"),
        ({"properties": ["a"]}, "schema.properties"),
        ({"properties": {"a": 5}}, "schema.properties.a"),
        ({"properties": {"a": {"items": {"minimum": "1"}}}}, "schema.properties.a.items.minimum"),
        ({"items": [{"type": "string"}]}, "schema.items"),
        ({"additionalProperties": "no"}, "schema.additionalProperties"),
        ({"anyOf": {}}, "schema.anyOf"),
        ({"anyOf": []}, "schema.anyOf"),
        ({"allOf": [{}, {"maxItems": True}]}, "schema.allOf[1].maxItems"),
        ({"oneOf": [5]}, "schema.oneOf[0]"),
        ({"minimum": None}, "schema.minimum"),
        ({"maxLength": "3"}, "schema.maxLength"),
    ],
)
def test_a_malformed_schema_is_told_with_its_place(its_schema: Any, place: str) -> None:
    """A schema that makes no sense is refused at the door, by a message that says where."""
    found = malformed(its_schema)
    assert found is not None
    assert found.startswith(f"{place}:")
    if isinstance(its_schema, dict) and its_schema.get("items") != [{"type": "string"}]:
        with pytest.raises(jsonschema.SchemaError):
            jsonschema.Draft202012Validator.check_schema(its_schema)


@pytest.mark.parametrize(
    ("value", "its_schema", "says"),
    [
        ({"a": [1, "x"]}, {"properties": {"a": {"items": {"type": "integer"}}}}, "answer.a[1]: not of type integer"),
        ({}, {"required": ["city"]}, "answer: city is missing"),
        (5, {"type": ["string", "null"]}, "answer: not of type string or null"),
        ({"x": 1}, {"additionalProperties": False}, "answer.x: nothing is allowed here"),
        (3, {"maximum": 2}, "answer: beyond the limit of 2"),
        ({"x" * 99: 1}, {"additionalProperties": False}, f"answer.{'x' * 60}: nothing is allowed here"),
        ({"x" * 99: 1}, {"properties": {"x" * 99: False}}, f"answer.{'x' * 60}: nothing is allowed here"),
        ({}, {"required": ["x" * 99]}, f"answer: {'x' * 60} is missing"),
    ],
)
def test_a_problem_is_told_with_its_place(value: Any, its_schema: Any, says: str) -> None:
    """What is wrong with an answer is said in one line that names the place; of a long name there is the beginning."""
    assert problem(value, its_schema) == says


@pytest.mark.parametrize(
    ("value", "its_schema"),
    [
        ("anything", {"pattern": "^(a+)+$"}),
        ({"x1": 5}, {"patternProperties": {"^x": {}}, "additionalProperties": False}),
        (["a", 1], {"prefixItems": [{"type": "string"}], "items": {"type": "integer"}}),
        ({"a": 1}, {"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}}),
        ("x", {"oneOf": [{"$ref": "#/$defs/a"}, {"type": "string"}]}),
        ("x", {"format": "date", "title": "t", "description": "d"}),
    ],
)
def test_what_is_not_known_is_not_checked(value: Any, its_schema: Any) -> None:
    """A keyword that is not known refuses no answer, nor does a known one whose meaning hangs on it."""
    assert malformed(its_schema) is None
    assert problem(value, its_schema) is None
