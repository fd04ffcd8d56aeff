"""SQL as text: names and values in quotes, and the view answers_wide, whose columns are data (others: views.sql)."""

from collections.abc import Sequence

_UNIT_SEPARATOR = "\x1f"
_KIND = "CASE WHEN type IN ('bool', 'choice', 'number', 'json') THEN type ELSE 'text' END"

# The ids of questions and their kinds, so many at most, in the order in which they were first asked. They come from all
# answers, not from the live ones: a column must not vanish while its videos are indexed anew.
ASKED = f"""
    SELECT question_id, kind FROM (
        SELECT question_id, arg_max({_KIND}, (coalesce(seq, 0), created_at)) AS kind, min(created_at) AS first_asked,
            count(*) AS num_answers
        FROM ledger_answers WHERE question_id IS NOT NULL GROUP BY question_id
        ORDER BY num_answers DESC, first_asked, question_id LIMIT ?
    )
    ORDER BY first_asked, question_id
"""
_WIDE_FIXED = ("video_id", "uri", "external_id", "write_id")
# A video that is live under several recipes is shown as the other views show it, or else as it was indexed last.
_WIDE_VIDEOS = """
    SELECT video_id, uri, external_id, write_id FROM live_videos
    QUALIFY row_number() OVER (
        PARTITION BY video_id ORDER BY (recipe IS NOT DISTINCT FROM (FROM active_recipe)) DESC, seq DESC, write_id DESC
    ) = 1
"""
# Values by type and question id, so that those from before a question changed its type are left out.
_WIDE_CELLS = f"""
    SELECT video_id, {_KIND} || chr(31) || question_id AS slot,
        CASE WHEN {_KIND} = 'text' THEN answer ELSE value END AS value,
        (coalesce(seq, 0), created_at, run_id) AS newness
    FROM answers WHERE status = 'answered'
"""
_WIDE_CASTS = {
    "bool": "TRY_CAST({} AS BOOLEAN)",
    "number": "TRY_CAST({} AS DOUBLE)",
    "json": "TRY_CAST({} AS JSON)",
    "choice": "{}",
    "text": "{}",
}


def quoted(text: str) -> str:
    """A string literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A name as SQL takes it, whatever characters it has."""
    return '"' + name.replace('"', '""') + '"'


def answers_wide(asked: Sequence[tuple[str, str]]) -> str:
    """The SELECT of the view answers_wide: one row a live video, one typed column a question id.

    Args:
        asked: what `ASKED` finds: an id and its kind each.
    """
    if not asked:
        return _WIDE_VIDEOS
    names = column_names([question_id for question_id, _ in asked])
    slots = [f"{quoted(kind + _UNIT_SEPARATOR + question_id)} AS c{i}" for i, (question_id, kind) in enumerate(asked)]
    columns = [
        f"{_WIDE_CASTS[kind].format(f'c{i}')} AS {identifier(name)}"
        for i, (name, (_, kind)) in enumerate(zip(names, asked, strict=True))
    ]
    return f"""
        SELECT v.*, {", ".join(columns)}
        FROM ({_WIDE_VIDEOS}) v
        LEFT JOIN (
            FROM ({_WIDE_CELLS})
            PIVOT (arg_max(value, newness) FOR slot IN ({", ".join(slots)}) GROUP BY video_id)
        ) USING (video_id)
    """


def column_names(question_ids: Sequence[str]) -> list[str]:
    """A column name for each question id: itself, with a number behind it where that is taken.

    Taken are the fixed columns of answers_wide and the names given before; case makes no difference to SQL.
    """
    taken = set(_WIDE_FIXED)
    names = []
    for question_id in question_ids:
        plain = name = question_id.replace("\0", "") or "question"  # no name is empty or goes on behind a NUL
        number = 1
        while name.casefold() in taken:
            number += 1
            name = f"{plain}_{number}"
        taken.add(name.casefold())
        names.append(name)
    return names
