"""Background work: the outbox, receipts and housekeeping."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

from whispr.kit.errors import Unavailable
from whispr.kit.outbox import Dispatcher
from whispr.kit.telemetry import get_logger
from whispr.services.messaging.service.expiry import Expiry
from whispr.services.messaging.service.firing import Firing
from whispr.services.messaging.service.housekeeping import Housekeeping
from whispr.services.messaging.service.receipts import Receipts
from whispr.services.messaging.service.reports import Reports
from whispr.services.messaging.service.retention import Retention
from whispr.services.messaging.service.scheduled import Scheduled

log = get_logger(__name__)

HOUSEKEEPING_SECONDS = 6 * 3600.0
RETENTION_SECONDS = 1800.0


def loops(
    dispatcher: Dispatcher,
    receipts: Receipts,
    housekeeping: Housekeeping,
    expiry: Expiry,
    retention: Retention,
    reports: Reports,
    firing: Firing,
    scheduled: Scheduled,
    *,
    scheduled_life: timedelta,
) -> dict[str, Callable[[], Awaitable[None]]]:
    """The supervised loops by name."""
    return {
        "outbox": dispatcher.run,
        "receipts": receipts.run,
        "housekeeping": lambda: _every(HOUSEKEEPING_SECONDS, housekeeping.run_once),
        "expiry": expiry.run,
        "retention": lambda: _every(RETENTION_SECONDS, retention.purge_outdated),
        "reports": lambda: _every(HOUSEKEEPING_SECONDS, reports.forget_old),
        "scheduled_messages": firing.run,
        "ended_scheduled_messages": lambda: _every(
            HOUSEKEEPING_SECONDS, lambda: scheduled.forget(scheduled_life)
        ),
    }


async def _every(seconds: float, work: Callable[[], Awaitable[int]]) -> None:
    while True:
        try:
            await work()
        except Unavailable as failure:
            # A restarting database is no crash: counting it as one would make the supervisor give up on the process.
            log.warning("job_postponed", code=failure.code)
        await asyncio.sleep(seconds)
