from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from whispr.kit.http import create_app, new_router
from whispr.kit.mtls import LocalCA, WorkloadIdentity
from whispr.kit.process import EXIT_SETTINGS, Context, Running, Service
from whispr.kit.settings import CommonSettings, SettingsError

SERVED = """
import sys
from whispr.kit.http import create_app, new_router
from whispr.kit.process import Service, run

router = new_router()

@router.get("/hello")
async def hello() -> dict[str, str]:
    return {"hello": "there"}

async def build(context):
    context.database("{database}")
    return Service("auth", http=create_app(title="t", description="", version="1", routers=[router], identity=None))

sys.exit(run("auth", build))
"""


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    LocalCA(tmp_path / "ca").issue("auth", tmp_path / "auth")
    return tmp_path / "auth"


def common(identity: Path, valkey_url: str, **changes: Any) -> CommonSettings:
    return CommonSettings(
        environment="test", identity_dir=identity, valkey_url=valkey_url, shutdown_seconds=1, **changes
    )


async def test_a_service_opens_its_doors_and_closes_them_in_order(
    identity: Path, valkey_url: str, new_database: Callable[[str], str]
) -> None:
    steps: list[str] = []
    looping = asyncio.Event()

    def step(name: str) -> Callable[[], Any]:
        async def take() -> None:
            steps.append(name)

        return take

    async def loop() -> None:
        looping.set()
        await asyncio.Event().wait()

    async def build(context: Context) -> Service:
        context.database(new_database("kit_process"))
        return Service(
            "auth",
            http=create_app(title="", description="", version="1", routers=[new_router()], identity=None),
            loops={"loop": loop},
            on_start=[step("start")],
            on_drain=[step("drain")],
            on_stop=[step("stop 1"), step("stop 2")],
        )

    running = await Running.start(build, Context("auth", common(identity, valkey_url)))
    await asyncio.wait_for(looping.wait(), 5)
    async with httpx.AsyncClient() as client:
        ready = await client.get(f"http://127.0.0.1:{running.internal_port}/readyz")
        assert ready.status_code == 200
        assert set(ready.json()["checks"]) == {"cache", "certificate", "database"}
        assert (await client.get(f"http://127.0.0.1:{running.http_port}/nothing")).status_code == 404
        await running.stop()
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{running.http_port}/nothing")
    assert steps == ["start", "drain", "stop 2", "stop 1"]


async def test_health_is_served_over_grpc(identity: Path, valkey_url: str) -> None:
    async def build(context: Context) -> Service:
        return Service("auth")

    running = await Running.start(build, Context("auth", common(identity, valkey_url)))
    channel = grpc.aio.secure_channel(
        f"127.0.0.1:{running.grpc_port}",
        WorkloadIdentity(identity).channel_credentials(),
        options=[("grpc.ssl_target_name_override", "auth-service")],
    )
    stub = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(5):
        while True:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=2)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                break
            await asyncio.sleep(0.01)
    await channel.close(None)
    await running.stop()


async def test_a_start_that_fails_leaves_nothing_open(identity: Path, valkey_url: str) -> None:
    stopped: list[str] = []

    async def fail() -> None:
        raise RuntimeError("cannot start")

    async def stop() -> None:
        stopped.append("stopped")

    async def build(context: Context) -> Service:
        return Service("auth", on_start=[fail], on_stop=[stop])

    with pytest.raises(RuntimeError, match="cannot start"):
        await Running.start(build, Context("auth", common(identity, valkey_url)))
    assert stopped == ["stopped"]


async def test_a_needed_neighbour_that_is_not_configured_is_named(identity: Path, valkey_url: str) -> None:
    context = Context("user", common(identity, valkey_url))
    assert context.channel("media") is None
    with pytest.raises(SettingsError, match="WHISPR_AUTH_ADDRESS"):
        context.neighbour("auth")
    await context.close()


def environment(identity: Path, valkey_url: str, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "WHISPR_IDENTITY_DIR": str(identity),
        "WHISPR_VALKEY_URL": valkey_url,
        "WHISPR_ENVIRONMENT": "test",
        **more,
    }


def test_a_process_announces_its_ports_and_ends_cleanly_on_sigterm(
    identity: Path, valkey_url: str, new_database: Callable[[str], str], tmp_path: Path
) -> None:
    script, ports = tmp_path / "served.py", tmp_path / "ports.json"
    script.write_text(SERVED.replace("{database}", new_database("kit_process_run")))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment(identity, valkey_url, WHISPR_PORTS_FILE=str(ports)),
        stdout=subprocess.PIPE,
    )
    try:
        with process:
            assert process.stdout is not None
            first = json.loads(process.stdout.readline())
            assert first["event"] == "service_started"
            announced = first["ports"]
            while not ports.exists():
                assert process.poll() is None
            assert json.loads(ports.read_text()) == announced
            answer = httpx.get(f"http://127.0.0.1:{announced['http']}/hello")
            assert answer.json() == {"hello": "there"}
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
    finally:
        process.kill()


def test_a_bad_setting_stops_the_process_with_its_name(
    identity: Path, valkey_url: str, tmp_path: Path
) -> None:
    script = tmp_path / "served.py"
    script.write_text(SERVED.replace("{database}", "postgresql://unused"))
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment(identity, valkey_url, WHISPR_LOG_LEVEL="loud"),
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == EXIT_SETTINGS
    assert "WHISPR_LOG_LEVEL" in done.stderr
