"""Which conversation has which channels on this node, and how events reach them: each once, in order, without a hole.

A channel enters before it reads the log for its join reply; what is committed meanwhile waits in its backlog and is let
through, from the reply's head on, when the reply is out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final
from uuid import UUID

import msgspec

from whispr.kit.channels import Channel
from whispr.kit.ids import swift
from whispr.services.messaging.models import (
    CommittedEvent,
    Membership,
    render_event,
    render_payload,
    seen_above,
)
from whispr.services.messaging.service.events import EventBus

if TYPE_CHECKING:
    from whispr.kit.channels import Socket

MAX_REPLY_BYTES: Final = 384 * 1024
"""Events in one frame; a socket that gets more than it reads is cut off."""

_MAX_BACKLOG: Final = 1_000

Tails = dict[str, bytes]
"""Encoded frames without their head, by version of the wire."""


class _Removal(msgspec.Struct):
    user_id: UUID


_decode_removal = msgspec.json.Decoder(_Removal).decode


class RoomChannel(Channel):
    """A channel that gets a conversation's events. `mark`: events up to it are in the join reply, or were pushed."""

    __slots__ = ("backlog", "conversation_id", "mark", "membership")

    def __init__(self, socket: Socket, topic: str, topic_id: str, conversation_id: UUID) -> None:
        super().__init__(socket, topic, topic_id)
        self.conversation_id = swift(conversation_id)
        self.membership: Membership | None = None
        self.mark = 0
        self.backlog: list[CommittedEvent] | None = []

    def take(self, event: CommittedEvent, tails: Tails) -> None:
        """Push the event, or keep it until the join reply is out."""
        if self.backlog is not None:
            self.backlog.append(event)
        elif event.seq > self.mark:
            self.mark = event.seq
            if event.message_seq and (seen := self._seen(event)) is not event:
                event, tails = seen, {}
            self.deliver(self._tail(event, tails))
            if event.event == "member_removed" and _decode_removal(event.payload).user_id == self.user_id:
                self.close()

    def release_backlog(self) -> None:
        """Push what was committed since the join reply was made. Called when it is out."""
        backlog, self.backlog = self.backlog or [], None
        if len(backlog) > _MAX_BACKLOG:
            # More than a client should be sent at once: it joins anew with the cursor it has now.
            self.crash()
            return
        for event in backlog:
            if not self.closed:
                self.take(event, {})

    @property
    def user_id(self) -> UUID:
        """Who listens."""
        return self.socket.caller.user_id

    def _seen(self, event: CommittedEvent) -> CommittedEvent:
        assert self.membership is not None, "a channel takes events after its join"
        return seen_above(event, self.membership.floor_seq)

    def _tail(self, event: CommittedEvent, tails: Tails) -> bytes:
        serializer = self.socket.serializer
        if event.content is not None and event.content.envelopes is not None:
            payload = render_payload(event, self.socket.caller.device_id)
            return serializer.tail(self.topic, event.event, payload)
        tail = tails.get(serializer.vsn)
        if tail is None:
            payload = render_payload(event, self.socket.caller.device_id)
            tail = tails[serializer.vsn] = serializer.tail(self.topic, event.event, payload)
        return tail


class Rooms:
    """The joined conversations of this node."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._rooms: dict[UUID, set[RoomChannel]] = {}
        bus.on_events(self._deliver)

    def enter(self, channel: RoomChannel) -> None:
        """Let the channel have the conversation's events from now on. Before the log is read."""
        room = self._rooms.get(channel.conversation_id)
        if room is None:
            room = self._rooms[channel.conversation_id] = set()
            self._bus.serve(channel.conversation_id)
        room.add(channel)

    def leave(self, channel: RoomChannel) -> None:
        """The channel is gone."""
        room = self._rooms.get(channel.conversation_id)
        if room is None or channel not in room:
            return
        room.discard(channel)
        if not room:
            del self._rooms[channel.conversation_id]
            self._bus.release(channel.conversation_id)

    def settle(self, channel: RoomChannel, head: int) -> None:
        """The channel's join reply covers events up to `head`."""
        channel.mark = head
        self._bus.settle(channel.conversation_id, head)

    def push(
        self,
        conversation_id: UUID,
        event: str,
        payload: bytes,
        *,
        chosen: Callable[[UUID], bool] | None = None,
    ) -> None:
        """Push something without a `seq` to the channels of the people `chosen`, all by default."""
        tails: Tails = {}
        for channel in tuple(self._rooms.get(conversation_id, ())):
            if channel.backlog is None and (chosen is None or chosen(channel.user_id)):
                serializer = channel.socket.serializer
                tail = tails.get(serializer.vsn)
                if tail is None:
                    tail = tails[serializer.vsn] = serializer.tail(channel.topic, event, payload)
                channel.deliver(tail)

    def people(self, conversation_id: UUID) -> set[UUID]:
        """Who has the conversation open on this node."""
        return {channel.user_id for channel in self._rooms.get(conversation_id, ())}

    def _deliver(self, conversation_id: UUID, events: list[CommittedEvent]) -> None:
        room = self._rooms.get(conversation_id)
        if room is None:
            return
        channels = tuple(room)
        for event in events:
            tails: Tails = {}
            for channel in channels:
                if not channel.closed:
                    channel.take(event, tails)


def render_events(events: Collection[CommittedEvent], device_id: UUID) -> tuple[list[msgspec.Raw], bool]:
    """EVENTs as a device gets them, and whether all of them fit into one frame. At least one always does."""
    rendered: list[msgspec.Raw] = []
    size = 0
    for event in events:
        item = render_event(event, device_id)
        size += len(item)
        if rendered and size > MAX_REPLY_BYTES:
            return rendered, False
        rendered.append(msgspec.Raw(item))
    return rendered, True
