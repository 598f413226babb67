"""Real instances for tests of the command line: `whispr up` as a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from whispr.instance.children import spawn
from whispr.instance.ports import free_port
from whispr.instance.postgres import EmbeddedPostgres

START_SECONDS = 120.0


class Up:
    """`whispr up` over `folder`; `lines` is what it has printed."""

    def __init__(self, folder: Path, port: int | None = None, **environment: str) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.output = folder.with_name(f"{folder.name}-{free_port()}.out")
        self.process = spawn(
            [sys.executable, "-m", "whispr", "up", "--data", folder, "--port", str(self.port)],
            env={**os.environ, "WHISPR_ENVIRONMENT": "test", "WHISPR_RATE_LIMITS": "off", **environment},
            log=self.output,
            death_signal=signal.SIGTERM,
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def lines(self) -> list[str]:
        return self.output.read_text().splitlines()

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        return found

    def wait_ready(self) -> "Up":
        wait_for(
            lambda: self.process.poll() is not None or f"whispr is ready on {self.url}" in self.lines,
            START_SECONDS,
        )
        assert self.process.poll() is None, self.output.read_text()
        return self

    def pids(self) -> dict[str, int]:
        record = self.record
        parts = {name: record[name]["pid"] for name in ("postgres", "valkey", "gateway")}
        return {**parts, **{name: service["pid"] for name, service in record["services"].items()}}

    def ask(
        self, path: str, body: object = None, token: str | None = None, method: str | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of a request to the public port; status 0 when nobody answers."""
        request = urllib.request.Request(
            self.url + path, method=method, data=None if body is None else json.dumps(body).encode()
        )
        request.add_header("content-type", "application/json")
        if token is not None:
            request.add_header("authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, _json(answer.read())
        except urllib.error.HTTPError as refusal:
            return refusal.code, _json(refusal.read())
        except OSError:
            return 0, None

    def is_ready(self) -> bool:
        return self.ask("/readyz")[0] == 200

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


def _json(text: bytes) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return None


def wait_for(check: Callable[[], bool], seconds: float = 30.0) -> float:
    """Waits until `check` holds; returns how long it took. Fails after `seconds`."""
    started = time.monotonic()
    while not check():
        assert time.monotonic() - started < seconds, "it did not happen"
        time.sleep(0.05)
    return time.monotonic() - started


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def data_folder() -> Iterator[Path]:
    """A folder for an instance's data, with a space in its path; PostgreSQL's data goes too when it lies elsewhere."""
    base = Path(tempfile.mkdtemp(prefix="whispr test "))
    base.chmod(0o755)
    folder = base / "data of one"
    try:
        yield folder
    finally:
        if (folder / "postgres").exists():
            server = EmbeddedPostgres(folder / "postgres", password="unused")
            server.prepare()
            server.destroy()
        subprocess.run(["rm", "-rf", str(base)], check=True)
