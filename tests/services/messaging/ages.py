"""Messages that grow old, in a database that no other test moves the clock of."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from tests.services.messaging.rooms import make_conversation

from whispr.kit.clock import ManualClock
from whispr.kit.db import Connection, Database
from whispr.kit.ids import uuid7
from whispr.services.messaging.models import (
    CommittedEvent,
    ConversationType,
    MemberId,
    Membership,
    MessageHead,
    ReceiptKind,
    Role,
    expires_from,
)
from whispr.services.messaging.service.expiry import Expiry
from whispr.services.messaging.service.receipts import Receipts
from whispr.services.messaging.service.retention import Retention
from whispr.services.messaging.store import conversations, history, members
from whispr.services.messaging.store.sending import NewMessage, Outcome, store_batch


class Node:
    """What one process runs, and what it published."""

    def __init__(self, db: Database, clock: ManualClock, longest: timedelta | None = None) -> None:
        self.published: list[CommittedEvent] = []
        self.doubts = 0
        self.woken = 0
        self.expiry = Expiry(db, clock, self.published.extend, self._doubt, self._wake)
        self.retention = Retention(
            db, clock, self.published.extend, self._doubt, self._wake, longest=lambda: longest
        )
        self.receipts = Receipts(db, clock)
        self.receipts.on_moved(self.expiry.readers_moved)

    def _doubt(self) -> None:
        self.doubts += 1

    def _wake(self) -> None:
        self.woken += 1


class Ages:
    """A database with a clock of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.clock = ManualClock()
        self.db = Database(url, pool_size=6)

    def node(self, longest: timedelta | None = None) -> Node:
        return Node(self.db, self.clock, longest)

    async def group(self, *user_ids: UUID) -> UUID:
        return await make_conversation(self.db, self.clock, user_ids)

    async def direct(self, one: UUID, other: UUID) -> UUID:
        return await make_conversation(self.db, self.clock, (one, other), ConversationType.DIRECT)

    async def send(
        self,
        conversation_id: UUID,
        sender_id: UUID,
        content: bytes = b'{"ciphertext":"aGVsbG8="}',
        *,
        expires_in: int | None = None,
        from_read: bool = False,
        media_ids: Sequence[UUID] = (),
        reply_to_id: UUID | None = None,
    ) -> MessageHead:
        """The stored message, as the flusher would hand it to `Expiry.expects`."""
        message = NewMessage(
            id=uuid7(),
            conversation_id=conversation_id,
            sender_id=sender_id,
            sender_device_id=uuid4(),
            client_id=uuid4(),
            message_type="text",
            content=content,
            content_sha256=b"digest",
            signature=b"signature",
            reply_to_id=reply_to_id,
            media_ids=tuple(media_ids),
            expires_in=expires_in,
            expires_from_read=from_read,
            plan=None,
        )
        async with self.db.connection() as connection:
            (stored,) = await store_batch(connection, [message], self.clock.now(), timeout=5)
            assert stored.outcome is Outcome.STORED
            found = await history.find_message(connection, message.id)
        assert found is not None
        assert found.head.expires_from == expires_from(expires_in, from_read)
        return found.head

    async def head(self, message_id: UUID) -> MessageHead | None:
        async with self.db.connection() as connection:
            found = await history.find_message(connection, message_id)
        return found.head if found else None

    async def read(self, node: Node, conversation_id: UUID, user_id: UUID, seq: int) -> None:
        """The person reads up to `seq` on `node`, whose expiry then looks."""
        membership = Membership(conversation_id, MemberId(user_id), Role.MEMBER, 0)
        await node.receipts.mark_now(membership, uuid4(), ReceiptKind.READ, seq)
        await node.expiry.begin_seconds()

    async def append(self, conversation_id: UUID, event: str, payload: dict[str, Any]) -> CommittedEvent:
        async with self.db.transaction() as tx:
            await conversations.lock(tx, conversation_id)
            return await conversations.append_event(tx, conversation_id, event, payload, self.clock.now())

    async def leave(self, conversation_id: UUID, user_id: UUID) -> None:
        async with self.db.transaction() as tx:
            await conversations.lock(tx, conversation_id)
            event = await conversations.append_event(
                tx, conversation_id, "member_removed", {"user_id": user_id}, self.clock.now()
            )
            await members.leave(tx, conversation_id, user_id, event.seq, self.clock.now())

    async def log(self, conversation_id: UUID) -> list[CommittedEvent]:
        async with self.db.connection() as connection:
            return await history.log(connection, conversation_id, 0, 1_000_000, 1_000_000)

    async def fetchval(self, query: str, *arguments: Any) -> Any:
        async with self.db.connection() as connection:
            return await connection.fetchval(query, *arguments)

    async def everything(self) -> str:
        """Every value of every table as text."""
        async with self.db.connection() as connection:
            return await _everything(connection)


async def _everything(connection: Connection) -> str:
    tables = await connection.fetch(
        "SELECT c.oid::regclass::text AS name FROM pg_class c"
        " WHERE c.relkind = 'r' AND c.relnamespace = current_schema()::regnamespace"
    )
    texts = [
        await connection.fetchval(f"SELECT coalesce(string_agg(t::text, ' '), '') FROM {table['name']} t")
        for table in tables
    ]
    return " ".join(texts)
