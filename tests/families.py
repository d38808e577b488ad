"""A small random model of each family of targets, as a user would have it in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import SHAPE, byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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


def save_model(folder: Path, kind: str, **own: Any) -> Path:
    """Save a random model and a tokenizer."""
    model_of(kind, **own).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_family(folder: Path, family: str) -> Path:
    kind, own = FAMILIES[family]
    return save_model(folder, kind, **own)
