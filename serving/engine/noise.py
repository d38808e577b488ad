"""Random numbers that depend on what they decide and on nothing else: (seed, purpose, position, candidate).

No generator's state, batch or order of evaluation enters. That is what makes an answer repeatable from its seed with
speculation on or off.

The function is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) with its state as a counter:
stream(key)[n] = mix(key + (n + 1) * GAMMA). The seed's stream gives a key for each purpose, that key's stream gives one
for each position, and streams of that one give 64 bits for each candidate.

Gumbel noise is made so that few tokens of a large vocabulary need any. A draw is a race: argmax(log p - log e) with
independent exponentials e, one a token (-log e is standard Gumbel). Among 64 tokens the least e is exponential of rate
64, it belongs to any of them with the same probability, and, exponentials having no memory, the others exceed it by
independent exponentials. So one number for 64 tokens bounds what they can reach, and those that cannot win need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

_GROUP_BITS = 6
GROUP = 1 << _GROUP_BITS  # tokens that share a bound: those of the same id // GROUP

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1
_PILOT = 4  # groups that are computed in full to learn what the others have to beat
_SLACK = 1e-9  # far above the rounding of float64 scores: none that could win is left out


class Purpose(IntEnum):
    """The purpose of a random number; numbers of different purposes are independent."""

    CHOICE = 0  # which token the target chooses
    DRAFT = 1  # which token the head drafts, under the rejection rule
    ACCEPT = 2  # the acceptance of a drafted token, under the rejection rule


def uniform(seed: int, purpose: Purpose, positions: Sequence[int], candidates: Tensor) -> Tensor:
    """Uniform numbers strictly between 0 and 1, in float64.

    positions: of [rows] tokens, absolute in the sequence; candidates: [n] int64, such as token ids -> [rows, n].
    """
    keys = position_keys(seed, purpose, positions)
    return torch.stack([_unit(_stream_tensor(single, candidates)) for _, single in keys])


def gumbel(seed: int, purpose: Purpose, positions: Sequence[int], candidates: Tensor) -> Tensor:
    """Standard Gumbel noise [rows, n] in float64: argmax(log p + noise) is a draw from p. Arguments as `uniform`."""
    group, member = candidates >> _GROUP_BITS, candidates & (GROUP - 1)
    groups = torch.arange(int(group.max()) + 1, device=candidates.device)
    rows = []
    for shared, single in position_keys(seed, purpose, positions):
        # row by row: that of a whole vocabulary stays in a core's cache, which is three times faster
        bits = _stream_tensor(shared, groups)
        least = _unit(bits).log_().mul_(-1 / GROUP)
        excess = _unit(_stream_tensor(single, candidates)).log_().neg_()
        excess.mul_(member != (bits & (GROUP - 1)).index_select(0, group))  # low bits, which _unit leaves unused
        rows.append(excess.add_(least.index_select(0, group)).log_().neg_())
    return torch.stack(rows)


def choose(log_p: Tensor, seed: int, positions: Sequence[int], purpose: Purpose = Purpose.CHOICE) -> Tensor:
    """Draw a token for each row from p: exactly (log_p + gumbel(seed, purpose, positions, all ids)).argmax(dim=1).

    log_p: [n, vocab], -inf where a token is excluded; positions: [n] -> [n] ids, of equal tokens the first.
    """
    if log_p.device.type != "cpu":  # there all of the noise costs less than finding out what is needed
        everyone = torch.arange(log_p.shape[1], device=log_p.device)
        return (log_p + gumbel(seed, purpose, positions, everyone)).argmax(dim=1)
    row, token, score = _contenders(log_p, position_keys(seed, purpose, positions))
    ids = np.zeros(len(log_p), dtype=np.int64)
    order = np.lexsort((-token, score))  # what is written last stays: the best of each row
    ids[row[order]] = token[order]
    return torch.from_numpy(ids)


def _contenders(log_p: Tensor, keys: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows, tokens and exact scores of all tokens that can have the largest score of their row.

    In numpy: on a CPU such small arrays cost torch more.
    """
    missing = -log_p.shape[-1] % GROUP
    whole = pad(log_p, (0, missing), value=-torch.inf) if missing else log_p
    groups = whole.unflatten(-1, (-1, GROUP))  # [n, groups, 64]
    logs = groups.numpy()
    shared, single = np.array(keys, dtype=np.uint64).T
    bits = _stream_array(shared[:, None], np.arange(groups.shape[1], dtype=np.uint64))
    least = np.log(_unit_array(bits)) * (-1 / GROUP)
    winner = (bits & np.uint64(GROUP - 1)).astype(np.int64)
    ceiling = -np.log(least)  # [n, groups]: the largest noise in each group
    bounds = groups.amax(dim=-1).numpy() + ceiling

    def scores(row: np.ndarray, group: np.ndarray, member: np.ndarray) -> np.ndarray:
        tokens = (group * GROUP + member).astype(np.uint64)
        excess = -np.log(_unit_array(_stream_array(single[row], tokens)))
        excess *= member != winner[row, group]
        return logs[row, group, member] - np.log(excess + least[row, group])

    # [n, 1]: what the best of each row reaches at least; the most promising groups tell
    pilots = min(_PILOT, bounds.shape[1])
    group = np.argpartition(bounds, -pilots, axis=1)[:, -pilots:, None]  # [n, pilots, 1]
    known = scores(np.arange(len(group))[:, None, None], group, np.arange(GROUP))
    floor = known.reshape(len(group), -1).max(axis=1, keepdims=True) - _SLACK
    row, group = ((bounds >= floor) & (bounds > -np.inf)).nonzero()
    reach = logs[row, group] + ceiling[row, group, None]  # [candidate groups, 64]
    index, member = ((reach >= floor[row]) & (reach > -np.inf)).nonzero()
    row, group = row[index], group[index]
    return row, group * GROUP + member, scores(row, group, member)


def draft_seed(seed: int, first_position: int) -> int:
    """Return the seed of the DRAFT numbers of one verification, which decides from this position on."""
    return _stream(seed, len(Purpose) + first_position)


def position_keys(seed: int, purpose: Purpose, positions: Sequence[int]) -> list[tuple[int, int]]:
    """Keys of the streams at each position: for groups of candidates, and for single ones."""
    key = _stream(seed, purpose)
    streams = [_stream(key, position) for position in positions]
    return [(_stream(stream, 0), _stream(stream, 1)) for stream in streams]


def _stream(key: int, counter: int) -> int:
    x = (key + (counter + 1) * _GAMMA) & _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def signed(value: int) -> int:
    """The 64-bit pattern of `value` as torch's int64 has it."""
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value


def _stream_array(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """`_stream` of many, uint64; products wrap modulo 2**64."""
    x = (counters + np.uint64(1)) * np.uint64(_GAMMA) + keys
    x ^= x >> np.uint64(30)
    x *= np.uint64(_MIX_1)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_MIX_2)
    x ^= x >> np.uint64(31)
    return x


def _unit_array(bits: np.ndarray) -> np.ndarray:
    """The upper 52 bits and a half as a number in (0, 1): neither 0 nor 1 can come out, and the steps are even."""
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically: the copies of the sign are cleared
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _stream_tensor(key: int, counters: Tensor) -> Tensor:
    """`_stream_array` on any device, as int64 bit patterns."""
    x = (counters * signed(_GAMMA)).add_(signed(key + _GAMMA))
    x.bitwise_xor_(_shift_right(x, 30)).mul_(signed(_MIX_1))
    x.bitwise_xor_(_shift_right(x, 27)).mul_(signed(_MIX_2))
    return x.bitwise_xor_(_shift_right(x, 31))


def _unit(bits: Tensor) -> Tensor:
    """`_unit_array` on any device."""
    return _shift_right(bits, 12).to(torch.float64).add_(0.5).mul_(2.0**-52)
