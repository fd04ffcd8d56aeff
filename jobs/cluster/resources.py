"""How many workers of each stage, with how much of the machine, and why: the only place where such numbers live."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

# New objects between two looks for cycles: after each 700, as is Python's way, they take a fifth of the CPU seconds in
# which torch is loaded.
COLLECT_EVERY = 10_000
TARGET_BLOCK_BYTES = (
    16 << 20
)  # about one work unit of 224 px frames: with larger blocks the encoder waits for coalescing
COMMIT_EVERY_S = 120.0  # what a crash may cost, against the number of commits a night leaves in the log
STORE_PATIENCE_S = 300.0  # a store out of reach for longer than that is for a person to look at
WAVE_VIDEOS = 20_000  # planned at a time: what the driver holds in memory, and the most a broken cluster has to redo
MAX_PASSES = 3  # how often a video whose units vanish is planned before its row says `lost`
MIN_OUTCOMES = 200  # before a share of failures means anything
MAX_LOSS = 0.2  # of a source: more that is gone at once is taken for a mistake (a wrong prefix, an unmounted disk)
MIN_RETENTION_HOURS = 48.0  # of replaced files: a reader holds on to what it pinned for as long as its job takes
MAX_RETENTION_HOURS = 168.0  # Delta's log remembers a dropped file for a week
WAVE_QUESTIONS = 200_000  # asked at a time: about 100 MB in the driver, and hours of a GPU
COMMIT_ANSWERS = 20_000  # kept in the driver at most: about 20 MB with their evidence
COMMIT_VERDICTS = 1000  # kept in the driver at most ...
COMMIT_VERDICTS_EVERY_S = 15.0  # ... and no longer than that: each may have cost money
PLAN_MEMORY_GB = 1.5  # of DuckDB's, for the plan of an answer run; ten million questions fit, more go to disk
WRITER_CPUS = 0.1  # writing a shard is a short burst of input and output every hundred units
ENCODERS_PER_WRITER = 4  # a writer takes 300 MB a second: the tokens of more than four GPUs
DECODE_DEADLINE_S = 300.0  # for one unit of at most 100 frames; the slowest real unit seen took 30 s
DECODER_THREADS = 2  # one decodes, one fetches the next video
LONG_DECODE_S = 3600.0  # of a video still to be decoded: more is left to several decoders, once the wave is through
PART_DECODE_S = 600.0  # of such a video for each of them: a hundred times what opening it takes ...
MAX_PARTS = 32  # ... but no more parts, for each may have to fetch all of it
DECODERS_PER_GPU = 8  # where GPUs decode: as many as an H100 has decoders, and one; each has its own 0.3 GB there
DECODING_SHARE = 0.2  # of a GPU, for Ray's books: decoders are other parts of it than those that encode
# Times as many encoders or answerers once nodes joined; not more, for Ray Data keeps CPUs free for all of them.
GROWTH = 4
DECODE_MEMORY_BYTES = 4 << 30  # a decoder needs 0.1 GB with in-decoder resize and up to 3.4 GB for full 1080p frames


@dataclass(frozen=True)
class IndexResources:
    """The index job's share of a cluster, stage by stage."""

    decoders: int
    decoder_cpus: float
    encoders: int
    encoder_cpus: float
    encoder_gpus: float
    encoder_threads: int
    writers: int
    units_per_forward: int
    units_per_shard: int
    videos_per_block: int
    most_encoders: int  # once nodes joined
    most_writers: int
    decoder_gpus: float = 0.0
    long_decode_s: float = LONG_DECODE_S  # of one video by one decoder


def for_index(cluster: Mapping[str, float], num_videos: int, *, decodes_on_gpu: bool = False) -> IndexResources:
    """The index job on a cluster as `ray.cluster_resources()` describes it."""
    cpus, gpus = max(1, int(cluster.get("CPU", 1))), int(cluster.get("GPU", 0))
    decodes_on_gpu = decodes_on_gpu and gpus > 0
    if gpus:
        # A GPU encodes 100 frames in about 0.1 s and a core decodes them in about one: every core that is left decodes.
        # Where GPUs have few cores, all take less than one, or the writer would find no place.
        decoders, encoders, most_encoders = max(1, cpus - gpus - 1), gpus, GROWTH * gpus
        decoders = min(decoders, DECODERS_PER_GPU * gpus) if decodes_on_gpu else decoders
        encoder_threads, units_per_forward, units_per_shard = 1, 8, 100
        left = cpus - WRITER_CPUS * max(1, gpus // ENCODERS_PER_WRITER)
        decoder_cpus = encoder_cpus = min(1.0, math.floor(100 * left / (decoders + encoders)) / 100)
    else:
        # Stages share the cores and the operating system divides them: fractions only make all of them schedulable,
        # and leave no room for more of them until a node joins.
        # One encoder per 8 cores, since a forward pass scales that far; small shards, since a unit may take minutes.
        decoders, decoder_cpus = cpus, 0.75 if cpus > 1 else 0.7
        # No more of them while a wave is under way: they would take the cores of decoders that are done, at its end.
        encoders = most_encoders = max(1, cpus // 8)
        encoder_cpus, encoder_threads, units_per_forward, units_per_shard = (
            0.2 * cpus / encoders,
            cpus // encoders,
            4,
            16,
        )
    # Many blocks a decoder, so that all end at about the same time; 8 videos at most: a dead worker repeats its block.
    videos_per_block = max(1, min(8, num_videos // (32 * decoders)))
    return IndexResources(
        decoders,
        decoder_cpus,
        encoders,
        encoder_cpus,
        (1.0 - DECODING_SHARE * decodes_on_gpu) if gpus else 0.0,
        encoder_threads,
        max(1, encoders // ENCODERS_PER_WRITER),
        units_per_forward,
        units_per_shard,
        videos_per_block,
        most_encoders,
        max(1, most_encoders // ENCODERS_PER_WRITER),
        DECODING_SHARE / DECODERS_PER_GPU if decodes_on_gpu else 0.0,
    )


def num_parts(decode_s: float) -> int:
    """Among how many decoders a video is shared out of which so many seconds of decoding are left."""
    return min(max(math.ceil(decode_s / PART_DECODE_S), 1), MAX_PARTS)


@dataclass(frozen=True)
class TrainResources:
    """The train job's share of a cluster."""

    workers: int
    cpus: float  # of a worker
    gpus: float
    threads: int
    readers: int  # of each worker
    reader_cpus: float


def for_train(cluster: Mapping[str, float], workers: int | None) -> TrainResources:
    """The train job on a cluster as `ray.cluster_resources()` describes it: a worker per GPU, or as many as are named.

    A reader hands on several hundred MB a second, and a step on an accelerator eats some ten: one is enough, a second
    hides an object store's latency. On CPUs both share the cores; fractions only make all of them schedulable.
    """
    cpus, gpus = max(1, int(cluster.get("CPU", 1))), int(cluster.get("GPU", 0))
    number = workers or gpus or 1
    if gpus:
        return TrainResources(number, 1.0, 1.0, 1, 2, 1.0)
    return TrainResources(number, 0.5 * cpus / number, 0.0, max(1, cpus // number), 1, 0.25 * cpus / number)


@dataclass(frozen=True)
class AnswerResources:
    """The answer job's share of a cluster."""

    answerers: int
    cpus: float
    gpus: float
    threads: int
    questions_per_block: int
    kv_bytes: int | None  # for the KV cache of one answerer; None: what its device has to spare


def for_answer(cluster: Mapping[str, float], num_questions: int, kv_gb: float | None = None) -> AnswerResources:
    """The answer job on a cluster as `ray.cluster_resources()` describes it: a language model per GPU, or one."""
    cpus, gpus = max(1, int(cluster.get("CPU", 1))), int(cluster.get("GPU", 0))
    answerers = gpus or 1
    # The engine batches within a block and idles at its end: several times as many questions as it decodes at once. But
    # some blocks an answerer, so that all end at about the same time, and a dead one does not repeat hours.
    questions_per_block = max(64, min(512, num_questions // (4 * answerers)))
    kv_bytes = None if kv_gb is None else int(kv_gb * 1e9)
    if gpus:
        return AnswerResources(gpus, 1.0, 1.0, 1, questions_per_block, kv_bytes)
    return AnswerResources(1, 0.9 * cpus, 0.0, cpus, questions_per_block, kv_bytes)


@dataclass(frozen=True)
class ServeResources:
    """What the pages over a store may take of the machine that they run on, beside whatever else runs there."""

    connections: int = 64  # open at once; a browser holds six
    requests: int = 32  # answered at once, each in a thread of its own; others are asked to come back
    head_s: float = 10.0  # for a request's line and headers to arrive
    request_s: float = 120.0  # for an answer to be made and taken; media at 35 KB a second
    page_s: float = 15.0  # for a query of a page
    sql_s: float = 20.0  # for somebody's own query
    sql_at_once: int = 2  # of these
    sql_bytes: int = 2 << 30  # of memory for each, enforced by the kernel
    wait_s: float = 5.0  # for a turn, before a request is asked to come back
    sql_rows: int = 1000  # on the page
    file_rows: int = 100_000  # in a file to download
    file_bytes: int = 64 << 20
    duckdb_memory: str = "1GB"
    duckdb_threads: int = 2
    renew_s: float = 3.0  # between two looks at the store's log
    renew_wait_s: float = 0.5  # for what changed; a page shows what was there before where that takes longer
    searches_at_once: int = 1  # each takes all cores
    asks_at_once: int = 1  # of the loaded model
    ask_videos: int = 20  # of a selection, by one question
    ask_s: float = 60.0  # then what has not begun is left
    media_bytes: int = 4 << 20  # of a video in one answer
    media_at_once: int = 8
    thumbnails_waiting: int = 12  # for the one decoder
    thumbnail_bytes: int = 32 << 20  # kept
    decode_s: float = 20.0  # for one thumbnail
    decode_bytes: int = 2 << 30


SERVE = ServeResources()
