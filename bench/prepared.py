"""What would take too long to make through the doors, put into the database of an instance as the doors would."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import asyncpg

from bench.instance import Instance
from bench.load import Person
from whispr.kit.ids import uuid7


def messaging_url(instance: Instance) -> str:
    """Messaging's database, as the administrator."""
    admin: str = instance.run["postgres"]["url"]
    return admin.rpartition("/")[0] + "/whispr_messaging"


async def make_conversations(
    instance: Instance, pairs: list[tuple[Person, Person]], *, last_seq: int = 0
) -> list[str]:
    """A group of two for each pair, so that two people may have many; their ids. `last_seq`: events they already have."""
    now = datetime.now(UTC)
    ids = [uuid7() for _ in pairs]
    connection = await asyncpg.connect(messaging_url(instance))
    try:
        await connection.copy_records_to_table(
            "conversations",
            columns=["id", "type", "created_by", "last_seq", "created_at", "updated_at"],
            records=[
                (conversation, "group", UUID(one.user_id), last_seq, now, now)
                for conversation, (one, _) in zip(ids, pairs, strict=True)
            ],
        )
        await connection.copy_records_to_table(
            "conversation_members",
            columns=["conversation_id", "user_id", "role", "joined_at"],
            records=[
                (conversation, UUID(person.user_id), role, now)
                for conversation, pair in zip(ids, pairs, strict=True)
                for person, role in zip(pair, ("owner", "member"), strict=True)
            ],
        )
        await connection.execute("ANALYZE conversations, conversation_members")
    finally:
        await connection.close()
    return [str(conversation) for conversation in ids]
