"""Precision of evidence: does it point to the right seconds? Counted on tiny-world questions that rest on one event.

    python -m benchmarks.evidence [--videos 100] [--seed 2]

Each such question is asked through the jobs, from files to the table `answers`. Evidence hits if its strongest span
lies within the event. It stands beside chance (a segment drawn at random) and beside search (the segment whose
embedding is nearest to the question's text, as `longvlm search` would find it). A right answer with evidence elsewhere
is possible: attention is what the model looked at, not what it needed.
"""

import json
import tempfile
from collections import defaultdict
from statistics import mean
from typing import Any

import click
import torch

from longvlm import tinyworld
from longvlm.jobs.evaluate.run import EvaluateOrder
from longvlm.jobs.evaluate.tinyworld import TinyWorldSpec, run_tinyworld
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.vision.text_encoder import load_text_encoder
from longvlm.tinyworld.make import TEST_SEED
from longvlm.tinyworld.questions import draw_questions
from longvlm.tinyworld.scenes import SEGMENT_S, Event, draw_scene
from longvlm.tinyworld.world import video_name

ANSWERS_SQL = """
SELECT a.question_id, a.question, a.answer, a.evidence, s.starts_s, s.embeddings
FROM answers a JOIN (
    SELECT write_id, list(start_s ORDER BY segment) AS starts_s, list(embedding ORDER BY segment) AS embeddings
    FROM segments GROUP BY write_id
) s USING (write_id) WHERE a.status = 'answered'"""


def overlaps(start_s: float, event: Event) -> bool:
    """Whether a segment that begins then is one of an event's."""
    return bool(event.start * SEGMENT_S <= start_s < event.end * SEGMENT_S)


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
        nearness = torch.tensor(row["embeddings"]) @ texts.encode([row["question"]])[0]
        hits.append(
            {
                "kind": one.kind,
                "is_right": row["answer"] == one.answer,
                "evidence": overlaps(row["evidence"][0]["start_s"], one.event),
                "search": overlaps(row["starts_s"][int(nearness.argmax())], one.event),
                "chance": mean(overlaps(start_s, one.event) for start_s in row["starts_s"]),
            }
        )
    return hits


def summarise(hits: list[dict[str, Any]]) -> dict[str, float]:
    """Shares that hit."""
    return {name: round(mean(hit[name] for hit in hits), 4) for name in ("evidence", "search", "chance", "is_right")}


@click.command()
@click.option("--videos", default=100)
@click.option("--seed", default=TEST_SEED)
def main(videos: int, seed: int) -> None:
    """Ask, then count."""
    with tempfile.TemporaryDirectory() as folder:
        run_tinyworld(EvaluateOrder(f"{folder}/store", max_new_tokens=40), TinyWorldSpec(seed, videos))
        with catalog.connect(Store.open(f"{folder}/store").pin()) as con:
            rows = catalog.query(con, ANSWERS_SQL).to_pylist()
    hits = count(rows, seed, videos)
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for hit in hits:
        by_kind[hit["kind"]].append(hit)
    for kind, some in sorted(by_kind.items()):
        print(f"{kind:8}", len(some), summarise(some))
    right = [hit for hit in hits if hit["is_right"]]
    told = {"all": summarise(hits), "where_right": summarise(right) if right else None, "questions": len(hits)}
    print(json.dumps({"benchmark": "evidence", "seed": seed, "videos": videos, **told}))


if __name__ == "__main__":
    main()
