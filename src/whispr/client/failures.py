"""What can go wrong for a user of the client library. Everything derives from `ClientError`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ClientError(Exception):
    """Any failure of the client library."""


class ApiError(ClientError):
    """An answer of the server that refuses: RFC 9457 problem or `phx_reply` error.

    `code` is stable and meant for programs; `detail` for people; `fields` holds whatever else the answer said
    (for validation errors the fields, for `devices_mismatch` the lists). `status` is 0 for refusals on a socket.
    `retry_after` is in seconds.
    """

    def __init__(
        self,
        code: str,
        status: int = 0,
        detail: str = "",
        fields: Mapping[str, Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(
            f"{code} ({status}): {detail}" if status else f"{code}: {detail}" if detail else code
        )
        self.code = code
        self.status = status
        self.detail = detail
        self.fields: Mapping[str, Any] = fields or {}
        self.retry_after = retry_after

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed later without being changed."""
        return self.status in {429, 502, 503, 504} or self.code in PASSING_CODES


PASSING_CODES = frozenset(
    {"rate_limited", "unavailable", "database_unavailable", "cache_unavailable", "overloaded", "internal"}
)


class Unreachable(ClientError):
    """The server did not answer: no connection, or no answer within the deadline."""


class SessionEnded(ClientError):
    """The login is no longer valid (revoked, logged out, device removed); a new login is needed.

    `code` is the server's; `device_expired` means that the device was away too long and is to be linked anew.
    """

    def __init__(self, detail: str, code: str = "session_ended") -> None:
        super().__init__(detail)
        self.code = code


class JoinRefused(ApiError):
    """The server refused to join a topic for good."""


class StoreCorrupted(ClientError):
    """The local store is damaged or was tampered with."""


class WrongPassphrase(ClientError):
    """The passphrase does not open the local store."""


class StoreInUse(ClientError):
    """Another process has the local store open."""


class CryptoError(ClientError):
    """A message or key does not pass its cryptographic checks."""


class BadBundle(CryptoError):
    """A prekey bundle is malformed or its signature is wrong."""


class Undecryptable(CryptoError):
    """A message cannot be opened by this device.

    `reason` is one of `no_envelope` (not meant for this device, for example sent before it existed),
    `no_session`, `no_sender_key`, `unknown_prekey`, `duplicate`, `bad_signature`, `malformed`, `failed`,
    `not_post_quantum` (a session without it, where it is required), `unknown_keys`, `bad_commitment` (nobody
    could report the message).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TooManyDevices(ClientError):
    """The conversation has more devices than one message can carry keys for."""
