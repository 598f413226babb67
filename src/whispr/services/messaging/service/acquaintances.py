"""Who shares a conversation with whom."""

from __future__ import annotations

from uuid import UUID

from whispr.kit.db import Database
from whispr.services.messaging.store import members


class Acquaintances:
    """Answers from the database: it is asked rarely, and remembering it would take much."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def of(self, user_id: UUID) -> set[UUID]:
        """Everybody else who is in a conversation with `user_id`. Raises `Unavailable`."""
        async with self._database.connection() as connection:
            return await members.acquainted(connection, user_id)
