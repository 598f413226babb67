"""Hints to other processes, sent after the commit. A lost one is made good by whoever polls PostgreSQL's truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from uuid import UUID

import msgspec

from whispr.kit.errors import Unavailable
from whispr.kit.identity import REVOCATIONS_CHANNEL, Revocation, encode_revocation
from whispr.kit.telemetry import get_logger
from whispr.services.auth.models import Link, NewDevice

log = get_logger(__name__)

NOTICES_CHANNEL = "user:notices"

# Who keeps device lists in memory.
_DEVICE_CACHES = ("messaging", "notification")


class Publisher(Protocol):
    """What this needs of the cache."""

    async def publish(self, channel: str, message: bytes) -> None: ...


class Announcer:
    """Publishes hints and never fails: what it announces has happened already."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._learners: list[Callable[[Revocation], None]] = []

    def on_revocation(self, learn: Callable[[Revocation], None]) -> None:
        """Tell `learn` of this process too, at once: nobody who was just logged out gets another answer from here."""
        self._learners.append(learn)

    async def revoked(self, revocations: Sequence[Revocation]) -> None:
        for revocation in revocations:
            for learn in self._learners:
                learn(revocation)
            await self._hint(REVOCATIONS_CHANNEL, encode_revocation(revocation))

    async def devices_changed(self, user_id: UUID, epoch: int) -> None:
        """The device list of `user_id` has changed; `epoch` is the new one.

        The notice is for the person's own devices; messaging tells those who write to them, by the hint.
        """
        await self._outdated({"kind": "devices", "user_id": user_id, "epoch": epoch})
        payload = {"user_id": user_id, "epoch": epoch}
        await self._notice({"user_id": user_id, "event": "device_list_changed", "payload": payload})

    async def tokens_changed(self, user_id: UUID) -> None:
        """What is known of the devices of `user_id` is out of date, though the list is what it was."""
        await self._outdated({"kind": "devices", "user_id": user_id})

    async def prekeys_low(self, user_id: UUID, device_id: UUID, key_type: str, remaining: int) -> None:
        await self._notice(
            {
                "user_id": user_id,
                "device_id": device_id,
                "event": "prekeys_low",
                "payload": {"device_id": device_id, "remaining": remaining, "key_type": key_type},
            }
        )

    async def link_claimed(self, link: Link, device: NewDevice) -> None:
        """A device asks to be linked: whoever began it compares the codes, and every other device may refuse."""
        await self._notice(
            {
                "user_id": link.account_id,
                "event": "device_link_claimed",
                "payload": {
                    "link_id": link.id,
                    "device_id": link.by_device_id,
                    "name": device.name,
                    "platform": device.platform,
                },
            }
        )

    async def _outdated(self, hint: dict[str, Any]) -> None:
        for service in _DEVICE_CACHES:
            await self._hint(f"cache:invalidate:{service}", msgspec.json.encode(hint))

    async def _notice(self, notice: dict[str, Any]) -> None:
        await self._hint(NOTICES_CHANNEL, msgspec.json.encode(notice))

    async def _hint(self, channel: str, message: bytes) -> None:
        try:
            await self._publisher.publish(channel, message)
        except Unavailable:
            log.warning("hint_not_published", channel=channel)
