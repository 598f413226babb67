"""A WebSocket client with nothing between the test and the bytes, so that it can also misbehave."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


@dataclass
class Refused(Exception):
    """The upgrade was answered with something other than 101."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Closed(Exception):
    """The server closed. `code` is None when it did so without a close frame."""

    code: int | None
    reason: str = ""


class RawClient:
    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: dict[str, str]
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.headers = headers
        self._refs = 100

    @classmethod
    async def connect(
        cls,
        port: int,
        query: str = "vsn=2.0.0&token=alice",
        headers: dict[str, str] | None = None,
        path: str = "/socket/websocket",
        method: str = "GET",
        limit: int = 2**20,
    ) -> Self:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=limit)
        sent = {
            "Host": f"127.0.0.1:{port}",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        } | (headers or {})
        lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        writer.write(f"{method} {path}?{query} HTTP/1.1\r\n{lines}\r\n".encode())
        async with asyncio.timeout(5):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status = int(head.split(" ")[1])
        pairs = (line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        answered = {name.lower(): value for name, value in pairs}
        if status != 101:
            body = await reader.read()
            writer.close()
            raise Refused(status, answered, body)
        return cls(reader, writer, answered)

    def frame(
        self, opcode: int, payload: bytes, *, fin: bool = True, rsv: int = 0, masked: bool = True
    ) -> None:
        head = bytes([fin << 7 | rsv << 4 | opcode])
        size = len(payload)
        bit = 0x80 if masked else 0
        if size < 126:
            head += bytes([bit | size])
        elif size < 65536:
            head += struct.pack("!BH", bit | 126, size)
        else:
            head += struct.pack("!BQ", bit | 127, size)
        if masked:
            mask = os.urandom(4)
            payload = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
            head += mask
        self.writer.write(head + payload)

    def text(self, data: str | bytes) -> None:
        self.frame(TEXT, data.encode() if isinstance(data, str) else data)

    def send(self, *message: Any) -> None:
        """A frame of version 2: join_ref, ref, topic, event, payload."""
        self.text(json.dumps(message))

    async def receive(self, timeout: float = 5.0) -> tuple[int, bytes]:
        """Opcode and payload of the next frame. Raises Closed."""
        try:
            async with asyncio.timeout(timeout):
                first, second = await self.reader.readexactly(2)
                assert not second & 0x80, "a server must not mask"
                assert not first & 0x70, "no extension was negotiated"
                size = second & 0x7F
                if size == 126:
                    (size,) = struct.unpack("!H", await self.reader.readexactly(2))
                elif size == 127:
                    (size,) = struct.unpack("!Q", await self.reader.readexactly(8))
                payload = await self.reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise Closed(None) from None
        opcode = first & 0x0F
        if opcode == CLOSE:
            code = struct.unpack("!H", payload[:2])[0] if payload else None
            raise Closed(code, payload[2:].decode())
        return opcode, payload

    async def next(self, timeout: float = 5.0) -> Any:
        """The next frame, which must be text, parsed."""
        opcode, payload = await self.receive(timeout)
        assert opcode == TEXT, payload
        return json.loads(payload)

    async def join(self, topic: str, params: Any = None, ref: str = "1") -> Any:
        """Join and return the reply's payload."""
        self.send(ref, ref, topic, "phx_join", params or {})
        join_ref, got, name, event, payload = await self.next()
        assert (join_ref, got, name, event) == (ref, ref, topic, "phx_reply")
        return payload

    async def silence(self) -> None:
        """Assert that nothing more comes than the answer to a heartbeat sent now."""
        self._refs += 1
        self.send(None, str(self._refs), "phoenix", "heartbeat", {})
        beat = [None, str(self._refs), "phoenix", "phx_reply", {"status": "ok", "response": {}}]
        assert await self.next() == beat

    async def closed(self, timeout: float = 5.0) -> Closed:
        """Wait for the close frame, whatever comes before it."""
        while True:
            try:
                await self.receive(timeout)
            except Closed as closed:
                return closed

    async def eof(self) -> None:
        """Wait until the connection is gone."""
        async with asyncio.timeout(5):
            try:
                while await self.reader.read(65536):
                    pass
            except ConnectionError:
                pass

    def abandon(self) -> None:
        self.writer.transport.abort()


async def until(condition: Callable[[], Any], seconds: float = 3.0) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
