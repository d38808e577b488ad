"""One request: what it asks for, how far it has come, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Any

from draft.errors import UserError
from draft.tau import acceptance_length

SEED_LIMIT = 2**63
# tokens before the one to be decoded that may change its text: tokenizers with a word-start marker need one
_CONTEXT = 6


@dataclass(frozen=True)
class SamplingParams:
    """How a request is decoded. The logits go through temperature, then top-k, then top-p, in that order.

    Raises:
        UserError: when a value is out of its range, naming the field, the value and the limit.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0 is greedy, and the fields below up to the seed have no effect
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    seed: int | None = None  # None: the engine draws one and reports it
    stop: tuple[str, ...] = ()  # a stop string stays in the text
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, int, lambda v: v >= 1, "a whole number of at least 1")
        _check("temperature", self.temperature, float, lambda v: v >= 0, "a finite number of at least 0")
        _check("top_p", self.top_p, float, lambda v: 0 < v <= 1, "a number above 0 and at most 1")
        _check("top_k", self.top_k, int, lambda v: v >= 0, "a whole number of at least 0 (0 is off)")
        if self.seed is not None:
            _check("seed", self.seed, int, lambda v: 0 <= v < SEED_LIMIT, "a whole number from 0 to 2**63 - 1")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop = {self.stop!r}: it must be a list of non-empty strings.")
        object.__setattr__(self, "stop", tuple(self.stop))


def _check(name: str, value: Any, kind: type, holds: Any, limit: str) -> None:
    numbers = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, numbers) or not math.isfinite(value) or not holds(value):
        raise UserError(f"{name} = {value!r}: it must be {limit}.")


@dataclass
class SpeculationStats:
    """What speculation did for one request. Only tokens that are in the answer count as emitted or accepted.

    A verification is one pass of the target after the prefill; without speculation it has no drafted tokens and
    emits one token.
    """

    verifications: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0  # by verifications: the bonus token included, the one that the prefill gave excluded
    drafted_per_position: list[int] = field(default_factory=list)  # index: draft position
    accepted_per_position: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0  # the prompt through the target and the head, up to the first token
    decode_seconds: float = 0.0  # all that follows

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted / verifications; nan when there was no verification."""
        return acceptance_length(self.emitted, self.verifications)

    def count(self, drafted: int, tokens: list[Token]) -> None:
        """Add one verification: how many tokens were drafted, and those that it emitted."""
        accepted = sum(token.accepted_position is not None for token in tokens)
        self.verifications += 1
        self.drafted += drafted
        self.accepted += accepted
        self.emitted += len(tokens)
        for counts, until in ((self.drafted_per_position, drafted), (self.accepted_per_position, accepted)):
            counts.extend([0] * (drafted - len(counts)))
            for position in range(until):
                counts[position] += 1


@dataclass
class Token:
    """One token of an answer."""

    id: int
    text: str  # what it adds to the text ("" while a character is incomplete); a special token's name
    logprob: float  # natural log of the target's own probability: before temperature and truncation
    special: bool  # special tokens are not in the answer's text
    accepted_position: int | None  # 0-based draft position, or None: supplied by the target itself


@dataclass
class Completion:
    """The answer to one request."""

    prompt_ids: list[int]
    token_ids: list[int]  # an EOS token included
    tokens: list[Token]
    text: str  # special tokens left out
    finish_reason: str  # "length", "eos_token", "stop_sequence", or "cancelled"
    seed: int | None  # None for a greedy request without one: nothing was random
    stats: SpeculationStats


def special_ids(tokenizer: Any, eos_ids: frozenset[int]) -> frozenset[int]:
    """Ids that never appear in a text: the tokenizer's special tokens, named or only added, and the target's EOS."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return eos_ids.union(tokenizer.all_special_ids, added)


class Sequence:
    """The state of a request between steps: its tokens, its text, and whether it has ended."""

    def __init__(
        self,
        prompt_ids: Ids[int],
        params: SamplingParams,
        tokenizer: Any,
        eos_ids: frozenset[int],
        special: frozenset[int],
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.tokens: list[Token] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._tokenizer = tokenizer
        self._eos_ids = frozenset() if params.ignore_eos else eos_ids
        self._special = special
        # tokens that show in the text, after the end of the prompt as context; shown[prefix:read] have given theirs
        self._shown = [token_id for token_id in self.prompt_ids[-_CONTEXT:] if token_id not in special]
        self._prefix, self._read = 0, len(self._shown)

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer."""
        return len(self.prompt_ids) + len(self.tokens)

    @property
    def last_id(self) -> int:
        return self.tokens[-1].id

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self.params.max_new_tokens - len(self.tokens)

    def append(self, token_id: int, logprob: float, accepted_position: int | None) -> Token:
        """Add one token and decide whether the sequence ends with it: EOS first, then stop strings, then length."""
        special = token_id in self._special
        if not special:
            self._shown.append(token_id)
        added = self._new_text(flush=token_id in self._eos_ids or self.remaining == 1)
        start = len(self.text)
        self.text += added
        name = (self._tokenizer.convert_ids_to_tokens(token_id) or "") if special else added
        token = Token(token_id, name, logprob, special, accepted_position)
        self.tokens.append(token)
        if token_id in self._eos_ids:
            self.finish_reason = "eos_token"
        elif any(self.text.find(stop, max(0, start - len(stop) + 1)) >= 0 for stop in self.params.stop):
            self.finish_reason = "stop_sequence"
        elif self.remaining == 0:
            self.finish_reason = "length"
        return token

    def _new_text(self, *, flush: bool) -> str:
        """The text that has become certain; a character whose bytes are not all there waits, unless `flush`."""
        before = self._decode(self._shown[self._prefix : self._read])
        text = self._decode(self._shown[self._prefix :])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not flush:
            return ""
        self._prefix, self._read = max(self._prefix, self._read - _CONTEXT), len(self._shown)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
