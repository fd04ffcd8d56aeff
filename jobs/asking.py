"""Which question goes to which video: the plan of an answer run, made in DuckDB."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import duckdb

from pipeline.language.questions import Question
from pipeline.store import catalog
from schemas.errors import InputError
from schemas.recipe import AnswerRecipe


@dataclass
class Asking:
    """What a run has to ask, and what was answered before."""

    groups: list[dict[str, Any]]  # a video each: video_id, uri, write_id and its questions
    reused: list[dict[str, Any]] = field(default_factory=list)  # rows of tables.ANSWERS
    asked: int = 0
    videos_without_recipe: int = 0


def plan(con: duckdb.DuckDBPyConnection, questions: list[Question], where: str | None, recipe: AnswerRecipe) -> Asking:
    """Join questions to the selected live videos, less what the same answer recipe has answered already.

    Raises:
        InputError: the predicate is not SQL over `videos`, selects nothing, or a question names a video not in it.
    """
    wanted = f"SELECT video_id, uri, external_id FROM videos WHERE status = 'indexed' AND ({where or 'true'})"
    selected: list[dict[str, Any]] = catalog.query(con, wanted).to_pylist()
    live = "SELECT video_id, write_id FROM live_videos WHERE recipe = ?"
    write_ids = dict(con.execute(live, [recipe.index_recipe]).fetchall())
    videos = [
        video | {"write_id": write_ids[video["video_id"]]} for video in selected if video["video_id"] in write_ids
    ]
    if not videos:
        raise InputError("no indexed video is selected; see `longvlm status`, or widen --where.")
    answers = f"SELECT * FROM answers WHERE answer_recipe = '{recipe.fingerprint}' AND status = 'answered'"
    rows = catalog.query(con, answers).to_pylist()
    answered = {(row["write_id"], row["question_id"], row["question_hash"]): row for row in rows}

    asking = Asking([], videos_without_recipe=len(selected) - len(videos))
    groups: dict[str, dict[str, Any]] = {}
    for question, video in pairs(questions, videos):
        asking.asked += 1
        if row := answered.get((video["write_id"], question.question_id, question.hash)):
            asking.reused.append(row)
            continue
        group = {"video_id": video["video_id"], "uri": video["uri"], "write_id": video["write_id"], "questions": []}
        groups.setdefault(video["write_id"], group)["questions"].append(
            {
                "question_id": question.question_id,
                "question": question.question,
                "question_hash": question.hash,
                "type": question.type or "text",
            }
        )
    asking.groups = list(groups.values())
    return asking


def pairs(questions: list[Question], videos: list[dict[str, Any]]) -> Iterator[tuple[Question, dict[str, Any]]]:
    """Every question with its video, or with all videos if it names none.

    A question names a video by its uri, external_id, path below the bucket, or file name without extension.

    Raises:
        InputError: no video, or more than one, answers to a name.
    """
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for video in videos:
        path = PurePosixPath(video["uri"].split("://")[-1])
        for name in {video["uri"], video["external_id"], path.name, path.stem} - {None}:
            by_name[name].append(video)
    for question in questions:
        if question.video is None:
            for video in videos:
                yield question, video
            continue
        found = by_name[question.video] or [v for v in videos if v["uri"].endswith("/" + question.video.lstrip("/"))]
        if len(found) != 1:
            problem = "names no indexed video" if not found else f"could mean {len(found)} videos"
            raise InputError(
                f"the question {question.question_id!r} is about {question.video!r}, which {problem}; "
                "name the video by its full uri (`longvlm sql` shows them in the view videos)."
            )
        yield question, found[0]
