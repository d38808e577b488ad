"""Reading a checkpoint folder of another project: its config.json and its tensors, nothing executed."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from draft.errors import UserError


@dataclass
class Checkpoint:
    """What a folder holds; `notes` grows while it is understood: sentences for the user."""

    folder: Path
    file: str  # of the tensors
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    about: dict[str, Any]  # draftsmith.json, where it is one of our exports
    notes: list[str]


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read its safetensors files, or its pickles through `torch.load(weights_only=True)`, which runs no code.

    A checkpoint of several files is found by its index.

    Raises:
        UserError: for a folder without them, a damaged file, or a pickle that holds more than tensors.
    """
    folder = Path(folder).expanduser()
    config = _read_json(folder / "config.json")
    about = _read_json(folder / "draftsmith.json") if (folder / "draftsmith.json").is_file() else {}
    for file, read in _READERS.items():
        for name, reader in ((file, read), (f"{file}.index.json", _read_shards)):
            if (folder / name).is_file():
                return Checkpoint(folder, name, config, reader(folder / name), about, [])
    raise UserError(f"{str(folder)!r} has no {' or '.join(_READERS)}; give the folder that the head was published as.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} is not readable JSON ({error}); give the folder of a whole head.") from error
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} holds a {type(values).__name__}, not a configuration; give a whole head.")
    return values


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file ({error}); download it again.") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{str(path)!r} is damaged or holds more than tensors, which may run code when it is loaded; get the "
            "head as safetensors, or save its state dict alone."
        ) from error
    except Exception as error:  # the unpickler takes any bytes for instructions, and stumbles over them in any way
        reason = (str(error).splitlines() or ["empty"])[0][:120]
        raise UserError(f"{str(path)!r} is not a whole PyTorch file ({reason}); download it again.") from error
    strangers = (
        [key for key, value in values.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
        if isinstance(values, dict)
        else []
    )
    if not isinstance(values, dict) or strangers:
        what = f"{strangers[0]!r} is no named tensor" if strangers else f"it holds a {type(values).__name__}"
        raise UserError(f"{str(path)!r} is no state dict: {what}; save the head's state dict alone.")
    return {name: value.contiguous() for name, value in values.items()}


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All files that an index names, each read as if it were the only one; the index decides which tensor is whose."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{str(index)!r} has no weight_map of tensors to files; give the folder of a whole head.")
    read = _READERS[index.name.removesuffix(".index.json")]
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise UserError(f"{str(index)!r} names {name!r}, which is no file beside it; download the head again.")
        if not (index.parent / name).is_file():
            raise UserError(f"{str(index.parent / name)!r} is missing, which the index names; download the whole head.")
        held = read(index.parent / name)
        for tensor in (tensor for tensor, place in places.items() if place == name):
            if tensor not in held:
                raise UserError(f"{str(index.parent / name)!r} lacks {tensor}, which its index says it has.")
            tensors[tensor] = held[tensor]
    return tensors


_READERS = {
    "model.safetensors": _read_safetensors,
    "pytorch_model.bin": _read_pickle,
    "medusa_lm_head.safetensors": _read_safetensors,
    "medusa_lm_head.pt": _read_pickle,
}
