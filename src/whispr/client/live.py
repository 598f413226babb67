"""The live side of a client: its sockets, the user's topic, and a channel with a feed for every conversation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

import msgspec

from whispr.client.conversations import Conversations
from whispr.client.events import Notice
from whispr.client.failures import JoinRefused, SessionEnded
from whispr.client.feed import Feed, JoinReply, SyncReply
from whispr.client.inbox import Inbox
from whispr.client.models import LogEvent
from whispr.client.socket import Channel, Socket, SocketOptions, Tokens

# Servers allow 100 topics on one socket.
TOPICS_PER_SOCKET: Final = 90
# Pushes of a conversation's channel that are not part of its log.
PASSING: Final = frozenset({"receipt", "typing", "presence_state", "presence_diff"})


class _Numbered(msgspec.Struct):
    seq: int


class Live:
    """`on_user_event(event, payload)` gets the pushes of the user's topic, and `joined` with each reply to joining it.

    `on_read(conversation_id, seq)` is told how far the person has read, on any device.
    """

    def __init__(
        self,
        url: str,
        tokens: Tokens,
        user_id: UUID,
        conversations: Conversations,
        inbox: Inbox,
        *,
        options: SocketOptions | None,
        notify: Callable[[Notice], None],
        on_user_event: Callable[[str, dict[str, Any]], None],
        on_read: Callable[[UUID, int], None],
    ) -> None:
        self._url = url
        self._tokens = tokens
        self._conversations = conversations
        self._inbox = inbox
        self._options = options
        self._notify = notify
        self._on_user_event = on_user_event
        self._on_read = on_read
        self._sockets: list[Socket] = []
        self._load: dict[Socket, int] = {}
        self._online = False
        self._ended = False
        self._channels: dict[UUID, Channel] = {}
        self._feeds: dict[UUID, Feed] = {}
        self._kept: dict[UUID, int] = {}
        self._user_id = user_id
        self._join_user()

    @property
    def connected(self) -> bool:
        return any(socket.connected for socket in self._sockets)

    def start(self) -> None:
        self._online = True
        for socket in self._sockets:
            socket.start()

    async def stop(self) -> None:
        """Go offline. What is sent meanwhile waits; what is missed is fetched after the next `start`."""
        self._online = False
        for socket in self._sockets:
            await socket.stop()

    def close(self) -> None:
        for feed in self._feeds.values():
            feed.close()

    def drop(self) -> None:
        """Cut the connections without a goodbye, as a lost network does."""
        for socket in self._sockets:
            socket.drop()

    def open(self, conversation_id: UUID) -> Channel:
        """The channel of a conversation, joined if it was not."""
        channel = self._channels.get(conversation_id)
        if channel is None:
            channel = self._join(conversation_id)
        return channel

    def leave(self, conversation_id: UUID) -> None:
        channel = self._channels.get(conversation_id)
        if channel is not None:
            channel.leave()
            self._closed(conversation_id, None)

    def acknowledge(self, conversation_id: UUID, seq: int) -> None:
        """Everything up to `seq` is kept here: tell the server now, or when the channel is joined again."""
        self._kept[conversation_id] = max(seq, self._kept.get(conversation_id, 0))
        channel = self._channels.get(conversation_id)
        if channel is not None:
            channel.cast("mark_as_delivered", {"seq": self._kept[conversation_id]})

    async def push(self, conversation_id: UUID, event: str, payload: dict[str, Any]) -> msgspec.Raw:
        return await self.open(conversation_id).push(event, payload)

    def _join(self, conversation_id: UUID) -> Channel:
        cursor = self._conversations.cursor(conversation_id)

        async def fetch(after: int) -> SyncReply:
            reply = await channel.push("sync", {"after_seq": after})
            return msgspec.json.decode(reply, type=SyncReply)

        feed = Feed(
            cursor.epoch,
            cursor.seq,
            deliver=lambda events: self._inbox.put(conversation_id, feed.epoch, events),
            fetch=fetch,
            lost=lambda first, last: self._notify(
                Notice("history_truncated", {"first": first, "last": last}, conversation_id)
            ),
            reset=lambda epoch: self._notify(Notice("history_reset", {"epoch": epoch}, conversation_id)),
        )

        def joined(reply: msgspec.Raw) -> None:
            answer = msgspec.json.decode(reply, type=JoinReply)
            for member in answer.members:
                if member.user_id == self._user_id and member.read_seq is not None:
                    self._on_read(conversation_id, member.read_seq)
            feed.joined(answer)
            if conversation_id in self._kept:
                self.acknowledge(conversation_id, self._kept[conversation_id])

        def received(event: str, payload: msgspec.Raw) -> None:
            if event in PASSING:
                self._notify(Notice(event, msgspec.json.decode(payload), conversation_id))
                return
            seq = msgspec.json.decode(payload, type=_Numbered).seq
            feed.offer([LogEvent(seq, event, msgspec.Raw(bytes(payload)))])

        channel = self._socket().channel(
            f"conversation:{conversation_id}",
            params=feed.params,
            on_join=joined,
            on_event=received,
            on_closed=lambda refusal: self._closed(conversation_id, refusal),
        )
        self._channels[conversation_id] = channel
        self._feeds[conversation_id] = feed
        if cursor.seq:
            self._kept[conversation_id] = cursor.seq
        return channel

    def _join_user(self) -> None:
        self._socket().channel(
            f"user:{self._user_id}",
            on_join=lambda reply: self._on_user_event("joined", msgspec.json.decode(reply)),
            on_event=lambda event, payload: self._on_user_event(event, msgspec.json.decode(payload)),
        )

    def _closed(self, conversation_id: UUID, refusal: JoinRefused | None) -> None:
        self._channels.pop(conversation_id, None)
        self._kept.pop(conversation_id, None)
        feed = self._feeds.pop(conversation_id, None)
        if feed is not None:
            feed.close()
        if refusal is not None and refusal.code == "forbidden":
            self._conversations.forget(conversation_id)
        reason = "closed" if refusal is None else refusal.code
        self._notify(Notice("conversation_closed", {"reason": reason}, conversation_id))

    def _socket(self) -> Socket:
        for socket in self._sockets:
            if self._load[socket] < TOPICS_PER_SOCKET:
                break
        else:
            socket = Socket(self._url, self._tokens, options=self._options, on_ended=self._session_ended)
            self._sockets.append(socket)
            self._load[socket] = 0
            if self._online:
                socket.start()
        self._load[socket] += 1
        return socket

    def _session_ended(self, ended: SessionEnded) -> None:
        if not self._ended:
            self._ended = True
            self._notify(Notice("session_ended", {"reason": str(ended), "code": ended.code}))
