import pytest

from longvlm.jobs.figures import counted, listed, short_names, spell_bytes, spell_figure, spell_seconds


@pytest.mark.parametrize(("number", "said"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1234, "1,234 rows")])
def test_one_is_one(number, said):
    assert counted(number, "row") == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0364, "0.04 s"),
        (0.999, "1.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (4_442_700, "1,234 h 5 min"),
    ],
)
def test_lengths_of_time(seconds, said):
    assert spell_seconds(seconds) == said


@pytest.mark.parametrize(
    ("number", "said"), [(1, "1 byte"), (812, "812 bytes"), (1_250_000, "1.2 MB"), (2.5e15, "2,500.0 TB")]
)
def test_sizes(number, said):
    assert spell_bytes(number) == said


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("wall_s", 200.4, ("wall time", "3 min 20 s")),
        ("encode_hours", 1.01e-05, ("encode time", "0.04 s")),
        ("store_bytes", 1_250_000, ("store", "1.2 MB")),
        ("known_failed", 12345, ("known failed", "12,345")),
        ("cost", 0.0000101, ("cost", "0.0000101")),
        ("cost", 12.345, ("cost", "12.3")),
        ("final_loss", 0.0, ("final loss", "0")),
        ("final_loss", float("nan"), ("final loss", "nan")),
        ("out_of_time", True, ("out of time", "True")),
        ("stopped", "disk full", ("stopped", "disk full")),
    ],
)
def test_a_figure_and_its_name(name, value, said):
    assert spell_figure(name, value) == said


def test_counts_in_a_line():
    assert listed({"truncated": 2000, "lost": 1}) == "truncated 2,000, lost 1"


@pytest.mark.parametrize(
    ("uris", "folder", "short"),
    [
        (["/v/a/1.mp4", "/v/b/1.mp4"], "/v", ["a/1.mp4", "b/1.mp4"]),
        (["s3://b/v/1.mp4", "s3://b/v/2.mp4"], "s3://b/v", ["1.mp4", "2.mp4"]),
        (["s3://a/1.mp4", "s3://b/1.mp4"], "", ["s3://a/1.mp4", "s3://b/1.mp4"]),
        (["/a/1.mp4", "/b/1.mp4"], "", ["/a/1.mp4", "/b/1.mp4"]),
        (["s3://a/1.mp4", "/a/1.mp4"], "", ["s3://a/1.mp4", "/a/1.mp4"]),
        (["/v/1.mp4"], "/v", ["1.mp4"]),
        ([], "", []),
    ],
)
def test_paths_without_what_all_share(uris, folder, short):
    assert short_names(uris) == (folder, dict(zip(uris, short, strict=True)))
