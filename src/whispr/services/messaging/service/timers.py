"""Timers of scheduled messages: scheduling is told when each is due, by way of the outbox.

The message stays here; scheduling gets its id and its time, and calls back. Calls may be lost, repeated and late: firing
decides by what is stored, and by itself sends what nobody called for.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any, Final, Protocol
from uuid import UUID, uuid5

from whispr.kit import outbox
from whispr.kit.db import Connection, Database
from whispr.kit.outbox import Handler, OutboxRow
from whispr.services.messaging.models import Plan, PlanRef, PlanStatus
from whispr.services.messaging.store import scheduled as store

SCHEDULE_JOB: Final = "schedule_job"
"""Topic of the rows that say that a scheduled message is not what it was. Their key is its id."""

JOB_TYPE: Final = "scheduled_message"


class Jobs(Protocol):
    """The part of scheduling this needs."""

    async def schedule_job(
        self,
        operation_id: UUID,
        key: str,
        revision: int,
        type: str,  # noqa: A002 - the job's word for it
        run_at: datetime,
        payload: dict[str, Any],
        *,
        user_id: UUID | None = None,
    ) -> object:
        """Plan a job, or plan it anew; an older revision than one that is known changes nothing."""

    async def cancel_job(self, operation_id: UUID, key: str, revision: int) -> object:
        """Let no revision up to this one run any more."""


async def set_timer(tx: Connection, ref: PlanRef) -> None:
    """Have scheduling told of what the transaction makes of a scheduled message."""
    await outbox.add(tx, SCHEDULE_JOB, str(ref.id), {"version": ref.version})


class Timers:
    """The outbox handler. It tells what is stored by then, so rows may come late, twice and in any order."""

    def __init__(self, db: Database, jobs: Jobs) -> None:
        self._db = db
        self._jobs = jobs

    def handlers(self) -> dict[str, Handler]:
        """By topic."""
        return {SCHEDULE_JOB: self.tell}

    async def tell(self, rows: list[OutboxRow]) -> None:
        """Tell of the messages of some rows."""
        versions = {UUID(row.key): int(row.payload["version"]) for row in rows}
        async with self._db.connection() as connection:
            plans = {plan.id: plan for plan in await store.get_all(connection, list(versions))}
        await asyncio.gather(
            *(self._tell(plan_id, version, plans.get(plan_id)) for plan_id, version in versions.items())
        )

    async def _tell(self, plan_id: UUID, version: int, plan: Plan | None) -> None:
        if plan is not None and plan.status is PlanStatus.PENDING:
            await self._jobs.schedule_job(
                uuid5(plan_id, f"schedule:{plan.version}"),
                str(plan_id),
                plan.version,
                JOB_TYPE,
                plan.send_at,
                {"scheduled_id": str(plan_id)},
                user_id=plan.draft.sender_id,
            )
        elif plan is None or plan.status is PlanStatus.CANCELLED:
            revision = version if plan is None else plan.version
            await self._jobs.cancel_job(uuid5(plan_id, f"cancel:{revision}"), str(plan_id), revision)
