"""Log files of the processes: kept small, and shown at the terminal when asked for."""

import asyncio
import contextlib
import os
import shutil
import sys
from pathlib import Path

ROTATE_SECONDS = 10.0
FOLLOW_SECONDS = 0.2
KEPT = 3


def rotate(log: Path, limit: int) -> bool:
    """Moves the content of `log` to `log.1` when it has more than `limit` bytes; older ones move on, KEPT stay.

    The file itself stays, because the process that writes it holds it open; it appends, so it goes on at the start.
    """
    try:
        if log.stat().st_size <= limit:
            return False
    except FileNotFoundError:
        return False
    for number in range(KEPT - 1, 0, -1):
        older = log.with_name(f"{log.name}.{number}")
        if older.exists():
            older.replace(log.with_name(f"{log.name}.{number + 1}"))
    shutil.copyfile(log, log.with_name(f"{log.name}.1"))
    log.with_name(f"{log.name}.1").chmod(0o600)
    os.truncate(log, 0)
    return True


def last_words(log: Path, lines: int = 12) -> str:
    """The end of `log`, for a message about a process that would not start."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        return "(its log is empty)"
    return "\n".join(text.splitlines()[-lines:]) or "(its log is empty)"


async def keep_small(folder: Path, limit: int) -> None:
    """Rotates every log in `folder`, for ever."""
    while True:
        for log in _logs_in(folder):
            # A full disk must not end the instance; the next round tries again.
            with contextlib.suppress(OSError):
                rotate(log, limit)
        await asyncio.sleep(ROTATE_SECONDS)


async def follow(folder: Path) -> None:
    """Prints what the logs in `folder` gain from now on, each line with the name of its process."""
    seen = {log: log.stat().st_size for log in _logs_in(folder)}
    while True:
        for log in _logs_in(folder):
            _print_news(log, seen)
        await asyncio.sleep(FOLLOW_SECONDS)


def _logs_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.log"))


def _print_news(log: Path, seen: dict[Path, int]) -> None:
    size, start = log.stat().st_size, seen.get(log, 0)
    if size < start:
        start = 0
    if size == start:
        return
    with log.open("rb") as file:
        file.seek(start)
        news = file.read(size - start)
    whole = news.rfind(b"\n") + 1
    seen[log] = start + whole
    for line in news[:whole].decode(errors="replace").splitlines():
        sys.stdout.write(f"{log.stem:>12} | {line}\n")
    sys.stdout.flush()
