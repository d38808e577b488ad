"""From logits to the distribution that a request asks for; noise.py draws from it.

The order is that of transformers: logit bias; repetition penalty; presence and frequency penalties; the ban of what
would end the answer before min_new_tokens; temperature; top-k; top-p; min-p. Under speculation each row is processed as
plain decoding would: with the tokens that were drafted before it.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draft.errors import UserError

_NUCLEUS_GUESS = 1024  # most nuclei are smaller, and the largest few are found faster than all are sorted
_TIES_GUESS = 14  # logits of a bf16 model often tie at the edge of the top k
_TINY, _HUGE = 1e-30, 1e30  # beyond these, float32 would give 0 or infinity, and they already decide everything


class Processor:
    """One request's processing of the target's logits, and the counts of tokens that this needs."""

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int, eos_ids: Iterable[int] = ()
    ) -> None:
        """Raises UserError when the request names a token outside the vocabulary."""
        params.check_vocabulary(vocab_size)
        self.params = params
        self._emitted = 0
        ends = {*params.stop_ids, *(() if params.ignore_eos else eos_ids)}
        self._ends = torch.tensor(sorted(ends), dtype=torch.int64)
        bias = dict(params.logit_bias)
        self._bias_ids = torch.tensor(list(bias), dtype=torch.int64)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float64)
        self._repetition = min(max(params.repetition_penalty, _TINY), _HUGE)
        self._penalises = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
        # False: `adjust` never changes anything
        self.active = bool(bias) or self._penalises or (params.min_new_tokens > 0 and bool(ends))
        if self._penalises:
            self._counts = torch.zeros(vocab_size)  # in the answer
            self._seen_ids = torch.zeros(vocab_size, dtype=torch.int64)  # [:len(_seen)]: in the prompt or the answer
            self._seen: set[int] = set()
            for token_id in dict.fromkeys(prompt_ids if params.repetition_penalty != 1 else ()):
                self._see(token_id)

    def append(self, token_id: int) -> None:
        """Take note of an emitted token."""
        self._emitted += 1
        if self._penalises:
            self._counts[token_id] += 1
            self._see(token_id)

    def adjust(self, logits: Tensor, prefixes: Sequence[Sequence[int]]) -> Tensor:
        """Apply bias, penalties and bans; greedy requests take the argmax of the result.

        logits: [n, vocab]; prefixes: for each row the drafted ids between the emitted tokens and the row's own.

        Returns:
            [n, vocab] in at least float32, or `logits` itself where nothing applies.
        """
        early = [row for row, ids in enumerate(prefixes) if self._emitted + len(ids) < self.params.min_new_tokens]
        bans = bool(early) and len(self._ends) > 0
        if not (len(self._bias) or self._penalises or bans):
            return logits
        self._move(logits.device)
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        if len(self._bias):
            scores[:, self._bias_ids] += self._bias.to(scores.dtype)
        if self._penalises:
            self._penalise(scores, prefixes)
        if bans:
            scores[torch.tensor(early, device=scores.device)[:, None], self._ends] = -torch.inf
        return scores

    def warp(self, logits: Tensor) -> Tensor:
        """Apply `warp` for this request."""
        return warp(logits, self.params)

    def _see(self, token_id: int) -> None:
        if token_id not in self._seen:
            self._seen_ids[len(self._seen)] = token_id
            self._seen.add(token_id)

    def _penalise(self, scores: Tensor, prefixes: Sequence[Sequence[int]]) -> None:
        """In place. The emitted tokens are the same for all rows; each row's drafted ones are done over for it."""
        drafted = [(row, token, count) for row, ids in enumerate(prefixes) for token, count in Counter(ids).items()]
        rows, tokens, extra = torch.tensor(drafted, dtype=torch.int64, device=scores.device).view(-1, 3).unbind(1)
        single = self._penalised(scores[rows, tokens], self._counts[tokens] + extra)
        seen = self._seen_ids[: len(self._seen)]
        scores[:, seen] = self._penalised(scores[:, seen], self._counts[seen])
        scores[rows, tokens] = single

    def _penalised(self, scores: Tensor, counts: Tensor) -> Tensor:
        """Scores of tokens that have been seen, `counts` times in the answer (arXiv 1909.05858; OpenAI's API)."""
        scores = torch.where(scores > 0, scores / self._repetition, scores * self._repetition)
        counts, present = counts.to(scores.dtype), (counts > 0).to(scores.dtype)
        return scores - self.params.frequency_penalty * counts - self.params.presence_penalty * present

    def _move(self, device: torch.device) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.device != device:
                setattr(self, name, value.to(device))


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits by a temperature (above 0), up to a constant: [..., vocab], in at least float32.

    The largest is 0, so that a tiny temperature overflows to -inf only; it is bounded below, since 1e-50 would be 0 in
    float32, while 1e-30 already decides between any two logits that differ.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (scores - scores.amax(dim=-1, keepdim=True)).div_(max(temperature, _TINY))


def warp(logits: Tensor, params: SamplingParams) -> Tensor:
    """Log-probabilities of the distribution that a request asks for: temperature (above 0), top-k, top-p, min-p.

    logits: [..., vocab] -> [..., vocab], -inf for tokens outside; half precision is computed in float32. top-p is of
    what top-k leaves, min-p is relative to the most probable token. Tokens as probable as the last one that is kept are
    kept too, so the result does not depend on any order.
    """
    scores = apply_temperature(logits, params.temperature)  # the largest is 0
    vocab = scores.shape[-1]
    top_k = params.top_k if 0 < params.top_k < vocab else 0
    if not top_k and params.top_p == 1 and params.min_p == 0:
        return scores.log_softmax(dim=-1)
    total = None if top_k or params.top_p == 1 else scores.logsumexp(dim=-1, keepdim=True)
    guess = top_k + _TIES_GUESS if top_k else _NUCLEUS_GUESS
    for count in (guess, max(guess, 8 * _NUCLEUS_GUESS), vocab):
        largest = _largest(scores, min(count, vocab))  # [..., count], falling
        edge = _edge(largest, top_k, params, total)
        inside = largest >= edge
        if count >= vocab or not inside[..., -1].any():  # all that are kept are among the largest
            break
    norm = largest.masked_fill(~inside, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.where(scores >= edge, scores - norm, -torch.inf)


def _edge(largest: Tensor, top_k: int, params: SamplingParams, total: Tensor | None) -> Tensor:
    """The least score [..., 1] that is kept, as far as the largest ones [..., count] tell.

    total: log of the sum of all scores' exponentials, [..., 1]; needed for top-p without top-k.
    """
    edge = torch.full_like(largest[..., :1], math.log(params.min_p) if params.min_p else -torch.inf)
    if top_k:
        least = largest[..., top_k - 1 : top_k]
        edge = torch.maximum(edge, least)
        largest = largest.masked_fill(largest < least, -torch.inf)
    if params.top_p < 1:
        p = (largest - (largest.logsumexp(dim=-1, keepdim=True) if total is None else total)).exp()
        # a token is in the nucleus when those before it fall short of top_p
        inside = p.cumsum(dim=-1) - p < params.top_p
        edge = torch.maximum(edge, largest.gather(-1, inside.sum(dim=-1, keepdim=True) - 1))
    return edge


def _largest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of [..., vocab], falling."""
    if scores.device.type != "cpu":
        return scores.topk(count, dim=-1).values
    # numpy's vectorised sort takes a tenth of the time of torch's
    largest = np.partition(scores.numpy(), -count, axis=-1)[..., -count:]
    return torch.from_numpy(np.sort(largest, axis=-1)[..., ::-1].copy())


# What a request asks for, and the limits of each field.


SEED_LIMIT = 2**63
MAX_LOGPROBS = 20  # alternatives a token


@dataclass(frozen=True)
class SamplingParams:
    """How a request is decoded; sampling.py says in which order the fields act on the logits, sequence.py when it ends.

    Raises:
        UserError: when a value is out of its range, naming the field, the value and the limit.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0 is greedy, and top_p, top_k, min_p and the seed have no effect
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # relative to the most probable token; 0 is off
    seed: int | None = None  # None: the engine draws one and reports it
    repetition_penalty: float = 1.0  # of tokens in the prompt or the answer
    presence_penalty: float = 0.0  # of tokens in the answer
    frequency_penalty: float = 0.0  # of tokens in the answer, for each time
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()  # token id -> addend; kept as sorted pairs
    min_new_tokens: int = 0  # what would end the answer earlier is banned or, being a stop string, not looked for
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    keep_stop: bool = True  # the stop string or id stays in the answer (TGI) or not (OpenAI)
    ignore_eos: bool = False
    logprobs: int | None = None  # None: not computed; 0: of the tokens themselves; n: and of the n most probable

    def __post_init__(self) -> None:
        for name, (kind, holds, limit) in _LIMITS.items():
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL) and not (_is_number(value, kind) and holds(value)):
                raise _refusal(name, value, limit)
        for name in ("keep_stop", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise _refusal(name, getattr(self, name), "true or false")
        if self.min_new_tokens > self.max_new_tokens:
            limit = f"at most max_new_tokens, which is {self.max_new_tokens}"
            raise _refusal("min_new_tokens", self.min_new_tokens, limit)
        object.__setattr__(self, "stop", _each("stop", self.stop, _is_text, "a list of non-empty strings"))
        object.__setattr__(self, "stop_ids", _each("stop_ids", self.stop_ids, _is_id, "a list of token ids"))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError when stop_ids or logit_bias name a token that the target does not have."""
        for name, ids in (("stop_ids", self.stop_ids), ("logit_bias", dict(self.logit_bias))):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise UserError(f"{name} has token id {token_id}: the target's go from 0 to {vocab_size - 1}.")


# field -> (type, test, the limit in words)
_LIMITS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "max_new_tokens": (int, lambda v: v >= 1, "a whole number of at least 1"),
    "min_new_tokens": (int, lambda v: v >= 0, "a whole number of at least 0"),
    "temperature": (float, lambda v: v >= 0, "a finite number of at least 0"),
    "top_p": (float, lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
    "top_k": (int, lambda v: v >= 0, "a whole number of at least 0 (0 is off)"),
    "min_p": (float, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    "repetition_penalty": (float, lambda v: v > 0, "a finite number above 0"),
    "presence_penalty": (float, lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "frequency_penalty": (float, lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "seed": (int, lambda v: 0 <= v < SEED_LIMIT, "a whole number from 0 to 2**63 - 1"),
    "logprobs": (int, lambda v: 0 <= v <= MAX_LOGPROBS, f"a whole number from 0 to {MAX_LOGPROBS}"),
}
_OPTIONAL = ("seed", "logprobs")


def _refusal(name: str, value: Any, limit: str) -> UserError:
    return UserError(f"{name} = {value!r}: it must be {limit}.")


def _is_number(value: Any, kind: type) -> bool:
    """A finite number that is no bool; whole numbers are floats, too."""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return False
    return kind is int or abs(value) <= sys.float_info.max  # of NaN, infinity and 10**400 none is


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_id(value: Any) -> bool:
    return _is_number(value, int) and value >= 0


def _each(name: str, values: Any, holds: Callable[[Any], bool], limit: str) -> tuple[Any, ...]:
    try:
        found = None if isinstance(values, str) else tuple(values)
    except TypeError:
        found = None
    if found is None or not all(map(holds, found)):
        raise _refusal(name, values, limit)
    return found


def _bias(bias: Any) -> tuple[tuple[int, float], ...]:
    limit = "a mapping of token ids to numbers from -100 to 100"
    try:
        pairs = dict(bias)
    except (TypeError, ValueError):
        raise _refusal("logit_bias", bias, limit) from None
    for token_id, value in pairs.items():
        if not _is_id(token_id) or not _is_number(value, float) or not -100 <= value <= 100:
            raise _refusal("logit_bias", {token_id: value}, limit)
    return tuple(sorted(pairs.items()))
