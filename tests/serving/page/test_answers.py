"""Answers on the page: every token with its origin, live figures, and the comparison with speculation off."""

import json
import math
import operator
import threading
from typing import Any

import httpx
import pytest
from http_testing import PROMPT, ask, eventually, idle, live

from serving.api.app import create_app
from serving.engine import Engine
from serving.engine.estimates import DraftPlan
from serving.engine.lookup import LOOKUP_LENGTH
from serving.engine.planner import Fixed

SAMPLED = {"temperature": 1.0, "seed": 7, "max_new_tokens": 24}


@pytest.fixture
def told(url, engine):
    """The API's answer to the same request."""
    engine.gate.set()
    with httpx.Client(base_url=url) as client:
        return ask(client, **SAMPLED, details=True, speculative={"origin": True}).json()


class Turnstile(threading.Event):
    """A gate that lets single steps through while it is closed."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = threading.Semaphore(steps)

    def wait(self, timeout: float | None = None) -> bool:
        return self.is_set() or self.steps.acquire(timeout=timeout)


def kind_of(token: dict[str, Any]) -> str:
    origin = token["origin"]
    return "draft" if origin["source"] == "draft" else "instead" if origin["rejected"] else "target"


def as_percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def test_tokens_are_coloured_by_origin_as_the_api_tells_it(page, told):
    page.choose("raw")
    page.run(prompt=PROMPT, **SAMPLED)
    tokens, expected = page.tokens(), told["details"]["tokens"]
    assert [token["kind"] for token in tokens] == [kind_of(token) for token in expected]
    assert [token["position"] and int(token["position"]) for token in tokens] == [
        token["origin"]["position"] for token in expected
    ]
    kinds = {"target", "instead", "draft"}
    assert {token["kind"] for token in tokens} == kinds
    looks = {(token["kind"], token["position"]): (token["color"], token["line"]) for token in tokens}
    assert len(set(looks.values())) == len(looks) > 3  # each position and kind has its own
    assert all(token["under"] == (f'"{token["position"]}"' if token["position"] else "none") for token in tokens)
    assert ", chains up to 5 · " in page.text("#served")
    legend = page.text("#legend")
    assert "drafted at this position" in legend and "rejected" in legend and "1 2 3 4 5" in legend
    # figures: the server's own at the end
    figures = told["details"]["speculative"]
    assert page.figure("tau") == f"{figures['acceptance_length']:.2f}"
    assert page.figure("accepted") == f"{figures['accepted']} of {figures['drafted']}"
    assert page.bars() == [as_percent(share) for share in figures["acceptance_per_position"]]
    assert float(page.figure("speed")) > 0 and page.figure("first").split()[1] in ("ms", "s")
    assert "24 tokens" in page.text(".end") and "seed 7" in page.text(".end") and "24 tokens" in page.text("#progress")


def test_the_text_is_the_answer_s_with_characters_of_several_tokens(page, url):
    wishes = {"temperature": 3.0, "seed": 5, "max_new_tokens": 160}
    page.fill(prompt="zebras", **wishes)
    page.find("#prompt").send_keys("\ue009\ue007")  # Control and Enter
    page.until(lambda: page.text("#progress") != "")
    page.wait()
    with httpx.Client(base_url=url) as client:
        told = ask(client, "zebras", chat=True, details=True, **wishes).json()
    shown = page.tokens()
    plain = [token for token, each in zip(shown, told["details"]["tokens"], strict=True) if not each["special"]]
    assert "".join(token["text"] for token in plain) == told["generated_text"]
    pieces = [index for index, token in enumerate(plain) if token["text"] == ""]
    assert pieces and all(plain[index]["glyph"] == "·" for index in pieces)  # can be seen and pointed at all the same
    whole = "".join(plain[pieces[0] + offset]["text"] for offset in range(4))
    assert any(len(character.encode()) > 1 for character in whole)
    assert page.script("return document.querySelector('.plain').textContent").endswith(told["generated_text"])


def test_what_is_known_of_a_token_by_pointer_and_by_keyboard(page, told):
    page.choose("raw")
    page.run(prompt=PROMPT, **SAMPLED)
    expected = told["details"]["tokens"]
    index = next(index for index, token in enumerate(expected) if index and token["origin"]["rejected"])
    elements = page.driver.find_elements("css selector", ".token")
    assert not page.find("#tip").is_displayed()
    page.point_at(elements[index].find_element("css selector", ".mark"))
    tip = page.text("#tip")
    rejected = expected[index]["origin"]["rejected"]["text"].strip()
    assert "Supplied by the target." in tip and "which was rejected" in tip
    assert rejected in tip or "a part of a character" in tip
    assert f"{100 * math.exp(expected[index]['logprob']):.1f} %" in tip or "below 0.1 %" in tip
    page.point_at(page.find("h1"))
    assert not page.find("#tip").is_displayed()
    # one stop of the Tab key for the whole answer, and arrows within
    page.script("document.querySelector('#access summary').focus()")
    page.press("\ue004")  # Tab
    drafted = next(index for index, token in enumerate(expected) if token["origin"]["source"] == "draft")
    page.press(*["\ue014"] * drafted)  # the right arrow
    focused = page.driver.switch_to.active_element
    assert focused == elements[drafted]
    tip = page.text("#tip")
    assert f"Drafted at position {expected[drafted]['origin']['position']}, and accepted." in tip
    assert f"Token {drafted + 1} of the answer" in tip
    assert focused.get_attribute("aria-describedby") == "tip" and focused.get_attribute("role") == "option"
    assert page.script("return getComputedStyle(arguments[0].querySelector('.mark')).outlineStyle", focused) == "solid"
    page.press("\ue00c")  # Escape
    assert not page.find("#tip").is_displayed()
    page.press("\ue004")
    assert page.driver.switch_to.active_element not in elements


def test_figures_live_and_stop(page, engine):
    engine.gate = Turnstile(8)
    page.fill(prompt="zebras", max_new_tokens=200, temperature=1, seed=7)
    page.find("#run").send_keys("\ue007")

    def told():
        """The figures as they are shown, and as the tokens say."""
        seen = page.tokens()
        verifications = sum(token["kind"] != "draft" for token in seen[1:])
        stood = [sum(token["position"] == str(position) for token in seen) for position in range(1, 6)]
        expected = [f"{(len(seen) - 1) / verifications:.2f}", *(as_percent(each / verifications) for each in stood)]
        return [page.figure("tau"), *page.bars()], expected

    page.until(lambda: len(page.tokens()) >= 8)
    page.until(lambda: operator.eq(*told()))  # the last of the 8 steps has come
    seen, (figures, _) = page.tokens(), told()
    assert page.text(".phase") == "running" and not page.find("#run").is_enabled()
    assert page.driver.switch_to.active_element == page.find("#stop")
    engine.gate.steps.release(6)
    page.until(lambda: len(page.tokens()) > len(seen) + 5)
    page.until(lambda: operator.eq(*told()))
    assert told()[0] != figures
    page.press("\ue007")

    page.wait()
    eventually(lambda: idle(engine))
    assert page.text("#progress") == "Stopped." and page.text(".phase").startswith("stopped after ")
    assert page.driver.switch_to.active_element == page.find("#run")
    page.fill(max_new_tokens=3)
    engine.gate.set()
    page.click("#run")
    page.wait()
    assert page.text("#progress").startswith("Done: 3 tokens")


def test_the_comparison_runs_both_with_one_seed(page):
    page.run("#compare", prompt="zebras", max_new_tokens=40, temperature=1)  # no seed: one is drawn for both
    sent = [json.loads(each["postData"])["parameters"] for each in page.requests() if "postData" in each]
    assert [each["speculative"].get("enabled") for each in sent] == [True, False]
    assert sent[0]["seed"] == sent[1]["seed"]
    on, off = page.tokens(0), page.tokens(1)
    assert len(on) > 5 and [token["text"] for token in on] == [token["text"] for token in off]
    assert any(token["kind"] == "draft" for token in on) and {token["kind"] for token in off} == {"target"}
    assert page.text(".identity") == "The two texts are identical."
    speeds = [float(page.figure("speed", card)) for card in (0, 1)]
    assert f"{speeds[0]:.1f} tokens per second with it, {speeds[1]:.1f} without" in page.text(".words")
    assert float(page.text(".ratio").split()[0]) == pytest.approx(speeds[0] / speeds[1], rel=0.02)
    assert page.figure("tau", 1) == "1.00"


def test_a_comparison_of_different_texts_says_so(page, engine):
    rule, engine.rule = engine.rule, "rejection"
    try:
        page.run("#compare", prompt="zebras", max_new_tokens=40, temperature=1, seed=2)
    finally:
        engine.rule = rule
    texts = [[token["text"] for token in page.tokens(card)] for card in (0, 1)]
    assert texts[0] != texts[1]
    place = int(page.text(".identity").removeprefix("The texts differ from token ").split()[0])
    assert texts[0][: place - 1] == texts[1][: place - 1] and "rejection rule" in page.text(".identity")


def test_every_setting_is_sent(page):
    settings = {"max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "seed": 2**63 - 1}
    page.choose("raw")
    page.run(prompt="one\ntwo", num_tokens=2, stop_strings="\\n\\n\nEND", **settings)
    [body] = [json.loads(each["postData"]) for each in page.requests() if "postData" in each]
    sent = {"chat": False, "stop": ["\n\n", "END"], "speculative": {"origin": True, "num_tokens": 2}, **settings}
    assert body == {"inputs": "one\ntwo", "parameters": sent}
    assert page.text("#progress").startswith("Done: 3 tokens")


def test_copied_tokens_have_a_colour_of_their_own_and_a_place_in_the_legend(open_page, tiny_target):
    engine = Engine(tiny_target)
    engine.controller = engine._decoder.controller = Fixed(DraftPlan.lookup(12))
    with live(create_app(engine)) as url:
        page = open_page(url)
        page.choose("raw")
        page.run(prompt="zebras " * 6, max_new_tokens=100)
        tokens = page.tokens()
        looks = {token["kind"]: (token["color"], token["line"]) for token in tokens}
        assert {"copied", "target"} <= looks.keys() and len(set(looks.values())) == len(looks)
        assert max(int(token["position"] or 0) for token in tokens) > 5 and len(page.bars()) == 10
        assert f"no draft head · copies up to {LOOKUP_LENGTH} · " in page.text("#served")
        assert page.find("#num_tokens").get_attribute("max") == str(LOOKUP_LENGTH)
        legend = page.text("#legend")
        assert "copied from the text before and accepted" in legend and "by the head" not in legend
        page.point_at(page.find(".token[data-kind=copied] .mark"))
        assert "Copied from the text before at position" in page.text("#tip")
        assert page.find("#compare").is_enabled() and not page.find("#notice").is_displayed()
