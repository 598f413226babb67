"""What every change of a conversation's structure shares: who may, under the lock, and who is told afterwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol
from uuid import UUID, uuid5

import msgspec

from whispr.kit import outbox
from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.services.messaging.models import (
    Blocked,
    CommittedEvent,
    ContactsOnly,
    ConversationClosed,
    ConversationNotFound,
    ConversationRow,
    ConversationType,
    GroupNews,
    MemberRow,
    NotAllowed,
    Role,
    UnknownUser,
)
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.timers import set_timer
from whispr.services.messaging.store import conversations, members, scheduled

GROUP_EVENT = "group_event"
"""Topic of the outbox rows that tell people of a group."""

MEMBERS_IN_NOTICE = 100
"""`conversation_added` of a larger group comes without its members: it goes to every one of them."""


Action = Literal["send", "add_members", "pin", "edit_metadata"]
"""What a group's permissions speak of."""


def require(row: ConversationRow, member: MemberRow, action: Action) -> None:
    """Raises `ConversationClosed`, or `NotAllowed` with the least `role` that may."""
    if not row.is_active:
        raise ConversationClosed
    least: Role = getattr(row.permissions, action)
    if member.role.rank < least.rank:
        raise NotAllowed(action=action, role=least)


def describe(row: ConversationRow, by: UUID) -> dict[str, Any]:
    """The payload of `conversation_updated`: the whole state, so that nobody needs an earlier one."""
    return {
        "is_active": row.is_active,
        "metadata": row.metadata,
        "permissions": row.permissions.filled(),
        "retention_seconds": row.retention_seconds,
        "updated_by": by,
    }


class Verdict(Protocol):
    """Whether a person may be written to or added."""

    @property
    def allowed(self) -> bool:
        """Whether they may."""

    @property
    def reason(self) -> str:
        """Why not: `unknown`, `blocked` or `contacts_only`."""

    @property
    def knows_sender(self) -> bool:
        """Whether they have the sender among their contacts."""


class Contacts(Protocol):
    """The part of `user` this needs."""

    async def check_contactability(
        self, sender_id: UUID, recipient_ids: Sequence[UUID], purpose: Literal["message", "group"]
    ) -> Mapping[UUID, Verdict]:
        """May `sender_id` write to, or add to a group, each person?"""


class Approaches(Protocol):
    """Who counts how many strangers somebody turns to."""

    def meet(self, user_id: UUID, strangers: int) -> None:
        """Count it. Raises `Restricted`."""


class Bus(Protocol):
    """The way from a commit to the sockets of every node."""

    def publish(self, events: Sequence[CommittedEvent]) -> None:
        """Deliver committed events; returns at once."""

    def notice(self, user_ids: Sequence[UUID], event: str, payload: dict[str, Any]) -> None:
        """Push `event` on people's own channels, if they are connected; returns at once."""


class Structure:
    """The tools of `Conversations`, `Members` and `Erasure`."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        directory: Directory,
        contacts: Contacts,
        bus: Bus,
        approaches: Approaches,
        wake_outbox: Callable[[], None],
    ) -> None:
        self.db = db
        self.clock = clock
        self.directory = directory
        self.bus = bus
        self._contacts = contacts
        self._approaches = approaches
        self._wake_outbox = wake_outbox

    async def approach(
        self, sender_id: UUID, user_ids: Collection[UUID], purpose: Literal["message", "group"]
    ) -> None:
        """`ensure_contactable` of people the sender turns to for the first time. Raises `Restricted`, too."""
        verdicts = await self.ensure_contactable(sender_id, user_ids, purpose)
        strangers = sum(not verdict.knows_sender for verdict in verdicts.values())
        if strangers:
            self._approaches.meet(sender_id, strangers)

    async def ensure_contactable(
        self, sender_id: UUID, user_ids: Collection[UUID], purpose: Literal["message", "group"]
    ) -> Mapping[UUID, Verdict]:
        """Raises `UnknownUser`, `Blocked` or `ContactsOnly`, each with the `user_ids` concerned."""
        if not user_ids:
            return {}
        verdicts = await self._contacts.check_contactability(sender_id, list(user_ids), purpose)
        refused: dict[str, list[str]] = {}
        for user_id in user_ids:
            verdict = verdicts.get(user_id)
            if verdict is None or not verdict.allowed:
                refused.setdefault(verdict.reason if verdict else "unknown", []).append(str(user_id))
        for reason, failure in (
            ("unknown", UnknownUser),
            ("blocked", Blocked),
            ("contacts_only", ContactsOnly),
        ):
            if reason in refused:
                raise failure(user_ids=refused[reason])
        assert not refused, f"user refuses for an unheard-of reason: {sorted(refused)}"
        return verdicts

    async def lock(
        self, tx: Connection, conversation_id: UUID, user_id: UUID
    ) -> tuple[ConversationRow, MemberRow]:
        """The conversation and the person's membership in it, unchanging until the transaction ends.

        Raises `ConversationNotFound`, also for strangers.
        """
        row = await conversations.lock(tx, conversation_id)
        member = await members.find_active(tx, conversation_id, user_id) if row else None
        if row is None or member is None:
            raise ConversationNotFound
        return row, member

    async def close(self, tx: Connection, row: ConversationRow, by: UUID) -> CommittedEvent:
        """End all sending in a conversation that the transaction holds."""
        await conversations.close(tx, row.id)
        payload = describe(msgspec.structs.replace(row, is_active=False), by)
        return await conversations.append_event(tx, row.id, "conversation_updated", payload, self.clock.now())

    async def end_membership(
        self, tx: Connection, row: ConversationRow, member: MemberRow, by: UUID, reason: str
    ) -> list[CommittedEvent]:
        """Take a member out of a conversation that the transaction holds.

        An owner's place goes to the admin, or else the member, who is in the group the longest; a group that nobody is
        left in, and a direct conversation that one of the two is not in any more, is closed.
        """
        now = self.clock.now()
        changes: list[tuple[str, dict[str, Any]]] = []
        rest = [m for m in await members.list_active(tx, [row.id]) if m.user_id != member.user_id]
        if member.role is Role.OWNER and rest:
            heir = max(rest, key=lambda candidate: candidate.role.rank)
            await members.set_role(tx, row.id, heir.user_id, Role.OWNER)
            changes.append(
                (
                    "member_updated",
                    {"user_id": heir.user_id, "role": Role.OWNER, "updated_by": member.user_id},
                )
            )
        # Whoever is gone still has the keys that the others encrypt with: they make new ones.
        changes.append(
            (
                "member_removed",
                {
                    "user_id": member.user_id,
                    "removed_by": by,
                    "reason": reason,
                    "rotate_sender_keys": True,
                },
            )
        )
        events = await conversations.append_events(tx, row.id, changes, now)
        await members.leave(tx, row.id, member.user_id, events[-1].seq, now)
        for ref in await scheduled.cancel_all_of(tx, row.id, member.user_id, now):
            await set_timer(tx, ref)
        if row.is_active and (not rest or row.type is ConversationType.DIRECT):
            events.append(await self.close(tx, row, by))
        return events

    async def tell_people(
        self,
        tx: Connection,
        conversation_id: UUID,
        name: str,
        seq: int,
        actor_id: UUID,
        recipients: Sequence[UUID],
    ) -> None:
        """Write the news of a group for notification. `seq` is that of its event, 0 for the creation."""
        if not recipients:
            return
        news = GroupNews(
            event_id=uuid5(conversation_id, f"{name}:{seq}"),
            name=name,
            conversation_id=conversation_id,
            actor_id=actor_id,
            recipient_ids=tuple(recipients),
        )
        await outbox.add(tx, GROUP_EVENT, str(news.event_id), msgspec.to_builtins(news))

    def publish(self, events: Sequence[CommittedEvent]) -> None:
        """Deliver events that left members and state as they were. Call it after the commit."""
        self.bus.publish(events)
        self._wake_outbox()

    async def committed(self, conversation_id: UUID, events: Sequence[CommittedEvent]) -> None:
        """Forget what is cached of the conversation and deliver its new events. Call it after the commit."""
        # Before the events: whoever reacts to one must not find the members as they were.
        self.directory.invalidate(conversation_id)
        self.publish(events)
        await self.directory.changed(conversation_id)

    def announce(self, row: ConversationRow, member_rows: Sequence[MemberRow], to: Sequence[UUID]) -> None:
        """Push `conversation_added` to people."""
        shown = None
        if len(member_rows) <= MEMBERS_IN_NOTICE:
            # Without watermarks: what somebody has read is not everybody's business.
            shown = [{"user_id": m.user_id, "role": m.role, "joined_at": m.joined_at} for m in member_rows]
        conversation = {
            "id": row.id,
            "type": row.type,
            "metadata": row.metadata,
            "is_active": row.is_active,
            "permissions": row.permissions.filled(),
            "retention_seconds": row.retention_seconds,
            "created_by": row.created_by,
            "created_at": row.created_at,
            "updated_at": row.updated_at,
            "head_seq": row.last_seq,
            "member_count": len(member_rows),
            "members": shown,
        }
        self.bus.notice(to, "conversation_added", {"conversation": conversation})

    def announce_removal(self, conversation_id: UUID, to: Sequence[UUID], reason: str) -> None:
        """Push `conversation_removed` to people."""
        self.bus.notice(to, "conversation_removed", {"conversation_id": conversation_id, "reason": reason})
