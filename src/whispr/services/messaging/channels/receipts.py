"""Telling of watermarks that moved: the others in the conversation, and the person's own devices."""

from __future__ import annotations

import asyncio
from typing import Final
from uuid import UUID

import msgspec

from whispr.kit.errors import Failure
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
    """

    def __init__(
        self,
        receipts: Receipts,
        rooms: Rooms,
        bus: EventBus,
        directory: Directory,
        contact: Contact,
        read_receipts: ReadReceipts,
    ) -> None:
        self._rooms = rooms
        self._bus = bus
        self._directory = directory
        self._contact = contact
        self._read_receipts = read_receipts
        self._tasks: set[asyncio.Task[None]] = set()
        receipts.on_moved(self._moved)
        bus.on_hint(self._hear)

    def _moved(self, watermarks: list[Watermark]) -> None:
        for mark in watermarks:
            if mark.read_seq > mark.previous_read_seq:
                payload = {"conversation_id": mark.conversation_id, "read_seq": mark.read_seq}
                self._bus.notice([mark.user_id], "read_synced", payload)
        task = asyncio.get_running_loop().create_task(self._tell_all(watermarks))
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
