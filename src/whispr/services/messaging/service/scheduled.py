"""Scheduled messages as their authors deal with them: made, looked at, changed and cancelled until they are sent.

Content and signature are held to the rules of sending when they are made, and again when they go out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType

from whispr.kit.batching import Batcher
from whispr.kit.cache import RateLimiter
from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.kit.errors import Unavailable
from whispr.kit.ids import uuid7
from whispr.services.messaging.models import (
    AlreadySent,
    ClientIdConflict,
    Draft,
    InvalidContent,
    InvalidSendAt,
    NotPending,
    Plan,
    PlanRef,
    PlanStatus,
    ReplyNotFound,
    ScheduledNotFound,
    TooManyScheduled,
)
from whispr.services.messaging.service.content import Parsed, parse
from whispr.services.messaging.service.timers import set_timer
from whispr.services.messaging.store import scheduled as store
from whispr.services.messaging.store import sending as sending_store

MAX_OPEN: Final = 100
MAX_AHEAD: Final = timedelta(days=366)

CHANGES_PER_HOUR: Final = 600
"""Of one person, new ones included."""

# A change that meets another one of the same person looks again; so often they do not meet.
_MAX_LOOKS: Final = 5

_CHUNK: Final = 5_000


class Examiner(Protocol):
    """The part of sending this needs."""

    async def examine(self, draft: Draft) -> Parsed:
        """Hold a draft to every rule of sending; raises why it would be refused."""


class PlanChange(msgspec.Struct, frozen=True):
    """What to change; what is unset stays. `content` and `signature` come together, signed by the calling device."""

    content: bytes | UnsetType = UNSET
    signature: bytes | UnsetType = UNSET
    send_at: datetime | UnsetType = UNSET
    reply_to_id: UUID | UnsetType | None = UNSET
    expires_in: int | UnsetType | None = UNSET
    expires_from_read: bool | UnsetType = UNSET


class Scheduled:
    """The rules of scheduling. `on_change` is called after each commit that the loops may want to know of."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        examiner: Examiner,
        limiter: RateLimiter,
        on_change: Callable[[], None],
        *,
        ensure_on: Callable[[], None] = lambda: None,
    ) -> None:
        self._ensure_on = ensure_on
        self._db = db
        self._clock = clock
        self._examiner = examiner
        self._limiter = limiter
        self._on_change = on_change
        self._needs = Batcher(self._read_needs)

    async def schedule(self, draft: Draft, send_at: datetime) -> Plan:
        """Keep a message and send it at `send_at`. The same client id again answers what was made of it the first time.

        Raises what sending raises, `InvalidSendAt`, `TooManyScheduled`, `AlreadySent` (it exists as a message),
        `ClientIdConflict` (with other content) and `FeatureOff`.
        """
        self._ensure_on()
        parsed = parse(draft)
        earlier = await self._find_earlier(parsed)
        if earlier is not None:
            return earlier
        send_at = self._checked_time(send_at)
        await self._count(draft.sender_id)
        await self._examiner.examine(draft)
        plan = self._new_plan(parsed, send_at)
        async with self._db.transaction() as tx:
            await store.lock_person(tx, draft.sender_id)
            if await store.count_open(tx, draft.sender_id) >= MAX_OPEN:
                raise TooManyScheduled(limit=MAX_OPEN)
            is_kept = await store.insert(tx, plan)
            if is_kept:
                await set_timer(tx, PlanRef(plan.id, plan.version))
        if not is_kept:
            # The same request, made twice at once.
            return await self._find_earlier(parsed) or plan
        self._on_change()
        return plan

    async def page(
        self, user_id: UUID, status: PlanStatus | None, after: tuple[datetime, UUID] | None, limit: int
    ) -> tuple[list[Plan], tuple[datetime, UUID] | None]:
        """A person's own, by the time they are to be sent, and where the next page begins."""
        async with self._db.connection() as connection:
            plans = await store.page(connection, user_id, status, after, limit + 1)
        if len(plans) <= limit:
            return plans, None
        last = plans[limit - 1]
        return plans[:limit], (last.send_at, last.id)

    async def get(self, user_id: UUID, plan_id: UUID) -> Plan:
        """One of a person's own. Raises `ScheduledNotFound`, also for other people's."""
        async with self._db.connection() as connection:
            plan = await store.get(connection, plan_id)
        if plan is None or plan.draft.sender_id != user_id:
            raise ScheduledNotFound
        return plan

    async def change(self, user_id: UUID, device_id: UUID, plan_id: UUID, change: PlanChange) -> Plan:
        """Change one that is not sent; one that waits for its author waits for nothing once its content is new.

        The same change again is answered as if it were the first. Raises what sending raises, `ScheduledNotFound`,
        `InvalidSendAt`, `AlreadySent`, `NotPending`, and `ClientIdConflict` if the calling device, which signs the content
        from now on, has used the client id.
        """
        for _ in range(_MAX_LOOKS):
            plan = await self.get(user_id, plan_id)
            changed = _changed(plan, device_id, change)
            if changed == plan and not _is_offered_again(plan, change):
                return plan
            _check_open(plan)
            if await self._replace(plan, changed, change):
                self._on_change()
                return await self.get(user_id, plan_id)
        raise Unavailable(retry_after=1)

    async def cancel(self, user_id: UUID, plan_id: UUID) -> None:
        """Never send it. May be repeated. Raises `ScheduledNotFound`, `AlreadySent`."""
        async with self._db.transaction() as tx:
            cancelled = await store.cancel(tx, plan_id, user_id, self._clock.now())
            if cancelled is not None:
                await set_timer(tx, cancelled)
        if cancelled is not None:
            self._on_change()
            return
        plan = await self.get(user_id, plan_id)
        if plan.status is PlanStatus.SENT:
            raise AlreadySent(message_id=str(plan.message_id))

    async def in_need(self, user_id: UUID) -> list[Plan]:
        """What the person's devices have to encrypt again. Questions that come together are one statement."""
        return await self._needs.ask(user_id)

    async def forget(self, older_than: timedelta) -> int:
        """Drop what ended longer ago than that; how many."""
        before = self._clock.now() - older_than
        gone = 0
        while True:
            # Small transactions: a long one would keep vacuum from every table of the database.
            async with self._db.connection() as connection:
                removed = await store.forget(connection, before, _CHUNK)
            gone += removed
            if removed < _CHUNK:
                return gone

    async def _find_earlier(self, parsed: Parsed) -> Plan | None:
        draft = parsed.draft
        async with self._db.connection() as connection:
            plan = await store.find(connection, draft.conversation_id, draft.sender_id, draft.client_id)
            sent = await sending_store.find_sent(
                connection, draft.conversation_id, draft.sender_device_id, draft.client_id
            )
        if plan is not None:
            if plan.content_sha256 != parsed.content_sha256:
                raise ClientIdConflict
            return plan
        if sent is not None:
            message, first_sha256 = sent
            if first_sha256 != parsed.content_sha256:
                raise ClientIdConflict
            raise AlreadySent(message_id=str(message.head.id))
        return None

    async def _replace(self, plan: Plan, changed: Plan, change: PlanChange) -> bool:
        if changed.send_at != plan.send_at:
            self._checked_time(changed.send_at)
        await self._count(plan.draft.sender_id)
        if change.content is not UNSET:
            await self._examiner.examine(changed.draft)
            changed = msgspec.structs.replace(changed, status=PlanStatus.PENDING, failure=None, needs=None)
        now = self._clock.now()
        ref = PlanRef(plan.id, plan.version + 1)
        changed = msgspec.structs.replace(
            changed, version=ref.version, due_at=max(changed.send_at, now), attempts=0, updated_at=now
        )
        async with self._db.transaction() as tx:
            if changed.draft.reply_to_id != plan.draft.reply_to_id:
                await _check_reply(tx, changed.draft)
            await self._check_client_id(tx, plan, changed)
            is_replaced = await store.replace(tx, changed, plan.version)
            if is_replaced:
                await set_timer(tx, ref)
        return is_replaced

    async def _check_client_id(self, tx: Connection, plan: Plan, changed: Plan) -> None:
        device_id = changed.draft.sender_device_id
        if device_id == plan.draft.sender_device_id:
            return
        draft = changed.draft
        if await sending_store.find_sent(tx, draft.conversation_id, device_id, draft.client_id) is not None:
            raise ClientIdConflict

    async def _read_needs(self, user_ids: list[UUID]) -> Sequence[list[Plan]]:
        async with self._db.connection() as connection:
            plans = await store.in_need(connection, user_ids)
        by_person: dict[UUID, list[Plan]] = {user_id: [] for user_id in user_ids}
        for plan in plans:
            by_person[plan.draft.sender_id].append(plan)
        return [by_person[user_id] for user_id in user_ids]

    async def _count(self, user_id: UUID) -> None:
        await self._limiter.check("scheduled_messages", str(user_id), CHANGES_PER_HOUR, 3600)

    def _checked_time(self, send_at: datetime) -> datetime:
        now = self._clock.now()
        if not now < send_at <= now + MAX_AHEAD:
            raise InvalidSendAt
        return send_at.astimezone(UTC)

    def _new_plan(self, parsed: Parsed, send_at: datetime) -> Plan:
        now = self._clock.now()
        plan_id = uuid7()
        return Plan(
            id=plan_id,
            draft=msgspec.structs.replace(parsed.draft, content=parsed.canonical, plan=PlanRef(plan_id, 1)),
            content_sha256=parsed.content_sha256,
            send_at=send_at,
            status=PlanStatus.PENDING,
            failure=None,
            needs=None,
            message_id=None,
            due_at=send_at,
            attempts=0,
            version=1,
            created_at=now,
            updated_at=now,
        )


async def _check_reply(tx: Connection, draft: Draft) -> None:
    if draft.reply_to_id is not None and not await store.can_be_replied_to(
        tx, draft.conversation_id, draft.reply_to_id, draft.sender_id
    ):
        raise ReplyNotFound


def _check_open(plan: Plan) -> None:
    if plan.status is PlanStatus.SENT:
        raise AlreadySent(message_id=str(plan.message_id))
    if not plan.status.is_open:
        raise NotPending(scheduled_status=plan.status.value)


def _is_offered_again(plan: Plan, change: PlanChange) -> bool:
    # The devices may be again what they were when it was encrypted.
    return plan.status is PlanStatus.NEEDS_REENCRYPT and change.content is not UNSET


def _changed(plan: Plan, device_id: UUID, change: PlanChange) -> Plan:
    """`plan` with the change made, equal to it where nothing changes."""
    draft = plan.draft
    changes: dict[str, object] = {
        name: value
        for name, value in (
            ("reply_to_id", change.reply_to_id),
            ("expires_in", change.expires_in),
            ("expires_from_read", change.expires_from_read),
        )
        if value is not UNSET
    }
    content_sha256 = plan.content_sha256
    if (change.content is UNSET) != (change.signature is UNSET):
        raise InvalidContent("Content and its signature are changed together.")
    if change.content is not UNSET and change.signature is not UNSET:
        signed = msgspec.structs.replace(
            draft, content=change.content, signature=change.signature, sender_device_id=device_id
        )
        parsed = parse(signed)
        content_sha256 = parsed.content_sha256
        is_same = content_sha256 == plan.content_sha256 and device_id == draft.sender_device_id
        # What was sent is kept as a message, and here as its digest only.
        if not (is_same and plan.status is PlanStatus.SENT):
            changes |= {
                "content": parsed.canonical,
                "signature": change.signature,
                "sender_device_id": device_id,
            }
    send_at = plan.send_at if change.send_at is UNSET else change.send_at
    if change.expires_in is None:
        changes["expires_from_read"] = False
    return msgspec.structs.replace(
        plan,
        draft=msgspec.structs.replace(draft, **changes),
        content_sha256=content_sha256,
        send_at=send_at,
    )
