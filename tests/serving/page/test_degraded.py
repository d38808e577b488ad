"""The page of a server whose speculation is broken."""

from __future__ import annotations

from http_testing import live

from serving.api.app import create_app
from serving.engine import Engine, SamplingParams


def test_the_page_says_so_once_speculation_is_broken(open_page, tiny_target, tiny_head) -> None:
    engine = Engine(tiny_target, tiny_head, speculation="chain")
    with live(create_app(engine)) as url:
        page = open_page(url)
        assert not page.find("#degraded").is_displayed()
        engine.generate([[5, 6, 7]] * 4, SamplingParams(120, ignore_eos=True))  # its random head is hardly ever right
        assert engine.watch.degraded is not None
        page.fill(prompt="zebras", max_new_tokens=4)
        page.click("#run")
        page.wait()
        assert engine.watch.degraded in page.text("#degraded") and page.text("#error") == ""
        page.driver.refresh()
        page.until(lambda: page.text("#state") == "Ready")
        assert page.find("#degraded").is_displayed() and page.find("#degraded").get_attribute("role") == "status"
