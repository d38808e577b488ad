"""EAGLE-1 heads of other trainers: one set of tensor names, and three habits of writing config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from draft.errors import UserError
from draft.interop.foreign import Checkpoint
from draft.interop.sources import (
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
