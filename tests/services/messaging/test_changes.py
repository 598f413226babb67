"""Edits and deletions: who may, what everybody gets of them, and that repeating one is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

import pytest
from tests.services.messaging.door import Door, assert_problem, signature_of
from tests.services.messaging.line import Line
from tests.services.messaging.test_channels import conversation, message, new_door
from tests.stack import Node, Person, Stack, b64

from whispr.kit.db import Database

Open = Callable[..., Awaitable[Line]]

TOMBSTONE = {
    "content": {},
    "content_sha256": "",
    "signature": "",
    "media_ids": [],
    "reactions": [],
    "is_deleted": True,
}


@pytest.fixture
async def connect(stack: Stack) -> AsyncIterator[Open]:
    lines: list[Line] = []

    async def open_line(person: Person, node: Node | None = None, **params: Any) -> Line:
        line = await Line.open(node or stack.messaging, person, **params)
        lines.append(line)
        return line

    yield open_line
    for line in lines:
        await line.close()


@pytest.fixture
async def messaging_tables(stack: Stack, database: Callable[[str], str]) -> AsyncIterator[Database]:
    """The tables of the stack's messaging."""
    db = Database(database("messaging"), pool_size=1)
    await db.open()
    yield db
    await db.close()


def edit_of(door: Door, sent: dict[str, Any], content: dict[str, Any] | str = "edited") -> dict[str, Any]:
    """The body of an edit, signed by the door's device."""
    if isinstance(content, str):
        content = {"ciphertext": b64(content.encode())}
    return {
        "content": content,
        "signature": signature_of(door.person, sent["conversation_id"], sent["client_id"], content),
    }


async def edit(door: Door, sent: dict[str, Any], content: dict[str, Any] | str = "edited") -> dict[str, Any]:
    answer = await door.patch(f"/messages/{sent['id']}", edit_of(door, sent, content))
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def test_an_edit_reaches_everybody(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    topic = conversation(topic_id)
    sent = await anna.send(topic_id)
    far = await stack.another_node()
    at_ben, from_far = await connect(ben.person), await connect(ben.person, far)
    joined = await at_ben.join(topic)
    await from_far.join(topic)
    edited = await edit(anna, sent)
    assert edited["content"] == {"ciphertext": b64(b"edited")}
    assert edited["edited_at"] is not None
    same = ("id", "seq", "client_id", "sent_at", "sender_device_id", "is_deleted", "reactions")
    assert {name: edited[name] for name in same} == {name: sent[name] for name in same}
    assert edited["signature"] != sent["signature"]
    assert edited["content_sha256"] != sent["content_sha256"]
    assert "edited_device_id" not in edited
    for line in (at_ben, from_far):
        assert await line.next(topic, "message_edited") == {"seq": 2, "message": edited}
    entry = {"seq": 2, "event": "message_edited", "payload": {"seq": 2, "message": edited}}
    log = await anna.log(topic_id)
    for door in (anna, ben):
        assert await door.ok(f"/messages/{sent['id']}") == edited
        assert (await door.ok(f"/conversations/{topic_id}/messages"))["items"] == [edited]
        assert (await door.ok(f"/conversations/{topic_id}"))["last_message"] == edited
        assert (
            await door.log(topic_id) == log == [{"seq": 1, "event": "new_message", "payload": edited}, entry]
        )
    back = await connect(ben.person)
    recovered = await back.join(topic, {"cursor": {"epoch": joined["epoch"], "seq": 1}})
    assert recovered["events"] == [entry]
    assert (await back.push(topic, "sync", {"after_seq": 1}))["events"] == [entry]
    own = await connect(ben.person)
    await own.join(f"user:{ben.id}")
    undelivered = await own.next(f"user:{ben.id}", "undelivered")
    assert undelivered["events"] == log


async def test_an_edit_from_another_device_of_the_author(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    too = Door(stack, await stack.add_device(anna.person))
    topic_id = await anna.direct(ben)
    topic = conversation(topic_id)
    sent = await anna.send(topic_id)
    line = await connect(too.person)
    await line.join(topic)
    reply = await line.push(topic, "edit_message", {"message_id": sent["id"], **edit_of(too, sent)})
    edited = await ben.ok(f"/messages/{sent['id']}")
    assert reply == {"seq": 2, "edited_at": edited["edited_at"]}
    assert (edited["sender_device_id"], edited["edited_device_id"]) == (
        str(anna.person.device_id),
        str(too.person.device_id),
    )
    assert "edited_device_id" not in await edit(anna, sent, "again by the first")


async def test_the_same_edit_again_is_no_event(stack: Stack) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    sent = await anna.send(topic_id)
    first = await edit(anna, sent)
    await stack.add_device(ben.person)
    assert await edit(anna, sent) == first, "whatever has changed since: it was stored"
    assert [event["event"] for event in await ben.log(topic_id)] == ["new_message", "message_edited"]


async def test_a_draft_sent_again_after_an_edit_is_still_known(stack: Stack) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    draft = anna.draft(topic_id)
    sent = (await anna.post("/messages", draft)).json()
    edited = await edit(anna, sent)
    again = await anna.post("/messages", draft)
    assert (again.status_code, again.json()) == (200, edited)
    await anna.delete(f"/messages/{sent['id']}")
    again = await anna.post("/messages", draft)
    assert (again.status_code, again.json()["is_deleted"]) == (200, True)
    assert (await anna.ok(f"/conversations/{topic_id}"))["head_seq"] == 3


async def test_an_edit_carries_each_device_its_own_envelope(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    ben_too = await stack.add_device(ben.person)
    topic_id = await anna.direct(ben)
    topic = conversation(topic_id)
    sent = await anna.send(topic_id)
    lines = {person.device_id: await connect(person) for person in (ben.person, ben_too)}
    for line in lines.values():
        await line.join(topic)
    bodies = {str(device): {"type": "message", "body": b64(device.bytes)} for device in lines}
    await edit(anna, sent, {"envelopes": bodies})
    for device, line in lines.items():
        own = {"envelopes": {str(device): bodies[str(device)]}}
        assert (await line.next(topic, "message_edited"))["message"]["content"] == own
    (_, entry) = await ben.log(topic_id)
    assert list(entry["payload"]["message"]["content"]["envelopes"]) == [str(ben.person.device_id)]
    bodies.pop(str(ben_too.device_id))
    refusal = await anna.patch(f"/messages/{sent['id']}", edit_of(anna, sent, {"envelopes": bodies}))
    assert assert_problem(refusal, 409, "devices_mismatch")["missing"] == [str(ben_too.device_id)]


async def test_what_an_edit_is_refused_for(stack: Stack, connect: Open) -> None:
    anna, ben, stranger = [await new_door(stack) for _ in range(3)]
    too = Door(stack, await stack.add_device(anna.person))
    topic_id = await anna.group(ben)
    sent = await anna.send(topic_id)
    path = f"/messages/{sent['id']}"

    async def refused(door: Door, body: Any, status: int, code: str) -> None:
        assert_problem(await door.patch(path, body), status, code)

    await refused(ben, edit_of(ben, sent), 403, "not_allowed")
    await refused(stranger, edit_of(stranger, sent), 404, "message_not_found")
    await refused(too, edit_of(anna, sent), 422, "bad_signature")
    other_id = {**sent, "client_id": str(uuid4())}
    await refused(anna, edit_of(anna, other_id), 422, "bad_signature")
    await refused(anna, edit_of(anna, sent, {"ciphertext": "no base64"}), 422, "invalid_content")
    await refused(anna, edit_of(anna, sent, {"ciphertext": b64(bytes(80_000))}), 413, "too_large")
    await refused(anna, {**edit_of(anna, sent), "signature": "short"}, 422, "bad_signature")
    unknown = await anna.patch(f"/messages/{uuid4()}", edit_of(anna, sent))
    assert_problem(unknown, 404, "message_not_found")
    line = await connect(anna.person)
    elsewhere = conversation(await anna.group(ben))
    await line.join(elsewhere)
    refusal = await line.refused(elsewhere, "edit_message", {"message_id": sent["id"], **edit_of(anna, sent)})
    assert refusal["reason"] == "message_not_found", "a channel changes nothing of another conversation"
    assert (await ben.ok(path)) == sent
    await anna.patch(f"/conversations/{topic_id}", {"permissions": {"send": "owner"}})
    owned = await anna.send(topic_id)
    await anna.patch(f"/conversations/{topic_id}/members/{ben.id}", {"role": "owner"})
    assert_problem(await anna.patch(f"/messages/{owned['id']}", edit_of(anna, owned)), 403, "not_allowed")


async def test_whoever_left_changes_nothing(stack: Stack) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.group(ben)
    sent = await ben.send(topic_id)
    await ben.delete(f"/conversations/{topic_id}/members/{ben.id}")
    path = f"/messages/{sent['id']}"
    assert_problem(await ben.patch(path, edit_of(ben, sent)), 404, "message_not_found")
    assert_problem(await ben.delete(path), 404, "message_not_found")
    assert_problem(await ben.get(path), 404, "message_not_found")
    assert (await anna.ok(path)) == sent


async def test_what_is_ones_own_is_taken_back_from_before_one_came_back(stack: Stack) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.group(ben)
    sent, of_anna = await ben.send(topic_id), await anna.send(topic_id)
    await ben.delete(f"/conversations/{topic_id}/members/{ben.id}")
    await anna.post(f"/conversations/{topic_id}/members", {"member_ids": [ben.id], "role": "admin"})
    path = f"/messages/{sent['id']}"
    assert_problem(await ben.get(path), 404, "message_not_found")
    assert_problem(await ben.patch(path, edit_of(ben, sent)), 404, "message_not_found")
    assert_problem(await ben.delete(f"/messages/{of_anna['id']}"), 404, "message_not_found")
    assert (await ben.delete(path)).status_code == 204
    assert (await anna.ok(path))["is_deleted"] is True


async def test_blocked_people_cannot_edit_but_can_take_back(stack: Stack) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    sent = await anna.send(topic_id)
    await block(stack, ben, anna)
    path = f"/messages/{sent['id']}"
    assert_problem(await anna.patch(path, edit_of(anna, sent)), 403, "blocked")
    assert (await anna.delete(path)).status_code == 204
    assert (await ben.ok(path))["is_deleted"] is True


async def block(stack: Stack, who: Door, whom: Door) -> None:
    answer = await stack.http.put(
        f"{stack.user.url}/api/v1/users/me/blocks/{whom.id}", headers=who.person.headers
    )
    assert answer.status_code in (200, 201, 204), answer.text

    async def is_blocked() -> bool:
        topic_id = await who.direct(whom)
        return (await whom.post("/messages", whom.draft(topic_id))).status_code == 403

    async with asyncio.timeout(5):
        while not await is_blocked():
            await asyncio.sleep(0.02)


async def test_a_closed_conversation_takes_deletions_only(stack: Stack) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.group(ben)
    sent = await ben.send(topic_id)
    await anna.delete(f"/conversations/{topic_id}")
    path = f"/messages/{sent['id']}"
    assert_problem(await ben.patch(path, edit_of(ben, sent)), 409, "conversation_closed")
    assert (await ben.delete(path)).status_code == 204


async def test_a_deleted_message_is_a_tombstone_everywhere(
    stack: Stack, connect: Open, messaging_tables: Database
) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.group(ben)
    topic = conversation(topic_id)
    draft = anna.draft(topic_id, "gone", media_ids=[str(uuid4())])
    sent = (await anna.post("/messages", draft)).json()
    path = f"/messages/{sent['id']}"
    await edit(anna, sent)
    await ben.call("PUT", f"{path}/reactions/👍")
    await anna.call("PUT", f"/conversations/{topic_id}/pins/{sent['id']}")
    far = await stack.another_node()
    at_ben, from_far = await connect(ben.person), await connect(ben.person, far)
    await at_ben.join(topic)
    await from_far.join(topic)
    assert (await anna.delete(path)).status_code == 204
    told = {"seq": 5, "message_id": sent["id"], "deleted_by": anna.id}
    for line in (at_ben, from_far):
        assert await line.next(topic, "message_deleted") == told
    assert (await anna.delete(path)).status_code == 204, "again"
    left = await ben.ok(path)
    assert {name: left[name] for name in TOMBSTONE} == TOMBSTONE
    assert (left["id"], left["seq"], left["sender_id"]) == (sent["id"], 1, anna.id)
    log = await ben.log(topic_id)
    assert [event["event"] for event in log] == [
        "new_message",
        "message_edited",
        "reaction_added",
        "message_pinned",
        "message_deleted",
    ]
    assert log[0]["payload"] == left
    assert log[1]["payload"] == {"seq": 2, "message": left}
    assert log[4]["payload"] == told
    assert (await ben.ok(f"/conversations/{topic_id}/pins"))["items"] == []
    assert (await ben.ok(f"{path}/reactions"))["items"] == []
    async with messaging_tables.connection() as connection:
        rows: Any = await connection.fetchrow(
            "SELECT content, media_ids, metadata FROM messages WHERE id = $1", sent["id"]
        )
        media = await connection.fetchval(
            "SELECT count(*) FROM message_media WHERE message_id = $1", sent["id"]
        )
        unlinked = await connection.fetchval(
            "SELECT payload FROM outbox WHERE topic = 'media_unlinked' AND key = $1", sent["id"]
        )
    assert (tuple(rows), media) == ((b"{}", None, None), 0)
    assert unlinked["links"][0]["media_ids"] == draft["media_ids"]
    assert_problem(await anna.patch(path, edit_of(anna, sent)), 409, "message_deleted")


async def test_who_deletes_for_all(stack: Stack) -> None:
    owner, admin, second, member, other = [await new_door(stack) for _ in range(5)]
    topic_id = await owner.group(admin, second, member, other)
    for door in (admin, second):
        await owner.patch(f"/conversations/{topic_id}/members/{door.id}", {"role": "admin"})
    of_owner, of_admin, of_member = [await door.send(topic_id) for door in (owner, admin, member)]

    async def refused(door: Door, sent: dict[str, Any], status: int = 403, code: str = "not_allowed") -> None:
        assert_problem(await door.delete(f"/messages/{sent['id']}"), status, code)

    await refused(other, of_member)
    await refused(second, of_admin)
    await refused(admin, of_owner)
    await refused(await new_door(stack), of_member, 404, "message_not_found")
    for door, sent in ((admin, of_member), (owner, of_admin)):
        assert (await door.delete(f"/messages/{sent['id']}")).status_code == 204
        assert (await other.ok(f"/messages/{sent['id']}"))["is_deleted"] is True
    left = await second.send(topic_id)
    await second.delete(f"/conversations/{topic_id}/members/{second.id}")
    await refused(member, left)
    assert (await admin.delete(f"/messages/{left['id']}")).status_code == 204


async def test_in_direct_conversations_only_ones_own(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    sent = await anna.send(topic_id)
    assert_problem(await ben.delete(f"/messages/{sent['id']}"), 403, "not_allowed")
    line = await connect(anna.person)
    await line.join(conversation(topic_id))
    pushed = {"message_id": sent["id"]}
    assert await line.push(conversation(topic_id), "delete_message", pushed) == {"seq": 2}
    assert await line.push(conversation(topic_id), "delete_message", pushed) == {"seq": None}


async def test_a_newcomer_sees_nothing_of_an_old_message_that_is_edited(stack: Stack, connect: Open) -> None:
    anna, ben, late = [await new_door(stack) for _ in range(3)]
    topic_id = await anna.group(ben)
    topic = conversation(topic_id)
    sent = await anna.send(topic_id, "before")
    await anna.post(f"/conversations/{topic_id}/members", {"member_ids": [late.id]})
    line = await connect(late.person)
    await line.join(topic)
    edited = await edit(anna, sent)
    hidden = {"seq": 3, "message_id": sent["id"], "deleted_by": None}
    assert await line.next(topic, "message_deleted") == hidden
    assert not line.has(topic, "message_edited")
    log = await late.log(topic_id)
    assert (log[-1]["event"], log[-1]["payload"]) == ("message_deleted", hidden)
    assert (await line.push(topic, "sync", {"after_seq": 0}))["events"] == log
    back = await connect(late.person)
    assert (await back.join(topic))["events"] == log
    own = await connect(late.person)
    await own.join(f"user:{late.id}")
    assert (await own.next(f"user:{late.id}", "undelivered"))["events"] == log
    assert (await ben.log(topic_id))[-1]["payload"] == {"seq": 3, "message": edited}
    for path in (f"/messages/{sent['id']}", f"/messages/{sent['id']}/reactions"):
        assert_problem(await late.get(path), 404, "message_not_found")
    own_path = f"/messages/{sent['id']}"
    assert_problem(await late.delete(own_path), 404, "message_not_found")


async def test_expired_messages_cannot_be_edited(stack: Stack) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    sent = (await anna.post("/messages", anna.draft(topic_id, expires_in=60))).json()
    stack.clock.advance(61)
    answer = await anna.patch(f"/messages/{sent['id']}", edit_of(anna, sent))
    assert answer.json()["code"] in ("message_not_found", "message_deleted")


async def test_edits_and_deletions_on_two_nodes_at_once(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.group(ben)
    far = await stack.another_node()
    doors = [anna, Door(stack, anna.person, far.url)]
    sent = await anna.send(topic_id)
    edits = [edit_of(anna, sent, f"edit {number}") for number in range(8)]
    answers = await asyncio.gather(
        *(doors[at % 2].patch(f"/messages/{sent['id']}", body) for at, body in enumerate(edits))
    )
    assert {answer.status_code for answer in answers} == {200}
    log = await ben.log(topic_id)
    assert [event["seq"] for event in log] == list(range(1, 10))
    final = await ben.ok(f"/messages/{sent['id']}")
    assert final["content"] in [body["content"] for body in edits]
    racing = await asyncio.gather(
        *(door.delete(f"/messages/{sent['id']}") for door in doors * 2),
        *(door.patch(f"/messages/{sent['id']}", edit_of(anna, sent, "late")) for door in doors),
    )
    assert {answer.status_code for answer in racing} <= {200, 204, 409}
    assert (await ben.ok(f"/messages/{sent['id']}"))["is_deleted"] is True
    names = [event["event"] for event in await ben.log(topic_id)]
    assert names.count("message_deleted") == 1
    assert names[-1] == "message_deleted"


NONSENSE: list[Any] = [
    {},
    [],
    {"message_id": 1},
    {"message_id": "x"},
    {"message_id": None, "reaction": "👍"},
    {"message_id": str(uuid4()), "content": None, "signature": ""},
    {"message_id": str(uuid4()), "content": {"ciphertext": 5}, "signature": "QQ=="},
    {"message_id": str(uuid4()), "reaction": 7},
    {"message_id": str(uuid4()), "reaction": ["👍"]},
]


@pytest.mark.parametrize(
    "event",
    ["edit_message", "delete_message", "add_reaction", "remove_reaction", "pin_message", "unpin_message"],
)
async def test_nonsense_is_answered(stack: Stack, connect: Open, event: str) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    topic = conversation(topic_id)
    line = await connect(anna.person)
    await line.join(topic)
    for payload in NONSENSE:
        reason = (await line.refused(topic, event, payload))["reason"]
        assert reason in ("invalid_payload", "message_not_found", "invalid_content", "bad_signature"), reason
    await line.push(topic, "new_message", message(anna, topic_id))
