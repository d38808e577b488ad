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
from draft.heads.medusa import MedusaHead
from draft.interop import formats
from draft.interop.formats import Checkpoint, Format, Shapes, Source, TargetShape
from draft.target import Target

_PREFIXES = ("medusa_heads.", "medusa_head.")
_ORIGINAL = re.compile(r"(\d+)\.(\d+)\.(linear\.)?(weight|bias)")
_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.weight")


def _translate(found: Checkpoint, target: Target, auxiliary_layers: list[int] | None) -> dict[str, Any]:
    formats.refuse_auxiliary_layers(found, auxiliary_layers)
    tensors = {_our_name(name): value for name, value in _bare(found).items()}
    found.tensors = tensors
    blocks = [(int(match[1]), int(match[2])) for name in tensors if (match := _BLOCK.fullmatch(name))]
    heads, layers = 1 + max(block for block, _ in blocks), 1 + max(layer for _, layer in blocks)
    _compare_counts(found, heads, layers)
    block, layer = min(blocks)
    size = tensors[f"blocks.{block}.layers.{layer}.weight"].shape[-1]
    formats.check_sizes(
        found,
        ("hidden size", size, target.hidden_size),
        ("vocabulary", found.config.get("vocab_size", target.vocab_size), target.vocab_size),
    )
    _complete_biases(found, heads, layers, size)
    values = {
        "hidden_size": size,
        "vocab_size": target.vocab_size,
        "num_heads": heads,
        "num_hidden_layers": layers,
        "logit_scale": found.config.get("logit_scale", 1.0),
    }
    ids = _vocabulary(found, target)
    shared = _settle_lm_heads(found, target, heads, ids)
    return {**values, "truncated_vocab_size": len(ids), "original_lm_head": shared}


def _bare(found: Checkpoint) -> dict[str, Tensor]:
    tensors = {}
    for name, value in found.tensors.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        tensors[name] = value
    return tensors


def _our_name(name: str) -> str:
    match = _ORIGINAL.fullmatch(name)
    if match is None:
        return name
    block, layer, linear, what = match.groups()
    return f"blocks.{block}.layers.{layer}.{what}" if linear else f"lm_heads.{block}.{what}"


def _compare_counts(found: Checkpoint, heads: int, layers: int) -> None:
    """Published configurations are at odds with their files; the files count."""
    for what, count, keys in (
        ("positions", heads, ("num_heads", "medusa_num_heads")),
        ("layers in a block", layers, ("num_hidden_layers", "medusa_num_layers")),
    ):
        for key in keys:
            said = found.config.get(key)
            if said is not None and said != count:
                found.notes.append(f"config.json has {key} = {said}, and the file {count} {what}, which are taken.")


def _complete_biases(found: Checkpoint, heads: int, layers: int, size: int) -> None:
    names = [f"blocks.{block}.layers.{layer}" for block in range(heads) for layer in range(layers)]
    lacking = [name for name in names if f"{name}.bias" not in found.tensors]
    for name in lacking:
        if f"{name}.weight" in found.tensors:
            found.tensors[f"{name}.bias"] = torch.zeros(size, dtype=found.tensors[f"{name}.weight"].dtype)
    if lacking:
        found.notes.append("filled in the blocks' biases with zeros, as they have none.")
    elif "medusa_fc_bias" in found.config and not found.config["medusa_fc_bias"]:
        found.notes.append("took the blocks' biases, which vLLM would leave out: medusa_fc_bias is false.")


def _vocabulary(found: Checkpoint, target: Target) -> Tensor:
    """Target ids [draft_vocab] of the draft vocabulary, and our map in the place of vLLM's.

    Raises:
        UserError: for a map into another vocabulary.
    """
    tensors, vocab = found.tensors, target.vocab_size
    known = tensors.pop("token_map", None)
    if known is not None:
        known = known.to(torch.int64)
        tensors["d2t"] = known - torch.arange(len(known))
        problem = formats.token_map_problem(tensors["d2t"], len(known), vocab)
        if problem:
            raise UserError(f"{str(found.folder)!r}: token_map: {problem}; use the target that it was made for.")
    if "d2t" not in tensors:
        return torch.arange(vocab)
    size = len(tensors["d2t"])
    if size == vocab:  # nothing but the identity is a head that we can write
        return torch.arange(vocab)
    formats.complete_token_map(found, {"vocab_size": vocab, "draft_vocab_size": size})
    return tensors["d2t"] + torch.arange(size)


def _settle_lm_heads(found: Checkpoint, target: Target, heads: int, ids: Tensor) -> bool:
    """One LM head [draft_vocab, hidden] for each position; none, and true, where all are the target's."""
    tensors = found.tensors
    single = tensors.pop("lm_head.weight", None)
    own = {index: tensors.pop(f"lm_heads.{index}.weight", single) for index in range(heads)}
    lacking = [index for index, value in own.items() if value is None]
    if len(lacking) == heads and found.config.get("original_lm_head") and len(ids) == target.vocab_size:
        found.notes.append("the file has no LM head: the target's is used.")
        return True
    if lacking:
        raise UserError(
            f"{str(found.folder)!r}: lm_heads.{lacking[0]}.weight is missing, of {heads} positions; get the whole head."
        )
    rows = [value for value in own.values() if value is not None]
    for index, value in enumerate(rows):
        if len(value) not in (target.vocab_size, len(ids)):
            raise UserError(
                f"{str(found.folder)!r}: the LM head of position {index} has {len(value)} rows and the target's "
                f"vocabulary {target.vocab_size} tokens; use the target that it was made for."
            )
    full = len(ids) == target.vocab_size
    if full and all(formats.is_the_targets(value, target) for value in rows):
        found.notes.append("left out the LM heads: they are the target's.")
        return True
    if single is not None and heads > 1:
        found.notes.append("wrote the one LM head of all positions for each of them.")
    for index, value in enumerate(rows):
        chosen = value if len(value) == len(ids) else value[ids]
        tensors[f"lm_heads.{index}.weight"] = chosen.clone()  # a file holds no tensor twice
    return False


MEDUSA_SOURCES = (
    Source("Medusa of vLLM", lambda found: any(map(_BLOCK.fullmatch, _bare(found))), _translate),
    Source(
        "FasterDecoding Medusa",
        lambda found: any((match := _ORIGINAL.fullmatch(name)) and match[3] for name in _bare(found)),
        _translate,
    ),
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


def _vllm_config(head: MedusaHead, dtype: torch.dtype, target: TargetShape, length: int) -> dict[str, Any]:
    """Without the reduced vocabulary: vLLM would require its own kind of map."""
    return {**head.config.as_json(dtype), "truncated_vocab_size": head.config.vocab_size}


def _vllm_shapes(config: dict[str, Any]) -> Shapes:
    size, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"lm_head.weight": (vocab, size)} if config["original_lm_head"] else {}
    for block in range(config["num_heads"]):
        for layer in range(config["num_hidden_layers"]):
            shapes[f"blocks.{block}.layers.{layer}.weight"] = (size, size)
            shapes[f"blocks.{block}.layers.{layer}.bias"] = (size,)
        if not config["original_lm_head"]:
            shapes[f"lm_heads.{block}.weight"] = (vocab, size)
    return shapes


MEDUSA_FORMATS = {
    "vllm": Format(
        (formats.sizes, formats.exactly(_vllm_shapes, besides=("d2t", "t2d"))),
        commands=lambda head: {},
        tensors=_vllm_tensors,
        config=_vllm_config,
        notes=lambda head: ["vLLM 0.33 and later serve no Medusa heads; 0.32 and earlier load this folder."],
    ),
}
