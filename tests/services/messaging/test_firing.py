"""Firing: scheduled messages go out once and in order, whatever dies, is frozen or is changed meanwhile."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from tests.services.messaging.plans import Crash, Node, World, ciphertext, envelopes, refusal, resigned

from whispr.kit import outbox
from whispr.kit.errors import RateLimited, Unavailable
from whispr.services.messaging.models import (
    AlreadySent,
    Draft,
    Plan,
    PlanStatus,
    ScheduledNotFound,
)
from whispr.services.messaging.models.abuse import Restricted
from whispr.services.messaging.service.firing import LEASE
from whispr.services.messaging.service.scheduled import PlanChange
from whispr.services.messaging.service.timers import SCHEDULE_JOB, Timers
from whispr.services.messaging.store import scheduled as store


async def test_the_loop_is_precise_below_a_second_and_woken_by_new_ones(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    running = asyncio.create_task(node.firing.run())
    await asyncio.sleep(0.05)
    started = asyncio.get_running_loop().time()
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(0.3))
    await asyncio.sleep(0.2)
    assert (await world.plan(plan.id)).status is PlanStatus.PENDING
    # The clock is moved just before the loop looks again: it looks when it said, not a second later.
    world.clock.advance(0.3)
    async with asyncio.timeout(5):
        while (await world.plan(plan.id)).status is not PlanStatus.SENT:
            await asyncio.sleep(0.01)
    assert asyncio.get_running_loop().time() - started < 0.8
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_messages_of_a_conversation_go_in_the_order_of_their_times(world: World, node: Node) -> None:
    conversation_id, one, two = await world.pair()
    drafts = {}
    for seconds, author in ((5, one), (3, two), (4, one), (1, one), (2, two)):
        drafts[seconds] = author.draft(conversation_id)
        await node.scheduled.schedule(drafts[seconds], world.at(seconds))
    other = world.node()
    world.clock.advance(10)
    while sum(await asyncio.gather(node.turn(), other.turn())):
        pass
    assert await world.sent(conversation_id) == [drafts[seconds].client_id for seconds in range(1, 6)]


async def test_what_cannot_be_sent_now_is_tried_again_and_keeps_its_place(world: World, node: Node) -> None:
    conversation_id, one, two = await world.pair()
    first, second, third = (author.draft(conversation_id) for author in (one, one, two))
    for seconds, draft in enumerate((first, second, third), 1):
        await node.scheduled.schedule(draft, world.at(seconds))
    attempts = 0

    async def refuse(draft: Draft) -> None:
        nonlocal attempts
        if draft.sender_id == one.user_id:
            attempts += 1
            raise RateLimited(retry_after=3) if attempts == 1 else Unavailable

    node.before_send = refuse
    world.clock.advance(10)
    await node.work_off()
    # The second one waits behind the first of the same author, and the third one for neither.
    assert await world.sent(conversation_id) == [third.client_id]
    assert attempts == 1
    world.clock.advance(2.9)
    assert await node.turn() == 0, "not before the time that was asked for"
    world.clock.advance(0.2)
    await node.work_off()
    assert attempts == 2
    for _ in range(30):
        world.clock.advance(90)
        await node.work_off()
    assert attempts == 32, "it is never given up"
    node.before_send = None
    world.clock.advance(90)
    await node.work_off()
    assert await world.sent(conversation_id) == [third.client_id, first.client_id, second.client_id]


async def test_a_restriction_only_delays(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(1))

    async def restrict(_: Draft) -> None:
        raise Restricted(retry_after=3600)

    node.before_send = restrict
    world.clock.advance(2)
    await node.work_off()
    assert (await world.plan(plan.id)).status is PlanStatus.PENDING
    # It may be lifted at any time.
    node.before_send = None
    world.clock.advance(61)
    await node.work_off()
    assert (await world.plan(plan.id)).status is PlanStatus.SENT


def crash() -> Callable[[Draft], Any]:
    async def die(_: Draft) -> None:
        raise Crash

    return die


@pytest.mark.parametrize("step", ["claimed", "sent", "answered"])
async def test_a_node_that_dies_at_any_step_leaves_it_sent_once(world: World, node: Node, step: str) -> None:
    conversation_id, one, _ = await world.pair()
    drafts = [one.draft(conversation_id) for _ in range(3)]
    for seconds, draft in enumerate(drafts, 1):
        await node.scheduled.schedule(draft, world.at(seconds))
    world.clock.advance(10)
    if step == "claimed":
        node.before_send = crash()
    elif step == "sent":
        node.after_send = crash()
    else:
        # The message was there already; it is only put down that it was.
        await node.sending.send(drafts[0])
        node.firing._sent = crash()  # type: ignore[method-assign,assignment]
    assert await node.turn() == 1
    survivor = world.node()
    if step == "sent":
        # It was marked in the very statement that stored it: nothing is left to find out.
        await survivor.work_off()
    else:
        assert await survivor.turn() == 0, "the dead node's claim holds for a while"
        world.clock.advance(LEASE.total_seconds() + 0.1)
        await survivor.work_off()
    assert await world.sent(conversation_id) == [draft.client_id for draft in drafts]
    async with world.db.connection() as connection:
        assert await store.count_open(connection, one.user_id) == 0


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_node_that_dies_while_it_puts_down_a_refusal(
    world: World, node: Node, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation_id, one, two = await world.pair()
    plan = await node.scheduled.schedule(one.draft(conversation_id, envelopes(two)), world.at(1))
    world.auth.add(two.user_id)
    settle = store.settle

    async def die(*arguments: Any) -> bool:
        if when == "after":
            await settle(*arguments)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(store, "settle", die)
        world.clock.advance(31)
        assert await node.turn() == 1
    world.clock.advance(LEASE.total_seconds() + 0.1)
    await world.node().work_off()
    assert (await world.plan(plan.id)).status is PlanStatus.NEEDS_REENCRYPT
    # Whoever was not told is told when they connect.
    assert [found.id for found in await node.scheduled.in_need(one.user_id)] == [plan.id]


async def test_two_nodes_that_both_believe_it_is_theirs_send_it_once(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(1))
    other = world.node()
    frozen = asyncio.Event()

    async def freeze(_: Draft) -> None:
        await frozen.wait()

    node.before_send = freeze
    world.clock.advance(2)
    slow = asyncio.create_task(node.turn())
    await asyncio.sleep(0.05)
    world.clock.advance(LEASE.total_seconds() + 1)
    await other.work_off()
    sent = await world.plan(plan.id)
    assert sent.status is PlanStatus.SENT
    frozen.set()
    await slow
    assert await world.sent(conversation_id) == [plan.draft.client_id]
    assert await world.plan(plan.id) == sent


async def test_a_change_wins_over_a_node_that_is_about_to_send(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    second = world.auth.add(one.user_id)
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(1))
    content = ciphertext()

    async def change(_: Draft) -> None:
        node.before_send = None
        await node.scheduled.change(one.user_id, second.device_id, plan.id, resigned(second, plan, content))

    node.before_send = change
    world.clock.advance(2)
    assert await node.turn() == 1
    assert await world.messages(conversation_id) == [], "what was read is not what is wanted any more"
    await node.work_off()
    (message,) = await world.messages(conversation_id)
    assert (message.content, message.head.sender_device_id) == (
        msgspec.json.encode(content),
        second.device_id,
    )


async def test_a_cancellation_wins_over_a_statement_that_waits_for_it(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(1))
    world.clock.advance(2)
    async with world.db.transaction() as tx:
        assert await store.cancel(tx, plan.id, one.user_id, world.clock.now()) is not None
        direct = asyncio.create_task(node.sending.send((await world.plan(plan.id)).draft))
        await asyncio.sleep(0.2)
        assert not direct.done(), "it waits for the row"
    assert (await refusal(direct)).code == "rescheduled"
    assert await world.messages(conversation_id) == []
    # The other way round: once it is stored, a cancellation comes too late.
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(1))
    world.clock.advance(2)
    await node.sending.send((await world.plan(plan.id)).draft)
    assert isinstance(await refusal(node.scheduled.cancel(one.user_id, plan.id)), AlreadySent)


async def test_everybody_at_once(world: World, node: Node) -> None:
    """Changes, cancellations and two nodes at the same moment: what was answered is what happened."""
    conversation_id, one, two = await world.pair()
    people = [one, two]
    other = world.node()
    plans = [
        await node.scheduled.schedule(people[at % 2].draft(conversation_id), world.at(1 + at % 3))
        for at in range(24)
    ]
    world.clock.advance(10)

    async def interfere(at: int, plan: Plan) -> str | None:
        author = people[at % 2]
        try:
            if at % 3 == 0:
                await node.scheduled.cancel(author.user_id, plan.id)
                return "cancelled"
            if at % 3 == 1:
                change = resigned(author, plan, {"ciphertext": "Y2hhbmdlZA=="})
                await other.scheduled.change(author.user_id, author.device_id, plan.id, change)
                return "changed"
        except AlreadySent:
            return "late"
        return None

    async def work(one_node: Node) -> None:
        for _ in range(40):
            await one_node.turn()

    outcomes, *_ = await asyncio.gather(
        asyncio.gather(*(interfere(at, plan) for at, plan in enumerate(plans))), work(node), work(other)
    )
    world.clock.advance(LEASE.total_seconds() * 2)
    await node.work_off()
    sent = {message.head.client_id: message for message in await world.messages(conversation_id)}
    assert len(sent) == len(await world.messages(conversation_id))
    for plan, outcome in zip(plans, outcomes, strict=True):
        message = sent.get(plan.draft.client_id)
        assert (message is None) == (outcome == "cancelled"), outcome
        if message is not None:
            assert (message.content == b'{"ciphertext":"Y2hhbmdlZA=="}') == (outcome == "changed"), outcome


async def test_scheduling_fires_what_is_due_after_what_goes_before_it(world: World) -> None:
    node = world.node(grace=timedelta(seconds=10))
    conversation_id, one, _ = await world.pair()
    drafts = [one.draft(conversation_id) for _ in range(3)]
    plans = [
        await node.scheduled.schedule(draft, world.at(seconds)) for seconds, draft in enumerate(drafts, 1)
    ]
    assert (await node.firing.fire(plans[2].id)).status is PlanStatus.PENDING, "it is not due"
    world.clock.advance(3)
    assert await node.turn() == 0, "scheduling has its time"
    fired = await asyncio.gather(*(node.firing.fire(plans[2].id) for _ in range(3)))
    assert {plan.status for plan in fired} == {PlanStatus.SENT}
    assert await world.sent(conversation_id) == [draft.client_id for draft in drafts]
    assert isinstance(await refusal(node.firing.fire(uuid4())), ScheduledNotFound)
    late = await node.scheduled.schedule(one.draft(conversation_id), world.at(1))
    world.clock.advance(11)
    await node.work_off()
    assert (await world.plan(late.id)).status is PlanStatus.SENT, "nobody called for it"


async def test_what_cannot_be_sent_for_scheduling_stays(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whispr.services.messaging.service.firing._PATIENCE", 0.1)
    conversation_id, one, _ = await world.pair()
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(1))

    async def away(_: Draft) -> None:
        raise Unavailable

    node.before_send = away
    world.clock.advance(2)
    assert isinstance(await refusal(node.firing.fire(plan.id)), Unavailable)
    assert (await world.plan(plan.id)).status is PlanStatus.PENDING


class Jobs:
    """What scheduling was told, and what is left of it."""

    def __init__(self) -> None:
        self.jobs: dict[str, tuple[int, Any]] = {}
        self.operations: list[UUID] = []

    async def schedule_job(
        self,
        operation_id: UUID,
        key: str,
        revision: int,
        type: str,  # noqa: A002
        run_at: Any,
        payload: dict[str, Any],
        *,
        user_id: UUID | None = None,
    ) -> None:
        assert (type, payload) == ("scheduled_message", {"scheduled_id": key})
        self._take(operation_id, key, revision, run_at)

    async def cancel_job(self, operation_id: UUID, key: str, revision: int) -> None:
        self._take(operation_id, key, revision, None)

    def _take(self, operation_id: UUID, key: str, revision: int, run_at: Any) -> None:
        self.operations.append(operation_id)
        if revision > self.jobs.get(key, (0, None))[0]:
            self.jobs[key] = (revision, run_at)


async def test_scheduling_is_told_in_any_order(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    first = await node.scheduled.schedule(one.draft(conversation_id), world.at(30))
    second = await node.scheduled.schedule(one.draft(conversation_id), world.at(40))
    third = await node.scheduled.schedule(one.draft(conversation_id), world.at(50))
    await node.scheduled.change(one.user_id, one.device_id, first.id, PlanChange(send_at=world.at(60)))
    await node.scheduled.cancel(one.user_id, second.id)
    keys = [str(plan.id) for plan in (first, second, third)]
    async with world.db.connection() as connection:
        records = await connection.fetch(
            "SELECT * FROM outbox WHERE topic = $1 AND key = ANY($2) ORDER BY id", SCHEDULE_JOB, keys
        )
    rows = [
        outbox.OutboxRow(r["id"], r["topic"], r["key"], r["payload"], r["created_at"], 1, {}) for r in records
    ]
    assert len(rows) == 5
    expected = {keys[0]: (2, world.at(60)), keys[1]: (2, None), keys[2]: (1, world.at(50))}
    for order in (rows, rows[::-1], rows + rows, *itertools.islice(itertools.permutations(rows), 50, 60)):
        jobs = Jobs()
        timers = Timers(world.db, jobs)
        for row in order:
            await timers.handlers()[SCHEDULE_JOB]([row])
        await timers.tell(list(order))
        assert jobs.jobs == expected
        assert len(set(jobs.operations)) == 3, "the same thing said again is the same operation"


async def test_an_erased_one_is_cancelled_with_scheduling(world: World) -> None:
    jobs = Jobs()
    row = outbox.OutboxRow(1, SCHEDULE_JOB, str(uuid4()), {"version": 4}, world.clock.now(), 1, {})
    await Timers(world.db, jobs).tell([row])
    assert jobs.jobs == {row.key: (4, None)}


async def test_what_ended_is_forgotten_with_time(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    sent, cancelled, waiting = [
        await node.scheduled.schedule(one.draft(conversation_id), world.at(seconds))
        for seconds in (1, 2, 40 * 86400)
    ]
    await node.scheduled.cancel(one.user_id, cancelled.id)
    world.clock.advance(5)
    await node.work_off()
    world.clock.advance(29 * 86400)
    assert await node.scheduled.forget(timedelta(days=30)) == 0
    world.clock.advance(2 * 86400)
    assert await node.scheduled.forget(timedelta(days=30)) == 2
    assert isinstance(await refusal(node.scheduled.get(one.user_id, sent.id)), ScheduledNotFound)
    assert (await world.plan(waiting.id)).status is PlanStatus.PENDING


async def test_a_draining_node_finishes_and_begins_nothing(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    held = asyncio.Event()

    async def hold(_: Draft) -> None:
        await held.wait()

    node.before_send = hold
    await node.scheduled.schedule(one.draft(conversation_id), world.at(1))
    later = await node.scheduled.schedule(one.draft(conversation_id), world.at(2))
    world.clock.advance(3)
    turn = asyncio.create_task(node.turn())
    await asyncio.sleep(0.05)
    draining = asyncio.create_task(node.firing.drain())
    await asyncio.sleep(0.05)
    assert not draining.done()
    held.set()
    await draining
    await turn
    assert await node.turn() == 0
    assert len(await world.messages(conversation_id)) == 1
    assert (await world.plan(later.id)).status is PlanStatus.PENDING


async def test_a_lost_database_only_delays(world: World, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation_id, one, _ = await world.pair()
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(1))
    running = asyncio.create_task(node.firing.run())

    async def lost(*_: Any) -> list[Plan]:
        raise ConnectionResetError

    with monkeypatch.context() as patch:
        patch.setattr(store, "claim", lost)
        world.clock.advance(2)
        node.firing.wake()
        await asyncio.sleep(0.1)
    node.firing.wake()
    async with asyncio.timeout(5):
        while (await world.plan(plan.id)).status is not PlanStatus.SENT:
            await asyncio.sleep(0.02)
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
