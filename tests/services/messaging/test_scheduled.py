"""Scheduled messages without the doors: each goes out exactly once, in order, as its author last left it."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import msgspec
import pytest
from tests.services.messaging.plans import Node, World, ciphertext, envelopes, refusal, resigned

from whispr.kit.errors import Failure
from whispr.services.messaging.models import (
    AlreadySent,
    BadSignature,
    Blocked,
    ClientIdConflict,
    ConversationType,
    DevicesMismatch,
    Draft,
    InvalidContent,
    InvalidSendAt,
    NotAMember,
    NotPending,
    Plan,
    PlanStatus,
    ReplyNotFound,
    ScheduledNotFound,
    TooManyScheduled,
)
from whispr.services.messaging.service.scheduled import MAX_OPEN, PlanChange
from whispr.services.messaging.store import conversations, members


async def test_a_message_goes_out_at_its_time_and_not_before(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    draft = one.draft(conversation_id, expires_in=60)
    plan = await node.scheduled.schedule(draft, world.at(30))
    assert (plan.status, plan.send_at, plan.version) == (PlanStatus.PENDING, world.at(30), 1)
    world.clock.advance(29.9)
    assert await node.turn() == 0
    assert await world.messages(conversation_id) == []
    world.clock.advance(0.1)
    assert await node.turn() == 1
    (message,) = await world.messages(conversation_id)
    head = message.head
    assert (head.client_id, head.sender_id, head.sender_device_id) == (
        draft.client_id,
        one.user_id,
        one.device_id,
    )
    assert (head.sent_at, head.expires_in) == (world.clock.now(), 60)
    sent = await world.plan(plan.id)
    assert (sent.status, sent.message_id, sent.failure) == (PlanStatus.SENT, head.id, None)
    assert (sent.draft.content, sent.draft.signature) == (b"", b""), "its content is kept once"
    assert await node.turn() == 0
    # What follows is a message like any other: the log goes on.
    await node.sending.send(one.draft(conversation_id))
    assert [message.head.seq for message in await world.messages(conversation_id)] == [1, 2]


async def test_the_same_request_again_is_answered_the_same(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    draft = one.draft(conversation_id)
    send_at = world.at(30)
    plans = await asyncio.gather(*(node.scheduled.schedule(draft, send_at) for _ in range(3)))
    assert len({plan.id for plan in plans}) == 1
    other = one.draft(conversation_id, client_id=draft.client_id)
    assert isinstance(await refusal(node.scheduled.schedule(other, send_at)), ClientIdConflict)
    world.clock.advance(31)
    await node.work_off()
    # Its time has passed, and still it is the first answer that is given again.
    again = await node.scheduled.schedule(draft, send_at)
    assert (again.id, again.status) == (plans[0].id, PlanStatus.SENT)
    assert await world.sent(conversation_id) == [draft.client_id]


async def test_a_client_id_that_a_message_has_is_taken(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    draft = one.draft(conversation_id)
    result = await node.sending.send(draft)
    failure = await refusal(node.scheduled.schedule(draft, world.at(30)))
    assert isinstance(failure, AlreadySent)
    assert failure.fields["message_id"] == str(result.message.head.id)
    other = one.draft(conversation_id, client_id=draft.client_id)
    assert isinstance(await refusal(node.scheduled.schedule(other, world.at(30))), ClientIdConflict)


@pytest.mark.parametrize("seconds", [0.0, -1.0, -1e9, 367 * 86400.0])
async def test_times_out_of_range_are_refused(world: World, node: Node, seconds: float) -> None:
    conversation_id, one, _ = await world.pair()
    failure = await refusal(node.scheduled.schedule(one.draft(conversation_id), world.at(seconds)))
    assert isinstance(failure, InvalidSendAt)


async def test_a_draft_is_judged_when_it_is_scheduled(world: World, node: Node) -> None:
    conversation_id, one, two = await world.pair(ConversationType.DIRECT)
    stranger = world.auth.add()
    drafts: list[tuple[Draft, type[Failure]]] = [
        (stranger.draft(conversation_id), NotAMember),
        (one.draft(conversation_id, signature=bytes(64)), BadSignature),
        (one.draft(conversation_id, {"ciphertext": "?"}), InvalidContent),
        (one.draft(conversation_id, envelopes(one)), DevicesMismatch),
        (one.draft(conversation_id, reply_to_id=uuid4()), ReplyNotFound),
    ]
    for draft, expected in drafts:
        assert isinstance(await refusal(node.scheduled.schedule(draft, world.at(30))), expected)
    world.users.reasons[one.user_id, two.user_id] = "blocked"
    node.contact.forget_all()
    world.clock.advance(1000)
    assert isinstance(
        await refusal(node.scheduled.schedule(one.draft(conversation_id), world.at(30))), Blocked
    )
    assert await node.turn() == 0


async def test_a_person_has_at_most_a_hundred(world: World, node: Node) -> None:
    conversation_id, one, two = await world.pair()
    await asyncio.gather(
        *(node.scheduled.schedule(one.draft(conversation_id), world.at(30)) for _ in range(MAX_OPEN - 1))
    )
    outcomes = await asyncio.gather(
        *(node.scheduled.schedule(one.draft(conversation_id), world.at(30)) for _ in range(3)),
        return_exceptions=True,
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == [
        "Plan",
        "TooManyScheduled",
        "TooManyScheduled",
    ]
    failure = next(outcome for outcome in outcomes if isinstance(outcome, TooManyScheduled))
    assert failure.fields["limit"] == 100
    await node.scheduled.schedule(two.draft(conversation_id), world.at(30))
    plan = next(outcome for outcome in outcomes if isinstance(outcome, Plan))
    await node.scheduled.cancel(one.user_id, plan.id)
    await node.scheduled.schedule(one.draft(conversation_id), world.at(30))


async def test_nobody_sees_or_touches_what_is_another_s(world: World, node: Node) -> None:
    conversation_id, one, two = await world.pair()
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(30))
    change = PlanChange(send_at=world.at(60))
    for work in (
        node.scheduled.get(two.user_id, plan.id),
        node.scheduled.change(two.user_id, two.device_id, plan.id, change),
        node.scheduled.cancel(two.user_id, plan.id),
        node.scheduled.get(one.user_id, uuid4()),
        node.scheduled.change(one.user_id, one.device_id, uuid4(), change),
        node.scheduled.cancel(one.user_id, uuid4()),
    ):
        assert isinstance(await refusal(work), ScheduledNotFound)
    assert await node.scheduled.page(two.user_id, None, None, 10) == ([], None)
    assert await world.plan(plan.id) == plan


async def test_pages_are_by_time(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    made = [
        await node.scheduled.schedule(one.draft(conversation_id), world.at(seconds))
        for seconds in (50, 10, 30, 10, 40)
    ]
    await node.scheduled.cancel(one.user_id, made[2].id)
    ordered = sorted(made, key=lambda plan: (plan.send_at, plan.id))
    seen: list[UUID] = []
    after = None
    while True:
        plans, after = await node.scheduled.page(one.user_id, None, after, 2)
        seen += [plan.id for plan in plans]
        if after is None:
            break
    assert seen == [plan.id for plan in ordered]
    cancelled, _ = await node.scheduled.page(one.user_id, PlanStatus.CANCELLED, None, 10)
    assert [plan.id for plan in cancelled] == [made[2].id]


async def test_a_change_is_what_is_sent(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    first = await node.sending.send(one.draft(conversation_id))
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(30))
    content = ciphertext()
    change = resigned(
        one, plan, content, send_at=world.at(60), reply_to_id=first.message.head.id, expires_in=9
    )
    changed = await node.scheduled.change(one.user_id, one.device_id, plan.id, change)
    assert (changed.version, changed.send_at) == (2, world.at(60))
    again = await node.scheduled.change(one.user_id, one.device_id, plan.id, change)
    assert again == changed, "the same change again changes nothing"
    world.clock.advance(30)
    assert await node.turn() == 0
    world.clock.advance(30)
    await node.work_off()
    message = (await world.messages(conversation_id))[-1]
    assert message.content == msgspec.json.encode(content)
    assert (message.head.reply_to_id, message.head.expires_in) == (first.message.head.id, 9)
    assert message.head.client_id == plan.draft.client_id
    # Its answer may have been lost: then the same change is made again after it was sent.
    assert (
        await node.scheduled.change(one.user_id, one.device_id, plan.id, change)
    ).status is PlanStatus.SENT
    later = resigned(one, plan, ciphertext())
    for work in (
        node.scheduled.change(one.user_id, one.device_id, plan.id, later),
        node.scheduled.cancel(one.user_id, plan.id),
    ):
        failure = await refusal(work)
        assert isinstance(failure, AlreadySent)
        assert failure.fields["message_id"] == str(message.head.id)


async def test_changes_are_held_to_the_rules(world: World, node: Node) -> None:
    conversation_id, one, two = await world.pair()
    second = world.auth.add(one.user_id)
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(30))
    content = ciphertext()
    right = one.sign(conversation_id, plan.draft.client_id, content)
    encoded = msgspec.json.encode(content)
    for device, change, expected in (
        (one, PlanChange(content=encoded), InvalidContent),
        (one, PlanChange(signature=right), InvalidContent),
        (one, PlanChange(content=encoded, signature=bytes(64)), BadSignature),
        (second, PlanChange(content=encoded, signature=right), BadSignature),
        (one, resigned(two, plan, content), BadSignature),
        (one, resigned(one, plan, {"ciphertext": "?"}), InvalidContent),
        (one, resigned(one, plan, envelopes(two)), DevicesMismatch),
        (one, PlanChange(send_at=world.at(-1)), InvalidSendAt),
        (one, PlanChange(send_at=world.at(400 * 86400)), InvalidSendAt),
        (one, PlanChange(reply_to_id=uuid4()), ReplyNotFound),
    ):
        work = node.scheduled.change(device.user_id, device.device_id, plan.id, change)
        assert isinstance(await refusal(work), expected), change
    assert await world.plan(plan.id) == plan


async def test_another_own_device_signs_anew(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    second = world.auth.add(one.user_id)
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(30))
    await node.scheduled.change(one.user_id, second.device_id, plan.id, resigned(second, plan, ciphertext()))
    world.clock.advance(30)
    await node.work_off()
    (message,) = await world.messages(conversation_id)
    assert message.head.sender_device_id == second.device_id
    assert message.head.client_id == plan.draft.client_id


async def test_a_device_that_has_used_the_client_id_cannot_sign_with_it(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    second = world.auth.add(one.user_id)
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(30))
    await node.sending.send(second.draft(conversation_id, client_id=plan.draft.client_id))
    change = resigned(second, plan, ciphertext())
    work = node.scheduled.change(one.user_id, second.device_id, plan.id, change)
    assert isinstance(await refusal(work), ClientIdConflict)


async def test_a_cancelled_one_is_never_sent(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(30))
    await node.scheduled.cancel(one.user_id, plan.id)
    await node.scheduled.cancel(one.user_id, plan.id)
    cancelled = await world.plan(plan.id)
    assert (cancelled.status, cancelled.draft.content) == (PlanStatus.CANCELLED, b"")
    change = PlanChange(send_at=world.at(60))
    failure = await refusal(node.scheduled.change(one.user_id, one.device_id, plan.id, change))
    assert isinstance(failure, NotPending)
    world.clock.advance(100)
    await node.work_off()
    assert await world.messages(conversation_id) == []


async def test_a_new_device_makes_its_author_encrypt_again(world: World, node: Node) -> None:
    conversation_id, one, two = await world.pair()
    plan = await node.scheduled.schedule(one.draft(conversation_id, envelopes(two)), world.at(30))
    newcomer = world.auth.add(two.user_id)
    world.clock.advance(31)
    await node.work_off()
    assert await world.messages(conversation_id) == []
    needs = {
        "missing": [str(newcomer.device_id)],
        "extra": [],
        "stale": [],
        "owners": {str(newcomer.device_id): str(two.user_id)},
    }
    waiting = await world.plan(plan.id)
    assert (waiting.status, waiting.failure, waiting.needs) == (
        PlanStatus.NEEDS_REENCRYPT,
        "devices_mismatch",
        needs,
    )
    assert world.told.to(one.user_id) == [
        (
            "needs_reencrypt",
            {
                "scheduled_id": str(plan.id),
                "conversation_id": str(conversation_id),
                "failure": "devices_mismatch",
                **needs,
            },
        )
    ]
    assert [found.id for found in await node.scheduled.in_need(one.user_id)] == [plan.id]
    assert await node.scheduled.in_need(two.user_id) == []
    # A later time alone does not help; nor does the same content.
    stays = await node.scheduled.change(one.user_id, one.device_id, plan.id, PlanChange(send_at=world.at(5)))
    assert stays.status is PlanStatus.NEEDS_REENCRYPT
    again = PlanChange(content=waiting.draft.content, signature=waiting.draft.signature)
    failure = await refusal(node.scheduled.change(one.user_id, one.device_id, plan.id, again))
    assert isinstance(failure, DevicesMismatch)
    world.clock.advance(10)
    content = envelopes(two, newcomer)
    await node.scheduled.change(one.user_id, one.device_id, plan.id, resigned(one, plan, content))
    await node.work_off()
    (message,) = await world.messages(conversation_id)
    assert message.head.client_id == plan.draft.client_id
    assert await node.scheduled.in_need(one.user_id) == []


async def test_the_same_content_is_taken_once_the_devices_are_what_they_were(
    world: World, node: Node
) -> None:
    conversation_id, one, two = await world.pair()
    draft = one.draft(conversation_id, envelopes(two))
    plan = await node.scheduled.schedule(draft, world.at(30))
    world.auth.add(two.user_id)
    world.clock.advance(31)
    await node.work_off()
    world.auth.devices[two.user_id].pop()
    world.clock.advance(2)
    change = PlanChange(content=draft.content, signature=draft.signature)
    await node.scheduled.change(one.user_id, one.device_id, plan.id, change)
    await node.work_off()
    assert await world.sent(conversation_id) == [draft.client_id]


async def test_without_the_device_that_signed_another_one_must(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    second = world.auth.add(one.user_id)
    plan = await node.scheduled.schedule(one.draft(conversation_id), world.at(30))
    world.auth.devices[one.user_id].remove(one)
    world.clock.advance(31)
    await node.work_off()
    waiting = await world.plan(plan.id)
    assert (waiting.status, waiting.failure) == (PlanStatus.NEEDS_REENCRYPT, "session_revoked")
    ((event, notice),) = world.told.to(one.user_id)
    assert (event, notice["missing"], notice["failure"]) == ("needs_reencrypt", [], "session_revoked")
    await node.scheduled.change(one.user_id, second.device_id, plan.id, resigned(second, plan, ciphertext()))
    await node.work_off()
    assert await world.sent(conversation_id) == [plan.draft.client_id]


async def test_what_can_never_be_sent_fails_and_its_author_is_told(world: World, node: Node) -> None:
    direct, one, two = await world.pair(ConversationType.DIRECT)
    group = await world.conversation(one, two)
    closed = await world.conversation(one, two)
    plans = {
        "blocked": await node.scheduled.schedule(one.draft(direct), world.at(1)),
        "forbidden": await node.scheduled.schedule(two.draft(group), world.at(1)),
        "conversation_closed": await node.scheduled.schedule(one.draft(closed), world.at(1)),
    }
    world.users.reasons[one.user_id, two.user_id] = "blocked"
    node.contact.changed(one.user_id)
    async with world.db.transaction() as tx:
        await members.leave(tx, group, two.user_id, 0, world.clock.now())
        await conversations.close(tx, closed)
    world.clock.advance(2)
    await node.work_off()
    for code, plan in plans.items():
        failed = await world.plan(plan.id)
        assert (failed.status, failed.failure) == (PlanStatus.FAILED, code)
        assert failed.draft.content, "its author may want it back"
        notice = {
            "scheduled_id": str(plan.id),
            "conversation_id": str(plan.draft.conversation_id),
            "failure": code,
        }
        assert ("scheduled_failed", notice) in world.told.to(plan.draft.sender_id)
        work = node.scheduled.change(
            plan.draft.sender_id, plan.draft.sender_device_id, plan.id, PlanChange(send_at=world.at(9))
        )
        assert isinstance(await refusal(work), NotPending)
    await node.scheduled.cancel(one.user_id, plans["blocked"].id)
    assert (await world.plan(plans["blocked"].id)).status is PlanStatus.CANCELLED


async def test_a_message_sent_under_its_client_id_is_not_sent_again(world: World, node: Node) -> None:
    conversation_id, one, _ = await world.pair()
    same, other = one.draft(conversation_id), one.draft(conversation_id)
    kept = await node.scheduled.schedule(same, world.at(1))
    doomed = await node.scheduled.schedule(other, world.at(2))
    result = await node.sending.send(same)
    await node.sending.send(one.draft(conversation_id, client_id=other.client_id))
    world.clock.advance(5)
    await node.work_off()
    sent = await world.plan(kept.id)
    assert (sent.status, sent.message_id) == (PlanStatus.SENT, result.message.head.id)
    failed = await world.plan(doomed.id)
    assert (failed.status, failed.failure) == (PlanStatus.FAILED, "client_id_conflict")
    assert await world.sent(conversation_id) == [same.client_id, other.client_id]
