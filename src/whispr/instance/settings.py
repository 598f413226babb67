"""Options of `whispr up`, prefix `WHISPR_`; the command line overrides them."""

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

import whispr

DEFAULT_FOLDER = ".whispr"


def home() -> Path:
    """The repository when whispr runs from one, else the present folder: data should not depend on where the command
    was typed."""
    repository = Path(whispr.__file__).resolve().parents[2]
    return repository if (repository / "pyproject.toml").exists() else Path.cwd()


class InstanceSettings(BaseSettings):
    """What one instance needs to know. Times in seconds."""

    model_config = SettingsConfigDict(env_prefix="WHISPR_", extra="ignore")

    environment: Literal["development", "test", "staging", "production"] = "development"
    rate_limits: Literal["on", "off"] = "on"

    data: Path = Field(default_factory=lambda: home() / DEFAULT_FOLDER)
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=1, le=65535)

    messaging_workers: int = Field(default=1, ge=1, le=64)

    postgres_url: str | None = None
    valkey_url: str | None = None
    gateway: Literal["auto", "envoy", "builtin"] = "auto"

    # Part of every certificate's SPIFFE id; the services read the same variables and check them.
    trust_domain: str = "cluster.local"
    namespace: str = "whispr"

    # Coarse, per person, for every request through the gateway: what a busy client never reaches. The services hold
    # the exact limits.
    gateway_requests_per_second: int = Field(default=50, ge=1)
    gateway_burst: int = Field(default=500, ge=1)

    start_seconds: float = Field(default=90, gt=0)
    stop_seconds: float = Field(default=15, gt=0)
    certificate_seconds: float = Field(default=24 * 3600, ge=60)
    log_bytes: int = Field(default=20_000_000, ge=100_000)

    @model_validator(mode="after")
    def _production_is_strict(self) -> Self:
        if self.environment == "production" and self.rate_limits == "off":
            raise ValueError("WHISPR_RATE_LIMITS=off is refused in production")
        return self

    def workers(self, service: str) -> int:
        """How many processes of `service` share its ports."""
        return self.messaging_workers if service == "messaging" else 1

    @model_validator(mode="after")
    def _data_is_absolute(self) -> Self:
        self.data = Path(os.path.abspath(self.data.expanduser()))  # noqa: PTH100 (a link must stay as it was written)
        return self
