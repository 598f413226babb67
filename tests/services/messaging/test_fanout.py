"""Every node delivers each event once and in order, whatever is lost between them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.services.messaging.door import Door
from tests.services.messaging.line import Line
from tests.services.messaging.rooms import make_conversation
from tests.services.messaging.test_channels import conversation, message, new_door
from tests.stack import Node, Person, Stack

from whispr.instance.valkey import EmbeddedValkey
from whispr.kit.cache import Cache
from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.services.messaging.models import CommittedEvent, Content
from whispr.services.messaging.service.events import EventBus
from whispr.services.messaging.service.history import History
from whispr.services.messaging.store import conversations, history

ALWAYS = {"user:notices", "messaging:nodes"}

Open = Callable[..., Awaitable[Line]]


class BusNode:
    """A node of which only the bus stands."""

    def __init__(self, db: Database, valkey_url: str) -> None:
        self.cache = Cache(valkey_url)
        self.bus = EventBus(self.cache, History(db))
        self.got: list[CommittedEvent] = []
        self.hints: list[tuple[UUID, str, bytes]] = []
        self.notices: list[tuple[UUID, UUID | None, str, bytes]] = []
        self.bus.on_events(lambda _, events: self.got.extend(events))
        self.bus.on_hint(lambda *hint: self.hints.append(hint))
        self.bus.on_notice(
            lambda user, device, event, raw: self.notices.append((user, device, event, bytes(raw)))
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[BusNode]:
        self.bus.start()
        loops = [asyncio.create_task(self.cache.run()), asyncio.create_task(self.bus.run())]
        yield self
        await self.bus.close()
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        await self.cache.close()

    async def serve(self, conversation_id: UUID, head: int = 0) -> None:
        self.bus.serve(conversation_id)
        self.bus.settle(conversation_id, head)
        shard = f"messaging:shard:{conversation_id.int % 64}"
        await until(lambda: shard in self.cache.subscribed)

    def seqs(self, conversation_id: UUID) -> list[int]:
        return [event.seq for event in self.got if event.conversation_id == conversation_id]

    def has_reached(self, conversation_id: UUID, seq: int) -> bool:
        return self.seqs(conversation_id)[-1:] == [seq]


async def until(condition: Callable[[], object], timeout: float = 5.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
async def nodes(messaging_db: Database, valkey_url: str) -> AsyncIterator[tuple[BusNode, BusNode]]:
    one, two = BusNode(messaging_db, valkey_url), BusNode(messaging_db, valkey_url)
    async with one.running(), two.running():
        await until(lambda: all("messaging:nodes" in node.cache.subscribed for node in (one, two)))
        yield one, two


async def append(db: Database, conversation_id: UUID, count: int = 1) -> list[CommittedEvent]:
    async with db.transaction() as tx:
        return await conversations.append_events(
            tx, conversation_id, [("conversation_updated", {})] * count, ManualClock().now()
        )


@pytest.fixture
async def room(messaging_db: Database) -> UUID:
    return await make_conversation(messaging_db, ManualClock(), [uuid4(), uuid4()])


async def test_events_travel_with_their_contents(
    nodes: tuple[BusNode, BusNode], messaging_db: Database, room: UUID
) -> None:
    one, two = nodes
    await one.serve(room)
    await two.serve(room)
    devices = {str(uuid4()): b'{"envelopes":{}}', str(uuid4()): b'{"envelopes":{"x":{}}}'}
    events = [
        CommittedEvent(room, 1, "new_message", b'{"seq":1}', Content(b'{"ciphertext":"YQ=="}', None)),
        CommittedEvent(room, 2, "new_message", b'{"seq":2}', Content(None, devices)),
        CommittedEvent(room, 3, "member_added", b'{"seq":3}'),
        CommittedEvent(
            room, 4, "message_edited", b'{"seq":4,"message":{}}', Content(b"{}", None), message_seq=1
        ),
    ]
    one.bus.publish(events)
    assert one.got == events, "at once where it was committed"
    await until(lambda: len(two.got) == 4)
    assert two.got == events
    await asyncio.sleep(0.05)
    assert one.got == events, "its own echo is not taken for news"


async def test_nodes_hear_only_of_what_they_serve(
    nodes: tuple[BusNode, BusNode], messaging_db: Database, room: UUID
) -> None:
    one, two = nodes
    other = await make_conversation(messaging_db, ManualClock(), [uuid4()])
    await two.serve(other)
    one.bus.publish(await append(messaging_db, room))
    one.bus.publish(await append(messaging_db, other))
    await until(lambda: two.got)
    assert {event.conversation_id for event in two.got} == {other}
    assert two.cache.subscribed == {*ALWAYS, f"messaging:shard:{other.int % 64}"}
    assert one.got == []


async def test_structure_is_told_of_before_the_event(
    nodes: tuple[BusNode, BusNode], messaging_db: Database, room: UUID
) -> None:
    one, two = nodes
    await two.serve(room)
    order: list[object] = []
    two.bus.on_structure(order.append)
    two.bus.on_events(lambda _, events: order.extend(events))
    (event,) = await append(messaging_db, room)
    one.bus.publish([event])
    await until(lambda: len(order) == 2)
    assert order == [room, event]


async def test_lost_hints_leave_no_hole(
    nodes: tuple[BusNode, BusNode], messaging_db: Database, room: UUID
) -> None:
    """Publishes are dropped at random; the next one that comes through brings the rest."""
    dice = random.Random(7)
    one, two = nodes
    await one.serve(room)
    await two.serve(room)
    last = 0
    for _ in range(60):
        events = await append(messaging_db, room, dice.randint(1, 3))
        last = events[-1].seq
        if dice.random() < 0.5:
            dice.choice([one, two]).bus.publish(events)
    one.bus.publish(await append(messaging_db, room))
    for node in nodes:
        await until(partial(node.has_reached, room, last + 1))
        assert node.seqs(room) == list(range(1, last + 2))


async def test_last_event_lost_is_found_by_comparing(
    nodes: tuple[BusNode, BusNode], messaging_db: Database, room: UUID
) -> None:
    _, two = nodes
    await two.serve(room)
    await append(messaging_db, room, 450)
    two.bus.suspect()
    await until(lambda: len(two.got) == 450)
    assert two.seqs(room) == list(range(1, 451))


async def test_lost_valkey_connection_is_made_good(
    nodes: tuple[BusNode, BusNode], messaging_db: Database, room: UUID
) -> None:
    one, two = nodes
    await two.serve(room)
    one.bus.publish(await append(messaging_db, room))
    await until(lambda: two.got)
    await one.cache.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # type: ignore[no-untyped-call]
    one.bus.publish(await append(messaging_db, room))
    await until(lambda: len(two.got) == 2)
    assert two.seqs(room) == [1, 2]


async def test_events_before_the_first_subscription_stands_are_found(
    nodes: tuple[BusNode, BusNode], messaging_db: Database, room: UUID
) -> None:
    one, two = nodes
    two.bus.serve(room)
    two.bus.settle(room, 0)
    one.bus.publish(await append(messaging_db, room))
    await until(lambda: two.got, 2.0)
    assert two.seqs(room) == [1]


async def test_conversation_let_go_and_served_again(
    nodes: tuple[BusNode, BusNode], messaging_db: Database, room: UUID
) -> None:
    one, two = nodes
    await two.serve(room)
    two.bus.release(room)
    one.bus.publish(await append(messaging_db, room))
    await asyncio.sleep(0.05)
    assert two.got == []
    two.bus.serve(room)
    one.bus.publish(await append(messaging_db, room))
    await asyncio.sleep(0.05)
    assert two.got == [], "held until the first join says where it begins"
    two.bus.settle(room, 1)
    assert two.seqs(room) == [2]


async def test_idle_shards_are_left(nodes: tuple[BusNode, BusNode], room: UUID) -> None:
    _, two = nodes
    await two.serve(room)
    two.bus.release(room)
    two.bus.suspect()
    await until(lambda: two.cache.subscribed == ALWAYS)


async def test_notices_reach_every_node_once(nodes: tuple[BusNode, BusNode]) -> None:
    one, two = nodes
    await until(lambda: all("user:notices" in node.cache.subscribed for node in nodes))
    people = [uuid4(), uuid4()]
    one.bus.notice(people, "conversation_added", {"x": 1})
    await until(lambda: len(two.notices) == 2)
    await asyncio.sleep(0.02)
    expected = [(user_id, None, "conversation_added", b'{"x":1}') for user_id in people]
    assert one.notices == two.notices == expected
    device = uuid4()
    note = b'{"user_id":"%b","device_id":"%b","event":"prekeys_low","payload":{"remaining":3}}'
    await one.cache.publish("user:notices", note % (str(people[0]).encode(), str(device).encode()))
    await one.cache.publish("user:notices", b"nonsense")
    await until(lambda: len(one.notices) == len(two.notices) == 3)
    assert two.notices[-1] == (people[0], device, "prekeys_low", b'{"remaining":3}')


@pytest.fixture(scope="module")
def quiet_valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Valkey without other tests' nodes."""
    server = EmbeddedValkey(tmp_path_factory.mktemp("quiet")).start()
    yield server.url
    server.stop()


async def test_node_that_is_alone_publishes_nothing(
    messaging_db: Database, quiet_valkey_url: str, room: UUID
) -> None:
    one, two = BusNode(messaging_db, quiet_valkey_url), BusNode(messaging_db, quiet_valkey_url)
    async with one.running():
        await one.serve(room)
        await until(lambda: one.bus._alone)
        published: list[bytes] = []
        one.cache.subscribe(f"messaging:shard:{room.int % 64}", published.append)
        one.bus.publish(await append(messaging_db, room))
        one.bus.notice([uuid4()], "conversation_added", {})
        assert one.seqs(room) == [1]
        async with two.running():
            await until(lambda: not one.bus._alone)
            await two.serve(room, head=1)
            one.bus.publish(await append(messaging_db, room))
            await until(lambda: two.got)
            assert two.seqs(room) == [2]
        assert len(published) == 1
        assert len(one.notices) == 1
        await until(lambda: one.bus._alone)


async def test_newcomer_finds_what_was_not_published_for_it(
    messaging_db: Database, quiet_valkey_url: str, room: UUID
) -> None:
    """The other node believes itself alone for a moment longer."""
    one, two = BusNode(messaging_db, quiet_valkey_url), BusNode(messaging_db, quiet_valkey_url)
    async with one.running():
        await until(lambda: one.bus._alone)
        async with two.running():
            await two.serve(room)
            one.bus._alone = True
            one.bus.publish(await append(messaging_db, room))
            await until(lambda: two.got, 4.0)
            assert two.seqs(room) == [1]


async def test_unreadable_shard_message_is_survived(
    nodes: tuple[BusNode, BusNode], messaging_db: Database, room: UUID
) -> None:
    one, two = nodes
    await two.serve(room)
    await append(messaging_db, room)
    await one.cache.publish(f"messaging:shard:{room.int % 64}", b"nonsense")
    await until(lambda: two.got)
    one.bus.hint(room, "typing", b"x")
    await until(lambda: two.hints)
    assert two.hints == [(room, "typing", b"x")]
    assert one.hints == []


# What arrives: chunks of the log, in any order, any of them repeatedly or never.
arrivals = st.lists(st.tuples(st.integers(0, 11), st.integers(1, 5)), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, 6), early=arrivals, late=arrivals)
async def test_any_arrival_is_delivered_dense_and_once(
    log_of_twelve: tuple[UUID, list[CommittedEvent], Database],
    valkey_url: str,
    start: int,
    early: list[tuple[int, int]],
    late: list[tuple[int, int]],
) -> None:
    room, log, db = log_of_twelve
    node = BusNode(db, valkey_url)
    node.bus.serve(room)
    for at, count in early:
        node.bus._take(room, log[at : at + count])
    assert node.got == []
    node.bus.settle(room, start)
    for at, count in late:
        node.bus._take(room, log[at : at + count])
    known = max([start, *(log[at : at + count][-1].seq for at, count in early + late)])
    await until(lambda: not node.got or node.got[-1].seq >= known) if known == start else await until(
        lambda: node.got and node.got[-1].seq == known
    )
    assert node.seqs(room) == list(range(start + 1, known + 1))
    await node.bus.close()
    await node.cache.close()


@pytest.fixture(scope="module")
async def log_of_twelve(
    database: Callable[[str], str],
) -> AsyncIterator[tuple[UUID, list[CommittedEvent], Database]]:
    db = Database(database("messaging"), pool_size=3)
    await db.open()
    room = await make_conversation(db, ManualClock(), [uuid4()])
    await append(db, room, 12)
    async with db.connection() as connection:
        log = await history.log(connection, room, 0, 12, 100)
    yield room, log, db
    await db.close()


# --- two whole nodes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def second(stack: Stack) -> AsyncIterator[Node]:
    node = await stack.another_node()
    yield node
    await node.running.stop()


@pytest.fixture
async def connect(stack: Stack) -> AsyncIterator[Open]:
    lines: list[Line] = []

    async def open_line(person: Person, node: Node | None = None) -> Line:
        line = await Line.open(node or stack.messaging, person)
        lines.append(line)
        return line

    yield open_line
    for line in lines:
        await line.close()


async def appears(line: Line, topic: str, user_id: str) -> None:
    """Within the presence this device is told of."""
    await line.find(
        topic,
        lambda name, payload: (
            user_id in {"presence_state": payload, "presence_diff": payload.get("joins", {})}.get(name, {})
        ),
    )


async def test_two_nodes_share_one_order(stack: Stack, second: Node, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    topic = conversation(topic_id)
    lines = [
        await connect(person, node)
        for person in (anna.person, ben.person)
        for node in (stack.messaging, second)
    ]
    for line in lines:
        await line.join(topic)
    doors = [anna, anna, ben, ben]
    acks = await asyncio.gather(
        *(
            line.push(topic, "new_message", message(door, topic_id, str(n)))
            for line, door in zip(lines, doors, strict=True)
            for n in range(25)
        )
    )
    assert sorted(ack["seq"] for ack in acks) == list(range(1, 101))
    for line in lines:
        assert await line.seqs(topic, 100) == list(range(1, 101))


async def test_typing_receipts_and_presence_cross_nodes(stack: Stack, second: Node, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.group(ben)
    topic = conversation(topic_id)
    at_anna, at_ben = await connect(anna.person), await connect(ben.person, second)
    await at_anna.join(topic)
    await at_ben.join(topic)
    await at_ben.join(f"user:{ben.id}")
    await appears(at_ben, topic, anna.id)
    await appears(at_anna, topic, ben.id)
    await at_anna.push(topic, "new_message", message(anna, topic_id))
    await at_ben.next(topic, "new_message")
    await at_anna.push(topic, "typing", {"state": "start"})
    assert await at_ben.next(topic, "typing") == {"user_id": anna.id, "state": "start", "expires_in": 6}
    await at_anna.push(topic, "typing", {"state": "stop"})
    assert (await at_ben.next(topic, "typing"))["state"] == "stop"
    await at_anna.push(topic, "typing", {"state": "start"})
    await at_ben.next(topic, "typing")
    stack.clock.advance(7)
    assert (await at_ben.next(topic, "typing"))["state"] == "stop", "each node lets it run out"
    await at_ben.push(topic, "mark_as_read", {"seq": 1})
    assert (await at_anna.next(topic, "receipt")) == {"user_id": ben.id, "delivered_seq": 1, "read_seq": 1}
    at_tablet = await connect(await stack.add_device(ben.person))
    await at_tablet.join(f"user:{ben.id}")
    await at_anna.push(topic, "new_message", message(anna, topic_id))
    await at_ben.push(topic, "mark_as_read", {"seq": 2})
    assert (await at_tablet.next(f"user:{ben.id}", "read_synced"))["read_seq"] == 2
    await at_ben.close()
    await at_anna.find(topic, lambda name, payload: name == "presence_diff" and ben.id in payload["leaves"])


async def test_removal_on_one_node_closes_the_channel_on_the_other(
    stack: Stack, second: Node, connect: Open
) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.group(ben)
    topic = conversation(topic_id)
    at_ben = await connect(ben.person, second)
    await at_ben.join(topic)
    await at_ben.push(topic, "new_message", message(ben, topic_id))
    assert (await anna.delete(f"/conversations/{topic_id}/members/{ben.id}")).status_code == 204
    await at_ben.next(topic, "phx_close")
    there = Door(stack, ben.person, second.url)
    assert (await there.post("/messages", there.draft(topic_id))).status_code == 404
    assert (await at_ben.join_refused(topic))["reason"] == "forbidden"


async def test_revocation_closes_sockets_on_every_node(stack: Stack, second: Node, connect: Open) -> None:
    anna = await new_door(stack)
    lines = [await connect(anna.person, node) for node in (stack.messaging, second)]
    answer = await stack.http.post(f"{stack.auth.url}/api/v1/auth/logout", headers=anna.person.headers)
    assert answer.status_code == 204
    assert [await line.closed(1.0) for line in lines] == [1001, 1001]
