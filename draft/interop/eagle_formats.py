"""The formats that EAGLE-1 heads are written in.

Engines (vLLM 0.32.0's `llama_eagle.py`, SGLang 0.5.23's) load the same tensors by the same names, and look for another
name of the architecture; SGLang's `fc` has a bias, random where the file has none, and vLLM's has not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from draft.heads.eagle import EagleHead
from draft.interop.formats import Format, own_config, own_tensors, sglang, vllm
from draft.interop.rules import Rule, TargetShape, exactly, rope, sizes

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
