"""Disappearing messages: each device erases its own copy, whether or not the server is reachable then.

Seconds from the sending end on every device with the server's. Seconds from the reading begin here with the person's own
reading; the server erases its copy when everybody has read. What one has written oneself goes when the server says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final
from uuid import UUID

from whispr.client.events import ChatMessage, Notice
from whispr.client.history import History
from whispr.client.store import Store

_DUE = "expiring"
_UNREAD = "expiring_when_read"
_READ = "read_marks"
# A computer that slept does not count that time in its timers.
LOOK_AGAIN: Final = 1.0


class Expiry:
    """`now` gives epoch seconds. `watch` and `read` need an open store transaction."""

    def __init__(
        self,
        store: Store,
        history: History,
        user_id: UUID,
        *,
        notify: Callable[[Notice], None],
        now: Callable[[], float],
    ) -> None:
        self._store = store
        self._history = history
        self._user_id = user_id
        self._notify = notify
        self._now = now
        self._changed = asyncio.Event()

    def watch(self, message: ChatMessage) -> None:
        """Take note of a message that has just been kept."""
        if message.expires_in is None or message.is_deleted:
            return
        if message.expires_from == "sent":
            self._end_at(message.id, message.sent_at.timestamp() + message.expires_in)
        elif message.sender_id != self._user_id:
            if message.seq <= self._mark(message.conversation_id):
                self._end_at(message.id, self._now() + message.expires_in)
            else:
                key = f"{message.conversation_id}/{message.seq:012}/{message.id}"
                self._store.save(_UNREAD, key, message.expires_in)

    def read(self, conversation_id: UUID, seq: int) -> None:
        """The person has read everything up to `seq`, on this device or another."""
        if seq <= self._mark(conversation_id):
            return
        self._store.save(_READ, str(conversation_id), seq)
        prefix = f"{conversation_id}/"
        for key in [key for key in self._store.keys(_UNREAD) if key.startswith(prefix)]:
            _, number, message_id = key.split("/")
            if int(number) <= seq:
                seconds = self._store.load(_UNREAD, key, int) or 0
                self._store.delete(_UNREAD, key)
                self._end_at(UUID(message_id), self._now() + seconds)

    def erase_due(self) -> None:
        """Erase what has expired."""
        for key in self._store.keys(_DUE):
            deadline, message_id = key.split("/")
            if float(deadline) > self._now():
                return
            message = self._history.find(UUID(message_id))
            with self._store.transaction():
                self._store.delete(_DUE, key)
                expired = message is not None and not message.is_deleted
                if message is not None and expired:
                    self._history.erase(message)
            if message is not None and expired:
                self._notify(Notice("message_expired", {"message_id": message_id}, message.conversation_id))

    async def run(self) -> None:
        while True:
            self.erase_due()
            if self._store.keys(_DUE):
                await asyncio.sleep(LOOK_AGAIN)
            else:
                self._changed.clear()
                await self._changed.wait()

    def _mark(self, conversation_id: UUID) -> int:
        return self._store.load(_READ, str(conversation_id), int) or 0

    def _end_at(self, message_id: UUID, deadline: float) -> None:
        # Padded, so that the store's ascending order is the order of time.
        self._store.save(_DUE, f"{deadline:017.3f}/{message_id}", None)
        self._changed.set()
