"""The answer of a request while it grows: tokens, the text that they add, and the stop strings in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from serving.engine.request import Token
from serving.engine.sampling import SamplingParams

# tokens before the one to be decoded that may change its text: tokenizers with a word-start marker need one
_CONTEXT = 6
_UNFINISHED = 3  # the most tokens that wait for a character's last byte, since it has up to 4
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def special_ids(tokenizer: Any, eos_ids: frozenset[int]) -> frozenset[int]:
    """Return the ids that are never in a text: the target's EOS, and the tokenizer's special tokens, named or added."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return eos_ids.union(tokenizer.all_special_ids, added)


class GrowingAnswer:
    """The answer of a request while it grows: its tokens, its text, and the reason for its end.

    Each token may end it, for the first of these reasons: it is an EOS id; it is a stop id; the text now has a stop
    string (of several the one that is complete first), or the token is a special one that is named as one; the answer
    has max_new_tokens.

    With keep_stop the text ends with the stop string, and a token that brought more keeps the part before; a stop id
    stays with what it adds. Without, the text ends before the stop string, tokens that begin there or later are
    dropped with their logprobs, the one before keeps the text that is left of it; a stop id is dropped. Text of the
    prompt and of the first min_new_tokens tokens is no part of any stop string.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
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
        context = self.prompt_ids[-_CONTEXT - _UNFINISHED :]
        self._detokenizer = _Detokenizer(tokenizer, [token_id for token_id in context if token_id not in special])
        self._stop_strings = StopStrings(params.stop)
        # special tokens are in no text, so that those which are stop strings are told by their ids
        ids = [(tokenizer.convert_tokens_to_ids(stop), stop) for stop in params.stop]
        self._stop_tokens = {
            token_id: stop
            for token_id, stop in ids
            if token_id in special and tokenizer.convert_ids_to_tokens(token_id) == stop
        }
        self._starts: list[int] = []  # of each token's text, in characters of the answer
        self._released = 0  # tokens
        self._last_shown = 0  # index of the last token that is not special

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end the answer."""
        return self._eos_ids.union(self.params.stop_ids)

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
        copied: bool = False,
    ) -> None:
        """Add one token and decide whether the sequence ends with it; arguments as in `Token`."""
        is_eos, is_stop = token_id in self._eos_ids, token_id in self.params.stop_ids
        if len(self.tokens) >= self.params.min_new_tokens:
            is_stop = is_stop or token_id in self._stop_tokens
        special, dropped = token_id in self._special, is_stop and not is_eos and not self.params.keep_stop
        hidden = special or dropped
        ends = is_eos or is_stop or self.remaining == 1
        added = self._detokenizer.add([] if hidden else [token_id], flush=ends)
        if hidden and added:  # the beginning of a character that will not be completed
            self.tokens[self._last_shown].text += added
        if not dropped:
            self._starts.append(len(self.text))
            name = (self._tokenizer.convert_ids_to_tokens(token_id) or "") if special else added
            self.tokens.append(
                Token(token_id, name, logprob, special, accepted_position, top, rejected, drafted, copied)
            )
        if not hidden:
            self._last_shown = len(self.tokens) - 1
        self.text += added
        if is_eos:
            self.finish_reason = "eos_token"
        elif is_stop:
            named = token_id not in self.params.stop_ids
            self.finish_reason = "stop_sequence"
            self.stop_reason = self._stop_tokens[token_id] if named else token_id
        elif (hidden or not self._find_stop_string(added)) and self.remaining == 0:
            self.finish_reason = "length"

    def cancel(self) -> None:
        """End the request with what it has."""
        self.finish_reason = self.finish_reason or "cancelled"

    def release(self) -> list[Token]:
        """Return the tokens that no stop string can take back any more, each once and in order; all after the end."""
        first, end = self._released, len(self.tokens)
        if self.finish_reason is None and self._detokenizer.pending:
            end = self._last_shown  # may be given what is left of a character
        if self.finish_reason is None and self.params.stop and not self.params.keep_stop:
            certain = len(self.text) - self._stop_strings.held
            ends = [*self._starts[1:], len(self.text)]  # of each token's text
            while end > first and (ends[end - 1] > certain or self._starts[end - 1] >= certain):
                end -= 1
        self._released = end
        return self.tokens[first:end]

    def _find_stop_string(self, added: str) -> bool:
        """Look for a stop string in the text that was added, and end the answer there."""
        if len(self.tokens) <= self.params.min_new_tokens:
            self._stop_strings.skip(added)
            return False
        match = self._stop_strings.feed(added)
        if match is None:
            return False
        start, end, stop = match
        self.finish_reason, self.stop_reason = "stop_sequence", stop
        end = end if self.params.keep_stop else start
        self.text = self.text[:end]
        while self._starts and self._starts[-1] >= end and len(self.tokens) > self.params.min_new_tokens:
            self._starts.pop()
            self.tokens.pop()
        if self.tokens and not self.tokens[-1].special:
            self.tokens[-1].text = self.text[self._starts[-1] :]
        return True


class _Detokenizer:
    """Text of a growing list of tokens, at a cost that does not grow: only the last few are decoded again.

    tokenizers' DecodeStream does not serve here: it waits for ever for the end of a character that never comes, at a
    growing cost, holds back a U+FFFD that the text really has, and cannot be made to give what it holds at the end.
    """

    def __init__(self, tokenizer: Any, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = context  # ids that may still matter to what follows
        self._read, self._before = 0, ""  # ids[:read] have given their text, `before`
        self._forget(len(context))

    @property
    def pending(self) -> bool:
        """True while the last ids are the beginning of a character."""
        return self._read < len(self._ids)

    def add(self, ids: list[int], *, flush: bool) -> str:
        """Return the text that has become certain; a character whose bytes are not all there waits, unless `flush`."""
        self._ids += ids
        if self._read == len(self._ids):
            return ""
        text, end = self._decode(self._ids), len(self._ids)
        if not flush and text.endswith(_REPLACEMENT):
            if end - self._read <= _UNFINISHED:
                return ""
            end -= _UNFINISHED  # what came before can't be completed any more
            text = self._decode(self._ids[:end])
        added = text[len(self._before) :]
        self._before, self._read = text, end
        if end > 4 * _CONTEXT:
            self._forget(end)
        return added

    def _forget(self, end: int) -> None:
        """Keep of ids[:end], which have given their text, the last few.

        They do not begin within a character: where a run of byte tokens has a byte too many, byte fallback (Llama 2,
        Mistral, Gemma) spoils all characters of the run.
        """
        start = max(0, end - _CONTEXT)
        for earlier in range(start, max(0, start - _UNFINISHED) - 1, -1):
            if not self._decode(self._ids[earlier:end]).startswith(_REPLACEMENT):
                start = earlier
                break
        del self._ids[:start]
        self._read = end - start
        self._before = self._decode(self._ids[: self._read])

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Finds the stop string that is complete first, whatever pieces the text comes in; of two, the longer one.

    Only the end of the text is kept and searched, in which a stop string may have begun.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = list(dict.fromkeys(stops))
        self._longest = max(map(len, self._stops), default=0)
        self._start, self._end = 0, ""  # of the text; where it begins, in characters

    @property
    def held(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        ends = (self._end[place:] for place in range(len(self._end)))
        longer = ((end, stop) for end in ends for stop in self._stops if len(end) < len(stop))
        return next((len(end) for end, stop in longer if stop.startswith(end)), 0)

    def skip(self, text: str) -> None:
        """Pass over text in which no stop string counts, not even its beginning."""
        self._start, self._end = self._start + len(self._end) + len(text), ""

    def feed(self, text: str) -> tuple[int, int, str] | None:
        """Read more text up to the first stop string that it completes: its start and end in the text, and itself."""
        text = self._end + text
        places = ((text.find(stop), stop) for stop in self._stops)
        found = [(place + len(stop), -len(stop), stop) for place, stop in places if place >= 0]
        if found:
            end, _, stop = min(found)
            return self._start + end - len(stop), self._start + end, stop
        passed = max(0, len(text) - self._longest + 1)
        self._start, self._end = self._start + passed, text[passed:]
        return None
