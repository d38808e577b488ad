"""Configurations of heads, under the keys of the config.json files that engines read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Annotated, Any, Self

import torch
from pydantic import ConfigDict, Field, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from draft.errors import UserError
from draft.target import Target
from draft.target.support import head_rope, impossible

STRICT = ConfigDict(strict=True, extra="forbid")  # of the pydantic dataclasses below and in the heads' files
# keys that change the arithmetic and are not built here: the only values that mean what is, absent ones aside
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish"),
    "num_hidden_layers": (1,),
    "partial_rotary_factor": (1.0, None),
}
# words in the names of keys that may change the arithmetic, and the keys of that kind that are honoured, checked
# elsewhere, or matter in training only; others have to be absent, off, or factors of 1
_SUSPICIOUS = re.compile(
    r"attn|attention|rope|rotary|window|sink|softcap|multiplier|scal(e|ing)(\b|_)|_emb\b|quant|compress|clip|chunk|alibi|"
    r"bias|norm|bidirectional|causal|interleave"
)
_KNOWN = {
    "num_attention_heads", "attention_bias", "mlp_bias", "attention_dropout", "attn_implementation", "sliding_window",
    "_attn_implementation", "use_sliding_window", "max_window_layers", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor", "rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_before_residual", "norm_before_fc",
    "fc_norm", "norm_output", "use_aux_norm", "qkv_bias", "eagle_fc_bias", "medusa_fc_bias", "bias", "norm_topk_prob",
    "max_position_embeddings", "tie_word_embeddings", "original_max_position_embeddings",
}  # fmt: skip
_ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies depend on nothing but the configuration
ROPES_BY_LENGTH = ("dynamic", "longrope")


class HeadConfig:
    """The common part of every architecture's configuration, which is a pydantic dataclass."""

    hidden_size: int
    vocab_size: int  # the target's
    draft_vocab_size: int

    def __post_init__(self) -> None:
        if getattr(self, "shared_lm_head", False) and not self.full_vocabulary:
            raise UserError(
                f"head config: the LM head is the target's, over {self.vocab_size} tokens, and draft_vocab_size is "
                f"{self.draft_vocab_size}; a reduced vocabulary needs an LM head of its own."
            )

    @property
    def full_vocabulary(self) -> bool:
        """The draft vocabulary is the target's: engines then refuse a token map."""
        return self.draft_vocab_size == self.vocab_size

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """The configuration of these fields; UserError for missing and impossible ones."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = min(error.errors(), key=lambda problem: problem["type"] == "missing")
            key = first["loc"][0]
            if first["type"] == "missing":
                raise UserError(f"head config: the key {key} is missing; this is not a whole config.json.") from None
            raise UserError(f"head config: {key} = {first['input']!r}: {first['msg']}; correct it.") from None

    @classmethod
    def of_known(cls, values: Mapping[str, Any]) -> Self:
        """The configuration of those of the `values` that are its fields; raises as `checked`."""
        return cls.checked(**{f.name: values[f.name] for f in fields(cls) if f.name in values})  # type: ignore[arg-type]


@dataclass(kw_only=True, config=STRICT)
class DecoderConfig(HeadConfig):
    """The part of the configuration that heads of one decoder layer share."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt  # the target's
    rms_norm_eps: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    rope_parameters: dict[str, Any]
    max_position_embeddings: PositiveInt  # the target's
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        theta = self.rope_parameters.get("rope_theta", 10000.0)
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or impossible("rope_theta", theta):
            raise UserError(f"head config: rope_theta = {theta!r}: it must be a finite number above 1; correct it.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"head config: {self.num_attention_heads} attention heads can't share {self.num_key_value_heads} "
                "key-value heads evenly; correct the one that is wrong."
            )


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
    check_unknown(values)
    window, kinds = values.get("sliding_window"), values.get("layer_types") or ()
    if window and values.get("use_sliding_window") is not False:
        raise UserError(
            f"head config: sliding_window = {window!r} is not supported; use a head with full attention, or set "
            "use_sliding_window to false where the window was not used in training."
        )
    if not isinstance(kinds, (list, tuple)) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"head config: layer_types = {kinds!r} is not supported; only full_attention is.")
    values = dict(values)
    heads = values.get("num_attention_heads", 1)
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    with suppress(KeyError, TypeError, ZeroDivisionError):  # `HeadConfig.checked` refuses the value
        if values.get("head_dim") is None:
            values["head_dim"] = values["hidden_size"] // heads
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"head config: the rotary embedding is {rope!r}; it must be an object with a rope_type.")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ROPES_BY_LENGTH:
        raise UserError(
            f"head config: the rotary embedding is of the kind {kind!r}, which depends on a text's length; use a head "
            f"with one of {', '.join(_ROPES)}."
        )
    check_fixed(rope, {"partial_rotary_factor": (1.0, None)}, "the rotary embedding's ")
    nested = next((key for key, value in rope.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise UserError(
            f"head config: rope_parameters has an object for {nested}; give the one of the head's layer alone."
        )
    for key, value in {"rope_theta": values.get("rope_theta"), **(values.get("rope_scaling") or {})}.items():
        if value is not None and key in rope and rope[key] != value:
            raise UserError(
                f"head config: {key} is {rope[key]!r} in rope_parameters and {value!r} beside it, and engines read "
                "either; correct the one that is wrong."
            )
    theta = rope.get("rope_theta") if rope.get("rope_theta") is not None else values.get("rope_theta")
    values["rope_parameters"] = {
        **{key: value for key, value in rope.items() if key != "type"},
        "rope_type": kind,
        "rope_theta": 10000.0 if theta is None else theta,
    }
    return values


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


def read_flag(values: Mapping[str, Any], key: str) -> bool:
    """A value that is true or false, false where it is absent or null; UserError for another."""
    value = values.get(key) or False
    if value not in (False, True):
        raise UserError(f"head config: {key} = {value!r}; it must be true or false.")
    return bool(value)


def check_unknown(values: Mapping[str, Any]) -> None:
    """Refuse a key that may change the arithmetic and is not known here, unless it is off or a factor of 1."""
    for key, value in values.items():
        off = not value or (not isinstance(value, bool) and value == 1)
        if not off and key not in _KNOWN and _SUSPICIOUS.search(key):
            raise UserError(
                f"head config: {key} = {str(value):.60} is not supported, and may change what the head computes; use a "
                "head without, or take the entry out where it has no effect."
            )


def check_fixed(values: dict[str, Any], fixed: dict[str, tuple[Any, ...]], where: str = "") -> None:
    """Refuse a value of the `fixed` keys that means something else than what is built here."""
    for key, allowed in fixed.items():
        if key in values and values[key] not in allowed:
            raise UserError(
                f"head config: {where}{key} = {values[key]!r} is not supported; "
                f"only heads with {key} = {allowed[0]!r} are."
            )
