"""Tiny targets of several families, and texts that transformers wrote with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from conftest import SHAPE, byte_tokenizer, make_tiny_target
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from draft.target import Target

CONTEXT = 72
SMALL: dict[str, Any] = {**SHAPE, "max_position_embeddings": CONTEXT}
FAMILIES: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**{**SMALL, "num_key_value_heads": 1, "num_hidden_layers": 9}),
    "mistral, windows of 6": MistralConfig(**SMALL, sliding_window=6),
    "gemma2, windows of 5 in half of the layers, bounded scores": Gemma2Config(
        **SMALL, sliding_window=5, query_pre_attn_scalar=8, attn_logit_softcapping=3.0, final_logit_softcapping=8.0
    ),
    "gemma3, windows of 7 in most layers": Gemma3TextConfig(**SMALL, sliding_window=7, query_pre_attn_scalar=8),
}


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


def target_of(config: PretrainedConfig, name: str = "tiny", seed: int = 1) -> Target:
    """A random target of any family, in float64."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.float64)
    if getattr(config, "attn_logit_softcapping", None):
        model.config._attn_implementation = "naive"  # sdpa has no bound on scores
    return Target(name, model, byte_tokenizer())


@dataclass(frozen=True)
class Text:
    """A prompt with its greedy continuation, and what the target thinks at each token."""

    tokens: list[int]
    written: int  # where the continuation begins
    auxiliary: Tensor = field(repr=False)  # [tokens, 3 * hidden], the true states
    log_p: Tensor = field(repr=False)  # [tokens, vocab], of the token after each


@cache
def tiny(family: str) -> Target:
    """The target of a family; its EOS is a token that its greedy texts contain now and then."""
    target = make_tiny_target(max_length=CONTEXT) if family == "llama" else target_of(FAMILIES[family], family)
    written = [token for text in texts_of(target) for token in text.tokens[text.written :]]
    rare = sorted((written.count(token), token) for token in set(written))
    target.__dict__["eos_token_ids"] = frozenset(token for _, token in rare[:: max(1, len(rare) // 3)])
    return target


@cache
@torch.inference_mode()
def texts_of(target: Target) -> list[Text]:
    """Ten texts as long as the context, by transformers' own greedy decoding from short and long prompts."""
    generator = torch.Generator().manual_seed(5)
    return [text for length in (1, 30) for text in texts_from(target, 5, length, CONTEXT - length, generator)]


def texts_from(target: Target, rows: int, length: int, count: int, generator: torch.Generator) -> list[Text]:
    """Texts of `count` tokens after random prompts of this length."""
    prompts = torch.randint(3, 259, (rows, length), generator=generator)
    ids = greedy_by_transformers(target, prompts, count)
    output = target.forward(ids, layers=target.default_auxiliary_layers)
    assert output.auxiliary is not None
    log_p = target.logits(output.last_hidden).log_softmax(dim=-1)
    return [Text(ids[row].tolist(), length, output.auxiliary[row], log_p[row]) for row in range(rows)]


def greedy_by_transformers(target: Target, prompts: Tensor, count: int) -> Tensor:
    """[rows, tokens] -> [rows, tokens + count], EOS ignored."""
    return target.model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=2,
    )
