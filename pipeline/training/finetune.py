"""Training on stored tokens: steps over batches of lessons, with a state to go on from. Needs no Ray.

A step's random numbers come from the recipe's seed, the step and the worker, so that a run that goes on from a state
is the run that was never interrupted.
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
from longvlm.pipeline.training.packing import Branch, Lesson, Pack, Sheet, Speller, lay_side_by_side, pack
from longvlm.pipeline.training.parameters import Trainee, whole
from longvlm.pipeline.training.whitening import Whitening, fit_whitening
from longvlm.schemas.training import TrainRecipe


class DivergedError(Exception):
    """The loss is no number any more: one sentence that says when, and what to do."""


@dataclass(frozen=True)
class Step:
    """What a step did. Loss, rate and norm are of all workers; the rest is of this one."""

    step: int  # 1 is the first
    loss: float  # before the step; 0 where there was nothing to learn
    lr: float  # of the language model, or of the projector where that alone learns
    grad_norm: float
    step_s: float
    videos: int
    conversations: int  # learnt from
    tokens: int  # positions of all packed sequences
    refused: tuple[tuple[int, int, str], ...] = ()  # lesson, its conversation, and why it could not be learnt from


class Finetuner:
    """A model, its optimizer, and how far they are. The model is the tuner's own until `finish`.

    Where torch.distributed runs, every worker takes every step, with its share of the step's lessons.

    Args:
        model: as `load_model` gives it.
        recipe: how it is trained.
        num_steps: of the whole run, by which the learning rate falls.
        whitening: of the tokens, where the recipe asks for one (`fit_whitening`).
        shard: what spreads the weights over workers, called before the optimizer is made.
    """

    def __init__(
        self,
        model: LanguageModel,
        recipe: TrainRecipe,
        num_steps: int,
        *,
        whitening: Whitening | None = None,
        shard: Callable[[Trainee], None] | None = None,
    ) -> None:
        if recipe.whiten != (whitening is not None):
            raise ValueError("a whitening is given where the recipe asks for one, and only there")
        self.recipe, self.num_steps, self.num_done = recipe, num_steps, 0
        self.speller = Speller(model, recipe.template or model.templates[0])
        self.trainee = Trainee(model, recipe, whitening)
        if shard is not None:
            shard(self.trainee)
        self.optimizer = torch.optim.AdamW(
            self.trainee.groups(), lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.eps
        )
        self.rank, self.num_workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def step(self, lessons: Sequence[Lesson]) -> Step:
        """Learn from one batch.

        Raises:
            DivergedError: the loss is not a number; the weights are as they were before the step.
        """
        started_s = time.perf_counter()
        torch.manual_seed(hash((self.recipe.seed, self.num_done, self.rank)) & 0x7FFFFFFFFFFFFFFF)
        packed = pack(self.speller, lessons, self.recipe.max_length)
        sheets = [self._sheet(packs) for packs in _parts(packed.packs, self.recipe.accumulation)]
        learnable = [sheet for sheet in sheets if sheet is not None]
        total = self._sum(sum(float(sheet.weights.sum()) for sheet in learnable))
        rate = self._set_rates()
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.trainee.model.device)
        for sheet in learnable:
            part = self._trainee_loss(lessons, sheet) / max(total, 1.0)
            (part * self.num_workers).backward()  # type: ignore[no-untyped-call] # workers' gradients are averaged
            loss += part.detach()
        mean = self._sum(float(loss))
        if not math.isfinite(mean):
            raise DivergedError(
                f"the loss of step {self.num_done + 1} is {mean}; lower the learning rate, or train in "
                "another precision."
            )
        norm = nn.utils.clip_grad_norm_(list(self._learning()), self.recipe.clip_norm)
        self.optimizer.step()
        self.num_done += 1
        return Step(
            self.num_done,
            mean,
            rate,
            float(whole(norm)),
            time.perf_counter() - started_s,
            len(lessons),
            sum(len(one.branches) for one in packed.packs),
            sum(sheet.num_tokens for sheet in learnable),
            tuple(packed.refused),
        )

    def rate_at(self, step: int) -> float:
        """Share of the learning rate at a step, 0 being the first: linear from 0, then half a cosine to 0."""
        warmup = math.ceil(self.recipe.warmup_ratio * self.num_steps)
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(self.num_steps - warmup, 1)))

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on: whole on the first worker, which saves it; every worker has to ask."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return {
            "num_done": self.num_done,
            "model": get_model_state_dict(self.trainee, options=options),
            "optimizer": get_optimizer_state_dict(self.trainee, self.optimizer, options=options),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, with the same recipe and model; every worker has to be given it."""
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
        set_model_state_dict(self.trainee, state["model"], options=options)
        set_optimizer_state_dict(self.trainee, self.optimizer, state["optimizer"], options=options)
        self.num_done = state["num_done"]

    def _learning(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def _set_rates(self) -> float:
        """Set the rates of this step; returns the language model's, or the only one there is."""
        share = self.rate_at(self.num_done)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["base_lr"]
        return float(self.optimizer.param_groups[0]["lr"])

    def _trainee_loss(self, lessons: Sequence[Lesson], sheet: Sheet) -> Tensor:
        loss: Tensor = self.trainee([*lessons, self._nothing()] if self.num_workers > 1 else lessons, sheet)
        return loss

    def _sheet(self, packs: Sequence[Pack]) -> Sheet | None:
        """Some packs as tensors. Where several workers step together none may stay out: an empty one weighs nothing."""
        device, average = self.trainee.model.device, self.recipe.average
        if packs:
            return lay_side_by_side(packs, average, device)
        if self.num_workers == 1:
            return None
        model, nothing = self.trainee.model, self._nothing()
        blank = Branch(np.array([model.eos_ids[0]] * 2), np.array([-1, 0]))
        one = Pack(-1, self.speller.before, model.count_rows(nothing.prefix), [blank])
        sheet = lay_side_by_side([one], average, device)
        sheet.weights.zero_()
        return sheet

    def _nothing(self) -> Lesson:
        """A video of one empty token."""
        row = torch.zeros(1, self.trainee.model.mm_hidden_size)
        return Lesson(VideoPrefix(row, times=SegmentTimes(0, (1,), (0.0,))), [])

    def _sum(self, number: float) -> float:
        """Over all workers."""
        if self.num_workers == 1:
            return number
        summed = torch.tensor(number, dtype=torch.float64, device=self.trainee.model.device)
        dist.all_reduce(summed)
        return float(summed)


def fit(
    model: LanguageModel,
    batches: Iterable[Sequence[Lesson]],
    recipe: TrainRecipe,
    num_steps: int,
    *,
    whitening: Whitening | None = None,
    on_step: Callable[[Step], object] | None = None,
) -> Finetuner:
    """Train on batches, one a step, in this process; `.trainee.finish()` of what is returned gives the model back.

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
        whitening = fit_whitening(lesson.prefix.rows for lessons in for_sample for lesson in lessons)
        del for_sample  # or it would keep every batch
    tuner = Finetuner(model, recipe, num_steps, whitening=whitening)
    for lessons in islice(source, num_steps):
        step = tuner.step(lessons)
        if on_step is not None:
            on_step(step)
    if tuner.num_done < num_steps:
        raise ValueError(f"there were batches for {tuner.num_done} of {num_steps} steps")
    return tuner


def _parts(packs: Sequence[Pack], number: int) -> list[Sequence[Pack]]:
    """So many runs of packs, as even as can be; some may be empty."""
    ends = [len(packs) * i // number for i in range(number + 1)]
    return [packs[start:end] for start, end in itertools.pairwise(ends)]
