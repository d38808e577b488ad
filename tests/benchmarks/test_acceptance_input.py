"""What benchmarks.acceptance_length is given: prompts that are left out, mistakes that end in one line."""

import json
from pathlib import Path

import pytest
import torch
from acceptance_runs import run, write_jsonl
from conftest import make_tiny_head, make_tiny_target

from benchmarks import acceptance_length, shared
from draft.errors import UserError
from draft.heads.checkpoint import save_head


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"turns": ["one"', "not JSON"),
        ('["one"]', "not a JSON object"),
        ('{"text": "one"}', "has text, and none of turns, prompt, question"),
        ('{"turns": []}', "`turns` must be text"),
        ('{"turns": ["one", 2]}', "`turns` must be text"),
        ('{"question": "  "}', "`question` must be text"),
        ('{"id": "a", "turns": ["one"]}', "id 'a' was used at"),
        ('{"turns": ["\\ud800"]}', "surrogate"),
        (b'{"turns": ["\xff"]}', "not UTF-8"),
    ],
)
def test_a_malformed_line_is_named(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str | bytes, complaint: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(
        b'{"id": "a", "turns": ["fine"]}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    )
    assert run(models, tmp_path / "out", "--prompts", str(file)) == 2
    message = capsys.readouterr().err
    assert f"{file}, line 3: " in message and complaint in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--temperature", "-1"), "'-1' is not a number between 0 and 100"),
        (("--temperature", "nan"), "'nan' is not a number"),
        (("--speculation-length", "0"), "'0' is not a whole number of at least 1"),
        (("--max-new-tokens", "1"), "at least 2"),
        (("--rule", "best"), "invalid choice: 'best'"),
        (("--heads", "x"), "unrecognized arguments: --heads"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(models, tmp_path, *options)
    message = capsys.readouterr().err
    assert ended.value.code == 2 and complaint in message and message.count("\n") == 1


def test_missing_files_and_a_head_of_another_target_exit_2(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = make_tiny_target()
    save_head(make_tiny_head(target), tmp_path / "foreign", dtype=torch.float64, about={"target_fingerprint": "beef"})
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "taken").write_text("a file")
    head = str(models / "first")
    for options, complaint in (
        (("--head", str(tmp_path / "foreign")), "was made for target beef"),
        (("--head", str(tmp_path / "nowhere")), "no config.json"),
        (("--head", head, "--prompts", str(tmp_path / "gone.jsonl")), "no such file"),
        (("--head", head, "--prompts", str(tmp_path / "empty.jsonl")), "has no prompts"),
        (("--head", head, "--out", str(tmp_path / "taken")), "cannot be a folder"),
        (("--head", head, "--speculation-length", "99"), "speculation_length = 99"),
        (("--head", head, "--dtype", "int3"), "int3"),
    ):
        target_options = ("--target", str(models / "target"), "--limit", "1", "--out", str(tmp_path / "out"))
        assert acceptance_length.main([*target_options, *options]) == 2, options
        message = capsys.readouterr().err
        assert complaint in message.splitlines()[-1] and "Traceback" not in message, message


def test_default_prompts_and_the_columns_that_are_read(tmp_path: Path) -> None:
    shipped = shared.load_prompts()
    assert len(shipped.prompts) >= 80
    assert "benchmarks/prompts/chat.jsonl" in shipped.files
    assert len({prompt.category for prompt in shipped.prompts}) == 8
    assert len({prompt.category for prompt in shared.load_prompts(limit=8).prompts}) == 8
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["one", "two"], "reference": []},
        {"prompt": "three"},
        {"id": "x", "question": "four \u2028 five"},
    ]
    file = tmp_path / "own.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    found = {prompt.id: (prompt.category, prompt.turns) for prompt in shared.load_prompts(file).prompts}
    assert found == {
        "81": ("writing", ("one", "two")),
        "own-2": ("own", ("three",)),
        "x": ("own", ("four \u2028 five",)),
    }
    with pytest.raises(UserError, match="is a folder"):
        shared.load_prompts(tmp_path)


def test_prompts_too_long_for_the_context_are_left_out_and_named(models: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", [{"id": "long", "turns": ["x" * 500]}, {"id": "short", "turns": ["y"]}])
    options = ("--prompts", str(file), "--temperature", "0", "--speculation-length", "2")
    assert run(models, tmp_path, *options) == 0
    results = json.loads((tmp_path / "acceptance_length.json").read_text())
    assert results["skipped"] == ["long"]
    assert {record["prompt"] for record in results["records"]} == {"short"}


def test_trouble_with_a_file_is_one_line_and_a_fault_of_ours_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert shared.run_program(lambda: len(Path("/dev/null/results.json").read_text())) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: '/dev/null/results.json' could not be read") and message.count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        shared.run_program(lambda: 1 // 0)
