"""Nodes that schedule and send, on one database and one clock, each of which may die at a chosen step."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from tests.services.messaging.rooms import Auth, Device, Users, make_conversation

from whispr.kit.cache import Cache, RateLimiter
from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.kit.errors import Failure
from whispr.services.messaging.models import ConversationType, Draft, Message, Plan, SendResult
from whispr.services.messaging.service.contact import Contact
from whispr.services.messaging.service.devices import Devices
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.firing import Firing
from whispr.services.messaging.service.scheduled import PlanChange, Scheduled
from whispr.services.messaging.service.sending import Sending
from whispr.services.messaging.service.signatures import SignatureChecker
from whispr.services.messaging.store import history
from whispr.services.messaging.store import scheduled as store
from whispr.services.messaging.store.sending import PLANNER


class Crash(BaseException):
    """The node is gone."""


@dataclass
class Told:
    """What people's devices were pushed."""

    notices: list[tuple[UUID, str, dict[str, Any]]] = field(default_factory=list)

    def notice(self, user_ids: Sequence[UUID], event: str, payload: Any) -> None:
        body = msgspec.json.decode(msgspec.json.encode(payload))
        self.notices.extend((user_id, event, body) for user_id in user_ids)

    def to(self, user_id: UUID) -> list[tuple[str, dict[str, Any]]]:
        return [(event, payload) for other, event, payload in self.notices if other == user_id]


class Node:
    """One process. `before_send` and `after_send` are called around each sending, and may raise `Crash`."""

    def __init__(self, world: World, *, grace: timedelta = timedelta(0)) -> None:
        self.world = world
        self.directory = Directory(world.db, world.cache, world.clock)
        self.devices = Devices(world.auth, world.clock)
        self.contact = Contact(world.users, world.clock)
        self.sending = Sending(
            world.flush_db,
            world.clock,
            self.directory,
            self.devices,
            self.contact,
            world.signatures,
            lambda events: None,
            lambda: None,
        )
        self.firing = Firing(world.db, world.clock, self, self.directory, world.told, grace=grace)
        self.scheduled = Scheduled(
            world.db, world.clock, self.sending, RateLimiter(world.cache, enabled=False), self.firing.wake
        )
        self._started: list[asyncio.Task[None]] = []
        self.firing._start = self._start  # type: ignore[method-assign]
        self.before_send: Any = None
        self.after_send: Any = None

    async def send(self, draft: Draft) -> SendResult:
        if self.before_send is not None:
            await self.before_send(draft)
        result = await self.sending.send(draft)
        if self.after_send is not None:
            await self.after_send(draft)
        return result

    async def turn(self) -> int:
        """One look at what is due, and what comes of it; how many were taken up."""
        self._started = []
        await self.firing.send_due()
        await asyncio.gather(*self._started, return_exceptions=True)
        await asyncio.sleep(0)
        return len(self._started)

    def _start(self, plan: Plan) -> None:
        before = set(self.firing._under_way)
        Firing._start(self.firing, plan)
        self._started += self.firing._under_way - before

    async def work_off(self) -> None:
        """Look until nothing more is due."""
        while await self.turn():
            pass


class World:
    """What nodes share."""

    def __init__(self, url: str, valkey_url: str) -> None:
        self.clock = ManualClock()
        self.db = Database(url, pool_size=8)
        self.flush_db = Database(url, pool_size=4, settings=PLANNER)
        self.cache = Cache(valkey_url)
        self.auth, self.users = Auth(), Users()
        self.signatures = SignatureChecker(0)
        self.told = Told()
        self._loops: list[asyncio.Task[None]] = []

    def node(self, **options: Any) -> Node:
        node = Node(self, **options)
        self._loops.append(asyncio.create_task(node.sending.run()))
        return node

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, valkey_url: str) -> AsyncIterator[World]:
        world = cls(url, valkey_url)
        await world.db.open()
        await world.flush_db.open()
        yield world
        for loop in world._loops:
            loop.cancel()
        await asyncio.gather(*world._loops, return_exceptions=True)
        await world.flush_db.close()
        await world.db.close()
        await world.cache.close()

    async def conversation(self, *people: Device, kind: ConversationType = ConversationType.GROUP) -> UUID:
        return await make_conversation(self.db, self.clock, [one.user_id for one in people], kind)

    async def pair(self, kind: ConversationType = ConversationType.GROUP) -> tuple[UUID, Device, Device]:
        one, two = self.auth.add(), self.auth.add()
        return await self.conversation(one, two, kind=kind), one, two

    def at(self, seconds: float) -> datetime:
        return self.clock.now() + timedelta(seconds=seconds)

    async def plan(self, plan_id: UUID) -> Plan:
        async with self.db.connection() as connection:
            plan = await store.get(connection, plan_id)
        assert plan is not None
        return plan

    async def messages(self, conversation_id: UUID) -> list[Message]:
        async with self.db.connection() as connection:
            return await history.messages_after(connection, conversation_id, 0, 2**62, 1_000)

    async def sent(self, conversation_id: UUID) -> list[UUID]:
        """The client ids of the messages of a conversation, in their order."""
        return [message.head.client_id for message in await self.messages(conversation_id)]


def ciphertext() -> dict[str, Any]:
    return {"ciphertext": base64.b64encode(uuid4().bytes).decode()}


def envelopes(*devices: Device) -> dict[str, Any]:
    body = base64.b64encode(uuid4().bytes).decode()
    return {"envelopes": {str(device.device_id): {"type": "message", "body": body} for device in devices}}


def resigned(by: Device, plan: Plan, content: dict[str, Any], **changes: Any) -> PlanChange:
    """New content for a plan, signed with the client id it was made with."""
    draft = plan.draft
    return PlanChange(
        content=msgspec.json.encode(content),
        signature=by.sign(draft.conversation_id, draft.client_id, content),
        **changes,
    )


async def refusal(work: Any) -> Failure:
    with pytest.raises(Failure) as raised:
        await work
    return raised.value
