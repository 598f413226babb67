"""The rules of Phoenix's socket.ex, over a real WebSocket."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.kit.channels.conftest import Connect, Serve
from tests.kit.channels.raw import BINARY, RawClient, until
from tests.kit.channels.room import Room

from whispr.kit.channels import Limits
from whispr.kit.channels.metrics import stats

OK: dict[str, Any] = {"status": "ok", "response": {}}


def error(reason: str, **fields: Any) -> dict[str, Any]:
    return {"status": "error", "response": {"reason": reason, **fields}}


@pytest.fixture
async def client(serve: Serve, connect: Connect) -> RawClient:
    _, port = await serve()
    return await connect(port)


async def test_join_answers_with_what_the_channel_returns(client: RawClient) -> None:
    # join_ref and ref are independent of each other.
    client.send("11", "1", "room:a", "phx_join", {"x": [1]})
    assert await client.next() == [
        "11",
        "1",
        "room:a",
        "phx_reply",
        {"status": "ok", "response": {"id": "a", "params": {"x": [1]}}},
    ]


async def test_join_may_answer_raw_json(client: RawClient) -> None:
    assert await client.join("lobby") == {"status": "ok", "response": {"raw": True}}


async def test_join_without_parameters(client: RawClient) -> None:
    client.send("1", "1", "room:a", "phx_join", None)
    assert (await client.next())[4]["response"]["params"] == {}


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"refuse": True}, error("forbidden", member_of=["nothing"])),
        ({"crash": True}, error("join crashed")),
        ({"parse": True}, error("invalid_payload")),
        ({"shape": True}, error("invalid_payload")),
    ],
)
async def test_join_refused(client: RawClient, params: Any, reason: Any) -> None:
    assert await client.join("room:a", params) == reason
    assert Room.rooms[0].terminations == 1
    assert not Room.rooms[0].hub.has_subscribers("room:a")
    client.send("1", "2", "room:a", "echo", {})
    assert await client.next() == [None, "2", "room:a", "phx_reply", error("unmatched topic")]
    assert (await client.join("room:a"))["status"] == "ok"


@pytest.mark.parametrize("payload", ["[]", "1", '"x"', "true"])
async def test_join_parameters_must_be_an_object(client: RawClient, payload: str) -> None:
    client.text(f'["1","1","room:a","phx_join",{payload}]')
    assert await client.next() == ["1", "1", "room:a", "phx_reply", error("invalid_payload")]
    assert Room.rooms == []


async def test_factory_may_refuse_or_crash(client: RawClient) -> None:
    assert await client.join("room:foreign") == error("forbidden")
    assert await client.join("room:unmade") == error("join crashed")
    await client.silence()


async def test_join_that_takes_too_long(serve: Serve, connect: Connect) -> None:
    _, port = await serve(limits=Limits(join_timeout=0.05))
    client = await connect(port)
    assert await client.join("room:a", {"wait": True}) == error("timeout")
    assert Room.rooms[0].terminations == 1


async def test_unknown_topic_is_unmatched_without_join_ref(client: RawClient) -> None:
    for topic in ("nowhere", "room", "lobby:1", ""):
        client.send("1", "2", topic, "phx_join", {})
        assert await client.next() == [None, "2", topic, "phx_reply", error("unmatched topic")]


async def test_push_and_reply(client: RawClient) -> None:
    await client.join("room:a", ref="5")
    client.send("5", "6", "room:a", "echo", {"text": "é", "n": [1, None]})
    assert await client.next() == [
        "5",
        "6",
        "room:a",
        "phx_reply",
        {"status": "ok", "response": {"text": "é", "n": [1, None]}},
    ]
    # A null join_ref is accepted on anything but a join.
    client.send(None, "7", "room:a", "say", {"text": "x"})
    assert (await client.next())[4] == {"status": "ok", "response": {"heard": "x"}}


async def test_push_without_ref_gets_no_reply(client: RawClient) -> None:
    await client.join("room:a")
    client.send("1", None, "room:a", "echo", {})
    client.send("1", None, "room:a", "refused", {})
    client.send("1", None, "nowhere", "x", {})
    await client.silence()


async def test_only_the_first_reply_counts(client: RawClient) -> None:
    await client.join("room:a")
    client.send("1", "2", "room:a", "twice", {})
    assert (await client.next())[4]["response"] == {"n": 1}
    await client.silence()


@pytest.mark.parametrize(
    ("event", "payload", "answer"),
    [
        ("refused", {}, error("conflict", holder="bob")),
        ("say", {"text": 1}, error("invalid_payload")),
        ("say", {}, error("invalid_payload")),
        ("say", [], error("invalid_payload")),
        ("undecoded", {}, error("invalid_payload")),
        ("no such event", {}, error("unknown_event")),
        ("phx_reply", {}, error("unknown_event")),
    ],
)
async def test_failures_become_error_replies(
    client: RawClient, event: str, payload: Any, answer: Any
) -> None:
    await client.join("room:a")
    client.send("1", "2", "room:a", event, payload)
    assert await client.next() == ["1", "2", "room:a", "phx_reply", answer]
    client.send("1", "3", "room:a", "echo", {})
    assert (await client.next())[1] == "3"


async def test_crash_ends_the_channel_with_phx_error_and_nothing_else(client: RawClient) -> None:
    await client.join("room:a", ref="1")
    await client.join("room:b", ref="2")
    before = stats.crashes
    client.send("1", "3", "room:a", "crash", {})
    assert await client.next() == ["1", "1", "room:a", "phx_error", {"reason": "channel_crash"}]
    assert (Room.rooms[0].terminations, stats.crashes) == (1, before + 1)
    client.send("1", "4", "room:a", "echo", {})
    assert (await client.next())[4] == error("unmatched topic")
    client.send("2", "5", "room:b", "echo", {})
    assert (await client.next())[4] == OK
    assert (await client.join("room:a", ref="6"))["status"] == "ok"


async def test_crash_in_terminated_harms_nobody(client: RawClient) -> None:
    await client.join("room:dies-badly")
    client.send("1", "2", "room:dies-badly", "phx_leave", {})
    assert (await client.next())[4] == OK
    assert (await client.next())[3] == "phx_close"
    await client.silence()


async def test_joined_runs_after_the_reply(client: RawClient) -> None:
    assert (await client.join("room:greets"))["status"] == "ok"
    assert await client.next() == ["1", None, "room:greets", "welcome", {}]


async def test_crash_in_joined_ends_the_channel(client: RawClient) -> None:
    assert (await client.join("room:greets-badly"))["status"] == "ok"
    assert (await client.next())[3] == "phx_error"


async def test_server_closes_a_channel(client: RawClient) -> None:
    await client.join("room:a", ref="3")
    client.send("3", "4", "room:a", "close", {})
    assert await client.next() == ["3", "3", "room:a", "phx_close", {}]
    assert Room.rooms[0].terminations == 1


async def test_leave(client: RawClient) -> None:
    await client.join("room:a", ref="5")
    client.send("5", "9", "room:a", "phx_leave", {})
    assert await client.next() == ["5", "9", "room:a", "phx_reply", OK]
    assert await client.next() == ["5", "5", "room:a", "phx_close", {}]
    assert Room.rooms[0].terminations == 1
    assert not Room.rooms[0].hub.has_subscribers("room:a")


async def test_leaving_what_was_not_joined_is_fine(client: RawClient) -> None:
    client.send("8", "9", "room:a", "phx_leave", {})
    assert await client.next() == ["8", "9", "room:a", "phx_reply", OK]


async def test_frames_of_an_earlier_join_are_ignored(client: RawClient) -> None:
    await client.join("room:a", ref="2")
    client.send("1", "7", "room:a", "echo", {})
    client.send("1", "8", "room:a", "phx_leave", {})
    await client.silence()
    client.send("2", "9", "room:a", "echo", {})
    assert (await client.next())[4] == OK


async def test_second_join_ends_the_first(client: RawClient) -> None:
    await client.join("room:a", ref="1")
    client.send("2", "3", "room:a", "phx_join", {})
    assert await client.next() == ["1", "1", "room:a", "phx_close", {}]
    assert (await client.next())[:4] == ["2", "3", "room:a", "phx_reply"]
    assert [room.terminations for room in Room.rooms] == [1, 0]
    assert list(Room.rooms[1].hub.channels("room:a")) == [Room.rooms[1]]


async def test_second_join_while_the_first_is_undecided(client: RawClient) -> None:
    client.send("1", "1", "room:a", "phx_join", {"wait": True})
    await until(lambda: Room.rooms)
    client.send("2", "2", "room:a", "phx_join", {})
    assert (await client.next())[:4] == ["1", "1", "room:a", "phx_close"]
    assert (await client.next())[:4] == ["2", "2", "room:a", "phx_reply"]
    first, second = Room.rooms
    assert first.terminations == 0, "a channel is not torn down under its own running join"
    first.gate.set()
    await until(lambda: first.terminations)
    await client.silence()
    client.send("2", "3", "room:a", "echo", {})
    assert (await client.next())[4] == OK
    assert second.live


async def test_leave_while_the_join_is_undecided(client: RawClient) -> None:
    client.send("1", "1", "room:a", "phx_join", {"wait": True})
    client.send("1", "2", "room:a", "phx_leave", {})
    assert (await client.next())[1:4] == ["2", "room:a", "phx_reply"]
    assert (await client.next())[3] == "phx_close"
    Room.rooms[0].gate.set()
    await until(lambda: Room.rooms[0].terminations)
    await client.silence()
    assert not Room.rooms[0].hub.has_subscribers("room:a")


async def test_nothing_overtakes_the_join_reply(client: RawClient) -> None:
    client.send("1", "1", "room:a", "phx_join", {"wait": True})
    client.send("1", "2", "room:a", "echo", {"early": True})
    await client.silence()
    room = Room.rooms[0]
    assert room.hub.broadcast("room:a", "news", {"n": 2}) == 1
    await client.silence()
    room.gate.set()
    assert (await client.next())[1] == "1"
    assert await client.next() == ["1", None, "room:a", "early", {"n": 1}]
    assert await client.next() == ["1", None, "room:a", "news", {"n": 2}]
    assert (await client.next())[1:2] == ["2"]
    await client.silence()


async def test_pushes_during_a_join_that_is_refused(client: RawClient) -> None:
    client.send("1", "1", "room:a", "phx_join", {"wait": True, "refuse": True})
    client.send("1", "2", "room:a", "echo", {})
    await client.silence()
    Room.rooms[0].gate.set()
    assert (await client.next())[4]["response"]["reason"] == "forbidden"
    assert await client.next() == [None, "2", "room:a", "phx_reply", error("unmatched topic")]


async def test_what_is_held_during_a_join_is_bounded(serve: Serve, connect: Connect) -> None:
    _, port = await serve(limits=Limits(max_held_frames=3, max_waiting_frames=2))
    client = await connect(port)
    client.send("1", "1", "room:a", "phx_join", {"wait": True})
    for ref in ("2", "3", "4"):
        client.send("1", ref, "room:a", "echo", {})
    assert await client.next() == ["1", "4", "room:a", "phx_reply", error("overloaded")]
    for n in range(5):
        Room.rooms[0].hub.broadcast("room:a", "news", {"n": n})
    Room.rooms[0].gate.set()
    assert await client.next() == ["1", "1", "room:a", "phx_reply", error("overloaded")]
    assert Room.rooms[0].terminations == 1


async def test_handlers_that_take_their_time(client: RawClient) -> None:
    await client.join("room:a")
    for ref, text in (("2", "x"), ("3", "refused"), ("4", "parse"), ("5", "crash")):
        client.send("1", ref, "room:a", "later", {"text": text})
    client.send("1", "6", "room:a", "later", {})
    assert await client.next() == ["1", "6", "room:a", "phx_reply", error("invalid_payload")]
    Room.rooms[0].gate.set()
    assert await client.next() == [
        "1",
        "2",
        "room:a",
        "phx_reply",
        {"status": "ok", "response": {"later": "x"}},
    ]
    assert (await client.next())[4] == error("conflict")
    assert (await client.next())[4] == error("invalid_payload")
    assert (await client.next())[3] == "phx_error"


async def test_reply_after_the_channel_is_gone_is_silent(client: RawClient) -> None:
    await client.join("room:a")
    client.send("1", "2", "room:a", "later", {"text": "x"})
    client.send("1", "3", "room:a", "phx_leave", {})
    assert (await client.next())[1] == "3"
    await client.next()
    Room.rooms[0].gate.set()
    await client.silence()


async def test_running_handlers_are_bounded(serve: Serve, connect: Connect) -> None:
    _, port = await serve(limits=Limits(max_running_handlers=2))
    client = await connect(port)
    await client.join("room:a")
    for ref in ("2", "3", "4"):
        client.send("1", ref, "room:a", "later", {"text": "x"})
    assert await client.next() == ["1", "4", "room:a", "phx_reply", error("rate_limited", retry_after=1)]
    Room.rooms[0].gate.set()
    assert {(await client.next())[1] for _ in range(2)} == {"2", "3"}
    client.send("1", "5", "room:a", "later", {"text": "x"})
    assert (await client.next())[4]["status"] == "ok"


async def test_channels_per_socket_are_bounded(client: RawClient) -> None:
    for n in range(100):
        client.send(str(n), str(n), f"room:{n}", "phx_join", {})
    for _ in range(100):
        assert (await client.next())[4]["status"] == "ok"
    client.send("a", "b", "room:one-more", "phx_join", {})
    assert await client.next() == ["a", "b", "room:one-more", "phx_reply", error("too many channels joined")]
    client.send("0", "x", "room:0", "phx_leave", {})
    await client.next()
    await client.next()
    assert (await client.join("room:one-more", ref="c"))["status"] == "ok"
    # Joining anew needs no further place.
    client.send("d", "e", "room:5", "phx_join", {})
    assert (await client.next())[3] == "phx_close"
    assert (await client.next())[4]["status"] == "ok"


async def test_joins_under_decision_are_bounded_too(serve: Serve, connect: Connect) -> None:
    _, port = await serve(limits=Limits(max_channels=3))
    client = await connect(port)
    for ref in ("1", "2", "3"):
        client.send(ref, ref, "room:a", "phx_join", {"wait": True})
        client.send(ref, f"leave {ref}", "room:a", "phx_leave", {})
        assert (await client.next())[1] == f"leave {ref}"
        assert (await client.next())[3] == "phx_close"
    assert await client.join("room:a", ref="4") == error("too many channels joined")
    for room in Room.rooms:
        room.gate.set()
    await until(lambda: all(room.terminations for room in Room.rooms))
    assert (await client.join("room:a", ref="5"))["status"] == "ok"


async def test_disconnect_releases_everything(serve: Serve, connect: Connect) -> None:
    gone: list[int] = []
    endpoint, port = await serve(on_disconnect=lambda socket: gone.append(socket.id))
    client = await connect(port)
    await client.join("room:a")
    client.send("2", "2", "room:b", "phx_join", {"wait": True})
    await until(lambda: len(Room.rooms) == 2)
    channels = stats.channels
    client.abandon()
    await until(lambda: gone)
    assert Room.rooms[0].terminations == 1
    assert Room.rooms[1].terminations == 0
    Room.rooms[1].gate.set()
    await until(lambda: Room.rooms[1].terminations)
    assert (len(endpoint.hub), list(endpoint.hub.topics())) == (0, [])
    assert stats.channels == channels - 1


async def test_heartbeats(client: RawClient) -> None:
    for text, ref in (
        ('[null,"7","phoenix","heartbeat",{}]', "7"),
        ('[null, "8", "phoenix", "heartbeat", {}]', "8"),
        ('["1","a b","phoenix","heartbeat",{}]', "a b"),
        ('[null,"\\"9","phoenix","heartbeat",{}]', '"9'),
    ):
        client.text(text)
        assert await client.next() == [None, ref, "phoenix", "phx_reply", OK]
    client.text('[null,null,"phoenix","heartbeat",{}]')
    await client.silence()
    client.send(None, "1", "phoenix", "other", {})
    assert await client.next() == [None, "1", "phoenix", "phx_reply", error("unmatched topic")]


@pytest.mark.parametrize(
    ("text", "ref", "topic"),
    [
        (b"", None, "phoenix"),
        (b"hello", None, "phoenix"),
        (b"{}", None, "phoenix"),
        (b"[]", None, "phoenix"),
        (b'["1","2","room:a","x"]', "2", "room:a"),
        (b'["1","2","room:a","x",{"a":}]', "2", "room:a"),
        (b'["1","2","room:a",5,{}]', "2", "room:a"),
        (b'["1","2",5,"x",{}]', "2", "phoenix"),
        (b'["1",2,"room:a","x",{}]', None, "phoenix"),
        (b'["1","2","room:a","x",{}] trailing', "2", "room:a"),
        (b'["1","2","room:a","x",{"a":"\xff"}]', "2", "room:a"),
        (b'["1","2","room:\xff","x",{}]', "2", "phoenix"),
        (b'["1","2","room:a","x",NaN]', "2", "room:a"),
        (b'["1","2","room:a","' + b"x" * 300 + b'",{}]', "2", "room:a"),
        (b'["1","2","room:a","x",' + b"[" * 100_000 + b"]" * 100_000 + b"]", "2", "room:a"),
    ],
)
async def test_malformed_frames_are_answered(
    client: RawClient, text: bytes, ref: str | None, topic: str
) -> None:
    before = stats.malformed
    client.text(text)
    _, got_ref, got_topic, event, payload = await client.next()
    assert (got_ref, got_topic, event) == (ref, topic, "phx_reply")
    assert (payload["status"], payload["response"]["reason"]) == ("error", "malformed_frame")
    assert stats.malformed == before + 1
    assert (await client.join("room:a"))["status"] == "ok"


async def test_too_many_malformed_frames_close_with_1008(serve: Serve, connect: Connect) -> None:
    time = 1000.0
    _, port = await serve(monotonic=lambda: time)
    client = await connect(port)
    for _ in range(100):
        client.text("?")
    for _ in range(100):
        await client.next()
    client.text("?")
    assert (await client.closed()).code == 1008


async def test_the_count_of_malformed_frames_starts_anew_each_minute(serve: Serve, connect: Connect) -> None:
    time = 1000.0
    endpoint, port = await serve(monotonic=lambda: time)
    client = await connect(port)
    for minute in range(3):
        for _ in range(60):
            client.text("?")
            await client.next()
        for _ in range(2):
            time += 31
            endpoint.sweep()
            await client.silence()
        assert minute < 3


async def test_version_1(serve: Serve, connect: Connect) -> None:
    _, port = await serve()
    client = await connect(port, "token=alice")

    async def exchange(message: Any) -> Any:
        client.text(json.dumps(message))
        return await client.next()

    beat = {"topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": "1"}
    assert await exchange(beat) == {"topic": "phoenix", "event": "phx_reply", "payload": OK, "ref": "1"}
    joined = await exchange({"topic": "room:a", "event": "phx_join", "payload": {"x": 1}, "ref": "2"})
    assert joined == {
        "topic": "room:a",
        "event": "phx_reply",
        "payload": {"status": "ok", "response": {"id": "a", "params": {"x": 1}}},
        "ref": "2",
    }
    client.text(json.dumps({"topic": "room:a", "event": "shout", "payload": {"n": 1}, "ref": "3"}))
    shouted = {"topic": "room:a", "event": "shouted", "payload": {"n": 1}, "ref": None}
    assert await client.next() == shouted
    assert (await client.next())["payload"] == OK
    client.frame(BINARY, b"\x00\x01\x01\x01\x011rte")
    assert (await client.next())["payload"]["response"]["reason"] == "malformed_frame"
    assert (await exchange("nonsense"))["payload"]["response"]["reason"] == "malformed_frame"
    crash = await exchange({"topic": "room:a", "event": "crash", "payload": {}, "ref": "4"})
    assert crash == {
        "topic": "room:a",
        "event": "phx_error",
        "payload": {"reason": "channel_crash"},
        "ref": None,
    }


async def test_binary_push_reply_and_broadcast(client: RawClient) -> None:
    await client.join("room:a", ref="12")
    client.frame(BINARY, b"\x00\x02\x03\x06\x0712123room:areverse\x01\x02\xff")
    assert await client.receive() == (BINARY, b"\x01\x02\x03\x06\x0212123room:aok\xff\x02\x01")
    client.frame(BINARY, b"\x00\x02\x00\x06\x0712room:ascatter\x00\xff")
    assert await client.receive() == (BINARY, b"\x00\x02\x06\x0912room:ascattered\x00\xff")
    # JSON inside a binary frame reaches the same handler; the reply to it is text.
    client.frame(BINARY, b"\x00\x02\x011\x03".replace(b"1", b"\x06") + b'127room:asay{"text":"x"}')
    assert await client.next() == [
        "12",
        "7",
        "room:a",
        "phx_reply",
        {"status": "ok", "response": {"heard": "x"}},
    ]


@pytest.mark.parametrize("data", [b"\xff\xfe", b'{"text":', b'{"text":"\xff"}', b""])
async def test_binary_push_that_should_hold_json(client: RawClient, data: bytes) -> None:
    await client.join("room:a", ref="1")
    client.frame(BINARY, b"\x00\x01\x01\x06\x0412room:aecho" + data)
    assert await client.next() == ["1", "2", "room:a", "phx_reply", error("invalid_payload")]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"\x01\x01\x01\x01\x0112te",
        b"\x09\x00\x00\x00\x00",
        b"\x00\xff\x01\x01\x01",
        b"\x00\x01\x00\x00\x00\xff",
    ],
)
async def test_malformed_binary_frames_are_answered(client: RawClient, data: bytes) -> None:
    client.frame(BINARY, data)
    answer = await client.next()
    assert (answer[2], answer[4]["response"]["reason"]) == ("phoenix", "malformed_frame")


async def test_join_by_binary_frame(client: RawClient) -> None:
    client.frame(BINARY, b'\x00\x01\x01\x06\x0811room:aphx_join{"x":1}')
    assert (await client.next())[4] == {"status": "ok", "response": {"id": "a", "params": {"x": 1}}}
