"""Who is in which conversation: the cache of hot conversations, and the only maker of `Membership`."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from uuid import UUID

import msgspec

from whispr.kit.batching import Batcher
from whispr.kit.cache import Cache
from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.errors import Failure
from whispr.kit.telemetry import get_logger
from whispr.services.messaging.models import (
    Conversation,
    ConversationNotFound,
    MemberId,
    MemberRow,
    Membership,
    NotAMember,
)
from whispr.services.messaging.store import members as store

log = get_logger(__name__)

HINTS = "cache:invalidate:messaging"


class _Hint(msgspec.Struct):
    kind: str
    conversation_id: UUID | None = None


class Directory:
    """A per-process cache of conversations and their active members.

    Entries live for `ttl` seconds at most and are dropped at once by a change here, and by a hint after a change on
    another node. A lost hint leaves a stale entry for the rest of its `ttl`: whoever must be certain asks for
    `fresh`, and every write checks again in its own transaction.
    """

    def __init__(
        self,
        db: Database,
        cache: Cache,
        clock: Clock,
        *,
        max_conversations: int = 20_000,
        max_members: int = 500_000,
        ttl: float = 60.0,
    ) -> None:
        self._db = db
        self._cache = cache
        self._clock = clock
        self._max_conversations = max_conversations
        self._max_members = max_members
        self._ttl = ttl
        self._entries: OrderedDict[UUID, tuple[Conversation, float]] = OrderedDict()
        self._member_count = 0
        self._loading: dict[UUID, asyncio.Task[Conversation | None]] = {}
        # A node that starts knows none of the conversations that its people go on writing in.
        self._reads = Batcher(self._read)

    def start(self) -> None:
        """Listen for other nodes' changes. A loss of Valkey empties the cache: hints were missed."""
        self._cache.subscribe(HINTS, self._on_hint)
        self._cache.on_reconnect(self.clear)

    def peek(self, conversation_id: UUID) -> Conversation | None:
        """The cached conversation or None, without waiting."""
        entry = self._entries.get(conversation_id)
        if entry is None:
            return None
        if entry[1] <= self._clock.time():
            self.invalidate(conversation_id)
            return None
        self._entries.move_to_end(conversation_id)
        return entry[0]

    async def get(self, conversation_id: UUID, *, fresh: bool = False) -> Conversation:
        """The conversation, from the cache or PostgreSQL. Raises `ConversationNotFound`.

        Callers that ask at the same time share one query. `fresh` reads PostgreSQL now.
        """
        if not fresh:
            cached = self.peek(conversation_id)
            if cached is not None:
                return cached
        else:
            self.invalidate(conversation_id)
        task = self._loading.get(conversation_id)
        if task is None:
            task = asyncio.create_task(self._load(conversation_id))
            self._loading[conversation_id] = task
        # A caller who gives up must not cancel the others' query.
        conversation = await asyncio.shield(task)
        if conversation is None:
            raise ConversationNotFound
        return conversation

    async def membership(self, conversation_id: UUID, user_id: UUID, *, fresh: bool = False) -> Membership:
        """Proof that the person is an active member. Raises `NotAMember`, also when there is no such conversation."""
        try:
            conversation = await self.get(conversation_id, fresh=fresh)
        except ConversationNotFound:
            raise NotAMember from None
        return self.membership_in(conversation, user_id)

    def membership_in(self, conversation: Conversation, user_id: UUID) -> Membership:
        """`membership` in a conversation at hand. Raises `NotAMember`."""
        member = conversation.members.get(user_id)
        if member is None:
            raise NotAMember
        return Membership(conversation.id, MemberId(user_id), member.role, member.floor_seq)

    async def reader(self, conversation_id: UUID, user_id: UUID) -> Membership:
        """`membership` for the REST door: from PostgreSQL, with one answer to strangers and for what does not exist.

        Raises `ConversationNotFound`.
        """
        async with self._db.connection() as connection:
            row = await store.find_active(connection, conversation_id, user_id)
        if row is None:
            raise ConversationNotFound
        return self.membership_of(row)

    def membership_of(self, row: MemberRow) -> Membership:
        """Proof from the row of an active member, read a moment ago or held by the caller's transaction."""
        return Membership(row.conversation_id, MemberId(row.user_id), row.role, row.floor_seq)

    def invalidate(self, conversation_id: UUID) -> None:
        """Forget the conversation in this process; a load under way is not cached when it ends."""
        entry = self._entries.pop(conversation_id, None)
        if entry is not None:
            self._member_count -= len(entry[0].members)
        self._loading.pop(conversation_id, None)

    def clear(self) -> None:
        """Forget everything in this process."""
        self._entries.clear()
        self._loading.clear()
        self._member_count = 0

    async def changed(self, conversation_id: UUID) -> None:
        """Forget the conversation here and tell the other nodes. Call it after the commit of any change of it."""
        self.invalidate(conversation_id)
        hint = {"kind": "members", "conversation_id": conversation_id}
        try:
            await self._cache.publish(HINTS, msgspec.json.encode(hint))
        except Failure as failure:
            log.warning("directory_hint_lost", code=failure.code)

    async def _load(self, conversation_id: UUID) -> Conversation | None:
        task = asyncio.current_task()
        try:
            conversation = await self._reads.ask(conversation_id)
            if conversation is not None and self._loading.get(conversation_id) is task:
                self._remember(conversation)
            return conversation
        finally:
            if self._loading.get(conversation_id) is task:
                del self._loading[conversation_id]

    async def _read(self, conversation_ids: list[UUID]) -> list[Conversation | None]:
        async with self._db.connection() as connection:
            found = await store.load_conversations(connection, conversation_ids)
        return [found.get(conversation_id) for conversation_id in conversation_ids]

    def _remember(self, conversation: Conversation) -> None:
        self._entries[conversation.id] = (conversation, self._clock.time() + self._ttl)
        self._member_count += len(conversation.members)
        while len(self._entries) > self._max_conversations or self._member_count > self._max_members:
            _, (oldest, _) = self._entries.popitem(last=False)
            self._member_count -= len(oldest.members)

    def _on_hint(self, data: bytes) -> None:
        try:
            hint = msgspec.json.decode(data, type=_Hint)
        except msgspec.MsgspecError:
            log.warning("directory_hint_unreadable")
            return
        if hint.kind == "members" and hint.conversation_id is not None:
            self.invalidate(hint.conversation_id)
