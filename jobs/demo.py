"""The whole journey in a minute: make videos, index them, ask about them, read the answers in DuckDB."""

import colorsys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table
from rich.text import Text

from jobs.answer import AnswerOrder, run_answer
from jobs.index import run_index
from jobs.orders import IndexOrder
from jobs.report import print_report, terminal
from pipeline.ingest.corpus import Source
from pipeline.language.untrained import build_untrained
from pipeline.store import catalog
from pipeline.store.ledger import Store
from pipeline.vision.untrained import DIM, build_untrained_tower
from schemas import tables

NUM_VIDEOS, FPS, WIDTH, HEIGHT = 6, 12, 160, 120
QUESTIONS = ("What is happening in the video?", "What color is the square?", "Which way does it move?")
ANSWERS_SQL = """
SELECT parse_filename(uri) AS video, question, answer, num_visual_tokens AS tokens
FROM answers ORDER BY video, question_id"""


def run_demo(folder: Path | None = None) -> Path:
    """Run the demo, printing as it goes; returns the folder that it leaves behind."""
    console = terminal()
    folder = folder or Path(tempfile.mkdtemp(prefix="longvlm-demo-"))
    videos, model, store = folder / "videos", folder / "model", folder / "store"
    console.print(f"1. Making {NUM_VIDEOS} short videos in {videos}", highlight=False)
    make_videos(videos)
    console.print("2. Building a small LongVLM with random weights: UNTRAINED, so its answers are random words")
    build_untrained_tower(model / "tower")
    build_untrained(model, tower="tower", tower_dim=DIM)
    console.print("3. Watching every video once")
    order = IndexOrder(
        Source(str(videos)), str(store), model=str(model), recipe="tiny", show_progress=console.is_terminal
    )
    report = run_index(order)
    counts = report.as_json()
    print_report(f"   run {counts.pop('run_id')}", counts, report.stages, report.wall_s)
    console.print(f"4. Asking {len(QUESTIONS)} questions about each, from the stored tokens alone")
    rows = [{"question_id": f"q{i}", "question": text, "type": "text"} for i, text in enumerate(QUESTIONS)]
    questions = pa.Table.from_pylist(rows, schema=tables.QUESTIONS)
    run_answer(
        AnswerOrder(str(store), questions, precision="float32", max_new_tokens=8, show_progress=console.is_terminal)
    )
    console.print(f"5. Reading the answers in DuckDB:{ANSWERS_SQL}\n", highlight=False)
    table = Table("video", "question", "answer (untrained model: random words)", "tokens", box=None)
    for row in catalog.query(catalog.connect(Store.open(str(store)).pin()), ANSWERS_SQL).to_pylist():
        table.add_row(*(Text(str(value)) for value in row.values()))
    console.print(table)
    console.print(
        f'\nThe store stays in {store}. Try: longvlm sql --store {store} "SELECT * FROM segments"', highlight=False
    )
    return folder


def make_videos(folder: Path) -> None:
    """Write real H.264 files of 3 to 8 seconds in which a coloured square crosses a grey scene."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(NUM_VIDEOS):
        hue = i / NUM_VIDEOS
        color = np.array([round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.9, 0.9)], dtype=np.uint8)
        num_frames = FPS * (3 + i)
        frames = (_scene(color, j / num_frames, vertical=bool(i % 2)) for j in range(num_frames))
        write_h264(folder / f"square-{i}.mp4", frames)


def _scene(color: np.ndarray, progress: float, *, vertical: bool) -> np.ndarray:
    """One frame [HEIGHT, WIDTH, 3]: the square at `progress` (0 to 1) of its way."""
    frame = np.full((HEIGHT, WIDTH, 3), 96, dtype=np.uint8)
    side = HEIGHT // 4
    x, y = (WIDTH // 2, progress * (HEIGHT - side)) if vertical else (progress * (WIDTH - side), HEIGHT // 3)
    frame[int(y) : int(y) + side, int(x) : int(x) + side] = color
    return frame


def write_h264(path: Path, frames: Any) -> None:
    """Encode RGB frames [H, W, 3] at FPS into an H.264 MP4."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
