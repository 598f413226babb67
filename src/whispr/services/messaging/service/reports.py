"""Reports of messages, and what of them can be verified: message franking.

A sender's client may put a commitment beside the ciphertext: HMAC-SHA-256 of the plaintext under a fresh key that travels
inside the encryption. The sending device's signature covers it, everybody gets it, and it says nothing to whoever lacks
key and plaintext. A reporter shows both; that they match proves what the sender wrote, and nothing else becomes known.
Messages that are not reported stay as unreadable as they were.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
from collections.abc import Callable
from datetime import timedelta
from typing import Final
from uuid import UUID

import msgspec

from whispr.kit import outbox
from whispr.kit.cache import RateLimiter
from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.ids import uuid7
from whispr.kit.telemetry import metrics
from whispr.services.messaging.models import MessageNotFound
from whispr.services.messaging.models.abuse import (
    FrankingMismatch,
    NotFranked,
    OwnMessage,
    Report,
    ReportReason,
    Reveal,
)
from whispr.services.messaging.store import reports as store

REPORT_SUBMITTED: Final = "report_submitted"
"""Topic of the outbox rows for moderation, which reads the report by its id: plaintexts are kept in one place."""

REPORTS_PER_DAY: Final = 50
FRANKING_KEY_BYTES: Final = (16, 64)
"""Above 64, HMAC hashes the key first, and two keys would be one."""

_CHUNK: Final = 1_000

reports_submitted = metrics.counter("reports_submitted", "Reports of messages.", ("reason", "is_verified"))


class Reports:
    """Takes reports of messages, one a person and message."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        limiter: RateLimiter,
        wake_outbox: Callable[[], None],
        *,
        life: timedelta,
    ) -> None:
        self._db = db
        self._clock = clock
        self._limiter = limiter
        self._wake_outbox = wake_outbox
        self._life = life

    async def submit(
        self,
        message_id: UUID,
        reporter_id: UUID,
        reason: ReportReason,
        comment: str | None,
        reveal: Reveal | None,
    ) -> tuple[Report, bool]:
        """The person's report of the message, and whether it is new: reporting again changes nothing.

        A revealed plaintext is verified against the message as it is now: after an edit that is the edit's commitment,
        and a deleted message has none. Raises `MessageNotFound` (also for what the person cannot see), `OwnMessage`,
        `NotFranked`, `FrankingMismatch`, `RateLimited`.
        """
        async with self._db.connection() as connection:
            earlier = await store.find(connection, message_id, reporter_id)
        if earlier is not None:
            return earlier, False
        await self._limiter.check("reports", str(reporter_id), REPORTS_PER_DAY, 86_400)
        async with self._db.transaction() as tx:
            message = await store.visible_message(tx, message_id, reporter_id)
            if message is None:
                raise MessageNotFound
            conversation_id, sender_id, content = message
            if sender_id == reporter_id:
                raise OwnMessage
            if reveal is not None:
                _verify(content, reveal)
            report = Report(
                id=uuid7(),
                conversation_id=conversation_id,
                message_id=message_id,
                reporter_id=reporter_id,
                reported_id=sender_id,
                reason=reason,
                comment=comment,
                plaintext=None if reveal is None else reveal.plaintext,
                is_verified=reveal is not None,
                created_at=self._clock.now(),
            )
            is_new = await store.insert(tx, report)
            if is_new:
                await outbox.add(tx, REPORT_SUBMITTED, str(report.id), {"report_id": str(report.id)})
            else:
                # Two devices of the person at the same time.
                earlier = await store.find(tx, message_id, reporter_id)
                assert earlier is not None
                report = earlier
        if is_new:
            reports_submitted.labels(reason=reason.value, is_verified=str(report.is_verified).lower()).inc()
            self._wake_outbox()
        return report, is_new

    async def forget_old(self) -> int:
        """Drop what is older than reports are kept; how many there were."""
        before = self._clock.now() - self._life
        gone = 0
        while True:
            async with self._db.connection() as connection:
                removed = await store.forget_old(connection, before, _CHUNK)
            gone += removed
            if removed < _CHUNK:
                return gone


class _Committed(msgspec.Struct):
    commitment: str | None = None


_decode = msgspec.json.Decoder(_Committed).decode


def _verify(content: bytes, reveal: Reveal) -> None:
    commitment = _decode(content).commitment
    if commitment is None:
        raise NotFranked
    shown = hmac.new(reveal.franking_key, reveal.plaintext, hashlib.sha256).digest()
    # In constant time: how much of a guess is right must not be told by how long the answer takes.
    if not hmac.compare_digest(shown, binascii.a2b_base64(commitment)):
        raise FrankingMismatch
