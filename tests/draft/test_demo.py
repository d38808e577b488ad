"""`draft-train demo`: what it serves the heads with, and its summary."""

import io
import json

import pytest
from conftest import make_tiny_head, make_tiny_target, save_tiny_target
from rich.console import Console
from written_data import prepared

from draft import demo
from draft.errors import UserError
from draft.heads.checkpoint import save_head

PROMPTS = [f"A prompt with the number {number}." for number in range(8)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny target, two heads of it, a file of prompts and the data set that the target wrote to them."""
    root = tmp_path_factory.mktemp("demo")
    target = save_tiny_target(root / "target")
    for seed, name in enumerate(("base", "adapted")):
        save_head(make_tiny_head(make_tiny_target(), seed), root / name, dtype=target.stored_dtype, about={})
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    prepared(target, root / "data", prompts=[root / "prompts.jsonl"], max_new_tokens=12, held_out_share=0.5)
    return root


def test_what_ships():
    """The demonstration's prompts, its general ones and the adapter of its target are there, and small."""
    for path, count in ((demo.TICKETS, 200), (demo.GENERAL_PROMPTS, 96)):
        rows = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
        assert len(set(rows)) == len(rows) == count and path.stat().st_size < 300_000
    assert sum(file.stat().st_size for file in demo.FINE_TUNED.iterdir()) < 2_000_000


def test_served_prompts_are_held_out(world):
    chosen = demo.held_out_prompts(str(world / "target"), world / "prompts.jsonl", world / "data", 3)
    prompts = [prompt for prompt, _ in chosen]
    assert len(set(prompts)) == 3 and set(prompts) < set(PROMPTS)
    assert all(text == f"<|im_start|>user\n{each}<|im_end|>\n<|im_start|>assistant\n" for each, text in chosen)
    every = [
        prompt for prompt, _ in demo.held_out_prompts(str(world / "target"), world / "prompts.jsonl", world / "data", 9)
    ]
    assert len(every) == 4 and every[:3] == prompts  # half of them


def test_both_heads_answer_each_prompt_in_the_automatic_mode(world, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(demo, "console", Console(file=out, width=200))
    model = ["--target", str(world / "target")]
    heads = {name: str(world / name) for name in ("base", "adapted")}
    texts = [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" for prompt in PROMPTS[:5]]
    options = ["--mode", "eager", "--no-warm-up"]
    answers = demo.serve_in_turn(model, heads, texts, 16, options)
    assert "--speculation" not in out.getvalue() and out.getvalue().count("$ draft-serve") == 2
    assert {name: len(each) for name, each in answers.items()} == {"base": 2, "adapted": 2}  # 3 to warm up
    for base, adapted in zip(answers["base"], answers["adapted"], strict=True):
        assert base["generated_text"] == adapted["generated_text"] and base["seconds"] > 0
    assert all(speed > 0 for speed in demo.speeds(answers["base"]))
    interval = {"value": 2.0, "low": 1.9, "high": 2.1}
    result = {"baseline": {"acceptance_length": interval}, "candidate": {"acceptance_length": interval}}
    domain = {"greedy": {"speculation_lengths": [{**result, "gain": {"value": 0.25, "low": 0.2, "high": 0.3}}]}}
    comparison = {"domain": domain, "general": None, "deciding_length": 1, "summary": "A verdict."}
    for text, message in ((None, "Both heads gave the same text"), ("other", "The heads' texts differ: at a near tie")):
        out.truncate(0)
        if text:
            answers["adapted"][-1]["generated_text"] = text
        demo.summarise(comparison, answers, "A question?")
        shown = out.getvalue()
        assert message in shown and "+25.0% [+20.0%, +30.0%]" in shown and "median of 2 answers" in shown
        assert "A question?" in shown and "A verdict." in shown


def test_a_refused_request_is_reported(world, monkeypatch):
    monkeypatch.setattr(demo, "console", Console(file=io.StringIO()))
    model, heads = ["--target", str(world / "target")], {"base": str(world / "base")}
    with pytest.raises(UserError, match="draft-serve answered with status 4"):
        demo.serve_in_turn(model, heads, ["x" * 600], 16, ["--mode", "eager", "--no-warm-up"])
