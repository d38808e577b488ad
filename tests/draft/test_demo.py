"""`draft-train demo`: the options that it serves the heads with, and its summary."""

import io

from conftest import make_tiny_head, make_tiny_target, save_tiny_target
from rich.console import Console

from draft import demo
from draft.heads.checkpoint import save_head


def test_the_served_request_is_drafted_with_the_tables_length(tmp_path, monkeypatch):
    """A real server; the automatic mode would draft one token or none here."""
    out = io.StringIO()
    monkeypatch.setattr(demo, "console", Console(file=out, width=120))
    monkeypatch.setattr(demo, "QUESTION", "What?")  # the tiny target knows no long prompts
    target = save_tiny_target(tmp_path / "target")
    save_head(make_tiny_head(make_tiny_target()), tmp_path / "head", dtype=target.stored_dtype, about={})
    options = ["--target", str(tmp_path / "target"), "--mode", "eager", "--no-warm-up"]
    answer = demo.ask(str(tmp_path / "target"), options, str(tmp_path / "head"))
    speculative = answer["details"]["speculative"]
    assert "--speculation chain --speculation-length 5" in out.getvalue()
    assert speculative["drafted"] > 2 * speculative["verifications"], speculative
    comparison = {"domain": None, "general": None, "deciding_length": 5, "summary": "Nothing was compared."}
    for text, message in (
        (answer["generated_text"], "Both heads gave the same text"),
        ("other", "The heads' texts differ: at a near tie"),
    ):
        out.truncate(0)
        demo.summarise(comparison, {"base": answer, "adapted": answer | {"generated_text": text}})
        shown = out.getvalue()
        assert message in shown and "served with a chain of 5" in shown
