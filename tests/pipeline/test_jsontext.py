import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvlm.pipeline.jsontext import compact, first_value, machine_line, parse, schema_validator

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
WORDS = st.text("abc `'.,:()*\n", max_size=30)


@given(VALUES)
def test_what_is_compact_reads_as_it_was(value):
    assert parse(compact(value)) == value
    assert first_value(compact(value)) == value
    assert first_value(json.dumps(value, indent=1)) == value


@given(VALUES.filter(lambda value: isinstance(value, dict | list)), WORDS, WORDS)
def test_an_object_or_array_is_found_between_words(value, before, after):
    assert first_value(f"{before}{compact(value)}{after}") == value
    assert first_value(f"{before}\n```json\n{json.dumps(value, indent=2)}\n```\n{after}") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('```json\n```json\n{"a": 1}\n```\n```', {"a": 1}),
        ('```{"a": 1}```', {"a": 1}),
        ("```json\n5\n```", 5),
        ("`true`", True),
        (' "red" \n', "red"),
        ('{"a": 1}{"a": 2}', {"a": 1}),
        ('As for {it} [see below]: {"a": "}"} :-]', {"a": "}"}),
        (') ] } {"a": [1]}', {"a": [1]}),
        ("[" * 400 + "]" * 400, parse("[" * 400 + "]" * 400)),
    ],
)
def test_the_first_value_is_what_was_meant(text, value):
    assert first_value(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        "The answer is 5",
        'He said "yes".',
        '{"a": [1, 2], "b": ',  # broken off: [1, 2] is a part of it
        "{a: [1, 2]}",
        "NaN",
        '{"a": NaN}',
        "[Infinity]",
        "[1e999]",
        "9" * 400,
        "9" * 9999,
        "[" * 99_999,
        "[" * 99_999 + "]" * 99_999,
    ],
)
def test_where_there_is_none_it_says_so(text):
    with pytest.raises(ValueError, match="there is no JSON in it"):
        first_value(text)


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(ValueError, match="surrogates not allowed"):
        compact(parse('"\\ud800"'))
    assert compact(parse('"\\ud83d\\ude00"')) == '"😀"'
    assert compact(parse('"\\u0000"')) == '"\\u0000"'


# --- schemas ---


@pytest.mark.parametrize(
    ("schema", "fits", "fits_not"),
    [
        ('{"type": "integer"}', 3, "3"),
        ('{"properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}', {"a": 1}, {"a": ""}),
        (
            '{"properties": {"a": {"$ref": "#n"}}, "$defs": {"n": {"$anchor": "n", "type": "null"}}}',
            {"a": None},
            {"a": 1},
        ),
        ('{"$id": "http://e.org/s", "items": {"$ref": "i"}, "$defs": {"i": {"$id": "i", "const": 1}}}', [1], [2]),
        ('{"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 3, "exclusiveMaximum": true}', 2, 3),
        ('{"additionalProperties": {"$ref": "#"}, "type": "object"}', {"a": {"b": {}}}, {"a": {"b": 1}}),
        ('{"enum": [{"$ref": "http://e.org/no-reference"}]}', {"$ref": "http://e.org/no-reference"}, {}),
    ],
)
def test_schemas_of_every_draft_with_references_of_their_own(schema, fits, fits_not):
    assert schema_validator(schema).is_valid(fits)
    assert not schema_validator(schema).is_valid(fits_not)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("{", "Expecting property name"),
        ("true", "not a JSON object"),
        ('{"const": NaN}', "NaN is no JSON number"),
        ('{"type": "colour"}', "'colour' is not valid"),
        ('{"pattern": "["}', "missing ]"),
        ('{"$schema": "http://e.org/mine"}', "none of JSON Schema's"),
        ('{"$schema": 3}', "none of JSON Schema's"),
        ('{"items": {"$ref": "http://127.0.0.1:9/s.json"}}', "'http://127.0.0.1:9/s.json' leads to no place in it"),
        ('{"items": {"$ref": "file:///etc/passwd"}}', "leads to no place in it"),
        ('{"items": {"$ref": "#/$defs/lost"}}', "'#/\\$defs/lost' leads to no place in it"),
        ('{"items": {"$ref": "#/x"}, "x": {"$ref": "http://127.0.0.1:9/s.json"}}', "leads to no place in it"),
        ('{"$ref": "#"}', "refers to itself without end"),
        ('{"type": "object", "$ref": "#"}', "refers to itself without end"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_without_fetching_anything(schema, reason, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)
    with pytest.raises(ValueError, match=reason):
        schema_validator(schema)


def test_a_line_for_machines_has_null_for_what_is_no_number():
    row = {"share": float("nan"), "of": [1.5, float("inf"), {"x": -float("inf")}], "said": "NaN 日", "all": True}
    assert machine_line(row) == '{"share": null, "of": [1.5, null, {"x": null}], "said": "NaN \\u65e5", "all": true}'
