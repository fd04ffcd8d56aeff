"""Does a question that gets the precision it needs beat merging everything alike? Counted on the tiny world.

    python -m benchmarks.focus [--videos 150] [--seed 3] [--work FOLDER]

The plan, written before the first run on the seed that is reported:

* **Seed 3**: its videos trained nothing and chose nothing. How nearness, the skeleton and `auto` work was chosen on
  seed 1, as all choices are (docs/training.md); seed 2 has the figures of the model.
* **Budgets**: a quarter and an eighth of each video's stored local tokens, rounded down, beside its 5 global tokens.
  The markers of time that the model reads, a row for each segment or block, count against it as in every run. Videos
  of equal length have equal budgets, so they are asked together: through `run_answer`, from one store, in float32.
* **Ways**: `even`, `question` and `auto` at either budget, and all that is stored, without a budget. Every way is asked
  the same questions about the same videos: one of each kind a video. An answer is right if it is the true one, as
  `evaluate` judges it.
* **Told** by kind: of how many answers, the share that is right in each way, and of how many `auto` made a question's.
  Paired by question: how many are right in one way only, with the p of a sign test.
* **Bars**, at both budgets: question is not more than 2 points below even on any kind of 60 answers or more; it is
  better on the moments (what, where, motion, after, before) together; auto is not more than 1 point below the better
  of the two over all kinds.

The last line is one JSON object.
"""

import json
import math
import tempfile
from collections import defaultdict
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import click
import pyarrow as pa

from longvlm import tinyworld
from longvlm.jobs.answer.run import AnswerOrder, run_answer
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.pipeline.answering.questions import check_questions
from longvlm.pipeline.judging.agreement import normalised
from longvlm.pipeline.models.families import sight_of
from longvlm.pipeline.source.corpus import Source
from longvlm.schemas.recipe import Focus
from longvlm.tinyworld.scenes import draw_scene
from longvlm.tinyworld.world import make_world, question_rows, video_name

REPORT_SEED = 3
TOKENS_PER_SEGMENT = 8  # as the tiny world's recipe stores them
PARTS = (4, 8)  # a budget is one in so many of the stored local tokens
WAYS: tuple[Focus, ...] = ("even", "question", "auto")
MOMENTS = ("what", "where", "motion", "after", "before")
NUM_FOR_A_BAR = 60  # answers of a kind
BAR, AUTO_BAR = 2.0, 1.0  # points

Answers = dict[str, dict[str, Any]]  # rows of `answers` by question_id


def index_world(work: Path, seed: int, videos: int, recipe: str = tinyworld.RECIPE) -> Path:
    """The store of a world, made unless it is there."""
    store = work / f"{Path(recipe).stem}-{seed}-{videos}"
    if not store.exists():
        folder = work / f"world-{seed}-{videos}"
        make_world(folder, seed, videos)
        source = Source(str(folder))
        run_index(IndexOrder(source, str(store), model=tinyworld.MODEL, recipe=recipe, ray_address=IN_PROCESS))
    return store


def ask(store: Path, questions: list[dict[str, Any]], focus: Focus | None, budget: int | None) -> Answers:
    """Answers on one budget, by question."""
    order = AnswerOrder(
        str(store),
        check_questions(pa.Table.from_pylist(questions)),
        model=tinyworld.MODEL,
        budget=budget,
        focus=focus,
        precision="float32",
        max_new_tokens=40,
        ray_address=IN_PROCESS,
    )
    return {row["question_id"]: row for row in run_answer(order).rows()}


def ask_part(store: Path, by_length: dict[int, list[dict[str, Any]]], focus: Focus, part: int) -> Answers:
    """Answers on a budget of one in `part` local tokens of each video."""
    num_global = sight_of(tinyworld.MODEL).num_global_tokens
    answers: Answers = {}
    for num_segments, questions in sorted(by_length.items()):
        answers |= ask(store, questions, focus, num_global + num_segments * TOKENS_PER_SEGMENT // part)
    return answers


def share(ids: list[str], right: dict[str, bool]) -> float:
    """Percent of some questions that are right."""
    return round(100 * mean(right[one] for one in ids), 1)


def sign_test(better: int, worse: int) -> float:
    """How likely so uneven a split is where either way is as good: two-sided, exact."""
    number = better + worse
    tail = sum(math.comb(number, k) for k in range(min(better, worse) + 1)) / 2**number if number else 1.0
    return min(1.0, 2 * tail)


def compare(by_kind: dict[str, list[str]], right: dict[str, dict[str, bool]], auto: Answers) -> dict[str, Any]:
    """Shares that are right by kind and way, and whether the bars are met."""
    kinds = {
        **by_kind,
        "moments": [one for kind in MOMENTS for one in by_kind[kind]],
        "all": list(chain.from_iterable(by_kind.values())),
    }
    told = {}
    for kind, ids in kinds.items():
        better, worse = (
            sum(right[a][one] and not right[b][one] for one in ids)
            for a, b in (("question", "even"), ("even", "question"))
        )
        told[kind] = {
            "answers": len(ids),
            **{way: share(ids, marks) for way, marks in right.items()},
            "auto_question": sum(auto[one]["focus"] == "question" for one in ids),
            "only_question": better,
            "only_even": worse,
            "p": round(sign_test(better, worse), 4),
        }
        print(f"{kind:8}", told[kind], flush=True)
    best = max(told["all"]["even"], told["all"]["question"])
    bars = {
        "below_even": {
            kind: round(told[kind]["question"] - told[kind]["even"], 1)
            for kind, ids in by_kind.items()
            if len(ids) >= NUM_FOR_A_BAR and told[kind]["question"] < told[kind]["even"] - BAR
        },
        "moments_gain": round(told["moments"]["question"] - told["moments"]["even"], 1),
        "auto_loss": round(best - told["all"]["auto"], 1),
    }
    is_met = not bars["below_even"] and bars["moments_gain"] > 0 and bars["auto_loss"] <= AUTO_BAR
    return {"kinds": told, "bars": bars, "met": is_met}


def run(work: Path, seed: int, videos: int) -> dict[str, Any]:
    """Make, ask and compare."""
    store = index_world(work, seed, videos)
    lengths = {video_name(seed, number): draw_scene(seed, number).num_segments for number in range(videos)}
    questions = question_rows(seed, videos)
    truth = {one["question_id"]: normalised(one["answer"]) for one in questions}
    by_length: dict[int, list[dict[str, Any]]] = defaultdict(list)
    by_kind: dict[str, list[str]] = defaultdict(list)
    for one in questions:
        by_length[lengths[one["video"]]].append(one)
        by_kind[one["kind"]].append(one["question_id"])

    def marks(answers: Answers) -> dict[str, bool]:
        return {one: normalised(answers[one]["answer"] or "") == true for one, true in truth.items()}

    whole = marks(ask(store, questions, None, None))
    budgets = {}
    for part in PARTS:
        print(f"one in {part}", flush=True)
        answers: dict[str, Answers] = {way: ask_part(store, by_length, way, part) for way in WAYS}
        right: dict[str, dict[str, bool]] = {"stored": whole, **{way: marks(rows) for way, rows in answers.items()}}
        rows = {way: round(mean(row["num_visual_tokens"] for row in of.values()), 1) for way, of in answers.items()}
        budgets[f"1/{part}"] = {"mean_visual_tokens": rows, **compare(by_kind, right, answers["auto"])}
    return {"benchmark": "focus", "seed": seed, "videos": videos, "questions": len(questions), "budgets": budgets}


@click.command()
@click.option("--videos", default=150)
@click.option("--seed", default=REPORT_SEED)
@click.option("--work", type=click.Path(path_type=Path), help="Where the store is kept; default: nowhere.")
def main(videos: int, seed: int, work: Path | None) -> None:
    """Ask on every budget in every way, then tell."""
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(run(work or Path(scratch), seed, videos)))


if __name__ == "__main__":
    main()
