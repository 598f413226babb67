"""Long polling over a real HTTP server."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from tests.kit.channels.conftest import Connect, Serve
from tests.kit.channels.raw import until
from tests.kit.channels.room import Room, make_endpoint, user_id

from whispr.kit.channels import ConnectRequest, Endpoint, Limits
from whispr.kit.channels.metrics import stats
from whispr.kit.errors import InvalidToken
from whispr.kit.identity import Caller

Start = Callable[..., Any]
PATH = "/socket/longpoll"


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Serve an endpoint's long polling; the endpoint and a client."""
    running: list[tuple[Endpoint, uvicorn.Server, asyncio.Task[None], httpx.AsyncClient]] = []
    Room.rooms.clear()

    async def serve_http(**options: Any) -> tuple[Endpoint, httpx.AsyncClient]:
        endpoint = make_endpoint(**options)
        app = Starlette(routes=endpoint.longpoll_routes())
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        listener = socket.create_server(("127.0.0.1", 0))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=10)
        running.append((endpoint, server, task, client))
        await until(lambda: server.started)
        return endpoint, client

    yield serve_http
    for endpoint, server, task, client in running:
        await endpoint.drain(0, 0.1)
        await client.aclose()
        server.should_exit = True
        await task


class Session:
    """What phoenix.js does with one session."""

    def __init__(self, client: httpx.AsyncClient, token: str, params: dict[str, str]) -> None:
        self.client = client
        self.params = {**params, "token": token}

    @classmethod
    async def open(cls, client: httpx.AsyncClient, token: str = "alice", vsn: str = "2.0.0") -> Session:
        params = {"vsn": vsn, "access_token": token}
        answer = await client.get(PATH, params={**params, "token": "null"})
        body = answer.json()
        assert (answer.status_code, body["status"], body["messages"]) == (200, 410, [])
        return cls(client, body["token"], params)

    async def poll(self) -> tuple[int, list[Any]]:
        answer = await self.client.get(PATH, params=self.params)
        assert answer.status_code == 200
        body = answer.json()
        return body["status"], [json.loads(message) for message in body["messages"]]

    async def post(self, *lines: bytes | list[Any]) -> int:
        content = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
        headers = {"Content-Type": "application/x-ndjson"}
        answer = await self.client.post(PATH, params=self.params, content=content, headers=headers)
        assert answer.status_code == 200
        return int(answer.json()["status"])

    async def join(self, topic: str, params: Any = None) -> Any:
        assert await self.post(["1", "1", topic, "phx_join", params or {}]) == 200
        status, messages = await self.poll()
        assert (status, len(messages)) == (200, 1)
        return messages[0][4]


async def test_the_same_channels_by_polling(start: Start) -> None:
    endpoint, client = await start()
    session = await Session.open(client)
    assert endpoint.hub.is_online(user_id("alice"))
    assert (await session.join("room:a"))["response"]["id"] == "a"
    assert (
        await session.post(
            ["1", "2", "room:a", "echo", {"x": 1}], ["1", "3", "room:a", "say", {"text": "hi"}]
        )
        == 200
    )
    status, messages = await session.poll()
    assert status == 200
    assert messages == [
        ["1", "2", "room:a", "phx_reply", {"status": "ok", "response": {"x": 1}}],
        ["1", "3", "room:a", "phx_reply", {"status": "ok", "response": {"heard": "hi"}}],
    ]


async def test_a_poll_waits_for_something_to_answer(start: Start) -> None:
    endpoint, client = await start()
    session = await Session.open(client)
    await session.join("room:a")
    poll = asyncio.create_task(session.poll())
    await asyncio.sleep(0.1)
    assert not poll.done()
    endpoint.hub.broadcast("room:a", "news", {"n": 1})
    async with asyncio.timeout(1):
        assert await poll == (200, [["1", None, "room:a", "news", {"n": 1}]])


async def test_a_poll_with_nothing_to_answer(start: Start) -> None:
    _, client = await start(limits=Limits(longpoll_window=0.1))
    session = await Session.open(client)
    assert await session.poll() == (204, [])


async def test_frames_between_two_polls_are_kept(start: Start) -> None:
    endpoint, client = await start()
    session = await Session.open(client)
    await session.join("room:a")
    for n in range(5):
        endpoint.hub.broadcast("room:a", "news", {"n": n})
    _, messages = await session.poll()
    assert [message[4]["n"] for message in messages] == [0, 1, 2, 3, 4]


async def test_a_newer_poll_ends_an_older_one(start: Start) -> None:
    endpoint, client = await start()
    session = await Session.open(client)
    await session.join("room:a")
    older = asyncio.create_task(session.poll())
    await asyncio.sleep(0.1)
    newer = asyncio.create_task(session.poll())
    assert await older == (204, [])
    endpoint.hub.broadcast("room:a", "news", {"n": 1})
    assert (await newer)[1][0][4] == {"n": 1}


async def test_frames_are_not_given_to_a_client_that_hung_up(start: Start) -> None:
    endpoint, client = await start()
    session = await Session.open(client)
    await session.join("room:a")
    with pytest.raises(httpx.ReadTimeout):
        await client.get(PATH, params=session.params, timeout=0.1)
    await asyncio.sleep(0.05)
    endpoint.hub.broadcast("room:a", "news", {"n": 1})
    await asyncio.sleep(0.05)
    assert (await session.poll())[1][0][4] == {"n": 1}


@pytest.mark.parametrize(
    ("params", "headers"),
    [
        ({"access_token": "alice"}, {}),
        ({}, {"X-Phoenix-AuthToken": "alice"}),
        ({}, {"Authorization": "Bearer alice"}),
    ],
)
async def test_where_a_token_may_stand(start: Start, params: dict[str, str], headers: dict[str, str]) -> None:
    endpoint, client = await start()
    answer = await client.get(PATH, params={"vsn": "2.0.0", **params}, headers=headers)
    assert answer.json()["status"] == 410
    assert endpoint.hub.is_online(user_id("alice"))


async def test_a_fallback_from_a_websocket_with_the_token_parameter(start: Start) -> None:
    endpoint, client = await start()
    opened = (await client.get(f"{PATH}?token=alice&vsn=2.0.0")).json()
    assert opened["status"] == 410
    assert endpoint.hub.is_online(user_id("alice"))
    # phoenix.js appends the session's token to parameters that have a token already.
    url = f"{PATH}?token=alice&vsn=2.0.0&token={opened['token']}"
    assert (await client.post(url, content='["1","1","room:a","phx_join",{}]')).json() == {"status": 200}
    assert (await client.get(url)).json()["status"] == 200


async def test_the_token_of_a_session_may_stand_in_a_header(start: Start) -> None:
    _, client = await start()
    session = await Session.open(client)
    headers = {"x-phoenix-longpoll-token": session.params["token"]}
    answer = await client.post(PATH, headers=headers, content=b'[null,"1","phoenix","heartbeat",{}]')
    assert answer.json() == {"status": 200}


@pytest.mark.parametrize(
    ("token", "status"),
    [("", 403), ("forged", 403), ("banned", 403), ("busy", 500), ("lost", 500), ("bug", 500)],
)
async def test_refusals(start: Start, token: str, status: int) -> None:
    endpoint, client = await start()
    answer = await client.get(PATH, params={"vsn": "2.0.0", "access_token": token})
    assert (answer.status_code, answer.json()) == (200, {"status": status})
    assert len(endpoint.hub) == 0


async def test_the_token_of_a_session_that_is_gone_authenticates_nobody(start: Start) -> None:
    endpoint, client = await start()
    session = await Session.open(client)
    endpoint.disconnect(lambda caller: True)
    seen: list[str | None] = []

    def authenticate(request: ConnectRequest) -> Caller:
        seen.append(request.token)
        raise InvalidToken

    endpoint._door._authenticate = authenticate
    answer = await client.get(PATH, params={"vsn": "2.0.0", "token": session.params["token"]})
    assert answer.json() == {"status": 403}
    assert seen == [session.params["token"]]


async def test_unspoken_version_and_foreign_origin(start: Start) -> None:
    _, client = await start()
    params = {"vsn": "3.0.0", "access_token": "alice"}
    assert (await client.get(PATH, params=params)).json() == {"status": 403}
    session = await Session.open(client)
    for method in ("GET", "POST"):
        answer = await client.request(
            method, PATH, params=session.params, headers={"Origin": "https://evil.example"}
        )
        assert answer.json() == {"status": 403}


async def test_cross_origin_requests(start: Start) -> None:
    _, client = await start(allowed_origins=["https://app.example"])
    answer = await client.options(PATH, headers={"Access-Control-Request-Headers": "x-phoenix-authtoken"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["access-control-allow-headers"] == "x-phoenix-authtoken"
    assert "POST" in answer.headers["access-control-allow-methods"]
    session = await Session.open(client)
    headers = {"Origin": "https://app.example"}
    answer = await client.post(PATH, params=session.params, headers=headers)
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["cache-control"] == "no-store"


async def test_sessions_that_are_unknown_here_are_gone(start: Start) -> None:
    _, client = await start()
    _, other = await start()
    session = await Session.open(client)
    there = Session(other, session.params["token"], {"vsn": "2.0.0", "access_token": "alice"})
    assert await there.post(["1", "1", "room:a", "phx_join", {}]) == 410
    status, messages = await there.poll()
    assert (status, messages) == (410, [])


async def test_sessions_nobody_polls_end(start: Start) -> None:
    time = 500.0
    endpoint, client = await start(monotonic=lambda: time)
    polled = await Session.open(client)
    abandoned = await Session.open(client, "bob")
    await polled.join("room:a")
    await abandoned.join("room:b")
    for _ in range(4):
        time += 6
        endpoint.sweep()
        await polled.post(["1", "2", "room:a", "echo", {}])
        await polled.poll()
    assert not endpoint.hub.is_online(user_id("bob"))
    assert endpoint.hub.is_online(user_id("alice"))
    assert [room.terminations for room in Room.rooms] == [0, 1]
    assert await abandoned.post(["1", "2", "room:b", "echo", {}]) == 410


async def test_revocation_ends_a_session_and_its_waiting_poll(start: Start) -> None:
    endpoint, client = await start()
    session = await Session.open(client)
    poll = asyncio.create_task(session.poll())
    await asyncio.sleep(0.1)
    assert endpoint.disconnect(lambda caller: caller.user_id == user_id("alice")) == 1
    assert await poll == (410, [])
    assert await session.post(["1", "1", "room:a", "phx_join", {}]) == 410


async def test_drain_ends_sessions_and_refuses_new_ones(start: Start) -> None:
    endpoint, client = await start()
    session = await Session.open(client)
    poll = asyncio.create_task(session.poll())
    await asyncio.sleep(0.1)
    await endpoint.drain(0, 0.1)
    assert await poll == (410, [])
    answer = await client.get(PATH, params={"vsn": "2.0.0", "access_token": "alice"})
    assert answer.json() == {"status": 500}


async def test_malformed_lines_are_answered(start: Start) -> None:
    _, client = await start()
    session = await Session.open(client)
    assert await session.post(b"[nonsense", b"%%%", base64.b64encode(b"\x09")) == 200
    _, messages = await session.poll()
    assert [message[4]["response"]["reason"] for message in messages] == ["malformed_frame"] * 3


async def test_too_many_malformed_lines_end_the_session(start: Start) -> None:
    _, client = await start()
    session = await Session.open(client)
    assert await session.post(*[b"[?"] * 60) == 200
    assert await session.post(*[b"[?"] * 60) == 410


async def test_binary_pushes_by_polling(start: Start) -> None:
    endpoint, client = await start()
    session = await Session.open(client)
    await session.join("room:a")
    push = base64.b64encode(b'\x00\x01\x01\x06\x0312room:asay{"text":"x"}')
    assert await session.post(push) == 200
    assert (await session.poll())[1][0][4] == {"status": "ok", "response": {"heard": "x"}}
    # phoenix.js reads no binary frame from a poll's answer.
    reverse = base64.b64encode(b"\x00\x01\x01\x06\x0712room:areverse\x01")
    assert await session.post(reverse) == 200
    assert (await session.poll())[1][0][4]["response"] == {"reason": "binary_unsupported"}
    assert endpoint.hub.broadcast_binary("room:a", "bytes", b"\x01") == 0


async def test_version_1_by_polling(start: Start) -> None:
    _, client = await start()
    session = await Session.open(client, vsn="1.0.0")
    beat = {"topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": "1"}
    assert await session.post(json.dumps(beat).encode()) == 200
    assert (await session.poll())[1][0]["payload"] == {"status": "ok", "response": {}}


async def test_what_is_posted_is_bounded(start: Start) -> None:
    _, client = await start(limits=Limits(max_frame_size=1000))
    session = await Session.open(client)
    assert await session.post(*[b'[null,"1","phoenix","heartbeat",{}]'] * 101) == 500
    assert await session.post(b"x" * 5000) == 500
    assert await session.post(b"[" + b"x" * 1000) == 410


async def test_what_waits_for_a_poll_is_bounded(start: Start) -> None:
    endpoint, client = await start(limits=Limits(max_write_buffer=1000))
    session = await Session.open(client)
    await session.join("room:a")
    before = stats.slow_closes
    for _ in range(10):
        endpoint.hub.broadcast("room:a", "news", {"x": "A" * 200})
    assert stats.slow_closes == before + 1
    assert (await session.poll())[0] == 410
    assert Room.rooms[0].terminations == 1


async def test_both_transports_meet_in_one_hub(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    transport = httpx.ASGITransport(app=Starlette(routes=endpoint.longpoll_routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        session = await Session.open(client)
        await session.join("room:a")
        websocket = await connect(port, "vsn=2.0.0&token=bob")
        await websocket.join("room:a")
        websocket.send("1", "2", "room:a", "shout", {"n": 1})
        assert (await session.poll())[1] == [["1", None, "room:a", "shouted", {"n": 1}]]
