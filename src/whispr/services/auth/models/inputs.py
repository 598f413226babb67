"""What callers hand in."""

from __future__ import annotations

from dataclasses import dataclass

from whispr.services.auth.models.words import Platform, PushChannel, PushEnvironment


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
