"""The connection to Valkey over which processes tell and hear each other.

Every process hears what all the others publish, most of it for somebody else. The client library goes through tasks, locks and
guards for each message, a tenth of a millisecond on either side; here a message costs its parsing. Connecting, with all
that TLS and passwords take, is left to the library.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError

from whispr.kit.telemetry import get_logger

log = get_logger(__name__)

_MESSAGE: Final = b"message"

# Servers may push other things of their own accord, which answer nothing.
_ANSWERS: Final = (b"subscribe", b"unsubscribe")

# A server that reads no more is noticed within seconds; until then so much is kept for it.
_MAX_UNSENT_BYTES: Final = 16 * 1024 * 1024


class Subscription(asyncio.Protocol):
    """Calls `deliver(channel, message)` with each message, in the order they were published.

    `lost` is done when the connection is gone. The commands wait for the server's answers and raise `RedisError`, or
    `OSError` when the connection goes meanwhile.
    """

    def __init__(self, deliver: Callable[[bytes, bytes], None]) -> None:
        self._deliver = deliver
        self._reader = hiredis.Reader()
        # In the order of the commands; None for those whose answer nobody waits for.
        self._awaited: deque[asyncio.Future[None] | None] = deque()
        self._connection: AbstractConnection | None = None
        self._transport: asyncio.WriteTransport | None = None
        self.has_heard = True
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def open(cls, client: Redis, deliver: Callable[[bytes, bytes], None]) -> Subscription:
        """Connect as `client` does. Raises `RedisError` or `OSError`."""
        subscription = cls(deliver)
        connection: Any = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        await _connect(connection)
        # The library has no public way to it, and nothing is under way on it now.
        transport: Any = connection._writer.transport  # noqa: SLF001
        transport.set_protocol(subscription)
        subscription._connection = connection
        subscription._transport = transport
        return subscription

    async def subscribe(self, channels: Collection[str]) -> None:
        """Hear these, too."""
        await self._ask(b"SUBSCRIBE", channels)

    async def unsubscribe(self, channels: Collection[str]) -> None:
        """Hear these no longer."""
        await self._ask(b"UNSUBSCRIBE", channels)

    def ping(self) -> None:
        """Ask the server for a sign of life. `has_heard` is true from when anything comes."""
        assert self._transport is not None
        self.has_heard = False
        if not self.lost.done():
            self._awaited.append(None)
            self._transport.write(_pack(b"PING"))

    def publish(self, messages: Iterable[tuple[str, bytes]]) -> bool:
        """Send messages on their channels without waiting. False, and nothing is sent, when the way is cut or blocked."""
        assert self._transport is not None
        if self.lost.done() or self._transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            return False
        commands = [_pack(b"PUBLISH", channel, message) for channel, message in messages]
        self._awaited.extend([None] * len(commands))
        self._transport.write(b"".join(commands))
        return True

    async def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)

    def data_received(self, data: bytes) -> None:
        """Deliver what has come."""
        self.has_heard = True
        self._reader.feed(data)
        while (item := self._reader.gets()) is not False:
            if not isinstance(item, list) or item[0] in _ANSWERS:
                self._settle(item)
            elif item[0] == _MESSAGE:
                self._deliver(item[1], item[2])

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        gone = RedisConnectionError("The subscription's connection is gone.")
        while self._awaited:
            waiter = self._awaited.popleft()
            if waiter is not None and not waiter.done():
                waiter.set_exception(gone)
        if not self.lost.done():
            self.lost.set_result(None)

    async def _ask(self, command: bytes, channels: Collection[str]) -> None:
        assert self._transport is not None
        if self.lost.done():
            raise RedisConnectionError("The subscription's connection is gone.")
        # The server answers once for each channel.
        waiters = [asyncio.get_running_loop().create_future() for _ in range(max(1, len(channels)))]
        self._awaited.extend(waiters)
        self._transport.write(_pack(command, *channels))
        await asyncio.gather(*waiters)

    def _settle(self, answer: object) -> None:
        if not self._awaited:
            return
        waiter = self._awaited.popleft()
        if waiter is None:
            if isinstance(answer, Exception):
                log.warning("publish_refused", error=str(answer))
        elif waiter.done():
            return
        elif isinstance(answer, Exception):
            waiter.set_exception(RedisConnectionError(str(answer)))
        else:
            waiter.set_result(None)


async def _connect(connection: Any) -> None:
    """The library may swallow a cancellation while it connects: who waits here can be stopped all the same."""
    connecting = asyncio.ensure_future(connection.connect())
    connecting.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.shield(connecting)
    except asyncio.CancelledError:
        connecting.cancel()
        await connection.disconnect(nowait=True)
        raise


def _pack(*command: str | bytes) -> bytes:
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]
    return packed
