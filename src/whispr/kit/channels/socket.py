"""One connection of a client, whatever carries it: joins, pushes, replies, and what happens when something goes wrong.

The rules are Phoenix's (socket.ex): one channel per topic, frames of an earlier join are ignored in silence, a second
join ends the first. A socket owns no task, queue, future or timer; a link below it (WebSocket or long poll) feeds it
frames and takes its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from whispr.kit.channels import wire
from whispr.kit.channels.channel import PAYLOAD_ERRORS, Channel, InvalidPayload, Reply
from whispr.kit.channels.core import Core, Link
from whispr.kit.channels.metrics import stats
from whispr.kit.errors import Failure, Kind, RateLimited
from whispr.kit.telemetry import get_logger

if TYPE_CHECKING:
    from whispr.kit.identity import Caller

log = get_logger(__name__)

GOING_AWAY: Final = 1001
PROTOCOL_ERROR: Final = 1002
POLICY_VIOLATION: Final = 1008
MESSAGE_TOO_BIG: Final = 1009
SERVICE_RESTART: Final = 1012
TRY_AGAIN_LATER: Final = 1013

NO_CHANNELS: Mapping[str, Channel] = MappingProxyType({})

_PARAMS: Final = msgspec.json.Decoder(dict[str, Any] | None)


class JoinTimeout(Failure):
    """The join took too long. Try again."""

    kind = Kind.UNAVAILABLE
    code = "timeout"


class Overloaded(Failure):
    """More happened during the join than could be kept. Try again."""

    kind = Kind.UNAVAILABLE
    code = "overloaded"


def _kind(topic: str) -> str:
    """What may be logged of a topic: not whom or what it is about."""
    return topic.partition(":")[0]


class Socket:
    """A connected client. `params` are its connect parameters without credentials; `connected_at` is epoch seconds."""

    __slots__ = (
        "_channels",
        "_deciding",
        "_malformed",
        "_malformed_since",
        "_running",
        "binary",
        "caller",
        "closed",
        "connected_at",
        "core",
        "id",
        "last_seen",
        "link",
        "params",
        "serializer",
        "wheel_slot",
    )

    def __init__(
        self, core: Core, link: Link, caller: Caller, serializer: wire.Serializer, params: Mapping[str, str]
    ) -> None:
        self.core = core
        self.link = link
        self.caller = caller
        self.serializer = serializer
        self.params = params
        self.binary = serializer.binary and link.carries_binary
        self.id = core.next_id()
        self.connected_at = core.clock.time()
        self.closed = False
        self.last_seen = core.wheel.now
        self.wheel_slot = -1
        self._channels: dict[str, Channel] | None = None
        self._malformed = 0
        self._malformed_since = 0
        self._running = 0
        self._deciding = 0
        core.connected(self)

    @property
    def channels(self) -> Mapping[str, Channel]:
        """The channels of this socket by topic, joining ones included."""
        return NO_CHANNELS if self._channels is None else self._channels

    @property
    def vsn(self) -> str:
        """The version of the wire the client speaks."""
        return self.serializer.vsn

    def close(self, code: int, reason: str = "") -> None:
        """Close the connection. Never 1000 when the client should come back: some do not reconnect after it."""
        if not self.closed:
            stats.closes[code] += 1
            self.ended()
            self.link.close(code, reason)

    def ended(self) -> None:
        """Release everything, because the connection is gone or about to go."""
        if self.closed:
            return
        self.closed = True
        channels, self._channels = self._channels, None
        for channel in (channels or {}).values():
            self._release(channel)
        self.core.disconnected(self)

    # Outgoing.

    def send(self, head: bytes, tail: bytes = b"") -> None:
        """Send one text frame, given whole or in two parts."""
        if not self.closed:
            stats.frames_out += 1
            self.link.send_text(head, tail)

    def send_binary(self, frame: bytes) -> None:
        """Send one binary frame; only where `binary` is true."""
        if not self.closed:
            stats.frames_out += 1
            self.link.send_binary(frame)

    def _reply(self, join_ref: str | None, ref: str | None, topic: str, status: str, response: bytes) -> None:
        if ref is not None:
            self.send(self.serializer.reply(join_ref, ref, topic, status, response))

    def _refuse(self, join_ref: str | None, ref: str | None, topic: str, failure: Failure) -> None:
        self._reply(join_ref, ref, topic, "error", wire.encode_payload(failure.reason()))

    # Incoming.

    def receive_text(self, data: bytes) -> None:
        """Handle one text message of the client."""
        if self.closed:
            return
        stats.frames_in += 1
        self.last_seen = self.core.wheel.now
        answer = self.serializer.heartbeat_answer(data)
        if answer is not None:
            self.send(answer)
            return
        try:
            frame = self.serializer.decode(data)
        except wire.MalformedFrame as error:
            self._answer_malformed(error)
            return
        self._dispatch(frame, binary=False)

    def receive_binary(self, data: bytes) -> None:
        """Handle one binary message of the client."""
        if self.closed:
            return
        stats.frames_in += 1
        self.last_seen = self.core.wheel.now
        try:
            frame = self.serializer.decode_binary(data)
        except wire.MalformedFrame as error:
            self._answer_malformed(error)
            return
        self._dispatch(frame, binary=True)

    def malformed(self, error: wire.MalformedFrame) -> None:
        """Answer something from the client that is no frame."""
        if not self.closed:
            self._answer_malformed(error)

    def _answer_malformed(self, error: wire.MalformedFrame) -> None:
        stats.malformed += 1
        now = self.core.wheel.now
        if now - self._malformed_since >= self.core.wheel.ticks_per_minute:
            self._malformed_since = now
            self._malformed = 0
        self._malformed += 1
        if self._malformed > self.core.limits.malformed_per_minute:
            self.close(POLICY_VIOLATION, "too many malformed frames")
            return
        # Clients take a ref of null for a push; one on the topic "phoenix" reaches no channel and does no harm.
        response = wire.encode_payload({"reason": "malformed_frame", "detail": error.reason})
        topic = error.topic if error.topic is not None else "phoenix"
        if error.ref is not None:
            self.send(self.serializer.reply(error.join_ref, error.ref, topic, "error", response))
        else:
            body = b'{"status":"error","response":%b}' % response
            self.send(self.serializer.head(None), self.serializer.tail("phoenix", "phx_reply", body))

    def _dispatch(self, frame: wire.Frame, binary: bool) -> None:
        topic = frame.topic
        channel = self._channels.get(topic) if self._channels is not None else None
        event = frame.event
        if event == "phx_join":
            self._join(frame, channel)
        elif channel is not None:
            # A frame of an earlier join of this topic: the client has given up on it.
            if frame.join_ref is None or frame.join_ref == channel.join_ref:
                if event == "phx_leave":
                    self._leave(channel, frame)
                elif channel.held is not None:
                    self._wait(channel, frame, binary)
                else:
                    self._handle(channel, frame, binary)
        elif event == "phx_leave":
            self._reply(frame.join_ref, frame.ref, topic, "ok", wire.EMPTY_OBJECT)
        elif topic == "phoenix" and event == "heartbeat":
            self._reply(None, frame.ref, topic, "ok", wire.EMPTY_OBJECT)
        else:
            self._unmatched(frame)

    def _unmatched(self, frame: wire.Frame) -> None:
        self._reply(None, frame.ref, frame.topic, "error", b'{"reason":"unmatched topic"}')

    # Joining and leaving.

    def _join(self, frame: wire.Frame, existing: Channel | None) -> None:
        topic = frame.topic
        route = self.core.router.resolve(topic)
        if route is None:
            self._unmatched(frame)
            return
        if existing is not None:
            self.end_channel(existing, "phx_close", wire.EMPTY_OBJECT)
        if self._channels is None:
            self._channels = {}
        # A join that was given up on runs on and counts, or joining and leaving in turn would start any number of them.
        if max(len(self._channels), self._deciding) >= self.core.limits.max_channels:
            self._reply(frame.join_ref, frame.ref, topic, "error", b'{"reason":"too many channels joined"}')
            return
        try:
            params = _PARAMS.decode(frame.payload) or {}
        except PAYLOAD_ERRORS as error:
            self._refuse(frame.join_ref, frame.ref, topic, InvalidPayload(str(error)))
            return
        factory, topic_id = route
        try:
            channel = factory(self, topic, topic_id)
        except Failure as failure:
            self._refuse(frame.join_ref, frame.ref, topic, failure)
            return
        except Exception:
            log.exception("join_crashed", topic=_kind(topic))
            self._join_crashed(frame.join_ref, frame.ref, topic)
            return
        channel.join_ref = frame.join_ref
        channel.head = self.serializer.head(frame.join_ref)
        self._channels[topic] = channel
        self._deciding += 1
        self.core.spawn(self._decide(channel, frame.ref, params))

    async def _decide(self, channel: Channel, ref: str | None, params: dict[str, Any]) -> None:
        failure: Failure | None = None
        body = wire.EMPTY_OBJECT
        try:
            async with asyncio.timeout(self.core.limits.join_timeout):
                body = wire.encode_payload(await channel.join(params))
            if channel.held is not None and channel.held.overflowed:
                failure = Overloaded()
        except Failure as refused:
            failure = refused
        except PAYLOAD_ERRORS as error:
            failure = InvalidPayload(str(error))
        except TimeoutError:
            failure = JoinTimeout()
        except asyncio.CancelledError:
            self._forget(channel)
            raise
        except Exception:
            log.exception("join_crashed", topic=_kind(channel.topic))
            if self._forget(channel):
                self._join_crashed(channel.join_ref, ref, channel.topic)
            return
        finally:
            self._deciding -= 1
        if failure is not None:
            if self._forget(channel):
                stats.joins["refused"] += 1
                self._refuse(channel.join_ref, ref, channel.topic, failure)
                self._refuse_waiting(channel)
        elif channel.closed:
            stats.joins["abandoned"] += 1
            self._run_release(channel)
        else:
            await self._open(channel, ref, body)

    async def _open(self, channel: Channel, ref: str | None, body: bytes) -> None:
        stats.joins["ok"] += 1
        stats.channels += 1
        self._reply(channel.join_ref, ref, channel.topic, "ok", body)
        for frame, binary in channel.open():
            if not channel.closed:
                self._handle(channel, frame, binary)
        if channel.closed:
            return
        try:
            await channel.joined()
        except Exception:
            log.exception("channel_crashed", topic=_kind(channel.topic))
            self._channel_crashed(channel)

    def _forget(self, channel: Channel) -> bool:
        """Release a channel whose join failed. False when the client had already given up on it."""
        wanted = not channel.closed
        if wanted and self._channels is not None:
            self._channels.pop(channel.topic, None)
        channel.closed = True
        self._run_release(channel)
        return wanted

    def _refuse_waiting(self, channel: Channel) -> None:
        for frame, _ in channel.held.incoming if channel.held is not None else ():
            self._unmatched(frame)

    def _join_crashed(self, join_ref: str | None, ref: str | None, topic: str) -> None:
        stats.joins["crashed"] += 1
        self._reply(join_ref, ref, topic, "error", b'{"reason":"join crashed"}')

    def _leave(self, channel: Channel, frame: wire.Frame) -> None:
        self._reply(channel.join_ref, frame.ref, channel.topic, "ok", wire.EMPTY_OBJECT)
        self.end_channel(channel, "phx_close", wire.EMPTY_OBJECT)

    def end_channel(self, channel: Channel, event: str, payload: bytes) -> None:
        """Tell the client how a channel ends, and release it."""
        if channel.closed:
            return
        if self._channels is not None:
            self._channels.pop(channel.topic, None)
        self.send(self.serializer.control(channel.join_ref, channel.topic, event, payload))
        self._release(channel)

    def _release(self, channel: Channel) -> None:
        channel.closed = True
        if channel.held is None:
            stats.channels -= 1
            self._run_release(channel)
        # Else its join still runs, and releases it when done: never while it is at work.

    def _run_release(self, channel: Channel) -> None:
        try:
            channel.release()
        except Exception:
            log.exception("terminated_crashed", topic=_kind(channel.topic))

    # Pushes.

    def _wait(self, channel: Channel, frame: wire.Frame, binary: bool) -> None:
        held = channel.held
        assert held is not None
        if len(held.incoming) < self.core.limits.max_waiting_frames:
            held.incoming.append((frame, binary))
        else:
            self._refuse(channel.join_ref, frame.ref, frame.topic, Overloaded())

    def _handle(self, channel: Channel, frame: wire.Frame, binary: bool) -> None:
        reply = Reply(channel, frame.ref)
        try:
            if binary:
                work = channel.receive_binary(frame.event, bytes(frame.payload), reply)
            else:
                work = channel.receive(frame.event, frame.payload, reply)
        except Failure as failure:
            reply.error(failure)
        except PAYLOAD_ERRORS as error:
            reply.error(InvalidPayload(str(error)))
        except Exception:
            log.exception("channel_crashed", topic=_kind(channel.topic))
            self._channel_crashed(channel)
        else:
            if work is not None:
                self._run(channel, work, reply)

    def _run(self, channel: Channel, work: Coroutine[Any, Any, None], reply: Reply) -> None:
        if self._running >= self.core.limits.max_running_handlers:
            work.close()
            reply.error(RateLimited(retry_after=1))
            return
        self._running += 1
        self.core.spawn(self._finish(channel, work, reply))

    async def _finish(self, channel: Channel, work: Coroutine[Any, Any, None], reply: Reply) -> None:
        try:
            await work
        except Failure as failure:
            reply.error(failure)
        except PAYLOAD_ERRORS as error:
            reply.error(InvalidPayload(str(error)))
        except Exception:
            log.exception("channel_crashed", topic=_kind(channel.topic))
            self._channel_crashed(channel)
        finally:
            self._running -= 1

    def _channel_crashed(self, channel: Channel) -> None:
        stats.crashes += 1
        channel.crash()
