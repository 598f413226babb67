"""Messages that the server sends later.

They are encrypted when they are scheduled, for the devices there are then and pairwise where that fits: sender keys are
replaced too often to wait for weeks. When devices come or go before the time, the server says `needs_reencrypt`, and this
device, which keeps what it scheduled, encrypts anew under the same client id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any, Final
from uuid import UUID, uuid4

import msgspec

from whispr.client.crypto.engine import DistributionNeeded, Payload, Sealed
from whispr.client.encoding import encode_base64
from whispr.client.events import Notice
from whispr.client.failures import ApiError, ClientError
from whispr.client.history import History
from whispr.client.outbox import Expires, Outbox, beside, digest_of
from whispr.client.rest import RestClient
from whispr.client.store import Store

log = logging.getLogger(__name__)

_SPACE: Final = "scheduled"
_MAX_ROUNDS: Final = 10


class Waiting(msgspec.Struct, frozen=True):
    """What this device has scheduled. `id` is None until the server has it; `sealed` is what the server is to get then."""

    conversation_id: UUID
    client_id: UUID
    payload: Payload
    send_at: datetime
    reply_to_id: UUID | None = None
    expires: Expires | None = None
    sealed: Sealed | None = None
    id: UUID | None = None


class Schedule:
    def __init__(
        self,
        store: Store,
        outbox: Outbox,
        history: History,
        rest: RestClient,
        notify: Callable[[Notice], None],
    ) -> None:
        self._store = store
        self._outbox = outbox
        self._history = history
        self._rest = rest
        self._notify = notify
        # One at a time: an answer to `needs_reencrypt` must not cross a change of the same message.
        self._busy = asyncio.Lock()

    async def add(
        self,
        conversation_id: UUID,
        payload: Payload,
        send_at: datetime,
        *,
        reply_to_id: UUID | None = None,
        expires: Expires | None = None,
    ) -> UUID:
        """Schedule a message. Returns the server's id for it. Raises ApiError, Unreachable.

        When the answer is lost and the process ends, the message is scheduled after the next connection.
        """
        item = Waiting(conversation_id, uuid4(), payload, send_at, reply_to_id, expires)
        async with self._busy:
            return await self._add(item)

    async def change(
        self, scheduled_id: UUID, *, payload: Payload | None = None, send_at: datetime | None = None
    ) -> None:
        """Another text, another time. Raises ApiError (`already_sent`), Unreachable."""
        async with self._busy:
            item = self._find(scheduled_id)
            body: dict[str, Any] = {} if send_at is None else {"send_at": send_at.isoformat()}
            if payload is None:
                await self._rest.change_scheduled(scheduled_id, body)
            elif item is None:
                raise ApiError("not_scheduled_here", detail="Another device scheduled the message.")
            else:
                item = msgspec.structs.replace(item, payload=payload)
                await self._seal_and(item, lambda content: self._change(scheduled_id, {**body, **content}))
            if item is not None:
                self._keep(msgspec.structs.replace(item, send_at=send_at or item.send_at, sealed=None))

    async def cancel(self, scheduled_id: UUID) -> None:
        """Raises ApiError (`already_sent`), Unreachable."""
        async with self._busy:
            await self._rest.cancel_scheduled(scheduled_id)
            item = self._find(scheduled_id)
            if item is not None:
                self._forget(item.client_id)

    def ids(self) -> list[UUID]:
        """Of what this device has scheduled and the server has not sent."""
        items = [self._store.load(_SPACE, key, Waiting) for key in self._store.keys(_SPACE)]
        return [item.id for item in items if item is not None and item.id is not None]

    def sent(self, client_id: UUID) -> None:
        """The log has a message of this device."""
        if self._store.get(_SPACE, str(client_id)) is not None:
            self._forget(client_id)

    async def resume(self) -> None:
        """After connecting: schedule what an earlier run could not, and encrypt anew what devices have changed for."""
        for key in self._store.keys(_SPACE):
            async with self._busy:
                item = self._store.load(_SPACE, key, Waiting)
                if item is not None and item.id is None:
                    try:
                        await self._add(item)
                    except ApiError as error:
                        if error.passing:
                            raise
        if not self._store.keys(_SPACE):
            return
        async for scheduled in self._rest.scheduled_messages("needs_reencrypt"):
            await self.encrypt_anew(scheduled.id, scheduled.needs or {})

    async def encrypt_anew(self, scheduled_id: UUID, needs: Mapping[str, Any]) -> None:
        """Follow the server's `needs_reencrypt {missing, extra, stale, owners}`, if this device scheduled the message."""
        async with self._busy:
            item = self._find(scheduled_id)
            if item is None:
                return
            await self._outbox.reconcile(item.conversation_id, needs)
            try:
                await self._seal_and(item, lambda content: self._change(scheduled_id, content))
            except ApiError as error:
                if error.passing:
                    raise
                # Another device was faster, or the message is cancelled or sent.
                log.info("A scheduled message could not be encrypted anew: %s", error)

    async def _add(self, item: Waiting) -> UUID:
        async def schedule(content: dict[str, Any]) -> UUID:
            return await self._rest.schedule_message(
                {
                    "conversation_id": str(item.conversation_id),
                    "client_id": str(item.client_id),
                    "message_type": "text",
                    "send_at": item.send_at.isoformat(),
                    **content,
                    **beside(item.reply_to_id, item.expires),
                }
            )

        try:
            scheduled_id = await self._seal_and(item, schedule)
        except ApiError as error:
            if not error.passing:
                self._forget(item.client_id)
                said = {"client_id": str(item.client_id), "error": str(error)}
                self._notify(Notice("send_failed", said, item.conversation_id))
            raise
        self._keep(msgspec.structs.replace(item, id=scheduled_id, sealed=None))
        return scheduled_id

    async def _change(self, scheduled_id: UUID, body: dict[str, Any]) -> UUID:
        await self._rest.change_scheduled(scheduled_id, body)
        return scheduled_id

    async def _seal_and(self, item: Waiting, call: Callable[[dict[str, Any]], Awaitable[UUID]]) -> UUID:
        """Encrypt and call, and again as long as the server names other devices."""

        def keep(sealed: Sealed) -> None:
            self._store.save(_SPACE, str(item.client_id), msgspec.structs.replace(item, sealed=sealed))
            self._history.keep_version(item.client_id, digest_of(sealed), item.payload)

        sealed = item.sealed
        for _ in range(_MAX_ROUNDS):
            try:
                sealed = sealed or await self._outbox.seal(
                    item.conversation_id, item.client_id, item.payload, keep, pairwise=True
                )
                signature = encode_base64(sealed.signature)
                return await call({"content": sealed.content, "signature": signature})
            except DistributionNeeded:
                await self._outbox.distribute(item.conversation_id)
            except ApiError as error:
                if error.code != "devices_mismatch":
                    raise
                sealed = None
                await self._outbox.reconcile(item.conversation_id, error.fields)
        raise ClientError("the server and this device do not agree on the devices")

    def _find(self, scheduled_id: UUID) -> Waiting | None:
        for key in self._store.keys(_SPACE):
            item = self._store.load(_SPACE, key, Waiting)
            if item is not None and item.id == scheduled_id:
                return item
        return None

    def _keep(self, item: Waiting) -> None:
        with self._store.transaction():
            # It may have been sent while the answer was on its way.
            if self._store.get(_SPACE, str(item.client_id)) is not None:
                self._store.save(_SPACE, str(item.client_id), item)

    def _forget(self, client_id: UUID) -> None:
        with self._store.transaction():
            self._store.delete(_SPACE, str(client_id))
