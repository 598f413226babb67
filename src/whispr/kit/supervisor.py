"""Loops that must not die: a crashed one is restarted with backoff, and one that keeps crashing ends the process.

A process that gives up loudly is restarted whole by what supervises it (`whispr up`, Kubernetes); one that limps on
without its flusher or dispatcher would look healthy and lose work.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable

from whispr.kit.telemetry import get_logger, metrics

log = get_logger(__name__)

LoopFactory = Callable[[], Awaitable[None]]


class GaveUp(Exception):
    """A loop crashed too often to be restarted again."""


class Supervisor:
    """Runs named loops. `max_restarts` within `window` seconds is one too many."""

    def __init__(
        self, *, max_restarts: int = 20, window: float = 60.0, backoff: float = 0.05, cap: float = 5.0
    ) -> None:
        self._max_restarts = max_restarts
        self._window = window
        self._backoff = backoff
        self._cap = cap
        self._factories: dict[str, LoopFactory] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failed: asyncio.Future[GaveUp] | None = None

    def add(self, name: str, factory: LoopFactory) -> None:
        """Supervise the loop that `factory` starts; a loop that returns is finished and not restarted."""
        if name in self._factories:
            raise ValueError(f"there is a loop {name!r} already")
        self._factories[name] = factory
        if self._failed is not None:
            self._start(name)

    def start(self) -> None:
        """Start every loop added so far."""
        self._failed = asyncio.get_running_loop().create_future()
        for name in self._factories:
            self._start(name)

    async def gave_up(self) -> GaveUp:
        """Wait until a loop has crashed too often, and return why."""
        assert self._failed is not None
        return await asyncio.shield(self._failed)

    async def stop(self) -> None:
        """Cancel every loop and wait for each."""
        tasks = set(self._tasks.values())
        while tasks:
            for task in tasks:
                task.cancel()
            # A loop may lose a cancellation: on 3.11 `wait_for`, which redis-py writes through, forgets one that arrives
            # together with its result. Asking once would then wait for ever.
            _, tasks = await asyncio.wait(tasks, timeout=0.5)
        self._tasks.clear()

    def _start(self, name: str) -> None:
        self._tasks[name] = asyncio.create_task(self._keep(name, self._factories[name]), name=f"loop:{name}")

    async def _keep(self, name: str, factory: LoopFactory) -> None:
        crashes: deque[float] = deque()
        loop = asyncio.get_running_loop()
        while True:
            try:
                await factory()
                return
            except asyncio.CancelledError:
                raise
            except Exception as error:
                now = loop.time()
                crashes.append(now)
                while crashes[0] < now - self._window:
                    crashes.popleft()
                metrics.loop_restarts.labels(loop=name).inc()
                log.exception("loop_crashed", loop=name, crashes=len(crashes))
                if len(crashes) > self._max_restarts:
                    assert self._failed is not None
                    if not self._failed.done():
                        self._failed.set_result(
                            GaveUp(f"loop {name} crashed {len(crashes)} times: {error!r}")
                        )
                    return
                delay = min(self._cap, self._backoff * 2 ** min(len(crashes) - 1, 16))
                await asyncio.sleep(random.uniform(delay / 2, delay))
