"""Telling of watermarks that moved: the others in the conversation, and the person's own devices."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final
from uuid import UUID

import msgspec

from whispr.kit.errors import Failure
from whispr.kit.live import Live
from whispr.kit.pressure import Pressure
from whispr.kit.telemetry import get_logger
from whispr.services.messaging.channels.rooms import Rooms
from whispr.services.messaging.models import Watermark
from whispr.services.messaging.service.contact import Contact
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.events import EventBus
from whispr.services.messaging.service.opening import SMALL_GROUP
from whispr.services.messaging.service.privacy import ReadReceipts
from whispr.services.messaging.service.receipts import Receipts

log = get_logger(__name__)

_HINT: Final = "receipt"

_MAX_LATER: Final = 50_000
_LATER_AT_ONCE: Final = 200
_LATER_PAUSE: Final = 0.05


class _Told(msgspec.Struct, array_like=True):
    """`for_others` is None if nobody else is told; `apart` hear nothing of the person."""

    user_id: UUID
    for_self: bytes
    for_others: bytes | None
    apart: list[UUID]


class _Payload(msgspec.Struct):
    user_id: UUID
    delivered_seq: int
    read_seq: int | None


class ReceiptTeller:
    """Told by `Receipts` after each commit; tells this node's channels and the other nodes.

    In larger groups only the person's own devices are told: everybody telling everybody would outweigh the messages.
    Under pressure nobody is; how far people have got by then is told when it is over. Where receipts are switched off the
    others are told nothing.
    """

    def __init__(
        self,
        receipts: Receipts,
        rooms: Rooms,
        bus: EventBus,
        directory: Directory,
        contact: Contact,
        read_receipts: ReadReceipts,
        live: Live,
        pressure: Pressure,
    ) -> None:
        self._live = live
        self._pressure = pressure
        self._later: dict[tuple[UUID, UUID], Watermark] = {}
        pressure.on_calm(lambda: self._hold(self._tell_later()))
        self._rooms = rooms
        self._bus = bus
        self._directory = directory
        self._contact = contact
        self._read_receipts = read_receipts
        self._tasks: set[asyncio.Task[None]] = set()
        receipts.on_moved(self._moved)
        bus.on_hint(self._hear)

    def _moved(self, watermarks: list[Watermark]) -> None:
        if self._pressure.shed("receipts", len(watermarks)):
            self._put_off(watermarks)
        else:
            self._tell_now(watermarks)

    def _put_off(self, watermarks: list[Watermark]) -> None:
        for mark in watermarks:
            key = mark.conversation_id, mark.user_id
            earlier = self._later.get(key)
            if earlier is not None:
                self._later[key] = msgspec.structs.replace(
                    mark,
                    previous_delivered_seq=earlier.previous_delivered_seq,
                    previous_read_seq=earlier.previous_read_seq,
                )
            elif len(self._later) < _MAX_LATER:
                self._later[key] = mark
            # Else it is stored, and shows on the next look.

    async def _tell_later(self) -> None:
        while self._later and not self._pressure.high:
            keys = list(self._later)[:_LATER_AT_ONCE]
            self._tell_now([self._later.pop(key) for key in keys])
            await asyncio.sleep(_LATER_PAUSE)

    def _tell_now(self, watermarks: list[Watermark]) -> None:
        for mark in watermarks:
            if mark.read_seq > mark.previous_read_seq:
                payload = {"conversation_id": mark.conversation_id, "read_seq": mark.read_seq}
                self._bus.notice([mark.user_id], "read_synced", payload)
        self._hold(self._tell_all(watermarks))

    def _hold(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell_all(self, watermarks: list[Watermark]) -> None:
        hidden = await self._read_receipts.hidden({mark.user_id for mark in watermarks})
        for mark in watermarks:
            told = await self._render(mark, hides_reading=mark.user_id in hidden)
            self._tell(mark.conversation_id, told)
            self._bus.hint(mark.conversation_id, _HINT, _encode(told))

    async def _render(self, mark: Watermark, *, hides_reading: bool) -> _Told:
        full = msgspec.json.encode(_Payload(mark.user_id, mark.delivered_seq, mark.read_seq))
        shown = full
        if not self._live.flag("receipts"):
            return _Told(mark.user_id, full, None, [])
        if hides_reading:
            if mark.delivered_seq == mark.previous_delivered_seq:
                return _Told(mark.user_id, full, None, [])
            shown = msgspec.json.encode(_Payload(mark.user_id, mark.delivered_seq, None))
        try:
            conversation = await self._directory.get(mark.conversation_id)
            if len(conversation.members) > SMALL_GROUP:
                return _Told(mark.user_id, full, None, [])
            others = [user_id for user_id in conversation.members if user_id != mark.user_id]
            apart = await self._contact.blocked(mark.user_id, others)
        except Failure as failure:
            # The watermark is stored and shows on the next look; nobody hears of it who must not.
            log.warning("receipt_not_told", code=failure.code)
            return _Told(mark.user_id, full, None, [])
        return _Told(mark.user_id, full, shown, list(apart))

    def _hear(self, conversation_id: UUID, kind: str, body: bytes) -> None:
        if kind == _HINT:
            self._tell(conversation_id, _decode(body))

    def _tell(self, conversation_id: UUID, told: _Told) -> None:
        self._rooms.push(
            conversation_id, "receipt", told.for_self, chosen=lambda user_id: user_id == told.user_id
        )
        if told.for_others is not None:
            left_out = {told.user_id, *told.apart}
            self._rooms.push(
                conversation_id, "receipt", told.for_others, chosen=lambda user_id: user_id not in left_out
            )


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Told).decode
