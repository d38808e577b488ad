"""How one sequence's tokens attend to its keys: a table of implementations, and why one may be impossible here."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from draft.errors import UserError
from serving.engine.kv_cache import Formula, Sight


def sdpa(query: Tensor, keys: Tensor, values: Tensor, sight: Sight, scale: float, softcap: float) -> Tensor:
    """PyTorch's own; it knows no bounded scores. Shapes as in `Formula`."""
    if softcap:
        return explicit(query, keys, values, sight, scale, softcap)
    grouped, visible = _grouped(query, keys, sight)
    return _ungrouped(scaled_dot_product_attention(grouped, keys, values, attn_mask=visible, scale=scale), query)


def explicit(query: Tensor, keys: Tensor, values: Tensor, sight: Sight, scale: float, softcap: float) -> Tensor:
    """The formula itself."""
    grouped, visible = _grouped(query, keys, sight)
    scores = grouped @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    return _ungrouped(weights @ values, query)


def flex(query: Tensor, keys: Tensor, values: Tensor, sight: Sight, scale: float, softcap: float) -> Tensor:
    """FlexAttention, which takes any mask and bound; one compiled kernel on CUDA."""
    from torch.nn.attention.flex_attention import flex_attention

    visible = sight.visible

    def score(scores: Tensor, batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        return scores if visible is None else torch.where(visible[batch, 0, row, key], scores, -torch.inf)

    run: Any = torch.compile(flex_attention, dynamic=True) if query.is_cuda else flex_attention
    mixed = run(query, keys, values, score_mod=score, scale=scale, enable_gqa=query.shape[1] != keys.shape[1])
    return mixed.transpose(1, 2)


def flash(query: Tensor, keys: Tensor, values: Tensor, sight: Sight, scale: float, softcap: float) -> Tensor:
    """flash-attn for chains and prompts; trees have masks that it does not take, and go through SDPA.

    So does a head in float32, beside a target in a dtype that flash-attn knows.
    """
    if not sight.is_chain or query.dtype not in _FLASH_DTYPES:
        return sdpa(query, keys, values, sight, scale, softcap)
    from flash_attn import flash_attn_func

    return flash_attn_func(
        *(x.transpose(1, 2) for x in (query, keys, values)),
        softmax_scale=scale,
        causal=True,
        window_size=(sight.window - 1, 0) if sight.window else (-1, -1),
        softcap=softcap,
    )


_FLASH_DTYPES = (torch.float16, torch.bfloat16)
FORMULAS: dict[str, Formula] = {"eager": explicit, "sdpa": sdpa, "flex": flex, "flash_attention_2": flash}


def choose_formula(name: str, device: torch.device, dtype: torch.dtype) -> Formula:
    """`auto` is flash-attn where it is installed and knows the dtype, else SDPA.

    Raises:
        UserError: for an unknown name, and for one that cannot work here, with the reason.
    """
    if name == "auto":
        name = "sdpa" if _why_not_flash(device, dtype) else "flash_attention_2"
    if name not in FORMULAS:
        raise UserError(f"attention = {name!r}: it must be one of auto, {', '.join(FORMULAS)}.")
    reason = None
    if name == "flash_attention_2":
        reason = _why_not_flash(device, dtype)
    elif name == "flex" and device.type != "cuda":
        reason = f"on {device.type} FlexAttention has no kernel that is faster than sdpa"
    if reason:
        raise UserError(f"attention = {name!r} is impossible here: {reason}; use auto or sdpa.")
    return FORMULAS[name]


def _why_not_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"flash-attn needs a CUDA device, and the target is on {device.type}"
    if dtype not in _FLASH_DTYPES:
        return f"flash-attn needs float16 or bfloat16, and the target is in {str(dtype).removeprefix('torch.')}"
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install 'draftsmith[flash-attn]')"
    return None


def _grouped(query: Tensor, keys: Tensor, sight: Sight) -> tuple[Tensor, Tensor | None]:
    """A group's queries stand side by side, as further tokens of their key-value head: nothing is repeated.

    query: [rows, heads, tokens, d] -> [rows, kv_heads, groups * tokens, d], and what each sees, [rows, 1, groups *
    tokens, keys].
    """
    groups = query.shape[1] // keys.shape[1]
    visible = None if sight.visible is None else sight.visible.repeat(1, 1, groups, 1)
    return query.reshape(len(query), keys.shape[1], -1, query.shape[3]), visible


def _ungrouped(mixed: Tensor, query: Tensor) -> Tensor:
    """[rows, kv_heads, groups * tokens, value_dim] -> [rows, tokens, heads, value_dim]."""
    return mixed.reshape(len(query), query.shape[1], query.shape[2], -1).transpose(1, 2)
