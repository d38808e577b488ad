"""A LoRA adapter on the target: what a team fine-tuned is the target then, and its head is adapted to that."""

from __future__ import annotations

import hashlib
import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from draft.errors import UserError
from draft.files import file_sha256, read_json

log = logging.getLogger(__name__)

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter in a folder."""

    name: str  # as the user gives it
    folder: Path
    sha256: str  # of its two files
    fingerprint: str = ""  # of the target with it, once merged
    base_fingerprint: str = ""  # of the target without it


def read_adapter(folder: str | Path) -> Adapter:
    """Find the adapter in `folder` and see that it is one that can be merged.

    Raises:
        UserError: for a folder without one, and for another kind than LoRA.
    """
    name, path = str(folder), Path(folder).expanduser()
    for file in (_CONFIG, _WEIGHTS):
        if not (path / file).is_file():
            raise UserError(
                f"target adapter {name!r}: no {file} there; give the folder that PEFT's save_pretrained wrote."
            )
    kind = read_json(path / _CONFIG).get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"target adapter {name!r} is of the kind {kind}, and only LORA can be merged; merge it yourself and give "
            "the merged model as --target."
        )
    return Adapter(name, path, file_sha256(path / _CONFIG, path / _WEIGHTS)[:32])


def warn_of_other_template(adapter: Adapter, tokenizer: Any) -> None:
    """Log that the adapter's folder has another chat template than the target's, which is the one that is used."""
    from transformers import AutoTokenizer

    if not (adapter.folder / "tokenizer_config.json").is_file():
        return
    try:
        theirs = AutoTokenizer.from_pretrained(adapter.folder).chat_template
    except Exception:  # nothing of it is used
        return
    if theirs and theirs != tokenizer.chat_template:
        log.warning(
            "target adapter %r comes with another chat template than the target's, which is used; where it was "
            "fine-tuned with that one, save it as the target's chat_template.jinja",
            adapter.name,
        )


def merge_into_target(model: Any, adapter: Adapter, target: str, fingerprint: str) -> tuple[Any, Adapter]:
    """Merge `adapter` into `model`, in place; the target's files stay as they are.

    target, fingerprint: of the model without it. The adapter that is returned knows the fingerprint with it.

    Raises:
        UserError: when the adapter was made for a model of other layers or shapes.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    def misfit(reason: str) -> UserError:
        return UserError(
            f"target adapter {adapter.name!r} does not fit target {target} ({_first_line(reason)}); give the target "
            "that it was trained on."
        )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            wrapped = PeftModel.from_pretrained(model, str(adapter.folder))
        except Exception as error:  # PEFT raises of many kinds
            raise misfit(str(error)) from error
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise misfit(str(warning.message))
    with safe_open(adapter.folder / _WEIGHTS, "pt") as tensors:
        unused = sorted(set(tensors.keys()) - set(get_peft_model_state_dict(wrapped)))
    if unused:
        raise misfit(f"it has no place for {unused[0]}")
    try:
        merged = wrapped.merge_and_unload(safe_merge=True)
    except ValueError as error:  # NaNs
        raise UserError(
            f"target adapter {adapter.name!r} cannot be merged ({_first_line(str(error))}); train it again."
        ) from error
    both = hashlib.sha256(f"{fingerprint}:{adapter.sha256}".encode()).hexdigest()[:16]
    return merged, replace(adapter, fingerprint=both, base_fingerprint=fingerprint)


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    sizes = [line for line in lines if "size mismatch" in line]
    return (sizes or lines or ["no reason given"])[0][:200]
