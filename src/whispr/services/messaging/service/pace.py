"""How fast messages may come, counted in this process: the hot path cannot wait for a shared counter.

What is busy here is told to the other nodes every second through Valkey, so that whoever spreads over nodes gains little.
While Valkey is away each node counts by itself.
"""

from __future__ import annotations

import asyncio
from typing import Final
from uuid import UUID

import msgspec

from whispr.kit.cache import LOST_CACHE, Cache
from whispr.kit.clock import Clock
from whispr.kit.errors import RateLimited
from whispr.kit.telemetry import metrics

SHARE_SECONDS: Final = 1.0

_MAX_KEYS: Final = 50_000
_TOLD_AT_ONCE: Final = 2_000


class _Use:
    """What one key has used. `arrival`: when the next one would be on time; `fresh`: not told to the others yet."""

    __slots__ = ("arrival", "fresh")

    def __init__(self, arrival: float) -> None:
        self.arrival = arrival
        self.fresh = 0


class Limit:
    """At most `rate` a second in the long run, `burst` at once (GCRA). Keys are the integers of ids: they hash fast."""

    __slots__ = ("_busy", "_interval", "_name", "_slack", "_uses", "_worth_telling")

    def __init__(self, name: str, rate: float, burst: int) -> None:
        self._name = name
        self._uses: dict[int, _Use] = {}
        self._busy: dict[int, _Use] = {}
        self._interval = self._slack = 0.0
        self.change(rate, burst)

    def change(self, rate: float, burst: int) -> None:
        """From now on, and for everybody anew: what was used up under a limit set too low would outlast it."""
        interval, slack = 1 / rate, burst / rate
        if (interval, slack) == (self._interval, self._slack):
            return
        self._interval, self._slack = interval, slack
        self._uses.clear()
        self._busy.clear()
        # Nobody needs to hear of a person who would have to be on eight nodes to be too fast.
        self._worth_telling = max(1, int(min(rate * SHARE_SECONDS, burst) / 8))

    def admit(self, key: int, now: float) -> _Use:
        """Where to `take` one. Raises `RateLimited` with the seconds to wait and the limit's name."""
        use = self._uses.get(key)
        if use is None:
            use = self._begin(key, now)
        elif use.arrival < now:
            use.arrival = now
        wait = use.arrival + self._interval - now - self._slack
        # A rounding error of the clock is not a message too many.
        if wait > 1e-6:
            metrics.rate_limited.labels(name=self._name).inc()
            raise RateLimited(retry_after=round(max(wait, 0.1), 1), limit=self._name)
        return use

    def take(self, key: int, use: _Use) -> None:
        """Count one."""
        use.arrival += self._interval
        use.fresh += 1
        if use.fresh == self._worth_telling:
            self._busy[key] = use

    def _begin(self, key: int, now: float) -> _Use:
        if len(self._uses) >= _MAX_KEYS:
            # Whoever is on time is as good as never seen; if nobody is, the first half is forgiven.
            late = {at: use for at, use in self._uses.items() if use.arrival > now}
            self._uses = late if len(late) < _MAX_KEYS // 2 else dict(list(late.items())[_MAX_KEYS // 2 :])
        use = self._uses[key] = _Use(now)
        return use

    def tell(self) -> list[tuple[bytes, int, int, _Use]]:
        """The name, interval in microseconds and number of what the others should hear of."""
        told = []
        interval = int(self._interval * 1e6)
        for key in list(self._busy)[:_TOLD_AT_ONCE]:
            use = self._busy.pop(key)
            # A changed rate begins anew for the others, too.
            name = f"messaging:pace:{self._name}:{interval}:{key:032x}".encode()
            told.append((name, interval, use.fresh, use))
            use.fresh = 0
        return told


class Pace:
    """One limit of what a device asks for."""

    def __init__(self, clock: Clock, *, rate: float, burst: int, name: str = "device") -> None:
        self._clock = clock
        self._limit = Limit(name, rate, burst)
        self.change = self._limit.change

    def count(self, device_id: UUID) -> None:
        """Count one. Raises `RateLimited` with the seconds to wait."""
        key = device_id.int
        self._limit.take(key, self._limit.admit(key, self._clock.time()))


class Rate(msgspec.Struct, frozen=True):
    """At most `rate` a second in the long run, `burst` at once."""

    rate: float
    burst: int


# As kit.cache's limiter, for several at once: the key holds when the next one would be on time, by the server's clock.
# Returns how far ahead of now that is.
_TELL = """
local now = redis.call('TIME')
local t = now[1] * 1000000 + now[2]
local arrival = tonumber(redis.call('GET', KEYS[1]) or t)
if arrival < t then arrival = t end
arrival = arrival + ARGV[1] * ARGV[2]
redis.call('SET', KEYS[1], string.format('%.0f', arrival), 'PX', math.ceil((arrival - t) / 1000) + 1)
return string.format('%.0f', arrival - t)
"""


class SendingPace:
    """The four limits of sending: of a device, of a person, of a person in one conversation, of a conversation.

    `run()` is its supervised loop. The limit of a device is not told to other nodes: a device is on one.
    """

    def __init__(
        self, clock: Clock, cache: Cache, *, device: Rate, user: Rate, member: Rate, conversation: Rate
    ) -> None:
        self._clock = clock
        self._cache = cache
        self._script = cache.client.register_script(_TELL)
        self.device = Limit("device", device.rate, device.burst)
        self.user = Limit("user", user.rate, user.burst)
        self.member = Limit("member", member.rate, member.burst)
        self.conversation = Limit("conversation", conversation.rate, conversation.burst)

    def count(self, device_id: UUID, user_id: UUID, conversation_id: UUID) -> None:
        """Count one message. Raises `RateLimited` with the seconds to wait and the name of the `limit`."""
        now = self._clock.time()
        device, user, conversation = device_id.int, user_id.int, conversation_id.int
        member = user ^ conversation
        of_device = self.device.admit(device, now)
        of_user = self.user.admit(user, now)
        of_member = self.member.admit(member, now)
        of_conversation = self.conversation.admit(conversation, now)
        # Not before all have admitted it: what one limit refuses must not use up the others.
        self.device.take(device, of_device)
        self.user.take(user, of_user)
        self.member.take(member, of_member)
        self.conversation.take(conversation, of_conversation)

    async def run(self) -> None:
        """Tell and hear, for ever."""
        while True:
            await asyncio.sleep(SHARE_SECONDS)
            await self.share()

    async def share(self) -> None:
        """Tell the other nodes what is busy here, and hear what of it is busy there."""
        told = [*self.user.tell(), *self.member.tell(), *self.conversation.tell()]
        if not told:
            return
        try:
            async with self._cache.client.pipeline(transaction=False) as pipe:
                for name, interval, count, _ in told:
                    await self._script(keys=[name], args=[interval, count], client=pipe)
                answers = await pipe.execute()
        except LOST_CACHE:
            # Each node for itself meanwhile.
            metrics.cache_failures.inc()
            return
        now = self._clock.time()
        for (_, _, _, use), ahead in zip(told, answers, strict=True):
            # What came in over a second was told all at once, and looks that much ahead.
            use.arrival = max(use.arrival, now + int(ahead) / 1e6 - SHARE_SECONDS)
