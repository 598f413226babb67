"""Applies the events that change messages, so that every device comes to the same state.

The log renders a message as it is now, also in entries from before it was changed. So a device that was away may see an
edit, a reaction or a deletion first in the message and again as an event: applying an event twice, or one that
something later has overtaken, must change nothing.
"""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID

import msgspec

from whispr.client.conversations import Conversations
from whispr.client.crypto.engine import Engine
from whispr.client.events import ChatMessage
from whispr.client.history import History
from whispr.client.models import Pin

log = logging.getLogger(__name__)


class Changes:
    """Everything but new and edited messages, which need decrypting. Needs an open store transaction."""

    def __init__(self, conversations: Conversations, history: History, engine: Engine) -> None:
        self._conversations = conversations
        self._history = history
        self._engine = engine

    def apply(self, conversation_id: UUID, name: str, payload: dict[str, Any]) -> ChatMessage | None:
        """The message that was changed, as it is now."""
        try:
            if name in _ABOUT_A_MESSAGE:
                return self._message(conversation_id, name, payload)
            if name == "history_purged":
                self._history.purge(conversation_id, int(payload["until_seq"]))
                self._engine.sender_keys.purged(conversation_id, int(payload["until_seq"]))
            elif name == "member_added":
                self._conversations.change_members(conversation_id, add=UUID(payload["user_id"]))
            elif name == "member_removed":
                self._conversations.change_members(conversation_id, remove=UUID(payload["user_id"]))
                # Whoever is gone holds the key of our messages so far; it must open none of the next.
                self._engine.sender_keys.rotate(conversation_id)
        except (AttributeError, KeyError, TypeError, ValueError):
            log.warning("The server sent a %s that makes no sense.", name)
        return None

    def _message(self, conversation_id: UUID, name: str, payload: dict[str, Any]) -> ChatMessage | None:
        message_id = UUID(payload["message_id"])
        message = self._history.find(message_id)
        if message is None or message.conversation_id != conversation_id:
            return None  # from before this device may see, or purged
        if name == "message_deleted":
            return message if message.is_deleted else self._history.erase(message)
        if name == "message_unpinned":
            self._history.unpin(conversation_id, message_id)
        elif message.is_deleted:
            pass  # the entry is from before the deletion, which took all of this with it
        elif name == "message_pinned":
            pin = {**payload, "pinned_by": payload["user_id"]}
            self._history.pin(conversation_id, msgspec.convert(pin, Pin))
        else:
            user_id, present = UUID(payload["user_id"]), name == "reaction_added"
            return self._history.react(message, str(payload["reaction"]), user_id, present=present)
        return message


_ABOUT_A_MESSAGE = frozenset(
    {"message_deleted", "reaction_added", "reaction_removed", "message_pinned", "message_unpinned"}
)
