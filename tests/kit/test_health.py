"""Alive and ready are two questions; both are answered in time, over HTTP and over grpc.health.v1."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from whispr.kit import health as health_module
from whispr.kit import telemetry
from whispr.kit.errors import Unavailable
from whispr.kit.health import Check, Health
from whispr.kit.settings import CommonSettings

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Part:
    """Something a service needs, that can be made to fail."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.answer: object = None
        self.hang = False
        self.asked = 0

    async def __call__(self) -> object:
        self.asked += 1
        if self.hang:
            await asyncio.sleep(3600)
        if self.error is not None:
            raise self.error
        return self.answer


def _health(checks: dict[str, Check], **options: Any) -> Health:
    return Health(checks, **{"cache_seconds": 0.0, "timeout": 0.05, **options})


@asynccontextmanager
async def _http(health: Health) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=health.asgi(), raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://internal") as client:
        yield client


@pytest.fixture
def part() -> Part:
    return Part()


async def test_livez_touches_nothing(part: Part) -> None:
    part.hang = True
    async with _http(_health({"database": part})) as http:
        answer = await http.get("/livez")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert part.asked == 0


async def test_readyz_names_each_check(part: Part) -> None:
    other = Part()
    async with _http(_health({"database": part, "cache": other})) as http:
        answer = await http.get("/readyz")
        assert answer.status_code == 200
        assert answer.json()["status"] == "ok"
        assert {name: check["status"] for name, check in answer.json()["checks"].items()} == {
            "database": "ok",
            "cache": "ok",
        }
        other.error = ConnectionRefusedError("redis://:pa55word@10.0.0.1")
        answer = await http.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["status"] == "unavailable"
        assert answer.json()["checks"]["database"]["status"] == "ok"
        assert answer.json()["checks"]["cache"]["error"] == "ConnectionRefusedError"
        assert "pa55word" not in answer.text
        other.error = None
        assert (await http.get("/readyz")).status_code == 200


@pytest.mark.parametrize(
    ("error", "answer", "code"),
    [
        (Unavailable(), None, "unavailable"),
        (RuntimeError("secret"), None, "RuntimeError"),
        (TimeoutError(), None, "timeout"),
        (None, False, "not_ready"),
    ],
)
async def test_every_way_to_fail_is_a_failure(
    part: Part, error: BaseException | None, answer: object, code: str
) -> None:
    part.error, part.answer = error, answer
    report = await _health({"part": part}).report()
    assert not report.ready
    assert report.checks["part"].error == code


@pytest.mark.parametrize("answer", [None, True, 0, "PONG"])
async def test_whatever_else_a_check_returns_it_passed(part: Part, answer: object) -> None:
    part.answer = answer
    assert (await _health({"part": part}).report()).ready


async def test_a_check_that_hangs_fails_alone_and_in_time(part: Part) -> None:
    part.hang = True
    started = asyncio.get_running_loop().time()
    report = await _health({"stuck": part, "fine": Part(), "stuck too": part}).report()
    assert asyncio.get_running_loop().time() - started < 1
    assert {name: result.error for name, result in report.checks.items()} == {
        "stuck": "timeout",
        "fine": None,
        "stuck too": "timeout",
    }


async def test_many_probes_make_one_round(part: Part) -> None:
    health = _health({"part": part}, cache_seconds=60.0)
    async with _http(health) as http:
        answers = await asyncio.gather(*(http.get("/readyz") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert part.asked == 1


async def test_a_round_is_not_believed_for_ever(part: Part) -> None:
    health = _health({"part": part}, cache_seconds=0.01)
    assert (await health.report()).ready
    part.error = OSError()
    await asyncio.sleep(0.02)
    assert not (await health.report()).ready


async def test_draining_is_unready_but_alive(part: Part) -> None:
    health = _health({"part": part}, cache_seconds=60.0)
    async with _http(health) as http:
        assert (await http.get("/readyz")).status_code == 200
        await health.drain()
        assert health.draining
        answer = await http.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["status"] == "draining"
        assert (await http.get("/livez")).status_code == 200


async def test_metrics_are_served(part: Part) -> None:
    part.error = OSError()
    async with _http(_health({"health_test": part})) as http:
        await http.get("/readyz")
        answer = await http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'whispr_ready{check="health_test"} 0.0' in answer.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/readyz/", 404),
        ("POST", "/nothing", 404),
        ("POST", "/livez", 405),
        ("DELETE", "/metrics", 405),
        ("HEAD", "/livez", 200),
        ("HEAD", "/readyz", 200),
    ],
)
async def test_nothing_else_is_here(method: str, path: str, status: int) -> None:
    async with _http(_health({})) as http:
        answer = await http.request(method, path)
    assert answer.status_code == status
    if method == "HEAD":
        assert answer.content == b""
    elif status >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == status
        assert answer.json()["code"] in ("not_found", "method_not_allowed")
    if status == 405:
        assert answer.headers["allow"] == "GET, HEAD"


async def test_lifespan_is_answered() -> None:
    sent: list[Any] = []
    incoming = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        return next(incoming)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await _health({}).asgi()({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


# --- grpc.health.v1 --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _grpc(health: Health) -> AsyncIterator[health_pb2_grpc.HealthStub]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    await health.register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health_pb2_grpc.HealthStub(channel)
    await server.stop(None)


async def _status(stub: health_pb2_grpc.HealthStub, service: str = "") -> int:
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
    return int(answer.status)


NAMES = ("", "readiness", "auth.AuthService")


async def test_grpc_health_follows_the_checks(part: Part) -> None:
    health = _health({"part": part}, grpc_services=["auth.AuthService"])
    async with _grpc(health) as stub:
        for name in NAMES:
            assert await _status(stub, name) == NOT_SERVING, "not before the first round"
        loop = asyncio.create_task(health.run(interval=0.01))
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="auth.AuthService"), timeout=10)
        updates = aiter(watch)
        seen = [(await anext(updates)).status]
        if seen == [NOT_SERVING]:
            seen.append((await anext(updates)).status)
        assert seen[-1] == SERVING
        for name in NAMES:
            assert await _status(stub, name) == SERVING

        part.error = OSError()
        assert (await anext(updates)).status == NOT_SERVING
        assert await _status(stub, "liveness") == SERVING, "a restart would not bring the database back"
        part.error = None
        assert (await anext(updates)).status == SERVING

        await health.drain()
        assert (await anext(updates)).status == NOT_SERVING
        for name in NAMES:
            assert await _status(stub, name) == NOT_SERVING
        await asyncio.sleep(0.05)
        assert await _status(stub) == NOT_SERVING, "the loop must not bring a draining process back"
        assert await _status(stub, "liveness") == SERVING
        watch.cancel()
        loop.cancel()


async def test_grpc_health_knows_no_other_service(part: Part) -> None:
    async with _grpc(_health({"part": part})) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _status(stub, "user.UserService")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_change_is_logged_once(
    part: Part, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet, loud = (
        CommonSettings(environment="test", mesh=True, log_level=level) for level in ("error", "info")
    )
    telemetry.configure("test", loud)
    # The module's own logger keeps the configuration of its first use.
    monkeypatch.setattr(health_module, "log", telemetry.get_logger("health"))
    try:
        health = _health({"log_test": part})
        await health.report()
        part.error = OSError()
        for _ in range(3):
            await health.report()
        part.error = None
        for _ in range(3):
            await health.report()
    finally:
        telemetry.configure("test", quiet)
    events = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert events == ["check failed", "check passed again"]


async def test_a_starting_process_is_unready_and_an_advisory_check_does_not_decide() -> None:
    async def fail() -> bool:
        return False

    health = Health({"cache": fail}, advisory=("cache",), starting=True)
    assert not (await health.report()).ready
    health.started()
    report = await health.report()
    assert report.ready
    assert report.checks["cache"].error == "not_ready"
