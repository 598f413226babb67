"""`Endpoint`: the channels of one process, reachable by WebSocket and by long polling."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from starlette.routing import Route

from whispr.kit.channels.connect import Authenticate, Door
from whispr.kit.channels.core import ChannelFactory, Core, Limits, Router
from whispr.kit.channels.hub import Hub
from whispr.kit.channels.liveness import IdleWheel
from whispr.kit.channels.longpoll import LongPolling
from whispr.kit.channels.socket import GOING_AWAY, SERVICE_RESTART, TRY_AGAIN_LATER, Socket
from whispr.kit.channels.websocket import WebSocketServer
from whispr.kit.clock import Clock

if TYPE_CHECKING:
    from whispr.kit.identity import Caller

_DRAIN_STEP = 0.05
"""Seconds between two groups of sockets that are told to go elsewhere."""


class Endpoint:
    """Serves topics to clients.

    `routes` pairs topic patterns ("lobby", "conversation:*") with factories `(socket, topic, topic_id) -> Channel`.
    `authenticate` is asked before a connection is made; it raises a `Failure` to refuse (401, 403, 429 or 503).
    `on_connect` and `on_disconnect` are told of each socket; they must not raise.
    """

    def __init__(
        self,
        routes: Sequence[tuple[str, ChannelFactory]],
        authenticate: Authenticate,
        *,
        clock: Clock,
        hub: Hub | None = None,
        limits: Limits | None = None,
        allowed_origins: Sequence[str] = (),
        path: str = "/socket",
        on_connect: Callable[[Socket], None] | None = None,
        on_disconnect: Callable[[Socket], None] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.hub = Hub() if hub is None else hub
        self.limits = Limits() if limits is None else limits
        self._path = path
        self._door = Door(authenticate, self.hub, self.limits, allowed_origins)
        self._core = Core(
            router=Router(routes),
            hub=self.hub,
            limits=self.limits,
            clock=clock,
            wheel=IdleWheel(self.limits.idle_timeout, monotonic=monotonic),
            on_connect=on_connect,
            on_disconnect=on_disconnect,
        )
        self._websockets = WebSocketServer(self._core, self._door, f"{path}/websocket")
        poll_wheel = IdleWheel(self.limits.longpoll_window * 1.5, monotonic=monotonic, ticks=6)
        self._polls = LongPolling(self._core, self._door, poll_wheel)
        self._timers: dict[str, asyncio.TimerHandle] = {}

    async def listen(self, host: str, port: int, *, reuse_port: bool = False) -> int:
        """Accept WebSockets at `host`; returns the port (a free one for 0). May be called for several addresses."""
        bound = await self._websockets.listen(host, port, reuse_port)
        self._watch()
        return bound

    def longpoll_routes(self) -> list[Route]:
        """Starlette routes for the process' HTTP app."""
        return self._polls.routes(f"{self._path}/longpoll")

    def start(self) -> None:
        """Begin to watch for silent clients. `listen` does it too; needed by itself where only long polling is served."""
        self._watch()

    def disconnect(
        self, predicate: Callable[[Caller], bool], code: int = GOING_AWAY, reason: str = "revoked"
    ) -> int:
        """Close the sockets of every caller for whom `predicate` is true. Returns how many."""
        concerned = [socket for socket in self.hub.sockets() if predicate(socket.caller)]
        for socket in concerned:
            socket.close(code, reason)
        return len(concerned)

    def disconnect_user(self, user_id: UUID, code: int = GOING_AWAY, reason: str = "revoked") -> int:
        """`disconnect` for all sockets of one person, without looking at anyone else's."""
        concerned = self.hub.sockets_of(user_id)
        for socket in concerned:
            socket.close(code, reason)
        return len(concerned)

    def sweep(self) -> None:
        """Close what has been silent for too long. Called by timers."""
        for socket in self._core.wheel.advance():
            assert isinstance(socket, Socket)
            if socket.link.stalled:
                socket.close(TRY_AGAIN_LATER, "slow consumer")
            else:
                socket.close(GOING_AWAY, "idle timeout")
        self._polls.expire()

    async def drain(self, window: float = 5.0, grace: float = 5.0) -> None:
        """Stop accepting, send every client elsewhere (1012) over `window` seconds, and wait up to `grace` for the rest.

        phoenix.js reconnects at once and without jitter: closing all at the same moment would send all of them to the other
        processes at the same moment. A socket whose pushes are being worked on is closed when they are answered, at the
        latest `grace` seconds after the window.
        """
        self._door.draining = True
        self._websockets.stop_accepting()
        sockets = list(self.hub.sockets())
        steps = max(1, round(window / _DRAIN_STEP))
        busy: list[Socket] = []
        for step in range(steps):
            busy = _send_away([*busy, *sockets[step::steps]])
            if step < steps - 1 and sockets:
                await asyncio.sleep(_DRAIN_STEP)
        patience = asyncio.get_running_loop().time() + grace
        while busy and asyncio.get_running_loop().time() < patience:
            await asyncio.sleep(_DRAIN_STEP)
            busy = _send_away(busy)
        # One may have been let in just before.
        for socket in self.hub.sockets():
            socket.close(SERVICE_RESTART, "restarting")
        await self._websockets.wait_closed(grace)
        await self._finish_tasks(grace)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    async def _finish_tasks(self, grace: float) -> None:
        tasks = set(self._core.tasks)
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=grace)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    def _watch(self) -> None:
        if self._timers:
            return
        loop = asyncio.get_running_loop()
        interval = min(self._core.wheel.tick, self._polls.wheel.tick)

        def tick() -> None:
            self._timers["sweep"] = loop.call_later(interval, tick)
            self.sweep()

        self._timers["sweep"] = loop.call_later(interval, tick)


def _send_away(sockets: Sequence[Socket]) -> list[Socket]:
    """Close those of `sockets` that owe their client no reply; the others."""
    busy = []
    for socket in sockets:
        if any(channel.unanswered for channel in socket.channels.values()):
            busy.append(socket)
        else:
            socket.close(SERVICE_RESTART, "restarting")
    return busy
