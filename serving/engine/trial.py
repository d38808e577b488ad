"""Trial of a draft head that became the default of a running server, beside the head before it.

A stale or corrupted head leaves the text right, and nothing fails: only fewer of its drafts are accepted. So each
verification of the new head is compared with what the previous head has accepted of chains that were planned as long,
on the traffic before and meanwhile; where too little is known of that, with its self-check. Plans are compared and not
drafted tokens, because a chain ends by the head's own confidence: a head that is always unsure drafts one token at a
time, and has that one accepted often.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.engine.request import MAX_SPECULATION_LENGTH
from serving.engine.self_check import BROKEN

if TYPE_CHECKING:
    from serving.engine.heads import LoadedHead

# A verification's accepted tokens vary about as much as their mean, and so do answers by a quarter of it: after 400
# verifications of 8 answers the mean is known to a tenth. A head is worse when it accepts less than 4/5, two such
# errors, of what the one before it does: one that is as good is rolled back in one of 40 trials, which costs a swap.
VERIFICATIONS = 400  # with drafts of the new head, after which it is judged
ANSWERS = 8  # of which they are at least
MARGIN = 4 / 5  # of the previous head's accepted tokens on live traffic
# Nothing in between has to be waited for where less than half is accepted (`BROKEN`): five errors after 64. The same
# bound holds at the end where only a self-check is known, whose answers to built-in prompts are another text.
EARLY_VERIFICATIONS, EARLY_ANSWERS = 64, 3
KNOWN = 100  # verifications in which a position was planned, from which a head's live figures there count
_MEMORY = 2000  # verifications after which one weighs 1/e


class Survival:
    """The share of a head's chains in which the first 1, 2, ... drafted tokens were accepted, by plan.

    A chain that ended before its planned length counts as rejected there.
    """

    def __init__(self) -> None:
        self.accepted = [0.0] * MAX_SPECULATION_LENGTH  # by position
        self.planned = [0.0] * MAX_SPECULATION_LENGTH

    def observe(self, planned: int, accepted: int) -> None:
        """Count one verification: `accepted` tokens in a row where the plan allowed `planned`."""
        fading = 1 - 1 / _MEMORY
        for position in range(planned):
            self.accepted[position] = self.accepted[position] * fading + (position < accepted)
            self.planned[position] = self.planned[position] * fading + 1

    def expected(self, planned: int) -> float | None:
        """Return the tokens that are accepted of such a plan on average; None: too little is known."""
        if min(self.planned[:planned]) < KNOWN:
            return None
        return sum(self.accepted[position] / self.planned[position] for position in range(planned))


class Trial:
    """Comparison of a new default head with the one before it, until either has won."""

    def __init__(self, previous: LoadedHead) -> None:
        self.previous = previous
        self.verifications = 0
        self._answers: set[int] = set()
        self._accepted = self._expected = 0.0
        self._least = 0.0  # accepted tokens below which the new head is worse

    def observe(self, answer: int, planned: int, accepted: int, *, samples: bool) -> str | None:
        """Count one verification of the new head, in the answer of this number, of which `accepted` of `planned`
        tokens were accepted; returns the reason why it is worse, once that is known."""
        planned = min(planned, self.previous.length)  # what it would have drafted
        live = self.previous.survival[samples].expected(planned)
        expected = self.previous.watch.expected(planned, samples=samples) if live is None else live
        self.verifications += 1
        self._answers.add(answer)
        self._accepted += accepted
        self._expected += expected
        self._least += expected * (BROKEN if live is None else MARGIN)
        early = self.verifications >= EARLY_VERIFICATIONS and len(self._answers) >= EARLY_ANSWERS
        if (self.over and self._accepted < self._least) or (early and self._accepted < BROKEN * self._expected):
            return self._reason()
        return None

    @property
    def over(self) -> bool:
        """True once there were enough verifications: a head that was not worse by then has proven itself."""
        return self.verifications >= VERIFICATIONS and len(self._answers) >= ANSWERS

    def _reason(self) -> str:
        count = self.verifications
        return (
            f"the target accepted {self._accepted / count:.2f} tokens of its drafts in each of {count} verifications, "
            f"and {self._expected / count:.2f} were to be expected of head {self.previous.name!r} before it"
        )
