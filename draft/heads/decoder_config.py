"""Sizes of a head's decoder layer, under the keys of a Llama config.json, which engines read."""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch

from draft.errors import UserError
from draft.target import Target
from draft.target.support import head_rope

# keys that change the arithmetic and are not built here: the only values that mean what is, absent ones aside
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish"),
    "num_hidden_layers": (1,),
    "partial_rotary_factor": (1.0, None),
    "logit_scale": (1.0, None),
}


@dataclass(kw_only=True)
class DecoderConfig:
    """The part of the configuration that heads of one decoder layer share."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # the target's
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    max_position_embeddings: int  # the target's
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


def sizes_like(target: Target) -> dict[str, Any]:
    """The fields of DecoderConfig for a layer of the target's own width.

    It has as many key-value heads as heads: the embedding reaches the residual stream through the values
    only, and a small target's grouped values are too narrow to carry a token's identity.
    """
    config = target.config
    eos = sorted(target.eos_token_ids)
    heads = config.num_attention_heads
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab_size": target.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": head_rope(config),
        "max_position_embeddings": target.stated_length,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if eos else None,
        "pad_token_id": config.pad_token_id,
    }


def read_sizes(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what may be missing or spelled otherwise filled in.

    Raises:
        UserError: for a key that changes the arithmetic and is not built here.
    """
    check_fixed(values, _FIXED)
    if "sliding_attention" in (values.get("layer_types") or ()):
        raise UserError("head config: layer_types has sliding_attention; use a head with full attention.")
    values = dict(values)
    heads = values.get("num_attention_heads", 1)
    groups = values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
    for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"):
        check_count(name, values.get(name, 1))
    values["head_dim"] = values.get("head_dim") or values.get("hidden_size", 0) // heads
    if heads % groups:
        raise UserError(
            f"head config: {heads} attention heads can't share {groups} key-value heads evenly; "
            "correct the one that is wrong."
        )
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"head config: the rotary embedding is {rope!r}; it must be an object with a rope_type.")
    values["rope_parameters"] = {
        **{key: value for key, value in rope.items() if key != "type"},
        "rope_type": rope.get("rope_type") or rope.get("type") or "default",
        "rope_theta": rope.get("rope_theta") or values.get("rope_theta") or 10000.0,
    }
    return values


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number above 0."""
    if type(value) is not int or value < 1:
        raise UserError(f"head config: {name} = {value!r}; it must be a whole number of at least 1.")


def fields_of(kind: type, values: dict[str, Any], name: str) -> dict[str, Any]:
    """The arguments of the dataclass `kind` among `values`; `name`: of the architecture, for the error.

    Raises:
        UserError: when some that have no default are missing, or a number is none that can be.
    """
    missing = [f.name for f in fields(kind) if f.default is MISSING and values.get(f.name) is None]
    if missing:
        raise UserError(f"head config: the keys {', '.join(missing)} are missing; this is not a whole {name} config.")
    for f in fields(kind):
        if f.type == "int" and f.name in values:
            check_count(f.name, values[f.name])
        if f.type == "float" and f.name in values:
            value = values[f.name]
            if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
                raise UserError(f"head config: {f.name} = {value!r}; it must be a finite number above 0.")
    return {f.name: values[f.name] for f in fields(kind) if f.name in values}


def decoder_json(architecture: str, values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a layer with these fields, with the legacy spelling of RoPE beside today's."""
    rope = values["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": [architecture],
        "model_type": "llama",
        **values,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def check_fixed(values: dict[str, Any], fixed: dict[str, tuple[Any, ...]], where: str = "") -> None:
    """Refuse a value of the `fixed` keys that means something else than what is built here."""
    for key, allowed in fixed.items():
        if key in values and values[key] not in allowed:
            raise UserError(
                f"head config: {where}{key} = {values[key]!r} is not supported; "
                f"only heads with {key} = {allowed[0]!r} are."
            )
