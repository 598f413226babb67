"""The embedded PostgreSQL: real starts, real kills."""

import os
import shutil
import signal
import stat
from pathlib import Path

import psycopg
import pytest

from whispr.instance.errors import InstanceError
from whispr.instance.postgres import EmbeddedPostgres


def ask(server: EmbeddedPostgres, statement: str) -> str:
    with psycopg.connect(server.url) as connection:
        row = connection.execute(statement).fetchone()
    assert row is not None
    return str(row[0])


def test_it_runs_durably_over_tcp_and_socket_with_a_password(open_folder: Path) -> None:
    server = EmbeddedPostgres(open_folder / "pg").start()
    try:
        assert ask(server, "SHOW fsync") == "on"
        assert ask(server, "SHOW synchronous_commit") == "on"
        assert int(ask(server, "SHOW server_version_num")) >= 150_000
        with psycopg.connect(
            host=str(server.socket_directory),
            port=server.port,
            user="whispr",
            password=server.password,
            dbname="postgres",
        ) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(server.url_of("postgres", password="wrong"))
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(
                host=str(server.socket_directory),
                port=server.port,
                user="whispr",
                password="x",
                dbname="postgres",
            )
    finally:
        server.destroy()
    assert not server.socket_directory.exists()


def test_committed_rows_outlive_kill_and_the_address_stays(open_folder: Path) -> None:
    server = EmbeddedPostgres(open_folder / "pg").start()
    try:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CREATE TABLE kept (n int)")
            connection.execute("INSERT INTO kept VALUES (7)")
        url, pid = server.url, server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        server.start()
        assert (server.url, ask(server, "SELECT n FROM kept")) == (url, "7")
        assert server.pid != pid
    finally:
        server.destroy()


def test_a_leftover_server_of_a_dead_supervisor_is_ended_first(open_folder: Path) -> None:
    first = EmbeddedPostgres(open_folder / "pg", durable=False).start()
    second = EmbeddedPostgres(open_folder / "pg", durable=False)
    try:
        leftover = first._process
        assert leftover is not None
        second.start()
        assert leftover.wait(5) == 0, "it was shut down cleanly"
        assert ask(second, "SELECT 1") == "1"
    finally:
        second.destroy()


def test_a_pid_file_that_names_a_stranger_does_not_block_the_start(open_folder: Path) -> None:
    server = EmbeddedPostgres(open_folder / "pg", durable=False).start()
    try:
        server.stop()
        (server.data / "postmaster.pid").write_text(f"{os.getpid()}\n{server.data}\n")
        server.start()
        assert ask(server, "SELECT 1") == "1"
    finally:
        server.destroy()


def test_a_start_that_was_cut_short_is_begun_anew(open_folder: Path) -> None:
    server = EmbeddedPostgres(open_folder / "pg", durable=False)
    half = open_folder / "pg" / "data" / "base"
    half.mkdir(parents=True)
    try:
        server.start()
        assert ask(server, "SELECT 1") == "1"
    finally:
        server.destroy()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root drops to another user")
def test_as_root_it_runs_as_another_user_and_leaves_foreign_folders_as_they_are(open_folder: Path) -> None:
    closed = open_folder / "closed"
    closed.mkdir(mode=0o700)
    server = EmbeddedPostgres(closed / "pg", durable=False).start()
    try:
        assert server.pid is not None
        assert Path(f"/proc/{server.pid}").stat().st_uid not in {0}
        assert stat.S_IMODE(closed.stat().st_mode) == 0o700
        assert not server.data.is_relative_to(closed), "its user cannot reach the data there"
        assert Path((closed / "pg" / "location").read_text().strip()) == server.data.parent
    finally:
        server.destroy()
    assert not server.data.parent.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root keeps data elsewhere")
def test_data_that_has_vanished_is_told_and_not_replaced_by_an_empty_database(open_folder: Path) -> None:
    closed = open_folder / "closed"
    closed.mkdir(mode=0o700)
    server = EmbeddedPostgres(closed / "pg", durable=False)
    server.prepare()
    shutil.rmtree(server.data.parent)
    with pytest.raises(InstanceError, match="nothing is there"):
        EmbeddedPostgres(closed / "pg", durable=False).prepare()
