"""Puts auth together."""

from __future__ import annotations

import whispr
from whispr.kit.clock import SystemClock
from whispr.kit.db import Database
from whispr.kit.http import create_app
from whispr.kit.maintenance import Maintenance
from whispr.kit.outbox import Dispatcher
from whispr.kit.process import Context, Service
from whispr.kit.settings import SettingsError, load
from whispr.services.auth import api, jobs, rpc
from whispr.services.auth.adapters import root_key_source
from whispr.services.auth.service import Auth, Roles, build_auth
from whispr.services.auth.settings import AuthLive, AuthSettings
from whispr.services.messaging.client import MessagingClient
from whispr.services.user.client import UserClient


async def build(context: Context) -> Service:
    """auth; it needs no neighbour, and tells those that run of deleted accounts."""
    settings = load(AuthSettings)
    context.live.declare(AuthLive)
    database = context.database(settings.database_url)
    dispatcher = Dispatcher(database, context.clock, jobs.erasers(_erase_targets(context)))
    auth = build_auth(
        db=database,
        clock=context.clock,
        publisher=context.cache,
        limiter=context.limiter,
        root=root_key_source(settings, context.common.environment).load(),
        settings=settings,
        issuer=context.common.token_issuer,
        audience=context.common.token_audience,
        wake_outbox=dispatcher.wake,
        require=context.live.require,
    )
    identity = context.identity(auth.source)
    auth.announcer.on_revocation(identity.learn)
    maintenance = Maintenance(database, log_retention=lambda: _clean(auth))
    return Service(
        name="auth",
        http=create_app(
            title="Whispr auth service",
            description="Accounts, sessions, devices, push tokens and prekeys.",
            version=whispr.__version__,
            routers=api.build_routers(auth, loopback_pushes=context.common.environment != "production"),
            identity=identity,
        ),
        rpc=[rpc.register(auth, identity), maintenance.register],
        loops={"outbox": dispatcher.run, **jobs.loops(auth, settings)},
        on_start=[lambda: _check_keys(auth)],
        on_stop=[lambda: _close(auth)],
    )


async def grant_role(database_url: str, username: str, role: str) -> bool:
    """`whispr admin grant`: give a role; False if the account has it already. Raises `UserNotFound`, `InvalidRole`."""
    return await _change_role(database_url, username, role, granted=True)


async def revoke_role(database_url: str, username: str, role: str) -> bool:
    """`whispr admin revoke`: take a role away; False if the account has it not. Raises `UserNotFound`, `InvalidRole`."""
    return await _change_role(database_url, username, role, granted=False)


async def _change_role(database_url: str, username: str, role: str, *, granted: bool) -> bool:
    database = Database(database_url, pool_size=2, application_name="whispr-admin")
    await database.open()
    try:
        roles = Roles(database, SystemClock())
        return await (roles.grant if granted else roles.revoke)(username, role)
    finally:
        await database.close()


def _erase_targets(context: Context) -> dict[str, jobs.EraseTarget]:
    """Those of the services that keep something of a person and run here; the others' rows wait for them."""
    targets: dict[str, jobs.EraseTarget] = {}
    if (user := context.channel("user")) is not None:
        targets["user"] = UserClient(user)
    if (messaging := context.channel("messaging")) is not None:
        targets["messaging"] = MessagingClient(messaging)
    return targets


async def _check_keys(auth: Auth) -> None:
    missing = await auth.housekeeping.missing_roots()
    if missing:
        raise SettingsError(
            f"WHISPR_AUTH_KEYRING: the database is sealed under root keys the ring lacks: {', '.join(missing)}. "
            "Start with the ring that belongs to this database"
        )
    await auth.signing.load()


async def _clean(auth: Auth) -> int:
    cleaned = await auth.housekeeping.clean()
    return cleaned.sessions + cleaned.revocations


async def _close(auth: Auth) -> None:
    auth.close()
