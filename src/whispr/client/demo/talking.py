"""Talking: between two people with several devices, in a group, over absences, after a loss, and with one who is blocked."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from uuid import UUID

from rich.table import Table

from whispr.client.demo.stage import PATIENCE, Stage
from whispr.client.encoding import decode_base64
from whispr.client.failures import ApiError
from whispr.client.models import Message


async def people(stage: Stage) -> None:
    stage.step("Five people and a stranger", "Ada and Ben have a phone and a laptop each.")
    for owner in ("Ada", "Ben", "Cleo", "Dan", "Eve", "Mallory"):
        await stage.add(owner, "phone", new_person=True)
    for owner in ("Ada", "Ben"):
        await stage.add(owner, "laptop")
    table = Table("device", "fingerprint of its keys", box=None, header_style="dim")
    for gadget in stage.gadgets.values():
        table.add_row(gadget.label, gadget.client.fingerprint[:29] + " …")
    stage.console.print(table)
    stage.check("every device has keys of its own", stage.all_different())


async def direct(stage: Stage) -> UUID:
    stage.step(
        "Ada writes to Ben",
        "PQXDH opens a session with each device, the Double Ratchet carries the messages.",
    )
    conversation = await stage.of("Ada's phone").client.direct(stage.name("Ben"))
    everyone = ["Ada's phone", "Ada's laptop", "Ben's phone", "Ben's laptop"]
    await stage.say("Ada's phone", conversation, "Ben, are you free on Friday? 🌻", everyone)
    await stage.say("Ben's laptop", conversation, "Yes! The usual place?", everyone)
    await stage.say("Ada's laptop", conversation, "The usual place, at eight.", everyone)
    clients = [stage.of(label).client for label in everyone]
    quantum = [
        one.engine.sessions.post_quantum(other.device_id)
        for one, other in itertools.permutations(clients, 2)
        if one.engine.sessions.ready(other.device_id)
    ]
    stage.console.print(
        f"   {sum(quantum)} of {len(quantum)} sessions began with ML-KEM-768 beside X25519.", style="dim"
    )
    stage.check("every session between them is post-quantum", len(quantum) >= 8 and all(quantum))
    return conversation


async def group(stage: Stage) -> UUID:
    stage.step(
        "A group of five",
        "Each device has a sender key, sent ahead to the others; then one ciphertext serves all.",
    )
    others = [stage.name(owner) for owner in ("Ben", "Cleo", "Dan", "Eve")]
    group = await stage.of("Ada's phone").client.group(others, {"title": "Friday"})
    everyone = [label for label in stage.gadgets if "Mallory" not in label]
    await stage.say("Ada's phone", group, "Dinner on Friday at eight, who is in?", everyone)
    await stage.say("Cleo's phone", group, "Me, of course!", everyone)
    await stage.say("Ada's phone", group, "Bring an umbrella.", everyone)
    kinds = await stage.envelope_types("Ben's phone", group)
    stage.console.print(f"   Ben's phone was sent envelopes of the types: {', '.join(kinds)}.", style="dim")
    stage.check("the group's texts use sender keys", kinds[-1] == "sender_key")
    return group


async def absence(stage: Stage, group: UUID) -> None:
    stage.step("Cleo is in a tunnel", "What is sent meanwhile waits on both sides.")
    cleo = stage.of("Cleo's phone")
    await cleo.client.offline()
    texts = [f"Course {number} is decided." for number in (1, 2, 3)]
    for text in texts:
        await stage.say("Dan's phone", group, text, ["Ada's phone", "Dan's phone", "Eve's phone"], show=False)
    waiting = cleo.client.queue_text(group, stage.secret("I am in a tunnel."))
    before = len(cleo.texts(group))
    stage.console.print(f"   3 messages are sent; Cleo's phone has seen {before}, and has one to send.")
    cleo.client.online()
    sent = await asyncio.wait_for(waiting, PATIENCE)
    await stage.until(lambda: "I am in a tunnel." in cleo.texts(group))
    stage.show("Cleo's phone", [m for m in cleo.read if m.conversation_id == group][-4:])
    stage.check("after the tunnel Cleo has everything, in order", cleo.texts(group)[-4:-1] == texts)
    stage.check("what Cleo wrote in the tunnel was sent once", sent.seq == cleo.events[group][-1])


async def lost_phone(stage: Stage, direct: UUID, group: UUID) -> None:
    stage.step("Ben loses his phone", "He removes it, and installs Whispr on a new one, with new keys.")
    lost = stage.gadgets.pop("Ben's phone")
    lost_id = lost.client.device_id
    await lost.client.stop()
    lost.client.store.close()
    await stage.of("Ben's laptop").client.rest.remove_device(lost_id)
    new = await stage.add("Ben", "new phone")
    await stage.until(lambda: {direct, group} <= set(new.client.conversations.ids()))
    await stage.say(
        "Ada's phone", direct, "New phone, Ben?", ["Ada's laptop", "Ben's laptop", "Ben's new phone"]
    )
    await stage.say("Ada's phone", group, "Ben has a new phone.", stage.everyone_in_group())
    unreadable = [m for m in new.read if m.error is not None]
    stage.console.print(
        f"   The new phone reads none of the {len(unreadable)} messages from before: they were not made for it.",
        style="dim",
    )
    stage.check(
        "a new device reads nothing from before it existed",
        bool(unreadable) and {m.error for m in unreadable} == {"no_envelope"},
    )
    await stage.say("Ben's new phone", group, "Back again.", stage.everyone_in_group())
    stage.check(
        "the lost phone holds no key of the group any more",
        lost_id not in stage.of("Ada's phone").client.engine.sender_keys.holders(group),
    )


async def blocked(stage: Stage) -> None:
    stage.step("Mallory is blocked", "Dan blocks Mallory, who tries to write to him all the same.")
    dan, mallory = stage.of("Dan's phone"), stage.of("Mallory's phone")
    conversation = await mallory.client.direct(stage.name("Dan"))
    await stage.say("Mallory's phone", conversation, "Hello, Dan.", ["Dan's phone"])
    await dan.client.rest.block(mallory.client.user_id)
    seen = len(dan.read)
    try:
        await asyncio.wait_for(mallory.client.send_text(conversation, "Why no answer?"), PATIENCE)
    except ApiError as error:
        refusal = error.code
    else:
        refusal = "accepted"
    stage.console.print(f"   The server's answer to Mallory: [bold]{refusal}[/bold].")
    stage.check("a blocked sender is refused", refusal == "blocked")
    await stage.say("Dan's phone", await dan.client.direct(stage.name("Ada")), "Peace.", ["Ada's phone"])
    mallory_id = mallory.client.user_id
    stage.check(
        "nothing of the blocked sender arrives", all(m.sender_id != mallory_id for m in dan.read[seen:])
    )


async def server_view(stage: Stage, conversations: list[UUID]) -> None:
    stage.step(
        "What the server saw",
        "The same messages as the server has them: each device asks for what is stored for it.",
    )
    for conversation_id in conversations:
        stored = await stored_by(stage, conversation_id)
        table = Table("seq", "from", "envelopes", "bytes", "begins", box=None, header_style="dim")
        for seq, (message, bodies) in list(stored.items())[:5]:
            kinds = Counter(kind for kind, _ in bodies)
            shown = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            first = bodies[0][1] if bodies else b""
            size = sum(len(body) for _, body in bodies)
            table.add_row(str(seq), stage.owner(message.sender_id), shown, str(size), f"{first[:14].hex()}…")
        stage.console.print(table)
        everything = b"\0".join(body for _, bodies in stored.values() for _, body in bodies)
        stage.check(
            "the server has something of every message but the deleted ones",
            all(bool(bodies) != message.is_deleted for message, bodies in stored.values()),
        )
        stage.check(
            "no text of anybody is in what the server has",
            bool(everything) and not any(secret.encode() in everything for secret in stage.secrets),
        )


async def stored_by(
    stage: Stage, conversation_id: UUID
) -> dict[int, tuple[Message, list[tuple[str, bytes]]]]:
    """By seq, each message with the type and bytes of all its envelopes, as far as today's devices are given them."""
    stored: dict[int, tuple[Message, list[tuple[str, bytes]]]] = {}
    for gadget in stage.gadgets.values():
        if conversation_id not in gadget.client.conversations.ids():
            continue
        page = await gadget.client.rest.messages(conversation_id, after_seq=0, limit=100)
        for message in page.items:
            _, bodies = stored.setdefault(message.seq, (message, []))
            bodies += _bodies(message)
    return dict(sorted(stored.items()))


def at_rest(stage: Stage) -> None:
    stored = b"".join(gadget.path.read_bytes() for gadget in stage.gadgets.values())
    stage.check(
        "no text of anybody is in the devices' files",
        not any(secret.encode() in stored for secret in stage.secrets),
    )


def _bodies(message: Message) -> list[tuple[str, bytes]]:
    """What of a message the server gives to the asking device: types and ciphertexts."""
    bodies = [(e.type, decode_base64(e.body)) for e in (message.content.envelopes or {}).values()]
    if message.content.ciphertext is not None:
        bodies.append(("shared", decode_base64(message.content.ciphertext)))
    return bodies
