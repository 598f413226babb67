"""The WebSocket below the channels: fragments, control frames, closing, clients that do not read, draining."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
from typing import Any

import pytest
from tests.kit.channels.conftest import Connect, Serve
from tests.kit.channels.raw import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, Closed, RawClient, until
from tests.kit.channels.room import Room, user_id

from whispr.kit.channels import Limits
from whispr.kit.channels.metrics import stats
from whispr.kit.channels.websocket import WebSocketLink

BEAT = b'[null,"7","phoenix","heartbeat",{}]'
BEAT_ANSWER = [None, "7", "phoenix", "phx_reply", {"status": "ok", "response": {}}]


@pytest.fixture
async def client(serve: Serve, connect: Connect) -> RawClient:
    _, port = await serve()
    return await connect(port)


async def test_fragmented_messages_are_put_together(client: RawClient) -> None:
    for cut in (0, 1, 10, len(BEAT)):
        client.frame(TEXT, BEAT[:cut], fin=False)
        client.frame(PING, b"between")
        client.frame(CONTINUATION, b"", fin=False)
        client.frame(CONTINUATION, BEAT[cut:])
        assert await client.receive() == (PONG, b"between")
        assert await client.next() == BEAT_ANSWER
    await client.join("room:a", ref="1")
    client.frame(BINARY, b"\x00\x01\x01\x06\x0712room:areve", fin=False)
    client.frame(CONTINUATION, b"rse\x01\x02")
    assert (await client.receive())[1].endswith(b"ok\x02\x01")


@pytest.mark.parametrize(
    "frames",
    [
        [(CONTINUATION, BEAT, {})],
        [(TEXT, BEAT, {"fin": False}), (TEXT, BEAT, {})],
        [(TEXT, BEAT, {"fin": False}), (BINARY, BEAT, {"fin": False})],
        [(TEXT, BEAT, {"rsv": 4})],
        [(TEXT, BEAT, {"rsv": 1}), (TEXT, BEAT, {})],
        [(BINARY, BEAT, {"rsv": 2})],
        [(PING, b"", {"rsv": 4})],
        [(TEXT, BEAT, {"masked": False})],
        [(PING, b"x", {"fin": False})],
        [(PING, b"x" * 126, {})],
        [(3, b"", {})],
        [(CLOSE, b"\x03", {})],
        [(CLOSE, struct.pack("!H", 1005), {})],
    ],
)
async def test_violations_of_the_websocket_protocol_close_with_1002(
    client: RawClient, frames: list[tuple[int, bytes, dict[str, Any]]]
) -> None:
    for opcode, payload, options in frames:
        client.frame(opcode, payload, **options)
    assert (await client.closed()).code == 1002
    client.frame(CLOSE, struct.pack("!H", 1002))
    await client.eof()


async def test_ping_and_unasked_pong(client: RawClient) -> None:
    client.frame(PING, b"")
    assert await client.receive() == (PONG, b"")
    client.frame(PONG, b"nobody asked")
    await client.silence()


@pytest.mark.parametrize(
    ("sent", "code"), [(b"", 1000), (struct.pack("!H", 1000) + b"bye", 1000), (struct.pack("!H", 4001), 4001)]
)
async def test_client_closes(client: RawClient, sent: bytes, code: int) -> None:
    await client.join("room:a")
    client.frame(CLOSE, sent)
    assert (await client.closed()).code == code
    await client.eof()
    assert Room.rooms[0].terminations == 1


async def test_messages_up_to_the_limit_and_over(serve: Serve, connect: Connect) -> None:
    _, port = await serve(limits=Limits(max_frame_size=20_000))
    client = await connect(port)
    await client.join("room:a")

    def push_of(size: int) -> bytes:
        frame = b'["1","2","room:a","echo",{"x":"%b"}]'
        return frame % (b"A" * (size - len(frame) + 2))

    client.text(push_of(20_000))
    assert len((await client.next())[4]["response"]["x"]) > 19_000
    client.frame(TEXT, push_of(20_000)[:10_000], fin=False)
    client.frame(CONTINUATION, push_of(20_000)[10_000:])
    assert len((await client.next())[4]["response"]["x"]) > 19_000
    client.text(push_of(20_001))
    assert (await client.closed()).code == 1009

    client = await connect(port)
    client.frame(TEXT, push_of(20_001)[:15_000], fin=False)
    client.frame(CONTINUATION, push_of(20_001)[15_000:])
    assert (await client.closed()).code == 1009


async def test_large_and_small_frames_do_not_overwrite_each_other(client: RawClient) -> None:
    await client.join("room:a")
    sizes = [9000, 10, 20_000, 8185, 8192, 8200, 30_000, 1, 70_000]
    for ref, size in enumerate(sizes):
        client.send("1", str(ref), "room:a", "echo", {"x": chr(65 + ref) * size})
    for ref, size in enumerate(sizes):
        frame = await client.next()
        assert (frame[1], frame[4]["response"]["x"] == chr(65 + ref) * size) == (str(ref), True)


async def test_what_was_sent_comes_before_the_close_of_the_same_turn(client: RawClient) -> None:
    await client.join("room:a")
    room = Room.rooms[0]
    room.push("one", {"n": 1})
    room.push("two", {"n": 2})
    room.socket.close(1001, "kicked")
    assert [(await client.next())[3:] for _ in range(2)] == [["one", {"n": 1}], ["two", {"n": 2}]]
    assert (await client.closed()).code == 1001


async def test_a_socket_that_cannot_be_written_to_keeps_nothing_from_the_others(
    serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, port = await serve()
    broken, sound = [await connect(port, f"vsn=2.0.0&token=user{n}") for n in range(2)]
    for client in (broken, sound):
        await client.join("room:a")
    links = [room.socket.link for room in Room.rooms]
    flush = WebSocketLink.flush

    def fail_once(link: WebSocketLink) -> None:
        if link is links[0]:
            raise RuntimeError("closed under our hands")
        flush(link)

    monkeypatch.setattr(WebSocketLink, "flush", fail_once)
    for room in Room.rooms:
        room.push("news", {})
    assert (await sound.next())[3] == "news"


async def test_silent_clients_are_closed_after_a_minute(serve: Serve, connect: Connect) -> None:
    time = 500.0
    endpoint, port = await serve(monotonic=lambda: time)
    silent, pinging, beating = [await connect(port) for _ in range(3)]
    for _ in range(4):
        time += 20
        endpoint.sweep()
        pinging.frame(PING, b"")
        assert await pinging.receive() == (PONG, b"")
        beating.text(BEAT)
        assert await beating.next() == BEAT_ANSWER
    closed = await silent.closed()
    assert (closed.code, closed.reason) == (1001, "idle timeout")
    assert len(endpoint.hub) == 2


async def test_a_minute_of_silence_is_measured_from_the_last_frame(serve: Serve, connect: Connect) -> None:
    time = 500.0
    endpoint, port = await serve(monotonic=lambda: time)
    client = await connect(port)
    time += 50
    endpoint.sweep()
    client.text(BEAT)
    await client.next()
    time += 55
    endpoint.sweep()
    await asyncio.sleep(0)
    assert len(endpoint.hub) == 1
    time += 12
    endpoint.sweep()
    assert (await client.closed()).code == 1001


async def test_a_client_that_does_not_answer_the_close_is_cut_off(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve(limits=Limits(close_timeout=0.1))
    client = await connect(port)
    assert endpoint.disconnect(lambda caller: True) == 1
    with pytest.raises(Closed) as caught:
        await client.receive()
    assert (caught.value.code, caught.value.reason) == (1001, "revoked")
    await client.eof()


def deaf_client(port: int) -> socket.socket:
    """Connected and joined to room:a, with a small buffer, never to read again."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    connection.sendall(
        b"GET /socket/websocket?vsn=2.0.0&token=deaf HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    join = b'["1","1","room:a","phx_join",{}]'
    connection.sendall(bytes([0x81, 0x80 | len(join)]) + bytes(4) + join)
    connection.setblocking(False)
    return connection


async def test_a_client_that_does_not_read_is_closed_and_the_others_are_not_held_up(
    serve: Serve, connect: Connect
) -> None:
    endpoint, port = await serve(limits=Limits(max_write_buffer=200_000, close_timeout=0.1))
    deaf = deaf_client(port)
    client = await connect(port)
    await client.join("room:a")
    await until(lambda: len(endpoint.hub.channels("room:a")) == 2)
    before = stats.slow_closes
    big = json.dumps({"x": "A" * 100_000}).encode()
    sent = 0
    while stats.slow_closes == before:
        assert sent < 1000
        endpoint.hub.broadcast("room:a", "big", big)
        sent += 1
        assert (await client.next())[3] == "big"
    assert not endpoint.hub.is_online(user_id("deaf"))
    assert stats.closes[1013] > 0
    await client.silence()
    deaf.close()


async def test_a_client_that_does_not_read_is_not_read_either(serve: Serve) -> None:
    time = 500.0
    endpoint, port = await serve(monotonic=lambda: time, limits=Limits(close_timeout=0.1))
    deaf = deaf_client(port)
    await until(lambda: endpoint.hub.channels("room:a"))
    (channel,) = endpoint.hub.channels("room:a")
    big = json.dumps({"x": "A" * 100_000}).encode()
    while not channel.socket.link.stalled:
        channel.push("big", big)
        await asyncio.sleep(0)
    received = stats.frames_in
    deaf.send(bytes([0x81, 0x80 | len(BEAT)]) + bytes(4) + BEAT)
    for _ in range(7):
        time += 11
        endpoint.sweep()
        await asyncio.sleep(0.01)
    assert stats.frames_in == received
    assert not endpoint.hub.is_online(user_id("deaf"))
    deaf.close()


async def test_a_slow_client_that_catches_up_is_read_again(serve: Serve) -> None:
    endpoint, port = await serve()
    deaf = deaf_client(port)
    await until(lambda: endpoint.hub.channels("room:a"))
    (channel,) = endpoint.hub.channels("room:a")
    big = json.dumps({"x": "A" * 100_000}).encode()
    while not channel.socket.link.stalled:
        channel.push("big", big)
        await asyncio.sleep(0)
    deaf.send(bytes([0x81, 0x80 | len(BEAT)]) + bytes(4) + BEAT)
    loop = asyncio.get_running_loop()
    tail = b""
    async with asyncio.timeout(5):
        while b'"phx_reply",{"status":"ok","response":{}}' not in tail:
            tail = (tail + await loop.sock_recv(deaf, 65536))[-200:]
    await until(lambda: not channel.socket.link.stalled)
    deaf.close()


async def test_drain_sends_everyone_elsewhere(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    clients = [await connect(port, f"vsn=2.0.0&token=user{n}") for n in range(20)]
    await clients[0].join("room:a")
    draining = asyncio.create_task(endpoint.drain(window=0.2, grace=2))
    closed = []
    for client in clients:
        closed.append((await client.closed()).code)
        client.frame(CLOSE, struct.pack("!H", 1012))
    await draining
    assert set(closed) == {1012}
    assert Room.rooms[0].terminations == 1
    with pytest.raises(ConnectionRefusedError):
        await RawClient.connect(port)


async def test_drain_is_spread_over_its_window(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    clients = [await connect(port, f"vsn=2.0.0&token=user{n}") for n in range(10)]
    loop = asyncio.get_running_loop()
    start = loop.time()
    times: list[float] = []

    async def watch(client: RawClient) -> None:
        await client.closed()
        times.append(loop.time() - start)
        client.frame(CLOSE, struct.pack("!H", 1012))

    await asyncio.gather(endpoint.drain(window=0.5, grace=2), *(watch(client) for client in clients))
    assert min(times) < 0.1
    assert max(times) > 0.35


async def test_drain_cuts_off_who_does_not_go(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    client = await connect(port)
    async with asyncio.timeout(2):
        await endpoint.drain(window=0, grace=0.1)
    assert (await client.closed()).code == 1012
    await client.eof()


async def test_drain_refuses_who_connects_meanwhile(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    await connect(port)
    # Accepted by the kernel before the listener closed, upgraded after.
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.sleep(0.05)
    draining = asyncio.create_task(endpoint.drain(window=0.3, grace=0.1))
    await asyncio.sleep(0.1)
    writer.write(b"GET /socket/websocket?vsn=2.0.0&token=late HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b" 503 " in await reader.readline()
    writer.close()
    await draining


async def test_drain_lets_running_handlers_finish(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    client = await connect(port)
    client.send("1", "1", "room:a", "phx_join", {"wait": True})
    await until(lambda: Room.rooms)
    draining = asyncio.create_task(endpoint.drain(window=0, grace=2))
    client.frame(CLOSE, struct.pack("!H", 1012))
    await asyncio.sleep(0.05)
    Room.rooms[0].gate.set()
    await draining
    assert Room.rooms[0].terminations == 1


async def test_drain_cancels_handlers_that_do_not_finish(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    client = await connect(port)
    client.send("1", "1", "room:a", "phx_join", {"wait": True})
    await until(lambda: Room.rooms)
    await endpoint.drain(window=0, grace=0.1)
    assert Room.rooms[0].terminations == 1


async def test_disconnect_closes_those_concerned_with_1001(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    phone = await connect(port, "vsn=2.0.0&token=alice/phone")
    laptop = await connect(port, "vsn=2.0.0&token=alice/laptop")
    bob = await connect(port, "vsn=2.0.0&token=bob")
    devices = endpoint.hub.devices_online(user_id("alice"))
    assert len(devices) == 2
    assert len(endpoint.hub.sockets_of(user_id("alice"))) == 2
    (first, *_) = endpoint.hub.sockets_of(user_id("alice"))
    assert endpoint.disconnect(lambda caller: caller.device_id == first.caller.device_id) == 1
    closed = await phone.closed()
    assert (closed.code, closed.reason) == (1001, "revoked")
    await laptop.silence()
    assert endpoint.disconnect_user(user_id("alice"), reason="account deleted") == 1
    assert (await laptop.closed()).reason == "account deleted"
    await bob.silence()
    assert not endpoint.hub.is_online(user_id("alice"))
    assert endpoint.disconnect_user(user_id("alice")) == 0


async def test_two_processes_may_share_a_port(serve: Serve, connect: Connect) -> None:
    endpoint, _ = await serve()
    other, _ = await serve()
    port = await endpoint.listen("127.0.0.1", 0, reuse_port=True)
    assert await other.listen("127.0.0.1", port, reuse_port=True) == port
    for _ in range(40):
        await connect(port)
    assert len(endpoint.hub) + len(other.hub) == 40
    assert min(len(endpoint.hub), len(other.hub)) > 0


async def test_a_long_reason_is_cut(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    client = await connect(port)
    endpoint.disconnect(lambda caller: True, reason="x" * 500)
    assert await client.closed() == Closed(1001, "x" * 123)


async def test_random_bytes_never_crash_a_connection_handler(
    serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint, port = await serve()
    for _ in range(60):
        client = await connect(port)
        client.writer.write(os.urandom(300))
        client.writer.write_eof()
        try:
            await client.eof()
        except TimeoutError:
            pytest.fail("the connection hangs")
    await until(lambda: len(endpoint.hub) == 0)
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_broken_connection_is_not_logged_frame_by_frame(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint, port = await serve()
    client = deaf_client(port)
    await until(lambda: endpoint.hub.channels("room:a"))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    with caplog.at_level(logging.DEBUG):
        for _ in range(50):
            endpoint.hub.broadcast("room:a", "news", {"n": 1})
        await until(lambda: len(endpoint.hub) == 0)
    assert caplog.records == []


async def test_garbage_instead_of_http(serve: Serve) -> None:
    _, port = await serve()
    for garbage in (b"\x16\x03\x01\x00\xa5\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n", b"x" * 20_000):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(garbage)
        async with asyncio.timeout(5):
            assert b" 101 " not in await reader.read()
        writer.close()


async def test_drain_answers_what_is_being_worked_on(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    client = await connect(port)
    await client.join("room:a")
    client.send("1", "2", "room:a", "later", {"text": "done"})
    await until(lambda: Room.rooms[0].unanswered)
    draining = asyncio.create_task(endpoint.drain(window=0, grace=5))
    await asyncio.sleep(0.1)
    Room.rooms[0].gate.set()
    assert (await client.next())[4] == {"status": "ok", "response": {"later": "done"}}
    assert (await client.closed()).code == 1012
    client.frame(CLOSE, struct.pack("!H", 1012))
    await draining
    assert Room.rooms[0].unanswered == 0


async def test_drain_does_not_wait_for_ever_for_an_answer(serve: Serve, connect: Connect) -> None:
    endpoint, port = await serve()
    client = await connect(port)
    await client.join("room:a")
    client.send("1", "2", "room:a", "later", {"text": "never"})
    await until(lambda: Room.rooms[0].unanswered)
    async with asyncio.timeout(3):
        await endpoint.drain(window=0, grace=0.2)
    assert (await client.closed()).code == 1012
