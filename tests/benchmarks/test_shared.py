"""Command lines, errors and prompts of all benchmarks."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target

from benchmarks import acceptance_length, shared
from draft import demo
from draft.data.records import records
from draft.heads.checkpoint import save_head


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"turns": ["one"', "not JSON"),
        ('["one"]', "not a JSON object"),
        ('{"text": "one"}', "has text, and none of turns, prompt, question"),
        ('{"turns": ["one", 2]}', "`turns` must be text"),
        ('{"question": "  "}', "`question` must be text"),
        ('{"id": "a", "turns": ["one"]}', "id 'a' was used at"),
        ('{"turns": ["\\ud800"]}', "surrogate"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, complaint):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"id": "a", "turns": ["fine"]}\n\n' + line + "\n")
    with pytest.raises(shared.UserError, match="line 3: ") as caught:
        shared.load_prompts(file)
    assert complaint in str(caught.value) and str(file) in str(caught.value)


def test_mistakes_are_one_sentence(models, tmp_path, capsys):
    about = {"target_fingerprint": "beef"}
    save_head(make_tiny_head(make_tiny_target()), tmp_path / "foreign", dtype=torch.float64, about=about)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "taken").write_text("a file")
    for options, complaint in (
        (("--temperature", "nan"), "'nan' is not a number between 0 and 100"),
        (("--speculation-length", "0"), "'0' is not a whole number of at least 1"),
        (("--rule", "best"), "invalid choice: 'best'"),
        (("--heads", "x"), "unrecognized arguments: --heads"),
        (("--head", str(tmp_path / "foreign")), "was made for target beef"),
        (("--prompts", str(tmp_path / "gone.jsonl")), "no such file"),
        (("--prompts", str(tmp_path / "empty.jsonl")), "has no prompts"),
        (("--out", str(tmp_path / "taken")), "cannot be a folder"),
        (("--speculation-length", "99"), "speculation_length = 99"),
        (("--dtype", "int3"), "int3"),
    ):
        base = f"--target {models}/target --head {models}/first --limit 1 --out {tmp_path}/out".split()
        try:
            status: object = acceptance_length.main([*base, *options])
        except SystemExit as ended:  # of argparse
            status = ended.code
        message = capsys.readouterr().err
        assert status == 2 and complaint in message.splitlines()[-1] and "Traceback" not in message, message


def test_a_file_error_is_one_line_and_a_bug_is_not(capsys):
    def run_body(body):
        return shared.run_program(lambda arguments: Namespace(), lambda parsed, command: body(), [])

    assert run_body(lambda: len(Path("/dev/null/results.json").read_text())) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: '/dev/null/results.json' could not be read") and message.count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        run_body(lambda: 1 // 0)


def test_default_prompts_and_the_columns_that_are_read(tmp_path):
    shipped = shared.load_prompts()
    assert len(shipped.prompts) >= 80 and "benchmarks/prompts/chat.jsonl" in shipped.files
    assert len({prompt.category for prompt in shipped.prompts}) == 8
    assert len({prompt.category for prompt in shared.load_prompts(limit=8).prompts}) == 8
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["one", "two"], "reference": []},
        {"prompt": "three"},
        {"id": "x", "question": "four \u2028 five"},
    ]
    file = tmp_path / "file.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    found = {prompt.id: (prompt.category, prompt.turns) for prompt in shared.load_prompts(file).prompts}
    assert found == {
        "81": ("writing", ("one", "two")),
        "file-2": ("file", ("three",)),
        "x": ("file", ("four \u2028 five",)),
    }


def normalised(text: str) -> str:
    """Keep letters and digits only, so that a change of spacing or punctuation does not hide a duplicate."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def sentences(texts: list[str]) -> set[str]:
    return {normalised(part) for text in texts for part in re.split(r"[.?!\n]", text) if len(part.split()) >= 4}


def test_shipped_prompts_are_different_and_are_not_trained_on():
    """The demonstration trains on answers to its own prompts: not one sentence may be a benchmark sentence."""
    turns = [turn for prompt in shared.load_prompts().prompts for turn in prompt.turns]
    assert len({normalised(turn) for turn in turns}) == len(turns) >= 80
    assert all(turn == turn.strip() and 3 <= len(turn.split()) <= 200 for turn in turns)
    files = demo.TICKETS, demo.GENERAL_PROMPTS
    prompts = [row["prompt"] for file in files for _, row in records(str(file))]
    benchmark, trained = sentences(turns), sentences(prompts)
    assert len(benchmark) > 100 and len(trained) > 300 and not benchmark & trained


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: --x 1\nb: ''\n", None),
        ("- a\n", "must map names to flags"),
        ("a: 3\n", "must map names to flags"),
        ("1: --x\n", "must map names to flags"),
        ("a: [\n", "could not be read"),
        (None, "could not be read"),
    ],
)
def test_named_flags(tmp_path, text, message):
    file = tmp_path / "flags.yaml"
    if text is not None:
        file.write_text(text)
    if message is None:
        assert shared.named_flags("--settings", str(file)) == {"a": "--x 1", "b": ""}
        return
    with pytest.raises(shared.UserError, match=message):
        shared.named_flags("--settings", str(file))
