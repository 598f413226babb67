"""Reading from ten million stored messages: the newest 50 of a conversation, and a join that recovers 200 events.

The messages are copied into the real tables in the order in which they would have been sent: one conversation after the
other, round after round, so that those of one conversation lie as far apart as they do in life.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import uvloop

from bench.instance import Instance, own_instance
from bench.load import CONTENT_BYTES, Person, connect, register_many
from bench.plain_http import Connections
from bench.prepared import make_conversations, messaging_url
from bench.report import percentile, publish
from bench.usage import cpu_between, used
from whispr.kit.db import Database
from whispr.services.messaging.store import history as store

PEOPLE = 200
RECOVERED = 200
_COLUMNS = (
    "conversation_id",
    "seq",
    "id",
    "sender_id",
    "sender_device_id",
    "client_id",
    "message_type",
    "content",
    "content_sha256",
    "signature",
    "sent_at",
)
_ROWS_AT_ONCE = 2_000


async def _fill(
    instance: Instance, people: list[Person], conversations: int, each: int
) -> tuple[list[str], float]:
    """Store `each` messages in each of so many conversations, between two of `people`; their ids, and the seconds."""
    begun = time.monotonic()
    pairs = [_pair(people, number) for number in range(conversations)]
    ids = await make_conversations(instance, pairs, last_seq=each)
    connection = await asyncpg.connect(messaging_url(instance))
    try:
        await connection.copy_to_table(
            "messages", source=_rows(ids, pairs, each), columns=_COLUMNS, timeout=7200
        )
        await connection.execute("ANALYZE", timeout=600)
    finally:
        await connection.close()
    return ids, time.monotonic() - begun


def _pair(people: list[Person], number: int) -> tuple[Person, Person]:
    first = number % len(people)
    return people[first], people[(first + 1 + number // len(people)) % len(people)]


async def _rows(
    conversations: list[str], pairs: list[tuple[Person, Person]], each: int
) -> AsyncIterator[bytes]:
    """The lines of COPY, text format. A few hundred contents serve all: what is read is not checked again."""
    contents = []
    for _ in range(256):
        content = json.dumps({"ciphertext": base64.b64encode(os.urandom(CONTENT_BYTES)).decode()}).encode()
        contents.append(
            f"\\\\x{content.hex()}\t\\\\x{hashlib.sha256(content).hexdigest()}\t\\\\x{os.urandom(64).hex()}"
        )
    now = datetime.now(UTC)
    senders = [tuple(f"{person.user_id}\t{person.device_id}" for person in pair) for pair in pairs]
    lines: list[str] = []
    number = 0
    for seq in range(1, each + 1):
        sent_at = (now - timedelta(minutes=each - seq)).isoformat()
        for place, conversation in enumerate(conversations):
            number += 1
            lines.append(
                f"{conversation}\t{seq}\t{number:08x}-0000-7000-8000-{number:012x}\t{senders[place][seq & 1]}"
                f"\t{number:08x}-0000-4000-8000-{number:012x}\ttext\t{contents[number & 255]}\t{sent_at}\n"
            )
            if len(lines) >= _ROWS_AT_ONCE:
                yield "".join(lines).encode()
                lines.clear()
    yield "".join(lines).encode()


async def _paced(rate: float, seconds: float, job: Callable[[], Awaitable[None]]) -> list[float]:
    """Start `job` at a steady rate; sorted milliseconds from when each was due until it was done."""
    # The loop's own clock counts whole milliseconds.
    started, late, running = time.monotonic(), [], set()

    async def one(due: float) -> None:
        await job()
        late.append((time.monotonic() - due) * 1000)

    for number in range(int(rate * seconds)):
        due = started + number / rate
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(one(due))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return sorted(late)


def _row(what: str, rate: float, late: list[float], **more: Any) -> dict[str, Any]:
    return {
        "what": what,
        "offered/s": rate,
        "done": len(late),
        "P50 ms": percentile(late, 0.5),
        "P99 ms": percentile(late, 0.99),
        "max ms": percentile(late, 1),
        **more,
    }


class _Reading:
    """What is read, always of a conversation chosen at random."""

    def __init__(self, instance: Instance, people: list[Person], conversations: list[str], each: int) -> None:
        self._tokens = {person.user_id: person.token for person in people}
        self._people = people
        self._conversations = conversations
        self._each = each
        self._socket = instance.socket_url(direct=True)
        self._owners: dict[str, str] = {}
        self._rest = Connections(instance.service("messaging")["http"])
        self.database = Database(messaging_url(instance), pool_size=8)

    async def open(self) -> None:
        await self.database.open()
        async with self.database.connection() as connection:
            rows = await connection.fetch("SELECT conversation_id, user_id FROM conversation_members")
        self._owners = {str(row["conversation_id"]): str(row["user_id"]) for row in rows}

    async def close(self) -> None:
        self._rest.close()
        await self.database.close()

    async def from_store(self) -> None:
        conversation = random.choice(self._conversations)
        async with self.database.connection() as connection:
            messages = await store.messages_before(connection, UUID(conversation), 0, self._each + 1, 50)
        assert len(messages) == min(50, self._each)

    async def by_rest(self) -> None:
        conversation = random.choice(self._conversations)
        body = await self._rest.get(
            f"/api/v1/conversations/{conversation}/messages?limit=50",
            self._tokens[self._owners[conversation]],
        )
        assert body.count(b'"client_id"') == min(50, self._each)

    async def by_join(self) -> None:
        conversation = random.choice(self._conversations)
        device = await connect(self._socket, self._tokens[self._owners[conversation]])
        try:
            first = max(0, self._each - RECOVERED)
            cursor = {"epoch": self.epoch, "seq": first}
            reply = await device.join(f"conversation:{conversation}", "1", 30, {"cursor": cursor})
            assert reply["recovered"]
            assert len(reply["events"]) == self._each - first
        finally:
            device.drop()

    async def learn_epoch(self) -> None:
        async with self.database.connection() as connection:
            self.epoch = str(await connection.fetchval("SELECT epoch FROM incarnation"))


async def _measure(arguments: argparse.Namespace) -> None:
    each = arguments.messages // arguments.conversations
    with own_instance(WHISPR_AUTH_ACCESS_TOKEN_SECONDS="3600") as instance:
        people = await register_many(instance.url, PEOPLE)
        conversations, filled = await _fill(instance, people, arguments.conversations, each)
        size = await _size(messaging_url(instance))
        reading = _Reading(instance, people, conversations, each)
        await reading.open()
        await reading.learn_epoch()
        rows = []
        for name, job, rates in (
            ("store: newest 50", reading.from_store, arguments.rates),
            ("REST: newest 50", reading.by_rest, arguments.rates),
            (f"connect + join, {RECOVERED} events", reading.by_join, arguments.join_rates),
        ):
            await _paced(5, 2, job)
            for rate in rates:
                before = used(instance)
                late = await _paced(rate, arguments.seconds, job)
                spent = cpu_between(before, used(instance))
                rows.append(_row(name, rate, late, **{"CPU ms each": 1000 * sum(spent.values()) / len(late)}))
        await reading.close()
    publish(
        "history",
        f"{each * arguments.conversations:,} messages in {arguments.conversations:,} conversations, {size / 2**30:.1f} GiB "
        f"with indexes, copied in {filled:.0f} s; conversations chosen at random, {arguments.seconds:g} s a rate, past the "
        "gateway",
        rows,
    )


async def _size(url: str) -> int:
    connection = await asyncpg.connect(url)
    try:
        return int(await connection.fetchval("SELECT pg_database_size(current_database())"))
    finally:
        await connection.close()


def main(argv: list[str]) -> int:
    """`whispr bench history [--messages N] [--conversations N] [--rates …] [--join-rates …]`."""
    parser = argparse.ArgumentParser(prog="whispr bench history", description=__doc__)
    parser.add_argument("--messages", type=int, default=10_000_000)
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[20, 100, 200], help="reads a second to offer"
    )
    parser.add_argument(
        "--join-rates", type=float, nargs="+", default=[10, 50], help="joins a second to offer"
    )
    parser.add_argument("--seconds", type=float, default=20, help="length of each rate")
    uvloop.run(_measure(parser.parse_args(argv)))
    return 0
