"""Checks of a target by its configuration, before gigabytes of weights are read."""

from __future__ import annotations

from typing import Any

from draft.errors import UserError

# keys of configurations all of whose layers, or an unnamed part of them, keep a recurrent state
_RECURRENT = ("state_size", "mamba_d_state", "ssm_state_size", "lru_width")
_RECURRENT_KINDS = ("rwkv", "xlstm")
# models whose layers make the attention mask over again, out of the values of the tokens
_OWN_MASKS = ("doge",)
# rotary embeddings that treat all tokens and layers alike
_HEAD_ROPES = ("default", "linear", "llama3", "yarn")


def check_config(name: str, config: Any) -> None:
    """Refuse what cannot be a target, with the reason.

    config: the model's transformers configuration, with that of the text part inside where there is one.

    Raises:
        UserError: for an encoder-decoder, a model that is no language model, a state-space model, attention to later
            tokens, and quantised weights.
    """
    if reason := _why_not(config):
        raise UserError(f"target {name!r}: {reason}.")


def _why_not(config: Any) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text, kind = config.get_text_config(), config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder; use a decoder-only model such as Llama, Qwen or Gemma"
    if quantisation := getattr(config, "quantization_config", None):
        values = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
        method = values.get("quant_method") or "an unknown method"
        if method == "bitsandbytes":
            method += ", 4 bits" if values.get("load_in_4bit") else ", 8 bits"
        return (
            f"its weights are quantised ({method}), and heads are trained and served beside plain ones; use the "
            "checkpoint that it was quantised from (of quantised files only GGUF is taken, and dequantised while it is "
            "read)"
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if text is not config:
            return (
                f"{kind} is a model of text and other media, which transformers does not load as a language model; "
                f"save its text part ({text.model_type}) as a model of its own, and use that"
            )
        return f"{kind} is no causal language model that transformers knows; use one such as Llama, Qwen or Gemma"
    # where some of the layers attend, the code that runs them refuses those of the others that it cannot run
    kinds = set(getattr(text, "layer_types", None) or ()) - {"linear_attention"}
    attends = any("attention" in layer for layer in kinds)
    if kind in _RECURRENT_KINDS or (not attends and any(getattr(text, key, None) for key in _RECURRENT)):
        return (
            f"{kind} is a state-space or recurrent model, whose state cannot be taken back when a draft is rejected; "
            "use a model whose layers all attend"
        )
    if kind in _OWN_MASKS:
        return (
            f"{kind} chooses by the values of the tokens which of them a head sees, and its masks don't fit rows of "
            "different lengths in one batch; use a model with plain attention such as Llama, Qwen or Gemma"
        )
    if getattr(text, "use_bidirectional_attention", None):
        return f"{kind} attends to later tokens too (use_bidirectional_attention), so it cannot write text"
    return None


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


def check_room(name: str, config: Any, dtype: Any, device: Any) -> None:
    """Refuse a target whose weights are larger than the device that they are to be on.

    dtype: that of loading, "auto" for the checkpoint's own.

    Raises:
        UserError: naming both sizes.
    """
    import psutil
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # loading it will give the reason
        return
    if device.type not in ("cpu", "cuda"):
        return
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if not isinstance(dtype, torch.dtype):
        dtype = config.dtype or torch.float32
    wanted = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    if wanted > free:
        raise UserError(
            f"target {name!r} has {wanted / 2**30:.1f} GiB of weights in {str(dtype).removeprefix('torch.')} and "
            f"{free / 2**30:.1f} GiB are free on {device}; a target spread over several devices is not supported: "
            "choose a narrower --dtype, a smaller target, or a larger device."
        )


def check_architecture(config: Any, name: str) -> None:
    """Raise UserError for a target whose layers are of a kind that there is no cache for."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    unknown = sorted(kinds - {"full_attention", "sliding_attention"})
    if unknown:
        raise UserError(
            f"target {name!r} has layers of kind {unknown[0]}, for which there is no cache; use a target "
            "whose layers are all full_attention or sliding_attention."
        )
