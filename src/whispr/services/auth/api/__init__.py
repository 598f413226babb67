"""The REST door of auth."""

from __future__ import annotations

from fastapi import APIRouter

from whispr.services.auth.api.accounts import account_router
from whispr.services.auth.api.devices import device_router
from whispr.services.auth.api.export import export_router
from whispr.services.auth.api.keys import key_router
from whispr.services.auth.api.links import link_router
from whispr.services.auth.api.second_factor import second_factor_router
from whispr.services.auth.service import Auth

__all__ = ["build_routers"]


def build_routers(auth: Auth, *, loopback_pushes: bool) -> list[APIRouter]:
    """Every route of auth. `loopback_pushes` lets Web Push subscriptions name plain HTTP on this machine."""
    return [
        account_router(auth),
        second_factor_router(auth),
        export_router(auth),
        # Before the devices, whose paths have an id where these have a name.
        link_router(auth),
        device_router(auth, loopback_pushes=loopback_pushes),
        key_router(auth),
    ]
