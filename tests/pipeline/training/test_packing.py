from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from longvlm.pipeline.models.llava.model import load_llava
from longvlm.pipeline.models.longvlm.model import load_longvlm
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.training.packing import PAD, ConversationTokenizer, Example, collate, pack
from longvlm.pipeline.training.parameters import TrainableModel
from longvlm.schemas.errors import InputError
from longvlm.schemas.training import full
from models import LLAVAS

RECIPE = replace(full(), precision="float32", gradient_checkpointing=False)
CONVERSATIONS = [
    (("What is red?", "the square"),),
    (("Describe the video.", "a large yellow square moves to the left and then it stops"), ("And then?", "it falls")),
    (("Is it night?", "yes"),),
    (("Who walks in the street?", "nobody"),),
]


@pytest.fixture
def model(untrained_folder):
    return load_longvlm(str(untrained_folder))


def example(num_rows, conversations, seed=0):
    prefix = VideoPrefix(torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(seed)))
    return Example(prefix, conversations)


def tokenizer_of(model):
    return ConversationTokenizer(model, model.templates[0])


def loss_and_gradients(model, sequences, examples, average):
    """Of a model on any device."""
    trainable = TrainableModel(model, RECIPE)
    trainable.zero_grad()
    batch = collate(sequences, average, model.device)
    loss = trainable(examples, batch) / batch.weights.sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainable.named_parameters() if p.grad is not None}


def plain_loss(model, examples, average):
    """Every conversation alone, by transformers' own forward and the text-book loss."""
    tokenizer, answers = tokenizer_of(model), []
    for one in examples:
        for turns in one.conversations:
            conversation = tokenizer.tokenize(turns)
            rows = model.read(one.prefix).embeds
            ids = torch.from_numpy(np.concatenate([tokenizer.head_ids, conversation.ids]))
            words = model.llm.get_input_embeddings()(ids)
            at = len(tokenizer.head_ids)
            embeds = torch.cat([words[:at], rows, words[at:]])
            logits = model.llm(inputs_embeds=embeds[None]).logits[0]
            each = nn.functional.cross_entropy(logits[at + len(rows) - 1 : -1], ids[at:], reduction="none")
            answers += [each[conversation.answer_index == number] for number in range(len(turns))]
    return torch.stack([one.mean() for one in answers]).mean() if average == "answer" else torch.cat(answers).mean()


@pytest.mark.parametrize("average", ["token", "answer"])
def test_packed_is_as_unpacked(model, untrained_folder, average, device, agree):
    examples = [
        example(9, CONVERSATIONS),
        example(21, CONVERSATIONS[1:3], seed=1),
        example(3, CONVERSATIONS[:1], seed=2),
    ]
    packed = pack(tokenizer_of(model), examples, 2048).sequences
    assert [len(one.conversations) for one in packed] == [4, 2, 1]
    there = load_longvlm(str(untrained_folder), device=str(device))
    loss, gradients = loss_and_gradients(there, packed, examples, average)
    model.llm.requires_grad_()
    model.projector.requires_grad_()
    plain = plain_loss(model, examples, average)
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
    examples, tokenizer = [example(40, CONVERSATIONS)], tokenizer_of(model)
    whole = pack(tokenizer, examples, 2048)
    limit = whole.sequences[0].length - 1
    cut = pack(tokenizer, examples, limit)
    assert len(cut.sequences) == 2
    assert all(one.length <= limit for one in cut.sequences)
    assert [conversation.ids.tolist() for one in cut.sequences for conversation in one.conversations] == [
        conversation.ids.tolist() for conversation in whole.sequences[0].conversations
    ]
    assert loss_and_gradients(model, cut.sequences, examples, "token")[0] == pytest.approx(
        loss_and_gradients(model, whole.sequences, examples, "token")[0], abs=1e-5
    )


def test_a_conversation_longer_than_any_pack_is_refused_and_the_others_stay(model):
    examples = [example(40, [*CONVERSATIONS[:2], (("What?", "a " * 500),)])]
    packed = pack(tokenizer_of(model), examples, 400)
    ((number, place, reason),) = packed.refused
    assert (number, place) == (0, 2)
    assert "40 visual tokens and the conversation make" in reason
    assert "more than the 400 that a sequence may have" in reason
    assert [len(one.conversations) for one in packed.sequences] == [2]


@pytest.mark.parametrize(
    ("conversation", "said"),
    [
        ((("Is <vid_patch> red?", "no"),), "mark the video's place"),
        ((("What?", "red </s> blue"),), "holds a mark"),
        ((("What?", "no"), ("And </s> then?", "yes")), "holds a mark"),
        ((("What?", ""),), "has no tokens of its own"),
    ],
)
def test_marks_and_empty_answers_are_refused(model, conversation, said):
    packed = pack(tokenizer_of(model), [example(4, [conversation])], 400)
    assert packed.sequences == []
    assert said in packed.refused[0][2]


def test_ids_are_those_that_the_model_is_asked_and_answers_with(model):
    turns = (("Is it red?", "a red ball"), ("Why?", "yes"))
    conversation = tokenizer_of(model).tokenize(turns)
    prompt = model.lay_out("Is it red?", 1, "long_vlm_v1")
    after = prompt.ids[prompt.first_patch + 1 :]
    assert tuple(conversation.ids[: len(after)]) == after
    assert (conversation.answer_index[: len(after)] == PAD).all()
    (told,) = model.option_ids(["a red ball"])
    answered = slice(len(after), len(after) + len(told) + 1)
    assert tuple(conversation.ids[answered]) == (*told, 2)
    assert set(conversation.answer_index[answered]) == {0}
    text = model.tokenizer.encode("</s>USER: Why? ASSISTANT: yes</s>", add_special_tokens=False).ids
    assert conversation.ids[answered.stop - 1 :].tolist() == text
    assert model.decode(conversation.ids[conversation.answer_index == 1]) == "yes"


@pytest.mark.parity
@pytest.mark.parametrize("template", ["long_vlm_v1", "vicuna_v1"])
def test_piecewise_ids_are_those_of_whole_rounds(golden, template):
    model = golden.models["full"]
    turns = (("What  is it?", "The man holds a rope."), ("And then?", "It ends, at 12."))
    tokenizer = ConversationTokenizer(model, template)
    ids = [*tokenizer.head_ids, *tokenizer.tokenize(turns).ids]
    whole = [
        f"<vid_start><vid_patch><vid_end>\n{turns[0][0]} ASSISTANT: {turns[0][1]}",
        f"USER: {turns[1][0]} ASSISTANT: {turns[1][1]}",
    ]  # the reference's fast tokenizer does not know </s> within a text, so a round at a time
    end = golden.about["token_ids"]["</s>"]
    rounds = [[*model.tokenizer.encode(text, add_special_tokens=False).ids, end] for text in whole]
    expected = [*rounds[0], *rounds[1]]
    patch = expected.index(golden.about["token_ids"]["<vid_patch>"])
    assert ids[len(tokenizer.head_ids) :] == expected[patch + 1 :]


@pytest.mark.parametrize("family", list(LLAVAS))
@pytest.mark.parametrize("num_whole_frames", [None, 2])
def test_rows_of_llavas_are_counted_and_trained(folders, family, num_whole_frames, device):
    model = load_llava(str(folders[family]), device=str(device))
    prefix = VideoPrefix(torch.randn(32, 64), num_whole_frames)
    one = Example(prefix, [(("What?", "red"),)])
    assert model.extent(prefix).num_rows == len(model.read(prefix).embeds)
    packed = pack(tokenizer_of(model), [one], 2048)
    loss, gradients = loss_and_gradients(model, packed.sequences, [one], "token")
    assert 0 < loss < 20
    assert gradients["projector.linear_1.weight"].abs().sum() > 0
    (refused,) = pack(tokenizer_of(model), [Example(prefix, [(("What?", "red"), ("Why?", "so"))])], 2048).refused
    assert "one question at a time" in refused[2]


def test_texts_are_tokenized_once(model, monkeypatch):
    tokenizer, calls = tokenizer_of(model), []
    monkeypatch.setattr(type(model), "option_ids", lambda _, options: calls.append(options) or [(5,)])
    for _ in range(3):
        tokenizer.tokenize((("What?", "red"),))
    assert calls == [["red"]]
    with pytest.raises(InputError, match="is not known"):
        ConversationTokenizer(model, "other")
