"""Has this process more to do than time for? Then what can wait or be left out must not delay what matters.

Measured by how late the event loop runs what is due, and by how long the oldest accepted work has waited. A single hiccup
is no overload: it must last, and be over for a while, before anything changes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from whispr.kit.telemetry import get_logger, metrics

log = get_logger(__name__)

TICK_SECONDS = 0.1
HIGH_SECONDS: Final = 0.25
LOW_SECONDS: Final = 0.08
RISE_TICKS: Final = 3
CALM_SECONDS: Final = 2.0

_lag = metrics.gauge("loop_lag_seconds", "How late the event loop last ran what was due.")
_high = metrics.gauge("pressure", "1 while what can be left out is left out.")
_shed = metrics.counter("shed", "What was left out or put off under pressure.", ("what",))


class Pressure:
    """`high` is what everybody asks. `run` is the supervised loop that measures."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.high = False
        self._monotonic = monotonic
        self._ages: list[Callable[[], float]] = []
        self._on_calm: list[Callable[[], None]] = []
        self._rising = 0
        self._low_since: float | None = None

    def watch(self, age: Callable[[], float]) -> None:
        """Take into account how many seconds the oldest accepted work has waited, as `age` tells."""
        self._ages.append(age)

    def on_calm(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the pressure is over. It must not raise."""
        self._on_calm.append(callback)

    def shed(self, what: str, count: int = 1) -> bool:
        """Whether `count` pieces of `what` are to be left out or put off now; they are counted then."""
        if self.high:
            _shed.labels(what).inc(count)
        return self.high

    async def run(self) -> None:
        """Measure, for ever."""
        while True:
            due = self._monotonic() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            self.observe(max(0.0, self._monotonic() - due))

    def observe(self, lag: float) -> None:
        """Take a measurement: the loop was `lag` seconds late."""
        _lag.set(lag)
        worst = max([lag, *(age() for age in self._ages)])
        self._rising = self._rising + 1 if worst > HIGH_SECONDS else 0
        if worst >= LOW_SECONDS:
            self._low_since = None
        elif self._low_since is None:
            self._low_since = self._monotonic()
        if not self.high and (self._rising >= RISE_TICKS or worst > RISE_TICKS * HIGH_SECONDS):
            self._change(True, worst)
        elif (
            self.high and self._low_since is not None and self._monotonic() - self._low_since >= CALM_SECONDS
        ):
            self._change(False, worst)

    def _change(self, high: bool, worst: float) -> None:
        self.high = high
        _high.set(high)
        if high:
            log.warning("pressure_high", late=round(worst, 3))
            return
        log.warning("pressure_over")
        for callback in self._on_calm:
            callback()
