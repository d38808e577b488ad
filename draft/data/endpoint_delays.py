"""How long to wait before a server is asked again."""

from __future__ import annotations

import random
import time
from email.utils import parsedate_to_datetime

_FIRST_DELAY, _LONGEST_DELAY, _LONGEST_WISH = 0.5, 60.0, 600.0  # seconds; the last: of a server's Retry-After


def delay(attempt: int, wish: str | None) -> float:
    """Seconds to wait before the next attempt: the server's wish, or twice as long as before; with jitter."""
    backoff = min(_LONGEST_DELAY, _FIRST_DELAY * 2**attempt) * random.uniform(0.5, 1.0)
    return backoff if wish is None else min(_LONGEST_WISH, _seconds(wish)) + backoff / 4


def _seconds(wish: str) -> float:
    """Of a Retry-After header, which has seconds or a date."""
    try:
        return max(0.0, float(wish))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(wish).timestamp() - time.time())
    except ValueError:
        return 0.0
