import shutil

import pytest
import torch

from longvlm.pipeline.models.llava.model import describe_llava, load_llava
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.sight import Sight
from longvlm.pipeline.vision.towers.families import load_tower
from longvlm.schemas.errors import InputError
from models import LLAVAS, save_llava

FRAMES = 3


def frames_of(image_size, num_frames=FRAMES):
    shape = (num_frames, image_size, image_size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tokens_of(folder, frames, device):
    """A video's tokens as an index without merging and global tokens would store them (in float32)."""
    layer = describe_llava(str(folder)).sight.feature_layer
    return load_tower(str(folder), device=device).encode(frames, layer, 0).patches.flatten(0, 1).clone()


def our_logits(model, prefix, num_whole_frames, question):
    rows = model.read(VideoPrefix(prefix, num_whole_frames)).embeds
    prompt = model.lay_out(question, len(rows), "chat")
    embeds = model.llm.get_input_embeddings()(torch.tensor(prompt.ids, device=model.device)).clone()
    embeds[prompt.first_patch : prompt.first_patch + prompt.num_patches] = rows
    with torch.inference_mode():
        return prompt, model.llm(inputs_embeds=embeds[None]).logits[0]


def oracle(folder):
    family = describe_llava(str(folder)).family
    return LLAVAS[family][1].from_pretrained(folder, dtype=torch.float32).eval()


def their_logits(model, folder, prompt, frames):
    tower = load_tower(str(folder))
    pixels = tower.pixels.prepare(frames, tower.device, torch.float32)
    seen = {"pixel_values": pixels} if model.config.model_type == "llava" else {"pixel_values_videos": pixels[None]}
    with torch.inference_mode():
        return model(input_ids=torch.tensor([prompt.ids]), **seen).logits[0]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llava", {}),
        ("llava", {"image_size": 70, "projector_hidden_act": "silu", "multimodal_projector_bias": False}),
        ("llava", {"vision_feature_layer": -1}),
        ("llava_next_video", {}),
        ("llava_next_video", {"image_size": 70, "spatial_pool_mode": "max"}),
        ("llava_next_video", {"vision_feature_layer": -3}),
        ("llava_onevision", {}),
        ("llava_onevision", {"image_size": 70, "tie_word_embeddings": True}),
        ("llava_onevision", {"vision_feature_layer": -2}),
    ],
)
def test_without_merging_logits_are_those_of_transformers_over_the_same_frames(
    tmp_path, family, changes, device, agree
):
    folder = save_llava(tmp_path / "model", family, **changes)
    frames = frames_of(changes.get("image_size", 56))
    model = load_llava(str(folder), device=str(device))
    prompt, ours = our_logits(model, tokens_of(folder, frames, device), FRAMES, "What happens?")
    theirs = their_logits(oracle(folder), folder, prompt, frames)
    agree(ours, theirs, atol=1e-4)
    assert ours.std() > 0.01


def test_weights_are_bit_equal_to_transformers(folder):
    ours, theirs = load_llava(str(folder)), oracle(folder)
    inner = theirs.model
    pairs = [
        (ours.projector.state_dict(), inner.multi_modal_projector.state_dict()),
        (ours.llm.model.state_dict(), inner.language_model.state_dict()),
        (ours.llm.lm_head.state_dict(), theirs.lm_head.state_dict()),
    ]
    for mine, other in pairs:
        assert mine.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
    if ours.newline is not None:
        assert torch.equal(ours.newline, inner.image_newline)


def test_merged_tokens_are_projected_each_by_itself(folder):
    model, prefix = load_llava(str(folder)), torch.randn(10, 64)
    rows = model.read(VideoPrefix(prefix)).embeds
    torch.testing.assert_close(rows[:10], model.projector(prefix))
    ended = model.newline is not None
    assert len(rows) == 10 + ended
    if ended:
        assert torch.equal(rows[10], model.newline)
    _, logits = our_logits(model, prefix, None, "What?")
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llava", FRAMES * 16), ("llava_next_video", FRAMES * 4), ("llava_onevision", FRAMES * 4 + 1)],
)
def test_whole_frames_are_pooled_as_the_family_pools_a_video(folders, family, expected):
    model = load_llava(str(folders[family]))
    assert model.read(VideoPrefix(torch.randn(FRAMES * 16, 64), FRAMES)).embeds.shape == (expected, 64)


@pytest.mark.parametrize(("family", "per_frame"), [("llava_next_video", 4), ("llava_onevision", 4)])
def test_pooled_frames_share_their_attention_among_their_patches(folders, family, per_frame):
    model, prefix = load_llava(str(folders[family])), VideoPrefix(torch.randn(FRAMES * 16, 64), FRAMES)
    seen = torch.rand(model.extent(prefix).num_rows)
    by_frame = model.fold(seen, prefix).view(FRAMES, 16)
    assert (by_frame == by_frame[:, :1]).all()
    torch.testing.assert_close(by_frame.sum(dim=1), seen[: FRAMES * per_frame].view(FRAMES, per_frame).sum(dim=1))
    seen = torch.rand(FRAMES * 16 + 1)
    assert torch.equal(model.fold(seen, VideoPrefix(prefix.rows)), seen[:-1])


def test_precision_is_taken_everywhere_but_in_positions(folder):
    model = load_llava(str(folder), "bfloat16")
    tensors = [*model.llm.state_dict().values(), *model.projector.state_dict().values()]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert model.llm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.read(VideoPrefix(torch.randn(16, 64), 1)).embeds.dtype == torch.bfloat16


def test_a_checkpoint_is_described_without_being_built(folder):
    spec, model = describe_llava(str(folder)), load_llava(str(folder))
    assert (spec.mm_hidden_size, spec.context) == (64, 4096)
    assert (spec.mm_hidden_size, spec.context) == (model.mm_hidden_size, model.context)
    assert spec.family == folder.name
    assert spec.sight == Sight(str(folder), -1 if spec.family == "llava_onevision" else -2, 0)
    assert spec.templates == ("chat",)


def test_the_fingerprint_follows_what_decides_answers_and_not_the_folder(folder, tmp_path):
    weights = describe_llava(str(folder)).weights
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert describe_llava(str(copy)).weights == weights
    template = copy / "chat_template.json"
    template.write_text(template.read_text().replace("USER", "HUMAN").replace("ASSISTANT", "AI").replace("user", "you"))
    (copy / "chat_template.json").write_text(template.read_text().replace("|im_start|>assistant", "|im_start|>bot"))
    assert describe_llava(str(copy)).weights != weights
    other = save_llava(tmp_path / "other", folder.name, seed=1)
    assert describe_llava(str(other)).weights != weights


def test_placeholders_and_rows_beyond_the_tokenizer_are_never_emitted(folder):
    model = load_llava(str(folder))
    known = len(model.chat.tokenizer)
    assert set(range(known, known + 5)) <= set(model.banned_ids)
    assert model.chat.marks <= set(model.banned_ids)
    assert not set(model.eos_ids) & set(model.banned_ids)


def test_a_template_that_the_model_lacks_is_refused(folder):
    with pytest.raises(InputError, match=r"has no prompt template 'long_vlm_v1'; it is asked with its own, chat\."):
        load_llava(str(folder)).lay_out("What?", 4, "long_vlm_v1")
