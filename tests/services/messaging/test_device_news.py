"""A changed device list is told to the person, to those who have them as a contact, and to those they write with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.services.messaging.door import Door
from tests.services.messaging.line import Line
from tests.stack import PASSWORD, DeviceKeys, Node, Stack

CHANGED = "device_list_changed"


@pytest.fixture
async def doors(stack: Stack) -> list[Door]:
    return [Door(stack, person) for person in await asyncio.gather(*(stack.register() for _ in range(5)))]


@pytest.fixture
async def lines(stack: Stack, doors: list[Door]) -> AsyncIterator[list[Line]]:
    """Everybody on their own channel, the last two on another node."""
    other: Node = await stack.another_node()
    nodes = [stack.messaging] * 3 + [other] * 2
    opened = [await Line.open(node, door.person) for node, door in zip(nodes, doors, strict=True)]
    yield opened
    for line in opened:
        await line.close()
    await other.running.stop()


async def add_contact(stack: Stack, owner: Door, contact: Door) -> None:
    answer = await owner.stack.http.put(
        f"{stack.user.url}/api/v1/users/me/contacts/{contact.id}", json={}, headers=owner.person.headers
    )
    assert answer.status_code < 300, answer.text


async def test_those_who_write_to_a_person_are_told_of_a_new_device(
    stack: Stack, doors: list[Door], lines: list[Line]
) -> None:
    anna, friend, stranger, companion, left = doors
    await add_contact(stack, friend, anna)
    await add_contact(stack, anna, stranger)
    group = await anna.group(companion, left)
    answer = await anna.delete(f"/conversations/{group}/members/{left.id}")
    assert answer.status_code == 204, answer.text
    for line, door in zip(lines, doors, strict=True):
        await line.join(f"user:{door.id}")
    await asyncio.sleep(0.2)

    second = await stack.add_device(anna.person)
    for number in (0, 1, 3):
        told = await lines[number].next(f"user:{doors[number].id}", CHANGED)
        assert told == {"user_id": anna.id, "epoch": 2}
    await stack.http.delete(
        f"{stack.auth.url}/api/v1/devices/{second.device_id}", headers=anna.person.headers
    )
    for number in (0, 1, 3):
        told = await lines[number].next(f"user:{doors[number].id}", CHANGED)
        assert told == {"user_id": anna.id, "epoch": 3}, "and each is told once"
    await asyncio.sleep(0.2)
    for number, door in ((2, stranger), (4, left)):
        assert not lines[number].has(f"user:{door.id}", CHANGED)


async def test_a_contact_who_hides_being_online_is_told_of_too(
    stack: Stack, doors: list[Door], lines: list[Line]
) -> None:
    anna, friend = doors[:2]
    await add_contact(stack, friend, anna)
    hiding = await stack.http.patch(
        f"{stack.user.url}/api/v1/users/me",
        json={"privacy": {"online": "nobody"}},
        headers=anna.person.headers,
    )
    assert hiding.status_code == 200, hiding.text
    await lines[1].join(f"user:{friend.id}")
    await asyncio.sleep(0.2)
    await stack.add_device(anna.person)
    assert await lines[1].next(f"user:{friend.id}", CHANGED) == {"user_id": anna.id, "epoch": 2}


async def test_a_new_push_token_is_no_news(stack: Stack, doors: list[Door], lines: list[Line]) -> None:
    anna, companion = doors[0], doors[3]
    await anna.direct(companion)
    await lines[3].join(f"user:{companion.id}")
    answer = await stack.http.put(
        f"{stack.auth.url}/api/v1/devices/{anna.person.device_id}/push-token",
        json={"channel": "fcm", "token": "fcm:" + anna.id},
        headers=anna.person.headers,
    )
    assert answer.status_code == 204, answer.text
    await asyncio.sleep(0.3)
    assert not lines[3].has(f"user:{companion.id}", CHANGED)


async def test_a_person_is_told_of_a_device_that_asks_to_be_linked(
    stack: Stack, doors: list[Door], lines: list[Line]
) -> None:
    anna, stranger = doors[0], doors[1]
    await lines[0].join(f"user:{anna.id}")
    await lines[1].join(f"user:{stranger.id}")
    link = f"{stack.auth.url}/api/v1/devices/link"
    begun = await stack.http.post(link, json={"password": PASSWORD}, headers=anna.person.headers)
    claim = {"token": begun.json()["token"], "device": DeviceKeys().registration(name="New phone")}
    assert (await stack.http.post(f"{link}/claim", json=claim)).status_code == 202
    assert await lines[0].next(f"user:{anna.id}", "device_link_claimed") == {
        "link_id": begun.json()["link_id"],
        "device_id": str(anna.person.device_id),
        "name": "New phone",
        "platform": "desktop",
    }
    assert not lines[1].has(f"user:{stranger.id}", "device_link_claimed")
