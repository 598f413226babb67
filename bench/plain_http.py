"""Requests over kept connections, as cheap as they can be: a full client costs more than the answers measured."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit


class Connections:
    """Connections to one server, as many as there are requests under way."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port or 80
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def get(self, path: str, token: str) -> bytes:
        """The body of a 200. Raises RuntimeError for any other answer."""
        return await self.request("GET", path, token)

    async def request(self, method: str, path: str, token: str, body: bytes = b"") -> bytes:
        """As `get`, with any method and a JSON body."""
        reader, writer = (
            self._idle.pop()
            if self._idle
            else await asyncio.open_connection(self._host, self._port, limit=2**20)
        )
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Bearer {token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        answer = await _body(reader, head.lower())
        self._idle.append((reader, writer))
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{method} {path}: {head[:32]!r} {answer[:200]!r}")
        return answer

    def close(self) -> None:
        """Close those that are idle."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    for line in head.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return await reader.readexactly(int(line.partition(b":")[2]))
    if b"transfer-encoding: chunked" not in head:
        raise RuntimeError("the answer does not tell its length")
    parts = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readexactly(2)
    return b"".join(parts)
