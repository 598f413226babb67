"""The long-poll link: the same channels over plain HTTP, for networks that let no WebSocket through.

The HTTP status is always 200 and the real one stands in the body, as phoenix.js expects. A session belongs to this
process and is named by an unguessable token; asked for by any other, it is gone (410) and the client joins anew.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from http import HTTPStatus
from typing import Any, Final

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from whispr.kit.channels import wire
from whispr.kit.channels.connect import ConnectRequest, Door, bearer_token, parse_query, refusal
from whispr.kit.channels.core import Core
from whispr.kit.channels.liveness import IdleWheel
from whispr.kit.channels.metrics import stats
from whispr.kit.channels.socket import MESSAGE_TOO_BIG, TRY_AGAIN_LATER, Socket
from whispr.kit.errors import Failure, Kind, TooLarge

MAX_LINES: Final = 100
"""Frames in one POST; phoenix.js sends no more."""

MAX_WAITING_FRAMES: Final = 1000
"""Frames kept between two polls."""

_FORBIDDEN: Final = frozenset({Kind.FORBIDDEN, Kind.UNAUTHENTICATED, Kind.INVALID})

_HEADERS: Final = {"Access-Control-Allow-Origin": "*", "Cache-Control": "no-store"}


def _answer(status: int, token: str | None = None, messages: list[str] | None = None) -> Response:
    body: dict[str, Any] = {"status": status}
    if messages is not None:
        body |= {"token": token, "messages": messages}
    return Response(msgspec.json.encode(body), media_type="application/json", headers=_HEADERS)


class LongPollLink:
    """One session. Frames wait here until a poll takes them; its idle time runs from poll to poll."""

    __slots__ = (
        "_poll",
        "_polls",
        "_sessions",
        "_size",
        "_waiting",
        "last_seen",
        "socket",
        "token",
        "wheel_slot",
    )

    carries_binary: Final = False

    def __init__(self, sessions: LongPolling, token: str) -> None:
        self.token = token
        self.socket: Socket | None = None
        self.last_seen = 0
        self.wheel_slot = -1
        self._sessions = sessions
        self._waiting: list[str] = []
        self._size = 0
        self._poll: asyncio.Future[None] | None = None
        self._polls = 0

    @property
    def stalled(self) -> bool:
        return False

    def send_text(self, head: bytes, tail: bytes) -> None:
        self._waiting.append((head + tail).decode())
        self._size += len(head) + len(tail)
        if (
            self._size > self._sessions.core.limits.max_write_buffer
            or len(self._waiting) > MAX_WAITING_FRAMES
        ):
            stats.slow_closes += 1
            if self.socket is not None:
                self.socket.close(TRY_AGAIN_LATER, "slow consumer")
        self._wake()

    def send_binary(self, frame: bytes) -> None:
        raise RuntimeError("a poll's answer is JSON text; phoenix.js reads no binary frame from it")

    def close(self, code: int, reason: str) -> None:
        self._sessions.forget(self)
        self._wake()

    def _wake(self) -> None:
        poll, self._poll = self._poll, None
        if poll is not None and not poll.done():
            poll.set_result(None)

    async def wait(self, window: float) -> bool:
        """Wait until there is something to answer a poll with, `window` seconds at most.

        False when a newer poll has come meanwhile: the answer is that one's.
        """
        self._wake()
        self._polls += 1
        turn = self._polls
        if not self._waiting and not self.closed:
            poll = self._poll = asyncio.get_running_loop().create_future()
            # A timeout would cancel the future under the hands of whoever wakes it.
            await asyncio.wait([poll], timeout=window)
        return turn == self._polls

    def take(self) -> list[str]:
        """The frames that wait."""
        taken, self._waiting = self._waiting, []
        self._size = 0
        return taken

    @property
    def closed(self) -> bool:
        """True when the session is gone."""
        return self.socket is None or self.socket.closed


class LongPolling:
    """The sessions of one endpoint, and their HTTP door."""

    def __init__(self, core: Core, door: Door, wheel: IdleWheel) -> None:
        self.core = core
        self.wheel = wheel
        self._door = door
        self._sessions: dict[str, LongPollLink] = {}

    def routes(self, path: str) -> list[Route]:
        """The routes to add to an HTTP app."""
        return [Route(path, self._serve, methods=["GET", "POST", "OPTIONS"], include_in_schema=False)]

    def forget(self, link: LongPollLink) -> None:
        """A session ended."""
        self._sessions.pop(link.token, None)
        self.wheel.discard(link)

    def expire(self) -> None:
        """End the sessions that nobody polls any more."""
        for link in self.wheel.advance():
            assert isinstance(link, LongPollLink)
            if link.socket is not None:
                link.socket.ended()
            self.forget(link)

    async def _serve(self, request: Request) -> Response:
        if request.method == "OPTIONS":
            asked = request.headers.get("access-control-request-headers", "")
            return Response(
                headers=_HEADERS
                | {
                    "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
                    "Access-Control-Allow-Headers": asked,
                    "Access-Control-Max-Age": "3600",
                }
            )
        try:
            self._door.check_origin(request.headers)
            query = parse_query(request.url.query)
            link = self._resume(request, query)
            if request.method == "POST":
                return _answer(HTTPStatus.GONE) if link is None else await self._publish(link, request)
            return self._open(request, query) if link is None else await self._poll(link, request)
        except Failure as failure:
            refusal(failure)
            # phoenix.js knows 403 (give up this connection) and 500 (try again later); any other number throws in it.
            return _answer(403 if failure.kind in _FORBIDDEN else 500)

    def _resume(self, request: Request, query: list[tuple[str, str]]) -> LongPollLink | None:
        token = request.headers.get("x-phoenix-longpoll-token")
        if token is None:
            # A client whose own parameters have a `token` too appends the session's after them.
            token = next((value for name, value in reversed(query) if name == "token"), "")
        link = self._sessions.get(token)
        return None if link is None or link.closed else link

    def _open(self, request: Request, query: list[tuple[str, str]]) -> Response:
        params = dict(query)
        token = (
            request.headers.get("x-phoenix-authtoken")
            or params.get("access_token")
            or bearer_token(request.headers)
            # The parameters of a client that would rather have a WebSocket; its session's token comes after them.
            or next((value for name, value in query if name == "token"), None)
        )
        connect = ConnectRequest("longpoll", params, request.headers, token)
        caller, serializer = self._door.admit(connect)
        link = LongPollLink(self, secrets.token_urlsafe(24))
        self._sessions[link.token] = link
        link.socket = Socket(self.core, link, caller, serializer, connect.kept_params())
        self.core.wheel.discard(link.socket)
        self.wheel.add(link)
        return _answer(HTTPStatus.GONE, link.token, [])

    async def _poll(self, link: LongPollLink, request: Request) -> Response:
        link.last_seen = self.wheel.now
        mine = await link.wait(self.core.limits.longpoll_window)
        if link.closed:
            return _answer(HTTPStatus.GONE, None, [])
        link.last_seen = self.wheel.now
        # Frames handed to a client that has hung up, or polls anew, would be lost.
        if not mine or await request.is_disconnected():
            return _answer(HTTPStatus.NO_CONTENT, link.token, [])
        messages = link.take()
        return _answer(HTTPStatus.OK if messages else HTTPStatus.NO_CONTENT, link.token, messages)

    async def _publish(self, link: LongPollLink, request: Request) -> Response:
        socket = link.socket
        assert socket is not None
        limit = self.core.limits.max_frame_size
        lines = [line for line in (await self._body(request, 4 * limit)).split(b"\n") if line]
        if len(lines) > MAX_LINES:
            raise TooLarge
        for line in lines:
            if len(line) > limit:
                socket.close(MESSAGE_TOO_BIG, "message too big")
            elif line.startswith(b"[") or not socket.serializer.binary:
                socket.receive_text(line)
            else:
                self._receive_binary(socket, line)
        return _answer(HTTPStatus.GONE if link.closed else HTTPStatus.OK)

    def _receive_binary(self, socket: Socket, line: bytes) -> None:
        try:
            data = base64.b64decode(line, validate=True)
        except binascii.Error:
            socket.malformed(wire.MalformedFrame("a line is neither a text frame nor base64"))
        else:
            socket.receive_binary(data)

    async def _body(self, request: Request, limit: int) -> bytes:
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise TooLarge
        except ClientDisconnect:
            return b""
        return bytes(body)
