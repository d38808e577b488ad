"""kill -9 at any step, signals and full disks: the same command goes on, and ends with the same bits."""

import os
import random
import shutil
import signal

import pytest
import torch
from filelock import FileLock
from training_runs import Run, command, last_step, logged, weights
from written_data import served

from draft.errors import UserError
from draft.target import load_target
from draft.training.config import resolve
from draft.training.run import RunFolder, latest_snapshot


def assert_same_bits(one, other):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert not [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


@pytest.mark.parametrize(
    ("mode", "architecture", "accumulation", "count"),
    [
        ("pretrain", "eagle3", 3, 14),
        ("adapt", "eagle3", 1, 26),
        ("pretrain", "eagle", 2, 8),
        ("pretrain", "medusa", 1, 8),
    ],
)
def test_kill_9_at_a_random_step(made, tmp_path, mode, architecture, accumulation, count):
    """With eagle3 four epochs and more: hidden states of the first one are remembered, and batches regroup."""
    settings = ["--max-steps", str(count), "--save-every", "3", "--gradient-accumulation", str(accumulation)]
    Run(command(made, mode, tmp_path / "whole", *settings, architecture=architecture)).succeed()
    choice = random.Random(os.environ.get("KILL_SEED", mode + architecture))
    steps = sorted(step + choice.random() for step in choice.sample(range(4, count - 2), count // 7))
    arguments = command(made, mode, tmp_path / "killed", *settings, architecture=architecture)
    for step in steps:
        assert Run(arguments, signalled=(step, signal.SIGKILL)).wait() == -signal.SIGKILL
    Run(arguments).succeed()
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")
    assert logged(tmp_path / "whole", "beta") == logged(tmp_path / "killed", "beta")


def test_a_signal_ends_a_run_after_the_step_under_way(made, tmp_path):
    out, settings = tmp_path / "run", ["--max-steps", "16", "--save-every", "1000"]
    resume = ["pretrain", "--out", str(out), "--resume"]  # the settings need not be repeated
    begin = command(made, "pretrain", out, *settings)
    for arguments, signalled, status in ((begin, (4, signal.SIGINT), 130), (resume, (9, signal.SIGTERM), 143)):
        run = Run(arguments, signalled=signalled)
        assert run.wait() == status, run.output()
        step = last_step(out)
        assert step < 16 and f"saved after step {step}" in run.output() and "Traceback" not in run.output()
        assert latest_snapshot(out / "checkpoints").name == f"step-{step:07d}"
        assert (out / "training.png").is_file()
    Run(resume).succeed()
    Run(command(made, "pretrain", tmp_path / "whole", *settings)).succeed()
    assert_same_bits(tmp_path / "whole", out)


def test_resume_and_start_again(made, tmp_path):
    out = tmp_path / "run"
    run = Run([*command(made, "pretrain", out, "--max-steps", "3"), "--resume"])
    assert run.wait() == 2 and "holds no checkpoint" in run.output() and not out.exists()
    Run(command(made, "pretrain", out, "--max-steps", "3")).succeed()
    run = Run(command(made, "pretrain", out, "--max-steps", "4"))
    assert run.wait() == 2 and "training.max_steps was 3, is 4" in run.output()
    (out / "mine.txt").write_text("mine")
    run = Run(command(made, "pretrain", out, "--max-steps", "4", "--no-resume")).succeed()
    assert list(logged(out)) == [1, 2, 3, 4] and (out / "mine.txt").read_text() == "mine"
    # what a killed process left while it wrote the result
    (out / ".head.new-left").mkdir()
    # what the weights don't depend on may change
    run = Run(command(made, "pretrain", out, "--max-steps", "4", "--save-every", "1", "--log-with", "none")).succeed()
    assert "Continuing" in run.output() and not (out / ".head.new-left").exists()


def test_starting_again_discards_nothing_until_all_else_is_in_order(made, tmp_path):
    out = tmp_path / "run"
    Run(command(made, "pretrain", out, "--max-steps", "3")).succeed()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for mistake, said in (
        (["--head", str(tmp_path / "typo")], "typo"),
        (["--head", str(out / "head")], "would discard"),
        (["--data", str(tmp_path / "absent")], "absent"),
    ):
        run = Run([*command(made, "adapt", out), "--no-resume", *mistake])
        assert run.wait() == 2 and said in run.output(), run.output()
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_second_command_on_the_folder_is_refused(made, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / ".lock"):
        second = Run(command(made, "pretrain", out, "--max-steps", "8"))
        assert second.wait() == 2 and "another command trains in" in second.output(), second.output()
        assert [path.name for path in out.iterdir()] == [".lock"]


def test_a_full_disk_leaves_the_previous_checkpoint_whole(made, tmp_path):
    """RLIMIT_FSIZE: writing fails in the middle of a file, as on a full disk."""
    arguments = command(made, "pretrain", tmp_path / "run", "--max-steps", "8", "--save-every", "3")
    assert Run(arguments, signalled=(4, signal.SIGKILL)).wait() == -signal.SIGKILL
    before = {path.name: path.read_bytes() for path in (tmp_path / "run/checkpoints/step-0000003").iterdir()}
    run = Run(arguments, file_size=60_000)
    assert run.wait() == 2
    [sentence] = [line for line in run.output().splitlines() if line.startswith("draft-train:")]
    assert "could not be written" in sentence and "step-0000003 is intact" in sentence
    assert "Traceback" not in run.output(), run.output()
    checkpoints = tmp_path / "run/checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-0000003"]
    assert {path.name: path.read_bytes() for path in (checkpoints / "step-0000003").iterdir()} == before
    Run(arguments).succeed()
    assert list(logged(tmp_path / "run")) == list(range(1, 9))


def test_a_full_disk_while_preparing_and_exporting(made, tmp_path):
    with served(load_target(f"{made}/target", "float32")) as server:
        prepare = f"prepare --target {made}/target --prompts {made}/prompts.jsonl --max-new-tokens 24 --device cpu"
        prepare += f" --endpoint {server.endpoint}"
        for words, name, size in ((prepare, "data", 2000), (f"export {made}/base/head", "head", 40_000)):
            run = Run([*words.split(), "--out", str(tmp_path / name)], file_size=size)
            assert run.wait() == 2 and "Traceback" not in run.output(), run.output()
            assert "could not be read or written" in run.output() and "draft-train: " in run.output()
        Run([*prepare.split(), "--out", str(tmp_path / "data")]).succeed()


def test_the_latest_is_always_a_whole_checkpoint(tmp_path):
    run = RunFolder(resolve("pretrain", str(tmp_path), flags={"data": ["d"], "keep_checkpoints": 2}))
    for step in (1, 2, 3, 4):
        run.save({"weight.a": torch.ones(3)}, {"step": step})
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-0000003", "step-0000004"}
    (run.checkpoints / "step-0000005").mkdir()  # not whole
    assert run.open(None) == {"step": 4, "name": "step-0000004"}
    shutil.rmtree(run.checkpoints / "step-0000004")
    assert latest_snapshot(run.checkpoints).name == "step-0000003"
    run.checkpoints = tmp_path / "file" / "checkpoints"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="there is none before it"):
        run.save({}, {"step": 1})
