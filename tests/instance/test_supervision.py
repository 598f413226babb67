"""Children, leftovers, logs, ports and certificates, with real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.instance.conftest import eventually

from whispr.instance.accounts import reachable
from whispr.instance.children import Account, spawn, stop, wait_gone
from whispr.instance.layout import Layout
from whispr.instance.leftovers import MARK, end_leftovers, is_of
from whispr.instance.logs import KEPT, rotate
from whispr.instance.ports import FIRST, LAST, free_port
from whispr.instance.serving import Spare
from whispr.instance.supervision import Child, Process, describe_exit

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)",
]


class Told:
    def __init__(self) -> None:
        self.changes = 0
        self.troubles: list[str] = []

    def change(self) -> None:
        self.changes += 1


def supervise(command: list[str], told: Told, log: Path | None = None, grace: float = 5.0) -> Child:
    def start() -> Process:
        return spawn(command, log=log)

    return Child("part", start, changed=told.change, trouble=told.troubles.append, grace=grace)


async def test_a_killed_child_is_started_again_at_once_and_a_stopped_one_is_not() -> None:
    told = Told()
    child = supervise(SLEEPER, told)
    child.start()
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: child.pid != first, 5)
    assert told.troubles == ["part ended (killed by SIGKILL); starting it again"]
    assert (child.restarts, told.changes) == (1, 1)
    await child.stop()
    assert child.restarts == 1


async def test_a_child_that_keeps_ending_is_started_ever_more_slowly() -> None:
    told = Told()
    child = supervise([sys.executable, "-c", "raise SystemExit(3)"], told)
    child.start()
    await eventually(lambda: child.restarts >= 2, 10)
    began = time.monotonic()
    await eventually(lambda: child.restarts >= 3, 10)
    assert time.monotonic() - began >= 0.3
    assert child.last_exit == 3
    await child.stop()


async def test_a_child_that_does_not_listen_is_killed_after_its_grace(tmp_path: Path) -> None:
    child = supervise(STUBBORN, Told(), log=tmp_path / "log", grace=0.3)
    child.start()
    await eventually(lambda: (tmp_path / "log").exists() and "deaf" in (tmp_path / "log").read_text())
    pid = child.pid
    assert pid is not None
    await asyncio.wait_for(child.stop(), 5)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child's life to its parent's")
async def test_a_child_dies_with_its_supervisor() -> None:
    script = (
        "import sys, time; from whispr.instance.children import spawn;"
        f"print(spawn({SLEEPER!r}).pid, flush=True); time.sleep(60)"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    child = int(supervisor.stdout.readline())
    supervisor.kill()
    supervisor.wait()

    def gone() -> bool:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return True
        return Path(f"/proc/{child}/stat").read_text().split()[2] == "Z"

    await eventually(gone, 5)


def test_leftovers_are_ended_and_strangers_are_not(tmp_path: Path) -> None:
    ours = spawn(SLEEPER, env={**os.environ, MARK: str(tmp_path)})
    of_another = spawn(SLEEPER, env={**os.environ, MARK: str(tmp_path / "other")})
    stranger = spawn(SLEEPER, cwd=tmp_path)
    try:
        record = {
            "services": {
                "auth": {"pid": ours.pid},
                "user": {"pid": of_another.pid},
                "messaging": {"pid": None},
            },
            "gateway": {"pid": stranger.pid},
        }
        assert end_leftovers(tmp_path, record) == [ours.pid]
        assert ours.wait(5) == -signal.SIGKILL
        assert (of_another.poll(), stranger.poll()) == (None, None)
        assert is_of(tmp_path / "other", of_another.pid)
        assert end_leftovers(tmp_path, None) == []
    finally:
        stop(of_another, signal.SIGKILL, 5)
        stop(stranger, signal.SIGKILL, 5)


def test_the_socket_of_a_killed_instance_is_removed_and_nothing_else(tmp_path: Path) -> None:
    ours, strangers = tmp_path / "whispr-gateway-x1", tmp_path / "somewhere"
    for folder in (ours, strangers):
        folder.mkdir()
        (folder / "admin").touch()
    link = tmp_path / "whispr-gateway-x2"
    link.symlink_to(strangers)
    for folder in (ours, strangers, link, tmp_path / "whispr-gateway-gone"):
        end_leftovers(tmp_path, {"gateway": {"pid": None, "admin": str(folder / "admin")}})
    end_leftovers(tmp_path, {"gateway": {"pid": None, "admin": None}})
    assert not ours.exists()
    assert (strangers / "admin").exists()


def test_a_spare_that_cannot_load_is_not_started_over_and_over(tmp_path: Path) -> None:
    spare = Spare(["no_such_service"], os.environ, tmp_path / "spare.log")
    spare.warm()
    process = spare._process
    assert process is not None
    assert process.wait(30) != 0
    assert spare.become("no_such_service", {}, tmp_path / "log") is None
    spare.warm()
    assert spare._process is process
    assert "No module named" in (tmp_path / "spare.log").read_text()


def test_logs_are_rotated_while_their_writer_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "auth.log"
    with log.open("a") as writer:
        for number in range(KEPT + 3):
            writer.write(f"{number} " + "x" * 100 + "\n")
            writer.flush()
            assert rotate(log, 50)
        assert not rotate(log, 50)
        writer.write("last\n")
    assert log.read_text() == "last\n"
    assert [path.read_text()[0] for path in sorted(tmp_path.glob("auth.log.*"))] == ["5", "4", "3"]


def test_ports_stay_over_restarts_and_lie_below_those_of_outgoing_connections(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    first = layout.ports(["auth.http", "auth.grpc"])
    assert len(set(first.values())) == 2
    assert all(FIRST <= port <= LAST for port in first.values())
    again = Layout(tmp_path).ports(["auth.http", "auth.grpc", "user.http"])
    assert again.items() >= first.items()
    assert free_port(again.values()) not in again.values()


def test_a_port_that_is_spoken_for_is_given_to_nobody(tmp_path: Path) -> None:
    first = Layout(tmp_path).ports(["auth.http", "auth.grpc"])
    again = Layout(tmp_path).ports(["auth.http", "auth.grpc"], taken={first["auth.http"]})
    assert again["auth.http"] != first["auth.http"]
    assert again["auth.grpc"] == first["auth.grpc"]


def test_a_process_that_nobody_asked_after_has_ended_all_the_same() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    assert wait_gone(process.pid, 20)
    os.kill(process.pid, 0)
    process.wait()
    assert wait_gone(process.pid, 0.1)


def test_a_half_written_ports_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "ports.json").write_text("{")
    assert Layout(tmp_path).ports(["auth.http"])["auth.http"]


def test_reachable_looks_at_every_folder_on_the_way(open_folder: Path) -> None:
    stranger = Account("stranger", 65_000, 65_000)
    inner = open_folder / "closed" / "inner"
    inner.mkdir(parents=True)
    assert reachable(inner, stranger)
    (open_folder / "closed").chmod(0o700)
    assert not reachable(inner, stranger)
    assert reachable(inner, None)


@pytest.mark.parametrize(
    ("status", "words"), [(1, "exit status 1"), (-9, "killed by SIGKILL"), (-99, "killed by signal 99")]
)
def test_an_exit_is_put_in_words(status: int, words: str) -> None:
    assert describe_exit(status) == words
