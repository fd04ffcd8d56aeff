"""The picture in the README, taken anew: the page of a video of the demo, in a browser. `python docs/picture.py`.

It needs Playwright and a Chromium, `/usr/bin/chromium` or what LONGVLM_BROWSER names.
"""

import os
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

import longvlm
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.jobs.demo import run_demo

PICTURE = Path(__file__).parent / "serve.png"
WIDTH, HEIGHT, SHOWN_HEIGHT = 1000, 600, 830  # the player takes half of the height, and answers stand below


def main() -> None:
    """Run the demo in this process, and look at what it left."""
    os.environ["RAY_ADDRESS"] = IN_PROCESS
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        run_demo(Path(folder), 4711)
        index = longvlm.open(f"{folder}/store")
        frame = index.show(index.answers("len(evidence) > 1")["uri"][0].as_py())
        path = os.environ.get("LONGVLM_BROWSER", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(frame.address)
        page.wait_for_function("() => document.getElementById('player').readyState >= 2")
        page.locator(".evidence.on rect").first.click()
        page.wait_for_function("() => !player.seeking && player.readyState >= 3")
        page.mouse.move(0, 0)
        page.wait_for_timeout(3000)  # until the frame is drawn, and the player shows nothing over it
        page.screenshot(path=PICTURE, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": SHOWN_HEIGHT})
        browser.close()


if __name__ == "__main__":
    main()
