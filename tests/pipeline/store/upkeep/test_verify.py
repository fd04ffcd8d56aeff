from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stores

from longvlm.pipeline.store.files import write_parquet
from longvlm.pipeline.store.shards import write_shards
from longvlm.pipeline.store.upkeep.verify import verify
from longvlm.schemas import tables


def token_file(store, outcomes):
    return Path(store.uri, "tokens", outcomes["tokens_shard"][0].as_py()["path"])


def commit(store, name, made):
    outcomes = write_shards(store.uri, made, stores.LONG.fingerprint)
    store.commit(outcomes, stores.videos(outcomes, [name], stores.LONG.fingerprint))
    return outcomes


def problems(store):
    return {(Path(row["uri"]).stem, row["table"], row["problem"]) for row in verify(store.pin()).problems}


def test_a_whole_store_has_nothing_to_tell(store):
    stores.index(store, ["a", "b"])
    stores.index(store, ["a"])
    seen = []
    checked = verify(store.pin(), seen.append)
    assert (checked.num_videos, checked.damaged_files, checked.problems) == (2, {}, [])
    assert checked.num_files == sum(len(table.files) for table in store.pin().tables.values())
    assert sum(seen) == checked.num_bytes > 0


def test_a_flipped_bit_is_found_and_costs_only_its_videos(store):
    stores.index(store, ["well"])
    outcomes = commit(store, "ill", stores.encoded(["ill"], seed=1))
    path = token_file(store, outcomes)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1  # somewhere in a blob
    path.write_bytes(content)
    checked = verify(store.pin())
    assert list(checked.damaged_files) == [str(path)]
    assert {(Path(row["uri"]).stem, row["table"]) for row in checked.problems} == {("ill", "tokens")}


def test_a_file_that_is_gone_is_found(store):
    outcomes = commit(store, "ill", stores.encoded(["ill"]))
    token_file(store, outcomes).unlink()
    assert problems(store) == {("ill", "tokens", "has 0 segments of 4")}


def test_blobs_of_the_wrong_length_and_segments_that_are_missing_or_doubled(store):
    made = stores.encoded(["short", "less", "twice"]).to_pylist()
    first, second, third = made[0]["segments"][:3]
    first["positions"], second["positions"] = bytes(24 * first["num_tokens"]), bytes(24 * second["num_tokens"] - 8)
    third["sizes"] += b"\0\0"
    outcomes = write_shards(store.uri, pa.Table.from_pylist(made, tables.ENCODED), stores.LONG.fingerprint)
    rows = pq.read_table(token_file(store, outcomes))
    less, twice = made[1]["write_id"], made[2]["write_id"]
    kept = [i for i, row in enumerate(rows.to_pylist()) if (row["write_id"], row["segment"]) != (less, 3)]
    doubled = [i for i, row in enumerate(rows.to_pylist()) if (row["write_id"], row["segment"]) == (twice, 1)]
    changed = write_parquet(store.uri, "tokens", rows.take(sorted(kept + doubled)).cast(tables.TOKENS))
    shards = pa.array([changed] * 3, tables.SHARD)
    outcomes = outcomes.set_column(outcomes.column_names.index("tokens_shard"), "tokens_shard", shards)
    store.commit(outcomes, stores.videos(outcomes, ["short", "less", "twice"], stores.LONG.fingerprint))
    assert problems(store) == {
        ("short", "tokens", "the blobs of segment 1 are not as long as its shape says"),
        ("short", "tokens", "the blobs of segment 2 are not as long as its shape says"),
        ("less", "tokens", "has 3 segments of 4"),
        ("twice", "tokens", "has 5 segments of 4, some repeated"),
    }


def test_int8_has_a_byte_a_channel_and_a_scale_for_every_64_of_them(store):
    names = ("whole", "no scales", "short scales", "float16", "scaled float16")
    made = stores.encoded(list(names)).to_pylist()
    for one in made:
        for segment in one["segments"]:
            segment |= {"dtype": "int8", "local": segment["local"][: 8 * 64], "scales": bytes(2 * 8)}
    made[1]["segments"][1]["scales"] = None
    made[2]["segments"][1]["scales"] = bytes(2 * 7)
    made[3]["segments"][1]["dtype"] = "float16"
    made[4]["segments"][1] |= {"dtype": "float16", "local": bytes(2 * 8 * 64)}
    outcomes = write_shards(store.uri, pa.Table.from_pylist(made, tables.ENCODED), stores.LONG.fingerprint)
    store.commit(outcomes, stores.videos(outcomes, list(names), stores.LONG.fingerprint))
    problem = "the blobs of segment 1 are not as long as its shape says"
    assert problems(store) == {(name, "tokens", problem) for name in names[1:]}


def test_a_damaged_file_of_the_ledger_is_told_too(store):
    stores.index(store, ["well"])
    stores.index(store, ["ill"], seed=1)
    path = Path(store.pin().table("videos").files[0].uri)
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    checked = verify(store.pin())
    assert list(checked.damaged_files) == [str(path)]
    assert (checked.num_videos, checked.problems) == (1, [])


@pytest.mark.parametrize("table", ["tokens", "segments", "videos"])
def test_a_footer_that_says_of_its_rows_what_they_do_not_have_is_damage(store, table):
    stores.index(store, ["a"])
    ((file,),) = (pinned.files for name, pinned in store.pin().tables.items() if name == table)
    content = Path(file.uri).read_bytes()
    write_id = pq.read_table(file.uri)["write_id"][0].as_py().encode()
    at = content.rindex(write_id)  # in the statistics, by which SQL leaves out row groups
    assert at > len(content) - int.from_bytes(content[-8:-4], "little") - 8
    Path(file.uri).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert "its footer says of the column write_id" in verify(store.pin()).damaged_files[file.uri]


def test_statistics_that_only_sql_refuses_are_damage_too(store):
    stores.index(store, ["a"])
    (file,) = store.pin().table("tokens").files
    content = Path(file.uri).read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    at = content.index(bytes.fromhex("16002804"), footer)  # thrift: no nulls, and a largest value of four bytes
    Path(file.uri).write_bytes(content[: at + 2] + b"\x08" + content[at + 3 :])  # the smallest, of three
    assert "stats size" in verify(store.pin()).damaged_files[file.uri]
