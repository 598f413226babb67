"""How events, hints and notices travel between nodes."""

from __future__ import annotations

from uuid import UUID

import msgspec

from whispr.kit.ids import id_of
from whispr.services.messaging.models import CommittedEvent, Content


class PackedEvent(msgspec.Struct, array_like=True, gc=False):
    """A `CommittedEvent`; ids as their 16 bytes, devices as their text."""

    conversation: bytes
    seq: int
    event: str
    payload: bytes
    shared: bytes | None
    envelopes: dict[str, bytes] | None
    message_seq: int = 0


class PackedHint(msgspec.Struct, array_like=True, gc=False):
    """Something about a conversation that may be lost."""

    conversation: bytes
    kind: str
    body: bytes


class PackedBatch(msgspec.Struct, array_like=True):
    """What one node tells of one shard at once."""

    events: list[PackedEvent]
    hints: list[PackedHint]


class Notice(msgspec.Struct):
    """`user:notices`: push `event` on the channels of a person or several, or of one device. `node` is ours, if it is."""

    event: str
    payload: msgspec.Raw
    user_id: UUID | None = None
    user_ids: list[UUID] = []
    device_id: UUID | None = None
    node: str = ""


encode_batch = msgspec.msgpack.Encoder().encode
decode_batch = msgspec.msgpack.Decoder(PackedBatch).decode
decode_notice = msgspec.json.Decoder(Notice).decode


def pack(event: CommittedEvent) -> PackedEvent:
    """For the way."""
    content = event.content
    if content is None:
        return PackedEvent(event.conversation_id.bytes, event.seq, event.event, event.payload, None, None)
    return PackedEvent(
        event.conversation_id.bytes,
        event.seq,
        event.event,
        event.payload,
        content.shared,
        content.envelopes,
        event.message_seq,
    )


def unpack(packed: PackedEvent) -> CommittedEvent:
    """As it was."""
    content = None
    if packed.shared is not None or packed.envelopes is not None:
        content = Content(packed.shared, packed.envelopes)
    return CommittedEvent(
        id_of(packed.conversation), packed.seq, packed.event, packed.payload, content, packed.message_seq
    )
