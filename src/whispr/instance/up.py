"""`whispr up`: one instance from start to stop."""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import whispr
from whispr.instance import logs
from whispr.instance.catalog import Entry
from whispr.instance.children import raise_file_limit
from whispr.instance.errors import PortInUse
from whispr.instance.gateway.running import Gateway
from whispr.instance.layout import Layout
from whispr.instance.leftovers import end_leftovers
from whispr.instance.metrics import Metrics
from whispr.instance.ports import answers, is_free
from whispr.instance.servers import Servers
from whispr.instance.services import Services
from whispr.instance.settings import InstanceSettings
from whispr.instance.site import Progress, Site
from whispr.instance.supervision import Family
from whispr.kit.mtls import LocalCA

RENEWAL_SECONDS = 60.0


class Instance:
    """PostgreSQL, Valkey, the services in `entries` and the gateway over one data directory.

    `command` gives the command line of a service's process.
    """

    def __init__(
        self,
        settings: InstanceSettings,
        entries: tuple[Entry, ...],
        progress: Progress,
        command: Callable[[str], list[str]] | None = None,
    ) -> None:
        self.settings = settings
        self.entries = entries
        self.layout = Layout(settings.data)
        self.family = Family(self._changed, progress.trouble)
        self.site = Site(settings, entries, self.layout, progress, self.family)
        self._servers = Servers(self.site)
        self._gateway = Gateway(self.site)
        metrics = Metrics(self.family, lambda: self._gateway.socket)
        self._services = Services(self.site, self._servers, metrics, command)
        self._progress = progress
        self._authority: LocalCA | None = None
        self._started_at = datetime.now(UTC)
        self._stopping = False

    @property
    def url(self) -> str:
        return self.site.url

    # --- start and stop -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Brings everything up. Raises InstanceError; what was started is stopped by `stop`."""
        self.layout.make()
        self.layout.lock()
        await asyncio.to_thread(end_leftovers, self.layout.root, self.layout.read_record())
        self._claim_public_port()
        raise_file_limit()
        names = ["postgres", "valkey", "readiness", *self._services.port_names()]
        # The gateway binds its port last: nothing else of ours may have been put there.
        self.site.ports.update(self.layout.ports(names, taken={self.settings.port}))
        await self._servers.start()
        self._authority = await asyncio.to_thread(
            LocalCA, self.layout.authority, self.settings.trust_domain, self.settings.namespace
        )
        await asyncio.to_thread(self._renew_certificates)
        await self._services.start()
        await self._gateway.start(self._services)
        self._record()

    async def run(self, stopped: asyncio.Event) -> None:
        """Starts, tells when ready, looks after things until `stopped`, stops."""
        try:
            starting = asyncio.create_task(self.start())
            waiting = asyncio.create_task(stopped.wait())
            await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await starting
                return
            await starting
            self._progress.done("whispr", f"is ready on {self.url}")
            async with asyncio.TaskGroup() as chores:
                tasks = [
                    chores.create_task(logs.keep_small(self.layout.logs, self.settings.log_bytes)),
                    chores.create_task(self._keep_certificates()),
                    chores.create_task(self._services.keep_spare()),
                ]
                await waiting
                for task in tasks:
                    task.cancel()
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Stops everything in the order that loses nothing: no new requests, then those that answer them, then data."""
        self._stopping = True
        readiness = self._services.readiness
        if readiness is not None:
            readiness.draining = True
        if self.family.children:
            self._progress.step("stopping")
        await self._gateway.stop()
        await self._services.stop()
        await self._servers.stop()
        if readiness is not None:
            await readiness.stop()
        if self.family.children:
            self.layout.remove_record()
        self.layout.unlock()

    def destroy(self) -> None:
        """Removes all data of a stopped instance. For demonstrations and tests."""
        self._servers.destroy()
        shutil.rmtree(self.layout.root, ignore_errors=True)

    def _claim_public_port(self) -> None:
        if not is_free(self.settings.port, self.settings.host) or answers(
            self.settings.host, self.settings.port
        ):
            raise PortInUse(
                f"Port {self.settings.port} is taken by another program. Choose another one with --port or WHISPR_PORT."
            )

    def _renew_certificates(self) -> None:
        if self._authority is not None:
            for entry in self.entries:
                ttl = timedelta(seconds=self.settings.certificate_seconds)
                self._authority.renew(entry.name, self.layout.identity(entry.name), ttl)

    async def _keep_certificates(self) -> None:
        pause = min(RENEWAL_SECONDS, self.settings.certificate_seconds / 10)
        while True:
            await asyncio.sleep(pause)
            await asyncio.to_thread(self._renew_certificates)

    # --- run.json -----------------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        """A process was started or replaced."""
        if self._services.readiness is not None:
            self._services.readiness.forget()
        self._record()

    def _record(self) -> None:
        """Writes run.json: also while starting, so that a killed start leaves word of what it had started."""
        if not self._stopping:
            self.layout.write_record(self.description())

    def description(self) -> dict[str, Any]:
        """What run.json holds."""
        internal = f"http://127.0.0.1:{self.site.ports['readiness']}"
        return {
            "public": self.url,
            "internal": internal,
            "version": whispr.__version__,
            "started_at": self._started_at.isoformat(timespec="seconds"),
            "pid": os.getpid(),
            "services": self._services.describe(),
            "postgres": {"url": self._servers.admin_url, "pid": self.family.pid("postgres")},
            "valkey": {"url": self._servers.valkey_url, "pid": self.family.pid("valkey")},
            "gateway": {
                "kind": self._gateway.kind,
                "pid": self.family.pid("gateway"),
                "metrics": f"{internal}/metrics/gateway",
                "admin": None if self._gateway.socket is None else str(self._gateway.socket),
            },
        }


async def supervise(instance: Instance, *, show_logs: bool = False) -> None:
    """Runs `instance` until SIGTERM, SIGINT or SIGHUP. A second signal changes nothing: stopping has its own limits."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stopped.set)
    following = None
    if show_logs:
        instance.layout.make()
        following = asyncio.create_task(logs.follow(instance.layout.logs))
    try:
        await instance.run(stopped)
    finally:
        if following is not None:
            following.cancel()
