"""Helpers for tests of the page: headless Chromium, and what a user does with it."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from http_testing import eventually

REQUIRED = "DRAFTSMITH_REQUIRE_BROWSER"  # set where a missing browser is a failure, and no reason to skip
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


def _without(what: str) -> NoReturn:
    reason = f"the page's tests need {what}: pip install selenium, apt-get install chromium chromium-driver"
    if os.environ.get(REQUIRED):
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def chromium(profile: Path, width: int = 1280, height: int = 900) -> Iterator[Any]:
    """A selenium driver of Debian's Chromium with this new, empty profile; skips or fails where there is none."""
    try:
        from selenium import webdriver
    except ImportError:
        _without("selenium")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver_binary = shutil.which("chromedriver")
    if not binary or not driver_binary:
        _without("chromium and its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_binary))
    try:
        resize(driver, width, height)
        yield driver
    finally:
        driver.quit()


def resize(driver: Any, width: int, height: int = 900, *, scale: float = 1, mobile: bool = False) -> None:
    """width, height: in CSS pixels, each of scale * scale dots; mobile: without scroll bars."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(driver: Any, **features: str) -> None:
    """Emulate media features, such as prefers_color_scheme="dark"."""
    asked = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": asked})


class Page:
    """The page of one server in a browser."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url
        self.console()
        self.requests()  # what an earlier page left there
        driver.get(url)
        driver.execute_script("sessionStorage.clear()")
        driver.refresh()
        self.until(lambda: self.text("#state") != "Connecting …")

    # what is there

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """The visible text."""
        return self.find(selector).text

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def tokens(self, card: int = 0) -> list[dict[str, Any]]:
        """Return an answer's tokens with their computed style."""
        return self.script(
            """return [...document.querySelectorAll(".card")[arguments[0]].querySelectorAll(".token")].map((token) => {
              const mark = token.querySelector(".mark"), style = getComputedStyle(mark);
              return {kind: token.dataset.kind, position: mark.dataset.position ?? null, text: token.textContent,
                glyph: mark.dataset.glyph ?? null, under: getComputedStyle(mark, "::after").content,
                color: style.backgroundColor, line: style.borderBottomStyle + " " + style.borderBottomColor};
            })""",
            card,
        )

    def figure(self, name: str, card: int = 0) -> str:
        return self.driver.find_elements("css selector", f"[data-figure={name}]")[card].text

    def bars(self) -> list[str]:
        return [each.text for each in self.driver.find_elements("css selector", ".positions .share") if each.text]

    def console(self) -> list[str]:
        """Messages since the last call."""
        return [each["message"] for each in self.driver.get_log("browser")]

    def requests(self) -> list[dict[str, Any]]:
        """Requests of the page since the last call, as the browser's protocol tells them."""
        logged = (json.loads(each["message"])["message"] for each in self.driver.get_log("performance"))
        sent = [each["params"] for each in logged if each["method"] == "Network.requestWillBeSent"]
        # a new browser's own first tab may still load when the page's requests begin
        return [each["request"] for each in sent if each["documentURL"].startswith(self.url)]

    # what a user does

    def fill(self, **fields: Any) -> None:
        """Type into fields, by their ids."""
        for name, value in fields.items():
            field = self.find(f"#{name}")
            if not field.is_displayed():
                self.script("arguments[0].closest('details').open = true", field)
            field.clear()
            field.send_keys(str(value))

    def choose(self, mode: str) -> None:
        self.find(f"[name=mode][value={mode}]").click()

    def click(self, selector: str) -> None:
        self.find(selector).click()

    @property
    def _actions(self) -> Any:
        from selenium.webdriver.common.action_chains import ActionChains

        return ActionChains(self.driver)

    def press(self, *keys: str) -> None:
        self._actions.send_keys(*keys).perform()

    def point_at(self, element: Any) -> None:
        self._actions.move_to_element(element).perform()

    def until(self, holds: Callable[[], bool]) -> None:
        """Each question costs the browser time, too."""
        eventually(holds, 60, every=0.1)

    def wait(self) -> None:
        """Until nothing runs."""
        self.until(lambda: self.find("#run").is_enabled())

    def run(self, button: str = "#run", **fields: Any) -> str:
        """Fill in fields, run to the end, and return what the alert says."""
        self.fill(**fields)
        self.click(button)
        self.wait()
        return self.text("#error")
