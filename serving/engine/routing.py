"""Choice of the head for each request by measured acceptance: a small bandit for each kind of request.

A kind is the beginning of the prompt, where templates and system prompts are. Of each kind the acceptance of every head
is estimated, drawn towards its acceptance in all requests, and that towards its self-check, so that a kind that is new
gets the head that is best on the whole.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serving.engine.self_check import LEAST
from serving.engine.trial import Survival

if TYPE_CHECKING:
    from serving.engine.heads import LoadedHead

PREFIX = 32  # tokens of a prompt that make its kind
KINDS = 256  # the most that are known at a time; the one that was not used for longest is forgotten
EXPLORATION = 0.05  # of the requests, at most, get a head that is not the best as far as is known: one in 20
STRENGTH = 20  # verifications that a prior is worth

Kind = tuple[int, ...]


class Router:
    """Chooses heads. One thread calls its methods; any may read the counts."""

    def __init__(self) -> None:
        self.routed = self.explored = 0  # requests
        self._credit = 1.0  # explorations that are due; what is not used does not add up
        self._kinds: OrderedDict[Kind, dict[str, Survival]] = OrderedDict()  # -> by the head's name
        self._overall: dict[str, Survival] = {}

    def choose(self, prompt_ids: Sequence[int], heads: Sequence[LoadedHead]) -> LoadedHead:
        """Return the head for a request.

        Now and then, as often as EXPLORATION allows, it is the one that its kind has tried least.
        """
        known = self._of(self.kind(prompt_ids))
        best = max(heads, key=lambda head: self._accepted(head, known))
        least = min(heads, key=lambda head: known[head.name].planned[0] if head.name in known else 0.0)
        self.routed += 1
        self._credit += EXPLORATION
        if least is best or self._credit < 1:
            return best
        self.explored, self._credit = self.explored + 1, 0.0
        return least

    def observe(self, prompt_ids: Sequence[int], head: LoadedHead, planned: int, accepted: int) -> None:
        """Count one verification of a request that was routed, of which `accepted` of `planned` tokens were."""
        for known in (self._of(self.kind(prompt_ids)), self._overall):
            known.setdefault(head.name, Survival()).observe(planned, accepted)

    def forget(self, name: str) -> None:
        """Forget a head: another one may come under its name."""
        for known in (*self._kinds.values(), self._overall):
            known.pop(name, None)

    @staticmethod
    def kind(prompt_ids: Sequence[int]) -> Kind:
        return tuple(prompt_ids[:PREFIX])

    def _of(self, kind: Kind) -> dict[str, Survival]:
        known = self._kinds.setdefault(kind, {})
        self._kinds.move_to_end(kind)
        if len(self._kinds) > KINDS:
            self._kinds.popitem(last=False)
        return known

    def _accepted(self, head: LoadedHead, known: dict[str, Survival]) -> float:
        """Estimate the tokens accepted of a head's longest chain in a request of a kind."""
        check = head.watch.check.acceptance_per_position if head.watch.check is not None else []
        total = 0.0
        for position in range(head.length):
            rate = check[position] if position < len(check) else LEAST ** (position + 1)
            for survival in (self._overall.get(head.name), known.get(head.name)):
                if survival is not None:
                    planned = survival.planned[position]
                    rate = (survival.accepted[position] + STRENGTH * rate) / (planned + STRENGTH)
            total += rate
        return total
