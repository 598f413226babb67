"""What `whispr status` says of servers that are not the instance's own."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from whispr.cli import status
from whispr.instance.ports import free_port
from whispr.instance.valkey import EmbeddedValkey


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    server = EmbeddedValkey(tmp_path_factory.mktemp("valkey")).start()
    yield server
    server.stop()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Somebody listens there and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def states(
    postgres: str, valkey: str, *, postgres_pid: int | None = None, valkey_pid: int | None = None
) -> tuple[str, str]:
    """What is said of PostgreSQL and Valkey at these addresses."""
    record: dict[str, Any] = {
        "public": "http://127.0.0.1:9",
        "postgres": {"url": postgres, "pid": postgres_pid},
        "valkey": {"url": valkey, "pid": valkey_pid},
        "services": {},
        "gateway": {"kind": "builtin", "pid": None},
    }
    first, second, _ = status.examine(record)
    assert (first["name"], second["name"]) == ("postgres", "valkey")
    return first["state"], second["state"]


def test_external_servers_that_answer_are_ready(postgres_url: str, valkey: EmbeddedValkey) -> None:
    assert states(postgres_url, valkey.url) == ("ready", "ready")


def test_external_servers_that_are_away_are_not_ready() -> None:
    port = free_port()
    urls = f"postgresql://whispr@127.0.0.1:{port}/whispr", f"redis://127.0.0.1:{port}/0"
    assert states(*urls) == ("not ready", "not ready")


def test_external_servers_that_refuse_the_password_are_not_ready(
    postgres_url: str, valkey: EmbeddedValkey
) -> None:
    nobody = f"postgresql://no_such_role:wrong@{postgres_url.rpartition('@')[2]}"
    assert states(nobody, f"redis://:wrong@127.0.0.1:{valkey.port}/0") == ("not ready", "not ready")


def test_external_servers_that_say_nothing_are_not_waited_for(
    silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "ASK_SECONDS", 1.0)
    began = time.monotonic()
    urls = f"postgresql://whispr@127.0.0.1:{silent_port}/whispr", f"redis://127.0.0.1:{silent_port}/0"
    assert states(*urls) == ("not ready", "not ready")
    assert time.monotonic() - began < 10


def test_embedded_servers_are_asked_too(postgres_url: str, valkey: EmbeddedValkey) -> None:
    alive = os.getpid()
    assert states(postgres_url, valkey.url, postgres_pid=alive, valkey_pid=alive) == ("ready", "ready")
    away = f"redis://127.0.0.1:{free_port()}/0"
    assert states(postgres_url, away, postgres_pid=alive, valkey_pid=alive) == ("ready", "not ready")


def test_a_dead_process_and_one_not_started_yet_are_stopped(
    postgres_url: str, valkey: EmbeddedValkey
) -> None:
    nobody = 2**22 + 1
    assert not Path(f"/proc/{nobody}").exists()
    dead = states(postgres_url, valkey.url, postgres_pid=nobody, valkey_pid=nobody)
    assert dead == ("stopped", "stopped")
    assert states("", "") == ("stopped", "stopped")
