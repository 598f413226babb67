"""The gateway's process in an instance."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from whispr.instance import gateway, logs
from whispr.instance.children import spawn
from whispr.instance.errors import InstanceError, StartFailed
from whispr.instance.gateway import builtin, envoy
from whispr.instance.layout import write_private
from whispr.instance.leftovers import MARK
from whispr.instance.services import AUDIENCE, ISSUER, Services
from whispr.instance.site import Site
from whispr.instance.supervision import Process, wait_until

# A Unix socket's path has 104 bytes at most on macOS, 108 on Linux. These leave room for the folder and the socket.
FOLDER_BYTES = 70


class Gateway:
    """The one process that listens on the public port. `kind` is `envoy` or `builtin`."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._folder: Path | None = None
        self.kind = gateway.choose(site.settings.gateway)

    @property
    def socket(self) -> Path | None:
        """Where its process tells what it counts; None before it starts."""
        return None if self._folder is None else self._folder / "admin"

    async def start(self, services: Services) -> None:
        """Opens the public port before `services`, which have started. Raises InstanceError."""
        site, readiness = self._site, services.readiness
        if readiness is None:
            raise StartFailed("Readiness is not being watched.")
        site.progress.step("opening the gateway")
        child = site.family.supervise(
            "gateway", self._spawn_envoy if self.kind == "envoy" else self._spawn_builtin, grace=5.0
        )
        log = site.layout.log("gateway")
        advice = f"Its log is {log}; it ends with:"
        try:
            await wait_until(
                child, lambda: readiness.reaches(f"{site.url}/readyz"), site.settings.start_seconds, advice
            )
        except StartFailed as failure:
            raise StartFailed(f"{failure}\n{logs.last_words(log)}") from None
        name = f"Envoy {gateway.envoy_version()}" if self.kind == "envoy" else "built in"
        site.progress.done("gateway", f"{name}, pid {child.pid}")

    async def stop(self) -> None:
        await self._site.family.stop("gateway")
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _free_socket(self) -> Path:
        """The path of the socket with nothing there: a killed process leaves its socket, over which none can be bound."""
        # Whatever empties the system's folder of temporary files must not keep the public port closed after a restart.
        if self._folder is None or not self._folder.is_dir():
            self._folder = private_folder()
        path = self._folder / "admin"
        path.unlink(missing_ok=True)
        return path

    def _plan(self) -> gateway.Plan:
        site = self._site
        doors = {
            (entry.name, door): site.ports[f"{entry.name}.{door}"]
            for entry in site.entries
            for door in entry.doors
        }
        return gateway.Plan(
            host=site.settings.host,
            port=site.settings.port,
            routes=tuple(route for entry in site.entries for route in entry.routes),
            addresses=doors,
            readiness=site.ports["readiness"],
            issuer=ISSUER,
            audience=AUDIENCE,
            rate_limits=site.settings.rate_limits == "on",
            requests_per_second=site.settings.gateway_requests_per_second,
            burst=site.settings.gateway_burst,
            admin=str(self._free_socket()),
        )

    def _spawn_envoy(self) -> Process:
        layout = self._site.layout
        path = layout.gateway / "envoy.json"
        write_private(path, envoy.render(self._plan()))
        binary = gateway.envoy_binary()
        if binary is None:
            raise InstanceError("Envoy is gone from the environment.")
        workers = str(min(4, os.cpu_count() or 1))
        options = ["--disable-hot-restart", "--log-level", "warning", "--concurrency", workers]
        return spawn(
            [binary, "-c", path, *options],
            env={**os.environ, MARK: str(layout.root)},
            log=layout.log("gateway"),
        )

    def _spawn_builtin(self) -> Process:
        layout = self._site.layout
        return spawn(
            [sys.executable, "-m", "whispr.instance.gateway.builtin"],
            env={**os.environ, MARK: str(layout.root)},
            log=layout.log("gateway"),
            stdin=builtin.encode(self._plan()).encode(),
        )


def private_folder() -> Path:
    """A new folder that only we enter, with a path short enough for a socket in it: data may lie at the end of any path."""
    usual = tempfile.gettempdir()
    short = usual if len(os.fsencode(usual)) <= FOLDER_BYTES else "/tmp"  # noqa: S108 (the new folder is ours alone)
    return Path(tempfile.mkdtemp(prefix=gateway.SOCKET_FOLDER, dir=short))
