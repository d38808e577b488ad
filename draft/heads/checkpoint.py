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
from draft.target.support import first_not_finite

PRETRAINED = Path(__file__).parents[1] / "pretrained"
TOKEN_MAPS = ("d2t", "t2d", "token_map")
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
    kind, config_values = head_config(folder)
    head = build_head(kind, config_values, read_tensors(folder / "model.safetensors"), str(folder))
    named = str(config_values.get("torch_dtype") or config_values.get("dtype") or "float32")
    wanted = dtype or DTYPES.get(named.removeprefix("torch."), torch.float32)
    head = head.to(device=device, dtype=wanted).eval()
    wrong = first_not_finite(head.state_dict())
    if wrong is not None:  # finite in the file, so too large for the dtype
        raise UserError(
            f"head {str(folder)!r}: tensor {wrong} is too large for {str(wanted).removeprefix('torch.')}; choose a "
            "wider --dtype."
        )
    about = folder / "draftsmith.json"
    return head, read_json(about) if about.is_file() else {}


def load_unchanged_head(folder: str | Path, target: Target) -> DraftHead:
    """Load a head for `target`, in its dtype, from files that do not change meanwhile, and remember their hash.

    Raises:
        UserError: as `load_head` and `attach_head`; when a file was written or replaced while they were read.
    """
    before = _file_hashes(folder)
    try:
        head, about = load_head(folder, dtype=target.dtype, device=target.device)
    finally:  # a half-written file is no whole one, either
        if _file_hashes(folder) != before:
            raise UserError(
                f"head {str(folder)!r}: its files changed while they were read; wait for its writer to end."
            )
    attach_head(head, about, target)
    head.fingerprint = before["model.safetensors"][:32]
    return head


def weights_bytes(folder: str | Path) -> int:
    """The size of a head's weights file; 0 where there is none."""
    path = _find(folder) / "model.safetensors"
    return path.stat().st_size if path.is_file() else 0


def _file_hashes(folder: str | Path) -> dict[str, str]:
    """The sha256 of each of a head's files that is there."""
    paths = [_find(folder) / name for name in sorted(HEAD_FILES)]
    return {path.name: file_sha256(path) for path in paths if path.is_file()}


def head_config(folder: str | Path) -> tuple[type[DraftHead], dict[str, Any]]:
    """The class and the config.json of a head, without its weights; names and errors as in `load_head`."""
    folder = _find(folder)
    values = read_json(folder / "config.json")
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and names else names or "(none)"
    kind = next((each for each in ARCHITECTURES.values() if each.stored_as == name), None)
    if kind is None:
        known = ", ".join(each.stored_as for each in ARCHITECTURES.values())
        raise UserError(f"head {str(folder)!r}: architecture {name} is not one of {known}.")
    return kind, values


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
        shipped = ", ".join(sorted(path.parent.name for path in PRETRAINED.glob("*/config.json")))
        raise UserError(
            f"head {str(folder)!r}: no config.json there; give a folder that `draft-train merge` wrote, "
            f"or one of: {shipped}."
        )
    return Path(folder)


def build_head(
    kind: type[DraftHead],
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    name: str,
    dtype: torch.dtype | None = None,
) -> DraftHead:
    """The head called `name` with a config.json of these `values` and with `tensors`, by our own files' names.

    dtype: of its weights; None: float32.

    Raises:
        UserError: naming a wrong entry of the configuration, or the first missing, unexpected, misshapen or quantised
            tensor, one that is not finite, and a wrong token map.
    """
    if values.get("quantization_config") or values.get("compression_config"):
        raise UserError(
            f"head {name!r}: its config.json has a quantization_config; use the head before it was quantised."
        )
    config = kind.config_class.from_dict(values)
    _check_room(config, sum(value.numel() for value in tensors.values()), name)
    head = kind(config)
    if dtype is not None:
        head.to(dtype)
    _fill(head, tensors, name)
    return head


def _check_room(config: Any, numbers: int, name: str) -> None:
    """Refuse sizes that the file cannot have tensors for, before memory is taken for them."""
    size, blocks = config.hidden_size, getattr(config, "num_heads", 1) * getattr(config, "num_layers", 1)
    needed = {
        "hidden_size": size * size,
        "vocab_size": config.vocab_size,
        "num_heads": blocks * size * size,
        "auxiliary_layers": getattr(config, "num_auxiliary", 1) * size * size,
        "intermediate_size": getattr(config, "intermediate_size", 1) * size,
        "num_attention_heads": getattr(config, "num_attention_heads", 1) * getattr(config, "head_dim", 1) * size,
        "draft_vocab_size": 0 if getattr(config, "shared_lm_head", True) else config.draft_vocab_size * size,
    }
    for key, count in needed.items():
        if count > numbers:
            raise UserError(
                f"head {name!r}: its config.json says {key} = {getattr(config, key)}, and its tensors hold {numbers} "
                "numbers in all; the two files do not belong together."
            )


def _fill(head: DraftHead, tensors: dict[str, Tensor], name: str) -> None:
    """Put `tensors` into the head, strictly; raises as `build_head`."""
    if "embed_tokens.weight" in tensors:
        raise UserError(
            f"head {name!r}: tensor embed_tokens.weight is unexpected: the target's embedding is used, and this may "
            f"differ; `draft-train import {name}` compares them, and leaves it out."
        )
    for theirs, ours in head.tensor_renames:
        tensors = {key.replace(theirs, ours, 1): value for key, value in tensors.items()}
    check_kinds(tensors, f"head {name!r}")
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
    wrong = first_not_finite(tensors)
    if wrong is not None:
        raise UserError(f"head {name!r}: tensor {wrong} holds NaN or infinity; get the head again.")
    head.load_state_dict(tensors)


def check_kinds(tensors: Mapping[str, Tensor], name: str) -> None:
    """Refuse weights that are no plain floating-point numbers, and token maps that are no integers.

    A map in bfloat16 or float16 has lost which tokens it names: these count exactly to 256 and 2048 only.
    """
    for key, value in tensors.items():
        dtype = str(value.dtype).removeprefix("torch.")
        if key.rpartition(".")[2] in TOKEN_MAPS:
            if value.is_floating_point() or value.is_complex() or value.dim() != 1:
                raise UserError(
                    f"{name}: {key} is of dtype {dtype} and shape {list(value.shape)}; a token map is a list of "
                    "integers, and others have lost which tokens they name: get the head with its map as trained."
                )
        elif value.dim() == 0:
            raise UserError(f"{name}: tensor {key} is a single number, which no part of a head is; get the head again.")
        elif value.dtype not in DTYPES.values():
            raise UserError(
                f"{name}: tensor {key} is of dtype {dtype}, no plain floating-point one; use the head before it was "
                "quantised."
            )


def _with_token_map(head: DraftHead, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Derive t2d where it is missing, as engines do; leave out a full vocabulary's maps, which must be trivial."""
    tensors = dict(tensors)
    if head.config.full_vocabulary:
        if tensors.pop("d2t", head.d2t).any() or not tensors.pop("t2d", head.t2d).all():
            raise UserError(
                f"head {name!r}: d2t reorders a draft vocabulary as large as the target's ({head.config.vocab_size}); "
                "engines take such a head only without a map."
            )
    elif "d2t" in tensors:
        tensors["d2t"] = tensors["d2t"].to(torch.int64)
        problem = token_map_problem(tensors["d2t"], len(head.d2t), len(head.t2d))
        if problem is not None:
            raise UserError(f"head {name!r}: {problem}; use a head made for this vocabulary.")
        marks = torch.zeros_like(head.t2d)
        marks[tensors["d2t"] + torch.arange(len(head.d2t))] = True
        theirs = tensors.get("t2d", marks)
        if theirs.shape != marks.shape or not torch.equal(theirs.bool(), marks):
            raise UserError(
                f"head {name!r}: t2d marks {int(theirs.bool().sum())} of {len(theirs)} target tokens, and d2t gives "
                f"{len(head.d2t)} of {len(marks)}, others; the two belong to different heads."
            )
        tensors["t2d"] = marks
    return tensors


def token_map_problem(d2t: Tensor, size: int, vocab: int) -> str | None:
    """The mistake in offsets d2t [draft_vocab] into a vocabulary, in words; None: none."""
    if d2t.shape != (size,):
        return f"d2t has {len(d2t)} entries and the draft vocabulary {size}"
    ids = d2t.to(torch.int64) + torch.arange(size)
    outside = ((ids < 0) | (ids >= vocab)).nonzero()
    if len(outside):
        place = int(outside[0])
        absolute = int(d2t.min()) >= 0 and int(d2t.max()) < vocab and len(d2t.unique()) == size
        hint = " (it seems to hold target ids where offsets are expected)" if absolute else ""
        return f"d2t maps draft id {place} to target id {int(ids[place])}, and the target's vocabulary is {vocab}{hint}"
    if len(ids.unique()) != size:
        return f"d2t maps {size} draft ids to only {len(ids.unique())} target ids"
    return None


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
