"""What a device is told when it opens a conversation: what it missed since its cursor, and who is there."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

import msgspec

from whispr.kit.batching import Batcher
from whispr.kit.db import Database
from whispr.services.messaging.models import (
    CommittedEvent,
    ConversationNotFound,
    EventsPage,
    Membership,
    MemberView,
    NotAMember,
    seen_above,
)
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.history import History
from whispr.services.messaging.service.privacy import ReadReceipts
from whispr.services.messaging.store import opening as store
from whispr.services.messaging.store.history import Span, logs

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


class _Door(msgspec.Struct, frozen=True, gc=False):
    conversation_id: UUID
    user_id: UUID
    seq: int | None


class _Inside(msgspec.Struct):
    membership: Membership
    head: int
    after: int
    recovered: bool
    limit: int
    members: list[MemberView] | None
    events: list[CommittedEvent] = []

    @property
    def span(self) -> Span:
        return Span(self.membership.conversation_id, self.after, self.head, self.limit)


class Openings:
    """Reads what a join answers with. Membership comes from PostgreSQL, never from a cache."""

    def __init__(
        self, db: Database, directory: Directory, history: History, read_receipts: ReadReceipts
    ) -> None:
        self._db = db
        self._directory = directory
        self._history = history
        self._read_receipts = read_receipts
        self._doors = Batcher(self._look, largest=50, lanes=2)

    async def membership(self, conversation_id: UUID, user_id: UUID) -> Membership:
        """Raises `NotAMember`, also when there is no such conversation."""
        try:
            return await self._directory.reader(conversation_id, user_id)
        except ConversationNotFound:
            raise NotAMember from None

    async def open(self, conversation_id: UUID, user_id: UUID, cursor: Cursor | None) -> Opening:
        """Raises `NotAMember`, also when there is no such conversation."""
        epoch = await self._history.epoch()
        seq = cursor.seq if cursor is not None and cursor.epoch == epoch else None
        inside = await self._doors.ask(_Door(conversation_id, user_id, seq))
        if inside is None:
            raise NotAMember
        last = inside.events[-1].seq if inside.events else inside.after
        page = EventsPage(epoch, inside.events, inside.head, more=last < inside.head)
        if inside.members is None:
            # A large group: the ids are enough, and a cache may have them; what is allowed was read just now.
            conversation = await self._directory.get(conversation_id)
            return Opening(inside.membership, page, inside.recovered, None, frozenset(conversation.members))
        members = await self._read_receipts.mask_for_join(inside.members, user_id)
        ids = frozenset(member.user_id for member in members)
        return Opening(inside.membership, page, inside.recovered, members, ids)

    async def _look(self, doors: list[_Door]) -> list[_Inside | None]:
        async with self._db.connection() as connection:
            asked = [(door.conversation_id, door.user_id) for door in doors]
            # The head is read first: everything up to it is committed, so no page has a hole that fills up later.
            found = await store.memberships(connection, asked)
            known = {membership.conversation_id for membership, _ in filter(None, found)}
            rooms = await store.small_rooms(connection, known, SMALL_GROUP) if known else {}
            insides = [
                None if place is None else _inside(door, *place, rooms)
                for door, place in zip(doors, found, strict=True)
            ]
            behind = [inside for inside in insides if inside is not None and inside.after < inside.head]
            for inside, events in zip(
                behind,
                await logs(connection, [inside.span for inside in behind]) if behind else [],
                strict=True,
            ):
                inside.events = [seen_above(event, inside.membership.floor_seq) for event in events]
        return insides


def _inside(
    door: _Door, membership: Membership, head: int, rooms: Mapping[UUID, list[MemberView]]
) -> _Inside:
    # A cursor ahead of the log is from a life of this database that a backup has undone.
    recovered = door.seq is not None and door.seq <= head
    after = door.seq if door.seq is not None and recovered else head - NEWEST_EVENTS
    return _Inside(
        membership,
        head,
        max(after, membership.floor_seq),
        recovered,
        RECOVERED_EVENTS if recovered else NEWEST_EVENTS,
        rooms.get(door.conversation_id),
    )
