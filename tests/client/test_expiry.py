"""Disappearing messages on the device itself, with and without the server's word."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from whispr.client.crypto.engine import Payload
from whispr.client.events import ChatMessage, Notice
from whispr.client.expiry import Expiry
from whispr.client.history import History
from whispr.client.models import Pin
from whispr.client.store import Store

ME, OTHER, CONVERSATION = uuid4(), uuid4(), uuid4()
BEGUN = datetime(2027, 1, 1, tzinfo=UTC)


class Device:
    def __init__(self, store: Store | None = None) -> None:
        self.store = store or Store()
        self.history = History(self.store)
        self.time = BEGUN.timestamp()
        self.notices: list[Notice] = []
        self.expiry = Expiry(self.store, self.history, ME, notify=self.notices.append, now=lambda: self.time)

    def keep(
        self, sender: UUID = OTHER, *, seq: int = 1, seconds: int | None = 60, start: str = "sent"
    ) -> UUID:
        message = ChatMessage(
            uuid4(),
            CONVERSATION,
            seq,
            sender,
            uuid4(),
            uuid4(),
            BEGUN,
            "text",
            "a secret",
            expires_in=seconds,
            expires_from=start,
        )
        with self.store.transaction():
            self.history.add(message)
            self.history.keep_sent(message.client_id, Payload("text", "a secret"))
            self.history.keep_franking_key(message.id, b"key")
            self.history.pin(CONVERSATION, Pin(message.id, OTHER))
            self.expiry.watch(message)
        return message.id

    def read(self, seq: int) -> None:
        with self.store.transaction():
            self.expiry.read(CONVERSATION, seq)

    def after(self, seconds: float) -> list[UUID]:
        """Which messages are gone then."""
        self.time = (BEGUN + timedelta(seconds=seconds)).timestamp()
        self.expiry.erase_due()
        return [message.id for message in self.history.messages(CONVERSATION) if message.is_deleted]


def test_from_sending_it_ends_for_both_sides_whoever_was_away() -> None:
    device = Device()
    theirs, mine, kept = device.keep(), device.keep(ME, seq=2), device.keep(seq=3, seconds=None)
    assert device.after(59.9) == []
    assert device.after(60) == [theirs, mine]
    assert {notice.payload["message_id"] for notice in device.notices} == {str(theirs), str(mine)}
    late = device.keep(seq=4)
    assert device.after(61) == [theirs, mine, late]
    assert [pin.message_id for pin in device.history.pins(CONVERSATION)] == [kept]


def test_from_reading_it_ends_after_ones_own_reading_and_ones_own_wait_for_the_server() -> None:
    device = Device()
    first, second, mine = (
        device.keep(who, seq=n, start="read") for n, who in ((1, OTHER), (2, OTHER), (3, ME))
    )
    assert device.after(1000) == []
    device.read(1)
    assert device.after(1059) == []
    device.read(3)
    device.read(3)
    assert device.after(1060) == [first]
    assert device.after(5000) == [first, second]
    assert device.history.find(mine) is not None
    # Read on another device before it came to this one.
    late = device.keep(seq=3, start="read")
    assert device.after(5059) == [first, second]
    assert late in device.after(5060)


def test_nothing_of_what_was_said_stays_in_the_store() -> None:
    device = Device()
    message_id = device.keep()
    message = device.history.find(message_id)
    assert message is not None
    device.after(60)
    assert device.history.franking_key(message_id) is None
    assert device.history.sent(message.client_id, "", edited=False) is None
    records = [
        device.store.get(space, key) or b""
        for space in ("messages", "sent_payloads", "sent_versions", "franking_keys", "pins", "expiring")
        for key in device.store.keys(space)
    ]
    assert len(records) == 1
    assert b"secret" not in b"".join(records)


async def test_the_loop_wakes_for_new_ones_and_goes_on_after_a_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("whispr.client.expiry.LOOK_AGAIN", 0.01)
    device = Device()
    loop = asyncio.create_task(device.expiry.run())
    await asyncio.sleep(0.02)
    first = device.keep()
    device.time += 60
    await gone(device, first)
    second = device.keep(seq=2, seconds=120)
    loop.cancel()
    again = Device(device.store)
    again.time += 120
    loop = asyncio.create_task(again.expiry.run())
    await gone(again, second)
    loop.cancel()


async def gone(device: Device, message_id: UUID) -> None:
    async with asyncio.timeout(5):
        while (message := device.history.find(message_id)) is None or not message.is_deleted:
            await asyncio.sleep(0.01)
