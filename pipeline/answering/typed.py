"""Typed questions: what a type adds to the question, and how its answer becomes a value.

text    the question verbatim, as the reference asks it; no value, the answer is all there is
bool    Yes or No, whichever is likelier                                        true, false
choice  the likeliest of the question's choices                                 the choice as it was given
number  a number in digits                                                      7, -0.5, 1234.5
json    a JSON value that fits the question's schema                            compact JSON

Numbers and JSON are decoded by a grammar, so that there is nothing else to be read. Values are read more freely than
that, out of sentences too: people write right answers, and stores hold answers of before there were grammars.
"""

import re
import unicodedata
from collections.abc import Hashable, Mapping
from math import isfinite
from typing import Any

from longvlm.pipeline.answering.grammar import MAX_NUMBER_TOKENS, grammar_of
from longvlm.pipeline.engine.requests import Request
from longvlm.pipeline.jsontext import compact, first_value, parse, schema_validator
from longvlm.schemas.tables import TypedQuestion

_BOOLS = {"Yes": "true", "No": "false"}

# A word of an answer that is a number: $-1,234.5e3%. Between thousands may also stand an apostrophe or one of the
# spaces that do not break a line; a plain space might as well divide two numbers.
_NUMBER = re.compile(
    r"""
    [^\w+\-\u2212.]*  (?P<sign>[-+\u2212]?)
    (?P<digits> [1-9][0-9]{0,2} (?P<comma>[,'\u2019\u00a0\u2009\u202f])[0-9]{3} (?:(?P=comma)[0-9]{3})* (?:\.[0-9]+)?
        | [0-9]+(?:\.[0-9]+)? | \.[0-9]+ )
    (?P<exponent>[eE][-+]?[0-9]+)?  (?P<unit>[^0-9]*)
    """,
    re.VERBOSE,
)
_WORDS = re.compile(r"[ \t\r\n]+|(?<=[A-Za-z])[:=]")
_NEGATIVE = ("minus", "negative")
_SHORT_SCALES = {"k", "K", "M", "B", "T", "bn"}  # 5m and 5t are metres and tonnes
_SCALES = {"dozen", "hundred", "thousand", "million", "billion", "trillion"}
_POINTS = ".,;:!?)]*\"'"


def as_request(key: Hashable, question: TypedQuestion) -> Request:
    """What the engine is asked.

    Args:
        key: what the answer will be known by.
        question: as it was asked.
    """
    text, kind = question["question"], question["type"]
    if kind == "text":
        return Request(key, text)
    if kind == "bool":
        return Request(key, f"{text}\nAnswer yes or no.", options=tuple(_BOOLS))
    if kind == "choice":
        choices = tuple(dict.fromkeys(question["choices"] or ()))
        return Request(key, "\n".join([text, "Answer with one of these:", *choices]), options=choices)
    longest = None
    if kind == "number":
        instruction, longest = "Answer with a number.", MAX_NUMBER_TOKENS
    elif kind == "json" and question["schema"] is None:
        instruction = "Answer in JSON."
    elif kind == "json":
        instruction = f"Answer in JSON that fits this schema: {question['schema']}"
    else:
        raise ValueError(f"unknown type {kind!r}")
    grammar = grammar_of(kind, question["schema"])
    return Request(key, f"{text}\n{instruction}", grammar=grammar, max_new_tokens=longest)


def read_value(question: Mapping[str, Any], text: str) -> str | None:
    """The column `value` of an answer; None for text, and for what is not of the question's type.

    Args:
        question: with its type, choices and schema: a row of QUESTIONS, or what else has these.
        text: the answer.
    """
    kind = question["type"]
    if kind == "bool":
        return _BOOLS.get(text)
    if kind == "choice":
        return text if text in question["choices"] else None
    if kind == "number":
        return _read_number(text)
    if kind == "json":
        return _read_json(text, question["schema"])
    return None


def typed_value(kind: str, value: str | None) -> Any:
    """What the column `value` says, as JSON has it: a bool, a number, a value of JSON, or the text of a choice."""
    return parse(value) if value is not None and kind in ("bool", "number", "json") else value


def _read_number(text: str) -> str | None:
    """The one number that a text holds, as Python writes it; units, percent signs and words around it are left out.

    A word with numerals in it begins with a letter and is none (H264), or is a number. None where there is no number,
    where there are two, and where one says more than its digits: 1/2, 3½, 10k, 2 million.
    """
    numbers = set()
    words = _WORDS.split(text)
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if not any(map(_is_numeral, word)) or next(filter(str.isalnum, word)).isalpha():
            continue
        match = _NUMBER.fullmatch(word)
        if match is None or _says_more(match["unit"], after):
            return None
        digits = match["digits"].replace(match["comma"] or ",", "").lstrip("0") + (match["exponent"] or "")
        digits = digits if digits[:1].isdecimal() else f"0{digits}"
        if not isfinite(float(digits)):
            return None
        number = int(digits) if digits.isdecimal() else float(digits)
        is_negative = match["sign"] in ("-", "\u2212") if match["sign"] else before.lower() in _NEGATIVE
        numbers.add(-number if is_negative else number)
    return repr(numbers.pop()) if len(numbers) == 1 else None


def _says_more(unit: str, after: str) -> bool:
    """Whether what follows a number's digits, in its word and in the next, makes another number of it.

    A numeral behind a letter belongs to the unit: m².
    """
    numerals = (i for i, character in enumerate(unit) if _is_numeral(character))
    if any(i == 0 or not unit[i - 1].isalpha() for i in numerals):
        return True
    if unit.strip(_POINTS) in _SHORT_SCALES:
        return True
    return not unit and after.lower().strip(_POINTS).removesuffix("s") in _SCALES


def _is_numeral(character: str) -> bool:
    return unicodedata.category(character).startswith("N")


def _read_json(text: str, schema: str | None) -> str | None:
    """The first JSON value of a text, compact; None if there is none, or it does not fit the schema.

    A value that the validator cannot descend into, or takes too long over, counts as not fitting.
    """
    try:
        value = first_value(text)
        fits = schema is None or schema_validator(schema).is_valid(value)
        return compact(value) if fits else None
    except (ValueError, RecursionError):
        return None
