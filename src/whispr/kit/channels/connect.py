"""What is decided before a connection is made: version, origin, and who is calling."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal
from urllib.parse import parse_qsl, urlsplit

from whispr.kit.channels import wire
from whispr.kit.channels.core import Limits
from whispr.kit.channels.hub import Hub
from whispr.kit.channels.metrics import stats
from whispr.kit.errors import Failure, Forbidden, Internal, Kind, RateLimited, Unavailable
from whispr.kit.telemetry import get_logger

if TYPE_CHECKING:
    from whispr.kit.identity import Caller

log = get_logger(__name__)

BEARER_PROTOCOL: Final = "base64url.bearer.phx."
PHOENIX_PROTOCOL: Final = "phoenix"

_MAX_PARAMS: Final = 64
_NOT_KEPT: Final = frozenset({"token", "access_token", "vsn"})

NO_PARAMS: Mapping[str, str] = MappingProxyType({})

_STATUS: Final = {
    Kind.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    Kind.RATE_LIMITED: HTTPStatus.TOO_MANY_REQUESTS,
    Kind.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Kind.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}


class UnsupportedVersion(Failure):
    """This version of the channel protocol is not spoken here."""

    kind = Kind.FORBIDDEN
    code = "unsupported_vsn"


class OriginRefused(Failure):
    """Pages of this origin may not connect."""

    kind = Kind.FORBIDDEN
    code = "origin_refused"


class TooManySockets(RateLimited):
    """This person has too many connections open."""

    code = "too_many_sockets"


class Draining(Unavailable):
    """This process is going away. Connect again."""

    code = "draining"


@dataclass(frozen=True, slots=True)
class ConnectRequest:
    """A request for a connection. `params` are the query's, the last value of each; header names are lower case."""

    transport: Literal["websocket", "longpoll"]
    params: Mapping[str, str]
    headers: Mapping[str, str]
    token: str | None

    @property
    def origin(self) -> str | None:
        """The page that connects; programs other than browsers send none."""
        return self.headers.get("origin")

    @property
    def vsn(self) -> str:
        """The version of the wire the client asks for."""
        return self.params.get("vsn", wire.DEFAULT_VSN)

    def kept_params(self) -> Mapping[str, str]:
        """What a socket remembers of its parameters: no credentials."""
        kept = {name: value for name, value in self.params.items() if name not in _NOT_KEPT}
        return kept or NO_PARAMS


Authenticate = Callable[[ConnectRequest], "Caller"]


def parse_query(query: str) -> list[tuple[str, str]]:
    """The pairs of a query string. Raises `Forbidden` when there are absurdly many."""
    try:
        return parse_qsl(query, keep_blank_values=True, max_num_fields=_MAX_PARAMS)
    except ValueError:
        raise Forbidden("too many parameters") from None


def protocol_token(offered: str) -> str | None:
    """The token inside the subprotocols a client offers (`authToken` of phoenix.js)."""
    for item in offered.split(","):
        name = item.strip()
        if name.startswith(BEARER_PROTOCOL):
            encoded = name[len(BEARER_PROTOCOL) :].replace("-", "+").replace("_", "/")
            try:
                return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                return None
    return None


def bearer_token(headers: Mapping[str, str]) -> str | None:
    """The token of an Authorization header."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


class Door:
    """Lets a connection in or refuses it with a `Failure`, before anything is kept for it."""

    def __init__(
        self, authenticate: Authenticate, hub: Hub, limits: Limits, allowed_origins: Sequence[str]
    ) -> None:
        self._authenticate = authenticate
        self._hub = hub
        self._limits = limits
        self._origins = [origin.rstrip("/").lower() for origin in allowed_origins]
        self.draining = False

    def admit(self, request: ConnectRequest) -> tuple[Caller, wire.Serializer]:
        """Who connects and which version they speak. Raises a `Failure`, `Internal` for anything unexpected."""
        if self.draining:
            raise Draining(retry_after=1)
        serializer = wire.serializer_for(request.vsn)
        if serializer is None:
            raise UnsupportedVersion
        self.check_origin(request.headers)
        if len(self._hub) >= self._limits.max_sockets:
            raise Unavailable("This process holds as many connections as it can.", retry_after=5)
        try:
            caller = self._authenticate(request)
        except Failure:
            raise
        except Exception:
            log.exception("authentication_crashed")
            raise Internal from None
        if len(self._hub.sockets_of(caller.user_id)) >= self._limits.max_sockets_per_user:
            raise TooManySockets(retry_after=30)
        return caller, serializer

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Raise `OriginRefused` for a page of another host, unless it is allowed by name.

        Tokens are never taken from cookies, so a foreign page could do nothing with a connection; this keeps it from
        trying with a token it got hold of.
        """
        origin = headers.get("origin")
        if origin is None or "*" in self._origins:
            return
        try:
            own = urlsplit(f"//{headers.get('host', '')}").hostname
            host = urlsplit(origin).hostname
        except ValueError:
            raise OriginRefused from None
        if host is not None and host == own:
            return
        if not any(_allows(pattern, origin.lower(), host or "") for pattern in self._origins):
            raise OriginRefused


def _allows(pattern: str, origin: str, host: str) -> bool:
    if pattern.startswith("//*."):
        return host.endswith(pattern[3:])
    if pattern.startswith("//"):
        return host == pattern[2:]
    return origin == pattern


def refusal(failure: Failure) -> tuple[HTTPStatus, dict[str, str], bytes]:
    """Status, headers and problem+json body that tell a client why it may not connect."""
    status = _STATUS.get(failure.kind, HTTPStatus.FORBIDDEN)
    stats.refusals[int(status)] += 1
    headers = {"Content-Type": "application/problem+json", "Cache-Control": "no-store"}
    if failure.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(failure.retry_after)))
    body = {
        "type": "about:blank",
        "title": status.phrase,
        "status": int(status),
        "detail": failure.detail,
        "code": failure.code,
        **failure.fields,
    }
    return status, headers, wire.encode_payload(body)
