"""Save and load draft heads: strictly, atomically, safetensors only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from draft.errors import UserError
from draft.files import atomic_folder, file_sha256, read_json, read_tensors, write_json
from draft.heads.base import DraftHead
from draft.heads.registry import ARCHITECTURES
from draft.target import DTYPES, Target

PRETRAINED = Path(__file__).parents[1] / "pretrained"
HEAD_FILES = frozenset({"config.json", "model.safetensors", "draftsmith.json"})


def save_head(head: DraftHead, folder: str | Path, *, dtype: torch.dtype, about: dict[str, Any]) -> None:
    """Write a head as the folder that vLLM and SGLang load: config.json, model.safetensors, and draftsmith.json.

    dtype is that of the floating-point tensors in the file. `about` (target fingerprint, how it was made) goes
    to draftsmith.json, which other engines don't read.
    """
    with atomic_folder(Path(folder), HEAD_FILES) as temporary:
        write_head(head, temporary, dtype=dtype, about=about)


def write_head(head: DraftHead, folder: Path, *, dtype: torch.dtype, about: dict[str, Any]) -> None:
    """`save_head` into an existing folder: for a caller that checks the files before they take their place."""
    tensors = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in head.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    write_json(folder / "config.json", head.config.as_json(dtype))
    write_json(folder / "draftsmith.json", about)


def load_head(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[DraftHead, dict[str, Any]]:
    """Load a head and its draftsmith.json (empty for a head from elsewhere).

    folder: a path, or the name of a head that ships with the package (`smollm2-eagle3`). dtype None keeps the file's.

    Raises:
        UserError: naming the first missing, unexpected or misshapen tensor.
    """
    folder = _find(folder)
    config_values = read_json(folder / "config.json")
    names = config_values.get("architectures")
    name = names[0] if isinstance(names, list) and names else names or "(none)"
    kind = next((each for each in ARCHITECTURES.values() if each.stored_as == name), None)
    if kind is None:
        known = ", ".join(each.stored_as for each in ARCHITECTURES.values())
        raise UserError(f"head {str(folder)!r}: architecture {name} is not one of {known}.")
    head = kind(kind.config_class.from_dict(config_values))
    fill(head, read_tensors(folder / "model.safetensors"), str(folder))
    stored = DTYPES.get(config_values.get("torch_dtype") or config_values.get("dtype") or "float32", torch.float32)
    about = folder / "draftsmith.json"
    return head.to(device=device, dtype=dtype or stored).eval(), read_json(about) if about.is_file() else {}


def head_sha256(folder: str | Path) -> str:
    """Identify a head's weights by the first half of their file's sha256; UserError where they are missing."""
    path = _find(folder) / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{str(path)!r} is missing; weights must be one safetensors file of that name.")
    return file_sha256(path)[:32]


def _find(folder: str | Path) -> Path:
    if not Path(folder).is_dir() and (PRETRAINED / str(folder) / "config.json").is_file():
        return PRETRAINED / str(folder)
    if not (Path(folder) / "config.json").is_file():
        shipped = ", ".join(sorted(path.name for path in PRETRAINED.iterdir() if path.is_dir()))
        raise UserError(
            f"head {str(folder)!r}: no config.json there; give a folder that `draft-train merge` wrote, "
            f"or one of: {shipped}."
        )
    return Path(folder)


def fill(head: DraftHead, tensors: dict[str, Tensor], name: str) -> None:
    """Put `tensors`, by the names of this program's own files, into the head called `name`.

    Raises:
        UserError: naming the first missing, unexpected or misshapen tensor.
    """
    if "embed_tokens.weight" in tensors:
        raise UserError(
            f"head {name!r}: tensor embed_tokens.weight is unexpected: the target's embedding is used, and this may "
            f"differ; `draft-train import {name}` compares them, and leaves it out."
        )
    for theirs, ours in head.tensor_renames:
        tensors = {key.replace(theirs, ours, 1): value for key, value in tensors.items()}
    tensors = _with_token_map(head, tensors, name)
    expected = head.state_dict()
    for key, value in expected.items():
        if key not in tensors:
            raise UserError(f"head {name!r}: tensor {key} is missing; this is not a whole {head.architecture} head.")
        if tensors[key].shape != value.shape:
            raise UserError(
                f"head {name!r}: tensor {key} has shape {tuple(tensors[key].shape)}, its config.json says "
                f"{tuple(value.shape)}; the two files do not belong together."
            )
    unexpected = sorted(set(tensors) - set(expected))
    if unexpected:
        raise UserError(f"head {name!r}: tensor {unexpected[0]} is unexpected; export the head again without it.")
    head.load_state_dict(tensors)


def _with_token_map(head: DraftHead, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Derive t2d where it is missing, as engines do; leave out a full vocabulary's maps, which must be trivial."""
    tensors = dict(tensors)
    if head.config.full_vocabulary:
        if tensors.pop("d2t", head.d2t).any() or not tensors.pop("t2d", head.t2d).all():
            raise UserError(
                f"head {name!r}: d2t reorders a draft vocabulary as large as the target's ({head.config.vocab_size}); "
                "engines take such a head only without a map."
            )
    elif "t2d" not in tensors and "d2t" in tensors:
        ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
        if int(ids.min()) < 0 or int(ids.max()) >= len(head.t2d):
            raise UserError(
                f"head {name!r}: d2t gives target ids from {int(ids.min())} to {int(ids.max())}, and the vocabulary "
                f"has {len(head.t2d)}; use a head made for this vocabulary."
            )
        tensors["t2d"] = torch.zeros_like(head.t2d)
        tensors["t2d"][ids] = True
    return tensors


def attach_head(head: DraftHead, about: Mapping[str, Any], target: Target) -> None:
    """Let a head draft for `target`: one without an LM head uses the target's from here on.

    Raises:
        UserError: for a head that was made for another target, naming both values.
    """
    for what, ours, theirs in (
        ("hidden size", head.config.hidden_size, target.hidden_size),
        ("vocabulary", head.config.vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            raise UserError(
                f"the head's {what} is {ours} and the target's is {theirs}; use a head made for this target."
            )
    head.auxiliary_layers(target)  # refuses layers that the target hasn't
    made_for = about.get("target_fingerprint")
    # under an adapter, the head of the target that it was trained on is the one to begin with
    if made_for and made_for not in (target.fingerprint, target.base_fingerprint):
        raise UserError(
            f"the head was made for target {made_for} and this target is {target.fingerprint}; adapt it to this "
            "target with `draft-train adapt --other-target`, or use the target that it was made for."
        )
    head.use_target_lm_head(target)
