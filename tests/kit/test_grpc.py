from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from whispr.contracts import kit_pb2, kit_pb2_grpc
from whispr.instance.ports import free_port
from whispr.kit.errors import Conflict, Internal, Kind
from whispr.kit.grpc import Channel, NeighbourUnavailable, caller_service, create_server, listen
from whispr.kit.mtls import LocalCA, WorkloadIdentity
from whispr.kit.settings import CommonSettings

METHOD = "/kit.MaintenanceService/RunMaintenance"

Answer = Callable[[Any], Awaitable[kit_pb2.RunMaintenanceResponse]]


class NameTaken(Conflict):
    """The name is taken."""

    code = "name_taken"


class Servicer(kit_pb2_grpc.MaintenanceServiceServicer):
    """Answers as the test says, and counts."""

    def __init__(self) -> None:
        self.calls = 0
        self.answer: Answer = self.echo

    async def echo(self, request: Any) -> kit_pb2.RunMaintenanceResponse:
        return kit_pb2.RunMaintenanceResponse(task=f"{request.task} for {caller_service()}")

    async def RunMaintenance(self, request: Any, context: Any) -> kit_pb2.RunMaintenanceResponse:  # noqa: N802
        self.calls += 1
        return await self.answer(request)


class Pair:
    """A server called auth and whoever calls it."""

    def __init__(self, directory: Path) -> None:
        self.ca = LocalCA(directory / "ca")
        self.directory = directory
        self.servicer = Servicer()
        self.port = free_port()
        self._server: grpc.aio.Server | None = None
        self._channels: list[Channel] = []

    def identity(self, service: str) -> WorkloadIdentity:
        self.ca.issue(service, self.directory / service)
        return WorkloadIdentity(self.directory / service)

    async def start(self) -> None:
        common = CommonSettings(environment="test", identity_dir=self.directory / "auth")
        identity = self.identity("auth")
        self._server = create_server(common, identity)
        kit_pb2_grpc.add_MaintenanceServiceServicer_to_server(self.servicer, self._server)
        assert listen(self._server, f"127.0.0.1:{self.port}", identity) == self.port
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)

    def channel(self, service: str) -> Channel:
        channel = Channel(f"127.0.0.1:{self.port}", "auth", self.identity(service))
        self._channels.append(channel)
        return channel

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()
        await self.stop()


async def call(channel: Channel, task: str = "analyze", **options: Any) -> str:
    stub = kit_pb2_grpc.MaintenanceServiceStub(channel.grpc)
    request = kit_pb2.RunMaintenanceRequest(task=task)
    response = await channel.call(stub.RunMaintenance, request, **{"timeout": 5.0, **options})
    return str(response.task)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    made = Pair(tmp_path)
    await made.start()
    yield made
    await made.close()


@asynccontextmanager
async def raw_channel(pair: Pair, service: str) -> AsyncIterator[grpc.aio.Channel]:
    channel = grpc.aio.secure_channel(
        f"127.0.0.1:{pair.port}",
        pair.identity(service).channel_credentials(),
        options=[("grpc.ssl_target_name_override", "auth-service")],
    )
    try:
        yield channel
    finally:
        await channel.close(None)


async def test_a_permitted_caller_is_served_and_known(pair: Pair) -> None:
    assert await call(pair.channel("scheduling")) == "analyze for scheduling"


async def test_a_service_the_policy_does_not_name_is_refused(pair: Pair) -> None:
    with pytest.raises(Internal):
        await call(pair.channel("media"))
    assert pair.servicer.calls == 0
    async with raw_channel(pair, "media") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(METHOD, None, None)(b"", timeout=5)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_method_nobody_knows_is_refused_like_a_forbidden_one(pair: Pair) -> None:
    async with raw_channel(pair, "scheduling") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary("/kit.MaintenanceService/DropEverything", None, None)(b"", timeout=5)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_failure_crosses_with_kind_code_fields_and_wait(pair: Pair) -> None:
    async def refuse(request: Any) -> kit_pb2.RunMaintenanceResponse:
        raise NameTaken("Ada was faster.", retry_after=7, name="ada")

    pair.servicer.answer = refuse
    with pytest.raises(Conflict) as refused:
        await call(pair.channel("scheduling"), idempotent=True)
    failure = refused.value
    assert (failure.kind, failure.code, failure.detail) == (Kind.CONFLICT, "name_taken", "Ada was faster.")
    assert (failure.fields, failure.retry_after) == ({"name": "ada"}, 7)
    assert pair.servicer.calls == 1


async def test_the_text_of_a_defect_does_not_cross(pair: Pair) -> None:
    async def crash(request: Any) -> kit_pb2.RunMaintenanceResponse:
        raise RuntimeError("secret")

    pair.servicer.answer = crash
    async with raw_channel(pair, "scheduling") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as crashed:
            await channel.unary_unary(METHOD, None, None)(b"", timeout=5)
    assert crashed.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in f"{crashed.value.details()}{crashed.value.debug_error_string()}"


async def test_a_neighbour_that_does_not_answer_in_time_is_unavailable(pair: Pair) -> None:
    async def hang(request: Any) -> kit_pb2.RunMaintenanceResponse:
        await asyncio.Event().wait()
        raise AssertionError

    pair.servicer.answer = hang
    with pytest.raises(NeighbourUnavailable):
        await call(pair.channel("scheduling"), timeout=0.2, idempotent=True)


async def test_an_idempotent_call_outlives_a_restart_and_others_fail_at_once(pair: Pair) -> None:
    channel = pair.channel("scheduling")
    await call(channel)
    await pair.stop()
    with pytest.raises(NeighbourUnavailable):
        await call(channel, idempotent=False)
    patient = asyncio.create_task(call(channel, idempotent=True))
    await asyncio.sleep(0.05)
    await pair.start()
    assert await patient == "analyze for scheduling"


async def test_the_circuit_opens_and_closes_again(pair: Pair) -> None:
    channel = pair.channel("scheduling")
    await pair.stop()
    for _ in range(Channel.TRIP_AFTER):
        with pytest.raises(NeighbourUnavailable):
            await call(channel, timeout=0.5)
    await pair.start()
    with pytest.raises(NeighbourUnavailable):
        await call(channel)
    assert pair.servicer.calls == 0
    channel._open_until = 0
    assert await call(channel, idempotent=True) == "analyze for scheduling"


async def test_a_rotated_certificate_is_used_without_a_restart(pair: Pair) -> None:
    channel = pair.channel("scheduling")
    await call(channel)
    first = channel.current()
    pair.ca.issue("scheduling", pair.directory / "scheduling")
    identity = channel._identity
    assert identity is not None
    identity.refresh()
    assert await call(channel) == "analyze for scheduling"
    assert channel.current() is not first
