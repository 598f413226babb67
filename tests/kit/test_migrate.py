"""A migration gives way to a live system, and processes that migrate at once apply each revision once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.exc import OperationalError

from whispr.kit import migrate

REVISION = """
from alembic import op

revision = {name!r}
down_revision = {before!r}


def upgrade() -> None:
    op.execute({statements!r})


def downgrade() -> None:
    op.execute("SELECT 1")
"""
# Longer than it may take until a migration that waits for a lock has given up, on a busy machine.
PATIENCE = 20


def write_history(package: Path, *revisions: str) -> None:
    """The history of a service `notes` in `package`: each revision's statements, numbered from 0001."""
    folder = package / "services" / "notes" / "migrations"
    folder.mkdir(parents=True)
    before = None
    for number, statements in enumerate(revisions, 1):
        name = f"{number:04}"
        text = REVISION.format(name=name, before=before, statements=statements)
        (folder / f"{name}_step.py").write_text(text)
        before = name


def wait_until_it_waits(connection: psycopg.Connection) -> None:
    """Until somebody in this database waits for a lock on a table."""
    waiting = """SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'relation'
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
    deadline = time.monotonic() + PATIENCE
    while connection.execute(waiting).fetchone() == (0,):
        assert time.monotonic() < deadline, "the migration met no lock"
        time.sleep(0.02)


def tables(connection: psycopg.Connection) -> set[str]:
    rows = connection.execute(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
    )
    return {row[0] for row in rows}


def test_a_migration_gives_way_to_a_live_system_and_leaves_nothing_half_done(
    new_database: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "_PACKAGE", tmp_path)
    write_history(
        tmp_path,
        "CREATE TABLE notes (id int PRIMARY KEY); INSERT INTO notes VALUES (1)",
        "CREATE TABLE tags (id int PRIMARY KEY)",
        "CREATE TABLE labels (id int PRIMARY KEY); ALTER TABLE notes ADD COLUMN label int",
    )
    url = new_database("migrate_live")
    migrate.upgrade("notes", url, "0001")
    with (
        ThreadPoolExecutor(1) as thread,
        psycopg.connect(url) as busy,
        psycopg.connect(url, autocommit=True) as person,
    ):
        # A transaction that has read the table stands in the way of every change to it.
        busy.execute("SELECT * FROM notes")
        migration = thread.submit(migrate.upgrade, "notes", url)
        wait_until_it_waits(person)
        # Whoever comes now queues behind the migration, and must get through although `busy` goes on.
        person.execute(f"SET statement_timeout = '{PATIENCE}s'")
        assert person.execute("SELECT * FROM notes").fetchall() == [(1,)]
        with pytest.raises(OperationalError, match="lock timeout"):
            migration.result(PATIENCE)
        assert migrate.current("notes", url) == "0002", "what was done before stays done"
        assert tables(person) == {"alembic_version", "notes", "tags"}
        busy.rollback()
        migrate.upgrade("notes", url)
        assert migrate.current("notes", url) == "0003"
        assert tables(person) == {"alembic_version", "notes", "tags", "labels"}


def test_a_statement_that_takes_for_ever_is_cut_off(
    new_database: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "_PACKAGE", tmp_path)
    write_history(
        tmp_path,
        "CREATE TABLE limits AS SELECT name, setting FROM pg_settings WHERE name LIKE '%\\_timeout'",
    )
    url = new_database("migrate_limits")
    migrate.upgrade("notes", url)
    with psycopg.connect(url) as connection:
        limits: dict[str, int] = dict(connection.execute("SELECT name, setting::int FROM limits").fetchall())
    assert 0 < limits["lock_timeout"] <= 5_000
    assert limits["lock_timeout"] < limits["statement_timeout"] <= 60_000


REPLICA = """
import sys
from pathlib import Path
from whispr.kit import migrate

migrate._PACKAGE = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
migrate.upgrade("notes", sys.argv[2])
print(migrate.current("notes", sys.argv[2]))
"""


def test_replicas_that_start_together_apply_each_revision_once(
    new_database: Callable[[str], str], tmp_path: Path
) -> None:
    # Each revision takes a while, so that the replicas meet in it, and would fail or count twice when done again.
    write_history(
        tmp_path,
        "CREATE TABLE applied (revision text); INSERT INTO applied VALUES ('0001'); SELECT pg_sleep(0.3)",
        "INSERT INTO applied VALUES ('0002'); SELECT pg_sleep(0.3)",
        "INSERT INTO applied VALUES ('0003'); SELECT pg_sleep(0.3)",
    )
    url = new_database("migrate_replicas")
    replicas = [
        subprocess.Popen(
            [sys.executable, "-c", REPLICA, str(tmp_path), url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for replica in replicas:
            assert replica.stdout is not None
            assert replica.stdout.readline() == "ready\n"
        for replica in replicas:
            assert replica.stdin is not None
            replica.stdin.write("go\n")
            replica.stdin.flush()
        outcomes = [(replica.communicate(timeout=60), replica.returncode) for replica in replicas]
    finally:
        for replica in replicas:
            replica.kill()
            replica.wait()
    assert [(said.strip(), status) for (said, _), status in outcomes] == [("0003", 0)] * 2, outcomes
    with psycopg.connect(url) as connection:
        applied = connection.execute("SELECT revision FROM applied ORDER BY revision").fetchall()
    assert applied == [("0001",), ("0002",), ("0003",)]
