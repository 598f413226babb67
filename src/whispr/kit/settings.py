"""Options from the environment, typed and checked before anything starts.

`CommonSettings` (prefix `WHISPR_`) are the same for every service; a service's own options subclass `ServiceSettings`
with the prefix `WHISPR_<SERVICE>_`. A bad value stops the start with the variable's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

SERVICES = ("auth", "user", "messaging", "notification", "scheduling", "media", "moderation")


class SettingsError(Exception):
    """The environment holds a value that Whispr cannot start with. The text names each variable."""


class CommonSettings(BaseSettings):
    """What every service process reads."""

    model_config = SettingsConfigDict(env_prefix="WHISPR_", extra="ignore")

    environment: Literal["development", "test", "staging", "production"] = "development"
    rate_limits: Literal["on", "off"] = "on"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"

    valkey_url: str = "redis://127.0.0.1:6379/0"
    database_pool_size: int = Field(default=10, ge=2, le=200)

    http_bind: str = "127.0.0.1:0"
    grpc_bind: str = "127.0.0.1:0"
    internal_bind: str = "127.0.0.1:0"
    own_http_bind: str | None = Field(
        default=None,
        description="A further HTTP door that no other worker has a part in, for what stays with one process.",
    )
    share_ports: bool = Field(
        default=False, description="Several workers listen on the same ports; the kernel spreads connections."
    )

    identity_dir: Path | None = None
    mesh: bool = False
    trust_domain: str = "cluster.local"
    namespace: str = "whispr"

    token_issuer: str = "whispr"  # noqa: S105
    token_audience: str = "whispr"  # noqa: S105

    live_settings: Path | None = None

    otlp_endpoint: str | None = None
    trace_sample_ratio: float = Field(default=0.0, ge=0, le=1)

    shutdown_seconds: float = Field(default=10, gt=0, le=300)

    auth_address: str | None = None
    user_address: str | None = None
    messaging_address: str | None = None
    notification_address: str | None = None
    scheduling_address: str | None = None
    media_address: str | None = None
    moderation_address: str | None = None

    @field_validator("http_bind", "grpc_bind", "internal_bind", "own_http_bind")
    @classmethod
    def _is_host_and_port(cls, value: str | None) -> str | None:
        if value is not None:
            split_bind(value)
        return value

    @model_validator(mode="after")
    def _production_is_strict(self) -> Self:
        if self.environment == "production" and self.rate_limits == "off":
            raise ValueError("WHISPR_RATE_LIMITS=off is refused in production")
        if self.identity_dir is None and not self.mesh:
            raise ValueError("WHISPR_IDENTITY_DIR is needed unless WHISPR_MESH is set")
        return self

    def address(self, service: str) -> str | None:
        """`host:port` of a neighbour's gRPC door, or None where that service does not run."""
        value = getattr(self, f"{service}_address")
        return value if isinstance(value, str) and value else None


class ServiceSettings(BaseSettings):
    """A service's own options. Subclasses set `env_prefix`."""

    model_config = SettingsConfigDict(extra="ignore")

    database_url: str


S = TypeVar("S", bound=BaseSettings)


def load(settings: type[S]) -> S:
    """Read `settings` from the environment; raises `SettingsError` naming the variables that are wrong."""
    try:
        return settings()
    except ValidationError as error:
        prefix = settings.model_config.get("env_prefix") or ""
        lines = []
        for item in error.errors():
            name = (
                prefix + "_".join(str(part) for part in item["loc"]).upper() if item["loc"] else "environment"
            )
            lines.append(f"{name}: {item['msg']}")
        raise SettingsError("\n".join(lines)) from None


def split_bind(bind: str) -> tuple[str, int]:
    """`host:port` as a pair; port 0 asks for a free one. Raises ValueError."""
    host, separator, port = bind.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{bind!r} is not host:port")
    return host.strip("[]"), int(port)
