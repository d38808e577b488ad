"""`draft-train demo`: the commands that it composes, what it serves the heads with, and its summary."""

import io
import json
import shlex
import shutil
import sys
from dataclasses import replace
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import typer
from conftest import byte_tokenizer, make_tiny_head, make_tiny_target, save_tiny_target
from rich.console import Console
from written_data import prepared

import draft.cli
import serving.cli
from draft import demo
from draft.data.dataset import Row, open_dataset, write_dataset
from draft.data.settings import Settings
from draft.errors import UserError
from draft.evaluation.compare import record_trained_rows
from draft.files import write_json
from draft.heads.checkpoint import save_head
from draft.target import Target, load_target
from draft.training.batches import load_rows
from draft.training.config import SECTIONS, RunSettings, resolve
from draft.training.model import settle, starting_head

PROMPTS = [f"A prompt with the number {number}." for number in range(8)]
INTERVAL = {"value": 2.0, "low": 1.9, "high": 2.1}
RESULT = {"baseline": {"acceptance_length": INTERVAL}, "candidate": {"acceptance_length": INTERVAL}}
DOMAIN = {"greedy": {"speculation_lengths": [{**RESULT, "gain": {"value": 0.25, "low": 0.2, "high": 0.3}}]}}
QUIET = Console(quiet=True)
COMPARISON = {"domain": DOMAIN, "general": None, "deciding_length": 1, "summary": "A verdict."}


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


def parsed(line: str) -> dict[str, Any]:
    """The options that a command line gives; its program's parser, or the command's settings, refuse wrong ones."""
    program, *words = shlex.split(line)
    command: Any = typer.main.get_command(draft.cli.app if program == "draft-train" else serving.cli.cli)
    if program == "draft-train":
        command = command.commands[words.pop(0)]
    options = command.make_context(program, words).params
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if command.name == "prepare":
        Settings.checked({name: given[name] for name in Settings.model_fields if name in given})
    if command.name == "adapt":
        settings_of(given)
    return given


def settings_of(given: dict[str, Any]) -> RunSettings:
    """The settings of the options of `draft-train adapt`."""
    known = {name for section in SECTIONS.values() for name in section.model_fields}
    return resolve("adapt", str(given["out"]), flags={name: given[name] for name in known if name in given})


@pytest.fixture
def run_demo(world, tmp_path, monkeypatch):
    """`demo()` whose commands are parsed, and not run: its arguments -> all that it prints.

    statuses: exit statuses of the commands, where not 0; general: the data set of general conversations.
    """

    def run(statuses=None, general=None, **arguments):
        def execute(command, check):
            assert command[:3] == [sys.executable, "-m", "draft.cli"] and not check
            options = parsed(shlex.join(["draft-train", *command[3:]]))
            if command[3] == "prepare":
                written = general if general and options["out"].name == "general" else world / "data"
                shutil.copytree(written, options["out"])
            if command[3] == "compare":
                write_json(options["out"] / "comparison.json", COMPARISON)
            return CompletedProcess(command, (statuses or {}).get(command[3], 0))

        def serve(model, heads, prompts):
            for head in heads.values():
                parsed(shlex.join(["draft-serve", *model, "--head", head]))
            answer = {"generated_text": "An answer.", "details": {"generated_tokens": 4}, "seconds": 0.5}
            return {name: [answer] for name in heads}

        out = io.StringIO()
        (tmp_path / "out" / "report").mkdir(parents=True)
        monkeypatch.setattr(demo, "console", Console(file=out, width=200))
        monkeypatch.setattr(demo.subprocess, "run", execute)
        monkeypatch.setattr(demo, "serve_in_turn", serve)
        monkeypatch.setattr("draft.target.load_tokenizer", lambda name: byte_tokenizer())
        monkeypatch.setattr("draft.target.load_target", lambda *_: load_target(str(world / "target"), "float32"))
        usual = {"target": str(world / "target"), "head": str(world / "base"), "prompts": world / "prompts.jsonl"}
        demo.demo(out=tmp_path / "out", **{**usual, **arguments})
        return out.getvalue()

    return run


def lines_of(shown: str, start: str) -> list[str]:
    """The command lines in what is printed, each after `start`."""
    return [line.removeprefix(start) for line in shown.splitlines() if line.startswith(f"{start}draft-")]


def test_each_command_is_one_that_its_program_takes(run_demo):
    shown = run_demo({"compare": 1})  # "don't ship" is a result, too
    run, advised = lines_of(shown, "$ "), lines_of(shown, "  ")
    assert [line.split()[1] for line in run] == ["prepare", "prepare", "adapt", "merge", "compare"]
    assert [line.split()[:2] for line in advised[:3]] == [
        ["draft-train", each] for each in ("prepare", "adapt", "merge")
    ]
    assert advised[3].startswith("draft-serve ") and len(advised) == 4
    for line in advised:
        parsed(line)
    assert "+25.0% [+20.0%, +30.0%]" in shown and "An answer." in shown


@pytest.mark.parametrize(
    ("tickets", "own", "used"),
    [(True, None, "shipped"), (True, "mine", "mine"), (False, None, None), (False, "mine", "mine")],
)
def test_the_adapter_that_ships_is_for_the_tickets_alone(run_demo, world, monkeypatch, tickets, own, used):
    if tickets:
        monkeypatch.setattr(demo, "TICKETS", world / "prompts.jsonl")
    monkeypatch.setattr(demo, "FINE_TUNED", "shipped")
    shown = run_demo(target="smollm2", target_adapter=own)
    run, advised = lines_of(shown, "$ "), lines_of(shown, "  ")
    for lines, adapter in ((run, used), (advised, own)):
        found = [parsed(line) for line in lines if " merge " not in line]
        assert {each["target"] for each in found} == {"smollm2"}
        assert {each.get("target_adapter") for each in found} == {adapter}


def started(shown: str, target: Target) -> None:
    """Begin the run of the demonstration's `adapt`, up to the first step."""
    settings = settings_of(parsed(next(line for line in lines_of(shown, "$ ") if " adapt " in line)))
    rows, _ = load_rows(settings, target, QUIET)
    head, _ = starting_head(settings, target, rows, QUIET)
    settle(settings, head)


@pytest.mark.parametrize(
    ("architecture", "options", "steps"),
    [("eagle3", {}, 3), ("eagle", {}, 3), ("medusa", {"num_heads": 2}, 2), ("medusa", {"num_heads": 4}, 3)],
)
def test_a_head_of_any_architecture_is_adapted(run_demo, world, tmp_path, architecture, options, steps):
    target = load_target(str(world / "target"), "float32")
    head = make_tiny_head(target, architecture=architecture, **options)
    save_head(head, tmp_path / "head", dtype=target.stored_dtype, about={})
    shown = run_demo(head=str(tmp_path / "head"))
    started(shown, target)
    assert f"--draft-steps {steps}" in shown and ("--rebuild-vocabulary" in shown) == (architecture != "eagle")


def test_a_head_of_another_target_is_refused_before_the_work(run_demo, world, tmp_path):
    target = make_tiny_target(hidden_size=48)
    save_head(make_tiny_head(target), tmp_path / "head", dtype=target.stored_dtype, about={})
    with pytest.raises(UserError, match="the head's hidden size is 48 and the target's is 32"):
        run_demo(head=str(tmp_path / "head"))
    assert not (tmp_path / "out" / "data").exists()


def test_a_head_that_knows_the_held_out_rows_is_refused_before_it_is_trained(run_demo, world, tmp_path):
    rows = list(open_dataset(world / "data").rows("held-out"))
    about = {"trained_rows": record_trained_rows(rows[:1], {})}
    save_head(make_tiny_head(make_tiny_target()), tmp_path / "head", dtype=torch.float32, about=about)
    with pytest.raises(UserError, match=f"was trained on 1 of the {len(rows)} domain rows that are held out"):
        run_demo({"adapt": 1}, head=str(tmp_path / "head"))


@pytest.mark.parametrize("tokens", [0, 20])
def test_few_general_conversations_are_a_smaller_share(run_demo, world, tmp_path, tokens):
    data = open_dataset(world / "data")
    rows = data.rows("train")
    few = [replace(rows[0], ids=rows[0].ids[-tokens:], mask=rows[0].mask[-tokens:], prompt_length=1)] if tokens else []
    (tmp_path / "few").mkdir()
    write_dataset(tmp_path / "few", few, data.manifest)
    shown = run_demo(general=tmp_path / "few")
    percent = 100 * tokens // (tokens + sum(len(row.ids) for row in rows))
    assert f"\n{percent} % of the training tokens are general ones, not 15 %" in shown
    assert (f"--mix-general {percent / 100} --general " in shown) == bool(tokens) == ("--mix-general" in shown)
    started(shown, load_target(str(world / "target"), "float32"))


@pytest.mark.parametrize(("tokens", "percent"), [(0, 0), (3, 3), (15, 14), (16, 15), (99, 15)])
def test_the_share_is_one_that_adapt_takes(world, tmp_path, tokens, percent):
    target, manifest = load_target(str(world / "target"), "float32"), open_dataset(world / "data").manifest
    for name, length in (("data", 85), ("general", tokens)):
        mask = [False] * 2 + [True] * (length - 2)
        rows = [Row(name, [5] * length, mask, 2, 0.0, 1.0, "a file", "train")] if length else []
        (tmp_path / name).mkdir()
        write_dataset(tmp_path / name, rows, manifest)
    assert demo.general_percent(tmp_path / "data", tmp_path / "general") == percent
    flags = {"head": "h", "data": [str(tmp_path / "data")], "mix_general": percent / 100}
    flags |= {"general": str(tmp_path / "general")} if percent else {}
    assert len(load_rows(resolve("adapt", "o", flags=flags), target, QUIET)[0]) == 1 + bool(percent)


def test_a_command_that_fails_ends_the_demonstration(run_demo):
    with pytest.raises(UserError, match="`draft-train adapt` ended with status 2; its message is above"):
        run_demo({"adapt": 2})


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
    for text, message in ((None, "Both heads gave the same text"), ("other", "The heads' texts differ: at a near tie")):
        out.truncate(0)
        if text:
            answers["adapted"][-1]["generated_text"] = text
        demo.summarise(COMPARISON, answers, "A question?")
        shown = out.getvalue()
        assert message in shown and "+25.0% [+20.0%, +30.0%]" in shown and "median of 2 answers" in shown
        assert "A question?" in shown and "A verdict." in shown


def test_a_refused_request_is_reported(world, monkeypatch):
    monkeypatch.setattr(demo, "console", Console(file=io.StringIO()))
    model, heads = ["--target", str(world / "target")], {"base": str(world / "base")}
    with pytest.raises(UserError, match="draft-serve answered with status 4"):
        demo.serve_in_turn(model, heads, ["x" * 600], 16, ["--mode", "eager", "--no-warm-up"])
