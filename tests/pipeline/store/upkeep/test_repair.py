from pathlib import Path

import stores

from longvlm.pipeline.store.upkeep.repair import repair
from longvlm.pipeline.store.upkeep.verify import verify


def live(store):
    return {Path(row["uri"]).stem for row in stores.rows(store, "SELECT uri FROM live_videos")}


def test_videos_that_lost_tokens_are_deleted_and_the_store_is_whole_again(store):
    stores.index(store, ["well"])
    before = {file.uri for file in store.pin().table("tokens").files}
    stores.index(store, ["ill", "poorly"], seed=1)
    (damaged,) = (file.uri for file in store.pin().table("tokens").files if file.uri not in before)
    content = Path(damaged).read_bytes()
    Path(damaged).write_bytes(content[:-20] + bytes(20))  # not even a footer
    snapshot = store.pin()
    found = verify(snapshot)
    assert list(found.damaged_files) == [damaged]
    assert repair(store, snapshot, found, "run") == 2
    assert live(store) == {"well"}
    again = verify(store.pin())
    assert (again.damaged_files, again.problems, again.num_videos) == ({}, [], 1)
    stores.index(store, ["ill"], seed=2)
    assert live(store) == {"well", "ill"}
