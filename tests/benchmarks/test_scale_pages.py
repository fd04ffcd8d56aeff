"""The benchmark of pages, on a few made-up videos."""

from benchmarks.scale import pages


def test_the_whole_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ROWS_A_COMMIT", 100)
    found = pages.measure(pages.make_store(tmp_path, 250), 1)
    assert {"start_s", "after_a_commit_s", "mb", "peak_mb", *pages.PAGES, "next_page", "video"} <= found.keys()
    assert found["first_page"]["cold_s"] > 0
