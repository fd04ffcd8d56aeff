import json

import pytest

from longvlm.pipeline.answering.grammar import MAX_NUMBER, MAX_SCHEMA, MAX_TEXT, _byte_speller, check_schema, grammar_of

SPELLER = _byte_speller()


def takes(text, kind="json", schema=None):
    """Whether a grammar has a text."""
    spelling = SPELLER.begin(grammar_of(kind, None if schema is None else json.dumps(schema)), 4096)
    ids = SPELLER.tokens.tokenize_str(text)
    return spelling.matcher.validate_tokens([*ids, *SPELLER.eos_ids]) == len(ids) + 1


def doubled(keyword):
    """A schema of 22 parts, each of which is twice the next: two million steps, and a kilobyte."""
    parts = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(21)}
    return {"$ref": "#/$defs/d0", "$defs": parts | {"d21": {"type": "integer"}}}


def nested(keyword, depth, inner=None):
    """A schema within a schema, and so on."""
    schema = inner or {"type": "integer"}
    for _ in range(depth):
        schema = {keyword: {"a": schema} if keyword == "properties" else schema}
    return schema


def chained(length, depth):
    """Parts that lead to each other, out of reach of values that are not nested."""
    parts = {f"d{i}": nested("items", depth, {"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"items": {"$ref": "#/$defs/d0"}, "$defs": parts | {f"d{length}": {"type": "integer"}}}


@pytest.mark.parametrize("text", ["0", "7", " 7", "-3", "12.5", "-0.000001", "123456789012345"])
def test_a_number_is_digits(text):
    assert takes(text, "number")


@pytest.mark.parametrize("text", ["", " ", "  7", "07", "+3", "1e3", ".5", "5.", "3 dogs", "1,234", "NaN", "1" * 16])
def test_anything_else_is_no_number(text):
    assert not takes(text, "number")


@pytest.mark.parametrize("text", ["null", " [1,[]]", '{"a":{"b":[true,"é\\n😀"]}}', '"a"', "-1.5", '"\\\\\\""'])
def test_json_is_compact(text):
    assert takes(text)


@pytest.mark.parametrize(
    "text",
    [
        *("[1, 2]", '{"a": 1}', "nil", "[1,]", "01", '"a', "{1:2}", "[NaN]"),
        *("1e999", "[1e5]", str(10 * MAX_NUMBER), f'"{"a" * (MAX_TEXT + 1)}"', f'["{"a" * (MAX_TEXT + 1)}"]'),
        *('"\\u0041"', '"\\ud800"', '"\\/"', '"\n"'),  # two ways to spell one key, half a character
    ],
)
def test_what_could_not_be_read_or_has_no_end_is_no_json(text):
    assert not takes(text)


@pytest.mark.parametrize(
    ("schema", "fits", "does_not"),
    [
        ({"type": "string", "maxLength": MAX_TEXT + 5}, f'"{"a" * (MAX_TEXT + 5)}"', f'"{"a" * (MAX_TEXT + 6)}"'),
        ({"type": "integer", "minimum": 10**17}, str(10**17), "1"),
        ({"items": True}, '[["a"]]', f'["{"a" * (MAX_TEXT + 1)}"]'),
        ({"allOf": [{"properties": {"a": {"type": "null"}}}, {"required": ["a"]}]}, '{"a":null}', '{"a":1}'),
        (
            {"allOf": [{"required": ["a"], "properties": {"a": {"type": "array", "minItems": 1}}}, {"properties": {}}]},
            '{"a":["b"]}',
            '{"a":[]}',
        ),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "null"}], "type": "array"},
            "[null,[1]]",
            "[null,1e9]",
        ),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"enum": [1, "é"]}}}, '"é"', "2"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, '{"a":{"a":{}}}', '{"a":1}'),
        ({"type": "string", "pattern": "^\\D\\w+$"}, '"xa"', '"1a"'),
        ({"type": "string", "format": "int32", "x-ours": 1}, '"no format that is known"', "1"),
        ({"type": "array", "x-guidance": {"whitespace_flexible": True}}, "[1,2]", "[1, 2]"),
        (
            {"type": "object", "additionalProperties": {"type": "null"}, "properties": {"a": {}}},
            '{"b":null}',
            '{"b":1}',
        ),
    ],
)
def test_a_schema_is_kept_and_what_it_leaves_open_is_bounded(schema, fits, does_not):
    check_schema(json.dumps(schema))
    assert takes(fits, schema=schema)
    assert not takes(does_not, schema=schema)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "leads to no place in it"),
        ({"$id": "http://127.0.0.1:9/a", "items": {"$ref": "b"}}, "leads to no place in it"),
        ({"not": {"type": "string"}}, r'decoding cannot follow it \(Unimplemented keys: \["not"\]\)'),
        ({"properties": {"a": {"uniqueItems": True}}}, "uniqueItems"),
        ({"if": {}, "then": {}}, "if"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "number", "multipleOf": 0.01}, "multipleOf 0.01 is no whole number"),
        ({"type": "object", "minProperties": 2}, "name them in required"),
        (
            {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 3, "exclusiveMinimum": True},
            "as in draft 4",
        ),
        ({"required": ["a"], "properties": {"a": {"$ref": "#"}}, "type": "object"}, "nothing fits it"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum .5. is greater than maximum .3."),
        ({"pattern": "(?=a)b"}, "invalid perl operator"),
        ({"items": {"pattern": "(a)\\1"}}, "invalid escape sequence"),
        ({"patternProperties": {"a{2000}": {}}}, "invalid repetition size"),
    ],
)
def test_what_no_answer_can_be_held_to_is_refused_in_a_sentence(schema, says):
    with pytest.raises(ValueError, match=says) as caught:
        check_schema(json.dumps(schema))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "array", "minItems": 10**7}, "short enough"),
        ({"type": "string", "minLength": 10**7}, "states"),
        ({"type": "string", "pattern": "(((a{100}){100}){100}){100}"}, "repetition size|determine if regex is empty"),
        ({"type": "string", "pattern": ".*a.{30}b.{30}c"}, "determine if regex is empty"),
        ({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(600)}}, "items; max is"),
        ({"enum": ["a" * MAX_SCHEMA]}, "has 20,014 characters, and at most 20,000"),
        (
            {"allOf": [{"anyOf": [{"type": "string", "pattern": f"{i}{j}"} for i in range(9)]} for j in range(7)]},
            "schema too large",
        ),
        (doubled("allOf"), "more than 50,000 steps"),
        (doubled("anyOf"), "more than 50,000 steps"),
        (nested("items", 70), "nested too deeply"),
        ({"allOf": [nested("properties", 40)]}, "nested too deeply"),
        ({"pattern": "(" * 5000 + ")" * 5000}, "nested parentheses"),
        ({"pattern": "(a*" * 500 + ")*" * 500}, "nested parentheses"),
        (chained(25, 30), "more than 400 brackets within each other"),
        (chained(450, 0), "more than 400 brackets within each other|lead too deep"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_would_take_for_ever_ends_at_a_limit(schema, says):
    with pytest.raises(ValueError, match=says):
        check_schema(json.dumps(schema))


@pytest.mark.parametrize("schema", [nested("items", 60), nested("properties", 30), chained(12, 30), chained(190, 1)])
def test_what_is_within_the_limits_is_followed(schema):
    check_schema(json.dumps(schema))
