"""Messages kept on the device, in the clear inside the encrypted store."""

from __future__ import annotations

from uuid import UUID

from whispr.client.crypto.engine import Payload
from whispr.client.events import ChatMessage, ConversationEvent
from whispr.client.store import Store

_MESSAGES = "messages"
_PLACES = "message_places"
_SENT = "sent_payloads"
_UNHANDED = "unhanded_events"


class History:
    """Writes need an open store transaction."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, message: ChatMessage) -> None:
        # The id is part of the key: a server restored from a backup numbers other messages with the same seq.
        place = f"{message.conversation_id}/{message.seq:012}/{message.id}"
        self._store.save(_MESSAGES, place, message)
        self._store.save(_PLACES, str(message.id), place)

    def find(self, message_id: UUID) -> ChatMessage | None:
        place = self._store.load(_PLACES, str(message_id), str)
        return None if place is None else self._store.load(_MESSAGES, place, ChatMessage)

    def messages(self, conversation_id: UUID) -> list[ChatMessage]:
        """In order of `seq`."""
        prefix = f"{conversation_id}/"
        places = [key for key in self._store.keys(_MESSAGES) if key.startswith(prefix)]
        found = [self._store.load(_MESSAGES, place, ChatMessage) for place in places]
        return [message for message in found if message is not None]

    # What this device sent: nobody encrypts it for the device itself.

    def keep_sent(self, client_id: UUID, payload: Payload) -> None:
        self._store.save(_SENT, str(client_id), payload)

    def sent(self, client_id: UUID) -> Payload | None:
        return self._store.load(_SENT, str(client_id), Payload)

    # Events that are kept but that the application has not had yet.

    def hold(self, event: ConversationEvent) -> None:
        self._store.save(_UNHANDED, f"{event.conversation_id}/{event.seq:012}", event)

    def handed(self, event: ConversationEvent) -> None:
        self._store.delete(_UNHANDED, f"{event.conversation_id}/{event.seq:012}")

    def unhanded(self) -> list[ConversationEvent]:
        found = [self._store.load(_UNHANDED, key, ConversationEvent) for key in self._store.keys(_UNHANDED)]
        return [event for event in found if event is not None]
