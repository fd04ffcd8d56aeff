"""Precision of evidence: does it point to the right seconds? Counted on tiny-world questions that rest on one event.

    python -m benchmarks.evidence [--videos 100] [--seed 2]

Each such question is asked through the jobs, from files to the table `answers`. Evidence hits if its strongest span
begins within the event. It stands beside chance (a segment drawn at random) and beside search (the segment whose
embedding is nearest to the question's text, as `longvlm search` would find it). A right answer with evidence elsewhere
is possible: attention is what the model looked at, not what it needed.

Beside it: how long the strongest span is and which share of its seconds lies in the event, against the same of the
whole segment that it lies in. Events begin and end with the segments of two seconds that the model was trained on, so
that there a part of a segment is as right as all of it. So the videos are indexed once more with segments of six
seconds, which events begin and end within; frames and tokens a second are the same.
"""

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch

from benchmarks.focus import ask, index_world
from longvlm import tinyworld
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.vision.text_encoder import load_text_encoder
from longvlm.tinyworld.make import TEST_SEED
from longvlm.tinyworld.questions import draw_questions
from longvlm.tinyworld.scenes import SEGMENT_S, Event, draw_scene
from longvlm.tinyworld.world import question_rows, video_name

LONG_RECIPE = """
base = "tiny"
segment_s = 6.0
frames_per_segment = 12
tokens_per_segment = 24
"""
ANSWERS_SQL = """
SELECT a.question_id, a.question, a.answer, a.evidence, s.starts_s, s.ends_s, s.embeddings
FROM answers a JOIN (
    SELECT write_id, list(start_s ORDER BY segment) AS starts_s, list(end_s ORDER BY segment) AS ends_s,
        list(embedding ORDER BY segment) AS embeddings
    FROM segments GROUP BY write_id
) s USING (write_id) WHERE a.status = 'answered'"""


def overlaps(start_s: float, event: Event) -> bool:
    """Whether a segment that begins then is one of an event's."""
    return bool(event.start * SEGMENT_S <= start_s < event.end * SEGMENT_S)


def share_inside(start_s: float, end_s: float, event: Event) -> float:
    """Which share of some seconds lies within an event."""
    inside_s = min(end_s, event.end * SEGMENT_S) - max(start_s, event.start * SEGMENT_S)
    return max(inside_s, 0.0) / (end_s - start_s)


def count(rows: list[dict[str, Any]], seed: int, num_videos: int) -> list[dict[str, Any]]:
    """A row a question that rests on one event: its kind, and whether evidence, search and chance hit."""
    asked = {
        f"{video_name(seed, number)}-{i:02}": one
        for number in range(num_videos)
        for i, one in enumerate(draw_questions(draw_scene(seed, number), seed, number))
    }
    texts = load_text_encoder(f"{tinyworld.MODEL}/tower")
    hits = []
    for row in rows:
        one = asked[row["question_id"]]
        if one.event is None or not row["evidence"]:
            continue
        told = row["evidence"][0]
        segment = max(i for i, start_s in enumerate(row["starts_s"]) if start_s <= told["start_s"])
        start_s, end_s = row["starts_s"][segment], row["ends_s"][segment]
        nearness = torch.tensor(row["embeddings"]) @ texts.encode([row["question"]])[0]
        hits.append(
            {
                "kind": one.kind,
                "is_right": row["answer"] == one.answer,
                "evidence": overlaps(told["start_s"], one.event),
                "search": overlaps(row["starts_s"][int(nearness.argmax())], one.event),
                "chance": mean(overlaps(start_s, one.event) for start_s in row["starts_s"]),
                "told_s": told["end_s"] - told["start_s"],
                "told_inside": share_inside(told["start_s"], told["end_s"], one.event),
                "segment_s": end_s - start_s,
                "segment_inside": share_inside(start_s, end_s, one.event),
                "is_finer": told["end_s"] - told["start_s"] < end_s - start_s,
            }
        )
    return hits


def summarise(hits: list[dict[str, Any]]) -> dict[str, float]:
    """Means over questions, and of those whose evidence is finer than a segment."""
    finer = [hit for hit in hits if hit["is_finer"]]
    compared = ("told_s", "told_inside", "segment_s", "segment_inside")
    told = {name: mean(hit[name] for hit in hits) for name in ("evidence", "search", "chance", "is_right", *compared)}
    told |= {f"finer_{name}": mean(hit[name] for hit in finer) for name in compared if finer}
    return {name: round(value, 4) for name, value in told.items()} | {"finer": len(finer)}


def run(store: Path, seed: int, videos: int) -> dict[str, Any]:
    """Ask about the videos of a store, then count."""
    ask(store, question_rows(seed, videos), None, None)
    with catalog.connect(Store.open(str(store)).pin()) as con:
        rows = catalog.query(con, ANSWERS_SQL).to_pylist()
    hits = count(rows, seed, videos)
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for hit in hits:
        by_kind[hit["kind"]].append(hit)
    for kind, some in sorted(by_kind.items()):
        print(f"{kind:8}", len(some), summarise(some))
    right = [hit for hit in hits if hit["is_right"]]
    return {"all": summarise(hits), "where_right": summarise(right) if right else None, "questions": len(hits)}


@click.command()
@click.option("--videos", default=100)
@click.option("--seed", default=TEST_SEED)
def main(videos: int, seed: int) -> None:
    """Index with either recipe, ask, count."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "long.toml").write_text(LONG_RECIPE)
        as_trained = run(index_world(work, seed, videos), seed, videos)
        longer = run(index_world(work, seed, videos, str(work / "long.toml")), seed, videos)
    print(json.dumps({"benchmark": "evidence", "seed": seed, "videos": videos, **as_trained, "six_seconds": longer}))


if __name__ == "__main__":
    main()
