"""The engine beside another process, and a server after its start."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.baselines import complete
from benchmarks.timing import Timing
from draft.launcher import draft_serve


def busy_share(run: Callable[[], Timing], repeats: int) -> float:
    """Return tokens per second beside a busy process / alone; the best of some runs each, alternating."""
    alone, beside = [], []
    for _ in range(repeats):
        alone.append(run().rate)
        process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            time.sleep(0.5)
            beside.append(run().rate)
        finally:
            process.kill()
            process.wait()
    return max(beside) / max(alone)


def second_start(options: list[str], new_tokens: int = 96) -> dict[str, float]:
    """Return seconds from the command of a server's second start to its first answer at 80 % of full speed."""
    for _ in range(2):
        began = time.monotonic()
        with draft_serve(options) as server:
            ready = time.monotonic() - began
            rates = []
            for _ in range(4):
                sent = time.monotonic()
                complete(server.url, "Tell me a story about a lighthouse.", new_tokens)
                rates.append((new_tokens / (time.monotonic() - sent), time.monotonic() - began))
    full = max(rate for rate, _ in rates)
    return {"ready": ready, "start": next(ended for rate, ended in rates if rate >= 0.8 * full)}
