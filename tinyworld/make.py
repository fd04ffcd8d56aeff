"""Reproduce the shipped model, with the commands that anybody would use: `make tinyworld`.

1 world      videos of the training seed, and instruction rows about them     longvlm.tinyworld.world
2 tower      a CLIP, trained on frames of the first of these videos           longvlm.tinyworld.tower
3 index      every video watched once                                         longvlm index
4 train      a LongVLM from random weights, on the stored tokens, twice       longvlm train
5 type       the words of typed questions into it, and four trainings more    longvlm train
6 calibrate  its confidences, on the seed that chooses                        longvlm.tinyworld.calibrate
7 ship       the trained model and its tower into the package
8 test       a held-out seed                                                  longvlm evaluate

Each step is left out where its result lies there already, so that the same command goes on after a stop.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from string import digits
from typing import Any

import click

from longvlm import tinyworld
from longvlm.pipeline.judging.benchmarks import BENCHMARKS, TINYWORLD
from longvlm.pipeline.models.longvlm.checkpoint import OPTION_TEMPERATURE
from longvlm.pipeline.models.longvlm.init import Shape, build_untrained, grow_vocabulary
from longvlm.pipeline.models.prompt import TEMPLATES
from longvlm.tinyworld.calibrate import measure_temperature
from longvlm.tinyworld.captions import timed_captions
from longvlm.tinyworld.questions import all_questions, timestamp
from longvlm.tinyworld.scenes import draw_scene, random_generator
from longvlm.tinyworld.tower import DIM, train_tower, write_untrained
from longvlm.tinyworld.typed import draw_typed
from longvlm.tinyworld.world import make_world, question_rows, video_name, write_rows

TRAIN_SEED, CHOOSE_SEED, TEST_SEED = 0, 1, 2  # training, choosing between recipes, and the figures that are told
NUM_VIDEOS, TOWER_VIDEOS, TOWER_STEPS = 3000, 950, 1400
CHOOSE_VIDEOS = 100
PER_KIND = {"what": 3, "where": 3, "motion": 2, "after": 2, "before": 2}  # questions a video; one of any other kind
TYPED_RUNS: dict[str, tuple[dict[str, int], dict[str, int], dict[str, int]]] = {
    # questions a video: as text (as above), of each type, and statements besides
    "typed": (PER_KIND, {"bool": 5, "choice": 5, "number": 1}, {}),
    "typed-more": (PER_KIND, {"bool": 5, "choice": 3, "number": 1}, {"what": 4, "first": 2, "camera": 2}),
    "typed-last": (PER_KIND, {"bool": 5, "choice": 3, "number": 1}, {"what": 5, "first": 4, "camera": 4}),
    "typed-fresh": (
        {"what": 3, "where": 6, "motion": 4, "after": 4, "before": 4},
        {"bool": 5, "choice": 3, "number": 1},
        {"what": 5, "first": 4, "camera": 2},
    ),
}
JSON_MARKS, JSON_WORDS = '{}[]":,-.', ("true", "false", "null")  # so that numbers and JSON can be spelt
SHAPE = {"hidden": 128, "layers": 5, "intermediate": 384}
HERE = Path(__file__).parent
_CARD_INTRO = f"""# A small LongVLM that knows the tiny world

It answers questions about videos that `tinyworld` draws (version {tinyworld.WORLD_VERSION}), and knows nothing else.
`make tinyworld` makes it again: {NUM_VIDEOS} videos of seed {TRAIN_SEED}, {TOWER_STEPS} steps of the tower over frames
of the first {TOWER_VIDEOS}, then the runs below; the last four added typed questions. Its confidences in answers
of type bool and choice are calibrated on seed {CHOOSE_SEED} by one temperature, `{OPTION_TEMPERATURE}` in
`config.json`.

## Figures

They are those of seed {TEST_SEED}, which nothing was trained on or chosen by: `longvlm evaluate --benchmark tinyworld
--seed {TEST_SEED}`, and the same for `tinyworld-bool`, `tinyworld-choice` and `tinyworld-number`.

"""


@cache
def vocabulary() -> tuple[str, ...]:
    """The vocabulary: every word of questions, answers, prompts and markers, in an order that does not change."""
    texts = [text for shown in TEMPLATES.values() for text in (shown.system, shown.user, shown.assistant, ":")]
    for number in range(300):
        asked = all_questions(draw_scene(TRAIN_SEED, number), random_generator(TRAIN_SEED, number, 1))
        texts += [text for one in asked for text in (one.question, one.answer)]
        texts += [text for _, text in timed_captions(draw_scene(TRAIN_SEED, number))]
    return (*_words_of(texts), *(timestamp(segment) for segment in range(30)))


def typed_words() -> tuple[str, ...]:
    """What typed questions and their answers need besides, in an order that does not change."""
    asked = [one for number in range(300) for one in draw_typed(draw_scene(TRAIN_SEED, number), TRAIN_SEED, number)]
    words = _words_of([text for one in asked for text in (one.prompt, one.answer)])
    known = set(vocabulary())
    return tuple(word for word in dict.fromkeys((*words, *digits, *JSON_MARKS, *JSON_WORDS)) if word not in known)


def _words_of(texts: Iterable[str]) -> list[str]:
    return sorted({word for text in texts for word in re.findall(r"[a-z]+|[^\w\s]", text.lower())})


def make_model(work: Path, *, num_videos: int = NUM_VIDEOS, tower_steps: int = TOWER_STEPS) -> Path:
    """Train the model in a work folder; returns the folder of the model, ready to be shipped."""
    work = work.resolve()
    videos, tower, store, untrained = (work / name for name in ("videos", "tower", "store", "untrained"))
    conversations = work / "conversations.jsonl"
    if not conversations.exists():
        make_world(videos, TRAIN_SEED, num_videos)
        write_rows(conversations, _as_text(num_videos, PER_KIND))
    if not (tower / "config.json").exists():
        draft = work / "tower-draft"
        write_untrained(draft, seed=0)
        train_tower(draft, videos, num_videos=min(TOWER_VIDEOS, num_videos), steps=tower_steps)
        draft.rename(tower)
    _run("index", str(videos), "--store", str(store), "--model", str(tower), "--recipe", tinyworld.RECIPE)
    if not untrained.exists():
        build_untrained(untrained, "../tower", DIM, Shape(words=vocabulary(), layout="time_markers", **SHAPE))
    _train(store, untrained, work / "trained", conversations, "training.toml")
    _train(store, work / "trained", work / "trained-more", conversations, "training-more.toml")
    return teach_types(work, num_videos)


def teach_types(work: Path, num_videos: int) -> Path:
    """The last steps of `make_model`: what is trained as far as `trained-more` learns typed questions."""
    trained, model = work / "grown", work / "model"
    if not trained.exists():
        draft = work / "grown-draft"
        grow_vocabulary(work / "trained-more", draft, typed_words())
        draft.rename(trained)
    for name, (per_kind, per_type, statements) in TYPED_RUNS.items():
        conversations = work / f"conversations-{name}.jsonl"
        if not conversations.exists():
            told = [
                {"video_id": video_name(TRAIN_SEED, number), "q": one.prompt, "a": one.answer}
                for number in range(num_videos)
                for one in draw_typed(draw_scene(TRAIN_SEED, number), TRAIN_SEED, number, per_type, statements)
            ]
            write_rows(conversations, [*_as_text(num_videos, per_kind), *told])
        before, trained = trained, work / f"trained-{name}"
        _train(work / "store", before, trained, conversations, f"training-{name}.toml")
    runs = [work / name for name in ("trained", "trained-more", *(f"trained-{name}" for name in TYPED_RUNS))]
    _package(runs, model, _calibrate(work, trained, min(num_videos, CHOOSE_VIDEOS)))
    return model


def _as_text(num_videos: int, per_kind: dict[str, int]) -> list[dict[str, Any]]:
    """Questions as text, so many of each kind, and captions: rows of a conversation file."""
    rows = question_rows(TRAIN_SEED, num_videos, per_kind=per_kind)
    asked: list[dict[str, Any]] = [{"video_id": row["video"], "q": row["question"], "a": row["answer"]} for row in rows]
    told = [
        {"video_id": video_name(TRAIN_SEED, number), "start_s": start_s, "caption": text}
        for number in range(num_videos)
        for start_s, text in timed_captions(draw_scene(TRAIN_SEED, number))
    ]
    return [*asked, *told]


def _calibrate(work: Path, model: Path, num_videos: int) -> float:
    """The temperature of the model's options, on videos of the seed that chooses."""
    videos, store = work / "choose", work / "choose-store"
    if not videos.exists():
        draft = work / "choose-draft"
        make_world(draft, CHOOSE_SEED, num_videos)
        draft.rename(videos)
    _run("index", str(videos), "--store", str(store), "--model", str(work / "tower"), "--recipe", tinyworld.RECIPE)
    return round(measure_temperature(model, store, CHOOSE_SEED), 2)


def _train(store: Path, model: Path, to: Path, conversations: Path, recipe: str) -> None:
    """One training of the language model, going on from another; it does what is left of it."""
    _run(
        "train", "--store", str(store), "--model", str(model), "--to", str(to),
        "--data", str(conversations), "--recipe", str(HERE / recipe),
    )  # fmt: skip


def _package(runs: Sequence[Path], model: Path, option_temperature: float) -> None:
    """The last run's model without what only training needs; its config says which world it knows."""
    trained = runs[-1]
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(trained / name, model / name)
    shutil.copytree(trained / "tower", model / "tower")
    config = json.loads((model / "config.json").read_text())
    config |= {OPTION_TEMPERATURE: option_temperature, tinyworld.VERSION_FIELD: tinyworld.WORLD_VERSION}
    _write(model / "config.json", json.dumps(config, indent=2) + "\n")
    cards = "\n".join((run / "README.md").read_text() for run in runs)
    _write(model / "README.md", _CARD_INTRO + cards.replace(f"{trained.parent.resolve()}/", ""))


def tell_figures(model: Path) -> None:
    """Test the model on the seed that nothing was trained on or chosen by, and write its figures into its card."""
    names = [name for name in BENCHMARKS if name.partition("-")[0] == TINYWORLD.name]
    told = [_evaluate(model, name) for name in names]
    rows = {
        "": [name.partition("-")[2] or "text" for name in names],
        "---": ["---"] * len(names),
        "questions": [str(figures["num_questions"]) for figures in told],
        "right": [_percent(figures["accuracy"]) for figures in told],
        "expected calibration error": [_percent(figures["calibration_error"]) for figures in told],
    }
    for kind in sorted({kind for figures in told for kind in figures["by_kind"]}):
        rows[f"right of {kind}"] = [_percent(figures["by_kind"].get(kind)) for figures in told]
    table = "".join(f"| {' | '.join([name, *cells])} |\n" for name, cells in rows.items())
    card = model / "README.md"
    _write(card, card.read_text().replace(_CARD_INTRO, f"{_CARD_INTRO}{table}\n"))


def _evaluate(model: Path, benchmark: str) -> dict[str, Any]:
    """The figures of a model by the command that anybody would use."""
    command = ["evaluate", "--benchmark", benchmark, "--seed", str(TEST_SEED), "--model", str(model), "--json"]
    shown = subprocess.run([sys.executable, "-m", "longvlm", *command], check=True, stdout=subprocess.PIPE)  # noqa: S603
    figures: dict[str, Any] = json.loads(shown.stdout)
    return figures


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


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
    """Make videos, tower, store and model; test the model, and put it into the package with its figures."""
    model = make_model(work)
    tell_figures(model)
    shutil.rmtree(tinyworld.MODEL, ignore_errors=True)
    shutil.copytree(model, tinyworld.MODEL)


if __name__ == "__main__":
    main()
