"""Options of auth, `WHISPR_AUTH_…`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from whispr.kit.live import LiveSettings
from whispr.kit.settings import ServiceSettings

DAY = 86400.0


class AuthLive(LiveSettings):
    """What may change while auth runs."""

    registration: bool = True
    linking: bool = True


class AuthSettings(ServiceSettings):
    """Times are in seconds unless the name says otherwise; a pair `…_limit`, `…_period` allows limit calls a period."""

    model_config = SettingsConfigDict(env_prefix="WHISPR_AUTH_", extra="ignore")

    # Root keys: the ring's JSON itself, or a file of mode 0600. None creates the file only outside production.
    keyring: SecretStr | None = None
    keyring_file: Path | None = None
    keyring_create: bool | None = None

    # The second choice of RFC 9106 section 4. Four lanes take 91 ms on the machine this was measured on.
    argon2_time_cost: int = Field(default=3, ge=1, le=20)
    argon2_memory_kib: int = Field(default=65536, ge=8, le=4194304)
    argon2_parallelism: int = Field(default=4, ge=1, le=16)
    # Each running hash holds argon2_memory_kib; whoever would wait behind more than hashing_queue others is sent away.
    hashing_threads: int = Field(default=2, ge=1, le=64)
    hashing_queue: int = Field(default=64, ge=1, le=10000)

    access_token_seconds: int = Field(default=600, ge=30, le=3600)
    refresh_token_seconds: float = Field(default=90 * DAY, ge=60)
    refresh_grace_seconds: float = Field(default=10, ge=0, le=60)
    idempotency_seconds: float = Field(default=DAY, ge=60)

    max_devices: int = Field(default=10, ge=1, le=100)
    # A device that was not seen for as long leaves the account; 0: none does.
    device_expiry_days: int = Field(default=90, ge=0, le=3650)
    max_sessions_per_device: int = Field(default=20, ge=1, le=1000)
    max_one_time_prekeys: int = Field(default=1000, ge=100, le=100000)
    low_prekeys: int = Field(default=10, ge=1, le=100)

    # To claim a link, and to fetch the session once it is confirmed; and to compare codes and confirm.
    link_seconds: int = Field(default=60, ge=10, le=600)
    link_confirm_seconds: int = Field(default=120, ge=10, le=600)

    # What authenticator apps show beside the username.
    totp_issuer: str = Field(default="Whispr", min_length=1, max_length=64, pattern=r"^[A-Za-z0-9 ._\-]+$")

    signing_key_days: float = Field(default=30, gt=0)
    # A new key is published this long before it signs: longer than any verifier keeps a key set.
    signing_key_notice_seconds: float = Field(default=3600, ge=0)
    data_key_days: float = Field(default=90, gt=0)
    reencrypt_batch: int = Field(default=200, ge=1, le=10000)
    keys_check_seconds: float = Field(default=60, gt=0)
    cleanup_seconds: float = Field(default=600, gt=0)

    register_limit: int = Field(default=60, ge=1)
    register_period: float = Field(default=3600, gt=0)
    login_ip_limit: int = Field(default=60, ge=1)
    login_ip_period: float = Field(default=60, gt=0)
    login_username_limit: int = Field(default=10, ge=1)
    login_username_period: float = Field(default=60, gt=0)
    refresh_limit: int = Field(default=120, ge=1)
    refresh_period: float = Field(default=60, gt=0)
    jwks_limit: int = Field(default=300, ge=1)
    jwks_period: float = Field(default=60, gt=0)
    password_limit: int = Field(default=10, ge=1)
    password_period: float = Field(default=300, gt=0)
    export_limit: int = Field(default=10, ge=1)
    export_period: float = Field(default=3600, gt=0)
    link_limit: int = Field(default=10, ge=1)
    link_period: float = Field(default=600, gt=0)
    # A new device asks every second or two until it is confirmed.
    link_ip_limit: int = Field(default=120, ge=1)
    link_ip_period: float = Field(default=60, gt=0)
    claim_limit: int = Field(default=30, ge=1)
    claim_period: float = Field(default=600, gt=0)
    upload_limit: int = Field(default=60, ge=1)
    upload_period: float = Field(default=600, gt=0)
