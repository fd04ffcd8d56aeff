"""What pages say of videos: a page of the library, one video, its segments and answers, looked up in a pinned store."""

import base64
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from longvlm.jobs.serve.own_sql import rows_of_own
from longvlm.jobs.serve.pinned import PinnedStore, Row
from longvlm.pipeline.store.shards import read_segments
from longvlm.schemas.errors import InputError

PAGE_VIDEOS = 60
MAX_ANSWERS = 500  # of one video
MAX_MODELS = 4  # beside each other

_COLUMNS = (
    "write_id, video_id, uri, external_id, status, duration_s, num_segments, codec, width, height, recipe, outdated, "
    "error_code, error"
)


@dataclass(frozen=True)
class LibraryOrder:
    """Which videos of the library to show."""

    words: str = ""  # each stands in the address or external id
    where: str = ""  # a predicate over the view `videos`
    status: str = ""
    error_code: str = ""
    after: str = ""  # the place where the page before ended


@dataclass(frozen=True)
class LibraryPage:
    """Some videos in the order of their addresses."""

    videos: list[Row]
    number: int  # that the order is for, on all pages
    after: str | None  # where the next page begins


def library_page(pinned: PinnedStore, order: LibraryOrder) -> LibraryPage:
    """A page of the library. Its time does not depend on how many pages come before it.

    Raises:
        InputError: the predicate cannot run, or `after` is no place.
    """
    source = f"(SELECT *, 'failed' AS status, false AS outdated FROM ({_FAILED}))" if order.error_code else "videos"
    conditions = ["true"]
    values: dict[str, Any] = {}
    for name in ("status", "error_code"):
        if asked := getattr(order, name):
            conditions.append(f"{name} = ${name}")
            values[name] = asked
    for place, word in enumerate(order.words.split()[:16]):
        conditions.append(f"contains(lower(concat_ws(' ', uri, external_id)), lower($word{place}))")
        values[f"word{place}"] = word
    if order.where.strip():
        conditions.append(f"(\n{order.where}\n)")
    beyond = ""
    if order.after:
        beyond = "WHERE (uri, video_id) > ($after_uri, $after_id)"
        values |= _place(order.after)
    is_own = bool(order.where.strip())
    page = f"""
        WITH chosen AS {"" if is_own else "NOT"} MATERIALIZED (
            SELECT {_COLUMNS} FROM {source} AS videos WHERE {" AND ".join(conditions)}
        )
        SELECT *, (SELECT count(*) FROM chosen) AS number
        FROM chosen {beyond} ORDER BY uri, video_id LIMIT {PAGE_VIDEOS + 1}
    """
    found = rows_of_own(pinned, page, values) if is_own else pinned.rows(page, values)
    shown = found[:PAGE_VIDEOS]
    number = found[0]["number"] if found else 0
    return LibraryPage(shown, number, _spell_place(shown[-1]) if len(found) > PAGE_VIDEOS else None)


# All whose last indexing failed, as the reasons count them; of some an older version is live.
_FAILED = """
SELECT * EXCLUDE (is_live, status) FROM failed_videos WHERE recipe = (FROM active_recipe)
"""


def _spell_place(video: Row) -> str:
    return base64.urlsafe_b64encode(json.dumps([video["uri"], video["video_id"]]).encode()).decode()


def _place(after: str) -> dict[str, str]:
    try:
        uri, video_id = json.loads(base64.urlsafe_b64decode(after.encode()))
        if isinstance(uri, str) and isinstance(video_id, str):
            return {"after_uri": uri, "after_id": video_id}
    except ValueError:
        pass
    raise InputError("the address of this page is damaged; begin at the first one.")


def find_video(pinned: PinnedStore, write_id: str) -> Row | None:
    """The live video of a write, under any recipe, with all columns of the view live_videos and the recipe's name."""
    found = pinned.rows(
        "SELECT v.*, r.name AS recipe_name, r.active AS is_shown FROM live_videos v LEFT JOIN recipes r USING (recipe) "
        "WHERE write_id = $write_id",
        {"write_id": write_id},
        1,
    )
    return found[0] if found else None


def find_videos(pinned: PinnedStore, write_ids: Sequence[str]) -> list[Row]:
    """Live videos by their writes, in that order: write_id, video_id, uri, external_id, recipe."""
    rows = pinned.rows(
        "SELECT write_id, video_id, uri, external_id, recipe FROM live_videos "
        "WHERE write_id IN (SELECT unnest($write_ids))",
        {"write_ids": list(write_ids)},
    )
    found = {row["write_id"]: row for row in rows}
    return [found[write_id] for write_id in write_ids if write_id in found]


def segments_of(pinned: PinnedStore, write_id: str) -> list[Row]:
    """The segments of a write in time order: segment, start_s, end_s and, where one is stored, thumbnail."""
    read = read_segments(pinned.snapshot, [write_id], ["thumbnail"])
    rows = read.select(["segment", "start_s", "end_s", "thumbnail"]).to_pylist()
    return sorted(rows, key=lambda row: row["segment"])


@dataclass(frozen=True)
class AskedOfVideo:
    """A question to one video, with its answers, by model."""

    question: str
    question_hash: str
    answers: dict[str, Row]  # of each model that answered


@dataclass(frozen=True)
class VideoAnswers:
    """All answers of one video, models side by side."""

    models: list[str]
    questions: list[AskedOfVideo]
    num_left_out: int = 0  # of answers

    @property
    def answers(self) -> list[Row]:
        """Each, in the order in which they are shown; `place` counts them."""
        return [answer for asked in self.questions for answer in asked.answers.values()]


def answers_of(pinned: PinnedStore, write_id: str, first: str = "", unkept: Row | None = None) -> VideoAnswers:
    """The newest answers of a write to each question, of each model and setting.

    Args:
        pinned: the store as it is shown.
        write_id: of which video.
        first: hash of the question that comes first.
        unkept: an answer that was given just now and is in no table; it comes before all.
    """
    rows = pinned.rows(
        "SELECT write_id, question_id, question, question_hash, type, answer, value, confidence, status, error, model, "
        "answer_recipe, num_visual_tokens, evidence, created_at FROM answers WHERE write_id = $write_id "
        "ORDER BY question_hash <> $first, question, question_hash, model, answer_recipe",
        {"write_id": write_id, "first": first if unkept is None else unkept["question_hash"]},
        MAX_ANSWERS + 1,
    )
    number, rows = len(rows), rows[:MAX_ANSWERS]
    if unkept is not None:
        older = [row for row in rows if any(row[name] != unkept[name] for name in ("question_hash", "answer_recipe"))]
        number, rows = number + 1 - len(rows) + len(older), [unkept, *older]
    names = _model_names(rows)
    questions = []
    place = 0
    for (question, question_hash), some in groupby(rows, lambda row: (row["question"], row["question_hash"])):
        answers = {}
        for row in some:
            name = names[row["model"] or "", row["answer_recipe"] or ""]
            if name is not None:
                known = {"place": place, "evidence": row["evidence"] or [], "is_kept": row is not unkept}
                answers[name] = row | known
                place += 1
        questions.append(AskedOfVideo(question or "", question_hash, answers))
    models = list(dict.fromkeys(name for name in names.values() if name is not None))
    return VideoAnswers(models, [asked for asked in questions if asked.answers], number - place)


def _model_names(rows: Sequence[Row]) -> dict[tuple[str, str], str | None]:
    """What each model and setting is called: by the model alone, unless it answered a question under two settings.

    None beyond MAX_MODELS.
    """
    settings = sorted({(row["model"] or "", row["answer_recipe"] or "") for row in rows})
    asked = Counter((short_model(row["model"]), row["question"], row["question_hash"]) for row in rows)
    ambiguous = {model for (model, _, _), number in asked.items() if number > 1}
    names: dict[tuple[str, str], str | None] = {}
    for model, recipe in settings:
        short = short_model(model)
        names[model, recipe] = f"{short} ({recipe[:6]})" if short in ambiguous else short
    beside = list(dict.fromkeys(names.values()))[:MAX_MODELS]
    return {setting: name if name in beside else None for setting, name in names.items()}


def short_model(model: str | None) -> str:
    """A model by the last two parts of its name: a hub id whole, and the end of a path."""
    return "/".join((model or "unknown").rstrip("/").split("/")[-2:])
