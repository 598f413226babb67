"""The one encoder of what clients see of the log, for every door."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

import msgspec

from whispr.services.messaging.models.records import CommittedEvent, Content, Message, MessageHead

_encode = msgspec.json.Encoder().encode


class _StoredContent(msgspec.Struct):
    envelopes: dict[str, msgspec.Raw] | None = None
    commitment: str | None = None


class _Named(msgspec.Struct):
    id: UUID


class _Edited(msgspec.Struct):
    message: _Named


_decode_content = msgspec.json.Decoder(_StoredContent).decode
_decode_edited = msgspec.json.Decoder(_Edited).decode


def split_content(content: bytes) -> Content:
    """Prepare stored content for delivery: an envelope is cut out for each device without parsing its body."""
    stored = _decode_content(content)
    if stored.envelopes is None:
        return Content(shared=content, envelopes=None)
    commitment = b"" if stored.commitment is None else b',"commitment":"%b"' % stored.commitment.encode()
    return Content(
        shared=None,
        envelopes={
            device: b'{"envelopes":{"%b":%b}%b}' % (device.encode(), envelope, commitment)
            for device, envelope in stored.envelopes.items()
        },
    )


def expires_from(expires_in: int | None, from_read: bool) -> Literal["sent", "read"] | msgspec.UnsetType:
    """When a message's seconds begin; unset for one that does not expire."""
    if expires_in is None:
        return msgspec.UNSET
    return "read" if from_read else "sent"


def encode_head(head: MessageHead) -> bytes:
    """MESSAGE without its content, as JSON."""
    return _encode(head)


def message_event(message: Message) -> CommittedEvent:
    """The `new_message` entry of the log for a stored message."""
    head = message.head
    return CommittedEvent(
        conversation_id=head.conversation_id,
        seq=head.seq,
        event="new_message",
        payload=encode_head(head),
        content=split_content(message.content),
    )


def edited_event(seq: int, message: Message) -> CommittedEvent:
    """The `message_edited` entry `seq` of the log, with the message as it is now."""
    head = message.head
    return CommittedEvent(
        conversation_id=head.conversation_id,
        seq=seq,
        event="message_edited",
        payload=b'{"seq":%d,"message":%b}' % (seq, encode_head(head)),
        content=split_content(message.content),
        message_seq=head.seq,
    )


def unseen_event(conversation_id: UUID, seq: int, message_id: UUID) -> CommittedEvent:
    """What stands in the log for an edit of a message that is purged, or that the reader may not see."""
    payload = _encode({"seq": seq, "message_id": message_id, "deleted_by": None})
    return CommittedEvent(conversation_id, seq, "message_deleted", payload)


def seen_above(event: CommittedEvent, floor_seq: int) -> CommittedEvent:
    """The event for a person who sees what is above `floor_seq`."""
    if event.message_seq == 0 or event.message_seq > floor_seq:
        return event
    return unseen_event(event.conversation_id, event.seq, _decode_edited(event.payload).message.id)


def render_payload(event: CommittedEvent, device_id: UUID) -> bytes:
    """The JSON of an event's payload as one device gets it."""
    if event.content is None:
        return event.payload
    content = event.content.for_device(device_id)
    if event.message_seq:
        return b'%b,"content":%b}}' % (event.payload[:-2], content)
    return b'%b,"content":%b}' % (event.payload[:-1], content)


def render_event(event: CommittedEvent, device_id: UUID) -> bytes:
    """EVENT, `{seq, event, payload}`, as one device gets it."""
    return b'{"seq":%d,"event":"%b","payload":%b}' % (
        event.seq,
        event.event.encode(),
        render_payload(event, device_id),
    )


def render_message(message: Message, device_id: UUID) -> bytes:
    """MESSAGE as one device gets it."""
    return render_payload(message_event(message), device_id)
