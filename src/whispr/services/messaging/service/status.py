"""When a message was delivered to whom, and read by whom."""

from __future__ import annotations

from uuid import UUID

import msgspec

from whispr.kit.db import Database
from whispr.services.messaging.models import MessageNotFound, RecipientStatus
from whispr.services.messaging.service.privacy import ReadReceipts
from whispr.services.messaging.store import history, members


class Status:
    """Derived from the watermarks: a message was delivered with the first mark at or past its `seq`."""

    def __init__(self, db: Database, read_receipts: ReadReceipts) -> None:
        self._db = db
        self._read_receipts = read_receipts

    async def of(self, message_id: UUID, user_id: UUID) -> list[RecipientStatus]:
        """When each recipient got and read a message. Raises `MessageNotFound`, also for messages one may not see."""
        async with self._db.connection() as connection:
            message = await history.find_message(connection, message_id)
            if message is None:
                raise MessageNotFound
            head = message.head
            member = await members.find_active(connection, head.conversation_id, user_id)
            if member is None or head.seq <= member.floor_seq:
                raise MessageNotFound
            statuses = await history.message_status(
                connection, head.conversation_id, head.seq, head.sender_id
            )
        others = {item.user_id for item in statuses} - {user_id}
        hidden = await self._read_receipts.hidden(others)
        apart = await self._read_receipts.apart(user_id, others)
        return [_shown(item, hidden, apart) for item in statuses]


def _shown(status: RecipientStatus, hidden: frozenset[UUID], apart: frozenset[UUID]) -> RecipientStatus:
    if status.user_id in apart:
        return RecipientStatus(status.user_id, None, None)
    return msgspec.structs.replace(status, read_at=None) if status.user_id in hidden else status
