"""Is this process alive, and may it be sent work? Answered on an internal port and over grpc.health.v1.

`/livez` touches nothing: a process that answers at all is alive, and restarting it because PostgreSQL is away would
only add a cold start to the trouble. `/readyz` asks what the service cannot do without. `/metrics` is Prometheus'.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import grpc.aio
import msgspec
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc

from whispr.kit.errors import Failure
from whispr.kit.telemetry import get_logger, metrics

Check = Callable[[], Awaitable[object]]
"""Returns if what it asks for is there; raises or returns False if not."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Asgi = Callable[
    [Scope, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """`error` is a stable code or the exception's type, None when the check passed; `seconds` is how long it took."""

    error: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """The state of a process as of the last round of checks."""

    ready: bool
    draining: bool
    checks: Mapping[str, CheckResult]


class Health:
    """Runs the checks of readiness, at most one round at a time and at most once in `cache_seconds`.

    A check that takes longer than `timeout` seconds has failed. `grpc_services` are the full names of the gRPC services
    whose health follows this process' readiness. Checks named in `advisory` are shown and do not decide.
    With `starting` the process is unready until `started` is called.
    """

    def __init__(
        self,
        checks: Mapping[str, Check],
        cache_seconds: float = 1.0,
        timeout: float = 2.0,
        grpc_services: Iterable[str] = (),
        advisory: Iterable[str] = (),
        starting: bool = False,
    ) -> None:
        self._starting = starting
        self._checks = dict(checks)
        self._advisory = frozenset(advisory)
        self._cache_seconds = cache_seconds
        self._timeout = timeout
        self._draining = False
        self._results: dict[str, CheckResult] = {}
        self._checked_at = float("-inf")
        self._round = asyncio.Lock()
        self._servicer = grpc_health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._grpc_names = ("", "readiness", *grpc_services)

    @property
    def draining(self) -> bool:
        """True once `drain` was called: this process takes no new work."""
        return self._draining

    async def drain(self) -> None:
        """Be unready from now on, so that work goes elsewhere while this process finishes what it has."""
        self._draining = True
        for name in self._grpc_names:
            await self._servicer.set(name, _NOT_SERVING)

    def started(self) -> None:
        """The doors are open: readiness is now a matter of the checks."""
        self._starting = False

    async def report(self) -> Report:
        """The present state, from the last round if that is recent enough."""
        async with self._round:
            # One lock, so that many probes at once make one round: a struggling database must not be asked by each.
            if time.monotonic() - self._checked_at >= self._cache_seconds:
                names = list(self._checks)
                results = await asyncio.gather(*(self._run(name) for name in names))
                self._results = dict(zip(names, results, strict=True))
                self._checked_at = time.monotonic()
        passed = all(
            result.error is None for name, result in self._results.items() if name not in self._advisory
        )
        ready = passed and not self._draining and not self._starting
        return Report(ready, self._draining, self._results)

    async def _run(self, name: str) -> CheckResult:
        started = time.monotonic()
        error: str | None = None
        try:
            async with asyncio.timeout(self._timeout):
                if await self._checks[name]() is False:
                    error = "not_ready"
        except TimeoutError:
            error = "timeout"
        except Failure as failure:
            error = failure.code
        except Exception as unexpected:  # noqa: BLE001 (a check may fail in any way; all of them mean "not ready")
            # Its text may hold an address or a password; the type is what an operator needs first.
            error = type(unexpected).__name__
        seconds = time.monotonic() - started
        metrics.readiness.labels(name).set(error is None)
        metrics.readiness_seconds.labels(name).observe(seconds)
        previous = self._results.get(name)
        if error is not None and (previous is None or previous.error != error):
            log.warning("check failed", check=name, error=error)
        elif error is None and previous is not None and previous.error is not None:
            log.info("check passed again", check=name)
        return CheckResult(error, seconds)

    async def register(self, server: grpc.aio.Server) -> None:
        """Serve grpc.health.v1 on `server`.

        "", "readiness" and the services' names follow the checks (once `run` runs), "liveness" is always up.
        """
        for name in self._grpc_names:
            # The library starts with "" serving, and a mesh would send work before the first round of checks.
            await self._servicer.set(name, _NOT_SERVING)
        await self._servicer.set("liveness", _SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def run(self, interval: float = 1.0) -> None:
        """A supervised loop that keeps grpc.health.v1 in step with the checks."""
        while True:
            report = await self.report()
            for name in self._grpc_names:
                await self._servicer.set(name, _SERVING if report.ready else _NOT_SERVING)
            await asyncio.sleep(interval)

    def asgi(self) -> Asgi:
        """The internal port's application: `/livez`, `/readyz`, `/metrics`."""
        return self._serve

    async def _serve(
        self,
        scope: Scope,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        status, content_type, body = await self._answer(scope["method"], scope["path"])
        headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
        if status == 405:
            headers.append((b"allow", b"GET, HEAD"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, method: str, path: str) -> tuple[int, bytes, bytes]:
        if path not in ("/livez", "/readyz", "/metrics"):
            return _problem(404, "not_found", "There is no such thing.")
        if method not in ("GET", "HEAD"):
            return _problem(405, "method_not_allowed", "This method is not allowed here.")
        if path == "/livez":
            return 200, b"application/json", b'{"status":"ok"}'
        if path == "/metrics":
            return 200, metrics.CONTENT_TYPE.encode(), metrics.exposition()
        report = await self.report()
        body = {
            "status": "ok" if report.ready else "draining" if report.draining else "unavailable",
            "checks": {
                name: {"status": "ok", "ms": round(result.seconds * 1000, 1)}
                if result.error is None
                else {"status": "failed", "error": result.error, "ms": round(result.seconds * 1000, 1)}
                for name, result in report.checks.items()
            },
        }
        return 200 if report.ready else 503, b"application/json", msgspec.json.encode(body)


def _problem(status: int, code: str, detail: str) -> tuple[int, bytes, bytes]:
    problem = {
        "type": "about:blank",
        "title": detail.rstrip("."),
        "status": status,
        "detail": detail,
        "code": code,
    }
    return status, b"application/problem+json", msgspec.json.encode(problem)


async def _lifespan(
    receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
