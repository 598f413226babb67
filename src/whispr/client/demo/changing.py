"""Changing what was said: edits, reactions, pins, replies, deletions, messages that disappear or come later, and reports."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

from whispr.client.demo.stage import Stage
from whispr.client.encoding import encode_base64
from whispr.client.events import ChatMessage
from whispr.client.failures import ApiError
from whispr.client.outbox import Expires


async def second_thoughts(stage: Stage, group: UUID) -> None:
    stage.step("Second thoughts", "Reactions, a pin, a reply, an edit, and a deletion for everybody.")
    everyone = stage.everyone_in_group()
    ada, cleo = stage.of("Ada's phone").client, stage.of("Cleo's phone").client
    await stage.say("Ada's phone", group, "Dinner is at sevn.", everyone)
    plan = stage.of("Ada's phone").read[-1]
    await cleo.actions.react(plan.id, "👍")
    await stage.of("Dan's phone").client.actions.react(plan.id, "👍")
    await ada.actions.pin(plan.id)
    reply = await cleo.send_text(group, stage.secret("Seven, you mean?"), reply_to_id=plan.id)
    await ada.edit_text(plan.id, stage.secret("Dinner is at eight."))

    def as_it_is() -> list[ChatMessage | None]:
        return [stage.of(label).client.history.find(plan.id) for label in everyone]

    edited = await stage.until(
        lambda: all(m is not None and m.text == "Dinner is at eight." for m in as_it_is())
    )
    both = sorted([cleo.user_id, stage.of("Dan's phone").client.user_id])
    stage.console.print(
        "   Ada writes “Dinner is at sevn.”, Cleo and Dan choose 👍, and Ada makes it “eight”."
    )
    stage.check(
        "the edit is read on every device, and marked as one",
        edited and all(m and m.edited_at for m in as_it_is()),
    )
    reacted = await stage.until(
        lambda: all(m is not None and m.reactions == {"👍": both} for m in as_it_is())
    )
    stage.check("both reactions are seen on every device, and survive the edit", reacted)
    pins = [[pin.message_id for pin in stage.of(label).client.history.pins(group)] for label in everyone]
    stage.check("the message is pinned on every device", pins == [[plan.id]] * len(everyone))
    kept = [stage.of(label).client.history.find(reply.id) for label in everyone]
    stage.check(
        "Cleo's reply says what it is to", all(m is not None and m.reply_to_id == plan.id for m in kept)
    )
    await _refused_edit(stage, plan.id)
    await ada.actions.delete(plan.id)
    gone = await stage.until(lambda: all(m is not None and m.is_deleted for m in as_it_is()))
    stage.console.print("   Then Ada deletes it for everybody.")
    stage.check(
        "nothing of the deleted message is on any device", gone and not any(m and m.text for m in as_it_is())
    )
    unpinned = not any(stage.of(label).client.history.pins(group) for label in everyone)
    stage.check("its pin is gone with it", unpinned)


async def _refused_edit(stage: Stage, message_id: UUID) -> None:
    try:
        await stage.of("Cleo's phone").client.edit_text(message_id, "I never said that")
    except ApiError as error:
        refusal = error.code
    else:
        refusal = "accepted"
    stage.check("nobody edits what another has said", refusal == "not_allowed")


async def disappearing(stage: Stage, direct: UUID) -> None:
    stage.step("What disappears", "Two seconds after it was sent, and two seconds after it was read.")
    readers = ["Ada's phone", "Ada's laptop", "Ben's laptop", "Ben's new phone"]
    ada, ben = stage.of("Ada's phone").client, stage.of("Ben's laptop").client
    texts = [stage.secret("The key is under the flowerpot."), stage.secret("The code is 4711.")]
    soon = await ada.send_text(direct, texts[0], expires=Expires(2))
    read = await ada.send_text(direct, texts[1], expires=Expires(2, "read"))
    arrived = await stage.until(lambda: all(texts[1] in stage.of(label).texts(direct) for label in readers))
    stage.check("both are read at first", arrived)

    def erased(message_id: UUID) -> list[bool]:
        kept = [stage.of(label).client.history.find(message_id) for label in readers]
        return [message is not None and message.is_deleted for message in kept]

    stage.check(
        "the first is gone from every device by itself", await stage.until(lambda: all(erased(soon.id)))
    )
    stage.check("the second waits to be read", not any(erased(read.id)))
    await ben.mark_read(direct, read.seq)
    stage.check("and is gone from every device when it was", await stage.until(lambda: all(erased(read.id))))
    page = await ben.rest.messages(direct, after_seq=soon.seq - 1)
    left = [message.content.envelopes or message.content.ciphertext for message in page.items[:2]]
    stage.check("the server has not even the ciphertexts any more", left == [None, None])


async def scheduled(stage: Stage, group: UUID) -> UUID:
    """Schedules a message for tomorrow; returns its id."""
    stage.step("Said later", "Eve schedules a message, and one more that she thinks better of.")
    eve = stage.of("Eve's phone").client
    at = datetime.fromtimestamp(stage.now() + 86400, UTC)
    text = stage.secret("It is time. Happy birthday, Dan!")
    chosen = await eve.schedule_text(group, stage.secret("It is time."), at)
    await eve.reschedule(chosen, text=text)
    dropped = await eve.schedule_text(group, stage.secret("I am so angry."), at + timedelta(hours=1))
    await eve.schedule.cancel(dropped)
    statuses = {message.id: message.status async for message in eve.rest.scheduled_messages()}
    stage.check("the server keeps one of the two", statuses.get(chosen) == "pending" != statuses.get(dropped))
    stage.check("nothing of it is sent yet", text not in stage.of("Dan's phone").texts(group))
    return chosen


async def scheduled_arrives(stage: Stage, group: UUID, scheduled_id: UUID) -> None:
    stage.step(
        "It is time", "A device has come since. The server asks Eve's phone to encrypt for it too, and sends."
    )
    text = "It is time. Happy birthday, Dan!"
    everyone = stage.everyone_in_group()
    eve = stage.of("Eve's phone").client
    # Tomorrow is too long to wait for.
    await eve.reschedule(scheduled_id, send_at=datetime.fromtimestamp(stage.now() + 1, UTC))
    arrived = await stage.until(lambda: all(text in stage.of(label).texts(group) for label in everyone))
    for label in everyone:
        stage.show(label, [m for m in stage.of(label).read if m.text == text][-1:])
    stage.check(f"what was scheduled is read by {len(everyone)} devices, the new one among them", arrived)
    asked = any(notice.name == "needs_reencrypt" for notice in stage.of("Eve's phone").notices)
    stage.check("the server asked for it to be encrypted anew", asked)
    stage.check("it is read once", all(stage.of(label).texts(group).count(text) == 1 for label in everyone))
    stage.check(
        "and nobody reads what was cancelled",
        not any("angry" in (m.text or "") for g in stage.gadgets.values() for m in g.read),
    )
    try:
        await eve.reschedule(scheduled_id, send_at=datetime.fromtimestamp(stage.now() + 60, UTC))
    except ApiError as error:
        refusal = error.code
    else:
        refusal = "accepted"
    stage.check("it is too late to change it", refusal == "already_sent")


async def report(stage: Stage) -> None:
    stage.step(
        "A report",
        "Eve reveals one message. The server verifies that it is what Mallory wrote, and learns no other.",
    )
    mallory, eve = stage.of("Mallory's phone"), stage.of("Eve's phone")
    conversation = await mallory.client.direct(stage.name("Eve"))
    await stage.say("Mallory's phone", conversation, "Send me money or else.", ["Eve's phone"])
    message = eve.read[-1]
    result = await eve.client.actions.report(message.id, "abuse", reveal=True)
    stage.check("the report is verified", result.is_verified)
    await stage.say("Mallory's phone", conversation, "Have a nice day.", ["Eve's phone"])
    forged = {"plaintext": encode_base64(b'{"kind":"text","text":"Or I will find you."}')}
    forged["franking_key"] = encode_base64(bytes(32))
    try:
        await eve.client.rest.report(eve.read[-1].id, {"reason": "abuse", "reveal": forged})
    except ApiError as error:
        refusal = error.code
    else:
        refusal = "accepted"
    stage.console.print(f"   The server's answer to words that were never said: [bold]{refusal}[/bold].")
    stage.check("words put into somebody's mouth are refused", refusal == "franking_mismatch")
