"""Sends messages and edits until the server has acknowledged them, each exactly once, in order within a conversation.

A message is kept with its client id before anything else happens, and again once it is encrypted, together with the
ratchets' new state. Only then is it sent. Whatever is lost after that, the same bytes are sent again under the
same client id; the server stores them once. When the server refuses because devices have come or gone, nothing
was stored, and the message is encrypted anew for the devices there are.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any, Final
from uuid import UUID, uuid4

import msgspec

from whispr.client.backoff import Backoff
from whispr.client.conversations import Conversations
from whispr.client.crypto.engine import BundleNeeded, DistributionNeeded, Engine, Payload, Sealed
from whispr.client.crypto.signing import content_sha256
from whispr.client.devices import Devices
from whispr.client.encoding import encode_base64
from whispr.client.events import ChatMessage, Notice
from whispr.client.failures import ApiError, ClientError, Unreachable
from whispr.client.history import History
from whispr.client.models import Sent
from whispr.client.store import Store

log = logging.getLogger(__name__)

_SPACE: Final = "outbox"
# Devices may come and go while we encrypt; but a server that never agrees must not keep us busy for ever.
_MAX_ROUNDS: Final = 10

Push = Callable[[UUID, str, dict[str, Any]], Awaitable[msgspec.Raw]]


class Expires(msgspec.Struct, frozen=True):
    """`seconds` after it was sent, or after it was read (`start` "sent" or "read"), a message is erased."""

    seconds: int
    start: str = "sent"


class Edited(msgspec.Struct, frozen=True):
    """The message an edit is of."""

    message_id: UUID
    seq: int
    sent_at: datetime


class Outgoing(msgspec.Struct):
    """A message or an edit that is not acknowledged yet. `number` keeps the order."""

    number: int
    conversation_id: UUID
    client_id: UUID
    payload: Payload
    message_type: str = "text"
    reply_to_id: UUID | None = None
    sealed: Sealed | None = None
    expires: Expires | None = None
    edits: Edited | None = None


class Outbox:
    """`push(conversation_id, event, payload)` sends on the conversation's channel and gives the reply."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        devices: Devices,
        conversations: Conversations,
        history: History,
        *,
        push: Push,
        notify: Callable[[Notice], None],
    ) -> None:
        self._store = store
        self._engine = engine
        self._devices = devices
        self._conversations = conversations
        self._history = history
        self._push = push
        self._notify = notify
        self._queues: dict[UUID, deque[Outgoing]] = {}
        self._workers: dict[UUID, asyncio.Task[None]] = {}
        self._answers: dict[int, asyncio.Future[Sent]] = {}
        self._seen: dict[UUID, asyncio.Event] = {}
        self._backoff = Backoff(base=0.2, cap=10.0)

    def start(self) -> None:
        """Go on with what an earlier run left."""
        for key in self._store.keys(_SPACE):
            item = self._store.load(_SPACE, key, Outgoing)
            if item is not None and item.number not in self._answers:
                self._enqueue(item)

    async def stop(self) -> None:
        workers = list(self._workers.values())
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        for answer in self._answers.values():
            answer.cancel()
        self._queues.clear()
        self._answers.clear()

    def send(
        self,
        conversation_id: UUID,
        payload: Payload,
        *,
        message_type: str = "text",
        reply_to_id: UUID | None = None,
        client_id: UUID | None = None,
        expires: Expires | None = None,
    ) -> asyncio.Future[Sent]:
        """Keep the message and send it as soon as it can be. The future has the server's receipt or what it refused."""
        item = Outgoing(
            self._next_number(),
            conversation_id,
            client_id or uuid4(),
            payload,
            message_type,
            reply_to_id,
            expires=expires,
        )
        with self._store.transaction():
            self._keep(item)
            self._history.keep_sent(item.client_id, payload)
        return self._enqueue(item)

    def edit(self, message: ChatMessage, payload: Payload) -> asyncio.Future[Sent]:
        """Give a message of one's own new content, in its turn behind what waits to be sent already."""
        item = Outgoing(
            self._next_number(),
            message.conversation_id,
            message.client_id,
            payload,
            edits=Edited(message.id, message.seq, message.sent_at),
        )
        with self._store.transaction():
            self._keep(item)
        return self._enqueue(item)

    def seen(self, client_id: UUID) -> None:
        """The log has a message of this device: it is stored, whatever became of the reply."""
        event = self._seen.get(client_id)
        if event is not None:
            event.set()

    # One worker a conversation, so that its messages keep their order.

    def _enqueue(self, item: Outgoing) -> asyncio.Future[Sent]:
        future: asyncio.Future[Sent] = asyncio.get_running_loop().create_future()
        # A failure is told by a notice too; nobody has to wait for the future.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._answers[item.number] = future
        self._queues.setdefault(item.conversation_id, deque()).append(item)
        if item.conversation_id not in self._workers:
            self._workers[item.conversation_id] = asyncio.create_task(self._work(item.conversation_id))
        return future

    async def _work(self, conversation_id: UUID) -> None:
        queue = self._queues[conversation_id]
        try:
            while queue:
                await self._finish(queue[0])
                queue.popleft()
        finally:
            del self._workers[conversation_id]

    async def _finish(self, item: Outgoing) -> None:
        future = self._answers.pop(item.number)
        try:
            sent = await self._deliver(item)
        except asyncio.CancelledError:
            future.cancel()
            raise
        except ClientError as error:
            with self._store.transaction():
                self._store.delete(_SPACE, _key(item))
            self._notify(
                Notice(
                    "send_failed",
                    {"client_id": str(item.client_id), "error": str(error)},
                    item.conversation_id,
                )
            )
            if not future.done():
                future.set_exception(error)
        except Exception as error:
            # A defect, or a full disk. The message stays in the store for the next start; the others go on.
            log.exception("A message could not be sent.")
            if not future.done():
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(sent)

    async def _deliver(self, item: Outgoing) -> Sent:
        attempt = rounds = 0
        while True:
            try:
                sent = await self._attempt(item)
            except DistributionNeeded:
                await self.distribute(item.conversation_id)
            except Unreachable:
                attempt += 1
                await asyncio.sleep(self._backoff.delay(attempt))
            except ApiError as error:
                if error.code == "devices_mismatch" and rounds < _MAX_ROUNDS:
                    rounds += 1
                    item.sealed = None
                    await self.reconcile(item.conversation_id, error.fields)
                elif error.passing:
                    attempt += 1
                    await asyncio.sleep(self._backoff.delay(attempt, error.retry_after))
                else:
                    raise
            else:
                with self._store.transaction():
                    if item.sealed is not None:
                        self._engine.confirm(item.conversation_id, item.sealed, sent.seq)
                    self._store.delete(_SPACE, _key(item))
                return sent

    async def _attempt(self, item: Outgoing) -> Sent:
        if item.sealed is None:

            def keep(sealed: Sealed) -> None:
                self._keep(msgspec.structs.replace(item, sealed=sealed))
                if item.edits is not None:
                    self._history.keep_version(item.client_id, digest_of(sealed), item.payload)

            # Only what a finished transaction holds may be sent: otherwise its keys would serve twice.
            item.sealed = await self.seal(item.conversation_id, item.client_id, item.payload, keep)
        signed = {"content": item.sealed.content, "signature": encode_base64(item.sealed.signature)}
        if item.edits is not None:
            edit = {"message_id": str(item.edits.message_id), **signed}
            await self._push(item.conversation_id, "edit_message", edit)
            return Sent(item.edits.message_id, item.edits.seq, item.edits.sent_at)
        body: dict[str, Any] = {
            "client_id": str(item.client_id),
            "message_type": item.message_type,
            **signed,
            **beside(item.reply_to_id, item.expires),
        }
        seen = self._seen[item.client_id] = asyncio.Event()
        try:
            reply = await self._push(item.conversation_id, "new_message", body)
        except ApiError as error:
            if error.code != "client_id_conflict":
                raise
            # An earlier encryption of this very message was stored, and its reply lost.
            return await self._await_own(item, seen)
        finally:
            del self._seen[item.client_id]
        return msgspec.json.decode(reply, type=Sent)

    async def seal(
        self,
        conversation_id: UUID,
        client_id: UUID,
        payload: Payload,
        keep: Callable[[Sealed], None],
        *,
        pairwise: bool = False,
    ) -> Sealed:
        """Encrypt for the devices there are now; `keep` is called in the transaction that moves the ratchets.

        `pairwise` does without sender keys where it can. Raises DistributionNeeded, TooManyDevices, BadBundle, ApiError,
        Unreachable.
        """
        conversation = await self._conversations.load(conversation_id)
        while True:
            devices = await self._devices.of(conversation.members)
            try:
                with self._store.transaction():
                    sealed = self._engine.seal(
                        conversation_id,
                        client_id,
                        payload,
                        devices,
                        group=conversation.group and not pairwise,
                    )
                    keep(sealed)
            except BundleNeeded as needed:
                await self._devices.provide(needed)
            else:
                return sealed

    async def _await_own(self, item: Outgoing, seen: asyncio.Event) -> Sent:
        item.sealed = None
        while True:
            for message in reversed(self._history.messages(item.conversation_id)):
                if message.client_id == item.client_id:
                    return Sent(message.id, message.seq, message.sent_at, duplicate=True)
            await seen.wait()
            seen.clear()

    async def distribute(self, conversation_id: UUID) -> None:
        """Give every device the sender key, by a message of its own."""
        item = Outgoing(self._next_number(), conversation_id, uuid4(), Payload("sender_key"), "system")
        with self._store.transaction():
            self._keep(item)
            self._history.keep_sent(item.client_id, item.payload)
        await self._deliver(item)

    async def reconcile(self, conversation_id: UUID, refusal: Mapping[str, Any]) -> None:
        """Follow a `devices_mismatch`: members may have changed, or their devices."""
        try:
            conversation = await self._conversations.load(conversation_id, again=True)
            await self._devices.reconcile(conversation.members, refusal)
        except Unreachable:
            await asyncio.sleep(self._backoff.delay(1))

    def _keep(self, item: Outgoing) -> None:
        self._store.save(_SPACE, _key(item), item)

    def _next_number(self) -> int:
        number = 1 + (self._store.load("counters", "outbox", int) or 0)
        with self._store.transaction():
            self._store.save("counters", "outbox", number)
        return number


def beside(reply_to_id: UUID | None, expires: Expires | None) -> dict[str, Any]:
    """What a message says in the clear besides its content."""
    said: dict[str, Any] = {}
    if reply_to_id is not None:
        said["reply_to_id"] = str(reply_to_id)
    if expires is not None:
        said |= {"expires_in": expires.seconds, "expires_from": expires.start}
    return said


def digest_of(sealed: Sealed) -> str:
    """As the server names it: `content_sha256`."""
    return encode_base64(content_sha256(sealed.content))


def _key(item: Outgoing) -> str:
    return f"{item.number:012}"
