"""`whispr up` as a process of its own, with the real services."""

import base64
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import redis
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tests.cli.instances import Up, data_folder, gone, wait_for

from whispr.instance.catalog import present

SERVICES = [entry.name for entry in present()]


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with data_folder() as folder:
        instance = Up(folder).wait_ready()
        try:
            yield instance
        finally:
            instance.stop()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def register(up: Up) -> dict[str, Any]:
    """A new person with a device; their session."""
    signing, identity, prekey = (
        Ed25519PrivateKey.generate(),
        X25519PrivateKey.generate(),
        X25519PrivateKey.generate(),
    )
    public = prekey.public_key().public_bytes_raw()
    device = {
        "name": "laptop",
        "platform": "desktop",
        "registration_id": 7,
        "identity_key": b64(identity.public_key().public_bytes_raw()),
        "signing_key": b64(signing.public_key().public_bytes_raw()),
        "signed_prekey": {"key_id": 1, "public_key": b64(public), "signature": b64(signing.sign(public))},
    }
    name = f"ada{secrets.token_hex(4)}"
    body = {"username": name, "password": "correct horse battery", "device": device}
    status, session = up.ask("/api/v1/auth/register", body)
    assert status == 201, session
    return {**session, "username": name}


def whispr(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "whispr", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def test_it_says_what_runs_and_last_where(up: Up) -> None:
    lines = up.lines
    for name in ("postgres", "valkey", *SERVICES, "gateway"):
        assert any(line.startswith(f"{name} ") for line in lines), lines
    assert lines[-1] == f"whispr is ready on {up.url}"


def test_run_json_names_every_part_and_only_its_owner_reads_it(up: Up) -> None:
    record = up.record
    assert record["public"] == up.url
    assert record["gateway"]["metrics"] == f"{record['internal']}/metrics/gateway"
    assert set(record["services"]) == set(SERVICES)
    for service in record["services"].values():
        assert {"http", "grpc", "internal", "pid"} <= service.keys()
    assert "socket" in record["services"]["messaging"]
    for pid in up.pids().values():
        assert psutil.pid_exists(pid)
    assert (up.folder / "run.json").stat().st_mode & 0o077 == 0
    with psycopg.connect(record["postgres"]["url"]) as connection:
        databases = {row[0] for row in connection.execute("SELECT datname FROM pg_database")}
    assert {f"whispr_{name}" for name in SERVICES} <= databases
    with redis.Redis.from_url(record["valkey"]["url"]) as client:
        assert client.ping()


def test_a_service_enters_only_its_own_database(up: Up) -> None:
    password = (up.folder / "secrets" / "database-user").read_text()
    server = up.record["postgres"]["url"].rpartition("@")[2].partition("/")[0]
    psycopg.connect(f"postgresql://whispr_user:{password}@{server}/whispr_user").close()
    with pytest.raises(psycopg.OperationalError, match="permission denied"):
        psycopg.connect(f"postgresql://whispr_user:{password}@{server}/whispr_auth")


def test_people_reach_the_services_through_the_gateway(up: Up) -> None:
    session = register(up)
    status, me = up.ask("/api/v1/users/me", token=session["access_token"])
    assert (status, me["user_id"]) == (200, session["user_id"])
    assert up.ask("/api/v1/users/me")[0] == 401
    assert up.ask("/api/v1/conversations", token=session["access_token"])[0] == 200
    assert up.ask("/nowhere", token=session["access_token"])[0] == 404


def test_a_second_up_on_the_same_data_is_refused(up: Up) -> None:
    outcome = whispr("up", "--data", str(up.folder), "--port", "1")
    assert outcome.returncode == 69
    assert "already runs" in outcome.stderr
    assert up.url in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert up.is_ready()


def test_a_taken_port_is_told(up: Up, tmp_path: Path) -> None:
    outcome = whispr("up", "--data", str(tmp_path / "other"), "--port", str(up.port))
    assert outcome.returncode == 69
    assert f"Port {up.port} is taken" in outcome.stderr


def test_status_and_doctor_describe_the_instance(up: Up) -> None:
    outcome = whispr("status", "--data", str(up.folder))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    for name in ("postgres", "valkey", *SERVICES, "gateway"):
        assert name in outcome.stdout
    outcome = whispr("doctor", "--data", str(up.folder))
    assert up.url in outcome.stdout


def test_migrate_finds_the_databases_and_changes_nothing(up: Up) -> None:
    outcome = whispr("migrate", "--data", str(up.folder))
    assert outcome.returncode == 0, outcome.stderr
    assert [line.split()[0] for line in outcome.stdout.splitlines()] == SERVICES
    assert outcome.stdout.count("(newest)") == len(SERVICES)


def test_a_role_is_in_force_at_the_next_login(up: Up) -> None:
    session = register(up)
    assert (
        whispr("admin", "grant", session["username"], "moderator", "--data", str(up.folder)).returncode == 0
    )
    assert "moderator" in roles(refresh(up, session))
    assert (
        whispr("admin", "revoke", session["username"], "moderator", "--data", str(up.folder)).returncode == 0
    )
    wrong = whispr("admin", "grant", session["username"], "king", "--data", str(up.folder))
    nobody = whispr("admin", "grant", "no.such.person", "admin", "--data", str(up.folder))
    assert wrong.returncode != 0
    assert nobody.returncode != 0
    assert "Traceback" not in wrong.stderr + nobody.stderr


def refresh(up: Up, session: dict[str, Any]) -> str:
    status, renewed = up.ask("/api/v1/auth/refresh", {"refresh_token": session["refresh_token"]})
    assert status == 200, renewed
    return str(renewed["access_token"])


def roles(token: str) -> str:
    payload = token.split(".")[1]
    return base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)).decode()


@pytest.mark.parametrize("part", ["user", "messaging", "auth", "valkey", "gateway", "postgres"])
def test_a_killed_part_comes_back_by_itself(up: Up, part: str) -> None:
    session = register(up)
    before, restarts = up.pids(), counted_restarts(up)
    os.kill(before[part], signal.SIGKILL)
    wait_for(lambda: up.pids()[part] not in {None, before[part]}, 10)
    wait_for(up.is_ready, 30)
    after = up.pids()
    assert {name for name in before if before[name] != after[name]} == {part}, "the others were left alone"
    assert up.ask("/api/v1/users/me", token=session["access_token"])[0] == 200
    assert counted_restarts(up) == {**restarts, part: restarts[part] + 1}
    assert read(up.record["gateway"]["metrics"])


def counted_restarts(up: Up) -> dict[str, int]:
    """Of every part, as the metrics of `up` have them."""
    text = read(f"{up.record['internal']}/metrics")
    found = re.findall(r'^whispr_part_restarts_total\{part="([^"]+)"\} (\S+)$', text, re.MULTILINE)
    return {part: int(float(count)) for part, count in found}


def test_every_part_is_in_the_metrics_of_up(up: Up) -> None:
    assert set(counted_restarts(up)) == {"postgres", "valkey", "gateway", *SERVICES}


def test_killed_it_recovers_with_all_its_data_and_term_leaves_no_process() -> None:
    with data_folder() as folder:
        first = Up(folder).wait_ready()
        session = register(first)
        pids, socket = first.pids(), Path(first.record["gateway"]["admin"])
        first.process.kill()
        first.process.wait()
        second = Up(folder, port=first.port).wait_ready()
        assert second.ask("/api/v1/users/me", token=session["access_token"])[0] == 200
        assert [name for name, pid in pids.items() if not gone(pid)] == []
        assert not socket.parent.exists(), "nor is anything of it left outside of its folder"
        pids = second.pids()
        assert second.stop(signal.SIGTERM) == 0
        assert [name for name, pid in pids.items() if not gone(pid)] == []
        assert not (folder / "run.json").exists()
        assert whispr("status", "--data", str(folder)).returncode == 3


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def internal(up: Up, path: str) -> str:
    return read(f"{up.record['services']['messaging']['internal']}{path}")


def test_a_feature_is_switched_off_while_everything_runs(up: Up) -> None:
    data = ("--data", str(up.folder))
    outcome = whispr("admin", "flag", "typing", "off", *data)
    assert outcome.returncode == 0, outcome.stderr
    off = 'whispr_feature_on{feature="typing"} 0.0'
    wait_for(lambda: off in internal(up, "/metrics"), 6)
    assert (up.folder / "live.json").stat().st_mode & 0o077 == 0
    assert whispr("admin", "set", "message_rate", "7.5", *data).returncode == 0
    listed = whispr("admin", "flags", *data).stdout
    rows = {line.split()[0]: line.split()[1:] for line in listed.splitlines()}
    assert rows["typing"] == ["messaging", "off"]
    assert rows["presence"] == ["messaging", "on"]
    assert rows["message_rate"] == ["messaging", "7.5"]
    assert rows["message_burst"] == ["messaging", "as", "started"]
    assert whispr("admin", "flag", "typing", "on", *data).returncode == 0
    assert whispr("admin", "set", "messaging.message_rate", "default", *data).returncode == 0
    wait_for(lambda: off not in internal(up, "/metrics"), 6)
    assert json.loads((up.folder / "live.json").read_text()) == {"messaging": {}}


@pytest.mark.parametrize(
    "arguments",
    [
        ("flag", "tipping", "off"),
        ("flag", "typing", "maybe"),
        ("flag", "message_rate", "off"),
        ("set", "typing", "false"),
        ("set", "message_rate", "fast"),
        ("set", "message_rate", "0"),
        ("set", "log_level", "loud"),
        ("set", "auth.message_rate", "1"),
    ],
)
def test_what_may_not_be_changed_is_refused_and_nothing_written(up: Up, arguments: tuple[str, ...]) -> None:
    file = up.folder / "live.json"
    before = file.read_bytes() if file.exists() else None
    outcome = whispr("admin", *arguments, "--data", str(up.folder))
    assert outcome.returncode not in (0, 1)
    assert arguments[1].rpartition(".")[2] in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert (file.read_bytes() if file.exists() else None) == before


def test_a_file_of_live_settings_that_is_not_valid_is_shown_and_serves_on(up: Up) -> None:
    file = up.folder / "live.json"
    file.write_text('{"messaging": {"typing": "off"}}')
    wait_for(lambda: json.loads(internal(up, "/readyz"))["checks"]["live_settings"]["status"] == "failed", 6)
    assert up.is_ready()
    outcome = whispr("admin", "flag", "presence", "off", "--data", str(up.folder))
    assert outcome.returncode != 0
    assert "messaging.typing" in outcome.stderr
    file.unlink()
    wait_for(lambda: json.loads(internal(up, "/readyz"))["checks"]["live_settings"]["status"] == "ok", 6)
