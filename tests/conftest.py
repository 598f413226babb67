"""A real PostgreSQL and a real Valkey for every test, one database per worker, and the services in this process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# gRPC runs in this process, and its fork handlers would break the servers that other tests start from it. It reads this
# when it is imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"

import psycopg
import pytest

from tests.stack import Stack
from whispr.instance.postgres import EmbeddedPostgres
from whispr.instance.valkey import EmbeddedValkey
from whispr.kit import migrate, pressure, telemetry
from whispr.kit.settings import CommonSettings

_server: EmbeddedPostgres | None = None


def pytest_configure(config: pytest.Config) -> None:
    telemetry.configure("test", CommonSettings(environment="test", log_level="error", mesh=True))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    # One server for all workers, owned by the process that outlives them.
    node.workerinput["postgres_url"] = _start_postgres().url


def pytest_unconfigure(config: pytest.Config) -> None:
    global _server
    if _server is not None:
        _server.stop()
        _server.destroy()
        _server = None


def _start_postgres() -> EmbeddedPostgres:
    global _server
    if _server is None:
        _server = EmbeddedPostgres(Path(tempfile.mkdtemp(prefix="whispr-test-")), durable=False).start()
    return _server


@pytest.fixture(scope="session", autouse=True)
def calm() -> None:
    """All services share the test's loop and two processors: what lags here is no overload of theirs."""
    pressure.TICK_SECONDS = 3_600.0


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> str:
    """Superuser's URL of the test server."""
    workerinput = getattr(request.config, "workerinput", None)
    return workerinput["postgres_url"] if workerinput else _start_postgres().url


@pytest.fixture(scope="session")
def worker(request: pytest.FixtureRequest) -> str:
    workerinput = getattr(request.config, "workerinput", None)
    return workerinput["workerid"] if workerinput else "main"


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """This worker's own Valkey."""
    server = EmbeddedValkey(tmp_path_factory.mktemp("valkey")).start()
    yield server.url
    server.stop()


@pytest.fixture(scope="session")
def new_database(postgres_url: str, worker: str) -> Callable[[str], str]:
    """Make an empty database called `name` of this worker; its URL."""

    def make(name: str) -> str:
        database = f"test_{name}_{worker}"
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')
            connection.execute(f'CREATE DATABASE "{database}"')
        return urlsplit(postgres_url)._replace(path=f"/{database}").geturl()

    return make


@pytest.fixture(scope="session")
def database(new_database: Callable[[str], str]) -> Callable[[str], str]:
    """The migrated database of a service, made once per worker; its URL. Tests keep apart by their own ids."""
    made: dict[str, str] = {}

    def url_of(service: str) -> str:
        if service not in made:
            url = new_database(service)
            migrate.upgrade(service, url)
            made[service] = url
        return made[service]

    return url_of


@pytest.fixture(scope="session")
async def stack(
    database: Callable[[str], str], valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    """auth, user and messaging in this process, over mutual TLS, with a clock that tests move."""
    databases = {service: database(service) for service in Stack.SERVICES}
    running = Stack(valkey_url, databases, tmp_path_factory.mktemp("stack"))
    await running.start()
    yield running
    await running.stop()
