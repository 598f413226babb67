"""Messages offered at a steady rate, and how long each took to be acknowledged and to reach the others.

A message's number is in its `client_id`, so that any generator process that gets it knows when it was due: all of them
read one monotonic clock. Rates are offered, not asked for: the clock of a message starts when it was due.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from bench.load import Device, Person, signed_payload
from bench.report import percentile

# Offsets in a frame to a channel whose join_ref has one character: ["1",null,"conversation:UUID","new_message",…
_EVENT = slice(63, 74)
_JOINED = slice(0, 4)
_REPLY = slice(4, 9)
_NUMBER = slice(24, 36)
_TAG = slice(0, 8)


@dataclass(frozen=True, slots=True)
class Offer:
    """`rate` messages a second, all processes together, for `seconds`. `tag` tells its messages from earlier ones."""

    rate: float
    seconds: float
    tag: int

    @property
    def total(self) -> int:
        return int(self.rate * self.seconds)


@dataclass(slots=True)
class Sender:
    """A device that joined `conversation` as join_ref "1". `devices`: one envelope each, None for a shared ciphertext.

    `listeners` connections get what it sends.
    """

    person: Person
    device: Device
    conversation: str
    devices: list[str] | None
    listeners: int


@dataclass(slots=True)
class Taken:
    """What one process saw of an offer. Times in milliseconds, unordered."""

    sent: int = 0
    expected: int = 0
    refused: int = 0
    acknowledged: list[float] = field(default_factory=list)
    delivered: list[float] = field(default_factory=list)


class Stream:
    """The part of one process, `share` of `shares`: it sends every message whose number falls to it, and hears all."""

    def __init__(self, offer: Offer, share: int, shares: int, senders: list[Sender]) -> None:
        self._offer = offer
        self._numbers = range(share, offer.total, shares) if senders else range(0)
        self._senders = senders
        self._frames: list[bytes] = []
        self._tag = b"%08x" % offer.tag
        self._start = 0.0
        self.taken = Taken()

    def prepare(self) -> None:
        """Sign and encode every message before the clock starts."""
        for position, number in enumerate(self._numbers):
            sender = self._senders[position % len(self._senders)]
            client_id = UUID(int=self._offer.tag << 96 | number)
            _, payload = signed_payload(
                sender.person, sender.conversation, sender.devices, client_id=client_id
            )
            self._frames.append(
                b'["1","%d","conversation:%s","new_message",%s]'
                % (number, sender.conversation.encode(), payload)
            )

    def heard_by_sender(self, data: bytes) -> None:
        """A frame to a device that sends: acknowledgements count, its own messages do not."""
        if data[_JOINED] == b'["1"' and data[_REPLY] != b",null":
            if b'"status":"ok"' in data[:200]:
                number = int(data.split(b'"', 4)[3])
                self.taken.acknowledged.append(self._late(number))
            else:
                self.taken.refused += 1

    def heard(self, data: bytes) -> None:
        """A frame to a device that only listens."""
        if data[_EVENT] != b"new_message":
            return
        start = data.find(b'"client_id":"') + 13
        client_id = data[start : start + 36]
        if client_id[_TAG] == self._tag:
            number = int(client_id[_NUMBER], 16)
            self.taken.delivered.append(self._late(number))

    def _late(self, number: int) -> float:
        return (time.monotonic() - self._start - number / self._offer.rate) * 1000

    async def send(self, start: float) -> None:
        """Send everything when it is due; message 0 is at the monotonic time `start`."""
        self._start = start
        numbers, frames, rate = self._numbers, self._frames, self._offer.rate
        position = 0
        while position < len(numbers):
            elapsed = time.monotonic() - start
            while position < len(numbers) and numbers[position] / rate <= elapsed:
                sender = self._senders[position % len(self._senders)]
                if sender.device.closed.done():
                    self.taken.refused += 1
                else:
                    sender.device.send(frames[position])
                    self.taken.expected += sender.listeners
                position += 1
            await asyncio.sleep(0.001)
        self.taken.sent = position


def merged(parts: list[Taken]) -> Taken:
    """What all processes saw together."""
    whole = Taken()
    for part in parts:
        whole.sent += part.sent
        whole.expected += part.expected
        whole.refused += part.refused
        whole.acknowledged += part.acknowledged
        whole.delivered += part.delivered
    return whole


def described(offer: Offer, taken: Taken) -> dict[str, Any]:
    """A row: rates, how many deliveries are missing, and the percentiles in milliseconds."""
    acknowledged, delivered = sorted(taken.acknowledged), sorted(taken.delivered)
    # The last delivery ends the run: a server that lags behind is not credited with the offered rate.
    ended = max((offer.seconds, *(delivered[-1:] and [delivered[-1] / 1000 + offer.seconds])))
    return {
        "offered/s": round(offer.rate),
        "deliveries/s": round(len(delivered) / ended),
        "lost": taken.expected - len(delivered),
        "refused": taken.refused,
        "ack P50 ms": percentile(acknowledged, 0.5),
        "ack P99 ms": percentile(acknowledged, 0.99),
        "delivery P50 ms": percentile(delivered, 0.5),
        "delivery P99 ms": percentile(delivered, 0.99),
    }
