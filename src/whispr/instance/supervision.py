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
        gone = asyncio.Event()
        loop.add_reader(descriptor, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
    while process.poll() is None:  # noqa: ASYNC110 (systems without pidfds have no event to wait for)
        await asyncio.sleep(POLL_SECONDS)
    return process.returncode


class Child:
    """One supervised process. `spawn` starts it; `changed` is called after each restart, `trouble` is told of each end
    that nobody asked for. `started_at` is when the present process was started, in seconds since 1970."""

    def __init__(
        self,
        name: str,
        spawn: Callable[[], Process],
        *,
        changed: Callable[[], None],
        trouble: Callable[[str], None],
        stop_signal: int = signal.SIGTERM,
        grace: float = 15.0,
    ) -> None:
        self.name = name
        self.restarts = 0
        self.started_at = 0.0
        self.last_exit: int | None = None
        self._spawn = spawn
        self._changed = changed
        self._trouble = trouble
        self._stop_signal = stop_signal
        self._grace = grace
        self._process: Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def running(self) -> bool:
        """False when the process has ended, until it is started again."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the process and keeps it running until `stop`."""
        self._process = self._begin()
        self._keeper = asyncio.create_task(self._keep(self._process), name=f"keep {self.name}")

    async def _keep(self, process: Process) -> None:
        failures = 0
        while True:
            started = time.monotonic()
            self.last_exit = await ended(process)
            failures = 1 if time.monotonic() - started > HEALTHY_SECONDS else failures + 1
            self._trouble(f"{self.name} ended ({describe_exit(self.last_exit)}); starting it again")
            process = await self._start_again(failures)
            self._changed()

    async def _start_again(self, failures: int) -> Process:
        while True:
            await asyncio.sleep(PAUSES[min(failures, len(PAUSES)) - 1])
            self.restarts += 1
            try:
                self._process = self._begin()
            except OSError as error:
                # No memory or no process numbers left for a moment: the next try may do.
                self._trouble(f"{self.name} could not be started: {error}")
                failures += 1
            else:
                return self._process

    def _begin(self) -> Process:
        process = self._spawn()
        self.started_at = time.time()
        return process

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


class Family:
    """The supervised processes of an instance, by name. `changed` is called when one was started or started again,
    `trouble` is told of each end that nobody asked for."""

    def __init__(self, changed: Callable[[], None], trouble: Callable[[str], None]) -> None:
        self.children: dict[str, Child] = {}
        self._changed = changed
        self._trouble = trouble

    def supervise(
        self,
        name: str,
        start: Callable[[], Process],
        *,
        stop_signal: int = signal.SIGTERM,
        grace: float = 15.0,
    ) -> Child:
        """Starts a process and keeps it running."""
        child = Child(
            name,
            start,
            changed=self._changed,
            trouble=self._trouble,
            stop_signal=stop_signal,
            grace=grace,
        )
        self.children[name] = child
        child.start()
        self._changed()
        return child

    async def stop(self, *names: str) -> None:
        """Stops those of `names` that were started, all at once."""
        await asyncio.gather(*(self.children[name].stop() for name in names if name in self.children))

    def pid(self, name: str) -> int | None:
        """The pid of a process; None when it was not started."""
        child = self.children.get(name)
        return child.pid if child is not None else None

    def restarts(self, name: str) -> int:
        """How often a process was started again."""
        child = self.children.get(name)
        return child.restarts if child is not None else 0


def describe_exit(status: int) -> str:
    """An exit status in words: `exit status 1`, `killed by SIGKILL`."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


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
            raise StartFailed(
                f"{child.name} does not stay up ({describe_exit(child.last_exit or 0)}). {advice}"
            )
        if time.monotonic() > deadline:
            raise StartFailed(f"{child.name} was not ready after {seconds:.0f} s. {advice}")
        await asyncio.sleep(0.05)
