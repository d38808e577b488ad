"""Both colour schemes, narrow screens, and less motion."""

from __future__ import annotations

import pytest
from browser_testing import prefer, resize

# of every element with text of its own that can be seen: its ratio of contrast (WCAG 2.2) to what is behind it
CONTRASTS = """
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = (color) => channels(color).slice(0, 3).map(linear)
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = getComputedStyle(each).backgroundColor;
      if ((channels(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const ratio = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    if (!element.checkVisibility() || element.closest("[hidden], script, template, .visually-hidden")) continue;
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const name = element.tagName + "." + element.className + "#" + element.id;
    if (own || element.value) found.push([name, ratio(getComputedStyle(element).color, behind(element))]);
    for (const pseudo of ["::before", "::after", "::placeholder"]) {
      const style = getComputedStyle(element, pseudo);
      if (!/attr|"[^"]/.test(style.content) && !(pseudo === "::placeholder" && element.placeholder)) continue;
      const under = pseudo === "::after" ? element.parentElement : element;  // the number stands below its token
      found.push([name + pseudo, ratio(style.color, behind(under))]);
    }
  }
  return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(page, scheme) -> None:
    prefer(page.driver, prefers_color_scheme=scheme)
    before = page.script(CONTRASTS)
    page.fill(prompt="zebras", max_new_tokens=60, temperature=1, seed=7)
    page.click("#compare")
    page.wait()
    page.script("document.querySelector('#error').hidden = false; document.querySelector('#error').textContent = 'no'")
    page.point_at(page.find(".token .mark"))
    after = page.script(CONTRASTS)
    assert {"BUTTON.primary#run", "P.notice bad#error", "P.name#"} < {name for name, _ in after}
    assert any(name.startswith("SPAN.mark") and name.endswith("::after") for name, _ in after)
    assert [each for each in before + after if each[1] < 4.5] == []
    # a shade each, which belongs to the scheme
    shades = page.script(
        """return [...document.querySelectorAll("#legend .mark")].map((mark) => {
          const {backgroundColor, borderBottom} = getComputedStyle(mark);
          return backgroundColor + borderBottom;
        })"""
    )
    assert len(set(shades)) == len(shades) == 7  # two for the target, five positions
    paper = page.script("return getComputedStyle(document.documentElement).backgroundColor")
    assert (int(paper.split("(")[1].split(",")[0]) > 128) == (scheme == "light")


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(page, width) -> None:
    resize(page.driver, width, 740)
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    page.script("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.script(overflow) == 0 and page.script("return innerWidth") == width
    page.fill(prompt="zebras " * 30 + "z" * 200, max_new_tokens=60, temperature=3, seed=1)
    page.click("#compare")
    page.wait()
    for element in page.driver.find_elements("css selector", ".token")[::12]:
        page.script("arguments[0].focus()", element)
        tip = page.script("return document.querySelector('#tip').getBoundingClientRect().toJSON()")
        assert page.find("#tip").is_displayed() and tip["left"] >= 0 and tip["right"] <= width
        assert page.script(overflow) == 0 and page.script("return innerWidth") == width
    tall = page.script("return [...document.querySelectorAll('.buttons button')].map((each) => each.offsetHeight)")
    assert min(tall) >= 44 and max(tall) < 60  # a finger's size, and no word is broken


def test_less_motion_where_it_is_wished(page) -> None:
    moving = "return document.getAnimations().length"
    page.script("document.querySelector('#cards').className = 'running'")  # the caret blinks
    page.script(
        "document.querySelector('#cards').append(Object.assign(document.createElement('p'), {className: 'answer'}))"
    )
    assert page.script(moving) == 1
    prefer(page.driver, prefers_reduced_motion="reduce")
    assert page.script(moving) == 0
