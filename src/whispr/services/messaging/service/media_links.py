"""Messages and media: telling media what is referred to, and who may see what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol
from uuid import UUID, uuid5

import msgspec

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.outbox import Handler, OutboxRow
from whispr.services.messaging.store import media_links as store

MEDIA_LINKED = "media_linked"
"""Topic of the rows that tell which media new messages refer to."""

MEDIA_UNLINKED = "media_unlinked"
"""Topic of the rows that tell which messages are gone."""

MAX_MEDIA = 20_000
_OPERATIONS = UUID("5f0c7f3e-52d4-4a4c-8c0e-6a5d3b6b5a11")


class MediaLink(msgspec.Struct, frozen=True):
    """A message and the media of its sender's that it refers to."""

    message_id: UUID
    conversation_id: UUID
    sender_id: UUID
    media_ids: tuple[UUID, ...]


class LinkedMedia(Protocol):
    """The part of media this needs."""

    async def link(self, operation_id: UUID, links: Sequence[MediaLink]) -> None:
        """These messages refer to media; the same again changes nothing."""

    async def unlink(self, operation_id: UUID, links: Sequence[MediaLink]) -> None:
        """These messages do not any more, for good."""


class _Links(msgspec.Struct):
    links: list[MediaLink]


class MediaLinks:
    """The outbox handlers. A row handled twice tells media what it knows already."""

    def __init__(self, media: LinkedMedia) -> None:
        self._media = media

    def handlers(self) -> dict[str, Handler]:
        """By topic."""
        return {MEDIA_LINKED: self.linked, MEDIA_UNLINKED: self.unlinked}

    async def linked(self, rows: list[OutboxRow]) -> None:
        """Tell of new messages."""
        for links in _calls(rows):
            await self._media.link(_operation(MEDIA_LINKED, links), links)

    async def unlinked(self, rows: list[OutboxRow]) -> None:
        """Tell of messages that are gone."""
        for links in _calls(rows):
            await self._media.unlink(_operation(MEDIA_UNLINKED, links), links)


class MediaAccess:
    """Who may see a medium that somebody else owns."""

    def __init__(self, db: Database, clock: Clock) -> None:
        self._db = db
        self._clock = clock

    async def may_see(self, user_id: UUID, media_id: UUID, owner_id: UUID) -> bool:
        """Whether the owner sent the medium in a message that the person can read now.

        Only the owner's own message counts: an id of somebody else's medium in one's own message opens nothing.
        """
        async with self._db.connection() as connection:
            return await store.may_see(connection, media_id, owner_id, user_id, self._clock.now())


def _calls(rows: Iterable[OutboxRow]) -> Iterator[list[MediaLink]]:
    # A call carries at most a few megabytes, and a message up to a hundred media.
    links: list[MediaLink] = []
    media = 0
    for row in rows:
        for link in msgspec.convert(row.payload, _Links).links:
            if links and media + len(link.media_ids) > MAX_MEDIA:
                yield links
                links, media = [], 0
            links.append(link)
            media += len(link.media_ids)
    if links:
        yield links


def _operation(topic: str, links: Sequence[MediaLink]) -> UUID:
    return uuid5(_OPERATIONS, f"{topic}:{links[0].message_id}:{links[-1].message_id}:{len(links)}")
