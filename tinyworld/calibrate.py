"""Calibration of the small model: the temperature of its options, fitted on typed questions that it has not seen."""

from collections.abc import Hashable, Iterator
from dataclasses import replace
from pathlib import Path

from longvlm.pipeline.answering.typed import as_request
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.judging.calibration import fit_temperature
from longvlm.pipeline.models.longvlm.model import describe_longvlm, load_longvlm
from longvlm.pipeline.models.prefix import VideoPrefix, prefix_of
from longvlm.pipeline.models.sight import Sight
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import by_video, read_segments, read_tokens
from longvlm.pipeline.vision.tokens import from_arrow
from longvlm.schemas.recipe import AnswerRecipe
from longvlm.tinyworld.scenes import draw_scene
from longvlm.tinyworld.typed import draw_typed

_VIDEOS_SQL = "SELECT parse_filename(uri, true) AS name, write_id FROM live_videos ORDER BY name"


def measure_temperature(model: Path, store: Path, seed: int) -> float:
    """The temperature at which the right options of bool and choice questions are likeliest.

    Args:
        model: folder of the model; what it says of its temperature is left aside.
        store: which holds videos of the seed, and no others.
        seed: of the videos.
    """
    spec = describe_longvlm(str(model))
    recipe = AnswerRecipe(spec.name, spec.weights, "", template=spec.templates[0], precision="float32")
    right: dict[Hashable, int] = {}
    groups = []
    for number, prefix in _read_prefixes(store, spec.sight):
        asked = [one for one in draw_typed(draw_scene(seed, number), seed, number) if one.type != "number"]
        about = [as_request((number, place), one.as_row()) for place, one in enumerate(asked)]
        right |= {of.key: _place_of(one.answer, of) for of, one in zip(about, asked, strict=True)}
        groups.append(Group(prefix, about))
    engine = Engine(replace(load_longvlm(str(model)), option_temperature=1.0), recipe)
    shares = {answer.key: answer.shares for answer in engine.answer(groups)}
    return fit_temperature([shares[key] for key in right], list(right.values()))


def _place_of(answer: str, request: Request) -> int:
    """Which of a request's options is right, but for capitals."""
    return [option.casefold() for option in request.options].index(answer.casefold())


def _read_prefixes(store: Path, sight: Sight) -> Iterator[tuple[int, VideoPrefix]]:
    """The number of each video in its seed, and what a model is given of it."""
    snapshot = Store.open(str(store)).pin()
    with catalog.connect(snapshot) as con:
        rows = catalog.query(con, _VIDEOS_SQL).to_pylist()
    numbers = {row["write_id"]: int(row["name"].rpartition("-")[2]) for row in rows}
    tokens, segments = by_video(read_tokens(snapshot, numbers)), by_video(read_segments(snapshot, numbers))
    for write_id, number in numbers.items():
        yield number, prefix_of(from_arrow(tokens[write_id]), segments[write_id].to_pylist(), sight)
