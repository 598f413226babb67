"""What requests hold, checked for shape; the rules check what it means."""

from __future__ import annotations

import base64
import unicodedata
from typing import Annotated, Any
from uuid import UUID

from pydantic import AfterValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

from whispr.kit.http import Body
from whispr.services.auth.models import (
    USERNAME,
    Codes,
    NewDevice,
    OneTimeKey,
    Platform,
    PrekeyUpload,
    SignedKey,
)


class Base64:
    """Exactly `length` bytes, in JSON as standard, padded base64."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._read,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: base64.b64encode(value).decode(), return_schema=core_schema.str_schema()
            ),
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        chars = 4 * ((self._length + 2) // 3)
        return {"type": "string", "contentEncoding": "base64", "minLength": chars, "maxLength": chars}

    def _read(self, value: Any) -> bytes:
        read = value if isinstance(value, bytes) else _decode(value)
        if len(read) != self._length:
            raise ValueError(f"must be {self._length} bytes")
        return read


def _decode(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError("must be base64 text")  # noqa: TRY004 (pydantic turns ValueError into a field's error)
    try:
        decoded = base64.b64decode(value, validate=True)
    except ValueError:
        raise ValueError("must be standard, padded base64") from None
    # Two texts for the same bytes would make two keys of one.
    if base64.b64encode(decoded).decode() != value:
        raise ValueError("must be standard, padded base64")
    return decoded


def _plain(value: str) -> str:
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise ValueError("must not hold control characters")
    return value


def _trimmed(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be blank")
    return value.strip()


Key32 = Annotated[bytes, Base64(32)]
Signature = Annotated[bytes, Base64(64)]
MlKem768 = Annotated[bytes, Base64(1184)]
Digest = Annotated[bytes, Base64(32)]

KeyId = Annotated[int, Field(ge=0, le=0xFFFFFFFF, strict=True)]
Username = Annotated[str, Field(pattern=USERNAME, description="3 to 32 of a-z, 0-9, _ and .")]
# What is asked at login is compared, not created: a name of any shape is answered like a wrong password.
AnyUsername = Annotated[str, Field(min_length=1, max_length=256)]
NewPassword = Annotated[str, Field(min_length=10, max_length=1024)]
AnyPassword = Annotated[str, Field(min_length=1, max_length=1024)]
DeviceName = Annotated[
    str, Field(min_length=1, max_length=64), AfterValidator(_plain), AfterValidator(_trimmed)
]


TotpCode = Annotated[str, Field(pattern=r"^[0-9]{6}$", description="Of the authenticator (RFC 6238).")]
RecoveryCode = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9 \-]{1,32}$", description="One of the ten; each works once.")
]


class SignedPrekeyForm(Body):
    """An X25519 public key and the device's Ed25519 signature over its 32 bytes."""

    key_id: KeyId
    public_key: Key32
    signature: Signature

    def key(self) -> SignedKey:
        return SignedKey(self.key_id, self.public_key, self.signature)


class OneTimePrekeyForm(Body):
    """An X25519 public key that serves one session."""

    key_id: KeyId
    public_key: Key32

    def key(self) -> OneTimeKey:
        return OneTimeKey(self.key_id, self.public_key)


class PqPrekeyForm(Body):
    """An ML-KEM-768 public key and the device's Ed25519 signature over its 1184 bytes."""

    key_id: KeyId
    public_key: MlKem768
    signature: Signature

    def key(self) -> SignedKey:
        return SignedKey(self.key_id, self.public_key, self.signature)


OneTimePrekeys = Annotated[list[OneTimePrekeyForm], Field(max_length=100)]
PqOneTimePrekeys = Annotated[list[PqPrekeyForm], Field(max_length=100)]


class DeviceForm(Body):
    """A device that joins an account."""

    name: DeviceName
    platform: Platform
    registration_id: Annotated[int, Field(ge=1, le=16380, strict=True)]
    identity_key: Key32 = Field(description="X25519 public key.")
    signing_key: Key32 = Field(description="Ed25519 public key.")
    signed_prekey: SignedPrekeyForm
    one_time_prekeys: OneTimePrekeys | None = None
    pq_last_resort_prekey: PqPrekeyForm | None = None
    pq_one_time_prekeys: PqOneTimePrekeys | None = None

    def device(self) -> NewDevice:
        return NewDevice(
            name=self.name,
            platform=self.platform,
            registration_id=self.registration_id,
            identity_key=self.identity_key,
            signing_key=self.signing_key,
            signed_prekey=self.signed_prekey.key(),
            one_time_prekeys=tuple(form.key() for form in self.one_time_prekeys or ()),
            pq_last_resort_prekey=self.pq_last_resort_prekey.key() if self.pq_last_resort_prekey else None,
            pq_one_time_prekeys=tuple(form.key() for form in self.pq_one_time_prekeys or ()),
        )


class RegisterForm(Body):
    username: Username
    password: NewPassword
    device: DeviceForm


class CodesForm(Body):
    """For accounts with a second factor: one of the two."""

    totp_code: TotpCode | None = None
    recovery_code: RecoveryCode | None = None

    def codes(self) -> Codes:
        return Codes(self.totp_code, self.recovery_code)


class LoginForm(CodesForm):
    """`device` to log in on a new device, `device_id` on a known one."""

    username: AnyUsername
    password: AnyPassword
    device: DeviceForm | None = None
    device_id: UUID | None = None


class RefreshForm(Body):
    """`device_id`, if given, must be the session's device: anything else is answered as reuse."""

    refresh_token: Annotated[str, Field(min_length=1, max_length=512)]
    device_id: UUID | None = None


class PasswordForm(CodesForm):
    current_password: AnyPassword
    new_password: NewPassword


class StepUpForm(CodesForm):
    """Proof that it is the owner who asks, and not whoever holds the device at this moment."""

    password: AnyPassword


class TotpForm(Body):
    password: AnyPassword


class TotpConfirmationForm(Body):
    code: TotpCode


class TotpRemovalForm(Body):
    """`code` may be a recovery code."""

    password: AnyPassword
    code: RecoveryCode


class UploadForm(Body):
    """New prekeys. Lasting keys replace, one-time keys are added; what is left out stays as it is."""

    signed_prekey: SignedPrekeyForm | None = None
    one_time_prekeys: OneTimePrekeys | None = None
    pq_last_resort_prekey: PqPrekeyForm | None = None
    pq_one_time_prekeys: PqOneTimePrekeys | None = None

    def upload(self) -> PrekeyUpload:
        return PrekeyUpload(
            signed_prekey=self.signed_prekey.key() if self.signed_prekey else None,
            one_time_prekeys=tuple(form.key() for form in self.one_time_prekeys or ()),
            pq_last_resort_prekey=self.pq_last_resort_prekey.key() if self.pq_last_resort_prekey else None,
            pq_one_time_prekeys=tuple(form.key() for form in self.pq_one_time_prekeys or ()),
        )


class CheckForm(Body):
    """`digest`: SHA-256 over identity key ‖ be64 signed prekey id ‖ signed prekey ‖ be64 last-resort id ‖ last-resort key.

    Without a last-resort key its id is 0 and its bytes are none.
    """

    digest: Digest
