"""Puts the user service together."""

from __future__ import annotations

import whispr
from whispr.kit.http import create_app
from whispr.kit.maintenance import Maintenance
from whispr.kit.process import Context, Service
from whispr.kit.settings import load
from whispr.services.auth.client import AuthClient
from whispr.services.user import api, jobs, rpc
from whispr.services.user.service import UserService
from whispr.services.user.settings import UserSettings


async def build(context: Context) -> Service:
    """The user service; it cannot do without `auth`, where people come from."""
    settings = load(UserSettings)
    database = context.database(settings.database_url)
    auth = AuthClient(context.neighbour("auth"))
    service = UserService(database, auth, context.cache.publish, context.limiter, context.clock, settings)
    maintenance = Maintenance(database, log_retention=service.storage.forget_operations)
    return Service(
        name="user",
        http=create_app(
            title="Whispr user service",
            description="Profiles, contacts, blocks, privacy and quotas.",
            version=whispr.__version__,
            routers=[api.build_router(service)],
            identity=context.identity(auth),
        ),
        rpc=[rpc.register(service), maintenance.register],
        loops=jobs.loops(service),
    )
