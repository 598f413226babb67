"""Request-rate limits of auth, each in one place."""

from __future__ import annotations

import hashlib
from typing import Protocol
from uuid import UUID

from whispr.services.auth.models import Origin
from whispr.services.auth.settings import AuthSettings


class Limiter(Protocol):
    """What this needs of the rate limiter."""

    async def check(self, name: str, key: str, limit: int, period: float) -> None: ...


class Limits:
    """Each method counts one request and raises `RateLimited` if it is one too many."""

    def __init__(self, limiter: Limiter, settings: AuthSettings) -> None:
        self._limiter = limiter
        self._settings = settings

    async def register(self, origin: Origin) -> None:
        await self._check(
            "auth_register", _hidden(origin.ip), self._settings.register_limit, self._settings.register_period
        )

    async def log_in(self, origin: Origin, username: str) -> None:
        settings = self._settings
        await self._check(
            "auth_login_ip", _hidden(origin.ip), settings.login_ip_limit, settings.login_ip_period
        )
        # Counted for names that do not exist too, or the limit itself would tell which do.
        await self._check(
            "auth_login_username",
            _hidden(username),
            settings.login_username_limit,
            settings.login_username_period,
        )

    async def refresh(self, origin: Origin) -> None:
        await self._check(
            "auth_refresh", _hidden(origin.ip), self._settings.refresh_limit, self._settings.refresh_period
        )

    async def jwks(self, origin: Origin) -> None:
        await self._check(
            "auth_jwks", _hidden(origin.ip), self._settings.jwks_limit, self._settings.jwks_period
        )

    async def password(self, user_id: UUID) -> None:
        await self._check(
            "auth_password", str(user_id), self._settings.password_limit, self._settings.password_period
        )

    async def export(self, user_id: UUID) -> None:
        await self._check(
            "auth_export", str(user_id), self._settings.export_limit, self._settings.export_period
        )

    async def link(self, user_id: UUID) -> None:
        await self._check("auth_link", str(user_id), self._settings.link_limit, self._settings.link_period)

    async def link_from(self, origin: Origin) -> None:
        await self._check(
            "auth_link_ip", _hidden(origin.ip), self._settings.link_ip_limit, self._settings.link_ip_period
        )

    async def claim(self, requester: UUID, target: UUID) -> None:
        await self._check(
            "auth_claim", f"{requester}:{target}", self._settings.claim_limit, self._settings.claim_period
        )

    async def upload(self, device_id: UUID) -> None:
        await self._check(
            "auth_upload", str(device_id), self._settings.upload_limit, self._settings.upload_period
        )

    async def _check(self, name: str, key: str, limit: int, period: float) -> None:
        await self._limiter.check(name, key, limit, period)


def _hidden(value: str) -> str:
    # Keys of limits lie in Valkey for minutes; addresses and names need not lie there in clear.
    return hashlib.sha256(value.encode()).hexdigest()[:32]
