"""Import: heads of other trainers, brought to our one folder format, or refused with the reason."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from draft.errors import UserError
from draft.files import read_json
from draft.heads import DraftHead, Eagle3Head, EagleHead, MedusaHead
from draft.heads.checkpoint import attach_head, build_head, check_kinds, save_head
from draft.interop import eagle, eagle3, medusa
from draft.interop.formats import Checkpoint, Source
from draft.target import Target
from draft.target.hidden_states import check_hidden_states

SOURCES: dict[type[DraftHead], Source] = {
    Eagle3Head: eagle3.SOURCE,
    EagleHead: eagle.SOURCE,
    MedusaHead: medusa.SOURCE,
}


@dataclass(frozen=True)
class Imported:
    """Result of an import."""

    head: Path
    kind: str
    notes: list[str]  # sentences: what was filled in, left out or assumed


def import_head(
    source: str | Path, target: Target, out: str | Path, *, auxiliary_layers: list[int] | None = None
) -> Imported:
    """Write the head in the folder `source` as a head for `target`, bit for bit in its own dtype.

    auxiliary_layers: the target's layers that an EAGLE-3 head was trained on, counted as layers that have run; for
    heads whose config.json leaves that open, or is wrong.

    Raises:
        UserError: for an unknown format, a head that doesn't fit the target, naming both values, or a target whose
            hidden states cannot be captured.
    """
    found = read_checkpoint(source)
    found.auxiliary_layers = auxiliary_layers
    check_kinds(found.tensors, repr(str(source)))
    kinds = [(head, name, is_it) for head, source in SOURCES.items() for name, is_it in source.kinds.items()]
    known = next(((head, name) for head, name, is_it in kinds if is_it(found)), None)
    if known is None:
        raise UserError(
            f"{str(found.folder)!r} (architecture {found.architecture or 'none'}, tensors "
            f"{', '.join(sorted(found.tensors)[:3])}, ...) is in none of the formats "
            f"{'; '.join(name for _, name, _ in kinds)}."
        )
    architecture, kind = known
    if auxiliary_layers is not None and architecture is not Eagle3Head:
        raise UserError(
            f"--auxiliary-layers {','.join(map(str, auxiliary_layers))}: {str(source)!r} is no EAGLE-3 head, and reads "
            "the target's last hidden states; leave the flag out."
        )
    if found.config.get("quantization_config"):
        raise UserError(
            f"{str(source)!r}: its config.json has a quantization_config; use the head before it was quantised."
        )
    values = SOURCES[architecture].translate(found, target)
    dtype = _widest_dtype(found)
    head = build_head(architecture, values, found.tensors, str(source), dtype)
    attach_head(head, {}, target)
    check_hidden_states(target, head.auxiliary_layers(target))
    about = {**found.about, **_made_for(found, target), "imported_as": kind}
    save_head(head, out, dtype=dtype, about=about)
    return Imported(Path(out), kind, found.notes)


def _widest_dtype(found: Checkpoint) -> torch.dtype:
    """The dtype of the file; where there are several, the one that holds them all."""
    dtypes = sorted({value.dtype for value in found.tensors.values() if value.is_floating_point()}, key=str)
    if not dtypes:
        raise UserError(f"{str(found.folder)!r} has no floating-point tensors; give the folder of a whole head.")
    widest = reduce(torch.promote_types, dtypes)
    if len(dtypes) > 1:
        found.notes.append(f"brought tensors of {', '.join(map(str, dtypes))} to {widest}.")
    return widest


def _made_for(found: Checkpoint, target: Target) -> dict[str, Any]:
    """The target that draftsmith.json is to name: this one, unless one of our exports says which it was."""
    keys = ("target", "target_fingerprint", "target_adapter")
    before = found.about.get("target_fingerprint")
    if before and before != target.fingerprint:
        found.notes.append(
            f"it was made for target {found.about.get('target')!r} with fingerprint {before}, and {target.title} has "
            f"{target.fingerprint}: it stays a head for that one; adapt it to this one with `draft-train adapt "
            "--other-target`."
        )
        return {key: found.about.get(key) for key in keys}
    adapter = target.adapter and str(target.adapter.folder.resolve())
    return dict(zip(keys, (target.name, target.fingerprint, adapter), strict=True))


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Read its safetensors files, or its pickles through `torch.load(weights_only=True)`, which runs no code.

    A checkpoint of several files is found by its index.

    Raises:
        UserError: for a folder without them, a damaged file, or a pickle that holds more than tensors.
    """
    folder = Path(folder).expanduser()
    config = read_json(folder / "config.json")
    for part in (config, config.get("transformer_layer_config") or {}):
        for keys, kind, words in ((_OBJECTS, dict, "an object"), (_NUMBERS, int, "a whole number")):
            for key in keys:
                value = part.get(key)
                if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                    raise UserError(f"{str(folder)!r}: {key} is {value!r} in config.json; it must be {words}.")
    about = read_json(folder / "draftsmith.json") if (folder / "draftsmith.json").is_file() else {}
    for file, read in _READERS.items():
        for path, reader in ((folder / file, read), (folder / f"{file}.index.json", _read_shards)):
            if path.is_file():
                return Checkpoint(folder, config, reader(path), about)
    raise UserError(f"{str(folder)!r} has no {' or '.join(_READERS)}; give the folder that the head was published as.")


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
    named = isinstance(values, dict) and all(isinstance(name, str) for name in values)
    if not named or not all(isinstance(value, Tensor) for value in values.values()):
        raise UserError(f"{str(path)!r} holds more than named tensors; save the head's state dict alone.")
    odd = next((name for name, value in values.items() if value.layout != torch.strided or value.is_meta), None)
    if odd is not None:
        raise UserError(
            f"{str(path)!r}: tensor {odd} is sparse, or has no data; save the head's tensors as plain ones."
        )
    return {name: value.contiguous() for name, value in values.items()}


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All files that an index names, each read as if it were the only one; the index decides which tensor is whose."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{str(index)!r} has no weight_map of tensors to files; give the folder of a whole head.")
    read = _READERS[index.name.removesuffix(".index.json")]
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        path = index.parent / file
        if Path(file).name != file or not path.is_file():
            raise UserError(f"{str(index)!r} names {file!r}, which is no file beside it; download the whole head.")
        held = read(path)
        for name in (name for name, place in places.items() if place == file):
            if name not in held:
                raise UserError(f"{str(path)!r} lacks {name}, which its index says it has; download the head again.")
            tensors[name] = held[name]
    return tensors


_OBJECTS = ("eagle_config", "rope_parameters", "rope_scaling", "transformer_layer_config", "speculators_config")
_NUMBERS = (
    "hidden_size", "target_hidden_size", "vocab_size", "draft_vocab_size", "num_heads", "medusa_num_heads",
    "num_hidden_layers", "medusa_num_layers", "num_attention_heads", "max_position_embeddings",
)  # fmt: skip
_READERS = {
    "model.safetensors": _read_safetensors,
    "pytorch_model.bin": _read_pickle,
    "medusa_lm_head.safetensors": _read_safetensors,
    "medusa_lm_head.pt": _read_pickle,
}
