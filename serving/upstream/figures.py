"""Figures of speculation in a server's /metrics, whatever prefix their names have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from serving.backend import DraftCounts

_NAMES = {  # after the prefix -> the figure; vLLM, llama.cpp and draft-serve have the first ones, SGLang the last two
    "spec_decode_num_drafts": "drafts",
    "spec_decode_num_draft_tokens": "drafted",
    "spec_decode_num_accepted_tokens": "accepted",
    "spec_decode_num_accepted_tokens_per_pos": "per_position",
    "kv_cache_usage_perc": "cache_usage",
    "token_usage": "cache_usage",
    "spec_num_steps": "longest",
    "spec_accept_length": "stated_length",
}


@dataclass(frozen=True)
class Figures:
    """A server's figures of itself."""

    counts: DraftCounts = DraftCounts()
    longest_draft: int = 0  # tokens drafted at a time
    cache_usage: float = float("nan")


def read_figures(text: str) -> Figures:
    """Return the figures of an exposition in Prometheus' format; counts of several engines are added up.

    Raises:
        ValueError: it is of another format.
    """
    found: dict[str, list[float]] = {}
    positions: dict[int, float] = {}
    for family in text_string_to_metric_families(text):
        figure = _NAMES.get(family.name.rpartition(":")[2])
        if figure is None:
            continue
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            if figure == "per_position":
                position = int(sample.labels["position"])
                positions[position] = positions.get(position, 0.0) + sample.value
            else:
                found.setdefault(figure, []).append(sample.value)
    counts = DraftCounts(
        _sum(found.get("drafts")),
        _sum(found.get("drafted")),
        _sum(found.get("accepted")),
        tuple(positions[position] for position in sorted(positions)),
        max(found["stated_length"]) if found.get("stated_length") else None,
    )
    longest = max(len(positions), *map(int, found.get("longest", [0])))
    return Figures(counts, longest, max(found.get("cache_usage", [float("nan")])))


def _sum(values: Iterable[float] | None) -> float | None:
    return None if values is None else sum(values)


def drafts_between(before: DraftCounts, after: DraftCounts, most: int) -> list[tuple[int, int]]:
    """Return (depth, accepted) of about the verifications between two readings, as their means; at most `most` of them.

    None where the server counts nothing, or was started again.
    """
    if None in (before.drafts, before.drafted, before.accepted, after.drafts, after.drafted, after.accepted):
        return []
    drafts, drafted, accepted = (
        int(getattr(after, name) - getattr(before, name)) for name in ("drafts", "drafted", "accepted")
    )
    if drafts <= 0 or drafted < 0 or accepted < 0:
        return []
    depth, count = round(drafted / drafts), min(drafts, most)
    # whole numbers whose sums follow the mean
    return [(depth, (place + 1) * accepted // drafts - place * accepted // drafts) for place in range(count)]
