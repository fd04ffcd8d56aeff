"""A video whose pictures stay is answered about in the same way, whether its file repeats them or holds them once."""

from fractions import Fraction

import av
import pyarrow as pa

from longvlm import tinyworld
from longvlm.jobs.answer.run import AnswerOrder, run_answer
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.pipeline.source.corpus import Source
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import tables
from longvlm.tinyworld.questions import draw_questions
from longvlm.tinyworld.render import FPS, draw_frame
from longvlm.tinyworld.scenes import SEGMENT_S, draw_scene

HELD = 3 * FPS // 2  # frames: a picture stays for 1.5 s
SEED, NUM_VIDEOS, QUESTIONS = 4711, 2, 8


def write_held(path, scene, *, repeated):
    """A video whose first half changes its picture every 1.5 s, without loss, so that what is repeated is the same."""
    per_segment = SEGMENT_S * FPS
    num_frames = scene.num_segments * per_segment
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"qp": "0", "preset": "ultrafast"})
        stream.pix_fmt, stream.width, stream.height = "yuv420p", 112, 112
        for number in range(num_frames):
            shown = number if number >= num_frames // 2 else number - number % HELD
            if shown == number or repeated:
                frame = av.VideoFrame.from_ndarray(draw_frame(scene, (shown + 0.5) / per_segment), format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def answers_about(folder, *, repeated):
    """(video, question): answer, of a few scenes."""
    videos, store, asked = folder / "videos", folder / "store", []
    videos.mkdir(parents=True)
    for number in range(NUM_VIDEOS):
        scene = draw_scene(SEED, number)
        write_held(videos / f"{number}.mp4", scene, repeated=repeated)
        for place, one in enumerate(draw_questions(scene, SEED, number)[:QUESTIONS]):
            asked.append({"question_id": f"{number}-{place}", "question": one.question, "video": f"{number}.mp4"})
            asked[-1]["type"] = "text"
    run_index(IndexOrder(Source(str(videos)), str(store), model=tinyworld.MODEL, recipe=tinyworld.RECIPE))
    run_answer(
        AnswerOrder(
            str(store), pa.Table.from_pylist(asked, schema=tables.QUESTIONS), precision="float32", max_new_tokens=40
        )
    )
    with catalog.connect(Store.open(str(store)).pin()) as con:
        found = catalog.query(con, "SELECT question_id, answer FROM answers WHERE status = 'answered'").to_pylist()
        ((frames, seconds),) = con.execute("SELECT sum(num_frames), sum(duration_s) FROM videos").fetchall()
    return {row["question_id"]: row["answer"] for row in found}, frames, seconds


def test_pictures_that_stay_get_the_same_answers_repeated_or_not(tmp_path):
    constant, num_frames, length_s = answers_about(tmp_path / "constant", repeated=True)
    variable, num_distinct, same_s = answers_about(tmp_path / "variable", repeated=False)
    assert num_distinct < 0.65 * num_frames
    assert same_s == length_s
    assert len(constant) == NUM_VIDEOS * QUESTIONS
    assert constant == variable
