import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from clips import write_clip
from longvlm.jobs.cluster.tally import Tally
from longvlm.jobs.index.stages import Watch
from longvlm.pipeline.source.corpus import Source, list_source
from longvlm.schemas import tables
from longvlm.schemas.recipe import paper
from longvlm.schemas.tower import TowerSpec

TOWER = TowerSpec("tower", "w", 4, (4, 4), 64, 56, has_cls=True, search_dim=None)


def test_the_next_video_is_fetched_while_one_is_decoded(tmp_path, s3):
    """Two threads call the operator; the one that waits for its turn has its copy already."""
    for name in "ab":
        s3.upload_file(str(write_clip(tmp_path / f"{name}.mp4", 50)), "bucket", f"{name}.mp4")
    plan = [{**row, "write_id": row["uri"], "attempts": 1} for row in list_source(Source("s3://bucket")).to_pylist()]
    tally = Tally()
    watch = Watch(paper(TOWER).spec(), tally)
    scratch = Path(watch.scratch.name)
    first = watch(pa.Table.from_pylist(plan[:1], schema=tables.PLAN))
    decoded = [next(first)]  # its thread has the turn
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(lambda: list(watch(pa.Table.from_pylist(plan[1:], schema=tables.PLAN))))
        for _ in range(3000):
            if tally.report()["fetch"]["done"] == 2:
                break
            time.sleep(0.01)
        assert len(list(scratch.iterdir())) == 2
        assert not second.done()
        decoded += first
        decoded += second.result()
    assert [unit["write_id"][0].as_py() for unit in decoded] == [row["uri"] for row in plan]
    assert sum(unit["read_bytes"][0].as_py() for unit in decoded) == sum(row["size_bytes"] for row in plan)
    assert list(scratch.iterdir()) == []
    assert tally.report()["decode"]["done"] == 2
    watch.close()
