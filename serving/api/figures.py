"""What speculation did for a request, in the shapes of both surfaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from serving.api.schemas import Speculative, SpeculativeDetails
from serving.api.service import Service
from serving.engine import Completion, Speculation, SpeculationStats


def speculation_of(wanted: Speculative | None, service: Service) -> Speculation:
    """A request's wishes, capped by what the server does."""
    wanted, most = wanted or Speculative(), service.speculation_length
    return Speculation(
        enabled=wanted.enabled is not False and most > 0,
        num_tokens=None if wanted.num_tokens is None else min(wanted.num_tokens, most),
        rule=wanted.rule,
    )


def speculation_length(speculation: Speculation, service: Service) -> int:
    """Tokens drafted at a time for this request, at most."""
    if not speculation.enabled:
        return 0
    return service.speculation_length if speculation.num_tokens is None else speculation.num_tokens


def speculative_details(completion: Completion, speculation: Speculation, service: Service) -> SpeculativeDetails:
    stats, length = completion.stats, speculation_length(speculation, service)
    return SpeculativeDetails(
        enabled=length > 0,
        rule=speculation.rule or service.engine.rule,
        speculation_length=length,
        acceptance_length=finite(stats.acceptance_length),
        verifications=stats.verifications,
        drafted=stats.drafted,
        accepted=stats.accepted,
        emitted=stats.emitted,
        acceptance_per_position=acceptance_per_position(stats),
    )


def acceptance_per_position(stats: SpeculationStats) -> list[float | None]:
    """accepted / drafted at each draft position; None where nothing was drafted."""
    pairs = zip(stats.accepted_per_position, stats.drafted_per_position, strict=True)
    return [accepted / drafted if drafted else None for accepted, drafted in pairs]


def vllm_metrics(completions: Sequence[Completion], speculation: Speculation, service: Service) -> dict[str, Any]:
    """`metrics` of an OpenAI answer: vLLM's per-request figures, which it has for single sequences only.

    A step is a verification of at least one drafted token. mean_acceptance_length is vLLM's 1 + accepted / steps:
    the bonus token counts, also where the end of the answer cut it off.
    """
    if len(completions) != 1:
        return {"speculative_decoding": None}
    stats, length = completions[0].stats, speculation_length(speculation, service)
    steps = [(depth, accepted) for depth, accepted in stats.steps if depth]
    accepted_tokens = sum(accepted for _, accepted in steps)
    by_depth = {
        str(depth): _histogram([accepted for own, accepted in steps if own == depth], depth)
        for depth in sorted({depth for depth, _ in steps})
    }
    return {
        "speculative_decoding": {
            "mean_acceptance_length": 1 + accepted_tokens / len(steps) if steps else None,
            "draft_acceptance_rate": accepted_tokens / stats.drafted if stats.drafted else None,
            "acceptance_histogram": _histogram([accepted for _, accepted in steps], length),
            "acceptance_histogram_by_draft_length": by_depth,
            "num_spec_steps": len(steps),
            "num_accepted_draft_tokens": accepted_tokens,
            "num_draft_tokens": stats.drafted,
            "num_spec_tokens": length,
        }
    }


def _histogram(accepted: list[int], most: int) -> list[int]:
    """How many steps accepted 0, 1, ... `most` tokens."""
    return [accepted.count(count) for count in range(most + 1)]


def finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity: null where a figure is undefined."""
    return value if value is not None and math.isfinite(value) else None
