"""The formats that Medusa heads are written in.

vLLM (0.32.0, `medusa.py`): an LM head of its own for each position has a row for each token of the target, also beside
a token map; a borrowed one must be in the file, once. It takes tensors that it doesn't know for none of its business.
So a reduced vocabulary is written as rows of zeros for the tokens that it lacks (their logits are 0, where those of the
best known tokens lie far above), with our d2t, by which an import finds the way back.
Tried: with such a file vLLM takes as many verifications as our engine.

FasterDecoding (`medusa_model.py`): `medusa_lm_head.pt`, with LM heads likewise, and one linear layer in each block: its
code repeats the same layer where the configuration asks for more.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draft.heads.medusa import MedusaHead
from draft.interop.formats import Format, own_tensors, vllm, write_pickle
from draft.interop.rules import TargetShape, exactly, sizes
from draft.interop.target_shape import target_tensor

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
    for lm_head in head.own_lm_heads.values():
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
