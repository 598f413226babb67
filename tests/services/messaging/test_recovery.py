"""What a device missed it gets: by cursor, by sync, by its own topic, with live events racing against the join."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

import pytest
from tests.services.messaging.door import Door
from tests.services.messaging.line import Line
from tests.services.messaging.test_channels import conversation, message, new_door
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


async def fill(line: Line, door: Door, topic_id: str, count: int) -> None:
    await asyncio.gather(
        *(
            line.push(conversation(topic_id), "new_message", message(door, topic_id, str(n)))
            for n in range(count)
        )
    )


@pytest.fixture(scope="module")
async def long_talk(stack: Stack) -> tuple[Door, Door, str]:
    """A conversation of 460 messages."""
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.group(ben)
    line = await Line.open(stack.messaging, anna.person)
    await line.join(conversation(topic_id))
    await fill(line, anna, topic_id, 460)
    await line.close()
    return anna, ben, topic_id


def seqs(events: list[dict[str, Any]]) -> list[int]:
    assert all(event["seq"] == event["payload"]["seq"] for event in events)
    return [event["seq"] for event in events]


async def test_join_without_cursor_brings_the_newest(
    long_talk: tuple[Door, Door, str], connect: Open
) -> None:
    _, ben, topic_id = long_talk
    joined = await (await connect(ben.person)).join(conversation(topic_id))
    assert not joined["recovered"]
    assert not joined["more"]
    assert seqs(joined["events"]) == list(range(411, 461))


async def test_join_with_cursor_continues_it(long_talk: tuple[Door, Door, str], connect: Open) -> None:
    _, ben, topic_id = long_talk
    line = await connect(ben.person)
    epoch = (await line.join(conversation(topic_id)))["epoch"]
    for seq, first, last in ((455, 456, 460), (260, 261, 460), (460, 1, 0)):
        joined = await line.join(conversation(topic_id), {"cursor": {"epoch": epoch, "seq": seq}})
        assert joined["recovered"]
        assert not joined["more"]
        assert seqs(joined["events"]) == list(range(first, last + 1))
        assert joined["head_seq"] == 460


async def test_more_than_a_join_can_bring_is_synced(long_talk: tuple[Door, Door, str], connect: Open) -> None:
    _, ben, topic_id = long_talk
    line = await connect(ben.person)
    epoch = (await line.join(conversation(topic_id)))["epoch"]
    joined = await line.join(conversation(topic_id), {"cursor": {"epoch": epoch, "seq": 10}})
    assert joined["recovered"]
    assert joined["more"]
    got = seqs(joined["events"])
    assert got == list(range(11, 211))
    more = True
    while more:
        page = await line.push(conversation(topic_id), "sync", {"after_seq": got[-1]})
        got += seqs(page["events"])
        more = page["more"]
    assert got == list(range(11, 461))
    middle = await line.push(conversation(topic_id), "sync", {"after_seq": 20, "until_seq": 25})
    assert (seqs(middle["events"]), middle["more"]) == ([21, 22, 23, 24, 25], False)
    long = await line.push(conversation(topic_id), "sync", {"after_seq": 0, "until_seq": 201})
    assert (len(long["events"]), long["more"]) == (200, True)
    for after, until in ((460, None), (10**12, None), (5, 5), (9, 3)):
        asked = {"after_seq": after} if until is None else {"after_seq": after, "until_seq": until}
        assert (await line.push(conversation(topic_id), "sync", asked))["events"] == []


async def test_cursor_of_another_life_of_the_database(
    long_talk: tuple[Door, Door, str], connect: Open
) -> None:
    _, ben, topic_id = long_talk
    line = await connect(ben.person)
    epoch = (await line.join(conversation(topic_id)))["epoch"]
    for cursor in ({"epoch": str(uuid4()), "seq": 5}, {"epoch": epoch, "seq": 461}):
        joined = await line.join(conversation(topic_id), {"cursor": cursor})
        assert not joined["recovered"]
        assert seqs(joined["events"]) == list(range(411, 461))


async def test_large_messages_come_in_several_pieces(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    topic = conversation(topic_id)
    at_anna, at_ben = await connect(anna.person), await connect(ben.person)
    epoch = (await at_anna.join(topic))["epoch"]
    for _ in range(12):
        await at_anna.push(
            topic, "new_message", message(anna, topic_id, content={"ciphertext": "A" * 80_000})
        )
    joined = await at_ben.join(topic, {"cursor": {"epoch": epoch, "seq": 0}})
    assert joined["more"]
    got = seqs(joined["events"])
    assert got == [1, 2, 3, 4]
    while joined["more"]:
        joined = await at_ben.push(topic, "sync", {"after_seq": got[-1]})
        got += seqs(joined["events"])
    assert got == list(range(1, 13))
    await at_ben.join(f"user:{ben.id}")
    pushed: list[int] = []
    while pushed[-1:] != [12]:
        page = await at_ben.next(f"user:{ben.id}", "undelivered")
        pushed += seqs(page["events"])
        assert page["more"] == (pushed[-1] != 12)
    assert pushed == list(range(1, 13))


async def test_live_events_race_with_joins(stack: Stack, connect: Open) -> None:
    """Devices join again and again while messages stream: reply and pushes together are dense, with nothing twice."""
    dice = random.Random(11)
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    topic = conversation(topic_id)
    sender = await connect(anna.person)
    epoch = (await sender.join(topic))["epoch"]
    streaming = True

    async def stream() -> None:
        while streaming:
            await asyncio.gather(
                *(
                    sender.push(topic, "new_message", message(anna, topic_id))
                    for _ in range(dice.randint(1, 4))
                )
            )
            await asyncio.sleep(dice.uniform(0, 0.004))

    async def device() -> list[int]:
        got: list[int] = []
        line = await connect(ben.person)
        for _ in range(12):
            cursor = {"epoch": epoch, "seq": got[-1] if got else 0}
            line.inbox[topic].clear()
            joined = await line.join(topic, {"cursor": cursor})
            assert joined["recovered"]
            assert not joined["more"]
            got += seqs(joined["events"])
            await asyncio.sleep(dice.uniform(0, 0.02))
            await line.leave(topic)
            got += [p["seq"] for name, p in line.inbox[topic] if name == "new_message"]
        return got

    sending = asyncio.create_task(stream())
    devices = await asyncio.gather(*(device() for _ in range(4)))
    streaming = False
    await sending
    for got in devices:
        assert got == list(range(1, len(got) + 1))
        assert len(got) > 20


async def test_undelivered_is_pushed_until_it_is_acknowledged(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    first, second = await anna.direct(ben), await anna.group(ben)
    for topic_id in (first, second, second):
        await anna.send(topic_id)
    at_ben = await connect(ben.person)
    await at_ben.join(f"user:{ben.id}")
    pages = {}
    for _ in range(2):
        page = await at_ben.next(f"user:{ben.id}", "undelivered")
        pages[page["conversation_id"]] = page
    assert {topic_id: seqs(page["events"]) for topic_id, page in pages.items()} == {
        first: [1],
        second: [1, 2],
    }
    assert not any(page["more"] or page["truncated"] for page in pages.values())
    await at_ben.join(conversation(first))
    await at_ben.push(conversation(first), "mark_as_delivered", {"seq": 1})
    again = await connect(ben.person)
    await again.join(f"user:{ben.id}")
    assert (await again.next(f"user:{ben.id}", "undelivered"))["conversation_id"] == second
    await again.settled()
    assert not again.has(f"user:{ben.id}", "undelivered")
    tablet = await connect(await stack.add_device(ben.person))
    await tablet.join(f"user:{ben.id}")
    for _ in range(2):
        await tablet.next(f"user:{ben.id}", "undelivered")


async def test_new_device_gets_the_newest_of_a_long_conversation(
    long_talk: tuple[Door, Door, str], stack: Stack, connect: Open
) -> None:
    _, ben, topic_id = long_talk
    tablet = await connect(await stack.add_device(ben.person))
    await tablet.join(f"user:{ben.id}")
    got: list[int] = []
    while got[-1:] != [460]:
        page = await tablet.next(f"user:{ben.id}", "undelivered")
        assert page["conversation_id"] == topic_id
        assert page["truncated"]
        got += seqs(page["events"])
    assert got == list(range(261, 461))


async def test_device_keeps_its_place_over_a_restart_of_the_service(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    topic = conversation(topic_id)
    at_ben = await connect(ben.person)
    epoch = (await at_ben.join(topic))["epoch"]
    at_anna = await connect(anna.person)
    await at_anna.join(topic)
    await fill(at_anna, anna, topic_id, 5)
    assert await at_ben.seqs(topic, 5) == [1, 2, 3, 4, 5]
    draft = message(anna, topic_id)
    ack = await at_anna.push(topic, "new_message", draft)
    await stack.restart("messaging")
    assert await at_ben.closed() == 1012
    at_anna, at_ben = await connect(anna.person), await connect(ben.person)
    joined = await at_ben.join(topic, {"cursor": {"epoch": epoch, "seq": 3}})
    assert joined["recovered"]
    assert seqs(joined["events"]) == [4, 5, 6]
    await at_anna.join(topic)
    # The acknowledgement may have been lost on the way: the device sends again.
    assert await at_anna.push(topic, "new_message", draft) == {**ack, "duplicate": True}
    assert (await at_anna.push(topic, "new_message", message(anna, topic_id)))["seq"] == 7
    assert await at_ben.seqs(topic, 7) == [7]
