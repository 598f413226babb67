"""Who listens to what in this process: topics to channels, people to sockets.

A broadcast encodes its frame once per version of the wire (and once more for channels that follow a topic under another
name); each recipient's frame differs only in the few bytes of its head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any
from uuid import UUID

from whispr.kit.channels import wire
from whispr.kit.channels.channel import Channel

if TYPE_CHECKING:
    from whispr.kit.channels.socket import Socket


class Hub:
    """Subscriptions and sockets of one process."""

    def __init__(self) -> None:
        self._topics: dict[str, set[Channel]] = {}
        self._sockets: dict[int, Socket] = {}
        self._by_user: dict[UUID, tuple[Socket, ...]] = {}
        self.on_first_subscriber: Callable[[str], None] | None = None
        """Called when a topic gets its first subscriber here."""
        self.on_last_unsubscribed: Callable[[str], None] | None = None
        """Called when a topic has lost its last subscriber here."""

    # Topics.

    def subscribe(self, topic: str, channel: Channel) -> None:
        """Deliver broadcasts on `topic` to `channel`. Channels use their own `subscribe`, which is undone by itself."""
        subscribers = self._topics.get(topic)
        if subscribers is None:
            self._topics[topic] = {channel}
            if self.on_first_subscriber is not None:
                self.on_first_subscriber(topic)
        else:
            subscribers.add(channel)

    def unsubscribe(self, topic: str, channel: Channel) -> None:
        """Undo `subscribe`; nothing happens when there is nothing to undo."""
        subscribers = self._topics.get(topic)
        if subscribers is None or channel not in subscribers:
            return
        subscribers.discard(channel)
        if not subscribers:
            del self._topics[topic]
            if self.on_last_unsubscribed is not None:
                self.on_last_unsubscribed(topic)

    def channels(self, topic: str) -> Collection[Channel]:
        """The subscribers of `topic` in this process, as they are now: safe to iterate while they come and go."""
        return tuple(self._topics.get(topic, ()))

    def has_subscribers(self, topic: str) -> bool:
        """Whether anyone in this process listens to `topic`."""
        return topic in self._topics

    def topics(self) -> Iterable[str]:
        """The topics anyone in this process listens to, as they are now."""
        return tuple(self._topics)

    def broadcast(self, topic: str, event: str, payload: Any = None, exclude: Channel | None = None) -> int:
        """Push an event to all subscribers but `exclude`. Returns how many.

        `payload` encodes to an object; bytes and `msgspec.Raw` are JSON text already.
        """
        subscribers = self.channels(topic)
        if not subscribers:
            return 0
        body = wire.encode_payload(payload)
        tails: dict[tuple[str, str], bytes] = {}
        serializer: wire.Serializer | None = None
        name = ""
        tail = b""
        count = 0
        for channel in subscribers:
            if channel is exclude:
                continue
            if channel.socket.serializer is not serializer or channel.topic != name:
                serializer, name = channel.socket.serializer, channel.topic
                key = (serializer.vsn, name)
                tail = tails.get(key, b"")
                if not tail:
                    tail = tails[key] = serializer.tail(name, event, body)
            channel.deliver(tail)
            count += 1
        return count

    def broadcast_binary(self, topic: str, event: str, data: bytes, exclude: Channel | None = None) -> int:
        """Push bytes to all subscribers whose connection carries binary frames, but `exclude`. Returns how many."""
        count = 0
        for channel in self.channels(topic):
            if channel is not exclude and channel.socket.binary:
                channel.push_binary(event, data)
                count += 1
        return count

    # People.

    def add(self, socket: Socket) -> None:
        """Know a socket."""
        self._sockets[socket.id] = socket
        user_id = socket.caller.user_id
        self._by_user[user_id] = (*self._by_user.get(user_id, ()), socket)

    def remove(self, socket: Socket) -> None:
        """Forget a socket."""
        self._sockets.pop(socket.id, None)
        user_id = socket.caller.user_id
        left = tuple(other for other in self._by_user.get(user_id, ()) if other is not socket)
        if left:
            self._by_user[user_id] = left
        else:
            self._by_user.pop(user_id, None)

    def __len__(self) -> int:
        """How many sockets are connected."""
        return len(self._sockets)

    def sockets(self) -> Collection[Socket]:
        """All connected sockets, as they are now."""
        return tuple(self._sockets.values())

    def sockets_of(self, user_id: UUID) -> Collection[Socket]:
        """The sockets of a person in this process."""
        return self._by_user.get(user_id, ())

    def devices_online(self, user_id: UUID) -> set[UUID]:
        """The devices of a person that are connected to this process."""
        return {socket.caller.device_id for socket in self._by_user.get(user_id, ())}

    def is_online(self, user_id: UUID) -> bool:
        """Whether any device of a person is connected to this process."""
        return user_id in self._by_user
