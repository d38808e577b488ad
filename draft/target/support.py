"""Checks of a target by its configuration and its modules, before gigabytes of weights are read."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn

from draft.errors import UserError

# rotary embeddings that treat all tokens and layers alike
_HEAD_ROPES = ("default", "linear", "llama3", "yarn")


def check_config(name: str, config: Any) -> None:
    """Refuse what cannot be a target, with the reason.

    config: the model's transformers configuration, with that of the text part inside where there is one.

    Raises:
        UserError: for an encoder-decoder, a model that is no language model, attention to later tokens or chosen by
            the tokens' values, and quantised weights.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text, kind, reason = config.get_text_config(), config.model_type, None
    if getattr(config, "is_encoder_decoder", False):
        reason = f"{kind} is an encoder-decoder; use a decoder-only model such as Llama, Qwen or Gemma"
    elif quantisation := getattr(config, "quantization_config", None):
        values = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
        reason = (
            f"its weights are quantised ({values.get('quant_method') or 'an unknown method'}), and heads are trained "
            "and served beside plain ones; use the checkpoint that it was quantised from (of quantised files only GGUF "
            "is taken, and dequantised while it is read)"
        )
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and text is not config:
        reason = (
            f"{kind} is a model of text and other media, which transformers does not load as a language model; "
            f"save its text part ({text.model_type}) as a model of its own, and use that"
        )
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        reason = f"{kind} is no causal language model that transformers knows; use one such as Llama, Qwen or Gemma"
    elif kind == "doge":
        reason = (
            f"{kind} chooses by the values of the tokens which of them a head sees, and its masks don't fit rows of "
            "different lengths in one batch; use a model with plain attention such as Llama, Qwen or Gemma"
        )
    elif getattr(text, "use_bidirectional_attention", None):
        reason = f"{kind} attends to later tokens too (use_bidirectional_attention), so it cannot write text"
    if reason is not None:
        raise UserError(f"target {name!r}: {reason}.")


def check_model(name: str, config: Any, dtype: torch.dtype | str, device: torch.device) -> None:
    """Refuse a target of other modules than heads need, or with weights larger than the device that they are to be on.

    dtype: that of loading, "auto" for the checkpoint's own.

    Raises:
        UserError: naming the architecture, or both sizes.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # loading it will give the reason
        return
    decoder_of(name, model)
    if device.type not in ("cpu", "cuda"):
        return
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if not isinstance(dtype, torch.dtype):
        dtype = config.dtype or torch.float32
    needed = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    if needed > free:
        raise UserError(
            f"target {name!r} has {needed / 2**30:.1f} GiB of weights in {str(dtype).removeprefix('torch.')} and "
            f"{free / 2**30:.1f} GiB are free on {device}; a target spread over several devices is not supported: "
            "choose a narrower --dtype, a smaller target, or a larger device."
        )


def decoder_of(name: str, model: Any) -> Any:
    """The decoder of a causal language model, with its `layers` and its final `norm`; UserError for other shapes."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if not (isinstance(getattr(decoder, "layers", None), nn.ModuleList) and hasattr(decoder, "norm")):
        raise UserError(
            f"target {name!r}: architecture {type(model).__name__} has no list of decoder layers with a final "
            "norm; use a decoder-only model such as Llama, Qwen or Mistral."
        )
    if not hasattr(model.config.get_text_config(), "rms_norm_eps"):
        raise UserError(
            f"target {name!r}: {type(model).__name__} has no RMSNorm, which an EAGLE-3 head needs; use another."
        )
    return decoder


def check_architecture(config: Any, name: str) -> None:
    """Raise UserError for a target whose layers are of a kind that there is no cache for."""
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(
            f"target {name!r} has layers of kind {min(unknown)}, for which there is no cache; use a target "
            "whose layers are all full_attention or sliding_attention."
        )


def rope_limit(config: Any) -> tuple[str, int] | None:
    """The kind of rotary embedding, and its limit in tokens, where its frequencies change for all tokens beyond it.

    transformers looks at the longest position of a batch, so there one row would change what another one gives, and
    entries of the cache made before would be wrong.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    limits = [
        (kind, int(each.get("original_max_position_embeddings") or config.max_position_embeddings))
        if kind == "longrope"
        else (kind, int(config.max_position_embeddings))
        for each in nested or [parameters]
        if (kind := str(each.get("rope_type", "default"))) == "longrope" or "dynamic" in kind
    ]
    return min(limits, key=lambda limit: limit[1], default=None)


def head_rope(config: Any) -> dict[str, Any]:
    """The rotary embedding of a new head for a target: its target's, where that is one for all tokens and layers.

    A head attends to everything before, as a target's full-attention layers do, and turns all of a head's width.
    """
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    kinds = [value for value in parameters.values() if isinstance(value, dict)]
    if kinds:  # a kind of layer each, of which one may have none
        parameters = dict(parameters.get("full_attention") or kinds[0])
    parameters.pop("partial_rotary_factor", None)
    if parameters.get("rope_type", "default") in _HEAD_ROPES:
        return {"rope_theta": 10000.0, "rope_type": "default", **parameters}
    return {"rope_theta": parameters.get("rope_theta", 10000.0), "rope_type": "default"}
