"""Telling notification who missed what: messages and news of groups, for people without a live device."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol
from uuid import UUID

import msgspec

from whispr.kit.db import Database
from whispr.kit.outbox import Handler, OutboxRow
from whispr.services.messaging.models import Announcement, GroupNews
from whispr.services.messaging.service.structure import GROUP_EVENT
from whispr.services.messaging.store import announcing as store

MESSAGE_SENT = "message_sent"
"""Topic of the rows that tell of messages: ranges of `seq`, one row for each batch that was stored."""

MAX_EVENTS = 500
MAX_RECIPIENTS = 20_000


class Notifications(Protocol):
    """The part of notification this needs."""

    async def publish(self, announcements: Sequence[Announcement]) -> None:
        """Hand over announcements; the same one twice is told once."""


class Online(Protocol):
    """The part of presence this needs."""

    async def online(self, user_ids: Collection[UUID]) -> Collection[UUID]:
        """Those of the people who have a live device on any node."""


class _Range(msgspec.Struct):
    conversation_id: UUID
    first_seq: int
    last_seq: int


class _Sent(msgspec.Struct):
    ranges: list[_Range]


class Announcing:
    """The outbox handlers. A row handled twice tells the same events again, with the same ids."""

    def __init__(self, db: Database, notifications: Notifications, online: Online) -> None:
        self._db = db
        self._notifications = notifications
        self._online = online

    def handlers(self) -> dict[str, Handler]:
        """By topic."""
        return {MESSAGE_SENT: self.messages, GROUP_EVENT: self.groups}

    async def messages(self, rows: list[OutboxRow]) -> None:
        """Tell of the messages of some batches."""
        ranges = [item for row in rows for item in msgspec.convert(row.payload, _Sent).ranges]
        ids = list({item.conversation_id for item in ranges})
        async with self._db.connection() as connection:
            sent = await store.sent_messages(
                connection,
                [item.conversation_id for item in ranges],
                [item.first_seq for item in ranges],
                [item.last_seq for item in ranges],
            )
            people = await store.audience(connection, ids)
            types = await store.types(connection, ids)
        await self._tell(
            Announcement(
                event_id=message.id,
                name="new_message",
                conversation_id=message.conversation_id,
                conversation_type=types[message.conversation_id],
                message_id=message.id,
                sender_id=message.sender_id,
                recipient_ids=tuple(
                    user_id
                    for user_id, floor in people.get(message.conversation_id, ())
                    if user_id != message.sender_id and floor < message.seq
                ),
                occurred_at=message.sent_at,
            )
            for message in sent
        )

    async def groups(self, rows: list[OutboxRow]) -> None:
        """Tell people of groups they were put into or taken out of."""
        news = [(msgspec.convert(row.payload, GroupNews), row.created_at) for row in rows]
        async with self._db.connection() as connection:
            types = await store.types(connection, [item.conversation_id for item, _ in news])
        await self._tell(
            Announcement(
                event_id=item.event_id,
                name=item.name,
                conversation_id=item.conversation_id,
                conversation_type=types[item.conversation_id],
                message_id=None,
                sender_id=item.actor_id,
                recipient_ids=item.recipient_ids,
                occurred_at=at,
            )
            for item, at in news
            if item.conversation_id in types
        )

    async def _tell(self, announcements: Iterable[Announcement]) -> None:
        all_of_them = list(announcements)
        everybody = {user_id for item in all_of_them for user_id in item.recipient_ids}
        online = frozenset(await self._online.online(everybody)) if everybody else frozenset()
        missed = [
            msgspec.structs.replace(item, recipient_ids=recipients)
            for item in all_of_them
            if (recipients := tuple(user_id for user_id in item.recipient_ids if user_id not in online))
        ]
        for chunk in _chunks(missed):
            await self._notifications.publish(chunk)


def _chunks(announcements: Sequence[Announcement]) -> Iterator[list[Announcement]]:
    # A call carries at most a few megabytes: recipients, not events, are what fills it.
    chunk: list[Announcement] = []
    recipients = 0
    for item in announcements:
        if chunk and (len(chunk) >= MAX_EVENTS or recipients + len(item.recipient_ids) > MAX_RECIPIENTS):
            yield chunk
            chunk, recipients = [], 0
        chunk.append(item)
        recipients += len(item.recipient_ids)
    if chunk:
        yield chunk
