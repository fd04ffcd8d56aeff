import pyarrow as pa
import pytest

from longvlm.jobs.cluster.resources import PART_DECODE_S
from longvlm.jobs.index.accounting import Account, Counts
from longvlm.schemas import tables
from longvlm.schemas.tables import ALL_UNITS

FACTS = {"duration_s": 30.0, "fps": 25.0, "width": 64, "height": 48, "num_frames": 750, "codec": "h264"}


def account_of(num_videos):
    account = Account("recipe", "run")
    work = [{"video_id": f"v{i}", "uri": f"/v{i}.mp4", "attempts": None} for i in range(num_videos)]
    return account, account.plan(work).to_pylist()


def outcome(video, unit, num_units, error_code=None):
    row = {"video_id": video["video_id"], "write_id": video["write_id"], "unit": unit, "num_units": num_units}
    row |= {"num_segments": 3, "error_code": error_code, "error": error_code and "why.", "decode_ms": 5.0, **FACTS}
    return row | {"encode_ms": 2.0}


def table(*rows):
    return pa.Table.from_pylist(list(rows), schema=tables.OUTCOMES)


def test_a_video_settles_when_all_its_units_have_landed_in_any_order():
    account, (video,) = account_of(1)
    assert account.add(table(outcome(video, 2, 3), outcome(video, 0, 3))) == []
    (row,) = account.add(table(outcome(video, 1, 3)))
    assert (row["status"], row["decode_ms"], row["encode_ms"], row["attempts"]) == ("indexed", 15.0, 6.0, 1)
    assert account.unaccounted() == []


def test_a_repeated_unit_counts_once():
    account, (video,) = account_of(1)
    assert account.add(table(outcome(video, 0, 2), outcome(video, 0, 2))) == []
    assert len(account.add(table(outcome(video, 1, 2)))) == 1


def test_the_first_failed_unit_fails_the_video_once():
    account, (bad, good) = account_of(2)
    (row,) = account.add(table(outcome(bad, 0, 3), outcome(bad, 1, 3, "truncated")))
    assert (row["status"], row["error_code"]) == ("failed", "truncated")
    assert account.add(table(outcome(bad, 2, 3), outcome(bad, 1, 3, "truncated"))) == []
    assert [row["status"] for row in account.add(table(outcome(good, 0, 1)))] == ["indexed"]


def test_what_vanishes_is_planned_again_and_then_lost():
    account, (video, other) = account_of(2)
    account.add(table(outcome(video, 0, 1), outcome(other, 0, 2)))
    work = account.unaccounted()
    assert [row["video_id"] for row in work] == ["v1"]
    (again,) = account.plan(work).to_pylist()
    assert again["write_id"] != other["write_id"]
    assert again["attempts"] == 2
    assert account.add(table(outcome(other, 1, 2))) == []  # a unit of the first pass is no part of the second
    (row,) = account.lost(account.unaccounted(), 3)
    assert (row["status"], row["error_code"], row["video_id"]) == ("failed", "lost", "v1")


def planned_parts(account):
    return [(row["write_id"], row["first_unit"], row["end_unit"]) for row in account.parts().to_pylist()]


def left(video, unit, num_units, rest_s):
    return outcome(video, unit, num_units) | {"rest_ms": rest_s * 1e3}


def test_what_a_decoder_left_is_planned_in_parts_of_the_same_write():
    account, (video, short) = account_of(2)
    assert (video["first_unit"], video["end_unit"]) == (None, None)
    assert planned_parts(account) == []
    account.add(table(outcome(short, 0, 2), outcome(video, 0, 12), left(video, 1, 12, 3.5 * PART_DECODE_S)))
    write_id = video["write_id"]
    assert planned_parts(account) == [(write_id, 2, 5), (write_id, 5, 8), (write_id, 8, 11), (write_id, 11, 12)]
    assert {row["attempts"] for row in account.parts().to_pylist()} == {1}
    account.add(table(*(outcome(video, unit, 12) for unit in (2, 3, 4, 5, 8, 9, 10, 11))))
    assert planned_parts(account) == [(write_id, 6, 8)]  # what one of them lost, and nothing else
    (row,) = account.add(table(outcome(video, 6, 12), outcome(video, 7, 12)))
    assert (row["status"], row["decode_ms"], row["attempts"]) == ("indexed", 60.0, 1)
    assert planned_parts(account) == []
    assert [row["video_id"] for row in account.unaccounted()] == ["v1"]


def test_units_that_were_lost_before_the_rest_are_parts_too():
    account, (video,) = account_of(1)
    account.add(table(outcome(video, 0, 9), left(video, 3, 9, 2.5 * PART_DECODE_S)))
    write_id = video["write_id"]
    assert planned_parts(account) == [(write_id, 1, 3), (write_id, 4, 6), (write_id, 6, 8), (write_id, 8, 9)]


def test_a_part_that_fails_fails_its_video_once():
    account, (video,) = account_of(1)
    account.add(table(outcome(video, 0, 9), left(video, 1, 9, 60)))
    (row,) = account.add(table(outcome(video, 2, 9), outcome(video, 3, 9, "decode_failed"), outcome(video, 4, 9)))
    assert (row["status"], row["error_code"]) == ("failed", "decode_failed")
    assert planned_parts(account) == account.unaccounted() == []


def test_a_part_that_meets_an_outage_is_planned_again_and_at_last_one_decoder_does_it_all():
    account, (video,) = account_of(1)
    account.add(table(outcome(video, 0, 4), left(video, 1, 4, 60)))
    for _ in range(2):
        assert account.add(table(outcome(video, 0, 1, "network"))) == []
        assert planned_parts(account) == [(video["write_id"], 2, 4)]
    (again,) = account.plan(account.unaccounted()).to_pylist()
    assert (again["first_unit"], again["end_unit"]) == (None, ALL_UNITS)
    (row,) = account.add(table(outcome(again, 0, 4), outcome(again, 0, 1, "network")))
    assert (row["status"], row["error_code"]) == ("failed", "network")


@pytest.mark.parametrize("found", [{"num_frames": 751}, {"decoder": "pyav-keyframes"}, {"num_units": 8}])
def test_parts_that_find_another_video_are_given_up_for_one_decoder_alone(found):
    account, (video,) = account_of(1)
    account.add(table(outcome(video, 0, 9), left(video, 1, 9, 60)))
    assert account.add(table(outcome(video, 2, 9), outcome(video, 3, 9) | found, outcome(video, 4, 9))) == []
    assert planned_parts(account) == []
    (again,) = account.plan(account.unaccounted()).to_pylist()
    assert again["write_id"] != video["write_id"]
    assert (again["first_unit"], again["end_unit"]) == (None, ALL_UNITS)
    assert [row["status"] for row in account.add(table(*(outcome(again, unit, 9) for unit in range(9))))] == ["indexed"]


def test_counts_add_up_or_say_so():
    counts = Counts(listed=5, unchanged=1, known_failed=1, not_attempted=3)
    counts.check()
    counts.add([{"status": "indexed", "duration_s": 30.0}, {"status": "failed", "error_code": "deadline"}])
    counts.check()
    assert (counts.indexed, counts.failed, counts.not_attempted, dict(counts.failures)) == (1, 1, 1, {"deadline": 1})
    counts.listed += 1
    with pytest.raises(RuntimeError, match="do not add up"):
        counts.check()


def test_what_was_told_of_reading_and_of_gpus_is_counted_by_why():
    _, (one, other) = account_of(2)
    rows = [outcome(one, 0, 2) | {"read_bytes": 5, "cpu_because": "codec av1"}, outcome(one, 1, 2) | {"read_bytes": 7}]
    rows.append(outcome(other, 0, 1) | {"whole_because": "no index", "cpu_because": "codec av1"})
    counts = Counts()
    counts.add_told(table(*rows))
    told = counts.as_json()
    assert (told["read_bytes"], told["read_whole"], told["on_cpu"]) == (12, {"no index": 1}, {"codec av1": 2})
