"""Which services there are, what each is given, and which public paths lead to it. Both gateways read this table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import whispr

Door = Literal["http", "socket", "own_http"]
SERVICES_FOLDER = Path(whispr.__file__).parent / "services"

MEBIBYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Route:
    """Public paths that begin with `prefix` (at a segment's end), or are it when `exact`.

    `door` is a port that all workers of the service share, or `own_http`, which is the first worker's alone: for what a
    client must find again in the same process.
    `token` says whether the gateway wants a valid access token; sockets and sign-in carry none or another.
    `max_body` in bytes; None leaves it to the service. `timeout` in seconds for the whole answer; None is endless.
    """

    prefix: str
    service: str
    door: Door = "http"
    exact: bool = False
    token: bool = True
    max_body: int | None = MEBIBYTE
    timeout: float | None = 30.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A service: `ports` besides http, grpc and internal; `files` are variables that name a file under secrets/."""

    name: str
    routes: tuple[Route, ...]
    ports: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def doors(self) -> tuple[str, ...]:
        """Every port that public paths lead to."""
        own = ("own_http",) if any(route.door == "own_http" for route in self.routes) else ()
        return ("http", *self.ports, *own)


def _open(prefix: str, service: str, *, exact: bool = True) -> Route:
    return Route(prefix, service, exact=exact, token=False)


# The order of services is the order in which they are started and told of; that of routes is the order of matching.
ENTRIES = (
    Entry(
        "auth",
        (
            _open("/.well-known/jwks.json", "auth"),
            _open("/api/v1/auth/register", "auth"),
            _open("/api/v1/auth/login", "auth"),
            _open("/api/v1/auth/refresh", "auth"),
            Route("/api/v1/auth", "auth"),
            # A device that is being linked has no session yet; what it has is the link's token, which auth checks.
            _open("/api/v1/devices/link/claim", "auth"),
            _open("/api/v1/devices/link/finish", "auth"),
            Route("/api/v1/devices", "auth"),
            Route("/api/v1/keys", "auth"),
        ),
        files={"WHISPR_AUTH_KEYRING_FILE": "auth-keyring.json"},
        variables={"WHISPR_AUTH_KEYRING_CREATE": "true"},
    ),
    Entry("user", (Route("/api/v1/users", "user"),)),
    Entry(
        "messaging",
        (
            # The token of a socket is in its query or subprotocol, where the gateway does not look: messaging checks it.
            Route(
                "/socket/websocket",
                "messaging",
                door="socket",
                exact=True,
                token=False,
                max_body=None,
                timeout=None,
            ),
            # A session of long polling lives in one process.
            Route("/socket/longpoll", "messaging", door="own_http", exact=True, token=False, timeout=90.0),
            Route("/api/v1/conversations", "messaging"),
            Route("/api/v1/messages", "messaging"),
            Route("/api/v1/scheduled-messages", "messaging"),
            Route("/api/v1/restrictions", "messaging"),
            Route("/api/v1/export/messaging", "messaging", exact=True, timeout=600.0),
        ),
        ports=("socket",),
    ),
    Entry("notification", (Route("/api/v1/notifications", "notification"),)),
    Entry(
        "scheduling",
        (
            _open("/api/v1/health", "scheduling"),
            Route("/api/v1/jobs", "scheduling"),
            Route("/api/v1/dead-letters", "scheduling"),
            Route("/api/v1/schedules", "scheduling"),
            Route("/api/v1/monitoring", "scheduling"),
        ),
    ),
    Entry("media", (Route("/api/v1/media", "media", max_body=None, timeout=None),)),
    Entry(
        "moderation",
        (Route("/api/v1/reports", "moderation"), Route("/api/v1/moderation", "moderation")),
    ),
)


def present(folder: Path = SERVICES_FOLDER) -> tuple[Entry, ...]:
    """The services whose code exists."""
    return tuple(entry for entry in ENTRIES if (folder / entry.name / "app.py").is_file())
