"""The pages in a real browser: what is shown moves, seeks and narrows, by mouse and keys, small and large."""

import pytest
from servers import SCRIPT_NAME

from support import BROWSER, missing

COLOURS = {"runOnly": ["color-contrast", "link-in-text-block"]}  # the rest of a page is the same in all sizes
COLOURFUL = ("library", "video", "question", "found")
WIDTHS = {"phone": (360, 740), "desk": (1440, 900)}


@pytest.fixture(scope="module")
def browser():
    if not BROWSER.exists():
        missing(BROWSER, "Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # a container's root has no sandbox of Chromium's, and all that it opens here is ours
        started = playwright.chromium.launch(executable_path=str(BROWSER), args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_and_errors(browser, server):
    """A page of the browser that all tests share, and what it wrote to its console as errors."""
    width, height = WIDTHS["desk"]
    context = browser.new_context(viewport={"width": width, "height": height}, base_url=server.url)
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page, errors
    context.close()


@pytest.fixture
def tab(page_and_errors):
    """The page of the browser; no test may leave an error on its console.

    The policy for scripts lets no text be run: what is waited for is a function, and no expression.
    """
    page, errors = page_and_errors
    errors.clear()
    yield page
    assert errors == []


@pytest.fixture
def at_video(tab, videos_by_name):
    """Gives a function that opens the page of a video."""

    def open_video(name, rest=""):
        tab.goto(f"/video/{videos_by_name[name]['write_id']}{rest}")
        return tab

    return open_video


def time_of(tab):
    return tab.evaluate("document.getElementById('player').currentTime")


def wait_for_time(tab, seconds):
    tab.wait_for_function("s => Math.abs(document.getElementById('player').currentTime - s) < 0.05", arg=seconds)


def test_the_library_loads_and_a_filter_narrows_it(tab):
    tab.goto("/")
    assert tab.locator(".card").count() == 5
    tab.wait_for_function(
        "() => [...document.querySelectorAll('.card img')].every(i => i.complete && i.naturalWidth === 160)"
    )
    tab.keyboard.press("/")
    tab.keyboard.type("tiny")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**q=tiny*")
    assert tab.locator(".card").count() == 2


def test_a_video_plays(at_video):
    tab = at_video("tiny-3-00000")
    tab.wait_for_function("() => document.getElementById('player').readyState >= 2")
    tab.keyboard.press(" ")
    tab.wait_for_function("() => document.getElementById('player').currentTime > 0.3")
    tab.keyboard.press(" ")
    assert tab.evaluate("document.getElementById('player').paused")
    assert float(tab.locator("#head").get_attribute("x1")) > 0


def test_a_click_on_evidence_or_a_segment_seeks(at_video):
    tab = at_video("tiny-3-00000")
    tab.locator(".evidence.on rect").first.click()
    wait_for_time(tab, 6.0)
    assert tab.url.endswith("#t=6")
    tab.locator("[data-segment='4']").click()
    wait_for_time(tab, 8.0)
    tab.locator(".answers a[data-t='2']").last.click()
    wait_for_time(tab, 2.0)
    assert tab.locator("[data-pick][aria-pressed='true']").count() == 1
    tab.locator("[data-pick]").first.click()
    assert tab.locator("[data-pick]").first.get_attribute("aria-pressed") == "true"


def test_an_address_leads_to_a_second(at_video):
    wait_for_time(at_video("tiny-3-00000", "#t=12.4"), 12.4)
    tab = at_video("tiny-3-00001")
    tab.evaluate("location.hash = '#t=3.5'")
    wait_for_time(tab, 3.5)


def test_keys_lead_from_moment_to_moment(at_video):
    tab = at_video("tiny-3-00000")
    for key in ("j", "j", "k"):
        tab.keyboard.press(key)
    assert tab.evaluate("document.activeElement.dataset.t") == "6"
    tab.keyboard.press("Enter")
    wait_for_time(tab, 6.0)
    tab.keyboard.press("?")
    assert tab.locator("#help").is_visible()
    tab.keyboard.press("Escape")
    tab.keyboard.press("/")
    tab.wait_for_url("**/search")


def test_pictures_stand_in_for_what_cannot_be_played(at_video):
    tab = at_video("hevc", "#t=3")
    tab.wait_for_selector("#strip:not([hidden])")
    assert "cannot play the file as it is (hevc)" in tab.locator("#strip").inner_text()
    tab.wait_for_function("() => document.getElementById('strip-picture').naturalWidth === 160")
    first = tab.locator("#strip-picture").get_attribute("src")
    assert first.endswith("/1")
    tab.locator("[data-segment='0']").click()
    assert tab.locator("#strip-picture").get_attribute("src").endswith("/0")
    tab.locator("#strip-play").click()
    tab.wait_for_function("() => Number(document.getElementById('strip-time').value) >= 0.5")


def test_a_hit_of_a_search_plays_in_place_and_leads_to_its_second(tab):
    tab.goto("/search?q=a cyan ring", timeout=120_000)
    tab.keyboard.press("j")
    start = float(tab.evaluate("document.activeElement.dataset.start"))
    tab.keyboard.press("Enter")
    tab.wait_for_function("s => document.querySelector('.card video')?.currentTime > s", arg=start)
    assert tab.locator(".card video").count() == 1
    tab.locator(".card").nth(1).locator("img").click()
    tab.wait_for_function("() => document.querySelectorAll('.card')[1].querySelector('video')?.currentTime > 0")
    assert tab.locator(".card video").count() == 1
    tab.keyboard.press("Escape")
    assert tab.locator(".card video").count() == 0
    seconds = float(tab.evaluate("document.activeElement.href").partition("#t=")[2])
    tab.locator(".card .name").nth(1).click()
    tab.wait_for_url("**/video/**")
    wait_for_time(tab, seconds)
    assert tab.locator(".marks rect").count() == 1


def test_a_model_says_what_of_the_hits_it_sees(tab):
    tab.goto("/search?q=a cyan ring")
    tab.locator("[name=verify]").check()
    tab.locator(".filter button").click()
    tab.wait_for_url("**verify=yes**")
    assert tab.locator(".card b").first.inner_text().endswith("% yes")
    tab.get_by_text("yes first").click()
    tab.wait_for_url("**by=yes**")
    said = [int(text.partition(" ")[0]) for text in tab.locator(".card b").all_inner_texts()]
    assert said == sorted(said, reverse=True)


def test_a_question_is_answered_and_its_answer_judged(at_video):
    tab = at_video(SCRIPT_NAME)
    tab.locator("[data-ask]").fill("is there a square?")
    tab.locator("[name=kind]").select_option("bool")
    tab.keyboard.press("Tab")
    tab.locator("[data-ask]").press("Enter")
    tab.wait_for_url("**question=**")
    row = tab.locator(".answers tbody tr").first
    assert "is there a square?" in row.inner_text()
    assert tab.locator(".evidence.on rect").count() > 0
    tab.locator("#player").evaluate("player => (player.currentTime = 1)")
    right, wrong = (row.get_by_label(label, exact=True).first for label in ("Right", "Wrong"))
    right.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_function("() => document.activeElement.getAttribute('aria-pressed') === 'true'")
    wrong.click()
    tab.wait_for_function("() => document.activeElement.value === 'no'")
    tab.wait_for_function("() => document.activeElement.getAttribute('aria-pressed') === 'true'")
    assert right.get_attribute("aria-pressed") == "false"
    assert time_of(tab) == 1  # the page was not left
    tab.reload()
    assert tab.locator(".answers tbody tr").first.get_by_label("Wrong").first.get_attribute("aria-pressed") == "true"


def test_every_page_can_be_read_by_everybody(tab, videos_by_name):
    from axe_playwright_python.sync_playwright import Axe

    video = videos_by_name["tiny-3-00000"]["write_id"]
    hostile = videos_by_name[SCRIPT_NAME]["write_id"]
    pages = {
        "library": "/?status=failed", "video": f"/video/{video}?marks=1-2", "hostile": f"/video/{hostile}",
        "search": "/search", "questions": "/questions", "question": "/questions?question=h1", "runs": "/runs",
        "sql": "/sql?query=FROM videos", "ask": "/ask?ask=is there a ring?&kind=bool&q=tiny",
        "found": "/search?q=a cyan ring&verify=yes",
    }  # fmt: skip
    for name, path in pages.items():
        tab.goto(path)
        for size, scheme in (("phone", "dark"), ("desk", "light")):  # to look anew costs less than another page
            width, height = WIDTHS[size]
            tab.set_viewport_size({"width": width, "height": height})
            tab.emulate_media(color_scheme=scheme)
            if size == "phone" or name in COLOURFUL:
                found = Axe().run(tab, options=None if size == "phone" else COLOURS).response["violations"]
                serious = [(one["id"], one["help"]) for one in found if one["impact"] in ("serious", "critical")]
                assert (name, size, serious) == (name, size, [])
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, (name, size)
