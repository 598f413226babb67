"""How a device joins an account: with its keys and its first session, all of it or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.db import Connection
from whispr.kit.identity import Revocation
from whispr.kit.ids import uuid7
from whispr.services.auth import store
from whispr.services.auth.models import Family, NewDevice, TooManyDevices
from whispr.services.auth.service.prekeys import add_first_prekeys
from whispr.services.auth.service.sessions import Sessions
from whispr.services.auth.settings import AuthSettings


@dataclass(frozen=True, slots=True)
class Joined:
    """The first session of a new device, and what to announce once it is committed."""

    family: Family
    refresh_token: str
    revocations: list[Revocation]
    epoch: int


class Joining:
    """Works in the caller's transaction, which has locked the account."""

    def __init__(self, clock: Clock, sessions: Sessions, settings: AuthSettings) -> None:
        self._clock = clock
        self._sessions = sessions
        self._settings = settings

    async def check_room(self, tx: Connection, account_id: UUID) -> None:
        """Raises `TooManyDevices`."""
        if await store.devices.count_active(tx, account_id) >= self._settings.max_devices:
            raise TooManyDevices(limit=self._settings.max_devices)

    async def join(self, tx: Connection, account_id: UUID, device: NewDevice) -> Joined:
        """Add the device with its keys, which are checked already, and open its first session."""
        device_id, now = uuid7(), self._clock.now()
        await store.devices.insert(tx, device_id, account_id, device, now)
        await add_first_prekeys(tx, device_id, device, now)
        epoch = await store.accounts.bump_epoch(tx, account_id)
        family, refresh_token, revocations = await self._sessions.open(tx, account_id, device_id)
        return Joined(family, refresh_token, revocations, epoch)
