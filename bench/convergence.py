"""A conversation as a device that follows its events has it, to be compared with what a fresh fetch brings."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import msgspec

from whispr.client.models import Content, LogEvent, Message


class _Edited(msgspec.Struct):
    message: Message


class _About(msgspec.Struct):
    message_id: UUID
    user_id: UUID | None = None
    reaction: str = ""


class Copy:
    """Messages in their present state, by the events that were applied, each once and in order."""

    def __init__(self) -> None:
        self._messages: dict[UUID, dict[str, Any]] = {}

    def apply(self, event: LogEvent) -> None:
        """Take one event; those that are not about messages change nothing."""
        handle = _HANDLERS.get(event.event)
        if handle is not None:
            handle(self, event.payload)

    def messages(self) -> dict[UUID, dict[str, Any]]:
        """The parts that must be alike, by message."""
        return self._messages

    def _message(self, payload: msgspec.Raw) -> None:
        message = msgspec.json.decode(payload, type=Message)
        self._messages[message.id] = portrait(message)

    def _edited(self, payload: msgspec.Raw) -> None:
        message = msgspec.json.decode(payload, type=_Edited).message
        self._messages[message.id] = portrait(message)

    def _deleted(self, payload: msgspec.Raw) -> None:
        message_id = msgspec.json.decode(payload, type=_About).message_id
        if message_id in self._messages:
            self._messages[message_id] |= {
                "is_deleted": True,
                "signature": "",
                "content": _NO_CONTENT,
                "reactions": {},
            }

    def _reacted(self, payload: msgspec.Raw) -> None:
        about = msgspec.json.decode(payload, type=_About)
        message = self._messages.get(about.message_id)
        if message is not None and not message["is_deleted"] and about.user_id is not None:
            people = message["reactions"].setdefault(about.reaction, set())
            people.add(about.user_id)

    def _unreacted(self, payload: msgspec.Raw) -> None:
        about = msgspec.json.decode(payload, type=_About)
        reactions = self._messages.get(about.message_id, {}).get("reactions", {})
        people = reactions.get(about.reaction, set())
        people.discard(about.user_id)
        if not people:
            reactions.pop(about.reaction, None)


_HANDLERS = {
    "new_message": Copy._message,  # noqa: SLF001 - the table of this class
    "message_edited": Copy._edited,  # noqa: SLF001
    "message_deleted": Copy._deleted,  # noqa: SLF001
    "reaction_added": Copy._reacted,  # noqa: SLF001
    "reaction_removed": Copy._unreacted,  # noqa: SLF001
}

LOGGED = frozenset(
    {
        *_HANDLERS,
        "message_pinned",
        "message_unpinned",
        "member_added",
        "member_removed",
        "member_updated",
        "conversation_updated",
        "history_purged",
    }
)
"""Events with a `seq`."""


def portrait(message: Message) -> dict[str, Any]:
    """What must be the same for everybody who asks: not times, and reactions without the order of people."""
    return {
        "seq": message.seq,
        "client_id": message.client_id,
        "is_deleted": message.is_deleted,
        "signature": message.signature,
        "content": msgspec.json.encode(message.content),
        "reactions": {item.reaction: set(item.user_ids) for item in message.reactions},
    }


_NO_CONTENT = msgspec.json.encode(Content())
