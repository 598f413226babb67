"""How long to wait before trying again."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """Exponential backoff with full jitter: anything between nothing and `base * 2**attempt`, at most `cap` seconds.

    Full jitter, because after an outage every client of a server begins to try at the same moment.
    """

    base: float = 0.25
    cap: float = 30.0

    def delay(self, attempt: int, at_least: float | None = None) -> float:
        """Seconds to wait after the failed `attempt` (from 0). `at_least` is what the server asked for."""
        spread = random.uniform(0.0, min(self.cap, self.base * 2.0 ** min(attempt, 32)))
        return spread + (at_least or 0.0)
