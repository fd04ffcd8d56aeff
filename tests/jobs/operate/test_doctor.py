import json
import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from longvlm.jobs.cli import main
from longvlm.jobs.operate import doctor
from longvlm.jobs.operate.doctor import DoctorOrder, run_doctor
from longvlm.jobs.runs import VERSIONS
from longvlm.schemas.errors import InputError

pytestmark = pytest.mark.usefixtures("on_ray")

CHECKS = ["libraries", "decoders", "scratch", "source", "store", "tables", "gpu", "model"]


def ask(source="", store="", model=None, test_object="", versions=None):
    order = DoctorOrder(str(source), str(store), model)
    return doctor._NodeCheck(order, "a", has_gpu=False, test_object=str(test_object), versions=versions or {})


def by_check(findings):
    return {found.check: found for found in findings}


def test_a_healthy_cluster_passes_and_nothing_stays_behind(tmp_path, clips, model, monkeypatch):
    monkeypatch.chdir(clips.parent)  # where no worker is
    findings = run_doctor(DoctorOrder(clips.name, os.path.relpath(tmp_path / "deep" / "store"), os.path.relpath(model)))
    assert [found.check for found in findings] == CHECKS
    assert [found for found in findings if not found.ok] == []
    found = by_check(findings)
    assert "12 videos" in found["source"].detail
    assert "no store yet" in found["tables"].detail
    assert "child starts, confined by" in found["decoders"].detail
    assert "is loaded on cpu" in found["model"].detail
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_there_stays_as_it_was(tmp_path, indexed, clips):
    store = shutil.copytree(indexed, tmp_path / "store")
    before = sorted(store.rglob("*"))
    found = by_check(run_doctor(DoctorOrder(str(clips), str(store))))
    assert all(each.ok for each in found.values())
    assert "12 live videos" in found["tables"].detail
    assert "is loaded" in found["model"].detail  # the one that the store remembers
    assert sorted(store.rglob("*")) == before


def test_a_bucket_passes(s3, clips):
    s3.upload_file(str(clips / "clip-00.mp4"), "bucket", "videos/0.mp4")
    with doctor._test_object("s3://bucket/store") as (test_object, findings):
        assert findings == []
        assert doctor._shared_store(ask(test_object=test_object)).startswith("written")
        assert "read" in doctor._source(ask("s3://bucket/videos"))
    assert s3.list_objects_v2(Bucket="bucket", Prefix="store").get("KeyCount") == 0


def test_a_bucket_that_does_not_heed_conditions_is_found_out(s3, monkeypatch):
    import s3fs

    def heedless(self, path, data, **_):
        bucket, key, _ = self.split_path(path)
        self.call_s3("put_object", Bucket=bucket, Key=key, Body=data)

    monkeypatch.setattr(s3fs.S3FileSystem, "_cache", {})  # a client that is there has its methods already
    monkeypatch.setattr(s3fs.S3FileSystem, "pipe_file", heedless)
    with (
        doctor._test_object("s3://bucket/store") as (test_object, _),
        pytest.raises(Exception, match="overwrote an object"),
    ):
        doctor._shared_store(ask(test_object=test_object))
    assert s3.list_objects_v2(Bucket="bucket", Prefix="store").get("KeyCount") == 0


def test_what_is_wrong_is_said_in_words_and_exits_with_1(tmp_path):
    (tmp_path / "file").write_text("")
    args = ["doctor", str(tmp_path / "nowhere"), "--store", str(tmp_path / "file"), "--model", str(tmp_path / "none")]
    done = CliRunner().invoke(main, [*args, "--json"])
    assert done.exit_code == 1
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    failed = {found["check"]: found for found in findings if not found["ok"]}
    assert set(failed) == {"source", "store", "model"}
    assert "does not exist" in failed["source"]["detail"]
    assert failed["store"]["advice"]
    told = CliRunner().invoke(main, args)
    assert told.exit_code == 1
    assert "FAILED" in told.output
    assert "does not exist" in told.output


def test_versions_that_differ_are_named():
    here = doctor._versions()
    assert set(VERSIONS) < set(here)
    driver = {**here, "torch": "1.0"}
    with pytest.raises(Exception, match=r"torch .* \(driver: 1.0\)"):
        doctor._libraries(ask(versions=driver))


def test_a_folder_that_is_not_shared_is_found_out(tmp_path):
    """Another node has a folder of the same name, and the driver's object is not in it."""
    with pytest.raises(Exception, match="another folder of the same name"):
        doctor._shared_store(ask(test_object=tmp_path / ".doctor-of-another-node"))


def test_an_address_where_no_store_can_be_is_wrong_input(clips):
    with pytest.raises(InputError, match="cannot be at"):
        run_doctor(DoctorOrder(str(clips), "ftp://host/store"))


def test_help_is_light():
    code = (
        "import sys, longvlm.jobs.operate.command; print([m for m in ('ray', 'torch', 'duckdb') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
