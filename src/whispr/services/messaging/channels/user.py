"""`user:{id}`: a person's own notices, what their device has not got yet, and the presence of their contacts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import msgspec

from whispr.kit.channels import Channel
from whispr.kit.errors import Forbidden
from whispr.services.messaging.channels.desk import Desk
from whispr.services.messaging.channels.rooms import render_events
from whispr.services.messaging.models import UndeliveredPage
from whispr.services.messaging.service.firing import needs_notice

if TYPE_CHECKING:
    from whispr.kit.channels import Hub, Socket

# A client that does not read its backlog for this long gets it with its next join.
_PATIENCE_SECONDS: Final = 30.0
_PACE_SECONDS: Final = 0.02


class UserChannel(Channel):
    """One device of a person, on the person's own topic."""

    __slots__ = ("_desk",)

    def __init__(self, socket: Socket, topic: str, topic_id: str, desk: Desk) -> None:
        super().__init__(socket, topic, topic_id)
        self._desk = desk

    async def join(self, params: dict[str, Any]) -> dict[str, Any]:
        """Refused with `forbidden` for anybody else's topic."""
        del params
        caller = self.socket.caller
        if self.topic_id != str(caller.user_id):
            raise Forbidden
        self._desk.count_read(caller.device_id)
        self.subscribe()
        devices = await self._desk.devices.of(caller.user_id)
        return {"epoch": await self._desk.history.epoch(), "devices": sorted(devices.signing_keys)}

    async def joined(self) -> None:
        """Become present, look at the contacts, and push what the device has not got."""
        whereabouts = self._desk.whereabouts
        whereabouts.enter(self, self.topic, {"online_at": self._desk.clock.now()})
        await whereabouts.watch_contacts(self)
        await self._push_needs()
        await self._push_undelivered()

    def terminated(self) -> None:
        """No longer present."""
        self._desk.whereabouts.leave(self)

    async def _push_needs(self) -> None:
        for plan in await self._desk.scheduled.in_need(self.socket.caller.user_id):
            self.push("needs_reencrypt", needs_notice(plan, plan.failure, plan.needs))

    async def _push_undelivered(self) -> None:
        caller = self.socket.caller
        # A node that starts again gets everybody back at once; they take turns at the database.
        async with self._desk.backlogs:
            async for page in self._desk.history.undelivered(caller.user_id, caller.device_id):
                if not await self._push_page(page):
                    return

    async def _push_page(self, page: UndeliveredPage) -> bool:
        """Push a page, in several frames if it is large. False when there is nobody to push to."""
        items = page.items
        while items:
            if not await self._is_reading():
                return False
            events, _ = render_events(items, self.socket.caller.device_id)
            items = items[len(events) :]
            self.push(
                "undelivered",
                {
                    "conversation_id": page.conversation_id,
                    "events": events,
                    "head_seq": page.head_seq,
                    "more": page.more or bool(items),
                    "truncated": page.truncated,
                },
            )
        return True

    async def _is_reading(self) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _PATIENCE_SECONDS
        while not self.closed and self.socket.link.stalled:
            if loop.time() > deadline:
                return False
            await asyncio.sleep(_PACE_SECONDS)
        return not self.closed


def push_notice(hub: Hub, user_id: UUID, device_id: UUID | None, event: str, payload: msgspec.Raw) -> None:
    """Push a notice on the person's channels of this node, or on one device's."""
    topic = f"user:{user_id}"
    if device_id is None:
        hub.broadcast(topic, event, payload)
        return
    for channel in hub.channels(topic):
        if channel.socket.caller.device_id == device_id:
            channel.push(event, payload)
