"""The command line as a person types it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from whispr.cli.benches import scenarios

COMMANDS = ("up", "serve", "migrate", "status", "doctor", "demo", "bench", "test", "admin")


def whispr(*arguments: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "whispr", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
    )


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    outcome = whispr("--help")
    assert outcome.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in outcome.stdout
    script = "import sys; from whispr.cli import commands; print([m for m in sys.modules if m in {names!r}])"
    heavy = {
        "fastapi",
        "grpc",
        "sqlalchemy",
        "asyncpg",
        "psycopg",
        "aiohttp",
        "cryptography",
        "redis",
        "pydantic",
    }
    loaded = subprocess.run(
        [sys.executable, "-c", script.format(names=heavy)], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


# The arguments of `test`, --help included, are pytest's.
@pytest.mark.parametrize("command", [*(name for name in COMMANDS if name != "test"), "check", "contracts"])
def test_each_command_explains_itself(command: str) -> None:
    outcome = whispr(command, "--help")
    assert outcome.returncode == 0
    assert "Usage: whispr" in outcome.stdout


def test_an_unknown_command_and_service_are_refused() -> None:
    assert whispr("fly").returncode == 2
    outcome = whispr("serve", "weather")
    assert outcome.returncode == 2
    assert "auth" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_serving_without_settings_names_the_variable() -> None:
    outcome = whispr("serve", "user")
    assert outcome.returncode == 78
    assert "WHISPR_IDENTITY_DIR" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_without_an_instance_status_and_migrate_say_so(tmp_path: Path) -> None:
    outcome = whispr("status", "--data", str(tmp_path))
    assert (outcome.returncode, "No instance runs" in outcome.stdout) == (3, True)
    outcome = whispr("migrate", "auth", "--data", str(tmp_path))
    assert (outcome.returncode, "No instance runs" in outcome.stderr) == (69, True)


def test_going_back_is_for_one_service(tmp_path: Path) -> None:
    outcome = whispr("migrate", "--down-to", "base", "--data", str(tmp_path))
    assert outcome.returncode == 69
    assert "one service at a time" in outcome.stderr


def test_doctor_finds_everything_here(tmp_path: Path) -> None:
    began = time.monotonic()
    outcome = whispr("doctor", "--data", str(tmp_path / "data"))
    for name in ("Python", "packages", "PostgreSQL", "Valkey", "gateway", "services", "disk"):
        assert name in outcome.stdout
    assert "18." in outcome.stdout
    assert time.monotonic() - began < 60


def test_doctor_says_what_is_missing_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHISPR_POSTGRES_URL", "postgresql://nobody@127.0.0.1:9/none")
    monkeypatch.setenv("WHISPR_VALKEY_URL", "redis://127.0.0.1:9")
    monkeypatch.setenv("WHISPR_GATEWAY", "builtin")
    outcome = whispr("doctor", "--data", str(tmp_path))
    assert outcome.returncode == 1
    assert "Check WHISPR_POSTGRES_URL" in outcome.stdout
    assert "Check WHISPR_VALKEY_URL" in outcome.stdout
    assert "built in, asked for by WHISPR_GATEWAY" in outcome.stdout


def test_benches_are_listed_with_what_they_measure(tmp_path: Path) -> None:
    (tmp_path / "send_fast.py").write_text('"""How fast.\n\nMore."""\n\ndef main(argv):\n    return 0\n')
    (tmp_path / "no_scenario.py").write_text("x = 1\n")
    (tmp_path / "_private.py").write_text("def main(argv):\n    return 0\n")
    assert scenarios(tmp_path) == {"send-fast": "How fast."}
    assert whispr("bench", "no-such-bench").returncode == 69
