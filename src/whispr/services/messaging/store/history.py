"""Reading the log: messages and other events, by `seq`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import msgspec
from msgspec import UNSET

from whispr.kit.db import Connection
from whispr.services.messaging.models import (
    CommittedEvent,
    Message,
    MessageHead,
    Reaction,
    RecipientStatus,
    edited_event,
    expires_from,
    message_event,
    unseen_event,
)

MESSAGE_COLUMNS = (
    "id, conversation_id, seq, sender_id, sender_device_id, client_id, message_type, content, content_sha256,"
    " signature, reply_to_id, media_ids, expires_in, sent_at, edited_at, is_deleted, edited_device_id, expires_from_read,"
    " expires_at"
)


def message_columns(table: str) -> str:
    """What `message_from` needs, selected from the messages that are called `table`: `MESSAGE_COLUMNS` and reactions."""
    return f"""{MESSAGE_COLUMNS}, (
        SELECT jsonb_agg(jsonb_build_array(r.reaction, r.user_id) ORDER BY r.seq) FROM message_reactions r
        WHERE r.conversation_id = {table}.conversation_id AND r.message_id = {table}.id
    ) AS reactions"""


_SELECT = f"SELECT {message_columns('messages')} FROM messages"


def message_from(record: Any) -> Message:
    """A message from a record that has `message_columns`."""
    return Message(
        head=MessageHead(
            id=record["id"],
            conversation_id=record["conversation_id"],
            seq=record["seq"],
            sender_id=record["sender_id"],
            sender_device_id=record["sender_device_id"],
            client_id=record["client_id"],
            message_type=record["message_type"],
            signature=record["signature"],
            content_sha256=record["content_sha256"],
            reply_to_id=record["reply_to_id"],
            media_ids=tuple(record["media_ids"] or ()),
            expires_in=record["expires_in"],
            sent_at=record["sent_at"],
            edited_at=record["edited_at"],
            is_deleted=record["is_deleted"],
            reactions=reactions_from(record["reactions"]),
            edited_device_id=record["edited_device_id"] or UNSET,
            expires_from=expires_from(record["expires_in"], record["expires_from_read"]),
            expires_at=record["expires_at"] or UNSET,
        ),
        content=record["content"],
    )


def reactions_from(choices: list[tuple[str, str]] | None) -> tuple[Reaction, ...]:
    """Pairs of reaction and person, first use first, put together by reaction."""
    if not choices:
        return ()
    people: dict[str, list[UUID]] = {}
    for reaction, user_id in choices:
        people.setdefault(reaction, []).append(UUID(user_id))
    return tuple(Reaction(reaction, tuple(user_ids)) for reaction, user_ids in people.items())


async def messages_after(
    connection: Connection, conversation_id: UUID, after_seq: int, until_seq: int, limit: int
) -> list[Message]:
    """Messages with `after_seq < seq <= until_seq`, the first `limit` of them, oldest first."""
    records = await connection.fetch(
        f"""
        {_SELECT}
        WHERE conversation_id = $1 AND seq > $2 AND seq <= $3 ORDER BY seq LIMIT $4
        """,
        conversation_id,
        after_seq,
        until_seq,
        limit,
    )
    return [message_from(record) for record in records]


async def messages_before(
    connection: Connection, conversation_id: UUID, after_seq: int, before_seq: int, limit: int
) -> list[Message]:
    """Messages with `after_seq < seq < before_seq`, the last `limit` of them, oldest first."""
    records = await connection.fetch(
        f"""
        {_SELECT}
        WHERE conversation_id = $1 AND seq > $2 AND seq < $3 ORDER BY seq DESC LIMIT $4
        """,
        conversation_id,
        after_seq,
        before_seq,
        limit,
    )
    return [message_from(record) for record in reversed(records)]


class Span(msgspec.Struct, frozen=True):
    """The first `limit` events of a conversation with `after_seq < seq <= until_seq`."""

    conversation_id: UUID
    after_seq: int
    until_seq: int
    limit: int

    @property
    def last_seq(self) -> int:
        """Numbers are dense, so nothing past `after_seq + limit` can be among the first `limit` events."""
        return min(self.until_seq, self.after_seq + self.limit)


async def log(
    connection: Connection, conversation_id: UUID, after_seq: int, until_seq: int, limit: int
) -> list[CommittedEvent]:
    """Every event with `after_seq < seq <= until_seq`, the first `limit` of them, oldest first.

    An edit is shown with the message as it is now: the log never keeps what a message once was.
    """
    [events] = await logs(connection, [Span(conversation_id, after_seq, until_seq, limit)])
    return events


async def logs(connection: Connection, spans: Sequence[Span]) -> list[list[CommittedEvent]]:
    """`log` of each span, in two statements for all of them where nothing was edited."""
    asked = (
        [span.conversation_id for span in spans],
        [span.after_seq for span in spans],
        [span.last_seq for span in spans],
    )
    found: list[list[CommittedEvent]] = [[] for _ in spans]
    # LATERAL: each span is a walk along an index of one partition, whatever the planner thinks of the whole.
    for record in await connection.fetch(
        """
        SELECT asked.number, e.* FROM unnest($1::uuid[], $2::bigint[], $3::bigint[])
            WITH ORDINALITY AS asked (conversation, after_seq, until_seq, number)
        CROSS JOIN LATERAL (
            SELECT seq, event, payload FROM conversation_events
            WHERE conversation_id = asked.conversation AND seq > asked.after_seq AND seq <= asked.until_seq ORDER BY seq
        ) AS e
        """,
        *asked,
    ):
        number = record["number"] - 1
        found[number].append(
            CommittedEvent(spans[number].conversation_id, record["seq"], record["event"], record["payload"])
        )
    for number, span in enumerate(spans):
        found[number] = await _with_edited(connection, span.conversation_id, found[number])
    for record in await connection.fetch(
        f"""
        SELECT asked.number, m.* FROM unnest($1::uuid[], $2::bigint[], $3::bigint[])
            WITH ORDINALITY AS asked (conversation, after_seq, until_seq, number)
        CROSS JOIN LATERAL (
            {_SELECT}
            WHERE conversation_id = asked.conversation AND seq > asked.after_seq AND seq <= asked.until_seq ORDER BY seq
        ) AS m
        """,
        *asked,
    ):
        found[record["number"] - 1].append(message_event(message_from(record)))
    for events in found:
        events.sort(key=lambda event: event.seq)
    return found


async def _with_edited(
    connection: Connection, conversation_id: UUID, events: list[CommittedEvent]
) -> list[CommittedEvent]:
    edits = {
        event.seq: _decode_edit(event.payload).message_id
        for event in events
        if event.event == "message_edited"
    }
    if not edits:
        return events
    records = await connection.fetch(
        f"{_SELECT} WHERE conversation_id = $1 AND id = ANY($2)", conversation_id, list(set(edits.values()))
    )
    messages = {record["id"]: message_from(record) for record in records}
    return [
        event
        if (message_id := edits.get(event.seq)) is None
        else edited_event(event.seq, messages[message_id])
        if message_id in messages
        else unseen_event(conversation_id, event.seq, message_id)
        for event in events
    ]


class _Edit(msgspec.Struct):
    message_id: UUID


_decode_edit = msgspec.json.Decoder(_Edit).decode


async def find_message(connection: Connection, message_id: UUID) -> Message | None:
    """One message by its id."""
    record = await connection.fetchrow(f"{_SELECT} WHERE id = $1", message_id)
    return message_from(record) if record else None


async def message_status(
    connection: Connection, conversation_id: UUID, seq: int, sender_id: UUID
) -> list[RecipientStatus]:
    """When each person who could see the message got and read it; the sender is no recipient."""
    records = await connection.fetch(
        """
        SELECT m.user_id, delivered.at AS delivered_at, read.at AS read_at
        FROM conversation_members m
        LEFT JOIN LATERAL (
            SELECT at FROM receipt_marks r
            WHERE r.conversation_id = m.conversation_id AND r.user_id = m.user_id AND r.kind = 1 AND r.seq >= $2
            ORDER BY r.seq LIMIT 1
        ) AS delivered ON true
        LEFT JOIN LATERAL (
            SELECT at FROM receipt_marks r
            WHERE r.conversation_id = m.conversation_id AND r.user_id = m.user_id AND r.kind = 2 AND r.seq >= $2
            ORDER BY r.seq LIMIT 1
        ) AS read ON true
        WHERE m.conversation_id = $1 AND m.user_id <> $3 AND m.floor_seq < $2 AND (m.is_active OR m.left_seq > $2)
        ORDER BY m.joined_at, m.user_id
        """,
        conversation_id,
        seq,
        sender_id,
    )
    return [
        RecipientStatus(record["user_id"], record["delivered_at"], record["read_at"]) for record in records
    ]
