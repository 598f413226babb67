"""How the other services call `notification`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from uuid import UUID

from whispr.contracts import notification_pb2, notification_pb2_grpc
from whispr.kit.grpc import Channel


@dataclass(frozen=True, slots=True)
class Event:
    """Something that may become notifications of `recipient_ids`. The same `event_id` counts once."""

    event_id: UUID
    type: Literal["message", "group", "system"]
    name: str
    conversation_id: UUID
    conversation_type: Literal["direct", "group"]
    message_id: UUID | None
    sender_id: UUID
    recipient_ids: tuple[UUID, ...]
    occurred_at: datetime


class NotificationClient:
    """`notification.EventService`. Raises the failure that `notification` raised, or `Unavailable`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._stub = notification_pb2_grpc.EventServiceStub(channel.grpc)

    async def publish_events(self, events: Sequence[Event]) -> int:
        """Hand events over; how many were accepted. May be repeated."""
        request = notification_pb2.PublishEventsRequest(events=[_event(event) for event in events])
        answer = await self._channel.call(self._stub.PublishEvents, request, timeout=10.0, idempotent=True)
        return int(answer.accepted)


def _event(event: Event) -> notification_pb2.Event:
    message = notification_pb2.Event(
        event_id=str(event.event_id),
        type=event.type,
        conversation_id=str(event.conversation_id),
        conversation_type=event.conversation_type,
        message_id=str(event.message_id) if event.message_id else "",
        sender_id=str(event.sender_id),
        recipient_ids=[str(user_id) for user_id in event.recipient_ids],
        name=event.name,
    )
    message.occurred_at.FromDatetime(event.occurred_at)
    return message
