"""Background work: telling others of deleted accounts, keeping keys fresh, removing what has served its time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Protocol
from uuid import UUID

from whispr.kit.errors import Unavailable
from whispr.kit.outbox import Handler, OutboxRow
from whispr.kit.telemetry import get_logger, metrics
from whispr.services.auth.models import erase_topic
from whispr.services.auth.service import Auth
from whispr.services.auth.settings import AuthSettings

log = get_logger(__name__)

tokens_per_key = metrics.gauge("auth_push_tokens", "Push tokens under each data key.", ("key",))


class EraseTarget(Protocol):
    """What auth needs of a service that keeps something of a person."""

    async def erase_user(self, user_id: UUID, operation_id: UUID) -> object: ...


def loops(auth: Auth, settings: AuthSettings) -> dict[str, Callable[[], Awaitable[None]]]:
    """The supervised loops by name."""
    return {
        "keys": lambda: _every(settings.keys_check_seconds, lambda: tend_keys(auth)),
        "cleanup": lambda: _every(settings.cleanup_seconds, lambda: _clean(auth)),
    }


def erasers(targets: dict[str, EraseTarget]) -> dict[str, Handler]:
    """Outbox handlers that tell each of `targets` (by service) of deleted accounts."""
    return {erase_topic(service): _eraser(target) for service, target in targets.items()}


async def tend_keys(auth: Auth) -> None:
    """Rotate keys that are due, re-encrypt what lies under old ones, and say how far that is."""
    await auth.signing.tend()
    rows = await auth.housekeeping.tend_data_keys()
    tokens_per_key.clear()
    for key_id, count in rows.items():
        tokens_per_key.labels(key=key_id).set(count)


def _eraser(target: EraseTarget) -> Handler:
    async def erase(rows: list[OutboxRow]) -> None:
        for row in rows:
            await target.erase_user(UUID(row.payload["user_id"]), UUID(row.payload["operation_id"]))

    return erase


async def _clean(auth: Auth) -> None:
    cleaned = await auth.housekeeping.clean()
    expired = await auth.expiry.run()
    log.info(
        "cleanup_done", sessions=cleaned.sessions, revocations=cleaned.revocations, devices_expired=expired
    )


async def _every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        # Replicas that started together need not all look at the same moment.
        await asyncio.sleep(seconds * random.uniform(0.8, 1.2))
        try:
            await work()
        except Unavailable as failure:
            # A restarting database is no crash: counting it as one would make the supervisor give up on the process.
            log.warning("job_postponed", code=failure.code)
