"""Checkpoints of a run: trained weights, optimiser state and progress, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from draft.checkpoint import atomic_folder, write_json
from draft.errors import UserError

_FILES = frozenset({"state.safetensors", "progress.json"})


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_snapshot(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any], keep: int
) -> None:
    """Write `folder/step-N` and point `folder/latest` at it; the newest `keep` are kept."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(model).items():
        tensors[f"weight.{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.detach().cpu().contiguous()
    name = f"step-{progress['step']:07d}"
    try:
        with atomic_folder(folder / name, _FILES) as temporary:
            save_file(tensors, temporary / "state.safetensors")
            write_json(temporary / "progress.json", progress)
        write_json(folder / "latest.json", {"checkpoint": name})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {name} could not be written ({error}); the one before it is intact."
        ) from error
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def latest_snapshot(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    pointer = folder / "latest.json"
    return folder / json.loads(pointer.read_text())["checkpoint"] if pointer.is_file() else None


def load_snapshot(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore weights and optimiser state in place; returns the progress that was stored with them."""
    try:
        tensors = load_file(folder / "state.safetensors")
        progress = json.loads((folder / "progress.json").read_text())
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"the checkpoint {folder.name} could not be read ({error}); start the run again.") from error
    parameters = trained_parameters(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if f"weight.{name}" not in tensors:
                raise UserError(f"the checkpoint {folder.name} lacks {name}; it belongs to a run with other settings.")
            parameter.copy_(tensors[f"weight.{name}"])
            state = {
                key: tensors[f"{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{name}" in tensors
            }
            if state:
                optimizer.state[parameter] = state
    return progress
