"""Any sequence of scheduling, changing, cancelling, moving time, changing devices and dying: what was answered is kept."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.services.messaging.plans import Crash, Node, World, ciphertext, envelopes, resigned
from tests.services.messaging.rooms import Device

from whispr.kit import migrate
from whispr.services.messaging.models import (
    AlreadySent,
    DevicesMismatch,
    Draft,
    NotPending,
    PlanStatus,
)
from whispr.services.messaging.service.firing import LEASE
from whispr.services.messaging.service.scheduled import PlanChange

PEOPLE = 2
NODES = 2
MOST_DEVICES = 3


@dataclass(frozen=True)
class Step:
    """A drawn step. What it does not need of the three numbers it ignores."""

    name: str
    who: int
    which: int
    seconds: int
    enveloped: bool


TROUBLES = (
    "dies claimed",
    "dies sent",
    "new device",
    "lost device",
    "new keys",
    "fire slowly",
    "meddle",
    "meddle",
)

steps = st.lists(
    st.builds(
        Step,
        st.sampled_from(
            [*("schedule",) * 4, "edit", "move", "cancel", *("wait",) * 2, "fire", "call", *TROUBLES]
        ),
        st.integers(0, 5),
        st.integers(0, 5),
        st.sampled_from([1, 2, 3, 4, 5, 10, 20, 25]),
        st.booleans(),
    ),
    min_size=3,
    max_size=20,
)


@dataclass
class Known:
    """A scheduled message as its author was last told."""

    id: UUID
    author: int
    client_id: UUID
    content: bytes
    device_id: UUID
    send_at: datetime
    is_cancelled: bool = False
    is_disturbed: bool = False
    """Changed, or once in need: its place among the others is not what it was."""


class Machine:
    """A conversation of two people, two nodes, and what the people know."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.nodes = [world.node() for _ in range(NODES)]
        self.people: list[list[Device]] = []
        self.known: list[Known] = []
        self.conversation_id: UUID

    async def start(self) -> None:
        self.people = [[self.world.auth.add()] for _ in range(PEOPLE)]
        self.conversation_id = await self.world.conversation(*(devices[0] for devices in self.people))

    async def do(self, step: Step) -> None:
        await getattr(self, step.name.replace(" ", "_"))(step)

    async def schedule(self, step: Step) -> None:
        author = step.who % PEOPLE
        device = self.people[author][step.which % len(self.people[author])]
        draft = device.draft(self.conversation_id, self.content(device, step))
        plan = await self.node(step).scheduled.schedule(draft, self.world.at(step.seconds))
        self.known.append(
            Known(plan.id, author, draft.client_id, plan.draft.content, device.device_id, plan.send_at)
        )

    async def edit(self, step: Step) -> None:
        if not self.known:
            return
        known = self.known[step.which % len(self.known)]
        devices = self.people[known.author]
        await self.encrypt(known, devices[step.who % len(devices)], step)

    async def encrypt(self, known: Known, device: Device, step: Step) -> None:
        content = self.content(device, step)
        change = resigned(device, await self.world.plan(known.id), content)
        if await self.change(known, device.device_id, change, step):
            known.content = msgspec.json.encode(content, order="sorted")
            known.device_id = device.device_id

    async def move(self, step: Step) -> None:
        if not self.known:
            return
        known = self.known[step.which % len(self.known)]
        send_at = self.world.at(step.seconds)
        if await self.change(known, known.device_id, PlanChange(send_at=send_at), step):
            known.send_at = send_at

    async def change(self, known: Known, device_id: UUID, change: PlanChange, step: Step) -> bool:
        user_id = self.people[known.author][0].user_id
        try:
            await self.node(step).scheduled.change(user_id, device_id, known.id, change)
        except AlreadySent:
            assert (await self.world.plan(known.id)).status is PlanStatus.SENT
            return False
        except NotPending:
            assert known.is_cancelled
            return False
        known.is_disturbed = True
        return True

    async def cancel(self, step: Step) -> None:
        if not self.known:
            return
        known = self.known[step.which % len(self.known)]
        try:
            await self.node(step).scheduled.cancel(self.people[known.author][0].user_id, known.id)
        except AlreadySent:
            assert not known.is_cancelled
        else:
            known.is_cancelled = True

    async def wait(self, step: Step) -> None:
        self.world.clock.advance(step.seconds)

    async def fire(self, step: Step) -> None:
        await self.node(step).turn()

    async def fire_slowly(self, step: Step) -> None:
        """The first one takes its time: nothing may overtake it."""
        await self.wait(step)
        node = self.node(step)
        held = iter([0.02])

        async def dawdle(_: Draft) -> None:
            await asyncio.sleep(next(held, 0))

        node.before_send = dawdle
        await node.turn()
        node.before_send = None

    async def meddle(self, step: Step) -> None:
        """A node is about to send when the author changes or cancels the message."""
        await self.wait(step)
        node = self.node(step)
        waiting = [step] * (1 + step.who % 2)

        async def interfere(draft: Draft) -> None:
            if not waiting:
                return
            waiting.pop()
            known = next(known for known in self.known if known.client_id == draft.client_id)
            at = self.known.index(known)
            if step.enveloped:
                await self.edit(dataclasses.replace(step, which=at, enveloped=False))
            else:
                await self.cancel(dataclasses.replace(step, which=at))

        node.before_send = interfere
        await node.turn()
        node.before_send = None

    async def call(self, step: Step) -> None:
        """Scheduling calls for one, due or not."""
        if not self.known or await self.is_claimed():
            return
        known = self.known[step.which % len(self.known)]
        early = (known.send_at - self.world.clock.now()).total_seconds()
        # Just before its time the call would wait, and this clock stands still.
        if not 0 < early <= 1:
            plan = await self.node(step).firing.fire(known.id)
            assert (plan.status is PlanStatus.PENDING) == (early > 0 and not known.is_cancelled), plan

    async def is_claimed(self) -> bool:
        """A dead node holds something: whoever calls would wait for it."""
        for known in self.known:
            plan = await self.world.plan(known.id)
            if plan.status is PlanStatus.PENDING and plan.due_at > max(plan.send_at, self.world.clock.now()):
                return True
        return False

    async def dies_claimed(self, step: Step) -> None:
        await self.die(step, "before_send")

    async def dies_sent(self, step: Step) -> None:
        await self.die(step, "after_send")

    async def die(self, step: Step, when: str) -> None:
        async def crash(_: Draft) -> None:
            raise Crash

        await self.wait(step)
        at = step.who % NODES
        setattr(self.nodes[at], when, crash)
        await self.nodes[at].turn()
        self.nodes[at] = self.world.node()

    async def new_device(self, step: Step) -> None:
        devices = self.people[step.who % PEOPLE]
        if len(devices) < MOST_DEVICES:
            devices.append(self.world.auth.add(devices[0].user_id))
            self.devices_changed(devices[0].user_id)

    async def lost_device(self, step: Step) -> None:
        devices = self.people[step.who % PEOPLE]
        if len(devices) > 1:
            gone = devices.pop(step.which % len(devices))
            self.world.auth.devices[gone.user_id].remove(gone)
            self.devices_changed(gone.user_id)

    async def new_keys(self, step: Step) -> None:
        """The installation is another one: what was encrypted for it before is stale."""
        devices = self.people[step.who % PEOPLE]
        devices[step.which % len(devices)].registration_id += 1
        self.devices_changed(devices[0].user_id)

    def devices_changed(self, user_id: UUID) -> None:
        for node in self.nodes:
            node.devices.changed(user_id)

    def node(self, step: Step) -> Node:
        return self.nodes[step.seconds % NODES]

    def content(self, device: Device, step: Step) -> dict[str, Any]:
        if not step.enveloped:
            return ciphertext()
        others = [one for devices in self.people for one in devices if one is not device]
        content = envelopes(*others)
        for one in others:
            content["envelopes"][str(one.device_id)]["registration_id"] = one.registration_id
        return content

    async def finish(self) -> None:
        """Let all time pass, and have everything that is in need encrypted again."""
        self.world.clock.advance(60 + LEASE.total_seconds())
        for _ in range(3):
            for node in self.nodes:
                await node.work_off()
            for known in self.known:
                plan = await self.world.plan(known.id)
                assert plan.status is not PlanStatus.PENDING, "everything is due"
                if plan.status is PlanStatus.NEEDS_REENCRYPT:
                    known.is_disturbed = True
                    device = self.people[known.author][0]
                    step = Step("edit", 0, 0, 1, enveloped=True)
                    await self.encrypt(known, device, step)
        await self.check()

    async def check(self) -> None:
        messages = await self.world.messages(self.conversation_id)
        by_client_id = {message.head.client_id: message for message in messages}
        assert len(by_client_id) == len(messages), "sent twice"
        assert [message.head.seq for message in messages] == list(range(1, len(messages) + 1))
        for known in self.known:
            plan = await self.world.plan(known.id)
            message = by_client_id.pop(known.client_id, None)
            if known.is_cancelled:
                assert message is None
                assert plan.status is PlanStatus.CANCELLED
                continue
            assert message is not None
            assert (plan.status, plan.message_id) == (PlanStatus.SENT, message.head.id)
            assert (message.content, message.head.sender_device_id) == (known.content, known.device_id)
            assert message.head.sent_at >= known.send_at, "too early"
        assert by_client_id == {}
        places = {message.head.client_id: message.head.seq for message in messages}
        calm = [known for known in self.known if not (known.is_disturbed or known.is_cancelled)]
        in_order = sorted(calm, key=lambda known: (known.send_at, known.id))
        seqs = [places[known.client_id] for known in in_order]
        assert seqs == sorted(seqs), "overtaken"


@pytest.fixture(scope="module")
async def world(new_database: Callable[[str], str], valkey_url: str) -> AsyncIterator[World]:
    url = new_database("messaging_machine")
    migrate.upgrade("messaging", url)
    async with World.open(url, valkey_url) as world:
        yield world


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
async def test_what_was_answered_is_what_happens(world: World, steps: list[Step]) -> None:
    machine = Machine(world)
    await machine.start()
    for seconds in (3, 2, 1):
        await machine.schedule(Step("schedule", seconds, 0, seconds, enveloped=seconds == 2))
    for step in steps:
        try:
            await machine.do(step)
        except DevicesMismatch:
            pytest.fail(f"{step}: devices are told at once")
    await machine.finish()
