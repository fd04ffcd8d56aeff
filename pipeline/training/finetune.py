"""The fine-tuning loop: optimizer steps over batches of stored tokens, with a state to resume from. Needs no Ray.

A step's random numbers come from the recipe's seed, the step and the worker, so that a resumed run is the run that was
never interrupted.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from longvlm.pipeline.models.contract import LanguageModel
from longvlm.pipeline.models.prefix import SegmentTimes, VideoPrefix
from longvlm.pipeline.training.packing import (
    ConversationTokenizer,
    Example,
    PackedConversation,
    PackedSequence,
    TrainBatch,
    collate,
    pack,
)
from longvlm.pipeline.training.parameters import TrainableModel, full_tensor
from longvlm.pipeline.training.whitening import Whitening, fit_whitening
from longvlm.schemas.training import TrainRecipe


class DivergedError(Exception):
    """Training has diverged, its loss is no number any more: one sentence that says when, and what to do."""


@dataclass(frozen=True)
class StepResult:
    """The metrics of an optimizer step. Loss, rate and norm are of all workers; the rest is of this one."""

    step: int  # 1 is the first
    loss: float  # before the step; 0 where there was nothing to learn
    lr: float  # of the language model, or of the projector where that alone learns
    grad_norm: float
    step_s: float
    videos: int
    conversations: int  # learnt from
    tokens: int  # positions of all packed sequences
    refused: tuple[tuple[int, int, str], ...] = ()  # example, its conversation, and why it could not be learnt from


class Finetuner:
    """A training run's model, optimizer and progress. The model is the run's own until `merge_and_unload`.

    Where torch.distributed runs, every worker takes every step, with its share of the step's examples.

    Args:
        model: as `load_model` gives it.
        recipe: how it is trained.
        num_steps: of the whole run, by which the learning rate falls.
        whitening: of the tokens, where the recipe asks for one (`fit_whitening`).
        shard: what shards the weights over workers, called before the optimizer is made.
    """

    def __init__(
        self,
        model: LanguageModel,
        recipe: TrainRecipe,
        num_steps: int,
        *,
        whitening: Whitening | None = None,
        shard: Callable[[TrainableModel], None] | None = None,
    ) -> None:
        if recipe.whiten != (whitening is not None):
            raise ValueError("a whitening is given where the recipe asks for one, and only there")
        self.recipe, self.num_steps, self.num_done = recipe, num_steps, 0
        self.tokenizer = ConversationTokenizer(model, recipe.template or model.templates[0])
        self.trainable = TrainableModel(model, recipe, whitening)
        if shard is not None:
            shard(self.trainable)
        self.optimizer = torch.optim.AdamW(
            self.trainable.parameter_groups(), lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps
        )
        self.rank, self.num_workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def step(self, examples: Sequence[Example]) -> StepResult:
        """Take one optimizer step, on a batch of examples.

        Raises:
            DivergedError: the loss is not a number; the weights are as they were before the step.
        """
        started_s = time.perf_counter()
        torch.manual_seed(hash((self.recipe.seed, self.num_done, self.rank)) & 0x7FFFFFFFFFFFFFFF)
        packed = pack(self.tokenizer, examples, self.recipe.max_length)
        batches = [self._collate(part) for part in _micro_batches(packed.sequences, self.recipe.accumulation)]
        micro_batches = [batch for batch in batches if batch is not None]
        total = self._all_reduce(sum(float(batch.weights.sum()) for batch in micro_batches))
        rate = self._set_learning_rates()
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.trainable.model.device)
        for batch in micro_batches:
            part = self._loss(examples, batch) / max(total, 1.0)
            (part * self.num_workers).backward()  # type: ignore[no-untyped-call] # workers' gradients are averaged
            loss += part.detach()
        mean = self._all_reduce(float(loss))
        if not math.isfinite(mean):
            raise DivergedError(
                f"the loss of step {self.num_done + 1} is {mean}; lower the learning rate, or train in "
                "another precision."
            )
        norm = nn.utils.clip_grad_norm_(list(self._trained_parameters()), self.recipe.clip_norm)
        self.optimizer.step()
        self.num_done += 1
        return StepResult(
            self.num_done,
            mean,
            rate,
            float(full_tensor(norm)),
            time.perf_counter() - started_s,
            len(examples),
            sum(len(one.conversations) for one in packed.sequences),
            sum(batch.num_tokens for batch in micro_batches),
            tuple(packed.refused),
        )

    def lr_factor(self, step: int) -> float:
        """Factor of the learning rate at a step, 0 being the first: linear warmup from 0, then a cosine to 0."""
        warmup = math.ceil(self.recipe.warmup_ratio * self.num_steps)
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(self.num_steps - warmup, 1)))

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to resume: whole on the first worker, which saves it; every worker has to ask."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return {
            "num_done": self.num_done,
            "model": get_model_state_dict(self.trainable, options=options),
            "optimizer": get_optimizer_state_dict(self.trainable, self.optimizer, options=options),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what `state_dict` gave, with the same recipe and model; every worker has to be given it."""
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
        set_model_state_dict(self.trainable, state["model"], options=options)
        set_optimizer_state_dict(self.trainable, self.optimizer, state["optimizer"], options=options)
        self.num_done = state["num_done"]

    def _trained_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def _set_learning_rates(self) -> float:
        """Set the rates of this step; returns the language model's, or the only one there is."""
        factor = self.lr_factor(self.num_done)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["base_lr"]
        return float(self.optimizer.param_groups[0]["lr"])

    def _loss(self, examples: Sequence[Example], batch: TrainBatch) -> Tensor:
        loss: Tensor = self.trainable([*examples, self._empty_example()] if self.num_workers > 1 else examples, batch)
        return loss

    def _collate(self, sequences: Sequence[PackedSequence]) -> TrainBatch | None:
        """A micro-batch. Where several workers step together none may stay out: an empty one weighs nothing."""
        device, average = self.trainable.model.device, self.recipe.average
        if sequences:
            return collate(sequences, average, device)
        if self.num_workers == 1:
            return None
        model, empty = self.trainable.model, self._empty_example()
        blank = PackedConversation(np.array([model.eos_ids[0]] * 2), np.array([-1, 0]))
        one = PackedSequence(-1, self.tokenizer.head_ids, model.extent(empty.prefix), [blank])
        batch = collate([one], average, device)
        batch.weights.zero_()
        return batch

    def _empty_example(self) -> Example:
        """A video of one empty token."""
        row = torch.zeros(1, self.trainable.model.mm_hidden_size)
        times = SegmentTimes(0, (1,), (0.0,), (0.0,))
        return Example(VideoPrefix(row, None, times, torch.zeros(1, 3, dtype=torch.float64), (1, 1)), [])

    def _all_reduce(self, number: float) -> float:
        """The sum over all workers."""
        if self.num_workers == 1:
            return number
        summed = torch.tensor(number, dtype=torch.float64, device=self.trainable.model.device)
        dist.all_reduce(summed)
        return float(summed)


def finetune(
    model: LanguageModel,
    batches: Iterable[Sequence[Example]],
    recipe: TrainRecipe,
    num_steps: int,
    *,
    whitening: Whitening | None = None,
    on_step: Callable[[StepResult], object] | None = None,
) -> Finetuner:
    """Train on batches, one a step, in this process; `.trainable.merge_and_unload()` of the result is the model.

    Args:
        model: as `load_model` gives it.
        batches: at least `num_steps` of them.
        recipe: how it is trained; its epochs, batch_videos and max_steps are up to whoever makes the batches.
        num_steps: of the whole run.
        whitening: None where the recipe asks for one: it is made of the first batches.
        on_step: called after every step.

    Raises:
        DivergedError: the loss is not a number.
        InputError: the recipe cannot be carried out with this model.
        ValueError: there are fewer batches than steps.
    """
    source = iter(batches)
    if recipe.whiten and whitening is None:
        for_sample, source = itertools.tee(source)
        whitening = fit_whitening(example.prefix.rows for examples in for_sample for example in examples)
        del for_sample  # or it would keep every batch
    finetuner = Finetuner(model, recipe, num_steps, whitening=whitening)
    for examples in islice(source, num_steps):
        result = finetuner.step(examples)
        if on_step is not None:
            on_step(result)
    if finetuner.num_done < num_steps:
        raise ValueError(f"there were batches for {finetuner.num_done} of {num_steps} steps")
    return finetuner


def _micro_batches(sequences: Sequence[PackedSequence], number: int) -> list[Sequence[PackedSequence]]:
    """So many runs of sequences, as even as can be; some may be empty."""
    ends = [len(sequences) * i // number for i in range(number + 1)]
    return [sequences[start:end] for start, end in itertools.pairwise(ends)]
