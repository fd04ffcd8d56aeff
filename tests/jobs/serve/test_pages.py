"""The pages over a real store, asked for as a browser without scripts would: what they say, and that all is escaped."""

import io
import re
import time
from html.parser import HTMLParser
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
import stores
from servers import SCRIPT, SCRIPT_NAME

from longvlm.jobs.query.search import SearchOrder, find_moments
from longvlm.jobs.serve import videos
from longvlm.jobs.serve.pinned import ShownStore
from longvlm.jobs.serve.questions import histogram
from longvlm.jobs.serve.thumbnails import Thumbnails
from longvlm.jobs.serve.videos import LibraryOrder, library_page
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas.errors import InputError


@pytest.fixture
def page(server):
    """Gives what the body of a page says, which must be there."""

    def page(target):
        status, headers, data = server.ask(target)
        assert status == 200, data
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        return data.decode()

    return page


class Tags(HTMLParser):
    """The tags of a page, with their attributes, as a browser takes it apart."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def names(html):
    return re.findall(r'<span class="name" title="[^"]*/([^"/]*)"', html)


# --- the library ---


def test_the_library_shows_every_video_and_why_one_failed(page):
    html = page("/")
    assert len(names(html)) == 5
    assert "all 5" in html
    assert "The file is not a video" in html


@pytest.mark.parametrize(
    ("asked", "number"),
    [
        ("q=TINY", 2),
        ("q=tiny+00001", 1),
        ("where=codec%3D%27hevc%27", 1),
        ("status=failed", 1),
        ("reason=not_a_video", 1),
        ("reason=no_such_code", 0),
        ("q=tiny&where=duration_s+%3E+1000", 0),
        ("where=write_id+IN+(SELECT+write_id+FROM+answers+WHERE+question_hash%3D%27h1%27)", 2),
    ],
)
def test_a_filter_narrows_the_library(page, asked, number):
    assert len(names(page(f"/?{asked}"))) == number


def test_pages_follow_each_other_through_the_whole_library(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "PAGE_VIDEOS", 3)
    store = Store.create(str(tmp_path))
    store.register_recipe(stores.LONG, "some/model")
    made = [f"v{number}" for number in range(8)]
    stores.index(store, made)
    pinned = ShownStore(str(tmp_path)).pinned()
    found, after = [], ""
    while after is not None:
        shown = library_page(pinned, LibraryOrder(after=after))
        assert shown.number == 8
        found += [video["uri"] for video in shown.videos]
        after = shown.after
    assert found == [stores.uri_of(name) for name in made]
    with pytest.raises(InputError, match="begin at the first"):
        library_page(pinned, LibraryOrder(after="nonsense"))


def test_what_is_indexed_meanwhile_is_shown(tmp_path, monkeypatch):
    store = Store.create(str(tmp_path))
    shown = ShownStore(str(tmp_path))
    assert shown.pinned().num_by_status == {}
    store.register_recipe(stores.LONG, "some/model")
    stores.index(store, ["a"])
    assert shown.pinned().num_by_status == {}  # it looked just now
    for _ in range(100):  # it looks in a thread
        monkeypatch.setattr(shown, "_looked_s", float("-inf"))
        if shown.pinned().num_by_status:
            break
        time.sleep(0.1)
    assert shown.pinned().num_by_status == {"indexed": 1}
    stores.index(store, ["b"])
    assert shown.renewed().num_by_status == {"indexed": 2}


# --- one video ---


def test_a_video_shows_answers_of_two_models_side_by_side(page, videos_by_name):
    html = page(f"/video/{videos_by_name['tiny-3-00000']['write_id']}?marks=1-2.5,x,7-3,9-9")
    assert re.findall(r'<th scope="col">(\w+/\w+)</th>', html) == ["other/model", "some/model"]
    assert "90 % sure" in html
    assert html.count('class="shade-4" x="6" y="0" width="2"') == 2  # evidence of both, of which one is chosen
    assert html.count('class="evidence on"') == 1
    assert 'href="#t=6"' in html
    assert "Search hits:" in html
    assert "0:02.5" in html
    assert "0:07" not in html.partition("Search hits:")[2].partition("</p>")[0]


def test_what_a_model_or_a_name_says_is_text(page, videos_by_name):
    for target in (f"/video/{videos_by_name['tiny-3-00001']['write_id']}", "/", "/questions", "/questions?question=h1"):
        html = page(target)
        assert "<script>alert" not in html
        assert "<img src=x" not in html
    assert "&lt;script&gt;alert(1)" in page(f"/video/{videos_by_name['tiny-3-00001']['write_id']}")
    assert "&lt;img src=x" in page(f"/sql?query={quote('SELECT uri FROM videos')}")
    assert "<img src=x" not in page(f"/?q={quote(SCRIPT)}")


def test_a_video_without_answers_says_so(page, videos_by_name):
    assert "Nothing was asked of this video yet" in page(f"/video/{videos_by_name['hevc']['write_id']}")


def test_no_page_has_a_script_or_a_style_in_it(page, videos_by_name):
    for target in (
        "/",
        "/search",
        "/questions?question=h1",
        "/runs",
        "/sql",
        f"/video/{videos_by_name['hevc']['write_id']}",
    ):
        tags = Tags()
        tags.feed(page(target))
        assert tags.seen
        for tag, given in tags.seen:
            assert tag != "style"
            assert tag != "script" or given["src"].startswith("/static/")
            assert not [name for name in given if name == "style" or name.startswith("on")]
            assert not any(
                re.match(r"\s*(\w+:|//)", given.get(name) or "") for name in ("src", "href", "action", "poster")
            )


# --- thumbnails ---


def test_a_thumbnail_is_a_small_picture_and_made_once(server, videos_by_name):
    video = videos_by_name["tiny-3-00000"]["write_id"]
    status, headers, first = server.ask(f"/thumbnail/{video}/3")
    assert (status, headers["Content-Type"], first[:2]) == (200, "image/jpeg", b"\xff\xd8")
    assert len(first) < 8000
    assert server.ask(f"/thumbnail/{video}/3")[2] == first
    assert server.ask(f"/thumbnail/{video}/0")[2] != first  # another moment, though all have one keyframe
    assert server.ask(f"/thumbnail/{video}/9999")[1]["Content-Type"] == "image/svg+xml"
    assert server.ask(f"/thumbnail/{videos_by_name[SCRIPT_NAME]['write_id']}")[1]["Content-Type"] == "image/jpeg"


def test_thumbnails_keep_no_more_than_there_is_room_for(videos_by_name, monkeypatch):
    made = Thumbnails()
    video = videos_by_name["tiny-3-00000"]
    segments = [{"segment": i, "start_s": 2.0 * i, "end_s": 2.0 * i + 2, "thumbnail": None} for i in range(4)]
    try:
        sizes = [len(made.get(video, segment)) for segment in segments]
        monkeypatch.setattr("longvlm.jobs.serve.thumbnails.SERVE", type("Small", (), {"thumbnail_bytes": 1}))
        made.get(video, {"segment": 9, "start_s": 8.0, "end_s": 9.0, "thumbnail": None})
        assert made._num_bytes == 0
        assert made.get(video, {**segments[0], "thumbnail": b"kept in the store"}) == b"kept in the store"
        assert sum(sizes) > 0
    finally:
        made.close()


# --- search, questions, runs, SQL ---


def test_search_finds_what_the_command_finds(page, shown):
    text = "a cyan ring"
    found = find_moments(SearchOrder(str(shown / "store"), text, limit=24)).hits
    html = page(f"/search?q={quote(text)}")
    linked = re.findall(r'href="/video/[-\w]+\?marks=[\d.-]+#t=([\d.]+)" data-moment', html)
    assert linked == [f"{hit['best_s']:.3f}".rstrip("0").rstrip(".") for hit in found]


def test_a_question_over_all_videos_is_sorted_and_counted(page):
    html = page("/questions?question=h1&sort=unsure")
    said = re.findall(r'<td class="said">\s*(.*?)\s*</td>', html, re.DOTALL)
    assert said[:2] == ["No", "Yes"]
    assert 'href="/questions?question=h1&amp;sort=unsure&amp;value=true"' in html
    assert ">Yes<" not in page("/questions?question=h1&value=false")
    assert "All questions" not in page("/questions?question=none-of-these")


def test_numbers_are_counted_in_bins(tmp_path):
    import pyarrow as pa

    from longvlm.schemas import tables

    store = Store.create(str(tmp_path))
    store.register_recipe(stores.LONG, "some/model")
    made = stores.index(store, ["a", "b", "c", "d"])
    rows = [
        {"write_id": write_id, "question_hash": "n", "question": "how many?", "type": "number", "value": value}
        for write_id, value in zip(made["write_id"].to_pylist(), ["1", "2", "10", "nan"], strict=True)
    ]
    store.append("answers", pa.Table.from_pylist(rows, tables.ANSWERS))
    pinned = ShownStore(str(tmp_path)).pinned()
    bars = histogram(pinned, "n", "number")
    assert [bar.number for bar in bars] == [2, 0, 1]
    assert bars[0].label == "1 to 4"


def test_runs_tell_what_failed(page):
    html = page("/runs")
    assert "listed" in html
    assert 'href="/?reason=not_a_video"' in html


def test_runs_tell_how_nights_went(page):
    html = page("/runs")
    (trends,) = re.findall(
        r'<section class="trend" aria-label="The last 3 runs of nightly">.*?</section>', html, re.DOTALL
    )
    said = re.findall(r'aria-label="([^"]*: last [^"]*)"', trends)
    assert said == [
        "took: last 1 min 2 s, at most 1 min 2 s",
        "index: indexed: last 20, at most 20",
        "index: failed: last 2, at most 2",
    ]
    assert re.findall(r'height="([\d.]+)"><title>', trends)[3:6] == ["0.00", "12.00", "24.00"]
    assert "alert many failures <b>2</b>" in html
    assert "index: indexed <b>20</b>" in html


def test_a_querys_rows_come_as_a_table_and_as_files(page, server):
    query = quote("SELECT uri, write_id, 1.5 AS x, NULL AS y FROM videos WHERE status = 'indexed' ORDER BY uri")
    html = page(f"/sql?query={query}")
    assert html.count('<a href="/video/') == 4
    assert '<span class="null">null</span>' in html
    status, headers, data = server.ask(f"/sql?form=csv&query={query}")
    assert (status, headers["Content-Disposition"]) == (200, 'attachment; filename="result.csv"')
    assert data.decode().splitlines()[0] == "uri,write_id,x,y"
    assert pq.read_table(io.BytesIO(server.ask(f"/sql?form=parquet&query={query}")[2])).num_rows == 4
    assert "one SELECT" in server.ask("/sql?query=DROP%20VIEW%20videos")[2].decode()
