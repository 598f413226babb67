"""The gRPC door: `messaging.MessagingService`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc
import msgspec

from whispr.contracts import messaging_pb2, messaging_pb2_grpc
from whispr.kit.rpc_fields import as_timestamp, read_id, read_time
from whispr.services.messaging.service.erasure import Erasure
from whispr.services.messaging.service.expiry import Expiry
from whispr.services.messaging.service.firing import Firing
from whispr.services.messaging.service.media_links import MediaAccess
from whispr.services.messaging.service.retention import Retention
from whispr.services.messaging.service.usage import Usage

# Just under half of what a caller waits, so that the answer with what was done still reaches it.
CLEANUP_SECONDS = 25.0

Call = grpc.aio.ServicerContext[Any, Any]


class MessagingServicer(messaging_pb2_grpc.MessagingServiceServicer):
    """Turns messages into calls of the rules and answers into messages."""

    def __init__(
        self,
        erasure: Erasure,
        expiry: Expiry,
        retention: Retention,
        media_access: MediaAccess,
        usage: Usage,
        firing: Firing,
    ) -> None:
        self._firing = firing
        self._erasure = erasure
        self._expiry = expiry
        self._retention = retention
        self._media_access = media_access
        self._usage = usage

    async def EraseUser(
        self, request: messaging_pb2.EraseUserRequest, context: Call
    ) -> messaging_pb2.EraseUserResponse:
        # Erasing twice is erasing once, so the operation needs no record; a caller without one is still wrong.
        read_id("operation_id", request.operation_id)
        left = await self._erasure.erase(read_id("user_id", request.user_id))
        return messaging_pb2.EraseUserResponse(conversations_left=left)

    async def CleanupExpiredMessages(
        self, request: messaging_pb2.CleanupExpiredMessagesRequest, context: Call
    ) -> messaging_pb2.CleanupExpiredMessagesResponse:
        # What is erased stays erased, so a repeat only goes on; a caller without an operation is still wrong.
        read_id("operation_id", request.operation_id)
        deadline = time.monotonic() + CLEANUP_SECONDS

        def is_over() -> bool:
            return time.monotonic() >= deadline

        expired = await self._expiry.erase_due(until=is_over)
        purged = await self._retention.purge_outdated(until=is_over)
        return messaging_pb2.CleanupExpiredMessagesResponse(expired=expired, purged=purged, more=is_over())

    async def SendScheduledMessage(
        self, request: messaging_pb2.SendScheduledMessageRequest, context: Call
    ) -> messaging_pb2.SendScheduledMessageResponse:
        # What was sent stays sent, so the operation needs no record; a caller without one is still wrong.
        read_id("operation_id", request.operation_id)
        plan = await self._firing.fire(read_id("scheduled_id", request.scheduled_id))
        return messaging_pb2.SendScheduledMessageResponse(
            status=plan.status.value,
            message_id="" if plan.message_id is None else str(plan.message_id),
            failure=plan.failure or "",
            send_at=as_timestamp(plan.send_at),
        )

    async def AuthorizeMediaAccess(
        self, request: messaging_pb2.AuthorizeMediaAccessRequest, context: Call
    ) -> messaging_pb2.AuthorizeMediaAccessResponse:
        allowed = await self._media_access.may_see(
            read_id("user_id", request.user_id),
            read_id("media_id", request.media_id),
            read_id("owner_id", request.owner_id),
        )
        return messaging_pb2.AuthorizeMediaAccessResponse(allowed=allowed)

    async def GenerateUsageReport(
        self, request: messaging_pb2.GenerateUsageReportRequest, context: Call
    ) -> messaging_pb2.GenerateUsageReportResponse:
        read_id("operation_id", request.operation_id)
        report = await self._usage.report(
            read_time("from", getattr(request, "from")), read_time("until", request.until)
        )
        return messaging_pb2.GenerateUsageReportResponse(report=msgspec.json.encode(report).decode())


def register(
    erasure: Erasure,
    expiry: Expiry,
    retention: Retention,
    media_access: MediaAccess,
    usage: Usage,
    firing: Firing,
) -> Callable[[grpc.aio.Server], None]:
    """What puts the servicer on a server."""

    def add(server: grpc.aio.Server) -> None:
        servicer = MessagingServicer(erasure, expiry, retention, media_access, usage, firing)
        messaging_pb2_grpc.add_MessagingServiceServicer_to_server(servicer, server)

    return add
