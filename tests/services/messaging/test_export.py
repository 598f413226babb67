"""People get everything that is kept of them, and nothing else."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.services.messaging.ages import Ages
from tests.services.messaging.door import Door, assert_problem, signature_of
from tests.stack import Stack

from whispr.kit.cache import Cache, RateLimiter
from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.kit.errors import RateLimited, Unavailable
from whispr.services.messaging.models import ConversationNotFound, ConversationView
from whispr.services.messaging.service import export as module
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.export import EXPORTS_PER_DAY, Export
from whispr.services.messaging.service.history import History
from whispr.services.messaging.store import views


async def people(stack: Stack, count: int) -> list[Door]:
    return [Door(stack, one) for one in await asyncio.gather(*(stack.register() for _ in range(count)))]


async def exported(door: Door) -> list[dict[str, Any]]:
    answer = await door.get("/export/messaging")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.headers["cache-control"] == "no-store"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert lines[0]["type"] == "export"
    assert lines[-1] == {"type": "end", "is_complete": True, "lines": len(lines) - 1}
    return lines[1:-1]


def of(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["type"] == kind]


async def test_an_export_holds_what_the_person_can_read(stack: Stack) -> None:
    ann, bob, cid = await people(stack, 3)
    direct, group = await ann.direct(bob), await bob.group(ann, cid, metadata={"name": "n"})
    sent = [await ann.send(direct, "1"), await bob.send(direct, "2"), await cid.send(group, "3")]
    await ann.patch(f"/conversations/{group}", {"settings": {"muted": True}})
    await ann.post(f"/conversations/{direct}/read", {"seq": 2})
    assert (await bob.call("PUT", f"/conversations/{direct}/pins/{sent[0]['id']}")).status_code < 300
    assert (await bob.call("PUT", f"/messages/{sent[0]['id']}/reactions/x")).status_code < 300
    await bob.delete(f"/messages/{sent[1]['id']}")
    reported = await ann.post(f"/messages/{sent[2]['id']}/report", {"reason": "spam", "comment": "c"})
    assert reported.status_code == 201, reported.text
    lines = await exported(ann)
    assert Counter(line["type"] for line in lines) == {
        "membership": 2,
        "conversation": 2,
        "pin": 1,
        "message": 3,
        "report": 1,
        "device_cursor": 1,
    }
    messages = {line["message"]["id"]: line["message"] for line in of(lines, "message")}
    for conversation in (direct, group):
        for message in (await ann.ok(f"/conversations/{conversation}/messages"))["items"]:
            assert messages.pop(message["id"]) == message
    assert messages == {}
    memberships = {line["conversation_id"]: line for line in of(lines, "membership")}
    assert memberships[group]["settings"] == {"muted": True}
    assert memberships[direct]["read_seq"] == 2
    (pin,) = of(lines, "pin")
    assert (pin["message_id"], pin["pinned_by"]) == (sent[0]["id"], bob.id)
    (report,) = of(lines, "report")
    assert (report["message_id"], report["comment"]) == (sent[2]["id"], "c")
    shown = {line["conversation"]["id"]: line["conversation"] for line in of(lines, "conversation")}
    view = await ann.ok(f"/conversations/{group}")
    assert all(view[name] == value for name, value in shown[group].items())


async def test_the_exporting_device_gets_its_own_envelopes_only(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    direct = await ann.direct(bob)
    content = {"envelopes": {str(bob.person.device_id): {"type": "message", "body": "YQ=="}}}
    draft = ann.draft(direct, content=content)
    assert (await ann.post("/messages", draft)).status_code == 201
    bob2 = Door(stack, await stack.add_device(bob.person))
    assert [of(await exported(door), "message")[0]["message"]["content"] for door in (bob, bob2, ann)] == [
        content,
        {"envelopes": {}},
        {"envelopes": {}},
    ]


async def test_of_what_others_have_nothing_is_in_it(stack: Stack) -> None:
    ann, bob, cid, dan = await people(stack, 4)
    before, theirs = await ann.group(bob, cid), await bob.direct(cid)
    early = await ann.send(before, "early")
    hidden = [await bob.send(theirs, "not for ann or dan")]
    await ann.post(f"/conversations/{before}/members", {"member_ids": [dan.id]})
    seen = await bob.send(before, "after dan came")
    await ann.delete(f"/conversations/{before}/members/{cid.id}")
    hidden.append(await bob.send(before, "after cid left"))
    texts = {door.id: json.dumps(await exported(door)) for door in (ann, cid, dan)}
    assert hidden[0]["id"] not in texts[ann.id] + texts[dan.id]
    assert early["id"] not in texts[dan.id]
    assert seen["id"] in texts[dan.id]
    # Who left keeps word of having been there, and reads nothing of it any more.
    assert all(message["id"] not in texts[cid.id] for message in (early, seen, hidden[1]))
    lines = await exported(cid)
    ended = [line for line in of(lines, "membership") if line["conversation_id"] == before]
    assert [line["left_at"] is not None for line in ended] == [True]
    assert before not in [line["conversation"]["id"] for line in of(lines, "conversation")]
    assert ann.person.username not in texts[cid.id]


async def test_private_reading_stays_private_in_it(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    direct = await ann.direct(bob)
    await stack.http.patch(
        f"{stack.user.url}/api/v1/users/me",
        json={"privacy": {"read_receipts": False}},
        headers=bob.person.headers,
    )
    await ann.send(direct)
    await bob.post(f"/conversations/{direct}/read", {"seq": 1})
    (line,) = of(await exported(ann), "conversation")
    assert {m["user_id"]: m["read_seq"] for m in line["conversation"]["members"]}[bob.id] is None


async def test_scheduled_messages_are_in_it(stack: Stack, messaging_db: Database) -> None:
    ann, bob = await people(stack, 2)
    direct = await ann.direct(bob)
    content = {"ciphertext": "YQ=="}
    client_id = str(uuid4())
    send_at = stack.clock.now().replace(microsecond=0).isoformat()
    async with messaging_db.connection() as connection:
        await connection.execute(
            """
            INSERT INTO scheduled_messages (id, conversation_id, sender_id, sender_device_id, client_id, message_type,
                content, content_sha256, signature, send_at, due_at, created_at, updated_at, status)
            VALUES (gen_random_uuid(), $1, $2, $3, $4, 'text', $5, '', $6, $7, $7, $7, $7, 'cancelled')
            """,
            direct,
            ann.id,
            ann.person.device_id,
            client_id,
            json.dumps(content).encode(),
            signature_of(ann.person, direct, client_id, content).encode(),
            stack.clock.now(),
        )
    (line,) = of(await exported(ann), "scheduled_message")
    assert (line["client_id"], line["status"], line["send_at"][:10]) == (client_id, "cancelled", send_at[:10])
    assert of(await exported(bob), "scheduled_message") == []


async def test_long_histories_come_page_by_page(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MESSAGES_AT_ONCE", 3)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 2)
    ann, bob = await people(stack, 2)
    groups = [await ann.group(bob) for _ in range(5)]
    sent = [(await ann.send(group, str(number)))["id"] for group in groups for number in range(7)]
    lines = await exported(bob)
    assert sorted(line["message"]["id"] for line in of(lines, "message")) == sorted(sent)
    assert len(of(lines, "membership")) == 5


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer nonsense"}])
async def test_strangers_get_nothing(stack: Stack, headers: dict[str, str]) -> None:
    answer = await stack.http.get(f"{stack.messaging.url}/api/v1/export/messaging", headers=headers)
    assert_problem(answer, 401, "unauthenticated" if not headers else "invalid_token")


class Views:
    """Conversations without anybody's wishes for privacy."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def get(self, conversation_id: UUID, user_id: UUID) -> ConversationView:
        async with self._db.connection() as connection:
            view = await views.view(connection, conversation_id, user_id)
        if view is None:
            raise ConversationNotFound
        return view


def limited(db: Database, cache: Cache) -> Export:
    clock = ManualClock()
    limiter = RateLimiter(cache, enabled=True)
    return Export(db, clock, Directory(db, cache, clock), History(db), Views(db), limiter)


async def test_whoever_is_removed_meanwhile_gets_no_further_page(
    ages: Ages, messaging_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MESSAGES_AT_ONCE", 2)
    ann, bob = uuid4(), uuid4()
    groups = [await ages.group(ann, bob) for _ in range(2)]
    for group in groups:
        for _ in range(6):
            await ages.send(group, ann)
    got: dict[str, int] = Counter()
    item: dict[str, Any] = {}
    async for line in await limited(ages.db, messaging_cache).begin(bob, uuid4()):
        item = json.loads(line)
        if item["type"] == "message":
            got[item["message"]["conversation_id"]] += 1
            if got[str(groups[0])] == 3:
                await ages.leave(groups[0], bob)
    assert got == {str(groups[0]): 4, str(groups[1]): 6}
    assert item["is_complete"] is True


async def test_a_few_a_day_are_enough(messaging_db: Database, messaging_cache: Cache) -> None:
    export = limited(messaging_db, messaging_cache)
    user_id = uuid4()
    for _ in range(EXPORTS_PER_DAY):
        await export.begin(user_id, uuid4())
    with pytest.raises(RateLimited):
        await export.begin(user_id, uuid4())
    await export.begin(uuid4(), uuid4())


async def test_an_export_that_was_cut_off_says_so(
    messaging_db: Database, messaging_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = limited(messaging_db, messaging_cache)

    async def away(*_: Any) -> Any:
        raise Unavailable

    monkeypatch.setattr("whispr.services.messaging.store.export.reports", away)
    lines = [json.loads(line) async for line in await export.begin(uuid4(), uuid4())]
    assert [line["type"] for line in lines] == ["export", "end"]
    assert lines[-1] == {"type": "end", "is_complete": False, "code": "unavailable", "lines": 1}
