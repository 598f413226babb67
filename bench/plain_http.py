"""GET requests over kept connections, as cheap as they can be: a full client costs more than the answers measured."""

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
        reader, writer = (
            self._idle.pop()
            if self._idle
            else await asyncio.open_connection(self._host, self._port, limit=2**20)
        )
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(_length(head))
        self._idle.append((reader, writer))
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"GET {path}: {head[:32]!r} {body[:200]!r}")
        return body

    def close(self) -> None:
        """Close those that are idle."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    raise RuntimeError("the answer does not tell its length")
