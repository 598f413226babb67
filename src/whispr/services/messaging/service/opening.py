"""What a device is told when it opens a conversation: what it missed since its cursor, and who is there."""

from __future__ import annotations

from uuid import UUID

import msgspec

from whispr.kit.db import Database
from whispr.services.messaging.models import (
    ConversationNotFound,
    EventsPage,
    Membership,
    MemberView,
    NotAMember,
)
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.history import History
from whispr.services.messaging.service.privacy import ReadReceipts
from whispr.services.messaging.store import members as store

RECOVERED_EVENTS = 200
"""How much of what was missed a join brings; the rest is fetched with `sync`."""

NEWEST_EVENTS = 50
"""What a device gets that has no cursor, or one that means nothing here."""

SMALL_GROUP = 100
"""Up to this many members, all are listed on opening and hear of each other's typing, presence and receipts."""


class Cursor(msgspec.Struct, frozen=True):
    """How far a device got: the last `seq` it has, in the database incarnation `epoch`."""

    epoch: UUID
    seq: int


class Opening(msgspec.Struct, frozen=True):
    """The state of a conversation at one moment. `members` is None in larger groups.

    `recovered`: `page` continues the cursor without a hole. Otherwise it is the newest events.
    """

    membership: Membership
    page: EventsPage
    recovered: bool
    members: list[MemberView] | None
    member_ids: frozenset[UUID]


class Openings:
    """Reads what a join answers with. Membership comes from PostgreSQL, never from a cache."""

    def __init__(
        self, db: Database, directory: Directory, history: History, read_receipts: ReadReceipts
    ) -> None:
        self._db = db
        self._directory = directory
        self._history = history
        self._read_receipts = read_receipts

    async def membership(self, conversation_id: UUID, user_id: UUID) -> Membership:
        """Raises `NotAMember`, also when there is no such conversation."""
        try:
            return await self._directory.reader(conversation_id, user_id)
        except ConversationNotFound:
            raise NotAMember from None

    async def open(self, conversation_id: UUID, user_id: UUID, cursor: Cursor | None) -> Opening:
        """Raises `NotAMember`, also when there is no such conversation."""
        membership = await self.membership(conversation_id, user_id)
        page, recovered = await self._page(membership, cursor)
        conversation = await self._directory.get(conversation_id)
        members = None
        if len(conversation.members) <= SMALL_GROUP:
            async with self._db.connection() as connection:
                rows = await store.list_active(connection, [conversation_id])
            members = await self._read_receipts.mask([row.view() for row in rows], user_id)
        return Opening(membership, page, recovered, members, frozenset(conversation.members))

    async def _page(self, membership: Membership, cursor: Cursor | None) -> tuple[EventsPage, bool]:
        if cursor is not None and cursor.epoch == await self._history.epoch():
            page = await self._history.events(membership, after_seq=cursor.seq, limit=RECOVERED_EVENTS)
            # A cursor ahead of the log is from a life of this database that a backup has undone.
            if cursor.seq <= page.head_seq:
                return page, True
        head = (await self._history.heads([membership.conversation_id])).get(membership.conversation_id, 0)
        newest = max(0, head - NEWEST_EVENTS)
        return await self._history.events(
            membership, after_seq=newest, until_seq=head, limit=NEWEST_EVENTS
        ), False
