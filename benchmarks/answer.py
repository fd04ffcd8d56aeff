"""Shared-prefix answering against one question at a time and left-padded batches.

    python -m benchmarks.answer

A LLaMA with random weights in bfloat16 (271M on a CPU, 7B-shaped on a GPU), 305 visual tokens a video, questions of 28
to 52 tokens, forced answer lengths evenly spread over 4 to 60. Every video is asked the same lengths, so that one
question at a time is timed over one video and counted eight times for eight. What bounds the engine: prefill by the
measured peak of a matrix product, decoding by reading the weights and the keys and values once a step at the bandwidth
measured with a matrix-vector product. The last line is one JSON object.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import interleave
from pipeline.language.backend import Group, Request, Stats
from pipeline.language.engine import Engine
from pipeline.language.model import Prompt, Timeline
from schemas.recipe import AnswerRecipe

SHAPES = {  # width, layers, heads, feed-forward width; rounds; side of the square product that stands for the peak
    "cpu": ((1024, 16, 16, 2816), 3, 2048),
    "cuda": ((4096, 32, 32, 11008), 5, 16384),
}
VOCABULARY, CONTEXT, NUM_VISUAL, TOWER_DIM, NUM_BEFORE = 32_000, 2048, 305, 1024, 40
NUM_VIDEOS = NUM_QUESTIONS = 8
QUESTION_TOKENS = [28 + round(i * 24 / 7) for i in range(NUM_QUESTIONS)]  # 28 to 52
ANSWER_TOKENS = [4 + 8 * (5 * i % NUM_QUESTIONS) for i in range(NUM_QUESTIONS)]  # 4 to 60, in no order
RECIPE = AnswerRecipe("random", "random", "random", max_new_tokens=max(ANSWER_TOKENS))


@dataclass(eq=False)
class RandomModel:
    """A language model whose questions are named "number length" and whose words mean nothing."""

    llm: Any
    projector: nn.Linear
    name: str = "random"
    context: int = CONTEXT
    mm_hidden_size: int = TOWER_DIM
    eos_ids: tuple[int, ...] = (VOCABULARY,)  # never comes up, so that answers have the lengths asked for
    banned_ids: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.projector.weight.device

    def project(
        self,
        prefix_NC: Tensor,  # noqa: N803
        num_whole_frames: int | None,  # noqa: ARG002
        timeline: Timeline | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Each token by itself."""
        return self.projector(prefix_NC.to(self.device, self.projector.weight.dtype))

    @property
    def templates(self) -> tuple[str, ...]:
        """None by name."""
        return ("",)

    def count_rows(self, num_rows: int, num_whole_frames: int | None, timeline: Timeline | None) -> int:  # noqa: ARG002
        """As many as there are."""
        return num_rows

    def marker_ids(self, start_s: float) -> tuple[int, ...]:  # noqa: ARG002
        """None."""
        return ()

    def lay_out(self, question: str, num_visual_tokens: int, template: str) -> Prompt:  # noqa: ARG002
        """Some ids before the video, and the question's after it."""
        number, _, length = question.partition(" ")
        ids = [(int(number) * 977 + i * 31) % VOCABULARY for i in range(int(length))] if length else [1]
        return Prompt((*range(NUM_BEFORE), *[0] * num_visual_tokens, *ids), NUM_BEFORE, num_visual_tokens)

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
        embeds[NUM_BEFORE : NUM_BEFORE + len(prefix_NC)] = self.project(prefix_NC, None)
        return embeds


def random_model(device: torch.device) -> RandomModel:
    """Weights drawn on the device."""
    width, layers, heads, inner = SHAPES[device.type][0]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=CONTEXT,
        dtype="bfloat16",
    )
    with torch.device(device):
        llm = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        return RandomModel(llm, nn.Linear(TOWER_DIM, width).to(torch.bfloat16))


@torch.inference_mode()
def one_by_one(model: RandomModel, prefix: Tensor) -> None:
    """Each question of a video by itself."""
    for i, (question, length) in enumerate(zip(QUESTION_TOKENS, ANSWER_TOKENS, strict=True)):
        embeds = model.embed(f"{i} {question}", prefix)[None]
        made = model.llm.generate(inputs_embeds=embeds, do_sample=False, min_new_tokens=length, max_new_tokens=length)
        assert made.shape[1] == length


@torch.inference_mode()
def left_padded(model: RandomModel, prefix: Tensor) -> None:
    """The questions of a video in one batch of whole prompts, which ends with the longest answer."""
    rows = [model.embed(f"{i} {question}", prefix) for i, question in enumerate(QUESTION_TOKENS)]
    embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    mask = torch.arange(embeds.shape[1], device=model.device) >= (embeds.shape[1] - lengths)[:, None]
    longest = max(ANSWER_TOKENS)
    model.llm.generate(
        inputs_embeds=embeds,
        attention_mask=mask.long(),
        do_sample=False,
        min_new_tokens=longest,
        max_new_tokens=longest,
    )


@torch.inference_mode()
def yes_or_no(model: RandomModel, prefix: Tensor) -> None:
    """Each yes/no question of a video by itself: one forward pass, and the likelihood of two tokens."""
    for i, question in enumerate(QUESTION_TOKENS):
        outputs = model.llm(inputs_embeds=model.embed(f"{i} {question}", prefix)[None], logits_to_keep=1)
        outputs.logits[0, -1, [100, 101]].softmax(dim=0).tolist()


def run_engine(
    model: RandomModel, prefixes: list[Tensor], options: tuple[str, ...], timed: list[tuple[Stats, float]]
) -> None:
    """All questions of some videos through the engine; notes what it did and how long it took."""
    questions = list(enumerate(zip(QUESTION_TOKENS, ANSWER_TOKENS, strict=True)))
    groups = [
        Group(
            prefix, [Request((v, i), f"{i} {tokens}", options, max_new_tokens=most) for i, (tokens, most) in questions]
        )
        for v, prefix in enumerate(prefixes)
    ]
    engine = Engine(model, RECIPE)
    started_s = time.perf_counter()
    answers = list(engine.answer(iter(groups)))
    timed.append((engine.stats, time.perf_counter() - started_s))
    assert len(answers) == len(prefixes) * NUM_QUESTIONS
    assert all(answer.error is None for answer in answers)


def peak_flops(device: torch.device, side: int) -> float:
    """Of a large square product in bfloat16."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / fastest(lambda: left @ right, device)


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a matrix-vector product whose matrix fits no cache (1 GB)."""
    matrix = torch.randn(16_384, 32_768, device=device, dtype=torch.bfloat16)
    vector = torch.randn(1, 32_768, device=device, dtype=torch.bfloat16)
    return matrix.nbytes / fastest(lambda: nn.functional.linear(vector, matrix), device)


def fastest(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of ten calls."""

    def finished() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return min(interleave({"it": finished}, 10)["it"])


def explain(
    model: RandomModel, stats: Stats, wall_s: float, num_videos: int, rates: tuple[float, float]
) -> dict[str, float]:
    """Where the engine's time went, and how far that is from what the machine could do."""
    flops, bytes_per_s = rates
    decoder = [p for name, p in model.llm.named_parameters() if "embed_tokens" not in name]
    weight_bytes = sum(p.nbytes for p in decoder)
    config = model.llm.config
    kv_bytes = 2 * config.num_hidden_layers * config.hidden_size * 2
    # Each step reads the weights and its videos' prefixes once, and each new token its own row's tail so far.
    tails = sum(tokens + q for q, most in zip(QUESTION_TOKENS, ANSWER_TOKENS, strict=True) for tokens in range(most))
    read = (
        stats.num_steps * (weight_bytes + num_videos * (NUM_BEFORE + NUM_VISUAL) * kv_bytes)
        + num_videos * tails * kv_bytes
    )
    blocks = sum(p.numel() for name, p in model.llm.named_parameters() if ".layers." in name)
    work = 2 * blocks * stats.prefill_tokens
    return {
        "prefill_s": stats.prefill_s,
        "decode_s": stats.decode_s,
        "host_s": wall_s - stats.prefill_s - stats.decode_s,
        "bandwidth_share": read / bytes_per_s / stats.decode_s if stats.decode_s else 0.0,
        "peak_share": work / flops / stats.prefill_s,
    }


def main() -> None:
    """Measure and print."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, rounds, side = SHAPES[device.type]
    torch.manual_seed(0)
    plain = random_model(device)
    shared = RandomModel(random_model(device).llm, plain.projector)  # the engine's attention stays with its model
    prefixes = [torch.randn(NUM_VISUAL, TOWER_DIM) for _ in range(NUM_VIDEOS)]
    timed: dict[str, list[tuple[Stats, float]]] = {"1x8": [], "8x8": [], "bool_8x8": []}
    one = prefixes[:1]
    seconds = interleave(
        {
            "one by one": lambda: one_by_one(plain, prefixes[0]),
            "left-padded": lambda: left_padded(plain, prefixes[0]),
            "1x8": lambda: run_engine(shared, one, (), timed["1x8"]),
            "8x8": lambda: run_engine(shared, prefixes, (), timed["8x8"]),
            "yes or no": lambda: yes_or_no(plain, prefixes[0]),
            "bool_8x8": lambda: run_engine(shared, prefixes, ("Yes", "No"), timed["bool_8x8"]),
        },
        rounds,
    )
    took = {name: median(values) for name, values in seconds.items()}
    rates = (peak_flops(device, side), bandwidth(device))
    parts = {
        name: explain(
            shared, *sorted(runs[1:], key=lambda run: run[1])[len(runs[1:]) // 2], 1 if name == "1x8" else 8, rates
        )
        for name, runs in timed.items()
    }
    millions = sum(p.numel() for p in plain.llm.parameters()) / 1e6
    print(f"LLaMA of {millions:.0f}M (width, layers, heads, inner: {shape}), bfloat16, {device.type}")
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
        json.dumps({"device": device.type, **result, **{f"{k}_{n}": v for n, p in parts.items() for k, v in p.items()}})
    )


if __name__ == "__main__":
    main()
