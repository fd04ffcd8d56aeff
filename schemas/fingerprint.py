"""Fingerprints: 16 hex characters that change exactly when what comes out changes.

What comes out follows from a recipe's fields and from rules of the program that no field names, such as which frames
make a segment. A fingerprint is of both, so that what was made before stays good for as long as it would be made again:

* A new field gets a default that stands for "as before", and is marked as `ADDED`: at its default it is not hashed, and
  no recipe that exists changes its fingerprint. That default never changes; what is better is set where a recipe is
  built. The fields of 0.1.0 are not marked and are always hashed, because the stores of 0.1.0 hold such fingerprints.
* A rule that changes gets the next number in the table of its recipe (`INDEX_RULES`, `ANSWER_RULES`, `TRAIN_RULES`), or
  where it is of one type of answers alone, in `TYPE_RULES`, which the hash of a question is of.
  Raise it in the commit after which the same fields give other tokens, answers or weights, beyond the rounding of
  arithmetic. All that was made by the rule before becomes stale by that: videos are watched and questions asked again.
  Do not raise it for speed, memory, or what only turns failures into results. A rule's first number is not hashed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

from longvlm.schemas.errors import InputError

# Metadata of a field that recipes did not always have: `field(default=False, metadata=ADDED)`.
ADDED = MappingProxyType({"added": True})


def fingerprint(spec: dict[str, Any]) -> str:
    """16 hex characters that change when anything in a JSON-able spec changes."""
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def spec_of(recipe: Any) -> dict[str, Any]:
    """A recipe's fields as JSON-able values, without the added ones that are at their defaults.

    These are left out so that what does not use a new field can be read by versions that do not know it.
    """
    spec = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if "added" not in field.metadata or value != field.default:
            spec[field.name] = spec_of(value) if is_dataclass(value) else value
    return spec


def raised(rules: Mapping[str, int]) -> dict[str, Any]:
    """What a table of rules adds to a spec that is hashed: those that are not as they were at first, if any."""
    changed = {name: number for name, number in rules.items() if number > 1}
    return {"rules": changed} if changed else {}


def known_fields(recipe: type[Any], spec: dict[str, Any]) -> dict[str, Any]:
    """A spec whose fields a recipe has, all of them.

    Raises:
        InputError: it has others, so a newer version wrote it, and what they do is not known here.
    """
    if unknown := sorted(spec.keys() - {field.name for field in fields(recipe)}):
        raise InputError(
            f"a recipe sets {', '.join(unknown)}, which this version does not know: it was written by a newer longvlm; "
            "upgrade with `pip install --upgrade longvlm-index`."
        )
    return spec
