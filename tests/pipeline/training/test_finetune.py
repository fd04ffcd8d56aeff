from dataclasses import replace

import pytest
import torch

from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.models.llava.model import load_llava
from longvlm.pipeline.models.longvlm.model import load_longvlm
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.training.finetune import DivergedError, Finetuner, finetune
from longvlm.pipeline.training.packing import Example
from longvlm.pipeline.training.parameters import TrainableModel, first_linear
from longvlm.pipeline.training.whitening import fit_whitening
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import AnswerRecipe
from longvlm.schemas.training import full, lora, projector

WORDS = ("red", "blue", "green", "square")
# A GPU may add up gradients in another order each time, and Adam makes much of those that are next to nothing.
LOSS_APART, WEIGHT_APART = {"cpu": 0.0, "cuda": 1e-3}, {"cpu": 0.0, "cuda": 1e-2}
QUICK = {"precision": "float32", "gradient_checkpointing": False, "learning_rate": 3e-3, "average": "answer"}
FULL = replace(full(), **QUICK)


def examples(seed, number=4):
    """The answer stands in the tokens: which of four channels is large."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for i in range(number):
        prefix = torch.randn(6, 64, generator=random)
        prefix[:, i % 4] += 6
        made.append(Example(VideoPrefix(prefix), [(("What color is it?", WORDS[i % 4]),), (("Is it night?", "no"),)]))
    return made


@pytest.fixture
def model_of(device):
    """What loads the model of a folder to be trained."""
    return lambda folder: load_longvlm(str(folder), device=str(device))


def weights(trainable):
    return {name: parameter.detach().clone() for name, parameter in trainable.named_parameters()}


def changed(before, after):
    return {name for name, weight in before.items() if not torch.equal(weight, after[name])}


def test_a_model_learns_to_see_and_answers_right_away(untrained_folder, model_of):
    losses = []
    recipe = replace(FULL, warmup_ratio=0.1)
    finetuner = finetune(
        model_of(untrained_folder), map(examples, range(40)), recipe, 40, on_step=lambda s: losses.append(s.loss)
    )
    assert losses[-1] < 0.1 * losses[0]
    model = finetuner.trainable.merge_and_unload()
    asked = [Group(one.prefix, [Request(i, "What color is it?")]) for i, one in enumerate(examples(99))]
    answers = Engine(model, AnswerRecipe("m", "w", "i", precision="float32", max_new_tokens=3)).answer(iter(asked))
    assert {answer.key: answer.text for answer in answers} == dict(enumerate(WORDS))


def test_only_what_the_stage_names_learns(untrained_folder, folders, model_of):
    before_after = {}
    for name, recipe in (("projector", projector()), ("lora", lora()), ("full", full())):
        finetuner = Finetuner(model_of(untrained_folder), replace(recipe, **QUICK, lora_rank=2, warmup_ratio=0.0), 2)
        before = weights(finetuner.trainable)
        finetuner.step(examples(0))
        finetuner.step(examples(1))
        before_after[name] = changed(before, weights(finetuner.trainable))
    assert before_after["projector"] == {"projector.weight", "projector.bias", "marks"}
    assert before_after["full"] == set(weights(TrainableModel(model_of(untrained_folder), FULL)))
    adapters = before_after["lora"] - {"projector.weight", "projector.bias"}
    assert len(adapters) == 2 * 7 * 2  # two matrices beside seven layers in each of two blocks
    assert all(".lora_" in name for name in adapters)
    finetuner = Finetuner(load_llava(str(folders["llava"])), replace(projector(), **QUICK, warmup_ratio=0.0), 1)
    before = weights(finetuner.trainable)
    finetuner.step([Example(VideoPrefix(torch.randn(6, 64)), [(("What?", "red"),)])])
    assert changed(before, weights(finetuner.trainable)) == {
        f"projector.linear_{i}.{n}" for i in (1, 2) for n in ("weight", "bias")
    }


@pytest.mark.parametrize("base", ["projector", "lora", "full"])
@pytest.mark.parametrize("whiten", [False, True])
def test_the_finished_model_does_what_the_trainable_one_did(untrained_folder, base, whiten, model_of, agree):
    recipe = replace({"projector": projector, "lora": lora, "full": full}[base](), **QUICK, lora_dropout=0.0)
    finetuner = finetune(model_of(untrained_folder), [examples(i) for i in range(4)], replace(recipe, whiten=whiten), 4)
    trainable = finetuner.trainable.eval()
    from longvlm.pipeline.training.packing import collate, pack

    held_out = examples(9)
    batch = collate(pack(finetuner.tokenizer, held_out, 2048).sequences, "token", trainable.model.device)
    with torch.no_grad():
        expected = trainable(held_out, batch)
        model = trainable.merge_and_unload()
        found = TrainableModel(model, FULL)(held_out, batch)
    agree(found, expected, atol=1e-3, rtol=1e-4)
    assert not any("lora" in name for name, _ in model.llm.named_parameters())


@pytest.mark.parametrize("base", [projector, lora, full])
def test_a_restored_run_is_the_run_that_went_on(untrained_folder, base, model_of, device, agree):
    recipe = replace(base(), **QUICK, lora_rank=2)
    whole = Finetuner(model_of(untrained_folder), recipe, 6)
    expected = [whole.step(examples(i)) for i in range(6)]
    first = Finetuner(model_of(untrained_folder), recipe, 6)
    for i in range(3):
        first.step(examples(i))
    state = first.state_dict()
    torch.rand(7)  # what others draw in between makes no difference
    second = Finetuner(model_of(untrained_folder), recipe, 6)
    second.load_state_dict(state)
    went_on = [second.step(examples(i)) for i in range(3, 6)]
    assert [(s.step, s.lr) for s in went_on] == [(s.step, s.lr) for s in expected[3:]]
    for mine, other in zip(went_on, expected[3:], strict=True):
        agree(mine.loss, other.loss, atol=LOSS_APART[device.type])
    for mine, other in zip(weights(whole.trainable).values(), weights(second.trainable).values(), strict=True):
        agree(mine, other, atol=WEIGHT_APART[device.type])


@pytest.mark.parametrize("changes", [{"accumulation": 3}, {"gradient_checkpointing": True}])
def test_saving_memory_changes_nothing(untrained_folder, changes, model_of):
    def curve(recipe):
        finetuner = Finetuner(model_of(untrained_folder), recipe, 3)
        return [finetuner.step(examples(i, 5)).loss for i in range(3)]

    assert curve(replace(FULL, **changes)) == pytest.approx(curve(FULL), abs=1e-5)


def test_bfloat16_learns_too_and_keeps_float32_weights(untrained_folder, model_of):
    finetuner = finetune(model_of(untrained_folder), map(examples, range(3)), replace(FULL, precision="bfloat16"), 3)
    assert {parameter.dtype for parameter in finetuner.trainable.parameters()} == {torch.float32}


def test_each_answer_counts_the_same_or_each_token_does(untrained_folder, model_of):
    one = Example(
        VideoPrefix(torch.randn(6, 64)),
        [(("Is it night?", "no"),), (("What?", "a large yellow square moves to the left"),)],
    )
    single = [with_conversations(one, [conversation]) for conversation in one.conversations]
    first, second = (Finetuner(model_of(untrained_folder), FULL, 1).step([part]).loss for part in single)
    both = {
        average: Finetuner(model_of(untrained_folder), replace(FULL, average=average), 1).step([one]).loss
        for average in ("answer", "token")
    }
    assert both["answer"] == pytest.approx((first + second) / 2, abs=1e-5)
    assert both["token"] == pytest.approx((2 * first + 9 * second) / 11, abs=1e-5)


def with_conversations(one, conversations):
    return Example(one.prefix, conversations)


def test_a_loss_that_is_no_number_stops_before_the_weights_suffer(untrained_folder, model_of):
    finetuner = Finetuner(model_of(untrained_folder), FULL, 2)
    broken = examples(0)
    broken[1].prefix.rows[2] = torch.inf
    before = weights(finetuner.trainable)
    with pytest.raises(DivergedError, match=r"the loss of step 1 is nan; lower the learning rate"):
        finetuner.step(broken)
    assert changed(before, weights(finetuner.trainable)) == set()


def test_a_step_with_nothing_to_learn_is_a_step(untrained_folder, model_of):
    step = Finetuner(model_of(untrained_folder), FULL, 2).step(
        [Example(VideoPrefix(torch.randn(4, 64)), [(("What?", "a " * 9000),)])]
    )
    assert (step.loss, step.conversations, len(step.refused)) == (0.0, 0, 1)


def test_wrong_recipes_are_told(untrained_folder, model_of):
    with pytest.raises(InputError, match="has no linear layers called other"):
        Finetuner(model_of(untrained_folder), replace(lora(), lora_targets=("other",)), 1)
    with pytest.raises(ValueError, match="there were batches for 1 of 3 steps"):
        finetune(model_of(untrained_folder), [examples(0)], FULL, 3)
    with pytest.raises(ValueError, match="a whitening is given where the recipe asks for one"):
        Finetuner(model_of(untrained_folder), FULL, 1, whitening=fit_whitening([torch.randn(9, 64)]))
    model = model_of(untrained_folder)
    model.projector.bias = None
    with pytest.raises(InputError, match="has no bias for a whitening"):
        first_linear(model)
