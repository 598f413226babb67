"""Which devices a person has, as auth says: their signing keys, and the set that envelopes must cover."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol
from uuid import UUID

import msgspec

from whispr.kit.clock import Clock
from whispr.kit.ids import swift
from whispr.services.messaging.service.readthrough import ReadThrough


class Device(Protocol):
    """What messaging needs to know of a device."""

    @property
    def device_id(self) -> UUID: ...
    @property
    def registration_id(self) -> int: ...
    @property
    def signing_key(self) -> bytes: ...


class DeviceList(Protocol):
    """A person's active devices."""

    @property
    def devices(self) -> Sequence[Device]: ...


class DeviceSource(Protocol):
    """Who knows devices: a client of auth."""

    async def get_user_devices(self, user_ids: Sequence[UUID]) -> Mapping[UUID, DeviceList]:
        """Active devices by person; unknown people are left out."""


class KnownDevices(msgspec.Struct, frozen=True):
    """A person's active devices. `registrations` is by the text of the id, as envelopes name devices."""

    signing_keys: dict[UUID, bytes]
    registrations: dict[str, int]


class Devices:
    """Device lists at hand for the hot path; see `ReadThrough` for how old they may be."""

    def __init__(self, source: DeviceSource, clock: Clock) -> None:
        self._source = source
        self._known: ReadThrough[UUID, KnownDevices] = ReadThrough(self._fetch, clock)
        self.peek = self._known.peek

    async def load(self, user_ids: Iterable[UUID], *, again: bool = False) -> None:
        """Make the lists of `user_ids` present; see `ReadThrough.load`."""
        await self._known.load(user_ids, again=again)

    async def of(self, user_id: UUID) -> KnownDevices:
        """The person's active devices, none if auth does not know the person. Raises `Unavailable`."""
        return await self._known.get(user_id) or _NO_DEVICES

    def changed(self, user_id: UUID) -> None:
        """The list of `user_id` is not what it was."""
        self._known.forget(user_id)

    def forget_all(self) -> None:
        """Nobody's list is to be relied on."""
        self._known.expire()

    async def _fetch(self, user_ids: list[UUID]) -> dict[UUID, KnownDevices]:
        lists = await self._source.get_user_devices(user_ids)
        # A person without any device (deleted, or all removed) is known to have none, and not asked for each time.
        return {
            user_id: _known(lists[user_id].devices) if user_id in lists else _NO_DEVICES
            for user_id in user_ids
        }


def _known(devices: Sequence[Device]) -> KnownDevices:
    return KnownDevices(
        signing_keys={swift(device.device_id): device.signing_key for device in devices},
        registrations={str(device.device_id): device.registration_id for device in devices},
    )


_NO_DEVICES = KnownDevices(signing_keys={}, registrations={})
