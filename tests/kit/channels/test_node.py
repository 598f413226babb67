"""The unmodified npm `phoenix` client against our endpoint."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.applications import Starlette
from tests.kit.channels.conftest import Serve
from tests.kit.channels.raw import until
from tests.kit.channels.room import Room, make_endpoint, user_id
from tests.node.driver import PhoenixClient, Unavailable, phoenix_client


@pytest.fixture
async def phoenix() -> AsyncIterator[PhoenixClient]:
    try:
        async with phoenix_client() as client:
            yield client
    except Unavailable as reason:
        pytest.skip(str(reason))


def url(port: int) -> str:
    return f"ws://127.0.0.1:{port}/socket"


QUICK = {"reconnectAfterMs": 20, "rejoinAfterMs": 20}


async def test_join_push_reply_broadcast_leave(serve: Serve, phoenix: PhoenixClient) -> None:
    endpoint, port = await serve()
    phoenix.do("connect", url=url(port), options={"params": {"token": "alice"}})
    await phoenix.wait("open")
    phoenix.do("join", topic="room:a", params={"cursor": 5})
    # Buffered by the client until it has joined.
    phoenix.do("push", topic="room:a", event="echo", payload={"text": "é💬"}, tag=1)
    joined = await phoenix.wait("joined", topic="room:a")
    assert joined["response"] == {"id": "a", "params": {"cursor": 5}}
    assert (await phoenix.wait("reply", tag=1))["response"] == {"text": "é💬"}
    phoenix.do("push", topic="room:a", event="refused", payload={}, tag=2)
    reply = await phoenix.wait("reply", tag=2)
    assert (reply["status"], reply["response"]) == ("error", {"reason": "conflict", "holder": "bob"})
    phoenix.do("push", topic="room:a", event="shout", payload={"n": 1}, tag=3)
    assert (await phoenix.wait("event", event="shouted"))["payload"] == {"n": 1}
    phoenix.do("leave", topic="room:a")
    await phoenix.wait("left")
    await phoenix.wait("channel_close")
    assert not endpoint.hub.has_subscribers("room:a")
    assert [event for event in phoenix.events if event["on"] in ("channel_error", "error", "close")] == []


async def test_binary(serve: Serve, phoenix: PhoenixClient) -> None:
    _, port = await serve()
    phoenix.do("connect", url=url(port), options={"params": {"token": "alice"}})
    phoenix.do("join", topic="room:a")
    await phoenix.wait("joined")
    phoenix.do("push", topic="room:a", event="reverse", payload={"$hex": "0001ff"}, tag=1)
    assert (await phoenix.wait("reply", tag=1))["response"] == {"$hex": "ff0100"}
    phoenix.do("push", topic="room:a", event="scatter", payload={"$hex": "c0ffee"}, tag=2)
    assert (await phoenix.wait("event", event="scattered"))["payload"] == {"$hex": "c0ffee"}


async def test_auth_token_in_the_subprotocol(serve: Serve, phoenix: PhoenixClient) -> None:
    endpoint, port = await serve()
    phoenix.do("connect", url=url(port), options={"authToken": "alice/phone"})
    await phoenix.wait("open")
    assert endpoint.hub.is_online(user_id("alice"))


async def test_heartbeats_keep_the_connection(serve: Serve, phoenix: PhoenixClient) -> None:
    _, port = await serve()
    phoenix.do("connect", url=url(port), options={"params": {"token": "alice"}, "heartbeatIntervalMs": 30})
    await phoenix.wait("open")
    await asyncio.sleep(0.5)
    assert phoenix.events == []


async def test_refused_join_is_tried_again(serve: Serve, phoenix: PhoenixClient) -> None:
    _, port = await serve()
    phoenix.do("connect", url=url(port), options={"params": {"token": "alice"}, **QUICK})
    phoenix.do("join", topic="room:a", params={"refuse": True})
    for _ in range(3):
        assert (await phoenix.wait("refused"))["response"]["reason"] == "forbidden"
    phoenix.do("join", topic="nowhere")
    assert (await phoenix.wait("refused", topic="nowhere"))["response"] == {"reason": "unmatched topic"}


async def test_crashed_channel_is_joined_again(serve: Serve, phoenix: PhoenixClient) -> None:
    _, port = await serve()
    phoenix.do("connect", url=url(port), options={"params": {"token": "alice"}, **QUICK})
    phoenix.do("join", topic="room:a")
    await phoenix.wait("joined")
    phoenix.do("push", topic="room:a", event="crash", payload={}, tag=1)
    assert (await phoenix.wait("channel_error"))["reason"] == {"reason": "channel_crash"}
    await phoenix.wait("joined")
    phoenix.do("push", topic="room:a", event="say", payload={"text": "back"}, tag=2)
    assert (await phoenix.wait("reply", tag=2))["response"] == {"heard": "back"}


async def test_channel_closed_by_the_server_is_not_joined_again(serve: Serve, phoenix: PhoenixClient) -> None:
    _, port = await serve()
    phoenix.do("connect", url=url(port), options={"params": {"token": "alice"}, **QUICK})
    phoenix.do("join", topic="room:a")
    await phoenix.wait("joined")
    phoenix.do("push", topic="room:a", event="close", payload={})
    await phoenix.wait("channel_close")
    await asyncio.sleep(0.2)
    assert len(Room.rooms) == 1


async def test_second_channel_of_a_topic(serve: Serve, phoenix: PhoenixClient) -> None:
    _, port = await serve()
    phoenix.do("connect", url=url(port), options={"params": {"token": "alice"}, **QUICK})
    phoenix.do("join", topic="room:a", params={"n": 1})
    assert (await phoenix.wait("joined"))["response"]["params"] == {"n": 1}
    phoenix.do("join", topic="room:a", params={"n": 2})
    assert (await phoenix.wait("joined"))["response"]["params"] == {"n": 2}
    phoenix.do("push", topic="room:a", event="say", payload={"text": "x"}, tag=1)
    assert (await phoenix.wait("reply", tag=1))["status"] == "ok"


@pytest.mark.parametrize("code", [1001, 1008, 1012, 1013])
async def test_reconnects_after_each_of_our_close_codes(
    serve: Serve, phoenix: PhoenixClient, code: int
) -> None:
    endpoint, port = await serve()
    phoenix.do("connect", url=url(port), options={"params": {"token": "alice"}, **QUICK})
    phoenix.do("join", topic="room:a")
    await phoenix.wait("joined")
    endpoint.disconnect(lambda caller: True, code)
    assert (await phoenix.wait("close"))["code"] == code
    await phoenix.wait("open")
    await phoenix.wait("joined")


async def test_server_dies_and_comes_back(phoenix: PhoenixClient) -> None:
    endpoint = make_endpoint()
    port = await endpoint.listen("127.0.0.1", 0)
    phoenix.do("connect", url=url(port), options={"params": {"token": "alice"}, **QUICK})
    phoenix.do("join", topic="room:a")
    await phoenix.wait("joined")
    await endpoint.drain(0, 1)
    await phoenix.wait("close", code=1012)
    await phoenix.wait("channel_error")
    # Pushed while nobody is there to take it: the client keeps it.
    phoenix.do("push", topic="room:a", event="say", payload={"text": "kept"}, tag=1)
    await asyncio.sleep(0.2)
    again = make_endpoint()
    await again.listen("127.0.0.1", port)
    try:
        await phoenix.wait("joined")
        assert (await phoenix.wait("reply", tag=1))["response"] == {"heard": "kept"}
    finally:
        await again.drain(0, 0.2)


@pytest.fixture
async def longpoll_port() -> AsyncIterator[int]:
    endpoint = make_endpoint()
    server = uvicorn.Server(
        uvicorn.Config(Starlette(routes=endpoint.longpoll_routes()), log_level="error", lifespan="off")
    )
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    yield listener.getsockname()[1]
    await endpoint.drain(0, 0.2)
    server.should_exit = True
    await task


@pytest.mark.parametrize("options", [{"params": {"access_token": "alice"}}, {"authToken": "alice"}])
async def test_long_polling(longpoll_port: int, phoenix: PhoenixClient, options: dict[str, object]) -> None:
    phoenix.do("connect", url=url(longpoll_port), transport="longpoll", options=options)
    await phoenix.wait("open", transport="longpoll")
    phoenix.do("join", topic="room:a")
    await phoenix.wait("joined")
    for tag in range(150):
        phoenix.do("push", topic="room:a", event="say", payload={"text": str(tag)}, tag=tag)
    for tag in range(150):
        assert (await phoenix.wait("reply", tag=tag))["response"] == {"heard": str(tag)}
    phoenix.do("push", topic="room:a", event="say", payload={"$hex": b'{"text":"x"}'.hex()}, tag="b")
    assert (await phoenix.wait("reply", tag="b"))["response"] == {"heard": "x"}
    phoenix.do("push", topic="room:a", event="reverse", payload={"$hex": "00"}, tag="r")
    assert (await phoenix.wait("reply", tag="r"))["response"] == {"reason": "binary_unsupported"}


async def test_falls_back_to_long_polling(longpoll_port: int, phoenix: PhoenixClient) -> None:
    # No WebSocket is served at this port; the token is the parameter that WebSockets use.
    options = {"params": {"token": "alice"}, "longPollFallbackMs": 300, **QUICK}
    phoenix.do("connect", url=url(longpoll_port), options=options)
    await phoenix.wait("open", transport="longpoll")
    phoenix.do("join", topic="room:a")
    await phoenix.wait("joined")


async def test_long_polling_session_that_is_gone_is_opened_anew(phoenix: PhoenixClient) -> None:
    endpoint = make_endpoint()
    server = uvicorn.Server(
        uvicorn.Config(Starlette(routes=endpoint.longpoll_routes()), log_level="error", lifespan="off")
    )
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        options = {"params": {"access_token": "alice"}, **QUICK}
        phoenix.do("connect", url=url(listener.getsockname()[1]), transport="longpoll", options=options)
        phoenix.do("join", topic="room:a")
        await phoenix.wait("joined")
        endpoint.disconnect(lambda caller: True)
        await phoenix.wait("close")
        await phoenix.wait("joined")
    finally:
        await endpoint.drain(0, 0.2)
        server.should_exit = True
        await task
