"""Who is shown as present to whom, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from tests.services.messaging.door import Door
from tests.services.messaging.line import Line
from tests.services.messaging.test_channels import conversation, new_door
from tests.services.messaging.test_fanout import appears
from tests.stack import Person, Stack

Open = Callable[..., Awaitable[Line]]


@pytest.fixture
async def connect(stack: Stack) -> AsyncIterator[Open]:
    lines: list[Line] = []

    async def open_line(person: Person, **params: Any) -> Line:
        line = await Line.open(stack.messaging, person, **params)
        lines.append(line)
        return line

    yield open_line
    for line in lines:
        await line.close()


async def change_user(stack: Stack, door: Door, method: str, path: str, body: Any = None) -> None:
    url = f"{stack.user.url}/api/v1/users/me{path}"
    answer = await stack.http.request(method, url, json=body, headers=door.person.headers)
    assert answer.status_code < 300, answer.text


async def befriend(stack: Stack, one: Door, two: Door) -> None:
    await change_user(stack, one, "PUT", f"/contacts/{two.id}", {})
    await change_user(stack, two, "PUT", f"/contacts/{one.id}", {})


async def test_contacts_come_and_go(stack: Stack, connect: Open) -> None:
    anna, ben, eve = [await new_door(stack) for _ in range(3)]
    await befriend(stack, anna, ben)
    mine = f"user:{anna.id}"
    at_anna = await connect(anna.person)
    await at_anna.join(mine)
    assert await at_anna.next(mine, "presence_state") == {}
    at_eve = await connect(eve.person)
    await at_eve.join(f"user:{eve.id}")
    at_ben = await connect(ben.person)
    await at_ben.join(f"user:{ben.id}")
    joined = await at_anna.next(mine, "presence_diff")
    assert list(joined["joins"]) == [ben.id], "nobody hears of strangers"
    (meta,) = joined["joins"][ben.id]["metas"]
    assert set(meta) == {"phx_ref", "online_at"}
    await at_ben.close()
    left = await at_anna.next(mine, "presence_diff")
    assert left["leaves"] == {ben.id: {"metas": [meta]}}
    again = await connect(anna.person)
    await again.join(mine)
    await again.next(mine, "presence_state")
    assert list((await again.next(mine, "last_seen"))["users"]) == [ben.id]


async def test_hidden_and_blocked_people_are_not_shown(stack: Stack, connect: Open) -> None:
    anna, ben, carl = [await new_door(stack) for _ in range(3)]
    topic_id = await anna.group(ben, carl)
    topic = conversation(topic_id)
    await change_user(stack, carl, "PATCH", "", {"privacy": {"online": "nobody"}})
    lines = {}
    for door in (anna, ben, carl):
        lines[door.id] = await connect(door.person)
        await lines[door.id].join(topic)
    await appears(lines[anna.id], topic, ben.id)
    await appears(lines[carl.id], topic, ben.id)
    await asyncio.sleep(0.7)
    await lines[anna.id].settled()
    everything = str(lines[anna.id].inbox[topic])
    assert carl.id not in everything
    lines[anna.id].inbox[topic].clear()
    await change_user(stack, ben, "PUT", f"/blocks/{anna.id}")
    state = await lines[anna.id].next(topic, "presence_state")
    assert ben.id not in state, "the state is told anew without them"
    await change_user(stack, ben, "DELETE", f"/blocks/{anna.id}")
    # Both people's caches are dropped, so the state without them may be told once more before the one with them.
    while ben.id not in await lines[anna.id].next(topic, "presence_state"):
        pass


async def test_newcomer_is_shown(stack: Stack, connect: Open) -> None:
    anna, ben, carl = [await new_door(stack) for _ in range(3)]
    topic_id = await anna.group(ben)
    topic = conversation(topic_id)
    at_anna = await connect(anna.person)
    await at_anna.join(topic)
    assert (
        await anna.post(f"/conversations/{topic_id}/members", {"member_ids": [carl.id]})
    ).status_code < 300
    at_carl = await connect(carl.person)
    await at_carl.join(topic)
    await appears(at_anna, topic, carl.id)
