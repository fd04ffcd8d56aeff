import json
import shutil
import tempfile
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import parquet
from stores import rows

from longvlm.jobs.cli import main
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.jobs.operate.forget import find_videos, read_uris
from longvlm.jobs.operate.maintain import MaintainOrder, run_maintain
from longvlm.jobs.query.search import SearchOrder, find_moments
from longvlm.pipeline.source.corpus import Source
from longvlm.pipeline.store.files import write_parquet
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens
from longvlm.schemas.errors import InputError


@pytest.fixture
def store(tmp_path, indexed):
    shutil.copytree(indexed, tmp_path / "store")
    return str(tmp_path / "store")


def live(store):
    return {row["uri"] for row in rows(store, "SELECT uri FROM live_videos")}


def test_a_video_is_forgotten_by_its_path_and_not_indexed_again(store, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    find_moments(SearchOrder(store, "a red square"))
    assert len([*tmp_path.glob("longvlm-search-*/*")]) == 1
    done = CliRunner().invoke(
        main, ["forget", "--store", store, "--uri", str(clips / "clip-03.mp4"), "--yes", "--json"]
    )
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["videos"], said["rows"]["videos"], said["rows"]["tokens"]) == (1, 1, 2)
    assert said["files_deleted"] >= 3
    files = list(Path(store, "videos").glob("*.parquet"))
    uris = [uri for file in files for uri in parquet.read_table(file)["uri"].to_pylist() if uri]
    assert {Path(uri).name for uri in uris} == {f"clip-{i:02}.mp4" for i in range(12) if i != 3}
    again = run_index(IndexOrder(Source(str(clips)), store))
    assert (again.counts.forgotten, again.counts.unchanged) == (1, 11)
    assert len(live(store)) == 11
    assert not [*tmp_path.glob("longvlm-search-*/*")]  # its vectors that a search laid out


def test_unknown_videos_are_named_and_nothing_is_erased(store, clips):
    with pytest.raises(InputError, match=r"never saw /nowhere/x.mp4; nothing was erased"):
        find_videos(store, [str(clips / "clip-00.mp4"), "/nowhere/x.mp4"])
    assert len(live(store)) == 12
    with pytest.raises(InputError, match="no video to forget"):
        find_videos(store, [])


class Terminal(StringIO):
    """Somebody who types."""

    def isatty(self):
        return True


def test_what_would_be_erased_is_shown_and_asked_about(store, clips, monkeypatch, capsys):
    uris = [str(clips / f"clip-0{i}.mp4") for i in (3, 7)]
    command = ["forget", "--store", store, "--quiet", *(word for uri in uris for word in ("--uri", uri))]

    def run(typed, *options):
        monkeypatch.setattr("sys.stdin", Terminal(typed) if typed else StringIO())
        with pytest.raises(SystemExit) as ended:
            main([*command, *options])
        return ended.value.code, *capsys.readouterr()

    rows = {"tokens": 4, "segments": 4, "verdicts": 0, "answers": 0, "videos": 2}
    code, out, _ = run("", "--dry-run", "--json")
    assert (code, json.loads(out)) == (0, {"videos": 2, "uris": uris, "rows": rows})
    code, _, err = run("", "--json")
    assert code == 2
    assert "To be erased: 2 videos, in rows: tokens 4, segments 4, verdicts 0, answers 0, videos 2." in err
    assert "nobody can be asked here; say --yes" in err
    code, _, err = run("n\n")
    assert code == 1
    assert all(f"  {uri}\n" in err for uri in uris)
    assert "nothing was erased" in err
    assert len(live(store)) == 12
    code, out, err = run("y\n", "--json")
    assert (code, json.loads(out)["rows"]) == (0, rows)
    assert len(live(store)) == 10


def test_videos_come_from_lists(tmp_path):
    (tmp_path / "list.txt").write_text("a.mp4\n\n b.mp4 \n")
    (tmp_path / "list.csv").write_text("n,uri\n1,a.mp4\n2,b.mp4\n")
    parquet.write_table(pa.table({"uri": ["a.mp4", "b.mp4"]}), tmp_path / "list.parquet")
    for name in ("list.txt", "list.csv", "list.parquet"):
        assert read_uris(str(tmp_path / name)) == ["a.mp4", "b.mp4"]
    (tmp_path / "other.csv").write_text("n\n1\n")
    (tmp_path / "number.json").write_text('[{"uri": 1}]')
    for name, says in (
        ("other.csv", "has no column uri; it has n"),
        ("number.json", "has no text in its column uri, but 1"),
        ("gone.txt", "does not exist"),
    ):
        with pytest.raises(InputError, match=rf"the list of videos .*{name} {says}"):
            read_uris(str(tmp_path / name))


def test_what_cannot_be_erased_is_told_and_the_next_maintenance_goes_on(store, clips, monkeypatch):
    args = ["forget", "--store", store, "--uri", str(clips / "clip-03.mp4"), "--yes"]
    with monkeypatch.context() as patch:
        patch.setattr("longvlm.pipeline.store.upkeep.erase.remove_files", lambda *_: [])
        done = CliRunner().invoke(main, args)
    assert done.exit_code == 1
    assert f"still there: {store}/tokens/" in done.stderr
    assert "not all of them is gone" in done.stderr
    assert len(live(store)) == 11
    report = run_maintain(MaintainOrder(store))
    assert (report.erased.videos, report.erased.still_there, report.stopped) == (1, [], None)
    assert run_maintain(MaintainOrder(store)).erased is None


def test_a_bucket_with_versions_is_told_before_and_its_versions_go(s3, indexed, clips):
    s3.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
    for path in Path(indexed).rglob("*"):
        if path.is_file() and path.name != "index.duckdb":
            s3.upload_file(str(path), "bucket", f"index/{path.relative_to(indexed)}")
    uri = str(clips / "clip-03.mp4")
    (known,) = rows(indexed, f"SELECT write_id FROM live_videos WHERE uri = '{uri}'")
    shards = b"".join(path.read_bytes() for path in Path(indexed, "tokens").glob("*.parquet"))
    assert known["write_id"].encode() in shards
    args = ["forget", "--store", "s3://bucket/index", "--uri", uri]
    shown = CliRunner().invoke(main, [*args, "--dry-run"])
    assert "Mind that the bucket keeps old versions of deleted files" in shown.stderr
    done = CliRunner().invoke(main, [*args, "--yes", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["versions_deleted"] > 0
    found = s3.list_object_versions(Bucket="bucket", Prefix="index/")["Versions"]
    versions = [one for one in found if one["Key"].endswith(".parquet")]
    assert all(one["IsLatest"] for one in versions)
    keys = [{"Key": one["Key"], "VersionId": one["VersionId"]} for one in versions]
    kept = b"".join(s3.get_object(Bucket="bucket", **key)["Body"].read() for key in keys)
    assert [word for word in (uri, known["write_id"]) if word.encode() in kept] == []
    left = [row["write_id"] for row in rows("s3://bucket/index", "SELECT write_id FROM live_videos")]
    assert len(left) == 11
    assert {*read_tokens(Store.open("s3://bucket/index").pin(), left)["write_id"].to_pylist()} == {*left}


def test_a_damaged_file_is_a_sentence_and_after_its_repair_the_erasure_goes_on(store, clips):
    forget = ["forget", "--store", store, "--uri", str(clips / "clip-03.mp4"), "--yes"]
    opened = Store.open(store)
    (file,) = opened.pin().table("tokens").files
    rows = parquet.read_table(file.uri)
    halves = [write_parquet(store, "tokens", half) for half in (rows.slice(0, 12), rows.slice(12))]
    opened.replace_files("tokens", [file], halves)
    last = Path(opened.pin().table("tokens").files[-1].uri)
    last.write_bytes(last.read_bytes()[:-9] + b"rotten!!!")
    for command in (forget, ["maintain", "--store", store]):
        done = CliRunner().invoke(main, command)
        assert (done.exit_code, "maintain --verify" in done.stderr) == (1, True), done.output
        assert str(last) in done.stderr
    assert CliRunner().invoke(main, ["maintain", "--store", store, "--repair"]).exit_code == 0
    assert CliRunner().invoke(main, forget).exit_code == 0


def test_a_damaged_ledger_is_a_sentence_and_after_its_repair_who_was_forgotten_stays_so(store, clips):
    first, second = (["forget", "--store", store, "--uri", str(clips / f"clip-0{i}.mp4"), "--yes"] for i in (3, 4))
    assert CliRunner().invoke(main, first).exit_code == 0
    for file in Store.open(store).pin().table("videos").files:
        Path(file.uri).write_bytes(Path(file.uri).read_bytes()[:-9] + b"rotten!!!")
    done = CliRunner().invoke(main, second)
    assert (done.exit_code, "`--repair` drop it" in done.stderr) == (2, True), done.output
    repaired = CliRunner().invoke(main, ["maintain", "--store", store, "--repair"])
    assert repaired.exit_code == 0, repaired.output
    assert "the ledger lost rows: the next index run watches their videos again" in repaired.stderr
    again = run_index(IndexOrder(Source(str(clips)), store))
    assert (again.counts.forgotten, again.counts.indexed) == (1, 11)
    assert live(store) == {str(clips / f"clip-{i:02}.mp4") for i in range(12) if i != 3}
