"""The WebSocket link: picows below, `Socket` above.

What picows does not do is done here: fragments, control frames, a client that does not read, the closing handshake. A
connection owns no task, queue or future beyond what picows and the loop need.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from multidict import CIMultiDict
from picows import (
    WSCloseCode,
    WSFrame,
    WSListener,
    WSMsgType,
    WSTransport,
    WSUpgradeRequest,
    WSUpgradeResponse,
    WSUpgradeResponseWithListener,
    ws_create_server,
)

from whispr.kit.channels import wire
from whispr.kit.channels.connect import (
    PHOENIX_PROTOCOL,
    ConnectRequest,
    Door,
    bearer_token,
    parse_query,
    protocol_token,
    refusal,
)
from whispr.kit.channels.core import Core
from whispr.kit.channels.metrics import stats
from whispr.kit.channels.socket import MESSAGE_TOO_BIG, PROTOCOL_ERROR, TRY_AGAIN_LATER, Socket
from whispr.kit.errors import Failure, Internal
from whispr.kit.telemetry import get_logger

if TYPE_CHECKING:
    from whispr.kit.identity import Caller

log = get_logger(__name__)

_TEXT: Final = WSMsgType.TEXT
_BINARY: Final = WSMsgType.BINARY
_CONTINUATION: Final = WSMsgType.CONTINUATION
_PING: Final = WSMsgType.PING
_PONG: Final = WSMsgType.PONG

# The first byte of a whole frame; the length follows (RFC 6455, section 5.2).
_TEXT_FRAME: Final = b"\x81"
_BINARY_FRAME: Final = b"\x82"

_MAX_UNSENT: Final = 64 * 1024
"""Kept for a socket until the turn of the loop is over. The loop then tells us when a socket does not take what it is sent."""

_MAX_REASON: Final = 123
"""A close frame carries at most 125 bytes, two of which are its code."""

_NOTHING: CIMultiDict[str] = CIMultiDict()


class _QuietLogger(logging.LoggerAdapter[logging.Logger]):
    """picows logs every connection with its address and every protocol error of a client as an error.

    Being no `logging.Logger`, it also keeps picows from making a logger object for each connection.
    """

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        # What is left is an exception of ours: `exception` and `error` with exc_info.
        if kwargs.get("exc_info"):
            super().log(level, msg, *args, **kwargs)

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - the name is logging's
        return level >= logging.ERROR


_LOGGER: Final = _QuietLogger(logging.getLogger("whispr.kit.channels.picows"), {})


class WebSocketLink(WSListener):
    """One accepted WebSocket."""

    __slots__ = (
        "_admitted",
        "_cut_off",
        "_fragments",
        "_fragments_kind",
        "_paused",
        "_server",
        "_socket",
        "_transport",
        "_unsent",
    )

    carries_binary: Final = True

    def __init__(
        self, server: WebSocketServer, caller: Caller, serializer: wire.Serializer, params: Mapping[str, str]
    ) -> None:
        self._server = server
        self._admitted: tuple[Caller, wire.Serializer, Mapping[str, str]] | None = (
            caller,
            serializer,
            params,
        )
        self._socket: Socket | None = None
        self._transport: WSTransport | None = None
        self._fragments: bytearray | None = None
        self._fragments_kind = _TEXT
        self._paused = False
        self._unsent: bytearray | None = None
        self._cut_off: asyncio.TimerHandle | None = None

    # What picows calls.

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._transport = transport
        # picows keeps the upgrade request for the life of the connection, the access token in its path included.
        transport.request.path = b""
        transport.request.headers = transport.response.headers = _NOTHING
        assert self._admitted is not None
        caller, serializer, params = self._admitted
        self._admitted = None
        self._socket = Socket(self._server.core, self, caller, serializer, params)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        socket = self._socket
        if socket is None:
            return
        kind = frame.msg_type
        if (
            kind is _TEXT
            and frame.fin
            and self._fragments is None
            and not (frame.rsv1 | frame.rsv2 | frame.rsv3)
        ):
            socket.receive_text(frame.get_payload_as_bytes())
        else:
            self._receive_uncommon(socket, kind, frame)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        if self._cut_off is not None:
            self._cut_off.cancel()
        self._server.disconnected(self)
        if self._socket is not None:
            self._socket.ended()
        self._socket = None

    def pause_writing(self) -> None:
        # A client that does not read its answers is not read either: what it would ask for has nowhere to go.
        self._paused = True
        transport = self._transport
        if transport is not None and not transport.underlying_transport.is_closing():
            transport.underlying_transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        transport = self._transport
        if transport is not None and not transport.underlying_transport.is_closing():
            transport.underlying_transport.resume_reading()

    # What a socket calls.

    @property
    def stalled(self) -> bool:
        return self._paused

    def send_text(self, head: bytes, tail: bytes) -> None:
        self._send(_TEXT_FRAME, head, tail)

    def send_binary(self, frame: bytes) -> None:
        self._send(_BINARY_FRAME, frame, b"")

    def _send(self, kind: bytes, head: bytes, tail: bytes) -> None:
        transport = self._transport
        assert transport is not None
        below = transport.underlying_transport
        if below.is_closing() or transport.is_close_frame_sent:
            # The connection broke and the loop has yet to say so; it would log each write until then.
            return
        if self._paused:
            waiting = below.get_write_buffer_size()
            if waiting > self._server.core.limits.max_write_buffer:
                stats.slow_closes += 1
                if self._socket is not None:
                    self._socket.close(TRY_AGAIN_LATER, "slow consumer")
                return
        # Not through picows: it would keep a buffer for each connection. And not at once: the loop makes a system call for
        # each write, and what a socket is sent in a turn, such as a reply and the sender's own event, needs only one.
        unsent = self._unsent
        if unsent is None:
            unsent = self._unsent = bytearray()
            self._server.flush_soon(self)
        size = len(head) + len(tail)
        if size < 126:
            unsent += b"%b%c%b%b" % (kind, size, head, tail)
        elif size < 1 << 16:
            unsent += b"%b~%b%b%b" % (kind, size.to_bytes(2, "big"), head, tail)
        else:
            unsent += b"%b\x7f%b%b%b" % (kind, size.to_bytes(8, "big"), head, tail)
        if len(unsent) > _MAX_UNSENT:
            self.flush()

    def flush(self) -> None:
        """Hand what was sent in this turn to the loop."""
        unsent, self._unsent = self._unsent, None
        transport = self._transport
        if unsent is not None and transport is not None and not transport.is_close_frame_sent:
            below = transport.underlying_transport
            if not below.is_closing():
                below.write(unsent)

    def close(self, code: int, reason: str) -> None:
        transport = self._transport
        if transport is None or transport.is_disconnected:
            return
        self.flush()
        transport.send_close(code, reason.encode()[:_MAX_REASON])  # type: ignore[arg-type]
        if self._paused:
            self.resume_writing()
        self._server.began_closing(self)
        self._cut_off = asyncio.get_running_loop().call_later(
            self._server.core.limits.close_timeout, self.abort
        )

    def abort(self) -> None:
        """Cut the connection off."""
        if self._transport is not None:
            self._transport.disconnect(False)

    # Frames other than a whole text message.

    def _receive_uncommon(self, socket: Socket, kind: WSMsgType, frame: WSFrame) -> None:
        if frame.rsv1 or frame.rsv2 or frame.rsv3:
            socket.close(PROTOCOL_ERROR, "reserved bits are set")
        elif kind is _TEXT or kind is _BINARY:
            self._receive_data(socket, kind, frame)
        elif kind is _CONTINUATION:
            self._continue(socket, frame)
        elif kind is _PING:
            socket.last_seen = self._server.core.wheel.now
            if self._transport is not None:
                self._transport.send_pong(frame.get_payload_as_bytes())
        elif kind is _PONG:
            socket.last_seen = self._server.core.wheel.now
        else:
            self._receive_close(socket, frame)

    def _receive_data(self, socket: Socket, kind: WSMsgType, frame: WSFrame) -> None:
        if self._fragments is not None:
            socket.close(PROTOCOL_ERROR, "a message began inside another")
        elif frame.fin:
            self._receive_message(socket, kind, frame.get_payload_as_bytes())
        else:
            self._fragments = bytearray(frame.get_payload_as_bytes())
            self._fragments_kind = kind

    def _continue(self, socket: Socket, frame: WSFrame) -> None:
        fragments = self._fragments
        if fragments is None:
            socket.close(PROTOCOL_ERROR, "a continuation of nothing")
        elif len(fragments) + frame.payload_size > self._server.core.limits.max_frame_size:
            self._fragments = None
            socket.close(MESSAGE_TOO_BIG, "message too big")
        else:
            fragments += frame.get_payload_as_bytes()
            if frame.fin:
                self._fragments = None
                self._receive_message(socket, self._fragments_kind, bytes(fragments))

    def _receive_message(self, socket: Socket, kind: WSMsgType, data: bytes) -> None:
        if kind is _TEXT:
            socket.receive_text(data)
        else:
            socket.receive_binary(data)

    def _receive_close(self, socket: Socket, frame: WSFrame) -> None:
        transport = self._transport
        assert transport is not None
        if not transport.is_close_frame_sent:
            self.flush()
            code = frame.get_close_code()
            # A close frame without a code must not be answered with "no code", which may not be sent.
            transport.send_close(WSCloseCode.OK if code == WSCloseCode.NO_INFO else code)
        socket.ended()
        transport.disconnect()


class WebSocketServer:
    """Accepts WebSockets for one endpoint."""

    def __init__(self, core: Core, door: Door, path: str) -> None:
        self.core = core
        self._closing: set[WebSocketLink] = set()
        self._unflushed: list[WebSocketLink] = []
        self._all_closed = asyncio.Event()
        self._door = door
        self._path = path
        self._listeners: list[asyncio.Server] = []

    async def listen(self, host: str, port: int, reuse_port: bool) -> int:
        """Listen and return the port."""
        server = await ws_create_server(
            self._accept,
            host,
            port,
            reuse_port=reuse_port,
            backlog=4096,
            logger_name=_LOGGER,
            websocket_handshake_timeout=10,
            # Pings count as signs of life, which only we can note.
            enable_auto_pong=False,
            max_frame_size=self.core.limits.max_frame_size,
            read_buffer_init_size=1024,
        )
        self._listeners.append(server)
        bound: int = server.sockets[0].getsockname()[1]
        return bound

    def flush_soon(self, link: WebSocketLink) -> None:
        """Flush the link when the present turn of the loop is over."""
        if not self._unflushed:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unflushed.append(link)

    def _flush(self) -> None:
        links, self._unflushed = self._unflushed, []
        for link in links:
            try:
                link.flush()
            except Exception:
                # One that cannot be written to must not keep the others from what they were sent.
                log.exception("flush_failed")

    def began_closing(self, link: WebSocketLink) -> None:
        """A link waits for the other side to finish closing."""
        self._closing.add(link)

    def disconnected(self, link: WebSocketLink) -> None:
        """A link is gone."""
        self._closing.discard(link)
        if not self._closing:
            self._all_closed.set()

    def stop_accepting(self) -> None:
        """Close the listening sockets; connections stay."""
        for server in self._listeners:
            server.close()
        self._listeners.clear()

    async def wait_closed(self, grace: float) -> None:
        """Wait until every closed connection is gone, and cut off those that are not after `grace` seconds."""
        if self._closing:
            self._all_closed.clear()
            try:
                async with asyncio.timeout(grace):
                    await self._all_closed.wait()
            except TimeoutError:
                for link in tuple(self._closing):
                    link.abort()

    def _accept(self, upgrade: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
        try:
            return self._admit(upgrade)
        except Failure as failure:
            return _refuse(failure)
        except Exception:
            log.exception("connect_crashed")
            return _refuse(Internal())

    def _admit(self, upgrade: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
        path, _, query = upgrade.path.decode("ascii", "replace").partition("?")
        if path != self._path:
            response = WSUpgradeResponse.create_error_response(HTTPStatus.NOT_FOUND)
            return WSUpgradeResponseWithListener(response, None)
        headers = _headers(upgrade)
        params = dict(parse_query(query))
        offered = headers.get("sec-websocket-protocol", "")
        token = (
            params.get("token")
            or params.get("access_token")
            or protocol_token(offered)
            or bearer_token(headers)
        )
        request = ConnectRequest("websocket", params, headers, token)
        caller, serializer = self._door.admit(request)
        answer = {}
        if PHOENIX_PROTOCOL in (item.strip() for item in offered.split(",")):
            answer["Sec-WebSocket-Protocol"] = PHOENIX_PROTOCOL
        link = WebSocketLink(self, caller, serializer, request.kept_params())
        return WSUpgradeResponseWithListener(WSUpgradeResponse.create_101_response(answer), link)


def _headers(upgrade: WSUpgradeRequest) -> Mapping[str, str]:
    connection = [item.strip().lower() for item in upgrade.headers.get("connection", "").split(",")]
    if "upgrade" in connection:
        # Firefox sends "keep-alive, Upgrade", which picows refuses.
        upgrade.headers["connection"] = "upgrade"
    headers: dict[str, str] = {}
    for name, value in upgrade.headers.items():
        lower = name.lower()
        headers[lower] = f"{headers[lower]}, {value}" if lower in headers else value
    return headers


def _refuse(failure: Failure) -> WSUpgradeResponseWithListener:
    status, headers, body = refusal(failure)
    return WSUpgradeResponseWithListener(WSUpgradeResponse.create_error_response(status, body, headers), None)
