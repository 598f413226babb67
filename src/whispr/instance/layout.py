"""Where things lie in the data directory of an instance."""

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

from whispr.instance.errors import AlreadyRunning, InstanceError
from whispr.instance.ports import free_port, is_free

PORTS_FILE = "ports.json"


class Layout:
    """The folders and small files of the data directory `root`.

    run.json      what runs, where, under which pid       ports.json    ports given out, kept over restarts
    live.json     flags and settings changed meanwhile
    secrets/      passwords and key rings (0600)          ca/           the local certificate authority
    identity/X/   certificate and key of service X        logs/         one file per process
    postgres/, valkey/, gateway/                          what the servers keep
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run_file = root / "run.json"
        self.live = root / "live.json"
        self.logs = root / "logs"
        self.secrets = root / "secrets"
        self.authority = root / "ca"
        self.postgres = root / "postgres"
        self.valkey = root / "valkey"
        self.gateway = root / "gateway"
        self._lock: int | None = None

    def make(self) -> None:
        """Creates what is missing; folders that exist keep their permissions. Raises InstanceError."""
        # As root the PostgreSQL user must be able to pass through; nobody but us may list or read.
        passable = 0o711 if os.geteuid() == 0 else 0o700
        try:
            for folder, mode in (
                (self.root, passable),
                (self.postgres, passable),
                (self.valkey, 0o700),
                (self.logs, 0o700),
                (self.secrets, 0o700),
                (self.gateway, 0o700),
            ):
                _make_folder(folder, mode)
        except OSError as error:
            raise InstanceError(
                f"Cannot use {self.root} for data: {error.strerror}. Choose another folder with --data."
            ) from error

    def identity(self, service: str) -> Path:
        return self.root / "identity" / service

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def secret(self, name: str) -> str:
        """A random password, made on first use and the same ever after."""
        path = self.secrets / name
        with contextlib.suppress(FileNotFoundError):
            return path.read_text().strip()
        value = secrets.token_urlsafe(24)
        write_private(path, value)
        return value

    def ports(self, names: list[str], taken: Collection[int] = ()) -> dict[str, int]:
        """A port for each name, none of them in `taken`: the one of last time where it is still free, else a new one."""
        path = self.root / PORTS_FILE
        try:
            known = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            known = {}
        chosen: dict[str, int] = {}
        for name in names:
            port = known.get(name)
            unusable = {*taken, *chosen.values()}
            usable = isinstance(port, int) and port not in unusable and is_free(port)
            chosen[name] = port if usable else free_port(unusable)
        write_private(path, json.dumps({**known, **chosen}, indent=1))
        return chosen

    def lock(self) -> None:
        """Claims the directory until this process ends, however it ends. Raises AlreadyRunning."""
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            record = self.read_record() or {}
            where = f" at {record['public']}" if "public" in record else ""
            raise AlreadyRunning(
                f"An instance already runs from {self.root}{where}. "
                "Stop it first, or give this one its own --data and --port."
            ) from None
        self._lock = descriptor

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read_record(self) -> dict[str, Any] | None:
        """run.json, or None when there is none that can be read."""
        try:
            record = json.loads(self.run_file.read_text())
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def write_record(self, record: dict[str, Any]) -> None:
        write_private(self.run_file, json.dumps(record, indent=2) + "\n")

    def remove_record(self) -> None:
        self.run_file.unlink(missing_ok=True)


def write_private(path: Path, text: str) -> None:
    """Replaces `path` in one step, readable by its owner only: a reader sees the old text or the new one."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _make_folder(folder: Path, mode: int) -> None:
    try:
        folder.mkdir(mode=mode, parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        # mkdir's mode passes through the umask, which may close more than we need closed.
        folder.chmod(mode)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "Permission denied", str(folder))
