"""Which service may call which gRPC method: the one table that every door, mesh policy and network policy comes from.

A method that is not here may be called by nobody, a service that is not named by a method may not call it. Every person's
request reaches a service over REST or a socket and is checked against the object there; this table is about services only.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from whispr.kit.settings import SERVICES

_EVERY = frozenset(SERVICES)


def _only(*callers: str) -> frozenset[str]:
    return frozenset(callers)


_PLANNERS = _only("media", "messaging", "moderation", "notification", "user")

CALLS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "/auth.AuthService/ValidateToken": _only("media", "messaging", "notification", "scheduling"),
        "/auth.AuthService/GetUserInfo": _only("media", "user"),
        "/auth.AuthService/GetUserDevices": _only("messaging", "notification"),
        # Push tokens in clear: notification sends with them, nobody else ever needs one.
        "/auth.AuthService/GetDeviceTokens": _only("notification"),
        "/auth.AuthService/GetDeviceInfo": _only("notification"),
        "/auth.AuthService/ValidateDevice": _only("messaging", "notification"),
        "/auth.AuthService/ReportDeviceDelivery": _only("notification"),
        "/auth.AuthService/CleanupExpiredSessions": _only("scheduling"),
        "/auth.AuthService/RotateKeys": _only("scheduling"),
        # What everyone needs to check an access token by itself.
        "/auth.AuthService/GetJwks": _EVERY,
        "/auth.AuthService/GetRevocations": _EVERY,
        "/user.UserService/GetProfiles": _only("messaging", "notification"),
        "/user.UserService/CheckContactability": _only("messaging"),
        "/user.UserService/GetPresenceVisibility": _only("messaging"),
        "/user.UserService/GetUserQuotas": _only("media"),
        "/user.UserService/UpdateStorageUsage": _only("media"),
        # Erasure follows the account, and accounts are auth's.
        "/user.UserService/EraseUser": _only("auth"),
        "/user.UserService/GenerateActivityReport": _only("scheduling"),
        "/user.UserService/CleanupInactiveUsers": _only("scheduling"),
        "/messaging.MessagingService/EraseUser": _only("auth"),
        "/messaging.MessagingService/CleanupExpiredMessages": _only("scheduling"),
        "/messaging.MessagingService/AuthorizeMediaAccess": _only("media"),
        "/messaging.MessagingService/GenerateUsageReport": _only("scheduling"),
        "/messaging.MessagingService/SendScheduledMessage": _only("scheduling"),
        "/media.MediaService/LinkMedia": _only("messaging"),
        "/scheduling.SchedulingService/ScheduleJob": _PLANNERS,
        "/scheduling.SchedulingService/CancelJob": _PLANNERS,
        "/scheduling.SchedulingService/GetJob": _PLANNERS,
        "/notification.EventService/PublishEvents": _only("media", "messaging", "moderation", "user"),
        "/kit.MaintenanceService/RunMaintenance": _only("scheduling"),
    }
)
"""Full method name to the services that may call it."""

HEALTH: frozenset[str] = frozenset(
    f"/grpc.health.v1.Health/{method}" for method in ("Check", "List", "Watch")
)
"""Open to every service: it says nothing but whether to send work here."""


REFLECTION: frozenset[str] = frozenset({"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"})
"""Open to every service, and served in development only."""


def known(method: str) -> bool:
    """Whether `method` (`/package.Service/Method`) is served by anyone at all."""
    return method in CALLS or method in HEALTH or method in REFLECTION


def allowed(method: str, caller: str) -> bool:
    """Whether the service `caller` may call `method`. Unknown methods and unknown callers may not."""
    if method in HEALTH or method in REFLECTION:
        return caller in _EVERY
    return caller in CALLS.get(method, ())
