"""The gate between the steps of training, which leaves serving its speed.

Training and a server beside it share memory bandwidth, caches and often cores. How much of its speed the server loses
is measured: the mean time between the steps of decoding while training works, and while it rests. A share of the time
that keeps the loss within the budget is worked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from draft.learning.server import Load, ServerAway

_WINDOW = 2.0  # seconds that are worked between two looks at the server
_LEAST_REST = 0.05  # of the worked time, in which the server's own speed is measured
_LEAST_WORK = 0.02  # of the time, whatever training costs the server
_FADING = 0.9  # of the weight of earlier windows, at each
_SLICE = 0.5  # seconds after which a signal is noticed
_CLOSE = 1e-3  # seconds that are no longer waited for
_LONGEST_WAIT = 60.0  # for a queue to shrink; one that stays is the server's own
_GROWN = 1.0  # requests beyond the usual queue


@dataclass
class _Speed:
    """Mean time between the steps of decoding, over the latest windows."""

    gaps: float = 0.0
    seconds: float = 0.0

    def add(self, before: Load, after: Load) -> None:
        gaps, seconds = after.gaps - before.gaps, after.seconds - before.seconds
        if gaps >= 0 and seconds >= 0:  # else the server was started again
            self.gaps = self.gaps * _FADING + gaps
            self.seconds = self.seconds * _FADING + seconds

    @property
    def mean(self) -> float | None:
        """Seconds; None where nothing was decoded."""
        return self.seconds / self.gaps if self.gaps >= 1 else None


class Gate:
    """Called between the steps of training, returns when the next one may begin."""

    def __init__(
        self,
        load: Callable[[], Load],
        budget: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """load: raises ServerAway. budget: share of the server's throughput that training may take."""
        self.budget = budget
        self.signals: Sequence[int] = ()  # of a run that is to end: then nothing is waited for
        self.worked = self.rested = 0.0  # seconds
        self._load, self._clock, self._sleep = load, clock, sleep
        self._working, self._resting = _Speed(), _Speed()
        self._usual = 0.0  # requests that wait while training rests
        self._mark: Load | None = None
        self._since: float | None = None  # the time at which the present window of work began

    @property
    def slowdown(self) -> float:
        """Share of its speed that the server loses while training works; 0 where nothing was decoded."""
        working, resting = self._working.mean, self._resting.mean
        return max(0.0, 1 - resting / working) if working and resting else 0.0

    @property
    def loss(self) -> float:
        """Share of its throughput that the server lost, over work and rest."""
        time = self.worked + self.rested
        return self.slowdown * self.worked / time if time else 0.0

    @property
    def share(self) -> float:
        """The share of the time that may be worked."""
        return min(1.0, max(_LEAST_WORK, self.budget / self.slowdown)) if self.slowdown else 1.0

    def __call__(self) -> None:
        now = self._clock()
        if self._since is None:  # the server's own speed comes first
            self._mark = self._read()
            self._rest(_WINDOW)
            return
        worked = now - self._since
        if worked < _WINDOW:
            return
        self.worked += worked
        load = self._read()
        if load is not None and self._mark is not None:
            self._working.add(self._mark, load)
        self._mark = load
        self._rest(max(_LEAST_REST * worked, worked * (1 / self.share - 1)))

    def _rest(self, seconds: float) -> None:
        """Rest for so long, and for a while longer where the queue has grown."""
        began, before, load = self._clock(), self._mark, None
        while not self.signals:
            over = self._clock() - began - seconds
            if over > -_CLOSE:
                load = self._read()
                grown = load is not None and load.waiting > self._usual + _GROWN
                if not grown or over >= _LONGEST_WAIT:
                    break
            self._sleep(min(_SLICE, -over) if over <= -_CLOSE else _SLICE)
        now = self._clock()
        self.rested += now - began
        if load is not None:
            self._usual += (load.waiting - self._usual) * (1 - _FADING)
            if before is not None:
                self._resting.add(before, load)
        self._mark, self._since = load, now

    def _read(self) -> Load | None:
        try:
            return self._load()
        except ServerAway:  # nobody to slow down
            return None
