"""The connections of one generator process: they join, beat, send and listen."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from picows import WSError

from bench.fleet import Fleet
from bench.load import Device, Person, Refused, connect, gather_bounded
from bench.stream import Offer, Sender, Stream, Taken, described, merged

HEARTBEAT = b'[null,"h","phoenix","heartbeat",{}]'
HEARTBEAT_SECONDS = 30.0
_SLOTS = 300

_TRIES = 20
_PASSING = frozenset(
    {"neighbour_unavailable", "database_unavailable", "unavailable", "timeout", "overloaded"}
)


@dataclass(slots=True)
class Seat:
    """A connection to make: who, in which conversation, from which address of 127.0.0.0/8.

    `sends`: it is among the senders, with an envelope for each of `devices` or a shared ciphertext; else it listens.
    """

    person: Person
    conversation: str
    address: str
    sends: bool = False
    devices: list[str] | None = None


def address_of(number: int, per_address: int = 10_000) -> str:
    """A source address for the connection `number`: 28,000 ports are all that one address has for one server port."""
    return f"127.{1 + number // per_address // 250}.{1 + number // per_address % 250}.1"


def spread(seats: list[Seat], processes: int) -> list[list[Seat]]:
    """The seats by process; those of one conversation stay together, so that deliveries are heard where they are sent."""
    by_conversation: dict[str, list[Seat]] = {}
    for seat in seats:
        by_conversation.setdefault(seat.conversation, []).append(seat)
    shares: list[list[Seat]] = [[] for _ in range(processes)]
    for number, together in enumerate(by_conversation.values()):
        shares[number % processes] += together
    return shares


class Crowd:
    """`index` of `count` processes, with its `seats`."""

    def __init__(self, url: str, seats: list[Seat], index: int, count: int) -> None:
        self._url = url
        self._seats = seats
        self._index = index
        self._count = count
        self._devices: list[tuple[Seat, Device]] = []
        self._beating: asyncio.Task[None] | None = None
        self._stream: Stream | None = None

    async def join(self, width: int, with_user_topic: bool) -> list[float]:
        """Connect and join everything, `width` at a time; milliseconds each connection took until it was joined."""
        # Those that have joined must beat while the rest still joins, or the server would close them as dead.
        self._beating = asyncio.create_task(self._beat())
        return await gather_bounded([_joiner(self, seat, with_user_topic) for seat in self._seats], width)

    async def join_one(self, seat: Seat, with_user_topic: bool) -> float:
        started = time.monotonic()
        device = await _connect(self._url, seat)
        if with_user_topic:
            await _join(device, f"user:{seat.person.user_id}", "2")
        await _join(device, f"conversation:{seat.conversation}", "1")
        self._devices.append((seat, device))
        return (time.monotonic() - started) * 1000

    async def alive(self) -> int:
        """How many connections are open."""
        return sum(not device.closed.done() for _, device in self._devices)

    async def ended(self) -> Counter[int]:
        """How many connections are closed, by the code they were closed with; 0: without one."""
        return Counter(device.close_code for _, device in self._devices if device.closed.done())

    async def prepare(self, rate: float, seconds: float, tag: int) -> None:
        """Make the messages of an offer, of which this process sends its share."""
        listeners = Counter(seat.conversation for seat, _ in self._devices if not seat.sends)
        senders = [
            Sender(seat.person, device, seat.conversation, seat.devices, listeners[seat.conversation])
            for seat, device in self._devices
            if seat.sends
        ]
        self._stream = stream = Stream(Offer(rate, seconds, tag), self._index, self._count, senders)
        stream.prepare()
        for seat, device in self._devices:
            device.on_frame = stream.heard_by_sender if seat.sends else stream.heard

    async def start(self, at: float) -> None:
        """Begin to send at the monotonic time `at`; returns when everything is sent."""
        assert self._stream is not None
        await self._stream.send(at)

    async def missing(self) -> int:
        """How many deliveries of what was sent have not been seen yet."""
        assert self._stream is not None
        taken = self._stream.taken
        return taken.expected - len(taken.delivered)

    async def taken(self) -> Taken:
        """What was seen of the present offer so far."""
        assert self._stream is not None
        return self._stream.taken

    async def _beat(self) -> None:
        """A heartbeat of each device every period, spread evenly over it; of a new one within the first."""
        began, beaten = time.monotonic(), 0
        while True:
            await asyncio.sleep(0.1)
            upto = int((time.monotonic() - began) / HEARTBEAT_SECONDS * _SLOTS)
            for slot in range(beaten, upto):
                for _, device in self._devices[slot % _SLOTS :: _SLOTS]:
                    if not device.closed.done():
                        with suppress(OSError):
                            device.send(HEARTBEAT)
            beaten = upto


def _joiner(crowd: Crowd, seat: Seat, with_user_topic: bool) -> Callable[[], Any]:
    return lambda: crowd.join_one(seat, with_user_topic)


async def run_offer(fleet: Fleet, offer: Offer, patience: float = 15) -> dict[str, Any]:
    """Offer messages through the crowds of `fleet`; the row that describes what came of it."""
    await fleet.call("prepare", offer.rate, offer.seconds, offer.tag)
    await fleet.call("start", time.monotonic() + 0.5)
    deadline = time.monotonic() + patience
    while sum(await fleet.call("missing")) > 0 and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return described(offer, merged(await fleet.call("taken")))


async def _connect(url: str, seat: Seat) -> Device:
    for attempt in range(_TRIES):
        try:
            return await connect(url, seat.person.token, seat.address)
        except (OSError, WSError, TimeoutError):
            if attempt == _TRIES - 1:
                raise
            await _pause(attempt)
    raise AssertionError("the last try returns or raises")


async def _join(device: Device, topic: str, ref: str) -> None:
    """Join as clients do: a server that has too much to do is asked again, with growing pauses."""
    for attempt in range(_TRIES):
        try:
            await device.join(topic, ref)
            return
        except Refused as refusal:
            if refusal.reason not in _PASSING or attempt == _TRIES - 1:
                raise
            await _pause(attempt)


async def _pause(attempt: int) -> None:
    await asyncio.sleep(random.uniform(0, min(15.0, 0.5 * 2**attempt)))
