"""How fast one device may send, counted in this process: the hot path cannot wait for a shared counter."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.errors import RateLimited

_MAX_DEVICES: Final = 50_000


class Pace:
    """At most `rate` a second in the long run, `burst` at once (GCRA)."""

    def __init__(self, clock: Clock, *, rate: float, burst: int) -> None:
        self._clock = clock
        self._interval = 1 / rate
        self._slack = burst / rate
        self._arrivals: OrderedDict[UUID, float] = OrderedDict()

    def count(self, device_id: UUID) -> None:
        """Count one. Raises `RateLimited` with the seconds to wait."""
        now = self._clock.time()
        arrival = max(self._arrivals.get(device_id, now), now)
        wait = arrival + self._interval - now - self._slack
        if wait > 0:
            raise RateLimited(retry_after=round(max(wait, 0.1), 1), limit="messages")
        self._arrivals[device_id] = arrival + self._interval
        self._arrivals.move_to_end(device_id)
        if len(self._arrivals) > _MAX_DEVICES:
            self._arrivals.popitem(last=False)
