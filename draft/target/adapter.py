"""A LoRA adapter on the target: what a team fine-tuned is the target then, and its head is adapted to that."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from draft.errors import UserError
from draft.files import file_sha256, read_json
from draft.target.support import first_not_finite, open_weights, wrong_dtype

log = logging.getLogger(__name__)

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# what merging honours, whatever its value; every other entry has to be absent or off
_HONOURED = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core",
    "trainable_token_indices", "eva_config", "use_dora", "use_qalora", "qalora_group_size", "use_bdlora",
    "runtime_config", "lora_bias", "target_parameters", "ensure_weight_tying",
}  # fmt: skip
# starts that leave the target's weights alone, or take out of them what can be computed again
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "pissa", "olora")
_ABOUT_CODE = (FutureWarning, DeprecationWarning)  # warnings that say nothing of the result
# PEFT's words about tied matrices, which are untied here
_ANSWERED = ("tie_word_embeddings", "no longer tied", "save_embedding_layers")


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
        UserError: for a folder without one, another kind than LoRA, and what merging would lose, by name.
    """
    name, path = str(folder), Path(folder).expanduser()
    for file in (_CONFIG, _WEIGHTS):
        if not (path / file).is_file():
            raise UserError(
                f"target adapter {name!r}: no {file} there; give the folder that PEFT's save_pretrained wrote."
            )
    values = read_json(path / _CONFIG)
    if not isinstance(values.get("rank_pattern") or {}, dict):
        raise UserError(f"target adapter {name!r}: rank_pattern is {values['rank_pattern']!r}; it must be an object.")
    kind = values.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"target adapter {name!r} is of the kind {kind}, and only LORA can be merged; merge it yourself and give "
            "the merged model as --target."
        )
    for key, value in sorted(values.items()):
        known = key in _HONOURED if key != "init_lora_weights" else value in _STARTS
        if value and not known:
            raise UserError(
                f"target adapter {name!r}: {key} = {json.dumps(value)[:60]} cannot be merged into what PEFT computes "
                "with it; train one without, or give a merged model as --target."
            )
    ranks = [values.get("r"), *(values.get("rank_pattern") or {}).values()]
    room = (path / _WEIGHTS).stat().st_size
    if any(isinstance(rank, int) and rank > room for rank in ranks):
        raise UserError(f"target adapter {name!r}: its ranks are {ranks}, and its file has {room} bytes; restore it.")
    misfit = wrong_dtype(open_weights(path / _WEIGHTS))
    if misfit is not None:
        raise UserError(f"target adapter {name!r}: tensor {misfit}, no plain floating-point one; save it again.")
    return Adapter(name, path, file_sha256(path / _CONFIG, path / _WEIGHTS)[:32])


def warn_of_other_template(adapter: Adapter, tokenizer: Any) -> None:
    """Log that the adapter's folder has another chat template than the target's, which is the one that is used."""
    settings, file = adapter.folder / "tokenizer_config.json", adapter.folder / "chat_template.jinja"
    theirs = file.read_text("utf-8") if file.is_file() else None
    if theirs is None and settings.is_file():
        theirs = read_json(settings).get("chat_template")
    if isinstance(theirs, list):  # several, each with a name
        theirs = {each.get("name"): each.get("template") for each in theirs if isinstance(each, dict)}.get("default")
    ours = tokenizer.chat_template
    if theirs and theirs != (ours.get("default") if isinstance(ours, dict) else ours):
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

    def misfit(reason: str) -> UserError:
        return UserError(
            f"target adapter {adapter.name!r} does not fit target {target} ({_first_line(reason)}); give the target "
            "that it was trained on."
        )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            wrapped = PeftModel.from_pretrained(model, str(adapter.folder))
            # True: whether the embedding belongs to it is nothing to ask the hub about
            kept = set(get_peft_model_state_dict(wrapped, save_embedding_layers=True))
        except Exception as error:  # PEFT raises of many kinds
            raise misfit(str(error)) from error
        _untie(wrapped.get_base_model())
        try:
            merged = wrapped.merge_and_unload(safe_merge=True)
        except Exception as error:  # NaNs, and parts that a matrix cannot hold
            raise UserError(
                f"target adapter {adapter.name!r} cannot be merged ({_first_line(str(error))}); train it again without."
            ) from error
    for text in dict.fromkeys(str(each.message) for each in caught if not issubclass(each.category, _ABOUT_CODE)):
        if "missing adapter keys" in text:
            raise misfit(text)
        if not any(words in text for words in _ANSWERED):
            log.warning("target adapter %r: PEFT warns: %s", adapter.name, text)
    unused = sorted(set(open_weights(adapter.folder / _WEIGHTS)) - kept)
    if unused:
        raise misfit(f"it has no place for {unused[0]}")
    wrong = first_not_finite(merged.state_dict())
    if wrong is not None:
        raise UserError(
            f"target adapter {adapter.name!r} cannot be merged ({wrong} would hold NaN or infinity); train it again."
        )
    both = hashlib.sha256(f"{fingerprint}:{adapter.sha256}".encode()).hexdigest()[:16]
    return merged, replace(adapter, fingerprint=both, base_fingerprint=fingerprint)


def _untie(model: Any) -> None:
    """Give the LM head a matrix of its own, where the adapter changes the one that it shares with the embedding."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    adapted = [
        part for end in ends for part in end.modules() if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    plain = []
    for end in ends:
        end = getattr(end, "original_module", end)
        plain.append(end.get_base_layer() if hasattr(end, "get_base_layer") else end)
    if adapted and plain[0].weight is plain[1].weight:
        plain[1].weight = nn.Parameter(plain[1].weight.data.clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    sizes = [line for line in lines if "size mismatch" in line]
    return (sizes or lines or ["no reason given"])[0][:200]
