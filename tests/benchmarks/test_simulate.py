"""The simulated world: fixed histories in which all is well, the same ones every time, and faults that it finds."""

import json

import pytest

from benchmarks.simulate.__main__ import main
from benchmarks.simulate.faults import FAULTS
from benchmarks.simulate.run import play
from benchmarks.simulate.turns import Turn, draw, shrink

# A run lists, others index a video and mean it; a driver sleeps while its files are taken.
LISTED = [
    Turn("people", "add", number=0),
    Turn("job", "index", 0),
    Turn("job", "prune", 1, points=3),
    Turn("people", "add", number=1),
    Turn("job", "index", 0),
    Turn("job", "prune", 1),
]
# A video is forgotten under its new name; while that is under way another one gets its old name, and is indexed.
FORGOTTEN = [
    Turn("people", "add", number=9),
    Turn("job", "index", 0),
    Turn("people", "rename"),
    Turn("job", "prune", 0),
    Turn("job", "forget", 1, points=30),
    Turn("people", "add", number=8),
    Turn("job", "index", 0),
]


def test_a_fault_is_found_where_its_mending_is_taken_out():
    with FAULTS["listed-before-looking"]():
        played = play(LISTED, 0)
    assert played.step == len(LISTED) - 1
    assert played.problem.endswith("was live, is in the bucket as it was, and is live no more")
    assert "prune: done" in played.told[-1]
    assert play(LISTED, 0).problem is None


def test_a_video_that_an_erasure_takes_by_its_name_is_missed():
    with FAULTS["erasing-by-name"]():
        played = play(FORGOTTEN, 0)
    assert (played.step, played.problem) == (
        None,
        "clip-09.mp4 was live, is in the bucket as it was, and is live no more",
    )


def test_a_seed_draws_one_history():
    assert draw(5, 60) == draw(5, 60) != draw(6, 60)


def test_a_history_is_shrunk_to_the_turns_that_it_needs_to_fail():
    turns = draw(5, 60)
    needed = [turns[7], turns[31], turns[58]]
    assert shrink(turns, lambda some: all(turn in some for turn in needed), tries=200) == needed


def test_every_fault_is_a_patch_that_fits():
    for fault in FAULTS.values():
        with fault():
            pass


def test_the_command_plays_a_history_to_its_end_and_says_on_its_last_line_that_all_is_well(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--seed", "3", "--seeds", "1", "--steps", "20", "--jobs", "1"])
    printed = capsys.readouterr().out
    assert end.value.code == 0, printed
    said = json.loads(printed.splitlines()[-1])
    assert (said["histories"], said["steps"], said["failed"]) == (1, 20, [])
    assert said["jobs"] > 6
