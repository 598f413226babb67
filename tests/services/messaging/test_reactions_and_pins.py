"""Reactions and pins: who may, how many, what everybody hears of them, and that repeating one is none."""

from __future__ import annotations

import asyncio
import base64
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest
from tests.services.messaging.door import Door, assert_problem
from tests.services.messaging.test_changes import Open, block, connect, messaging_tables
from tests.services.messaging.test_channels import conversation, new_door
from tests.stack import Stack

from whispr.kit.db import Database

__all__ = ["connect", "messaging_tables"]


async def react(door: Door, sent: dict[str, Any], reaction: str, method: str = "PUT") -> Any:
    return await door.call(method, f"/messages/{sent['id']}/reactions/{quote(reaction, safe='')}")


async def pin(door: Door, sent: dict[str, Any], method: str = "PUT") -> Any:
    return await door.call(method, f"/conversations/{sent['conversation_id']}/pins/{sent['id']}")


async def test_reactions_are_told_and_read_in_order_of_first_use(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.group(ben)
    topic = conversation(topic_id)
    sent = await anna.send(topic_id)
    far = await stack.another_node()
    at_anna, from_far = await connect(anna.person), await connect(ben.person, far)
    await at_anna.join(topic)
    await from_far.join(topic)
    added = {"message_id": sent["id"], "reaction": "👍"}
    assert await from_far.push(topic, "add_reaction", added) == {"seq": 2}
    assert await from_far.push(topic, "add_reaction", added) == {"seq": None}
    told = {"seq": 2, "message_id": sent["id"], "user_id": ben.id, "reaction": "👍"}
    for line in (at_anna, from_far):
        assert await line.next(topic, "reaction_added") == told
    assert (await react(anna, sent, "❤️")).status_code == 204
    assert (await react(anna, sent, "👍")).status_code == 204
    expected = [
        {"reaction": "👍", "user_ids": [ben.id, anna.id]},
        {"reaction": "❤️", "user_ids": [anna.id]},
    ]
    assert await anna.ok(f"/messages/{sent['id']}/reactions") == {"items": expected, "next_cursor": None}
    shown = [
        (await ben.ok(f"/messages/{sent['id']}")),
        (await ben.ok(f"/conversations/{topic_id}/messages"))["items"][0],
        (await ben.ok(f"/conversations/{topic_id}/messages", after_seq=0))["items"][0],
        (await ben.ok(f"/conversations/{topic_id}"))["last_message"],
        (await ben.ok("/conversations"))["items"][0]["last_message"],
        (await ben.log(topic_id))[0]["payload"],
    ]
    assert [message["reactions"] for message in shown] == [expected] * 6
    assert await from_far.push(topic, "remove_reaction", added) == {"seq": 5}
    assert await from_far.push(topic, "remove_reaction", added) == {"seq": None}
    assert await at_anna.next(topic, "reaction_removed") == {**told, "seq": 5}
    assert (await ben.ok(f"/messages/{sent['id']}/reactions"))["items"] == [
        {"reaction": "❤️", "user_ids": [anna.id]},
        {"reaction": "👍", "user_ids": [anna.id]},
    ]


@pytest.mark.parametrize("reaction", ["x", "👩‍👩‍👧‍👦", "a/b+c==", "%2F", "🏳️‍🌈" * 8, "y" * 64, "ä ö"])
async def test_reactions_of_any_text(stack: Stack, reaction: str) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    sent = await anna.send(await anna.direct(ben))
    assert (await react(ben, sent, reaction)).status_code == 204
    (item,) = (await anna.ok(f"/messages/{sent['id']}/reactions"))["items"]
    assert item == {"reaction": reaction, "user_ids": [ben.id]}
    assert (await react(ben, sent, reaction, "DELETE")).status_code == 204
    assert (await anna.ok(f"/messages/{sent['id']}"))["reactions"] == []


@pytest.mark.parametrize("reaction", ["y" * 65, "\0", "a\nb", "\x7f"])
async def test_reactions_that_are_none(stack: Stack, connect: Open, reaction: str) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    sent = await anna.send(topic_id)
    for method in ("PUT", "DELETE"):
        answer = await react(ben, sent, reaction, method)
        # A path with a line break in it is no route at all.
        assert answer.json()["code"] in ("invalid_reaction", "invalid_request", "not_found"), answer.text
    line = await connect(ben.person)
    await line.join(conversation(topic_id))
    pushed = {"message_id": sent["id"], "reaction": reaction}
    for event in ("add_reaction", "remove_reaction"):
        assert (await line.refused(conversation(topic_id), event, pushed))["reason"] == "invalid_reaction"
    empty = {"message_id": sent["id"], "reaction": ""}
    assert (await line.refused(conversation(topic_id), "add_reaction", empty))["reason"] == "invalid_reaction"


async def test_limits_of_reactions(stack: Stack) -> None:
    doors = [await new_door(stack) for _ in range(5)]
    topic_id = await doors[0].group(*doors[1:])
    sent = await doors[0].send(topic_id)
    for at, door in enumerate(doors[:4]):
        for number in range(5):
            assert (await react(door, sent, f"{at}-{number}")).status_code == 204
    over = assert_problem(await react(doors[0], sent, "0-5"), 409, "too_many_reactions")
    assert over["limit"] in (5, 20)
    assert_problem(await react(doors[4], sent, "another kind"), 409, "too_many_reactions")
    for number in range(5):
        assert (await react(doors[4], sent, f"0-{number}")).status_code == 204
    sixth = assert_problem(await react(doors[4], sent, "1-0"), 409, "too_many_reactions")
    assert sixth["limit"] == 5
    assert (await react(doors[4], sent, "0-0")).status_code == 204, "it is there already"
    assert (await react(doors[3], sent, "3-0", "DELETE")).status_code == 204
    assert (await react(doors[3], sent, "another kind")).status_code == 204


async def test_who_reacts(stack: Stack) -> None:
    anna, ben, late, stranger = [await new_door(stack) for _ in range(4)]
    topic_id = await anna.group(ben)
    sent = await anna.send(topic_id)
    await anna.post(f"/conversations/{topic_id}/members", {"member_ids": [late.id]})
    for door in (late, stranger):
        for method in ("PUT", "DELETE"):
            assert_problem(await react(door, sent, "👍", method), 404, "message_not_found")
        assert_problem(await door.get(f"/messages/{sent['id']}/reactions"), 404, "message_not_found")
    assert (await react(ben, sent, "👍")).status_code == 204
    await ben.delete(f"/conversations/{topic_id}/members/{ben.id}")
    for method in ("PUT", "DELETE"):
        assert_problem(await react(ben, sent, "👍", method), 404, "message_not_found")
    assert (await anna.ok(f"/messages/{sent['id']}"))["reactions"] == [
        {"reaction": "👍", "user_ids": [ben.id]}
    ]
    unknown = {**sent, "id": str(uuid4())}
    assert_problem(await react(anna, unknown, "👍"), 404, "message_not_found")
    assert (await anna.delete(f"/messages/{sent['id']}")).status_code == 204
    assert_problem(await react(anna, sent, "👍"), 409, "message_deleted")
    assert (await react(anna, sent, "👍", "DELETE")).status_code == 204
    left = await anna.send(topic_id)
    assert (await react(anna, left, "👍")).status_code == 204
    await anna.delete(f"/conversations/{topic_id}")
    assert_problem(await react(anna, left, "❤️"), 409, "conversation_closed")
    assert (await react(anna, left, "👍", "DELETE")).status_code == 204, "one's own can be taken back"


async def test_blocked_people_do_not_react_or_pin(stack: Stack) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    sent = await anna.send(await anna.direct(ben))
    assert (await react(anna, sent, "👍")).status_code == 204
    await block(stack, ben, anna)
    for door in (anna, ben):
        assert_problem(await react(door, sent, "❤️"), 403, "blocked")
        assert_problem(await pin(door, sent), 403, "blocked")
    assert (await react(anna, sent, "👍", "DELETE")).status_code == 204


async def test_a_group_reacts_all_at_once(stack: Stack) -> None:
    doors = [await new_door(stack) for _ in range(6)]
    topic_id = await doors[0].group(*doors[1:])
    sent = await doors[0].send(topic_id)
    far = await stack.another_node()
    spread = [Door(stack, door.person, far.url) if at % 2 else door for at, door in enumerate(doors)]
    answers = await asyncio.gather(
        *(react(door, sent, reaction) for door in spread for reaction in ("👍", "❤️", "👍")),
        *(react(door, sent, "👍", "DELETE") for door in spread[:3]),
    )
    assert {answer.status_code for answer in answers} == {204}
    await asyncio.gather(*(react(door, sent, "👍", "DELETE") for door in spread[:3]))
    found = {item["reaction"]: set(item["user_ids"]) for item in await reactions_of(doors[0], sent)}
    assert found == {"❤️": {door.id for door in doors}, "👍": {door.id for door in doors[3:]}}
    state: dict[str, set[str]] = {}
    log = await doors[0].log(topic_id)
    assert [event["seq"] for event in log] == list(range(1, len(log) + 1))
    for event in log[1:]:
        people = state.setdefault(event["payload"]["reaction"], set())
        who = event["payload"]["user_id"]
        assert (who in people) == (event["event"] == "reaction_removed"), "no event without a change"
        (people.discard if event["event"] == "reaction_removed" else people.add)(who)
    assert state == found


async def reactions_of(door: Door, sent: dict[str, Any]) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = (await door.ok(f"/messages/{sent['id']}/reactions"))["items"]
    return items


async def test_pins_are_told_and_listed(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    topic = conversation(topic_id)
    first, second = await anna.send(topic_id, "1"), await ben.send(topic_id, "2")
    far = await stack.another_node()
    at_anna, from_far = await connect(anna.person), await connect(ben.person, far)
    await at_anna.join(topic)
    await from_far.join(topic)
    pushed = {"message_id": first["id"]}
    assert await from_far.push(topic, "pin_message", pushed) == {"seq": 3}
    assert await from_far.push(topic, "pin_message", pushed) == {"seq": None}
    told = await at_anna.next(topic, "message_pinned")
    assert told == await from_far.next(topic, "message_pinned")
    assert {**told, "pinned_at": ""} == {
        "seq": 3,
        "message_id": first["id"],
        "user_id": ben.id,
        "pinned_at": "",
    }
    stack.clock.advance(1)
    assert (await pin(anna, second)).status_code == 204
    items = (await anna.ok(f"/conversations/{topic_id}/pins"))["items"]
    assert [(item["message_id"], item["pinned_by"]) for item in items] == [
        (second["id"], anna.id),
        (first["id"], ben.id),
    ]
    assert items[1]["pinned_at"] == told["pinned_at"]
    assert [item["message"] for item in items] == [second, first]
    page = await anna.ok(f"/conversations/{topic_id}/pins", limit=1)
    rest = await anna.ok(f"/conversations/{topic_id}/pins", limit=1, cursor=page["next_cursor"])
    assert [*page["items"], *rest["items"]] == items
    assert rest["next_cursor"] is None
    assert await at_anna.push(topic, "unpin_message", pushed) == {"seq": 5}
    assert await at_anna.push(topic, "unpin_message", pushed) == {"seq": None}
    assert await from_far.next(topic, "message_unpinned") == {
        "seq": 5,
        "message_id": first["id"],
        "user_id": anna.id,
    }
    assert (await pin(ben, second, "DELETE")).status_code == 204
    assert (await ben.ok(f"/conversations/{topic_id}/pins"))["items"] == []


async def test_who_pins(stack: Stack) -> None:
    owner, admin, member, late, stranger = [await new_door(stack) for _ in range(5)]
    topic_id = await owner.group(admin, member)
    path = f"/conversations/{topic_id}"
    await owner.patch(f"{path}/members/{admin.id}", {"role": "admin"})
    sent = await member.send(topic_id)
    await owner.post(f"{path}/members", {"member_ids": [late.id], "role": "admin"})
    for method in ("PUT", "DELETE"):
        assert_problem(await pin(member, sent, method), 403, "not_allowed")
        assert_problem(await pin(late, sent, method), 404, "message_not_found")
        assert_problem(await pin(stranger, sent, method), 404, "conversation_not_found")
    assert_problem(await stranger.get(f"{path}/pins"), 404, "conversation_not_found")
    assert (await pin(admin, sent)).status_code == 204
    assert (await late.ok(f"{path}/pins"))["items"] == [], (
        "what one may not see is not shown as pinned either"
    )
    assert len((await member.ok(f"{path}/pins"))["items"]) == 1
    await owner.patch(path, {"permissions": {"pin": "member"}})
    assert (await pin(member, sent, "DELETE")).status_code == 204
    await owner.patch(path, {"permissions": {"pin": "owner"}})
    assert_problem(await pin(admin, sent), 403, "not_allowed")
    elsewhere = await owner.group(admin)
    foreign = {**sent, "conversation_id": elsewhere}
    assert_problem(await pin(owner, foreign), 404, "message_not_found")
    await member.delete(f"/messages/{sent['id']}")
    assert_problem(await pin(owner, sent), 409, "message_deleted")
    assert (await pin(owner, sent, "DELETE")).status_code == 204
    other = await owner.send(topic_id)
    await owner.delete(path)
    assert_problem(await pin(owner, other), 409, "conversation_closed")


async def test_a_conversation_has_a_hundred_pins(stack: Stack, messaging_tables: Database) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    sent = [await anna.send(topic_id, str(number)) for number in range(4)]
    async with messaging_tables.connection() as connection:
        await connection.execute(
            "INSERT INTO message_pins SELECT $1, gen_random_uuid(), $2, now() FROM generate_series(1, 98)",
            topic_id,
            anna.id,
        )
    answers = await asyncio.gather(*(pin(anna, message) for message in sent))
    assert sorted(answer.status_code for answer in answers) == [204, 204, 409, 409]
    refused = [at for at, answer in enumerate(answers) if answer.status_code == 409]
    assert_problem(await pin(ben, sent[refused[0]]), 409, "too_many_pins")
    pinned = [message["id"] for at, message in enumerate(sent) if at not in refused]
    items = (await ben.ok(f"/conversations/{topic_id}/pins"))["items"]
    assert {item["message_id"] for item in items} == set(pinned)
    assert (await pin(anna, {**sent[0], "id": pinned[0]}, "DELETE")).status_code == 204
    assert (await pin(ben, sent[refused[0]])).status_code == 204


@pytest.mark.parametrize(
    "cursor", ["x", base64.b64encode(b"[1,2]").decode(), base64.urlsafe_b64encode(b'["a","b"]').decode()]
)
async def test_cursors_that_are_none(stack: Stack, cursor: str) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    assert_problem(await anna.get(f"/conversations/{topic_id}/pins", cursor=cursor), 422, "invalid_cursor")
