"""Training steps of projector and LoRA: that the loss falls, and the throughput with a LLaMA of 7B."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from benchmarks.answer import TOWER_DIM, LlamaShape, RandomModel, random_model
from benchmarks.gpu.section import Found, Run, check
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.training.finetune import Finetuner
from longvlm.pipeline.training.packing import Example
from longvlm.schemas.training import TrainRecipe, lora, projector

SHAPE = LlamaShape(4096, 32, 32, 11008)
TINY_SHAPE = LlamaShape(64, 2, 4, 128, vocabulary=512)
VIDEOS, QUESTIONS, QUESTION_TOKENS, NUM_VISUAL = 8, 20, 30, 305
TINY_VIDEOS, TINY_QUESTIONS, TINY_VISUAL = 2, 4, 20
STEPS, TINY_STEPS = 4, 16  # the first of a measured few is left out: it warms up
MUST_FALL = 0.05  # nats over the steps of the tiny shape, most of whose weights are random and stay so
RECIPES: dict[str, Callable[[], TrainRecipe]] = {"projector": projector, "lora": lora}
LEARNS = {"projector": ("projector.",), "lora": ("projector.", "lora_A.", "lora_B.")}  # parts of parameters' names


class RandomAnswerModel(RandomModel):
    """A random model whose answers are ids, spelt out."""

    def option_ids(self, options: Sequence[str]) -> list[tuple[int, ...]]:
        """The ids that an option names."""
        return [tuple(map(int, option.split())) for option in options]


def run(run: Run) -> None:
    """Each stage at a tiny shape, where the loss has to fall, then at the shape that is measured."""
    for name in RECIPES:
        run.part(f"learns_{name}", lambda name=name: check_loss_falls(run, name))  # type: ignore[misc]
    for name in RECIPES:
        if run.device.type == "cuda":
            gc.collect()  # a finetuner holds itself
            torch.cuda.empty_cache()
        run.part(name, lambda name=name: measure(run, name))  # type: ignore[misc]


def check_loss_falls(run: Run, stage: str) -> Found:
    """Train in float32 on the same examples over and over; the loss has to fall."""
    faster = replace(RECIPES[stage](), learning_rate=1e-2, projector_learning_rate=1e-2, precision="float32")
    finetuner = random_finetuner(
        run, TINY_SHAPE, replace(faster, warmup_ratio=0.0, lora_dropout=0.0), torch.float32, TINY_STEPS
    )
    examples = random_examples(TINY_VIDEOS, TINY_QUESTIONS, TINY_VISUAL, TINY_SHAPE.vocabulary)
    losses = [finetuner.step(examples).loss for _ in range(TINY_STEPS)]
    check_gradients(finetuner, stage)
    check(losses[-1] < losses[0] - MUST_FALL, f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}.")
    run.say(f"{stage}, tiny: loss {losses[0]:.3f} to {losses[-1]:.3f} in {TINY_STEPS} steps")
    return {"losses": losses}


def measure(run: Run, stage: str) -> Found:
    """Measure tokens a second and peak memory, in bfloat16, with the recipe's own settings."""
    shape = TINY_SHAPE if run.is_tiny else SHAPE
    sizes = (TINY_VIDEOS, TINY_QUESTIONS, TINY_VISUAL) if run.is_tiny else (VIDEOS, QUESTIONS, NUM_VISUAL)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    finetuner = random_finetuner(run, shape, RECIPES[stage](), torch.bfloat16, STEPS)
    examples = random_examples(*sizes, shape.vocabulary)
    steps = [finetuner.step(examples) for _ in range(STEPS)]
    check(not steps[0].refused, f"examples were refused: {steps[0].refused[:1]}.")
    check(steps[0].conversations == sizes[0] * sizes[1], f"{steps[0].conversations} conversations were learnt from.")
    check_gradients(finetuner, stage)
    step_s = median(step.step_s for step in steps[1:])
    peak_bytes = torch.cuda.max_memory_allocated() if run.device.type == "cuda" else None
    found = {
        "tokens_per_s": steps[0].tokens / step_s,
        "conversations_per_s": steps[0].conversations / step_s,
        "step_s": step_s,
        "tokens_per_step": steps[0].tokens,
        "peak_bytes": peak_bytes,
        "losses": [step.loss for step in steps],
    }
    held = "" if peak_bytes is None else f", {peak_bytes / 1e9:.1f} GB at the most"
    run.say(f"{stage}: {found['tokens_per_s']:.0f} tokens/s in steps of {steps[0].tokens} tokens{held}")
    return found


def random_finetuner(run: Run, shape: LlamaShape, recipe: TrainRecipe, dtype: torch.dtype, num_steps: int) -> Finetuner:
    """The finetuner of a random model."""
    torch.manual_seed(0)
    drawn = random_model(shape, run.device, dtype)
    return Finetuner(RandomAnswerModel(drawn.llm, drawn.projector, eos_ids=(2,)), recipe, num_steps)


def random_examples(num_videos: int, num_questions: int, num_visual: int, vocabulary: int) -> list[Example]:
    """Training examples: videos of random tokens, and short answers of random ids."""
    draw = torch.Generator().manual_seed(0)

    def answer(number: int) -> str:
        ids = torch.randint(100, vocabulary, (1 + number % 4,), generator=draw)
        return " ".join(map(str, ids.tolist()))

    return [
        Example(
            VideoPrefix(torch.randn(num_visual, TOWER_DIM, generator=draw)),
            [((f"{video * num_questions + i} {QUESTION_TOKENS}", answer(i)),) for i in range(num_questions)],
        )
        for video in range(num_videos)
    ]


def check_gradients(finetuner: Finetuner, stage: str) -> None:
    """Check gradients after a step: what is trained has finite ones, not all zero; the rest has none."""
    some: dict[str, Any] = {}
    for name, parameter in finetuner.trainable.named_parameters():
        is_to_learn = any(part in name for part in LEARNS[stage])
        check(parameter.grad is not None or not is_to_learn, f"{name} has no gradient, and should learn.")
        check(parameter.grad is None or is_to_learn, f"{name} has a gradient, and should stay as it is.")
        if parameter.grad is not None:
            check(bool(parameter.grad.isfinite().all()), f"the gradient of {name} is not finite.")
            kind = next(part for part in LEARNS[stage] if part in name)
            some[kind] = some.get(kind, False) or bool(parameter.grad.any())
    for kind in LEARNS[stage]:
        check(bool(some.get(kind)), f"nothing of {kind.removesuffix('.')} has a gradient other than zero.")
