"""The videos that questions name: by uri, external_id, path, file name or stem, all of them at once in DuckDB."""

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
_UNCLEAR = """
SELECT name, count(*), min(uri), max(uri) FROM named JOIN live USING (n)
GROUP BY name HAVING count(*) > 1 ORDER BY name LIMIT 1
"""
_FIRST_OF = "SELECT count(*), arg_min(question, q), arg_min(video, q) FROM given SEMI JOIN {names} ON video = name"


def resolve(con: duckdb.DuckDBPyConnection) -> int:
    """Find the videos that the questions in `given` name; makes the table `named` (name, n) over the table `live`.

    Returns:
        How many questions are about a video that the ledger knows but that is not live under the recipe: it failed, was
        deleted, or is indexed under another recipe. These are in `named` no more than others that are not asked.

    Raises:
        InputError: a name could mean several videos, or none that the ledger has ever known.
    """
    find_live(con)
    if not _num_open(con, "named"):
        return 0
    con.execute("CREATE TEMP TABLE not_live AS SELECT name FROM names ANTI JOIN named USING (name)")
    con.execute("CREATE TEMP TABLE known AS SELECT DISTINCT uri, external_id, 0 AS n FROM ledger_videos")
    con.execute("CREATE OR REPLACE TEMP TABLE names AS FROM not_live")
    _match(con, "known", "known_names")
    con.execute("DELETE FROM names WHERE name IN (SELECT name FROM known_names)")
    num_unknown, question, name = con.execute(_FIRST_OF.format(names="names")).fetchall()[0]
    if num_unknown:
        raise InputError(
            f"{num_unknown} of the questions name no indexed video: the first, {question!r}, is about {name!r}, which "
            "the store does not know (`longvlm sql` shows its uris in the view videos)."
        )
    (num_not_indexed, _, _) = con.execute(_FIRST_OF.format(names="not_live")).fetchall()[0]
    return int(num_not_indexed)


def find_live(con: duckdb.DuckDBPyConnection) -> None:
    """Make the table `named` (name, n): which videos of the table `live` the rows of `given` name, where any is.

    Raises:
        InputError: a name could mean several videos.
    """
    con.execute("CREATE TEMP TABLE names AS SELECT DISTINCT video AS name FROM given WHERE video IS NOT NULL")
    _match(con, "live", "named")
    if unclear := con.execute(_UNCLEAR).fetchone():
        name, count, first, last = unclear
        raise InputError(
            f"a question is about {name!r}, which could mean {count} videos, such as {first} and {last}; name the "
            "video by its full uri."
        )


def known_names(con: duckdb.DuckDBPyConnection, names: Iterable[str]) -> set[str]:
    """Those of some names that any video answers to which the ledger has ever known, live or not."""
    con.register("asked_names", pa.table({"name": pa.array(sorted(set(names)), pa.string())}))
    con.execute("CREATE OR REPLACE TEMP TABLE names AS FROM asked_names")
    con.execute("CREATE TEMP TABLE ever_known AS SELECT DISTINCT uri, external_id, 0 AS n FROM ledger_videos")
    _match(con, "ever_known", "answering")
    return {name for (name,) in con.execute("SELECT DISTINCT name FROM answering").fetchall()}


def _match(con: duckdb.DuckDBPyConnection, videos: str, into: str) -> None:
    """Make the table `into` (name, n): every name with each of the videos that answer to it in the first way."""
    con.execute(f"CREATE TEMP TABLE {into} (name VARCHAR, n INTEGER)")
    con.execute(f"CREATE OR REPLACE TEMP VIEW open_names AS SELECT name FROM names ANTI JOIN {into} USING (name)")
    for way in _WAYS:
        if not _num_open(con, into):
            break
        con.execute(f"INSERT INTO {into} {way.format(videos=videos)}")


def _num_open(con: duckdb.DuckDBPyConnection, into: str) -> int:
    (count,) = con.execute(f"SELECT count(*) FROM names ANTI JOIN {into} USING (name)").fetchall()[0]
    return int(count)
