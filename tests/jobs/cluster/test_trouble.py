"""What the machine lacks is told by its name, whoever tells of it and however deep it lies."""

import errno
import os
import subprocess
import sys
import tempfile

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import stores
from click.testing import CliRunner
from deltalake.exceptions import DeltaError
from servers import BucketServer

from longvlm.jobs.cli import main
from longvlm.jobs.cluster.executor import StageError
from longvlm.jobs.cluster.trouble import trouble
from longvlm.pipeline.store.catalog import queries_as_sentences
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas.errors import QueryError

FULL = "No space left on device"


@pytest.mark.parametrize(
    "error",
    [
        duckdb.IOException(f'IO Error: Could not write file "/full/store": {FULL}'),
        DeltaError(f"Generic LocalFileSystem error: Unable to open file '/full/store': {FULL} (os error 28)"),
        OSError(errno.ENOSPC, FULL, "/full/store"),
        StageError(f"OSError: [Errno 28] Error writing bytes to file '/full/store'. Detail: {FULL}"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_told_alike_by_whatever_library(error):
    assert trouble(error).startswith(f"{FULL} (/full/store): free some space on that disk")


def test_it_is_found_behind_what_it_caused():
    error = ValueError("no table")
    error.__cause__ = OSError(errno.EROFS, os.strerror(errno.EROFS), "/ro/file")
    assert trouble(error).startswith("Read-only file system (/ro/file): use a folder that can be written")


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("no space"), FileNotFoundError(2, "No such file", "f")])
def test_mistakes_of_the_program_are_none_of_the_machines(error):
    assert trouble(error) is None


@pytest.mark.parametrize(
    ("refused", "sentence"),
    [
        ("_last_checkpoint", "/_delta_log/_last_checkpoint did not give what was asked for (Said by AccessDenied)"),
        (".parquet", ".parquet cannot be read (Forbidden): check your rights and the network."),
    ],
)
def test_what_a_bucket_refuses_of_a_store_in_the_middle_of_a_command_is_a_sentence(
    monkeypatch, tmp_path, refused, sentence
):
    stores.index(Store.create(str(tmp_path / "s")), ["a"])
    contents = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*.*")}

    def refuse(key):
        return (403, "AccessDenied") if key.startswith("s/segments/") and key.endswith(refused) else None

    with BucketServer(contents, refuse) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        done = CliRunner().invoke(main, ["sql", "--store", "s3://bucket/s", "FROM segments"])
    s3fs.S3FileSystem.clear_instance_cache()
    assert done.exit_code == 1
    assert sentence in done.output


def test_a_damaged_head_of_a_page_which_duckdb_tells_without_its_file_is_damage(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": ["x"] * 100}), path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    for at in (4, 15):  # of the page's head
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1 :])
        with pytest.raises(duckdb.Error) as error:
            duckdb.sql(f"SELECT string_agg(a) FROM '{path}'").fetchall()
        assert ".parquet" not in str(error.value)
        assert trouble(error.value).startswith("a file of the store is damaged or gone; `longvlm maintain --verify`")
        with pytest.raises(QueryError, match="--verify` says which"), queries_as_sentences():
            raise error.value


def test_too_few_open_files_are_named():
    code = """
import resource
from longvlm.jobs.cluster.trouble import trouble
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
kept = []
try:
    while True:
        kept.append(open("/dev/null"))
except OSError as error:
    said = trouble(error)
del kept
print(said)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ulimit -n" in done.stdout


def test_a_command_without_a_temporary_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])
    words = ["index", str(tmp_path), "--store", str(tmp_path / "s"), "--model", "tinyworld", "--quiet"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert done.stderr == (
        "longvlm: there is no folder for temporary files, or no room in it; set TMPDIR to one that can be written. "
        "What was finished is kept.\n"
    )
    assert not (tmp_path / "s").exists()
