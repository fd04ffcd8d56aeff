"""Qwen3-VL-2B's shapes, weights random: frames to four streams of tokens, and questions over them.

Frames go through the Encode stage's own function, as in `encode`; its figure is of whole calls. Answers are to eight
questions on each of eight videos of ten minutes, indexed by the recipe `long`: 60 segments of 80 tokens, each behind
its time. Prefixes stand at positions along three axes and have deepstack streams added, which is what the engine does
more than for a LLaMA.

Shape letters: N tokens of a video, C channels of a token.
"""

# ruff: noqa: N806 - tensors are named by their shape

import time
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from benchmarks.gpu.encode import check_tokens, made_up_frames, same_tokens
from benchmarks.gpu.section import Found, Run, check
from benchmarks.measure import interleave, peak_flops
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.requests import Group, Request, Stats
from longvlm.pipeline.models.prefix import SegmentTimes, VideoPrefix
from longvlm.pipeline.models.qwen3_vl.model import QwenModel
from longvlm.pipeline.models.qwen3_vl.modules import Qwen3VLForCausalLM
from longvlm.pipeline.models.timed_prompt import NAME, TimedPrompt
from longvlm.pipeline.vision.encode import encode_units
from longvlm.pipeline.vision.pixels import Normalisation
from longvlm.pipeline.vision.towers.qwen3_vl import DEFAULT_GRID, Qwen3Tower, spec_of
from longvlm.schemas.recipe import AnswerRecipe, IndexRecipe, long

VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 2048,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}
TEXT = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262_144,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
TINY_VISION = VISION | {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
TINY_VISION |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
TINY_TEXT = TEXT | {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
TINY_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY_TEXT |= {"rope_parameters": TEXT["rope_parameters"] | {"mrope_section": [4, 2, 2]}}  # type: ignore[operator]
MARKS = ("<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
UNITS, SEGMENTS_PER_UNIT, SIDE, ROUNDS = 8, 10, 8192, 3
TINY_UNITS, TINY_SEGMENTS_PER_UNIT, TINY_SIDE = 1, 1, 256
VIDEOS, SEGMENTS, QUESTIONS, NEW_TOKENS = 8, 60, 8, 20
TINY_VIDEOS, TINY_SEGMENTS, TINY_NEW_TOKENS = 2, 3, 4
SEGMENT_S = 10.0


def run(run: Run) -> None:
    """The tower, then the language model; each is gone before the next comes."""
    torch.manual_seed(0)
    config = _config(is_tiny=run.is_tiny)
    encoded = run.part("encode", lambda: measure_encoding(run, config))
    if encoded:
        run.note(frames_per_s=encoded["frames_per_s"], peak_share=encoded["peak_share"])
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    answered = run.part("answer", lambda: measure_answering(run, config))
    if answered:
        run.note(questions_per_s=answered["questions_per_s"], prefill_tokens_per_s=answered["prefill_tokens_per_s"])


def _config(*, is_tiny: bool) -> Any:
    text, vision = (TINY_TEXT, TINY_VISION) if is_tiny else (TEXT, VISION)
    ids = {"vision_start_token_id": 2, "vision_end_token_id": 3, "image_token_id": 4, "video_token_id": 5}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **ids, tie_word_embeddings=True)


def measure_encoding(run: Run, config: Any) -> Found:
    """Whether the tower's tokens are right, then how fast they come."""
    tower = random_tower(config, run.device)
    recipe = long(tower.spec)
    num_units, per_unit = (TINY_UNITS, TINY_SEGMENTS_PER_UNIT) if run.is_tiny else (UNITS, SEGMENTS_PER_UNIT)
    frames = made_up_frames(recipe, num_units, per_unit)
    first, second = (encode_units(frames, tower, recipe) for _ in range(2))
    check_tokens(first, recipe, num_units, per_unit)
    same = same_tokens(first, second)
    check(same == 1 or (run.device.type == "cuda" and same > 0.99), f"twice the same frames: {same:.2%} equal.")
    seconds = interleave({"whole": lambda: encode_units(frames, tower, recipe)}, 1 if run.is_tiny else ROUNDS)
    whole_s, num_frames = median(seconds["whole"]), num_units * per_unit * recipe.frames_per_segment
    flops = peak_flops(run.device, TINY_SIDE if run.is_tiny else SIDE)
    pictures = num_units * per_unit * recipe.tower.num_pictures(recipe.frames_per_segment)
    found = {
        "frames": num_frames,
        "frames_per_s": num_frames / whole_s,
        "peak_share": pictures * flops_per_picture(config.vision_config, recipe) / whole_s / flops,
        "same_tokens": same,
    }
    run.say(f"tower: {found['frames_per_s']:.0f} frames/s, {found['peak_share']:.0%} of peak")
    return found


def random_tower(config: Any, device: torch.device) -> Qwen3Tower:
    """A tower without weights of its own, drawn on the device."""
    with torch.device(device):
        model = Qwen3VLVisionModel(config.vision_config)
    model = model.to(torch.bfloat16).eval()
    half = Normalisation(1 / 255, (0.5,) * 3, (0.5,) * 3)
    return Qwen3Tower(model, config.vision_config, spec_of("random", "random", config.vision_config), half)


def flops_per_picture(vision: Any, recipe: IndexRecipe) -> float:
    """Two per multiply-add of all blocks and mergers over a pair of frames."""
    tokens, dim, merge = recipe.tower.num_patches, vision.hidden_size, vision.spatial_merge_size**2
    patches = tokens * merge
    block = patches * (4 * dim**2 + 2 * dim * vision.intermediate_size) + 2 * patches**2 * dim
    merger = tokens * ((merge * dim) ** 2 + merge * dim * vision.out_hidden_size)
    embedding = patches * 3 * vision.temporal_patch_size * vision.patch_size**2 * dim
    return 2.0 * (embedding + vision.depth * block + recipe.tower.num_streams * merger)


def measure_answering(run: Run, config: Any) -> Found:
    """Questions and tokens a second, each answer checked."""
    model = random_model(config, run.device)
    num_videos, num_segments = (TINY_VIDEOS, TINY_SEGMENTS) if run.is_tiny else (VIDEOS, SEGMENTS)
    new_tokens = TINY_NEW_TOKENS if run.is_tiny else NEW_TOKENS
    recipe = AnswerRecipe("random", "random", "random", template=NAME, max_new_tokens=new_tokens)
    engine = Engine(model, recipe)
    prefixes = [made_up_prefix(model, num_segments) for _ in range(num_videos)]
    rounds = []
    for _ in range(2 if run.is_tiny else ROUNDS):
        engine.stats, started_s = Stats(), time.perf_counter()
        groups = (
            Group(prefix, [Request((video, i), f"What happens at {i} o'clock?") for i in range(QUESTIONS)])
            for video, prefix in enumerate(prefixes)
        )
        answers = list(engine.answer(groups))
        rounds.append((time.perf_counter() - started_s, engine.stats))
        check(len(answers) == num_videos * QUESTIONS, f"{len(answers)} answers came.")
        for answer in answers:
            check(answer.error is None, f"an answer failed: {answer.error}")
    wall_s, stats = sorted(rounds, key=lambda one: one[0])[len(rounds) // 2]
    extent = model.extent(prefixes[0])
    found = {
        "videos": num_videos,
        "rows_per_video": extent.num_rows,
        "positions_per_video": extent.num_positions,
        "questions_per_s": num_videos * QUESTIONS / wall_s,
        "prefill_tokens_per_s": stats.prefill_tokens / stats.prefill_s,
        "ms_per_step": stats.decode_s / stats.num_steps * 1e3,
    }
    run.say(
        f"{num_videos} videos of {extent.num_rows} rows: {found['questions_per_s']:.1f} questions/s, prefill "
        f"{found['prefill_tokens_per_s']:.0f} tokens/s, a step {found['ms_per_step']:.1f} ms"
    )
    return found


def random_model(config: Any, device: torch.device) -> QwenModel:
    """A language model without weights of its own, whose words mean nothing."""
    text = config.text_config
    with torch.device(device):
        llm = Qwen3VLForCausalLM(text).to(torch.bfloat16)
        llm.model.rotary_emb = type(llm.model.rotary_emb)(text)  # in float32
    llm.lm_head.weight = llm.get_input_embeddings().weight
    tokenizer = _byte_tokenizer()
    prompt = TimedPrompt("random", tokenizer, lambda question: ("user\n", question), 5, frozenset({4, 5}))
    width = (1 + len(config.vision_config.deepstack_visual_indexes)) * text.hidden_size
    never = text.vocab_size - 1  # ends no answer, so that all have the length that is asked for
    return QwenModel("random", llm.eval().requires_grad_(requires_grad=False), prompt, (never,), width, config)


def made_up_prefix(model: QwenModel, num_segments: int) -> VideoPrefix:
    """A merged video: every segment as the recipe `long` keeps it."""
    per_segment, (rows, columns) = 80, DEFAULT_GRID
    tokens_NC = torch.randn(num_segments * per_segment, model.mm_hidden_size).half()
    starts_s = tuple(SEGMENT_S * segment for segment in range(num_segments))
    times = SegmentTimes(0, (per_segment,) * num_segments, starts_s, tuple(start_s + SEGMENT_S for start_s in starts_s))
    scale = torch.tensor([num_segments * SEGMENT_S, rows - 1, columns - 1], dtype=torch.float64)
    places = torch.rand(len(tokens_NC), 3, dtype=torch.float64) * scale
    return VideoPrefix(tokens_NC, None, times, places, DEFAULT_GRID)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*MARKS, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=MARKS[0], additional_special_tokens=[*MARKS[1:]])
