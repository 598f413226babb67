"""Reading what happened: messages, the dense log, and what a device has not acknowledged."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import UUID

from whispr.kit.batching import Batcher
from whispr.kit.db import Connection, Database
from whispr.services.messaging.models import (
    CommittedEvent,
    ConversationNotFound,
    EventsPage,
    Membership,
    MessagesPage,
    UndeliveredPage,
    seen_above,
)
from whispr.services.messaging.store import conversations, members, opening
from whispr.services.messaging.store import history as store

NEW_DEVICE_WINDOW = 200
"""How many of the newest events of a conversation are pushed to a device that is new in it."""

_FIRST = UUID(int=0)
_CONVERSATIONS_AT_ONCE = 100


class History:
    """Reads of the log. Each takes the `Membership` that allows it and honours its floor.

    Raises `ConversationNotFound` if the membership has ended meanwhile.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._epoch: UUID | None = None
        self._devices_behind = Batcher(self._find_undelivered)

    async def epoch(self) -> UUID:
        """The id of the database's incarnation; cursors of another one are not recovered."""
        if self._epoch is None:
            async with self._db.connection() as connection:
                self._epoch = await conversations.read_epoch(connection)
        return self._epoch

    async def heads(self, conversation_ids: list[UUID]) -> dict[UUID, int]:
        """The `seq` of the newest event of each conversation that exists."""
        async with self._db.connection() as connection:
            return await conversations.heads(connection, conversation_ids)

    async def messages(
        self,
        membership: Membership,
        *,
        after_seq: int | None = None,
        before_seq: int | None = None,
        limit: int = 50,
    ) -> MessagesPage:
        """Up to `limit` messages in `seq` order: the first after `after_seq`, or the last before `before_seq`.

        With both, the last ones between them; with neither, the newest.
        """
        async with self._db.connection() as connection:
            membership, head = await self._place(connection, membership)
            after = max(membership.floor_seq, after_seq or 0)
            if after_seq is not None and before_seq is None:
                items = await store.messages_after(connection, membership.conversation_id, after, head, limit)
            else:
                before = head + 1 if before_seq is None else min(before_seq, head + 1)
                items = await store.messages_before(
                    connection, membership.conversation_id, after, before, limit
                )
        return MessagesPage(items, head)

    async def events(
        self, membership: Membership, *, after_seq: int, until_seq: int | None = None, limit: int = 50
    ) -> EventsPage:
        """Up to `limit` events after `after_seq`, in dense order. `more` counts up to `until_seq` or the head."""
        epoch = await self.epoch()
        async with self._db.connection() as connection:
            membership, head = await self._place(connection, membership)
            after = max(membership.floor_seq, after_seq)
            until = head if until_seq is None else min(until_seq, head)
            items = await store.log(connection, membership.conversation_id, after, until, limit)
            items = [seen_above(event, membership.floor_seq) for event in items]
        last = items[-1].seq if items else after
        return EventsPage(epoch, items, head, more=last < until)

    async def log(
        self, conversation_id: UUID, after_seq: int, until_seq: int, limit: int
    ) -> list[CommittedEvent]:
        """Events with `after_seq < seq <= until_seq`, for the delivery within the server: nobody's floor applies.

        What is purged is left out, so the first one may come later.
        """
        async with self._db.connection() as connection:
            after = max(after_seq, await conversations.purged_until(connection, conversation_id))
            return await store.log(connection, conversation_id, after, until_seq, limit)

    async def undelivered(
        self, user_id: UUID, device_id: UUID, limit: int = 50
    ) -> AsyncIterator[UndeliveredPage]:
        """Everything the device has not acknowledged, page by page, conversation by conversation.

        One page of up to `limit` events is in memory at a time, and no connection is held between pages. A person
        who is removed meanwhile gets no further page of that conversation.
        """
        after = _FIRST
        while True:
            behind = await self._devices_behind.ask((user_id, device_id, after))
            for conversation_id, from_seq, head_seq, truncated in behind:
                async for page in self._undelivered_of(
                    conversation_id, user_id, from_seq, head_seq, truncated, limit
                ):
                    yield page
            if len(behind) < _CONVERSATIONS_AT_ONCE:
                return
            after = behind[-1][0]

    async def _find_undelivered(
        self, asked: list[tuple[UUID, UUID, UUID]]
    ) -> list[list[tuple[UUID, int, int, bool]]]:
        async with self._db.connection() as connection:
            return await opening.undelivered_heads(
                connection, asked, NEW_DEVICE_WINDOW, _CONVERSATIONS_AT_ONCE
            )

    async def _undelivered_of(
        self, conversation_id: UUID, user_id: UUID, from_seq: int, head_seq: int, truncated: bool, limit: int
    ) -> AsyncIterator[UndeliveredPage]:
        while from_seq < head_seq:
            async with self._db.connection() as connection:
                member = await members.find_active(connection, conversation_id, user_id)
                if member is None:
                    return
                truncated |= member.floor_seq > from_seq
                from_seq = max(from_seq, member.floor_seq)
                items = await store.log(connection, conversation_id, from_seq, head_seq, limit)
                items = [seen_above(event, member.floor_seq) for event in items]
            if not items:
                # Numbers are dense: what is not there was purged between the two reads.
                from_seq, truncated = from_seq + limit, True
                continue
            from_seq = items[-1].seq
            yield UndeliveredPage(
                conversation_id, items, head_seq, more=from_seq < head_seq, truncated=truncated
            )

    async def _place(self, connection: Connection, membership: Membership) -> tuple[Membership, int]:
        # Read before the items: everything up to the head is committed, so the page has no hole that fills up later. And
        # read together with the membership: what comes after a removal that happens now is past this head.
        asked = membership.conversation_id, membership.user_id
        (place,) = await opening.memberships(connection, [asked])
        if place is None:
            raise ConversationNotFound
        return place
