"""EAGLE-1 heads of other trainers: one set of tensor names, and three habits of writing config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from draft.errors import UserError
from draft.heads.eagle import EagleHead
from draft.interop.checks import Rule, TargetShape, exactly, rope, sizes
from draft.interop.formats import Format, own_config, own_tensors, sglang, vllm
from draft.interop.sources import (
    Checkpoint,
    Source,
    check_sizes,
    complete_layer,
    drop_embedding,
    is_the_targets,
    no_auxiliary_layers,
)
from draft.target import Target

_QUERIES = "layers.0.self_attn.q_proj.weight"
# tables that are computed
_LEFT_OUT = ("layers.0.self_attn.rotary_emb.inv_freq",)


def _is_eagle(found: Checkpoint) -> bool:
    """A layer that attends over `fc`'s output alone: EAGLE-3's reads the embedding beside it, and is twice as wide."""
    tensors = {name.removeprefix("model."): value for name, value in found.tensors.items()}
    if not {"fc.weight", _QUERIES} <= tensors.keys():
        return False
    size = tensors["fc.weight"].shape[0]
    return tensors["fc.weight"].shape[-1] == 2 * size and tensors[_QUERIES].shape[-1] == size


def _named(*endings: str) -> Callable[[Checkpoint], bool]:
    def recognise(found: Checkpoint) -> bool:
        architecture = (found.config.get("architectures") or [""])[0]
        return _is_eagle(found) and architecture.startswith(endings[0]) and architecture.endswith(endings[1])

    return recognise


def _translate(found: Checkpoint, target: Target, auxiliary_layers: list[int] | None) -> dict[str, Any]:
    no_auxiliary_layers(found, auxiliary_layers)
    found.tensors = {name.removeprefix("model."): value for name, value in found.tensors.items()}
    values = dict(found.config)
    check_sizes(
        found,
        (
            ("hidden size", values.get("hidden_size", len(found.tensors["fc.weight"])), target.hidden_size),
            ("vocabulary", values.get("vocab_size"), target.vocab_size),
        ),
    )
    drop_embedding(found, target)
    for name in _LEFT_OUT:
        if found.tensors.pop(name, None) is not None:
            found.notes.append(f"left out {name}: it is not the head's.")
    _drop_lm_head(found, target)
    _settle_biases(values, found)
    complete_layer(values, found, target)
    return values


def _drop_lm_head(found: Checkpoint, target: Target) -> None:
    """An EAGLE-1 head has none: vLLM fails on one, and SGLang passes over it."""
    own = found.tensors.pop("lm_head.weight", None)
    if own is None:
        return
    if not is_the_targets(own, target):
        raise UserError(
            f"{str(found.folder)!r}: lm_head.weight is not the target's, and engines use the target's with an EAGLE-1 "
            "head; use the target that it was made for."
        )
    found.notes.append("left out lm_head.weight: it is the target's.")


def _settle_biases(values: dict[str, Any], found: Checkpoint) -> None:
    """By the tensors: `bias` is fc's to SafeAILab, and the attention's to engines."""
    values.pop("bias", None)
    values["qkv_bias"] = "layers.0.self_attn.q_proj.bias" in found.tensors
    bias = found.tensors.get("fc.bias")
    if bias is not None and not values.get("eagle_fc_bias") and not bias.any():
        del found.tensors["fc.bias"]
        bias = None
        found.notes.append("left out fc.bias: it is all zeros.")
    values["eagle_fc_bias"] = bias is not None
    if bias is not None and bias.any():
        found.notes.append("fc has a bias, which SGLang knows and vLLM leaves out.")


EAGLE_SOURCES = (
    Source("EAGLE-1 of vLLM", _named("Eagle", "ForCausalLM"), _translate),
    Source("EAGLE-1 of SGLang", _named("", "ForCausalLMEagle"), _translate),
    Source("SafeAILab EAGLE-1", _is_eagle, _translate),
)


# The formats that EAGLE-1 heads are written in.
#
# Engines (vLLM 0.32.0's `llama_eagle.py`, SGLang 0.5.23's) load the same tensors by the same names, and look for
# another
# name of the architecture; SGLang's `fc` has a bias, random where the file has none, and vLLM's has not.


# why it is not written: format -> reason
EAGLE_NO_FORMAT = {
    "plain": "vLLM and SGLang look for different architectures in its config.json",
    "speculators": "vLLM no longer loads EAGLE-1 heads in it",
    "medusa": "it is for Medusa heads",
}


def _sglang_tensors(head: EagleHead, target: TargetShape) -> dict[str, Tensor]:
    zeros = torch.zeros(head.config.hidden_size, dtype=head.dtype)
    return {"fc.bias": zeros, **own_tensors(head, target)}


def _sglang_config(head: EagleHead, dtype: torch.dtype, target: TargetShape, length: int) -> dict[str, Any]:
    return {**head.config.as_json(dtype), "architectures": ["LlamaForCausalLMEagle"]}


def _shapes(config: dict[str, Any], *, fc_bias: bool) -> dict[str, tuple[int, ...]]:
    size, inner, layer = config["hidden_size"], config["intermediate_size"], "layers.0"
    queries = config["num_attention_heads"] * config["head_dim"]
    values = config["num_key_value_heads"] * config["head_dim"]
    widths = {"q_proj": queries, "k_proj": values, "v_proj": values}
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (size, 2 * size),
        f"{layer}.post_attention_layernorm.weight": (size,),
        **{f"{layer}.self_attn.{name}.weight": (width, size) for name, width in widths.items()},
        f"{layer}.self_attn.o_proj.weight": (size, queries),
        f"{layer}.mlp.gate_proj.weight": (inner, size),
        f"{layer}.mlp.up_proj.weight": (inner, size),
        f"{layer}.mlp.down_proj.weight": (size, inner),
    }
    if fc_bias:
        shapes["fc.bias"] = (size,)
    if config.get("qkv_bias"):
        shapes.update({f"{layer}.self_attn.{name}.bias": (width,) for name, width in widths.items()})
    return shapes


def no_fc_bias(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
    if "fc.bias" in tensors and tensors["fc.bias"].any():
        yield "fc has a bias, which vLLM silently leaves out; use --format sglang"


def no_qkv_bias(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
    if config.get("qkv_bias"):
        yield "SGLang's Llama layer has no biases of queries, keys and values; use --format vllm"


_COMMON: tuple[Rule, ...] = (sizes, rope)

EAGLE_FORMATS = {
    "vllm": Format(
        own_tensors,
        own_config,
        (*_COMMON, exactly(lambda config: _shapes(config, fc_bias=bool(config.get("eagle_fc_bias")))), no_fc_bias),
        lambda head: {"vLLM": vllm("eagle")},
    ),
    "sglang": Format(
        _sglang_tensors,
        _sglang_config,
        (*_COMMON, exactly(lambda config: _shapes(config, fc_bias=True)), no_qkv_bias),
        lambda head: {"SGLang": sglang("EAGLE")},
    ),
}
