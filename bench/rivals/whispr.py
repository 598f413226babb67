"""Whispr itself as one of those compared: signed messages, an envelope for the other device, past the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from uuid import UUID

import httpx

from bench.instance import Instance
from bench.load import (
    Device,
    Person,
    connect,
    gather_bounded,
    open_conversation,
    register_many,
    signed_payload,
)

_EVENT = slice(63, 74)


class WhisprTalk:
    """The pairs. What is sent has been signed before, as far as `prepare` went."""

    def __init__(self, ends: list[tuple[Person, Person, str, Device, Device]]) -> None:
        self.pairs = len(ends)
        self.delivered: Callable[[int], None] = lambda number: None
        self._ends = ends
        self._ready: dict[int, bytes] = {}
        for _, _, _, _, listening in ends:
            listening.on_frame = self._on_frame

    def prepare(self, first: int, count: int) -> None:
        """Sign the next `count` messages of each pair, from the round `first` on."""
        numbers = range(first * self.pairs, (first + count) * self.pairs)
        self._ready = {number: self._frame(number) for number in numbers}

    def send(self, number: int) -> None:
        frame = self._ready.pop(number, b"") or self._frame(number)
        self._ends[number % self.pairs][3].send(frame)

    def _frame(self, number: int) -> bytes:
        sender, other, conversation, _, _ = self._ends[number % self.pairs]
        _, payload = signed_payload(sender, conversation, [other.device_id], client_id=UUID(int=number))
        return b'["1","%d","conversation:%s","new_message",%s]' % (number, conversation.encode(), payload)

    def _on_frame(self, data: bytes) -> None:
        if data[_EVENT] == b"new_message":
            start = data.find(b'"client_id":"') + 13
            self.delivered(UUID(data[start : start + 36].decode()).int)


@asynccontextmanager
async def talking(instance: Instance, pairs: int) -> AsyncIterator[WhisprTalk]:
    """The instance, with everybody joined."""
    people = await register_many(instance.url, 2 * pairs)
    couples = list(zip(people[::2], people[1::2], strict=True))
    async with httpx.AsyncClient(timeout=60) as http:
        conversations = await gather_bounded(
            [partial(open_conversation, http, instance.url, one, [two]) for one, two in couples]
        )
    url = instance.socket_url(direct=True)
    ends = []
    for (one, two), conversation in zip(couples, conversations, strict=True):
        devices = [await connect(url, person.token) for person in (one, two)]
        for device in devices:
            await device.join(f"conversation:{conversation}", ref="1")
        ends.append((one, two, conversation, devices[0], devices[1]))
    yield WhisprTalk(ends)
    for _, _, _, sending, listening in ends:
        sending.drop()
        listening.drop()
