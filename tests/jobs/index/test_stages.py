import subprocess
import sys
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
from models import save_clip_tower

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


def loaded_by(code):
    """Names of the packages that a process has loaded after some code."""
    code = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {*done.stdout.split()}


def test_workers_load_what_their_stage_needs(tmp_path):
    """Each starts in a process of its own, and every import is waited for once a worker.

    What Ray's own processes load of training, to start and watch its workers, needs no torch either.
    """
    stages = loaded_by("import longvlm.jobs.index.stages, longvlm.jobs.train.entry, longvlm.jobs.train.worker_config")
    assert (
        not {"torch", "pandas", "transformers", "ray", "duckdb", "deltalake", "av", "aiobotocore", "huggingface_hub"}
        & stages
    )
    tower = str(save_clip_tower(tmp_path, text=False))
    encoder = loaded_by(
        "from longvlm.jobs.cluster.tally import Tally\n"
        "from longvlm.jobs.index.stages import Encode\n"
        "from longvlm.pipeline.vision.towers.families import describe_tower\n"
        "from longvlm.schemas.recipe import paper\n"
        f"Encode(paper(describe_tower({tower!r})).spec(), Tally(), 'cpu', 1)"
    )
    assert "torch" in encoder
    assert not {"transformers", "sympy", "ray", "duckdb", "deltalake", "av"} & encoder
