"""The words of auth: records, what callers hand in, and failures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import StrEnum
from typing import Literal
from uuid import UUID

from whispr.kit.errors import Conflict, Failure, Kind, NotFound, RateLimited, Unauthenticated, Unavailable

Platform = Literal["ios", "android", "web", "desktop"]
PushChannel = Literal["apns", "fcm", "webpush"]
PushEnvironment = Literal["production", "sandbox"]
DeliveryOutcome = Literal["ok", "invalid_token", "inactive"]
OneTimeKind = Literal["ec", "pq"]
LastingKind = Literal["signed", "pq_last_resort"]

# Where a push token stands among all: device, channel, app.
TokenPlace = tuple[UUID, str, str]

USERNAME = r"^[a-z0-9_.]{3,32}$"

ROLES = ("admin", "moderator")

# Every service that keeps something of a person. An account's deletion waits in the outbox for those that do not run.
ERASING_SERVICES = ("user", "messaging", "notification", "scheduling", "media", "moderation")


def erase_topic(service: str) -> str:
    """The outbox topic that tells `service` of a deleted account."""
    return f"erase_user.{service}"


class Subject(StrEnum):
    """What a revocation is about."""

    SESSION = "session"
    DEVICE = "device"
    USER = "user"


# --- what callers hand in -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SignedKey:
    """A public prekey with the device's Ed25519 signature over its bytes."""

    key_id: int
    public_key: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class OneTimeKey:
    """An X25519 (32 bytes) or, with a signature, an ML-KEM-768 (1184 bytes) public key that serves one session."""

    key_id: int
    public_key: bytes
    signature: bytes | None = None


@dataclass(frozen=True, slots=True)
class NewDevice:
    """What a device says of itself when it joins an account."""

    name: str
    platform: Platform
    registration_id: int
    identity_key: bytes
    signing_key: bytes
    signed_prekey: SignedKey
    one_time_prekeys: tuple[OneTimeKey, ...] = ()
    pq_last_resort_prekey: SignedKey | None = None
    pq_one_time_prekeys: tuple[SignedKey, ...] = ()


@dataclass(frozen=True, slots=True)
class PrekeyUpload:
    """New prekeys of one device. What is None or empty stays as it is."""

    signed_prekey: SignedKey | None = None
    one_time_prekeys: tuple[OneTimeKey, ...] = ()
    pq_last_resort_prekey: SignedKey | None = None
    pq_one_time_prekeys: tuple[SignedKey, ...] = ()


@dataclass(frozen=True, slots=True)
class NewPushToken:
    """A push token in clear. For webpush `token` is the subscription as canonical JSON."""

    channel: PushChannel
    token: str
    app_id: str
    environment: PushEnvironment


@dataclass(frozen=True, slots=True)
class Codes:
    """What proves the second factor: `totp_code` is looked at first. An account without one needs neither."""

    totp_code: str | None = None
    recovery_code: str | None = None


NO_CODES = Codes()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an unauthenticated request comes from; only ever a rate-limit key, never stored."""

    ip: str


# --- records ------------------------------------------------------------------------------------------------------


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
    revoked_at: datetime | None


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


# --- failures -----------------------------------------------------------------------------------------------------


class BadSignature(Failure):
    """A signature does not match the device's signing key."""

    kind = Kind.INVALID
    code = "bad_signature"


class InvalidPrekey(Failure):
    """A post-quantum prekey is no ML-KEM-768 public key."""

    kind = Kind.INVALID
    code = "invalid_prekey"


class InvalidRole(Failure):
    """There is no such role."""

    kind = Kind.INVALID
    code = "invalid_role"


class UsernameTaken(Conflict):
    """This username is taken."""

    code = "username_taken"


class InvalidCredentials(Unauthenticated):
    """Username, password or device is wrong."""

    code = "invalid_credentials"


class WrongPassword(Failure):
    """The current password is wrong."""

    # Not 401: the access token is good, and a client that saw 401 would try to refresh it.
    kind = Kind.FORBIDDEN
    code = "wrong_password"


class TotpRequired(Failure):
    """The account has a second factor: send totp_code or recovery_code."""

    # Not 401, as with WrongPassword.
    kind = Kind.FORBIDDEN
    code = "totp_required"


class TotpRequiredAtLogin(TotpRequired):
    """The account has a second factor: send totp_code or recovery_code."""

    kind = Kind.UNAUTHENTICATED


class BadTotpCode(Failure):
    """The code is wrong or was used before."""

    kind = Kind.FORBIDDEN
    code = "bad_totp_code"


class BadTotpCodeAtLogin(BadTotpCode):
    """The code is wrong or was used before."""

    kind = Kind.UNAUTHENTICATED


class TotpLocked(RateLimited):
    """Too many wrong codes. A recovery code still works."""


class TotpEnabled(Conflict):
    """The account has a second factor already. Remove it first."""

    code = "totp_enabled"


class TotpNotBegun(Conflict):
    """There is no second factor waiting to be confirmed."""

    code = "totp_not_begun"


class InvalidRefreshToken(Unauthenticated):
    """The refresh token is not known."""

    code = "invalid_refresh_token"


class RefreshTokenExpired(Unauthenticated):
    """The refresh token has expired. Log in again."""

    code = "refresh_token_expired"


class RefreshReused(Unauthenticated):
    """This refresh token was used before. Its session is revoked; log in again."""

    code = "refresh_reused"


class TooManyDevices(Conflict):
    """The account has as many devices as it may have. Remove one first."""

    code = "too_many_devices"


class DeviceKeysDiffer(Conflict):
    """The keys of this device have changed. Log in as a new device."""

    code = "device_keys_differ"


class IdempotencyKeyReused(Conflict):
    """This Idempotency-Key was used for another request, or its session has ended."""

    code = "idempotency_key_reused"


class UserNotFound(NotFound):
    """There is no such user."""

    code = "user_not_found"


class DeviceNotFound(NotFound):
    """There is no such device."""

    code = "device_not_found"


class SessionNotFound(NotFound):
    """There is no such session."""

    code = "session_not_found"


class KeyIdConflict(Conflict):
    """A prekey with this id, or these bytes under another id, is stored already."""

    code = "key_id_conflict"


class TooManyPrekeys(Conflict):
    """The device has as many one-time prekeys as the server keeps."""

    code = "too_many_prekeys"


class KeysMismatch(Conflict):
    """The device's keys differ from those the server hands out. Upload them again."""

    code = "keys_mismatch"


class Busy(Unavailable):
    """Too many people are logging in at this moment. Try again."""

    code = "busy"
