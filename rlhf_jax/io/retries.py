"""How long to wait before a server is asked again, or not at all.

The server's own word (Retry-After) goes first; without one pauses double, a little
shorter or longer each, so that requests that failed together do not come back together.
"""

import email.utils
import random
import time
from typing import Any

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 16.0
"""Before the second attempt, doubled for each further one, where the endpoint names no
time of its own."""
LONGEST_RETRY_AFTER_S = 120.0
"""An endpoint that wants to be left alone for longer is not asked again."""
_TEMPORARY = (408, 409, 429)
"""Statuses below 500 that another attempt may change."""


def pause_s(response: Any, attempt: int) -> float | None:
    """Seconds before another attempt; None = it would be refused too.

    Args:
        response: with status and headers; None = none came.
        attempt: how many there were before the one that failed.
    """
    # Not all at once: the questions that failed together were too many together.
    doubled = min(FIRST_PAUSE_S * 2.0 ** min(attempt, 16), LONGEST_PAUSE_S)
    pause = doubled * random.uniform(0.75, 1.0)
    if response is None:
        return pause
    wanted = _retry_after_s(response.headers)
    if wanted > LONGEST_RETRY_AFTER_S:
        return None
    # Some endpoints say so where the status does not: a spent quota is a 429 too.
    said = response.headers.get("x-should-retry")
    temporary = response.status_code in _TEMPORARY or response.status_code >= 500
    if said == "false" or not (temporary or said == "true"):
        return None
    return wanted or pause


def _retry_after_s(headers: Any) -> float:
    """Seconds that an endpoint asks for; 0 = it does not say."""
    for name, seconds in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            wanted = float(headers.get(name, "")) * seconds
        except ValueError:
            continue
        return wanted if wanted > 0 else 0.0  # nan is none
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except ValueError:
        return 0.0
    return max(date.timestamp() - time.time(), 0.0)
