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
import errno
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from draft.errors import UserError
from draft.files import atomic_folder, finish_folders, provenance, write_json
from draft.training.config import LEFT_TO_THE_HEAD, SECTIONS, RunSettings, to_yaml
from draft.training.distributed import part_of, whole

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
        finish_folders(self.checkpoints, f"{_PREFIX}*")
        for name in RESULTS:
            finish_folders(self.folder, name)
        if self.starts_again:
            self._discard()
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


# Checkpoints of a run: trained weights, optimiser state and progress, written whole or not at all.


_FILES = frozenset({"state.safetensors", "progress.json"})
_PREFIX = "step-"


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Whole copies on the CPU of the trained weights, the optimiser's state and the random generators'.

    All processes have to ask for it together.
    """
    tensors: dict[str, Tensor] = {f"random.{name}": state for name, state in _random_states()}
    for name, parameter in trained_parameters(model).items():
        tensors[f"weight.{name}"] = _copy(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = _copy(value)
    return tensors


def _copy(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu().contiguous()


def _random_states() -> Iterator[tuple[str, Tensor]]:
    yield "cpu", torch.get_rng_state()
    if torch.cuda.is_available():
        yield "cuda", torch.cuda.get_rng_state()


def write_snapshot(folder: Path, tensors: dict[str, Tensor], progress: dict[str, Any], keep: int) -> None:
    """Write `folder/step-N` and point `folder/latest.json` at it; the newest `keep` are kept.

    Raises:
        UserError: when it can't be written; the checkpoints before it are intact then.
    """
    name = f"{_PREFIX}{progress['step']:07d}"
    try:
        with atomic_folder(folder / name, _FILES) as temporary:
            save_file(tensors, temporary / "state.safetensors")
            write_json(temporary / "progress.json", progress)
        write_json(folder / "latest.json", {"checkpoint": name})
    except (OSError, SafetensorError) as error:
        before = latest_snapshot(folder)
        kept = (
            f"{before.name} is intact, and the same command goes on from there" if before else "there is none before it"
        )
        raise UserError(f"the checkpoint {name} in {str(folder)!r} could not be written ({error}); {kept}.") from error
    for old in sorted(folder.glob(f"{_PREFIX}*"))[:-keep]:
        shutil.rmtree(old)


def latest_snapshot(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    try:
        named = folder / json.loads((folder / "latest.json").read_text())["checkpoint"]
    except (OSError, ValueError, KeyError):
        named = folder
    candidates = [named, *sorted(folder.glob(f"{_PREFIX}*"), reverse=True)]  # somebody may have deleted the named one
    return next((path for path in candidates if all((path / file).is_file() for file in _FILES)), None)


def read_progress(folder: Path) -> dict[str, Any]:
    """What was stored with a checkpoint; UserError when it can't be read."""
    try:
        return json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def load_snapshot(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore weights, optimiser state and random generators in place, each process its part."""
    try:
        tensors = load_file(folder / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            if f"weight.{name}" not in tensors:
                raise UserError(f"the checkpoint {folder.name} lacks {name}; it belongs to a run with other settings.")
            parameter.copy_(part_of(tensors[f"weight.{name}"].to(parameter.device), parameter))
            state = {
                key: part_of(tensors[f"{key}.{name}"].to(parameter.device), parameter)
                for key in ("exp_avg", "exp_avg_sq")
                if f"{key}.{name}" in tensors
            }
            if state:
                optimizer.state[parameter] = {"step": tensors[f"step.{name}"], **state}
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"the checkpoint {folder.name} could not be read ({error}); delete it to go on from the one before, "
        "or start again with --no-resume."
    )


# Ctrl-C and SIGTERM end a run at the end of an optimiser step, so that what is saved is a whole step's.


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run was told to stop, and saved its state after `step`."""

    def __init__(self, number: int | None, step: int) -> None:
        """number: the signal; None: another process received it."""
        super().__init__(f"interrupted and saved after step {step}")
        self.exit_code = 128 + (number or signal.SIGTERM)
        self.step = step


class Interruption:
    """A context in which the first signal only sets `received`; a second one does what it always does."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # others can't set handlers
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()


# What surrounds a run: reproducible arithmetic, and a disk that fills up told in one sentence.


WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let torch use only algorithms that give the same bits every time, and refuse the others by name."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(wanted or before[0])
    memory.fill_uninitialized_memory = before[1] and not wanted  # nothing here reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Turn what writing into `folder` raises into a UserError that says how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in WRITE_ERRORS:
            raise
        raise UserError(
            f"{str(folder)!r} could not be written to ({error}); make room, and the same command goes on from the last "
            "checkpoint."
        ) from error
