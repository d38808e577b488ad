"""Drafts that are copied from the sequence itself: what followed the longest suffix that has occurred before.

One suffix automaton a sequence, over its prompt and answer, tells that suffix after every token (Blumer et al.,
Theoretical Computer Science 40, 1985; for drafts: SAM decoding, arXiv 2411.10666). A token costs amortised constant
time, some microseconds, and at most two states.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence, Set
from itertools import takewhile
from typing import NamedTuple

from serving.engine.verification import DraftTree

LOOKUP_LENGTH = 31  # the most tokens copied at a time: a pass of 32
_REFRESHED = 16  # suffixes, from the longest on, whose latest occurrence is brought up to date with each token
_TRIED = 64  # suffixes, from the longest on, that are tried for a match behind tokens which are not in the list yet
_NO_EDGES: dict[int, int] = {}


class Match(NamedTuple):
    """A suffix of a sequence that has occurred before."""

    length: int  # tokens; 0: even the last one is new
    end: int  # index of the token that followed its latest occurrence before (a recent one, in runs of few tokens)


NO_MATCH = Match(0, 0)


class SuffixAutomaton:
    """All substrings of a growing list of tokens; a state is a set of them that end at the same places.

    Most states have one edge, which is kept in flat arrays; a dictionary has the others of those that branch.
    """

    def __init__(self) -> None:
        self.tokens = array("i")
        self.match = NO_MATCH  # of the longest suffix
        self._last = 0  # the state of the whole list; 0 is the empty string
        self._length = array("i", [0])  # of each state's longest string
        self._link = array("i", [-1])  # the state of its longest suffix that ends at other places, too
        self._end = array("i", [0])  # the latest place where it ends, in tokens before it
        self._token = array("i", [-1])  # of its first edge; -1: it has none
        self._target = array("i", [0])
        self._branches: dict[int, dict[int, int]] = {}  # its other edges

    def append(self, token: int) -> None:
        """Add one token."""
        self.tokens.append(token)
        count = len(self.tokens)
        state, new = self._last, self._add_state(count, count)
        while state >= 0 and (after := self._follow(state, token)) < 0:
            self._add_edge(state, token, new)
            state = self._link[state]
        if state < 0:
            self._link[new] = 0
        elif self._length[after] == self._length[state] + 1:
            self._link[new] = after
        else:
            self._link[new] = self._split(state, token, after)
        self._last = new
        suffix = self._link[new]
        self.match = Match(self._length[suffix], self._end[suffix])
        for _ in range(_REFRESHED):  # a list of equal tokens has as many suffixes as tokens
            if suffix <= 0:
                break
            self._end[suffix] = count
            suffix = self._link[suffix]

    def match_after(self, following: Sequence[int]) -> Match:
        """Return the match of the list with these tokens behind it, which it does not get."""
        if not following:
            return self.match  # whose end is that of an earlier place
        state, length = max(0, self._link[self._last]), self.match.length
        for token in following:
            links = 0  # a list of equal tokens has as many suffixes as tokens
            while state and self._follow(state, token) < 0:
                links += 1
                state = self._link[state] if links < _TRIED else 0
                length = self._length[state]
            after = self._follow(state, token)
            if after >= 0:
                state, length = after, length + 1
        return Match(length, self._end[state]) if length else NO_MATCH

    def copy(self, match: Match, count: int, following: Sequence[int] = ()) -> list[int]:
        """Return the `count` tokens after a match; where they reach the end of the list, they go on as it repeats.

        following: tokens behind the list, as in `match_after`.
        """
        copied = [*self.tokens[match.end : match.end + count], *following][:count]
        period = len(copied)
        while len(copied) < count:
            copied.append(copied[-period])
        return copied

    def _follow(self, state: int, token: int) -> int:
        """Return the state after an edge; -1: there is none."""
        if self._token[state] == token:
            return self._target[state]
        return self._branches.get(state, _NO_EDGES).get(token, -1)

    def _add_state(self, length: int, end: int) -> int:
        self._length.append(length)
        self._link.append(-1)
        self._end.append(end)
        self._token.append(-1)
        self._target.append(0)
        return len(self._length) - 1

    def _add_edge(self, state: int, token: int, target: int) -> None:
        if self._token[state] < 0:
            self._token[state], self._target[state] = token, target
        else:
            self._branches.setdefault(state, {})[token] = target

    def _split(self, state: int, token: int, whole: int) -> int:
        """Give those strings of a state that now end at one more place a state of their own, and return it."""
        part = self._add_state(self._length[state] + 1, self._end[whole])
        self._link[part] = self._link[whole]
        self._token[part], self._target[part] = self._token[whole], self._target[whole]
        if whole in self._branches:
            self._branches[part] = dict(self._branches[whole])
        self._link[whole] = part
        while state >= 0 and self._follow(state, token) == whole:
            if self._token[state] == token:
                self._target[state] = part
            else:
                self._branches[state][token] = part
            state = self._link[state]
        return part


class LookupProposer:
    """The drafts of one sequence. They cost no pass of any model."""

    def __init__(self, ends: Set[int] = frozenset()) -> None:
        """ends: tokens that end the answer, behind which nothing is copied."""
        self._seen = SuffixAutomaton()
        self._ends = ends

    def observe(self, tokens: Sequence[int]) -> None:
        """Add tokens of the prompt, as they are read, or of the answer, so that neither takes long at a time."""
        for token in tokens:
            self._seen.append(token)

    @property
    def match(self) -> Match:
        """The longest suffix of all that was observed which had occurred before."""
        return self._seen.match

    def match_after(self, tree: DraftTree) -> Match:
        """Return the match that there will be once a chain has been accepted."""
        return self._seen.match_after(tree.tokens)

    def propose(self, count: int) -> DraftTree:
        """Copy `count` tokens after the match, which there must be, or up to one that ends the answer."""
        copied = self._up_to_end(self._seen.copy(self.match, count))
        return DraftTree.chain(copied, copied=len(copied))

    def extend(self, tree: DraftTree, match: Match, count: int) -> DraftTree:
        """Copy `count` tokens, or up to one that ends the answer, behind a chain, after its `match_after`."""
        if not self._ends.isdisjoint(tree.tokens):
            return tree
        return tree.extended(self._up_to_end(self._seen.copy(match, count, tree.tokens)))

    def _up_to_end(self, tokens: list[int]) -> list[int]:
        last = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
        return tokens[: last + 1]

    def continues(self, tokens: Sequence[int]) -> int:
        """Return how many of these tokens, the next ones, are what would have been copied."""
        copied = self._seen.copy(self.match, len(tokens)) if self.match.length else []
        same = takewhile(lambda pair: pair[0] == pair[1], zip(copied, tokens, strict=False))
        return sum(1 for _ in same)
