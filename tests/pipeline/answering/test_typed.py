import json
import pickle
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvlm.pipeline.answering.grammar import grammar_of
from longvlm.pipeline.answering.typed import as_request, read_value, typed_value
from longvlm.pipeline.jsontext import compact, parse

SCHEMA = '{"type":"object","required":["n"],"properties":{"n":{"type":"integer"}}}'


def question(kind, **columns):
    return {"question": " What?\n", "type": kind, "choices": None, "schema": None, **columns}


NUMBER, JSON = question("number"), question("json")
CHOICE = question("choice", choices=["red", "green, or so", "red"])


# --- what is asked ---


def test_a_text_is_asked_verbatim():
    request = as_request(("v", 7), question("text"))
    assert (request.key, request.question, request.options, request.grammar) == (("v", 7), " What?\n", (), None)
    assert request.max_new_tokens is None


@pytest.mark.parametrize(
    ("asked", "options", "instruction"),
    [
        (question("bool"), ("Yes", "No"), "Answer yes or no."),
        (CHOICE, ("red", "green, or so"), "Answer with one of these:\nred\ngreen, or so"),
    ],
)
def test_bool_and_choice_have_options_and_no_grammar(asked, options, instruction):
    request = as_request("k", asked)
    assert request.question == f" What?\n\n{instruction}"
    assert request.options == options
    assert request.grammar is None
    assert all(read_value(asked, option) is not None for option in options)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (NUMBER, "Answer with a number."),
        (JSON, "Answer in JSON."),
        (question("json", schema=SCHEMA), f"Answer in JSON that fits this schema: {SCHEMA}"),
    ],
)
def test_number_and_json_are_held_by_a_grammar(asked, said):
    request = pickle.loads(pickle.dumps(as_request("k", asked)))
    assert request.options == ()
    assert request.question == f" What?\n\n{said}"
    assert request.grammar == grammar_of(asked["type"], asked["schema"])


def test_an_unknown_type_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="unknown type 'open'"):
        as_request("k", question("open"))


# --- what is read ---


def test_a_text_has_no_value():
    assert read_value(question("text"), "3") is None


def test_bool_and_choice_are_their_options_alone():
    read = [read_value(question("bool"), text) for text in ("Yes", "No", "yes", "Yes.", "")]
    assert read == ["true", "false", None, None, None]
    assert [read_value(CHOICE, text) for text in ("red", "green, or so", "green")] == ["red", "green, or so", None]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("There are 3 dogs.", "3"),
        ("**7**", "7"),
        ("007", "7"),
        ("0" * 5000 + "7", "7"),
        ("-3", "-3"),
        ("\u22123 degrees", "-3"),
        ("minus 3", "-3"),
        ("+3", "3"),
        ("- 3 dogs", "3"),
        ("-0", "0"),
        ("3.50", "3.5"),
        (".5", "0.5"),
        ("3e5", "300000.0"),
        ("1,234.5", "1234.5"),
        ("1,234,567", "1234567"),
        ("1\u202f234", "1234"),
        ("1'234", "1234"),
        ("45%", "45"),
        ("45 %", "45"),
        ("$5.", "5"),
        ("5kg", "5"),
        ("5 m²", "5"),
        ("5m²", "5"),
        ("count=3", "3"),
        ("Answer: 3", "3"),
        ("2, I say, 2.0", "2"),
        ("The MP4 of COVID-19 shows 2", "2"),
        ("12345678901234567890", "12345678901234567890"),
    ],
)
def test_a_number_is_read_out_of_what_stands_around_it(text, value):
    assert read_value(NUMBER, text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "no number", "three", "MP4", "NaN", "inf", "0x1F", "½", "3½", "10²", "٣", "Ⅳ"),
        *("2 or 3", "3-5", "3\u20135", "1/2", "12:30", "2024-01-01", "1,2", "3,5", "1,23", "1.2.3", "1 234", "1_000"),
        *("10k", "about 2 million", "3 dozens.", "1e999", "9" * 400, "9" * 9999),
    ],
)
def test_what_is_no_single_number_has_no_value(text):
    assert read_value(NUMBER, text) is None


@given(st.integers(-(10**300), 10**300) | st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_come_back_as_they_were(number):
    text = read_value(NUMBER, repr(number))
    assert text == repr(type(number)(0) if number == 0 and isinstance(number, int) else number)
    assert read_value(NUMBER, text) == text
    if isinstance(number, int):
        assert read_value(NUMBER, f"It is {number:,}.") == repr(number)


@given(st.text())
def test_no_answer_breaks_the_reading(text):
    for asked in (NUMBER, JSON, CHOICE, question("bool"), question("json", schema=SCHEMA)):
        value = read_value(asked, text)
        assert value is None or isinstance(value, str)
    value = read_value(NUMBER, text)
    assert value is None or abs(float(value)) <= sys.float_info.max


def test_json_is_stored_compact():
    assert read_value(JSON, 'Here:\n```json\n{"a": [1, 2.0, null],\n "é": "😀"}\n```') == '{"a":[1,2.0,null],"é":"😀"}'


@given(st.dictionaries(st.text(max_size=3), st.integers()))
def test_json_values_read_again_stay_what_they_are(value):
    text = read_value(JSON, f"Surely {compact(value)}, I say.")
    assert parse(text) == value
    assert read_value(JSON, text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"n": 1, "m": 2}', '{"n":1,"m":2}'),
        ('{"n": "1"}', None),
        ('{"m": 1} or rather {"n": 1}', None),  # the first counts
        ('{"n": NaN}', None),
        ('{"n": 1, "m": "\\ud800"}', None),
        ('{"n": 1', None),
        ("1", None),
    ],
)
def test_json_has_to_fit_its_schema(text, value):
    assert read_value(question("json", schema=SCHEMA), text) == value


def test_json_deeper_than_its_schema_can_be_followed_has_no_value():
    nested = question("json", schema='{"items": {"$ref": "#"}}')
    assert read_value(nested, "[[[]]]") == "[[[]]]"
    assert read_value(nested, "[" * 900 + "]" * 900) is None


def test_json_over_which_its_schema_branches_without_end_has_no_value():
    """Two ways at each of thirty levels."""
    either = [{"type": "array", "items": {"$ref": "#"}}] * 2
    branching = question("json", schema=json.dumps({"anyOf": [{"type": "integer"}, *either]}))
    assert read_value(branching, "[" * 30 + "1" + "]" * 30) == "[" * 30 + "1" + "]" * 30
    assert read_value(branching, "[" * 30 + '"one"' + "]" * 30) is None


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|a)*$", "^(a|aa)+$", "^(.*a){20}$"])
def test_a_pattern_that_backtracks_has_an_answer_at_once(pattern):
    asked = question("json", schema=json.dumps({"type": "string", "pattern": pattern}))
    assert read_value(asked, json.dumps("a" * 50_000)) == json.dumps("a" * 50_000)
    assert read_value(asked, json.dumps("a" * 50_000 + "!")) is None


@pytest.mark.parametrize(
    ("kind", "value", "typed"),
    [
        ("bool", "true", True),
        ("bool", "false", False),
        ("number", "7", 7),
        ("number", "-0.5", -0.5),
        ("number", "1e+22", 1e22),
        ("json", '{"a":[1,null]}', {"a": [1, None]}),
        ("json", '"text"', "text"),
        ("choice", "7", "7"),
        ("choice", "true", "true"),
        ("text", None, None),
        ("bool", None, None),
    ],
)
def test_a_value_has_the_type_of_its_question(kind, value, typed):
    found = typed_value(kind, value)
    assert (found, type(found)) == (typed, type(typed))


@given(st.one_of(st.integers(-(10**300), 10**300), st.floats(allow_nan=False, allow_infinity=False)))
def test_every_number_that_is_read_has_a_typed_value(number):
    value = read_value({"type": "number", "choices": None, "schema": None}, repr(number))
    assert float(typed_value("number", value)) == float(number)
