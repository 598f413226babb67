"""Answers written straight to JSON: what messages hold is never parsed on its way out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

import msgspec
from fastapi import Response

from whispr.services.messaging.models import (
    ConversationView,
    EventsPage,
    MessagesPage,
    Pin,
    render_event,
    render_message,
)


def json_answer(body: Any, status: int = 200) -> Response:
    """`body` as JSON; bytes are JSON already."""
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return Response(data, status, media_type="application/json")


def conversation(view: ConversationView, device_id: UUID) -> dict[str, Any]:
    """CONVERSATION for one device."""
    last = view.last_message
    return {
        **msgspec.structs.asdict(view),
        "permissions": view.permissions.filled(),
        "last_message": None if last is None else msgspec.Raw(render_message(last, device_id)),
    }


def pin(item: Pin, device_id: UUID) -> dict[str, Any]:
    """A pinned message for one device."""
    return {
        "message_id": item.message.head.id,
        "pinned_by": item.pinned_by,
        "pinned_at": item.pinned_at,
        "message": msgspec.Raw(render_message(item.message, device_id)),
    }


def messages(page: MessagesPage, device_id: UUID) -> bytes:
    """`{items, head_seq}` for one device."""
    items = _joined(render_message(message, device_id) for message in page.items)
    return b'{"items":[%b],"head_seq":%d}' % (items, page.head_seq)


def events(page: EventsPage, device_id: UUID) -> bytes:
    """`{epoch, items, head_seq, more}` for one device."""
    items = _joined(render_event(event, device_id) for event in page.items)
    return b'{"epoch":"%b","items":[%b],"head_seq":%d,"more":%b}' % (
        str(page.epoch).encode(),
        items,
        page.head_seq,
        b"true" if page.more else b"false",
    )


def _joined(parts: Iterable[bytes]) -> bytes:
    return b",".join(parts)
