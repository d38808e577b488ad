"""EAGLE-1 heads of other trainers and for other engines: one set of tensor names, three habits of writing config.json.

Engines (vLLM 0.32.0's `llama_eagle.py`, SGLang 0.5.23's) load the same tensors by the same names, and look for another
name of the architecture; SGLang's `fc` has a bias, random where the file has none, and vLLM's has not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from draft.errors import UserError
from draft.heads.eagle import EagleHead
from draft.interop import formats
from draft.interop.formats import Checkpoint, Format, Rule, Shapes, Source, TargetShape
from draft.target import Target

_LAYER = "layers.0"
_QUERIES = f"{_LAYER}.self_attn.q_proj.weight"
_COMPUTED = f"{_LAYER}.self_attn.rotary_emb.inv_freq"


def _is_eagle(found: Checkpoint) -> bool:
    """A layer that attends over `fc`'s output alone: EAGLE-3's reads the embedding beside it, and is twice as wide."""
    tensors = {name.removeprefix("model."): value for name, value in found.tensors.items()}
    if not {"fc.weight", _QUERIES} <= tensors.keys():
        return False
    size = tensors["fc.weight"].shape[0]
    return tensors["fc.weight"].shape[-1] == 2 * size and tensors[_QUERIES].shape[-1] == size


def _translate(found: Checkpoint, target: Target, auxiliary_layers: list[int] | None) -> dict[str, Any]:
    formats.refuse_auxiliary_layers(found, auxiliary_layers)
    found.tensors = {name.removeprefix("model."): value for name, value in found.tensors.items()}
    values = dict(found.config)
    formats.check_sizes(
        found,
        ("hidden size", values.get("hidden_size", len(found.tensors["fc.weight"])), target.hidden_size),
        ("vocabulary", values.get("vocab_size"), target.vocab_size),
    )
    formats.drop_embedding(found, target)
    if found.tensors.pop(_COMPUTED, None) is not None:
        found.notes.append(f"left out {_COMPUTED}: it is not the head's.")
    lm_head = found.tensors.pop("lm_head.weight", None)  # vLLM fails on one, and SGLang passes over it
    if lm_head is not None and not formats.is_the_targets(lm_head, target):
        raise UserError(
            f"{str(found.folder)!r}: lm_head.weight is not the target's, and engines use the target's with an EAGLE-1 "
            "head; use the target that it was made for."
        )
    if lm_head is not None:
        found.notes.append("left out lm_head.weight: it is the target's.")
    _settle_biases(values, found)
    formats.complete_layer(values, found, target)
    return values


def _settle_biases(values: dict[str, Any], found: Checkpoint) -> None:
    """By the tensors: `bias` is fc's to SafeAILab, and the attention's to engines."""
    values.pop("bias", None)
    values["qkv_bias"] = f"{_LAYER}.self_attn.q_proj.bias" in found.tensors
    bias = found.tensors.get("fc.bias")
    if bias is not None and not values.get("eagle_fc_bias") and not bias.any():
        del found.tensors["fc.bias"]
        bias = None
        found.notes.append("left out fc.bias: it is all zeros.")
    values["eagle_fc_bias"] = bias is not None
    if bias is not None and bias.any():
        found.notes.append("fc has a bias, which SGLang knows and vLLM leaves out.")


EAGLE_SOURCES = (
    Source(
        "EAGLE-1 of vLLM",
        lambda found: (
            _is_eagle(found) and re.fullmatch("Eagle.*ForCausalLM", formats.architecture_of(found)) is not None
        ),
        _translate,
    ),
    Source(
        "EAGLE-1 of SGLang",
        lambda found: _is_eagle(found) and formats.architecture_of(found).endswith("ForCausalLMEagle"),
        _translate,
    ),
    Source("SafeAILab EAGLE-1", _is_eagle, _translate),
)


def _sglang_tensors(head: EagleHead, target: TargetShape) -> dict[str, Tensor]:
    zeros = torch.zeros(head.config.hidden_size, dtype=head.dtype)
    return {"fc.bias": zeros, **formats.own_tensors(head, target)}


def _sglang_config(head: EagleHead, dtype: torch.dtype, target: TargetShape, length: int) -> dict[str, Any]:
    return {**head.config.as_json(dtype), "architectures": ["LlamaForCausalLMEagle"]}


def _shapes(config: dict[str, Any], *, fc_bias: bool) -> Shapes:
    size = config["hidden_size"]
    shapes = {"fc.weight": (size, 2 * size), **formats.layer_shapes(config, _LAYER, size)}
    if fc_bias:
        shapes["fc.bias"] = (size,)
    if config.get("qkv_bias"):
        biased = [f"{_LAYER}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
        shapes.update({f"{name}.bias": shapes[f"{name}.weight"][:1] for name in biased})
    return shapes


def no_fc_bias(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
    if "fc.bias" in tensors and tensors["fc.bias"].any():
        yield "fc has a bias, which vLLM silently leaves out; use --format sglang"


def no_qkv_bias(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
    if config.get("qkv_bias"):
        yield "SGLang's Llama layer has no biases of queries, keys and values; use --format vllm"


_COMMON: tuple[Rule, ...] = (formats.sizes, formats.rope)

EAGLE_FORMATS = {
    "vllm": Format(
        (
            *_COMMON,
            formats.exactly(lambda config: _shapes(config, fc_bias=bool(config.get("eagle_fc_bias")))),
            no_fc_bias,
        ),
        lambda head: {"vLLM": formats.vllm("eagle")},
    ),
    "sglang": Format(
        (*_COMMON, formats.exactly(lambda config: _shapes(config, fc_bias=True)), no_qkv_bias),
        lambda head: {"SGLang": formats.sglang("EAGLE")},
        tensors=_sglang_tensors,
        config=_sglang_config,
    ),
}
