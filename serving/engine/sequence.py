"""One request: how far it has come, when it ends, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Any

from draft.tau import acceptance_length
from serving.engine.params import SEED_LIMIT, SamplingParams
from serving.engine.stopping import StopStrings

__all__ = ["SEED_LIMIT", "Completion", "SamplingParams", "Sequence", "SpeculationStats", "Token", "special_ids"]

# tokens before the one to be decoded that may change its text: tokenizers with a word-start marker need one
_CONTEXT = 6
_UNFINISHED = 3  # the most tokens that wait for a character's last byte, since it has up to 4


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
    steps: list[tuple[int, int]] = field(default_factory=list)  # of each verification: drafted in a row, accepted
    prefill_seconds: float = 0.0  # the prompt through the target, up to the first token
    decode_seconds: float = 0.0  # the steps that follow; the head reads the prompt in the first of them that drafts

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted / verifications; nan when there was no verification."""
        return acceptance_length(self.emitted, self.verifications)

    def count(self, depth: int, drafted: int, accepted: int, emitted: int) -> None:
        """Add one verification: of `drafted` tokens, up to `depth` in a row, with what stood and was emitted."""
        self.verifications += 1
        self.steps.append((depth, accepted))
        self.drafted += drafted
        self.accepted += accepted
        self.emitted += emitted
        for counts, until in ((self.drafted_per_position, depth), (self.accepted_per_position, accepted)):
            counts.extend([0] * (depth - len(counts)))
            for position in range(until):
                counts[position] += 1

    def settle(self, tokens: list[Token]) -> None:
        """Count again what is in the answer, `tokens`, after a stop string took back some of what had been emitted."""
        verified = tokens[1:]  # the first is the prefill's
        positions = [token.accepted_position for token in verified if token.accepted_position is not None]
        self.emitted, self.accepted = len(verified), len(positions)
        self.accepted_per_position = [positions.count(p) for p in range(len(self.drafted_per_position))]
        left = len(verified)
        for index, (depth, accepted) in enumerate(self.steps):
            self.steps[index] = (depth, min(accepted, left))
            left = max(0, left - accepted - 1)


@dataclass
class Token:
    """One token of an answer."""

    id: int
    text: str  # what it adds to the text ("" while a character is incomplete); a special token's name
    logprob: float | None  # natural log of the target's own probability: before penalties, temperature and truncation
    special: bool  # special tokens are not in the answer's text
    accepted_position: int | None  # 0-based draft position, or None: supplied by the target itself
    top: list[tuple[int, float]] | None = None  # the most probable ids and their logprobs, falling
    rejected: int | None = None  # what the head had drafted here, the first of several, where the target said otherwise
    drafted: int = 0  # tokens in a row that had been drafted for the verification which decided this one


@dataclass
class Completion:
    """The answer to one request."""

    prompt_ids: list[int]
    token_ids: list[int]  # an EOS token included, and a stop id where the request keeps it
    tokens: list[Token]
    text: str  # special tokens left out
    finish_reason: str  # "length", "eos_token", "stop_sequence", or "cancelled"
    seed: int | None  # None for a greedy request without one: nothing was random
    stats: SpeculationStats
    stop_reason: str | int | None = None  # the stop string, or the stop id, that ended it


def special_ids(tokenizer: Any, eos_ids: frozenset[int]) -> frozenset[int]:
    """Ids that never appear in a text: the tokenizer's special tokens, named or only added, and the target's EOS."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return eos_ids.union(tokenizer.all_special_ids, added)


class Sequence:
    """The state of a request between steps: its tokens, its text, and whether it has ended.

    Each token may end it, for the first of these reasons: it is an EOS id; it is a stop id; the text now has a stop
    string (of several the one that is complete first); the answer has max_new_tokens.

    With keep_stop the text ends with the stop string, and a token that brought more keeps the part before; a stop id
    stays with what it adds. Without, the text ends before the stop string, tokens that begin there or later are
    dropped with their logprobs, the one before keeps the text that is left of it; a stop id is dropped. Text of the
    prompt and of the first min_new_tokens tokens is no part of any stop string.
    """

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
        self.finish_reason: str | None = None  # "eos_token", "stop_sequence", "length" or "cancelled"
        self.stop_reason: str | int | None = None  # the string or the id, for "stop_sequence"
        self._eos_ids = frozenset() if params.ignore_eos else eos_ids
        self._special = special
        self._tokenizer = tokenizer
        self._detokenizer = _Detokenizer(tokenizer, [i for i in self.prompt_ids[-_CONTEXT:] if i not in special])
        self._stop_strings = StopStrings(params.stop)
        self._starts: list[int] = []  # of each token's text, in characters of the answer
        self._released = 0  # tokens
        self._last_shown = 0  # index of the last token that is not special

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

    def append(
        self,
        token_id: int,
        logprob: float | None = None,
        top: list[tuple[int, float]] | None = None,
        accepted_position: int | None = None,
        rejected: int | None = None,
        drafted: int = 0,
    ) -> None:
        """Add one token and decide whether the sequence ends with it; arguments as in `Token`."""
        is_eos, is_stop = token_id in self._eos_ids, token_id in self.params.stop_ids
        special, dropped = token_id in self._special, is_stop and not is_eos and not self.params.keep_stop
        hidden = special or dropped
        ends = is_eos or is_stop or self.remaining == 1
        added = self._detokenizer.add([] if hidden else [token_id], flush=ends)
        if hidden and added:  # the beginning of a character that will not be completed
            self.tokens[self._last_shown].text += added
        if not dropped:
            self._starts.append(len(self.text))
            name = (self._tokenizer.convert_ids_to_tokens(token_id) or "") if special else added
            self.tokens.append(Token(token_id, name, logprob, special, accepted_position, top, rejected, drafted))
        if not hidden:
            self._last_shown = len(self.tokens) - 1
        self.text += added
        if is_eos:
            self.finish_reason = "eos_token"
        elif is_stop:
            self.finish_reason, self.stop_reason = "stop_sequence", token_id
        elif (hidden or not self._find_stop_string(added)) and self.remaining == 0:
            self.finish_reason = "length"

    def cancel(self) -> None:
        """End the request with what it has."""
        self.finish_reason = self.finish_reason or "cancelled"

    def release(self) -> list[Token]:
        """Tokens that no stop string can take back any more, each once and in order; all of them after the end."""
        first, end = self._released, len(self.tokens)
        if self.finish_reason is None and self._detokenizer.pending:
            end = self._last_shown  # may be given what is left of a character
        if self.finish_reason is None and self.params.stop and not self.params.keep_stop:
            certain = len(self.text) - self._stop_strings.held
            while end > first and (self._end(end - 1) > certain or self._starts[end - 1] >= certain):
                end -= 1
        self._released = end
        return self.tokens[first:end]

    def _end(self, index: int) -> int:
        """Where the text of a token ends."""
        return self._starts[index + 1] if index + 1 < len(self._starts) else len(self.text)

    def _find_stop_string(self, added: str) -> bool:
        if len(self.tokens) <= self.params.min_new_tokens:
            self._stop_strings.skip(added)
            return False
        match = self._stop_strings.feed(added)
        if match is None:
            return False
        self.finish_reason, self.stop_reason = "stop_sequence", match.stop
        self._trim(match.end if self.params.keep_stop else match.start)
        return True

    def _trim(self, end: int) -> None:
        """Let the answer's text end at `end`."""
        self.text = self.text[:end]
        while self._starts and self._starts[-1] >= end and len(self.tokens) > self.params.min_new_tokens:
            self._starts.pop()
            self.tokens.pop()
        if self.tokens and not self.tokens[-1].special:
            self.tokens[-1].text = self.text[self._starts[-1] :]


class _Detokenizer:
    """Text of a growing list of tokens, at a cost that does not grow: only the last few are decoded again."""

    def __init__(self, tokenizer: Any, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = context  # ids that may still matter to what follows
        self._read = len(context)  # ids[:read] have given their text, `before`
        self._before = self._decode(context)

    @property
    def pending(self) -> bool:
        """Whether the last ids are the beginning of a character."""
        return self._read < len(self._ids)

    def add(self, ids: list[int], *, flush: bool) -> str:
        """The text that has become certain; a character whose bytes are not all there waits, unless `flush`."""
        self._ids += ids
        if self._read == len(self._ids):
            return ""
        text, end = self._decode(self._ids), len(self._ids)
        if not flush and text.endswith("\N{REPLACEMENT CHARACTER}"):
            if end - self._read <= _UNFINISHED:
                return ""
            end -= _UNFINISHED  # what came before can't be completed any more
            text = self._decode(self._ids[:end])
        added = text[len(self._before) :]
        self._before, self._read = text, end
        if end > 4 * _CONTEXT:
            del self._ids[: end - _CONTEXT]
            self._read = _CONTEXT
            self._before = self._decode(self._ids[:_CONTEXT])
        return added

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
