"""gRPC between services: who may call, failures that keep their code, deadlines, retries and circuit breakers.

Both ends live here. A server made by `create_server` refuses unknown callers and methods, renders failures as a
status with `whispr-code` and `whispr-fields` in trailing metadata, and never shows the text of an unexpected
exception. A `Channel` gives every call a deadline, retries idempotent ones while the neighbour restarts, and stops
calling one that does not answer.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, cast

import grpc
import msgspec
from google.protobuf.message import Message

from whispr.kit import policy
from whispr.kit.errors import Failure, Internal, Kind, Unavailable, from_wire
from whispr.kit.mtls import WorkloadIdentity, peer_service, spiffe_from_xfcc, spiffe_service
from whispr.kit.settings import CommonSettings
from whispr.kit.telemetry import (
    bind_request,
    client_span,
    get_logger,
    grpc_carrier,
    grpc_metadata,
    metrics,
    request_id,
    server_span,
)

log = get_logger(__name__)

CODE = "whispr-code"
KIND = "whispr-kind"
FIELDS = "whispr-fields-bin"
RETRY_AFTER = "whispr-retry-after"

MAX_MESSAGE = 8 * 1024 * 1024
MAX_DEADLINE = 60.0

_STATUS: dict[Kind, grpc.StatusCode] = {
    Kind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Kind.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Kind.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    Kind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Kind.CONFLICT: grpc.StatusCode.FAILED_PRECONDITION,
    Kind.TOO_LARGE: grpc.StatusCode.OUT_OF_RANGE,
    Kind.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Kind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Kind.INTERNAL: grpc.StatusCode.INTERNAL,
}

# The policy refuses without a code, as do methods that the other side does not have: a mistake in what is deployed.
_REFUSED = frozenset(
    {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}
)

_caller: ContextVar[str] = ContextVar("whispr_caller_service")

RequestT_contra = TypeVar("RequestT_contra", bound=Message, contravariant=True)
ResponseT_co = TypeVar("ResponseT_co", bound=Message, covariant=True)


class NeighbourUnavailable(Unavailable):
    """A service this depends on is not available. Try again."""

    code = "neighbour_unavailable"

    def __init__(self, service: str) -> None:
        super().__init__(retry_after=1, service=service)


def caller_service() -> str:
    """The service whose call is being served, as its certificate says."""
    return _caller.get()


# --- serving ---------------------------------------------------------------------------------------------------------


def create_server(settings: CommonSettings, identity: WorkloadIdentity | None) -> grpc.aio.Server:
    """A server whose every method is authorised, bounded by a deadline and rendered. Not yet listening."""
    return grpc.aio.server(
        interceptors=[_Door(settings)],
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_send_message_length", MAX_MESSAGE),
            # Two processes must not share a port by accident: the second would steal calls of the first.
            ("grpc.so_reuseport", int(settings.share_ports)),
        ],
    )


def listen(server: grpc.aio.Server, bind: str, identity: WorkloadIdentity | None) -> int:
    """Bind `server`, with mutual TLS unless a mesh's sidecar terminates it; the port."""
    if identity is None:
        return server.add_insecure_port(bind)
    return server.add_secure_port(bind, identity.server_credentials())


class _Door(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stub only
    def __init__(self, settings: CommonSettings) -> None:
        self._settings = settings

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        method = details.method
        known = policy.known(method)
        handler: grpc.RpcMethodHandler[Any, Any] | None = await continuation(details)
        if not known or handler is None or handler.unary_unary is None:
            if known and handler is not None:
                # grpc.health.v1 Watch streams; it carries nothing and is open to every service.
                return handler
            return grpc.unary_unary_rpc_method_handler(_refuse_unknown)
        inner = handler.unary_unary

        async def serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            return await self._serve(method, inner, request, context)

        return grpc.unary_unary_rpc_method_handler(
            serve,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    async def _serve(
        self,
        method: str,
        inner: Callable[[Any, Any], Awaitable[Any]],
        request: Any,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> Any:
        metadata = list(context.invocation_metadata() or ())
        caller = self._identify(context, metadata)
        started = asyncio.get_running_loop().time()
        status = "ok"
        try:
            with server_span(method, grpc_carrier(metadata), caller=caller or "unknown"):
                if caller is None or not policy.allowed(method, caller):
                    status = "refused"
                    log.warning("grpc_call_refused", method=method, caller=caller or "unknown")
                    await context.abort(
                        grpc.StatusCode.PERMISSION_DENIED, "This service may not call this method."
                    )
                _caller.set(caller)
                bind_request(request_id=_text(metadata, "x-request-id"), caller=caller)
                remaining: float | None = context.time_remaining()  # None where the caller set no deadline
                timeout = min(remaining or MAX_DEADLINE, MAX_DEADLINE)
                return await asyncio.wait_for(inner(request, context), timeout)
        except Failure as failure:
            status = failure.kind.value
            await _abort(context, failure)
        except TimeoutError:
            status = "deadline"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "The deadline passed.")
        except grpc.aio.AbortError:
            raise
        except Exception:
            status = "internal"
            log.exception("grpc_call_crashed", method=method)
            await _abort(context, Internal())
        finally:
            metrics.grpc_server_calls.labels(method=method, caller=caller or "unknown", status=status).inc()
            metrics.grpc_server_call_seconds.labels(method=method).observe(
                asyncio.get_running_loop().time() - started
            )

    def _identify(
        self, context: grpc.aio.ServicerContext[Any, Any], metadata: Sequence[tuple[str, str | bytes]]
    ) -> str | None:
        settings = self._settings
        if not settings.mesh:
            return peer_service(context.auth_context(), settings.trust_domain, settings.namespace)
        header = _text(metadata, "x-forwarded-client-cert")
        uri = spiffe_from_xfcc(header) if header else None
        return spiffe_service(uri, settings.trust_domain, settings.namespace) if uri else None


async def _refuse_unknown(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    await context.abort(grpc.StatusCode.PERMISSION_DENIED, "This service may not call this method.")


async def _abort(context: grpc.aio.ServicerContext[Any, Any], failure: Failure) -> None:
    trailers: list[tuple[str, str | bytes]] = [(CODE, failure.code), (KIND, failure.kind.value)]
    if failure.fields:
        trailers.append((FIELDS, msgspec.json.encode(failure.fields)))
    if failure.retry_after is not None:
        trailers.append((RETRY_AFTER, str(failure.retry_after)))
    detail = failure.detail if failure.kind is not Kind.INTERNAL else "Internal error."
    await context.abort(_STATUS[failure.kind], detail, tuple(trailers))


def _text(metadata: Sequence[tuple[str, str | bytes]], name: str) -> str | None:
    return next((value for key, value in metadata if key == name and isinstance(value, str)), None)


# --- calling ---------------------------------------------------------------------------------------------------------


class UnaryMethod(Protocol[RequestT_contra, ResponseT_co]):
    """A stub's method."""

    def __call__(
        self, request: RequestT_contra, *, timeout: float | None = ..., metadata: Any = ...
    ) -> Awaitable[ResponseT_co]: ...


class Channel:
    """The way to one neighbour.

    `grpc` is what generated stubs are made from; it follows the certificate's rotation. `call` is how a client calls.
    """

    ATTEMPTS = 5
    TRIP_AFTER = 8
    OPEN_SECONDS = 2.0

    def __init__(self, address: str, service: str, identity: WorkloadIdentity | None) -> None:
        self._address = address
        self._service = service
        self._identity = identity
        self._version: object = None
        self._channel: grpc.aio.Channel | None = None
        self._retired: list[asyncio.Task[None]] = []
        self._failures = 0
        self._open_until = 0.0
        self.grpc = cast(grpc.aio.Channel, _Following(self))

    @property
    def service(self) -> str:
        """The neighbour's name."""
        return self._service

    async def close(self) -> None:
        """Close the connections."""
        for task in self._retired:
            task.cancel()
        await asyncio.gather(*self._retired, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close(0)
            self._channel = None

    async def ready(self) -> None:
        """Raise `NeighbourUnavailable` unless the neighbour accepts a connection now."""
        try:
            await asyncio.wait_for(self.current().channel_ready(), 1.0)
        except TimeoutError as error:
            raise NeighbourUnavailable(self._service) from error

    def current(self) -> grpc.aio.Channel:
        """The connection with the present certificate; an older one is let finish its calls."""
        version = self._identity.version if self._identity else 0
        if self._channel is None or version != self._version:
            if self._channel is not None:
                self._retired = [task for task in self._retired if not task.done()]
                self._retired.append(asyncio.create_task(self._channel.close(30)))
            self._version = version
            self._channel = self._connect()
        return self._channel

    def _connect(self) -> grpc.aio.Channel:
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_send_message_length", MAX_MESSAGE),
            # A neighbour that restarts is back within two seconds; the default backoff would look away for minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            # Shorter than the tries of a call together last, or a call could fail on a neighbour that is back already.
            ("grpc.max_reconnect_backoff_ms", 500),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.enable_retries", 0),
        ]
        if self._identity is None:
            return grpc.aio.insecure_channel(self._address, options=options)
        options.append(("grpc.ssl_target_name_override", f"{self._service}-service"))
        return grpc.aio.secure_channel(self._address, self._identity.channel_credentials(), options=options)

    async def call(
        self,
        method: UnaryMethod[RequestT_contra, ResponseT_co],
        request: RequestT_contra,
        *,
        timeout: float = 2.0,
        idempotent: bool = False,
    ) -> ResponseT_co:
        """Call `method` of a stub made from `grpc`, within `timeout` seconds over all tries.

        Raises the `Failure` that the neighbour raised, with its kind and code, or `NeighbourUnavailable`. Only
        `idempotent` calls are tried again; every write carries a key that makes it so.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        name = _method_name(method)
        if loop.time() < self._open_until:
            raise NeighbourUnavailable(self._service)
        attempt = 0
        with client_span(name, target=self._service):
            while True:
                attempt += 1
                try:
                    response = await method(
                        request, timeout=max(0.05, deadline - loop.time()), metadata=self._metadata()
                    )
                except grpc.aio.AioRpcError as error:
                    failure = self._read_failure(error)
                    metrics.grpc_client_calls.labels(method=name, status=error.code().name.lower()).inc()
                    delay = random.uniform(0.05, 0.1) * 2 ** (attempt - 1)
                    last = attempt >= self.ATTEMPTS or loop.time() + delay >= deadline
                    if not isinstance(failure, Unavailable) or not idempotent or last:
                        raise failure from error
                    metrics.grpc_client_retries.labels(method=name).inc()
                    await asyncio.sleep(delay)
                else:
                    self._failures = 0
                    metrics.grpc_client_circuit_open.labels(target=self._service).set(0)
                    metrics.grpc_client_calls.labels(method=name, status="ok").inc()
                    metrics.grpc_client_call_seconds.labels(method=name).observe(
                        timeout - (deadline - loop.time())
                    )
                    return response

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        current = request_id()
        return (*grpc_metadata(), ("x-request-id", current)) if current else grpc_metadata()

    def _read_failure(self, error: grpc.aio.AioRpcError) -> Failure:
        trailers: dict[str, str | bytes] = dict(
            cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
        )
        code, kind = trailers.get(CODE), trailers.get(KIND)
        if isinstance(code, str) and isinstance(kind, str):
            self._failures = 0
            fields = trailers.get(FIELDS)
            retry_after = trailers.get(RETRY_AFTER)
            return from_wire(
                Kind(kind),
                code,
                error.details() or "",
                msgspec.json.decode(fields) if isinstance(fields, bytes) else None,
                float(retry_after) if isinstance(retry_after, str) else None,
            )
        if error.code() in _REFUSED:
            log.error("grpc_call_refused", target=self._service, status=error.code().name)
            return Internal()
        # Our doors name every failure of their own, so this is the transport's: a neighbour that is killed in the middle
        # of a call shows as UNAVAILABLE, but also as UNKNOWN, CANCELLED or INTERNAL.
        self._trip()
        return NeighbourUnavailable(self._service)

    def _trip(self) -> None:
        self._failures += 1
        if self._failures >= self.TRIP_AFTER:
            # Half-open afterwards: the next call is let through, and one more failure opens the circuit again.
            self._failures = self.TRIP_AFTER - 1
            self._open_until = asyncio.get_running_loop().time() + self.OPEN_SECONDS
            metrics.grpc_client_circuit_open.labels(target=self._service).set(1)
            log.warning("grpc_circuit_opened", target=self._service)


class _Following:
    """Stands in for a `grpc.aio.Channel` in stubs: each call goes out over the channel of the present certificate."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        made: list[Any] = [None, None]

        def invoke(request: Any, **call: Any) -> Any:
            current = self._channel.current()
            if made[0] is not current:
                made[:] = [current, current.unary_unary(method, *args, **kwargs)]
            return made[1](request, **call)

        invoke.__name__ = method
        return invoke


def _method_name(method: Any) -> str:
    name = getattr(method, "__name__", None)
    return name if isinstance(name, str) else "unknown"
