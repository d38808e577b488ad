"""draft-train from end to end, as a user types it."""

import json
import sys

import pytest
from conftest import save_tiny_target

from draft.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    save_tiny_target(root / "target")
    lines = (json.dumps({"question": f"what is {n} plus {n * 3 % 17}?"}) for n in range(60))
    (root / "questions.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture
def run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*words):
        """Exit status and everything printed."""
        monkeypatch.setattr(sys, "argv", ["draft-train", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


COMMON = ("--target", "target", "--dtype", "float32")


def test_the_whole_path(run, folder):
    prepare = ("prepare", *COMMON, "--prompts", "questions.jsonl", "--max-new-tokens", 20, "--held-out-share", 0.4,
               "--out", "data")  # fmt: skip
    assert run(*prepare)[0] == 0
    assert "complete" in run(*prepare)[1].lower()
    status, shown = run("inspect", "data", "--examples", 1)
    assert status == 0 and "what is" in shown
    train = ("--data", "data", "--max-steps", 20, "--draft-steps", 2, "--eval-every", 0)
    status, shown = run("pretrain", *COMMON, *train, "--draft-vocab-size", 200, "--out", "base")
    assert status == 0 and "draft-train merge base" in shown
    status, shown = run("adapt", *COMMON, *train, "--head", "base/head", "--rank", 4, "--out", "run", "training.seed=3")
    assert status == 0 and "seed: 3" in (folder / "run" / "config.yaml").read_text()
    assert run("merge", "run", "--out", "head")[0] == 0
    assert {path.name for path in (folder / "head").iterdir()} == {
        "config.json",
        "draftsmith.json",
        "model.safetensors",
    }
    compare = (
        "compare",
        *COMMON,
        "--baseline",
        "base/head",
        "--candidate",
        "head",
        "--data",
        "data",
        "--out",
        "report",
    )
    status, shown = run(*compare)
    report = json.loads((folder / "report" / "comparison.json").read_text())
    assert status == (0 if report["verdict"] == "ship" else 1)
    assert report["verdict"] in shown.lower().replace("’", "'")
    assert {path.name for path in (folder / "report").iterdir()} == {
        "comparison.json",
        "comparison.md",
        "comparison.png",
    }


def test_a_head_compared_with_itself_is_not_shipped(run, folder):
    if not (folder / "head").exists():
        test_the_whole_path(run, folder)
    status, _ = run("compare", *COMMON, "--baseline", "head", "--candidate", "head", "--data", "data", "--out", "same")
    assert status == 1


@pytest.mark.parametrize("command", ["prepare", "inspect", "pretrain", "adapt", "merge", "compare"])
def test_help_has_an_example(run, command):
    status, shown = run(command, "--help")
    assert status == 0 and f"draft-train {command}" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("adapt", "--data", "d", "--out", "o"), "--head"),
        (("adapt", "--head", "h", "--data", "d", "--out", "o", "adapter.rang=3"), "adapter.rang"),
        (("adapt", "--head", "h", "--data", "nowhere", "--out", "o", *COMMON), "nowhere"),
        (("pretrain", "--data", "d", "--out", "o", "--target", "missing.gguf"), "missing.gguf"),
        (("merge", "nowhere", "--out", "o"), "nowhere"),
        (("prepare", "--out", "x", "--prompts", "absent.jsonl", *COMMON), "absent.jsonl"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(run, words, said):
    status, shown = run(*words)
    assert status == 2
    assert said in shown and "Traceback" not in shown
    assert shown.strip().count("\n") == 0 and shown.startswith("draft-train: ")
