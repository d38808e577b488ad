"""GET /: one document that needs nothing else, under a policy that allows nothing else. No browser is needed."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from fastapi.testclient import TestClient

from serving.api.app import create_app


@pytest.fixture(scope="module")
def answer():
    """The page of a server that is still loading, and has a key: it holds no data."""
    with TestClient(create_app(None, api_key="secret")) as client:
        assert client.get("/info").status_code == 401
        head = client.head("/")
        answer = client.get("/")
    assert (head.status_code, head.text) == (200, "")
    assert {**head.headers, "x-request-id": ""} == {**answer.headers, "x-request-id": ""}
    return answer


def test_it_is_one_html_document(answer):
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text.startswith("<!doctype html>") and answer.text.rstrip().endswith("</html>")
    assert answer.headers["x-content-type-options"] == "nosniff"
    loads = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            names = dict(attributes)
            loads.extend(names[name] for name in ("src", "href", "action", "srcset") if name in names)
            assert not [name for name in names if name == "style" or name.startswith("on")], "the policy forbids it"

    Parser().feed(answer.text)
    assert len(loads) == 1 and loads[0].startswith("data:image/svg+xml,")  # the icon
    assert not re.search(r"@import|url\(|\bimport\b|innerHTML|insertAdjacentHTML|document\.write|\beval\b", answer.text)


def test_the_policy_allows_this_style_this_script_and_this_server(answer):
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        [text] = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(directive) == f"'sha256-{digest}'"
    nothing = dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'")
    allowed = {"img-src": "data:", "connect-src": "'self'", "require-trusted-types-for": "'script'"}
    assert policy == nothing | allowed


def test_every_field_has_a_label(answer):
    ids = set(re.findall(r"<(?:input|textarea) id=\"(\w+)\"", answer.text))
    fields = ["prompt", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop_strings", "num_tokens", "key"]
    assert ids == set(fields)
    assert ids == set(re.findall(r"<label for=\"(\w+)\"", answer.text))


def luminance(colour: str) -> float:
    """As WCAG 2.2 has it, of #rgb or #rrggbb."""
    digits = colour.removeprefix("#")
    pairs = [digit * 2 for digit in digits] if len(digits) == 3 else re.findall("..", digits)
    shares = [int(pair, 16) / 255 for pair in pairs]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_all_text_has_enough_contrast_in_both_schemes(answer):
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", answer.text, re.S)
    ]
    papers = {
        "text": "paper surface note-paper target copied d1 d2 d3 d4 d5",
        "muted": "paper surface",
        "on-accent": "accent",
        "bad": "bad-paper",
    }
    for scheme in schemes:
        for ink, names in papers.items():
            for paper in names.split():
                low, high = sorted(luminance(scheme[name]) for name in (ink, paper))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)
        assert len({scheme[name] for name in ("target", "copied", "d1", "d2", "d3", "d4", "d5")}) == 7  # a shade each
    assert [luminance(scheme["paper"]) > 0.5 for scheme in schemes] == [True, False]
