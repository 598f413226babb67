from __future__ import annotations

import json

import pytest
from tests.kit.channels.conftest import Connect, Serve
from tests.kit.channels.raw import BINARY
from tests.kit.channels.room import Lobby, Room

from whispr.kit.channels import Endpoint, Hub
from whispr.kit.channels import wire as wire_module
from whispr.kit.clock import SystemClock


async def test_broadcast_carries_each_recipients_join_ref(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    first, second = await connect(port), await connect(port)
    old = await connect(port, "vsn=1.0.0&token=bob")
    await first.join("room:a", ref="5")
    await second.join("room:a", ref="17")
    old.text('{"topic":"room:a","event":"phx_join","payload":{},"ref":"1"}')
    await old.next()
    assert endpoint.hub.broadcast("room:a", "news", {"n": 1}) == 3
    assert await first.next() == ["5", None, "room:a", "news", {"n": 1}]
    assert await second.next() == ["17", None, "room:a", "news", {"n": 1}]
    assert await old.next() == {"topic": "room:a", "event": "news", "payload": {"n": 1}, "ref": None}
    assert endpoint.hub.broadcast("room:nobody", "news", {"n": 1}) == 0
    await first.silence()


async def test_broadcast_encodes_once_per_version(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, port = await serve()
    clients = [await connect(port, f"vsn={1 + n % 2}.0.0&token=user{n}") for n in range(6)]
    for client in clients[1::2]:
        await client.join("room:a")
    for client in clients[::2]:
        client.text('{"topic":"room:a","event":"phx_join","payload":{},"ref":"1"}')
        await client.next()
    encoded: list[str] = []
    for version in (wire_module.V1, wire_module.V2):
        original = version.tail

        def counting(topic: str, event: str, payload: bytes, original: object = original) -> bytes:
            encoded.append(event)
            return original(topic, event, payload)  # type: ignore[operator,no-any-return]

        monkeypatch.setattr(type(version), "tail", staticmethod(counting))
    assert endpoint.hub.broadcast("room:a", "news", b'{"n":1}') == 6
    assert encoded == ["news", "news"]
    for client in clients:
        assert json.dumps(await client.next()).count('"n": 1') == 1


async def test_broadcast_without_the_one_who_caused_it(serve: Serve, connect: Connect) -> None:
    _, port = await serve()
    speaker, listener = await connect(port), await connect(port)
    await speaker.join("room:a")
    await listener.join("room:a")
    speaker.send("1", "2", "room:a", "whisper", {"text": "x"})
    assert (await speaker.next())[3] == "phx_reply"
    assert await listener.next() == ["1", None, "room:a", "whispered", {"text": "x"}]
    await speaker.silence()


async def test_a_channel_may_follow_another_topic_under_its_own_name(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    client = await connect(port)
    await client.join("lobby")
    assert endpoint.hub.broadcast("announcements", "news", {"n": 1}) == 1
    assert await client.next() == ["1", None, "lobby", "news", {"n": 1}]
    assert endpoint.hub.broadcast("lobby", "news") == 0
    (lobby,) = endpoint.hub.channels("announcements")
    assert isinstance(lobby, Lobby)
    lobby.unsubscribe("announcements")
    lobby.unsubscribe("announcements")
    assert not endpoint.hub.has_subscribers("announcements")


async def test_broadcast_of_bytes_reaches_those_who_can_take_them(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    new = await connect(port)
    old = await connect(port, "vsn=1.0.0&token=bob")
    await new.join("room:a", ref="12")
    old.text('{"topic":"room:a","event":"phx_join","payload":{},"ref":"1"}')
    await old.next()
    assert endpoint.hub.broadcast_binary("room:a", "bytes", b"\x00\xff") == 1
    assert await new.receive() == (BINARY, b"\x00\x02\x06\x0512room:abytes\x00\xff")
    # Without a join_ref there is nothing to stamp: the form of a broadcast.
    new.send(None, "3", "room:b", "phx_join", {})
    await new.next()
    endpoint.hub.broadcast_binary("room:b", "bytes", b"\x01")
    assert await new.receive() == (BINARY, b"\x02\x06\x05room:bbytes\x01")


async def test_hooks_of_the_first_and_the_last_subscriber(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    seen: list[str] = []
    endpoint.hub.on_first_subscriber = lambda topic: seen.append(f"+{topic}")
    endpoint.hub.on_last_unsubscribed = lambda topic: seen.append(f"-{topic}")
    clients = [await connect(port) for _ in range(2)]
    for client in clients:
        await client.join("room:a")
    for client in clients:
        client.send("1", "2", "room:a", "phx_leave", {})
        await client.next()
    assert seen == ["+room:a", "-room:a"]


async def test_iterating_subscribers_while_they_go(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    for _ in range(3):
        await (await connect(port)).join("room:a")
    for channel in endpoint.hub.channels("room:a"):
        channel.close()
    assert [room.terminations for room in Room.rooms] == [1, 1, 1]


def test_an_empty_hub_is_kept() -> None:
    hub = Hub()
    assert (
        Endpoint([], lambda request: pytest.fail("nobody connects"), clock=SystemClock(), hub=hub).hub is hub
    )
