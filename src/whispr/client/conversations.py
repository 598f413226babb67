"""What the device knows of its conversations: kind, members, and how far it has come in each log."""

from __future__ import annotations

from uuid import UUID

import msgspec

from whispr.client.models import Conversation
from whispr.client.rest import RestClient
from whispr.client.store import Store

_KNOWN = "conversations"
_CURSORS = "cursors"


class KnownConversation(msgspec.Struct, frozen=True):
    id: UUID
    group: bool
    members: list[UUID]


class Cursor(msgspec.Struct, frozen=True):
    """Everything up to `seq` of the log `epoch` is kept on this device."""

    epoch: str | None = None
    seq: int = 0


class Conversations:
    """Reads and writes go to the store; `change_members` and `advance` need an open transaction."""

    def __init__(self, store: Store, rest: RestClient) -> None:
        self._store = store
        self._rest = rest

    def ids(self) -> list[UUID]:
        return [UUID(name) for name in self._store.keys(_KNOWN)]

    def get(self, conversation_id: UUID) -> KnownConversation | None:
        return self._store.load(_KNOWN, str(conversation_id), KnownConversation)

    async def load(self, conversation_id: UUID, *, again: bool = False) -> KnownConversation:
        """Known, or asked for from the server; `again` asks in any case."""
        known = self.get(conversation_id)
        if known is None or again:
            known = self.keep(await self._rest.conversation(conversation_id))
        return known

    def keep(self, conversation: Conversation) -> KnownConversation:
        members = [member.user_id for member in conversation.members or ()]
        known = KnownConversation(conversation.id, conversation.type == "group", members)
        with self._store.transaction():
            self._store.save(_KNOWN, str(conversation.id), known)
        return known

    def change_members(
        self, conversation_id: UUID, *, add: UUID | None = None, remove: UUID | None = None
    ) -> None:
        known = self.get(conversation_id)
        if known is not None:
            members = [member for member in known.members if member not in (add, remove)]
            members += [] if add is None else [add]
            self._store.save(_KNOWN, str(conversation_id), msgspec.structs.replace(known, members=members))

    def forget(self, conversation_id: UUID) -> None:
        """No longer a member. The cursor stays: whoever is added again goes on from there."""
        with self._store.transaction():
            self._store.delete(_KNOWN, str(conversation_id))

    def cursor(self, conversation_id: UUID) -> Cursor:
        return self._store.load(_CURSORS, str(conversation_id), Cursor) or Cursor()

    def advance(self, conversation_id: UUID, cursor: Cursor) -> None:
        self._store.save(_CURSORS, str(conversation_id), cursor)
