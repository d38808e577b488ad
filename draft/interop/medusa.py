"""Medusa heads of other trainers (FasterDecoding's, and vLLM's layout), and for vLLM up to 0.32.

In vLLM's `medusa.py` an LM head for each position has a row for each token of the target, also beside a token map; the
target's, shared, must be in the file, once. It passes over tensors that it doesn't know. So a reduced vocabulary is
written as rows of zeros for the tokens that it lacks (their logits are 0, where those of the best known tokens lie far
above), with our d2t, by which an import finds the way back. Tried: with such a file vLLM takes as many verifications as
our engine.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from draft.errors import UserError
from draft.heads.checkpoint import token_map_problem
from draft.heads.medusa import MedusaHead
from draft.interop import formats
from draft.interop.formats import Checkpoint, Format, Source, TargetShape
from draft.target import Target

_PREFIX = re.compile(r"(medusa_heads?\.)*")
_ORIGINAL = re.compile(r"^(\d+)\.(\d+)\.(linear\.)?(weight|bias)$")
_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.weight")


def _bare(found: Checkpoint) -> dict[str, Tensor]:
    return {_PREFIX.sub("", name, count=1): value for name, value in found.tensors.items()}


def _translate(found: Checkpoint, target: Target) -> dict[str, Any]:
    def our_name(match: re.Match[str]) -> str:
        block, layer, linear, what = match.groups()
        return f"blocks.{block}.layers.{layer}.{what}" if linear else f"lm_heads.{block}.{what}"

    found.tensors = tensors = {_ORIGINAL.sub(our_name, name): value for name, value in _bare(found).items()}
    blocks = [(int(match[1]), int(match[2])) for name in tensors if (match := _BLOCK.fullmatch(name))]
    heads, layers = 1 + max(block for block, _ in blocks), 1 + max(layer for _, layer in blocks)
    counts = {
        "num_heads": (heads, "positions"),
        "medusa_num_heads": (heads, "positions"),
        "num_hidden_layers": (layers, "layers in a block"),
        "medusa_num_layers": (layers, "layers in a block"),
    }
    for key, (count, what) in counts.items():  # published configurations are at odds with their files; the files count
        if found.config.get(key) not in (None, count):
            found.notes.append(
                f"config.json has {key} = {found.config[key]}, and the file {count} {what}, which are taken."
            )
    block, layer = min(blocks)
    size = tensors[f"blocks.{block}.layers.{layer}.weight"].shape[-1]
    formats.check_sizes(
        found,
        ("hidden size", size, target.hidden_size),
        ("vocabulary", found.config.get("vocab_size", target.vocab_size), target.vocab_size),
    )
    lacking = [name for block, layer in blocks if (name := f"blocks.{block}.layers.{layer}.bias") not in tensors]
    tensors.update({name: torch.zeros(size, dtype=tensors[f"{name[:-4]}weight"].dtype) for name in lacking})
    if lacking:
        found.notes.append("filled in the blocks' biases with zeros, as they have none.")
    elif not found.config.get("medusa_fc_bias", True):
        found.notes.append("took the blocks' biases, which vLLM would leave out: medusa_fc_bias is false.")
    ids = _vocabulary(found, target)
    return {
        "hidden_size": size,
        "vocab_size": target.vocab_size,
        "num_heads": heads,
        "num_hidden_layers": layers,
        "logit_scale": found.config.get("logit_scale", 1.0),
        "truncated_vocab_size": len(ids),
        "original_lm_head": _settle_lm_heads(found, target, heads, ids),
    }


def _vocabulary(found: Checkpoint, target: Target) -> Tensor:
    """Target ids [draft_vocab] of the draft vocabulary, and our map in the place of vLLM's.

    Raises:
        UserError: for a map into another vocabulary.
    """
    tensors, vocab = found.tensors, target.vocab_size
    known = tensors.pop("token_map", None)
    if known is not None:
        tensors["d2t"] = known.to(torch.int64) - torch.arange(len(known))
        problem = token_map_problem(tensors["d2t"], len(known), vocab)
        if problem:
            raise UserError(f"{str(found.folder)!r}: token_map: {problem}; use the target that it was made for.")
    size = len(tensors.get("d2t", ())) or vocab
    if size == vocab:  # nothing but the identity is a head that we can write
        return torch.arange(vocab)
    formats.complete_token_map(found, {"vocab_size": vocab, "draft_vocab_size": size})
    return tensors["d2t"] + torch.arange(size)


def _settle_lm_heads(found: Checkpoint, target: Target, heads: int, ids: Tensor) -> bool:
    """One LM head [draft_vocab, hidden] for each position; none, and true, where all are the target's."""
    tensors, full = found.tensors, len(ids) == target.vocab_size
    single = tensors.pop("lm_head.weight", None)
    own = [tensors.pop(f"lm_heads.{index}.weight", single) for index in range(heads)]
    rows = [value for value in own if value is not None]
    if not rows and found.config.get("original_lm_head") and full:
        found.notes.append("the file has no LM head: the target's is used.")
        return True
    if len(rows) < heads:
        missing = next(index for index, value in enumerate(own) if value is None)
        raise UserError(
            f"{str(found.folder)!r}: lm_heads.{missing}.weight is missing, of {heads} positions; get the whole head."
        )
    for index, value in enumerate(rows):
        if len(value) not in (target.vocab_size, len(ids)):
            raise UserError(
                f"{str(found.folder)!r}: the LM head of position {index} has {len(value)} rows and the target's "
                f"vocabulary {target.vocab_size} tokens; use the target that it was made for."
            )
    if full and all(formats.is_the_targets(value, target) for value in rows):
        found.notes.append("left out the LM heads: they are the target's.")
        return True
    if single is not None and heads > 1:
        found.notes.append("wrote the one LM head of all positions for each of them.")
    for index, value in enumerate(rows):
        chosen = value if len(value) == len(ids) else value[ids]
        tensors[f"lm_heads.{index}.weight"] = chosen.clone()  # a file holds no tensor twice
    return False


SOURCE = Source(
    {
        "Medusa of vLLM": lambda found: any(map(_BLOCK.fullmatch, _bare(found))),
        "FasterDecoding Medusa": lambda found: any(
            (match := _ORIGINAL.fullmatch(name)) and match[3] for name in _bare(found)
        ),
    },
    _translate,
)


def _vllm_tensors(head: MedusaHead, target: TargetShape) -> dict[str, Tensor]:
    config, tensors = head.config, formats.own_tensors(head, target)
    if config.shared_lm_head:
        shared = formats.target_tensor(target.path, "lm_head.weight", "embed_tokens.weight")
        return {**tensors, "lm_head.weight": shared.to(head.dtype)}
    for name, lm_head in head.lm_head_modules.items():
        rows = torch.zeros(config.vocab_size, config.hidden_size, dtype=head.dtype)
        rows[head.vocabulary] = lm_head.weight.detach().cpu()
        tensors[f"{name}.weight"] = rows
    return tensors


FORMATS = {
    "vllm": Format(
        commands=lambda head: {},
        tensors=_vllm_tensors,
        # without the reduced vocabulary: vLLM would require its own kind of map
        config=lambda config, target, length: {**config, "truncated_vocab_size": config["vocab_size"]},
        notes=lambda head: ["vLLM 0.33 and later serve no Medusa heads; 0.32 and earlier load this folder."],
    ),
}
