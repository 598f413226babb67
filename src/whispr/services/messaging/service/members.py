"""Who joins and leaves a group, and in which role."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from whispr.kit.cache import RateLimiter
from whispr.services.messaging.models import (
    MAX_MEMBERS,
    CommittedEvent,
    ConversationClosed,
    ConversationNotFound,
    ConversationRow,
    ConversationType,
    MemberNotFound,
    MemberRow,
    MemberView,
    NotAGroup,
    NotAllowed,
    Role,
    TooManyMembers,
)
from whispr.services.messaging.service.privacy import ReadReceipts
from whispr.services.messaging.service.structure import Structure, require
from whispr.services.messaging.store import conversations
from whispr.services.messaging.store import members as store

ADDITIONS_PER_HOUR = 300
"""Requests of one person, of up to 1,000 people each."""


class Members:
    """Changes of membership, each one event or more in the conversation's order.

    Owner over admin over member: one acts upon those below and gives roles below one's own; only the owner names
    admins or hands the group over. Who may add people is among the group's permissions; a plain member who may adds
    plain members. Every rule is checked under the conversation's lock.
    """

    def __init__(self, structure: Structure, read_receipts: ReadReceipts, limiter: RateLimiter) -> None:
        self._structure = structure
        self._limiter = limiter
        self._read_receipts = read_receipts
        self._db = structure.db

    async def add(
        self, conversation_id: UUID, actor_id: UUID, user_ids: Sequence[UUID], role: Role
    ) -> tuple[list[MemberView], bool]:
        """Add people; the ones asked for as members, and whether any of them is new.

        People who are members already stay as they are, so the request can be repeated. Raises
        `ConversationNotFound`, `NotAGroup`, `ConversationClosed`, `NotAllowed`, `TooManyMembers`, `UnknownUser`,
        `Blocked`, `ContactsOnly`, `RateLimited`.
        """
        await self._limiter.check("memberships", str(actor_id), ADDITIONS_PER_HOUR, 3600)
        wanted = list(dict.fromkeys(user_ids))
        async with self._db.connection() as connection:
            row = await conversations.get(connection, conversation_id)
            actor = await store.find_active(connection, conversation_id, actor_id)
            present = set(await store.active_ids(connection, conversation_id))
        _check_may_add(row, actor, role)
        newcomers = [user_id for user_id in wanted if user_id not in present]
        if len(present) + len(newcomers) > MAX_MEMBERS:
            raise TooManyMembers(limit=MAX_MEMBERS)
        await self._structure.approach(actor_id, newcomers, "group")
        events: list[CommittedEvent] = []
        async with self._db.transaction() as tx:
            row, actor = await self._structure.lock(tx, conversation_id, actor_id)
            _check_may_add(row, actor, role)
            present = set(await store.active_ids(tx, conversation_id))
            # Whoever left between the two looks was not asked about, and is not added by this request.
            newcomers = [user_id for user_id in newcomers if user_id not in present]
            if len(present) + len(newcomers) > MAX_MEMBERS:
                raise TooManyMembers(limit=MAX_MEMBERS)
            if newcomers:
                now = self._structure.clock.now()
                changes = [
                    (
                        "member_added",
                        {"user_id": user_id, "role": role, "joined_at": now, "added_by": actor_id},
                    )
                    for user_id in newcomers
                ]
                events = await conversations.append_events(tx, conversation_id, changes, now)
                floors = [event.seq - 1 for event in events]
                await store.join(tx, conversation_id, newcomers, role, floors, now)
                await self._structure.tell_people(
                    tx, conversation_id, "member_added", events[0].seq, actor_id, newcomers
                )
        async with self._db.connection() as connection:
            row = await conversations.get(connection, conversation_id)
            rows = await store.list_active(connection, [conversation_id])
        if events:
            assert row is not None
            self._structure.announce(row, rows, newcomers)
            await self._structure.committed(conversation_id, events)
        asked = set(wanted)
        views = [member.view() for member in rows if member.user_id in asked]
        return await self._read_receipts.mask(views, actor_id), bool(events)

    async def change_role(
        self, conversation_id: UUID, actor_id: UUID, user_id: UUID, role: Role
    ) -> MemberView:
        """Give a member a role. The owner who makes somebody else owner becomes an admin.

        Raises `ConversationNotFound`, `NotAGroup`, `ConversationClosed`, `MemberNotFound`, `NotAllowed`.
        """
        async with self._db.transaction() as tx:
            row, actor = await self._structure.lock(tx, conversation_id, actor_id)
            _check_open_group(row)
            target = await store.find_active(tx, conversation_id, user_id)
            if target is None:
                raise MemberNotFound
            changed = _role_changes(actor, target, role)
            for person, new_role in changed:
                await store.set_role(tx, conversation_id, person, new_role)
            changes = [
                ("member_updated", {"user_id": person, "role": new_role, "updated_by": actor_id})
                for person, new_role in changed
            ]
            events: list[CommittedEvent] = []
            if changes:
                now = self._structure.clock.now()
                events = await conversations.append_events(tx, conversation_id, changes, now)
            after = await store.find_active(tx, conversation_id, user_id)
        assert after is not None
        if events:
            await self._structure.committed(conversation_id, events)
        return (await self._read_receipts.mask([after.view()], actor_id))[0]

    async def remove(self, conversation_id: UUID, actor_id: UUID, user_id: UUID) -> None:
        """Take a member out, or leave oneself; a closed group can still be left.

        An owner who leaves is followed by the admin, or else the member, who is there the longest. Raises
        `ConversationNotFound`, `NotAGroup`, `ConversationClosed`, `MemberNotFound`, `NotAllowed`.
        """
        async with self._db.transaction() as tx:
            row, actor = await self._structure.lock(tx, conversation_id, actor_id)
            if row.type is not ConversationType.GROUP:
                raise NotAGroup
            target = actor
            reason = "left"
            if user_id != actor_id:
                _check_open_group(row)
                found = await store.find_active(tx, conversation_id, user_id)
                if found is None:
                    raise MemberNotFound
                if actor.role.rank <= found.role.rank:
                    raise NotAllowed
                target, reason = found, "removed"
            events = await self._structure.end_membership(tx, row, target, actor_id, reason)
            if reason == "removed":
                await self._structure.tell_people(
                    tx, conversation_id, "member_removed", events[0].seq, actor_id, [user_id]
                )
        self._structure.announce_removal(conversation_id, [user_id], reason)
        await self._structure.committed(conversation_id, events)


def _check_open_group(row: ConversationRow) -> None:
    if row.type is not ConversationType.GROUP:
        raise NotAGroup
    if not row.is_active:
        raise ConversationClosed


def _check_may_add(row: ConversationRow | None, actor: MemberRow | None, role: Role) -> None:
    if row is None or actor is None:
        raise ConversationNotFound
    _check_open_group(row)
    require(row, actor, "add_members")
    if role is not Role.MEMBER and role.rank >= actor.role.rank:
        raise NotAllowed("One adds people only in roles below one's own.")


def _role_changes(actor: MemberRow, target: MemberRow, role: Role) -> list[tuple[UUID, Role]]:
    if target.role is role:
        if actor.role is Role.MEMBER and target.user_id != actor.user_id:
            raise NotAllowed
        return []
    if target.user_id == actor.user_id:
        # An admin may step down. An owner first hands the group over: it is never without one.
        if actor.role is Role.OWNER or role.rank > actor.role.rank:
            raise NotAllowed
        return [(target.user_id, role)]
    if actor.role.rank <= target.role.rank:
        raise NotAllowed
    if role is Role.OWNER:
        if actor.role is not Role.OWNER:
            raise NotAllowed("Only the owner hands the group over.")
        return [(target.user_id, Role.OWNER), (actor.user_id, Role.ADMIN)]
    if role.rank >= actor.role.rank:
        raise NotAllowed("One gives only roles below one's own.")
    return [(target.user_id, role)]
