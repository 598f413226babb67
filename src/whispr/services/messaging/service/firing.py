"""Scheduled messages go out when their time has come, each exactly once, whichever node has time for it.

A node claims what is due for a few seconds and sends it as its author would have. The statement that stores the message
marks the scheduled one as sent: a node that dies at any point leaves either both or neither. Nothing a node believes
about a claim matters: a change, a cancellation or another node's success in the meantime makes that statement refuse.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final, Protocol
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.errors import Failure, Kind, SessionRevoked, Unavailable
from whispr.kit.telemetry import get_logger, metrics
from whispr.services.messaging.models import (
    BadSignature,
    DevicesMismatch,
    Draft,
    Plan,
    PlanRef,
    PlanStatus,
    Rescheduled,
    ScheduledNotFound,
    SendResult,
)
from whispr.services.messaging.store import scheduled as store

log = get_logger(__name__)

LEASE: Final = timedelta(seconds=10)
"""For how long a claimed message is left to the node that claimed it. Not what keeps it from being sent twice."""

AT_ONCE: Final = 100
"""Messages one node sends at the same time, each of another conversation."""

# New ones wake the node they are made on. This is how late one can be whose node has died since.
_LONGEST_SLEEP: Final = 1.0

_FIRST_RETRY: Final = 0.5
_LONGEST_RETRY: Final = 60.0

# A caller's clock may be ahead of ours by so much: the rest is waited for.
_EARLY: Final = 1.0

# How long a caller waits for those that go before its message, or for another node that is sending it.
_PATIENCE: Final = 5.0

_PASSING: Final = (Kind.UNAVAILABLE, Kind.RATE_LIMITED, Kind.INTERNAL)
_NEEDS_AUTHOR: Final = (DevicesMismatch, SessionRevoked, BadSignature)

_lateness = metrics.histogram(
    "scheduled_message_lateness_seconds", "From the time a message was to be sent to its sending."
)
_outcomes = metrics.counter("scheduled_messages", "Scheduled messages, by what became of them.", ("outcome",))


class Sender(Protocol):
    """The part of sending this needs."""

    async def send(self, draft: Draft) -> SendResult:
        """Send a message; raises why it is refused."""


class Cached(Protocol):
    """What is remembered of conversations."""

    def invalidate(self, conversation_id: UUID) -> None:
        """Forget one."""


class Notices(Protocol):
    """The way to people's devices."""

    def notice(self, user_ids: Sequence[UUID], event: str, payload: Any) -> None:
        """Push `event` on people's own channels; returns at once."""


class Firing:
    """`run()` is its supervised loop. `grace` is how long a message is left to scheduling before it is late."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        sender: Sender,
        directory: Cached,
        notices: Notices,
        *,
        grace: timedelta = timedelta(0),
    ) -> None:
        self._db = db
        self._clock = clock
        self._sender = sender
        self._directory = directory
        self._notices = notices
        self._grace = grace
        self._woken = asyncio.Event()
        self._under_way: set[asyncio.Task[None]] = set()
        self._is_draining = False

    def wake(self) -> None:
        """Something may be due sooner than was known."""
        self._woken.set()

    async def run(self) -> None:
        """Send what is due, for ever."""
        while True:
            self._woken.clear()
            try:
                delay = await self.send_due()
            except Failure as failure:
                log.warning("scheduled_messages_unavailable", code=failure.code)
                delay = _LONGEST_SLEEP
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), delay)

    async def send_due(self) -> float:
        """Begin to send what is due; the seconds until there may be more."""
        free = AT_ONCE - len(self._under_way)
        if self._is_draining or free <= 0:
            return _LONGEST_SLEEP
        now = self._clock.now()
        async with self._db.connection() as connection:
            plans = await store.claim(connection, now - self._grace, now + LEASE, free)
            for plan in plans:
                self._start(plan)
            due_at = await store.next_due(connection, now - self._grace)
        if due_at is None:
            return _LONGEST_SLEEP
        return min(_LONGEST_SLEEP, max(0.0, (due_at + self._grace - self._clock.now()).total_seconds()))

    async def fire(self, plan_id: UUID) -> Plan:
        """Send one message if it is due, after those that go before it; what became of it. May be repeated.

        Raises `ScheduledNotFound`, and `Unavailable` if it could not be sent now: it stays pending and is not forgotten.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _PATIENCE
        while True:
            async with self._db.connection() as connection:
                plan = await store.get(connection, plan_id)
            if plan is None:
                raise ScheduledNotFound
            now = self._clock.now()
            early = (plan.send_at - now).total_seconds()
            if plan.status is not PlanStatus.PENDING or early > _EARLY:
                return plan
            if early <= 0:
                async with self._db.connection() as connection:
                    claimed = await store.claim_in(connection, plan.draft.conversation_id, now, now + LEASE)
                for head in sorted(claimed, key=lambda one: (one.send_at, one.id)):
                    await self._send(head)
                if claimed:
                    continue
            if loop.time() >= deadline:
                raise Unavailable(retry_after=1)
            await asyncio.sleep(min(max(early, 0.05), _EARLY))

    async def drain(self) -> None:
        """Begin nothing more, and wait for what is under way."""
        self._is_draining = True
        while self._under_way:
            await asyncio.wait(self._under_way)

    def _start(self, plan: Plan) -> None:
        task = asyncio.create_task(self._send(plan))
        self._under_way.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        # The next one of its conversation may be due.
        self._woken.set()

    async def _send(self, plan: Plan) -> None:
        try:
            await self._try(plan)
        except Failure as failure:
            # The database is away. The claim ends by itself.
            log.warning("scheduled_message_delayed", code=failure.code)
        except Exception:
            log.exception("scheduled_message_not_sent", scheduled_id=str(plan.id))

    async def _try(self, plan: Plan) -> None:
        # To be refused for good on the word of an old entry would be worse than to look again.
        self._directory.invalidate(plan.draft.conversation_id)
        try:
            result = await self._sender.send(plan.draft)
        except Rescheduled:
            return
        except _NEEDS_AUTHOR as failure:
            await self._settle(plan, PlanStatus.NEEDS_REENCRYPT, failure)
        except Failure as failure:
            if failure.kind in _PASSING or failure.retry_after is not None:
                await self._postpone(plan, failure)
            else:
                await self._settle(plan, PlanStatus.FAILED, failure)
        else:
            await self._sent(plan, result)

    async def _sent(self, plan: Plan, result: SendResult) -> None:
        head = result.message.head
        if result.duplicate:
            async with self._db.connection() as connection:
                await store.mark_as_sent(connection, _ref(plan), head.id, self._clock.now())
        else:
            _lateness.observe(max(0.0, (head.sent_at - plan.send_at).total_seconds()))
        _outcomes.labels(outcome="sent").inc()

    async def _postpone(self, plan: Plan, failure: Failure) -> None:
        delay = min(_LONGEST_RETRY, _FIRST_RETRY * 2 ** min(plan.attempts, 16)) * random.uniform(0.5, 1.0)
        # What is said to last may end sooner.
        delay = max(delay, min(failure.retry_after or 0.0, _LONGEST_RETRY))
        log.warning("scheduled_message_postponed", code=failure.code, attempts=plan.attempts + 1)
        async with self._db.connection() as connection:
            await store.postpone(connection, _ref(plan), self._clock.now() + timedelta(seconds=delay))
        _outcomes.labels(outcome="postponed").inc()

    async def _settle(self, plan: Plan, status: PlanStatus, failure: Failure) -> None:
        needs = needs_of(failure) if status is PlanStatus.NEEDS_REENCRYPT else None
        async with self._db.connection() as connection:
            is_settled = await store.settle(
                connection, _ref(plan), status, failure.code, needs, self._clock.now()
            )
        if not is_settled:
            return
        _outcomes.labels(outcome=status.value).inc()
        if needs is not None:
            self._notices.notice(
                [plan.draft.sender_id], "needs_reencrypt", needs_notice(plan, failure.code, needs)
            )
        else:
            body = {
                "scheduled_id": plan.id,
                "conversation_id": plan.draft.conversation_id,
                "failure": failure.code,
            }
            self._notices.notice([plan.draft.sender_id], "scheduled_failed", body)


def needs_of(failure: Failure) -> dict[str, Any]:
    """Which devices the envelopes were not for; empty lists where the device that signed is the trouble."""
    fields = failure.fields
    return {
        "missing": fields.get("missing", []),
        "extra": fields.get("extra", []),
        "stale": fields.get("stale", []),
        "owners": fields.get("owners", {}),
    }


def needs_notice(plan: Plan, code: str | None, needs: dict[str, Any] | None) -> dict[str, Any]:
    """The payload of `needs_reencrypt`."""
    return {
        "scheduled_id": plan.id,
        "conversation_id": plan.draft.conversation_id,
        "failure": code,
        **(needs or {}),
    }


def _ref(plan: Plan) -> PlanRef:
    return PlanRef(plan.id, plan.version)
