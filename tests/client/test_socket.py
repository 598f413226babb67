"""The socket and the feed against real channels: replies, refusals, reconnects, close codes, holes, duplicates."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.client.phoenix import PhoenixServer, Tokens
from whispr.client.backoff import Backoff
from whispr.client.failures import ApiError, JoinRefused, SessionEnded, Unreachable
from whispr.client.feed import Feed, JoinReply, SyncReply
from whispr.client.models import LogEvent
from whispr.client.socket import Socket, SocketOptions
from whispr.kit.errors import Forbidden, Unavailable

QUICK = Backoff(base=0.01, cap=0.05)


@pytest.fixture
async def server() -> AsyncIterator[PhoenixServer]:
    running = PhoenixServer()
    await running.start()
    yield running
    await running.stop()


class Client:
    """One socket with one conversation, and everything that came of it."""

    def __init__(self, server: PhoenixServer, tokens: Tokens | None = None, **options: Any) -> None:
        self.tokens = tokens or Tokens("token-1")
        self.ended: list[SessionEnded] = []
        self.closed: list[JoinRefused | None] = []
        self.events: list[int] = []
        self.lost: list[tuple[int, int]] = []
        self.resets: list[str] = []
        values = {"reconnect": QUICK, "rejoin": QUICK, "reply_timeout": 2.0, **options}
        self.socket = Socket(
            server.url, self.tokens, options=SocketOptions(**values), on_ended=self.ended.append
        )
        self.feed = Feed(
            None,
            0,
            deliver=lambda events: self.events.extend(event.seq for event in events),
            fetch=self._fetch,
            lost=lambda first, last: self.lost.append((first, last)),
            reset=self.resets.append,
            backoff=QUICK,
        )
        self.channel = self.socket.channel(
            "conversation:1",
            params=self.feed.params,
            on_join=lambda reply: self.feed.joined(msgspec.json.decode(reply, type=JoinReply)),
            on_event=self._event,
            on_closed=self.closed.append,
        )
        self.socket.start()

    async def _fetch(self, after: int) -> SyncReply:
        return msgspec.json.decode(await self.channel.push("sync", {"after_seq": after}), type=SyncReply)

    def _event(self, name: str, payload: msgspec.Raw) -> None:
        seq = msgspec.json.decode(payload)["seq"]
        self.feed.offer([LogEvent(seq, name, msgspec.Raw(bytes(payload)))])

    async def stop(self) -> None:
        self.feed.close()
        await self.socket.stop()


@contextlib.asynccontextmanager
async def client_of(
    server: PhoenixServer, tokens: Tokens | None = None, **options: Any
) -> AsyncIterator[Client]:
    client = Client(server, tokens, **options)
    try:
        yield client
    finally:
        await client.stop()


async def until(condition: Callable[[], object], within: float = 5.0) -> None:
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.005)


async def test_pushes_wait_for_the_join_and_keep_their_order(server: PhoenixServer) -> None:
    async with client_of(server) as client:
        assert not client.channel.joined
        replies = await asyncio.gather(*(client.channel.push("say", {"n": n}) for n in range(5)))
        assert [msgspec.json.decode(reply)["echo"]["n"] for reply in replies] == [0, 1, 2, 3, 4]
        assert [data["n"] for event, data in server.received] == [0, 1, 2, 3, 4]


async def test_refusals_carry_their_code_and_silence_is_unreachable(server: PhoenixServer) -> None:
    async with client_of(server) as client:
        with pytest.raises(ApiError) as refused:
            await client.channel.push("refuse", {})
        assert (refused.value.code, refused.value.passing) == ("forbidden", False)
        with pytest.raises(ApiError) as later:
            await client.channel.push("refuse", {"later": True})
        assert later.value.passing
        assert later.value.retry_after == 0.5
        with pytest.raises(Unreachable):
            await client.channel.push("silence", {}, timeout=0.05)


async def test_a_push_whose_answer_is_lost_with_the_connection_fails(server: PhoenixServer) -> None:
    async with client_of(server) as client:
        await until(lambda: client.channel.joined)
        pending = asyncio.create_task(client.channel.push("silence", {}))
        await until(lambda: server.received)
        client.socket.drop()
        with pytest.raises(Unreachable):
            await pending
        assert msgspec.json.decode(await client.channel.push("again", {"n": 1})) == {"echo": {"n": 1}}
        assert client.socket.connections == 2


async def test_a_push_made_while_away_goes_out_when_back(server: PhoenixServer) -> None:
    async with client_of(server) as client:
        await until(lambda: client.channel.joined)
        await client.socket.stop()
        assert not client.channel.joined
        assert not client.channel.cast("typing", {})
        waiting = asyncio.create_task(client.channel.push("say", {"n": 7}))
        await asyncio.sleep(0.01)
        client.socket.start()
        assert msgspec.json.decode(await waiting) == {"echo": {"n": 7}}


async def test_a_join_refused_for_good_ends_the_channel_and_a_passing_one_does_not(
    server: PhoenixServer,
) -> None:
    server.refuse_joins = [Unavailable(), Unavailable()]
    async with client_of(server) as client:
        await until(lambda: client.channel.joined)
        assert len(server.joins) == 3
        assert client.closed == []
    server.refuse_joins = [Forbidden()]
    async with client_of(server) as client:
        with pytest.raises(JoinRefused) as refused:
            await client.channel.push("say", {})
        assert refused.value.code == "forbidden"
        assert len(client.closed) == 1
        with pytest.raises(JoinRefused):
            await client.channel.push("say", {})


async def test_a_crashed_channel_is_joined_again_where_it_was(server: PhoenixServer) -> None:
    async with client_of(server) as client:
        server.append(push=False)
        await until(lambda: client.channel.joined)
        client.channel.cast("crash", {})
        await until(lambda: len(server.joins) == 2 and client.channel.joined)
        assert client.socket.connections == 1
        server.append()
        await until(lambda: client.events == [1, 2])


async def test_frames_of_an_earlier_join_are_dropped(server: PhoenixServer) -> None:
    async with client_of(server) as client:
        await until(lambda: client.channel.joined)
        client.socket._received(b'["stale",null,"conversation:1","new_message",{"seq":1}]')
        client.socket._received(b"not json")
        client.socket._received(b'[null,null,"conversation:other","new_message",{"seq":1}]')
        assert client.events == []
        client.socket._received(b'[null,null,"conversation:1","new_message",{"seq":1}]')
        assert client.events == [1]


async def test_leaving_ends_the_channel_without_coming_back(server: PhoenixServer) -> None:
    async with client_of(server) as client:
        await until(lambda: client.channel.joined)
        client.channel.leave()
        client.socket.drop()
        await until(lambda: client.socket.connections == 2)
        await asyncio.sleep(0.05)
        assert len(server.joins) == 1


async def test_a_silent_server_is_noticed_by_the_heartbeat(server: PhoenixServer) -> None:
    async with client_of(server, heartbeat=0.03) as client:
        await until(lambda: client.channel.joined)
        client.socket.send = lambda *_: None  # type: ignore[method-assign]
        await until(lambda: client.socket.connections >= 2)


# Close codes


async def test_1001_asks_for_a_new_token_before_anything_else(server: PhoenixServer) -> None:
    server.valid_tokens = {"token-1", "token-2"}
    async with client_of(server, Tokens("token-1", "token-2")) as client:
        await until(lambda: client.channel.joined)
        server.valid_tokens = {"token-2"}
        server.endpoint.disconnect(lambda caller: True)
        await until(lambda: client.socket.connections == 2 and client.channel.joined)
        assert client.tokens.refusals == ["token-1"]
        assert server.tokens_seen == ["token-1", "token-2"]


async def test_1001_ends_the_socket_when_the_login_is_gone(server: PhoenixServer) -> None:
    async with client_of(server) as client:
        await until(lambda: client.channel.joined)
        server.endpoint.disconnect(lambda caller: True)
        await until(lambda: client.ended)
        await asyncio.sleep(0.05)
        assert client.socket.connections == 1


async def test_a_refused_handshake_refreshes_the_token(server: PhoenixServer) -> None:
    server.valid_tokens = {"token-2"}
    async with client_of(server, Tokens("token-1", "token-2")) as client:
        await until(lambda: client.channel.joined)
        assert client.tokens.refusals == ["token-1"]


async def test_1012_and_a_server_that_is_away_are_waited_out(server: PhoenixServer) -> None:
    async with client_of(server) as client:
        server.append()
        await until(lambda: client.events == [1])
        await server.stop()
        server.append(push=False)
        await asyncio.sleep(0.05)
        assert client.tokens.refusals == []
        await server.start()
        await until(lambda: client.events == [1, 2])


def test_waits_are_jittered_and_capped() -> None:
    backoff = Backoff(base=1.0, cap=8.0)
    for attempt in (0, 2, 50):
        delays = [backoff.delay(attempt) for _ in range(200)]
        assert max(delays) <= min(8.0, 2.0**attempt)
        assert max(delays) - min(delays) > min(8.0, 2.0**attempt) / 2
    assert backoff.delay(0, at_least=5.0) >= 5.0


# Order, holes, duplicates


async def test_live_events_holes_and_duplicates(server: PhoenixServer) -> None:
    async with client_of(server) as client:
        for _ in range(10):
            server.append(push=False)
        await until(lambda: client.events == list(range(1, 11)))
        server.append()
        server.append(push=False)
        server.append(push=False)
        server.append()
        server.append()
        await until(lambda: client.events == list(range(1, 16)))
        client.feed.offer([LogEvent(n, "new_message", msgspec.Raw(b"{}")) for n in range(1, 16)])
        assert client.events == list(range(1, 16))
        assert client.lost == []


async def test_any_number_of_disconnects_loses_and_repeats_nothing(server: PhoenixServer) -> None:
    async with client_of(server) as client:
        for n in range(120):
            server.append(push=n % 7 != 0)
            if n % 10 == 3:
                client.socket.drop()
            if n % 25 == 5:
                server.endpoint.disconnect(lambda caller: True, code=1012)
            if n % 4 == 0:
                await asyncio.sleep(0.004)
        await until(lambda: client.channel.joined)
        server.append()  # announces the end: nobody can miss events that nothing follows
        await until(lambda: len(client.events) >= 121, within=10)
        assert client.events == list(range(1, 122))
        assert client.lost == []
        assert client.socket.connections > 3


async def test_a_failing_sync_is_tried_again(server: PhoenixServer) -> None:
    server.sync_failures = [Unavailable(), Unavailable()]
    async with client_of(server) as client:
        for _ in range(9):
            server.append(push=False)
        await until(lambda: client.events == list(range(1, 10)))


async def test_a_member_who_joined_later_begins_later_without_alarm(server: PhoenixServer) -> None:
    for _ in range(9):
        server.append(push=False)
    server.floor = 5
    async with client_of(server) as client:
        await until(lambda: client.events == [6, 7, 8, 9])
        assert client.lost == []


async def test_events_that_the_server_no_longer_has_are_reported_never_skipped_in_silence(
    server: PhoenixServer,
) -> None:
    async with client_of(server) as client:
        server.append()
        await until(lambda: client.events == [1])
        await client.socket.stop()
        for _ in range(9):
            server.append(push=False)
        server.floor = 6
        client.feed.epoch = None  # joins without a cursor, so that only sync can fill the hole
        client.socket.start()
        await until(lambda: len(client.events) == 5)
        assert client.events == [1, 7, 8, 9, 10]
        assert client.lost == [(2, 6)]


async def test_a_restored_server_is_read_from_the_beginning(server: PhoenixServer) -> None:
    async with client_of(server) as client:
        server.append()
        server.append()
        await until(lambda: client.events == [1, 2])
        server.epoch = str(uuid4())
        server.log.pop()
        client.socket.drop()
        await until(lambda: client.resets == [server.epoch])
        await until(lambda: client.events == [1, 2, 1])


@settings(max_examples=40, deadline=None)
@given(st.data())
async def test_whatever_the_order_the_feed_gives_each_event_once_in_order(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 25))
    log = [LogEvent(n, "e", msgspec.Raw(b"{}")) for n in range(1, size + 1)]
    got: list[int] = []
    away = data.draw(st.lists(st.booleans(), max_size=5))

    async def fetch(after: int) -> SyncReply:
        if away and away.pop():
            raise Unreachable("away")
        return SyncReply(log[after : after + 3], more=after + 3 < size)

    async with asyncio.timeout(10):
        feed = Feed(
            None,
            0,
            deliver=lambda events: got.extend(event.seq for event in events),
            fetch=fetch,
            lost=lambda first, last: pytest.fail(f"lost {first}..{last}"),
            reset=lambda epoch: pytest.fail("no reset"),
            backoff=Backoff(base=0.0, cap=0.0),
        )
        arrivals = data.draw(st.lists(st.tuples(st.sampled_from(log), st.booleans()), max_size=40))
        for event, pause in arrivals:
            feed.offer([event])
            if pause:
                await asyncio.sleep(0)
            assert got == list(range(1, len(got) + 1))
        feed.joined(JoinReply("epoch", size, events=log[-2:]))
        while len(got) < size:
            await asyncio.sleep(0)
        feed.close()
    assert got == list(range(1, size + 1))
