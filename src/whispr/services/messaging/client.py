"""How the other services call `messaging`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from whispr.contracts import messaging_pb2, messaging_pb2_grpc
from whispr.kit.grpc import Channel


@dataclass(frozen=True, slots=True)
class Cleanup:
    """What was erased by one call. `more`: its time was over before everything was."""

    expired: int
    purged: int
    more: bool


class MessagingClient:
    """`messaging.MessagingService`. Every method raises the failure that `messaging` raised, or `Unavailable`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._stub = messaging_pb2_grpc.MessagingServiceStub(channel.grpc)

    async def erase_user(self, user_id: UUID, operation_id: UUID) -> int:
        """End all memberships of a person; how many conversations were left by this call. May be repeated."""
        request = messaging_pb2.EraseUserRequest(operation_id=str(operation_id), user_id=str(user_id))
        answer = await self._channel.call(self._stub.EraseUser, request, timeout=30.0, idempotent=True)
        return int(answer.conversations_left)

    async def cleanup_expired_messages(self, operation_id: UUID) -> Cleanup:
        """Erase expired messages and what retention does not keep. May be repeated."""
        request = messaging_pb2.CleanupExpiredMessagesRequest(operation_id=str(operation_id))
        answer = await self._channel.call(
            self._stub.CleanupExpiredMessages, request, timeout=60.0, idempotent=True
        )
        return Cleanup(int(answer.expired), int(answer.purged), answer.more)

    async def authorize_media_access(self, user_id: UUID, media_id: UUID, owner_id: UUID) -> bool:
        """Whether the owner sent the medium in a message that the person can read now."""
        request = messaging_pb2.AuthorizeMediaAccessRequest(
            user_id=str(user_id), media_id=str(media_id), owner_id=str(owner_id)
        )
        answer = await self._channel.call(
            self._stub.AuthorizeMediaAccess, request, timeout=2.0, idempotent=True
        )
        return answer.allowed

    async def generate_usage_report(
        self, operation_id: UUID, start: datetime, end: datetime
    ) -> dict[str, Any]:
        """Aggregates of the whole days (UTC) from `start` to before `end`."""
        request = messaging_pb2.GenerateUsageReportRequest(operation_id=str(operation_id))
        getattr(request, "from").FromDatetime(start)
        request.until.FromDatetime(end)
        answer = await self._channel.call(
            self._stub.GenerateUsageReport, request, timeout=30.0, idempotent=True
        )
        return msgspec.json.decode(answer.report, type=dict[str, Any])
