"""Background work: hints that could not be sent, giving back abandoned reservations and forgetting old operations."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from whispr.kit.errors import Unavailable
from whispr.kit.telemetry import get_logger
from whispr.services.user.service import UserService

log = get_logger(__name__)

EXPIRY_SECONDS = 60.0
FORGETTING_SECONDS = 3600.0


def loops(service: UserService) -> dict[str, Callable[[], Awaitable[None]]]:
    """The supervised loops by name."""
    return {
        "hints": service.hints.run,
        "expire_reservations": lambda: _every(EXPIRY_SECONDS, service.storage.expire_reservations),
        "forget_operations": lambda: _every(FORGETTING_SECONDS, service.storage.forget_operations),
    }


async def _every(seconds: float, work: Callable[[], Awaitable[int]]) -> None:
    while True:
        try:
            await work()
        except Unavailable as failure:
            # A restarting database is no crash: counting it as one would make the supervisor give up on the process.
            log.warning("job_postponed", code=failure.code)
        await asyncio.sleep(seconds)
