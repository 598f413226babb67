"""Takes events out of the feeds, opens messages, keeps them, and hands them to the application.

What one batch changes (ratchets, messages, cursor) is one transaction. Only after it is on the disk is the
application told, and only then is delivery acknowledged to the server. After a crash in between, events kept
but not yet handed over are handed over at the next start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final
from uuid import UUID

import msgspec

from whispr.client.backoff import Backoff
from whispr.client.changes import Changes
from whispr.client.conversations import Conversations, Cursor
from whispr.client.crypto.engine import Engine, UnknownSender
from whispr.client.devices import Devices
from whispr.client.events import ChatMessage, ConversationEvent
from whispr.client.expiry import Expiry
from whispr.client.failures import ApiError, ClientError, Undecryptable
from whispr.client.history import History, sorted_reactions
from whispr.client.models import LogEvent, Message
from whispr.client.store import Store

log = logging.getLogger(__name__)

BATCH: Final = 100


class Incoming(msgspec.Struct):
    """One event on its way in.

    `identified`: the server was asked for the sender's keys; `failure`: why the message will not open, if that is certain.
    """

    conversation_id: UUID
    epoch: str | None
    event: LogEvent
    identified: bool = False
    failure: str | None = None


class Inbox:
    """`hand_over(event)` must not raise; `acknowledge(conversation_id, seq)` is called when everything up to `seq` is kept, `on_own(client_id)` for
    messages this device sent."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        devices: Devices,
        conversations: Conversations,
        history: History,
        expiry: Expiry,
        *,
        hand_over: Callable[[ConversationEvent], Awaitable[None]],
        acknowledge: Callable[[UUID, int], None],
        on_own: Callable[[UUID], None],
    ) -> None:
        self._store = store
        self._engine = engine
        self._devices = devices
        self._conversations = conversations
        self._history = history
        self._expiry = expiry
        self._changes = Changes(conversations, history, engine)
        self._application = hand_over
        self._acknowledge = acknowledge
        self._on_own = on_own
        self._queue: asyncio.Queue[Incoming] = asyncio.Queue()
        self._backoff = Backoff(base=0.2, cap=10.0)

    def put(self, conversation_id: UUID, epoch: str | None, events: list[LogEvent]) -> None:
        for event in events:
            self._queue.put_nowait(Incoming(conversation_id, epoch, event))

    async def run(self) -> None:
        await self._hand_over(self._history.unhanded())
        while True:
            batch = [await self._queue.get()]
            while len(batch) < BATCH and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            await self._take_all(batch)

    async def _take_all(self, batch: list[Incoming]) -> None:
        while batch:
            taken, unknown = self._take_some(batch)
            await self._hand_over(taken)
            if unknown is not None:
                await self._identify(batch[0], unknown)

    def _take_some(self, batch: list[Incoming]) -> tuple[list[ConversationEvent], UnknownSender | None]:
        """Take from the front of `batch` until it is empty or a sender has to be asked for."""
        taken: list[ConversationEvent] = []
        reached: dict[UUID, int] = {}
        unknown: UnknownSender | None = None
        with self._store.transaction():
            while batch:
                try:
                    event = self._take(batch[0])
                except UnknownSender as error:
                    unknown = error
                    break
                incoming = batch.pop(0)
                seq = reached[incoming.conversation_id] = incoming.event.seq
                self._conversations.advance(incoming.conversation_id, Cursor(incoming.epoch, seq))
                if event is not None:
                    self._history.hold(event)
                    taken.append(event)
        for event in taken:
            own = event.message is not None and event.message.sender_device_id == self._engine.device_id
            if event.event == "new_message" and event.message is not None and own:
                self._on_own(event.message.client_id)
        for conversation_id, seq in reached.items():
            self._acknowledge(conversation_id, seq)
        return taken, unknown

    async def _identify(self, incoming: Incoming, unknown: UnknownSender) -> None:
        attempt = 0
        while True:
            try:
                await self._devices.identify(unknown)
            except Undecryptable as error:
                incoming.failure = error.reason
            except ApiError as error:
                if error.passing:
                    attempt += 1
                    await asyncio.sleep(self._backoff.delay(attempt, error.retry_after))
                    continue
                incoming.failure = "unknown_keys"
            except ClientError:
                attempt += 1
                await asyncio.sleep(self._backoff.delay(attempt))
                continue
            incoming.identified = True
            return

    def _take(self, incoming: Incoming) -> ConversationEvent | None:
        """Keep one event. None for a message that the application has already had under another number."""
        name, conversation_id = incoming.event.event, incoming.conversation_id
        payload = msgspec.json.decode(incoming.event.payload, type=dict[str, Any])
        chat: ChatMessage | None
        if name == "new_message":
            message = _message(incoming.event.payload)
            if message is not None and self._history.find(message.id) is not None:
                return None
            chat = None if message is None else self._new(message, incoming)
        elif name == "message_edited":
            chat = self._edited(payload, incoming)
        else:
            chat = self._changes.apply(conversation_id, name, payload)
        return ConversationEvent(conversation_id, incoming.event.seq, name, payload, chat)

    def _new(self, message: Message, incoming: Incoming) -> ChatMessage:
        chat = self._read(message, incoming)
        self._history.add(chat)
        if message.is_deleted:
            return self._history.erase(chat)
        self._expiry.watch(chat)
        return chat

    def _edited(self, payload: dict[str, Any], incoming: Incoming) -> ChatMessage | None:
        try:
            message = msgspec.convert(payload["message"], Message)
        except (KeyError, msgspec.ValidationError) as error:
            log.warning("The server sent a malformed message_edited: %s", error)
            return None
        known = self._history.find(message.id)
        if known is None or known.is_deleted:
            return known
        if message.is_deleted:
            return self._history.erase(known)
        # Nobody but its author may have edited it, whatever the server says.
        if (message.sender_id, message.client_id) != (known.sender_id, known.client_id):
            log.warning("The server sent a message_edited for a message of somebody else.")
            return known
        # An edit may be seen first in the place of the message, before the key it needs has come.
        if message.content_sha256 != known.content_sha256 or known.error is not None:
            chat = self._read(message, incoming)
            if chat.error is not None:
                self._history.drop_franking_key(message.id)
            known = msgspec.structs.replace(
                chat, seq=known.seq, sent_at=known.sent_at, reactions=known.reactions
            )
        # The same content again opens no second time: its key is gone.
        chat = msgspec.structs.replace(known, edited_at=message.edited_at)
        self._history.add(chat)
        return chat

    def _read(self, message: Message, incoming: Incoming) -> ChatMessage:
        chat = ChatMessage(
            id=message.id,
            conversation_id=message.conversation_id,
            seq=message.seq,
            sender_id=message.sender_id,
            sender_device_id=message.sender_device_id,
            client_id=message.client_id,
            sent_at=message.sent_at,
            kind="unknown",
            reply_to_id=message.reply_to_id,
            media_ids=message.media_ids or [],
            edited_at=message.edited_at,
            reactions=sorted_reactions((r.reaction, r.user_ids) for r in message.reactions),
            expires_in=message.expires_in,
            expires_from=message.expires_from,
            content_sha256=message.content_sha256,
        )
        if message.is_deleted:
            return chat
        if message.signing_device_id == self._engine.device_id:
            edited = message.edited_at is not None
            payload = self._history.sent(message.client_id, message.content_sha256, edited=edited)
            if payload is None:
                return msgspec.structs.replace(chat, error="no_envelope")
        elif incoming.failure is not None:
            return msgspec.structs.replace(chat, error=incoming.failure)
        else:
            try:
                payload = self._engine.open(message)
            except Undecryptable as error:
                return msgspec.structs.replace(chat, error=error.reason)
            except UnknownSender:
                if not incoming.identified:
                    raise
                # The server has been asked, and the message still claims keys that are nobody's.
                return msgspec.structs.replace(chat, error="unknown_keys")
            if payload.franking_key is not None and message.content.commitment is not None:
                self._history.keep_franking_key(message.id, payload.franking_key)
            sender = self._engine.directory.device(message.signing_device_id)
            chat = msgspec.structs.replace(chat, verified=sender is not None and sender.confirmed)
        return msgspec.structs.replace(chat, kind=payload.kind, text=payload.text, data=payload.data)

    async def _hand_over(self, events: list[ConversationEvent]) -> None:
        for event in events:
            await self._application(event)
        if events:
            with self._store.transaction():
                for event in events:
                    self._history.handed(event)


def _message(payload: msgspec.Raw) -> Message | None:
    """The MESSAGE that the payload of `new_message` is; None if it is malformed."""
    try:
        return msgspec.json.decode(payload, type=Message)
    except msgspec.DecodeError as error:
        # One bad entry must not stop all that come after it.
        log.warning("The server sent a malformed new_message: %s", error)
        return None
