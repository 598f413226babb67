"""Hosts one service: its doors, its loops, its health, and an orderly start and stop.

A service's `app.py` offers `async def build(context: Context) -> Service`. `run` is what `whispr serve SERVICE` calls;
`Running` starts the same thing inside a test's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgspec
import uvicorn
import uvloop
from grpc_reflection.v1alpha import reflection

from whispr.kit import policy, telemetry
from whispr.kit.cache import Cache, RateLimiter
from whispr.kit.clock import Clock, SystemClock
from whispr.kit.db import Database
from whispr.kit.errors import Failure
from whispr.kit.grpc import Channel, create_server, listen
from whispr.kit.health import Health
from whispr.kit.identity import Identity, IdentitySource
from whispr.kit.live import Live
from whispr.kit.mtls import WorkloadIdentity
from whispr.kit.pressure import Pressure
from whispr.kit.settings import CommonSettings, SettingsError, load, split_bind
from whispr.kit.supervisor import Supervisor

log = telemetry.get_logger(__name__)

EXIT_SETTINGS = 78
EXIT_GAVE_UP = 70

Step = Callable[[], Awaitable[object]]


@dataclass(slots=True)
class Service:
    """What `build` hands over.

    `rpc` registers servicers; `loops` are supervised; `checks` decide readiness; `on_start` runs before the doors open,
    `on_drain` once no new work is wanted, and `on_stop` when the doors are closed, last one first. `ports` names extra
    listeners (filled by `on_start`).
    """

    name: str
    http: Any = None
    rpc: list[Callable[[grpc.aio.Server], None]] = field(default_factory=list)
    loops: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    checks: dict[str, Step] = field(default_factory=dict)
    on_start: list[Step] = field(default_factory=list)
    on_drain: list[Step] = field(default_factory=list)
    on_stop: list[Step] = field(default_factory=list)
    ports: dict[str, int] = field(default_factory=dict)


class Context:
    """What a service is built from. Everything it makes is opened, checked and closed with the process."""

    def __init__(self, name: str, common: CommonSettings, clock: Clock | None = None) -> None:
        self.name = name
        self.common = common
        self.clock: Clock = clock or SystemClock()
        self.workload = (
            None if common.mesh or common.identity_dir is None else WorkloadIdentity(common.identity_dir)
        )
        self.cache = Cache(common.valkey_url)
        self.pressure = Pressure()
        self.live = Live(common.live_settings, name)
        if common.live_settings is not None:
            self.live.on_change(lambda: telemetry.set_level(self.live.value("log_level", common.log_level)))
        self.limiter = RateLimiter(self.cache, enabled=common.rate_limits == "on")
        self.databases: dict[str, Database] = {}
        self.identities: list[Identity] = []
        self._channels: dict[str, Channel] = {}

    def database(self, url: str) -> Database:
        """The service's database; opened before `on_start`, part of readiness."""
        if url not in self.databases:
            self.databases[url] = Database(
                url, pool_size=self.common.database_pool_size, application_name=f"whispr-{self.name}"
            )
        return self.databases[url]

    def channel(self, service: str) -> Channel | None:
        """The way to a neighbour; None where it does not run."""
        address = self.common.address(service)
        if address is None:
            return None
        if service not in self._channels:
            self._channels[service] = Channel(address, service, self.workload)
        return self._channels[service]

    def neighbour(self, service: str) -> Channel:
        """The way to a neighbour this service cannot do without. Raises `SettingsError` where it is not configured."""
        channel = self.channel(service)
        if channel is None:
            raise SettingsError(f"WHISPR_{service.upper()}_ADDRESS: {self.name} needs the {service} service")
        return channel

    def identity(self, source: IdentitySource) -> Identity:
        """The verifier of people's tokens, started before the doors open."""
        identity = Identity(
            source,
            self.cache,
            self.clock,
            issuer=self.common.token_issuer,
            audience=self.common.token_audience,
        )
        self.identities.append(identity)
        return identity

    async def close(self) -> None:
        """Close everything this context made."""
        for channel in self._channels.values():
            await channel.close()
        for database in self.databases.values():
            await database.close()
        await self.cache.close()


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # The process decides when to stop; uvicorn's own handlers would race its drain.
        yield


class _HttpDoor:
    def __init__(self, app: Any, bind: str, shutdown_seconds: float, *, share: bool = False) -> None:
        host, port = split_bind(bind)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind((host, port))
        self.port: int = self._socket.getsockname()[1]
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                interface="asgi3",
                lifespan="off",
                http="httptools",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=1024,
                # Longer than the gateway's, or it would send a request on a connection that is just being closed.
                timeout_keep_alive=120,
                timeout_graceful_shutdown=max(1, int(shutdown_seconds)),
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise RuntimeError("the HTTP server stopped while starting")
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._socket.close()


class Running:
    """A started service. `http_port`, `grpc_port`, `internal_port` and `ports` are where it listens."""

    def __init__(self, service: Service, context: Context) -> None:
        self.service = service
        self.context = context
        self.supervisor = Supervisor()
        # Without Valkey everything goes on, more slowly; taking every process out of service for it would stop it all.
        # The internal port answers from the first moment on, and the doors that work comes through open last.
        self.health = Health(
            {**self._own_checks(), **service.checks}, advisory=("cache", "live_settings"), starting=True
        )
        self.http_port: int | None = None
        self.grpc_port: int | None = None
        self.internal_port: int | None = None
        self.own_http_port: int | None = None
        self._http: list[_HttpDoor] = []
        self._internal: _HttpDoor | None = None
        self._grpc: grpc.aio.Server | None = None
        self._stopped = False

    @property
    def ports(self) -> dict[str, int]:
        """Every port by name."""
        named = {
            "http": self.http_port,
            "grpc": self.grpc_port,
            "internal": self.internal_port,
            "own_http": self.own_http_port,
        }
        return {**{name: port for name, port in named.items() if port is not None}, **self.service.ports}

    @classmethod
    async def start(cls, build: Callable[[Context], Awaitable[Service]], context: Context) -> Running:
        """Build and start a service. On failure everything begun is stopped before the error is raised."""
        for_closing = context
        try:
            service = await build(context)
        except BaseException:
            await for_closing.close()
            raise
        running = cls(service, context)
        try:
            await running._start()
        except BaseException:
            await running.stop()
            raise
        return running

    def _own_checks(self) -> dict[str, Step]:
        checks: dict[str, Step] = {"cache": self.context.cache.ready}
        if self.context.common.live_settings is not None:
            checks["live_settings"] = self.context.live.ready
        if self.context.databases:
            (database, *others) = self.context.databases.values()
            assert not others, "a service owns one database"
            checks["database"] = database.ready
        for identity in self.context.identities:
            checks["identity"] = identity.ready
        if self.context.workload is not None:
            checks["certificate"] = self.context.workload.ready
        return checks

    async def _start(self) -> None:
        common = self.context.common
        for database in self.context.databases.values():
            await database.open()
        self._internal = _HttpDoor(self.health.asgi(), common.internal_bind, 1)
        self.internal_port = self._internal.port
        await self._internal.start()
        self.supervisor.add("cache", self.context.cache.run)
        self.supervisor.add("health", self.health.run)
        self.supervisor.add("live", self.context.live.run)
        self.supervisor.add("pressure", self.context.pressure.run)
        if self.context.workload is not None:
            self.supervisor.add("certificate", self.context.workload.run)
        for identity in self.context.identities:
            self.supervisor.add("identity", identity.run)
        for name, factory in self.service.loops.items():
            self.supervisor.add(name, factory)
        await self._start_grpc(common)
        for identity in self.context.identities:
            await identity.start()
        for step in self.service.on_start:
            await step()
        self.supervisor.start()
        if self.service.http is not None:
            self.http_port = await self._open_http(common.http_bind, share=common.share_ports)
            if common.own_http_bind is not None:
                self.own_http_port = await self._open_http(common.own_http_bind, share=False)
        self.health.started()
        log.info("service_started", ports=self.ports)

    async def _open_http(self, bind: str, *, share: bool) -> int:
        door = _HttpDoor(self.service.http, bind, self.context.common.shutdown_seconds, share=share)
        self._http.append(door)
        await door.start()
        return door.port

    async def _start_grpc(self, common: CommonSettings) -> None:
        self._grpc = create_server(common, self.context.workload)
        await self.health.register(self._grpc)
        for register in self.service.rpc:
            register(self._grpc)
        if common.environment == "development":
            reflection.enable_server_reflection(_rpc_services(self.service.name), self._grpc)
        self.grpc_port = listen(self._grpc, common.grpc_bind, self.context.workload)
        await self._grpc.start()

    async def stop(self) -> None:
        """Drain and stop: refuse new work, finish what is begun, close. Safe to call twice."""
        if self._stopped:
            return
        self._stopped = True
        await self.health.drain()
        for step in self.service.on_drain:
            await self._quietly(step)
        await asyncio.gather(*(self._quietly(door.stop) for door in self._http))
        if self._grpc is not None:
            grace = min(5.0, self.context.common.shutdown_seconds)
            await self._quietly(lambda: self._grpc.stop(grace) if self._grpc else asyncio.sleep(0))
        for step in reversed(self.service.on_stop):
            await self._quietly(step)
        await self.supervisor.stop()
        if self._internal is not None:
            await self._quietly(self._internal.stop)
        await self.context.close()
        log.info("service_stopped")

    async def _quietly(self, step: Step) -> None:
        try:
            await asyncio.wait_for(_awaited(step), self.context.common.shutdown_seconds + 2)
        except Exception:
            # The rest must still be closed: a half-stopped process would keep its ports and its peers waiting.
            log.exception("stop_step_failed")


def _rpc_services(service: str) -> list[str]:
    served = {method.split("/")[1] for method in policy.CALLS}
    own = {name for name in served if name.split(".")[0] in (service, "kit")}
    return [reflection.SERVICE_NAME, *sorted(own)]


async def _awaited(step: Step) -> None:
    await step()


def run(name: str, build: Callable[[Context], Awaitable[Service]]) -> int:
    """Run a service until SIGTERM or SIGINT; the process's exit status.

    Writes `{"http": …, "grpc": …, "internal": …, …}` as one line of JSON to `WHISPR_PORTS_FILE` when it is started.
    """
    try:
        common = load(CommonSettings)
    except SettingsError as error:
        sys.stderr.write(f"whispr serve {name}: {error}\n")
        return EXIT_SETTINGS
    telemetry.configure(name, common)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(name, build, common))
    except SettingsError as error:
        sys.stderr.write(f"whispr serve {name}: {error}\n")
        return EXIT_SETTINGS
    except Failure as failure:
        sys.stderr.write(f"whispr serve {name}: {failure.detail} ({failure.code})\n")
        return EXIT_GAVE_UP
    finally:
        telemetry.shutdown()


async def _serve(name: str, build: Callable[[Context], Awaitable[Service]], common: CommonSettings) -> int:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    starting = asyncio.create_task(Running.start(build, Context(name, common)))
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return 0
    running = starting.result()
    _announce(running.ports)
    # What was made while starting lives for ever; leaving it out keeps collections short under load.
    gc.collect()
    gc.freeze()
    # What is under way together at load are some thousand objects, all freed by their last reference. At the usual 700 each
    # few messages would have the collector walk through them, and each few seconds through all that the process holds.
    gc.set_threshold(20_000, 20, 20)
    gave_up = asyncio.create_task(running.supervisor.gave_up())
    await asyncio.wait({gave_up, stopped}, return_when=asyncio.FIRST_COMPLETED)
    failed = gave_up.done()
    if failed:
        log.error("service_gave_up", reason=str(gave_up.result()))
    gave_up.cancel()
    stopped.cancel()
    await running.stop()
    return EXIT_GAVE_UP if failed else 0


def _announce(ports: dict[str, int]) -> None:
    target = os.environ.get("WHISPR_PORTS_FILE")
    if not target:
        return
    path = Path(target)
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(msgspec.json.encode(ports) + b"\n")
    temporary.replace(path)
