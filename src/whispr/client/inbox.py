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
from whispr.client.conversations import Conversations, Cursor
from whispr.client.crypto.engine import Engine, UnknownSender
from whispr.client.devices import Devices
from whispr.client.events import ChatMessage, ConversationEvent
from whispr.client.failures import ApiError, ClientError, Undecryptable
from whispr.client.history import History
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
            if event.message is not None and event.message.sender_device_id == self._engine.device_id:
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
        chat: ChatMessage | None = None
        if name == "new_message":
            message = _message(incoming.event.payload)
            if message is not None:
                if self._history.find(message.id) is not None:
                    return None
                chat = self._read(message, incoming)
                self._history.add(chat)
        else:
            self._follow(conversation_id, name, payload)
        return ConversationEvent(conversation_id, incoming.event.seq, name, payload, chat)

    def _follow(self, conversation_id: UUID, name: str, payload: dict[str, Any]) -> None:
        try:
            if name == "member_added":
                self._conversations.change_members(conversation_id, add=UUID(payload["user_id"]))
            elif name == "member_removed":
                self._conversations.change_members(conversation_id, remove=UUID(payload["user_id"]))
        except (KeyError, ValueError):
            log.warning("The server sent a %s that names nobody.", name)

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
        )
        if message.sender_device_id == self._engine.device_id:
            payload = self._history.sent(message.client_id)
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
            sender = self._engine.directory.device(message.sender_device_id)
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
