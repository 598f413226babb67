"""Hints that what is remembered of people is out of date."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

import msgspec

from whispr.kit.cache import Cache
from whispr.kit.telemetry import get_logger
from whispr.services.messaging.service.contact import Contact
from whispr.services.messaging.service.devices import Devices
from whispr.services.messaging.service.directory import HINTS

log = get_logger(__name__)


class _Hint(msgspec.Struct):
    kind: str
    user_id: UUID | None = None
    # Of a device list that has changed; None where only something of its devices has.
    epoch: int | None = None


class Outdated:
    """Forgets devices and relations when auth or user say so.

    `on_shown` is told whose presence may show otherwise, `on_devices` whose device list has changed and its new epoch,
    `on_missed` that hints may have been missed.
    """

    def __init__(
        self,
        cache: Cache,
        devices: Devices,
        contact: Contact,
        on_shown: Callable[[UUID], None],
        on_devices: Callable[[UUID, int], None],
        on_missed: Callable[[], None],
    ) -> None:
        self._cache = cache
        self._devices = devices
        self._contact = contact
        self._on_shown = on_shown
        self._on_devices = on_devices
        self._on_missed = on_missed

    def start(self) -> None:
        """Listen. After a loss of Valkey everything is forgotten: hints were missed."""
        self._cache.subscribe(HINTS, self._hear)
        self._cache.on_reconnect(self._devices.forget_all)
        self._cache.on_reconnect(self._contact.forget_all)
        self._cache.on_reconnect(self._on_missed)

    def _hear(self, data: bytes) -> None:
        try:
            hint = msgspec.json.decode(data, type=_Hint)
        except msgspec.MsgspecError:
            # Directory listens to the same channel and has said so.
            return
        if hint.user_id is None:
            return
        if hint.kind == "devices":
            # First, so that whoever is told and sends at once is measured by the new list.
            self._devices.changed(hint.user_id)
            if hint.epoch is not None:
                self._on_devices(hint.user_id, hint.epoch)
        elif hint.kind == "relations":
            self._contact.changed(hint.user_id)
            self._on_shown(hint.user_id)
