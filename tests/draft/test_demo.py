"""`draft-train demo`: the options that it serves the heads with, and its summary."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny_head, make_tiny_target, save_tiny_target
from rich.console import Console

from draft import demo
from draft.heads.checkpoint import save_head


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setattr(demo, "console", Console(file=io.StringIO(), width=120))
    return demo.console.file  # type: ignore[return-value]


def test_the_served_request_is_drafted_with_the_tables_length(
    tmp_path: Path, shown: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real server; the automatic mode would draft one token or none here."""
    monkeypatch.setattr(demo, "QUESTION", "What?")  # the tiny target knows no long prompts
    target = save_tiny_target(tmp_path / "target")
    save_head(make_tiny_head(make_tiny_target()), tmp_path / "head", dtype=target.stored_dtype, about={})
    options = ["--target", str(tmp_path / "target"), "--mode", "eager", "--no-warm-up"]
    details = demo.ask(str(tmp_path / "target"), options, str(tmp_path / "head"))["details"]
    speculative = details["speculative"]
    assert "--speculation chain --speculation-length 5" in shown.getvalue()
    assert speculative["drafted"] > 2 * speculative["verifications"], speculative


def answer(text: str) -> dict[str, Any]:
    details = {"generated_tokens": 10, "speculative": {"acceptance_length": 1.5}}
    return {"generated_text": text, "details": details, "seconds": 1.0}


@pytest.mark.parametrize(
    ("text", "message", "other"),
    [
        ("81", "Both heads gave the same text, as greedy decoding should.", "differ"),
        ("82", "The heads' texts differ: at a near tie", "as greedy decoding should"),
    ],
)
def test_message_about_the_two_texts(shown: io.StringIO, text: str, message: str, other: str) -> None:
    comparison = {"domain": None, "general": None, "deciding_length": 5, "summary": "Nothing was compared."}
    demo.summarise(comparison, {"base": answer("81"), "adapted": answer(text)})
    assert message in shown.getvalue() and other not in shown.getvalue()
    assert "served with a chain of 5" in shown.getvalue()
