"""Timings of variants that take turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks import shared


class Key(NamedTuple):
    """Setting of a row of the results."""

    batch: int
    temperature: float
    rule: str | None
    name: str
    weights: str | None = None  # None: as the target has them


@dataclass(frozen=True)
class Timing:
    """One timed pass over some prompts at once."""

    tokens: int  # after each prompt's first one
    seconds: float
    outputs: tuple[tuple[int, ...], ...] = ()
    verifications: int = 0  # 0: not known
    emitted: int = 0  # by these verifications
    parts: tuple[tuple[str, float], ...] = ()  # seconds by part of a step

    @property
    def rate(self) -> float:
        """Tokens per second, of all prompts together."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Variant:
    """One way to decode a batch of prompts."""

    key: Key
    run: Callable[[list[list[int]]], Timing]


Samples = dict[Key, list[Timing]]  # one for each repeat


def measure(
    variants: list[Variant], groups: dict[int, list[list[list[int]]]], repeats: int, what: str = "decoding"
) -> Samples:
    """Time every variant `repeats` times over its batches; repeat 0 warms up and is not kept."""
    samples: Samples = {variant.key: [] for variant in variants}
    with shared.progress_bar() as progress:
        bar = progress.add_task(what, total=len(variants) * (repeats + 1))
        try:
            for repeat in range(repeats + 1):
                shift = repeat % len(variants)
                for variant in variants[shift:] + variants[:shift]:
                    chosen = groups[variant.key.batch] if repeat else groups[variant.key.batch][:1]
                    timings = [variant.run(prompts) for prompts in chosen]
                    if repeat:
                        samples[variant.key].append(pool(timings))
                    progress.advance(bar)
        except KeyboardInterrupt:
            if not any(samples.values()):
                raise
    return {key: timings for key, timings in samples.items() if timings}


def pool(timings: list[Timing]) -> Timing:
    """Add up all batches of one repeat."""
    parts: dict[str, float] = {}
    for timing in timings:
        for name, seconds in timing.parts:
            parts[name] = parts.get(name, 0.0) + seconds
    return Timing(
        sum(timing.tokens for timing in timings),
        sum(timing.seconds for timing in timings),
        tuple(output for timing in timings for output in timing.outputs),
        sum(timing.verifications for timing in timings),
        sum(timing.emitted for timing in timings),
        tuple(parts.items()),
    )


def batches(ids: list[list[int]], size: int) -> list[list[list[int]]]:
    """Return the prompts in groups of `size`; the last one is filled up from the beginning."""
    count = -(-len(ids) // size)
    return [[ids[(group * size + place) % len(ids)] for place in range(size)] for group in range(count)]
