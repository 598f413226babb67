"""Reports of messages, and restrictions of who sends too many."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

import msgspec

from whispr.kit.errors import Failure, Kind


class ReportReason(StrEnum):
    """What a message is reported as."""

    SPAM = "spam"
    ABUSE = "abuse"
    VIOLENCE = "violence"
    ILLEGAL = "illegal"
    OTHER = "other"


class Reveal(msgspec.Struct, frozen=True):
    """What the reporter read, and the key that came with it inside the encryption."""

    plaintext: bytes
    franking_key: bytes


class Report(msgspec.Struct, frozen=True):
    """A row of `message_reports`.

    `is_verified`: `plaintext` is what the sender had committed to when they sent the message. Without a reveal there is
    no plaintext, and a report is one person's word.
    """

    id: UUID
    conversation_id: UUID
    message_id: UUID
    reporter_id: UUID
    reported_id: UUID
    reason: ReportReason
    comment: str | None
    plaintext: bytes | None
    is_verified: bool
    created_at: datetime


class Restriction(msgspec.Struct, frozen=True):
    """A row of `sender_restrictions`: until then, the person writes to contacts and answers only.

    `reason`: the volume that was too much, as `service.volume` names it.
    """

    user_id: UUID
    reason: str
    until: datetime
    created_at: datetime


class FrankingMismatch(Failure):
    """This is not what the sender of the message committed to."""

    kind = Kind.INVALID
    code = "franking_mismatch"


class NotFranked(Failure):
    """The message holds no commitment that a plaintext could be verified against."""

    kind = Kind.INVALID
    code = "not_franked"


class OwnMessage(Failure):
    """One does not report oneself."""

    kind = Kind.INVALID
    code = "own_message"


class Restricted(Failure):
    """You have written to too many people. Until `until` you can write to contacts and answer others."""

    kind = Kind.FORBIDDEN
    code = "restricted"


class RestrictionNotFound(Failure):
    """This person is not restricted."""

    kind = Kind.NOT_FOUND
    code = "restriction_not_found"
