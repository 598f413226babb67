"""The rules of auth. `Auth` holds the parts; each rule lives in the part it is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.identity import Revocation
from whispr.services.auth import store
from whispr.services.auth.models import RootKeys
from whispr.services.auth.service.accounts import Accounts
from whispr.services.auth.service.announcements import Announcer, Publisher
from whispr.services.auth.service.audit import AuditTrail
from whispr.services.auth.service.credentials import Credentials
from whispr.services.auth.service.data_keys import DataKeys
from whispr.services.auth.service.devices import Devices
from whispr.services.auth.service.entry import Entry
from whispr.services.auth.service.expiry import Expiry
from whispr.services.auth.service.export import Export
from whispr.services.auth.service.housekeeping import Housekeeping
from whispr.services.auth.service.joining import Joining
from whispr.services.auth.service.limits import Limiter, Limits
from whispr.services.auth.service.links import Links
from whispr.services.auth.service.passwords import Passwords
from whispr.services.auth.service.prekeys import Prekeys
from whispr.services.auth.service.push_tokens import PushTokens
from whispr.services.auth.service.roles import Roles
from whispr.services.auth.service.second_factor import SecondFactor
from whispr.services.auth.service.sessions import Sessions
from whispr.services.auth.service.signing import SigningKeys
from whispr.services.auth.service.vault import Vault
from whispr.services.auth.settings import AuthSettings

__all__ = ["Auth", "Roles", "build_auth"]


class Source:
    """Keys and revocations from the source: auth is its own `IdentitySource`."""

    def __init__(self, db: Database, signing: SigningKeys) -> None:
        self._db = db
        self._signing = signing

    async def jwks(self) -> dict[str, Any]:
        """The key set as at `/.well-known/jwks.json`."""
        return await self._signing.jwks()

    async def revocations(self, since: datetime) -> list[Revocation]:
        """Everything revoked at or after `since`, oldest first."""
        async with self._db.connection() as connection:
            return await store.sessions.revocations(connection, since)


@dataclass(frozen=True, slots=True)
class Auth:
    """Everything auth can do."""

    entry: Entry
    accounts: Accounts
    sessions: Sessions
    devices: Devices
    links: Links
    prekeys: Prekeys
    push_tokens: PushTokens
    data_keys: DataKeys
    second_factor: SecondFactor
    signing: SigningKeys
    source: Source
    expiry: Expiry
    export: Export
    housekeeping: Housekeeping
    limits: Limits
    announcer: Announcer
    audit: AuditTrail
    passwords: Passwords

    def close(self) -> None:
        """End the hashing threads."""
        self.passwords.close()


def build_auth(
    *,
    db: Database,
    clock: Clock,
    publisher: Publisher,
    limiter: Limiter,
    root: RootKeys,
    settings: AuthSettings,
    issuer: str,
    audience: str,
    wake_outbox: Callable[[], None],
    require: Callable[[str], None],
) -> Auth:
    """Put the parts together. `require` raises where the feature it is given the name of is switched off."""
    vault, audit = Vault(root), AuditTrail(clock)
    announcer, limits, passwords = Announcer(publisher), Limits(limiter, settings), Passwords(settings)
    signing = SigningKeys(db, clock, vault, audit, settings, issuer, audience)
    sessions = Sessions(db, clock, signing, announcer, audit, limits, settings)
    credentials = Credentials(db, passwords, audit, limits)
    data_keys = DataKeys(db, clock, vault, audit, settings)
    joining = Joining(clock, sessions, settings)
    second_factor = SecondFactor(db, clock, credentials, data_keys, audit, settings)
    push_tokens = PushTokens(db, clock, data_keys, announcer, audit, settings)
    return Auth(
        entry=Entry(
            db,
            clock,
            credentials,
            second_factor,
            joining,
            sessions,
            announcer,
            audit,
            limits,
            settings,
            ensure_on=lambda: require("registration"),
        ),
        accounts=Accounts(db, clock, credentials, second_factor, sessions, announcer, audit, wake_outbox),
        sessions=sessions,
        devices=Devices(db, clock, announcer, audit),
        links=Links(
            db,
            clock,
            credentials,
            second_factor,
            joining,
            sessions,
            announcer,
            audit,
            limits,
            settings,
            ensure_on=lambda: require("linking"),
        ),
        prekeys=Prekeys(db, clock, announcer, limits, settings),
        push_tokens=push_tokens,
        data_keys=data_keys,
        second_factor=second_factor,
        signing=signing,
        source=Source(db, signing),
        export=Export(db, clock, limits),
        expiry=Expiry(db, clock, announcer, audit, settings),
        housekeeping=Housekeeping(db, clock, vault, data_keys, push_tokens, second_factor, signing, settings),
        limits=limits,
        announcer=announcer,
        audit=audit,
        passwords=passwords,
    )
