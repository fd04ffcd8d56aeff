import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longvlm.pipeline.answering.grammar import check_schema, grammar_of
from longvlm.pipeline.answering.typed import as_request, read_value
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.grammar import MAX_DEPTH, Nesting, Speller, Spelling
from longvlm.pipeline.engine.reference import PlainTokens
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.jsontext import schema_validator
from longvlm.pipeline.models.contract import Vocabulary
from longvlm.pipeline.models.families import load_model
from longvlm.pipeline.models.longvlm.init import word_tokenizer
from longvlm.pipeline.models.longvlm.model import load_longvlm
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.schemas.errors import ErrorCode, TerminalError
from longvlm.schemas.recipe import AnswerRecipe
from models import LLAVAS, byte_fallback_tokenizer, byte_tokenizer

BYTES = Speller(Vocabulary(byte_tokenizer(start=None, end="</s>", max_length=9, lower=False).backend_tokenizer, (2,)))
FALLBACK = Speller(Vocabulary(byte_fallback_tokenizer(), (2,)))
GREEDY = AnswerRecipe("m", "w", "i", precision="float32", max_new_tokens=45)
TAGS = {"type": "array", "items": {"enum": ["red", "grün", "röt"]}, "minItems": 1}
PERSON = {
    "type": "object",
    "required": ["name", "tags"],
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "tags": TAGS},
    "additionalProperties": False,
}


def typed(kind, schema=None, words="What?"):
    text = None if schema is None else json.dumps(schema)
    return {"question": words, "type": kind, "choices": None, "schema": text}


def grammar(kind, schema=None):
    return grammar_of(kind, None if schema is None else json.dumps(schema))


def allowed(spelling):
    """The tokens that may come next, end marks among them."""
    if (forced := spelling.forced) is not None:
        return [forced]
    bits = np.unpackbits(np.frombuffer(spelling.matcher.compute_bitmask(), np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def walk(spelling, draw):
    """An answer of random tokens, as many as there is room for, and whether it stands where a row would be closed."""
    ids = []
    while spelling.room and (not ids or ids[-1] not in spelling.speller.eos_ids):
        room = spelling.room
        chosen = draw.choice(allowed(spelling))
        stands = spelling.take(chosen)
        ids.append(stands)
        assert spelling.error is None
        assert spelling.room == room - (stands not in spelling.speller.eos_ids)
    return ids


# --- everything that is written parses and fits ---

NAMES = st.text('abé"\\ 0{', min_size=1, max_size=4)
BOUNDED = st.integers(-500, 500).flatmap(
    lambda low: st.integers(low, 1000).map(lambda high: {"type": "integer", "minimum": low, "maximum": high})
)
LEAVES = st.one_of(
    st.sampled_from([{"type": kind} for kind in ("string", "number", "integer", "boolean", "null")]),
    st.sampled_from([{}, {"type": "number", "exclusiveMinimum": 0}, {"type": ["string", "null"], "maxLength": 3}]),
    st.sampled_from([{"type": "string", "pattern": "^[a-z]{2}-\\d+$"}, {"type": "string", "minLength": 2}]),
    st.sampled_from([{"type": "string", "format": "date"}, {"type": "integer", "multipleOf": 7, "minimum": 1}]),
    BOUNDED,
    st.lists(NAMES | st.integers(-9, 9) | st.none(), min_size=1, max_size=3).map(lambda values: {"enum": values}),
)


def objects(parts):
    properties = st.dictionaries(NAMES, parts, max_size=3)

    def of(properties):
        required = st.lists(st.sampled_from(sorted(properties)), unique=True) if properties else st.just([])
        return st.builds(
            lambda required, more: {"type": "object", "properties": properties, "required": required, **more},
            required,
            st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": {"type": "null"}}]),
        )

    return properties.flatmap(of)


SCHEMAS = st.recursive(
    LEAVES,
    lambda parts: (
        objects(parts)
        | st.builds(lambda part, low: {"type": "array", "items": part, "minItems": low}, parts, st.integers(0, 2))
        | st.lists(parts, min_size=1, max_size=3).map(lambda some: {"anyOf": some})
    ),
    max_leaves=5,
)


@pytest.mark.parametrize("speller", [BYTES, FALLBACK], ids=["bytes", "fallback"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=SCHEMAS, seed=st.integers(0, 2**32), room=st.integers(1, 120))
def test_random_tokens_within_any_room_fit_any_schema_or_nothing_would(speller, schema, seed, room):
    text = json.dumps(schema)
    check_schema(text)
    least = len(speller.begin(grammar_of("json", text), 4096).closing)
    if least > room:
        with pytest.raises(TerminalError, match="--max-new-tokens") as caught:
            speller.begin(grammar_of("json", text), room)
        assert caught.value.code is ErrorCode.CUT_OFF
        return
    spelling = speller.begin(grammar_of("json", text), room)
    answer = speller.text(walk(spelling, random.Random(seed)))
    assert read_value(typed("json", schema), answer) is not None, answer
    assert schema_validator(text).is_valid(json.loads(answer))


@pytest.mark.parametrize("room", [1, 2, 3, 8, 30])
def test_random_digits_are_a_number(room):
    for speller in (BYTES, FALLBACK):
        for seed in range(20):
            answer = speller.text(walk(speller.begin(grammar("number"), room), random.Random(seed)))
            assert read_value(typed("number"), answer) is not None, answer


def test_brackets_are_not_nested_more_deeply_than_can_be_read():
    spelling = BYTES.begin(grammar("json"), 3 * MAX_DEPTH)
    bracket = BYTES.closing_ids[ord("]")] - 2  # "[" is two before
    assert BYTES.tokens.decode_bytes([bracket]) == b"["
    taken = [spelling.take(bracket) for _ in range(MAX_DEPTH)]
    assert set(taken) == {bracket}
    assert spelling.take(bracket) != bracket
    assert spelling.error is None


# --- the end of the room ---


def test_a_token_after_which_there_is_no_room_to_close_gives_way_to_one_that_closes():
    schema = {"type": "array", "items": {"type": "object", "required": ["a long name"], "properties": {}}}
    spelling = BYTES.begin(grammar("json", schema), 12)
    opening, brace = (BYTES.tokens.greedy_tokenize(mark)[0] for mark in "[{")
    assert spelling.take(opening) == opening
    assert brace in allowed(spelling)  # the grammar would have it
    assert BYTES.tokens.decode_bytes([spelling.take(brace)]) == b"]"
    roomy = BYTES.begin(grammar("json", schema), 40)
    assert [roomy.take(opening), roomy.take(brace)] == [opening, brace]


def test_what_the_room_does_not_do_for_is_cut_off():
    least = len(BYTES.begin(grammar("json", PERSON), 100).closing)
    assert BYTES.begin(grammar("json", PERSON), least)
    with pytest.raises(
        TerminalError, match=rf"takes about {least} tokens .* and only {least - 1} are .*--max-new-tokens"
    ) as caught:
        BYTES.begin(grammar("json", PERSON), least - 1)
    assert caught.value.code is ErrorCode.CUT_OFF


@pytest.mark.parametrize(
    ("schema", "shortest"),
    [
        ({}, "0"),
        ({"type": "integer", "minimum": 100}, None),
        ({"type": "string", "pattern": "^a*b$"}, '"ab"'),
        ({"type": "string", "pattern": "^b*a$"}, '"a"'),
        ({"type": "string", "pattern": "^(x|a)*m[0-9]{3}$"}, '"am012"'),
        ({"type": "string", "format": "email"}, None),
        ({"type": "string", "minLength": 300}, None),
        ({"const": {"é": ["ü", None]}}, '{"é":["ü",null]}'),
        (PERSON, None),
    ],
)
def test_a_way_to_the_end_is_found(schema, shortest):
    for speller in (BYTES, FALLBACK):
        spelling = speller.begin(grammar("json", schema), 4096)
        answer = speller.text(spelling.closing)
        assert shortest in (None, answer)
        assert schema_validator(json.dumps(schema)).is_valid(json.loads(answer))


def test_nesting_is_told_from_texts_that_hold_brackets():
    assert Nesting().after(b'{"a\\"[": [1, {') == Nesting(depth=3)
    assert Nesting().after(b'{"a\\').after(b'"').after(b'"}') == Nesting()
    assert Nesting().after(b'["') == Nesting(1, in_text=True)


# --- vocabularies ---


def test_words_spell_numbers_without_spaces_and_no_json():
    speller = Speller(Vocabulary(word_tokenizer(["red", *"0123456789"]), (2,)))
    assert speller.lacking("0123456789") == ""
    answer = speller.text(walk(speller.begin(grammar("number"), 9), random.Random(3)))
    assert answer == read_value(typed("number"), answer)
    with pytest.raises(TerminalError, match=r"nothing fits it that .* can be spelt") as caught:
        speller.begin(grammar("json", PERSON), 99)
    assert caught.value.code is ErrorCode.ANSWER_FAILED
    assert speller.lacking("{}7") == "{}"


def test_a_word_that_leads_nowhere_is_not_taken():
    words = word_tokenizer(["{", "}", '"', "a", "b", ":", "1"])  # no comma, so that no second property can follow
    speller = Speller(Vocabulary(words, (2,)))
    schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 1}}, "additionalProperties": False}
    for seed in range(20):
        answer = speller.text(walk(speller.begin(grammar("json", schema), 30), random.Random(seed)))
        assert answer in ("{}", '{"a":1}', '{"b":1}')


# --- in the engine, whoever else is in the batch ---


def load_bytes_longvlm(folder):
    model, tokenizer = load_longvlm(str(folder)), byte_fallback_tokenizer()
    tokenizer.add_special_tokens(["<vid_patch>", "<vid_start>", "<vid_end>"])
    banned_ids = range(tokenizer.get_vocab_size() - 3, model.llm.config.vocab_size)
    return replace(model, tokenizer=tokenizer, banned_ids=tuple(banned_ids))


@pytest.fixture
def longvlm(untrained_folder):
    return load_bytes_longvlm(untrained_folder)


@pytest.fixture
def model(request, longvlm, folders):
    return longvlm if request.param == "longvlm" else load_model(str(folders[request.param]))


def groups(model, num_videos=2):
    kinds = [("number", None), ("json", None), ("json", PERSON), ("text", None), ("bool", None)]
    for video in range(num_videos):
        asked = {(video, place): typed(kind, schema, f"What {video}?") for place, (kind, schema) in enumerate(kinds)}
        rows = torch.randn(9 + video, model.mm_hidden_size, generator=torch.Generator().manual_seed(video))
        yield asked, Group(VideoPrefix(rows), [as_request(key, one) for key, one in asked.items()])


def answers(engine, asked_of):
    return {answer.key: answer for answer in engine.answer(iter(asked_of))}


@pytest.mark.parametrize(
    ("model", "temperature"), [("longvlm", 1.5), *((name, 0.0) for name in ("longvlm", *LLAVAS))], indirect=["model"]
)
def test_rows_with_a_grammar_and_without_decode_together_as_each_would_alone(model, temperature):
    recipe = AnswerRecipe(
        "m", "w", "i", model.templates[0], precision="float32", max_new_tokens=45, temperature=temperature
    )
    made, engine = list(groups(model)), Engine(model, recipe)
    together = answers(engine, [one for _, one in made])
    alone = {}
    for asked, group in made:
        for request in group.requests:
            alone |= answers(engine, [Group(group.prefix, [request])])
            answer = alone[request.key]
            assert answer.error is None
            assert (read_value(asked[request.key], answer.text) is None) == (asked[request.key]["type"] == "text")
    engine.max_rows = 3
    few = answers(engine, [one for _, one in made[::-1]])
    told = [{key: (one.text, one.num_new_tokens) for key, one in found.items()} for found in (alone, together, few)]
    assert told[0] == told[1] == told[2]


def test_transformers_own_decoding_kept_to_a_grammar_gives_the_same(longvlm, untrained_folder):
    plain = PlainTokens(load_bytes_longvlm(untrained_folder), GREEDY)
    ((_, group),) = groups(longvlm, 1)
    view = plain.show(group.prefix)
    for key, answer in answers(Engine(longvlm, GREEDY), [group]).items():
        wanted = plain.answer(view, group.requests[key[1]])
        assert (answer.text, answer.num_new_tokens) == (wanted.text, wanted.num_new_tokens)


def test_every_limit_gives_an_answer_that_fits_or_is_cut_off(longvlm):
    ((_, group),) = groups(longvlm, 1)
    asked = typed("json", PERSON)
    request = as_request("it", asked)
    limits = [*range(1, 48, 3), 90]
    requests = [replace(request, key=most, max_new_tokens=most) for most in limits]
    found = answers(Engine(longvlm, GREEDY), [Group(group.prefix, requests)])
    cut_off = [found[most].error is not None for most in limits]
    assert cut_off == sorted(cut_off, reverse=True)
    assert len(set(cut_off)) == 2
    for most, answer in found.items():
        if answer.error is None:
            assert read_value(asked, answer.text) is not None
            assert answer.num_new_tokens <= most
        else:
            assert answer.error.code is ErrorCode.CUT_OFF
            assert answer.text is None


def test_out_of_memory_begins_an_answer_anew(longvlm):
    made = [one for _, one in groups(longvlm, 1)]
    wanted, engine = answers(Engine(longvlm, GREEDY), made), Engine(longvlm, GREEDY)
    decode, failures = engine._batch.decode, iter([False] * 5 + [True])

    def failing(extend, **options):
        if next(failures, False):
            raise torch.OutOfMemoryError
        decode(extend, **options)

    engine._batch.decode = failing
    found = answers(engine, made)
    assert {key: one.text for key, one in found.items()} == {key: one.text for key, one in wanted.items()}


def test_a_grammar_that_can_be_followed_no_further_fails_alone(longvlm, monkeypatch):
    ((asked, group),) = groups(longvlm, 1)
    wanted, take = answers(Engine(longvlm, GREEDY), [group]), Spelling.take

    def exhausted(spelling, token):
        if spelling.room < GREEDY.max_new_tokens - 3:
            spelling.matcher.consume_token(0)  # which no grammar has: an error for good, as beyond any limit
        return take(spelling, token)

    monkeypatch.setattr(Spelling, "take", exhausted)
    found = answers(Engine(longvlm, GREEDY), [group])
    failed = {key for key, answer in found.items() if answer.error is not None}
    assert {asked[key]["type"] for key in failed} == {"number", "json"}
    for key, answer in found.items():
        if key in failed:
            assert answer.error.code is ErrorCode.ANSWER_FAILED
            assert "cannot be followed any further" in str(answer.error)
        else:
            assert answer.text == wanted[key].text


def test_without_a_grammar_none_is_loaded(longvlm):
    engine = Engine(longvlm, GREEDY)
    prefix = VideoPrefix(torch.zeros(4, longvlm.mm_hidden_size))
    assert answers(engine, [Group(prefix, [Request("it", "What?", max_new_tokens=3)])])
    assert "tokens" not in vars(engine._speller)
