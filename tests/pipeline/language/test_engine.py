from dataclasses import replace

import pytest
import torch

from pipeline.language.engine import Request, _choose, _generate, _prepare, _Ready, answer_batch
from pipeline.language.longvlm import load_longvlm
from pipeline.language.prompt import tidy
from schemas.errors import ErrorCode, InputError
from schemas.recipe import AnswerRecipe

GREEDY = AnswerRecipe("model", "weights", "index", precision="float32", max_new_tokens=16)
SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.9)
LOGITS_WITHIN = 1e-4


def reference_recipe(golden):
    return replace(GREEDY, max_new_tokens=golden.about["max_new_tokens"])


def ready(model, record):
    request = Request(record.prefix, record.about["question"])
    return _prepare(replace(model, use_start_end=record.use_start_end), 0, request, reference_recipe(record.golden))


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["full", "base"])
def test_logits_are_the_reference_s(record, layout):
    model = record.golden.models[layout]
    with torch.inference_mode():
        logits = model.llm(inputs_embeds=ready(model, record).embeds[None], logits_to_keep=1).logits[0, -1]
    rows = len(logits) if layout == "full" else record.golden.about["V"]  # a base has no head for the video tokens
    wanted = torch.from_numpy(record.array("logits_last"))
    torch.testing.assert_close(logits[:rows], wanted[:rows], rtol=0, atol=LOGITS_WITHIN)


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["full", "base"])
def test_greedy_ids_are_the_reference_s(record, layout):
    model = record.golden.models[layout]
    (ids,) = _generate(model, [ready(model, record)], reference_recipe(record.golden))
    assert ids == record.array("greedy").tolist()


@pytest.mark.parity
def test_a_batch_of_all_prompts_gives_the_reference_s_ids(golden):
    records = [(i, about) for i, about in enumerate(golden.about["records"]) if about.get("use_vid_start_end", True)]
    model = golden.models["full"]
    local, memory = (torch.from_numpy(golden.arrays[name]) for name in ("local", "memory"))
    requests = [
        Request(torch.cat([memory[len(memory) - (about["video_token_len"] - len(local)) :], local]), about["question"])
        for _, about in records
    ]
    answers = answer_batch(model, requests, reference_recipe(golden))
    for answer, (_, about) in zip(answers, records, strict=True):
        assert answer.text == tidy(model.decode(golden.arrays[f"{about['key']}_greedy"].tolist()))
        assert answer.text == tidy(about["decoded"])
        assert answer.num_new_tokens == about["n_new"]
        assert answer.num_prompt_tokens == about["n_fast"]
        assert answer.num_visual_tokens == about["video_token_len"]


@pytest.fixture(scope="module")
def requests():
    generator = torch.Generator().manual_seed(7)
    questions = ["What happens?", "Describe the large yellow square in detail, then count the stars.", "Why?", "Who?"]
    return [
        Request(torch.randn(n, 64, generator=generator), question)
        for n, question in zip((9, 40, 1, 23), questions, strict=True)
    ]


@pytest.mark.parametrize("recipe", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_does_not_depend_on_its_batch(untrained, requests, recipe):
    batch = [answer.text for answer in answer_batch(untrained, requests, recipe)]
    assert batch == [answer_batch(untrained, [request], recipe)[0].text for request in requests]
    assert batch[::-1] == [answer.text for answer in answer_batch(untrained, requests[::-1], recipe)]
    assert len(set(batch)) == len(batch)


def test_sampling_follows_the_seed_and_not_the_global_one(untrained, requests):
    torch.manual_seed(1)
    one = [answer.text for answer in answer_batch(untrained, requests, SAMPLED)]
    torch.manual_seed(2)
    assert one == [answer.text for answer in answer_batch(untrained, requests, SAMPLED)]
    assert one != [answer.text for answer in answer_batch(untrained, requests, replace(SAMPLED, seed=1))]
    assert one != [answer.text for answer in answer_batch(untrained, requests, GREEDY)]


def test_counts_and_latency_come_with_each_answer(untrained, requests):
    answers = answer_batch(untrained, requests, GREEDY)
    for answer, request in zip(answers, requests, strict=True):
        assert answer.error is None
        assert answer.num_visual_tokens == len(request.prefix)
        assert answer.num_prompt_tokens > answer.num_visual_tokens
        assert 1 <= answer.num_new_tokens <= GREEDY.max_new_tokens
    assert len({answer.latency_ms for answer in answers}) == 1
    assert answers[0].latency_ms > 0


def test_a_row_stops_at_the_end_mark_and_the_others_go_on(untrained, requests):
    rows = [_prepare(untrained, i, request, GREEDY) for i, request in enumerate(requests)]
    free = _generate(untrained, rows, GREEDY)
    end = free[0][2]
    stopped = _generate(replace(untrained, eos_ids=(*untrained.eos_ids, end)), rows, GREEDY)
    for ids, all_ids in zip(stopped, free, strict=True):
        assert ids == (all_ids[: all_ids.index(end) + 1] if end in all_ids else all_ids)
    assert len(stopped[0]) <= 3


def test_untrained_rows_of_the_head_are_never_emitted(untrained_folder, requests):
    model = load_longvlm(str(untrained_folder))
    assert [model.tokenizer.id_to_token(i) for i in model.banned_ids] == ["<vid_patch>", "<vid_start>", "<vid_end>"]
    head = model.llm.lm_head.weight
    head[list(model.banned_ids)] = 100 * head[:3]
    for recipe in (GREEDY, SAMPLED):
        rows = [_prepare(model, i, request, recipe) for i, request in enumerate(requests)]
        allowed = {token for ids in _generate(model, rows, recipe) for token in ids}
        anything = {token for ids in _generate(replace(model, banned_ids=()), rows, recipe) for token in ids}
        assert not allowed & set(model.banned_ids)
        assert anything & set(model.banned_ids)


def test_one_that_cannot_be_answered_leaves_the_others_alone(untrained, requests):
    broken = requests[0].prefix.clone()
    broken[3, 5] = float("nan")
    bad = [
        Request(broken, "What?"),
        Request(torch.empty(0, 64), "What?"),
        Request(torch.zeros(untrained.context, 64), "What?"),
        Request(requests[0].prefix, "What is <vid_end>?"),
        Request(torch.full((2, 64), 3e38), "What?"),
    ]
    mixed = [request for pair in zip(bad, [*requests, requests[0]], strict=True) for request in pair]
    answers = answer_batch(untrained, mixed, GREEDY)
    good = [answer.text for answer in answer_batch(untrained, requests, GREEDY)]
    assert [answer.text for answer in answers[1::2]] == [*good, good[0]]
    codes = [answer.error.code for answer in answers[::2]]
    assert codes == [
        ErrorCode.BAD_TOKENS,
        ErrorCode.BAD_TOKENS,
        ErrorCode.PROMPT_TOO_LONG,
        ErrorCode.ANSWER_FAILED,
        ErrorCode.ANSWER_FAILED,
    ]
    assert all(answer.text is None for answer in answers[::2])
    assert str(untrained.context) in str(answers[4].error)
    assert answers[0].num_visual_tokens == len(broken)


def test_an_answer_ends_where_the_context_does(untrained, requests, monkeypatch):
    num_prompt_tokens = answer_batch(untrained, requests[:1], GREEDY)[0].num_prompt_tokens
    monkeypatch.setattr(untrained.llm.config, "max_position_embeddings", num_prompt_tokens + 4)
    assert answer_batch(untrained, requests[:1], GREEDY)[0].num_new_tokens == 4
    monkeypatch.setattr(untrained.llm.config, "max_position_embeddings", num_prompt_tokens)
    assert answer_batch(untrained, requests[:1], GREEDY)[0].error.code is ErrorCode.PROMPT_TOO_LONG


def test_tokens_of_another_tower_are_refused_naming_both_widths(untrained):
    with pytest.raises(InputError, match=r"shape \[4, 32\].* takes \[tokens, 64\]"):
        answer_batch(untrained, [Request(torch.zeros(4, 32), "What?")], GREEDY)


def test_nothing_is_printed(untrained, requests, capfd, recwarn):
    answer_batch(untrained, requests, SAMPLED)
    assert answer_batch(untrained, [], GREEDY) == []
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_sampling_draws_from_the_softmax_cut_at_top_p(untrained):
    logits = torch.full((1, untrained.llm.config.vocab_size), -50.0)
    logits[0, :4] = torch.tensor([0.6, 0.25, 0.1, 0.05]).log()
    row = _Ready(0, torch.empty(0, 0), 1, torch.Generator().manual_seed(0))

    def shares(recipe):
        drawn = torch.tensor([_choose(logits.clone(), [row], untrained, recipe)[0] for _ in range(2000)])
        return torch.bincount(drawn, minlength=5)[:5] / 2000

    free = replace(GREEDY, temperature=1.0)
    wanted = torch.tensor([0.6, 0.25, 0.1, 0.05, 0])
    torch.testing.assert_close(shares(free), wanted, atol=0.04, rtol=0)
    torch.testing.assert_close(
        shares(replace(free, top_p=0.8)), torch.tensor([0.6, 0.25, 0, 0, 0]) / 0.85, atol=0.04, rtol=0
    )
    squared = wanted**2 / (wanted**2).sum()
    torch.testing.assert_close(shares(replace(free, temperature=0.5)), squared, atol=0.04, rtol=0)
    assert shares(replace(free, top_p=0.0))[0] == 1
