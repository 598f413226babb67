"""What is stored, and what is answered from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from uuid import UUID

from whispr.kit.errors import Failure
from whispr.services.auth.models.inputs import NewDevice, OneTimeKey, SignedKey
from whispr.services.auth.models.words import (
    DeliveryOutcome,
    LinkStatus,
    Platform,
    PushChannel,
    PushEnvironment,
)


@dataclass(frozen=True, slots=True)
class Account:
    id: UUID
    username: str | None
    password_hash: str | None
    status: str
    device_list_epoch: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Device:
    id: UUID
    account_id: UUID
    name: str
    platform: Platform
    registration_id: int
    identity_key: bytes
    signing_key: bytes
    status: str
    created_at: datetime
    last_seen_day: date
    expired_at: datetime | None
    has_push_token: bool = False

    @property
    def active(self) -> bool:
        return self.status == "active"


@dataclass(frozen=True, slots=True)
class DeviceList:
    """The active devices of an account; `epoch` grows with every change of the list."""

    user_id: UUID
    epoch: int
    devices: tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class SessionRecord:
    id: UUID
    account_id: UUID
    device_id: UUID
    device_name: str
    platform: Platform
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Family:
    """A session as the refresh of its tokens sees it, locked for the transaction that read it."""

    session_id: UUID
    account_id: UUID
    device_id: UUID
    family_key: bytes
    expires_at: datetime
    revoked_at: datetime | None = None
    revoke_reason: str | None = None


@dataclass(frozen=True, slots=True)
class RefreshRecord:
    """A refresh token, by digest. Once used it names its successor, sealed under the token itself."""

    session_id: UUID
    expires_at: datetime
    used_at: datetime | None
    successor_digest: bytes | None
    successor_sealed: bytes | None


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a device holds after register, login or refresh. `expires_in` is in seconds."""

    user_id: UUID
    device_id: UUID
    session_id: UUID
    access_token: str
    expires_in: int
    refresh_token: str


@dataclass(frozen=True, slots=True)
class NewLink:
    """A link just begun. Whoever holds `token` may claim it once within `expires_in` seconds."""

    id: UUID
    token: str
    expires_in: int


@dataclass(frozen=True, slots=True)
class ClaimedLink:
    """What a claim answers: what the new device shows, and how many seconds there are to confirm it."""

    id: UUID
    check_code: str
    expires_in: int


@dataclass(frozen=True, slots=True)
class Link:
    """The linking of a new device. `device` is what it brought, from the claim until it is a device."""

    id: UUID
    account_id: UUID
    by_device_id: UUID
    by_session_id: UUID
    stored_status: LinkStatus
    created_at: datetime
    expires_at: datetime
    device: NewDevice | None
    check_code: str | None
    wrong_confirms: int
    device_id: UUID | None
    session_id: UUID | None

    def status(self, now: datetime) -> LinkStatus:
        is_open = self.stored_status in ("waiting", "claimed", "confirmed")
        return "expired" if is_open and now >= self.expires_at else self.stored_status


@dataclass(frozen=True, slots=True)
class AccountInfo:
    user_id: UUID
    username: str | None
    status: str
    created_at: datetime
    roles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a peer needs to open a session with one device."""

    device_id: UUID
    registration_id: int
    identity_key: bytes
    signing_key: bytes
    signed_prekey: SignedKey
    one_time_prekey: OneTimeKey | None
    pq_prekey: OneTimeKey | None


@dataclass(frozen=True, slots=True)
class PrekeyCounts:
    """What the server holds of one device."""

    one_time_prekeys: int
    pq_one_time_prekeys: int
    signed_prekey_id: int
    pq_last_resort_prekey_id: int | None


@dataclass(frozen=True, slots=True)
class SealedPushToken:
    """A push token as it lies in the database."""

    device_id: UUID
    account_id: UUID
    platform: Platform
    channel: PushChannel
    app_id: str
    environment: PushEnvironment
    data_key_id: str
    nonce: bytes
    ciphertext: bytes
    updated_at: datetime
    epoch: int


@dataclass(frozen=True, slots=True)
class PushToken:
    """A push token in clear, for notification."""

    user_id: UUID
    device_id: UUID
    platform: Platform
    channel: PushChannel
    token: str
    app_id: str
    environment: PushEnvironment
    updated_at: datetime
    epoch: int


@dataclass(frozen=True, slots=True)
class DeliveryReport:
    """What a push service said of a token; `token_updated_at` says of which one."""

    device_id: UUID
    channel: PushChannel
    outcome: DeliveryOutcome
    token_updated_at: datetime


@dataclass(frozen=True, slots=True)
class RootKeys:
    """The keys (32 bytes each) that other keys are sealed under; `primary` seals, all of them open."""

    primary: str
    keys: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Encrypted:
    """A secret at rest under a data key (AES-256-GCM)."""

    data_key_id: str
    nonce: bytes
    ciphertext: bytes


@dataclass(frozen=True, slots=True)
class SecondFactorRecord:
    """A second factor, locked. It is asked for once it is confirmed; `last_step` is that of the newest code accepted."""

    encrypted: Encrypted
    confirmed_at: datetime | None
    last_step: int
    failures: int
    locked_until: datetime | None
    request_digest: bytes | None


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of asking for the second factor: why not, and what the audit trail is to say of what it allowed."""

    refused: Failure | None = None
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SecondFactorState:
    enabled: bool
    recovery_codes_left: int


@dataclass(frozen=True, slots=True)
class NewSecret:
    """A TOTP secret as authenticators take it: base32, and as a URI for a QR code."""

    secret: str
    uri: str


@dataclass(frozen=True, slots=True)
class SealedKey:
    """A data key or private signing key, sealed under the root key `root_key_id`."""

    id: str
    root_key_id: str
    sealed: bytes
    created_at: datetime


@dataclass(frozen=True, slots=True)
class SigningKeyRecord:
    id: str
    public_key: bytes
    root_key_id: str
    sealed: bytes
    created_at: datetime
    active_from: datetime


@dataclass(frozen=True, slots=True)
class AuditEvent:
    number: int
    at: datetime
    event: str
    account_id: UUID | None
    device_id: UUID | None
    details: dict[str, object]
    previous_hash: bytes
    hash: bytes


# What a person is given of their own: everything auth keeps but secrets and what is derived from them.


@dataclass(frozen=True, slots=True)
class ExportedAccount:
    user_id: UUID
    username: str | None
    status: str
    roles: list[str]
    created_at: datetime
    password_changed_at: datetime
    second_factor: bool
    recovery_codes_left: int


@dataclass(frozen=True, slots=True)
class ExportedPushToken:
    channel: PushChannel
    app_id: str
    environment: PushEnvironment
    status: str
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class ExportedDevice:
    """A device, removed ones included; of its prekeys the ids."""

    device_id: UUID
    name: str
    platform: Platform
    registration_id: int
    identity_key: bytes
    signing_key: bytes
    status: str
    created_at: datetime
    removed_at: datetime | None
    expired_at: datetime | None
    last_seen_on: date
    signed_prekey_id: int | None
    pq_last_resort_prekey_id: int | None
    one_time_prekey_ids: list[int]
    pq_one_time_prekey_ids: list[int]
    push_tokens: list[ExportedPushToken] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ExportedSession:
    session_id: UUID
    device_id: UUID
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    ended_at: datetime | None
    end_reason: str | None


@dataclass(frozen=True, slots=True)
class ExportedLink:
    link_id: UUID
    by_device_id: UUID
    status: LinkStatus
    created_at: datetime
    device_id: UUID | None


@dataclass(frozen=True, slots=True)
class ExportedEvent:
    at: datetime
    event: str
    device_id: UUID | None
    details: dict[str, object]


@dataclass(frozen=True, slots=True)
class AccountExport:
    """`events` are the newest ones, oldest first."""

    exported_at: datetime
    account: ExportedAccount
    devices: list[ExportedDevice]
    sessions: list[ExportedSession]
    links: list[ExportedLink]
    events: list[ExportedEvent]
