"""The whole journey in a minute: videos of the tiny world, indexed, asked about, and the answers beside the truth."""

import random
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.table import Table
from rich.text import Text

from longvlm import tinyworld
from longvlm.jobs.answer.run import AnswerOrder, run_answer
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.jobs.terminal import print_report, terminal
from longvlm.pipeline.judging.agreement import is_right
from longvlm.pipeline.source.corpus import Source
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import tables
from longvlm.tinyworld.typed import TYPED_KINDS
from longvlm.tinyworld.world import make_world, question_rows

NUM_VIDEOS, QUESTIONS_PER_VIDEO = 6, 4  # half of them as text, half typed
HELD_OUT_SEEDS = range(1_000, 1_000_000)  # training draws from seeds below these
ANSWERS_SQL = """
SELECT parse_filename(uri) AS video, question_id, question, type, answer, value
FROM answers ORDER BY video, question_id"""
TRY_SQL = (
    "SELECT question, answer, list_transform(evidence, lambda e: e.start_s) AS seconds FROM answers LIMIT 5",
    "SELECT uri, num_segments, duration_s, decode_ms + encode_ms AS cpu_ms FROM videos",
    "SELECT answer, count(*) AS times FROM answers GROUP BY answer ORDER BY times DESC LIMIT 5",
)


def run_demo(folder: Path | None = None, seed: int | None = None) -> float:
    """Run the demo, printing as it goes; returns the share of right answers.

    Args:
        folder: where videos and store are left; None makes a temporary one.
        seed: of the videos, and of which questions are asked about them; None draws one.
    """
    console = terminal()
    folder = folder or Path(tempfile.mkdtemp(prefix="longvlm-demo-"))
    seed = random.SystemRandom().choice(HELD_OUT_SEEDS) if seed is None else seed
    store = folder / "store"
    console.print(
        f"1. Making {NUM_VIDEOS} videos of the tiny world, seed {seed}, in {folder / 'videos'}",
        markup=False,
        highlight=False,
    )
    make_world(folder / "videos", seed, NUM_VIDEOS)
    asked = _draw(seed, NUM_VIDEOS)
    console.print("2. Watching every video once, with the small LongVLM that was trained on this world alone")
    order = IndexOrder(
        Source(str(folder / "videos")), str(store), model=tinyworld.MODEL, recipe=tinyworld.RECIPE,
        show_progress=console.is_terminal,
    )  # fmt: skip
    report = run_index(order)
    counts = report.as_json()
    print_report(f"   run {counts.pop('run_id')}", counts, report.stages, report.wall_s)
    console.print(f"3. Asking {len(asked)} questions, drawn at random, from the stored tokens alone")
    questions = pa.Table.from_pylist(asked, schema=tables.QUESTIONS)
    run_answer(
        AnswerOrder(str(store), questions, precision="float32", max_new_tokens=40, show_progress=console.is_terminal)
    )
    console.print(f"4. Reading the answers in DuckDB, beside the truth:{ANSWERS_SQL}\n", highlight=False)
    by_id = {row["question_id"]: row for row in asked}
    answers = catalog.query(catalog.connect(Store.open(str(store)).pin()), ANSWERS_SQL).to_pylist()
    table = Table("video", "question", "type", "answer", "value", "truth", "", box=None)
    num_right = 0
    for row in answers:
        question = by_id[row.pop("question_id")]
        right = is_right(question, row["answer"] or "", question["answer"])
        num_right += right
        cells = (*row.values(), question["answer"], "right" if right else "wrong")
        table.add_row(*(Text(str(cell or "")) for cell in cells))
    console.print(table)
    console.print(f"\n{num_right} of {len(asked)} answers are right.", highlight=False)
    console.print(f"\nThe store stays in {store}. Try:", markup=False, highlight=False, soft_wrap=True)
    for sql in TRY_SQL:
        line = f'  {_command()} sql --store {shlex.quote(str(store))} "{sql}"'
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print("\nLook at it in the browser:", highlight=False)
    line = f"  {_command()} serve --store {shlex.quote(str(store))}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    return num_right / len(asked)


def _command() -> str:
    """The command of this installation, as a shell finds it: by its path where the environment is not active."""
    called = Path(sys.argv[0])
    by_path = called.name == "longvlm" and shutil.which("longvlm") is None
    return shlex.quote(str(called)) if by_path else "longvlm"


def _draw(seed: int, num_videos: int) -> list[dict[str, Any]]:
    """A few questions a video, each of another kind, every other one typed; which ones is left to chance."""
    draw = random.Random(seed)  # noqa: S311 - a lot, not a secret
    as_text, *typed = (question_rows(seed, num_videos, answer) for answer in ("text", *TYPED_KINDS))
    pools = (as_text, [row for rows in typed for row in rows])
    asked = []
    for video in dict.fromkeys(row["video"] for row in as_text):
        kinds: set[str] = set()
        for place in range(QUESTIONS_PER_VIDEO):
            open_rows = [row for row in pools[place % 2] if row["video"] == video and row["kind"] not in kinds]
            asked.append(draw.choice(open_rows))
            kinds.add(asked[-1]["kind"])
    return asked
