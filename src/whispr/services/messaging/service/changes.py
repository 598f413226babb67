"""Changes of stored messages: edits and deletions for all.

Each is one event in the conversation's order, made in one transaction under the conversation's lock. What is so already is
answered like a change, without an event, so that everything here can be repeated.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final
from uuid import UUID

from whispr.kit.db import Connection
from whispr.services.messaging.models import (
    Actor,
    ConversationNotFound,
    ConversationRow,
    ConversationType,
    Draft,
    MemberRow,
    Message,
    MessageDeleted,
    MessageNotFound,
    NotAllowed,
    NotAMember,
    Role,
    edited_event,
)
from whispr.services.messaging.service.content import parse
from whispr.services.messaging.service.sending import Sending
from whispr.services.messaging.service.structure import Structure, require
from whispr.services.messaging.store import changes as store
from whispr.services.messaging.store import conversations, history, members

_MODERATORS: Final = frozenset({Role.OWNER, Role.ADMIN})


class Changes:
    """Edits by the author, from any of their devices; deletions by the author and, in groups, by those above them."""

    def __init__(self, structure: Structure, sending: Sending) -> None:
        self._structure = structure
        self._sending = sending
        self._db = structure.db

    async def place(self, message_id: UUID) -> UUID:
        """The conversation a message is in; it proves nothing about who may know. Raises `MessageNotFound`."""
        async with self._db.connection() as connection:
            conversation_id = await store.find_place(connection, message_id)
        if conversation_id is None:
            raise MessageNotFound
        return conversation_id

    async def read(self, message_id: UUID, user_id: UUID) -> Message:
        """One message as it is now. Raises `MessageNotFound`, also for messages the person may not see."""
        async with self._db.connection() as connection:
            message = await history.find_message(connection, message_id)
            if message is None:
                raise MessageNotFound
            member = await members.find_active(connection, message.head.conversation_id, user_id)
        if member is None or message.head.seq <= member.floor_seq:
            raise MessageNotFound
        return message

    async def edit(
        self, actor: Actor, conversation_id: UUID, message_id: UUID, content: bytes, signature: bytes
    ) -> tuple[Message, int | None]:
        """Put new content in place of a message's; the message, and the event's `seq` if there had to be one.

        The content is held to every rule of sending and signed by the calling device under the `client_id` of the message.
        Raises what `Sending.submit` answers with, `MessageNotFound`, `MessageDeleted`, or `NotAllowed` to others than
        the author.
        """
        try:
            message = await self.read(message_id, actor.user_id)
        except MessageNotFound:
            await self._require_member(conversation_id, actor.user_id)
            raise
        head = message.head
        if head.conversation_id != conversation_id:
            raise MessageNotFound
        draft = Draft(
            conversation_id,
            actor.user_id,
            actor.device_id,
            head.client_id,
            head.message_type,
            content,
            signature,
        )
        if head.sender_id != actor.user_id:
            raise NotAllowed("Only its author edits a message.")
        if _is_of(draft, message):
            return message, None
        parsed = await self._sending.examine(draft)
        now = self._structure.clock.now()
        async with self._db.transaction() as tx:
            row, member = await hold(self._structure, tx, conversation_id, actor.user_id)
            target = (await store.targets(tx, conversation_id, [message_id])).get(message_id)
            require_seen(target, member.floor_seq, now)
            require(row, member, "send")
            edited = await store.edit(
                tx,
                conversation_id,
                message_id,
                actor.device_id,
                parsed.canonical,
                parsed.content_sha256,
                signature,
                now,
            )
            entry = await conversations.append_event(
                tx, conversation_id, "message_edited", {"message_id": message_id}, now
            )
        self._structure.publish([edited_event(entry.seq, edited)])
        return edited, entry.seq

    async def delete(self, actor: Actor, conversation_id: UUID, message_id: UUID) -> int | None:
        """Erase a message for everybody; the event's `seq` if there had to be one.

        The author may always, also where nobody may send. In a group its owner and admins may whose role is above the
        author's, or when the author has left. Raises `NotAMember`, `MessageNotFound`, `NotAllowed`, `RateLimited`.
        """
        self._sending.count(actor.device_id, actor.user_id, conversation_id)
        events = []
        async with self._db.transaction() as tx:
            row, member = await hold(self._structure, tx, conversation_id, actor.user_id)
            target = (await store.targets(tx, conversation_id, [message_id])).get(message_id)
            # What is one's own can be taken back even from where one does not see it any more.
            floor = row.purged_seq if target and target.sender_id == actor.user_id else member.floor_seq
            if target is None or target.seq <= floor:
                raise MessageNotFound
            await _require_may_delete(tx, row, member, target.sender_id)
            if await store.tombstone(tx, conversation_id, [message_id]):
                payload = {"message_id": message_id, "deleted_by": actor.user_id}
                now = self._structure.clock.now()
                events.append(
                    await conversations.append_event(tx, conversation_id, "message_deleted", payload, now)
                )
        if not events:
            return None
        self._structure.publish(events)
        return events[0].seq

    async def _require_member(self, conversation_id: UUID, user_id: UUID) -> None:
        async with self._db.connection() as connection:
            if await members.find_active(connection, conversation_id, user_id) is None:
                raise NotAMember


async def hold(
    structure: Structure, tx: Connection, conversation_id: UUID, user_id: UUID
) -> tuple[ConversationRow, MemberRow]:
    """`Structure.lock`, for doors through which only members come. Raises `NotAMember`."""
    try:
        return await structure.lock(tx, conversation_id, user_id)
    except ConversationNotFound:
        raise NotAMember from None


def require_seen(target: store.Target | None, floor_seq: int, now: datetime) -> store.Target:
    """The message, if somebody who sees what is above `floor_seq` may do something with it.

    Raises `MessageNotFound`, also when its time is over and it only waits to be erased, or `MessageDeleted`.
    """
    if target is None or target.seq <= floor_seq:
        raise MessageNotFound
    if target.is_deleted:
        raise MessageDeleted
    if target.expires_at is not None and target.expires_at <= now:
        raise MessageNotFound
    return target


def _is_of(draft: Draft, message: Message) -> bool:
    """Whether the message holds what the draft would put there: an edit whose answer was lost, and is made again."""
    return (
        not message.head.is_deleted
        and message.head.signature == draft.signature
        and message.head.content_sha256 == parse(draft).content_sha256
    )


async def _require_may_delete(
    tx: Connection, row: ConversationRow, member: MemberRow, sender_id: UUID
) -> None:
    if sender_id == member.user_id:
        return
    if row.type is not ConversationType.GROUP or member.role not in _MODERATORS:
        raise NotAllowed("Only its author deletes this message.")
    author = await members.find_active(tx, row.id, sender_id)
    if author is not None and author.role.rank >= member.role.rank:
        raise NotAllowed("One deletes only messages of people with a lower role.")
