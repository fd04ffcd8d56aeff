"""Reproduce the shipped model, with the commands that anybody would use: `make tinyworld`.

1 world   videos of the training seed, and instruction rows about them     longvlm.tinyworld.world
2 tower   a CLIP, trained on frames of the first of these videos           longvlm.tinyworld.tower
3 index   every video watched once                                         longvlm index
4 train   a LongVLM from random weights, on the stored tokens, twice       longvlm train
5 ship    the trained model and its tower into the package
6 test    a held-out seed                                                  longvlm evaluate

Each step is left out where its result lies there already, so that the same command goes on after a stop.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from longvlm import tinyworld
from longvlm.pipeline.models.longvlm.init import Shape, build_untrained
from longvlm.pipeline.models.prompt import TEMPLATES
from longvlm.tinyworld.captions import timed_captions
from longvlm.tinyworld.questions import all_questions, timestamp
from longvlm.tinyworld.scenes import draw_scene, random_generator
from longvlm.tinyworld.tower import DIM, train_tower, write_untrained
from longvlm.tinyworld.world import make_world, read_question_rows, video_name

TRAIN_SEED, CHOOSE_SEED, TEST_SEED = 0, 1, 2  # training, choosing between recipes, and the figures that are told
NUM_VIDEOS, TOWER_VIDEOS, TOWER_STEPS = 3000, 950, 1400
PER_KIND = {"what": 3, "where": 3, "motion": 2, "after": 2, "before": 2}  # questions a video; one of any other kind
RUNS = {"trained": "training.toml", "trained-more": "training-more.toml"}  # each goes on from the one before
SHAPE = {"hidden": 128, "layers": 5, "intermediate": 384}
HERE = Path(__file__).parent
_CARD_INTRO = f"""# A small LongVLM that knows the tiny world

It answers questions about videos that `tinyworld` draws (version {tinyworld.WORLD_VERSION}), and knows nothing else.
`make tinyworld` makes it again: {NUM_VIDEOS} videos of seed {TRAIN_SEED}, {TOWER_STEPS} steps of the tower over frames
of the first {TOWER_VIDEOS}, then the runs below. Its figures are those of seed {TEST_SEED}, which nothing was
trained on or chosen by: `longvlm evaluate --benchmark tinyworld --seed {TEST_SEED}`.

"""


def vocabulary() -> tuple[str, ...]:
    """The vocabulary: every word of questions, answers, prompts and markers, in an order that does not change."""
    texts = [text for shown in TEMPLATES.values() for text in (shown.system, shown.user, shown.assistant, ":")]
    for number in range(300):
        asked = all_questions(draw_scene(TRAIN_SEED, number), random_generator(TRAIN_SEED, number, 1))
        texts += [text for one in asked for text in (one.question, one.answer)]
        texts += [text for _, text in timed_captions(draw_scene(TRAIN_SEED, number))]
    words = {word for text in texts for word in re.findall(r"[a-z]+|[^\w\s]", text.lower())}
    return (*sorted(words), *(timestamp(segment) for segment in range(30)))


def make_model(work: Path, *, num_videos: int = NUM_VIDEOS, tower_steps: int = TOWER_STEPS) -> Path:
    """Train the model in a work folder; returns the folder of the model, ready to be shipped."""
    work = work.resolve()
    videos, tower, store, untrained = (work / name for name in ("videos", "tower", "store", "untrained"))
    conversations, model = work / "conversations.jsonl", work / "model"
    if not conversations.exists():
        rows = read_question_rows(make_world(videos, TRAIN_SEED, num_videos, PER_KIND))
        told: list[dict[str, Any]] = [
            {"video_id": row["video"], "q": row["question"], "a": row["answer"]} for row in rows
        ]
        told += [
            {"video_id": video_name(TRAIN_SEED, number), "start_s": start_s, "caption": text}
            for number in range(num_videos)
            for start_s, text in timed_captions(draw_scene(TRAIN_SEED, number))
        ]
        _write(conversations, "".join(json.dumps(row) + "\n" for row in told))
    if not (tower / "config.json").exists():
        draft = work / "tower-draft"
        write_untrained(draft, seed=0)
        train_tower(draft, videos, num_videos=min(TOWER_VIDEOS, num_videos), steps=tower_steps)
        draft.rename(tower)
    _run("index", str(videos), "--store", str(store), "--model", str(tower), "--recipe", tinyworld.RECIPE)
    if not untrained.exists():
        build_untrained(untrained, "../tower", DIM, Shape(words=vocabulary(), layout="time_markers", **SHAPE))
    trained = untrained
    for name, recipe in RUNS.items():
        before, trained = trained, work / name
        _run(
            "train", "--store", str(store), "--model", str(before), "--to", str(trained),
            "--data", str(conversations), "--recipe", str(HERE / recipe),
        )  # fmt: skip
    _package([work / name for name in RUNS], model)
    return model


def _package(runs: Sequence[Path], model: Path) -> None:
    """The last run's model without what only training needs; its config says which world it knows."""
    trained = runs[-1]
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / name, model / name)
    shutil.copytree(trained / "tower", model / "tower")
    config = json.loads((model / "config.json").read_text())
    config[tinyworld.VERSION_FIELD] = tinyworld.WORLD_VERSION
    _write(model / "config.json", json.dumps(config, indent=2) + "\n")
    cards = "\n".join((run / "README.md").read_text() for run in runs)
    _write(model / "README.md", _CARD_INTRO + cards.replace(f"{trained.parent.resolve()}/", ""))


def _write(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.rename(path)


def _run(*arguments: str) -> None:
    """A command of longvlm's own; it does what is left to do."""
    subprocess.run([sys.executable, "-m", "longvlm", *arguments], check=True)  # noqa: S603 - our own command


@click.command()
@click.option("--to", "work", default="build/tinyworld", type=click.Path(path_type=Path), help="Folder of all steps.")
def main(work: Path) -> None:
    """Make videos, tower, store and model; then put the model into the package and test it."""
    model = make_model(work)
    shutil.rmtree(tinyworld.MODEL, ignore_errors=True)
    shutil.copytree(model, tinyworld.MODEL)
    _run("evaluate", "--benchmark", "tinyworld", "--seed", str(TEST_SEED), "--json")


if __name__ == "__main__":
    main()
