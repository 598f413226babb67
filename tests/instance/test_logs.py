"""Logs stay small while their writers hold them open, and are followed without losing a line."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.instance.conftest import eventually

from whispr.instance import logs
from whispr.instance.children import spawn


def write(log: Path, text: str) -> None:
    with log.open("a") as file:
        file.write(text)


def kept(log: Path) -> dict[str, str]:
    """Every file of `log` by name, with what it holds."""
    return {path.name: path.read_text() for path in sorted(log.parent.glob(f"{log.name}*"))}


def test_a_log_is_rotated_only_above_its_limit(tmp_path: Path) -> None:
    log = tmp_path / "auth.log"
    assert not logs.rotate(log, 10), "there is none yet"
    write(log, "x" * 10)
    assert not logs.rotate(log, 10)
    assert kept(log) == {"auth.log": "x" * 10}
    write(log, "y")
    assert logs.rotate(log, 10)
    assert kept(log) == {"auth.log": "", "auth.log.1": "x" * 10 + "y"}


def test_three_older_ones_are_kept_newest_first_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    log = tmp_path / "auth.log"
    for content in ("first", "second", "third", "fourth", "fifth"):
        write(log, content)
        assert logs.rotate(log, 1)
    assert kept(log) == {
        "auth.log": "",
        "auth.log.1": "fifth",
        "auth.log.2": "fourth",
        "auth.log.3": "third",
    }
    assert {path.stat().st_mode & 0o077 for path in tmp_path.glob("auth.log.*")} == {0}


@pytest.fixture
def writer(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process whose output is `auth.log`, started as `up` starts it; it repeats the lines it is given."""
    code = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
    process = spawn([sys.executable, "-c", code], log=tmp_path / "auth.log", keep_stdin=True)
    yield process
    process.kill()
    process.wait()


def tell(writer: "subprocess.Popen[bytes]", line: str) -> None:
    assert writer.stdin is not None
    writer.stdin.write(f"{line}\n".encode())
    writer.stdin.flush()


@contextlib.asynccontextmanager
async def running(loop: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(loop)
    try:
        yield
        assert not task.done(), "it runs for ever"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_process_goes_on_at_the_start_of_its_rotated_log(
    tmp_path: Path, writer: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "ROTATE_SECONDS", 0.02)
    log = tmp_path / "auth.log"
    async with running(logs.keep_small(tmp_path, 10)):
        tell(writer, "one")
        await eventually(lambda: kept(log) == {"auth.log": "one\n"})
        tell(writer, "two, which is too much")
        await eventually(lambda: kept(log) == {"auth.log": "", "auth.log.1": "one\ntwo, which is too much\n"})
        tell(writer, "three")
        # No hole at its start: the process holds the file open and appends.
        await eventually(lambda: kept(log)["auth.log"] == "three\n")
        assert kept(log)["auth.log.1"] == "one\ntwo, which is too much\n"


async def test_a_log_that_cannot_be_rotated_stops_neither_the_others_nor_the_instance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "ROTATE_SECONDS", 0.02)
    (tmp_path / "auth.log").mkdir()
    log = tmp_path / "user.log"
    async with running(logs.keep_small(tmp_path, 1)):
        write(log, "first")
        await eventually(lambda: kept(log).get("user.log.1") == "first")
        write(log, "second")
        await eventually(lambda: kept(log).get("user.log.2") == "first")


async def test_following_prints_whole_lines_from_now_on_also_over_a_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "FOLLOW_SECONDS", 0.01)
    log, printed = tmp_path / "auth.log", ""

    def has_printed(text: str) -> bool:
        nonlocal printed
        printed += capsys.readouterr().out
        return printed == text

    write(log, "long ago\n")
    async with running(logs.follow(tmp_path)):
        await asyncio.sleep(0)
        write(log, "one\ntw")
        expected = "        auth | one\n"
        await eventually(lambda: has_printed(expected))
        write(log, "o\n")
        expected += "        auth | two\n"
        await eventually(lambda: has_printed(expected))
        logs.rotate(log, 1)
        write(log, "three\n")
        expected += "        auth | three\n"
        await eventually(lambda: has_printed(expected))
        write(tmp_path / "user.log", "hello\n")
        expected += "        user | hello\n"
        await eventually(lambda: has_printed(expected))


def test_last_words_are_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "auth.log"
    assert logs.last_words(log) == "(its log is empty)"
    write(log, "".join(f"line {number}\n" for number in range(5000)))
    assert logs.last_words(log, 2) == "line 4998\nline 4999"
