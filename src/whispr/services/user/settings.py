"""Options of the user service, prefix `WHISPR_USER_`."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from whispr.kit.settings import ServiceSettings

GIBIBYTE = 1024**3


class UserSettings(ServiceSettings):
    """Limits and periods. Bytes and seconds unless the name says otherwise."""

    model_config = SettingsConfigDict(env_prefix="WHISPR_USER_", extra="ignore")

    storage_limit_bytes: int = Field(default=GIBIBYTE, ge=0)
    contacts_limit: int = Field(default=5000, ge=1)
    blocks_limit: int = Field(default=5000, ge=1)

    searches_per_minute: int = Field(default=60, ge=1)
    views_per_minute: int = Field(default=600, ge=1)

    reservation_seconds: int = Field(default=24 * 3600, ge=60)
    operation_retention_days: int = Field(default=30, ge=1)

    report_threshold: int = Field(default=10, ge=2)
