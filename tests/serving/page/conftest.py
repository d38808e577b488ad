"""A browser, and servers to look at."""

import pytest
from browser_testing import Page, chromium, prefer, resize
from http_testing import GatedEngine, live

from serving.api.app import create_app


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture(scope="module")
def engine(tiny_target, tiny_head):
    """float64, chains of 5, one slot and a line of one."""
    return GatedEngine(tiny_target, {"tiny-head": tiny_head}, speculation="chain", max_batch=1, max_waiting=1)


@pytest.fixture(scope="module")
def app(engine):
    return create_app(engine)


@pytest.fixture(scope="module")
def url(app):
    with live(app) as url:
        yield url


@pytest.fixture
def open_page(driver):
    """Opens a server's page. Whatever the test, the page asks no other host and its console has no error.

    The browser itself reports refused requests there; tests that provoke them empty the console.
    """
    pages: list[Page] = []

    def opened(url):
        pages.append(Page(driver, url))
        return pages[-1]

    resize(driver, 1280)
    prefer(driver)
    yield opened
    [page] = pages
    assert page.console() == []
    elsewhere = [each["url"] for each in page.requests() if not each["url"].startswith((f"{page.url}/", "data:"))]
    assert elsewhere == []


@pytest.fixture
def page(open_page, url, engine):
    engine.gate.set()
    return open_page(url)
