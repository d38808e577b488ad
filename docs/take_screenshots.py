"""Take docs/page-desktop.png and docs/page-phone.png again, from a server that runs.

    draft-serve --target smollm2 --head smollm2-eagle3 --speculation chain
    .venv/bin/python docs/take_screenshots.py http://127.0.0.1:8000

Chains are forced because the automatic mode drafts little where drafting does not pay, as on a busy machine.
Needs chromium, chromedriver and selenium, as the page's tests do (Debian: apt-get install chromium chromium-driver).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PROMPT = "What are the benefits of drinking water?"
# name -> width, height, dots a pixel, colour scheme
SCREENS = {"desktop": (1280, 800, 1.25, "light"), "phone": (390, 844, 2, "dark")}


def main(url: str) -> None:
    sys.path[:0] = [str(DOCS.parent / "tests"), str(DOCS.parent)]
    from browser_testing import Page, chromium, prefer, resize

    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as driver:
        for name, (width, height, scale, scheme) in SCREENS.items():
            phone = name == "phone"
            resize(driver, width, height, scale=scale, mobile=True)
            prefer(driver, prefers_color_scheme=scheme)
            page = Page(driver, url.rstrip("/"))
            page.fill(prompt=PROMPT)
            page.click("#run")
            page.wait()
            if phone:
                page.script("document.querySelector('#results').scrollIntoView()")
            else:
                page.script("document.querySelector('#settings').open = true; scrollTo(0, 0)")
                rejected = driver.find_elements("css selector", ".token[data-kind=instead] .mark")
                page.point_at(rejected[len(rejected) // 3])
            page.until(lambda page=page: page.script("return !document.getAnimations().length"))
            driver.save_screenshot(str(DOCS / f"page-{name}.png"))


if __name__ == "__main__":
    main(*sys.argv[1:] or ["http://127.0.0.1:8000"])
