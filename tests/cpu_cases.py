"""Random cases for the CPU kernels, and how far two results are apart."""

import torch
from torch import Tensor

from cpu_kernels import slot_attention
from cpu_kernels.ops import BLOCK

FLOAT, HALF = torch.float32, torch.bfloat16
PROMPT = torch.empty(0, 0, dtype=torch.bool)  # causal


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def random_case(
    seed: int,
    count: int = 0,
    dtype: torch.dtype = FLOAT,
    tree: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    group: int = 3,
    width: int = 16,
    value_width: int = 16,
) -> dict:
    """Three slots of 80 entries, whose blocks lie anywhere in a cache of 20; segments of random lengths in two of them,
    with random trees as masks if asked."""
    torch.manual_seed(seed)
    key_heads, slots, entries = 2, 3, 80
    pick = lambda low, high: int(torch.randint(low, high + 1, ()))  # noqa: E731
    segments, start = [], 0
    for slot in torch.randperm(slots)[:2].tolist():
        size = count or pick(0, 9)
        past = pick(0, entries - size)
        base = pick(max(0, past - 6), past) if tree else past
        segments.append((slot, base, past, start, size))
        start += size
    tokens = start + 1  # the last token belongs to nobody
    positions = torch.zeros(tokens, dtype=torch.int64)
    mask = torch.zeros(tokens, 24, dtype=torch.bool) if tree else torch.empty(tokens, 0, dtype=torch.bool)
    for _, base, past, first, size in segments:
        for j in range(size):
            positions[first + j] = past + j
            if tree:
                mask[first + j, : past + j - base] = torch.rand(past + j - base) < 0.5
                mask[first + j, past + j - base] = True

    def new(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    return dict(
        q=new(1, tokens, key_heads * group, width).transpose(1, 2),
        k=new(1, tokens, key_heads, width).transpose(1, 2),
        v=new(1, tokens, key_heads, value_width).transpose(1, 2),
        k_cache=new(key_heads, 20 * BLOCK, width),
        v_cache=new(key_heads, 20 * BLOCK, value_width),
        blocks=torch.randperm(20)[: slots * entries // BLOCK].view(slots, -1),
        positions=positions,
        segments=torch.tensor(segments),
        mask=mask,
        scale=width**-0.5,
        window=window,
        softcap=softcap,
    )  # fmt: skip


def attend(case: dict) -> Tensor:
    """slot_attention on copies of the case's cache."""
    return slot_attention(**{**case, "k_cache": case["k_cache"].clone(), "v_cache": case["v_cache"].clone()})


def places(blocks: Tensor, slot: int, entries: int) -> Tensor:
    """The places in the cache of a slot's first entries."""
    at = torch.arange(entries)
    return blocks[slot, at // BLOCK] * BLOCK + at % BLOCK
