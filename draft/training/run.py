"""The folder of a run, its checkpoints, and its end by a signal.

config.yaml         the resolved settings
provenance.json     the command and the commit
metrics.jsonl       a line a step; training.png is drawn from it
logs/               output of the trackers
checkpoints/        step-N, each whole once it is there, and the weights of the best replay
head/ or adapter/   the result; about.json, written last, describes it

The same command goes on with an interrupted run, if the settings that its weights depend on are the same.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from draft.errors import UserError
from draft.files import atomic_file, atomic_folder, finish_folders, provenance, read_json, write_json
from draft.training.config import SECTIONS, RunSettings, to_yaml
from draft.training.distributed import part_of, whole
from draft.training.optimizer import Average

# settings that may change when a run goes on: the weights of a step don't depend on them. Replays of other rows could
# not be compared with the best one so far. Accumulation may change where the number of processes does, see
# `RunFolder.check`
FREE = {"save_every", "keep_checkpoints", "eval_every", "log_with", "gradient_accumulation"}
OURS = ("config.yaml", "provenance.json", "metrics.jsonl", "training.png", "about.json", "logs", "checkpoints")
RESULTS = ("head", "adapter")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FILES = frozenset({"state.safetensors", "progress.json"})  # of a checkpoint
_PREFIX = "step-"
_BEST = "best.safetensors"  # its weights, and in its header step and tau


class NotSaved(UserError):
    """A checkpoint could not be written; the same command goes on from the one before."""


@dataclass(frozen=True)
class Best:
    """The best replay of a run so far."""

    step: int
    tau: float


class RunFolder:
    """A run's folder, of which process 0 alone writes."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.folder = Path(settings.out)
        self.checkpoints = self.folder / "checkpoints"
        self.starts_again = False

    def open(self, resume: bool | None) -> dict[str, Any]:
        """Read what an earlier run left, and change nothing: `begin` does, once all else has been found in order.

        resume: True = there has to be a checkpoint to go on from; False = start again; None = go on if there is one.

        Returns:
            the progress stored with the newest checkpoint, and its `name`; empty without one.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {str(self.folder)!r} is a file; choose a folder.")
        if resume is False and (self.folder / "config.yaml").is_file():
            head = self.settings.model.head
            if head and Path(head).is_dir() and Path(head).resolve().is_relative_to(self.folder.resolve()):
                raise UserError(f"--no-resume would discard {head!r}, the --head to start from; choose another --out.")
            self.starts_again = True
            return {}
        latest = latest_snapshot(self.checkpoints)
        if resume and latest is None:
            raise UserError(f"--resume: {str(self.folder)!r} holds no checkpoint to go on from; leave --resume out.")
        return {**read_json(latest / "progress.json"), "name": latest.name} if latest else {}

    def check(self, progress: dict[str, Any], identity: str, batches_per_step: int, processes: int) -> None:
        """Refuse to go on with a run of other settings, or from a checkpoint of other data, weights or steps.

        identity: hash of all that the weights depend on, settings aside.
        """
        if self.starts_again or not (progress or any((self.folder / name).exists() for name in RESULTS)):
            return
        before, now = read_config(self.folder), self.settings.model_dump()
        different = [
            f"{section}.{key} was {before[section].get(key)}, is {new}"
            for section in SECTIONS
            for key, new in now[section].items()
            if key not in FREE and before[section].get(key) != new
        ]
        if before["mode"] != self.settings.mode:
            different = [f"mode was {before['mode']}, is {self.settings.mode}"]
        if different:
            raise UserError(
                f"{str(self.folder)!r} holds a run with other settings ({'; '.join(different)}); choose another --out, "
                "or start again there with --no-resume."
            )
        if progress and progress["batches_per_step"] != batches_per_step:
            raise UserError(
                f"{str(self.folder)!r} was begun with {progress['batches_per_step']} batches a step and this command "
                f"has {batches_per_step} ({processes} processes, gradient_accumulation "
                f"{self.settings.training.gradient_accumulation}); their product has to stay the same."
            )
        if progress and progress["identity"] != identity:
            raise UserError(
                f"the data, the target or the base head of {str(self.folder)!r} have changed since it was "
                "interrupted; choose another --out, or start again there with --no-resume."
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder's lock; UserError where another command trains in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"another command trains in {str(self.folder)!r}; let it end, or choose another --out."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def begin(self) -> None:
        """Make the folder, empty of an earlier run if this one starts again, and store settings and provenance."""
        self.folder.mkdir(parents=True, exist_ok=True)
        finish_folders(self.checkpoints, f"{_PREFIX}*")
        for name in RESULTS:
            finish_folders(self.folder, name)
        for path in (self.folder / name for name in (*OURS, *RESULTS) if self.starts_again):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if latest_snapshot(self.checkpoints) is None:  # of a run that ended before its first checkpoint
            (self.checkpoints / _BEST).unlink(missing_ok=True)
        with atomic_file(self.folder / "config.yaml") as temporary:
            temporary.write_text(to_yaml(self.settings))
        write_json(self.folder / "provenance.json", provenance())

    def save(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Write a `snapshot` and its progress as a checkpoint; the newest `keep_checkpoints` are kept.

        Raises:
            NotSaved: when it can't be written; the checkpoints before it are intact then.
        """
        name = f"{_PREFIX}{progress['step']:07d}"
        try:
            with atomic_folder(self.checkpoints / name, _FILES) as temporary:
                save_file(tensors, temporary / "state.safetensors")
                write_json(temporary / "progress.json", progress)
        except (OSError, SafetensorError) as error:
            before = latest_snapshot(self.checkpoints)
            kept = f"{before.name} is intact, the same command goes on from it" if before else "there is none before it"
            raise NotSaved(f"{str(self.checkpoints / name)!r} could not be written ({error}); {kept}.") from error
        for old in sorted(self.checkpoints.glob(f"{_PREFIX}*"))[: -self.settings.training.keep_checkpoints]:
            shutil.rmtree(old)

    def save_best(self, weights: dict[str, Tensor], step: int, tau: float) -> None:
        """Write the weights of the best replay so far.

        Raises:
            NotSaved: when they can't be written; those of the one before are intact then.
        """
        path = self.checkpoints / _BEST
        try:
            with atomic_file(path) as temporary:
                save_file(weights, temporary, {"step": str(step), "tau": repr(tau)})
        except (OSError, SafetensorError) as error:
            raise NotSaved(
                f"{str(path)!r} could not be written ({error}); make room there, and give the same command again."
            ) from error

    def best(self) -> Best | None:
        """The best replay that was written."""
        path = self.checkpoints / _BEST
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
                return Best(int(about["step"]), float(about["tau"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{str(path)!r} could not be read ({error}); start again with --no-resume.") from error

    def load_best(self, model: nn.Module) -> None:
        """Restore the weights of the best replay in place, each process its part."""
        tensors = load_file(self.checkpoints / _BEST)
        with torch.no_grad():
            for name, parameter in trained_parameters(model).items():
                parameter.copy_(part_of(tensors[name].to(parameter.device), parameter))

    def load(
        self, checkpoint: str, model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None = None
    ) -> None:
        """Restore a checkpoint's weights, optimiser state and random generators in place, each process its part."""
        try:
            tensors = load_file(self.checkpoints / checkpoint / "state.safetensors")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the checkpoint {checkpoint} could not be read ({error}); delete it to go on from the one before, or "
                "start again with --no-resume."
            ) from error
        with torch.no_grad():
            for name, parameter in trained_parameters(model).items():
                parameter.copy_(part_of(tensors[f"weight.{name}"].to(parameter.device), parameter))
                state = {
                    key: part_of(tensors[f"{key}.{name}"].to(parameter.device), parameter)
                    for key in ("exp_avg", "exp_avg_sq", "momentum_buffer")
                    if f"{key}.{name}" in tensors
                }
                if f"step.{name}" in tensors:
                    state["step"] = tensors[f"step.{name}"]
                if state:
                    optimizer.state[parameter] = state
                if average is not None:
                    kept = tensors[f"average.{name}"].to(parameter.device)
                    average.values[name] = part_of(kept, parameter).clone()
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved settings of the run in `folder`: its mode, and all sections; UserError when they can't be read."""
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text())
        return {"mode": values.get("mode"), **{section: dict(values.get(section) or {}) for section in SECTIONS}}
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise UserError(f"{str(path)!r} is missing or damaged; restore it, or start again with --no-resume.") from error


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None = None) -> dict[str, Tensor]:
    """Whole copies on the CPU of the trained weights, their average, the optimiser's state and the generators'.

    All processes have to call this together.
    """
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in trained_parameters(model).items():
        tensors[f"weight.{name}"] = _copy(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = _copy(value)
        if average is not None:
            tensors[f"average.{name}"] = _copy(average.values[name])
    return tensors


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole copies on the CPU of what is trained; all processes have to call this together."""
    return {name: _copy(parameter) for name, parameter in trained_parameters(model).items()}


def _copy(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).to("cpu", copy=True).contiguous()


def latest_snapshot(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    candidates = sorted(folder.glob(f"{_PREFIX}*"), reverse=True)
    return next((path for path in candidates if all((path / file).is_file() for file in _FILES)), None)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run, which saved its state after `step`."""

    def __init__(self, number: int | None, step: int) -> None:
        """number: the signal; None: another process received it."""
        super().__init__(f"interrupted and saved after step {step}")
        self.exit_code = 128 + (number or signal.SIGTERM)
        self.step = step


@contextmanager
def noting_signals(received: list[int]) -> Iterator[None]:
    """Add Ctrl-C's or SIGTERM's number to `received` in place of ending; a second signal does what it always does.

    So a run ends at the end of an optimiser step, and what is saved is a whole step's.
    """
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def receive(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():  # others can't set handlers
        before.update({number: signal.signal(number, receive) for number in SIGNALS})
    try:
        yield
    finally:
        restore()


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
