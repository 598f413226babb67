"""The gRPC door: `user.UserService`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import grpc
import msgspec

from whispr.contracts import user_pb2, user_pb2_grpc
from whispr.kit.errors import Invalid
from whispr.kit.rpc_fields import read_choice, read_id, read_ids, read_time
from whispr.services.user.models import (
    PresenceQuestion,
    Profile,
    Purpose,
    Quotas,
    StorageAction,
    StorageRequest,
)
from whispr.services.user.service import UserService

Call = grpc.aio.ServicerContext[Any, Any]


class UserServicer(user_pb2_grpc.UserServiceServicer):
    """Turns messages into calls of the rules and answers into messages."""

    def __init__(self, service: UserService) -> None:
        self._service = service

    async def GetProfiles(
        self, request: user_pb2.GetProfilesRequest, context: Call
    ) -> user_pb2.GetProfilesResponse:
        profiles = await self._service.profiles.batch(read_ids("user_ids", request.user_ids))
        return user_pb2.GetProfilesResponse(profiles=[_profile(profile) for profile in profiles])

    async def CheckContactability(
        self, request: user_pb2.CheckContactabilityRequest, context: Call
    ) -> user_pb2.CheckContactabilityResponse:
        purpose: Purpose = read_choice("purpose", request.purpose, get_args(Purpose))
        relations = self._service.relations
        if request.pairs:
            pairs = [
                (read_id("sender_id", pair.sender_id), read_id("recipient_id", pair.recipient_id))
                for pair in request.pairs
            ]
            results = await relations.contactability_of(pairs, purpose)
        else:
            sender_id = read_id("sender_id", request.sender_id)
            recipient_ids = read_ids("recipient_ids", request.recipient_ids)
            results = await relations.contactability(sender_id, recipient_ids, purpose)
        return user_pb2.CheckContactabilityResponse(
            results=[
                user_pb2.Contactability(
                    user_id=str(item.user_id),
                    exists=item.exists,
                    allowed=item.allowed,
                    reason=item.reason,
                    knows_sender=item.knows_sender,
                )
                for item in results
            ]
        )

    async def GetPresenceVisibility(
        self, request: user_pb2.GetPresenceVisibilityRequest, context: Call
    ) -> user_pb2.GetPresenceVisibilityResponse:
        answers = await self._service.relations.presence_visibility(
            [
                PresenceQuestion(
                    read_id("viewer_id", item.viewer_id), tuple(read_ids("subject_ids", item.subject_ids))
                )
                for item in request.questions
            ]
        )
        return user_pb2.GetPresenceVisibilityResponse(
            answers=[
                user_pb2.PresenceAnswer(
                    subjects=[
                        user_pb2.PresenceVisibility(
                            user_id=str(item.user_id), online=item.online, last_seen=item.last_seen
                        )
                        for item in subjects
                    ]
                )
                for subjects in answers
            ]
        )

    async def GetUserQuotas(
        self, request: user_pb2.GetUserQuotasRequest, context: Call
    ) -> user_pb2.GetUserQuotasResponse:
        quotas = await self._service.storage.quotas(read_id("user_id", request.user_id))
        return user_pb2.GetUserQuotasResponse(quotas=_quotas(quotas))

    async def UpdateStorageUsage(
        self, request: user_pb2.UpdateStorageUsageRequest, context: Call
    ) -> user_pb2.UpdateStorageUsageResponse:
        action: StorageAction = read_choice("action", request.action, get_args(StorageAction))
        usage = await self._service.storage.update(
            StorageRequest(
                operation_id=read_id("operation_id", request.operation_id),
                user_id=read_id("user_id", request.user_id),
                action=action,
                bytes=request.bytes,
                reservation_id=read_id("reservation_id", request.reservation_id)
                if request.reservation_id
                else None,
            )
        )
        return user_pb2.UpdateStorageUsageResponse(
            limit=usage.limit, used=usage.used, reserved=usage.reserved
        )

    async def EraseUser(
        self, request: user_pb2.EraseUserRequest, context: Call
    ) -> user_pb2.EraseUserResponse:
        # Erasing twice is erasing once, so the operation needs no record; a caller without one is still wrong.
        read_id("operation_id", request.operation_id)
        await self._service.erasure.erase(read_id("user_id", request.user_id))
        return user_pb2.EraseUserResponse()

    async def GenerateActivityReport(
        self, request: user_pb2.GenerateActivityReportRequest, context: Call
    ) -> user_pb2.GenerateActivityReportResponse:
        report = await self._service.reports.activity(
            read_time("from", getattr(request, "from")), read_time("until", request.until)
        )
        return user_pb2.GenerateActivityReportResponse(report=msgspec.json.encode(report).decode())

    async def CleanupInactiveUsers(
        self, request: user_pb2.CleanupInactiveUsersRequest, context: Call
    ) -> user_pb2.CleanupInactiveUsersResponse:
        if not request.HasField("inactive_since"):
            # Left out it would read as 1970 by some and as "everybody" by others.
            raise Invalid("inactive_since is needed.", field="inactive_since")
        affected = await self._service.reports.cleanup_inactive(
            read_id("operation_id", request.operation_id),
            read_time("inactive_since", request.inactive_since),
            dry_run=request.dry_run,
            limit=request.limit,
        )
        return user_pb2.CleanupInactiveUsersResponse(affected=affected)


def register(service: UserService) -> Callable[[grpc.aio.Server], None]:
    """What puts the servicer on a server."""

    def add(server: grpc.aio.Server) -> None:
        user_pb2_grpc.add_UserServiceServicer_to_server(UserServicer(service), server)

    return add


def _profile(profile: Profile) -> user_pb2.Profile:
    return user_pb2.Profile(
        user_id=str(profile.user_id),
        username=profile.username,
        display_name=profile.display_name or "",
        avatar_media_id=str(profile.avatar_media_id) if profile.avatar_media_id else "",
        locale=profile.locale,
        time_zone=profile.time_zone,
        read_receipts=profile.privacy.read_receipts,
    )


def _quotas(quotas: Quotas) -> list[user_pb2.Quota]:
    storage = quotas.storage
    return [
        user_pb2.Quota(
            resource="storage_bytes", limit=storage.limit, used=storage.used, reserved=storage.reserved
        ),
        user_pb2.Quota(resource="contacts", limit=quotas.contacts_limit, used=quotas.contacts_used),
        user_pb2.Quota(resource="blocks", limit=quotas.blocks_limit, used=quotas.blocks_used),
    ]
