"""The layers that heads are made of: Llama's, with inputs as wide as a head wants them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from draft.heads.decoder_config import DecoderConfig
from draft.heads.rotary import rotate


class Attend(Protocol):
    """How queries find their keys and values: where a head decodes, an engine's cache keeps those of the past."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [batch, heads, new, d], key, value [batch, kv_heads, new, d] -> [batch, new, heads, d]."""
        ...


def attend_causally(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Within a text that is read in one piece; shapes as in `Attend`."""
    mixed = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1]
    )
    return mixed.transpose(1, 2)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, inputs: int, *, bias: bool = False) -> None:
        """inputs: width of what is attended to; bias: of queries, keys and values."""
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(inputs, width, bias=bias)
        self.k_proj = nn.Linear(inputs, kv_width, bias=bias)
        self.v_proj = nn.Linear(inputs, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, tokens, inputs] -> rotated queries, rotated keys, values: [batch, heads, tokens, head_dim]."""
        q, k, v = (self._split(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, rotation), rotate(k, rotation), v

    def merge(self, mixed: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim] -> [batch, tokens, hidden]."""
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        return self.o_proj(attend(*self.project(x, rotation)).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
