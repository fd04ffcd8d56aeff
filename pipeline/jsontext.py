"""JSON as people and models write it: read strictly, found between other words, and held against a schema."""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from math import isfinite
from typing import Any

_FENCE = re.compile(r"^[ \t]*```[\w-]*[ \t]*$", re.MULTILINE)
_OPENING, _CLOSING = "[{", "]}"
_BRACKET = re.compile(r"[\[\]{}]")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _float(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError("a number is beyond any float")  # its digits may fill a page
    return number


def _int(text: str) -> int:
    _float(text)  # larger ones are JSON too, but neither schemas nor other programs can reckon with them
    return int(text)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_float, parse_int=_int)


def parse(text: str) -> Any:
    """The value of a JSON text; ValueError if it is none, for NaN, infinities, and what is nested too deeply."""
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def compact(value: Any) -> str:
    """A value as JSON without white space; ValueError for half a surrogate pair, which no UTF-8 text can hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text.encode()
    return text


def first_value(text: str) -> Any:
    r"""The first JSON value of an answer, code fences and words around it left out; ValueError if there is none.

    Objects and arrays may stand between words. A text, number, true, false or null must stand alone: any sentence
    holds some. What cannot be read is passed over together with all it encloses, and an answer that breaks off within
    brackets has no value: what stands inside is a part, not what was asked for.
    """
    alone = _FENCE.sub("", text).strip(" \t\r\n`")
    try:
        return parse(alone)
    except ValueError:
        position = 0
    while bracket := _BRACKET.search(text, position):
        if bracket[0] in _OPENING:
            try:
                return _DECODER.raw_decode(text, bracket.start())[0]
            except (ValueError, RecursionError):
                position = _closing(text, bracket.start())
        else:
            position = bracket.end()
    raise ValueError("there is no JSON in it")


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed again, by counting; the text's end if it never is."""
    depth = 0
    for bracket in _BRACKET.finditer(text, start):
        depth += 1 if bracket[0] in _OPENING else -1
        if depth == 0:
            return bracket.end()
    return len(text)


@lru_cache(maxsize=1024)  # a file has few schemas, and an actor meets each of them thousands of times
def schema_validator(schema_text: str) -> Any:
    """A jsonschema validator, which never fetches anything; its draft is `$schema`'s, else 2020-12.

    Raises:
        ValueError: the text is no JSON object or no valid schema, or it refers to something outside itself.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.jsonschema import specification_with

    schema = parse(schema_text)
    if not isinstance(schema, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 - a wrong file, not a wrong call
    draft = schema.get("$schema", Draft202012Validator.META_SCHEMA["$id"])
    kind = validator_for({"$schema": draft}, default=None) if isinstance(draft, str) else None
    if kind is None:
        raise ValueError(f"its $schema {draft!r} is none of JSON Schema's")
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(error.message) from error
    draft_rules = specification_with(draft)
    resource = draft_rules.create_resource(schema)
    uri = resource.id() or ""
    registry = Registry().with_resource(uri, resource).crawl()  # it knows this schema alone, and no way to others
    _check_references(resource, registry.resolver(uri), draft_rules.create_resource, set())
    validator = kind(schema, registry=registry)
    probes: tuple[Any, ...] = (None, "", 0, [], {})
    try:
        for value in probes:
            validator.is_valid(value)
    except RecursionError as error:
        raise ValueError("it refers to itself without end") from error
    return validator


def _check_references(resource: Any, resolver: Any, as_resource: Callable[[Any], Any], seen: set[int]) -> None:
    """Follow every reference of a schema; ValueError for the first that does not lead to a place in it."""
    from referencing.exceptions import Unresolvable

    contents = resource.contents
    if id(contents) in seen or not isinstance(contents, dict):
        return
    seen.add(id(contents))
    for keyword in ("$ref", "$dynamicRef"):
        reference = contents.get(keyword)
        if isinstance(reference, str):
            try:
                found = resolver.lookup(reference)
            except Unresolvable as error:
                raise ValueError(f"its {keyword} {reference!r} leads to no place in it") from error
            _check_references(as_resource(found.contents), found.resolver, as_resource, seen)
    for part in resource.subresources():
        _check_references(part, resolver.in_subresource(part), as_resource, seen)
