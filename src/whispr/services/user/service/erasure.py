"""The end of a person in this service."""

from __future__ import annotations

from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.services.user import store
from whispr.services.user.service.hints import Hints


class Erasure:
    """Erases people whose accounts are gone."""

    def __init__(self, database: Database, hints: Hints, clock: Clock) -> None:
        self._database = database
        self._hints = hints
        self._clock = clock

    async def erase(self, user_id: UUID) -> None:
        """Erase everything the service holds of a person but the id; doing it again changes nothing.

        The tombstone is written first: it waits for whoever holds the profile locked and keeps later ones out, so
        nothing can be added behind the deletions.
        """
        async with self._database.transaction() as tx:
            await store.bury(tx, user_id, self._clock.now())
            await store.delete_belongings(tx, user_id)
        await self._hints.changed("profile", user_id)
        await self._hints.changed("relations", user_id)
