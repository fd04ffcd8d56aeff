"""The videos that names mean: by uri, external_id, path, file name or stem, all names at once in DuckDB.

Videos and questions are given as relations: the name of a table or view of the connection, or a query in brackets.
"""

from collections.abc import Iterable

import duckdb
import pyarrow as pa

from longvlm.schemas.errors import InputError

# In order: the first way in which any video answers to a name decides. A path is any trailing part of the uri that
# begins after a "/"; equal ends have equally many parts, so one hash join on the ends of those lengths finds them all,
# also where a million videos are called video.mp4.
_WAYS = (
    "SELECT name, n FROM open_names JOIN {videos} ON uri = name",
    "SELECT name, n FROM open_names JOIN {videos} ON external_id = name",
    """
    WITH ends AS (SELECT DISTINCT len(string_split(ltrim(name, '/'), '/')) AS num_parts FROM open_names),
    paths AS (SELECT n, array_to_string(string_split(uri, '/')[-num_parts:], '/') AS path FROM {videos}, ends)
    SELECT DISTINCT name, n FROM open_names JOIN paths ON path = ltrim(name, '/')
    """,
    r"""
    SELECT name, n FROM open_names JOIN {videos}
    ON regexp_replace(string_split(uri, '/')[-1], '^(.+)\.[^.]*$', '\1') = name
    """,
)
_NAMES = "SELECT DISTINCT video AS name FROM {questions} WHERE video IS NOT NULL"
_UNCLEAR = """
SELECT name, count(*), min(uri), max(uri) FROM found_names JOIN {videos} USING (n)
GROUP BY name HAVING count(*) > 1 ORDER BY name LIMIT 1
"""
_ABOUT = """
SELECT count(*), arg_min(question, q), arg_min(video, q) FROM {questions} SEMI JOIN some_names ON video = name
"""


def match_names(con: duckdb.DuckDBPyConnection, names: pa.Table, videos: str) -> pa.Table:
    """Every name with each of the videos that answer to it, as a table of name and n.

    Args:
        con: a connection that knows the videos.
        names: distinct ones, in the column name.
        videos: a relation of n, uri and external_id.
    """
    found = []
    for way in _WAYS:
        if not len(names):
            break
        con.register("open_names", names)
        found.append(con.sql(way.format(videos=videos)).to_arrow_table().cast(_FOUND))
        con.register("found_names", found[-1])
        names = con.sql("SELECT name FROM open_names ANTI JOIN found_names USING (name)").to_arrow_table()
    return pa.concat_tables([_FOUND.empty_table(), *found])


_FOUND = pa.schema([("name", pa.string()), ("n", pa.int32())])


def match_questions(con: duckdb.DuckDBPyConnection, questions: str, videos: str) -> pa.Table:
    """The videos that questions name, where there are any, as a table of name and n.

    Args:
        con: a connection that knows both.
        questions: a relation of q, question and video (null: about all).
        videos: a relation of n, uri and external_id.

    Raises:
        InputError: a name could mean several videos.
    """
    found = match_names(con, con.sql(_NAMES.format(questions=questions)).to_arrow_table(), videos)
    con.register("found_names", found)
    if unclear := con.execute(_UNCLEAR.format(videos=videos)).fetchone():
        name, count, first, last = unclear
        raise InputError(
            f"a question is about {name!r}, which could mean {count} videos, such as {first} and {last}; name the "
            "video by its full uri."
        )
    return found


def match_live(con: duckdb.DuckDBPyConnection, questions: str, live: str, ledger: str) -> tuple[pa.Table, int]:
    """The live videos that questions name, as a table of name and n; every name must be one that the ledger knows.

    Also returns how many questions are about a video that the ledger knows but that is not live under the recipe: it
    failed, was deleted, or is indexed under another recipe.

    Args:
        con: a connection that knows all three.
        questions: a relation of q, question and video (null: about all).
        live: a relation of n, uri and external_id: the videos that may be asked about.
        ledger: a relation of uri and external_id: all videos there ever were.

    Raises:
        InputError: a name could mean several videos, or none that the ledger has ever known.
    """
    named = match_questions(con, questions, live)
    con.register("found_names", named)
    not_live = con.sql(
        f"SELECT name FROM ({_NAMES.format(questions=questions)}) ANTI JOIN found_names USING (name)"
    ).to_arrow_table()
    if not len(not_live):
        return named, 0
    known = match_names(con, not_live, _known(ledger))
    con.register("found_names", known)
    con.register("not_live", not_live)
    unknown = con.sql("SELECT name FROM not_live ANTI JOIN found_names USING (name)").to_arrow_table()
    con.register("some_names", unknown)
    num_unknown, question, name = con.execute(_ABOUT.format(questions=questions)).fetchall()[0]
    if num_unknown:
        raise InputError(
            f"{num_unknown} of the questions name no indexed video: the first, {question!r}, is about {name!r}, which "
            "the store does not know (`longvlm sql` shows its uris in the view videos)."
        )
    con.register("some_names", not_live)
    (num_not_live, _, _) = con.execute(_ABOUT.format(questions=questions)).fetchall()[0]
    return named, int(num_not_live)


def known_names(con: duckdb.DuckDBPyConnection, names: Iterable[str], ledger: str) -> set[str]:
    """Those of some names that any video answers to which the ledger has ever known, live or not."""
    asked = pa.table({"name": pa.array(sorted(set(names)), pa.string())})
    return set(match_names(con, asked, _known(ledger))["name"].to_pylist())


def _known(ledger: str) -> str:
    """The distinct videos of a ledger; which of several a name means does not matter where it is only known."""
    return f"(SELECT DISTINCT uri, external_id, 0 AS n FROM {ledger})"
