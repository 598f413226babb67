"""What auth keeps of a person, for that person."""

from __future__ import annotations

from dataclasses import replace

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.identity import Caller
from whispr.services.auth import store
from whispr.services.auth.models import AccountExport, UserNotFound
from whispr.services.auth.service.limits import Limits

# Whoever guesses passwords fills the trail of the one they guess at; the export must stay of a size that can be sent.
MAX_EVENTS = 10_000


class Export:
    """No secret, and nothing a secret can be guessed from, is ever part of it."""

    def __init__(self, db: Database, clock: Clock, limits: Limits) -> None:
        self._db = db
        self._clock = clock
        self._limits = limits

    async def of(self, caller: Caller) -> AccountExport:
        """Everything of the caller. Raises `RateLimited`, `UserNotFound`."""
        await self._limits.export(caller.user_id)
        user_id, now = caller.user_id, self._clock.now()
        async with self._db.connection() as connection:
            account = await store.export.account(connection, user_id)
            if account is None:
                raise UserNotFound
            tokens = await store.export.push_tokens(connection, user_id)
            devices = await store.export.devices(connection, user_id)
            return AccountExport(
                exported_at=now,
                account=account,
                devices=[replace(device, push_tokens=tokens.get(device.device_id, [])) for device in devices],
                sessions=await store.export.sessions(connection, user_id),
                links=await store.export.links(connection, user_id, now),
                events=await store.export.events(connection, user_id, MAX_EVENTS),
            )
