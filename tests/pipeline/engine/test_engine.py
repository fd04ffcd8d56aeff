import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.reference import PlainTokens
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.models.longvlm.model import load_longvlm
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.prompt import tidy
from longvlm.schemas.errors import ErrorCode, InputError
from longvlm.schemas.recipe import AnswerRecipe
from support import moved

GREEDY = AnswerRecipe("model", "weights", "index", precision="float32", max_new_tokens=16)
SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.9)
WORDS = "what happens where is the red blue square who walks in street count all people dogs cats please why".split()  # noqa: SIM905 - a list of 20 lines reads worse


@pytest.fixture(scope="module")
def served(untrained_folder, device):
    """The engines' own: an engine takes over a model's attention."""
    return load_longvlm(str(untrained_folder), device=str(device))


@pytest.fixture(scope="module")
def grouped(untrained, device):
    """A model whose key heads serve two query heads each, for engines, and the plain one."""
    config = {**untrained.llm.config.to_dict(), "num_key_value_heads": 2}
    torch.manual_seed(3)
    plain = replace(untrained, llm=LlamaForCausalLM(LlamaConfig(**config)).eval())
    return moved(plain, device), plain


def group(num_rows, *questions, seed=0, **options):
    prefix = VideoPrefix(torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(seed)))
    return Group(prefix, [q if isinstance(q, Request) else Request((seed, q), q, **options) for q in questions])


@pytest.fixture
def groups():
    asked = ["What happens?", "Describe the large yellow square in detail, then count the stars.", "Why?", "Who?"]
    return [group(n, *asked, seed=n) for n in (9, 40, 1, 23)]


def answers(model, groups, recipe=GREEDY, **settings):
    engine = Engine(model, recipe, settings.pop("kv_bytes", None))
    for name, value in settings.items():
        setattr(engine, name, value)
    return {answer.key: answer for answer in engine.answer(iter(groups))}


def embedded(model, prefix, question):
    prompt = model.lay_out(question, len(prefix.rows), GREEDY.template)
    embeds = model.llm.get_input_embeddings()(torch.tensor(prompt.ids, device=model.device)).clone()
    embeds[prompt.first_patch : prompt.first_patch + prompt.num_patches] = model.read(prefix).embeds
    return embeds


def alone(model, prefix, question, most):
    """Greedy ids by whole forward passes without any cache."""
    (ids,) = ways(model, prefix, question, most, slack=0.0)
    return ids


@torch.inference_mode()
def ways(model, prefix, question, most, slack):
    """All greedy ids there are if a token may be taken whose logit is less than `slack` below the best."""
    begun, ended = [([], embedded(model, prefix, question))], []
    while begun:
        ids, embeds = begun.pop()
        logits = model.llm(inputs_embeds=embeds[None], logits_to_keep=1).logits[0, -1]
        logits[list(model.banned_ids)] = float("-inf")
        near = (logits > logits.max() - slack).nonzero().flatten().tolist()
        for token in {int(logits.argmax()), *near}:
            more = torch.cat([embeds, model.llm.get_input_embeddings()(torch.tensor([token]))])
            is_done = len(ids) + 1 == most or token in model.eos_ids
            (ended if is_done else begun).append(([*ids, token], more))
    return [ids for ids, _ in ended]


@torch.inference_mode()
def likelihoods(model, prefix, question, options):
    """Each option's share, by a plain forward pass an option."""
    ids = model.option_ids(options)
    ids = [(*own, model.eos_ids[0]) if any(own == o[: len(own)] != o for o in ids) else own for own in ids]
    embeds, totals = embedded(model, prefix, question), []
    for own in ids:
        whole = torch.cat([embeds, model.llm.get_input_embeddings()(torch.tensor(own))])
        logp = model.llm(inputs_embeds=whole[None]).logits[0].log_softmax(-1)
        totals.append(sum(logp[len(embeds) - 1 + i, token] for i, token in enumerate(own)))
    return torch.stack(totals).softmax(0)


QUESTIONS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=14).map(" ".join)
TIE = {"cpu": 0.0, "cuda": 1e-4}  # logits nearer than this may change places: a GPU adds up in another order
OPTIONS = st.sampled_from([(), (), (), ("yes", "no"), ("red", "blue car", "red car", "two red dogs")])
MIXES = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.tuples(QUESTIONS, OPTIONS), min_size=1, max_size=6)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mix=MIXES,
    max_rows=st.integers(1, 9),
    kv_tokens=st.sampled_from([200, 400, 10_000]),
    ends=st.sets(st.integers(3, 400), max_size=120),
    most=st.integers(1, 14),
    is_grouped=st.booleans(),
)
def test_any_mix_gives_every_row_what_it_gets_alone(  # noqa: PLR0917 - hypothesis and fixtures
    served, untrained, grouped, device, agree, mix, max_rows, kv_tokens, ends, most, is_grouped
):
    ours, plain = grouped if is_grouped else (served, untrained)
    ours, plain = (replace(model, eos_ids=(2, *ends)) for model in (ours, plain))
    groups = [
        Group(
            VideoPrefix(torch.randn(n, 64, generator=torch.Generator().manual_seed(100 * v + n))),
            [Request((v, i), question, options) for i, (question, options) in enumerate(questions)],
        )
        for v, (n, questions) in enumerate(mix)
    ]
    engine = Engine(ours, replace(GREEDY, max_new_tokens=most))
    engine.max_rows, engine.kv_bytes = max_rows, kv_tokens * engine._batch.bytes_per_token
    found = {answer.key: answer for answer in engine.answer(iter(groups))}
    assert len(found) == sum(len(g.requests) for g in groups)
    for g in groups:
        for request in g.requests:
            answer = found[request.key]
            assert answer.error is None
            if request.options:
                shares = likelihoods(plain, g.prefix, request.question, request.options)
                chosen = request.options.index(answer.text)
                assert chosen == shares.argmax() or shares[chosen] > shares.max() - TIE[device.type]
                agree(answer.confidence, shares.max(), atol=1e-4)
            else:
                found_ways = ways(plain, g.prefix, request.question, most, TIE[device.type])
                assert (answer.text, answer.num_new_tokens) in [(plain.decode(ids), len(ids)) for ids in found_ways]


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["full", "base"])
def test_greedy_ids_are_the_reference_s(record, layout, device):
    model = replace(moved(record.golden.models[layout], device), use_start_end=record.use_start_end)
    recipe = replace(GREEDY, max_new_tokens=record.golden.about["max_new_tokens"])
    (answer,) = answers(
        model, [Group(VideoPrefix(record.prefix), [Request("it", record.about["question"])])], recipe
    ).values()
    assert answer.text == model.decode(record.array("greedy").tolist())
    assert answer.num_new_tokens == len(record.array("greedy"))


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["full", "base"])
def test_logits_are_the_reference_s(record, layout, device, agree):
    model = replace(moved(record.golden.models[layout], device), use_start_end=record.use_start_end)
    with torch.inference_mode():
        embeds = embedded(model, VideoPrefix(record.prefix), record.about["question"])
        logits = model.llm(inputs_embeds=embeds[None], logits_to_keep=1).logits[0, -1]
    rows = len(logits) if layout == "full" else record.golden.about["V"]  # a base has no head for the video tokens
    wanted = torch.from_numpy(record.array("logits_last"))
    agree(logits[:rows], wanted[:rows], atol=1e-4)


@pytest.mark.parity
def test_a_batch_of_all_prompts_gives_the_reference_s_answers(golden, device):
    model = moved(golden.models["full"], device)
    local, memory = (torch.from_numpy(golden.arrays[name]) for name in ("local", "memory"))
    groups, wanted = [], {}
    for about in golden.about["records"]:
        if about.get("use_vid_start_end", True):
            prefix = torch.cat([memory[len(memory) - (about["video_token_len"] - len(local)) :], local])
            groups.append(Group(VideoPrefix(prefix), [Request(about["key"], about["question"])]))
            wanted[about["key"]] = about
    recipe = replace(GREEDY, max_new_tokens=golden.about["max_new_tokens"])
    for key, answer in answers(model, groups, recipe, max_rows=3).items():
        assert answer.text == tidy(wanted[key]["decoded"])
        assert answer.num_new_tokens == wanted[key]["n_new"]
        assert answer.num_prompt_tokens == wanted[key]["n_fast"]
        assert answer.num_visual_tokens == wanted[key]["video_token_len"]


def texts(found):
    return {key: answer.text for key, answer in found.items()}


def test_a_sampled_answer_does_not_depend_on_its_batch(served, groups):
    together = texts(answers(served, groups, SAMPLED))
    assert together == texts(answers(served, groups[::-1], SAMPLED, max_rows=3))
    assert together == {key: text for g in groups for key, text in texts(answers(served, [g], SAMPLED)).items()}
    assert len(set(together.values())) > len(together) // 2


def test_sampling_follows_the_seed_and_not_the_global_one(served, groups):
    torch.manual_seed(1)
    one = texts(answers(served, groups, SAMPLED))
    torch.manual_seed(2)
    assert one == texts(answers(served, groups, SAMPLED))
    assert one != texts(answers(served, groups, replace(SAMPLED, seed=1)))
    assert one != texts(answers(served, groups))


def test_counts_latency_and_attention_come_with_each_answer(served, groups):
    found = answers(served, groups)
    for g in groups:
        for request in g.requests:
            answer = found[request.key]
            assert answer.num_visual_tokens == len(g.prefix.rows)
            assert answer.num_prompt_tokens > answer.num_visual_tokens
            assert 1 <= answer.num_new_tokens <= GREEDY.max_new_tokens
            assert answer.latency_ms > 0
            assert answer.attention.shape == (len(g.prefix.rows),)
            assert 0 < answer.attention.sum() < 1


@torch.inference_mode()
def test_attention_is_that_of_a_plain_forward_pass(served, untrained, agree):
    g = group(20, "What happens in the street?", seed=5)
    (answer,) = answers(served, [g], max_rows=1).values()
    ids = alone(untrained, g.prefix, "What happens in the street?", GREEDY.max_new_tokens)
    plain = copy.deepcopy(untrained.llm)
    plain.set_attn_implementation("eager")
    embeds = embedded(untrained, g.prefix, "What happens in the street?")
    whole = torch.cat([embeds, plain.get_input_embeddings()(torch.tensor(ids[:-1]))])
    weights = plain(inputs_embeds=whole[None], output_attentions=True).attentions[0][0]  # layer 0 of 2 is watched
    first = untrained.lay_out("What?", 1, GREEDY.template).first_patch
    wanted = weights[:, len(embeds) - 1 :, first : first + 20].mean(dim=(0, 1))
    agree(answer.attention, wanted, atol=1e-5, rtol=1e-4)


def test_attention_of_an_option_is_that_of_what_made_it_likely(served):
    g = group(20, Request("it", "Is it red?", ("yes", "red car")), seed=5)
    (answer,) = answers(served, [g]).values()
    assert answer.num_new_tokens == 0
    assert 0 < answer.attention.sum() < 1


def test_memory_for_keys_and_values_stays_within_what_it_may_take(served):
    engine = Engine(served, GREEDY)
    engine.kv_bytes = 600 * engine._batch.bytes_per_token
    most, decode = 0, engine._batch.decode

    def watched(extend):
        nonlocal most
        decode(extend)
        layers = engine._batch.prefix_kv.layers + engine._batch.tail_kv.layers
        most = max(most, sum(layer.nbytes for layer in layers))

    engine._batch.decode = watched
    many = [group(9 + n % 5, *(f"{word} {n}" for word in WORDS), seed=n) for n in range(6)]
    assert len(list(engine.answer(iter(many)))) == 6 * len(WORDS)
    assert 0 < most <= engine.kv_bytes


def test_groups_are_taken_only_as_there_is_room(served):
    taken = []

    def source():
        for n in range(20):
            taken.append(n)
            yield group(4, "Who?", "Why?", seed=n)

    engine = Engine(served, GREEDY)
    engine.max_rows = 4
    stream = engine.answer(source())
    next(stream)
    assert len(taken) <= 4
    assert len(list(stream)) == 39


def test_out_of_memory_halves_the_batch_and_loses_nothing(served, groups):
    wanted = texts(answers(served, groups))
    engine = Engine(served, GREEDY)
    engine.max_rows = 16
    decode = engine._batch.decode
    failures = iter([False, False, True, False, True])

    def failing(extend):
        if next(failures, False):
            raise torch.OutOfMemoryError
        decode(extend)

    engine._batch.decode = failing
    assert {answer.key: answer.text for answer in engine.answer(iter(groups))} == wanted
    assert engine.max_rows == 4


def test_one_row_that_never_fits_fails_and_the_others_go_on(served):
    engine = Engine(served, GREEDY)
    engine.kv_bytes = 200 * engine._batch.bytes_per_token
    big, small = group(300, "What?", seed=1), group(5, "What?", seed=2)
    found = {answer.key: answer for answer in engine.answer(iter([big, small]))}
    assert found[1, "What?"].error.code is ErrorCode.MEMORY_LIMIT
    assert found[2, "What?"].text


def test_a_request_may_ask_for_fewer_tokens(served):
    found = answers(served, [group(7, Request("short", "Why?", max_new_tokens=3), Request("long", "Why?"))])
    assert found["short"].num_new_tokens == 3
    assert found["long"].text.startswith(found["short"].text)


def test_untrained_rows_of_the_head_are_never_emitted(untrained_folder, groups, device):
    model = load_longvlm(str(untrained_folder), device=str(device))
    assert [model.tokenizer.id_to_token(i) for i in model.banned_ids] == ["<vid_patch>", "<vid_start>", "<vid_end>"]
    wanted = texts(answers(model, groups))
    head = model.llm.lm_head.weight
    head[list(model.banned_ids)] = 100 * head[:3]
    assert texts(answers(model, groups)) == wanted
    assert texts(answers(replace(model, banned_ids=()), groups)) != wanted


def test_one_that_cannot_be_answered_leaves_the_others_alone(served, groups):
    broken = groups[0].prefix.rows.clone()
    broken[3, 5] = float("nan")
    bad = {
        "nan": Group(VideoPrefix(broken), [Request("nan", "What?")]),
        "none": Group(VideoPrefix(torch.empty(0, 64)), [Request("none", "What?")]),
        "long": Group(VideoPrefix(torch.zeros(served.context, 64)), [Request("long", "What?")]),
        "mark": Group(groups[0].prefix, [Request("mark", "What is <vid_end>?")]),
        "overflow": Group(VideoPrefix(torch.full((2, 64), 3e38)), [Request("overflow", "What?")]),
        "options": Group(VideoPrefix(torch.full((2, 64), 3e38)), [Request("options", "What?", ("yes", "no"))]),
        "alike": Group(groups[0].prefix, [Request("alike", "What?", ("zebra", "gnu"))]),
    }
    mixed = [g for pair in zip(bad.values(), [*groups, *groups[:3]], strict=True) for g in pair]
    found = answers(served, mixed)
    assert texts(found).items() >= texts(answers(served, groups)).items()
    assert {key: found[key].error.code for key in bad} == {
        "nan": ErrorCode.BAD_TOKENS,
        "none": ErrorCode.BAD_TOKENS,
        "long": ErrorCode.PROMPT_TOO_LONG,
        "mark": ErrorCode.ANSWER_FAILED,
        "overflow": ErrorCode.ANSWER_FAILED,
        "options": ErrorCode.ANSWER_FAILED,
        "alike": ErrorCode.ANSWER_FAILED,
    }
    assert all(found[key].text is None for key in bad)
    assert str(served.context - 1) in str(found["long"].error)
    assert found["nan"].num_visual_tokens == len(broken)


def test_an_answer_ends_where_the_context_does(served, monkeypatch):
    g = group(9, "What happens?")
    (answer,) = answers(served, [g]).values()
    monkeypatch.setattr(served.llm.config, "max_position_embeddings", answer.num_prompt_tokens + 4)
    assert next(iter(answers(served, [g]).values())).num_new_tokens == 4
    monkeypatch.setattr(served.llm.config, "max_position_embeddings", answer.num_prompt_tokens)
    assert next(iter(answers(served, [g]).values())).error.code is ErrorCode.PROMPT_TOO_LONG


def test_tokens_of_another_tower_are_refused_naming_both_widths(served):
    with pytest.raises(InputError, match=r"shape \[4, 32\].* takes \[tokens, 64\]"):
        answers(served, [Group(VideoPrefix(torch.zeros(4, 32)), [Request("it", "What?")])])


def test_a_template_that_the_model_lacks_is_refused(served, groups):
    with pytest.raises(InputError, match="no_such"):
        answers(served, groups, replace(GREEDY, template="no_such"))


def test_nothing_is_printed(served, groups, capfd, recwarn):
    assert len(answers(served, groups, SAMPLED)) == 16
    assert answers(served, []) == {}
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_it_counts_what_it_does(served, groups):
    engine = Engine(served, GREEDY)
    found = list(engine.answer(iter(groups)))
    stats = engine.stats
    first = served.lay_out("?", 1, GREEDY.template).first_patch
    prefixes = sum(first + len(g.prefix.rows) for g in groups)
    suffixes = sum(a.num_prompt_tokens - first - a.num_visual_tokens for a in found)
    assert stats.prefill_tokens == prefixes + suffixes
    assert stats.decode_tokens == sum(a.num_new_tokens - 1 for a in found)
    assert len(found) == 16
    assert min(stats.prefill_s, stats.decode_s, stats.num_steps) > 0


def test_half_precision_answers_too(untrained_folder, groups, device):
    for precision in ("bfloat16", "float16"):
        model = load_longvlm(str(untrained_folder), precision, str(device))
        found = answers(model, groups, replace(GREEDY, precision=precision))
        assert all(answer.text and answer.error is None for answer in found.values())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_temperature_brings_shares_nearer_and_chooses_nothing_else(served, untrained, device, temperature):
    options = ("red", "blue car", "red car", "two red dogs")
    asked = [group(9, "What is red?", options=options)]
    (found,) = answers(replace(served, option_temperature=temperature), asked).values()
    (cold,) = answers(served, asked).values()
    wanted = (likelihoods(untrained, asked[0].prefix, "What is red?", options).double().log() / temperature).softmax(0)
    torch.testing.assert_close(torch.tensor(found.shares), wanted, atol=1e-4, rtol=1e-3, check_dtype=False)
    assert found.text == cold.text == options[int(wanted.argmax())]
    assert found.confidence == max(found.shares)
    one_by_one = PlainTokens(replace(moved(untrained, device), option_temperature=temperature), GREEDY)
    plain = one_by_one.answer(one_by_one.show(asked[0].prefix), asked[0].requests[0])
    torch.testing.assert_close(torch.tensor(plain.shares), torch.tensor(found.shares), atol=1e-4, rtol=1e-3)
