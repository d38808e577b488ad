"""What importing takes of a checkpoint, and what every kind of it is brought through.

A format is a `Source`: how to recognise it, and how to bring its config.json and tensors to those of this program's own
files, by filling in what is missing and leaving out what is the target's.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from draft.errors import UserError
from draft.target import Target


@dataclass(frozen=True)
class Source:
    """A format: `recognise` a checkpoint; `translate` it for a target.

    translate: (checkpoint, target, the user's word on auxiliary layers) -> config.json; it changes the tensors in
    place.
    """

    name: str
    recognise: Callable[[Checkpoint], bool]
    translate: Callable[[Checkpoint, Target, list[int] | None], dict[str, Any]]


def no_auxiliary_layers(found: Checkpoint, layers: list[int] | None) -> None:
    """Raises UserError when layers were chosen for a head that reads the last hidden states."""
    if layers is not None:
        raise UserError(
            f"--auxiliary-layers {','.join(map(str, layers))}: {str(found.folder)!r} is no EAGLE-3 head, and reads the "
            "target's last hidden states; leave the flag out."
        )


def check_sizes(found: Checkpoint, sizes: tuple[tuple[str, Any, int], ...]) -> None:
    """sizes: (what, the head's, the target's). Raises UserError at the first that differs."""
    for what, ours, theirs in sizes:
        if ours != theirs:
            raise UserError(
                f"{str(found.folder)!r}: the head's {what} is {ours} and the target's is {theirs}; use the target "
                "that it was made for."
            )


def complete_layer(values: dict[str, Any], found: Checkpoint, target: Target) -> None:
    """Fill in what a decoder layer's config.json may lack, in place."""
    # what engines assume too where a LlamaConfig says nothing
    defaults: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
    if not values.get("rope_parameters") and not values.get("rope_theta"):
        defaults["rope_theta"] = 10000.0
    for key, value in defaults.items():
        if values.get(key) is None:
            values[key] = value
            found.notes.append(f"filled in {key} = {value}, which engines assume.")
    _complete_rope(values, found, target)


def _complete_rope(values: dict[str, Any], found: Checkpoint, target: Target) -> None:
    """The head's context is its target's; scaled RoPE remembers the length that it was made for."""
    theirs = values.get("max_position_embeddings")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default"))
    if scaled != "default":
        rope = {**rope, "rope_type": scaled}
        if theirs and scaled in ("yarn", "longrope"):
            rope.setdefault("original_max_position_embeddings", theirs)
        rope.setdefault("rope_theta", values.get("rope_theta") or 10000.0)
        values["rope_parameters"] = rope
    if theirs != target.stated_length:
        values["max_position_embeddings"] = target.stated_length
        found.notes.append(f"set max_position_embeddings from {theirs} to the target's {target.stated_length}.")


def drop_embedding(found: Checkpoint, target: Target) -> None:
    """Leave out a copy of the target's embedding; refuse another one, which vLLM would use and SGLang would not."""
    theirs = found.tensors.pop("embed_tokens.weight", None)
    if theirs is None:
        return
    ours = target.embedding.weight.detach().cpu()
    if theirs.shape != ours.shape:
        raise UserError(
            f"{str(found.folder)!r}: embed_tokens.weight is {list(theirs.shape)} and the target's {list(ours.shape)}; "
            "use the target that the head was made for."
        )
    # both may have been rounded, to different half precisions
    if not torch.allclose(theirs.float(), ours.float(), rtol=2**-8, atol=2**-24):
        worst = float((theirs.float() - ours.float()).abs().max())
        raise UserError(
            f"{str(found.folder)!r}: embed_tokens.weight differs from the target's by up to {worst:.2g}: vLLM would "
            "use it and SGLang would not; use the target that the head was made for, or a head without one."
        )
    found.notes.append("left out embed_tokens.weight: it is the target's.")


def is_the_targets(lm_head: Tensor, target: Target) -> bool:
    """Whether an LM head is a copy of the target's, in its own dtype."""
    theirs = target.lm_head.weight.detach()
    return lm_head.shape == theirs.shape and torch.equal(lm_head, theirs.to("cpu", lm_head.dtype))


def one_dtype(found: Checkpoint) -> torch.dtype:
    """The dtype of the file; where there are several, the one that holds them all."""
    dtypes = sorted({value.dtype for value in found.tensors.values() if value.is_floating_point()}, key=str)
    if not dtypes:
        raise UserError(f"{str(found.folder)!r} has no floating-point tensors; give the folder of a whole head.")
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    if len(dtypes) > 1:
        found.notes.append(f"brought tensors of {', '.join(map(str, dtypes))} to {widest}.")
    return widest


# Reading a checkpoint folder of another project: its config.json and its tensors, nothing executed.


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
