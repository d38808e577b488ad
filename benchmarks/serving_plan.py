"""Plan of a run of `benchmarks.serving_load`: its parts, and the requests that it can afford by a short calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass

MODES = ("off", "on", "automatic")
HTTP_CONCURRENCY = 8
POISSON_LOAD = 0.7  # of what the closed loop answered with speculation off
LOOP_SECONDS = (60.0, 50, 40, 32, 26, 21, 17, 14, 12, 10, 8, 7, 6, 5, 4, 3, 2)  # tried, with speculation off


@dataclass(frozen=True)
class Plan:
    """The parts of a run, and how many requests each loop has."""

    concurrency: tuple[int, ...]
    arrivals: tuple[str, ...]  # closed, poisson
    repeats: int
    http_repeats: int  # 0: HTTP is not compared with the engine alone
    endurance: int  # requests

    def requests(self, rates: Rates, seconds: float) -> dict[int, int]:
        """Return, by concurrency, the requests of a loop that takes so long with speculation off."""
        levels = {*self.concurrency, HTTP_CONCURRENCY}
        return {level: level * max(1, round(seconds * rates.of("off", level) / level)) for level in levels}

    def seconds(self, rates: Rates, requests: dict[int, int]) -> float:
        """Return the seconds that the whole run takes."""
        loops = {(mode, level): requests[level] / rates.of(mode, level) for mode in MODES for level in self.concurrency}
        total = self.repeats * sum(loops.values()) if "closed" in self.arrivals else 0.0
        if "poisson" in self.arrivals:
            total += sum(max(loops[mode, level], loops["off", level] / POISSON_LOAD) for mode, level in loops)
        if self.http_repeats:  # and one more of each, which warms up
            total += 2 * (self.http_repeats + 1) * requests[HTTP_CONCURRENCY] / rates.of("off", HTTP_CONCURRENCY)
        return total + self.endurance / rates.endurance

    def fit(self, rates: Rates, seconds: float, least: int | None = None) -> dict[int, int]:
        """Return the most requests a loop that let the run end in time, or the fewest that make sense.

        least: so many a loop instead, rounded up for each client to have as many.
        """
        if least:
            return {level: level * -(-least // level) for level in {*self.concurrency, HTTP_CONCURRENCY}}
        tries = [self.requests(rates, each) for each in LOOP_SECONDS]
        return next((each for each in tries if self.seconds(rates, each) <= seconds), tries[-1])


@dataclass(frozen=True)
class Rates:
    """Requests per second as calibrated, at a concurrency of 1 and at the highest."""

    highest: int
    measured: dict[tuple[str, int], float]  # (off or on, concurrency)
    endurance: float

    def of(self, mode: str, concurrency: int) -> float:
        """Interpolate by a power of the concurrency; automatic counts as the slower of on and off."""
        if mode == "automatic":
            return min(self.of("off", concurrency), self.of("on", concurrency))
        least, most = self.measured[mode, 1], self.measured[mode, self.highest]
        if self.highest == 1:
            return least
        exponent = min(1.0, math.log(concurrency) / math.log(self.highest))
        return least * (most / least) ** exponent
