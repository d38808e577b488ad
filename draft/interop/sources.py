"""What importing takes of a checkpoint, and what every kind of it is brought through.

A format is a `Source`: how to recognise it, and how to bring its config.json and tensors to those of this program's own
files, by filling in what is missing and leaving out what is the target's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draft.errors import UserError
from draft.interop.foreign import Checkpoint
from draft.target import Target


@dataclass(frozen=True)
class Source:
    """A format: `recognise` a checkpoint; `translate` it for a target.

    translate: (checkpoint, target, the user's word on auxiliary layers) -> config.json; it changes the tensors in
    place.
    """

    name: str
    recognise: Callable[[Checkpoint], bool]
    translate: Callable[[Checkpoint, Target, list[int] | None], dict[str, Any]]


def no_auxiliary_layers(found: Checkpoint, layers: list[int] | None) -> None:
    """Raises UserError when layers were chosen for a head that reads the last hidden states."""
    if layers is not None:
        raise UserError(
            f"--auxiliary-layers {','.join(map(str, layers))}: {str(found.folder)!r} is no EAGLE-3 head, and reads the "
            "target's last hidden states; leave the flag out."
        )


def check_sizes(found: Checkpoint, sizes: tuple[tuple[str, Any, int], ...]) -> None:
    """sizes: (what, the head's, the target's). Raises UserError at the first that differs."""
    for what, ours, theirs in sizes:
        if ours != theirs:
            raise UserError(
                f"{str(found.folder)!r}: the head's {what} is {ours} and the target's is {theirs}; use the target "
                "that it was made for."
            )


def complete_layer(values: dict[str, Any], found: Checkpoint, target: Target) -> None:
    """Fill in what a decoder layer's config.json may lack, in place."""
    # what engines assume too where a LlamaConfig says nothing
    defaults: dict[str, Any] = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
    if not values.get("rope_parameters") and not values.get("rope_theta"):
        defaults["rope_theta"] = 10000.0
    for key, value in defaults.items():
        if values.get(key) is None:
            values[key] = value
            found.notes.append(f"filled in {key} = {value}, which engines assume.")
    _complete_rope(values, found, target)


def _complete_rope(values: dict[str, Any], found: Checkpoint, target: Target) -> None:
    """The head's context is its target's; scaled RoPE remembers the length that it was made for."""
    theirs = values.get("max_position_embeddings")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default"))
    if scaled != "default":
        rope = {**rope, "rope_type": scaled}
        if theirs and scaled in ("yarn", "longrope"):
            rope.setdefault("original_max_position_embeddings", theirs)
        rope.setdefault("rope_theta", values.get("rope_theta") or 10000.0)
        values["rope_parameters"] = rope
    if theirs != target.stated_length:
        values["max_position_embeddings"] = target.stated_length
        found.notes.append(f"set max_position_embeddings from {theirs} to the target's {target.stated_length}.")


def drop_embedding(found: Checkpoint, target: Target) -> None:
    """Leave out a copy of the target's embedding; refuse another one, which vLLM would use and SGLang would not."""
    theirs = found.tensors.pop("embed_tokens.weight", None)
    if theirs is None:
        return
    ours = target.embedding.weight.detach().cpu()
    if theirs.shape != ours.shape:
        raise UserError(
            f"{str(found.folder)!r}: embed_tokens.weight is {list(theirs.shape)} and the target's {list(ours.shape)}; "
            "use the target that the head was made for."
        )
    # both may have been rounded, to different half precisions
    if not torch.allclose(theirs.float(), ours.float(), rtol=2**-8, atol=2**-24):
        worst = float((theirs.float() - ours.float()).abs().max())
        raise UserError(
            f"{str(found.folder)!r}: embed_tokens.weight differs from the target's by up to {worst:.2g}: vLLM would "
            "use it and SGLang would not; use the target that the head was made for, or a head without one."
        )
    found.notes.append("left out embed_tokens.weight: it is the target's.")


def is_the_targets(lm_head: Tensor, target: Target) -> bool:
    """Whether an LM head is a copy of the target's, in its own dtype."""
    theirs = target.lm_head.weight.detach()
    return lm_head.shape == theirs.shape and torch.equal(lm_head, theirs.to("cpu", lm_head.dtype))


def one_dtype(found: Checkpoint) -> torch.dtype:
    """The dtype of the file; where there are several, the one that holds them all."""
    dtypes = sorted({value.dtype for value in found.tensors.values() if value.is_floating_point()}, key=str)
    if not dtypes:
        raise UserError(f"{str(found.folder)!r} has no floating-point tensors; give the folder of a whole head.")
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    if len(dtypes) > 1:
        found.notes.append(f"brought tensors of {', '.join(map(str, dtypes))} to {widest}.")
    return widest
