"""The names that things go by."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal
from uuid import UUID

Platform = Literal["ios", "android", "web", "desktop"]
PushChannel = Literal["apns", "fcm", "webpush"]
PushEnvironment = Literal["production", "sandbox"]
DeliveryOutcome = Literal["ok", "invalid_token", "inactive"]
OneTimeKind = Literal["ec", "pq"]
LastingKind = Literal["signed", "pq_last_resort"]

LinkStatus = Literal["waiting", "claimed", "confirmed", "finished", "expired", "refused"]

# Where a push token stands among all: device, channel, app.
TokenPlace = tuple[UUID, str, str]

USERNAME = r"^[a-z0-9_.]{3,32}$"

ROLES = ("admin", "moderator")

# Every service that keeps something of a person. An account's deletion waits in the outbox for those that do not run.
ERASING_SERVICES = ("user", "messaging", "notification", "scheduling", "media", "moderation")


# Why the sessions of a device that was away for too long have ended; their refresh says it for a year.
DEVICE_EXPIRED = "device_expired"


def erase_topic(service: str) -> str:
    """The outbox topic that tells `service` of a deleted account."""
    return f"erase_user.{service}"


class Subject(StrEnum):
    """What a revocation is about."""

    SESSION = "session"
    DEVICE = "device"
    USER = "user"
