"""The few kinds of failure, each with a stable code. Raised in the rules, rendered at the door.

REST renders a failure as RFC 9457 problem+json, gRPC as a status with the code in trailing metadata, channels as
`phx_reply error` with `{"reason": code, …}`. A machine reads `code`; people read `detail`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar


class Kind(StrEnum):
    """What went wrong, as far as a caller can act on it."""

    INVALID = "invalid"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    TOO_LARGE = "too_large"
    RATE_LIMITED = "rate_limited"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"


class Failure(Exception):
    """Something a caller is told about. Subclasses set `kind` and `code`; their docstring is the default detail.

    `fields` are extra members of the rendered error (JSON-encodable); `retry_after` is in seconds.
    """

    kind: ClassVar[Kind] = Kind.INTERNAL
    code: str = "internal"

    def __init__(self, detail: str | None = None, *, retry_after: float | None = None, **fields: Any) -> None:
        self.detail = detail if detail is not None else (type(self).__doc__ or "").strip().split("\n", 1)[0]
        self.retry_after = retry_after
        self.fields = fields
        super().__init__(self.detail)

    def reason(self) -> dict[str, Any]:
        """The channel form: `{"reason": code, …fields}`."""
        body: dict[str, Any] = {"reason": self.code, **self.fields}
        if self.retry_after is not None:
            body["retry_after"] = self.retry_after
        return body


class Invalid(Failure):
    """The request is not valid."""

    kind = Kind.INVALID
    code = "invalid_request"


class Unauthenticated(Failure):
    """Authentication is required."""

    kind = Kind.UNAUTHENTICATED
    code = "unauthenticated"


class InvalidToken(Unauthenticated):
    """The access token is not valid."""

    code = "invalid_token"


class TokenExpired(Unauthenticated):
    """The access token has expired."""

    code = "token_expired"


class SessionRevoked(Unauthenticated):
    """The session was revoked."""

    code = "session_revoked"


class Forbidden(Failure):
    """This is not allowed."""

    kind = Kind.FORBIDDEN
    code = "forbidden"


class NotFound(Failure):
    """There is no such thing."""

    kind = Kind.NOT_FOUND
    code = "not_found"


class Conflict(Failure):
    """This conflicts with what is stored."""

    kind = Kind.CONFLICT
    code = "conflict"


class TooLarge(Failure):
    """This is too large."""

    kind = Kind.TOO_LARGE
    code = "too_large"


class RateLimited(Failure):
    """Too many requests."""

    kind = Kind.RATE_LIMITED
    code = "rate_limited"


class Unavailable(Failure):
    """A part this depends on is not available. Try again."""

    kind = Kind.UNAVAILABLE
    code = "unavailable"


class Internal(Failure):
    """Internal error."""


_BY_KIND: dict[Kind, type[Failure]] = {
    Kind.INVALID: Invalid,
    Kind.UNAUTHENTICATED: Unauthenticated,
    Kind.FORBIDDEN: Forbidden,
    Kind.NOT_FOUND: NotFound,
    Kind.CONFLICT: Conflict,
    Kind.TOO_LARGE: TooLarge,
    Kind.RATE_LIMITED: RateLimited,
    Kind.UNAVAILABLE: Unavailable,
    Kind.INTERNAL: Internal,
}


def from_wire(
    kind: Kind, code: str, detail: str, fields: dict[str, Any] | None = None, retry_after: float | None = None
) -> Failure:
    """A failure another service raised, made again here with its kind and code intact."""
    failure = _BY_KIND[kind](detail, retry_after=retry_after)
    failure.code = code
    failure.fields = fields or {}
    return failure
