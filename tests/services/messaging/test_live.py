"""Features switched off while messaging runs, and what it leaves out while it has too much to do."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.services.messaging.door import Door, assert_problem
from tests.services.messaging.line import Line
from tests.stack import Node, Stack

from whispr.kit.live import Live
from whispr.kit.pressure import Pressure


class Switchboard:
    """A node of messaging with a file of live settings, and people on it."""

    def __init__(self, stack: Stack, node: Node, path: Path, lines: AsyncExitStack) -> None:
        self.stack = stack
        self.node = node
        self._path = path
        self._lines = lines

    @property
    def live(self) -> Live:
        return self.node.running.context.live

    @property
    def pressure(self) -> Pressure:
        return self.node.running.context.pressure

    def is_pressed(self) -> bool:
        return self.pressure.high

    def set(self, **values: Any) -> None:
        """What the file says from now on, taken at once."""
        self._path.write_text(json.dumps({"messaging": values}))
        self.live.reload()

    async def pair(self) -> tuple[Door, Line, Door, Line, str]:
        """Two people in a direct conversation, both joined, and its topic."""
        doors = [Door(self.stack, await self.stack.register(), self.node.url) for _ in range(2)]
        topic = f"conversation:{await doors[0].direct(doors[1])}"
        lines = [await Line.open(self.node, door.person) for door in doors]
        for line in lines:
            self._lines.push_async_callback(line.close)
            await line.join(topic)
        return doors[0], lines[0], doors[1], lines[1], topic


Make = Callable[..., Awaitable[Switchboard]]


@pytest.fixture
async def make(stack: Stack, tmp_path: Path) -> AsyncIterator[Make]:
    async with AsyncExitStack() as lines:
        started: list[Node] = []

        async def make(**changes: Any) -> Switchboard:
            path = tmp_path / "live.json"
            node = await stack.another_node(live_settings=path, **changes)
            started.append(node)
            return Switchboard(stack, node, path, lines)

        yield make
        await lines.aclose()
        for node in started:
            await node.running.stop()


async def test_typing_is_switched_off_and_on(make: Make) -> None:
    board = await make()
    _, at_anna, _, at_ben, topic = await board.pair()
    board.set(typing=False)
    refusal = await at_anna.refused(topic, "typing", {"state": "start"})
    assert (refusal["reason"], refusal["feature"]) == ("feature_off", "typing")
    board.set()
    await at_anna.push(topic, "typing", {"state": "start"})
    await at_ben.next(topic, "typing")


async def test_presence_is_switched_off_and_on(make: Make) -> None:
    board = await make()
    anna, at_anna, ben, _, topic = await board.pair()
    await at_anna.find(topic, lambda _, payload: ben.id in payload.get("joins", payload), what="ben")
    board.set(presence=False)
    await at_anna.find(topic, lambda name, payload: (name, payload) == ("presence_state", {}), what="nobody")
    late = await Line.open(board.node, ben.person)
    await late.join(topic)
    await late.push(topic, "mark_as_read", {"seq": 0})
    assert not late.has(topic, "presence_state")
    board.set()
    await at_anna.find(topic, lambda _, payload: {anna.id, ben.id} <= payload.keys(), what="both")
    await late.close()


async def test_with_receipts_switched_off_only_ones_own_devices_hear(make: Make) -> None:
    board = await make()
    anna, at_anna, ben, at_ben, topic = await board.pair()
    seq = (await anna.send(topic.partition(":")[2]))["seq"]
    board.set(receipts=False)
    await at_ben.push(topic, "mark_as_read", {"seq": seq})
    assert (await at_ben.next(topic, "receipt"))["user_id"] == ben.id
    assert not at_anna.has(topic, "receipt")
    board.set()
    seq = (await anna.send(topic.partition(":")[2]))["seq"]
    await at_ben.push(topic, "mark_as_read", {"seq": seq})
    assert (await at_anna.next(topic, "receipt"))["read_seq"] == seq


async def test_reactions_and_scheduled_messages_are_switched_off(make: Make) -> None:
    board = await make()
    anna, at_anna, _, _, topic = await board.pair()
    conversation = topic.partition(":")[2]
    message = await anna.send(conversation)
    board.set(reactions=False, scheduled_messages=False)
    reaction = {"message_id": message["id"], "reaction": "+"}
    assert (await at_anna.refused(topic, "add_reaction", reaction))["reason"] == "feature_off"
    later = anna.draft(conversation, send_at="2099-01-01T00:00:00Z")
    assert_problem(await anna.post("/messages", later), 503, "feature_off")
    board.set()
    await at_anna.push(topic, "add_reaction", reaction)


async def test_limits_follow_the_file(make: Make) -> None:
    board = await make(rate_limits="on")
    anna, at_anna, ben, _, topic = await board.pair()
    board.set(message_rate=0.01, message_burst=1, conversations_per_hour=1)
    draft = anna.draft(topic.partition(":")[2])
    del draft["conversation_id"]
    await at_anna.push(topic, "new_message", draft)
    again = anna.draft(topic.partition(":")[2])
    del again["conversation_id"]
    assert (await at_anna.refused(topic, "new_message", again))["reason"] == "rate_limited"
    body = {"type": "group", "member_ids": [ben.id]}
    assert_problem(await anna.post("/conversations", body), 429, "rate_limited")
    board.set()
    await at_anna.push(topic, "new_message", again)
    assert (await anna.post("/conversations", body)).status_code == 201


async def test_under_pressure_messages_go_on_and_the_rest_waits_or_is_left_out(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whispr.kit.pressure.TICK_SECONDS", 0.1)
    board = await make()
    anna, at_anna, ben, at_ben, topic = await board.pair()
    await at_anna.push(topic, "typing", {"state": "start"})
    await at_ben.next(topic, "typing")
    for _ in range(2):
        # As if the event loop had stood still; the loop that measures goes on and would end it after two seconds.
        board.pressure.observe(10.0)
    assert board.is_pressed()
    sent = await anna.send(topic.partition(":")[2])
    assert (await at_ben.next(topic, "new_message"))["id"] == sent["id"]
    await at_ben.push(topic, "typing", {"state": "start"})
    await at_ben.push(topic, "mark_as_delivered", {"seq": sent["seq"]})
    await at_ben.push(topic, "mark_as_read", {"seq": sent["seq"]})
    # It is stored all the same.
    stored = await ben.ok(f"/conversations/{topic.partition(':')[2]}")
    assert stored["unread_count"] == 0
    assert not at_anna.has(topic, "receipt")
    receipt = await at_anna.next(topic, "receipt", timeout=10)
    assert (receipt["user_id"], receipt["read_seq"]) == (ben.id, sent["seq"])
    assert not board.is_pressed(), "told when it was over"
    assert not any(
        name == "typing" and payload["user_id"] == ben.id for name, payload in at_anna.inbox[topic]
    )
