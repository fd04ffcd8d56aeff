"""Which question goes to which video: the plan of an answer run, made in DuckDB.

However many questions there are, no Python object is made of one: they stay an Arrow table, the plan holds two numbers
for each question and video, and what is to be asked leaves in waves.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from longvlm.jobs.cluster.resources import PLAN_MEMORY_GB, WAVE_QUESTIONS, WAVE_VIDEOS
from longvlm.jobs.names import match_live
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.query import access
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import TYPE_RULES, AnswerRecipe

_OTHER_RULES = " ".join(
    f"WHEN '{kind}' THEN substr(sha256(id_of(kind, choices, form, question) || chr(31) || 'rule {number}'), 1, 16)"
    for kind, number in TYPE_RULES.items()
    if number > 1
)
# The id of a question that has none, 64 bits as 16 hex characters: of its text, or of all that says how it is to be
# answered, with unit separators in between. A question's hash is the same, or where the rule of its type has changed, a
# hash of that and the rule's number. In the plan it stands as a number.
HASH = f"""
CREATE TEMP MACRO id_of(kind, choices, form, question) AS substr(sha256(CASE WHEN kind = 'text' THEN question
    ELSE kind || chr(31) || coalesce(array_to_string(choices, chr(31)), '') || chr(31) || coalesce(form, '')
        || chr(31) || question END), 1, 16);
CREATE TEMP MACRO hash_of(kind, choices, form, question) AS
    CASE kind {_OTHER_RULES} ELSE id_of(kind, choices, form, question) END;
CREATE TEMP MACRO as_number(hash) AS ('0x' || hash)::UBIGINT
"""
_SELECTED = """
SELECT video_id FROM videos WHERE status = 'indexed' AND ({where}
)"""  # the line break ends a comment in the predicate
# The same where there is no predicate: the view takes longer than the rest of a small plan.
_SELECTED_ALL = "SELECT video_id FROM live_videos WHERE recipe = (FROM active_recipe)"
# All live videos of the recipe, numbered in the order of their write ids, which is that of the shards.
_LIVE = """
CREATE TEMP TABLE live AS
SELECT row_number() OVER (ORDER BY write_id)::INTEGER AS n, video_id, uri, external_id, write_id, num_segments,
    video_id IN (FROM selected) AS is_selected
FROM live_videos WHERE recipe = $1
"""
# The videos that this run is about: selected, asked about, and at most as many as the limit says.
_CHOSEN = """
CREATE TEMP TABLE chosen AS
SELECT n FROM live
WHERE is_selected AND (EXISTS (FROM given WHERE video IS NULL) OR n IN (SELECT n FROM named))
ORDER BY n LIMIT {limit}
"""
# Each question about each chosen video, once; `other` differs from `hash` where one id stands for two questions. Hashes
# are made after the cut to what is chosen, but before the questions about all videos are multiplied by these.
_PAIRS = """
CREATE TEMP TABLE pairs AS
WITH both_kinds AS (
    SELECT n, q, coalesce(question_id, id_of("type", choices, "schema", question)) AS question_id,
        hash_of("type", choices, "schema", question) AS hash
    FROM given JOIN named ON video = name SEMI JOIN chosen USING (n)
    UNION ALL
    SELECT n, q, question_id, hash FROM chosen, (
        SELECT q, coalesce(question_id, id_of("type", choices, "schema", question)) AS question_id,
            hash_of("type", choices, "schema", question) AS hash
        FROM given WHERE video IS NULL
    )
)
SELECT n, question_id, min(q) AS q, min(as_number(hash)) AS hash,
    max(as_number(hash)) AS other
FROM both_kinds GROUP BY ALL
"""
_TWO_QUESTIONS = "SELECT question_id, uri FROM pairs JOIN live USING (n) WHERE hash <> other ORDER BY n, q LIMIT 1"
# `status` is that of the newest answer the recipe has given; null where there is none, or only a failure.
_PLAN = """
CREATE TEMP TABLE plan AS
WITH newest AS (
    SELECT write_id, question_id, question_hash, arg_max(status, (coalesce(seq, 0), created_at, run_id)) AS status
    FROM ledger_answers SEMI JOIN live USING (write_id) WHERE answer_recipe = $1 GROUP BY ALL
),
done AS (
    SELECT n, question_id, as_number(question_hash) AS hash, status::ENUM ('answered', 'unparsed') AS status
    FROM newest JOIN live USING (write_id) WHERE status IN ('answered', 'unparsed')
)
SELECT n, q, status FROM pairs LEFT JOIN done USING (n, question_id, hash) ORDER BY n, q
"""
# Within a wave neither quotient changes, so that it has at most so many questions, and at most so many videos.
_PENDING = """
CREATE TEMP TABLE pending AS
SELECT n, q, ((row_number() OVER (ORDER BY n, q) - 1) // $1
    + (dense_rank() OVER (ORDER BY n) - 1) // $2)::INTEGER AS wave
FROM plan WHERE status IS NULL ORDER BY n, q
"""
_WAVE = """
WITH wave AS (
    SELECT n, q, (row_number() OVER (PARTITION BY n ORDER BY q) - 1) // $1 AS piece FROM pending WHERE wave = $2
)
SELECT video_id, uri, write_id,
    list({'question_id': coalesce(question_id, id_of("type", choices, "schema", question)), 'question': question,
        'question_hash': hash_of("type", choices, "schema", question), 'type': "type", 'choices': choices,
        'schema': "schema"} ORDER BY q) AS questions
FROM wave JOIN live USING (n) JOIN given USING (q)
GROUP BY n, piece, video_id, uri, write_id ORDER BY n, piece
"""
_CHARACTERS_PER_TOKEN = 4  # of English in the tokenizers of these models, about
_WORKLOAD = f"""
WITH videos_now AS (
    SELECT $1 * any_value(num_segments) + $2 AS stored, count(*) AS num_questions
    FROM live JOIN pending USING (n) GROUP BY n
),
questions_now AS (SELECT length(question) AS num_characters, "type" FROM pending JOIN given USING (q))
SELECT (SELECT coalesce(sum(least(stored, $3) * if($4 AND stored > $3, num_questions, 1)), 0) FROM videos_now)::BIGINT,
    coalesce(sum(ceil(num_characters / {_CHARACTERS_PER_TOKEN})), 0)::BIGINT,
    count(*) FILTER ("type" NOT IN ('bool', 'choice'))
FROM questions_now
"""
# What is to be asked that a grammar holds; questions that differ in their words alone stand for each other.
_HELD = """
SELECT "type", "schema", first(question ORDER BY q) FROM pending JOIN given USING (q)
WHERE "type" IN ('number', 'json') GROUP BY "type", "schema" ORDER BY min(q)
"""
# What was asked, a part at a time (the plan is stored in its own order), and the newest answer to each.
_KEYS = """
CREATE OR REPLACE TEMP TABLE keys AS
SELECT n, q, status IS NOT NULL AS was_there, write_id, hash_of("type", choices, "schema", question) AS question_hash,
    coalesce(question_id, id_of("type", choices, "schema", question)) AS question_id
FROM plan JOIN live USING (n) JOIN given USING (q) WHERE plan.rowid >= $1 AND plan.rowid < $2
"""
_GIVEN = "FROM ledger_answers WHERE answer_recipe = $1 AND write_id BETWEEN $2 AND $3"
_ANSWERS = """
SELECT a.* FROM answers_now a JOIN keys USING (write_id, question_id, question_hash)
WHERE was_there OR run_id = $1
QUALIFY row_number() OVER (PARTITION BY n, q ORDER BY seq DESC NULLS LAST, created_at DESC, run_id DESC) = 1
ORDER BY n, q
"""


@dataclass
class Asking:
    """What a run has to ask, and how much of it was answered before; the plan itself lies in `con`."""

    con: duckdb.DuckDBPyConnection
    answer_recipe: str
    num_videos: int  # asked about
    num_asked: int  # questions about them, each once a video
    reused: dict[str, int]  # of these, answers in the store already, by status: answered, unparsed
    num_not_indexed: int  # questions about videos the ledger knows but has not live under the recipe
    num_without_recipe: int  # selected videos that are live under another recipe only

    @property
    def num_pending(self) -> int:
        """Questions to ask now."""
        return self.num_asked - sum(self.reused.values())

    def waves(self, questions_per_group: int) -> Iterator[pa.Table]:
        """What is to be asked, as tables of tables.GROUPS in the order of write ids.

        A wave has at most WAVE_VIDEOS videos and WAVE_QUESTIONS questions, a row of it at most `questions_per_group`.
        """
        for (wave,) in self.con.execute("SELECT DISTINCT wave FROM pending ORDER BY wave").fetchall():
            yield self.con.sql(_WAVE, params=[questions_per_group, wave]).to_arrow_table().cast(tables.GROUPS)

    def workload(
        self, tokens_per_segment: int, num_global: int, budget: int | None, *, follows_questions: bool
    ) -> tuple[int, int, int]:
        """Of what is to be asked: visual tokens; tokens of text, about; questions to decode for.

        Visual tokens are each video's once, but of a video that is over the budget once for every question, where the
        focus follows these.
        """
        return self.con.execute(_WORKLOAD, [tokens_per_segment, num_global, budget, follows_questions]).fetchall()[0]

    def held_by_grammars(self) -> list[tuple[str, str | None, str]]:
        """Each type and schema of numbers and JSON to be asked for, and one question that does."""
        return self.con.execute(_HELD).fetchall()

    def answers(self, snapshot: Snapshot, run_id: str) -> Iterator[dict[str, Any]]:
        """Rows of tables.ANSWERS to what was asked: those of this run, and those that were there before it.

        They come in the order of write ids, and within a video in that of the questions.
        """
        con = self.con
        with catalog.connect(Snapshot({"answers": snapshot.table("answers")}), ()) as later:
            for start in range(0, self.num_asked, WAVE_QUESTIONS):
                con.execute(_KEYS, [start, start + WAVE_QUESTIONS])
                span = _one(con, "SELECT min(write_id), max(write_id) FROM keys")
                con.register("answers_now", later.sql(_GIVEN, params=[self.answer_recipe, *span]).to_arrow_table())
                for batch in con.sql(_ANSWERS, params=[run_id]).to_arrow_table().to_batches(max_chunksize=1000):
                    yield from batch.to_pylist()


def plan(
    snapshot: Snapshot, questions: pa.Table, recipe: AnswerRecipe, where: str | None = None, limit: int | None = None
) -> Asking:
    """Join questions to the selected live videos, less what the same answer recipe has answered already.

    Args:
        snapshot: from `Store.pin`.
        questions: tables.QUESTIONS. A question without a video is about every selected video.
        recipe: says which tokens are asked about, and whose answers count as given.
        where: SQL predicate over the view `videos`.
        limit: at most this many videos: of those selected and asked about, the ones indexed first.

    Raises:
        InputError: the predicate is not SQL over `videos` or selects nothing, a question names a video that the store
            does not know or that could be several, or one id stands for two questions about one video.
    """
    views = None if where else ("live_videos", "active_recipe")  # a predicate may ask any
    con = _connect(snapshot, questions, views)
    num_selected, num_live = _select(con, where, recipe.index_recipe)
    named, num_not_indexed = match_live(con, "given", "live", "ledger_videos")
    con.register("named", named)
    con.execute(_CHOSEN.format(limit="NULL" if limit is None else limit))
    con.execute(_PAIRS)
    if conflict := con.execute(_TWO_QUESTIONS).fetchone():
        raise InputError(
            f"the question_id {conflict[0]!r} stands for two different questions about {conflict[1]}; number them "
            "apart."
        )
    con.execute(_PLAN, [recipe.fingerprint])
    con.execute(_PENDING, [WAVE_QUESTIONS, WAVE_VIDEOS])
    con.execute("DROP TABLE pairs; DROP TABLE selected")
    con.unregister("named")
    counts = dict(con.execute("SELECT status, count(*) FROM plan GROUP BY status").fetchall())
    return Asking(
        con,
        recipe.fingerprint,
        num_videos=_one(con, "SELECT count(*) FROM chosen")[0],
        num_asked=sum(counts.values()),
        reused={status: count for status, count in counts.items() if status is not None},
        num_not_indexed=num_not_indexed,
        num_without_recipe=num_selected - num_live,
    )


def _connect(snapshot: Snapshot, questions: pa.Table, views: Collection[str] | None) -> duckdb.DuckDBPyConnection:
    """A database over the snapshot with room for a plan, and the questions as `given`, numbered by `q`."""
    read = _without_tokens(snapshot)
    con = catalog.connect(read, views, apart=True)
    con.execute(f"SET memory_limit = '{PLAN_MEMORY_GB}GB'")  # beyond that it goes to disk
    access.seal(con, read)  # the predicate is somebody's own SQL
    con.execute(HASH)
    numbers = pa.array(np.arange(len(questions), dtype=np.int32))
    con.register("given", questions.select(tables.QUESTIONS.names).append_column("q", numbers))
    return con


def _without_tokens(snapshot: Snapshot) -> Snapshot:
    """A view over ten thousand shards would have DuckDB look at each of them, and a plan needs none."""
    return Snapshot({name: table for name, table in snapshot.tables.items() if name != "tokens"})


def _select(con: duckdb.DuckDBPyConnection, where: str | None, index_recipe: str) -> tuple[int, int]:
    """Make `live`; returns how many videos the predicate selects, and how many of these have the recipe's tokens."""
    sql = _SELECTED.format(where=where) if where else _SELECTED_ALL
    try:
        catalog.check_select(con, sql)
        con.execute(f"CREATE TEMP TABLE selected AS {sql}")
    except duckdb.Error as error:
        raise InputError(f"the predicate of --where cannot run: {catalog.without_place(error)}") from error
    con.execute(_LIVE, [index_recipe])
    (num_selected,), (num_live,) = (
        _one(con, sql) for sql in ("SELECT count(*) FROM selected", "SELECT count(*) FROM live WHERE is_selected")
    )
    if not num_live:
        raise InputError("no indexed video is selected; see `longvlm status`, or widen --where.")
    return num_selected, num_live


def _one(con: duckdb.DuckDBPyConnection, sql: str) -> tuple[Any, ...]:
    """The only row of a query."""
    (row,) = con.execute(sql).fetchall()
    return tuple(row)
