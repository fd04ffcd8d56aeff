"""Training held to what the reference's own training did (LONGVLM.md section 7): data, loss, gradients, ten steps."""

import json

import numpy as np
import pytest
import torch
from reference_training import IGNORED, SlowTokenizer, preprocess, reference_collate
from safetensors.torch import save_file

from longvlm.pipeline.models.longvlm.checkpoint import find_checkpoint
from longvlm.pipeline.models.longvlm.init import with_video_rows
from longvlm.pipeline.models.longvlm.model import EMBED, HEAD, PROJECT, PROJECT_BIAS, load_longvlm
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.training.conversations import to_reference
from longvlm.pipeline.training.finetune import Finetuner
from longvlm.pipeline.training.packing import Example, PackedConversation, PackedSequence, PackingResult, collate
from longvlm.pipeline.training.parameters import TrainableModel
from longvlm.schemas.training import TrainRecipe

pytestmark = pytest.mark.parity
NUM_PATCHES = 305


@pytest.fixture(scope="module")
def about(goldens):
    return json.loads((goldens / "train_golden.json").read_text())


@pytest.fixture(scope="module")
def arrays(goldens):
    with np.load(goldens / "train_golden.npz") as found:
        return dict(found)


@pytest.fixture(scope="module")
def slow(goldens):
    return SlowTokenizer(goldens / "longvlm_tiny" / "base" / "tokenizer.json")


@pytest.fixture
def begun(goldens, arrays, tmp_path, device):
    """The model as the reference's training began with it."""
    base = goldens / "longvlm_tiny" / "base"
    embed = torch.cat([find_checkpoint(str(base)).tensors()[EMBED], torch.from_numpy(arrays["init_embed_rows"][:1])])
    embed = torch.cat([embed, embed.mean(dim=0).expand(2, -1)])
    weight, bias = (torch.from_numpy(arrays[name]) for name in ("proj_w0", "proj_b0"))
    projector = tmp_path / "mm_projector.safetensors"
    save_file({EMBED: embed, PROJECT: weight, PROJECT_BIAS: bias}, projector)
    model = load_longvlm(str(base), projector=str(projector), device=str(device))
    model.llm.lm_head.weight.data[-3:] = torch.from_numpy(arrays["init_lmhead_rows"])
    return model


@pytest.fixture
def batch(arrays):
    """The reference's batch as examples and sequences: its ids, not ours."""
    examples, sequences = [], []
    features = torch.from_numpy(
        np.concatenate([arrays["collate_memory_features"], arrays["collate_local_features"]], axis=1)
    )
    rows = zip(arrays["collate_input_ids"], arrays["collate_labels"], arrays["collate_attention_mask"], strict=True)
    for number, (all_ids, all_labels, mask) in enumerate(rows):
        ids, labels = all_ids[mask], all_labels[mask]
        first = int((ids == 640).argmax())
        after = slice(first + NUM_PATCHES, None)
        assert (labels[: after.start] == IGNORED).all()
        conversation = PackedConversation(ids[after], np.where(labels[after] == IGNORED, -1, 0))
        sequences.append(PackedSequence(number, ids[:first], NUM_PATCHES, [conversation]))
        examples.append(Example(VideoPrefix(features[number].float()), []))
    return examples, sequences


def recipe(**changes):
    settings = {"precision": "float32", "learning_rate": 2e-3, "gradient_checkpointing": False}
    return TrainRecipe("parity", "projector", **{**settings, **changes})


def test_instruction_rows_become_the_reference_s_format(goldens):
    about = json.loads((goldens / "train_data_format.json").read_text())
    assert to_reference(about["instruction_input"]) == about["filter_output"]


@pytest.mark.parametrize("number", range(5))
def test_ids_and_labels_of_a_conversation(about, arrays, slow, number):
    example = about["examples"][number]
    turns = [(turn["from"], turn["value"]) for turn in example["conversations"]]
    ids, labels = preprocess(turns, slow)
    np.testing.assert_array_equal(ids, arrays[f"ex{number}_input_ids"])
    np.testing.assert_array_equal(labels, arrays[f"ex{number}_labels"])


def test_ids_and_labels_of_odd_conversations(goldens, slow):
    cases = json.loads((goldens / "train_preprocess_cases.json").read_text())
    for name, case in cases.items():
        ids, labels = preprocess([tuple(turn) for turn in case["turns"]], slow)
        assert (ids.tolist(), labels.tolist()) == (case["input_ids"], case["labels"]), name


def test_a_collated_batch(about, arrays, slow):
    examples = [[(t["from"], t["value"]) for t in about["examples"][i]["conversations"]] for i in range(5)]
    made = [preprocess(turns, slow) for turns in examples]
    wanted = [np.trim_zeros(row, "b") for row in arrays["collate_input_ids"]]
    chosen = [next(one for one in made if np.array_equal(one[0], row)) for row in wanted]
    for ours, name in zip(reference_collate(chosen), ("input_ids", "labels", "attention_mask"), strict=True):
        np.testing.assert_array_equal(ours, arrays[f"collate_{name}"])


def test_new_rows_are_drawn_as_the_reference_draws_them(goldens, arrays):
    base = find_checkpoint(str(goldens / "longvlm_tiny" / "base")).tensors()
    head = torch.from_numpy(arrays["init_lmhead_rows"])  # of the embedding they were noted after the ten steps
    mean = torch.cat([base[HEAD], head[:1]]).mean(dim=0)
    torch.testing.assert_close(head[1:], mean.expand(2, -1), atol=1e-6, rtol=0)
    ours = with_video_rows(base[HEAD], torch.Generator().manual_seed(0))
    assert torch.equal(ours[:-3], base[HEAD])
    torch.testing.assert_close(ours[-2:], ours[:-2].mean(dim=0).expand(2, -1), atol=1e-6, rtol=0)
    assert float(ours[-3].std()) == pytest.approx(float(head[0].std()), rel=0.3)


def test_loss_and_gradients_of_the_first_batch(begun, batch, arrays, agree):
    examples, sequences = batch
    trainable = TrainableModel(begun, recipe())
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


def test_ten_steps(begun, batch, about, arrays, monkeypatch, agree):
    examples, sequences = batch
    told = about["facts"]["traj"]
    monkeypatch.setattr("longvlm.pipeline.training.finetune.pack", lambda *_: PackingResult(sequences))
    finetuner = Finetuner(begun, recipe(), told["total_steps"])
    steps = [finetuner.step(examples) for _ in range(told["total_steps"])]
    for ours, theirs in (("loss", "losses"), ("lr", "lrs"), ("grad_norm", "grad_norms")):
        assert [getattr(step, ours) for step in steps] == pytest.approx(told[theirs], abs=1e-4), ours
    model = finetuner.trainable.merge_and_unload()
    agree(model.projector.weight, arrays["proj_w10"], atol=1e-4)
    embed = model.llm.get_input_embeddings().weight
    agree(embed[-3:], arrays["embed_rows10"], atol=1e-4)
