"""The draft heads of an engine, which come and go while it runs: the default, its trial, and what became of them.

All heads draft for one target. They change between two steps only; a request keeps its head to its end, or until that
head is removed, after which nothing but copies is drafted for it. Its text is the same in each case.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from draft.errors import UserError
from draft.evaluation.tau import acceptance_length
from draft.heads import DraftHead
from serving.engine.drafting import Proposer
from serving.engine.estimates import HeadEstimate
from serving.engine.request import Request
from serving.engine.routing import Router
from serving.engine.self_check import AcceptanceWatch
from serving.engine.trial import Survival, Trial
from serving.names import MAX_HEAD_NAME, check_head_name

log = logging.getLogger(__name__)

ROUTES = ("default", "auto")
_EVENTS = 50  # the latest ones are kept


class UnknownHead(UserError):
    """No head of that name is loaded."""


class HeadConflict(UserError):
    """The name is taken, or the head cannot be removed."""


@dataclass(eq=False)
class LoadedHead:
    """A head in the engine, what proposes with it, and what is known of its acceptance."""

    name: str
    head: DraftHead
    proposer: Proposer | None  # None: the engine never drafts
    length: int  # the most tokens that it drafts in a row
    watch: AcceptanceWatch = field(default_factory=AcceptanceWatch)
    estimate: HeadEstimate = field(default_factory=HeadEstimate)
    # on live traffic: of greedy requests, and of those that sample
    survival: tuple[Survival, Survival] = field(default_factory=lambda: (Survival(), Survival()))
    requests: int = 0  # that it drafted for
    verifications: int = 0  # of its drafts; the tokens that lookup copied are no part of these figures
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0

    def count(self, drafted: int, accepted: int, emitted: int) -> None:
        """Count one verification of its drafts."""
        self.verifications += 1
        self.drafted += drafted
        self.accepted += accepted
        self.emitted += emitted

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted / verifications of its drafts; NaN without any."""
        return acceptance_length(self.emitted, self.verifications)


class Heads:
    """The heads by name. The engine's thread changes them between steps; any thread may look."""

    def __init__(self, route: str = "default") -> None:
        """route: `default` gives requests that name no head the default one; `auto` the best for their kind."""
        self.router = Router() if route == "auto" else None
        self.route = route
        self.default: LoadedHead | None = None
        self.trial: Trial | None = None  # of the default
        self.events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self.swaps = self.rollbacks = 0
        self._heads: dict[str, LoadedHead] = {}
        self.checked: LoadedHead | None = None  # loaded, and not known to requests before it has checked itself

    def __len__(self) -> int:
        return len(self._heads)

    def __iter__(self) -> Iterator[LoadedHead]:
        return iter(list(self._heads.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._heads

    def __getitem__(self, name: str) -> LoadedHead:
        """Return a head. Raises UnknownHead, naming those that are loaded."""
        head = self._heads.get(name)
        if head is None:
            known = ", ".join(self._heads) or "none"
            raise UnknownHead(f"no head {name[:MAX_HEAD_NAME]!r} is loaded; the loaded ones: {known[:300]}.")
        return head

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose auxiliary hidden states any of them reads."""
        every = [*self, *([self.checked] if self.checked else [])]
        return tuple(sorted({layer for head in every if head.proposer is not None for layer in head.proposer.layers}))

    @property
    def default_name(self) -> str | None:
        return self.default.name if self.default is not None else None

    @property
    def explorations(self) -> int:
        """Requests that got another head than the best known for their kind."""
        return self.router.explored if self.router is not None else 0

    def choose(self, name: str | None, prompt_ids: Sequence[int]) -> LoadedHead | None:
        """Return the head for a request that may name one; None: there is none."""
        if name is not None and name in self:  # it may have been removed while the request waited
            return self[name]
        if self.router is not None and len(self) > 1:
            return self.router.choose(prompt_ids, list(self))
        return self.default

    # between steps

    def check_name(self, name: str) -> None:
        """Raise HeadConflict where a name is taken, UserError where it is none."""
        check_head_name(name)
        if name in self:
            raise HeadConflict(f"a head {name!r} is loaded already; remove it, or choose another name.")

    def add(self, head: LoadedHead) -> None:
        """Let requests choose a head; the first one is the default."""
        self.check_name(head.name)
        self.checked = None
        self._heads[head.name] = head
        self.note("loaded", head)
        if self.default is None:
            self.default = head

    def make_default(self, name: str) -> str:
        """Give new requests this head by default, on trial beside the one before it; returns that one's name.

        A head that has not proven itself yet is none to come back to: then it is the one before it.
        """
        head, previous = self[name], self.default
        assert previous is not None
        if head is previous:
            return name
        proven = self.trial.previous if self.trial is not None else previous
        self.trial = Trial(proven) if proven is not head else None
        self.default = head
        self.swaps += 1
        self.note("default", head)
        log.info("draft head %r is the default now, after %r", name, previous.name)
        return previous.name

    def remove(self, name: str) -> LoadedHead:
        """Take a head out. Raises HeadConflict where it is the default: nothing could take its place."""
        head = self[name]
        if head is self.default:
            raise HeadConflict(f"head {name!r} is the default; make another one the default first.")
        del self._heads[name]
        if self.trial is not None and self.trial.previous is head:
            self.trial = None  # there is nothing to come back to
        if self.router is not None:
            self.router.forget(name)
        self.note("unloaded", head)
        return head

    def note(self, kind: str, head: LoadedHead, **more: str) -> None:
        self.events.append({"time": round(time.time(), 3), "kind": kind, "head": head.name, **more})

    # while it runs

    def judge(
        self, head: LoadedHead, request: Request, planned: int, drafted: int, accepted: int, *, samples: bool
    ) -> None:
        """Judge a head by one verification of a request: it drafted `drafted` of the `planned` tokens, of which
        `accepted` were accepted.

        Requests that name their head say nothing about the traffic.
        """
        head.watch.observe(drafted, accepted, samples=samples)
        if request.speculation.head is not None:
            return
        head.survival[samples].observe(planned, accepted)
        if self.router is not None:
            self.router.observe(request.prompt_ids, head, planned, accepted)
        trial = self.trial
        if trial is None or head is not self.default:
            return
        reason = trial.observe(request.number, planned, accepted, samples=samples)
        if reason is not None:
            self._roll_back(head, trial.previous, reason)
        elif trial.over:
            self.trial = None
            log.info("draft head %r has proven itself beside %r", head.name, trial.previous.name)

    def _roll_back(self, head: LoadedHead, previous: LoadedHead, reason: str) -> None:
        self.default, self.trial = previous, None
        self.rollbacks += 1
        self.note("rolled back", head, reason=reason)
        log.warning("draft head %r is rolled back to %r: %s", head.name, previous.name, reason)
