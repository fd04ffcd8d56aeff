"""Shared-prefix answering on a CPU against one question at a time and left-padded batches.

    python -m benchmarks.answer

A LLaMA of 271M with random weights in bfloat16 (in float32 on a CPU that does not compute in that), 305 visual tokens a
video, questions of 28 to 52 tokens, forced answer lengths evenly spread over 4 to 60. Every video is asked the same
lengths, so that one question at a time is timed over one video and counted eight times for eight. What bounds the
engine: prefill by the measured peak of a matrix product, decoding by reading the weights and the keys and values once a
step at the bandwidth measured with a matrix-vector product. On a GPU: `python -m benchmarks.gpu`. The last line is one
JSON object.
"""

import json
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks.measure import bandwidth, interleave, peak_flops
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.requests import Group, Request, Stats
from longvlm.pipeline.models.contract import Extent, Prompt, VideoRows, Vocabulary
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import AnswerRecipe

CONTEXT, NUM_VISUAL, TOWER_DIM = 2048, 305, 1024
NUM_VIDEOS, NUM_QUESTIONS, ROUNDS, SIDE = 8, 8, 3, 2048  # the last: of the product that stands for the peak
QUESTION_TOKENS = tuple(28 + round(i * 24 / 7) for i in range(NUM_QUESTIONS))  # 28 to 52


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a LLaMA."""

    width: int
    layers: int
    heads: int
    inner: int  # width inside a block's MLP
    vocabulary: int = 32_000


@dataclass(frozen=True)
class Load:
    """The load: so many visual tokens a video, questions of these lengths, and how long their answers are."""

    question_tokens: tuple[int, ...] = QUESTION_TOKENS
    answer_tokens: tuple[int, ...] = tuple(4 + 8 * (5 * i % NUM_QUESTIONS) for i in range(NUM_QUESTIONS))  # 4 to 60
    num_visual: int = NUM_VISUAL

    @property
    def questions(self) -> list[tuple[int, str, int]]:
        """Each one's number, its text for a `RandomModel`, and how long its answer is to be."""
        lengths = zip(self.question_tokens, self.answer_tokens, strict=True)
        return [(i, f"{i} {tokens}", most) for i, (tokens, most) in enumerate(lengths)]

    @property
    def tail_reads(self) -> int:
        """Positions behind the prefix that the steps for one video's answers read: each row's own so far."""
        lengths = zip(self.question_tokens, self.answer_tokens, strict=True)
        return sum(tokens + made for tokens, most in lengths for made in range(1, most))


SHAPE, LOAD = LlamaShape(1024, 16, 16, 2816), Load()
RECIPE = AnswerRecipe("random", "random", "random", max_new_tokens=max(LOAD.answer_tokens))


@dataclass(eq=False)
class RandomModel:
    """A language model whose questions are named "number length" and whose words mean nothing."""

    llm: Any
    projector: nn.Linear
    num_before: int = 40  # positions ahead of the video
    name: str = "random"
    context: int = CONTEXT
    eos_ids: tuple[int, ...] = (1 << 30,)  # never comes up, so that answers have the lengths asked for
    banned_ids: tuple[int, ...] = ()
    option_temperature: float = 1.0
    mark_ids: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.projector.weight.device

    @property
    def vocabulary(self) -> Vocabulary:
        """Of no words."""
        return Vocabulary(Tokenizer(WordLevel({}, unk_token="")), self.eos_ids)

    @property
    def mm_hidden_size(self) -> int:
        """Width of a visual token."""
        return self.projector.in_features

    def read(self, prefix: VideoPrefix) -> VideoRows:
        """Each token by itself."""
        return VideoRows(self.projector(prefix.rows.to(self.device, self.projector.weight.dtype)))

    @property
    def templates(self) -> tuple[str, ...]:
        """None by name."""
        return ("",)

    def extent(self, prefix: VideoPrefix) -> Extent:
        """As many rows as there are."""
        return Extent(len(prefix.rows), len(prefix.rows))

    def fold(self, seen_M: Tensor, prefix: VideoPrefix) -> Tensor:  # noqa: ARG002, N803
        """Each row is a token."""
        return seen_M

    def num_text_rows(self, start_s: float, end_s: float) -> int:  # noqa: ARG002
        """None."""
        return 0

    def caption_row(self, prefix: VideoPrefix, at_s: float) -> int:  # noqa: ARG002
        """Its prompts have no time markers; InputError."""
        raise InputError("it is a timed caption, and prompts of this model have no time markers to learn it at.")

    def lay_out(self, question: str, num_visual_tokens: int, template: str, *, may_think: bool = False) -> Prompt:  # noqa: ARG002
        """Some ids before the video, and the question's after it."""
        number, _, length = question.partition(" ")
        vocabulary = self.llm.config.vocab_size
        ids = [(int(number) * 977 + i * 31) % vocabulary for i in range(int(length))] if length else [1]
        return Prompt((*range(self.num_before), *[0] * num_visual_tokens, *ids), self.num_before, num_visual_tokens)

    def turn_ids(self, question: str, template: str) -> tuple[int, ...]:
        """As any question."""
        return self.lay_out(question, 1, template).ids

    def option_ids(self, options: Sequence[str]) -> list[tuple[int, ...]]:
        """A token an option."""
        return [(100 + i,) for i in range(len(options))]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids as they are."""
        return " ".join(map(str, ids))

    def embed(self, question: str, prefix_NC: Tensor) -> Tensor:  # noqa: N803
        """A whole prompt, [T, D], as one question alone needs it."""
        prompt = self.lay_out(question, len(prefix_NC), "")
        embeds = self.llm.get_input_embeddings()(torch.tensor(prompt.ids, device=self.device))
        embeds[self.num_before : self.num_before + len(prefix_NC)] = self.read(VideoPrefix(prefix_NC)).embeds
        return embeds


def random_model(
    shape: LlamaShape, device: torch.device, dtype: torch.dtype = torch.bfloat16, tower_dim: int = TOWER_DIM
) -> RandomModel:
    """Weights drawn on the device, in their own precision."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=CONTEXT,
        dtype=dtype,
    )
    with torch.device("meta"):  # shapes only: 7B in float32 would be drawn for nothing
        llm: Any = LlamaForCausalLM(config)
    llm = llm.to(dtype).to_empty(device=device).eval()
    for parameter in llm.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=config.initializer_range)
        else:
            nn.init.ones_(parameter)  # of norms
    with torch.device(device):
        llm.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are no weights
        projector = nn.Linear(tower_dim, shape.width).to(dtype)
    return RandomModel(llm.requires_grad_(requires_grad=False), projector.requires_grad_(requires_grad=False))


@torch.inference_mode()
def one_by_one(model: RandomModel, prefix: Tensor, load: Load = LOAD) -> None:
    """Each question of a video by itself."""
    for _, question, length in load.questions:
        embeds = model.embed(question, prefix)[None]
        made = model.llm.generate(inputs_embeds=embeds, do_sample=False, min_new_tokens=length, max_new_tokens=length)
        assert made.shape[1] == length


@torch.inference_mode()
def left_padded(model: RandomModel, prefix: Tensor, load: Load = LOAD) -> None:
    """The questions of a video in one batch of whole prompts, which ends with the longest answer."""
    rows = [model.embed(question, prefix) for _, question, _ in load.questions]
    embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    mask = torch.arange(embeds.shape[1], device=model.device) >= (embeds.shape[1] - lengths)[:, None]
    longest = max(load.answer_tokens)
    model.llm.generate(
        inputs_embeds=embeds,
        attention_mask=mask.long(),
        do_sample=False,
        min_new_tokens=longest,
        max_new_tokens=longest,
    )


@torch.inference_mode()
def yes_or_no(model: RandomModel, prefix: Tensor, load: Load = LOAD) -> None:
    """Each yes/no question of a video by itself: one forward pass, and the likelihood of two tokens."""
    for _, question, _ in load.questions:
        outputs = model.llm(inputs_embeds=model.embed(question, prefix)[None], logits_to_keep=1)
        outputs.logits[0, -1, [100, 101]].softmax(dim=0).tolist()


def run_engine(
    engine: Engine, prefixes: Sequence[Tensor], options: tuple[str, ...], load: Load = LOAD
) -> tuple[Stats, float]:
    """All questions of some videos through the engine, each answer as it has to be; what was done, and the seconds."""
    groups = [
        Group(
            VideoPrefix(prefix),
            [Request((v, i), text, options, max_new_tokens=most) for i, text, most in load.questions],
        )
        for v, prefix in enumerate(prefixes)
    ]
    engine.stats = Stats()
    started_s = time.perf_counter()
    answers = list(engine.answer(iter(groups)))
    wall_s = time.perf_counter() - started_s
    wanted: dict[Hashable, int] = {(v, i): most for v in range(len(prefixes)) for i, _, most in load.questions}
    for answer in answers:
        num_tokens = wanted.pop(answer.key)  # none twice
        assert answer.error is None, f"an answer failed: {answer.error}"
        if options:
            assert answer.text in options, f"{answer.text!r} is none of the options"
            assert 1 / len(options) <= (answer.confidence or 0) <= 1, f"an option's share is {answer.confidence}"
        else:
            assert answer.num_new_tokens == num_tokens, f"an answer has {answer.num_new_tokens} tokens"
    assert not wanted, f"{len(wanted)} questions were not answered"
    return engine.stats, wall_s


def explain(
    model: RandomModel, run: tuple[Stats, float], num_videos: int, rates: tuple[float, float], load: Load = LOAD
) -> dict[str, float]:
    """Where the engine's time went, and how far that is from what the machine could do (operations, bytes a second)."""
    (stats, wall_s), (flops, bytes_per_s) = run, rates
    config = model.llm.config
    decoder = [p for name, p in model.llm.named_parameters() if "embed_tokens" not in name]
    weight_bytes = sum(p.nbytes for p in decoder)
    kv_bytes = 2 * config.num_hidden_layers * config.hidden_size * decoder[0].element_size()
    # Each step reads the weights and its videos' prefixes once, and each new token its own row's tail so far.
    prefix_reads = (max(load.answer_tokens) - 1) * (model.num_before + load.num_visual)
    read = stats.num_steps * weight_bytes + num_videos * (prefix_reads + load.tail_reads) * kv_bytes
    blocks = sum(p.numel() for name, p in model.llm.named_parameters() if ".layers." in name)
    work = 2 * blocks * stats.prefill_tokens
    return {
        "prefill_s": stats.prefill_s,
        "decode_s": stats.decode_s,
        "host_s": wall_s - stats.prefill_s - stats.decode_s,
        "bandwidth_share": read / bytes_per_s / stats.decode_s if stats.num_steps else 0.0,
        "peak_share": work / flops / stats.prefill_s,
    }


def median_run(runs: Sequence[tuple[Stats, float]]) -> tuple[Stats, float]:
    """The one of median length; the first has only warmed up."""
    return sorted(runs[1:], key=lambda run: run[1])[len(runs[1:]) // 2]


def precision() -> torch.dtype:
    """Bfloat16 where the CPU multiplies in it; without AVX-512 its products take three times as long as float32's."""
    return torch.float32 if torch.backends.cpu.get_cpu_capability() in {"DEFAULT", "AVX2"} else torch.bfloat16


def main() -> None:
    """Measure and print."""
    device, dtype = torch.device("cpu"), precision()
    torch.manual_seed(0)
    plain = random_model(SHAPE, device, dtype)
    shared = random_model(SHAPE, device, dtype)  # what an engine makes of a model's layers stays with it
    engine = Engine(shared, RECIPE)
    prefixes = [torch.randn(NUM_VISUAL, TOWER_DIM) for _ in range(NUM_VIDEOS)]
    timed: dict[str, list[tuple[Stats, float]]] = {"1x8": [], "8x8": [], "bool_8x8": []}
    one, both = prefixes[:1], ("Yes", "No")
    seconds = interleave(
        {
            "one by one": lambda: one_by_one(plain, prefixes[0]),
            "left-padded": lambda: left_padded(plain, prefixes[0]),
            "1x8": lambda: timed["1x8"].append(run_engine(engine, one, ())),
            "8x8": lambda: timed["8x8"].append(run_engine(engine, prefixes, ())),
            "yes or no": lambda: yes_or_no(plain, prefixes[0]),
            "bool_8x8": lambda: timed["bool_8x8"].append(run_engine(engine, prefixes, both)),
        },
        ROUNDS,
    )
    took = {name: median(values) for name, values in seconds.items()}
    rates = (peak_flops(device, SIDE, dtype), bandwidth(device, dtype=dtype))
    parts = {
        name: explain(shared, median_run(runs), 1 if name == "1x8" else NUM_VIDEOS, rates)
        for name, runs in timed.items()
    }
    millions = sum(p.numel() for p in plain.llm.parameters()) / 1e6
    print(f"LLaMA of {millions:.0f}M ({SHAPE}), {dtype}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"peak {rates[0] / 1e12:.2f} TFLOP/s, bandwidth {rates[1] / 1e9:.1f} GB/s")
    for name, value in took.items():
        asked = NUM_QUESTIONS * (NUM_VIDEOS if name.endswith("8x8") else 1)
        print(f"{name:<12} {value:8.2f} s {asked / value:8.2f} questions/s")
    print(f"{'':<12} {'prefill s':>10} {'decode s':>9} {'host s':>7} {'of peak':>8} {'of bandwidth':>13}")
    for name, part in parts.items():
        print(
            f"{name:<12} {part['prefill_s']:10.2f} {part['decode_s']:9.2f} {part['host_s']:7.2f} "
            f"{part['peak_share']:8.0%} {part['bandwidth_share']:13.0%}"
        )
    result = {
        "ratio_1x8": took["one by one"] / took["1x8"],
        "ratio_8x8": NUM_VIDEOS * took["one by one"] / took["8x8"],
        "ratio_bool_8x8": NUM_VIDEOS * took["yes or no"] / took["bool_8x8"],
        "ratio_1x8_padded": took["left-padded"] / took["1x8"],
        "ratio_8x8_padded": NUM_VIDEOS * took["left-padded"] / took["8x8"],
    }
    print(
        json.dumps(
            {
                "device": device.type,
                "precision": str(dtype),
                **result,
                **{f"{k}_{n}": v for n, p in parts.items() for k, v in p.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
