"""What one can do to a message that is there: through REST, which repeats until it is answered."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from whispr.client.crypto.engine import Payload
from whispr.client.encoding import encode_base64
from whispr.client.events import ChatMessage
from whispr.client.failures import ApiError
from whispr.client.history import History
from whispr.client.models import Report
from whispr.client.rest import RestClient


class Actions:
    """Each raises ApiError when the server refuses it, Unreachable, and ApiError `message_not_found` for what is not here.

    What they change is seen by the events that follow, as on every other device.
    """

    def __init__(self, rest: RestClient, history: History) -> None:
        self._rest = rest
        self._history = history

    def known(self, message_id: UUID) -> ChatMessage:
        message = self._history.find(message_id)
        if message is None:
            raise ApiError("message_not_found", detail="This device does not have the message.")
        return message

    async def delete(self, message_id: UUID) -> None:
        """For everybody."""
        await self._rest.delete_message(message_id)

    async def react(self, message_id: UUID, reaction: str) -> None:
        """With an emoji, say. The server and all members see it: it is not encrypted."""
        await self._rest.add_reaction(message_id, reaction)

    async def unreact(self, message_id: UUID, reaction: str) -> None:
        await self._rest.remove_reaction(message_id, reaction)

    async def pin(self, message_id: UUID) -> None:
        await self._rest.pin(self.known(message_id).conversation_id, message_id)

    async def unpin(self, message_id: UUID) -> None:
        await self._rest.unpin(self.known(message_id).conversation_id, message_id)

    async def report(
        self, message_id: UUID, reason: str, *, comment: str | None = None, reveal: bool = False
    ) -> Report:
        """Tell the moderators: `spam`, `abuse`, `violence`, `illegal` or `other`.

        With `reveal` they can read this one message, and verify that it is what its sender wrote.
        """
        body: dict[str, Any] = {"reason": reason}
        if comment is not None:
            body["comment"] = comment
        if reveal:
            message = self.known(message_id)
            key = self._history.franking_key(message_id)
            if key is None:
                raise ApiError("not_franked", detail="The sender of the message made no commitment.")
            plaintext = Payload(message.kind, message.text, message.data).plaintext()
            body["reveal"] = {"plaintext": encode_base64(plaintext), "franking_key": encode_base64(key)}
        return await self._rest.report(message_id, body)
