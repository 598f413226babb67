"""The processes of the services: how many, what each is given, whether they are ready."""

import asyncio
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from whispr.instance import logs
from whispr.instance.catalog import Entry
from whispr.instance.children import spawn
from whispr.instance.errors import StartFailed
from whispr.instance.leftovers import MARK
from whispr.instance.metrics import Metrics
from whispr.instance.readiness import Readiness
from whispr.instance.servers import Servers
from whispr.instance.serving import Spare
from whispr.instance.site import Site
from whispr.instance.supervision import Process, wait_until

SPARE_SECONDS = 2.0
ISSUER = AUDIENCE = "whispr"


@dataclass(frozen=True, slots=True)
class Worker:
    """One process of the service `entry`. The workers of a service share its ports; `number` counts from 1."""

    entry: Entry
    number: int

    @property
    def name(self) -> str:
        """Of its process, log and internal port: the service's own for the first."""
        return self.entry.name if self.number == 1 else f"{self.entry.name}-{self.number}"


class Services:
    """Starts and describes every worker of every service.

    `metrics` are served where readiness is; `command` gives the command line of a service's process where it is not ours.
    """

    def __init__(
        self, site: Site, servers: Servers, metrics: Metrics, command: Callable[[str], list[str]] | None
    ) -> None:
        self._site = site
        self._servers = servers
        self._metrics = metrics
        self._command = command or (lambda service: [sys.executable, "-m", "whispr", "serve", service])
        # Another command than ours is not what the spare process could become.
        self._spare = None if command is not None else self._make_spare()
        self._workers = {
            entry.name: [Worker(entry, number) for number in range(1, site.settings.workers(entry.name) + 1)]
            for entry in site.entries
        }
        self.readiness: Readiness | None = None

    def port_names(self) -> list[str]:
        """Names of the ports to be given out: the doors of a service, and one for the health of each worker."""
        names = []
        for entry in self._site.entries:
            names += [f"{entry.name}.{door}" for door in ("grpc", *entry.doors)]
            names += [f"{worker.name}.internal" for worker in self._workers[entry.name]]
        return names

    async def start(self) -> None:
        """Starts all workers and waits until each is ready. Raises InstanceError."""
        site = self._site
        internal = {
            entry.name: [site.ports[f"{worker.name}.internal"] for worker in self._workers[entry.name]]
            for entry in site.entries
        }
        self.readiness = Readiness(internal, self._metrics.routes())
        await self.readiness.start(site.ports["readiness"])
        workers = [worker for entry in site.entries for worker in self._workers[entry.name]]
        for worker in workers:
            site.family.supervise(worker.name, partial(self._spawn, worker), grace=site.settings.stop_seconds)
        site.progress.step("starting " + ", ".join(entry.name for entry in site.entries))
        await asyncio.gather(*(self._await_ready(self.readiness, worker) for worker in workers))

    async def stop(self) -> None:
        """Stops all workers of all services."""
        if self._spare is not None:
            self._spare.stop()
        await self._site.family.stop(
            *(worker.name for workers in self._workers.values() for worker in workers)
        )

    async def keep_spare(self) -> None:
        """Keeps a warm process at hand, but leaves the processor to a service that is just starting."""
        if self._spare is None:
            return
        while True:
            await asyncio.sleep(SPARE_SECONDS)
            self._spare.warm()

    def describe(self) -> dict[str, Any]:
        """What run.json says of each service: its addresses, and pid, health and restarts of its workers."""
        return {entry.name: self._describe(entry) for entry in self._site.entries}

    def bind(self, service: str, door: str) -> str:
        """`host:port` of a door."""
        return f"127.0.0.1:{self._site.ports[f'{service}.{door}']}"

    def _describe(self, entry: Entry) -> dict[str, Any]:
        workers = [
            {
                "pid": self._site.family.pid(worker.name),
                "internal": f"http://{self.bind(worker.name, 'internal')}",
                "restarts": self._site.family.restarts(worker.name),
            }
            for worker in self._workers[entry.name]
        ]
        return {
            "grpc": self.bind(entry.name, "grpc"),
            **{door: f"http://{self.bind(entry.name, door)}" for door in entry.doors},
            "internal": workers[0]["internal"],
            "pid": workers[0]["pid"],
            "restarts": sum(worker["restarts"] for worker in workers),
            "workers": workers,
        }

    async def _await_ready(self, readiness: Readiness, worker: Worker) -> None:
        site, log = self._site, self._site.layout.log(worker.name)
        child = site.family.children[worker.name]
        try:
            await wait_until(
                child,
                partial(readiness.reaches, f"http://{self.bind(worker.name, 'internal')}/readyz"),
                site.settings.start_seconds,
                f"Its log is {log}; it ends with:",
            )
        except StartFailed as failure:
            raise StartFailed(f"{failure}\n{logs.last_words(log)}") from None
        site.progress.done(worker.name, f"ready on {self.bind(worker.entry.name, 'http')}, pid {child.pid}")

    def _make_spare(self) -> Spare:
        environment = {**os.environ, MARK: str(self._site.layout.root), "PYTHONUNBUFFERED": "1"}
        names = [entry.name for entry in self._site.entries]
        return Spare(names, environment, self._site.layout.log("spare"))

    def _spawn(self, worker: Worker) -> Process:
        service, environment = worker.entry.name, self._environment(worker)
        log = self._site.layout.log(worker.name)
        warm = self._spare.become(service, environment, log) if self._spare is not None else None
        return warm or spawn(self._command(service), env=environment, log=log)

    def _environment(self, worker: Worker) -> dict[str, str]:
        entry, site = worker.entry, self._site
        prefix = f"WHISPR_{entry.name.upper()}"
        # The administrator's password of PostgreSQL is no business of a service.
        inherited = {name: value for name, value in os.environ.items() if name != "WHISPR_POSTGRES_URL"}
        return {
            **entry.variables,
            **{name: str(site.layout.secrets / file) for name, file in entry.files.items()},
            "WHISPR_LIVE_SETTINGS": str(site.layout.live),
            **inherited,
            MARK: str(site.layout.root),
            "PYTHONUNBUFFERED": "1",
            "WHISPR_ENVIRONMENT": site.settings.environment,
            "WHISPR_RATE_LIMITS": site.settings.rate_limits,
            "WHISPR_VALKEY_URL": self._servers.valkey_url,
            "WHISPR_IDENTITY_DIR": str(site.layout.identity(entry.name)),
            "WHISPR_TOKEN_ISSUER": ISSUER,
            "WHISPR_TOKEN_AUDIENCE": AUDIENCE,
            f"{prefix}_DATABASE_URL": self._servers.database_url(entry.name),
            **self._binds(worker),
            **{
                f"WHISPR_{other.name.upper()}_ADDRESS": self.bind(other.name, "grpc")
                for other in site.entries
            },
        }

    def _binds(self, worker: Worker) -> dict[str, str]:
        name = worker.entry.name
        binds = {
            "WHISPR_HTTP_BIND": self.bind(name, "http"),
            "WHISPR_GRPC_BIND": self.bind(name, "grpc"),
            "WHISPR_INTERNAL_BIND": self.bind(worker.name, "internal"),
            **{
                f"WHISPR_{name.upper()}_{door.upper()}_BIND": self.bind(name, door)
                for door in worker.entry.ports
            },
        }
        if len(self._workers[name]) > 1:
            binds["WHISPR_SHARE_PORTS"] = "true"
        if worker.number == 1 and "own_http" in worker.entry.doors:
            binds["WHISPR_OWN_HTTP_BIND"] = self.bind(name, "own_http")
        return binds
