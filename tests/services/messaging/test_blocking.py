"""People of whom one has blocked the other hear nothing of each other, through any door, whoever did it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from tests.services.messaging.door import Door, assert_problem, signature_of
from tests.services.messaging.line import Line
from tests.services.messaging.test_members import people
from tests.stack import Person, Stack, b64

Open = Callable[[Person], Awaitable[Line]]


@pytest.fixture
async def connect(stack: Stack) -> AsyncIterator[Open]:
    lines: list[Line] = []

    async def open_line(person: Person) -> Line:
        line = await Line.open(stack.messaging, person)
        lines.append(line)
        return line

    yield open_line
    for line in lines:
        await line.close()


async def block(stack: Stack, who: Door, whom: Door, conversation_id: str) -> None:
    """`who` blocks `whom`; messaging knows it when this returns."""
    answer = await stack.http.put(
        f"{stack.user.url}/api/v1/users/me/blocks/{whom.id}", headers=who.person.headers
    )
    assert answer.status_code == 204
    async with asyncio.timeout(5):
        while (await whom.post("/messages", whom.draft(conversation_id))).status_code != 403:
            await asyncio.sleep(0.02)


async def pair(stack: Stack) -> tuple[Door, Door, str]:
    ann, bob = await people(stack, 2)
    return ann, bob, await ann.direct(bob)


async def test_neither_of_them_does_anything_to_the_other(stack: Stack) -> None:
    ann, bob, direct = await pair(stack)
    messages = {ann.id: await ann.send(direct), bob.id: await bob.send(direct)}
    await block(stack, bob, ann, direct)
    log = await bob.log(direct)
    group = await ann.group()
    for door, other in ((ann, bob), (bob, ann)):
        own, theirs = messages[door.id], messages[other.id]
        content = {"ciphertext": b64(b"edited")}
        signature = signature_of(door.person, direct, own["client_id"], content)
        requests: list[tuple[str, str, Any]] = [
            ("POST", "/messages", door.draft(direct)),
            ("POST", "/messages", door.draft(direct, send_at="2100-01-01T00:00:00Z")),
            ("PATCH", f"/messages/{own['id']}", {"content": content, "signature": signature}),
            ("PUT", f"/messages/{theirs['id']}/reactions/x", None),
            ("PUT", f"/conversations/{direct}/pins/{theirs['id']}", None),
            ("PATCH", f"/conversations/{direct}", {"metadata": {"name": "look at me"}}),
            ("PATCH", f"/conversations/{direct}", {"retention_seconds": 3600}),
            ("POST", "/conversations", {"type": "group", "member_ids": [other.id]}),
        ]
        if door is ann:
            requests.append(("POST", f"/conversations/{group}/members", {"member_ids": [bob.id]}))
        for method, path, body in requests:
            answer = await door.call(method, path, json=body)
            if "send_at" in (body or {}) and answer.status_code == 422:
                continue
            assert_problem(answer, 403, "blocked")
    assert await bob.log(direct) == log
    # What is one's own one may still keep in order, and read.
    assert (await ann.patch(f"/conversations/{direct}", {"settings": {"x": 1}})).status_code == 200
    assert (await ann.get(f"/conversations/{direct}/messages")).status_code == 200
    assert (await ann.delete(f"/messages/{messages[ann.id]['id']}")).status_code == 204


async def test_a_conversation_with_a_blocked_person_is_not_begun(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    answer = await stack.http.put(
        f"{stack.user.url}/api/v1/users/me/blocks/{ann.id}", headers=bob.person.headers
    )
    assert answer.status_code == 204
    for door, other in ((ann, bob), (bob, ann)):
        body = {"type": "direct", "member_ids": [other.id]}
        assert_problem(await door.post("/conversations", body), 403, "blocked")


async def test_reading_and_getting_are_not_shown(stack: Stack, connect: Open) -> None:
    ann, bob, direct = await pair(stack)
    message = await ann.send(direct)
    await bob.post(f"/conversations/{direct}/read", {"seq": 1})
    view = await ann.ok(f"/conversations/{direct}")
    assert [m["read_seq"] for m in view["members"] if m["user_id"] == bob.id] == [1]
    await block(stack, bob, ann, direct)
    for door, other in ((ann, bob), (bob, ann)):
        line = await connect(door.person)
        views = [
            await door.ok(f"/conversations/{direct}"),
            *[item for item in (await door.ok("/conversations"))["items"] if item["id"] == direct],
            await line.join(f"conversation:{direct}"),
        ]
        assert len(views) == 3
        for shown in views:
            (member,) = [member for member in shown["members"] if member["user_id"] == other.id]
            assert (member["delivered_seq"], member["read_seq"]) == (0, None)
            (own,) = [member for member in shown["members"] if member["user_id"] == door.id]
            assert own["read_seq"] is not None
    (status,) = (await ann.ok(f"/messages/{message['id']}/status"))["items"]
    assert status == {"user_id": bob.id, "delivered_at": None, "read_at": None}


async def test_typing_presence_and_receipts_are_not_told(stack: Stack, connect: Open) -> None:
    ann, bob, direct = await pair(stack)
    cid = (await people(stack, 1))[0]
    group = await cid.group(ann, bob)
    await ann.send(direct)
    await cid.send(group)
    await block(stack, bob, ann, direct)
    at = {door.id: await connect(door.person) for door in (ann, bob, cid)}
    topics = [f"conversation:{direct}", f"conversation:{group}"]
    for door in (ann, bob):
        for topic in topics:
            await at[door.id].join(topic)
    await at[cid.id].join(topics[1])
    for door in (ann, bob):
        for topic in topics:
            await at[door.id].push(topic, "typing", {"state": "start"})
            await at[door.id].push(topic, "mark_as_read", {"seq": 1})
        # A third person in the group hears of both: then what goes to the others has gone, too.
        for event in ("typing", "receipt"):
            await at[cid.id].find(topics[1], lambda name, p: (name, p.get("user_id")) == (event, door.id))  # noqa: B023
    await asyncio.sleep(0.7)
    for door, other in ((ann, bob), (bob, ann)):
        line = at[door.id]
        await line.settled()
        for topic in topics:
            for name, payload in line.inbox[topic]:
                told = name in ("typing", "receipt") and payload["user_id"] == other.id
                shown = name in ("presence_state", "presence_diff", "last_seen") and other.id in str(payload)
                assert not told, (name, payload)
                assert not shown, (name, payload)


async def test_in_a_group_they_share_both_are_heard(stack: Stack) -> None:
    ann, bob, direct = await pair(stack)
    cid = (await people(stack, 1))[0]
    group = await cid.group(ann, bob)
    await block(stack, bob, ann, direct)
    # A message of a group is for the group: leaving it, or hiding what one does not want to see, is the reader's choice.
    message = await ann.send(group)
    assert message["id"] in [
        item["id"] for item in (await bob.ok(f"/conversations/{group}/messages"))["items"]
    ]
    view = await ann.ok(f"/conversations/{group}")
    (member,) = [member for member in view["members"] if member["user_id"] == bob.id]
    assert (member["delivered_seq"], member["read_seq"]) == (0, None)


async def test_after_unblocking_everything_is_as_before(stack: Stack) -> None:
    ann, bob, direct = await pair(stack)
    await ann.send(direct)
    await bob.post(f"/conversations/{direct}/read", {"seq": 1})
    await block(stack, bob, ann, direct)
    answer = await stack.http.delete(
        f"{stack.user.url}/api/v1/users/me/blocks/{ann.id}", headers=bob.person.headers
    )
    assert answer.status_code == 204
    async with asyncio.timeout(5):
        while (await ann.post("/messages", ann.draft(direct))).status_code != 201:
            await asyncio.sleep(0.02)
    (member,) = [
        member
        for member in (await ann.ok(f"/conversations/{direct}"))["members"]
        if member["user_id"] == bob.id
    ]
    assert member["read_seq"] == 1
