"""`whispr up`: one instance from start to stop."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Protocol
from urllib.parse import quote, urlsplit, urlunsplit

import whispr
from whispr.instance import gateway, logs
from whispr.instance.catalog import Entry
from whispr.instance.children import raise_file_limit, spawn
from whispr.instance.errors import InstanceError, PortInUse, StartFailed
from whispr.instance.gateway import builtin, envoy
from whispr.instance.layout import Layout, write_private
from whispr.instance.leftovers import MARK, end_leftovers
from whispr.instance.ports import answers, is_free
from whispr.instance.postgres import EmbeddedPostgres
from whispr.instance.readiness import Readiness
from whispr.instance.serving import Spare
from whispr.instance.settings import InstanceSettings
from whispr.instance.supervision import Child, Process, wait_until
from whispr.instance.valkey import EmbeddedValkey
from whispr.kit.mtls import LocalCA

RENEWAL_SECONDS = 60.0
SPARE_SECONDS = 2.0
ISSUER = AUDIENCE = "whispr"


class Progress(Protocol):
    """Tells the person at the terminal what happens."""

    def step(self, text: str) -> None:
        """Something that takes a moment begins."""

    def done(self, name: str, text: str) -> None:
        """A part is ready: one line."""

    def trouble(self, text: str) -> None:
        """Something went wrong that is being mended."""


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
        self.children: dict[str, Child] = {}
        self.ports: dict[str, int] = {}
        self._progress = progress
        self._gateway = gateway.choose(settings.gateway)
        self._command = command or (lambda service: [sys.executable, "-m", "whispr", "serve", service])
        # Another command than ours is not what the spare process could become.
        self._spare = None if command is not None else self._make_spare()
        self._postgres: EmbeddedPostgres | None = None
        self._valkey: EmbeddedValkey | None = None
        self._databases: dict[str, str] = {}
        self._readiness: Readiness | None = None
        self._authority: LocalCA | None = None
        self._started_at = datetime.now(UTC)
        self._stopping = False

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.settings.host in {"0.0.0.0", "::"} else self.settings.host  # noqa: S104
        return f"http://{host}:{self.settings.port}"

    # --- start and stop -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Brings everything up. Raises InstanceError; what was started is stopped by `stop`."""
        self.layout.make()
        self.layout.lock()
        await asyncio.to_thread(end_leftovers, self.layout.root, self.layout.read_record())
        self._claim_public_port()
        raise_file_limit()
        self._choose_ports()
        await asyncio.gather(self._start_postgres(), self._start_valkey())
        await self._prepare_databases()
        self._authority = await asyncio.to_thread(
            LocalCA, self.layout.authority, self.settings.trust_domain, self.settings.namespace
        )
        await asyncio.to_thread(self._renew_certificates)
        await self._start_services()
        await self._start_gateway()
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
                    chores.create_task(self._keep_spare()),
                ]
                await waiting
                for task in tasks:
                    task.cancel()
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Stops everything in the order that loses nothing: no new requests, then those that answer them, then data."""
        self._stopping = True
        if self._readiness is not None:
            self._readiness.draining = True
        if self.children:
            self._progress.step("stopping")
        if self._spare is not None:
            self._spare.stop()
        await self._stop_children("gateway")
        await self._stop_children(*(entry.name for entry in self.entries))
        await self._stop_children("valkey")
        await self._stop_children("postgres")
        if self._readiness is not None:
            await self._readiness.stop()
        if self._postgres is not None:
            self._postgres.stop()
        if self.children:
            self.layout.remove_record()
        self.layout.unlock()

    def destroy(self) -> None:
        """Removes all data of a stopped instance. For demonstrations and tests."""
        if self._postgres is not None:
            self._postgres.destroy()
        shutil.rmtree(self.layout.root, ignore_errors=True)

    async def _stop_children(self, *names: str) -> None:
        await asyncio.gather(*(self.children[name].stop() for name in names if name in self.children))

    # --- the parts ----------------------------------------------------------------------------------------------------

    def _claim_public_port(self) -> None:
        if not is_free(self.settings.port, self.settings.host) or answers(
            self.settings.host, self.settings.port
        ):
            raise PortInUse(
                f"Port {self.settings.port} is taken by another program. Choose another one with --port or WHISPR_PORT."
            )

    def _choose_ports(self) -> None:
        names = ["postgres", "valkey", "readiness"]
        for entry in self.entries:
            names += [f"{entry.name}.{door}" for door in ("http", "grpc", "internal", *entry.ports)]
        self.ports = self.layout.ports(names)

    async def _start_postgres(self) -> None:
        if self.settings.postgres_url is not None:
            self._progress.done("postgres", "external, from WHISPR_POSTGRES_URL")
            return
        server = EmbeddedPostgres(
            self.layout.postgres, port=self.ports["postgres"], password=self.layout.secret("postgres")
        )
        server.log = self.layout.log("postgres")
        self._postgres = server
        self._progress.step("preparing PostgreSQL")
        made = await asyncio.to_thread(server.prepare)
        child = self._supervise("postgres", server.spawn, stop_signal=signal.SIGINT, grace=30.0)
        await wait_until(child, server.accepting, self.settings.start_seconds, f"See {server.log}.")
        self._progress.done(
            "postgres", f"ready on 127.0.0.1:{server.port}" + (", new database" if made else "")
        )

    async def _start_valkey(self) -> None:
        if self.settings.valkey_url is not None:
            self._progress.done("valkey", "external, from WHISPR_VALKEY_URL")
            return
        server = EmbeddedValkey(
            self.layout.valkey, port=self.ports["valkey"], password=self.layout.secret("valkey")
        )
        server.log = self.layout.log("valkey")
        self._valkey = server
        child = self._supervise("valkey", server.spawn)
        # Once ready it is never asked again: the services see for themselves.
        await wait_until(child, server.accepting, self.settings.start_seconds, f"See {server.log}.")
        self._progress.done("valkey", f"ready on 127.0.0.1:{server.port}")

    async def _prepare_databases(self) -> None:
        """Makes and migrates the services' databases, in a process of its own."""
        self._progress.step("preparing databases")
        order = {
            "admin_url": self._admin_url,
            "exclusive": self._postgres is not None,
            "databases": [self._database(entry.name) for entry in self.entries],
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "whispr.instance.databases",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            if process.stdin is None or process.stdout is None or process.stderr is None:
                raise StartFailed("The databases' process has no pipes.")
            process.stdin.write(json.dumps(order).encode())
            process.stdin.close()
            complaints = asyncio.create_task(process.stderr.read())
            async for line in process.stdout:
                self._tell_database_step(json.loads(line))
            status = await process.wait()
            if status != 0:
                text = (await complaints).decode(errors="replace").strip()
                raise StartFailed(f"The databases could not be prepared:\n{text}")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def _tell_database_step(self, told: dict[str, Any]) -> None:
        if told["step"] == "migrating":
            self._progress.step(f"migrating the database of {told['service']}")

    @property
    def _admin_url(self) -> str:
        if self._postgres is not None:
            return self._postgres.url
        return self.settings.postgres_url or ""

    @property
    def _valkey_url(self) -> str:
        if self._valkey is not None:
            return self._valkey.url
        return self.settings.valkey_url or ""

    def _database(self, service: str) -> dict[str, Any]:
        name = f"whispr_{service}"
        given = os.environ.get(f"WHISPR_{service.upper()}_DATABASE_URL")
        if given is not None:
            self._databases[service] = given
            return {"service": service, "name": name, "role": name, "password": None, "url": given}
        password = self.layout.secret(f"database-{service}")
        self._databases[service] = url_of(self._admin_url, name, name, password)
        return {
            "service": service,
            "name": name,
            "role": name,
            "password": password,
            "url": self._databases[service],
        }

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

    async def _start_services(self) -> None:
        self._readiness = Readiness(
            {entry.name: self.ports[f"{entry.name}.internal"] for entry in self.entries}
        )
        await self._readiness.start(self.ports["readiness"])
        for entry in self.entries:
            self._supervise(entry.name, partial(self._spawn_service, entry), grace=self.settings.stop_seconds)
        self._progress.step("starting " + ", ".join(entry.name for entry in self.entries))
        await asyncio.gather(*(self._await_service(entry) for entry in self.entries))

    def _make_spare(self) -> Spare:
        environment = {**os.environ, MARK: str(self.layout.root), "PYTHONUNBUFFERED": "1"}
        return Spare([entry.name for entry in self.entries], environment, self.layout.log("spare"))

    async def _await_service(self, entry: Entry) -> None:
        log = self.layout.log(entry.name)
        if self._readiness is None:
            raise StartFailed("Readiness is not being watched.")
        try:
            await wait_until(
                self.children[entry.name],
                partial(self._readiness.is_ready, entry.name),
                self.settings.start_seconds,
                f"Its log is {log}; it ends with:",
            )
        except StartFailed as failure:
            raise StartFailed(f"{failure}\n{logs.last_words(log)}") from None
        child = self.children[entry.name]
        self._progress.done(
            entry.name, f"ready on 127.0.0.1:{self.ports[f'{entry.name}.http']}, pid {child.pid}"
        )

    def _spawn_service(self, entry: Entry) -> Process:
        environment, log = self._service_environment(entry), self.layout.log(entry.name)
        warm = self._spare.become(entry.name, environment, log) if self._spare is not None else None
        return warm or spawn(self._command(entry.name), env=environment, log=log)

    async def _keep_spare(self) -> None:
        """Keeps a warm process at hand, but leaves the processor to a service that is just starting."""
        if self._spare is None:
            return
        while True:
            await asyncio.sleep(SPARE_SECONDS)
            self._spare.warm()

    def _service_environment(self, entry: Entry) -> dict[str, str]:
        prefix = f"WHISPR_{entry.name.upper()}"
        # The administrator's password of PostgreSQL is no business of a service.
        inherited = {name: value for name, value in os.environ.items() if name != "WHISPR_POSTGRES_URL"}
        return {
            **entry.variables,
            **{name: str(self.layout.secrets / file) for name, file in entry.files.items()},
            **inherited,
            MARK: str(self.layout.root),
            "PYTHONUNBUFFERED": "1",
            "WHISPR_ENVIRONMENT": self.settings.environment,
            "WHISPR_RATE_LIMITS": self.settings.rate_limits,
            "WHISPR_VALKEY_URL": self._valkey_url,
            "WHISPR_IDENTITY_DIR": str(self.layout.identity(entry.name)),
            "WHISPR_TOKEN_ISSUER": ISSUER,
            "WHISPR_TOKEN_AUDIENCE": AUDIENCE,
            f"{prefix}_DATABASE_URL": self._databases[entry.name],
            **{
                f"WHISPR_{door.upper()}_BIND": self._bind(entry.name, door)
                for door in ("http", "grpc", "internal")
            },
            **{f"{prefix}_{door.upper()}_BIND": self._bind(entry.name, door) for door in entry.ports},
            **{
                f"WHISPR_{other.name.upper()}_ADDRESS": self._bind(other.name, "grpc")
                for other in self.entries
            },
        }

    def _bind(self, service: str, door: str) -> str:
        return f"127.0.0.1:{self.ports[f'{service}.{door}']}"

    async def _start_gateway(self) -> None:
        self._progress.step("opening the gateway")
        start = self._spawn_envoy if self._gateway == "envoy" else self._spawn_builtin
        child = self._supervise("gateway", start, grace=5.0)
        log = self.layout.log("gateway")
        readiness = self._readiness
        if readiness is None:
            raise StartFailed("Readiness is not being watched.")
        advice = f"Its log is {log}; it ends with:"
        try:
            await wait_until(
                child, lambda: readiness.reaches(f"{self.url}/readyz"), self.settings.start_seconds, advice
            )
        except StartFailed as failure:
            raise StartFailed(f"{failure}\n{logs.last_words(log)}") from None
        name = f"Envoy {gateway.envoy_version()}" if self._gateway == "envoy" else "built in"
        self._progress.done("gateway", f"{name}, pid {child.pid}")

    def _plan(self) -> gateway.Plan:
        doors = {
            (entry.name, door): self.ports[f"{entry.name}.{door}"]
            for entry in self.entries
            for door in ("http", *entry.ports)
        }
        return gateway.Plan(
            host=self.settings.host,
            port=self.settings.port,
            routes=tuple(route for entry in self.entries for route in entry.routes),
            addresses=doors,
            readiness=self.ports["readiness"],
            issuer=ISSUER,
            audience=AUDIENCE,
            rate_limits=self.settings.rate_limits == "on",
            requests_per_second=self.settings.gateway_requests_per_second,
            burst=self.settings.gateway_burst,
        )

    def _spawn_envoy(self) -> Process:
        path = self.layout.gateway / "envoy.json"
        write_private(path, envoy.render(self._plan()))
        binary = gateway.envoy_binary()
        if binary is None:
            raise InstanceError("Envoy is gone from the environment.")
        workers = str(min(4, os.cpu_count() or 1))
        options = ["--disable-hot-restart", "--log-level", "warning", "--concurrency", workers]
        return spawn(
            [binary, "-c", path, *options],
            env={**os.environ, MARK: str(self.layout.root)},
            log=self.layout.log("gateway"),
        )

    def _spawn_builtin(self) -> Process:
        return spawn(
            [sys.executable, "-m", "whispr.instance.gateway.builtin"],
            env={**os.environ, MARK: str(self.layout.root)},
            log=self.layout.log("gateway"),
            stdin=builtin.encode(self._plan()).encode(),
        )

    # --- run.json -----------------------------------------------------------------------------------------------------

    def _supervise(
        self,
        name: str,
        start: Callable[[], Process],
        *,
        stop_signal: int = signal.SIGTERM,
        grace: float = 15.0,
    ) -> Child:
        child = Child(
            name,
            start,
            changed=self._replaced,
            trouble=self._progress.trouble,
            stop_signal=stop_signal,
            grace=grace,
        )
        self.children[name] = child
        child.start()
        self._record()
        return child

    def _replaced(self) -> None:
        if self._readiness is not None:
            self._readiness.forget()
        self._record()

    def _record(self) -> None:
        """Writes run.json: also while starting, so that a killed start leaves word of what it had started."""
        if not self._stopping:
            self.layout.write_record(self.description())

    def description(self) -> dict[str, Any]:
        """What run.json holds."""
        return {
            "public": self.url,
            "version": whispr.__version__,
            "started_at": self._started_at.isoformat(timespec="seconds"),
            "pid": os.getpid(),
            "services": {entry.name: self._describe_service(entry) for entry in self.entries},
            "postgres": {"url": self._admin_url, "pid": self._pid("postgres")},
            "valkey": {"url": self._valkey_url, "pid": self._pid("valkey")},
            "gateway": {"kind": self._gateway, "pid": self._pid("gateway")},
        }

    def _describe_service(self, entry: Entry) -> dict[str, Any]:
        child = self.children.get(entry.name)
        return {
            "http": f"http://{self._bind(entry.name, 'http')}",
            "grpc": self._bind(entry.name, "grpc"),
            "internal": f"http://{self._bind(entry.name, 'internal')}",
            **{door: f"http://{self._bind(entry.name, door)}" for door in entry.ports},
            "pid": self._pid(entry.name),
            "restarts": 0 if child is None else child.restarts,
        }

    def _pid(self, name: str) -> int | None:
        child = self.children.get(name)
        return child.pid if child is not None else None


def url_of(admin_url: str, database: str, user: str, password: str) -> str:
    """The URL of `database` on the server of `admin_url`, as `user`. Options after `?` stay."""
    parts = urlsplit(admin_url)
    where = parts.netloc.rpartition("@")[2]
    netloc = f"{quote(user, safe='')}:{quote(password, safe='')}@{where}"
    return urlunsplit((parts.scheme, netloc, f"/{database}", parts.query, ""))


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
