"""The gateway where Envoy has no wheel: the same routes, bodies and retries, in one Python process.

It passes tokens on unread and limits nobody: the services check tokens and hold the exact limits themselves.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    TCPConnector,
    WSMsgType,
    web,
)
from multidict import CIMultiDict
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from whispr.instance.catalog import Route
from whispr.instance.gateway import METRICS_PATH, Plan
from whispr.instance.gateway.counts import Counts

# They belong to one connection, not to the message (RFC 9110, section 7.6.1).
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
REQUEST_ID = "x-request-id"
# The status of a request that became a socket.
SWITCHED = 101
# Escaped slashes and dot segments mean another path to a service than to us: they could lead past the routes.
AMBIGUOUS = re.compile(r"%2f|%5c|/\.{1,2}(?:/|$)|//", re.IGNORECASE)
FRAME_BYTES = 1024 * 1024
CHUNK_BYTES = 64 * 1024
# As in Envoy's configuration: enough tries to bridge the restart of a service.
TRIES = 12
PAUSE_SECONDS = 0.35


class Gateway:
    """Passes requests on as `plan` says."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._counts = Counts()
        self._session: ClientSession | None = None

    def application(self) -> web.Application:
        application = web.Application(client_max_size=0)
        application.router.add_route("*", "/{path:.*}", self.handle)
        application.cleanup_ctx.append(self._open_session)
        return application

    def administration(self) -> web.Application:
        """What the socket of the plan answers: what was counted."""
        application = web.Application()
        application.router.add_get(METRICS_PATH, self._tell_counts)
        return application

    async def _tell_counts(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._counts.exposition(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4}
        )

    async def _open_session(self, _: web.Application) -> AsyncIterator[None]:
        connector = TCPConnector(limit=0, keepalive_timeout=30)
        timeout = ClientTimeout(total=None, sock_connect=1.0)
        async with ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
            self._session = session
            yield

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers a request and counts it. A socket, which may stay for days, was counted when it opened."""
        route = find(self._plan.routes, request.path)
        began = time.monotonic()
        # What aiohttp answers to an error that nobody expected.
        status = 500
        try:
            response = await self._answer(request, route)
            status = response.status
            return response
        finally:
            if status != SWITCHED:
                service = "none" if route is None else route.service
                self._counts.answered(service, status, time.monotonic() - began)

    async def _answer(self, request: web.Request, route: Route | None) -> web.StreamResponse:
        request_id = request.headers.get(REQUEST_ID) or str(uuid.uuid4())
        try:
            response = await self._dispatch(request, request_id, route)
        except (ClientError, TimeoutError):
            response = problem(503, "unavailable", "The service is not available at the moment.", request_id)
        if not response.prepared:
            response.headers.setdefault(REQUEST_ID, request_id)
            response.headers["server"] = "whispr"
        return response

    async def _dispatch(
        self, request: web.Request, request_id: str, route: Route | None
    ) -> web.StreamResponse:
        if request.path == "/readyz":
            return await self._pass(request, request_id, self._plan.readiness, None)
        if AMBIGUOUS.search(request.raw_path.partition("?")[0]):
            return problem(400, "invalid_request", "The path is ambiguous.", request_id)
        if route is None:
            return problem(404, "not_found", "There is nothing at this address.", request_id)
        port = self._plan.addresses[route.service, route.door]
        if route.door == "socket":
            return await self._pass_socket(request, request_id, route.service, port)
        if route.max_body is not None and (request.content_length or 0) > route.max_body:
            return problem(413, "too_large", "The request is too large.", request_id)
        async with asyncio.timeout(route.timeout):
            return await self._pass(request, request_id, port, route.max_body)

    async def _pass(
        self, request: web.Request, request_id: str, port: int, max_body: int | None
    ) -> web.StreamResponse:
        headers = forwarded_headers(request, request_id)
        url = f"http://127.0.0.1:{port}{request.raw_path}"
        # A body is read once: where the first try never reached the service, the next one needs it again.
        body: Any = (
            request.content if request.can_read_body and max_body is None else await _read(request, max_body)
        )
        if body is TOO_LARGE:
            return problem(413, "too_large", "The request is too large.", request_id)
        for attempt in range(TRIES):
            try:
                async with self._client.request(
                    request.method, url, headers=headers, data=body, allow_redirects=False
                ) as answer:
                    return await _relay(request, request_id, answer)
            except ClientConnectorError:
                if attempt == TRIES - 1 or body is request.content:
                    raise
                await asyncio.sleep(PAUSE_SECONDS)
        raise AssertionError("the last try returns or raises")

    async def _pass_socket(
        self, request: web.Request, request_id: str, service: str, port: int
    ) -> web.StreamResponse:
        upgrade = web.WebSocketResponse(
            autoping=False, autoclose=False, max_msg_size=FRAME_BYTES, protocols=_protocols(request)
        )
        if not upgrade.can_prepare(request):
            return await self._pass(request, request_id, port, CHUNK_BYTES)
        headers = forwarded_headers(request, request_id)
        for name in [name for name in headers if name.lower().startswith("sec-websocket-")]:
            headers.popall(name, None)
        async with self._client.ws_connect(
            f"http://127.0.0.1:{port}{request.raw_path}",
            headers=headers,
            protocols=_protocols(request),
            autoping=False,
            autoclose=False,
            max_msg_size=FRAME_BYTES,
        ) as onward:
            await upgrade.prepare(request)
            with self._counts.open_socket(service):
                pumps = {
                    asyncio.create_task(_pump(upgrade, onward)),
                    asyncio.create_task(_pump(onward, upgrade)),
                }
                _, waiting = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
        return upgrade

    @property
    def _client(self) -> ClientSession:
        if self._session is None:
            raise RuntimeError("The gateway has not been started.")
        return self._session


TOO_LARGE = object()


async def _read(request: web.Request, limit: int | None) -> Any:
    """The whole body; TOO_LARGE as soon as it passes `limit` bytes."""
    parts, size = [], 0
    async for part in request.content.iter_chunked(CHUNK_BYTES):
        size += len(part)
        if limit is not None and size > limit:
            return TOO_LARGE
        parts.append(part)
    return b"".join(parts) or None


async def _relay(request: web.Request, request_id: str, answer: ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status)
    for name, value in answer.headers.items():
        if name.lower() not in HOP_BY_HOP:
            response.headers.add(name, value)
    response.headers.setdefault(REQUEST_ID, request_id)
    response.headers["server"] = "whispr"
    await response.prepare(request)
    async for part in answer.content.iter_chunked(CHUNK_BYTES):
        await response.write(part)
    await response.write_eof()
    return response


async def _pump(source: Any, target: Any) -> None:
    """Passes frames on until `source` closes, then closes `target` with the same code."""
    async for message in source:
        if message.type is WSMsgType.TEXT:
            await target.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            await target.send_bytes(message.data)
        elif message.type is WSMsgType.PING:
            await target.ping(message.data)
        elif message.type is WSMsgType.PONG:
            await target.pong(message.data)
    with contextlib.suppress(ConnectionError):
        await target.close(code=source.close_code or 1001)


def forwarded_headers(request: web.Request, request_id: str) -> "CIMultiDict[str]":
    """The client's headers with the request id and, last in `X-Forwarded-For`, the address we saw."""
    named = {name.strip().lower() for name in request.headers.get("connection", "").split(",")}
    headers = CIMultiDict(
        (name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP | named
    )
    headers[REQUEST_ID] = request_id
    chain = [part for part in (request.headers.get("x-forwarded-for"), request.remote) if part]
    headers["x-forwarded-for"] = ", ".join(chain)
    headers["x-forwarded-proto"] = "http"
    return headers


def find(routes: tuple[Route, ...], path: str) -> Route | None:
    """The first route that `path` belongs to."""
    for route in routes:
        if path == route.prefix or (not route.exact and path.startswith(f"{route.prefix}/")):
            return route
    return None


def problem(status: int, code: str, detail: str, request_id: str) -> web.Response:
    """An answer of the gateway itself, in the form of the services' own."""
    document = {
        "type": "about:blank",
        "title": {400: "Bad Request", 404: "Not Found", 413: "Content Too Large", 503: "Service Unavailable"}[
            status
        ],
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": request_id,
    }
    headers = {"access-control-allow-origin": "*", **({"retry-after": "1"} if status == 503 else {})}
    return web.Response(
        status=status,
        body=json.dumps(document).encode(),
        content_type="application/problem+json",
        headers=headers,
    )


def _protocols(request: web.Request) -> list[str]:
    offered = request.headers.get("sec-websocket-protocol", "")
    return [part.strip() for part in offered.split(",") if part.strip()]


def decode(text: str) -> Plan:
    """The plan that `encode` wrote."""
    raw = json.loads(text)
    raw["routes"] = tuple(Route(**route) for route in raw["routes"])
    raw["addresses"] = {(service, door): port for service, door, port in raw["addresses"]}
    return Plan(**raw)


def encode(plan: Plan) -> str:
    """The plan as a file for the gateway's process."""
    fields = {name: getattr(plan, name) for name in plan.__slots__}
    fields["routes"] = [{name: getattr(route, name) for name in route.__slots__} for route in plan.routes]
    fields["addresses"] = [[service, door, port] for (service, door), port in plan.addresses.items()]
    return json.dumps(fields, indent=1)


async def serve(plan: Plan) -> None:
    """Serves the public port, and the socket of `plan.admin` to its owner, until SIGTERM."""
    gateway = Gateway(plan)
    runners = [await _prepare(gateway.administration()), await _prepare(gateway.application())]
    with _files_of_ours_alone():
        await web.UnixSite(runners[0], plan.admin).start()
    await web.TCPSite(runners[1], plan.host, plan.port).start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await asyncio.gather(*(runner.cleanup() for runner in runners))


async def _prepare(application: web.Application) -> web.AppRunner:
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    return runner


@contextlib.contextmanager
def _files_of_ours_alone() -> Iterator[None]:
    """What is made meanwhile has mode 0600 from its first moment on, which a later chmod could not say."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def main() -> None:
    import uvloop

    plan = decode(sys.stdin.read())
    uvloop.run(serve(plan))


if __name__ == "__main__":
    main()
