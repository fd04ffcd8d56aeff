"""Grammars of typed answers: what a number or JSON may look like, so that it can be read and fits its schema.

llguidance makes a schema a grammar, and refuses what it cannot follow. What would let an answer go on for ever, or be
beyond what other programs read, gets bounds that the schema does not mention.
"""

import json
from functools import cache, lru_cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from longvlm.pipeline.engine.grammar import MAX_LEAST, Speller
from longvlm.pipeline.jsontext import parse, schema_validator
from longvlm.pipeline.models.contract import Vocabulary
from longvlm.schemas.errors import TerminalError

MAX_TEXT = 500  # characters of a text in JSON for which the schema names no maxLength
MAX_NUMBER = 10**15  # of numbers for which it names no bound: up to there every program knows whole ones exactly
MAX_SCHEMA = 20_000  # characters: more would not fit a prompt, and take seconds to follow
MAX_NUMBER_TOKENS = 25  # where each is a character, with the end mark

_SPACE = " ?"  # ahead of an answer: many a tokenizer has it in a word's first token
_NUMBER = _SPACE + r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,6})?"
_MARKS, _DIGITS = '{}[]":,', "0123456789"
_ANY = "any-value-at-all"  # among the definitions of a schema
_REF = {"$ref": f"#/$defs/{_ANY}"}
_BOUNDS = {"minimum": -MAX_NUMBER, "maximum": MAX_NUMBER, "maxLength": MAX_TEXT}
# Within allOf, whose parts llguidance merges: it could not merge any value with any value to no end.
_PART = {**_BOUNDS, "items": _BOUNDS, "additionalProperties": _BOUNDS}
# No white space, and escapes only of what has to be escaped: others spell the same key in another way.
_STYLE = {"whitespace_flexible": False, "json_allowed_escapes": 'nrtbf\\"'}
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
# Where a schema holds others: one, in a list, or by name.
_ONE = ("items", "additionalItems", "additionalProperties")
_SOME = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
# What says what a value is without any help: bounds beside it would have to be merged into it.
_SETTLED = {"$ref", "enum", "const", "anyOf", "oneOf", "allOf"}


def grammar_of(kind: str, schema: str | None) -> str:
    """The grammar, as llguidance writes them, of an answer of type number or json.

    Args:
        kind: number or json.
        schema: of json; any JSON fits where there is none.

    Raises:
        ValueError: the schema asks for what decoding cannot follow.
    """
    return _number_grammar() if kind == "number" else _json_grammar(schema)


@lru_cache(maxsize=1024)
def check_schema(schema: str) -> None:
    """Raise ValueError for a schema that no answer can be held to.

    That is one that is none, refers to something outside itself, asks for what decoding cannot follow, is fitted by
    nothing that is short enough, or takes too long.
    """
    if len(schema) > MAX_SCHEMA:
        raise ValueError(f"it has {len(schema):,} characters, and at most {MAX_SCHEMA:,} can be followed")
    schema_validator(schema)
    try:
        _byte_speller().begin(_json_grammar(schema), MAX_LEAST)
    except TerminalError as error:
        raise ValueError(error.message.rstrip(".")) from error


def check_spelling(speller: Speller, kind: str, schema: str | None) -> None:
    """Raise ValueError where a vocabulary cannot spell an answer of type number or json.

    A number may need any digit. Of JSON something has to be spelt that fits the schema; what else fits may be out of
    reach, and is then never begun.
    """
    lacking = speller.lacking(_DIGITS if kind == "number" else _MARKS + _DIGITS)
    if kind == "number" and lacking:
        raise ValueError(f"it has no token for {' '.join(lacking)}")
    try:
        speller.begin(grammar_of(kind, schema), MAX_LEAST)
    except TerminalError as error:
        raise ValueError(
            f"it has no token for {' '.join(lacking)}" if lacking else error.message.rstrip(".")
        ) from error


@cache
def _number_grammar() -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(_NUMBER)


@cache
def _byte_speller() -> Speller:
    """A vocabulary of bytes, which can spell whatever there is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({spelt: i for i, spelt in enumerate([*alphabet, "</s>"])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return Speller(Vocabulary(tokenizer, (len(alphabet),)))


@lru_cache(maxsize=1024)
def _json_grammar(schema: str | None) -> str:
    from llguidance import LLMatcher

    bounded = _bounded(parse(schema) if schema else {}, _REF)
    any_value = {**_BOUNDS, "items": _REF, "additionalProperties": _REF}
    bounded |= {"$defs": {**bounded.get("$defs", {}), _ANY: any_value}, "x-guidance": _STYLE}
    return LLMatcher.grammar_from_lark(f'start: SPACE? value\nSPACE: " "\nvalue: %json {json.dumps(bounded)}\n')


def _bounded(schema: Any, of_rest: dict[str, Any]) -> Any:
    """A schema, or a part of one, with bounds for whatever it leaves without; they mean nothing for other types.

    Args:
        schema: it.
        of_rest: bounds of items and properties of which it says nothing.

    Raises:
        ValueError: it says something that llguidance takes in another sense.
    """
    if schema is True:
        return of_rest
    if not isinstance(schema, dict):
        return schema
    _refuse(schema)
    found = {name: part for name, part in schema.items() if name != "format" or part in _FORMATS}
    for name, part in found.items():
        within = _PART if name == "allOf" else of_rest
        if name in _NAMED and isinstance(part, dict):
            found[name] = {key: _bounded(one, within) for key, one in part.items()}
        elif name in _SOME and isinstance(part, list):
            found[name] = [_bounded(one, within) for one in part]
        elif name in _ONE:
            found[name] = _bounded(part, within)
    return found if found.keys() & _SETTLED else _with_bounds(found, of_rest)


def _with_bounds(schema: dict[str, Any], of_rest: dict[str, Any]) -> dict[str, Any]:
    least, most = (
        max((schema[name] for name in names if name in schema), key=abs, default=0)
        for names in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    )
    bounds: dict[str, Any] = {"additionalProperties": of_rest}
    if not schema.keys() & {"minimum", "exclusiveMinimum"}:
        bounds["minimum"] = min(-MAX_NUMBER, -2 * abs(most))
    if not schema.keys() & {"maximum", "exclusiveMaximum"}:
        bounds["maximum"] = max(MAX_NUMBER, 2 * abs(least))
    if "format" not in schema:
        bounds["maxLength"] = max(MAX_TEXT, schema.get("minLength", 0))
    bounds["additionalItems" if isinstance(schema.get("items"), list) else "items"] = of_rest
    return bounds | schema


def _refuse(schema: dict[str, Any]) -> None:
    """ValueError for what llguidance would follow so that an answer need not fit."""
    divisor = schema.get("multipleOf", 1)
    if isinstance(divisor, float) and not divisor.is_integer():
        raise ValueError(f"its multipleOf {divisor} is no whole number, and no float is exactly a multiple of such")
    if any(isinstance(schema.get(name), bool) for name in ("exclusiveMinimum", "exclusiveMaximum")):
        raise ValueError("its exclusiveMinimum or exclusiveMaximum is true or false, as in draft 4; name the number")
    has_free_names = schema.get("additionalProperties") is not False or "patternProperties" in schema
    if has_free_names and schema.get("minProperties", 0) > len(schema.get("required", ())):
        raise ValueError("its minProperties asks for properties that it does not name; name them in required")
