"""The heads that are exported: one for each option of an EAGLE-3 head, random, over a random tiny target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import SHAPE, save_tiny_target

from draft.heads.registry import ARCHITECTURES
from draft.target import Target

VOCAB = SHAPE["vocab_size"]
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
    "full vocabulary": {"draft_vocab_size": VOCAB},
    "shared LM head": {"draft_vocab_size": VOCAB, "shared_lm_head": True},
    "three other layers": {"auxiliary_layers": [1, 3, 6]},
    "five layers": {"auxiliary_layers": [0, 2, 4, 5, 7], "fc_norm": True},
}
# what vLLM loads besides
OTHERS: dict[str, dict[str, Any]] = {
    "EAGLE-1": {"architecture": "eagle"},
    "Medusa": {"architecture": "medusa"},
    "Medusa, full vocabulary": {"architecture": "medusa", "draft_vocab_size": VOCAB},
    "Medusa, shared LM head": {"architecture": "medusa", "draft_vocab_size": VOCAB, "shared_lm_head": True},
}
VLLM_HEAD_DIM = 32  # the smallest that its attention on a CPU has


def tiny_target(folder: Path, head_dim: int = 8) -> Target:
    """A random Llama of 8 layers, written to `folder` in float32 and named by it."""
    target = save_tiny_target(folder, head_dim=head_dim)
    target.name = str(folder)
    return target


def random_head(
    target: Target, *, architecture: str = "eagle3", seed: int = 0, draft_vocab_size: int = 200, **options: Any
) -> Any:
    """A random head with options of its configuration, norms included; a reduced vocabulary lacks a middle part."""
    generator = torch.Generator().manual_seed(seed)
    entry = ARCHITECTURES[architecture]
    if not entry.reduced_vocabulary:
        draft_vocab_size = target.vocab_size
    head = entry(entry.config_class.for_target(target, draft_vocab_size, **options)).to(target.dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
    ids = torch.arange(target.vocab_size)
    gap = target.vocab_size - draft_vocab_size
    head.set_vocabulary(torch.cat([ids[:40], ids[40 + gap :]]))
    head.use_target_lm_head(target)
    return head.eval()
