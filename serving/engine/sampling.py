"""From logits to the distribution that a request asks for; noise.py draws from it.

The order is that of transformers: logit bias; repetition penalty; presence and frequency penalties; the ban of what
would end the answer before min_new_tokens; temperature; top-k; top-p; min-p. Under speculation each row is processed as
plain decoding would: with the tokens that were drafted before it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from draft.errors import UserError

_NUCLEUS_GUESS = 1024  # most nuclei are smaller, and the largest few are found faster than all are sorted
_TIES_GUESS = 14  # logits of a bf16 model often tie at the edge of the top k
LEAST_TEMPERATURE = 1e-30
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
        self.truncates = 0 < params.top_k < vocab_size or params.top_p < 1 or params.min_p > 0
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
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.device != logits.device:
                setattr(self, name, value.to(logits.device))
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


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits by a temperature (above 0), up to a constant: [..., vocab], in at least float32.

    The largest is 0, so that a tiny temperature overflows to -inf only; it is bounded below, since 1e-50 would be 0 in
    float32, while 1e-30 already decides between any two logits that differ.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (scores - scores.amax(dim=-1, keepdim=True)).div_(max(temperature, LEAST_TEMPERATURE))


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


# Sampling parameters. The HTTP API validates its own fields with the same types.


SEED_LIMIT = 2**63
MAX_LOGPROBS = 20  # alternatives per token
DEFAULT_MAX_NEW_TOKENS = 128

NewTokens = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0)]
TopP = Annotated[float, Field(gt=0, le=1)]
MinP = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(gt=0)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def sorted_pairs(bias: Any) -> Any:
    """Return a mapping's items by key, so that equal parameters compare and hash alike."""
    try:
        return tuple(sorted(dict(bias).items()))
    except (TypeError, ValueError):
        raise ValueError("input should be a mapping of token ids to numbers") from None


class SamplingParams(BaseModel):
    """Sampling parameters of one request: what acts on the logits, in the order above, and when the answer ends.

    Raises:
        UserError: when a value is out of its range, with the field, the value and the limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    max_new_tokens: NewTokens = DEFAULT_MAX_NEW_TOKENS
    temperature: Temperature = Field(0.0, description="0 is greedy: top_p, top_k, min_p and the seed have no effect.")
    top_p: TopP = 1.0
    top_k: int = Field(0, ge=0, description="0 is off.")
    min_p: MinP = Field(0.0, description="Relative to the most probable token; 0 is off.")
    seed: Seed | None = Field(None, description="None: the engine draws one and reports it.")
    repetition_penalty: RepetitionPenalty = Field(1.0, description="For tokens in the prompt or the answer.")
    presence_penalty: Penalty = Field(0.0, description="For tokens in the answer.")
    frequency_penalty: Penalty = Field(0.0, description="For tokens in the answer, once per occurrence.")
    logit_bias: Annotated[tuple[tuple[TokenId, Bias], ...], BeforeValidator(sorted_pairs)] = Field(
        (), description="A mapping of token ids to what is added to their logits; kept as sorted pairs."
    )
    min_new_tokens: int = Field(0, ge=0, description="Ends are banned, and stop strings ignored, until then.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), strict=False)
    stop_ids: tuple[TokenId, ...] = Field((), strict=False)
    keep_stop: bool = Field(True, description="Keep the stop string or id in the answer (TGI) or drop it (OpenAI).")
    ignore_eos: bool = False
    logprobs: Logprobs | None = Field(
        None, description="None: not computed; 0: of the emitted tokens; n: also of the n most probable ones."
    )

    def __init__(self, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS, **fields: Any) -> None:
        given = {"max_new_tokens": max_new_tokens, **fields}
        try:
            super().__init__(**given)
        except ValidationError as error:
            problem = error.errors()[0]
            name = str(problem["loc"][0]) if problem["loc"] else "min_new_tokens"
            message = problem["msg"].removeprefix("Value error, ")
            raise UserError(f"{name} = {given[name]!r:.100}: {message[:1].lower()}{message[1:]}.") from None

    @model_validator(mode="after")
    def _check_min_new_tokens(self) -> SamplingParams:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"it must be at most max_new_tokens, which is {self.max_new_tokens}")
        return self

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError when stop_ids or logit_bias name a token that the target does not have."""
        for name, ids in (("stop_ids", self.stop_ids), ("logit_bias", dict(self.logit_bias))):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise UserError(f"{name} has token id {token_id}: the target's go from 0 to {vocab_size - 1}.")
