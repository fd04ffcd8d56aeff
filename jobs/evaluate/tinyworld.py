"""The tiny world as an evaluation benchmark with videos of its own: made, indexed and asked about in one go."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from longvlm import tinyworld
from longvlm.jobs.choose import SHIPPED, absolute
from longvlm.jobs.evaluate.run import EvaluateOrder, EvaluateReport, choose_benchmark, run_evaluate
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.pipeline.judging.benchmarks import TINYWORLD
from longvlm.pipeline.model_folder import read_json, resolve
from longvlm.pipeline.source.corpus import Source
from longvlm.pipeline.store.files import canonical
from longvlm.pipeline.uris import is_local
from longvlm.schemas.errors import InputError


@dataclass(frozen=True)
class TinyWorldSpec:
    """The seed and size of a tiny world."""

    seed: int = 0
    num_videos: int = 100


def run_tinyworld(order: EvaluateOrder, world: TinyWorldSpec) -> EvaluateReport:
    """Make the videos of a world, index them, and evaluate a model on its questions.

    Args:
        order: its benchmark says of which type the questions are, text if there is none; its store is made if it is
            not there; an empty one is a temporary one. Without a model, or for SHIPPED, the one that comes with the
            project is evaluated.
        world: what is made. Beside a local store it is kept and not made again; else it goes with the run.

    Raises:
        InputError: the store or model cannot be used.
    """
    from longvlm.tinyworld.world import question_rows, write_rows

    benchmark = choose_benchmark(replace(order, benchmark=order.benchmark or TINYWORLD.name, questions=""))
    kind_of_answer = benchmark.name.partition("-")[2] or "text"
    model = absolute(order.model or SHIPPED)
    _check_version(model)
    with _folders(order.store, world) as (videos, store):
        questions = videos / f"{benchmark.name}.jsonl"
        if not videos.is_dir():
            _make(videos, world)
        rows = question_rows(world.seed, world.num_videos, kind_of_answer)
        # by path: another world beside the same store may use their names
        write_rows(questions, (row | {"video": str(videos / f"{row['video']}.mp4")} for row in rows))
        indexing = run_index(
            IndexOrder(
                Source(str(videos)),
                store,
                model=model,
                recipe=tinyworld.RECIPE,
                ray_address=order.ray_address,
                show_progress=order.show_progress,
            )
        )
        asked = replace(order, store=store, model=model, benchmark=benchmark.name, questions=str(questions))
        report = run_evaluate(replace(asked, precision="float32"))  # small models lose more by rounding than they save
        report.stopped = report.stopped or indexing.stopped
        return report


def _check_version(model: str) -> None:
    """InputError if a model was trained on another version of the world; one that knows nothing of it may be asked."""
    version = read_json(resolve(model), "config.json").get(tinyworld.VERSION_FIELD, tinyworld.WORLD_VERSION)
    if version != tinyworld.WORLD_VERSION:
        raise InputError(
            f"the model {model} was trained on version {version} of the tiny world, and this is version "
            f"{tinyworld.WORLD_VERSION}: its figures would mean nothing; train it again with `make tinyworld`."
        )


@contextmanager
def _folders(store: str, world: TinyWorldSpec) -> Iterator[tuple[Path, str]]:
    """Where the videos lie, and the store."""
    with tempfile.TemporaryDirectory(prefix="longvlm-tinyworld-") as scratch:
        name = f"tinyworld-{world.seed}-{world.num_videos}"
        if store and is_local(store):
            beside = Path(canonical(store))
            yield beside.with_name(f"{beside.name}-{name}"), store
        else:
            yield Path(scratch) / name, store or f"{scratch}/store"


def _make(folder: Path, world: TinyWorldSpec) -> None:
    """Make the folder, whole or not at all."""
    from longvlm.tinyworld.world import make_world

    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
    make_world(draft, world.seed, world.num_videos)
    draft.rename(folder)
