"""The audit trail: every security event, in one chain of hashes that shows any change made behind our back."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import datetime
from uuid import UUID

import msgspec

from whispr.kit.clock import Clock
from whispr.kit.db import Connection
from whispr.services.auth import store
from whispr.services.auth.models import AuditEvent

GENESIS = bytes(32)
_PAGE = 1_000


class AuditTrail:
    """Appends events in the transaction that brings them about, so that none is missing and none is invented."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def record(
        self,
        tx: Connection,
        event: str,
        account_id: UUID | None = None,
        device_id: UUID | None = None,
        **details: str | int | bool,
    ) -> None:
        """Append an event as the last step of `tx`. Details hold ids and reasons, never secrets or addresses."""
        tail = await store.audit.lock_tail(tx)
        number, previous = (tail["number"] + 1, tail["hash"]) if tail else (1, GENESIS)
        made = AuditEvent(
            number, self._clock.now(), event, account_id, device_id, dict(details), previous, b""
        )
        await store.audit.append(tx, replace(made, hash=digest(made)))

    async def first_broken(self, connection: Connection) -> int | None:
        """The number of the first event that was changed, removed or put in; None if the chain holds."""
        number, previous = 0, GENESIS
        while page := await store.audit.page(connection, number, _PAGE):
            for event in page:
                if (
                    event.number != number + 1
                    or event.previous_hash != previous
                    or event.hash != digest(event)
                ):
                    return number + 1
                number, previous = event.number, event.hash
        return None


def digest(event: AuditEvent) -> bytes:
    """SHA-256 over everything of the event, its predecessor's hash included."""
    return hashlib.sha256(
        msgspec.json.encode(
            {
                "number": event.number,
                "at": _microseconds(event.at),
                "event": event.event,
                "account_id": str(event.account_id),
                "device_id": str(event.device_id),
                "details": event.details,
                "previous": event.previous_hash.hex(),
            },
            order="deterministic",
        )
    ).digest()


def _microseconds(at: datetime) -> int:
    # What PostgreSQL keeps; the chain must not break over the text form of a time zone.
    return int(at.timestamp()) * 1_000_000 + at.microsecond
