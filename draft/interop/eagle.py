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
from draft.interop import formats
from draft.interop.formats import SGLANG, VLLM, Checkpoint, Format, Source, TargetShape
from draft.target import Target

_LAYER = "layers.0"
_QUERIES = f"{_LAYER}.self_attn.q_proj.weight"
_COMPUTED = f"{_LAYER}.self_attn.rotary_emb.inv_freq"


def _is_eagle(found: Checkpoint, architecture: str = "") -> bool:
    """A layer that attends over `fc`'s output alone: EAGLE-3's reads the embedding beside it, and is twice as wide."""
    tensors = {name.removeprefix("model."): value for name, value in found.tensors.items()}
    if not {"fc.weight", _QUERIES} <= tensors.keys() or not re.search(architecture, found.architecture):
        return False
    size = tensors["fc.weight"].shape[0]
    return tensors["fc.weight"].shape[-1] == 2 * size and tensors[_QUERIES].shape[-1] == size


def _translate(found: Checkpoint, target: Target) -> dict[str, Any]:
    found.tensors = {name.removeprefix("model."): value for name, value in found.tensors.items()}
    tensors, values, notes = found.tensors, dict(found.config), found.notes
    formats.check_sizes(
        found,
        ("hidden size", values.get("hidden_size", len(tensors["fc.weight"])), target.hidden_size),
        ("vocabulary", values.get("vocab_size"), target.vocab_size),
    )
    formats.drop_embedding(found, target)
    if tensors.pop(_COMPUTED, None) is not None:
        notes.append(f"left out {_COMPUTED}: it is not the head's.")
    lm_head = tensors.pop("lm_head.weight", None)  # vLLM fails on one, and SGLang passes over it
    if lm_head is not None and not formats.is_the_targets(lm_head, target):
        raise UserError(
            f"{str(found.folder)!r}: lm_head.weight is not the target's, and engines use the target's with an EAGLE-1 "
            "head; use the target that it was made for."
        )
    if lm_head is not None:
        notes.append("left out lm_head.weight: it is the target's.")
    # biases by the tensors: `bias` is fc's to SafeAILab, and the attention's to engines
    values.pop("bias", None)
    values["qkv_bias"] = f"{_LAYER}.self_attn.q_proj.bias" in tensors
    bias = tensors.get("fc.bias")
    if bias is not None and bias.any():
        notes.append("fc has a bias, which SGLang knows and vLLM leaves out.")
    elif bias is not None and not values.get("eagle_fc_bias"):
        del tensors["fc.bias"]
        notes.append("left out fc.bias: it is all zeros.")
    values["eagle_fc_bias"] = "fc.bias" in tensors
    formats.complete_layer(values, found, target)
    return values


SOURCE = Source(
    {
        "EAGLE-1 of vLLM": lambda found: _is_eagle(found, "^Eagle.*ForCausalLM$"),
        "EAGLE-1 of SGLang": lambda found: _is_eagle(found, "ForCausalLMEagle$"),
        "SafeAILab EAGLE-1": _is_eagle,
    },
    _translate,
)


def no_fc_bias(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
    if "fc.bias" in tensors and tensors["fc.bias"].any():
        yield "fc has a bias, which vLLM silently leaves out; use --format sglang"


FORMATS = {
    "vllm": Format(lambda head: {"vLLM": VLLM}, rules=(no_fc_bias,)),
    "sglang": Format(
        lambda head: {"SGLang": SGLANG},
        lacking={"qkv_bias": "SGLang's Llama layer has no biases of queries, keys and values; use --format vllm"},
        tensors=lambda head, target: {
            "fc.bias": torch.zeros(head.config.hidden_size, dtype=head.dtype),
            **formats.own_tensors(head, target),
        },
        config=lambda config, target, length: {**config, "architectures": ["LlamaForCausalLMEagle"]},
    ),
}
