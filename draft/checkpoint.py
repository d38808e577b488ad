"""Save and load draft heads: strictly, atomically, safetensors only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from draft.errors import UserError
from draft.heads import DraftHead, registry
from draft.target import DTYPES

PRETRAINED = Path(__file__).parent / "pretrained"

HEAD_FILES = frozenset({"config.json", "model.safetensors", "draftsmith.json"})


@contextmanager
def atomic_folder(folder: Path, files: frozenset[str]) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes when it doesn't.

    Raises:
        UserError: when `folder` exists and holds anything but `files`: only what this wrote before is replaced.
    """
    if folder.exists():
        others = sorted({path.name for path in folder.iterdir()} - files) if folder.is_dir() else [folder.name]
        if others:
            raise UserError(f"{str(folder)!r} holds something else ({others[0]}); choose another folder to write to.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):  # a rename may reach the disk before the data does
            sync(path)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old / "folder")
            os.replace(temporary, folder)
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's data, or a folder's entries, are on the disk; where folders can't be opened, they wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # Windows
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON through a temporary name and a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_head(head: DraftHead, folder: str | Path, *, dtype: torch.dtype, about: dict[str, Any]) -> None:
    """Write a head as the folder that vLLM and SGLang load: config.json, model.safetensors, and draftsmith.json.

    dtype is that of the floating-point tensors in the file. `about` (target fingerprint, how it was made) goes
    to draftsmith.json, which other engines don't read.
    """
    with atomic_folder(Path(folder), HEAD_FILES) as temporary:
        write_head(head, temporary, dtype=dtype, about=about)


def write_head(head: DraftHead, folder: Path, *, dtype: torch.dtype, about: dict[str, Any]) -> None:
    """`save_head` into an existing folder: for those who check the files before they take their place."""
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
    architecture = registry.stored_as(name)
    if architecture is None:
        known = ", ".join(each.stored_as for each in registry.ARCHITECTURES.values())
        raise UserError(f"head {str(folder)!r}: architecture {name} is not one of {known}.")
    head = architecture.head(architecture.config.from_dict(config_values))
    fill(head, _read_tensors(folder / "model.safetensors"), str(folder))
    stored = DTYPES.get(config_values.get("torch_dtype") or config_values.get("dtype") or "float32", torch.float32)
    about = folder / "draftsmith.json"
    return head.to(device=device, dtype=dtype or stored).eval(), read_json(about) if about.is_file() else {}


def head_sha256(folder: str | Path) -> str:
    """Identifies a head's weights: the first half of its safetensors file's sha256."""
    path = _find(folder) / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32] if path.is_file() else "missing"


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


def read_json(path: Path) -> dict[str, Any]:
    """A file's keys and values; UserError when it can't be read, or holds something else."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} is not readable JSON ({error}); restore the file.") from error
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} holds a {type(values).__name__} where keys and values belong; restore it.")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{str(path)!r} is missing; a head's weights must be one safetensors file of that name.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file ({error}); write or copy it again.") from error


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
    architecture = registry.architecture_of(head)
    for theirs, ours in architecture.renames:
        tensors = {key.replace(theirs, ours, 1): value for key, value in tensors.items()}
    tensors = _with_token_map(head, tensors, name)
    expected = head.state_dict()
    for key, value in expected.items():
        if key not in tensors:
            raise UserError(f"head {name!r}: tensor {key} is missing; this is not a whole {architecture.name} head.")
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


def check_fits(head: DraftHead, about: dict[str, Any], target: Any) -> None:
    """Refuse a head that was made for another target, naming both values; lend the target's LM head to one without."""
    for what, ours, theirs in (
        ("hidden size", head.config.hidden_size, target.hidden_size),
        ("vocabulary", head.config.vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            raise UserError(
                f"the head's {what} is {ours} and the target's is {theirs}; use a head made for this target."
            )
    head.auxiliary_layers(target)  # refuses layers that the target hasn't
    head.borrow(target)
    made_for = about.get("target_fingerprint")
    # under an adapter, the head of the target that it was trained on is the one to begin with
    if made_for and made_for not in (target.fingerprint, target.base_fingerprint):
        raise UserError(
            f"the head was made for target {made_for} and this target is {target.fingerprint}; adapt it to this "
            "target with `draft-train adapt --other-target`, or use the target that it was made for."
        )
