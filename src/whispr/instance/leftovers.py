"""Ends processes that an earlier supervisor of the same data directory left behind when it was killed."""

import contextlib
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from whispr.instance.children import wait_gone
from whispr.instance.gateway import SOCKET_FOLDER

# Every child carries it, so that a process can be told from a stranger that was given its number since.
MARK = "WHISPR_INSTANCE"


def end_leftovers(root: Path, record: dict[str, Any] | None) -> list[int]:
    """Kills what `record` (the last run.json) names and is still ours; returns the pids. PostgreSQL is left to its own
    start, which ends a leftover cleanly. The folder of the gateway's socket goes too: it lies outside of `root`."""
    ended = []
    for pid in _pids(record or {}):
        if is_of(root, pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_gone(pid, 5.0)
            ended.append(pid)
    _remove_socket(record or {})
    return ended


def is_of(root: Path, pid: int) -> bool:
    """True when `pid` is a living child of an instance over `root`."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if process.environ().get(MARK) == str(root):
            return True
        # Valkey writes its title over its environment; its working folder still tells.
        return process.name().startswith("valkey") and Path(process.cwd()).is_relative_to(root)
    except (psutil.Error, OSError):
        return False


def _pids(record: dict[str, Any]) -> Iterator[int]:
    parts = [record.get("valkey", {}), record.get("gateway", {})]
    for service in record.get("services", {}).values():
        # The first worker's pid is the service's too; killed once it is not ours any more.
        parts += [service, *service.get("workers", [])]
    for part in parts:
        pid = part.get("pid") if isinstance(part, dict) else None
        if isinstance(pid, int):
            yield pid


def _remove_socket(record: dict[str, Any]) -> None:
    gateway = record.get("gateway")
    socket = gateway.get("admin") if isinstance(gateway, dict) else None
    if not isinstance(socket, str):
        return
    folder = Path(socket).parent
    with contextlib.suppress(OSError):
        found = folder.lstat()
        # Anybody may have put something else under that name since.
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if ours and folder.name.startswith(SOCKET_FOLDER):
            Path(socket).unlink(missing_ok=True)
            folder.rmdir()
