"""Pairs of people who write to each other, whatever the server: how messages are driven through and timed.

A message's number tells its pair: `number % pairs`. The clock stops when the other person's client has it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from bench.report import percentile


class CannotInstallError(Exception):
    """The server cannot be had on this machine; the text says why."""


class Talk(Protocol):
    """A server with its pairs connected. `delivered` is set by whoever drives, and called with a message's number."""

    pairs: int
    delivered: Callable[[int], None]

    def send(self, number: int) -> None:
        """Send a message from the first of the number's pair to the second."""


class _Clock:
    def __init__(self, talk: Talk) -> None:
        self.begun: dict[int, float] = {}
        self.late: list[float] = []
        self.talk = talk
        talk.delivered = self.delivered

    def send(self, number: int, due: float) -> None:
        self.begun[number] = due
        self.talk.send(number)

    def delivered(self, number: int) -> None:
        begun = self.begun.pop(number, None)
        if begun is not None:
            self.late.append((time.monotonic() - begun) * 1000)
            self.arrived(number)

    def arrived(self, number: int) -> None:
        """Called for each delivery, once."""


class _Loop(_Clock):
    """Each pair sends another message when one has arrived; `window` of them are under way."""

    def __init__(self, talk: Talk, window: int) -> None:
        super().__init__(talk)
        self.is_running = True
        self._step = window * talk.pairs

    def arrived(self, number: int) -> None:
        if self.is_running:
            self.send(number + self._step, time.monotonic())


async def closed_loop(talk: Talk, seconds: float, window: int, first: int) -> dict[str, Any]:
    """`window` messages under way in each pair, for `seconds`: what the server can carry that way."""
    loop = _Loop(talk, window)
    begun = time.monotonic()
    for number in range(window * talk.pairs):
        loop.send(first * talk.pairs + number, time.monotonic())
    await asyncio.sleep(seconds)
    loop.is_running = False
    elapsed, count = time.monotonic() - begun, len(loop.late)
    await _rest(loop)
    return _row("as fast as it goes", count / elapsed, sorted(loop.late), len(loop.begun))


async def paced(talk: Talk, rate: float, seconds: float, first: int) -> dict[str, Any]:
    """`rate` messages a second over all pairs, each counted from when it was due."""
    clock = _Clock(talk)
    begun, sent, total = time.monotonic() + 0.05, 0, int(rate * seconds)
    while sent < total:
        wanted = min(total, int((time.monotonic() - begun) * rate) + 1) if time.monotonic() >= begun else 0
        while sent < wanted:
            clock.send(first * talk.pairs + sent, begun + sent / rate)
            sent += 1
        await asyncio.sleep(0.001)
    await _rest(clock)
    elapsed = max(seconds, time.monotonic() - begun) if clock.begun else seconds
    return _row(f"{rate:g}/s", len(clock.late) / elapsed, sorted(clock.late), len(clock.begun))


async def _rest(clock: _Clock, patience: float = 15) -> None:
    deadline = time.monotonic() + patience
    while clock.begun and time.monotonic() < deadline:
        await asyncio.sleep(0.01)


def _row(offered: str, rate: float, late: list[float], lost: int) -> dict[str, Any]:
    return {
        "offered": offered,
        "delivered/s": rate,
        "P50 ms": percentile(late, 0.5),
        "P99 ms": percentile(late, 0.99),
        "lost": lost,
    }
