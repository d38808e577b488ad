"""Progress, metrics and pictures of a run."""

import json
import subprocess

import pytest
import yaml
from rich.console import Console
from training_runs import Run, command, logged

from draft import files
from draft.errors import UserError
from draft.training import monitor
from draft.training.monitor import Monitor, choose_trackers, draw, read_lines


def test_a_run_leaves_everything(made, tmp_path):
    arguments = command(made, "pretrain", tmp_path / "run", "--max-steps", "5", "--draft-vocab-size", "170")
    arguments[arguments.index("--eval-every") + 1] = "2"
    run = Run(arguments).succeed()
    folder = tmp_path / "run"
    assert list(logged(folder, "tau")) == [0, 2, 4, 5] and list(logged(folder)) == [1, 2, 3, 4, 5]
    assert all(value > 0 for step, value in logged(folder, "tokens_per_second").items() if step)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["mode"] == "pretrain" and config["training"]["max_steps"] == 5
    provenance = json.loads((folder / "provenance.json").read_text())
    assert "--max-steps 5" in provenance["command"] and len(provenance["commit"].removesuffix("-dirty")) == 40
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    # a log file gets lines, not a bar
    assert "step 2/5  loss " in run.output() and "τ " in run.output() and "tokens/s" in run.output()
    [events] = folder.glob("logs/draftsmith/events.out.tfevents.*")
    assert b"loss" in events.read_bytes() and b"tau" in events.read_bytes()
    quiet = Run(command(made, "pretrain", tmp_path / "quiet", "--max-steps", "1", "--log-with", "none")).succeed()
    assert not (tmp_path / "quiet" / "logs").exists(), quiet.output()


def test_the_commit_is_this_programs_own(tmp_path, monkeypatch):
    """An installed copy may lie in somebody else's repository; files that were changed are no commit's."""

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)

    monkeypatch.setattr(files, "__file__", str(tmp_path / "monitor.py"))
    (tmp_path / "monitor.py").write_text("one")
    (tmp_path / "theirs").write_text("one")
    for words in ("init", "add theirs", "commit -m one"):
        git(*words.split())
    assert files.provenance()["commit"] == "unknown"
    git("add", "monitor.py")
    git("commit", "-m", "two")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert files.provenance()["commit"] == commit
    (tmp_path / "monitor.py").write_text("two")
    assert files.provenance()["commit"] == f"{commit}-dirty"


def test_trackers_that_are_not_installed_are_named(monkeypatch):
    assert choose_trackers([]) == ["tensorboard"] and choose_trackers(["none"]) == []
    for installed, wanted, chosen in ((["trackio"], ["trackio"], ["trackio"]), ([], [], []), ([], ["wandb"], None)):
        monkeypatch.setattr(monitor, "get_available_trackers", lambda installed=installed: installed)
        if chosen is None:
            with pytest.raises(UserError, match="pip install wandb"):
                choose_trackers(wanted)
        else:
            assert choose_trackers(wanted) == chosen


def test_a_resumed_run_repeats_no_step(tmp_path):
    console = Console(quiet=True)
    first = Monitor(tmp_path, 10, 0, console)
    for step in range(5):
        first.log(step, {"loss": 1.0}, tokens=10)
    with first.file.open("a") as file:
        file.write('{"step": 5, "loss": {}')  # killed while it was written
    assert [line["step"] for line in read_lines(first.file)] == [0, 1, 2, 3, 4]
    Monitor(tmp_path, 10, 3, console).log(4, {"loss": 0.5, "beta": 0.1}, tokens=10)
    lines = read_lines(first.file)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4] and lines[-1]["loss"] == 0.5
    draw(tmp_path, console)
    Monitor(tmp_path / "nowhere", 10, 0, console, silent=True).log(1, {"loss": 1.0})
    assert not (tmp_path / "nowhere").exists()
