"""Runs one service in this process, and keeps a process warm that can become any of them.

Loading a service's libraries takes a second or more of a busy machine, which is most of the time that a killed service
would be away. One spare process has loaded them already and waits for its part.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from whispr.instance.children import spawn


def serve(service: str) -> int:
    """Runs `service` until it is told to stop, with its settings from the environment; returns the exit status."""
    from whispr.kit import process

    return process.run(service, importlib.import_module(f"whispr.services.{service}.app").build)


class Spare:
    """The waiting process, in the eyes of the supervisor."""

    def __init__(self, services: Iterable[str], environment: Mapping[str, str], log: Path) -> None:
        self._command = [sys.executable, "-m", "whispr.instance.serving", *services]
        self._environment = dict(environment)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def warm(self) -> None:
        """Starts a process to wait, unless one does, or one could not and ended: the next one would end likewise."""
        if self._process is None:
            self._process = spawn(self._command, env=self._environment, log=self._log, keep_stdin=True)

    def become(
        self, service: str, environment: Mapping[str, str], log: Path
    ) -> "subprocess.Popen[bytes] | None":
        """Makes the waiting process run `service`; returns it, or None when there is none."""
        process = self._process
        if process is None or process.stdin is None or process.poll() is not None:
            return None
        self._process = None
        order = {"service": service, "environment": dict(environment), "log": str(log)}
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.close()
        except BrokenPipeError:
            return None
        return process

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


def main() -> int:
    """Loads the services named by the arguments, waits for one line with an order, and follows it."""
    importlib.import_module("whispr.kit.process")
    for service in sys.argv[1:]:
        importlib.import_module(f"whispr.services.{service}.app")
    line = sys.stdin.readline()
    if not line:
        return 0
    order = json.loads(line)
    os.environ.clear()
    os.environ.update(order["environment"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log)
    return serve(order["service"])


if __name__ == "__main__":
    sys.exit(main())
