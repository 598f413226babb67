"""PostgreSQL fails under the flusher at every point, and each message is still stored and told of exactly once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit
from uuid import UUID

import psycopg
import pytest
from tests.services.messaging.test_sending import Bench

from whispr.kit.errors import Failure
from whispr.services.messaging.models import CommittedEvent, Draft, NotAMember, SendResult
from whispr.services.messaging.service.flusher import SendingUnavailable
from whispr.services.messaging.store import conversations, members


class Proxy:
    """Stands between the flusher and PostgreSQL and cuts the connection when a batch passes.

    `cut` says when: "request" (the batch never arrives), "half" (a part of it arrives) or "answer" (it is committed, and
    the answer is lost). `refuse` lets nobody connect.
    """

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self.cut: str | None = None
        self.cuts = 0
        self.refuse = False
        self.refused = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        user = self._target.netloc.rpartition("@")[0]
        return self._target._replace(
            netloc=f"{user}@127.0.0.1:{port}" if user else f"127.0.0.1:{port}"
        ).geturl()

    async def stop(self) -> None:
        self._server.close()
        self.drop()

    def drop(self) -> None:
        """Cut every connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            self.refused += 1
            writer.transport.abort()
            return
        server_reader, server_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        both = {writer, server_writer}
        self._writers |= both
        doomed = asyncio.Event()
        with suppress(OSError):
            await asyncio.gather(
                self._pump(reader, server_writer, doomed, to_server=True),
                self._pump(server_reader, writer, doomed, to_server=False),
            )
        for end in both:
            end.transport.abort()
        self._writers -= both

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        doomed: asyncio.Event,
        *,
        to_server: bool,
    ) -> None:
        while data := await source.read(1 << 20):
            if to_server and self.cut is not None and b'{"ciphertext":' in data:
                cut, self.cut = self.cut, None
                self.cuts += 1
                if cut == "answer":
                    doomed.set()
                else:
                    if cut == "half":
                        sink.write(data[: len(data) // 2])
                        await sink.drain()
                    raise ConnectionResetError
            elif not to_server and doomed.is_set():
                raise ConnectionResetError
            sink.write(data)
            await sink.drain()
        raise ConnectionResetError


class FaultyBench(Bench):
    """A `Bench` whose flusher reaches PostgreSQL through a proxy."""

    def __init__(self, url: str, proxied_url: str, valkey_url: str, **options: float) -> None:
        super().__init__(proxied_url, valkey_url, **options)
        self.db = self.directory._db = type(self.db)(url, pool_size=3)


class WitnessedBench(FaultyBench):
    """A `FaultyBench` that looks, whenever somebody is told of a message, whether another session can see it.

    `premature` is what was told too early, `acknowledged` the numbers of the messages whose sender was answered.
    """

    def __init__(self, url: str, proxied_url: str, valkey_url: str, **options: float) -> None:
        super().__init__(url, proxied_url, valkey_url, **options)
        self._witness = psycopg.connect(url, autocommit=True)
        self.premature: list[tuple[str, int]] = []
        self.acknowledged: list[int] = []
        self.refused: list[Failure] = []

    async def __aexit__(self, *error: object) -> None:
        await super().__aexit__(*error)
        self._witness.close()

    def publish(self, events: list[CommittedEvent]) -> None:
        for event in events:
            self._look("published", event.conversation_id, event.seq)
        super().publish(events)

    def submit(self, drafts: list[Draft]) -> None:
        """Send without waiting."""
        for draft in drafts:
            self.sending.submit(draft, self._answer)

    def _answer(self, answer: SendResult | Failure) -> None:
        if isinstance(answer, Failure):
            self.refused.append(answer)
            return
        head = answer.message.head
        self._look("acknowledged", head.conversation_id, head.seq)
        self.acknowledged.append(head.seq)

    def _look(self, what: str, conversation_id: UUID, seq: int) -> None:
        # Synchronous on purpose: nothing else may happen between the telling and the look.
        found = self._witness.execute(
            "SELECT 1 FROM messages WHERE conversation_id = %s AND seq = %s", (conversation_id, seq)
        )
        if found.fetchone() is None:
            self.premature.append((what, seq))


@pytest.fixture(scope="session")
def messaging_url(database: Callable[[str], str]) -> str:
    return database("messaging")


@pytest.mark.parametrize("cut", ["request", "half", "answer"])
async def test_lost_connection_is_nobodys_business(messaging_url: str, valkey_url: str, cut: str) -> None:
    proxy = Proxy(messaging_url)
    async with FaultyBench(messaging_url, await proxy.start(), valkey_url) as bench:
        conversation_id, one, two = await bench.pair()
        await bench.sending.send(one.draft(conversation_id))
        proxy.cut = cut
        drafts = [device.draft(conversation_id) for device in (one, two) for _ in range(10)]
        results = await asyncio.gather(*(bench.sending.send(draft) for draft in drafts))
        assert proxy.cuts == 1
        assert [result.duplicate for result in results] == [False] * 20
        assert [result.message.head.seq for result in results] == list(range(2, 22))
        log = await bench.log(conversation_id)
        assert [event.seq for event in log] == list(range(1, 22))
        assert bench.published == log
    await proxy.stop()


@pytest.mark.parametrize("cut", [None, "request", "half", "answer"])
async def test_nobody_is_told_before_the_commit(messaging_url: str, valkey_url: str, cut: str | None) -> None:
    proxy = Proxy(messaging_url)
    async with WitnessedBench(messaging_url, await proxy.start(), valkey_url) as bench:
        conversation_id, one, two = await bench.pair()
        await bench.sending.send(one.draft(conversation_id))
        proxy.cut = cut
        bench.submit([device.draft(conversation_id) for device in (one, two) for _ in range(10)])
        await bench.sending.drain()
        assert bench.acknowledged == list(range(2, 22))
        assert [event.seq for event in bench.published] == list(range(1, 22))
        assert bench.premature == []
    await proxy.stop()


async def test_nobody_is_told_while_the_commit_waits(messaging_url: str, valkey_url: str) -> None:
    """Also not on the second way in, where what changed meanwhile is stored again under a lock."""
    async with WitnessedBench(messaging_url, messaging_url, valkey_url) as bench:
        conversation_id, one, two = await bench.pair()
        await bench.sending.send(one.draft(conversation_id))
        async with bench.db.transaction() as tx:
            await conversations.append_event(
                tx, conversation_id, "conversation_updated", {}, bench.clock.now()
            )
            bench.submit([device.draft(conversation_id) for device in (one, two)])
            while not await tx.fetchval(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE wait_event_type = 'Lock' AND datname = current_database()"
            ):
                await asyncio.sleep(0.01)
            assert (len(bench.published), bench.acknowledged, bench.refused) == (1, [], [])
        await bench.sending.drain()
        assert bench.acknowledged == [3, 4]
        assert [event.seq for event in bench.published] == [1, 3, 4]
        assert bench.premature == []


async def test_nobody_is_told_while_the_database_is_away(messaging_url: str, valkey_url: str) -> None:
    proxy = Proxy(messaging_url)
    async with WitnessedBench(messaging_url, await proxy.start(), valkey_url, patience=60) as bench:
        conversation_id, one, two = await bench.pair()
        await bench.sending.send(one.draft(conversation_id))
        proxy.cut, proxy.refuse = "request", True
        bench.submit([device.draft(conversation_id) for device in (one, two) for _ in range(5)])
        while proxy.refused < 3:
            await asyncio.sleep(0.01)
        assert (len(bench.published), bench.acknowledged, bench.refused) == (1, [], [])
        assert [event.seq for event in await bench.log(conversation_id)] == [1]
        proxy.refuse = False
        await bench.sending.drain()
        assert bench.acknowledged == list(range(2, 12))
        assert [event.seq for event in bench.published] == list(range(1, 12))
        assert bench.premature == []
    await proxy.stop()


async def test_session_ended_by_an_administrator_while_waiting_for_a_lock(
    messaging_url: str, valkey_url: str
) -> None:
    async with Bench(messaging_url, valkey_url) as bench:
        conversation_id, one, _ = await bench.pair()
        await bench.sending.send(one.draft(conversation_id))
        async with bench.db.transaction() as tx:
            await tx.execute("SELECT 1 FROM conversations WHERE id = $1 FOR UPDATE", conversation_id)
            sends = asyncio.gather(*(bench.sending.send(one.draft(conversation_id)) for _ in range(5)))
            ended = 0
            while ended == 0:
                await asyncio.sleep(0.01)
                ended = await tx.fetchval(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                    " WHERE wait_event_type = 'Lock' AND datname = current_database() AND pid <> pg_backend_pid()"
                )
        assert [result.message.head.seq for result in await sends] == [2, 3, 4, 5, 6]
        assert [event.seq for event in bench.published] == [1, 2, 3, 4, 5, 6]


async def test_conversation_that_changed_while_the_batch_waited(messaging_url: str, valkey_url: str) -> None:
    """The batch's snapshot is older than a removal it waited for: the removed member must not get in."""
    async with Bench(messaging_url, valkey_url) as bench:
        conversation_id, one, two = await bench.pair()
        await bench.sending.send(one.draft(conversation_id))
        async with bench.db.transaction() as tx:
            event = await conversations.append_event(
                tx, conversation_id, "member_removed", {}, bench.clock.now()
            )
            await members.leave(tx, conversation_id, two.user_id, event.seq, bench.clock.now())
            sends = asyncio.gather(
                bench.outcome(two.draft(conversation_id)), bench.outcome(one.draft(conversation_id))
            )
            waiting = 0
            while waiting == 0:
                await asyncio.sleep(0.01)
                waiting = await tx.fetchval(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE wait_event_type = 'Lock' AND datname = current_database()"
                )
        removed, member = await sends
        assert isinstance(removed, NotAMember)
        assert isinstance(member, SendResult)
        assert member.message.head.seq == 3


async def test_database_away_for_longer_than_patience(messaging_url: str, valkey_url: str) -> None:
    proxy = Proxy(messaging_url)
    async with FaultyBench(messaging_url, await proxy.start(), valkey_url, patience=0.3) as bench:
        conversation_id, one, _ = await bench.pair()
        await bench.sending.send(one.draft(conversation_id))
        drafts = [one.draft(conversation_id) for _ in range(3)]
        # Committed, the answer lost, and nobody there to ask.
        proxy.cut, proxy.refuse = "answer", True
        outcomes = await asyncio.gather(*(bench.outcome(draft) for draft in drafts))
        assert all(isinstance(outcome, SendingUnavailable) for outcome in outcomes)
        assert bench.doubts == 1
        proxy.refuse = False
        results = await asyncio.gather(*(bench.sending.send(draft) for draft in drafts))
        assert [result.message.head.seq for result in results] == [2, 3, 4]
        assert [result.duplicate for result in results] == [True] * 3
        assert [event.seq for event in await bench.log(conversation_id)] == [1, 2, 3, 4]
    await proxy.stop()


async def test_chaos_of_faults_and_retries(messaging_url: str, valkey_url: str) -> None:
    """Devices that retry until acknowledged, over a connection that breaks all the time."""
    dice = random.Random(4)
    proxy = Proxy(messaging_url)
    async with FaultyBench(messaging_url, await proxy.start(), valkey_url, patience=0.4) as bench:
        conversation_id, one, two = await bench.pair()
        acknowledged: dict[int, object] = {}

        async def device(sender: object) -> None:
            while proxy.cuts < 12:
                draft = sender.draft(conversation_id)  # type: ignore[attr-defined]
                while isinstance(outcome := await bench.outcome(draft), Failure):
                    assert outcome.kind == "unavailable", outcome
                    await asyncio.sleep(0.01)
                assert isinstance(outcome, SendResult)
                assert outcome.message.head.seq not in acknowledged
                acknowledged[outcome.message.head.seq] = outcome.message.head.client_id

        async def trouble() -> None:
            while True:
                await asyncio.sleep(dice.uniform(0.05, 0.2))
                if dice.random() < 0.2:
                    proxy.drop()
                proxy.cut = dice.choice(["request", "half", "answer"])

        making = asyncio.create_task(trouble())
        await asyncio.gather(*(device(sender) for sender in (one, two) for _ in range(4)))
        making.cancel()
        async with bench.db.connection() as connection:
            rows = await connection.fetch(
                "SELECT seq, client_id FROM messages WHERE conversation_id = $1 ORDER BY seq", conversation_id
            )
        assert [row["seq"] for row in rows] == list(range(1, len(acknowledged) + 1))
        assert {row["seq"]: row["client_id"] for row in rows} == acknowledged
        told = [event.seq for event in bench.published]
        assert len(told) == len(set(told)), "nobody is told twice"
    await proxy.stop()
