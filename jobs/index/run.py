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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from longvlm.jobs.choose import choose_index_recipe
from longvlm.jobs.cluster import logs, metrics
from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.cluster.commits import Commits
from longvlm.jobs.cluster.executor import Executor, OutOfTimeError, Stage, StageError
from longvlm.jobs.cluster.open_executor import open_executor
from longvlm.jobs.cluster.progress import progress
from longvlm.jobs.cluster.resources import (
    DECODER_THREADS,
    MAX_LOSS,
    MAX_PASSES,
    WAVE_VIDEOS,
    WRITER_CPUS,
    IndexResources,
    for_index,
)
from longvlm.jobs.figures import counted
from longvlm.jobs.index.accounting import Account, Counts, Finished, commit_to, count_committed
from longvlm.jobs.index.order import IndexOrder, IndexReport, check_device, check_order
from longvlm.jobs.index.refused import RefusedVideos
from longvlm.jobs.index.stages import Encode, Watch, Write
from longvlm.jobs.limits import INTERRUPTED, Limits, TooManyFailuresError
from longvlm.jobs.runs import close_run
from longvlm.pipeline.decode.device import Device
from longvlm.pipeline.source.copies import is_as_listed
from longvlm.pipeline.source.corpus import nothing_in, spool_source
from longvlm.pipeline.source.scratch import scratch_folder
from longvlm.pipeline.store.changes import ChangeCriteria, Changes, compare
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.look import Listed
from longvlm.pipeline.store.settings import keeps_thumbnails, remember_thumbnails
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import IndexRecipe
from longvlm.schemas.rows import WorkRow


def run_index(order: IndexOrder) -> IndexReport:
    """Index a source, note the run in the store, and leave few files behind. Raises as `index_source`."""
    report, store = index_source(order)
    close_run(store, "index", report)
    return report


def index_source(order: IndexOrder) -> tuple[IndexReport, Store]:
    """Stages 1 to 8. Wrong input is refused before anything is written.

    Raises:
        InputError: the source, model, recipe or store cannot be used, or too much of the source is gone.
    """
    report = IndexReport(Counts(), time.time())
    with scratch_folder() as scratch:
        store, recipe, model, changes = take_stock(order, Path(scratch) / "listing.parquet", report.counts.left_out)
        logs.begun("index", report.run_id, source=order.source.uri, store=order.store)
        with changes:
            num_work = min(changes.num_work, order.limit or changes.num_work)
            executor = open_executor(order.ray_address) if num_work else None
            check_device(order, executor.resources() if executor else {})
            store = store or Store.create(order.store)  # the input is good: from here on, something is written
            _keep_books(changes, store, report, prune=order.prune)
            if executor is not None:
                store.register_recipe(recipe, model)
                _index_work(order, changes, recipe, executor, store, report)
    report.counts.check()
    report.wall_s = time.time() - report.started_s
    logs.ended("index", report.run_id, report.as_json(), report.stopped)
    return report, store


def take_stock(
    order: IndexOrder, scratch: Path, left_out: Counter[str]
) -> tuple[Store | None, IndexRecipe, str, Changes]:
    """Stages 1 and 2: the store if there is one, the recipe and model of the run, and what there is to do.

    Args:
        order: of the run.
        scratch: where the listing may lie.
        left_out: counts by kind what of the source is not listed.
    """
    check_order(order)
    doing(f"listing {order.source.uri}")
    store = Store.find(order.store)
    listed_seq = store.pin(("videos",)).newest_seq("videos") if store else 0  # who came later is not gone, but not seen
    num_listed = spool_source(order.source, str(scratch), left_out)
    if not num_listed and not (order.prune and order.allow_mass_delete):
        raise nothing_in(order.source, left_out)
    doing("reading the store and the model")
    recipe, model = choose_index_recipe(store, order.model, order.recipe, order.decode)
    criteria = ChangeCriteria(
        recipe.fingerprint,
        order.source.home,
        order.source.coverage(),
        retry_failed=order.retry_failed,
        restale=order.restale,
        is_manifest=order.source.is_manifest,
        by_time=recipe.sampling == "interval",
        listed_seq=listed_seq,
    )
    doing(f"comparing {num_listed:,} listed videos with the store")
    changes = compare(str(scratch), store.pin(("videos",)) if store else Snapshot(), criteria)
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
    counts.mistimed = changes.num_mistimed
    counts.listed, counts.not_attempted = changes.num_work + sum(changes.others.values()), changes.num_work
    left_out = store.append("videos", changes.bookkeeping(report.run_id, prune=prune), changes.look)
    counts.deleted, counts.gone = (changes.num_gone, 0) if prune else (0, changes.num_gone)
    if not left_out.num_rows:
        return
    named = {row["video_id"] for row in left_out.to_pylist() if row["uri"]}  # but not those no longer forgotten
    tied = changes.look.tied
    num_moved, num_gone = len(named & tied.keys()), len(named - tied.keys() - {*tied.values()})
    counts.moved, counts.not_attempted = counts.moved - num_moved, counts.not_attempted + num_moved
    if prune:
        counts.deleted, counts.gone = counts.deleted - num_gone, counts.gone + num_gone
    report.notes.append(
        f"{counted(left_out.num_rows, 'row')} about moved or deleted videos were left out, for another run came to "
        "know more of them since this one looked; the next run looks again"
    )


def _index_work(
    order: IndexOrder, changes: Changes, recipe: IndexRecipe, executor: Executor, store: Store, report: IndexReport
) -> None:
    """Stages 3 to 8; however they end, what was finished is committed."""
    tally = executor.start_tally(report.run_id)
    num_work = min(changes.num_work, order.limit or changes.num_work)
    if order.thumbnails is not None:
        remember_thumbnails(store, keeps=order.thumbnails)
    has_thumbnails = keeps_thumbnails(store)

    def run_stages(plan: pa.Table) -> Iterator[pa.Table]:
        cluster = executor.resources()  # a wave begins with what there is by then
        resources = for_index(cluster, len(plan), decodes_on_gpu=order.decode_device == "cuda")
        watching = (has_thumbnails, order.decode_device)
        blocks, stages = _stages(recipe, store, resources, tally, plan, watching=watching)
        return executor.run(blocks, stages, limits.ends_s)

    limits = Limits(order.max_hours, order.max_failed, report.started_s)
    listed = Listed(changes.criteria.listed_seq, changes.look.seq, report.run_id, is_as_listed)
    run = IndexRun(run_stages, recipe.fingerprint, store, listed, report, limits)
    try:
        with progress(tally, {"decode": num_work, "encode": None, "write": None}, show=order.show_progress):
            for wave in changes.waves(WAVE_VIDEOS, order.limit):
                run.index_wave(wave)
    except KeyboardInterrupt:
        report.stopped = INTERRUPTED
    except OutOfTimeError:
        report.out_of_time = True
    except (TooManyFailuresError, StageError) as error:
        report.stopped = str(error)
    finally:
        run.flush()
        metrics.QUEUE.record(0, job="index")  # nothing waits any more, whatever is left
    if listed.overtaken:
        report.notes.append(
            f"{counted(len(listed.overtaken), 'video')} of which another run indexed a newer file, or which it found "
            "gone, meanwhile: what was listed of them is no longer there, and was left out; the next run looks again"
        )
    if report.stopped or report.out_of_time:
        executor.release()  # not in an except clause, where the exception is still held
    report.stages = tally.report()
    begun_s = tally.begun_s()
    if begun_s is not None:
        report.work_s = run.commits.last_s - begun_s
        report.startup_s = begun_s - report.started_s


class IndexRun:
    """What the waves of an index run share: the accounting of its videos, and what is to be committed.

    Args:
        stages: tables.PLAN in, tables.OUTCOMES out as they land.
        recipe: fingerprint of the tokens.
        store: where they go.
        listed: the listing that it was planned by.
        report: counts what is committed.
        limits: when the run ends before its work does.
    """

    def __init__(
        self,
        stages: Callable[[pa.Table], Iterator[pa.Table]],
        recipe: str,
        store: Store,
        listed: Listed,
        report: IndexReport,
        limits: Limits,
    ) -> None:
        self.stages, self.counts, self.limits = stages, report.counts, limits
        self.account, self.refused = Account(recipe, report.run_id), RefusedVideos()
        self.store, self.listed = store, listed
        self.commits: Commits[Finished] = Commits(store.uri, "index", report.run_id, self._commit)

    def index_wave(self, wave: Sequence[WorkRow]) -> None:
        """One wave, then the parts of its long videos; what is lost in a pass is planned again, then fails as lost."""
        for _ in range(MAX_PASSES):
            self._pass(self.account.plan(wave))
            for _ in range(MAX_PASSES):
                if len(parts := self.account.parts()):
                    self._pass(parts)
            wave = left = self.account.unaccounted()
            if not left:
                return
        self._finish(Finished(None, self.account.lost(left, MAX_PASSES)))

    def _pass(self, plan: pa.Table) -> None:
        """The stages over a plan once."""
        for landed in self.stages(plan):
            self._settle(self.refused.sift(landed, self.account.planned))
            self._settle(self.refused.judge(self.account.planned))
            if not self.account.planned:  # nothing more to wait for, while Ray still takes the stages down
                self.flush()
            self.limits.check(self.account.settled)
        self._settle(self.refused.judge(self.account.planned, is_end=True))

    def flush(self) -> None:
        """Commit what is finished."""
        count_committed(self.commits.flush(), self.counts)

    def _commit(self, parts: list[Finished]) -> None:
        """Commit; a video whose tokens were taken meanwhile is planned again, one forgotten or overtaken is not."""
        left_out = commit_to(self.store, parts, self.listed)
        rows = pa.Table.from_pylist(left_out, schema=tables.VIDEOS)
        forgotten = self.store.forgotten(rows, self.listed.planned_seq) if left_out else frozenset()
        for row in left_out:
            if row["video_id"] in forgotten:
                self.counts.forgotten += 1
                self.counts.not_attempted -= 1
            elif row["write_id"] not in self.listed.overtaken:
                self.account.reopen(row)

    def _settle(self, outcomes: pa.Table) -> None:
        if len(outcomes):
            self._finish(Finished(outcomes, self.account.add(outcomes)))

    def _finish(self, finished: Finished) -> None:
        count_committed(self.commits.add(finished, len(finished.rows)), self.counts)
        metrics.QUEUE.record(self.counts.not_attempted - self.commits.num_rows, job="index")


def _stages(
    recipe: IndexRecipe,
    store: Store,
    resources: IndexResources,
    tally: Any,
    plan: pa.Table,
    *,
    watching: tuple[bool, Device],
) -> tuple[list[pa.Table], list[Stage]]:
    """Stages 4 to 6 over a plan: tables.PLAN in blocks, tables.OUTCOMES out; `watching` is what `Watch` is told."""
    per_block = resources.videos_per_block if plan["first_unit"].null_count else 1  # of parts: Ray retries a block
    blocks = [plan.slice(i, per_block) for i in range(0, len(plan), per_block)]
    spec, device = recipe.spec(), "cuda" if resources.encoder_gpus else "cpu"
    return blocks, [
        Stage(  # 4: one worker a core, since decoding is what there is most of
            Watch,
            (spec, tally, *watching, resources.long_decode_s),
            None,
            workers=min(resources.decoders, len(blocks)),
            cpus=resources.decoder_cpus,
            gpus=resources.decoder_gpus,
            threads=DECODER_THREADS,
            most=len(blocks),
        ),
        Stage(  # 5: one worker a GPU; a few units a forward pass fill it
            Encode,
            (spec, tally, device, resources.encoder_threads),
            resources.units_per_forward,
            workers=resources.encoders,
            cpus=resources.encoder_cpus,
            gpus=resources.encoder_gpus,
            most=resources.most_encoders,
        ),
        Stage(  # 6: one worker, since writing is a thousandth of the work; stateless, so it may be run again
            Write,
            (store.uri, recipe.fingerprint, tally),
            resources.units_per_shard,
            workers=resources.writers,
            cpus=WRITER_CPUS,
            most=resources.most_writers,
        ),
    ]
