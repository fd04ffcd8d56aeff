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

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from longvlm.jobs.choose import choose_index_recipe
from longvlm.jobs.cluster import logs, metrics
from longvlm.jobs.cluster.progress import progress
from longvlm.jobs.cluster.resources import MAX_LOSS, MAX_PASSES, WAVE_VIDEOS, WRITER_CPUS, IndexResources, for_index
from longvlm.jobs.cluster.session import INTERRUPTED, connect, failure_of, release_failed_execution
from longvlm.jobs.cluster.tally import start_tally
from longvlm.jobs.index.accounting import Account, Commits, Counts
from longvlm.jobs.index.limits import Limits, OutOfTimeError, TooManyFailuresError
from longvlm.jobs.index.order import IndexOrder, IndexReport, check_order
from longvlm.jobs.index.stages import Encode, Watch, Write
from longvlm.jobs.runs import record_run
from longvlm.pipeline.source.corpus import nothing_in, spool_source
from longvlm.pipeline.store.catalog import write_index_duckdb
from longvlm.pipeline.store.changes import Changes, Terms, compare
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.store.upkeep.compact import merge_small_files
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import IndexRecipe


def run_index(order: IndexOrder) -> IndexReport:
    """Index a source, note the run in the store, and leave few files behind. Raises as `index_source`."""
    report, store = index_source(order)
    record_run(store, "index", report.as_json(), report.stages)
    merge_small_files(store)
    write_index_duckdb(store.uri, store.pin())
    return report


def index_source(order: IndexOrder) -> tuple[IndexReport, Store]:
    """Stages 1 to 8. Wrong input is refused before anything is written.

    Raises:
        InputError: the source, model, recipe or store cannot be used, or too much of the source is gone.
    """
    report = IndexReport(Counts(), time.time())
    with tempfile.TemporaryDirectory(prefix="longvlm-") as scratch:
        store, recipe, model, changes = take_stock(order, Path(scratch) / "listing.parquet")
        logs.begun("index", report.run_id, source=order.source.uri, store=order.store)
        with changes:
            num_work = min(changes.num_work, order.limit or changes.num_work)
            if num_work:
                connect(order.ray_address)
            store = store or Store.create(order.store)  # the input is good: from here on, something is written
            _keep_books(changes, store, report, prune=order.prune)
            if num_work:
                store.register_recipe(recipe, model)
                _index_work(order, changes, recipe, store, report)
    report.counts.check()
    report.wall_s = time.time() - report.started_s
    logs.ended("index", report.run_id, report.as_json(), report.stopped)
    return report, store


def take_stock(order: IndexOrder, scratch: Path) -> tuple[Store | None, IndexRecipe, str, Changes]:
    """Stages 1 and 2: the store if there is one, the recipe and model of the run, and what there is to do."""
    check_order(order)
    num_listed = spool_source(order.source, str(scratch))
    if not num_listed and not (order.prune and order.allow_mass_delete):
        raise nothing_in(order.source)
    store = Store.find(order.store)
    recipe, model = choose_index_recipe(store, order.model, order.recipe, order.decode)
    terms = Terms(
        recipe.fingerprint,
        order.source.home,
        order.source.coverage(),
        retry_failed=order.retry_failed,
        restale=order.restale,
    )
    changes = compare(str(scratch), store.pin(("videos",)) if store else Snapshot(), terms)
    if order.prune and not order.allow_mass_delete and changes.num_gone > MAX_LOSS * changes.num_known:
        raise InputError(
            f"{changes.num_gone} of the {changes.num_known} videos known of {order.source.uri} are gone; if that is "
            "right, say so with --allow-mass-delete, else check the source."
        )
    return store, recipe, model, changes


def _keep_books(changes: Changes, store: Store, report: IndexReport, *, prune: bool) -> None:
    """Count what needs no watching, and write the rows of what moved or is gone."""
    counts = report.counts
    for way, number in changes.others.items():
        setattr(counts, way, number)
    counts.listed, counts.not_attempted = changes.num_work + sum(changes.others.values()), changes.num_work
    store.append("videos", changes.bookkeeping(report.run_id, prune=prune))
    counts.deleted, counts.gone = (changes.num_gone, 0) if prune else (0, changes.num_gone)


def _index_work(order: IndexOrder, changes: Changes, recipe: IndexRecipe, store: Store, report: IndexReport) -> None:
    """Stages 3 to 8; however they end, what was finished is committed."""
    tally = start_tally(report.run_id)
    num_work = min(changes.num_work, order.limit or changes.num_work)
    commits = Commits(store, report.counts)
    account = Account(recipe.fingerprint, report.run_id)
    limits = Limits(order.max_hours, order.max_failed, report.started_s)
    stages = partial(_stages, recipe, store, for_index(ray.cluster_resources(), num_work), tally)
    try:
        with progress(tally, {"decode": num_work, "encode": None, "write": None}, show=order.show_progress):
            for wave in changes.waves(WAVE_VIDEOS, order.limit):
                _index_wave(wave, stages, account, commits, limits)
    except KeyboardInterrupt:
        report.stopped = INTERRUPTED
    except OutOfTimeError:
        report.out_of_time = True
    except TooManyFailuresError as error:
        report.stopped = str(error)
    except ray.exceptions.RayError as error:
        report.stopped = failure_of(error)
    finally:
        commits.flush()
        metrics.QUEUE.record(0, job="index")  # nothing waits any more, whatever is left
    if report.stopped or report.out_of_time:
        release_failed_execution()  # not in the except clause, where the exception is still held
    report.stages = ray.get(tally.report.remote())
    begun_s = ray.get(tally.begun_s.remote())
    if begun_s is not None:
        report.work_s = commits.last_s - begun_s
        report.startup_s = begun_s - report.started_s


def _index_wave(
    wave: list[dict[str, Any]],
    stages: Callable[[pa.Table], Iterator[pa.Table]],
    account: Account,
    commits: Commits,
    limits: Limits,
) -> None:
    """One wave; what is lost in a pass is planned again, then fails as lost."""
    for _ in range(MAX_PASSES):
        for outcomes in stages(account.plan(wave)):
            commits.add(outcomes, account.add(outcomes))
            if not account.planned:  # nothing more to wait for, while Ray still takes the stages down
                commits.flush()
            limits.check(account.settled)
        wave = account.unaccounted()
        if not wave:
            return
    commits.add(None, account.lost(wave, MAX_PASSES))


def _stages(
    recipe: IndexRecipe, store: Store, resources: IndexResources, tally: Any, plan: pa.Table
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
