"""Messages of the page when a request is refused, fails or is lost, the need for a key, and screens of any width."""

import pytest
from browser_testing import resize
from conftest import make_tiny_target
from http_testing import GatedEngine, failing, live

from serving.api.app import create_app
from serving.engine import Engine, SamplingParams, Speculation


def run(page, **fields) -> str:
    """Run a prompt; what the alert says."""
    return page.run(**{"prompt": "zebras", **fields})


def only_network_messages(page) -> bool:
    """Empties the console, where the browser itself reports statuses that are no success."""
    return all("Failed to load resource" in message for message in page.console())


def test_a_refused_value_is_told_in_the_server_s_words(page):
    error = run(page, prompt="zebras " * 20, max_new_tokens=500)
    assert error.startswith("The server refused the request: `inputs` tokens + `max_new_tokens` must be <= 512.")
    assert page.find("#error").get_attribute("role") == "alert" and page.text("#progress") == "Failed."
    assert only_network_messages(page)
    assert run(page, max_new_tokens=4) == "" and len(page.tokens()) == 4


def test_what_no_server_needs_to_say(page):
    page.click("#run")  # no prompt
    assert page.script("return document.activeElement.id") == "prompt"
    page.fill(prompt="zebras", temperature=-1)
    page.script("document.querySelector('#settings').open = false")
    page.click("#run")
    assert page.find("#temperature").is_displayed()  # the field that is wrong comes to light
    assert page.script("return document.activeElement.id") == "temperature"
    assert not [each for each in page.requests() if each["method"] == "POST"]


def test_a_full_line_and_a_server_that_ends(page, app, engine):
    engine.gate.clear()
    waiting = [engine.submit([5], SamplingParams(max_new_tokens=2), Speculation()) for _ in range(2)]
    assert "busy" in run(page, max_new_tokens=4)
    for request in waiting:
        request.cancel()
    engine.gate.set()
    app.state.service.draining = True
    assert run(page) == "The server takes no requests now: the server is shutting down"
    app.state.service.draining = False
    assert run(page) == ""
    assert only_network_messages(page)


def test_a_failure_in_the_middle_of_an_answer(open_page, tiny_target, tiny_head):
    engine = GatedEngine(tiny_target, tiny_head, speculation="chain", max_batch=1)
    failing(engine, 6, RuntimeError("/home/secret exploded"))
    with live(create_app(engine)) as url:
        page = open_page(url)
        page.fill(prompt="zebras", max_new_tokens=400, temperature=1)
        page.click("#run")
        page.wait()
        assert page.text("#error") == "The server failed at this request: Request failed during generation"
        assert page.text(".phase") == "incomplete" and len(page.tokens()) > 3
    assert run(page).startswith("No connection to the server.")  # which has ended
    assert only_network_messages(page)


def test_the_key_is_asked_for_and_forgotten_with_the_tab(open_page, tiny_target):
    with live(create_app(Engine(tiny_target), api_key="open sesame".replace(" ", "-"))) as url:
        page = open_page(url)
        assert page.text("#state") == "Key needed" and "API key" in page.text("#error")
        assert page.script("return document.activeElement.id") == "key"
        assert "needs an API key" in run(page, key="wrong")
        page.fill(key="ключ")
        page.press("\ue004")
        assert "characters that no key has" in page.text("#error")
        page.fill(key="open-sesame")
        page.press("\ue004")
        page.until(lambda: page.text("#state") == "Ready")
        assert run(page, max_new_tokens=5) == "" and len(page.tokens()) == 5
        page.driver.refresh()
        page.until(lambda: page.text("#state") == "Ready")
        stored = page.script("return [JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]")
        assert "open-sesame" in stored[0] and stored[1:] == ["{}", ""]
        page.script("sessionStorage.clear()")
        assert only_network_messages(page)


def test_a_server_that_loads_and_has_no_head(open_page, tiny_target):
    app = create_app(None)
    with live(app) as url:
        page = open_page(url)
        assert page.text("#state") == "Loading …"
        app.state.service.attach(Engine(tiny_target, lookup=False))
        page.until(lambda: page.text("#state") == "Ready")
        assert "no draft head" in page.text("#notice") and "no draft head" in page.text("#served")
        assert not page.find("#compare").is_enabled() and not page.find("#num_tokens").is_enabled()
        assert run(page, max_new_tokens=6) == "" and only_network_messages(page)
        assert [token["kind"] for token in page.tokens()] == ["target"] * 6
        assert page.figure("tau") == "1.00" and page.figure("accepted") == "–" and page.bars() == []
        assert "drafted" not in page.text("#legend ul")


def test_a_target_without_a_chat_template(open_page):
    target = make_tiny_target()
    target.tokenizer.chat_template = None
    with live(create_app(Engine(target))) as url:
        page = open_page(url)
        assert not page.find("[value=chat]").is_enabled() and page.find("[value=raw]").is_selected()
        assert run(page, max_new_tokens=3) == ""


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(page, width):
    resize(page.driver, width, 740)
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    page.script("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.script(overflow) == 0 and page.script("return innerWidth") == width
    page.run("#compare", prompt="zebras " * 30 + "z" * 200, max_new_tokens=60, temperature=3, seed=1)
    for element in page.driver.find_elements("css selector", ".token")[::12]:
        page.script("arguments[0].focus()", element)
        tip = page.script("return document.querySelector('#tip').getBoundingClientRect().toJSON()")
        assert page.find("#tip").is_displayed() and tip["left"] >= 0 and tip["right"] <= width
        assert page.script(overflow) == 0 and page.script("return innerWidth") == width
    tall = page.script("return [...document.querySelectorAll('.buttons button')].map((each) => each.offsetHeight)")
    assert min(tall) >= 44 and max(tall) < 60  # a finger's size, and no word is broken
