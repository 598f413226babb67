"""HTTP to one server as one login: retries, tokens that are refreshed in time, problems as exceptions."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar
from uuid import uuid4

import httpx
import msgspec

from whispr.client.backoff import Backoff
from whispr.client.failures import ApiError, SessionEnded, Unreachable
from whispr.client.models import Session

T = TypeVar("T")

RETRY_STATUS: Final = frozenset({429, 502, 503, 504})
# A token that expires on its way is as good as expired.
EXPIRY_MARGIN: Final = 30.0


class HttpClient:
    """Speaks to one server.

    Requests are retried with jittered backoff when the server could not be reached or says so (429, 502, 503, 504).
    That is safe for every method: each POST carries an Idempotency-Key, the same one for all its attempts.
    The access token is refreshed before it expires or when it is refused, by one request for all that wait for it.

    `on_session` is called with every new session before anything else uses it, so that a refresh token, which
    the server accepts only once, is never lost with a crash. `clock` gives seconds; only differences count.
    """

    def __init__(
        self,
        base_url: str,
        *,
        session: Session | None = None,
        on_session: Callable[[Session], None] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        timeout: float = 15.0,
        attempts: int = 5,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._http = httpx.AsyncClient(base_url=base_url, timeout=timeout, transport=transport)
        self._attempts = attempts
        self._backoff = backoff or Backoff()
        self._on_session = on_session
        self._clock = clock
        self._refreshing = asyncio.Lock()
        self._session = session
        self._why = ("not logged in", "session_ended")
        # A session from the store is of unknown age.
        self._expires_at = -math.inf

    async def close(self) -> None:
        await self._http.aclose()

    @property
    def session(self) -> Session:
        """Raises SessionEnded when nobody is logged in."""
        if self._session is None:
            raise SessionEnded(*self._why)
        return self._session

    async def access_token(self, *, refused: str | None = None) -> str:
        """A token good for a while. `refused`: one the server did not take; it is replaced if nobody has yet.

        Raises SessionEnded, Unreachable, ApiError.
        """
        async with self._refreshing:
            session = self.session
            fresh = self._clock() < self._expires_at - EXPIRY_MARGIN
            if fresh and session.access_token != refused:
                return session.access_token
            try:
                answer = await self.request(
                    "POST",
                    "/api/v1/auth/refresh",
                    json={"refresh_token": session.refresh_token},
                    authorized=False,
                )
            except ApiError as error:
                if error.status == 401:
                    # Kept, since whoever asks next, the socket perhaps, must hear the same reason.
                    self._session, self._why = None, (error.detail or error.code, error.code)
                    raise SessionEnded(*self._why) from error
                raise
            return self.adopt(decode(answer, Session)).access_token

    def adopt(self, session: Session) -> Session:
        """Go on as this login."""
        if self._on_session is not None:
            self._on_session(session)
        self._session = session
        self._expires_at = self._clock() + session.expires_in
        return session

    def ended(self) -> None:
        """Nobody is logged in any more."""
        self._session = None

    async def get(self, path: str, kind: type[T], params: Mapping[str, Any] | None = None) -> T:
        """The body of a GET as `kind`. Raises what `request` raises."""
        return decode(await self.request("GET", path, params=params), kind)

    async def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        authorized: bool = True,
        idempotency_key: str | None = None,
    ) -> httpx.Response:
        """A successful answer. Raises ApiError, Unreachable, SessionEnded."""
        headers = {"Idempotency-Key": idempotency_key or str(uuid4())} if method == "POST" else {}
        query = {name: value for name, value in (params or {}).items() if value is not None}
        content = None if json is None else msgspec.json.encode(json)
        if content is not None:
            headers["Content-Type"] = "application/json"
        refused: str | None = None
        attempt = 0
        while True:
            token = None
            if authorized:
                token = await self.access_token(refused=refused)
                headers["Authorization"] = f"Bearer {token}"
            try:
                answer = await self._http.request(
                    method, path, content=content, params=query, headers=headers
                )
            except httpx.TransportError as error:
                attempt += 1
                if attempt >= self._attempts:
                    raise Unreachable(f"{method} {path}: {error!r}") from error
                await asyncio.sleep(self._backoff.delay(attempt))
                continue
            if answer.is_success:
                return answer
            failure = _problem(answer)
            if answer.status_code == 401 and token is not None and refused is None:
                refused = token
                continue
            attempt += 1
            if answer.status_code not in RETRY_STATUS or attempt >= self._attempts:
                raise failure
            await asyncio.sleep(self._backoff.delay(attempt, failure.retry_after))


def decode(answer: httpx.Response, kind: type[T]) -> T:
    """The body as `kind`. Raises ApiError."""
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except msgspec.DecodeError as error:
        raise ApiError("unexpected_answer", answer.status_code, str(error)) from error


def _problem(answer: httpx.Response) -> ApiError:
    """RFC 9457, or whatever a proxy in between answers instead."""
    try:
        problem = msgspec.json.decode(answer.content, type=dict[str, Any])
    except msgspec.DecodeError:
        problem = {}
    try:
        retry_after: float | None = float(answer.headers["Retry-After"])
    except (KeyError, ValueError):
        retry_after = None
    known = {"type", "title", "status", "detail", "code", "request_id"}
    return ApiError(
        str(problem.get("code", "http_error")),
        answer.status_code,
        str(problem.get("detail", "")),
        {name: value for name, value in problem.items() if name not in known},
        retry_after,
    )
