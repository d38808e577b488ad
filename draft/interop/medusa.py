"""Medusa heads of other trainers: FasterDecoding's, and vLLM's layout."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draft.errors import UserError
from draft.heads.medusa import MedusaHead
from draft.interop.checks import TargetShape, complete_token_map, exactly, sizes, target_tensor, token_map_problem
from draft.interop.formats import Format, own_tensors, vllm, write_pickle
from draft.interop.sources import Checkpoint, Source, check_sizes, is_the_targets, no_auxiliary_layers
from draft.target import Target

_PREFIXES = ("medusa_heads.", "medusa_head.")
_ORIGINAL = re.compile(r"(\d+)\.(\d+)\.(linear\.)?(weight|bias)")
_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.weight")


def _bare(found: Checkpoint) -> dict[str, Tensor]:
    tensors = {}
    for name, value in found.tensors.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        tensors[name] = value
    return tensors


def _is_vllm(found: Checkpoint) -> bool:
    return any(_BLOCK.fullmatch(name) for name in _bare(found))


def _is_original(found: Checkpoint) -> bool:
    return any((match := _ORIGINAL.fullmatch(name)) and match[3] for name in _bare(found))


def _translate(found: Checkpoint, target: Target, auxiliary_layers: list[int] | None) -> dict[str, Any]:
    no_auxiliary_layers(found, auxiliary_layers)
    tensors = {_our_name(name): value for name, value in _bare(found).items()}
    found.tensors = tensors
    blocks = [(int(match[1]), int(match[2])) for name in tensors if (match := _BLOCK.fullmatch(name))]
    heads, layers = 1 + max(block for block, _ in blocks), 1 + max(layer for _, layer in blocks)
    _compare_counts(found, heads, layers)
    block, layer = min(blocks)
    size = tensors[f"blocks.{block}.layers.{layer}.weight"].shape[-1]
    check_sizes(
        found,
        (
            ("hidden size", size, target.hidden_size),
            ("vocabulary", found.config.get("vocab_size", target.vocab_size), target.vocab_size),
        ),
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
        problem = token_map_problem(tensors["d2t"], len(known), vocab)
        if problem:
            raise UserError(f"{str(found.folder)!r}: token_map: {problem}; use the target that it was made for.")
    if "d2t" not in tensors:
        return torch.arange(vocab)
    size = len(tensors["d2t"])
    if size == vocab:  # nothing but the identity is a head that we can write
        return torch.arange(vocab)
    complete_token_map(found, {"vocab_size": vocab, "draft_vocab_size": size})
    return tensors["d2t"] + torch.arange(size)


def _settle_lm_heads(found: Checkpoint, target: Target, heads: int, ids: Tensor) -> bool:
    """One LM head [draft_vocab, hidden] for each position, or none where all are the target's: returns whether."""
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
    if full and all(is_the_targets(value, target) for value in rows):
        found.notes.append("left out the LM heads: they are the target's.")
        return True
    if single is not None and heads > 1:
        found.notes.append("wrote the one LM head of all positions for each of them.")
    for index, value in enumerate(rows):
        chosen = value if len(value) == len(ids) else value[ids]
        tensors[f"lm_heads.{index}.weight"] = chosen.clone()  # a file holds no tensor twice
    return False


MEDUSA_SOURCES = (
    Source("Medusa of vLLM", _is_vllm, _translate),
    Source("FasterDecoding Medusa", _is_original, _translate),
)


# The formats that Medusa heads are written in.
#
# vLLM (0.32.0, `medusa.py`): an LM head of its own for each position has a row for each token of the target, also
# beside
# a token map; a borrowed one must be in the file, once. It takes tensors that it doesn't know for none of its business.
# So a reduced vocabulary is written as rows of zeros for the tokens that it lacks (their logits are 0, where those
# of the
# best known tokens lie far above), with our d2t, by which an import finds the way back.
# Tried: with such a file vLLM takes as many verifications as our engine.
#
# FasterDecoding (`medusa_model.py`): `medusa_lm_head.pt`, with LM heads likewise, and one linear layer in each
# block: its
# code repeats the same layer where the configuration asks for more.


MEDUSA_NO_FORMAT = {
    "plain": "no two engines load the same folder",
    "sglang": "SGLang has no Medusa",
    "speculators": "speculators has no Medusa",
}
LM_HEAD_FILE = "medusa_lm_head.pt"


def _full_rows(head: MedusaHead, target: TargetShape) -> list[Tensor]:
    """An LM head [vocab, hidden] for each position."""
    config = head.config
    if config.shared_lm_head:
        return [_targets_lm_head(head, target)] * config.num_heads
    rows = []
    for lm_head in head.lm_head_modules.values():
        full = torch.zeros(config.vocab_size, config.hidden_size, dtype=head.dtype)
        full[head.vocabulary] = lm_head.weight.detach().cpu()
        rows.append(full)
    return rows


def _targets_lm_head(head: MedusaHead, target: TargetShape) -> Tensor:
    return target_tensor(target.path, ("lm_head.weight", "embed_tokens.weight")).to(head.dtype)


def _vllm_tensors(head: MedusaHead, target: TargetShape) -> dict[str, Tensor]:
    tensors = own_tensors(head, target)
    if head.config.shared_lm_head:
        return {**tensors, "lm_head.weight": _targets_lm_head(head, target)}
    return {**tensors, **{f"lm_heads.{index}.weight": rows for index, rows in enumerate(_full_rows(head, target))}}


def _vllm_config(head: MedusaHead, dtype: torch.dtype, target: TargetShape, length: int) -> dict[str, Any]:
    """Without the reduced vocabulary: vLLM would ask for its own kind of map."""
    return {**head.config.as_json(dtype), "truncated_vocab_size": head.config.vocab_size}


def _original_tensors(head: MedusaHead, target: TargetShape) -> dict[str, Tensor]:
    tensors = {}
    for name, value in own_tensors(head, target).items():
        kind, *place = name.split(".")
        if kind == "blocks":
            block, _, layer, what = place
            tensors[f"{block}.{layer}.linear.{what}"] = value
        elif kind != "lm_heads":
            tensors[name] = value  # d2t, t2d: loaded with strict=False
    layers = head.config.num_layers
    return tensors | {f"{index}.{layers}.weight": rows for index, rows in enumerate(_full_rows(head, target))}


def _original_config(head: MedusaHead, dtype: torch.dtype, target: TargetShape, length: int) -> dict[str, Any]:
    return {
        "medusa_num_heads": head.config.num_heads,
        "medusa_num_layers": head.config.num_layers,
        "base_model_name_or_path": target.path,
        "hidden_size": head.config.hidden_size,
        "vocab_size": head.config.vocab_size,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _vllm_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    size, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(config["num_heads"]):
        for layer in range(config["num_hidden_layers"]):
            shapes[f"blocks.{block}.layers.{layer}.weight"] = (size, size)
            shapes[f"blocks.{block}.layers.{layer}.bias"] = (size,)
        if not config["original_lm_head"]:
            shapes[f"lm_heads.{block}.weight"] = (vocab, size)
    return shapes | ({"lm_head.weight": (vocab, size)} if config["original_lm_head"] else {})


def _original_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    size, layers = config["hidden_size"], config["medusa_num_layers"]
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(config["medusa_num_heads"]):
        for layer in range(layers):
            shapes |= {f"{block}.{layer}.linear.weight": (size, size), f"{block}.{layer}.linear.bias": (size,)}
        shapes[f"{block}.{layers}.weight"] = (config["vocab_size"], size)
    return shapes


def one_layer(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
    """Layers of a block are one and the same to FasterDecoding's code: the last in the file counts for all."""
    for block in range(config["medusa_num_heads"]):
        for layer in range(1, config["medusa_num_layers"]):
            for what in ("weight", "bias"):
                if not torch.equal(tensors[f"{block}.{layer}.linear.{what}"], tensors[f"{block}.0.linear.{what}"]):
                    yield "FasterDecoding's code has one layer in a block, and the head more; use --format vllm"
                    return


def _fasterdecoding(out: Path, target: TargetShape, length: int) -> str:
    return shlex.join(["python", "-m", "medusa.inference.cli", "--model", str(out)])


_MAP = ("d2t", "t2d")

MEDUSA_FORMATS = {
    "vllm": Format(
        _vllm_tensors,
        _vllm_config,
        (sizes, exactly(_vllm_shapes, besides=_MAP)),
        lambda head: {"vLLM": vllm("medusa", most=head.longest)},
    ),
    "medusa": Format(
        _original_tensors,
        _original_config,
        (sizes, exactly(_original_shapes, besides=_MAP), one_layer),
        lambda head: {"FasterDecoding": _fasterdecoding},
        file=LM_HEAD_FILE,
        write=write_pickle,
    ),
}
