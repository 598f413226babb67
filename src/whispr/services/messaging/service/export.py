"""Everything that messaging keeps of one person, as lines of JSON.

It is written while it is read: one page is in memory at a time, no connection is held between pages, and each page of a
conversation asks again whether the person is still in it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar
from uuid import UUID

import msgspec

from whispr.kit.cache import RateLimiter
from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.kit.errors import Failure
from whispr.kit.telemetry import get_logger
from whispr.services.messaging.models import (
    ConversationNotFound,
    ConversationView,
    Membership,
    MessagesPage,
    render_message,
)
from whispr.services.messaging.store import export as store

log = get_logger(__name__)

VERSION: Final = 1
EXPORTS_PER_DAY: Final = 5

# A message may hold 96 KiB.
_MESSAGES_AT_ONCE: Final = 50
_ROWS_AT_ONCE: Final = 200
_FIRST: Final = UUID(int=0)

_encode = msgspec.json.Encoder().encode
Row = TypeVar("Row", bound=store.ScheduledMessage | store.Report)


class Readers(Protocol):
    """The membership check."""

    async def reader(self, conversation_id: UUID, user_id: UUID) -> Membership:
        """Proof of membership, read now. Raises `ConversationNotFound`."""


class Messages(Protocol):
    """The reading of messages."""

    async def messages(
        self,
        membership: Membership,
        *,
        after_seq: int | None = None,
        before_seq: int | None = None,
        limit: int = 50,
    ) -> MessagesPage:
        """Messages in `seq` order that the member may see."""


class Views(Protocol):
    """Conversations as a person sees them."""

    async def get(self, conversation_id: UUID, user_id: UUID) -> ConversationView:
        """One conversation. Raises `ConversationNotFound`."""


class Export:
    """The person's own data and what they can read; nothing that only others can."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        readers: Readers,
        messages: Messages,
        views: Views,
        limiter: RateLimiter,
    ) -> None:
        self._db = db
        self._clock = clock
        self._readers = readers
        self._messages = messages
        self._views = views
        self._limiter = limiter

    async def begin(self, user_id: UUID, device_id: UUID) -> AsyncIterator[bytes]:
        """The lines of an export, each ended by a newline. Raises `RateLimited`.

        The last one has the type `end` and says whether the export `is_complete`; one without it was cut off.
        """
        await self._limiter.check("export", str(user_id), EXPORTS_PER_DAY, 24 * 3600)
        return self._lines(user_id, device_id)

    async def _lines(self, user_id: UUID, device_id: UUID) -> AsyncIterator[bytes]:
        count = 0
        end: dict[str, Any] = {"type": "end", "is_complete": True}
        try:
            async for line in self._content(user_id, device_id):
                count += 1
                yield line + b"\n"
        except Failure as failure:
            # The answer has begun long ago: only its own last line can tell.
            log.warning("export_cut_off", code=failure.code, lines=count)
            end = {"type": "end", "is_complete": False, "code": failure.code}
        yield _encode({**end, "lines": count}) + b"\n"

    async def _content(self, user_id: UUID, device_id: UUID) -> AsyncIterator[bytes]:
        yield _encode(
            {
                "type": "export",
                "version": VERSION,
                "user_id": user_id,
                "device_id": device_id,
                "exported_at": self._clock.now(),
            }
        )
        after = _FIRST
        while True:
            async with self._db.connection() as connection:
                page = await store.memberships(connection, user_id, after, _ROWS_AT_ONCE)
            for membership in page:
                yield _encode(membership)
                if membership.left_at is None:
                    async for line in self._conversation(membership.conversation_id, user_id, device_id):
                        yield line
            if len(page) < _ROWS_AT_ONCE:
                break
            after = page[-1].conversation_id
        async for row in self._pages(user_id, store.scheduled_messages):
            yield _encode(row)
        async for report in self._pages(user_id, store.reports):
            yield _encode(report)
        async for line in self._rest(user_id):
            yield line

    async def _conversation(
        self, conversation_id: UUID, user_id: UUID, device_id: UUID
    ) -> AsyncIterator[bytes]:
        """A conversation, its pins and its messages, as far as the person gets before they are removed."""
        try:
            view = await self._views.get(conversation_id, user_id)
            yield _encode({"type": "conversation", "conversation": _shown(view)})
            async with self._db.connection() as connection:
                pins = await store.pins(connection, conversation_id, user_id)
            for pin in pins:
                yield _encode(pin)
            after = 0
            while True:
                membership = await self._readers.reader(conversation_id, user_id)
                page = await self._messages.messages(membership, after_seq=after, limit=_MESSAGES_AT_ONCE)
                for message in page.items:
                    yield b'{"type":"message","message":%b}' % render_message(message, device_id)
                if len(page.items) < _MESSAGES_AT_ONCE:
                    return
                after = page.items[-1].head.seq
        except ConversationNotFound:
            return

    async def _pages(
        self, user_id: UUID, read: Callable[[Connection, UUID, UUID, int], Awaitable[list[Row]]]
    ) -> AsyncIterator[Row]:
        after = _FIRST
        while True:
            async with self._db.connection() as connection:
                page = await read(connection, user_id, after, _ROWS_AT_ONCE)
            for row in page:
                yield row
            if len(page) < _ROWS_AT_ONCE:
                return
            after = page[-1].id

    async def _rest(self, user_id: UUID) -> AsyncIterator[bytes]:
        async with self._db.connection() as connection:
            restriction = await store.restriction(connection, user_id)
        if restriction is not None:
            yield _encode(restriction)
        after = (_FIRST, _FIRST)
        while True:
            async with self._db.connection() as connection:
                page = await store.cursors(connection, user_id, after, _ROWS_AT_ONCE)
            for cursor in page:
                yield _encode(cursor)
            if len(page) < _ROWS_AT_ONCE:
                return
            after = (page[-1].device_id, page[-1].conversation_id)


def _shown(view: ConversationView) -> dict[str, Any]:
    return {
        "id": view.id,
        "type": view.type,
        "metadata": view.metadata,
        "is_active": view.is_active,
        "permissions": view.permissions.filled(),
        "retention_seconds": view.retention_seconds,
        "created_by": view.created_by,
        "created_at": view.created_at,
        "updated_at": view.updated_at,
        "head_seq": view.head_seq,
        "members": view.members,
    }
