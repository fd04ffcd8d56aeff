"""The Arrow schema of every table in a store, and of the batches that travel between the operators.

A new column goes to the end of its table's schema: rows so far read as null, and stores are given it with the first
commit to that table. Columns are never renamed, removed or retyped; see `pipeline/store/delta.py`.
"""

from typing import TypedDict

import pyarrow as pa

# --- tables of a store (Delta Lake; rows are only ever added, the newest wins) ---

VIDEOS = pa.schema(
    [
        ("video_id", pa.string()),
        ("source", pa.string()),
        ("uri", pa.string()),
        ("external_id", pa.string()),
        ("etag", pa.string()),
        ("size_bytes", pa.int64()),
        ("modified_at", pa.timestamp("us")),  # naive UTC, as everywhere
        ("recipe", pa.string()),
        ("status", pa.string()),  # indexed | failed | deleted
        ("error_code", pa.string()),
        ("error", pa.string()),
        ("attempts", pa.int32()),
        ("duration_s", pa.float64()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_frames", pa.int64()),
        ("codec", pa.string()),
        ("decoder", pa.string()),
        ("num_segments", pa.int32()),
        ("write_id", pa.string()),
        ("seq", pa.int64()),  # epoch microseconds at commit, strictly growing
        ("run_id", pa.string()),
        ("indexed_at", pa.timestamp("us")),
        ("decode_ms", pa.float64()),
        ("encode_ms", pa.float64()),
        ("keyframe_shift_s", pa.float64()),  # the farthest that a keyframe lies from what it stands for; else null
        ("time_rule", pa.int32()),  # recipe.TIME_RULE when it was written; null before there was one
    ]
)

SEGMENTS = pa.schema(
    [
        ("video_id", pa.string()),
        ("recipe", pa.string()),
        ("write_id", pa.string()),
        ("segment", pa.int32()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("first_frame", pa.int64()),
        ("last_frame", pa.int64()),
        ("num_frames", pa.int32()),
        ("embedding", pa.list_(pa.float32())),  # search vector, L2-normalised; null without a text encoder
        ("thumbnail", pa.binary()),  # JPEG; null where the store keeps none
        ("frames", pa.list_(pa.int64())),  # F: the numbers of its frames, each once; null before they were kept
        ("times_s", pa.list_(pa.float64())),  # F: when each begins to be shown
        ("frame_embeddings", pa.binary()),  # [F, E] int8: of each frame, 127 its largest value; null as embedding
    ]
)

TOKENS = pa.schema(
    [
        ("video_id", pa.string()),
        ("recipe", pa.string()),
        ("write_id", pa.string()),
        ("segment", pa.int32()),
        ("num_tokens", pa.int32()),
        ("dim", pa.int32()),
        ("dtype", pa.string()),  # of `local`: float16 | int8; `cls` is float16
        ("local", pa.binary()),  # [K, D] little-endian
        ("sizes", pa.binary()),  # [K] uint16: patch tokens merged into each
        ("spans", pa.binary()),  # [K, 2] uint32: first and last frame number each token draws on, inclusive
        ("cls", pa.binary()),  # [G, D]: mean over the segment's frames, per layer; null without CLS
        ("num_frames", pa.int32()),
        ("positions", pa.binary()),  # [K, 3] float64: seconds into the video, row, column; means; null without
        ("scales", pa.binary()),  # [K, ceil(D / 64)] float16: what 64 int8 are times; null for float16
    ]
)

EVIDENCE = pa.list_(pa.struct([("start_s", pa.float64()), ("end_s", pa.float64()), ("weight", pa.float64())]))

QUESTION_TYPES = ("text", "bool", "choice", "number", "json")

QUESTIONS = pa.schema(  # one row a question of a file; not a table of the store
    [
        ("question_id", pa.string()),  # null: the question's hash stands in
        ("question", pa.string()),
        ("video", pa.string()),  # uri, external_id, path or a file's unique stem; null: every selected video
        ("type", pa.string()),  # one of QUESTION_TYPES, never null
        ("choices", pa.list_(pa.string())),  # of a choice; null otherwise
        ("schema", pa.string()),  # JSON schema of a json answer; null: any JSON
    ]
)


class TypedQuestion(TypedDict):
    """What of a question says how it is answered, and what its answer's value is."""

    question: str
    type: str
    choices: list[str] | None
    schema: str | None


class QuestionRow(TypedQuestion):
    """A row of QUESTIONS."""

    question_id: str | None
    video: str | None


ANSWERS = pa.schema(
    [
        ("run_id", pa.string()),
        ("question_id", pa.string()),
        ("question", pa.string()),
        ("question_hash", pa.string()),
        ("type", pa.string()),
        ("video_id", pa.string()),
        ("uri", pa.string()),
        ("write_id", pa.string()),
        ("answer", pa.string()),
        ("value", pa.string()),  # of a typed answer, as its type is written: true, 3.5, red, {"a": 1}; null for text
        ("confidence", pa.float64()),  # bool and choice: the chosen option's share of the options' likelihood
        ("status", pa.string()),  # answered | unparsed (an answer, but not of its type) | failed
        ("error_code", pa.string()),
        ("error", pa.string()),
        ("model", pa.string()),
        ("answer_recipe", pa.string()),
        ("num_visual_tokens", pa.int32()),
        ("num_prompt_tokens", pa.int32()),
        ("num_new_tokens", pa.int32()),
        ("evidence", EVIDENCE),
        ("created_at", pa.timestamp("us")),  # by the worker's clock
        ("latency_ms", pa.float64()),
        ("seq", pa.int64()),  # of its commit, which says what is newer
        ("thinking", pa.string()),  # what the model wrote on the way to its answer; null where it wrote nothing so
        ("decoding", pa.string()),  # how its words were chosen: AnswerRecipe.decoding
        ("focus", pa.string()),  # question | even: what gave way to the budget; null where nothing had to
        ("kept_segments", pa.list_(pa.int32())),  # of focus question: which were shown as stored
    ]
)

VERDICTS = pa.schema(  # one row an answer that was judged, in one dimension of one benchmark
    [
        ("run_id", pa.string()),
        ("benchmark", pa.string()),
        ("dimension", pa.string()),  # what was judged: qa | correctness | detail | context | temporal | consistency
        ("question_id", pa.string()),
        ("question", pa.string()),
        ("kind", pa.string()),  # of question, where the benchmark's file says one
        ("video_id", pa.string()),
        ("uri", pa.string()),
        ("write_id", pa.string()),
        ("answer_recipe", pa.string()),
        ("model", pa.string()),
        ("prediction", pa.string()),
        ("prediction2", pa.string()),  # of consistency: what the question was answered in other words
        ("reference", pa.string()),  # the right answer
        ("judge", pa.string()),  # KIND:MODEL@HOST#PROMPTS
        ("prompt_hash", pa.string()),  # SHA-256 of all that the judge was shown
        ("raw_reply", pa.string()),  # the judge's last; null where no model was asked
        ("score", pa.float64()),  # 0 to 5; null where the judge gives none
        ("is_right", pa.bool_()),  # null where the dimension knows only scores
        ("status", pa.string()),  # judged | unparsed (a reply that says neither) | failed
        ("error_code", pa.string()),
        ("error", pa.string()),
        ("created_at", pa.timestamp("us")),
        ("seq", pa.int64()),
    ]
)

RECIPES = pa.schema(
    [
        ("recipe", pa.string()),
        ("name", pa.string()),
        ("spec", pa.string()),  # JSON of IndexRecipe.spec()
        ("model", pa.string()),  # what `--model` named when it was registered: the default of `answer`
        ("event", pa.string()),  # registered | promoted, of a recipe; thumbnails | no_thumbnails, of what comes
        ("seq", pa.int64()),
    ]
)

RUNS = pa.schema(
    [
        ("run_id", pa.string()),
        ("job", pa.string()),
        ("counts", pa.string()),  # JSON {name: count}
        ("wall_s", pa.float64()),
        ("stage_s", pa.string()),  # JSON {stage: busy seconds}
        ("versions", pa.string()),  # JSON {package: version}
        ("seq", pa.int64()),
    ]
)

TABLES = {
    "videos": VIDEOS,
    "segments": SEGMENTS,
    "tokens": TOKENS,
    "answers": ANSWERS,
    "verdicts": VERDICTS,
    "recipes": RECIPES,
    "runs": RUNS,
}
# How many columns the tables had in 0.1.0, whose files do not say in their names how many they have.
FIRST_COLUMNS = {"videos": 26, "segments": 11, "tokens": 12, "answers": 22, "verdicts": 23, "recipes": 6, "runs": 7}

# --- batches between the operators of the index job ---

_LISTED = ("video_id", "source", "uri", "external_id", "etag", "size_bytes", "modified_at", "error_code", "error")
LISTING = pa.schema([VIDEOS.field(name) for name in _LISTED])  # one row a listed video; with an error it is not watched

PLAN = pa.schema(  # one row a video to watch, or a part of a long one
    [
        *LISTING,
        VIDEOS.field("write_id"),
        VIDEOS.field("attempts"),
        ("first_unit", pa.int32()),  # of a part; null: the video is watched from its beginning
        ("end_unit", pa.int32()),  # the first that is not asked for; null: to its end, or as far as one decoder should
    ]
)
ALL_UNITS = 2**31 - 1  # in place of an end: one decoder watches all of it, however long that takes


_UNIT = pa.schema(  # what is known of a unit from its decoding on; error_code null means good so far
    [
        ("video_id", pa.string()),
        ("write_id", pa.string()),
        ("unit", pa.int32()),
        ("num_units", pa.int32()),
        *[VIDEOS.field(name) for name in ("duration_s", "fps", "width", "height", "num_frames", "codec", "decoder")],
        ("num_segments", pa.int32()),  # of the whole video
        ("error_code", pa.string()),
        ("error", pa.string()),
        ("decode_ms", pa.float64()),  # CPU milliseconds
        VIDEOS.field("keyframe_shift_s"),  # of this unit
        ("read_bytes", pa.int64()),  # from the network, since the unit before
        ("whole_because", pa.string()),  # why a file of which a part was to do was fetched whole
        ("rest_ms", pa.float64()),  # CPU milliseconds that the units behind it will take, left to others; else null
        ("cpu_because", pa.string()),  # why it was decoded on the CPU where a GPU was asked for; once for each reason
    ]
)

# frames and times of a segment before it is merged: one that is shown twice stands there twice
_SHOWN = [SEGMENTS.field(name) for name in ("segment", "start_s", "end_s", "frames", "times_s", "thumbnail")]

FRAMES = pa.schema(  # one row a unit; of a failed unit, segments is empty and frames null
    [
        *_UNIT,
        ("segments", pa.list_(pa.struct(_SHOWN))),
        ("num_pictures", pa.int64()),  # that the tower sees of the whole video, repeats counted
        ("frame_height", pa.int32()),  # pixels
        ("frame_width", pa.int32()),
        # uint8 [F, frame_height, frame_width, 3] RGB: each number that the segments show once, ascending
        ("frames", pa.large_binary()),
    ]
)

_SEGMENT_TOKENS = {f.name: f for f in [*SEGMENTS, *TOKENS] if f.name not in ("video_id", "recipe", "write_id")}
ENCODED_SEGMENT = pa.struct([*_SEGMENT_TOKENS.values()])

ENCODED = pa.schema([*_UNIT, ("encode_ms", pa.float64()), ("segments", pa.list_(ENCODED_SEGMENT))])  # one row a unit

# A closed parquet file, as Delta's log will describe it: its path in its table, and Delta's statistics as JSON.
SHARD = pa.struct([("path", pa.string()), ("size_bytes", pa.int64()), ("stats", pa.string())])

OUTCOMES = pa.schema(  # one row a unit: what the driver accounts for
    [*_UNIT, ("encode_ms", pa.float64()), ("tokens_shard", SHARD), ("segments_shard", SHARD)]
)


# --- batches between the operators of the answer job ---

_ASKED = pa.struct(
    [
        *(ANSWERS.field(name) for name in ("question_id", "question", "question_hash", "type")),
        *(QUESTIONS.field(name) for name in ("choices", "schema")),
    ]
)

GROUPS = pa.schema(  # a video and what is asked about it; a video with very many questions has several rows
    [*(VIDEOS.field(name) for name in ("video_id", "uri", "write_id")), ("questions", pa.list_(_ASKED))]
)


class AskedQuestion(TypedQuestion):
    """A question of a row of GROUPS."""

    question_id: str
    question_hash: str


class GroupRow(TypedDict):
    """A row of GROUPS."""

    video_id: str
    uri: str
    write_id: str
    questions: list[AskedQuestion]
