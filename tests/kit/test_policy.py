"""The call table agrees with the compiled contracts, and every cell of it holds."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from hypothesis import given
from hypothesis import strategies as st

import whispr.contracts
from whispr.kit import policy
from whispr.kit.settings import SERVICES


def _methods(file: FileDescriptor) -> set[str]:
    return {
        f"/{service.full_name}/{method.name}"
        for service in file.services_by_name.values()
        for method in service.methods
    }


def _compiled() -> set[str]:
    methods: set[str] = set()
    for module in pkgutil.iter_modules(whispr.contracts.__path__):
        if module.name.endswith("_pb2"):
            methods |= _methods(importlib.import_module(f"whispr.contracts.{module.name}").DESCRIPTOR)
    return methods


def test_table_and_contracts_name_the_same_methods() -> None:
    compiled = _compiled()
    assert compiled, "no compiled contracts were found"
    assert set(policy.CALLS) - compiled == set(), "the table names methods that no contract has"
    assert compiled - set(policy.CALLS) == set(), "contracts have methods that the table forgot"


def test_health_methods_are_the_library_s() -> None:
    assert _methods(health_pb2.DESCRIPTOR) == policy.HEALTH


def test_callers_are_services_that_exist() -> None:
    for method, callers in policy.CALLS.items():
        assert callers, f"{method} may be called by nobody"
        assert callers <= set(SERVICES), method


JOBS = {f"/scheduling.SchedulingService/{method}" for method in ("ScheduleJob", "CancelJob", "GetJob")}
# Written out once more, by caller: a slip of the hand in the table shows here as a cell that should be empty.
MAY_CALL = {
    "auth": {
        "/messaging.MessagingService/EraseUser",
        "/user.UserService/EraseUser",
    },
    "user": {
        "/auth.AuthService/GetUserInfo",
        "/notification.EventService/PublishEvents",
        *JOBS,
    },
    "messaging": {
        "/auth.AuthService/GetUserDevices",
        "/auth.AuthService/ValidateDevice",
        "/auth.AuthService/ValidateToken",
        "/media.MediaService/LinkMedia",
        "/notification.EventService/PublishEvents",
        "/user.UserService/CheckContactability",
        "/user.UserService/GetPresenceVisibility",
        "/user.UserService/GetProfiles",
        *JOBS,
    },
    "notification": {
        "/auth.AuthService/GetDeviceInfo",
        "/auth.AuthService/GetDeviceTokens",
        "/auth.AuthService/GetUserDevices",
        "/auth.AuthService/ReportDeviceDelivery",
        "/auth.AuthService/ValidateDevice",
        "/auth.AuthService/ValidateToken",
        "/user.UserService/GetProfiles",
        *JOBS,
    },
    "scheduling": {
        "/auth.AuthService/CleanupExpiredSessions",
        "/auth.AuthService/RotateKeys",
        "/auth.AuthService/ValidateToken",
        "/kit.MaintenanceService/RunMaintenance",
        "/messaging.MessagingService/CleanupExpiredMessages",
        "/messaging.MessagingService/GenerateUsageReport",
        "/messaging.MessagingService/SendScheduledMessage",
        "/user.UserService/CleanupInactiveUsers",
        "/user.UserService/GenerateActivityReport",
    },
    "media": {
        "/auth.AuthService/GetUserInfo",
        "/auth.AuthService/ValidateToken",
        "/messaging.MessagingService/AuthorizeMediaAccess",
        "/notification.EventService/PublishEvents",
        "/user.UserService/GetUserQuotas",
        "/user.UserService/UpdateStorageUsage",
        *JOBS,
    },
    "moderation": {"/notification.EventService/PublishEvents", *JOBS},
}
OPEN = {"/auth.AuthService/GetJwks", "/auth.AuthService/GetRevocations", *policy.HEALTH}
CELLS = [(method, caller) for method in sorted({*policy.CALLS, *policy.HEALTH}) for caller in SERVICES]


@pytest.mark.parametrize(("method", "caller"), CELLS)
def test_every_cell(method: str, caller: str) -> None:
    assert policy.known(method)
    assert policy.allowed(method, caller) is (method in OPEN or method in MAY_CALL[caller])


@pytest.mark.parametrize("method", sorted({*policy.CALLS, *policy.HEALTH}))
@pytest.mark.parametrize("caller", ["", "unknown", "gateway", "Auth", "auth ", "auth-service", "*"])
def test_unknown_callers_are_refused_everywhere(method: str, caller: str) -> None:
    assert not policy.allowed(method, caller)


@pytest.mark.parametrize("caller", SERVICES)
@pytest.mark.parametrize(
    "method",
    [
        "",
        "/",
        "/auth.AuthService/",
        "/auth.AuthService/Nothing",
        "auth.AuthService/GetJwks",
        "/auth.AuthService/getJwks",
        "/auth.AuthService/GetJwks/",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.health.v1.Health/Other",
    ],
)
def test_unknown_methods_are_refused_to_everyone(method: str, caller: str) -> None:
    assert not policy.known(method)
    assert not policy.allowed(method, caller)


@given(st.text(), st.text())
def test_nothing_made_up_is_allowed(method: str, caller: str) -> None:
    assert policy.allowed(method, caller) is (
        caller in SERVICES and (method in policy.HEALTH or caller in policy.CALLS.get(method, ()))
    )


def test_the_table_cannot_be_changed_at_run_time() -> None:
    with pytest.raises(TypeError):
        policy.CALLS["/auth.AuthService/GetDeviceTokens"] = frozenset({"media"})  # type: ignore[index]
