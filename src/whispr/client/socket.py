"""A Phoenix Channels (version 2) client over one WebSocket that comes back by itself.

`Socket` keeps a connection, `Channel` one topic on it. Pushes made while a channel is not joined wait and go out, in
order, once it is. What was sent when a connection broke and has no answer yet fails with `Unreachable`: only the
caller knows whether sending it again is safe.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final, Protocol
from urllib.parse import urlencode

import msgspec
import picows

from whispr.client.backoff import Backoff
from whispr.client.failures import (
    PASSING_CODES,
    ApiError,
    ClientError,
    JoinRefused,
    SessionEnded,
    Unreachable,
)

GOING_AWAY: Final = 1001
MAX_FRAME: Final = 16 * 1024 * 1024
# Join refusals that a later attempt may overcome, beside those of `PASSING_CODES`.
PASSING_JOINS: Final = frozenset({"timeout", "join crashed"})


class _Frame(msgspec.Struct, array_like=True):
    join_ref: str | None
    ref: str | None
    topic: str
    event: str
    payload: msgspec.Raw


class _ReplyPayload(msgspec.Struct):
    status: str
    response: msgspec.Raw = msgspec.Raw(b"{}")


_decode_frame = msgspec.json.Decoder(_Frame).decode
_decode_reply = msgspec.json.Decoder(_ReplyPayload).decode

OnReply = Callable[[ClientError | None, msgspec.Raw], None]


class Tokens(Protocol):
    """Where access tokens come from: `RestClient`."""

    async def access_token(self, *, refused: str | None = None) -> str: ...


@dataclass(frozen=True)
class SocketOptions:
    """Times in seconds. `reconnect` spaces connection attempts, `rejoin` attempts to join a topic."""

    heartbeat: float = 30.0
    reply_timeout: float = 10.0
    connect_timeout: float = 10.0
    reconnect: Backoff = field(default=Backoff(base=0.5, cap=20.0))
    rejoin: Backoff = field(default=Backoff(base=1.0, cap=15.0))


@dataclass
class _Push:
    event: str
    payload: Any
    on_reply: OnReply


class Channel:
    """One topic. Made by `Socket.channel`.

    `params` gives the join parameters anew for every join. `on_join` gets the reply of each successful one, before any
    later frame; `on_event` every other event; `on_closed` is called once when the server ends the channel for good
    (with what it refused, or None if it closed it). All callbacks are synchronous.
    """

    def __init__(
        self,
        socket: Socket,
        topic: str,
        params: Callable[[], Mapping[str, Any]],
        on_join: Callable[[msgspec.Raw], None],
        on_event: Callable[[str, msgspec.Raw], None],
        on_closed: Callable[[JoinRefused | None], None],
    ) -> None:
        self.topic = topic
        self.joined = False
        self._socket = socket
        self._params = params
        self._on_join = on_join
        self._on_event = on_event
        self._on_closed = on_closed
        self._join_ref: str | None = None
        self._waiting: deque[_Push] = deque()
        self._joiner: asyncio.Task[None] | None = None
        self._closed = False
        self._refusal: JoinRefused | None = None

    async def push(self, event: str, payload: Any, timeout: float | None = None) -> msgspec.Raw:
        """Send and wait for the reply. Raises ApiError (the server refused) or Unreachable (nothing is known)."""
        if self._closed:
            raise self._refusal or JoinRefused("closed")
        future: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()

        def on_reply(error: ClientError | None, response: msgspec.Raw) -> None:
            if not future.done():
                _settle(future, error, response)

        push = _Push(event, payload, on_reply)
        if self.joined:
            self._send(push)
        else:
            self._waiting.append(push)
        try:
            return await asyncio.wait_for(future, timeout or self._socket.options.reply_timeout)
        except TimeoutError:
            raise Unreachable(f"no answer to {event} on {self.topic}") from None
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(push)

    def cast(self, event: str, payload: Any) -> bool:
        """Send without waiting for anything. False, and not sent, while the channel is not joined."""
        if self.joined:
            self._socket.send(self._join_ref, None, self.topic, event, payload)
        return self.joined

    def leave(self) -> None:
        """Leave the topic; it is not joined again."""
        if self.joined:
            self._socket.send(self._join_ref, self._socket.next_ref(), self.topic, "phx_leave", {})
        self._end(None)

    # What the socket calls.

    def connected(self) -> None:
        self._start_joining(0)

    def disconnected(self) -> None:
        self.joined = False
        if self._joiner is not None:
            self._joiner.cancel()

    def received(self, frame: _Frame) -> None:
        if frame.join_ref is not None and frame.join_ref != self._join_ref:
            return  # of an earlier join
        if frame.event == "phx_error":
            self.joined = False
            self._start_joining(1)
        elif frame.event == "phx_close":
            if not self._closed:
                self._end(None)
                self._on_closed(None)
        elif not self._closed:
            self._on_event(frame.event, frame.payload)

    def _send(self, push: _Push) -> None:
        ref = self._socket.expect(push.on_reply)
        self._socket.send(self._join_ref, ref, self.topic, push.event, push.payload)

    def _start_joining(self, attempt: int) -> None:
        if self._joiner is not None:
            self._joiner.cancel()
        if not self._closed:
            self._joiner = asyncio.create_task(self._join(attempt))

    async def _join(self, attempt: int) -> None:
        if attempt:
            await asyncio.sleep(self._socket.options.rejoin.delay(attempt))
        while not self._closed and self._socket.connected:
            await self._join_once()
            if self.joined or self._closed:
                return
            attempt += 1
            await asyncio.sleep(self._socket.options.rejoin.delay(attempt))

    async def _join_once(self) -> None:
        answered = asyncio.Event()

        def on_reply(error: ClientError | None, response: msgspec.Raw) -> None:
            # At once, not when the task wakes: frames that follow the reply must find the channel joined.
            self._answered(error, response)
            answered.set()

        ref = self._socket.expect(on_reply)
        self._join_ref = ref
        self._socket.send(ref, ref, self.topic, "phx_join", self._params())
        try:
            await asyncio.wait_for(answered.wait(), self._socket.options.reply_timeout)
        except TimeoutError:
            # The server may have joined us all the same; without this it would go on pushing to nobody.
            self._socket.forget(ref)
            self._socket.send(ref, self._socket.next_ref(), self.topic, "phx_leave", {})

    def _answered(self, error: ClientError | None, response: msgspec.Raw) -> None:
        if isinstance(error, ApiError) and error.code not in PASSING_CODES | PASSING_JOINS:
            refusal = JoinRefused(error.code, fields=error.fields)
            self._end(refusal)
            self._on_closed(refusal)
        elif error is None and not self._closed:
            self.joined = True
            self._on_join(response)
            while self._waiting and self.joined:
                self._send(self._waiting.popleft())

    def _end(self, refusal: JoinRefused | None) -> None:
        self._closed = True
        self._refusal = refusal
        self.joined = False
        self._socket.remove(self)
        for push in self._waiting:
            push.on_reply(refusal or JoinRefused("closed"), msgspec.Raw(b"{}"))
        self._waiting.clear()


class Socket:
    """The connection. `url` is the endpoint's `…/socket/websocket`.

    `start()` connects and keeps connected until `stop()`, or until the login is no longer valid: then `on_ended` is
    called. Waits between attempts are jittered, also after the server closed for a restart (1012), since all its
    clients are told at the same moment. After 1001 (revoked) a new token is asked for before anything else.
    """

    def __init__(
        self,
        url: str,
        tokens: Tokens,
        *,
        options: SocketOptions | None = None,
        on_ended: Callable[[SessionEnded], None] | None = None,
    ) -> None:
        self.options = options or SocketOptions()
        self.connections = 0
        self._url = url
        self._tokens = tokens
        self._on_ended = on_ended
        self._channels: dict[str, Channel] = {}
        self._expected: dict[str, OnReply] = {}
        self._ref = 0
        self._link: _Link | None = None
        self._task: asyncio.Task[None] | None = None
        self._up = asyncio.Event()

    @property
    def connected(self) -> bool:
        return self._link is not None

    async def wait_connected(self) -> None:
        await self._up.wait()

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Close the connection. Channels stay known and are joined again by the next `start()`."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def channel(
        self,
        topic: str,
        *,
        params: Callable[[], Mapping[str, Any]] = dict,
        on_join: Callable[[msgspec.Raw], None] = lambda _: None,
        on_event: Callable[[str, msgspec.Raw], None] = lambda _, __: None,
        on_closed: Callable[[JoinRefused | None], None] = lambda _: None,
    ) -> Channel:
        """Join a topic now or as soon as there is a connection."""
        channel = Channel(self, topic, params, on_join, on_event, on_closed)
        self._channels[topic] = channel
        if self.connected:
            channel.connected()
        return channel

    def drop(self) -> None:
        """Cut the connection without a goodbye, as a lost network does."""
        if self._link is not None:
            self._link.abort()

    # What channels call.

    def next_ref(self) -> str:
        self._ref += 1
        return str(self._ref)

    def expect(self, on_reply: OnReply) -> str:
        """A ref whose reply goes to `on_reply`, exactly once: also when the connection breaks."""
        ref = self.next_ref()
        self._expected[ref] = on_reply
        return ref

    def forget(self, ref: str) -> None:
        self._expected.pop(ref, None)

    def send(self, join_ref: str | None, ref: str | None, topic: str, event: str, payload: Any) -> None:
        if self._link is not None:
            self._link.send(msgspec.json.encode([join_ref, ref, topic, event, payload]))

    def remove(self, channel: Channel) -> None:
        if self._channels.get(channel.topic) is channel:
            del self._channels[channel.topic]

    # The connection.

    async def _run(self) -> None:
        token = ""
        refused: str | None = None
        attempt = 0
        while True:
            try:
                token = await self._tokens.access_token(refused=refused)
                refused = None
                link = await self._connect(token)
            except SessionEnded as ended:
                self._task = None
                if self._on_ended is not None:
                    self._on_ended(ended)
                return
            except picows.WSHandshakeError as error:
                if error.response and error.response.status in (
                    HTTPStatus.UNAUTHORIZED,
                    HTTPStatus.FORBIDDEN,
                ):
                    refused = token
            except (OSError, TimeoutError, picows.WSError, ClientError):
                pass
            else:
                code, proven = await self._serve(link)
                refused = token if code == GOING_AWAY else None
                # A server that accepts and closes at once must not be hammered, so only a working link resets it.
                attempt = 0 if proven else attempt
            await asyncio.sleep(self.options.reconnect.delay(attempt))
            attempt += 1

    async def _connect(self, token: str) -> _Link:
        url = f"{self._url}?{urlencode({'vsn': '2.0.0', 'token': token})}"
        _, link = await asyncio.wait_for(
            picows.ws_connect(lambda: _Link(self._received), url, max_frame_size=MAX_FRAME),
            self.options.connect_timeout,
        )
        assert isinstance(link, _Link)
        return link

    async def _serve(self, link: _Link) -> tuple[int, bool]:
        """Until the connection ends. The close code (1006 if there was none), and whether anything was received."""
        self._link = link
        self.connections += 1
        heartbeat = asyncio.create_task(self._beat(link))
        self._up.set()
        try:
            for channel in list(self._channels.values()):
                channel.connected()
            await link.closed.wait()
        finally:
            heartbeat.cancel()
            self._up.clear()
            self._link = None
            link.close()
            self._lost()
        return link.code, link.received

    def _lost(self) -> None:
        for channel in list(self._channels.values()):
            channel.disconnected()
        expected, self._expected = self._expected, {}
        for on_reply in expected.values():
            on_reply(Unreachable("the connection was lost"), msgspec.Raw(b"{}"))

    async def _beat(self, link: _Link) -> None:
        """Ask the server for a sign of life; without one in time the connection is dead, whatever TCP believes."""
        alive = asyncio.Event()
        while True:
            await asyncio.sleep(self.options.heartbeat)
            alive.clear()
            ref = self.expect(lambda _, __: alive.set())
            self.send(None, ref, "phoenix", "heartbeat", {})
            try:
                await asyncio.wait_for(alive.wait(), self.options.heartbeat)
            except TimeoutError:
                link.abort()
                return

    def _received(self, data: bytes) -> None:
        try:
            frame = _decode_frame(data)
        except msgspec.DecodeError:
            return  # not of this protocol; nothing could be done with it
        if frame.event == "phx_reply":
            on_reply = self._expected.pop(frame.ref or "", None)
            if on_reply is not None:
                _answer(on_reply, frame.payload)
            return
        channel = self._channels.get(frame.topic)
        if channel is not None:
            channel.received(frame)


class _Link(picows.WSListener):
    """One WebSocket connection."""

    def __init__(self, on_data: Callable[[bytes], None]) -> None:
        self.closed = asyncio.Event()
        self.code = 1006
        self.received = False
        self._on_data = on_data
        self._transport: picows.WSTransport | None = None
        self._fragments = bytearray()

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        self._transport = transport

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        if frame.msg_type == picows.WSMsgType.CLOSE:
            payload = frame.get_payload_as_bytes()
            self.code = int.from_bytes(payload[:2], "big") if len(payload) >= 2 else 1005
            transport.send_close(picows.WSCloseCode.OK)
            transport.disconnect()
        elif frame.msg_type in (picows.WSMsgType.TEXT, picows.WSMsgType.CONTINUATION):
            self._fragments += frame.get_payload_as_bytes()
            if frame.fin:
                data, self._fragments = bytes(self._fragments), bytearray()
                self.received = True
                self._on_data(data)

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        self._transport = None
        self.closed.set()

    def send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.send(picows.WSMsgType.TEXT, data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.send_close(picows.WSCloseCode.OK)
            self._transport.disconnect()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.disconnect(graceful=False)


def _answer(on_reply: OnReply, payload: msgspec.Raw) -> None:
    try:
        reply = _decode_reply(payload)
        if reply.status == "ok":
            on_reply(None, reply.response)
            return
        fields = msgspec.json.decode(reply.response, type=dict[str, Any])
    except msgspec.DecodeError:
        on_reply(ApiError("unexpected_answer"), msgspec.Raw(b"{}"))
        return
    reason = str(fields.pop("reason", "unknown"))
    retry_after = fields.get("retry_after")
    on_reply(
        ApiError(
            reason,
            detail=str(fields.pop("detail", "")),
            fields=fields,
            retry_after=float(retry_after) if isinstance(retry_after, int | float) else None,
        ),
        reply.response,
    )


def _settle(future: asyncio.Future[msgspec.Raw], error: ClientError | None, response: msgspec.Raw) -> None:
    if error is None:
        future.set_result(response)
    else:
        future.set_exception(error)
