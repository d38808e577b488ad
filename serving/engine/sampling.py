"""From logits to a warped distribution, and random numbers that depend on what they decide and on nothing else.

A random number is a function of (seed, purpose, position, candidate): of no generator's state, batch or order of
evaluation. That is what makes an answer repeatable from its seed with speculation on or off.

The function is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) with its state as a counter:
stream(key)[n] = mix(key + (n + 1) * GAMMA). The seed's stream gives a key for each purpose, that key's stream gives one
for each position, and that one's stream gives 64 bits for each candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from serving.engine.sequence import SamplingParams

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1
_NUCLEUS_GUESS = 256  # most nuclei are smaller, and the largest few are found faster than all are sorted


class Purpose(IntEnum):
    """What a random number is for; numbers of different purposes are independent."""

    CHOICE = 0  # which token the target chooses
    DRAFT = 1  # which token the head drafts, under the rejection rule
    ACCEPT = 2  # whether a drafted token stands, under the rejection rule


def _mix(x: int) -> int:
    """SplitMix64's finaliser."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def _stream(key: int, counter: int) -> int:
    return _mix((key + (counter + 1) * _GAMMA) & _MASK)


def _signed(value: int) -> int:
    """The 64-bit pattern of `value` as torch's int64 has it."""
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically: the copies of the sign are cleared
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _stream_tensor(key: int, counters: Tensor) -> Tensor:
    """`_stream` of many counters, as int64 bit patterns; torch's products wrap modulo 2**64."""
    x = (counters * _signed(_GAMMA)).add_(_signed(key + _GAMMA))
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(_MIX_1))
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(_MIX_2))
    return x.bitwise_xor_(_shift_right(x, 31))


def uniform(seed: int, purpose: Purpose, positions: Sequence[int], candidates: Tensor) -> Tensor:
    """Uniform numbers strictly between 0 and 1, in float64.

    positions: of [rows] tokens, absolute in the sequence; candidates: [n] int64, such as token ids -> [rows, n].
    """
    key = _stream(seed, purpose)
    bits = candidates.new_empty(len(positions), len(candidates))
    for row, position in zip(bits, positions, strict=True):
        # row by row: that of a whole vocabulary stays in a core's cache, which is three times faster
        row.copy_(_shift_right(_stream_tensor(_stream(key, position), candidates), 12))
    # 52 bits and a half: neither 0 nor 1 can come out, and the steps are even
    return bits.to(torch.float64).add_(0.5).mul_(2.0**-52)


def gumbel(seed: int, purpose: Purpose, positions: Sequence[int], candidates: Tensor) -> Tensor:
    """Standard Gumbel noise [rows, n] in float64: argmax(log p + noise) is a draw from p."""
    return uniform(seed, purpose, positions, candidates).log_().neg_().log_().neg_()


def heat(logits: Tensor, temperature: float) -> Tensor:
    """Logits / temperature (above 0), up to a constant: [..., vocab], in at least float32.

    The largest is 0, so that a tiny temperature overflows to -inf only; it is bounded below, since 1e-50 would be 0 in
    float32, while 1e-30 already decides between any two logits that differ.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (scores - scores.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)


def warp(logits: Tensor, params: SamplingParams) -> Tensor:
    """Log-probabilities of the distribution that a request asks for: temperature (above 0), then top-k, then top-p.

    logits: [..., vocab] -> [..., vocab], -inf for tokens outside; half precision is computed in float32. Tokens as
    probable as the last one that is kept are kept too, so the result does not depend on any order.
    """
    scores = heat(logits, params.temperature)
    vocab = scores.shape[-1]
    if 0 < params.top_k < vocab:
        least = scores.topk(params.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    log_p = scores.log_softmax(dim=-1)
    if params.top_p == 1:
        return log_p
    outside = log_p < _nucleus_edge(log_p, params.top_p)
    return log_p.masked_fill(outside, -torch.inf).log_softmax(dim=-1)


def _nucleus_edge(log_p: Tensor, top_p: float) -> Tensor:
    """The least log-probability [..., 1] in the smallest set of most probable tokens whose sum reaches top_p."""
    for count in (min(_NUCLEUS_GUESS, log_p.shape[-1]), log_p.shape[-1]):
        largest = log_p.topk(count, dim=-1).values  # [..., count], falling
        # a token is in the set when those before it fall short of top_p
        before = largest.exp().cumsum(dim=-1) - largest.exp()
        inside = before < top_p
        if not inside[..., -1].any():
            break
    return largest.gather(-1, inside.sum(dim=-1, keepdim=True) - 1)
