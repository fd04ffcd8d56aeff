"""An ablation on the tiny world: do local tokens in time order with global ones beat pooled features?

    python -m benchmarks.ablation [--work build/ablation] [--steps 3200] [--videos 1500] [--seeds 3] [--only NAME ...]
        [--results benchmarks/ablation/runs]

Every variant is a small LongVLM from random weights that learns from the same videos and questions for the same number
of steps, three seeds each; only what stands in its prefix differs. `pooled` are Video-ChatGPT's features (arXiv
2306.05424, section 3.1): the mean of every patch over time, and the mean of every frame over its patches. They get the
same aids: whitening, time markers (after the frames of a segment) and timed captions. `global` has no segments, and so
neither markers nor captions; `no time markers` is the paper's plain layout, where captions have no place either.

A run that is finished lies among the results as JSON and is not done again, so that the study goes on where it stopped.
Whole answers are right or wrong, on videos of a seed that nothing learns from; at each quarter of the steps, so that
one sees whether a plateau was reached. Bound by arithmetic on the CPU.
"""

# ruff: noqa: N806 - tensors are named by their shape

import json
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import numpy as np
import torch

from benchmarks.ablation.tokens import KEPT, KeptRows, read_rows
from longvlm import tinyworld
from longvlm.pipeline.models.longvlm.init import Shape, build_untrained
from longvlm.pipeline.models.longvlm.model import load_longvlm
from longvlm.pipeline.models.prefix import SegmentTimes, VideoPrefix
from longvlm.pipeline.models.prompt import PromptLayout
from longvlm.pipeline.training.finetune import Finetuner
from longvlm.pipeline.training.packing import PAD, Caption, Example, collate, pack
from longvlm.pipeline.training.whitening import fit_whitening
from longvlm.schemas.fingerprint import fingerprint
from longvlm.schemas.training import TrainRecipe, from_settings
from longvlm.tinyworld.captions import timed_captions
from longvlm.tinyworld.make import CHOOSE_SEED, PER_KIND, SHAPE, TRAIN_SEED, vocabulary
from longvlm.tinyworld.questions import draw_questions
from longvlm.tinyworld.scenes import SEGMENT_S, draw_scene
from longvlm.tinyworld.tower import DIM

RESULTS = Path(__file__).parent / "runs"
NUM_TESTED = 200  # videos
QUARTERS = 4
STUDIED = {**SHAPE, "layers": 4}  # one layer less than what ships: there are 30 runs
RECIPE = from_settings(tomllib.loads((Path(tinyworld.__file__).parent / "training.toml").read_text()))  # as shipped


@dataclass(frozen=True)
class Variant:
    """A variant of the prefix: which tokens stand in it."""

    name: str
    num_global: int = 5
    kept: int | None = 8  # local tokens a segment; None: no local tokens
    is_pooled: bool = False
    has_markers: bool = True

    @property
    def layout(self) -> PromptLayout:
        """The layout of its prompts: without segments there is nothing to mark."""
        return "time_markers" if self.has_markers and (self.is_pooled or self.kept) else "plain"

    def prefix(self, rows: KeptRows) -> VideoPrefix:
        """A video's rows, and when its segments began if that is marked."""
        head = rows.patches if self.is_pooled else rows.cls[len(rows.cls) - self.num_global :]
        if self.kept is None and not self.is_pooled:
            return VideoPrefix(head)
        segments = rows.frames if self.is_pooled else rows.local[self.kept or 0]
        starts_s = tuple(float(SEGMENT_S * segment) for segment in range(len(segments)))
        ends_s = tuple(start_s + SEGMENT_S for start_s in starts_s)
        times = SegmentTimes(len(head), (segments.shape[1],) * len(segments), starts_s, ends_s)
        rows_NC = torch.cat([head, segments.flatten(0, 1)])
        return VideoPrefix(rows_NC, times=times if self.has_markers else None)


VARIANTS = (
    Variant("local + global"),
    Variant("pooled", is_pooled=True),
    Variant("global", kept=None),
    Variant("local", num_global=0),
    *(Variant(f"{kept} tokens a segment", kept=kept) for kept in KEPT if kept != 8),
    *(Variant(f"{number} global layers", num_global=number) for number in (1, 3)),
    Variant("no time markers", has_markers=False),
)


@dataclass(frozen=True)
class Study:
    """The settings that all runs of the study have in common."""

    steps: int
    videos: int
    world: int = tinyworld.WORLD_VERSION

    @property
    def fingerprint(self) -> str:
        """A hash of all that the runs share: results of another study are never taken for this one's."""
        shared = {"recipe": RECIPE.fingerprint, "shape": STUDIED, "asked": PER_KIND, "words": vocabulary()}
        return fingerprint({**asdict(self), **shared})


def examples_of(variant: Variant, seed: int, rows: Sequence[KeptRows]) -> tuple[list[Example], list[list[str]]]:
    """Training examples, with captions where there are markers; and the kinds of their questions."""
    examples, kinds = [], []
    for number, video in enumerate(rows):
        scene = draw_scene(seed, number)
        asked = draw_questions(scene, seed, number, PER_KIND if seed == TRAIN_SEED else None)
        prefix = variant.prefix(video)
        conversations: list[Any] = [((one.question, one.answer),) for one in asked]
        if seed == TRAIN_SEED and prefix.times is not None:
            conversations += [Caption(float(at_s), text) for at_s, text in timed_captions(scene)]
        examples.append(Example(prefix, conversations))
        kinds.append([one.kind for one in asked])
    return examples, kinds


@torch.no_grad()
def measure_accuracy(finetuner: Finetuner, examples: Sequence[Example], kinds: Sequence[list[str]]) -> dict[str, float]:
    """Accuracy: the share of whole answers that greedy decoding would give, over all and by kind.

    An answer is decoded right if, and only if, each of its tokens is the likeliest one after the right ones before it.
    """
    trainable = finetuner.trainable.eval()
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(examples), RECIPE.batch_videos):
        some = slice(start, start + RECIPE.batch_videos)
        own = examples[some]
        packed = pack(finetuner.tokenizer, own, RECIPE.max_length)
        batch = collate(packed.sequences, "answer", trainable.model.device)
        logits_LV = trainable.llm.lm_head(trainable.hidden_states(own, batch).flatten(0, 1)[batch.label_positions])
        hits_L = (logits_LV.argmax(-1) == batch.labels).numpy()
        lengths = [
            int((conversation.answer_index != PAD).sum())
            for one in packed.sequences
            for conversation in one.conversations
        ]
        whole = np.logical_and.reduceat(hits_L, np.cumsum([0, *lengths[:-1]]))
        for kind, is_right in zip((kind for theirs in kinds[some] for kind in theirs), whole.tolist(), strict=True):
            right[kind].append(is_right)
    trainable.train()
    by_kind = {kind: round(mean(hits), 4) for kind, hits in sorted(right.items())}
    return {"all": round(mean(hit for hits in right.values() for hit in hits), 4), **by_kind}


def run(variant: Variant, seed: int, study: Study, work: Path) -> dict[str, Any]:
    """Train and test one variant with one seed."""
    examples, _ = examples_of(variant, TRAIN_SEED, read_rows(work, TRAIN_SEED, study.videos))
    tested = examples_of(variant, CHOOSE_SEED, read_rows(work, CHOOSE_SEED, NUM_TESTED))
    folder = work / "untrained" / f"{variant.name}-{seed}"
    build_untrained(
        folder, f"{tinyworld.MODEL}/tower", DIM, Shape(words=vocabulary(), layout=variant.layout, **STUDIED), seed=seed
    )
    recipe = replace(RECIPE, seed=seed)
    finetuner = Finetuner(
        load_longvlm(str(folder)),
        recipe,
        study.steps,
        whitening=fit_whitening(example.prefix.rows for example in examples),
    )
    started_s = time.perf_counter()
    losses: list[float] = []
    tests: list[dict[str, float]] = []
    for number, batch in zip(range(1, study.steps + 1), _batches(examples, recipe), strict=False):
        losses.append(finetuner.step(batch).loss)
        if number % (study.steps // QUARTERS) == 0:
            tests.append(measure_accuracy(finetuner, *tested))
    rows = mean(len(example.prefix.rows) for example in examples)
    curve = [one["all"] for one in tests]
    told = {"accuracy": tests[-1], "curve": curve, "loss": round(mean(losses[-20:]), 4), "rows": round(rows, 1)}
    return {**told, "seconds": round(time.perf_counter() - started_s, 1), "study": asdict(study)}


def _batches(examples: Sequence[Example], recipe: TrainRecipe) -> Iterator[list[Example]]:
    """Batches without end, every epoch in another order, the same for every variant."""
    random = np.random.default_rng(recipe.seed)
    while True:
        order = random.permutation(len(examples)).tolist()
        for start in range(0, len(order) - recipe.batch_videos + 1, recipe.batch_videos):
            yield [examples[place] for place in order[start : start + recipe.batch_videos]]


def summarise(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and spread of each variant over its seeds, and what its last quarter still gained."""
    told = []
    for name, runs in results.items():
        scores = [one["accuracy"]["all"] for one in runs]
        gains = [one["curve"][-1] - one["curve"][-2] for one in runs]
        told.append(
            {
                "variant": name,
                "runs": len(runs),
                "accuracy": round(mean(scores), 4),
                "spread": round(stdev(scores), 4) if len(scores) > 1 else None,
                "rows": runs[0]["rows"],
                "last_quarter": round(mean(gains), 4),
                "seconds": round(mean(one["seconds"] for one in runs)),
            }
        )
    return told


def plot(table: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy by variant, with the spread over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(table) + 1.5), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['variant']} ({row['rows']:.0f} rows)" for row in table]
    axes.barh(names, [row["accuracy"] for row in table], xerr=[row["spread"] or 0 for row in table])
    axes.invert_yaxis()
    axes.set(xlabel="share of whole answers that are right", xlim=(0, 1))
    figure.savefig(path, dpi=120)


@click.command()
@click.option("--work", default="build/ablation", type=click.Path(path_type=Path))
@click.option("--results", default=RESULTS, type=click.Path(path_type=Path), help="Where finished runs lie.")
@click.option("--steps", default=3200, help="Of each run; take fewer if a run lasts longer than eight minutes.")
@click.option("--videos", default=1500)
@click.option("--seeds", default=3)
@click.option("--only", multiple=True, type=click.Choice([variant.name for variant in VARIANTS]))
def main(work: Path, results: Path, steps: int, videos: int, seeds: int, only: tuple[str, ...]) -> None:
    """Run what is left of the study, then print its results."""
    study = Study(steps, videos)
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    finished = results / study.fingerprint
    finished.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        for variant in VARIANTS:
            path = finished / f"{variant.name.replace(' ', '-')}-{seed}.json"
            if not path.exists() and (not only or variant.name in only):
                draft = path.with_suffix(".draft")
                draft.write_text(json.dumps(run(variant, seed, study, work)) + "\n")
                draft.rename(path)
            if path.exists():
                runs[variant.name].append(json.loads(path.read_text()))
                print(variant.name, seed, runs[variant.name][-1]["accuracy"]["all"], flush=True)
    table = summarise(runs)
    for row in table:
        print(row)
    plot(table, finished / "ablation.png")
    print(json.dumps({"benchmark": "ablation", **asdict(study), "variants": table}))


if __name__ == "__main__":
    main()
