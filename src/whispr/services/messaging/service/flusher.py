"""Group commit: while one batch commits, the next one fills.

Two stages run side by side, signatures of the next batch while the last one commits. A message that comes alone goes
alone and waits for nothing; under load a batch is what arrived meanwhile, and batches are a few milliseconds apart.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from msgspec import UNSET, UnsetType

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.errors import Failure, Internal, Unavailable
from whispr.kit.ids import uuid7
from whispr.kit.telemetry import get_logger
from whispr.services.messaging.models import (
    BadSignature,
    ClientIdConflict,
    CommittedEvent,
    ConversationClosed,
    Draft,
    Message,
    MessageHead,
    NotAllowed,
    NotAMember,
    Rescheduled,
    SendResult,
    expires_from,
    message_event,
)
from whispr.services.messaging.service.content import Parsed
from whispr.services.messaging.service.signatures import SignatureChecker
from whispr.services.messaging.store import sending as store

log = get_logger(__name__)

OnDone = Callable[[SendResult | Failure], None]

MAX_BATCH: Final = 500

# A statement costs PostgreSQL and us about a millisecond, and a question to the helper a fraction of it, however many
# messages they are for. Once so many were taken within so many seconds, the rest waits for the next such span.
SPAN: Final = 0.008
_BUSY: Final = 24

# Where small batches take long the machine is busy with many processes that each have little to store. Then the next one
# waits for as long as the last one took, up to so many seconds, and carries what comes meanwhile.
_SMALL: Final = 8
_LONG: Final = 0.004
_MAX_REST: Final = 0.02
MAX_BATCH_BYTES: Final = 4 * 1024 * 1024

# Seconds. A message that would wait for longer behind others is better refused at once and sent again.
MAX_WAIT: Final = 1.5

STATEMENT_TIMEOUT: Final = 5.0

_REFUSALS: Final[dict[store.Outcome, type[Failure]]] = {
    store.Outcome.CONFLICT: ClientIdConflict,
    store.Outcome.NOT_A_MEMBER: NotAMember,
    store.Outcome.CLOSED: ConversationClosed,
    store.Outcome.NOT_ALLOWED: NotAllowed,
    store.Outcome.RESCHEDULED: Rescheduled,
}


class SendingUnavailable(Unavailable):
    """Messages cannot be stored now. Send it again with the same client_id."""

    code = "sending_unavailable"

    def __init__(self) -> None:
        super().__init__(retry_after=1)


class Admitted:
    """A draft that may be stored if its signature by `signing_key` is right."""

    __slots__ = ("id", "on_done", "parsed", "signing_key", "submitted_at")

    def __init__(self, parsed: Parsed, signing_key: bytes, on_done: OnDone, submitted_at: float) -> None:
        self.id = uuid7()
        self.parsed = parsed
        self.signing_key = signing_key
        self.on_done: OnDone | None = on_done
        self.submitted_at = submitted_at

    def row(self) -> store.NewMessage:
        """As the store takes it."""
        parsed, draft = self.parsed, self.parsed.draft
        return store.NewMessage(
            self.id,
            draft.conversation_id,
            draft.sender_id,
            draft.sender_device_id,
            draft.client_id,
            draft.message_type,
            parsed.canonical,
            parsed.content_sha256,
            draft.signature,
            draft.reply_to_id,
            draft.media_ids,
            draft.expires_in,
            draft.expires_from_read,
            draft.plan,
        )

    def message(self, stored: store.Stored) -> Message:
        """The stored message, from what was stored."""
        draft = self.parsed.draft
        return Message(
            MessageHead(
                stored.id,
                draft.conversation_id,
                stored.seq,
                draft.sender_id,
                draft.sender_device_id,
                draft.client_id,
                draft.message_type,
                draft.signature,
                self.parsed.content_sha256,
                draft.reply_to_id,
                draft.media_ids,
                draft.expires_in,
                stored.sent_at,
                None,
                False,
                expires_from=expires_from(draft.expires_in, draft.expires_from_read),
                expires_at=_expires_at(draft, stored.sent_at),
            ),
            self.parsed.canonical,
        )


class Flusher:
    """The only writer of messages in this process. `run()` is its supervised loop.

    `patience` is for how many seconds after its arrival a message is tried while the database is away. An attempt whose
    outcome is unknown is simply made again: the client id shows whether it had happened.
    """

    def __init__(
        self,
        db: Database,
        clock: Clock,
        signatures: SignatureChecker,
        publish: Callable[[list[CommittedEvent]], None],
        on_doubt: Callable[[], None],
        on_duplicate: Callable[[Parsed, OnDone], None],
        on_expiring: Callable[[MessageHead], None],
        *,
        patience: float = 8.0,
    ) -> None:
        self._db = db
        self._clock = clock
        self._signatures = signatures
        self._publish = publish
        self._on_doubt = on_doubt
        self._on_duplicate = on_duplicate
        self._on_expiring = on_expiring
        self._patience = patience
        self._arrived: deque[Admitted] = deque()
        self._verified: deque[Admitted] = deque()
        self._has_arrived = asyncio.Event()
        self._has_verified = asyncio.Event()
        self._stored_at = 0.0
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def backlog(self) -> int:
        """Messages accepted and not answered yet."""
        return self._in_flight

    def waiting_seconds(self) -> float:
        """How long the oldest message that waits for its turn has waited."""
        oldest = [queue[0].submitted_at for queue in (self._arrived, self._verified) if queue]
        return time.monotonic() - min(oldest) if oldest else 0.0

    @property
    def is_behind(self) -> bool:
        """Whether more comes than can be stored: batches are, and yet what is next has waited for long.

        While nothing is stored because the database is away, messages wait for it within their patience.
        """
        return self.waiting_seconds() > MAX_WAIT and time.monotonic() - self._stored_at < MAX_WAIT / 2

    def add(self, admitted: Admitted) -> None:
        """Store it with the next batch, and call its `on_done` when that is decided."""
        self._in_flight += 1
        self._idle.clear()
        self._arrived.append(admitted)
        self._has_arrived.set()

    async def drain(self) -> None:
        """Wait until everything accepted is answered."""
        await self._idle.wait()

    async def run(self) -> None:
        """Verify and commit, for ever."""
        async with asyncio.TaskGroup() as stages:
            stages.create_task(
                self._repeat(self._has_arrived, self._arrived, self._take_arrived, self._verify)
            )
            stages.create_task(
                self._repeat(self._has_verified, self._verified, self._take_verified, self._commit, _MAX_REST)
            )

    async def _repeat(
        self,
        wake: asyncio.Event,
        queue: deque[Admitted],
        take: Callable[[], list[Admitted]],
        handle: Callable[[list[Admitted]], Awaitable[None]],
        max_rest: float = 0.0,
    ) -> None:
        span_began, taken = 0.0, 0
        while True:
            if not queue:
                wake.clear()
                await wake.wait()
            if taken >= _BUSY:
                await asyncio.sleep(span_began + SPAN - time.monotonic())
            if time.monotonic() - span_began >= SPAN:
                span_began, taken = time.monotonic(), 0
            batch = take()
            taken += len(batch)
            began = time.monotonic()
            try:
                await handle(batch)
            except asyncio.CancelledError:
                self._refuse(batch, SendingUnavailable())
                raise
            except Exception:
                # The loop must live: everybody behind this batch is waiting for it.
                log.exception("flush_failed", messages=len(batch))
                self._refuse(batch, Internal())
            took = time.monotonic() - began
            if max_rest and took > _LONG and len(batch) < _SMALL:
                await asyncio.sleep(min(took, max_rest))

    def _take_arrived(self) -> list[Admitted]:
        return [self._arrived.popleft() for _ in range(min(MAX_BATCH, len(self._arrived)))]

    def _take_verified(self) -> list[Admitted]:
        """The next batch; a second use of a client id waits for the one after, which finds the first one stored."""
        batch: list[Admitted] = []
        keys: set[tuple[UUID, UUID, UUID]] = set()
        again: list[Admitted] = []
        size = 0
        while self._verified and len(batch) < MAX_BATCH and size < MAX_BATCH_BYTES:
            admitted = self._verified.popleft()
            draft = admitted.parsed.draft
            keys.add((draft.conversation_id, draft.sender_device_id, draft.client_id))
            if len(keys) == len(batch):
                again.append(admitted)
                continue
            batch.append(admitted)
            size += len(admitted.parsed.canonical)
        self._verified.extendleft(reversed(again))
        return batch

    async def _verify(self, batch: list[Admitted]) -> None:
        genuine = await self._signatures.check(
            [(one.signing_key, one.parsed.signed, one.parsed.draft.signature) for one in batch]
        )
        for admitted, is_genuine in zip(batch, genuine, strict=True):
            if is_genuine:
                self._verified.append(admitted)
            else:
                self._answer(admitted, BadSignature())
        if self._verified:
            self._has_verified.set()

    async def _commit(self, batch: list[Admitted]) -> None:
        try:
            answers = await self._store_patiently(batch)
        except Unavailable:
            # The last attempt may have happened all the same; then nobody has been told of its messages.
            self._on_doubt()
            self._refuse(batch, SendingUnavailable())
            return
        self._stored_at = time.monotonic()
        events: list[CommittedEvent] = []
        for admitted, stored in zip(batch, answers, strict=True):
            if stored is None:
                self._answer(admitted, Internal())
            elif stored.outcome is store.Outcome.STORED or (
                # Our own earlier attempt, whose answer was lost: nobody has heard of it yet.
                stored.outcome is store.Outcome.DUPLICATE and stored.id == admitted.id
            ):
                message = admitted.message(stored)
                events.append(message_event(message))
                if message.head.expires_in is not None:
                    self._on_expiring(message.head)
                self._answer(admitted, SendResult(message, duplicate=False))
            elif stored.outcome is store.Outcome.DUPLICATE:
                self._hand_over(admitted)
            else:
                self._answer(admitted, _REFUSALS[stored.outcome]())
        if events:
            self._publish(events)

    async def _store_patiently(self, batch: list[Admitted]) -> Sequence[store.Stored | None]:
        """Store the batch however long the database is away, within the patience. Raises `Unavailable`."""
        rows = [admitted.row() for admitted in batch]
        sent_at = self._clock.now()
        deadline = batch[0].submitted_at + self._patience
        while True:
            try:
                return await self._store(rows, sent_at, max(0.1, min(deadline - time.monotonic(), 2.0)))
            except Unavailable:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(random.uniform(0.02, 0.1))
            except Exception:
                if len(rows) == 1:
                    log.exception("message_not_stored")
                    return [None]
                log.warning("batch_not_stored", messages=len(rows), exc_info=True)
                return [await self._store_alone(row, sent_at) for row in rows]

    async def _store_alone(self, row: store.NewMessage, sent_at: datetime) -> store.Stored | None:
        """One message of a batch that failed as a whole, so that it fails alone if it is the reason."""
        try:
            return (await self._store([row], sent_at, 2.0))[0]
        except Unavailable:
            raise
        except Exception:
            log.exception("message_not_stored")
            return None

    async def _store(
        self, rows: list[store.NewMessage], sent_at: datetime, acquire_timeout: float
    ) -> list[store.Stored]:
        async with self._db.connection(acquire_timeout=acquire_timeout) as connection:
            answers = await store.store_batch(connection, rows, sent_at, timeout=STATEMENT_TIMEOUT)
        stale = [at for at, answer in enumerate(answers) if answer.outcome is store.Outcome.STALE]
        if stale:
            again = [rows[at] for at in stale]
            async with self._db.transaction() as tx:
                await store.lock_conversations(
                    tx, {row.conversation_id for row in again}, timeout=STATEMENT_TIMEOUT
                )
                settled = await store.store_batch(tx, again, sent_at, timeout=STATEMENT_TIMEOUT)
            for at, answer in zip(stale, settled, strict=True):
                answers[at] = answer
        return answers

    def _refuse(self, batch: Sequence[Admitted], failure: Failure) -> None:
        for admitted in batch:
            self._answer(admitted, failure)

    def _answer(self, admitted: Admitted, result: SendResult | Failure) -> None:
        on_done = self._settle(admitted)
        if on_done is None:
            return
        try:
            on_done(result)
        except Exception:
            # One reader that cannot take its answer must not cost the others theirs.
            log.exception("send_answer_failed")

    def _hand_over(self, admitted: Admitted) -> None:
        on_done = self._settle(admitted)
        if on_done is not None:
            self._on_duplicate(admitted.parsed, on_done)

    def _settle(self, admitted: Admitted) -> OnDone | None:
        """Take the message off the backlog; None if it had its answer already."""
        on_done, admitted.on_done = admitted.on_done, None
        if on_done is not None:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()
        return on_done


def _expires_at(draft: Draft, sent_at: datetime) -> datetime | UnsetType:
    if draft.expires_in is None or draft.expires_from_read:
        return UNSET
    return sent_at + timedelta(seconds=draft.expires_in)
