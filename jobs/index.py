"""The index job: a source of videos to tokens in a store, every video accounted for.

1 list     the source, one row a video                         driver
2 diff     against the ledger: what is there to do             driver
3 plan     waves of videos, a write_id each                    driver
4 decode   a video -> units of frames        1 : n             actors with a killable child each
5 encode   a unit of frames -> merged tokens 1 : 1             actors with the tower
6 write    about 100 units -> a closed shard of each table     actors, stateless
7 account  an outcome a unit -> a row a video                  driver
8 commit   shards, then rows, every two minutes                driver
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from jobs.accounting import Account, Commits, Counts
from jobs.models import choose_index_recipe
from jobs.report import progress, record_run
from jobs.resources import MAX_PASSES, WAVE_VIDEOS, WRITER_CPUS, IndexResources, for_index
from jobs.session import connect, failure_of, release_failed_execution
from jobs.stages import Encode, Watch, Write
from jobs.tally import start_tally
from pipeline.ingest.corpus import Source, diff, list_source
from pipeline.store.catalog import write_index_duckdb
from pipeline.store.ledger import Store
from pipeline.store.upkeep import merge_small_files
from schemas import tables
from schemas.identity import new_run_id
from schemas.recipe import Decode, IndexRecipe


@dataclass(frozen=True)
class IndexOrder:
    """What to index, and how."""

    source: Source
    store: str
    model: str | None = None
    recipe: str | None = None  # a name or a file; None: the store's own, or `long`
    decode: Decode | None = None  # exact or keyframe; None: as the recipe says
    limit: int | None = None
    retry_failed: bool = False
    restale: bool = False
    ray_address: str | None = None
    show_progress: bool = False


@dataclass
class IndexReport:
    """How a run ended."""

    run_id: str
    counts: Counts
    started_s: float  # seconds since the epoch
    wall_s: float = 0.0
    startup_s: float = 0.0  # before the first decode: listing, Ray, loading models
    work_s: float = 0.0  # from the first decode to the last commit
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    stopped: str | None = None  # why, if it did not get to the end; what was finished by then is committed

    def as_json(self) -> dict[str, Any]:
        """The object that `longvlm index --json` ends with."""
        return {**self.counts.as_json(), "wall_s": round(self.wall_s, 3), "run_id": self.run_id}


def run_index(order: IndexOrder) -> IndexReport:
    """Index a source. Wrong input is refused before anything is written.

    Raises:
        InputError: the source, model, recipe or store cannot be used.
    """
    started_s = time.time()
    listing = list_source(order.source)
    store = Store.find(order.store)
    recipe, model = choose_index_recipe(store, order.model, order.recipe, order.decode)
    newest = store.newest() if store else tables.VIDEOS.empty_table()
    found = diff(listing, newest, recipe.fingerprint, retry_failed=order.retry_failed, restale=order.restale)
    work = found.work.to_pylist()[: order.limit]
    if work:
        connect(order.ray_address)

    store = store or Store.create(order.store)  # the input is good: from here on, something is written
    report = IndexReport(new_run_id(), Counts(listed=len(listing), not_attempted=len(found.work)), started_s)
    report.counts.unchanged = found.num_unchanged
    report.counts.known_failed = found.num_known_failed
    report.counts.stale = found.num_stale
    if work:
        store.register_recipe(recipe, model)
        _index_work(work, recipe, store, report, show=order.show_progress)
    report.counts.check()
    report.wall_s = time.time() - started_s
    record_run(store, "index", report.as_json(), report.stages)
    merge_small_files(store)
    write_index_duckdb(store.uri, store.pin())
    return report


def _index_work(
    work: list[dict[str, Any]], recipe: IndexRecipe, store: Store, report: IndexReport, *, show: bool
) -> None:
    """Stages 3 to 8, wave by wave; what is lost in a pass is planned again, then fails as lost."""
    tally = start_tally(report.run_id)
    resources = for_index(ray.cluster_resources(), len(work))
    account = Account(recipe.fingerprint, report.run_id)
    commits = Commits(store, report.counts)
    expected = {"decode": len(work), "encode": None, "write": None}
    try:
        with progress(tally, expected, show=show):
            for start in range(0, len(work), WAVE_VIDEOS):
                wave = work[start : start + WAVE_VIDEOS]
                for _ in range(MAX_PASSES):
                    plan = account.plan(wave)
                    for outcomes in _stages(plan, recipe, store, resources, tally):
                        commits.add(outcomes, account.add(outcomes))
                        if not account.planned:  # nothing more to wait for, while Ray still takes the stages down
                            commits.flush()
                    wave = account.unaccounted()
                    if not wave:
                        break
                commits.add(None, account.lost(wave, MAX_PASSES))
    except KeyboardInterrupt:
        report.stopped = "interrupted"
    except ray.exceptions.RayError as error:
        report.stopped = failure_of(error)
    finally:
        commits.flush()
    if report.stopped:
        release_failed_execution()  # not in the except clause, where the exception is still held
    report.stages = ray.get(tally.report.remote())
    begun_s = ray.get(tally.begun_s.remote())
    if begun_s is not None:
        report.work_s = commits.last_s - begun_s
        report.startup_s = begun_s - report.started_s


def _stages(
    plan: pa.Table, recipe: IndexRecipe, store: Store, resources: IndexResources, tally: Any
) -> Iterator[pa.Table]:
    """The stages on Ray Data: tables.PLAN in, batches of tables.OUTCOMES out as they land."""
    blocks = [plan.slice(i, resources.videos_per_block) for i in range(0, len(plan), resources.videos_per_block)]
    spec = recipe.spec()
    outcomes = (
        ray.data.from_blocks(blocks)  # not from_arrow, which runs a task a block to look at it
        .map_batches(  # 4: one actor a core, since decoding is what there is most of
            Watch,
            fn_constructor_args=(spec, tally),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(resources.decoders, len(blocks))),
            num_cpus=resources.decoder_cpus,
        )
        .map_batches(  # 5: one actor a GPU; a few units a forward pass fill it
            Encode,
            fn_constructor_args=(spec, tally, "cuda" if resources.encoder_gpus else "cpu", resources.encoder_threads),
            batch_size=resources.units_per_forward,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=resources.encoders),
            num_cpus=resources.encoder_cpus,
            num_gpus=resources.encoder_gpus,
        )
        .map_batches(  # 6: one actor, since writing is a thousandth of the work; stateless, so it may be run again
            Write,
            fn_constructor_args=(store.uri, recipe.fingerprint, tally),
            batch_size=resources.units_per_shard,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=resources.writers),
            num_cpus=WRITER_CPUS,
        )
    )
    return outcomes.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


if __name__ == "__main__":
    import sys

    from jobs.cli import main

    main(["index", *sys.argv[1:]])
