"""What the channels of this node work with."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.services.messaging.channels.presence import Whereabouts
from whispr.services.messaging.channels.rooms import Rooms
from whispr.services.messaging.channels.typists import Typists
from whispr.services.messaging.service.changes import Changes
from whispr.services.messaging.service.devices import Devices
from whispr.services.messaging.service.history import History
from whispr.services.messaging.service.opening import Openings
from whispr.services.messaging.service.pace import Pace
from whispr.services.messaging.service.pins import Pins
from whispr.services.messaging.service.reactions import Reactions
from whispr.services.messaging.service.receipts import Receipts
from whispr.services.messaging.service.scheduled import Scheduled
from whispr.services.messaging.service.sending import Sending

_BACKLOGS_AT_ONCE = 20


@dataclass(slots=True)
class Desk:
    """Shared by all channels. `reads` bounds how often one device makes the database read (joins, syncs)."""

    clock: Clock
    rooms: Rooms
    sending: Sending
    changes: Changes
    reactions: Reactions
    pins: Pins
    history: History
    openings: Openings
    receipts: Receipts
    devices: Devices
    typists: Typists
    whereabouts: Whereabouts
    scheduled: Scheduled
    reads: Pace | None = None
    backlogs: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_BACKLOGS_AT_ONCE))

    def count_read(self, device_id: UUID) -> None:
        """Raises `RateLimited`."""
        if self.reads is not None:
            self.reads.count(device_id)
