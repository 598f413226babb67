"""The REST API, typed. One `RestClient` is one login (or none yet)."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar
from uuid import UUID, uuid4

import httpx
import msgspec

from whispr.client.backoff import Backoff
from whispr.client.failures import ApiError, SessionEnded, Unreachable
from whispr.client.models import (
    Conversation,
    Device,
    DeviceKeys,
    EventsPage,
    Message,
    MessagesPage,
    Profile,
    Session,
    UserKeys,
)

T = TypeVar("T")

RETRY_STATUS: Final = frozenset({429, 502, 503, 504})
# A token that expires on its way is as good as expired.
EXPIRY_MARGIN: Final = 30.0


class RestClient:
    """Speaks HTTP to one server.

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
        # A session from the store is of unknown age.
        self._expires_at = -math.inf

    async def close(self) -> None:
        await self._http.aclose()

    @property
    def session(self) -> Session:
        """Raises SessionEnded when nobody is logged in."""
        if self._session is None:
            raise SessionEnded("not logged in")
        return self._session

    # Accounts and devices

    async def register(
        self, username: str, password: str, device: Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> Session:
        body = {"username": username, "password": password, "device": device}
        return await self._enter("/api/v1/auth/register", body, idempotency_key)

    async def login(
        self,
        username: str,
        password: str,
        *,
        device: Mapping[str, Any] | None = None,
        device_id: UUID | None = None,
        idempotency_key: str | None = None,
    ) -> Session:
        """With `device` on a new device, with `device_id` on one the account has."""
        body: dict[str, Any] = {"username": username, "password": password}
        if device is not None:
            body["device"] = device
        if device_id is not None:
            body["device_id"] = str(device_id)
        return await self._enter("/api/v1/auth/login", body, idempotency_key)

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
                answer = await self._request(
                    "POST",
                    "/api/v1/auth/refresh",
                    json={"refresh_token": session.refresh_token},
                    authorized=False,
                )
            except ApiError as error:
                if error.status == 401:
                    self._session = None
                    raise SessionEnded(error.detail or error.code) from error
                raise
            return self._adopt(_decode(answer, Session)).access_token

    async def logout(self) -> None:
        await self._request("POST", "/api/v1/auth/logout")
        self._session = None

    async def devices(self) -> list[Device]:
        """One's own devices."""
        answer = msgspec.json.decode((await self._request("GET", "/api/v1/devices")).content)
        items = answer["items"] if isinstance(answer, dict) else answer
        return [msgspec.convert({"device_id": item.get("id"), **item}, Device) for item in items]

    async def remove_device(self, device_id: UUID) -> None:
        await self._request("DELETE", f"/api/v1/devices/{device_id}")

    # Keys

    async def upload_keys(
        self,
        signed_prekey: Mapping[str, Any],
        one_time_prekeys: Sequence[Mapping[str, Any]],
        pq_last_resort_prekey: Mapping[str, Any] | None = None,
        pq_one_time_prekeys: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Replace the lasting prekeys and add one-time keys (at most 100 of each kind). The same again changes nothing."""
        body: dict[str, Any] = {"signed_prekey": signed_prekey, "one_time_prekeys": one_time_prekeys}
        if pq_last_resort_prekey is not None:
            body["pq_last_resort_prekey"] = pq_last_resort_prekey
        if pq_one_time_prekeys:
            body["pq_one_time_prekeys"] = pq_one_time_prekeys
        await self._request("PUT", "/api/v1/keys", json=body)

    async def key_counts(self) -> dict[str, Any]:
        return await self._get("/api/v1/keys", dict[str, Any])

    async def user_keys(self, user_id: UUID) -> UserKeys:
        """Bundles of all a person's devices. Takes a one-time key of each."""
        return await self._get(f"/api/v1/keys/{user_id}", UserKeys)

    async def device_keys(self, user_id: UUID, device_id: UUID) -> DeviceKeys | None:
        """One device's bundle, or None if the person has no such device. Takes a one-time key."""
        try:
            keys = await self._get(f"/api/v1/keys/{user_id}/{device_id}", UserKeys)
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return next((device for device in keys.devices if device.device_id == device_id), None)

    # People

    async def profile(self, user_id: UUID) -> Profile:
        return await self._get(f"/api/v1/users/{user_id}", Profile)

    async def find_user(self, username: str) -> Profile | None:
        """By exact name."""
        answer = await self._request("GET", "/api/v1/users", params={"username": username})
        found = msgspec.json.decode(answer.content)
        items = found.get("items", [found])
        return msgspec.convert(items[0], Profile, strict=False) if items else None

    async def update_profile(self, **fields: Any) -> Profile:
        """`display_name`, `avatar_media_id`, `locale`, `time_zone`, `privacy`."""
        return _decode(await self._request("PATCH", "/api/v1/users/me", json=fields), Profile)

    async def my_profile(self) -> Profile:
        return await self._get("/api/v1/users/me", Profile)

    async def block(self, user_id: UUID) -> None:
        await self._request("PUT", f"/api/v1/users/me/blocks/{user_id}")

    async def unblock(self, user_id: UUID) -> None:
        await self._request("DELETE", f"/api/v1/users/me/blocks/{user_id}")

    async def add_contact(self, user_id: UUID, **fields: Any) -> None:
        await self._request("PUT", f"/api/v1/users/me/contacts/{user_id}", json=fields)

    # Conversations and messages

    async def create_conversation(
        self, kind: str, member_ids: Sequence[UUID], metadata: Mapping[str, Any] | None = None
    ) -> Conversation:
        body: dict[str, Any] = {"type": kind, "member_ids": [str(member) for member in member_ids]}
        if metadata is not None:
            body["metadata"] = metadata
        return _decode(await self._request("POST", "/api/v1/conversations", json=body), Conversation)

    async def conversation(self, conversation_id: UUID) -> Conversation:
        return await self._get(f"/api/v1/conversations/{conversation_id}", Conversation)

    async def conversations(self) -> AsyncIterator[Conversation]:
        """All of one's conversations, page by page."""
        cursor: str | None = None
        while True:
            params = {"limit": "100", **({"cursor": cursor} if cursor else {})}
            answer = await self._request("GET", "/api/v1/conversations", params=params)
            page = _decode(answer, _ConversationPage)
            for conversation in page.items:
                yield conversation
            cursor = page.next_cursor
            if cursor is None:
                return

    async def add_members(self, conversation_id: UUID, user_ids: Sequence[UUID]) -> None:
        body = {"member_ids": [str(user_id) for user_id in user_ids]}
        await self._request("POST", f"/api/v1/conversations/{conversation_id}/members", json=body)

    async def remove_member(self, conversation_id: UUID, user_id: UUID) -> None:
        await self._request("DELETE", f"/api/v1/conversations/{conversation_id}/members/{user_id}")

    async def leave(self, conversation_id: UUID) -> None:
        await self._request("DELETE", f"/api/v1/conversations/{conversation_id}")

    async def send_message(self, message: Mapping[str, Any]) -> Message:
        """`POST /messages`; idempotent by its `client_id`."""
        return _decode(await self._request("POST", "/api/v1/messages", json=message), Message)

    async def messages(
        self,
        conversation_id: UUID,
        *,
        after_seq: int | None = None,
        before_seq: int | None = None,
        limit: int = 50,
    ) -> MessagesPage:
        params = {"limit": limit, "after_seq": after_seq, "before_seq": before_seq}
        return await self._get(f"/api/v1/conversations/{conversation_id}/messages", MessagesPage, params)

    async def events(self, conversation_id: UUID, *, after_seq: int = 0, limit: int = 100) -> EventsPage:
        params = {"after_seq": after_seq, "limit": limit}
        return await self._get(f"/api/v1/conversations/{conversation_id}/events", EventsPage, params)

    # The mechanism

    async def _enter(self, path: str, body: Mapping[str, Any], idempotency_key: str | None) -> Session:
        answer = await self._request(
            "POST", path, json=body, authorized=False, idempotency_key=idempotency_key
        )
        return self._adopt(_decode(answer, Session))

    def _adopt(self, session: Session) -> Session:
        if self._on_session is not None:
            self._on_session(session)
        self._session = session
        self._expires_at = self._clock() + session.expires_in
        return session

    async def _get(self, path: str, kind: type[T], params: Mapping[str, Any] | None = None) -> T:
        return _decode(await self._request("GET", path, params=params), kind)

    async def _request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        authorized: bool = True,
        idempotency_key: str | None = None,
    ) -> httpx.Response:
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


class _ConversationPage(msgspec.Struct, frozen=True):
    items: list[Conversation]
    next_cursor: str | None = None


def _decode(answer: httpx.Response, kind: type[T]) -> T:
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
