"""Check of the draft head at the start, and watch over its acceptance while the engine runs.

Drafts of a head that does not fit its target are rejected, which leaves the text right: nothing but these figures
shows it. Both judge by the accepted tokens of the verifications that had drafts. A head is expected to have LEAST of
them in each, whatever else is known of it, and is broken below half of that: τ below 1.2 gains nothing, and heads with
shuffled weights, silenced inputs or states of far layers were measured at 1.00 to 1.16.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from draft.errors import UserError
from draft.target import Target
from serving.engine.request import MAX_SPECULATION_LENGTH, SpeculationStats

log = logging.getLogger(__name__)

NEW_TOKENS = 32  # of each answer
MAX_SECONDS = 10.0  # a large target on a CPU is judged by the verifications that it has made by then
LEAST = 0.4  # accepted tokens per verification
SAMPLED = 2 / 3  # of what is expected of greedy answers: of the bundled head's 0.53 are accepted at temperature 1
BROKEN, WELL = 1 / 2, 2 / 3  # of the accepted tokens that are expected
ENOUGH = 16  # verifications with drafts from which the head is judged at the start
WATCHED = 200  # verifications with drafts from which a running server is judged, and after which one weighs 1/e

_PROMPTS = (
    "What are the benefits of drinking water?",
    "Write a Python function that returns the largest number in a list.",
    "Tell me a short story about a lighthouse keeper and her dog.",
    "How does a bicycle stay upright while it moves?",
)
_CAUSES = (
    "the draft head may belong to another target or another version of it, read other auxiliary layers than it was "
    "trained on, or have a wrong vocabulary map (d2t) or norm"
)


def check_prompts(target: Target, longest: int) -> list[list[int]]:
    """Return the built-in prompts as token ids of `target`, the last `longest` of each.

    They are a user's messages where the chat template takes them, and texts to be continued otherwise.
    """
    prompts = []
    for text in _PROMPTS:
        try:
            ids = target.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True)
        except UserError as error:  # there is no template, or it refuses a user's message
            log.info("self-check: texts in the place of chat messages (%s)", error)
            ids = target.tokenizer(text).input_ids
        known = [token for token in ids if token < target.vocab_size]
        prompts.append((known or [0])[-longest:])
    return prompts


@dataclass(frozen=True)
class SelfCheck:
    """The speculation of greedy answers to the built-in prompts, in chains of the engine's speculation length."""

    stats: SpeculationStats  # of all answers together

    @classmethod
    def of(cls, answers: Sequence[SpeculationStats]) -> SelfCheck:
        """Put the figures of several answers together."""
        steps = [step for each in answers for step in each.steps]
        drafted, emitted = sum(each.drafted for each in answers), sum(each.emitted for each in answers)
        return cls(SpeculationStats(drafted, emitted, steps))

    @property
    def drafts(self) -> int:
        """Verifications that had drafted tokens."""
        return sum(step.depth > 0 for step in self.stats.steps)

    @property
    def acceptance_per_position(self) -> list[float]:
        """Accepted / drafted at each draft position."""
        pairs = zip(self.stats.accepted_per_position, self.stats.drafted_per_position, strict=True)
        return [accepted / drafted for accepted, drafted in pairs]

    @property
    def enough(self) -> bool:
        """True where there were enough verifications to judge by."""
        return self.drafts >= ENOUGH

    @property
    def failed(self) -> bool:
        """True where next to no drafted token was accepted."""
        return self.enough and self.stats.accepted < BROKEN * LEAST * self.drafts

    def expected(self, depth: int) -> float:
        """Tokens that a verification of `depth` tokens drafted in a row is expected to accept; at least LEAST."""
        return max(LEAST, sum(self.acceptance_per_position[:depth])) if self.enough else LEAST

    def figures(self) -> dict[str, Any]:
        """Return the figures of /info."""
        return {
            "tau": self.stats.acceptance_length,
            "verifications": self.stats.verifications,
            "drafted_per_position": self.stats.drafted_per_position,
            "accepted_per_position": self.stats.accepted_per_position,
            "acceptance_per_position": self.acceptance_per_position,
        }

    def report(self, head: str = "the draft head") -> None:
        """Log the result: a warning where the head seems not to fit the target."""
        shares = ", ".join(f"{each:.2f}" for each in self.acceptance_per_position)
        tau = f"τ = {self.stats.acceptance_length:.2f} in {self.stats.verifications} verifications"
        if self.failed:
            log.warning("self-check of %s: %s. Speculation is broken: %s", head, tau, self.reason)
        elif not self.enough:
            log.info("self-check of %s: %s, too few to judge it by", head, tau)
        else:
            log.info("self-check of %s: %s; accepted by draft position: %s", head, tau, shares)

    @property
    def reason(self) -> str:
        """The sentence about a head that failed."""
        return (
            f"the target accepts {self.stats.accepted} of {self.stats.drafted} drafted tokens on the built-in prompts, "
            f"so that speculation gains nothing; {_CAUSES}."
        )


class AcceptanceWatch:
    """Watch over the acceptance of a running engine: `degraded` is a sentence while speculation is broken, or None.

    Each verification with drafts is compared with those of the self-check that drafted as many tokens in a row: it is
    expected to accept the sum of their acceptance by position up to that depth (`SelfCheck.expected`), so that short
    chains count by what they could give. Accepted and expected tokens are summed, with weights that fall to 1/e within
    WATCHED verifications. From WATCHED verifications on, speculation is degraded when the accepted tokens are less than
    BROKEN of the expected ones, or none was accepted in the last WATCHED; it is well again from WELL of them on.
    Without a self-check LEAST tokens are expected. Of a tree more is accepted than of a chain, so that it is judged the
    more leniently. Of requests that sample SAMPLED of it is expected, and LEAST too: the self-check's answers are
    greedy. What lookup copied is no part of the figures, alone or behind a chain.

    The engine's thread calls `observe`; any thread may read the attributes.
    """

    def __init__(self, check: SelfCheck | None = None) -> None:
        """check: of the head at the start; a head that failed is degraded from the beginning."""
        self.check = check
        self.degraded = check.reason if check is not None and check.failed else None
        self._count = self._missed = 0  # drafted verifications, and the latest ones without an accepted token
        self._accepted = self._expected = 0.0
        depths = range(MAX_SPECULATION_LENGTH + 1)
        greedy = [check.expected(depth) if check is not None else LEAST for depth in depths]
        self._expecting = {False: greedy, True: [max(LEAST, SAMPLED * each) for each in greedy]}  # by `samples`

    @property
    def tau(self) -> float:
        """τ of the self-check; NaN without one."""
        return self.check.stats.acceptance_length if self.check is not None else float("nan")

    @property
    def is_degraded(self) -> bool:
        return self.degraded is not None

    def expected(self, depth: int, *, samples: bool) -> float:
        """Tokens that a verification of `depth` tokens drafted in a row is expected to accept."""
        return self._expecting[samples][depth]

    def observe(self, depth: int, accepted: int, *, samples: bool = False) -> None:
        """Count one verification of `depth` tokens that the head drafted in a row; 0: none, which says nothing.

        accepted: of these. samples: the request is not greedy.
        """
        if not depth:
            return
        depth = min(depth, MAX_SPECULATION_LENGTH)  # another server may draft more
        fading = WATCHED / (WATCHED + 1)
        self._count += 1
        self._missed = 0 if accepted else self._missed + 1
        self._accepted = self._accepted * fading + accepted
        self._expected = self._expected * fading + self._expecting[samples][depth]
        if self._count < WATCHED:
            return
        share = self._accepted / self._expected
        if self.degraded is None and (share < BROKEN or self._missed >= WATCHED):
            self.degraded = self._reason()
            self._accepted *= self._missed < WATCHED  # what was accepted before must not end this at once
            log.warning("speculation is degraded: %s", self.degraded)
        elif self.degraded is not None and share >= WELL:
            self.degraded = None
            log.info("speculation is well again: the target accepts %.0f %% of what is expected", 100 * share)

    def _reason(self) -> str:
        if self._missed >= WATCHED:
            return f"no drafted token was accepted in the last {self._missed} verifications; {_CAUSES}."
        share = self._accepted / self._expected
        compared = "that the self-check at the start leads to expect" if self.check is not None else "to be expected"
        return (
            f"the target accepts {share:.0%} of the drafted tokens {compared}; the traffic may be far from "
            "the text that the head was trained on: adapt the head to it with `draft-train adapt`."
        )
