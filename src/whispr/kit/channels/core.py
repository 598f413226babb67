"""What the sockets of one endpoint share: limits, routes, the hub, the tasks they started, the wheel that watches them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from whispr.kit.channels.channel import Channel
from whispr.kit.channels.liveness import IdleWheel
from whispr.kit.channels.metrics import stats
from whispr.kit.clock import Clock
from whispr.kit.telemetry import get_logger

if TYPE_CHECKING:
    from whispr.kit.channels.hub import Hub
    from whispr.kit.channels.socket import Socket

log = get_logger(__name__)

ChannelFactory = Callable[["Socket", str, str], Channel]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what one client, and all of them together, can make a process hold. Sizes in bytes, times in seconds."""

    max_sockets: int = 20_000
    max_sockets_per_user: int = 50
    max_channels: int = 100
    """Per socket."""
    max_frame_size: int = 256 * 1024
    """Of a received message, whole or in fragments."""
    max_write_buffer: int = 2 * 1024 * 1024
    """A socket with more than this unsent is closed with 1013."""
    max_held_frames: int = 1000
    """Frames kept for a channel while its join is being decided."""
    max_waiting_frames: int = 100
    """Frames kept from a client while its join is being decided."""
    max_running_handlers: int = 64
    """Coroutines that `Channel.receive` returned and that still run, per socket."""
    malformed_per_minute: int = 100
    idle_timeout: float = 60.0
    join_timeout: float = 10.0
    close_timeout: float = 5.0
    """A client that does not answer our close frame for this long is cut off."""
    longpoll_window: float = 10.0
    """How long a poll waits for something to answer with."""


class Link(Protocol):
    """What carries a socket's frames."""

    def send_text(self, head: bytes, tail: bytes) -> None:
        """Send one text frame, given in two parts."""

    def send_binary(self, frame: bytes) -> None:
        """Send one binary frame. Only called where `carries_binary`."""

    def close(self, code: int, reason: str) -> None:
        """Close with a WebSocket close code. No frame may follow."""

    @property
    def carries_binary(self) -> bool: ...

    @property
    def stalled(self) -> bool:
        """True while the client does not take what was sent."""


class Router:
    """Topic patterns: exact ones, and prefixes that end in `*`. The longest prefix wins."""

    def __init__(self, routes: Sequence[tuple[str, ChannelFactory]]) -> None:
        self._exact: dict[str, ChannelFactory] = {}
        prefixes: list[tuple[str, ChannelFactory]] = []
        for pattern, factory in routes:
            if pattern.endswith("*"):
                prefixes.append((pattern[:-1], factory))
            else:
                self._exact[pattern] = factory
        self._prefixes = sorted(prefixes, key=lambda route: len(route[0]), reverse=True)

    def resolve(self, topic: str) -> tuple[ChannelFactory, str] | None:
        """The factory for `topic` and what `*` matched; None when nobody serves it."""
        factory = self._exact.get(topic)
        if factory is not None:
            return factory, ""
        for prefix, candidate in self._prefixes:
            if topic.startswith(prefix):
                return candidate, topic[len(prefix) :]
        return None


class Core:
    """What the sockets of one endpoint share."""

    def __init__(
        self,
        *,
        router: Router,
        hub: Hub,
        limits: Limits,
        clock: Clock,
        wheel: IdleWheel,
        on_connect: Callable[[Socket], None] | None,
        on_disconnect: Callable[[Socket], None] | None,
    ) -> None:
        self.router = router
        self.hub = hub
        self.limits = limits
        self.clock = clock
        self.wheel = wheel
        self.draining = False
        self.tasks: set[asyncio.Task[None]] = set()
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._last_id = 0

    def next_id(self) -> int:
        """A number no other socket of this endpoint has had."""
        self._last_id += 1
        return self._last_id

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task that is held until it ends: the loop itself keeps only weak references."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def connected(self, socket: Socket) -> None:
        """Tell the hub and the service of a new socket."""
        self.hub.add(socket)
        self.wheel.add(socket)
        stats.sockets += 1
        if self._on_connect is not None:
            try:
                self._on_connect(socket)
            except Exception:
                log.exception("on_connect_failed")

    def disconnected(self, socket: Socket) -> None:
        """Tell the hub and the service that a socket is gone."""
        self.hub.remove(socket)
        self.wheel.discard(socket)
        stats.sockets -= 1
        if self._on_disconnect is not None:
            try:
                self._on_disconnect(socket)
            except Exception:
                log.exception("on_disconnect_failed")
