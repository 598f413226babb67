"""What is done to messages, over the real services: every device of everybody comes to what a fresh fetch shows."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest

from tests.client.test_client import Device, People, name, until
from tests.stack import Stack
from whispr.client import ApiError, Expires, Store, Unreachable
from whispr.client.crypto.engine import Payload
from whispr.client.events import ChatMessage
from whispr.client.history import sorted_reactions
from whispr.client.models import Message


@pytest.fixture
async def people(stack: Stack) -> AsyncIterator[People]:
    made = People(stack)
    yield made
    for device in made.devices:
        await device.client.stop()


def shown(device: Device, message_id: UUID) -> ChatMessage:
    message = device.client.history.find(message_id)
    assert message is not None
    return message


async def sees(devices: list[Device], message_id: UUID, text: str | None) -> None:
    await until(
        lambda: all(
            (found := device.client.history.find(message_id)) is not None and found.text == text
            for device in devices
        ),
        lambda: str([device.client.history.find(message_id) for device in devices]),
    )


async def test_an_edit_reaches_every_device_and_says_so(people: People) -> None:
    ada = name()
    phone, laptop, bens = await people.new(ada), await people.another(ada), await people.new()
    conversation = await phone.client.direct(bens.client.user_id)
    sent = await phone.client.send_text(conversation, "helo")
    await sees([phone, laptop, bens], sent.id, "helo")
    await phone.client.edit_text(sent.id, "hello")
    await sees([phone, laptop, bens], sent.id, "hello")
    # From another device of hers, under the client id of the first.
    await laptop.client.edit_text(sent.id, "hello!")
    everybody = [phone, laptop, bens]
    await sees(everybody, sent.id, "hello!")
    assert [shown(device, sent.id).edited_at is not None for device in everybody] == [True] * 3
    assert all(shown(device, sent.id).verified for device in everybody)
    assert phone.seqs() == laptop.seqs() == bens.seqs() == [1, 2, 3]
    with pytest.raises(ApiError) as refused:
        await bens.client.edit_text(sent.id, "I never said that")
    assert refused.value.code in ("not_allowed", "forbidden")
    await bens.client.send_text(conversation, "and on it goes")
    await phone.hears("helo", "and on it goes")


async def test_an_edit_whose_answer_is_lost_and_one_across_a_new_device_are_made_once(people: People) -> None:
    ada, bens_name = await people.new(), name()
    ben = await people.new(bens_name)
    conversation = await ada.client.direct(bens_name)
    sent = await ada.client.send_text(conversation, "first")
    push, lost = ada.client.live.push, 0

    async def losing(conversation_id: Any, event: str, payload: Any) -> Any:
        nonlocal lost
        reply = await push(conversation_id, event, payload)
        if event == "edit_message" and lost < 2:
            lost += 1
            raise Unreachable("the reply was lost")
        return reply

    ada.client.live.push = losing  # type: ignore[method-assign]
    await ada.client.edit_text(sent.id, "second")
    second = await people.another(bens_name)
    await ada.client.edit_text(sent.id, "third")
    await sees([ada, ben, second], sent.id, "third")
    assert ada.seqs() == [1, 2, 3]


async def test_deleted_for_all_leaves_nothing_on_any_device(people: People) -> None:
    ada, ben = await people.new(), await people.new()
    conversation = await ada.client.direct(ben.client.user_id)
    sent = await ada.client.send_text(conversation, "a slip of the tongue")
    await sees([ada, ben], sent.id, "a slip of the tongue")
    await ben.client.actions.react(sent.id, "😱")
    await ben.client.actions.pin(sent.id)
    with pytest.raises(ApiError) as refused:
        await ben.client.actions.delete(sent.id)
    assert refused.value.status == 403
    await ada.client.actions.delete(sent.id)
    await ada.client.actions.delete(sent.id)
    await until(lambda: all(shown(device, sent.id).is_deleted for device in (ada, ben)))
    for device in (ada, ben):
        message = shown(device, sent.id)
        assert (message.kind, message.text, message.reactions) == ("deleted", None, {})
        assert device.client.history.pins(conversation) == []
        assert device.client.history.sent(message.client_id, "", edited=False) is None
    with pytest.raises(ApiError):
        await ada.client.edit_text(sent.id, "I take it back")


async def test_replies_reactions_and_pins(people: People) -> None:
    ada, ben = await people.new(), await people.new()
    conversation = await ada.client.direct(ben.client.user_id)
    sent = await ada.client.send_text(conversation, "eight o'clock?")
    await sees([ben], sent.id, "eight o'clock?")
    reply = await ben.client.send_text(conversation, "yes", reply_to_id=sent.id)
    await sees([ada], reply.id, "yes")
    assert shown(ada, reply.id).reply_to_id == sent.id
    for device in (ada, ben, ada):
        await device.client.actions.react(sent.id, "👍🏽")
    await ben.client.actions.react(sent.id, "50% / half?")
    await ben.client.actions.pin(sent.id)
    both = sorted([ada.client.user_id, ben.client.user_id])
    wanted = {"50% / half?": [ben.client.user_id], "👍🏽": both}
    await until(lambda: [shown(d, sent.id).reactions for d in (ada, ben)] == [wanted] * 2)
    await until(lambda: [p.message_id for p in ada.client.history.pins(conversation)] == [sent.id])
    assert ada.client.history.pins(conversation)[0].pinned_by == ben.client.user_id
    await ben.client.actions.unreact(sent.id, "50% / half?")
    await ada.client.actions.unpin(sent.id)
    await until(lambda: [shown(d, sent.id).reactions for d in (ada, ben)] == [{"👍🏽": both}] * 2)
    await until(lambda: ben.client.history.pins(conversation) == [])


async def test_disappearing_messages_are_gone_from_devices_and_server(people: People) -> None:
    ada, ben = await people.new(), await people.new()
    conversation = await ada.client.direct(ben.client.user_id)
    soon = await ada.client.send_text(conversation, "one minute", expires=Expires(60))
    read = await ada.client.send_text(conversation, "once you have read it", expires=Expires(60, "read"))
    stays = await ada.client.send_text(conversation, "this stays")
    await sees([ada, ben], stays.id, "this stays")
    await ben.client.offline()
    people.stack.clock.advance(61)
    # Ben's device is not told, and keeps its word all the same.
    await until(lambda: shown(ben, soon.id).is_deleted)
    assert not shown(ben, read.id).is_deleted
    await until(lambda: shown(ada, soon.id).is_deleted)
    ben.client.online()
    await ben.client.mark_read(conversation, read.seq)
    async with asyncio.timeout(10):
        # The server's minute begins when it has noted the reading.
        while (await ada.client.rest.messages(conversation, after_seq=1, limit=1)).items[
            0
        ].expires_at is None:
            await asyncio.sleep(0.05)
    people.stack.clock.advance(61)
    await until(lambda: shown(ben, read.id).is_deleted and shown(ada, read.id).is_deleted)
    page = await ada.client.rest.messages(conversation, after_seq=0)
    assert [message.is_deleted for message in page.items] == [True, True, False]
    assert shown(ben, stays.id).text == "this stays"


async def test_a_report_proves_what_was_said(people: People) -> None:
    ada, ben = await people.new(), await people.new()
    conversation = await ada.client.direct(ben.client.user_id)
    sent = await ada.client.send_text(conversation, "buy my coins")
    await sees([ben], sent.id, "buy my coins")
    forged = {"plaintext": "YQ==", "franking_key": "YQ=="}
    with pytest.raises(ApiError) as refused:
        await ben.client.rest.report(sent.id, {"reason": "spam", "reveal": forged})
    assert refused.value.code in ("franking_mismatch", "invalid_request")
    report = await ben.client.actions.report(sent.id, "spam", comment="again", reveal=True)
    assert report.is_verified
    again = await ben.client.actions.report(sent.id, "spam", reveal=True)
    assert again.report_id == report.report_id
    await ada.client.edit_text(sent.id, "buy my other coins")
    await sees([ben], sent.id, "buy my other coins")
    other = await people.new()
    with pytest.raises(ApiError) as stranger:
        await other.client.actions.report(sent.id, "spam")
    assert stranger.value.status in (403, 404)


async def test_the_sender_key_is_replaced_when_a_member_is_removed(people: People) -> None:
    owner, ben, cleo = [await people.new() for _ in range(3)]
    group = await owner.client.group([ben.client.user_id, cleo.client.user_id])
    await ben.client.send_text(group, "with Cleo")
    assert cleo.client.device_id in ben.client.engine.sender_keys.holders(group)
    await owner.client.rest.remove_member(group, cleo.client.user_id)
    await until(lambda: any(event.event == "member_removed" for event in ben.events))
    assert ben.client.engine.sender_keys.holders(group) == {}
    await ben.client.send_text(group, "without Cleo")
    await until(lambda: "without Cleo" in owner.texts())
    assert "without Cleo" not in cleo.texts()


async def test_a_deleted_text_takes_no_key_with_it(people: People) -> None:
    """A device was away when a group's first text was sent and deleted; it reads what followed, edits included."""
    ada, bens_name, cleo = await people.new(), name(), await people.new()
    ben = await people.new(bens_name)
    group = await ada.client.group([ben.client.user_id, cleo.client.user_id])
    await until(lambda: group in ben.client.conversations.ids())
    await ben.client.offline()
    first = await ada.client.send_text(group, "first")
    second = await ada.client.send_text(group, "second")
    await cleo.hears("first", "second")
    for number in range(3):
        await ada.client.send_text(group, f"{number}")
    await ada.client.edit_text(second.id, "second, edited")
    await until(lambda: ada.client.history.find(first.id) is not None)
    await ada.client.actions.delete(first.id)
    ben.client.online()
    await ben.hears("second, edited", "0", "1", "2")
    await until(lambda: shown(ben, first.id).is_deleted)
    assert [message.error for message in ben.client.history.messages(group)] == [None] * 6


async def test_any_device_comes_to_what_a_fresh_fetch_shows(people: People) -> None:
    """A random history by two people on three devices, one of them away most of the time, and one that comes late."""
    chance = random.Random(20261121)
    ada_name = name()
    ada, ben, away = await people.new(ada_name), await people.new(), await people.another(ada_name)
    conversation = await ada.client.direct(ben.client.user_id)
    messages = [
        (await device.client.send_text(conversation, f"begun by {n}"), device)
        for n, device in ((1, ada), (2, ben))
    ]
    await until(lambda: all(len(device.events) == 2 for device in (ada, ben, away)))
    await away.client.offline()
    refusals: set[str] = set()
    for step in range(60):
        actor = chance.choice([ada, ben])
        sent, author = chance.choice(messages)
        await until(lambda actor=actor, sent=sent: actor.client.history.find(sent.id) is not None)  # type: ignore[misc]
        act = chance.choice(["send", "edit", "edit", "delete", "react", "react", "unreact", "pin", "unpin"])
        reaction = chance.choice("👍🌻🎉")
        try:
            if act == "send":
                messages.append((await actor.client.send_text(conversation, f"text {step}"), actor))
            elif act == "edit":
                await author.client.edit_text(sent.id, f"edit {step}")
            elif act == "delete" and chance.random() < 0.4:
                await author.client.actions.delete(sent.id)
            elif act in ("react", "unreact"):
                await getattr(actor.client.actions, act)(sent.id, reaction)
            elif act in ("pin", "unpin"):
                await getattr(actor.client.actions, act)(sent.id)
        except ApiError as error:
            refusals.add(error.code)
        if step == 30:
            away.client.online()
            await asyncio.sleep(0.2)
            await away.client.offline()
    assert refusals <= {"message_deleted"}
    late = await people.another(ada_name)
    away.client.online()
    events = await ada.client.rest.events(conversation, after_seq=0, limit=1)
    everybody = [ada, ben, away, late]
    await until(
        lambda: all(
            device.client.conversations.cursor(conversation).seq == events.head_seq for device in everybody
        )
    )
    texts = [[m.text for m in device.client.history.messages(conversation)] for device in everybody[:3]]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 3
    for device in everybody:
        fresh = (await device.client.rest.messages(conversation, after_seq=0, limit=100)).items
        kept = device.client.history.messages(conversation)
        assert [state_of(message) for message in kept] == [state_of(message) for message in fresh]
        pins = await device.client.rest.pins(conversation)
        assert {p.message_id: p for p in device.client.history.pins(conversation)} == {
            p.message_id: p for p in pins
        }


async def test_pins_are_fetched_however_many_they_are(people: People) -> None:
    ada, bens_name = await people.new(), name()
    await people.new(bens_name)
    conversation = await ada.client.direct(bens_name)
    sent = [await ada.client.send_text(conversation, str(number)) for number in range(55)]
    for message in sent:
        await ada.client.actions.pin(message.id)
    pins = await ada.client.rest.pins(conversation)
    assert {pin.message_id for pin in pins} == {message.id for message in sent}


def state_of(message: ChatMessage | Message) -> tuple[Any, ...]:
    reactions = message.reactions
    if isinstance(message, Message):
        reactions = sorted_reactions((r.reaction, r.user_ids) for r in message.reactions)
    edited_at = None if message.is_deleted else message.edited_at
    return message.id, message.seq, message.is_deleted, edited_at, message.content_sha256, reactions


async def test_a_scheduled_message_follows_a_device_that_came_in_between(people: People) -> None:
    ada, bens_name = await people.new(), name()
    ben = await people.new(bens_name)
    conversation = await ada.client.direct(bens_name)
    later = people.stack.clock.now() + timedelta(hours=1)
    first = await ada.client.schedule_text(conversation, "happy birthday", later)
    dropped = await ada.client.schedule_text(conversation, "never mind", later)
    await ada.client.reschedule(first, text="happy birthday!", send_at=later + timedelta(hours=1))
    await ada.client.schedule.cancel(dropped)
    new = await people.another(bens_name)
    await until(lambda: conversation in new.client.conversations.ids())
    people.stack.clock.advance(3660)
    await asyncio.sleep(0.3)
    assert ben.texts() == []
    people.stack.clock.advance(3600)
    for device in (ada, ben, new):
        await device.hears("happy birthday!")
        assert device.seqs() == [1]
    statuses = {s.id: s.status async for s in ada.client.rest.scheduled_messages()}
    assert statuses.get(first, "sent") == "sent"
    assert statuses.get(dropped, "cancelled") == "cancelled"
    with pytest.raises(ApiError) as refused:
        await ada.client.reschedule(first, text="too late")
    assert refused.value.code in ("already_sent", "not_scheduled_here")
    assert ada.client.store.keys("scheduled") == []
    await ada.client.outbox.send(conversation, Payload("text", "and on"))
    await ben.hears("happy birthday!", "and on")


async def test_a_scheduled_message_waits_for_the_device_that_can_encrypt_it(people: People) -> None:
    """Its time comes while that device is away and the devices have changed."""
    ada, bens_name = await people.new(), name()
    ben = await people.new(bens_name)
    conversation = await ada.client.direct(bens_name)
    later = people.stack.clock.now() + timedelta(minutes=1)
    scheduled = await ada.client.schedule_text(conversation, "in the end", later)
    await ada.client.offline()
    new = await people.another(bens_name)
    people.stack.clock.advance(61)
    async with asyncio.timeout(10):
        while [s.status async for s in ada.client.rest.scheduled_messages()] != ["needs_reencrypt"]:
            await asyncio.sleep(0.05)
    assert ben.texts() == []
    ada.client.online()
    for device in (ben, new, ada):
        await device.hears("in the end")
        assert device.seqs() == [1]
    assert [(s.id, s.status) async for s in ada.client.rest.scheduled_messages()] == [(scheduled, "sent")]


async def test_a_message_whose_scheduling_was_cut_off_is_scheduled_once(people: People) -> None:
    store = Store()
    ada, ben = await people.new(store=store), await people.new()
    conversation = await ada.client.direct(ben.client.user_id)
    later = people.stack.clock.now() + timedelta(minutes=1)
    handle = ada.gateway.handle_async_request

    async def losing(request: httpx.Request) -> httpx.Response:
        answer = await handle(request)
        if request.url.path == "/api/v1/messages":
            raise KeyboardInterrupt  # the process ends here
        return answer

    ada.gateway.handle_async_request = losing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        await ada.client.schedule_text(conversation, "once", later)
    ada.gateway.handle_async_request = handle  # type: ignore[method-assign]
    await ada.client.stop()
    again = await people.again(store)
    async with asyncio.timeout(10):
        while not again.client.schedule.ids():
            await asyncio.sleep(0.05)
    (known,) = again.client.schedule.ids()
    assert [s.id async for s in again.client.rest.scheduled_messages()] == [known]
    people.stack.clock.advance(61)
    await ben.hears("once")
    await again.hears("once")
    assert ben.seqs() == [1]
    assert again.client.schedule.ids() == []
