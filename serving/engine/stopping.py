"""Stop strings in a text that grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Match(NamedTuple):
    """A stop string and where it is in the text, in characters."""

    start: int
    end: int
    stop: str


class StopStrings:
    """Finds the stop string that is complete first, whatever pieces the text comes in; of two, the longer one.

    Each string is followed by Knuth, Morris and Pratt's automaton (SIAM J. Comput. 6, 1977), whose state is the number
    of the string's characters that the text ends with. The work is proportional to the characters that come in.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        # longest first, so that it is found before one that ends at the same place
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._read = 0  # characters

    @property
    def held(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        return max(self._states, default=0)

    def skip(self, text: str) -> None:
        """Pass over text in which no stop string counts, not even its beginning."""
        self._read += len(text)
        self._states = [0] * len(self._stops)

    def feed(self, text: str) -> Match | None:
        """Read more text up to the first stop string that it completes."""
        if not self._stops:
            return None
        for character in text:
            self._read += 1
            for index, stop in enumerate(self._stops):
                state, borders = self._states[index], self._borders[index]
                while state and stop[state] != character:
                    state = borders[state - 1]
                self._states[index] = state = state + (stop[state] == character)
                if state == len(stop):
                    return Match(self._read - len(stop), self._read, stop)
        return None


def _borders(pattern: str) -> list[int]:
    """For each prefix of the pattern, the length of the longest shorter prefix that it ends with."""
    borders = [0] * len(pattern)
    for index in range(1, len(pattern)):
        length = borders[index - 1]
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        borders[index] = length + (pattern[index] == pattern[length])
    return borders
