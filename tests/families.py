"""A small random model of each family of targets, as a user would have it in a folder."""

from pathlib import Path
from typing import Any

import torch
from conftest import SHAPE, byte_tokenizer
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from draft.target import Target

CONTEXT = 160
SHORT_ROPE = 64  # tokens from which longrope would give all others new states
SMALL: dict[str, Any] = {**SHAPE, "max_position_embeddings": CONTEXT}
# Phi-3's configuration has the limit twice, and believes the one outside
PHI: dict[str, Any] = {"original_max_position_embeddings": SHORT_ROPE}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SHORT_ROPE}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
WINDOWS = {"sliding_window": 6}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA2 = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0, "query_pre_attn_scalar": 8}


def longrope(frequencies: int) -> dict[str, Any]:
    short, long = ([first + step * n for n in range(frequencies)] for first, step in ((1.0, 0.5), (2.0, 1.0)))
    return {**LONGROPE, "short_factor": short, "long_factor": long}


# name -> model type and what it adds to the common small shape; windows are shorter than the prompts
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2, windows in some layers": ("qwen2", {"use_sliding_window": True, **WINDOWS, "max_window_layers": 3}),
    "qwen3": ("qwen3", {}),
    "mistral, windows": ("mistral", WINDOWS),
    "gemma2, windows, bounded scores": ("gemma2", {**WINDOWS, **GEMMA2}),
    "gemma3, windows, two ropes": ("gemma3_text", {**WINDOWS, "query_pre_attn_scalar": 8}),
    "phi3, windows, longrope": ("phi3", {**PHI, **WINDOWS, "rope_parameters": longrope(4)}),
    "phi4, rope in part of a head": ("phi3", {**PHI, "rope_parameters": longrope(3) | {"partial_rotary_factor": 0.75}}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, **EXPERTS}),
    "beam, windows, no rope in other layers": (
        "beam",
        {**WINDOWS, "num_experts": 4, **EXPERTS, "n_group": 2, "topk_group": 1},
    ),
    "mixtral, windows": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOWS}),
}


def model_of(kind: str, *, seed: int = 1, **own: Any) -> PreTrainedModel:
    """A random model of the type `kind`; `own`: keys of its configuration."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **own}))


def naive_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' own formula and masks, in the dtype of its input: its softmax would be in float32."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    mixed = scores.softmax(dim=-1) @ value.repeat_interleave(groups, dim=1)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register("naive", naive_attention)
AttentionMaskInterface.register("naive", eager_mask)


def target_of(kind: str, **own: Any) -> Target:
    """A random target of the type `kind`, in float64."""
    model = model_of(kind, **own).to(torch.float64)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.config._attn_implementation = "naive"  # sdpa has no bound on scores
    return Target(kind, model, byte_tokenizer())


def save_model(folder: Path, kind: str, **own: Any) -> Path:
    """Save a random model and a tokenizer."""
    model_of(kind, **own).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
