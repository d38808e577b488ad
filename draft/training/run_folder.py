"""The folder of a run: its settings, where it stands, and whether the same command may go on with it.

config.yaml         the resolved settings
provenance.json     the command and the commit
metrics.jsonl       a line a step; training.png is drawn from it
logs/               what the trackers write
checkpoints/        step-N, and latest.json, which names the newest whole one
head/ or adapter/   the result; about.json, written last, says what it is made of
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import yaml

from draft.checkpoint import write_json
from draft.errors import UserError
from draft.training.config import LEFT_TO_THE_HEAD, SECTIONS, RunSettings, to_yaml
from draft.training.monitor import provenance
from draft.training.snapshots import discard_unfinished, latest_snapshot, read_progress

# settings that may change when a run goes on: the weights don't depend on them. Accumulation may where the number of
# processes does, see `RunFolder.check_progress`
FREE = {"save_every", "keep_checkpoints", "eval_every", "eval_rows", "log_with", "gradient_accumulation"}
OURS = ("config.yaml", "provenance.json", "metrics.jsonl", "training.png", "about.json", "logs", "checkpoints")
RESULTS = ("head", "adapter")


class RunFolder:
    """A run's folder, of which process 0 alone writes."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.folder = Path(settings.out)
        self.checkpoints = self.folder / "checkpoints"
        self.starts_again = False

    def open(self, resume: bool | None) -> dict[str, Any]:
        """Look at what an earlier run left, and change nothing: `begin` does, once all else has been found in order.

        resume: True = there has to be a checkpoint to go on from; False = start again; None = go on if there is one.

        Returns:
            what was stored with the newest checkpoint, and its `name`; empty without one.

        Raises:
            UserError: when the folder's run has other settings, or when there is nothing to resume.
        """
        self._check_is_folder()
        if resume is False and (self.folder / "config.yaml").is_file():
            self._check_keeps_head()
            self.starts_again = True
            return {}
        latest = latest_snapshot(self.checkpoints)
        if resume and latest is None:
            raise UserError(f"--resume: {str(self.folder)!r} holds no checkpoint to go on from; leave --resume out.")
        self.check_settings()
        return {**read_progress(latest), "name": latest.name} if latest else {}

    def _check_is_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {str(self.folder)!r} is a file; choose a folder.")

    def _check_keeps_head(self) -> None:
        head = self.settings.model.head
        if head and Path(head).is_dir() and Path(head).resolve().is_relative_to(self.folder.resolve()):
            raise UserError(f"--no-resume would discard {head!r}, the --head to start from; choose another --out.")

    def _discard(self) -> None:
        """Remove what an earlier run wrote, and nothing else."""
        for name in (*OURS, *RESULTS):
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def check_settings(self) -> None:
        """Refuse to go on with a run of other settings; what is left to the head is compared once it is filled in."""
        if self.starts_again:
            return
        if latest_snapshot(self.checkpoints) is None and not any((self.folder / name).exists() for name in RESULTS):
            return
        different = _differences(self.folder / "config.yaml", self.settings)
        if different:
            raise UserError(
                f"{str(self.folder)!r} holds a run with other settings ({'; '.join(different)}); choose another --out, "
                "or start again there with --no-resume."
            )

    def begin(self) -> None:
        """Make the folder, without what an earlier run wrote if this one starts again, and write down what runs."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {str(self.folder)!r} cannot be made ({error.strerror}); choose another.") from error
        if self.starts_again:
            self._discard()
        discard_unfinished(self.checkpoints)
        for left in (path for name in RESULTS for path in self.folder.glob(f".{name}-*")):
            shutil.rmtree(left, ignore_errors=True)  # a killed process was writing it
        config = self.folder / ".config.yaml.tmp"
        config.write_text(to_yaml(self.settings))
        config.replace(self.folder / "config.yaml")
        write_json(self.folder / "provenance.json", provenance())

    def check_progress(self, progress: dict[str, Any], identity: str, batches_per_step: int, processes: int) -> None:
        """Refuse to go on from a checkpoint of other data, weights or steps."""
        if progress["batches_per_step"] != batches_per_step:
            raise UserError(
                f"{str(self.folder)!r} was begun with {progress['batches_per_step']} batches a step and this command "
                f"has {batches_per_step} ({processes} processes, gradient_accumulation "
                f"{self.settings.training.gradient_accumulation}); their product has to stay the same."
            )
        if progress["identity"] != identity:
            raise UserError(
                f"the data, the target or the base head of {str(self.folder)!r} have changed since it was "
                "interrupted; choose another --out, or start again there with --no-resume."
            )


def _differences(config: Path, settings: RunSettings) -> list[str]:
    """`section.key was A, is B` for what must not change between a run's beginning and its going on."""
    try:
        before = yaml.safe_load(config.read_text())
        assert isinstance(before, dict)
    except (OSError, ValueError, yaml.YAMLError, AssertionError):
        return [f"{config.name} is missing or damaged"]
    if before.get("mode") != settings.mode:
        return [f"mode was {before.get('mode')}, is {settings.mode}"]
    different = []
    for section in SECTIONS:
        old = before.get(section) or {}
        for key, new in dataclasses.asdict(getattr(settings, section)).items():
            open_yet = key in LEFT_TO_THE_HEAD and new in (None, [])
            if key not in FREE and not open_yet and old.get(key) != new:
                different.append(f"{section}.{key} was {old.get(key)}, is {new}")
    return different
