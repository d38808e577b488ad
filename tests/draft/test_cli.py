"""draft-train from end to end, as a user types it."""

import json

import pytest
from conftest import save_tiny_target
from written_data import served

from draft.target import load_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    save_tiny_target(root / "target")
    lines = (json.dumps({"question": f"what is {n} plus {n * 3 % 17}?"}) for n in range(40))
    (root / "questions.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def server(folder):
    """The options of a running server of the target."""
    with served(load_target(str(folder / "target"), "float32")) as settings:
        yield "--endpoint", settings.endpoint


@pytest.fixture
def run(folder, monkeypatch, draft_train):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")
    return draft_train


COMMON = ("--target", "target", "--dtype", "float32")
ARCHITECTURES = {
    "eagle3": ("--draft-vocab-size", 200),
    "eagle": ("--architecture", "eagle"),
    "medusa": ("--architecture", "medusa", "--head-options", "num_heads=2", "--draft-vocab-size", 200),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_whole_path(run, folder, architecture):
    prepare = ("prepare", *COMMON, "--prompts", "questions.jsonl", "--max-new-tokens", 20, "--held-out-share", 0.4,
               "--out", "data")  # fmt: skip
    assert run(*prepare)[0] == 0
    assert "complete" in run(*prepare)[1].lower()
    status, shown = run("inspect", "data", "--examples", 1)
    assert status == 0 and "what is" in shown
    train = ("--data", "data", "--max-steps", 6, "--draft-steps", 2, "--eval-every", 0)
    base, adapted, head = (f"{architecture}-{name}" for name in ("base", "run", "head"))
    status, shown = run("pretrain", *COMMON, *train, *ARCHITECTURES[architecture], "--out", base)
    assert status == 0 and f"draft-train merge {base}" in shown
    adapt = ("adapt", *COMMON, *train, "--head", f"{base}/head", "--out", adapted, "training.seed=3")
    adapt += ("--method", "afa-lora", "--rank", 4)
    status, shown = run(*adapt)
    settings = (folder / adapted / "config.yaml").read_text()
    assert status == 0 and "seed: 3" in settings and f"architecture: {architecture}\n" in settings
    assert run("merge", adapted, "--out", head)[0] == 0
    assert {path.name for path in (folder / head).iterdir()} == {"config.json", "draftsmith.json", "model.safetensors"}
    out = folder / f"{architecture}-report"
    heads = ("--baseline", f"{base}/head", "--candidate", head)
    status, shown = run("compare", *COMMON, *heads, "--data", "data", "--out", out)
    report = json.loads((out / "comparison.json").read_text())
    assert status == (0 if report["verdict"] == "ship" else 1)
    assert report["verdict"] in shown.lower().replace("’", "'")
    assert {path.name for path in out.iterdir()} == {"comparison.json", "comparison.md", "comparison.png"}


def test_a_place_that_cannot_be_written_to_is_one_sentence(run, folder):
    if not (folder / "eagle3-run" / "about.json").exists():
        test_the_whole_path(run, folder, "eagle3")
    for words in (
        ("prepare", *COMMON, "--prompts", "questions.jsonl"),
        ("export", "eagle3-head"),
        ("import", "eagle3-head", *COMMON),
        ("merge", "eagle3-run"),
        ("compare", *COMMON, "--baseline", "eagle3-head", "--candidate", "eagle3-head", "--data", "data"),
    ):
        for place in ("/dev/null/a/b", "questions.jsonl/a"):
            status, shown = run(*words, "--out", place)
            assert status == 2 and shown.startswith("draft-train: "), shown
            assert place[:8] in shown and "Traceback" not in shown and shown.strip().count("\n") == 0


def test_names_with_brackets_are_printed_as_they_are(run, folder, server):
    for out in ("odd/q[red]x", "odd/w[/b]", "odd/a:b:c"):
        words = ("prepare", *COMMON, *server, "--prompts", "questions.jsonl", "--num-prompts", 4, "--max-new-tokens", 2)
        for _ in range(2):  # the second has nothing to do
            status, shown = run(*words, "--out", out)
            assert status == 0 and f"{out}: 4 rows" in shown.replace("3 rows to train on, 1", "4 rows"), shown
        assert f"{out} is complete" in shown
        status, shown = run("inspect", out)
        assert status == 0 and shown.startswith(f"{out}: target")


def test_one_prompts_flag_takes_several_files(run, folder, server):
    (folder / "more.jsonl").write_text(json.dumps({"prompt": "one more"}))
    files = ("--prompts", "questions.jsonl", "more.jsonl")
    status, shown = run("prepare", *COMMON, *server, "--max-new-tokens", 1, *files, "--out", "several")
    assert status == 0, shown
    manifest = json.loads((folder / "several" / "manifest.json").read_text())
    assert manifest["sources"] == ["questions.jsonl", "more.jsonl"] and manifest["counts"]["conversations"] == 41


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
        (("pretrain", "--data", "d", "--out", "o", "--architecture", "hydra"), "eagle3, eagle, medusa"),
        (("prepare", "--out", "x", "--prompts", "absent.jsonl", *COMMON), "absent.jsonl"),
        (("prepare", "--out", "x", "--greedy-share", "2", *COMMON), "--greedy-share is 2.0"),
        (("prepare", "--out", "x", "a.jsonl", "b.jsonl", *COMMON), "--prompts a.jsonl b.jsonl"),
        (("prepare", "--out", "x", "--endpoint", "http://127.0.0.1:9", "--weights", "int8"), "--weights is of a"),
        (("prepare", "--out", "x", "--concurrency", "2", *COMMON), "--concurrency is about a running server"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(run, words, said):
    status, shown = run(*words)
    assert status == 2
    assert said in shown and "Traceback" not in shown
    assert shown.strip().count("\n") == 0 and shown.startswith("draft-train: ")
