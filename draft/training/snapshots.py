"""Checkpoints of a run: trained weights, optimiser state and progress, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from draft.checkpoint import atomic_folder, write_json
from draft.errors import UserError
from draft.training.processes import part_of, whole

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


def discard_unfinished(folder: Path) -> None:
    """Remove what a killed process left behind of a checkpoint that it was writing."""
    for left in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


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
