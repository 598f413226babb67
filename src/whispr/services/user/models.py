"""Records, values and failures of the user service."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from whispr.kit.errors import Conflict, Invalid, NotFound

Audience = Literal["everyone", "contacts", "nobody"]
Senders = Literal["everyone", "contacts"]
State = Literal["active", "dormant", "erased"]
Purpose = Literal["message", "group"]
Reason = Literal["ok", "unknown", "blocked", "contacts_only"]
StorageAction = Literal["reserve", "commit", "release", "free"]
ReservationState = Literal["reserved", "committed", "released", "expired"]

BATCH_LIMIT = 1000


class UserNotFound(NotFound):
    """There is no such person."""

    code = "user_not_found"


class OwnAccount(Invalid):
    """This cannot be done to oneself."""

    code = "own_account"


class InvalidDisplayName(Invalid):
    """A display name is 1 to 64 visible characters on one line."""

    code = "invalid_display_name"


class InvalidLocale(Invalid):
    """A locale is a BCP 47 language tag, such as "en", "pt-BR" or "zh-Hant-TW"."""

    code = "invalid_locale"


class InvalidTimeZone(Invalid):
    """A time zone is a name of the IANA database, such as "Europe/Paris"."""

    code = "invalid_time_zone"


class InvalidUsername(Invalid):
    """A username is 3 to 32 characters of a-z, 0-9, "_" and "."."""

    code = "invalid_username"


class ContactLimitReached(Conflict):
    """The contact list is full."""

    code = "contact_limit_reached"


class BlockLimitReached(Conflict):
    """The block list is full."""

    code = "block_limit_reached"


class ContactBlocked(Conflict):
    """You blocked this person. Unblock them first."""

    code = "contact_blocked"


class BatchTooLarge(Invalid):
    """A batch holds at most 1,000 ids."""

    code = "batch_too_large"


class InvalidBytes(Invalid):
    """The number of bytes does not fit this action."""

    code = "invalid_bytes"


class InvalidPeriod(Invalid):
    """The period ends before it begins."""

    code = "invalid_period"


class QuotaExceeded(Conflict):
    """There is not enough room left in the storage quota."""

    code = "quota_exceeded"


class StorageUnderflow(Conflict):
    """More bytes would be given back than are in use."""

    code = "storage_underflow"


class ReservationNotFound(NotFound):
    """There is no such reservation."""

    code = "reservation_not_found"


class ReservationSettled(Conflict):
    """The reservation has already ended in another way."""

    code = "reservation_settled"


class OperationConflict(Conflict):
    """This operation_id was used for a different request."""

    code = "operation_id_conflict"


@dataclass(frozen=True, slots=True)
class Privacy:
    """What others may see and do. "contacts" means the people whom the owner has added."""

    last_seen: Audience = "contacts"
    online: Audience = "everyone"
    profile: Audience = "everyone"
    read_receipts: bool = True
    messages: Senders = "everyone"
    groups: Senders = "everyone"

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Privacy:
        """Read the stored choices. A name this version does not know is left alone: a newer one may have written it."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in known})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Account:
    """What `auth` says of a person, as far as a profile starts from it."""

    user_id: UUID
    username: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Profile:
    """A living person's profile, as its owner sees it."""

    user_id: UUID
    username: str
    display_name: str | None
    avatar_media_id: UUID | None
    locale: str
    time_zone: str
    privacy: Privacy
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class RelatedProfile:
    """A profile together with how its owner and a viewer stand to each other."""

    profile: Profile
    is_contact: bool
    """The viewer has added the owner."""
    knows_viewer: bool
    """The owner has added the viewer."""
    is_blocked: bool
    """The viewer has blocked the owner."""
    blocks_viewer: bool
    """The owner has blocked the viewer."""

    @property
    def apart(self) -> bool:
        """A block stands between the two, whoever set it."""
        return self.is_blocked or self.blocks_viewer


@dataclass(frozen=True, slots=True)
class PublicProfile:
    """What a viewer is shown of a person. Hidden parts are None, exactly as if they had never been filled in."""

    user_id: UUID
    username: str
    display_name: str | None
    avatar_media_id: UUID | None
    is_contact: bool
    is_blocked: bool


@dataclass(frozen=True, slots=True)
class Position:
    """Where a page of contacts or blocks ended."""

    created_at: datetime
    user_id: UUID


@dataclass(frozen=True, slots=True)
class Relation:
    """One entry of a contact or block list."""

    user: PublicProfile
    created_at: datetime


@dataclass(frozen=True, slots=True)
class RelationPage:
    """A page in the order of adding; `next` is None at the end."""

    items: list[Relation]
    next: Position | None


@dataclass(frozen=True, slots=True)
class Contactability:
    """May a sender write to this person, or add them to a group?"""

    user_id: UUID
    reason: Reason
    knows_sender: bool
    """They have the sender among their contacts."""

    @property
    def exists(self) -> bool:
        return self.reason != "unknown"

    @property
    def allowed(self) -> bool:
        return self.reason == "ok"


@dataclass(frozen=True, slots=True)
class PresenceQuestion:
    """Whose presence may the viewer see: of these people, or of all their contacts where none are named?"""

    viewer_id: UUID
    subject_ids: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class PresenceVisibility:
    """Which parts of a person's presence a viewer may see."""

    user_id: UUID
    online: bool
    last_seen: bool


@dataclass(frozen=True, slots=True)
class StorageUsage:
    """Bytes: the limit, what is stored, and what uploads under way have set aside."""

    limit: int
    used: int
    reserved: int


@dataclass(frozen=True, slots=True)
class Quotas:
    """All limits of a person with their use."""

    storage: StorageUsage
    contacts_limit: int
    contacts_used: int
    blocks_limit: int
    blocks_used: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """Bytes set aside for an upload."""

    reservation_id: UUID
    user_id: UUID
    bytes: int
    state: ReservationState


@dataclass(frozen=True, slots=True)
class StorageRequest:
    """One change of a person's storage use; `operation_id` makes it safe to repeat.

    `reserve` sets `bytes` aside under `reservation_id` (`operation_id` where None); `commit` turns the reservation
    into use (`bytes` of 0: as many as were reserved); `release` gives it up; `free` gives back committed bytes.
    """

    operation_id: UUID
    user_id: UUID
    action: StorageAction
    bytes: int
    reservation_id: UUID | None = None
