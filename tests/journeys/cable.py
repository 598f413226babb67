"""The network between a server and its users, which a test can cut."""

from __future__ import annotations

import asyncio
import contextlib


class Cable:
    """A TCP proxy on loopback, to `port` of this machine.

    `cut()` swallows whatever is sent, in both directions, and closes nothing: that is how a partition looks from inside.
    `heal()` lets new connections through and resets those that lived through the cut, as routers do that forgot them;
    with `silently` they stay open and dead for ever.
    """

    def __init__(self, port: int) -> None:
        self.port = 0
        self._target = port
        self._whole = asyncio.Event()
        self._whole.set()
        self._server: asyncio.Server | None = None
        self._lines: set[_Line] = set()

    async def __aenter__(self) -> Cable:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for line in tuple(self._lines):
            line.reset()

    @property
    def lines(self) -> int:
        """Connections that are open."""
        return len(self._lines)

    def cut(self) -> None:
        self._whole.clear()
        for line in self._lines:
            line.dead = True

    def heal(self, *, silently: bool = False) -> None:
        self._whole.set()
        for line in tuple(self._lines):
            if line.dead and not silently:
                line.reset()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = _Line(writer)
        self._lines.add(line)
        try:
            # A connection made during the cut is answered by nobody.
            await self._whole.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            line.writers.append(far_writer)
            pumps = {
                asyncio.create_task(line.pump(reader, far_writer)),
                asyncio.create_task(line.pump(far_reader, writer)),
            }
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass
        finally:
            line.reset()
            self._lines.discard(line)


class _Line:
    """One connection."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]
        self.dead = False

    async def pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if not self.dead:
                    target.write(data)
                    await target.drain()

    def reset(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
