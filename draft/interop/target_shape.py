"""A target's sizes, and single tensors of it, without loading it: it may be larger than this machine."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from draft.bundled import BUNDLED_TARGET, bundled_target_folder
from draft.errors import UserError
from draft.interop.rules import TargetShape


def target_shape(name: str) -> TargetShape:
    """Read the config.json of a target: hub id, folder, or the bundled one.

    Raises:
        UserError: when there is none, or it is a GGUF file, which the other engines' EAGLE-3 does not take.
    """
    from transformers import AutoConfig

    if name.endswith(".gguf"):
        raise UserError(f"target {name!r}: vLLM and SGLang serve EAGLE-3 beside a folder or hub id, not a GGUF file.")
    path = str(bundled_target_folder()) if name == BUNDLED_TARGET else name
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"target {name!r}: its config.json can't be read ({reason}); pass --target.") from error
    inner = config.get_text_config()
    return TargetShape(
        path=path,
        architecture=(config.architectures or ["unknown"])[0],
        hidden_size=inner.hidden_size,
        vocab_size=inner.vocab_size,
        num_layers=inner.num_hidden_layers,
        max_length=int(getattr(inner, "max_position_embeddings", 2048)),
    )


def target_tensor(path: str, names: tuple[str, ...]) -> Tensor:
    """The first of `names` (ends of tensor names) that a target's safetensors files have.

    Raises:
        UserError: when the target has no safetensors files, or none of them has such a tensor.
    """
    files = _safetensors_files(path)
    for name in names:
        for file in files:
            with safe_open(file, "pt") as tensors:
                found = next((key for key in tensors.keys() if f".{key}".endswith(f".{name}")), None)  # noqa: SIM118
                if found is not None:
                    return tensors.get_tensor(found)
    raise UserError(f"target {path!r}: its safetensors files have no {' or '.join(names)}; export in another format.")


def _safetensors_files(path: str) -> list[str]:
    """Its one file, or the shards that its index names; hub ids are looked up as transformers does."""
    from transformers.utils.hub import cached_file

    def find(name: str) -> str | None:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False)

    single, index = find("model.safetensors"), find("model.safetensors.index.json")
    if single is not None:
        return [single]
    if index is None:
        raise UserError(f"target {path!r} has no safetensors files, which this format's copies come from.")
    shards = dict.fromkeys(json.loads(Path(index).read_text())["weight_map"].values())
    return [file for file in map(find, shards) if file is not None]
