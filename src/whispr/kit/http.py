"""The REST door: an application factory that authenticates, limits, logs and renders failures the same way everywhere.

Routers are made by `build_router(service)` in a service's `api.py`. Failures raised anywhere become RFC 9457
`application/problem+json` with a stable `code`; what nobody expected becomes `internal` without its text.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from whispr.kit.errors import Failure, Forbidden, Internal, Invalid, Kind, NotFound, TooLarge, Unauthenticated
from whispr.kit.identity import Caller, Identity
from whispr.kit.ids import uuid7
from whispr.kit.telemetry import (
    asgi_carrier,
    bind_request,
    clear_request,
    get_logger,
    metrics,
    server_span,
    trace_id,
)

log = get_logger(__name__)

MAX_BODY = 256 * 1024

STATUS: dict[Kind, int] = {
    Kind.INVALID: 422,
    Kind.UNAUTHENTICATED: 401,
    Kind.FORBIDDEN: 403,
    Kind.NOT_FOUND: 404,
    Kind.CONFLICT: 409,
    Kind.TOO_LARGE: 413,
    Kind.RATE_LIMITED: 429,
    Kind.UNAVAILABLE: 503,
    Kind.INTERNAL: 500,
}

_TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
}

_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,64}")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Body(BaseModel):
    """Base of request bodies. Unknown members are ignored, so that newer clients can talk to older servers."""

    model_config = ConfigDict(extra="ignore", str_max_length=200_000)


class Problem(BaseModel):
    """RFC 9457 problem details. `code` is stable; validation problems list the `errors` by field."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    trace_id: str | None = None
    errors: list[dict[str, Any]] | None = None

    model_config = ConfigDict(extra="allow")


ItemT = TypeVar("ItemT")


class Page(BaseModel, Generic[ItemT]):
    """One page of a list; `next_cursor` is null at the end."""

    items: list[ItemT]
    next_cursor: str | None = None


class MalformedJson(Invalid):
    """The body is not valid JSON."""

    code = "malformed_json"


class InvalidCursor(Invalid):
    """The cursor is not one this list handed out."""

    code = "invalid_cursor"


LimitParam = Annotated[int, Query(ge=1, le=100, description="Items a page.")]
CursorParam = Annotated[str | None, Query(max_length=512, description="`next_cursor` of the page before.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=128,
        pattern=r"^[\x21-\x7e]+$",
        description="Repeating a request with the same key gives the same result and creates nothing twice.",
    ),
]


def encode_cursor(value: Any) -> str:
    """An opaque cursor holding `value` (JSON-encodable)."""
    return base64.urlsafe_b64encode(msgspec.json.encode(value)).rstrip(b"=").decode()


T = TypeVar("T")


def decode_cursor(cursor: str, shape: type[T]) -> T:
    """What `encode_cursor` was given, checked to be of `shape`. Raises `InvalidCursor`."""
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)), type=shape)
    except (binascii.Error, ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise InvalidCursor from error


# --- who is calling ---------------------------------------------------------------------------------------------------

_bearer = HTTPBearer(auto_error=False, description="The access token of a session.")


async def current_caller(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Caller:
    """The person and device behind the request. Raises `Unauthenticated` and its kin."""
    if credentials is None:
        raise Unauthenticated
    identity: Identity = request.app.state.identity
    caller = await identity.verify_async(credentials.credentials)
    bind_request(user_id=str(caller.user_id), device_id=str(caller.device_id))
    return caller


async def current_admin(caller: Annotated[Caller, Depends(current_caller)]) -> Caller:
    """The caller, who must hold the role `admin`."""
    if "admin" not in caller.roles:
        raise Forbidden
    return caller


CallerDep = Annotated[Caller, Depends(current_caller)]
AdminDep = Annotated[Caller, Depends(current_admin)]


def client_ip(request: Request) -> str:
    """The address the request came from, for rate limits.

    The gateway appends the peer it saw to `X-Forwarded-For`; only that last entry is its own word, anything before it
    is the client's claim.
    """
    forwarded = request.headers.get("x-forwarded-for", "").rsplit(",", 1)[-1].strip()
    return forwarded or (request.client.host if request.client else "unknown")


# --- the application --------------------------------------------------------------------------------------------------


def create_app(
    *,
    title: str,
    description: str,
    version: str,
    routers: Sequence[APIRouter],
    identity: Identity | None,
    cors_origins: Sequence[str] = ("*",),
    max_body: int = MAX_BODY,
) -> FastAPI:
    """The REST application of one service, its OpenAPI document at `/openapi.json` included.

    `max_body` (bytes) bounds request bodies; a larger one is 413 `too_large`.
    """
    app = FastAPI(
        title=title,
        description=description,
        version=version,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        responses={
            str(status): {"model": Problem, "description": _TITLES[status]} for status in (400, 422, 429, 503)
        },
    )
    app.router.route_class = CheckedRoute
    app.state.identity = identity
    for router in routers:
        _check_routes(router)
        app.include_router(router)
    app.add_exception_handler(Failure, _on_failure)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_middleware(_Door, max_body=max_body)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(cors_origins),
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"],
        allow_headers=[
            "Authorization",
            "Content-Type",
            "Idempotency-Key",
            "X-Request-Id",
            "X-Phoenix-AuthToken",
        ],
        expose_headers=["X-Request-Id", "Retry-After"],
        max_age=7200,
    )
    _describe_problems(app)
    return app


def _describe_problems(app: FastAPI) -> None:
    """Make the document say what the door does: problems have their own content type, on routes that name none too."""
    make_document = app.openapi

    def openapi() -> dict[str, Any]:
        document = make_document()
        for operations in document["paths"].values():
            for operation in operations.values():
                answers: dict[str, dict[str, Any]] = operation["responses"]
                if "security" in operation:
                    answers.setdefault("401", {"description": _TITLES[401]})
                if "requestBody" in operation:
                    answers.setdefault("413", {"description": _TITLES[413]})
                for status, answer in answers.items():
                    if status >= "400":
                        answer["content"] = {
                            "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
                        }
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _check_routes(router: APIRouter) -> None:
    for route in router.routes:
        if isinstance(route, APIRoute) and not isinstance(route, CheckedRoute):
            raise TypeError(f"{route.path}: make the router with whispr.kit.http.new_router()")


def new_router(**options: Any) -> APIRouter:
    """An `APIRouter` whose routes parse JSON strictly. Takes APIRouter's options."""
    return APIRouter(route_class=CheckedRoute, **options)


class _StrictRequest(Request):
    """Reads JSON with msgspec: no NaN, no lone surrogates, bounded depth, and no NUL, which PostgreSQL refuses."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            try:
                value = msgspec.json.decode(body)
                if b"\\u0000" in body and _holds_nul(value):
                    raise Invalid("Text may not hold NUL characters.")
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise MalformedJson from error
            self._json = value
        return self._json


def _holds_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any("\0" in key or _holds_nul(item) for key, item in value.items())
    return isinstance(value, list) and any(_holds_nul(item) for item in value)


class CheckedRoute(APIRoute):
    """A route that parses JSON strictly and tells the metrics its template, not its path."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        template = self.path_format

        async def handle_strictly(request: Request) -> Response:
            request.scope["whispr.route"] = template
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


class _Door:
    """Request ids, size limit, log line, metrics and trace of every request, and the last net for exceptions."""

    def __init__(self, app: App, max_body: int) -> None:
        self._app = app
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else str(uuid7())
        scope["whispr.request_id"] = request_id
        clear_request()
        bind_request(request_id=request_id)
        started = time.perf_counter()
        status = 500
        begun = False

        async def respond(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                begun = True
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        metrics.http_requests_in_flight.inc()
        with server_span("http", asgi_carrier(scope["headers"]), public=True):
            try:
                await self._serve(scope, headers, receive, respond)
            except Exception as error:
                log.exception("http_request_crashed", error=type(error).__name__)
                if begun:
                    raise
                await _render(scope, Internal())(scope, receive, respond)
            finally:
                metrics.http_requests_in_flight.dec()
                self._record(scope, status, time.perf_counter() - started)

    async def _serve(self, scope: Scope, headers: Headers, receive: Receive, respond: Send) -> None:
        if b"\x00" in scope["path"].encode("utf-8", "surrogatepass") or b"%00" in scope["query_string"]:
            await _render(scope, Invalid("The address may not hold NUL characters."))(scope, receive, respond)
            return
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self._max_body:
            await _render(scope, self._too_large())(scope, receive, respond)
            return
        size = 0

        async def receive_bounded() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > self._max_body:
                    raise self._too_large()
            return message

        await self._app(scope, receive_bounded, respond)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"The body is larger than {self._max_body} bytes.", limit=self._max_body)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("whispr.route", "unmatched")
        method = metrics.bounded(scope["method"], metrics.HTTP_METHODS)
        metrics.http_requests.labels(method=method, route=route, status=str(status)).inc()
        metrics.http_request_seconds.labels(method=method, route=route).observe(seconds)
        log.info("http_request", method=method, route=route, status=status, ms=round(seconds * 1000, 2))


# --- rendering --------------------------------------------------------------------------------------------------------


def _problem(scope: Scope, status: int, code: str, detail: str, /, **fields: Any) -> Response:
    body = {
        **fields,
        "type": "about:blank",
        "title": _TITLES.get(status, "Error"),
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": scope.get("whispr.request_id", ""),
    }
    trace = trace_id()
    if trace:
        body["trace_id"] = trace
    return Response(msgspec.json.encode(body, enc_hook=str), status, media_type="application/problem+json")


def _render(scope: Scope, failure: Failure) -> Response:
    status = 400 if isinstance(failure, MalformedJson) else STATUS[failure.kind]
    detail = failure.detail if failure.kind is not Kind.INTERNAL else "Internal error."
    response = _problem(scope, status, failure.code, detail, **failure.fields)
    if failure.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, round(failure.retry_after)))
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if failure.kind is Kind.UNAVAILABLE:
        cause = failure.__cause__
        log.warning("http_unavailable", code=failure.code, cause=type(cause).__name__ if cause else None)
    return response


async def _on_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, Failure)
    if error.kind is Kind.INTERNAL:
        log.error("http_internal_failure", code=error.code)
    return _render(request.scope, error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [
        {"field": ".".join(str(part) for part in item["loc"]), "message": item["msg"], "type": item["type"]}
        for item in error.errors()[:50]
    ]
    return _problem(request.scope, 422, "invalid_request", "The request is not valid.", errors=errors)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, Failure):
        # FastAPI turns whatever reading the body raises into a bare 400.
        return _render(request.scope, error.__cause__)
    if error.status_code == 404:
        return _render(request.scope, NotFound("There is no such route."))
    codes = {400: "malformed_request", 405: "method_not_allowed"}
    response = _problem(
        request.scope, error.status_code, codes.get(error.status_code, "http_error"), str(error.detail)
    )
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response
