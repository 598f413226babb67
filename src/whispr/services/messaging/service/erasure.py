"""A deleted account leaves every conversation; what it sent stays as the ciphertext it was."""

from __future__ import annotations

from uuid import UUID

from whispr.services.messaging.models import ConversationNotFound
from whispr.services.messaging.service.structure import Structure
from whispr.services.messaging.store import erasure as store
from whispr.services.messaging.store import reports

CHUNK = 100


class Erasure:
    """Erasing twice is erasing once: each conversation is left in its own transaction, and a repeat goes on."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        self._db = structure.db

    async def erase(self, user_id: UUID) -> int:
        """End all memberships of the person and forget the rest; how many conversations were left."""
        left = 0
        while True:
            async with self._db.connection() as connection:
                conversation_ids = await store.active_conversations(connection, user_id, CHUNK)
            if not conversation_ids:
                break
            for conversation_id in conversation_ids:
                left += await self._leave(conversation_id, user_id)
        async with self._db.transaction() as tx:
            await store.forget_person(tx, user_id)
            await reports.forget_reporter(tx, user_id)
        return left

    async def _leave(self, conversation_id: UUID, user_id: UUID) -> int:
        try:
            async with self._db.transaction() as tx:
                row, member = await self._structure.lock(tx, conversation_id, user_id)
                events = await self._structure.end_membership(tx, row, member, user_id, "account_deleted")
        except ConversationNotFound:
            # Removed by somebody else in the meantime.
            return 0
        await self._structure.committed(conversation_id, events)
        return 1
