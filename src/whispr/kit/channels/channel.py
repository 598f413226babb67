"""`Channel`: what a service subclasses, one instance per join of a topic by a socket, and `Reply`, its answer to a push."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from whispr.kit.channels import wire
from whispr.kit.errors import Failure, Kind

if TYPE_CHECKING:
    from whispr.kit.channels.hub import Hub
    from whispr.kit.channels.socket import Socket

T = TypeVar("T")


class UnknownEvent(Failure):
    """The channel does not know this event."""

    kind = Kind.INVALID
    code = "unknown_event"


class InvalidPayload(Failure):
    """The payload is not what this event takes."""

    kind = Kind.INVALID
    code = "invalid_payload"


class BinaryUnsupported(Failure):
    """This connection carries no binary frames."""

    kind = Kind.INVALID
    code = "binary_unsupported"


PAYLOAD_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding a client's payload raises. Each becomes `InvalidPayload`."""


def decode_payload(payload: msgspec.Raw | bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode a client's payload. Raises `InvalidPayload` with what is wrong in its detail."""
    try:
        return decoder.decode(payload)
    except PAYLOAD_ERRORS as error:
        raise InvalidPayload(str(error)) from None


class Reply:
    """The answer to one push: at most once, and silent when the client gave no ref or the channel is gone."""

    __slots__ = ("_channel", "_ref")

    def __init__(self, channel: Channel, ref: str | None) -> None:
        self._channel = channel
        self._ref = ref
        if ref is not None:
            channel.unanswered += 1

    @property
    def sent(self) -> bool:
        """True when nothing more will be sent: answered already, or nobody asked."""
        return self._ref is None

    def ok(self, response: Any = None) -> None:
        """Answer `{"status": "ok", "response": response}`. `response` must encode to an object; None is the empty one."""
        self._send("ok", wire.encode_payload(response))

    def ok_raw(self, response: bytes) -> None:
        """Answer ok with JSON text of an object."""
        self._send("ok", response)

    def ok_binary(self, data: bytes) -> None:
        """Answer ok with bytes; an error reply where the connection carries no binary frames."""
        if not self._channel.socket.binary:
            self.error(BinaryUnsupported())
            return
        ref, channel = self._settle()
        if ref is not None and not channel.closed:
            channel.socket.send_binary(wire.binary_reply(channel.join_ref, ref, channel.topic, "ok", data))

    def error(self, failure: Failure) -> None:
        """Answer `{"status": "error", "response": {"reason": failure.code, …}}`."""
        self._send("error", wire.encode_payload(failure.reason()))

    def _settle(self) -> tuple[str | None, Channel]:
        ref, self._ref = self._ref, None
        if ref is not None:
            self._channel.unanswered -= 1
        return ref, self._channel

    def _send(self, status: str, response: bytes) -> None:
        ref, channel = self._settle()
        if ref is not None and not channel.closed:
            socket = channel.socket
            socket.send(socket.serializer.reply(channel.join_ref, ref, channel.topic, status, response))


class Held:
    """What waits until a join is answered: frames for the client, and frames from it."""

    __slots__ = ("incoming", "outgoing", "overflowed")

    def __init__(self) -> None:
        self.outgoing: list[tuple[bool, bytes]] = []
        self.incoming: list[tuple[wire.Frame, bool]] = []
        self.overflowed = False


class Channel:
    """One join of a topic by a socket. Subclasses name their fields in `__slots__`: there may be 100,000 of them.

    Everything runs on the event loop. `receive` is the hot path and synchronous; what has to wait returns a coroutine.
    """

    __slots__ = (
        "_subscriptions",
        "closed",
        "head",
        "held",
        "join_ref",
        "socket",
        "topic",
        "topic_id",
        "unanswered",
    )

    def __init__(self, socket: Socket, topic: str, topic_id: str) -> None:
        """`topic_id` is what the `*` of the route matched."""
        self.socket = socket
        self.topic = topic
        self.topic_id = topic_id
        self.join_ref: str | None = None
        self.closed = False
        self.head = b""
        self.held: Held | None = Held()
        self.unanswered = 0
        """Pushes that wait for their reply."""
        self._subscriptions: tuple[str, ...] = ()

    # What a service overrides.

    async def join(self, params: dict[str, Any]) -> Any:
        """Decide about the join. Returns the reply: something that encodes to a JSON object, `msgspec.Raw`, or None.

        Raise a `Failure` to refuse. Subscribe before reading what the reply is made from: frames that arrive meanwhile are
        held until the reply is out, so that nothing falls between the two.
        """
        return None

    async def joined(self) -> None:
        """Called when the join reply and the frames held meanwhile are written. An exception ends the channel."""

    def receive(self, event: str, payload: msgspec.Raw, reply: Reply) -> Coroutine[Any, Any, None] | None:
        """Handle a push. A returned coroutine is run as a task; `reply` may be used at any time later.

        `Failure` (raised here or in the coroutine) becomes an error reply; any other exception ends the channel with
        `phx_error`, after which the client joins anew.
        """
        raise UnknownEvent

    def receive_binary(self, event: str, data: bytes, reply: Reply) -> Coroutine[Any, Any, None] | None:
        """Handle a push that came as a binary frame. Unless overridden, `data` must be JSON text and goes to `receive`."""
        if not data.isascii():
            data.decode()
        return self.receive(event, msgspec.json.decode(data, type=msgspec.Raw), reply)

    def terminated(self) -> None:
        """Release everything. Called exactly once for each channel whose `join` was started, whatever came of it."""

    # What a service uses.

    @property
    def hub(self) -> Hub:
        """The hub of this process."""
        return self.socket.core.hub

    @property
    def live(self) -> bool:
        """True from the moment the join reply is out until the channel is gone."""
        return self.held is None and not self.closed

    def subscribe(self, topic: str | None = None) -> None:
        """Receive what the hub broadcasts on `topic` (default: the channel's own), under the channel's own topic."""
        wanted = self.topic if topic is None else topic
        if wanted not in self._subscriptions and not self.closed:
            self._subscriptions += (wanted,)
            self.hub.subscribe(wanted, self)

    def unsubscribe(self, topic: str | None = None) -> None:
        """Undo `subscribe`. Happens by itself when the channel ends."""
        unwanted = self.topic if topic is None else topic
        if unwanted in self._subscriptions:
            self._subscriptions = tuple(name for name in self._subscriptions if name != unwanted)
            self.hub.unsubscribe(unwanted, self)

    def push(self, event: str, payload: Any = None) -> None:
        """Send an event. `payload` encodes to an object; bytes and `msgspec.Raw` are JSON text already.

        Held until the join reply is out; dropped when the channel is gone.
        """
        if not self.closed:
            self.deliver(self.socket.serializer.tail(self.topic, event, wire.encode_payload(payload)))

    def push_binary(self, event: str, data: bytes) -> None:
        """Send an event with bytes. Dropped where the connection carries no binary frames."""
        if self.closed or not self.socket.binary:
            return
        if self.join_ref is None:
            self._deliver_binary(wire.binary_broadcast(self.topic, event, data))
        else:
            self._deliver_binary(wire.binary_push(self.join_ref, self.topic, event, data))

    def close(self) -> None:
        """End the channel with `phx_close`: the client does not join again by itself."""
        self.socket.end_channel(self, "phx_close", wire.EMPTY_OBJECT)

    def crash(self) -> None:
        """End the channel with `phx_error`: the client joins again."""
        self.socket.end_channel(self, "phx_error", b'{"reason":"channel_crash"}')

    # What the kit calls.

    def deliver(self, tail: bytes) -> None:
        """Send a frame whose tail is encoded already, or hold it."""
        if self.held is not None:
            self._hold(False, tail)
        elif not self.closed:
            self.socket.send(self.head, tail)

    def _deliver_binary(self, frame: bytes) -> None:
        if self.held is not None:
            self._hold(True, frame)
        else:
            self.socket.send_binary(frame)

    def _hold(self, binary: bool, frame: bytes) -> None:
        held = self.held
        assert held is not None
        if len(held.outgoing) >= self.socket.core.limits.max_held_frames:
            held.overflowed = True
        else:
            held.outgoing.append((binary, frame))

    def open(self) -> list[tuple[wire.Frame, bool]]:
        """Send what was held and let frames through from now on. Returns what the client sent meanwhile."""
        held, self.held = self.held, None
        assert held is not None
        for binary, frame in held.outgoing:
            if binary:
                self.socket.send_binary(frame)
            else:
                self.socket.send(self.head, frame)
        return held.incoming

    def release(self) -> None:
        """Leave the hub and let the service release its own."""
        for topic in self._subscriptions:
            self.hub.unsubscribe(topic, self)
        self._subscriptions = ()
        self.terminated()
