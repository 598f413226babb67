"""Watermarks: by REST, coalesced, and only ever forward."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.services.messaging.door import Door, assert_problem
from tests.stack import Stack

from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.kit.errors import Failure
from whispr.kit.ids import uuid7
from whispr.services.messaging.models import (
    ConversationType,
    MemberId,
    Membership,
    ReceiptKind,
    Role,
    Watermark,
)
from whispr.services.messaging.service import receipts as module
from whispr.services.messaging.service.housekeeping import Housekeeping
from whispr.services.messaging.service.receipts import Receipts
from whispr.services.messaging.store import conversations, history, members, opening


async def pair(stack: Stack) -> tuple[Door, Door, str]:
    ann, bob = (Door(stack, person) for person in await asyncio.gather(stack.register(), stack.register()))
    return ann, bob, await ann.direct(bob)


async def watermarks(door: Door, conversation: str) -> tuple[int, int]:
    view = await door.ok(f"/conversations/{conversation}")
    return view["delivered_seq"], view["read_seq"]


async def test_watermarks_only_grow_and_stop_at_the_head(stack: Stack) -> None:
    ann, bob, direct = await pair(stack)
    for _ in range(3):
        await ann.send(direct)
    path = f"/conversations/{direct}"
    for route, seq, expected in (
        ("delivered", 2, (2, 0)),
        ("delivered", 1, (2, 0)),
        ("read", 1, (2, 1)),
        ("read", 0, (2, 1)),
        ("read", 99, (3, 3)),
        ("delivered", 99, (3, 3)),
    ):
        assert (await bob.post(f"{path}/{route}", {"seq": seq})).status_code == 204
        assert await watermarks(bob, direct) == expected
    members_seen = {m["user_id"]: m["read_seq"] for m in (await ann.ok(path))["members"]}
    assert members_seen == {ann.id: 0, bob.id: 3}


async def test_reading_counts_for_all_devices_of_a_person(stack: Stack) -> None:
    ann, bob, direct = await pair(stack)
    bob2 = Door(stack, await stack.add_device(bob.person))
    await ann.send(direct)
    await bob.post(f"/conversations/{direct}/read", {"seq": 1})
    assert await watermarks(bob2, direct) == (1, 1)
    assert (await bob2.ok(f"/conversations/{direct}"))["unread_count"] == 0


@pytest.mark.parametrize(
    "body", [{}, {"seq": -1}, {"seq": 2**53}, {"seq": "one"}, {"seq": 1.5}, {"seq": None}]
)
async def test_bad_marks_are_refused(stack: Stack, body: dict[str, object]) -> None:
    ann, _, direct = await pair(stack)
    for route in ("read", "delivered"):
        assert_problem(await ann.post(f"/conversations/{direct}/{route}", body), 422, "invalid_request")


async def test_the_status_of_a_message_is_the_first_mark_past_it(stack: Stack) -> None:
    ann, bob, direct = await pair(stack)
    first, second = await ann.send(direct, "1"), await ann.send(direct, "2")
    t1 = stack.clock.now()
    await bob.post(f"/conversations/{direct}/delivered", {"seq": 1})
    stack.clock.advance(10)
    t2 = stack.clock.now()
    await bob.post(f"/conversations/{direct}/read", {"seq": 2})

    async def status(message: dict[str, str]) -> tuple[datetime | None, datetime | None]:
        (item,) = (await ann.ok(f"/messages/{message['id']}/status"))["items"]
        assert item["user_id"] == bob.id
        delivered, read = item["delivered_at"], item["read_at"]
        return (
            datetime.fromisoformat(delivered) if delivered else None,
            datetime.fromisoformat(read) if read else None,
        )

    assert await status(first) == (t1, t2)
    assert await status(second) == (t2, t2)
    third = await ann.send(direct, "3")
    assert await status(third) == (None, None)


async def test_who_joined_later_is_no_recipient_of_earlier_messages(stack: Stack) -> None:
    ann, bob, cid = (
        Door(stack, person) for person in await asyncio.gather(*(stack.register() for _ in range(3)))
    )
    group = await ann.group(bob)
    early = await ann.send(group)
    await ann.post(f"/conversations/{group}/members", {"member_ids": [cid.id]})
    await bob.delete(f"/conversations/{group}/members/{bob.id}")
    late = await ann.send(group)
    recipients = []
    for message in (early, late):
        items = (await ann.ok(f"/messages/{message['id']}/status"))["items"]
        recipients.append([item["user_id"] for item in items])
    assert recipients == [[bob.id], [cid.id]]


async def test_private_reading_stays_private(stack: Stack) -> None:
    ann, bob, direct = await pair(stack)
    group = await ann.group(bob)
    answer = await stack.http.patch(
        f"{stack.user.url}/api/v1/users/me",
        json={"privacy": {"read_receipts": False}},
        headers=bob.person.headers,
    )
    assert answer.status_code == 200
    sent = await ann.send(direct)
    await bob.post(f"/conversations/{direct}/read", {"seq": 1})
    (status,) = (await ann.ok(f"/messages/{sent['id']}/status"))["items"]
    assert status["delivered_at"] is not None
    assert status["read_at"] is None

    def read_by_bob(members_shown: list[dict[str, object]]) -> object:
        return next(member["read_seq"] for member in members_shown if member["user_id"] == bob.id)

    assert read_by_bob((await ann.ok(f"/conversations/{direct}"))["members"]) is None
    listed = {item["id"]: item for item in (await ann.ok("/conversations"))["items"]}
    assert read_by_bob(listed[direct]["members"]) is None
    added = await ann.post(f"/conversations/{group}/members", {"member_ids": [bob.id]})
    assert read_by_bob(added.json()["items"]) is None
    changed = await ann.patch(f"/conversations/{group}/members/{bob.id}", {"role": "admin"})
    assert changed.json()["read_seq"] is None
    assert read_by_bob((await bob.ok(f"/conversations/{direct}"))["members"]) == 1
    assert (await bob.ok(f"/conversations/{direct}"))["read_seq"] == 1
    (status,) = (await bob.ok(f"/messages/{sent['id']}/status"))["items"]
    assert status["read_at"] is not None


# --- without the doors ------------------------------------------------------------------------------------------------


class Room:
    """A conversation of `events` events with some members."""

    def __init__(self, conversation_id: UUID, memberships: list[Membership]) -> None:
        self.id = conversation_id
        self.memberships = memberships

    @classmethod
    async def make(cls, db: Database, events: int, people: int = 1) -> Room:
        conversation_id = uuid7()
        user_ids = [uuid4() for _ in range(people)]
        now = ManualClock().now()
        async with db.transaction() as tx:
            await conversations.insert(tx, conversation_id, ConversationType.GROUP, user_ids[0], {}, now)
            await members.insert_founders(tx, conversation_id, [(u, Role.MEMBER) for u in user_ids], now)
            await conversations.append_events(
                tx, conversation_id, [("conversation_updated", {})] * events, now
            )
        return cls(
            conversation_id, [Membership(conversation_id, MemberId(u), Role.MEMBER, 0) for u in user_ids]
        )

    async def watermarks(self, db: Database, index: int = 0) -> tuple[int, int]:
        async with db.connection() as connection:
            row = await members.find_active(connection, self.id, self.memberships[index].user_id)
        assert row is not None
        return row.delivered_seq, row.read_seq

    async def cursor(self, db: Database, device_id: UUID) -> int | None:
        async with db.connection() as connection:
            [behind] = await opening.undelivered_heads(
                connection, [(self.memberships[0].user_id, device_id, UUID(int=0))], 10**6, 10
            )
        return next((from_seq for found, from_seq, _, _ in behind if found == self.id), None)


async def test_marks_are_merged_and_told_once(messaging_db: Database) -> None:
    room = await Room.make(messaging_db, 10, people=2)
    receipts = Receipts(messaging_db, ManualClock())
    told: list[list[Watermark]] = []
    answers: list[Failure | None] = []
    receipts.on_moved(told.append)
    ann, bob = room.memberships
    phone, laptop = uuid4(), uuid4()
    for seq in range(1, 8):
        receipts.mark(ann, phone, ReceiptKind.DELIVERED, seq, answers.append)
    receipts.mark(ann, laptop, ReceiptKind.READ, 3, answers.append)
    receipts.mark(bob, uuid4(), ReceiptKind.READ, 5)
    assert (told, answers) == ([], [])
    await receipts.flush()
    assert answers == [None] * 8
    (moved,) = told
    assert {(w.user_id, w.delivered_seq, w.read_seq, w.previous_delivered_seq) for w in moved} == {
        (ann.user_id, 7, 3, 0),
        (bob.user_id, 5, 5, 0),
    }
    assert (await room.cursor(messaging_db, phone), await room.cursor(messaging_db, laptop)) == (7, 3)
    receipts.mark(ann, phone, ReceiptKind.DELIVERED, 7)
    await receipts.flush()
    assert len(told) == 1


async def test_the_loop_writes_by_itself(messaging_db: Database) -> None:
    room = await Room.make(messaging_db, 2)
    receipts = Receipts(messaging_db, ManualClock())
    loop = asyncio.create_task(receipts.run())
    done: asyncio.Future[Failure | None] = asyncio.get_running_loop().create_future()
    receipts.mark(room.memberships[0], uuid4(), ReceiptKind.READ, 2, done.set_result)
    assert await asyncio.wait_for(done, 5) is None
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    assert await room.watermarks(messaging_db) == (2, 2)


async def test_a_lost_database_is_told_to_who_waits(messaging_db: Database) -> None:
    room = await Room.make(messaging_db, 2)
    closed = Database("postgresql://nobody@127.0.0.1:1/none")
    receipts = Receipts(closed, ManualClock())
    with pytest.raises(Failure) as failure:
        await receipts.mark_now(room.memberships[0], uuid4(), ReceiptKind.READ, 1)
    assert failure.value.code == "database_unavailable"


async def test_too_many_waiting_receipts_are_refused(
    messaging_db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 1)
    room = await Room.make(messaging_db, 2, people=2)
    receipts = Receipts(messaging_db, ManualClock())
    answers: list[Failure | None] = []
    receipts.mark(room.memberships[0], uuid4(), ReceiptKind.READ, 1)
    receipts.mark(room.memberships[1], uuid4(), ReceiptKind.READ, 1, answers.append)
    receipts.mark(room.memberships[0], uuid4(), ReceiptKind.READ, 2)
    assert [answer.code for answer in answers if answer] == ["unavailable"]
    await receipts.flush()
    assert await room.watermarks(messaging_db) == (2, 2)
    assert await room.watermarks(messaging_db, 1) == (0, 0)


async def test_a_former_member_moves_nothing(messaging_db: Database) -> None:
    room = await Room.make(messaging_db, 4)
    (member,) = room.memberships
    async with messaging_db.transaction() as tx:
        await members.leave(tx, room.id, member.user_id, 4, ManualClock().now())
    receipts = Receipts(messaging_db, ManualClock())
    told: list[list[Watermark]] = []
    receipts.on_moved(told.append)
    await receipts.mark_now(member, uuid4(), ReceiptKind.READ, 3)
    assert told == []
    async with messaging_db.connection() as connection:
        count = await connection.fetchval(
            "SELECT count(*) FROM device_cursors WHERE conversation_id = $1", room.id
        )
    assert count == 0


async def test_watermarks_only_grow_whatever_devices_say(messaging_db: Database) -> None:
    loop = asyncio.get_running_loop()
    marks = st.tuples(
        st.sampled_from(list(ReceiptKind)), st.integers(0, 15), st.integers(0, 2), st.booleans()
    )

    async def run(sequence: list[tuple[ReceiptKind, int, int, bool]]) -> None:
        room = await Room.make(messaging_db, 10)
        nodes = [Receipts(messaging_db, ManualClock()) for _ in range(2)]
        devices = [uuid4() for _ in range(3)]
        seen = [(0, 0)]
        for kind, seq, device, second_node in sequence:
            nodes[second_node].mark(room.memberships[0], devices[device], kind, seq)
            if seq % 3 == 0:
                await asyncio.gather(*(node.flush() for node in nodes))
                seen.append(await room.watermarks(messaging_db))
        await asyncio.gather(*(node.flush() for node in nodes))
        seen.append(await room.watermarks(messaging_db))
        assert seen == sorted(seen)
        assert [read for _, read in seen] == sorted(read for _, read in seen)
        highest = max((seq for _, seq, _, _ in sequence), default=0)
        highest_read = max((seq for kind, seq, _, _ in sequence if kind is ReceiptKind.READ), default=0)
        assert seen[-1] == (min(highest, 10), min(highest_read, 10))

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(sequence=st.lists(marks, max_size=15))
    def example(sequence: list[tuple[ReceiptKind, int, int, bool]]) -> None:
        asyncio.run_coroutine_threadsafe(run(sequence), loop).result(60)

    await asyncio.to_thread(example)


async def test_two_nodes_marking_the_same_people_do_not_deadlock(messaging_db: Database) -> None:
    rooms = [await Room.make(messaging_db, 5, people=5) for _ in range(5)]
    nodes = [Receipts(messaging_db, ManualClock()) for _ in range(2)]
    for number, node in enumerate(nodes):
        everyone = [membership for room in rooms for membership in room.memberships]
        for membership in everyone if number else reversed(everyone):
            node.mark(membership, uuid4(), ReceiptKind.READ, 5)
    await asyncio.gather(*(node.flush() for node in nodes))
    for room in rooms:
        assert await room.watermarks(messaging_db, 4) == (5, 5)


async def test_old_times_become_exact_to_the_day_and_none_is_lost(messaging_db: Database) -> None:
    room = await Room.make(messaging_db, 8)
    clock = ManualClock(datetime.fromisoformat("2026-03-01T08:00:00+00:00"))
    receipts = Receipts(messaging_db, clock)
    member, device = room.memberships[0], uuid4()
    times = []
    for seq in range(1, 7):
        times.append(clock.now())
        await receipts.mark_now(member, device, ReceiptKind.READ, seq)
        clock.advance(6 * 3600)
    keeping = Housekeeping(
        messaging_db, clock, receipt_detail=timedelta(days=1), cursor_life=timedelta(days=400)
    )
    clock.advance(20 * 3600)
    await keeping.run_once()

    async def read_at(seq: int) -> datetime | None:
        async with messaging_db.connection() as connection:
            (status,) = await history.message_status(connection, room.id, seq, uuid4())
        return status.read_at

    # 1, 2 and 3 were read on the first of March, the others on the second, of which the last are not old yet.
    assert [await read_at(seq) for seq in (1, 2, 3)] == [times[2]] * 3
    assert await read_at(6) == times[5]
    assert await read_at(7) is None
    clock.advance(40 * 86400)
    await keeping.run_once()
    assert [await read_at(seq) for seq in (4, 5, 6)] == [times[5]] * 3
    assert await keeping.run_once() == 0


async def test_cursors_of_silent_devices_are_forgotten(messaging_db: Database) -> None:
    clock = ManualClock(datetime.fromisoformat("2020-01-01T00:00:00+00:00"))
    room = await Room.make(messaging_db, 5)
    device = uuid4()
    await Receipts(messaging_db, clock).mark_now(room.memberships[0], device, ReceiptKind.DELIVERED, 4)
    assert await room.cursor(messaging_db, device) == 4
    clock.advance(200 * 86400)
    keeping = Housekeeping(
        messaging_db, clock, receipt_detail=timedelta(days=999), cursor_life=timedelta(days=180)
    )
    assert await keeping.run_once() == 1
    assert await room.cursor(messaging_db, device) == 0
