"""Finding connections that have gone silent, without a timer for each.

A wheel of buckets, one per tick. A member sits in the bucket of the tick at which it would be due had it said nothing;
when that tick comes it is either due or moved on by as much as it was heard since. Each member is so touched once per
timeout, however often it speaks, and hearing from it costs one store.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol


class Watched(Protocol):
    """Something that is expected to be heard from. `last_seen` is a tick, `wheel_slot` belongs to the wheel."""

    last_seen: int
    wheel_slot: int


class IdleWheel:
    """Members not heard of for `timeout` seconds (late by up to one tick) come out of `advance`.

    Time is monotonic: it is about peers in the real world, and a corrected clock must not cut them off.
    """

    def __init__(
        self, timeout: float, *, monotonic: Callable[[], float] = time.monotonic, ticks: int = 12
    ) -> None:
        self.tick = timeout / ticks
        """Seconds between calls of `advance`."""
        self.ticks_per_minute = math.ceil(60 / self.tick)
        self._timeout = ticks
        self._monotonic = monotonic
        self._start = monotonic()
        self._slots: list[set[Watched]] = [set() for _ in range(ticks + 2)]
        self.now = 0
        """The present tick."""

    def add(self, member: Watched) -> None:
        """Watch a member, heard just now."""
        member.last_seen = self.now
        self._put(member, self.now + self._timeout + 1)

    def discard(self, member: Watched) -> None:
        """Forget a member."""
        if member.wheel_slot >= 0:
            self._slots[member.wheel_slot].discard(member)
            member.wheel_slot = -1

    def advance(self) -> list[Watched]:
        """Move to the present. Returns the members that are due; they are forgotten."""
        due: list[Watched] = []
        present = int((self._monotonic() - self._start) / self.tick)
        while self.now < present:
            self.now += 1
            slot = self.now % len(self._slots)
            members, self._slots[slot] = self._slots[slot], set()
            for member in members:
                when = member.last_seen + self._timeout + 1
                if when <= self.now:
                    member.wheel_slot = -1
                    due.append(member)
                else:
                    self._put(member, when)
        return due

    def _put(self, member: Watched, when: int) -> None:
        slot = when % len(self._slots)
        self._slots[slot].add(member)
        member.wheel_slot = slot
