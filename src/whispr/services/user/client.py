"""How the other services call `user`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import msgspec

from whispr.contracts import user_pb2, user_pb2_grpc
from whispr.kit.grpc import Channel
from whispr.kit.ids import parse_id

BATCH = 1000


@dataclass(frozen=True, slots=True)
class Profile:
    """A person as the services see them; parts never filled in are None."""

    user_id: UUID
    username: str
    display_name: str | None
    avatar_media_id: UUID | None
    locale: str
    time_zone: str
    read_receipts: bool


@dataclass(frozen=True, slots=True)
class Contactability:
    """May the sender write to this person, or add them to a group? `reason` says why not."""

    user_id: UUID
    exists: bool
    allowed: bool
    reason: Literal["ok", "unknown", "blocked", "contacts_only"]
    knows_sender: bool = False
    """They have the sender among their contacts."""


@dataclass(frozen=True, slots=True)
class PresenceVisibility:
    """Which parts of a person's presence the viewer may see."""

    user_id: UUID
    online: bool
    last_seen: bool


@dataclass(frozen=True, slots=True)
class Quota:
    """A limit with its use; `reserved` is what uploads under way have set aside."""

    resource: str
    limit: int
    used: int
    reserved: int


@dataclass(frozen=True, slots=True)
class StorageUsage:
    """Bytes after a change."""

    limit: int
    used: int
    reserved: int


class UserClient:
    """`user.UserService`. Every method raises the failure that `user` raised, or `Unavailable`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._stub = user_pb2_grpc.UserServiceStub(channel.grpc)

    async def get_profiles(self, user_ids: Sequence[UUID]) -> list[Profile]:
        """The profiles of any number of people; unknown ids are left out."""
        profiles: list[Profile] = []
        for batch in _batches(user_ids):
            request = user_pb2.GetProfilesRequest(user_ids=batch)
            answer = await self._channel.call(self._stub.GetProfiles, request, timeout=2.0, idempotent=True)
            profiles.extend(_profile(item) for item in answer.profiles)
        return profiles

    async def check_contactability(
        self, sender_id: UUID, recipient_ids: Sequence[UUID], purpose: Literal["message", "group"]
    ) -> dict[UUID, Contactability]:
        """May `sender_id` write to, or add to a group, each of any number of people?"""
        results: dict[UUID, Contactability] = {}
        for batch in _batches(recipient_ids):
            request = user_pb2.CheckContactabilityRequest(
                sender_id=str(sender_id), recipient_ids=batch, purpose=purpose
            )
            answer = await self._channel.call(
                self._stub.CheckContactability, request, timeout=2.0, idempotent=True
            )
            for item in map(_contactability, answer.results):
                results[item.user_id] = item
        return results

    async def check_pairs(
        self, pairs: Sequence[tuple[UUID, UUID]], purpose: Literal["message", "group"]
    ) -> list[Contactability]:
        """May the sender write to the recipient, or add them to a group, for pairs of the two, in order?"""
        results: list[Contactability] = []
        for start in range(0, len(pairs), BATCH):
            request = user_pb2.CheckContactabilityRequest(
                purpose=purpose,
                pairs=[
                    user_pb2.ContactPair(sender_id=str(sender_id), recipient_id=str(recipient_id))
                    for sender_id, recipient_id in pairs[start : start + BATCH]
                ],
            )
            answer = await self._channel.call(
                self._stub.CheckContactability, request, timeout=2.0, idempotent=True
            )
            results += map(_contactability, answer.results)
        return results

    async def presence_visibility(
        self, questions: Sequence[tuple[UUID, Sequence[UUID]]]
    ) -> list[list[PresenceVisibility]]:
        """What each viewer may see of each subject's presence, for questions `(viewer_id, subject_ids)` in order.

        Without subjects: of each of the viewer's contacts.
        """
        answers: list[list[PresenceVisibility]] = [[] for _ in questions]
        for batch in _question_batches(questions):
            request = user_pb2.GetPresenceVisibilityRequest(
                questions=[
                    user_pb2.PresenceQuestion(viewer_id=str(questions[number][0]), subject_ids=subjects)
                    for number, subjects in batch
                ]
            )
            response = await self._channel.call(
                self._stub.GetPresenceVisibility, request, timeout=2.0, idempotent=True
            )
            for (number, _), answer in zip(batch, response.answers, strict=True):
                answers[number].extend(
                    PresenceVisibility(parse_id(item.user_id), item.online, item.last_seen)
                    for item in answer.subjects
                )
        return answers

    async def get_user_quotas(self, user_id: UUID) -> dict[str, Quota]:
        """The person's quotas by resource: `storage_bytes`, `contacts`, `blocks`."""
        request = user_pb2.GetUserQuotasRequest(user_id=str(user_id))
        answer = await self._channel.call(self._stub.GetUserQuotas, request, timeout=2.0, idempotent=True)
        return {
            item.resource: Quota(item.resource, item.limit, item.used, item.reserved)
            for item in answer.quotas
        }

    async def update_storage_usage(
        self,
        operation_id: UUID,
        user_id: UUID,
        action: Literal["reserve", "commit", "release", "free"],
        size: int = 0,
        reservation_id: UUID | None = None,
    ) -> StorageUsage:
        """Reserve, commit, release or free `size` bytes.

        A reservation is named by `reservation_id`, or by the `operation_id` that made it. `commit` with a size of 0
        commits as many bytes as were reserved.
        """
        request = user_pb2.UpdateStorageUsageRequest(
            operation_id=str(operation_id),
            user_id=str(user_id),
            action=action,
            bytes=size,
            reservation_id=str(reservation_id) if reservation_id else "",
        )
        answer = await self._channel.call(
            self._stub.UpdateStorageUsage, request, timeout=2.0, idempotent=True
        )
        return StorageUsage(answer.limit, answer.used, answer.reserved)

    async def erase_user(self, user_id: UUID, operation_id: UUID) -> None:
        """Erase everything held of a person; may be repeated."""
        request = user_pb2.EraseUserRequest(operation_id=str(operation_id), user_id=str(user_id))
        await self._channel.call(self._stub.EraseUser, request, timeout=5.0, idempotent=True)

    async def generate_activity_report(
        self, operation_id: UUID, start: datetime, end: datetime
    ) -> dict[str, Any]:
        """Aggregates of the whole days (UTC) from `start` to before `end`."""
        request = user_pb2.GenerateActivityReportRequest(operation_id=str(operation_id))
        getattr(request, "from").FromDatetime(start)
        request.until.FromDatetime(end)
        answer = await self._channel.call(
            self._stub.GenerateActivityReport, request, timeout=30.0, idempotent=True
        )
        return msgspec.json.decode(answer.report, type=dict[str, Any])

    async def cleanup_inactive_users(
        self, operation_id: UUID, inactive_since: datetime, *, dry_run: bool, limit: int = 0
    ) -> int:
        """Put people to rest who were not there since; how many were, or would be."""
        request = user_pb2.CleanupInactiveUsersRequest(
            operation_id=str(operation_id), dry_run=dry_run, limit=limit
        )
        request.inactive_since.FromDatetime(inactive_since)
        answer = await self._channel.call(
            self._stub.CleanupInactiveUsers, request, timeout=30.0, idempotent=True
        )
        return int(answer.affected)


def _batches(user_ids: Sequence[UUID]) -> list[list[str]]:
    ids = [str(user_id) for user_id in dict.fromkeys(user_ids)]
    return [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]


def _question_batches(
    questions: Sequence[tuple[UUID, Sequence[UUID]]],
) -> Iterator[list[tuple[int, list[str]]]]:
    """Questions by number, as many at once as a request may hold; one with too many subjects is split."""
    batch: list[tuple[int, list[str]]] = []
    size = 0
    for number, (_, subject_ids) in enumerate(questions):
        for subjects in _batches(subject_ids) or [[]]:
            weight = max(1, len(subjects))
            if size + weight > BATCH:
                yield batch
                batch, size = [], 0
            batch.append((number, subjects))
            size += weight
    if batch:
        yield batch


def _contactability(item: user_pb2.Contactability) -> Contactability:
    return Contactability(
        parse_id(item.user_id), item.exists, item.allowed, _reason(item.reason), item.knows_sender
    )


def _profile(item: user_pb2.Profile) -> Profile:
    return Profile(
        user_id=parse_id(item.user_id),
        username=item.username,
        display_name=item.display_name or None,
        avatar_media_id=parse_id(item.avatar_media_id) if item.avatar_media_id else None,
        locale=item.locale,
        time_zone=item.time_zone,
        read_receipts=item.read_receipts,
    )


def _reason(text: str) -> Literal["ok", "unknown", "blocked", "contacts_only"]:
    match text:
        case "ok" | "blocked" | "contacts_only":
            return text
        case _:
            # A newer neighbour may know more reasons; none of them is a permission.
            return "unknown"
