"""A folder of tiny-world videos, with a question file that `longvlm answer` and `evaluate` read."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from longvlm.tinyworld.questions import draw_questions
from longvlm.tinyworld.render import write_video
from longvlm.tinyworld.scenes import draw_scene
from longvlm.tinyworld.typed import TypedSceneQuestion, draw_typed

QUESTIONS_FILE = "questions.jsonl"


def video_name(seed: int, number: int) -> str:
    """The name of a video's file, without its ending."""
    return f"tiny-{seed}-{number:05}"


def question_rows(
    seed: int, num_videos: int, kind_of_answer: str = "text", per_kind: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """The questions about videos `0 .. num_videos` of a seed, as rows of a question file.

    They hold video (the file's stem), question_id, question, answer, kind and type, and choices where there are any.

    Args:
        seed: of the videos.
        num_videos: how many there are.
        kind_of_answer: the type of all of them: text, bool, choice or number.
        per_kind: how many as text are drawn of each kind, where that is not one.
    """
    rows = []
    for number in range(num_videos):
        name, scene = video_name(seed, number), draw_scene(seed, number)
        if kind_of_answer == "text":
            drawn = draw_questions(scene, seed, number, per_kind)
            asked, prefix = [TypedSceneQuestion(one.kind, "text", one.question, one.answer) for one in drawn], name
        else:
            asked = [one for one in draw_typed(scene, seed, number) if one.type == kind_of_answer]
            prefix = f"{name}-{kind_of_answer}"
        for i, one in enumerate(asked):
            known = {field: value for field, value in one.as_row().items() if value is not None}
            about = {"video": name, "question_id": f"{prefix}-{i:02}", "answer": one.answer, "kind": one.kind}
            rows.append(about | known)
    return rows


def make_world(folder: Path, seed: int, num_videos: int) -> Path:
    """Write videos `0 .. num_videos` of a seed as H.264 files, and their questions as text; returns the question file.

    The same seed writes the same scenes and questions wherever it runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_videos):
        write_video(folder / f"{video_name(seed, number)}.mp4", draw_scene(seed, number))
    path = folder / QUESTIONS_FILE
    write_rows(path, question_rows(seed, num_videos))
    return path


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file, whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft.rename(path)
