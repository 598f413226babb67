"""How the other services call `messaging`."""

from __future__ import annotations

from uuid import UUID

from whispr.contracts import messaging_pb2, messaging_pb2_grpc
from whispr.kit.grpc import Channel


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
