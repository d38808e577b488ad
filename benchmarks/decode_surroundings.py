"""Speed where the machine is not ours alone, and how long a start takes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.decode_baselines import Timing
from draft.launcher import draft_serve


@contextmanager
def busy_process() -> Iterator[None]:
    """Another process that keeps a core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


def busy_share(run: Callable[[], Timing], repeats: int) -> float:
    """Tokens per second beside a busy process / alone; the best of some runs each, alternating."""
    alone, beside = [], []
    for _ in range(repeats):
        alone.append(run().rate)
        with busy_process():
            beside.append(run().rate)
    return max(beside) / max(alone)


def second_start(options: list[str], prompt: str, new_tokens: int = 96) -> dict[str, Any]:
    """Seconds from the command of a server's second start to the end of its first answer at 80 % of full speed."""
    for attempt in range(2):
        began = time.monotonic()
        with draft_serve(options) as server:
            ready = time.monotonic() - began
            rates = []
            for _ in range(4):
                asked = time.monotonic()
                _ask(server.url, prompt, new_tokens)
                rates.append((new_tokens / (time.monotonic() - asked), time.monotonic() - began))
        if attempt:
            full = max(rate for rate, _ in rates)
            return {"ready": ready, "start": next(ended for rate, ended in rates if rate >= 0.8 * full)}
    raise AssertionError


def _ask(address: str, prompt: str, new_tokens: int) -> None:
    body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        response.read()
