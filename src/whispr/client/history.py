"""Messages kept on the device, in the clear inside the encrypted store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from uuid import UUID

import msgspec

from whispr.client.crypto.engine import Payload
from whispr.client.events import ChatMessage, ConversationEvent
from whispr.client.models import Pin
from whispr.client.store import Store

_MESSAGES = "messages"
_PLACES = "message_places"
_SENT = "sent_payloads"
_VERSIONS = "sent_versions"
_FRANKING = "franking_keys"
_PINS = "pins"
_UNHANDED = "unhanded_events"


class History:
    """Writes need an open store transaction. `erased` is set when something must not stay in the store's file."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.erased = asyncio.Event()

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
        found = [self._store.load(_MESSAGES, place, ChatMessage) for place in self._places(conversation_id)]
        return [message for message in found if message is not None]

    # Changes

    def erase(self, message: ChatMessage) -> ChatMessage:
        """Leave nothing of a message but that there was one. Returns what is left."""
        stone = msgspec.structs.replace(
            message,
            kind="deleted",
            text=None,
            data={},
            verified=True,
            error=None,
            media_ids=[],
            edited_at=None,
            is_deleted=True,
            reactions={},
            expires_in=None,
            expires_from="sent",
            content_sha256="",
        )
        self.add(stone)
        self._forget_beside(message)
        return stone

    def purge(self, conversation_id: UUID, until_seq: int) -> None:
        """Forget every message up to `until_seq`."""
        for place in self._places(conversation_id):
            message = self._store.load(_MESSAGES, place, ChatMessage)
            if message is not None and message.seq <= until_seq:
                self._store.delete(_MESSAGES, place)
                self._store.delete(_PLACES, str(message.id))
                self._forget_beside(message)

    def react(self, message: ChatMessage, reaction: str, user_id: UUID, *, present: bool) -> ChatMessage:
        """Note that a person has, or no longer has, chosen a reaction."""
        chosen = {name: set(users) for name, users in message.reactions.items()}
        users = chosen.setdefault(reaction, set())
        (users.add if present else users.discard)(user_id)
        changed = msgspec.structs.replace(message, reactions=sorted_reactions(chosen.items()))
        self.add(changed)
        return changed

    def pin(self, conversation_id: UUID, pin: Pin) -> None:
        self._store.save(_PINS, f"{conversation_id}/{pin.message_id}", pin)

    def unpin(self, conversation_id: UUID, message_id: UUID) -> None:
        self._store.delete(_PINS, f"{conversation_id}/{message_id}")

    def pins(self, conversation_id: UUID) -> list[Pin]:
        keys = [key for key in self._store.keys(_PINS) if key.startswith(f"{conversation_id}/")]
        return [pin for pin in (self._store.load(_PINS, key, Pin) for key in keys) if pin is not None]

    # What this device sent: nobody encrypts it for the device itself.

    def keep_sent(self, client_id: UUID, payload: Payload) -> None:
        self._store.save(_SENT, str(client_id), payload)

    def keep_version(self, client_id: UUID, content_sha256: str, payload: Payload) -> None:
        """What one encryption says, where different ones under a client id may say different things."""
        self._store.save(_VERSIONS, str(client_id), {**self._versions(client_id), content_sha256: payload})

    def sent(self, client_id: UUID, content_sha256: str, *, edited: bool) -> Payload | None:
        """What this device said in a message whose present content has this digest."""
        version = self._versions(client_id).get(content_sha256)
        if version is not None or edited:
            return version
        return self._store.load(_SENT, str(client_id), Payload)

    def _versions(self, client_id: UUID) -> dict[str, Payload]:
        return self._store.load(_VERSIONS, str(client_id), dict[str, Payload]) or {}

    # What a report reveals

    def keep_franking_key(self, message_id: UUID, key: bytes) -> None:
        self._store.put(_FRANKING, str(message_id), key)

    def drop_franking_key(self, message_id: UUID) -> None:
        self._store.delete(_FRANKING, str(message_id))

    def franking_key(self, message_id: UUID) -> bytes | None:
        return self._store.get(_FRANKING, str(message_id))

    # Events that are kept but that the application has not had yet.

    def hold(self, event: ConversationEvent) -> None:
        self._store.save(_UNHANDED, f"{event.conversation_id}/{event.seq:012}", event)

    def handed(self, event: ConversationEvent) -> None:
        self._store.delete(_UNHANDED, f"{event.conversation_id}/{event.seq:012}")

    def unhanded(self) -> list[ConversationEvent]:
        found = [self._store.load(_UNHANDED, key, ConversationEvent) for key in self._store.keys(_UNHANDED)]
        return [event for event in found if event is not None]

    def _places(self, conversation_id: UUID) -> list[str]:
        prefix = f"{conversation_id}/"
        return [key for key in self._store.keys(_MESSAGES) if key.startswith(prefix)]

    def _forget_beside(self, message: ChatMessage) -> None:
        self.erased.set()
        self.unpin(message.conversation_id, message.id)
        self._store.delete(_FRANKING, str(message.id))
        self._store.delete(_SENT, str(message.client_id))
        self._store.delete(_VERSIONS, str(message.client_id))


def sorted_reactions(reactions: Iterable[tuple[str, Iterable[UUID]]]) -> dict[str, list[UUID]]:
    """By reaction, who chose it. Sorted, since the log does not tell everybody the order of first use."""
    return {name: sorted(users) for name, users in sorted(reactions, key=lambda pair: pair[0]) if users}
