"""A Whispr of its own for a scenario: `whispr up` in a new folder on free ports, stopped and removed afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whispr.instance.ports import free_port


class Instance:
    """A running instance. `url` is its public address; `run` the present `run.json`.

    With `keep_logs` set, its logs outlive it, and where they are is printed.
    """

    def __init__(self, directory: Path, process: subprocess.Popen[bytes], url: str) -> None:
        self.directory = directory
        self.process = process
        self.url = url
        self.keep_logs = False

    @property
    def run(self) -> dict[str, Any]:
        """`run.json` as it stands now; a restarted process has another pid there."""
        loaded: dict[str, Any] = json.loads((self.directory / "run.json").read_text())
        return loaded

    def service(self, name: str) -> dict[str, Any]:
        """Ports and pid of one service."""
        described: dict[str, Any] = self.run["services"][name]
        return described

    def socket_url(self, *, direct: bool) -> str:
        """Where devices connect: through the gateway, or `direct` at messaging's own port."""
        base = self.service("messaging")["socket"] if direct else self.url
        return base.replace("http://", "ws://") + "/socket/websocket"


@contextmanager
def own_instance(**environment: str) -> Iterator[Instance]:
    """Start an instance with `environment` added, and with request-rate limits lifted."""
    directory = Path(tempfile.mkdtemp(prefix="whispr-bench-"))
    # PostgreSQL's own user must be able to enter: else, as root, its data would lie elsewhere and stay there.
    directory.chmod(0o755)
    port = free_port()
    log = (directory / "up.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "whispr", "up", "--port", str(port), "--data", str(directory / "data")],
        env={
            **os.environ,
            "WHISPR_RATE_LIMITS": "off",
            "WHISPR_LOG_LEVEL": "warning",
            # Hashing a password is meant to be slow; registering thousands of people is not what is measured.
            "WHISPR_AUTH_ARGON2_MEMORY_KIB": "1024",
            "WHISPR_AUTH_ARGON2_TIME_COST": "1",
            **environment,
        },
        stdout=log,
        stderr=log,
    )
    instance = Instance(directory / "data", process, f"http://127.0.0.1:{port}")
    try:
        _await_ready(process, directory, time.monotonic() + 120)
        yield instance
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()
        if instance.keep_logs:
            kept = Path(tempfile.mkdtemp(prefix="whispr-bench-logs-"))
            shutil.copytree(instance.directory / "logs", kept, dirs_exist_ok=True)
            print("logs kept in", kept)
        shutil.rmtree(directory, ignore_errors=True)


def _await_ready(process: subprocess.Popen[bytes], directory: Path, deadline: float) -> None:
    log = directory / "up.log"
    while "whispr is ready on" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"whispr up did not become ready:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.1)
