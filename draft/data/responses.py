"""Responses written by the target: many rows at once, each exactly what the target would write alone.

transformers' `generate` pads every row to the longest, runs until the last row has ended and copies the whole cache at
each token. Here a row that ends leaves its place to the next prompt, and the cache is allocated once. The decoder is
transformers' own, unmodified: only its attention function and its cache are ours, and only while this runs.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from draft.data.row_cache import RowCache, row_attention
from draft.errors import UserError
from draft.target import Target
from draft.target.support import check_architecture

_ROUND = 32  # the part of the cache that a step reads grows in such jumps
_PADDING = 1.25  # prompts are read together while padding costs at most a quarter more tokens


@dataclass(eq=False)
class _Row:
    """One response being written."""

    index: int
    prompt: list[int]
    limit: int  # most tokens that this response may have
    temperature: float
    noise: Tensor  # [limit] uniform in [0, 1), float64: one number a position, whoever shares the batch
    response: list[int] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are in the cache: all but the one just chosen."""
        return len(self.prompt) + len(self.response) - 1


def generate_responses(
    target: Target,
    prompts: Iterable[list[int]],
    *,
    max_new_tokens: int,
    temperature: float | Sequence[float] = 0.0,
    top_p: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    max_length: int | None = None,
    keys: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Let the target answer every prompt; yields (index of the prompt, response ids) as soon as a row ends.

    Temperature 0 is greedy (the largest logit, the lower id on ties); any other temperature samples
    softmax(logits / t), cut to its `top_p` nucleus when that is below 1. A response ends with the target's
    end-of-turn token, which it includes, or without one at `max_new_tokens`, or where prompt and response together
    reach `max_length` tokens.

    Args:
        prompts: token ids under the chat template, generation prompt included.
        temperature: one for all, or one a prompt.
        seed, keys: what a row draws depends on the seed and its key (default: its index), not on the batch: apart
            from rounding the same text comes out for every batch size and order.
        progress: called after each step with the number of tokens that it wrote.

    Raises:
        UserError: for a prompt without tokens or without room for a response, and for targets whose attention is not
            plain softmax attention (possibly in windows).
    """
    waiting = deque(_rows(list(prompts), max_new_tokens, temperature, seed, max_length or target.max_length, keys))
    check_architecture(target.config, target.name)
    if not waiting:
        return
    batch = _Batch(target, batch_size, max(len(row.prompt) + row.limit for row in waiting), top_p)
    while waiting or batch.rows:
        written = len(batch.rows)
        with torch.inference_mode(), row_attention(target):  # not held across the yield: the caller may use the target
            finished = batch.step() if batch.rows else []
            free = batch_size - len(batch.rows)
            # one at a time would read each prompt alone, which wastes an accelerator
            if waiting and free >= max(1, batch_size // 8):
                new = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                written += len(new)
                finished += batch.admit(new)
        if progress is not None:
            progress(written)
        yield from ((row.index, row.response) for row in finished)


def _rows(
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float | Sequence[float],
    seed: int,
    max_length: int,
    keys: Sequence[str] | None,
) -> Iterator[_Row]:
    for index, prompt in enumerate(prompts):
        limit = min(max_new_tokens, max_length - len(prompt))
        if not prompt or limit < 1:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, which leaves no room for a response within {max_length}; "
                "leave it out or raise the maximal length."
            )
        heat = float(temperature if isinstance(temperature, (int, float)) else temperature[index])
        noise = row_noise(seed, keys[index] if keys else str(index), limit) if heat > 0 else torch.empty(0)
        yield _Row(index, prompt, limit, heat, noise)


def row_noise(seed: int, key: str, count: int) -> Tensor:
    """Uniform numbers [count] in [0, 1), float64, that depend on the seed and the row's key only."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(count, dtype=torch.float64, generator=generator)


class _Batch:
    """The rows being written, in the first places of a cache."""

    def __init__(self, target: Target, size: int, capacity: int, top_p: float) -> None:
        self.target = target
        self.top_p = top_p
        self.rows: list[_Row] = []
        self.cache = RowCache(target.num_layers, size, -(-capacity // _ROUND) * _ROUND)

    def admit(self, rows: list[_Row]) -> list[_Row]:
        """Read the prompts of `rows` and choose their first tokens; returns those already finished."""
        finished: list[_Row] = []
        for group in _similar(rows):
            width = max(len(row.prompt) for row in group)
            # padding on the right: a causal row never sees what comes after it
            ids = torch.tensor([row.prompt + [0] * (width - len(row.prompt)) for row in group])  # [group, width]
            self.cache.prefill_at(len(self.rows))
            hidden = self._decoder(ids, torch.arange(width).expand_as(ids), torch.ones(width, width).tril().bool())
            last = torch.tensor([len(row.prompt) - 1 for row in group], device=hidden.device)
            self.rows += group
            finished += self._choose(group, hidden[torch.arange(len(group), device=hidden.device), last])
        return finished

    def step(self) -> list[_Row]:
        """One more token for every row; returns the finished ones."""
        lengths = torch.tensor([row.cached for row in self.rows])  # [rows]
        ids = torch.tensor([row.response[-1:] for row in self.rows])  # [rows, 1]
        reach = -(-int(lengths.max() + 1) // _ROUND) * _ROUND
        self.cache.decode_at(lengths.to(self.target.device), reach)
        mask = torch.arange(reach) <= lengths[:, None]  # [rows, reach]
        hidden = self._decoder(ids, lengths[:, None], mask[:, None])
        return self._choose(list(self.rows), hidden[:, 0])

    def _decoder(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """ids, positions: [rows, tokens]; mask [tokens, keys] or [rows, tokens, keys] -> [rows, tokens, hidden]."""
        device = self.target.device
        return self.target.decoder(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            # four dimensions: transformers hands such a mask to the attention function as it is
            attention_mask=(mask[None, None] if mask.dim() == 2 else mask[:, None]).to(device),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def _choose(self, rows: list[_Row], hidden: Tensor) -> list[_Row]:
        """Append the next token to `rows` from their last states [rows, hidden]; drop and return those that ended."""
        drawn = [row.noise[len(row.response)].item() if row.temperature > 0 else 0.0 for row in rows]
        noise = torch.tensor(drawn, dtype=torch.float64)
        heats = torch.tensor([row.temperature for row in rows], dtype=torch.float64)
        chosen = draw(self.target.logits(hidden), heats, self.top_p, noise).tolist()
        finished = []
        for row, token in zip(rows, chosen, strict=True):
            row.response.append(token)
            if token in self.target.eos_token_ids or len(row.response) == row.limit:
                finished.append(row)
        for row in finished:
            self._remove(row)
        return finished

    def _remove(self, row: _Row) -> None:
        """The last row moves into the place of a finished one, so that rows always fill the first places."""
        place, last = self.rows.index(row), self.rows.pop()
        if last is not row:
            self.rows[place] = last
            self.cache.move(len(self.rows), place, last.cached)


def _similar(rows: list[_Row]) -> list[list[_Row]]:
    """Groups of rows whose prompts are of similar length."""
    groups: list[list[_Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.prompt)):
        if groups:
            group = [*groups[-1], row]
            if len(group) * len(group[0].prompt) <= _PADDING * sum(len(row.prompt) for row in group):
                groups[-1] = group
                continue
        groups.append([row])
    return groups


def draw(logits: Tensor, temperatures: Tensor, top_p: float, noise: Tensor) -> Tensor:
    """One token a row by inversion: the first id at which the cumulated probability exceeds the noise.

    logits [rows, vocab]; temperatures, noise [rows] float64 on the CPU -> [rows] int64.
    """
    chosen = logits.argmax(dim=-1)
    sampled = temperatures.nonzero()[:, 0]
    if len(sampled) == 0:
        return chosen
    heats = temperatures[sampled].to(logits.device, torch.promote_types(logits.dtype, torch.float32))
    sampled_on = sampled.to(logits.device)
    probabilities = (logits[sampled_on].to(heats.dtype) / heats[:, None]).softmax(dim=-1)
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    # float64, since float32 sums over a vocabulary lose the small probabilities
    cumulated = probabilities.cumsum(dim=-1, dtype=torch.float64)
    at = noise[sampled].to(logits.device)[:, None] * cumulated[:, -1:]
    chosen[sampled_on] = torch.searchsorted(cumulated, at, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
    return chosen


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of most likely tokens whose probability reaches `top_p` (not renormalised)."""
    ordered, ids = probabilities.sort(dim=-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, ids, ordered)
