import random
from contextlib import suppress
from pathlib import Path

import pytest

from clips import remux, write_clip
from longvlm.pipeline.source import sparse
from longvlm.pipeline.source.fetch import FetchError, WholeNeededError
from longvlm.pipeline.source.ranges import RemoteObject
from longvlm.pipeline.source.sparse import SparseCopy


@pytest.fixture
def uploaded(s3, tmp_path):
    """Uploads a file and gives a sparse copy of it, in which there is nothing yet."""

    def upload(path):
        s3.upload_file(str(path), "bucket", path.name)
        etag = s3.head_object(Bucket="bucket", Key=path.name)["ETag"].strip('"')
        return SparseCopy(RemoteObject(f"s3://bucket/{path.name}", etag), str(tmp_path / "copy"), path.stat().st_size)

    return upload


def filled(copy):
    content = Path(copy.path).read_bytes()
    assert len(content) == copy.size_bytes
    return content


@pytest.mark.parametrize(("name", "options"), [("a.mp4", {}), ("b.mp4", {"movflags": "faststart"}), ("c.mkv", {})])
def test_the_index_is_found_and_nothing_else_of_note_is_read(uploaded, tmp_path, name, options):
    plain = write_clip(tmp_path / "plain.mp4", 3000, size=(160, 120))
    path = remux(plain, tmp_path / name, **options)
    copy = uploaded(path)
    copy.fetch_index()
    content, whole = filled(copy), path.read_bytes()
    assert all(content[start:end] == whole[start:end] for start, end in copy.have)
    assert copy.remote.num_bytes_read == sum(end - start for start, end in copy.have) < len(whole) / 2
    if name.endswith("mp4"):
        place = whole.index(b"moov")
        assert content[place : place + 1000] == whole[place : place + 1000]
    else:
        assert whole.rindex(b"\x1cS\xbbk") > copy.have[0][1]
        assert content[whole.rindex(b"\x1cS\xbbk") :] == whole[whole.rindex(b"\x1cS\xbbk") :]


def test_where_there_is_no_index_the_whole_is_needed(uploaded, tmp_path):
    clip = write_clip(tmp_path / "plain.mp4", 50)
    cut_off = tmp_path / "cut.mp4"
    cut_off.write_bytes(clip.read_bytes()[: clip.read_bytes().index(b"moov") - 8])
    live = remux(clip, tmp_path / "live.mkv", live="1")
    cases = [
        (remux(clip, tmp_path / "a.ts"), "no index"),
        (cut_off, "no index"),
        (live, "no index"),
        (remux(clip, tmp_path / "f.mp4", movflags="frag_keyframe+empty_moov"), "fragmented"),
    ]
    for path, reason in cases:
        with pytest.raises(WholeNeededError) as caught:
            uploaded(path).fetch_index()
        assert caught.value.reason == reason, path


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_file_has_an_index_or_none_but_ends_nobody(uploaded, tmp_path, seed):
    clip = write_clip(tmp_path / "plain.mp4", 50)
    source = random.Random(seed)
    path = remux(clip, tmp_path / "a.mkv") if seed % 2 else clip
    content = bytearray(path.read_bytes())
    for _ in range(20):
        content[source.randrange(min(len(content), 400)) if seed % 3 else source.randrange(len(content))] = (
            source.randrange(256)
        )
    path.write_bytes(content[: source.randrange(1, len(content))] if seed % 5 == 0 else content)
    copy = uploaded(path)
    with suppress(WholeNeededError):
        copy.fetch_index()
    whole = path.read_bytes()
    assert all(filled(copy)[start:end] == whole[start:end] for start, end in copy.have)


def test_ranges_are_taken_from_nobody_on_trust(uploaded, tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 400)
    copy = uploaded(path)
    for ranges in ([(0, 0)], [(-1, 5)], [(5, 102_401)], [(10, 5)], [(0, 10), (5, 20)]):
        with pytest.raises(WholeNeededError, match="ranges that are none"):
            copy.fetch(ranges)
    with pytest.raises(WholeNeededError, match="most of it"):
        copy.fetch([(0, 60_000)])
    monkeypatch.setattr(sparse, "MAX_RANGES", 2)
    with pytest.raises(WholeNeededError, match="too many"):
        copy.fetch([(0, 1), (10, 11), (20, 21)])
    assert copy.have == []
    assert copy.remote.num_bytes_read == 0


def test_ranges_that_are_near_are_one_and_none_is_read_twice(uploaded, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 400)
    copy = uploaded(path)
    copy.fetch([(20_000, 21_000), (10_000, 11_000), (11_500, 12_000)])
    assert copy.have == [(10_000, 12_000), (20_000, 21_000)]
    copy.fetch([(10_500, 13_000)])
    assert copy.have == [(10_000, 13_000), (20_000, 21_000)]
    assert copy.remote.num_bytes_read == 4_000
    assert filled(copy)[10_000:13_000] == path.read_bytes()[10_000:13_000]


def test_an_object_that_was_replaced_gives_no_range(uploaded, tmp_path, s3):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(100_000))
    copy = uploaded(path)
    s3.put_object(Bucket="bucket", Key="a.bin", Body=b"1" * 100_000)
    with pytest.raises(WholeNeededError, match="replaced"):
        copy.fetch([(0, 100)])


def test_where_a_bare_request_is_in_vain_the_library_asks(uploaded, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 400)
    copy = uploaded(path)
    copy.remote._signed, copy.remote._to_sign = "http://127.0.0.1:1/nobody", False
    copy.fetch([(256, 512)])
    assert filled(copy)[256:512] == bytes(range(256))


def test_other_stores_are_asked_for_the_etag_afterwards():
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/sparse/a.bin", b"x" * 1000)
    with pytest.raises(WholeNeededError, match="replaced"):  # it has no etags
        RemoteObject("memory://sparse/a.bin", "made-up").read([(0, 10)])


def test_a_short_body_is_an_error(uploaded, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(1000))
    copy = uploaded(path)
    with pytest.raises(FetchError, match="500 bytes came where 1000"):
        copy.remote.read([(500, 1500)])
