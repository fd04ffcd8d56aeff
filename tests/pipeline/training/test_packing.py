from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from longvlm.pipeline.models.llava.model import load_llava
from longvlm.pipeline.models.longvlm.model import load_longvlm
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.training.packing import PAD, Lesson, Speller, lay_side_by_side, pack
from longvlm.pipeline.training.parameters import Trainee
from longvlm.schemas.errors import InputError
from longvlm.schemas.training import full
from models import LLAVAS

RECIPE = replace(full(), precision="float32", gradient_checkpointing=False)
TALKS = [
    (("What is red?", "the square"),),
    (("Describe the video.", "a large yellow square moves to the left and then it stops"), ("And then?", "it falls")),
    (("Is it night?", "yes"),),
    (("Who walks in the street?", "nobody"),),
]


@pytest.fixture
def model(untrained_folder):
    return load_longvlm(str(untrained_folder))


def lesson(num_rows, talks, seed=0):
    return Lesson(VideoPrefix(torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(seed))), talks)


def speller_of(model):
    return Speller(model, model.templates[0])


def loss_and_gradients(model, packs, lessons, average):
    """Of a model on any device."""
    trainee = Trainee(model, RECIPE)
    trainee.zero_grad()
    sheet = lay_side_by_side(packs, average, model.device)
    loss = trainee(lessons, sheet) / sheet.weights.sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainee.named_parameters() if p.grad is not None}


def plain_loss(model, lessons, average):
    """Every conversation alone, by transformers' own forward and the text-book loss."""
    speller, answers = speller_of(model), []
    for one in lessons:
        for turns in one.conversations:
            branch = speller.spell(turns)
            rows = model.project(one.prefix)
            ids = torch.from_numpy(np.concatenate([speller.before, branch.ids]))
            words = model.llm.get_input_embeddings()(ids)
            at = len(speller.before)
            embeds = torch.cat([words[:at], rows, words[at:]])
            logits = model.llm(inputs_embeds=embeds[None]).logits[0]
            each = nn.functional.cross_entropy(logits[at + len(rows) - 1 : -1], ids[at:], reduction="none")
            answers += [each[branch.answer == number] for number in range(len(turns))]
    return torch.stack([one.mean() for one in answers]).mean() if average == "answer" else torch.cat(answers).mean()


@pytest.mark.parametrize("average", ["token", "answer"])
def test_packed_is_as_unpacked(model, untrained_folder, average, device, agree):
    lessons = [lesson(9, TALKS), lesson(21, TALKS[1:3], seed=1), lesson(3, TALKS[:1], seed=2)]
    packed = pack(speller_of(model), lessons, 2048).packs
    assert [len(one.branches) for one in packed] == [4, 2, 1]
    there = load_longvlm(str(untrained_folder), device=str(device))
    loss, gradients = loss_and_gradients(there, packed, lessons, average)
    model.llm.requires_grad_()
    model.projector.requires_grad_()
    plain = plain_loss(model, lessons, average)
    plain.backward()
    agree(loss, plain, atol=1e-5)
    expected = {
        **{f"llm.{name}": p.grad for name, p in model.llm.named_parameters()},
        **{f"projector.{name}": p.grad for name, p in model.projector.named_parameters()},
    }
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        agree(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_one_pack_moves_to_the_next_whole(model):
    lessons, speller = [lesson(40, TALKS)], speller_of(model)
    whole = pack(speller, lessons, 2048)
    limit = whole.packs[0].num_positions - 1
    cut = pack(speller, lessons, limit)
    assert len(cut.packs) == 2
    assert all(one.num_positions <= limit for one in cut.packs)
    assert [branch.ids.tolist() for one in cut.packs for branch in one.branches] == [
        branch.ids.tolist() for branch in whole.packs[0].branches
    ]
    assert loss_and_gradients(model, cut.packs, lessons, "token")[0] == pytest.approx(
        loss_and_gradients(model, whole.packs, lessons, "token")[0], abs=1e-5
    )


def test_a_conversation_longer_than_any_pack_is_refused_and_the_others_stay(model):
    lessons = [lesson(40, [*TALKS[:2], (("What?", "a " * 500),)])]
    packed = pack(speller_of(model), lessons, 400)
    ((number, place, reason),) = packed.refused
    assert (number, place) == (0, 2)
    assert "40 visual tokens and the conversation make" in reason
    assert "more than the 400 that a sequence may have" in reason
    assert [len(one.branches) for one in packed.packs] == [2]


@pytest.mark.parametrize(
    ("talk", "said"),
    [
        ((("Is <vid_patch> red?", "no"),), "mark the video's place"),
        ((("What?", "red </s> blue"),), "holds a mark"),
        ((("What?", "no"), ("And </s> then?", "yes")), "holds a mark"),
        ((("What?", ""),), "has no tokens of its own"),
    ],
)
def test_marks_and_empty_answers_are_refused(model, talk, said):
    packed = pack(speller_of(model), [lesson(4, [talk])], 400)
    assert packed.packs == []
    assert said in packed.refused[0][2]


def test_ids_are_those_that_the_model_is_asked_and_answers_with(model):
    turns = (("Is it red?", "a red ball"), ("Why?", "yes"))
    branch = speller_of(model).spell(turns)
    prompt = model.lay_out("Is it red?", 1, "long_vlm_v1")
    after = prompt.ids[prompt.first_patch + 1 :]
    assert tuple(branch.ids[: len(after)]) == after
    assert (branch.answer[: len(after)] == PAD).all()
    (told,) = model.option_ids(["a red ball"])
    answered = slice(len(after), len(after) + len(told) + 1)
    assert tuple(branch.ids[answered]) == (*told, 2)
    assert set(branch.answer[answered]) == {0}
    text = model.tokenizer.encode("</s>USER: Why? ASSISTANT: yes</s>", add_special_tokens=False).ids
    assert branch.ids[answered.stop - 1 :].tolist() == text
    assert model.decode(branch.ids[branch.answer == 1]) == "yes"


@pytest.mark.parity
@pytest.mark.parametrize("template", ["long_vlm_v1", "vicuna_v1"])
def test_piecewise_ids_are_those_of_whole_rounds(golden, template):
    model = golden.models["full"]
    turns = (("What  is it?", "The man holds a rope."), ("And then?", "It ends, at 12."))
    speller = Speller(model, template)
    ids = [*speller.before, *speller.spell(turns).ids]
    whole = [
        f"<vid_start><vid_patch><vid_end>\n{turns[0][0]} ASSISTANT: {turns[0][1]}",
        f"USER: {turns[1][0]} ASSISTANT: {turns[1][1]}",
    ]  # the reference's fast tokenizer does not know </s> within a text, so a round at a time
    rounds = [[*model.tokenizer.encode(text, add_special_tokens=False).ids, 2] for text in whole]
    expected = [*rounds[0], *rounds[1]]
    patch = expected.index(model.tokenizer.token_to_id("<vid_patch>"))
    assert ids[len(speller.before) :] == expected[patch + 1 :]


@pytest.mark.parametrize("family", list(LLAVAS))
@pytest.mark.parametrize("num_whole_frames", [None, 2])
def test_rows_of_llavas_are_counted_and_trained(folders, family, num_whole_frames, device):
    model = load_llava(str(folders[family]), device=str(device))
    prefix = VideoPrefix(torch.randn(32, 64), num_whole_frames)
    one = Lesson(prefix, [(("What?", "red"),)])
    assert model.count_rows(prefix) == len(model.project(prefix))
    packed = pack(speller_of(model), [one], 2048)
    loss, gradients = loss_and_gradients(model, packed.packs, [one], "token")
    assert 0 < loss < 20
    assert gradients["projector.linear_1.weight"].abs().sum() > 0
    (refused,) = pack(speller_of(model), [Lesson(prefix, [(("What?", "red"), ("Why?", "so"))])], 2048).refused
    assert "one question at a time" in refused[2]


def test_texts_are_tokenized_once(model, monkeypatch):
    speller, calls = speller_of(model), []
    monkeypatch.setattr(type(model), "option_ids", lambda _, options: calls.append(options) or [(5,)])
    for _ in range(3):
        speller.spell((("What?", "red"),))
    assert calls == [["red"]]
    with pytest.raises(InputError, match="is not known"):
        Speller(model, "other")
