"""Who is typing. Nothing is stored: a start holds for six seconds on every node that heard of it."""

from __future__ import annotations

import asyncio
from typing import Final
from uuid import UUID

import msgspec

from whispr.kit.clock import Clock
from whispr.kit.errors import Failure
from whispr.kit.live import Live
from whispr.kit.pressure import Pressure
from whispr.kit.telemetry import get_logger
from whispr.services.messaging.channels.rooms import Rooms
from whispr.services.messaging.service.contact import Contact
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.events import EventBus
from whispr.services.messaging.service.opening import SMALL_GROUP

log = get_logger(__name__)

TYPING_SECONDS: Final = 6.0

# A client says "start" with every few keys; the others need it only before the last one runs out.
_REPEAT_SECONDS: Final = 3.0
_SWEEP_SECONDS: Final = 1.0
_HINT: Final = "typing"


class _Hint(msgspec.Struct, array_like=True):
    user_id: UUID
    starts: bool
    apart: list[UUID]


class _Typist:
    __slots__ = ("apart", "told_at")

    def __init__(self, apart: frozenset[UUID], told_at: float) -> None:
        self.apart = apart
        self.told_at = told_at


class Typists:
    """Tells members of small groups who is typing, except people who are kept apart. `run()` is its supervised loop.

    Under pressure nobody is told that someone begins.
    """

    def __init__(
        self,
        rooms: Rooms,
        bus: EventBus,
        directory: Directory,
        contact: Contact,
        clock: Clock,
        live: Live,
        pressure: Pressure,
    ) -> None:
        self._live = live
        self._pressure = pressure
        self._rooms = rooms
        self._bus = bus
        self._directory = directory
        self._contact = contact
        self._clock = clock
        self._typing: dict[tuple[UUID, UUID], _Typist] = {}
        bus.on_hint(self._hear)

    def ensure_on(self) -> None:
        """Raises `FeatureOff`."""
        self._live.require("typing")

    async def start(self, conversation_id: UUID, user_id: UUID) -> None:
        """The person types."""
        if self._pressure.shed("typing"):
            return
        known = self._typing.get((conversation_id, user_id))
        if known is not None and self._clock.time() - known.told_at < _REPEAT_SECONDS:
            return
        try:
            conversation = await self._directory.get(conversation_id)
            if user_id not in conversation.members or len(conversation.members) > SMALL_GROUP:
                return
            others = [other for other in conversation.members if other != user_id]
            apart = await self._contact.blocked(user_id, others)
        except Failure as failure:
            # Better nobody hears of it than somebody who must not.
            log.warning("typing_not_told", code=failure.code)
            return
        self._tell(conversation_id, user_id, apart, starts=True)
        self._bus.hint(conversation_id, _HINT, _encode(_Hint(user_id, True, list(apart))))

    def stop(self, conversation_id: UUID, user_id: UUID) -> None:
        """The person has stopped, sent the message, or gone."""
        known = self._typing.get((conversation_id, user_id))
        if known is not None:
            self._tell(conversation_id, user_id, known.apart, starts=False)
            self._bus.hint(conversation_id, _HINT, _encode(_Hint(user_id, False, list(known.apart))))

    async def run(self) -> None:
        """End what nobody has ended, for ever."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self.sweep()

    def sweep(self) -> None:
        """End what has run out. Every node does this for itself."""
        ended = self._clock.time() - TYPING_SECONDS
        for (conversation_id, user_id), typist in list(self._typing.items()):
            if typist.told_at <= ended:
                self._tell(conversation_id, user_id, typist.apart, starts=False)

    def _hear(self, conversation_id: UUID, kind: str, body: bytes) -> None:
        if kind == _HINT:
            hint = _decode(body)
            if hint.starts and self._pressure.shed("typing"):
                return
            self._tell(conversation_id, hint.user_id, frozenset(hint.apart), starts=hint.starts)

    def _tell(self, conversation_id: UUID, user_id: UUID, apart: frozenset[UUID], *, starts: bool) -> None:
        key = conversation_id, user_id
        if starts:
            self._typing[key] = _Typist(apart, self._clock.time())
        elif self._typing.pop(key, None) is None:
            return
        payload = b'{"user_id":"%b","state":"%b","expires_in":%d}' % (
            str(user_id).encode(),
            b"start" if starts else b"stop",
            TYPING_SECONDS,
        )
        self._rooms.push(
            conversation_id, "typing", payload, chosen=lambda other: other != user_id and other not in apart
        )


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Hint).decode
