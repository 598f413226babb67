"""The REST client against a server that misbehaves on purpose (httpx's own transport for tests stands in for the network)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from whispr.client.backoff import Backoff
from whispr.client.failures import ApiError, SessionEnded, Unreachable
from whispr.client.http import EXPIRY_MARGIN
from whispr.client.models import Session
from whispr.client.rest import RestClient

USER, DEVICE, SESSION = uuid4(), uuid4(), uuid4()
QUICK = Backoff(base=0.001, cap=0.002)


def session_json(number: int, expires_in: float = 600) -> dict[str, Any]:
    return {
        "user_id": str(USER),
        "device_id": str(DEVICE),
        "session_id": str(SESSION),
        "access_token": f"access-{number}",
        "token_type": "Bearer",
        "expires_in": expires_in,
        "refresh_token": f"refresh-{number}",
    }


def session(number: int = 0) -> Session:
    return Session(USER, DEVICE, SESSION, f"access-{number}", 600, f"refresh-{number}")


def problem(status: int, code: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    body = {"type": "about:blank", "title": code, "status": status, "code": code, "detail": "why", **fields}
    return httpx.Response(status, json=body, headers=headers)


class Server:
    """Answers what the test says, in turn; refreshes and keeps what it was asked."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.refreshes: list[str] = []
        self.refresh_answer: Callable[[int], httpx.Response] = lambda n: httpx.Response(
            200, json=session_json(n)
        )

    async def handle(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        if request.url.path == "/api/v1/auth/refresh":
            self.refreshes.append(json.loads(request.content)["refresh_token"])
            return self.refresh_answer(len(self.refreshes))
        self.requests.append(request)
        answer = self.answers.pop(0) if self.answers else httpx.Response(200, json={})
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self, **options: Any) -> RestClient:
        options = {"session": session(), "backoff": QUICK, **options}
        return RestClient("http://server", transport=httpx.MockTransport(self.handle), **options)


async def test_a_post_is_repeated_with_the_same_idempotency_key() -> None:
    created: dict[str, Any] = {"id": str(uuid4()), "type": "direct", "members": []}
    server = Server(
        httpx.ConnectError("down"), problem(503, "unavailable"), httpx.Response(201, json=created)
    )
    conversation = await server.client().create_conversation("direct", [uuid4()])
    assert conversation.id == UUID(created["id"])
    keys = [request.headers["Idempotency-Key"] for request in server.requests]
    assert len(keys) == 3
    assert len(set(keys)) == 1
    assert len({bytes(request.content) for request in server.requests}) == 1


async def test_it_gives_up_after_some_attempts() -> None:
    server = Server(*[httpx.ConnectError("down")] * 9)
    with pytest.raises(Unreachable):
        await server.client(attempts=3).my_profile()
    assert len(server.requests) == 3
    server = Server(*[problem(503, "unavailable", {"Retry-After": "0"})] * 9)
    with pytest.raises(ApiError) as refused:
        await server.client(attempts=3).my_profile()
    assert refused.value.passing
    assert len(server.requests) == 3


async def test_retry_after_is_waited_out() -> None:
    profile = httpx.Response(200, json={"user_id": str(USER)})
    server = Server(problem(429, "rate_limited", {"Retry-After": "0.2"}), profile)
    started = asyncio.get_running_loop().time()
    assert (await server.client().my_profile()).user_id == USER
    assert asyncio.get_running_loop().time() - started >= 0.2


async def test_a_problem_becomes_an_api_error_and_is_not_repeated() -> None:
    server = Server(problem(409, "devices_mismatch", missing=["a"], extra=[]))
    with pytest.raises(ApiError) as refused:
        await server.client().send_message({})
    error = refused.value
    assert (error.code, error.status, error.detail, error.passing) == ("devices_mismatch", 409, "why", False)
    assert error.fields == {"missing": ["a"], "extra": []}
    assert len(server.requests) == 1
    server = Server(httpx.Response(404, text="<html>a proxy's page</html>"))
    with pytest.raises(ApiError) as refused:
        await server.client().my_profile()
    assert refused.value.code == "http_error"
    server = Server(httpx.Response(200, text="not json"))
    with pytest.raises(ApiError) as refused:
        await server.client().my_profile()
    assert refused.value.code == "unexpected_answer"


async def test_many_requests_share_one_refresh_which_is_kept_before_use() -> None:
    kept: list[Session] = []
    server = Server(*[httpx.Response(200, json={"user_id": str(USER)})] * 20)

    async def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/api/v1/auth/refresh":
            assert [s.refresh_token for s in kept] == ["refresh-1"]
            assert request.headers["Authorization"] == "Bearer access-1"
        return await server.handle(request)

    client = RestClient(
        "http://server", session=session(), on_session=kept.append, transport=httpx.MockTransport(handle)
    )
    await asyncio.gather(*(client.my_profile() for _ in range(20)))
    assert server.refreshes == ["refresh-0"]


async def test_a_token_is_renewed_before_it_expires_and_when_it_is_refused() -> None:
    time = [0.0]
    server = Server()
    server.answers = [httpx.Response(200, json={"user_id": str(USER)}) for _ in range(2)]
    client = server.client(clock=lambda: time[0])
    await client.my_profile()
    time[0] = 600 - EXPIRY_MARGIN + 1
    await client.my_profile()
    assert server.refreshes == ["refresh-0", "refresh-1"]
    server.answers = [problem(401, "token_expired"), httpx.Response(200, json={"user_id": str(USER)})]
    await client.my_profile()
    assert server.refreshes == ["refresh-0", "refresh-1", "refresh-2"]
    assert server.requests[-1].headers["Authorization"] == "Bearer access-3"
    server.answers = [problem(401, "session_revoked"), problem(401, "session_revoked")]
    with pytest.raises(ApiError):
        await client.my_profile()
    assert len(server.refreshes) == 4  # one more try with a new token, not a loop


@pytest.mark.parametrize("code", ["session_revoked", "device_expired"])
async def test_a_refused_refresh_ends_the_session_and_everybody_hears_why(code: str) -> None:
    server = Server()
    server.refresh_answer = lambda _: problem(401, code)
    client = server.client()
    for _ in range(2):
        with pytest.raises(SessionEnded) as ended:
            await client.my_profile()
        assert ended.value.code == code
    with pytest.raises(SessionEnded):
        await client.access_token()
    assert server.requests == []
    assert len(server.refreshes) == 1


async def test_lists_are_read_page_by_page() -> None:
    ids = [str(uuid4()) for _ in range(3)]
    first = {"items": [{"id": i, "type": "group", "members": None} for i in ids[:2]], "next_cursor": "c"}
    second = {"items": [{"id": ids[2], "type": "direct", "members": []}], "next_cursor": None}
    server = Server(httpx.Response(200, json=first), httpx.Response(200, json=second))
    found = [str(conversation.id) async for conversation in server.client().conversations()]
    assert found == ids
    assert [request.url.params.get("cursor") for request in server.requests] == [None, "c"]
