"""GET /: the page that shows speculation at work, one HTML document that needs nothing else."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse

router = APIRouter()

_SCRIPTS = ("api.js", "figures.js", "view.js", "main.js")  # one after the other, in one module


@router.get("/", response_class=HTMLResponse)
async def page() -> Response:
    """Holds no data, and asks the public API as any other client does."""
    document, policy = _document()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(document, media_type="text/html; charset=utf-8", headers=headers)


@cache
def _document() -> tuple[str, str]:
    """The page with its style and script in it, and the policy under which a browser runs those two and no others."""
    folder = files("serving") / "page"
    style = (folder / "style.css").read_text("utf-8")
    script = "".join((folder / name).read_text("utf-8") for name in _SCRIPTS)
    document = (folder / "index.html").read_text("utf-8")
    for place, text in (("/* style */", style), ("/* script */", script)):
        document = document.replace(place, text)
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",  # no text of an answer ever becomes markup
    }
    return document, "; ".join(f"{name} {value}" for name, value in policy.items())


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
