"""A request while it has a slot: what the engine knows of it between steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serving.engine.acceptance import RowStats
from serving.engine.params import SamplingParams
from serving.engine.request import Request
from serving.engine.sampling import Processor
from serving.engine.sequence import Completion, Sequence, SpeculationStats
from serving.engine.verification import Rule


@dataclass(eq=False)
class Row:
    """One sequence being read or decoded."""

    request: Request
    sequence: Sequence
    processor: Processor
    rule: Rule
    seed: int | None  # None: greedy, and nothing was random
    slot: int
    cap: int  # the most tokens drafted at a time; 0: plain decoding
    acceptance: RowStats
    drafting: Any = None  # the proposer's state of this sequence; None where nothing is ever drafted
    read: int = 0  # tokens of the prompt that the target has read
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    @property
    def params(self) -> SamplingParams:
        return self.sequence.params

    @property
    def reading(self) -> bool:
        """Whether part of the prompt is still to be read."""
        return self.read < len(self.sequence.prompt_ids)

    @property
    def finished(self) -> bool:
        return self.sequence.finish_reason is not None

    @property
    def draftable(self) -> int:
        """The most tokens worth drafting now: a verification emits one token more than stand."""
        return max(0, min(self.cap, self.sequence.remaining - 1))

    def completion(self) -> Completion:
        sequence = self.sequence
        assert sequence.finish_reason is not None
        if len(sequence.tokens) != self.stats.emitted + 1:  # a stop string took some back
            self.stats.settle(sequence.tokens)
        times = self.request.times
        if times.first_token:
            self.stats.prefill_seconds = times.first_token - times.started
        return Completion(
            prompt_ids=sequence.prompt_ids,
            token_ids=[token.id for token in sequence.tokens],
            tokens=sequence.tokens,
            text=sequence.text,
            finish_reason=sequence.finish_reason,
            seed=self.seed,
            stats=self.stats,
            stop_reason=sequence.stop_reason,
        )
