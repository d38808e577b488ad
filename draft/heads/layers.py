"""The layers that heads are made of: Llama's, with inputs as wide as a head wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from draft.errors import UserError
from draft.heads.config import DecoderConfig

# The attention of query [batch, heads, new, d] to key and value [batch, kv_heads, new, d]: [batch, new, heads, d]. In
# decoding, an engine's cache keeps those of the past.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        return self.queries(x, rotation), *self.keys_values(x, rotation)

    def queries(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """x [batch, tokens, inputs] -> rotated queries, [batch, heads, tokens, head_dim]."""
        return rotate(self._by_head(self.q_proj(x)), rotation)

    def keys_values(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x [batch, tokens, inputs] -> rotated keys, values: [batch, kv_heads, tokens, head_dim] each."""
        return rotate(self._by_head(self.k_proj(x)), rotation), self._by_head(self.v_proj(x))

    def _by_head(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def merge(self, mixed: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim] -> [batch, tokens, hidden]."""
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        return self.o_proj(attend(*self.project(x, rotation)).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Rotary(nn.Module):
    """Cosines and sines of rotary position embeddings, through transformers' table of RoPE types."""

    inverse_frequencies: Tensor

    def __init__(self, parameters: dict[str, Any], head_dim: int, max_positions: int) -> None:
        super().__init__()
        inverse, self.scaling = _inverse_frequencies(parameters, head_dim, max_positions)
        self.register_buffer("inverse_frequencies", inverse, persistent=False)

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids [batch, tokens] -> cos, sin: [batch, 1, tokens, head_dim]."""
        # always in at least float32: positions in the thousands are not representable in bfloat16
        precision = torch.promote_types(torch.float32, dtype)
        angles = position_ids[:, None, :, None].to(precision) * self.inverse_frequencies.to(precision)
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # a cast of the head to bfloat16 must not round the frequencies
        kept = self.inverse_frequencies
        super()._apply(fn, recurse)
        self.inverse_frequencies = kept.to(self.inverse_frequencies.device)
        return self


def _inverse_frequencies(parameters: dict[str, Any], head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """[head_dim / 2] and the factor on cosines and sines.

    Raises:
        UserError: for a type that transformers doesn't know, or a value that is missing or makes no sense.
    """
    try:
        if parameters.get("rope_type", "default") == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            inverse, scaling = 1.0 / parameters.get("rope_theta", 10000.0) ** exponents, 1.0
        else:
            from transformers import LlamaConfig
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            config = LlamaConfig(
                head_dim=head_dim, hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=max_positions,
                rope_parameters=dict(parameters),
            )  # fmt: skip
            inverse, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"head config: the rotary embedding {parameters} is of an unknown rope_type or lacks a value "
            f"({type(error).__name__}: {error}); correct it, or use a head with another."
        ) from error
    if inverse.shape != (head_dim // 2,) or not ((inverse > 0) & inverse.isfinite()).all():
        raise UserError(
            f"head config: the rotary embedding {parameters} gives no {head_dim} / 2 positive, finite frequencies; "
            "correct it."
        )
    return inverse, scaling


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x [batch, heads, tokens, head_dim] with the two halves of a head as the rotated pairs, as Llama has them."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
