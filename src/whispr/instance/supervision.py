"""Keeps child processes running: the first restart at once, later ones with growing pauses."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable

from whispr.instance.errors import StartFailed

PAUSES = (0.0, 0.25, 0.5, 1.0, 2.0, 5.0)
# A process that ran this long was healthy: its next end is a new accident, not one more of a series.
HEALTHY_SECONDS = 30.0
POLL_SECONDS = 0.1

Process = subprocess.Popen[bytes]


async def ended(process: Process) -> int:
    """Waits until `process` has ended; returns its exit status. Costs nothing while it runs where pidfds exist."""
    if process.poll() is None and hasattr(os, "pidfd_open"):
        loop = asyncio.get_running_loop()
        descriptor = os.pidfd_open(process.pid)
        gone = loop.create_future()
        loop.add_reader(descriptor, lambda: gone.done() or gone.set_result(None))
        try:
            await gone
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
    while process.poll() is None:
        await asyncio.sleep(POLL_SECONDS)
    return process.returncode


class Child:
    """One supervised process. `spawn` starts it; `changed` is called after each start and each unexpected end."""

    def __init__(
        self,
        name: str,
        spawn: Callable[[], Process],
        *,
        changed: Callable[[], None],
        stop_signal: int = signal.SIGTERM,
        grace: float = 15.0,
    ) -> None:
        self.name = name
        self.restarts = 0
        self.last_exit: int | None = None
        self._spawn = spawn
        self._changed = changed
        self._stop_signal = stop_signal
        self._grace = grace
        self._process: Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the process and keeps it running until `stop`."""
        self._process = self._spawn()
        self._keeper = asyncio.create_task(self._keep(), name=f"keep {self.name}")

    async def _keep(self) -> None:
        failures = 0
        while self._process is not None:
            started = time.monotonic()
            self.last_exit = await ended(self._process)
            failures = 1 if time.monotonic() - started > HEALTHY_SECONDS else failures + 1
            self._changed()
            await asyncio.sleep(PAUSES[min(failures, len(PAUSES)) - 1])
            self.restarts += 1
            self._process = self._spawn()
            self._changed()

    async def stop(self) -> None:
        """Asks the process to end, waits, and kills it after the grace period."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(self._stop_signal)
        try:
            await asyncio.wait_for(ended(process), self._grace)
        except TimeoutError:
            process.kill()
            await ended(process)


async def wait_until(
    child: Child, ready: Callable[[], "asyncio.Future[bool] | object"], seconds: float, advice: str
) -> None:
    """Waits until `ready` says so. Raises StartFailed when `child` keeps ending or `seconds` have passed."""
    deadline = time.monotonic() + seconds
    while True:
        answer = ready()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer:
            return
        if child.restarts >= len(PAUSES) - 1:
            raise StartFailed(f"{child.name} does not stay up (exit status {child.last_exit}). {advice}")
        if time.monotonic() > deadline:
            raise StartFailed(f"{child.name} was not ready after {seconds:.0f} s. {advice}")
        await asyncio.sleep(0.05)
