"""Training held to what the reference's own training did (LONGVLM.md section 7): data, loss, gradients, every step."""

import numpy as np
import pytest
import torch
from reference_outputs import goldens, read_arrays, read_json
from reference_training import IGNORED, SlowTokenizer, preprocess, reference_collate
from safetensors.torch import save_file

from longvlm.pipeline.models.contract import Extent
from longvlm.pipeline.models.longvlm.checkpoint import find_checkpoint
from longvlm.pipeline.models.longvlm.init import with_video_rows
from longvlm.pipeline.models.longvlm.model import EMBED, HEAD, PROJECT, PROJECT_BIAS, load_longvlm
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.prompt import PATCH
from longvlm.pipeline.training.conversations import to_reference
from longvlm.pipeline.training.finetune import Finetuner
from longvlm.pipeline.training.packing import Example, PackedConversation, PackedSequence, PackingResult, collate
from longvlm.pipeline.training.parameters import TrainableModel
from longvlm.schemas.training import TrainRecipe
from support import GOLDENS, missing, parameters

pytestmark = pytest.mark.parity


def examples():
    """Pytest parameters for the conversations that the reference's own dataset could read."""
    about = read_json("train_golden.json") if (GOLDENS / "train_golden.json").is_file() else {"examples": []}
    found = [(str(one["index"]), one) for one in about["examples"] if "error" not in one]
    return parameters(found, GOLDENS, "conversations in train_golden.json")


def turns_of(example):
    return [(turn["from"], turn["value"]) for turn in example["conversations"]]


@pytest.fixture(scope="module")
def told():
    """What is said of the run whose loss, gradients and weights are kept."""
    return read_json("train_golden.json")["facts"]["traj"]


@pytest.fixture(scope="module")
def arrays():
    return read_arrays(GOLDENS / "train_golden.npz")


@pytest.fixture(scope="module")
def base(arrays):
    """The model that the training began with: the one of its projector's and its embedding's shape."""
    num_rows = read_json("train_golden.json")["facts"]["saved_mm_projector_bin"][EMBED][0]
    for golden in goldens():
        model = golden.models["base"]
        if model.projector.weight.shape == arrays["proj_w0"].shape and model.llm.vocab_size == num_rows:
            return golden.folder / "base"
    return missing(GOLDENS, "model of train_golden.json")


@pytest.fixture(scope="module")
def slow(base):
    return SlowTokenizer(base / "tokenizer.json")


@pytest.fixture(scope="module")
def num_patches(arrays):
    """Of one video: what `<video>` stands for in the reference's data."""
    return arrays["collate_memory_features"].shape[1] + arrays["collate_local_features"].shape[1]


@pytest.fixture
def begun(base, arrays, tmp_path, device):
    """The model as the reference's training began with it."""
    embed = torch.cat([find_checkpoint(str(base)).tensors()[EMBED], torch.from_numpy(arrays["init_embed_rows"][:1])])
    embed = torch.cat([embed, embed.mean(dim=0).expand(2, -1)])
    weight, bias = (torch.from_numpy(arrays[name]) for name in ("proj_w0", "proj_b0"))
    projector = tmp_path / "mm_projector.safetensors"
    save_file({EMBED: embed, PROJECT: weight, PROJECT_BIAS: bias}, projector)
    model = load_longvlm(str(base), projector=str(projector), device=str(device))
    model.llm.lm_head.weight.data[-3:] = torch.from_numpy(arrays["init_lmhead_rows"])
    return model


@pytest.fixture
def batch(slow, arrays, num_patches):
    """The reference's batch as examples and sequences: its ids, not ours."""
    examples, sequences = [], []
    features = torch.from_numpy(
        np.concatenate([arrays["collate_memory_features"], arrays["collate_local_features"]], axis=1)
    )
    rows = zip(arrays["collate_input_ids"], arrays["collate_labels"], arrays["collate_attention_mask"], strict=True)
    for number, (all_ids, all_labels, mask) in enumerate(rows):
        ids, labels = all_ids[mask], all_labels[mask]
        is_patch = ids == slow.special[PATCH]
        first = int(is_patch.argmax())
        after = slice(first + num_patches, None)
        assert is_patch.sum() == is_patch[first : after.start].sum() == num_patches
        assert (labels[: after.start] == IGNORED).all()
        conversation = PackedConversation(ids[after], np.where(labels[after] == IGNORED, -1, 0))
        sequences.append(PackedSequence(number, ids[:first], Extent(num_patches, num_patches), [conversation]))
        examples.append(Example(VideoPrefix(features[number].float()), []))
    return examples, sequences


@pytest.fixture(scope="module")
def recipe(told):
    return TrainRecipe(
        "parity",
        "projector",
        precision="float32",
        learning_rate=told["lr_peak"],
        warmup_ratio=max(told["warmup_steps"] - 0.5, 0.0) / told["total_steps"],
        gradient_checkpointing=False,
    )


@pytest.fixture
def finetuner(begun, recipe, told):
    return Finetuner(begun, recipe, told["total_steps"])


def test_instruction_rows_become_the_reference_s_format():
    about = read_json("train_data_format.json")
    assert to_reference(about["instruction_input"]) == about["filter_output"]


@pytest.mark.parametrize("example", examples())
def test_ids_and_labels_of_a_conversation(example, arrays, slow, num_patches):
    ids, labels = preprocess(turns_of(example), slow, num_patches)
    np.testing.assert_array_equal(ids, arrays[f"ex{example['index']}_input_ids"])
    np.testing.assert_array_equal(labels, arrays[f"ex{example['index']}_labels"])


def test_ids_and_labels_of_odd_conversations(slow, num_patches):
    for name, case in read_json("train_preprocess_cases.json").items():
        ids, labels = preprocess([tuple(turn) for turn in case["turns"]], slow, num_patches)
        assert (ids.tolist(), labels.tolist()) == (case["input_ids"], case["labels"]), name


def test_a_collated_batch(arrays, slow, num_patches):
    read = [one for one in read_json("train_golden.json")["examples"] if "error" not in one]
    made = [preprocess(turns_of(one), slow, num_patches) for one in read]
    wanted = zip(arrays["collate_input_ids"], arrays["collate_attention_mask"], strict=True)
    chosen = [next(one for one in made if np.array_equal(one[0], row[mask])) for row, mask in wanted]
    for ours, name in zip(reference_collate(chosen, slow.pad), ("input_ids", "labels", "attention_mask"), strict=True):
        np.testing.assert_array_equal(ours, arrays[f"collate_{name}"])


def test_new_rows_are_drawn_as_the_reference_draws_them(base, arrays):
    base = find_checkpoint(str(base)).tensors()
    head = torch.from_numpy(arrays["init_lmhead_rows"])  # of the embedding they were noted after the last step
    mean = torch.cat([base[HEAD], head[:1]]).mean(dim=0)
    torch.testing.assert_close(head[1:], mean.expand(2, -1), atol=1e-6, rtol=0)
    ours = with_video_rows(base[HEAD], torch.Generator().manual_seed(0))
    assert torch.equal(ours[:-3], base[HEAD])
    torch.testing.assert_close(ours[-2:], ours[:-2].mean(dim=0).expand(2, -1), atol=1e-6, rtol=0)
    four_sigma = 4 / head.shape[1] ** 0.5  # of a ratio of two such deviations
    assert float(ours[-3].std()) == pytest.approx(float(head[0].std()), rel=four_sigma)


def test_loss_and_gradients_of_the_first_batch(begun, batch, recipe, arrays, agree):
    examples, sequences = batch
    trainable = TrainableModel(begun, recipe)
    batch = collate(sequences, "token", begun.device)
    loss = trainable(examples, batch) / batch.weights.sum()
    loss.backward()
    agree(loss, float(arrays["loss0"]), atol=1e-5)
    found = {"proj_w": trainable.projector.weight, "proj_b": trainable.projector.bias, "embed_rows": trainable.marks}
    for name, parameter in found.items():
        agree(parameter.grad, arrays[f"grad_{name}"], atol=1e-5, rtol=1e-4)
    assert {name for name, parameter in trainable.named_parameters() if parameter.requires_grad} == {
        "projector.weight", "projector.bias", "marks",
    }  # fmt: skip


def is_beyond_rounding(gradient):
    return torch.from_numpy(np.abs(gradient) > 1e-6 * np.abs(gradient).max())


def test_every_step(finetuner, batch, told, arrays, monkeypatch, agree):
    examples, sequences = batch
    monkeypatch.setattr("longvlm.pipeline.training.finetune.pack", lambda *_: PackingResult(sequences))
    num_steps = told["total_steps"]
    steps = [finetuner.step(examples) for _ in range(num_steps)]
    assert [step.loss for step in steps] == pytest.approx(told["losses"], abs=1e-4)
    assert [step.lr for step in steps] == pytest.approx(told["lrs"], abs=1e-9)
    norms = [step.grad_norm for step in steps]
    assert norms[0] == pytest.approx(told["grad_norms"][0], abs=1e-4)
    assert norms == pytest.approx(told["grad_norms"], rel=1e-3)  # rounding grows from step to step
    # Adam's first update knows a gradient's sign alone: where rounding made that, a weight may go either way
    sure = {name: is_beyond_rounding(arrays[f"grad_{name}"]) for name in ("proj_w", "embed_rows")}
    assert all(held.float().mean() > 0.99 for held in sure.values())
    model = finetuner.trainable.merge_and_unload()
    weight, wanted = model.projector.weight.detach().cpu(), torch.from_numpy(arrays[f"proj_w{num_steps}"])
    agree(weight[sure["proj_w"]], wanted[sure["proj_w"]], atol=1e-4)
    embed = model.llm.get_input_embeddings().weight.detach().cpu()
    patch, *marks = torch.from_numpy(arrays[f"embed_rows{num_steps}"])
    agree(embed[-3], patch, atol=1e-4)
    agree(embed[-2:][sure["embed_rows"]], torch.stack(marks)[sure["embed_rows"]], atol=1e-4)
