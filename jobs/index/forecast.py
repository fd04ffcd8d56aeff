"""What an index run would take, before it is run: by what the store measured so far, or by a sample that is watched."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from longvlm.jobs.cluster.open_executor import open_executor
from longvlm.jobs.cluster.resources import IndexResources, for_index
from longvlm.jobs.figures import counted, spell_figure
from longvlm.jobs.index.order import IndexOrder, IndexReport
from longvlm.jobs.index.projection import COVERAGE, CostModel, failure_shares, project
from longvlm.jobs.index.run import index_source, take_stock
from longvlm.jobs.options import say
from longvlm.jobs.terminal import print_report, terminal
from longvlm.pipeline.source.corpus import Source
from longvlm.pipeline.source.leftovers import describe_left_out
from longvlm.pipeline.source.scratch import scratch_folder
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.changes import Changes
from longvlm.pipeline.store.files import canonical, filesystem
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.settings import keeps_thumbnails
from longvlm.pipeline.uris import is_local
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import new_run_id
from longvlm.schemas.recipe import IndexRecipe, channel_bytes

_LEDGER_SUMS = """
SELECT coalesce(sum(duration_s), 0.0) AS video_s, coalesce(sum(num_segments), 0)::BIGINT AS segments,
    coalesce(sum(decode_ms) / 1000, 0.0) AS decode_s, coalesce(sum(encode_ms) / 1000, 0.0) AS encode_s,
    coalesce(sum(size_bytes), 0)::BIGINT AS size_bytes, count(*) AS videos
FROM (
    SELECT DISTINCT ON (write_id) * FROM ledger_videos
    WHERE status = 'indexed' AND duration_s > 0 AND size_bytes > 0 AND {which}
)"""
_SOME_WRITES = "SELECT DISTINCT write_id FROM ledger_videos WHERE status = 'indexed' AND recipe = ? LIMIT 1000"
_OUTCOMES = """
SELECT error_code, coalesce(size_bytes, 0) AS size_bytes, coalesce(duration_s, 0.0) AS video_s,
    coalesce(num_segments, 0) AS segments, coalesce(decode_ms, 0.0) / 1000 AS decode_s,
    coalesce(encode_ms, 0.0) / 1000 AS encode_s
FROM newest_rows ORDER BY video_id"""
_THUMBNAIL_BYTES = 4000  # about


@dataclass(frozen=True)
class ForecastOrder:
    """Which index run to forecast, and how."""

    run: IndexOrder
    sample: int | None = None  # videos to watch; None: nothing is watched
    seed: int | None = None  # of the draw, and of the intervals; None: 0
    gpu_price: float | None = None  # of an hour of a GPU, in whatever currency
    cpu_price: float | None = None  # of an hour of a core


@dataclass
class Forecast:
    """What there is to do, and what it would take; None where nothing was measured that would tell."""

    counts: dict[str, int]  # of the listing: as an index run counts, `work` in place of its outcomes
    left_out: Counter[str] = field(default_factory=Counter)  # files of the source that are not listed, by kind
    measured_on: str | None = None  # source | store | sample: what the lengths of videos were estimated from
    video_hours: float | None = None  # to watch
    store_bytes: int | None = None  # to be added
    read_bytes: int | None = None  # to come from the network, as far as a sample tells; None of local files
    decode_cpu_hours: float | None = None
    encode_hours: float | None = None  # of one encoder
    sample: dict[str, Any] | None = None  # what only a sample tells: wall, cost, intervals, failures
    stopped: str | None = None  # why the sample did not get to its end

    def as_json(self) -> dict[str, Any]:
        """The object that `longvlm index --dry-run --json` ends with."""
        figures = {name: value for name, value in vars(self).items() if name not in ("counts", "sample")}
        rounded = {name: float(f"{v:.6g}") if isinstance(v, float) else v for name, v in figures.items()}
        left_out = dict(self.left_out.most_common())
        return {"dry_run": True, **self.counts, **rounded, "left_out": left_out, **(self.sample or {})}


def forecast(order: ForecastOrder) -> Forecast:
    """Say what an index run would do and take. The store's tables stay as they are, and no store is made.

    Without a sample nothing is watched and no Ray is started. A sample goes into a store of its own, which is removed
    again, rather than into the real one: a dry run that is repeated, with another seed or recipe, must leave nothing
    behind, and answers must not come from videos that nobody has decided to index yet.

    Raises:
        InputError: as the index run itself, or options have nothing to work on.
    """
    if order.sample is None and (order.seed, order.gpu_price, order.cpu_price) != (None, None, None):
        raise InputError("--seed, --gpu-price and --cpu-price go with --sample N; add it, or leave them out.")
    with scratch_folder() as scratch:
        left_out: Counter[str] = Counter()
        store, recipe, model, changes = take_stock(order.run, Path(scratch) / "listing.parquet", left_out)
        if order.run.thumbnails is None:
            order = replace(order, run=replace(order.run, thumbnails=keeps_thumbnails(store)))
        with changes:
            found = Forecast(_counts(changes, order.run), left_out)
            if not changes.num_work:
                return found
            if order.sample is None:
                _from_ledger(found, changes, order.run, recipe, store)
                return found
            drawn = changes.draw(order.sample, order.seed or 0, order.run.limit)
            workload = changes.workload(order.run.limit)
        _from_sample(found, order, workload, _watch(drawn, order.run, recipe, model, Path(scratch)))
        return found


def _counts(changes: Changes, run: IndexOrder) -> dict[str, int]:
    ways = ("unchanged", "moved", "known_failed", "stale", "forgotten")
    work = min(changes.num_work, run.limit or changes.num_work)
    gone = {"would_delete" if run.prune else "gone": changes.num_gone}
    listed = changes.num_work + sum(changes.others.values())
    left = {"not_attempted": changes.num_work - work}
    return {"listed": listed, "work": work, **{way: changes.others.get(way, 0) for way in ways}, **left, **gone}


def _from_ledger(found: Forecast, changes: Changes, run: IndexOrder, recipe: IndexRecipe, store: Store | None) -> None:
    """Lengths by the seconds a byte of this source (else of the store), all else by the rates of this recipe."""
    for scope, which, value in (("source", "source = ?", run.source.home), ("store", "? = ''", "")):
        lengths = _ledger_sums(changes, which, value)
        if lengths["videos"]:
            found.measured_on = scope
            break
    else:
        return
    work = changes.workload(run.limit)
    video_s = work["known_s"] + work["unknown_bytes"] * lengths["video_s"] / lengths["size_bytes"]
    video_s += work["num_unknown_sizes"] * lengths["video_s"] / lengths["videos"]
    found.video_hours = video_s / 3600
    rates = _ledger_sums(changes, "recipe = ?", recipe.fingerprint)
    segments = _segments(recipe, video_s, work["videos"])
    segment_bytes = segment_bytes_of(recipe) + (_THUMBNAIL_BYTES if run.thumbnails else 0)
    if rates["video_s"]:
        by_length = video_s / rates["video_s"]
        # a recipe with a fixed number of frames encodes as many of a long video as of a short one
        by_frames = by_length if recipe.sampling == "interval" else work["videos"] / rates["videos"]
        segments = rates["segments"] * by_frames
        found.decode_cpu_hours = rates["decode_s"] * by_length / 3600
        found.encode_hours = rates["encode_s"] * by_frames / 3600
        assert store is not None  # where the rates come from
        segment_bytes = _stored_segment_bytes(changes, store, recipe) or segment_bytes
    found.store_bytes = round(segments * segment_bytes)


def _ledger_sums(changes: Changes, which: str, value: str) -> dict[str, float]:
    (sums,) = changes.con.sql(_LEDGER_SUMS.format(which=which), params=[value]).to_arrow_table().to_pylist()
    return sums


def _segments(recipe: IndexRecipe, video_s: float, num_videos: float) -> float:
    """As many as the recipe makes: with fixed intervals the last one of a video is a broken one, half on average."""
    if recipe.num_segments:
        return num_videos * recipe.num_segments
    if recipe.max_frames:
        num_frames = min(video_s * (recipe.frames_per_s or 1), num_videos * recipe.max_frames)
        return num_frames / recipe.frames_per_segment + num_videos / 2
    return video_s / (recipe.segment_s or 1) + num_videos / 2


def segment_bytes_of(recipe: IndexRecipe) -> float:
    """What a full segment's blobs take: tokens with what is known of each, float16 CLS, search vectors.

    Of a token its size and span are known, and by some towers its time and place. The search vector of a segment is
    float32, that of a frame int8, with its number and time.
    """
    of_token = channel_bytes(recipe.tower.dim, recipe.dtype) + 2 + 2 * 4 + (3 * 8 if recipe.tower.has_positions else 0)
    whole = recipe.num_global_layers * recipe.tower.dim * 2 + (recipe.tower.search_dim or 0) * 4
    whole += recipe.frames_per_segment * ((recipe.tower.search_dim or 0) + 2 * 8)
    return recipe.tokens_per_segment * of_token + whole


def _stored_segment_bytes(changes: Changes, store: Store, recipe: IndexRecipe) -> float | None:
    """What a segment of this recipe takes in the store's files, by Delta's log alone."""
    writes = [row[0] for row in changes.con.execute(_SOME_WRITES, [recipe.fingerprint]).fetchall()]
    snapshot = store.pin(("tokens", "segments"))
    total = 0.0
    for table in ("tokens", "segments"):
        files = snapshot.files_for(table, writes)
        if not sum(file.num_rows for file in files):
            return None
        total += sum(file.size_bytes for file in files) / sum(file.num_rows for file in files)
    return total


@dataclass
class _Watched:
    """A sample that was watched."""

    report: IndexReport
    rows: list[dict[str, Any]] = field(default_factory=list)  # _OUTCOMES
    store_bytes: int = 0  # of its tokens and segments


def _watch(drawn: pa.Table, run: IndexOrder, recipe: IndexRecipe, model: str, scratch: Path) -> _Watched:
    """Index a sample into a store of its own, for a moment."""
    manifest = scratch / "sample.parquet"
    drawn = drawn.filter(drawn["error_code"].is_null())  # of the others the uri is not one to open
    parquet.write_table(drawn.select(["uri", "external_id", "etag", "size_bytes"]).rename_columns(_MANIFEST), manifest)
    address = _beside(run.store)
    try:
        Store.create(address).register_recipe(recipe, model)  # whose model and recipe the run then takes for its own
        asked = IndexOrder(
            Source(str(manifest)),
            address,
            decode_device=run.decode_device,
            thumbnails=run.thumbnails,
            max_failed=1.0,
            ray_address=run.ray_address,
            show_progress=run.show_progress,
        )
        report, store = index_source(asked)
        if report.stopped:
            return _Watched(report)
        snapshot = store.pin(("videos", "segments", "tokens"))
        with catalog.connect(snapshot) as con:
            rows = con.sql(_OUTCOMES).to_arrow_table().to_pylist()
        files = [file for name in ("segments", "tokens") for file in snapshot.table(name).files]
        return _Watched(report, rows, sum(file.size_bytes for file in files))
    finally:
        fs, path = filesystem(address)
        if fs.exists(path):
            fs.rm(path, recursive=True)


_MANIFEST = ["uri", "external_id", "etag", "size"]


def _beside(store_uri: str) -> str:
    """Where a sample may lie so that all workers reach it: within the store, or where the store would be made."""
    address, name = canonical(store_uri), f".sample-{new_run_id()}"
    if not is_local(address):
        return f"{address}/{name}"
    return str(next(path for path in (Path(address), *Path(address).parents) if path.is_dir()) / name)


def _from_sample(found: Forecast, order: ForecastOrder, work: dict[str, float], watched: _Watched) -> None:
    found.stopped = watched.report.stopped
    if not watched.rows:
        return
    cluster, on_gpu = open_executor(order.run.ray_address).resources(), order.run.decode_device == "cuda"
    resources = for_index(cluster, int(work["videos"]), decodes_on_gpu=on_gpu)
    values, intervals = project(watched.rows, work, _cost_model(order, watched, resources), order.seed or 0)
    found.measured_on = "sample"
    found.read_bytes = _read_bytes(watched, work)
    for name in ("video_hours", "store_bytes", "decode_cpu_hours", "encode_hours"):
        setattr(found, name, values.pop(name))
    found.sample = {
        "sampled": len(watched.rows),
        "encoder": "gpu" if resources.encoder_gpus else "cpu",
        "decoders": resources.decoders,
        "encoders": resources.encoders,
        **values,
        "intervals": intervals,
        "failures": failure_shares([row["error_code"] for row in watched.rows]),
    }


def _read_bytes(watched: _Watched, work: dict[str, float]) -> int | None:
    """What all of the work reads, as the sample did: in proportion to bytes, or to videos if sizes are not known."""
    read, sampled = watched.report.counts.read_bytes, sum(row["size_bytes"] for row in watched.rows)
    if not read:
        return None
    by_bytes = sampled and not work["num_unknown_sizes"]
    return round(read * (work["size_bytes"] / sampled if by_bytes else work["videos"] / len(watched.rows)))


def _cost_model(order: ForecastOrder, watched: _Watched, resources: IndexResources) -> CostModel:
    segments, decode_s, encode_s = (sum(row[n] for row in watched.rows) for n in ("segments", "decode_s", "encode_s"))
    stages = watched.report.stages
    return CostModel(
        resources,
        segment_bytes=watched.store_bytes / max(segments, 1),
        decoder_s=stages["decode"]["busy_s"] / decode_s if decode_s else 1.0,
        encoder_s=stages["encode"]["busy_s"] / encode_s if encode_s else 1.0,
        encode_cpu_s=stages["encode"]["cpu_s"] / encode_s if encode_s else 1.0,
        gpu_price=order.gpu_price,
        cpu_price=order.cpu_price,
    )


def print_forecast(found: Forecast) -> None:
    """What a person sees: the counts, the figures with their intervals, and what would tell more."""
    said = found.as_json()
    intervals = said.get("intervals", {})
    shown: dict[str, Any] = {"work": found.counts["work"], **found.counts}
    for name in _SHOWN:
        if (value := said.get(name)) is not None:
            label, shown_value = spell_figure(name, value)
            if name in intervals:
                low, high = (spell_figure(name, bound)[1] for bound in intervals[name])
                shown_value += f"  ({low} to {high})"
            shown[label] = shown_value
    for code, share in said.get("failures", {}).items():
        low, high = share["interval"]
        shown["failed" if code == "any" else f"failed {code}"] = (
            f"{share['videos']} of the sample  ({100 * low:.1f} to {100 * high:.1f} %)"
        )
    print_report("dry run: nothing was changed", shown, {}, 0.0)
    if found.left_out:
        say(f"left out: {describe_left_out(found.left_out)}")
    terminal().print(_note(found), highlight=False)


_SHOWN = (
    "video_hours",
    "store_bytes",
    "read_bytes",
    "decode_cpu_hours",
    "encode_hours",
    "wall_hours",
    "cpus_per_encoder",
    "cost",
)


def _note(found: Forecast) -> str:
    if found.stopped or not found.counts["work"]:
        return "nothing to watch" if not found.stopped else "the sample did not get to its end"
    if found.sample:
        encoder, number = ("GPU" if found.sample["encoder"] == "gpu" else "CPU encoder"), found.sample["sampled"]
        of = f"{found.sample['decoders']} decoders and {found.sample['encoders']} encoders"
        said = f"from {counted(number, 'video')} watched, in brackets {100 * COVERAGE:.0f} % intervals; "
        said += f"wall: on {of}, as here; cpus per encoder: cores that keep one {encoder} busy"
        return said if "cost" in found.sample else f"{said}; --cpu-price (on GPUs also --gpu-price) adds the cost"
    if found.decode_cpu_hours is None:
        return "no run under this recipe yet to tell how long it takes; --dry-run --sample 50 finds out"
    return f"lengths from bytes at the rate of this {found.measured_on}, the rest at the rates of this recipe's videos"
