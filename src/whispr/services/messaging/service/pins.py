"""Messages that a conversation keeps in view."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final
from uuid import UUID

from whispr.kit.db import Connection
from whispr.services.messaging.models import (
    Actor,
    CommittedEvent,
    Membership,
    MessageDeleted,
    Pin,
    TooManyPins,
)
from whispr.services.messaging.service.changes import hold, require_seen
from whispr.services.messaging.service.sending import Sending
from whispr.services.messaging.service.structure import Structure, require
from whispr.services.messaging.store import changes, conversations
from whispr.services.messaging.store import pins as store

MAX_PINS: Final = 100
"""In one conversation."""


class Pins:
    """In groups, those whom the permissions allow it; in direct conversations, both."""

    def __init__(self, structure: Structure, sending: Sending) -> None:
        self._structure = structure
        self._sending = sending

    async def pin(self, actor: Actor, conversation_id: UUID, message_id: UUID) -> int | None:
        """Pin a message; the event's `seq` if there had to be one.

        Raises `NotAMember`, `ConversationClosed`, `NotAllowed`, `Blocked`, `ContactsOnly`, `MessageNotFound`,
        `MessageDeleted`, `TooManyPins`, `RateLimited`, `Unavailable`.
        """
        self._sending.count(actor.device_id, actor.user_id, conversation_id)
        await self._sending.ensure_open(conversation_id, actor.user_id)
        now = self._structure.clock.now()
        async with self._structure.db.transaction() as tx:
            await self._require_may(tx, actor, conversation_id, message_id, now)
            if await store.is_pinned(tx, conversation_id, message_id):
                return None
            if await store.count(tx, conversation_id) >= MAX_PINS:
                raise TooManyPins(limit=MAX_PINS)
            await store.insert(tx, conversation_id, message_id, actor.user_id, now)
            payload = {"message_id": message_id, "user_id": actor.user_id, "pinned_at": now}
            event = await conversations.append_event(tx, conversation_id, "message_pinned", payload, now)
        return self._told(event)

    async def unpin(self, actor: Actor, conversation_id: UUID, message_id: UUID) -> int | None:
        """Unpin a message; the event's `seq` if there had to be one.

        Raises `NotAMember`, `ConversationClosed`, `NotAllowed`, `MessageNotFound`, `RateLimited`, `Unavailable`.
        """
        self._sending.count(actor.device_id, actor.user_id, conversation_id)
        now = self._structure.clock.now()
        async with self._structure.db.transaction() as tx:
            try:
                await self._require_may(tx, actor, conversation_id, message_id, now)
            except MessageDeleted:
                return None
            if not await store.delete(tx, conversation_id, message_id):
                return None
            payload: dict[str, Any] = {"message_id": message_id, "user_id": actor.user_id}
            event = await conversations.append_event(tx, conversation_id, "message_unpinned", payload, now)
        return self._told(event)

    async def list_page(
        self, membership: Membership, before: tuple[datetime, UUID] | None, limit: int
    ) -> tuple[list[Pin], tuple[datetime, UUID] | None]:
        """Pinned messages the person may see, the latest pinned first, and where the next page begins."""
        async with self._structure.db.connection() as connection:
            found = await store.list_page(
                connection, membership.conversation_id, membership.user_id, before, limit + 1
            )
        page = found[:limit]
        following = (page[-1].pinned_at, page[-1].message.head.id) if len(found) > limit else None
        return page, following

    async def _require_may(
        self, tx: Connection, actor: Actor, conversation_id: UUID, message_id: UUID, now: datetime
    ) -> None:
        row, member = await hold(self._structure, tx, conversation_id, actor.user_id)
        require(row, member, "pin")
        target = (await changes.targets(tx, conversation_id, [message_id])).get(message_id)
        require_seen(target, member.floor_seq, now)

    def _told(self, event: CommittedEvent) -> int:
        self._structure.publish([event])
        return event.seq
