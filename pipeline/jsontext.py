"""JSON as people and models write it: read strictly, found between other words, and held against a schema."""

import json
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import lru_cache, wraps
from math import isfinite
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_FENCE = re.compile(r"^[ \t]*```[\w-]*[ \t]*$", re.MULTILINE)
_OPENING, _CLOSING = "[{", "]}"
_BRACKET = re.compile(r"[\[\]{}]")
MAX_SCHEMA_DEPTH = 64  # brackets within each other: whatever follows a schema recurses, llguidance on the C stack
MAX_REFERRED_DEPTH = 400  # of all that is referred to together, which bounds any way through it
MAX_STEPS = 50_000  # keywords of a schema that are held against one value: a second or two

_steps_left: ContextVar[int] = ContextVar("_steps_left")


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


def machine_line(value: Any) -> str:
    """A value as one line of JSON that every program reads: NaN and infinities, which JSON lacks, are null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None))


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


class SchemaValidator:
    """A schema that values are held against, in bounded time."""

    def __init__(self, validator: Any) -> None:
        self._validator = validator

    def is_valid(self, value: Any) -> bool:
        """Whether a value fits.

        Raises:
            ValueError: that takes more than `MAX_STEPS` steps, since alternatives of alternatives multiply, or value or
                schema lead too deep.
        """
        _steps_left.set(MAX_STEPS)
        try:
            return bool(self._validator.is_valid(value))
        except RecursionError as error:
            raise ValueError("it refers to itself without end") from error


@lru_cache(maxsize=1024)  # a file has few schemas, and an actor meets each of them thousands of times
def schema_validator(schema_text: str) -> SchemaValidator:
    """The validator of a schema, which never fetches anything; its draft is `$schema`'s, else 2020-12.

    Raises:
        ValueError: the text is no JSON object or no valid schema, it is nested too deeply, refers to something outside
            itself, or branches so that no value can be held against it in bounded time.
    """
    from jsonschema import Draft202012Validator, FormatChecker
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.jsonschema import specification_with

    schema = parse(schema_text)
    if not isinstance(schema, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 - a wrong file, not a wrong call
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise ValueError(f"it is nested too deeply, more than {MAX_SCHEMA_DEPTH} brackets within each other")
    draft = schema.get("$schema", Draft202012Validator.META_SCHEMA["$id"])
    kind = validator_for({"$schema": draft}, default=None) if isinstance(draft, str) else None
    if kind is None:
        raise ValueError(f"its $schema {draft!r} is none of JSON Schema's")
    try:
        kind.check_schema(schema, format_checker=FormatChecker(()))  # patterns are RE2's, not Python's
    except SchemaError as error:
        raise ValueError(error.message) from error
    draft_rules = specification_with(draft)
    resource = draft_rules.create_resource(schema)
    uri = resource.id() or ""
    registry = Registry().with_resource(uri, resource).crawl()  # it knows this schema alone, and no way to others
    referred: dict[int, int] = {}
    try:
        _check_parts(resource, registry.resolver(uri), draft_rules.create_resource, set(), referred)
    except RecursionError as error:
        raise ValueError("its references lead too deep") from error
    if sum(referred.values()) > MAX_REFERRED_DEPTH:
        raise ValueError(f"what it refers to has more than {MAX_REFERRED_DEPTH} brackets within each other in all")
    validator = SchemaValidator(_in_bounded_time(kind)(schema, registry=registry))
    probes: tuple[Any, ...] = (None, "", 0, [], {})
    for value in probes:
        validator.is_valid(value)
    return validator


def _depth(value: Any) -> int:
    """How many brackets of a value stand within each other."""
    depth, level = 0, [value]
    while level := [whole for whole in level if isinstance(whole, dict | list)]:
        depth += 1
        level = [part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole)]
    return depth


def _in_bounded_time(kind: Any) -> Any:
    """A class of validators whose steps are counted, and whose regular expressions are RE2's.

    Python's may take for ever over thirty characters.
    """
    from jsonschema.validators import extend

    ours = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
    }
    return extend(kind, {name: _counted(keyword) for name, keyword in (dict(kind.VALIDATORS) | ours).items()})


def _counted(keyword: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    @wraps(keyword)
    def counted(*args: Any) -> Iterator[Any]:
        left = _steps_left.get()
        if not left:
            raise ValueError(f"to hold a value against it takes more than {MAX_STEPS:,} steps")
        _steps_left.set(left - 1)
        yield from keyword(*args) or ()

    return counted


def _pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if isinstance(value, str) and not _is_found(pattern, value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, parts: dict[str, Any], value: Any, _: Any) -> Iterator[Any]:
    for name in value if isinstance(value, dict) else ():
        for pattern, part in parts.items():
            if _is_found(pattern, name):
                yield from validator.descend(value[name], part, path=name, schema_path=pattern)


def _additional_properties(validator: Any, part: Any, value: Any, schema: dict[str, Any]) -> Iterator[Any]:
    patterns = schema.get("patternProperties", {})
    for name in value if isinstance(value, dict) else ():
        if name not in schema.get("properties", {}) and not any(_is_found(pattern, name) for pattern in patterns):
            yield from validator.descend(value[name], part, path=name)


def _is_found(pattern: str, text: str) -> bool:
    """Whether a regular expression matches somewhere in a text; ValueError for one that RE2 does not know."""
    return bool(pc.match_substring_regex(pa.scalar(text), pattern).as_py())


def _check_parts(
    resource: Any, resolver: Any, as_resource: Callable[[Any], Any], seen: set[int], referred: dict[int, int]
) -> None:
    """Follow every reference of a schema, note how deep each place is that one leads to, and read regular expressions.

    ValueError for the first reference that does not lead to a place in it, or expression that RE2 does not know.
    """
    from referencing.exceptions import Unresolvable

    contents = resource.contents
    if id(contents) in seen or not isinstance(contents, dict):
        return
    seen.add(id(contents))
    for pattern in (contents.get("pattern", ""), *contents.get("patternProperties", ())):
        _is_found(pattern, "")
    for keyword in ("$ref", "$dynamicRef"):
        reference = contents.get(keyword)
        if isinstance(reference, str):
            try:
                found = resolver.lookup(reference)
            except Unresolvable as error:
                raise ValueError(f"its {keyword} {reference!r} leads to no place in it") from error
            referred[id(found.contents)] = _depth(found.contents)
            _check_parts(as_resource(found.contents), found.resolver, as_resource, seen, referred)
    for part in resource.subresources():
        _check_parts(part, resolver.in_subresource(part), as_resource, seen, referred)
