"""How the other services call `media`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from whispr.contracts import media_pb2, media_pb2_grpc
from whispr.kit.grpc import Channel


@dataclass(frozen=True, slots=True)
class MediaLink:
    """A message that refers to media of its sender's."""

    message_id: UUID
    conversation_id: UUID
    sender_id: UUID
    media_ids: tuple[UUID, ...]


class MediaClient:
    """`media.MediaService`. Every method raises the failure that `media` raised, or `Unavailable`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._stub = media_pb2_grpc.MediaServiceStub(channel.grpc)

    async def link_media(
        self, operation_id: UUID, *, links: Sequence[MediaLink] = (), unlinks: Sequence[MediaLink] = ()
    ) -> None:
        """Tell which messages refer to media, and which do not any more. May be repeated, in any order."""
        request = media_pb2.LinkMediaRequest(
            operation_id=str(operation_id),
            links=[_link(link) for link in links],
            unlinks=[_link(link) for link in unlinks],
        )
        await self._channel.call(self._stub.LinkMedia, request, timeout=10.0, idempotent=True)


def _link(link: MediaLink) -> media_pb2.MediaLink:
    return media_pb2.MediaLink(
        message_id=str(link.message_id),
        conversation_id=str(link.conversation_id),
        sender_id=str(link.sender_id),
        media_ids=[str(media_id) for media_id in link.media_ids],
    )
