"""Everything auth refuses, each with a stable code."""

from __future__ import annotations

from whispr.kit.errors import Conflict, Failure, Kind, NotFound, RateLimited, Unauthenticated, Unavailable


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


class DeviceExpired(Unauthenticated):
    """This device was away for too long and has left the account. Link it anew."""

    code = "device_expired"


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


class WrongCheckCode(Failure):
    """This is not the check code that the new device shows."""

    kind = Kind.FORBIDDEN
    code = "wrong_check_code"


class LinkNotClaimed(Conflict):
    """No device has claimed this link yet."""

    code = "link_not_claimed"


class LinkExpired(Conflict):
    """The link has expired. Begin a new one."""

    code = "link_expired"


class LinkRefused(Conflict):
    """The link was refused or replaced. Begin a new one."""

    code = "link_refused"


class LinkUsed(Conflict):
    """The link was used. Begin a new one for another device."""

    code = "link_used"


class LinkNotFound(NotFound):
    """There is no such link."""

    code = "link_not_found"


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
