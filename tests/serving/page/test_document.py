"""GET /: one document that needs nothing else, under a policy that allows nothing else. No browser is needed."""

from __future__ import annotations

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
    assert (
        head.status_code == 200
        and head.text == ""
        and head.headers.items() >= answer.headers.items() - {("x-request-id", answer.headers["x-request-id"])}
    )
    return answer


def test_it_is_one_html_document(answer) -> None:
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


def test_the_policy_allows_this_style_this_script_and_this_server(answer) -> None:
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        [text] = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(directive) == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }


def test_every_field_has_a_label(answer) -> None:
    ids = set(re.findall(r"<(?:input|textarea) id=\"(\w+)\"", answer.text))
    assert ids == set(
        ["prompt", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop_strings", "num_tokens", "key"]
    )
    assert ids == set(re.findall(r"<label for=\"(\w+)\"", answer.text))
