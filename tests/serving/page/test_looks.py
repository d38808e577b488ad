"""The page on narrow and wide screens."""

import pytest
from browser_testing import resize


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
