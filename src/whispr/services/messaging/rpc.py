"""The gRPC door: `messaging.MessagingService`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from whispr.contracts import messaging_pb2, messaging_pb2_grpc
from whispr.kit.rpc_fields import read_id
from whispr.services.messaging.service.erasure import Erasure

Call = grpc.aio.ServicerContext[Any, Any]


class MessagingServicer(messaging_pb2_grpc.MessagingServiceServicer):
    """Turns messages into calls of the rules and answers into messages."""

    def __init__(self, erasure: Erasure) -> None:
        self._erasure = erasure

    async def EraseUser(
        self, request: messaging_pb2.EraseUserRequest, context: Call
    ) -> messaging_pb2.EraseUserResponse:
        # Erasing twice is erasing once, so the operation needs no record; a caller without one is still wrong.
        read_id("operation_id", request.operation_id)
        left = await self._erasure.erase(read_id("user_id", request.user_id))
        return messaging_pb2.EraseUserResponse(conversations_left=left)


def register(erasure: Erasure) -> Callable[[grpc.aio.Server], None]:
    """What puts the servicer on a server."""

    def add(server: grpc.aio.Server) -> None:
        messaging_pb2_grpc.add_MessagingServiceServicer_to_server(MessagingServicer(erasure), server)

    return add
