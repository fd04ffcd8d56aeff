"""A folder of tiny-world videos, with a question file that `longvlm answer` and `evaluate` read."""

import json
from collections.abc import Mapping
from pathlib import Path

from longvlm.tinyworld.questions import draw_questions
from longvlm.tinyworld.render import write_video
from longvlm.tinyworld.scenes import draw_scene

QUESTIONS_FILE = "questions.jsonl"


def video_name(seed: int, number: int) -> str:
    """The name of a video's file, without its ending."""
    return f"tiny-{seed}-{number:05}"


def read_question_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a question file of `make_world`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_world(folder: Path, seed: int, num_videos: int, per_kind: Mapping[str, int] | None = None) -> Path:
    """Write videos `0 .. num_videos` of a seed as H.264 files, and their questions; returns the question file.

    Its rows hold video (the file's stem), question_id, question, answer, kind and type (always text). The same seed
    writes the same scenes and questions wherever it runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num_videos):
        name = video_name(seed, number)
        scene = draw_scene(seed, number)
        write_video(folder / f"{name}.mp4", scene)
        for i, asked in enumerate(draw_questions(scene, seed, number, per_kind)):
            row = {"video": name, "question_id": f"{name}-{i:02}", "type": "text"}
            rows.append(row | {"question": asked.question, "answer": asked.answer, "kind": asked.kind})
    path = folder / QUESTIONS_FILE
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
