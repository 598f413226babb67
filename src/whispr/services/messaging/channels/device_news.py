"""Telling those who write to a person that their devices have changed, before their next message is refused for it."""

from __future__ import annotations

import asyncio
from uuid import UUID

from whispr.kit.channels import Hub
from whispr.kit.errors import Failure
from whispr.kit.telemetry import get_logger
from whispr.services.messaging.channels.presence import Whereabouts
from whispr.services.messaging.service.acquaintances import Acquaintances

log = get_logger(__name__)


class DeviceNews:
    """Pushes `device_list_changed` to everybody connected here who has the person as a contact or in a conversation.

    The person's own devices are told by auth's notice. What is lost here is found out by `devices_mismatch` on sending.
    """

    def __init__(self, hub: Hub, whereabouts: Whereabouts, acquaintances: Acquaintances) -> None:
        self._hub = hub
        self._whereabouts = whereabouts
        self._acquaintances = acquaintances
        self._epochs: dict[UUID, int] = {}
        self._task: asyncio.Task[None] | None = None

    def changed(self, user_id: UUID, epoch: int) -> None:
        """The device list of `user_id` is at `epoch`."""
        if not len(self._hub):
            return
        self._epochs[user_id] = max(epoch, self._epochs.get(user_id, 0))
        # One after the other: when many devices expire at once the database has other things to do.
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._tell_all())

    async def _tell_all(self) -> None:
        try:
            while self._epochs:
                user_id, epoch = self._epochs.popitem()
                try:
                    await self._tell(user_id, epoch)
                except Failure as failure:
                    log.warning("device_news_lost", code=failure.code)
        finally:
            self._task = None

    async def _tell(self, user_id: UUID, epoch: int) -> None:
        people = self._whereabouts.having_contact(user_id) | await self._acquaintances.of(user_id)
        payload = {"user_id": user_id, "epoch": epoch}
        for other in people - {user_id}:
            self._hub.broadcast(f"user:{other}", "device_list_changed", payload)
