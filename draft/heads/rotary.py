"""Rotary position embeddings of a head, as Llama has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from draft.errors import UserError


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
        inverse, scaling = _computed(parameters, head_dim, max_positions)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"head config: the rotary embedding {parameters} is of an unknown rope_type or lacks a value "
            f"({type(error).__name__}: {error}); correct it, or use a head with another."
        ) from error
    if inverse.shape != (head_dim // 2,) or not torch.isfinite(inverse).all():
        raise UserError(
            f"head config: the rotary embedding {parameters} gives no {head_dim} / 2 finite frequencies; correct it."
        )
    return inverse, scaling


def _computed(parameters: dict[str, Any], head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    if parameters.get("rope_type", "default") == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / parameters.get("rope_theta", 10000.0) ** exponents, 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        head_dim=head_dim, hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=max_positions,
        rope_parameters=dict(parameters),
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x [batch, heads, tokens, head_dim] with the two halves of a head as the rotated pairs, as Llama has them."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
