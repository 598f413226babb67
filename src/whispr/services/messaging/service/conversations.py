"""Making, showing, changing, leaving and closing conversations."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from whispr.kit.cache import RateLimiter
from whispr.kit.db import Connection
from whispr.kit.ids import uuid7
from whispr.services.messaging.models import (
    MAX_MEMBERS,
    CommittedEvent,
    ConversationClosed,
    ConversationNotFound,
    ConversationRow,
    ConversationType,
    ConversationView,
    IdempotencyConflict,
    InvalidMembers,
    MemberRow,
    NotAGroup,
    NotAllowed,
    Role,
    TooManyMembers,
    check_document,
)
from whispr.services.messaging.service.members import Members
from whispr.services.messaging.service.privacy import ReadReceipts, without_marks, without_reading
from whispr.services.messaging.service.structure import Structure, describe, require
from whispr.services.messaging.store import conversations as store
from whispr.services.messaging.store import members as member_store
from whispr.services.messaging.store import views
from whispr.services.messaging.store.expiry import set_retention

CREATIONS_PER_HOUR = 200
"""By one person. Whoever has a reason to start more at once is writing to strangers."""


CHANGES_PER_HOUR = 300
"""Of metadata, permissions and retention by one person: each is told to everybody in the conversation."""


class Conversations:
    """CONVERSATION, as a person makes, sees and changes it."""

    def __init__(
        self, structure: Structure, members: Members, read_receipts: ReadReceipts, limiter: RateLimiter
    ) -> None:
        self._structure = structure
        self._limiter = limiter
        self._members = members
        self._read_receipts = read_receipts
        self._db = structure.db

    async def create(
        self,
        creator_id: UUID,
        conversation_type: ConversationType,
        member_ids: Sequence[UUID],
        metadata: dict[str, Any],
        idempotency_key: str | None,
    ) -> tuple[ConversationView, bool]:
        """The conversation as its creator sees it, and whether it is new.

        There is one direct conversation of two people, ever; a group is made once per Idempotency-Key. Raises
        `InvalidMembers`, `TooManyMembers`, `UnknownUser`, `Blocked`, `ContactsOnly`, `IdempotencyConflict`,
        `InvalidDocument`, `DocumentTooLarge`, `RateLimited`.
        """
        check_document(metadata)
        await self._limiter.check("conversations", str(creator_id), CREATIONS_PER_HOUR, 3600)
        others = [user_id for user_id in dict.fromkeys(member_ids) if user_id != creator_id]
        if len(others) + 1 > MAX_MEMBERS:
            raise TooManyMembers(limit=MAX_MEMBERS)
        if conversation_type is ConversationType.DIRECT:
            if len(others) != 1:
                raise InvalidMembers("A direct conversation is with exactly one other person.")
            conversation_id, is_new = await self._create_direct(creator_id, others[0], metadata)
        else:
            conversation_id, is_new = await self._create_group(creator_id, others, metadata, idempotency_key)
        return await self.get(conversation_id, creator_id), is_new

    async def _create_direct(
        self, creator_id: UUID, peer_id: UUID, metadata: dict[str, Any]
    ) -> tuple[UUID, bool]:
        key = ":".join(sorted((str(creator_id), str(peer_id))))
        async with self._db.connection() as connection:
            existing = await store.find_direct(connection, key)
        if existing is None:
            await self._structure.approach(creator_id, [peer_id], "message")
            conversation_id = uuid7()
            now = self._structure.clock.now()
            async with self._db.transaction() as tx:
                is_new = await store.insert(
                    tx, conversation_id, ConversationType.DIRECT, creator_id, metadata, now, direct_key=key
                )
                if is_new:
                    roles = [(creator_id, Role.MEMBER), (peer_id, Role.MEMBER)]
                    await member_store.insert_founders(tx, conversation_id, roles, now)
                else:
                    existing = await store.find_direct(tx, key)
            if is_new:
                await self._announce_new(conversation_id)
                return conversation_id, True
        assert existing is not None
        async with self._db.connection() as connection:
            await member_store.unhide(connection, existing, creator_id)
        return existing, False

    async def _create_group(
        self, creator_id: UUID, others: Sequence[UUID], metadata: dict[str, Any], idempotency_key: str | None
    ) -> tuple[UUID, bool]:
        key = f"{creator_id}:{idempotency_key}" if idempotency_key is not None else None
        digest = hashlib.sha256(msgspec.json.encode([sorted(others), metadata], order="sorted")).digest()
        existing = await self._find_created(key, digest, creator_id)
        if existing is not None:
            return existing, False
        await self._structure.approach(creator_id, others, "group")
        conversation_id = uuid7()
        now = self._structure.clock.now()
        async with self._db.transaction() as tx:
            is_new = await store.insert(
                tx,
                conversation_id,
                ConversationType.GROUP,
                creator_id,
                metadata,
                now,
                creation_key=key,
                creation_digest=digest,
            )
            if is_new:
                roles = [(creator_id, Role.OWNER), *((user_id, Role.MEMBER) for user_id in others)]
                await member_store.insert_founders(tx, conversation_id, roles, now)
                await self._structure.tell_people(
                    tx, conversation_id, "conversation_added", 0, creator_id, others
                )
        if not is_new:
            existing = await self._find_created(key, digest, creator_id)
            assert existing is not None
            return existing, False
        await self._announce_new(conversation_id)
        return conversation_id, True

    async def _find_created(self, key: str | None, digest: bytes, creator_id: UUID) -> UUID | None:
        if key is None:
            return None
        async with self._db.connection() as connection:
            found = await store.find_created(connection, key)
            if found is None:
                return None
            conversation_id, first_digest = found
            if first_digest != digest:
                raise IdempotencyConflict
            if await member_store.find_active(connection, conversation_id, creator_id) is None:
                raise IdempotencyConflict("You have left the conversation that this Idempotency-Key made.")
        return conversation_id

    async def _announce_new(self, conversation_id: UUID) -> None:
        async with self._db.connection() as connection:
            row = await store.get(connection, conversation_id)
            members = await member_store.list_active(connection, [conversation_id])
        assert row is not None
        self._structure.announce(row, members, [member.user_id for member in members])
        await self._structure.committed(conversation_id, [])

    async def get(self, conversation_id: UUID, user_id: UUID) -> ConversationView:
        """One conversation with all its members. Raises `ConversationNotFound`, also for strangers."""
        async with self._db.connection() as connection:
            view = await views.view(connection, conversation_id, user_id)
        if view is None:
            raise ConversationNotFound
        return (await self._mask([view], user_id))[0]

    async def list_page(
        self, user_id: UUID, before: tuple[datetime, UUID] | None, limit: int
    ) -> tuple[list[ConversationView], tuple[datetime, UUID] | None]:
        """A person's conversations, latest activity first, and where the next page begins (None at the end)."""
        async with self._db.connection() as connection:
            found = await views.list_views(connection, user_id, before, limit + 1)
        page = await self._mask(found[:limit], user_id)
        following = (page[-1].updated_at, page[-1].id) if len(found) > limit else None
        return page, following

    async def _mask(self, shown: Sequence[ConversationView], user_id: UUID) -> list[ConversationView]:
        people = {member.user_id for view in shown for member in view.members or ()}
        hidden = await self._read_receipts.hidden(people - {user_id})
        apart = await self._read_receipts.apart(user_id, people - {user_id})
        return [
            msgspec.structs.replace(
                view, members=view.members and without_marks(without_reading(view.members, hidden), apart)
            )
            for view in shown
        ]

    async def change(
        self,
        conversation_id: UUID,
        user_id: UUID,
        metadata: dict[str, Any] | None,
        settings: dict[str, Any] | None,
        permissions: Mapping[str, Role] | None = None,
        retention_seconds: int | msgspec.UnsetType | None = msgspec.UNSET,
    ) -> ConversationView:
        """Replace the conversation's metadata or retention (whom the permissions allow it), some of a group's permissions
        (its owner alone: nobody lifts a limit that is on themselves), or the person's own settings; None leaves it.

        With a retention of None messages are kept as long as this server keeps any.

        Raises `ConversationNotFound`, `NotAGroup`, `NotAllowed`, `ConversationClosed`, `Blocked`, `ContactsOnly`,
        `InvalidDocument`, `DocumentTooLarge`, `RateLimited`.
        """
        for document in (metadata, settings):
            if document is not None:
                check_document(document)
        if metadata is not None or permissions or retention_seconds is not msgspec.UNSET:
            await self._limiter.check("conversation_changes", str(user_id), CHANGES_PER_HOUR, 3600)
            await self._ensure_told(conversation_id, user_id)
        events: list[CommittedEvent] = []
        async with self._db.transaction() as tx:
            row, actor = await self._structure.lock(tx, conversation_id, user_id)
            if settings is not None:
                await member_store.set_settings(tx, conversation_id, user_id, settings)
            changed = row
            if metadata is not None and metadata != row.metadata:
                require(row, actor, "edit_metadata")
                await store.update_metadata(tx, conversation_id, metadata)
                changed = msgspec.structs.replace(changed, metadata=metadata)
            if retention_seconds is not msgspec.UNSET and retention_seconds != row.retention_seconds:
                require(row, actor, "edit_metadata")
                await set_retention(tx, conversation_id, retention_seconds)
                changed = msgspec.structs.replace(changed, retention_seconds=retention_seconds)
            if permissions:
                changed = await _change_permissions(tx, changed, actor, permissions)
            if changed != row:
                payload = describe(changed, user_id)
                events.append(
                    await store.append_event(
                        tx, conversation_id, "conversation_updated", payload, self._structure.clock.now()
                    )
                )
        if events:
            await self._structure.committed(conversation_id, events)
        return await self.get(conversation_id, user_id)

    async def _ensure_told(self, conversation_id: UUID, user_id: UUID) -> None:
        """What is changed in a direct conversation is told to the other one, so it takes as much as a message does."""
        async with self._db.connection() as connection:
            row = await store.get(connection, conversation_id)
            if row is None or row.type is not ConversationType.DIRECT:
                return
            people = await member_store.active_ids(connection, conversation_id)
        if user_id in people:
            others = [other for other in people if other != user_id]
            await self._structure.ensure_contactable(user_id, others, "message")

    async def remove(self, conversation_id: UUID, user_id: UUID) -> None:
        """Leave a group, or as its owner close it; take a direct or closed conversation out of the own list.

        A direct conversation comes back with the next thing that happens in it, or when it is made again: two people
        have one for good, and nobody can take the other's history away. Raises `ConversationNotFound`.
        """
        async with self._db.connection() as connection:
            row = await store.get(connection, conversation_id)
            member = await member_store.find_active(connection, conversation_id, user_id)
        if row is None or member is None:
            raise ConversationNotFound
        if row.type is ConversationType.GROUP and member.role is not Role.OWNER:
            await self._members.remove(conversation_id, user_id, user_id)
            return
        events: list[CommittedEvent] = []
        async with self._db.transaction() as tx:
            row, member = await self._structure.lock(tx, conversation_id, user_id)
            head = row.last_seq
            if row.type is ConversationType.GROUP:
                if member.role is not Role.OWNER:
                    # Handed over a moment ago: a member who is not the owner any more closes nothing.
                    raise NotAllowed
                if row.is_active:
                    events.append(await self._structure.close(tx, row, user_id))
                    head = events[-1].seq
            await member_store.hide(tx, conversation_id, user_id, head)
        self._structure.announce_removal(conversation_id, [user_id], "closed" if events else "hidden")
        if events:
            await self._structure.committed(conversation_id, events)


async def _change_permissions(
    tx: Connection, row: ConversationRow, actor: MemberRow, wanted: Mapping[str, Role]
) -> ConversationRow:
    if row.type is not ConversationType.GROUP:
        raise NotAGroup
    permissions = msgspec.structs.replace(row.permissions, **wanted)
    if permissions == row.permissions:
        return row
    if not row.is_active:
        raise ConversationClosed
    if actor.role is not Role.OWNER:
        raise NotAllowed("Only the owner says who may do what.")
    await store.set_permissions(tx, row.id, permissions)
    return msgspec.structs.replace(row, permissions=permissions)
