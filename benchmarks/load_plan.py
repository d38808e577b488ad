"""How many requests a run can afford: what a short calibration says of its speed, against the minutes it may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

MODES = ("off", "on", "automatic")
HTTP_CONCURRENCY = 8
POISSON_LOAD = 0.7  # of what the closed loop answered with speculation off
_TRIES = (60.0, 50, 40, 32, 26, 21, 17, 14, 12, 10, 8, 7, 6, 5, 4, 3, 2)  # seconds for a loop with speculation off


@dataclass(frozen=True)
class Plan:
    """The parts of a run, and how many requests each loop has."""

    concurrency: tuple[int, ...]
    arrivals: tuple[str, ...]  # closed, poisson
    repeats: int
    http_repeats: int  # 0: HTTP is not compared with the engine alone
    endurance: int  # requests

    def requests(self, rates: Rates, seconds: float) -> dict[int, int]:
        """concurrency -> requests of a loop that takes about so long with speculation off; each client has as many."""
        levels = {*self.concurrency, HTTP_CONCURRENCY}
        return {level: level * max(1, round(seconds * rates.of("off", level) / level)) for level in levels}

    def seconds(self, rates: Rates, requests: dict[int, int]) -> float:
        """That the whole run takes."""
        loops = {(mode, level): requests[level] / rates.of(mode, level) for mode in MODES for level in self.concurrency}
        total = self.repeats * sum(loops.values()) if "closed" in self.arrivals else 0.0
        if "poisson" in self.arrivals:
            total += sum(max(loops[mode, level], loops["off", level] / POISSON_LOAD) for mode, level in loops)
        total += 2 * self.http_repeats * requests[HTTP_CONCURRENCY] / rates.of("off", HTTP_CONCURRENCY)
        return total + self.endurance / rates.endurance

    def fit(self, rates: Rates, seconds: float) -> dict[int, int]:
        """The most requests a loop that let the run end in time, or the fewest that make sense."""
        tries = [self.requests(rates, each) for each in _TRIES]
        return next((each for each in tries if self.seconds(rates, each) <= seconds), tries[-1])


@dataclass(frozen=True)
class Rates:
    """Requests per second as calibrated, at a concurrency of 1 and at the highest."""

    highest: int
    measured: dict[tuple[str, int], float]  # (off or on, concurrency)
    endurance: float

    def of(self, mode: str, concurrency: int) -> float:
        """Between the two concurrencies a power of it; automatic is taken for what is slower."""
        if mode == "automatic":
            return min(self.of("off", concurrency), self.of("on", concurrency))
        least, most = self.measured[mode, 1], self.measured[mode, self.highest]
        if self.highest == 1:
            return least
        exponent = min(1.0, math.log(concurrency) / math.log(self.highest))
        return least * (most / least) ** exponent
