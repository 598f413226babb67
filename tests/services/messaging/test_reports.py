"""Reports of messages: who may make one, what is verified of it, and what becomes of it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.services.messaging.door import Door, assert_problem
from tests.services.messaging.test_members import people
from tests.stack import Stack, b64

from whispr.kit.cache import Cache, RateLimiter
from whispr.kit.clock import ManualClock
from whispr.kit.db import Database
from whispr.kit.errors import RateLimited
from whispr.services.messaging.models.abuse import ReportReason
from whispr.services.messaging.service.reports import REPORT_SUBMITTED, REPORTS_PER_DAY, Reports

KEY = bytes(range(32))
INSULT = b"something nobody should have to read"


def commitment(plaintext: bytes, key: bytes = KEY) -> str:
    return b64(hmac.new(key, plaintext, hashlib.sha256).digest())


def reveal(plaintext: bytes = INSULT, key: bytes = KEY) -> dict[str, str]:
    return {"plaintext": b64(plaintext), "franking_key": b64(key)}


async def send_franked(door: Door, conversation_id: str, plaintext: bytes = INSULT) -> str:
    content = {"ciphertext": b64(b"sealed"), "commitment": commitment(plaintext)}
    answer = await door.post("/messages", door.draft(conversation_id, content=content))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def report(door: Door, message_id: str, **body: Any) -> Any:
    return await door.post(f"/messages/{message_id}/report", {"reason": "abuse", **body})


async def rows(db: Database, message_id: str) -> list[dict[str, Any]]:
    async with db.connection() as connection:
        found = await connection.fetch(
            "SELECT * FROM message_reports WHERE message_id = $1", UUID(message_id)
        )
    return [dict(row) for row in found]


async def told(db: Database, report_id: str) -> int:
    async with db.connection() as connection:
        count: int = await connection.fetchval(
            "SELECT count(*) FROM outbox WHERE topic = $1 AND payload = $2",
            REPORT_SUBMITTED,
            {"report_id": report_id},
        )
    return count


async def test_a_report_that_shows_what_was_written_is_verified(stack: Stack, messaging_db: Database) -> None:
    ann, bob = await people(stack, 2)
    message_id = await send_franked(ann, await ann.direct(bob))
    answer = await report(bob, message_id, comment="Look at this.", reveal=reveal())
    assert answer.status_code == 201
    body = answer.json()
    assert body == {"report_id": body["report_id"], "is_verified": True}
    (row,) = await rows(messaging_db, message_id)
    assert row["created_at"] == stack.clock.now()
    assert (str(row["id"]), str(row["reporter_id"]), str(row["reported_id"])) == (
        body["report_id"],
        bob.id,
        ann.id,
    )
    assert (row["reason"], row["comment"], row["plaintext"]) == ("abuse", "Look at this.", INSULT)
    assert await told(messaging_db, body["report_id"]) == 1


@pytest.mark.parametrize(
    "shown",
    [
        reveal(b"something else"),
        reveal(INSULT + b" "),
        reveal(b""),
        reveal(key=bytes(32)),
        reveal(key=KEY + b"\1"),
    ],
)
async def test_what_was_not_written_cannot_be_reported_as_if(
    stack: Stack, messaging_db: Database, shown: dict[str, str]
) -> None:
    ann, bob = await people(stack, 2)
    message_id = await send_franked(ann, await ann.direct(bob))
    assert_problem(await report(bob, message_id, reveal=shown), 422, "franking_mismatch")
    assert await rows(messaging_db, message_id) == []
    assert (await report(bob, message_id, reveal=reveal())).json()["is_verified"] is True


async def test_a_message_without_a_commitment_verifies_nothing(stack: Stack, messaging_db: Database) -> None:
    ann, bob = await people(stack, 2)
    message_id = (await ann.send(await ann.direct(bob)))["id"]
    assert_problem(await report(bob, message_id, reveal=reveal()), 422, "not_franked")
    answer = await report(bob, message_id)
    assert (answer.status_code, answer.json()["is_verified"]) == (201, False)
    assert (await rows(messaging_db, message_id))[0]["plaintext"] is None


async def test_reporting_again_answers_the_first(stack: Stack, messaging_db: Database) -> None:
    ann, bob, cid = await people(stack, 3)
    message_id = await send_franked(ann, await ann.group(bob, cid))
    answers = await asyncio.gather(*(report(bob, message_id, comment=str(n)) for n in range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 201]
    assert len({answer.text for answer in answers}) == 1
    again = await report(bob, message_id, reason="spam", reveal=reveal(b"wrong"))
    assert (again.status_code, again.json()) == (200, answers[0].json())
    assert (await report(cid, message_id)).status_code == 201
    assert len(await rows(messaging_db, message_id)) == 2
    assert await told(messaging_db, answers[0].json()["report_id"]) == 1


async def test_who_may_not_report(stack: Stack, messaging_db: Database) -> None:
    ann, bob, cid, eve = await people(stack, 4)
    group = await ann.group(bob)
    message_id = await send_franked(ann, group)
    await ann.post(f"/conversations/{group}/members", {"member_ids": [cid.id]})
    for door in (eve, cid):
        assert_problem(await report(door, message_id, reveal=reveal()), 404, "message_not_found")
    await ann.delete(f"/conversations/{group}/members/{bob.id}")
    assert_problem(await report(bob, message_id), 404, "message_not_found")
    assert_problem(await report(bob, str(uuid4())), 404, "message_not_found")
    assert_problem(await report(ann, message_id), 422, "own_message")
    assert await rows(messaging_db, message_id) == []
    answer = await stack.http.post(f"{ann.url}/api/v1/messages/{message_id}/report", json={"reason": "spam"})
    assert answer.status_code == 401


async def test_a_report_survives_blocking_either_way(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    direct = await ann.direct(bob)
    first, second = [await send_franked(ann, direct) for _ in range(2)]
    blocks = f"{stack.user.url}/api/v1/users/me/blocks"
    await stack.http.put(f"{blocks}/{ann.id}", headers=bob.person.headers)
    assert (await report(bob, first, reveal=reveal())).status_code == 201
    await stack.http.put(f"{blocks}/{bob.id}", headers=ann.person.headers)
    assert (await report(bob, second, reveal=reveal())).status_code == 201


@pytest.mark.parametrize(
    "body",
    [
        {"reason": "boredom"},
        {"reason": None},
        {"reason": ["spam"]},
        {"comment": "x" * 2001},
        {"comment": 1},
        {"reveal": {}},
        {"reveal": "x"},
        {"reveal": {"plaintext": "YQ=="}},
        {"reveal": {"plaintext": "a", "franking_key": b64(KEY)}},
        {"reveal": {"plaintext": "YQ==\n", "franking_key": b64(KEY)}},
        {"reveal": {"plaintext": "YQ==", "franking_key": b64(b"short")}},
        {"reveal": {"plaintext": "YQ==", "franking_key": b64(bytes(65))}},
        {"reveal": {"plaintext": "YQ==", "franking_key": "\u00e9"}},
        {"reveal": {"plaintext": "A" * 140_000, "franking_key": b64(KEY)}},
    ],
)
async def test_malformed_reports(stack: Stack, body: dict[str, Any]) -> None:
    ann, bob = await people(stack, 2)
    message_id = await send_franked(ann, await ann.direct(bob))
    assert_problem(await report(bob, message_id, **body), 422, "invalid_request")


async def test_a_deleted_account_takes_its_reports_along(stack: Stack, messaging_db: Database) -> None:
    ann, bob, cid = await people(stack, 3)
    message_id = await send_franked(ann, await ann.group(bob, cid))
    for door in (bob, cid):
        await report(door, message_id, reveal=reveal())
    gone = await stack.http.request(
        "DELETE",
        f"{stack.auth.url}/api/v1/auth/account",
        headers=bob.person.headers,
        json={"password": bob.person.password},
    )
    assert gone.status_code == 204, gone.text
    async with asyncio.timeout(10):
        while len(await rows(messaging_db, message_id)) > 1:
            await asyncio.sleep(0.05)
    assert [str(row["reporter_id"]) for row in await rows(messaging_db, message_id)] == [cid.id]


async def test_old_reports_go(stack: Stack, messaging_db: Database, messaging_cache: Cache) -> None:
    ann, bob = await people(stack, 2)
    direct = await ann.direct(bob)
    old, new = [await send_franked(ann, direct) for _ in range(2)]
    clock = ManualClock(stack.clock.now())
    reports = Reports(
        messaging_db, clock, RateLimiter(messaging_cache), lambda: None, life=timedelta(days=365)
    )
    who = bob.person.user_id
    await reports.submit(UUID(old), who, ReportReason.SPAM, None, None)
    clock.advance(364 * 86_400)
    await reports.submit(UUID(new), who, ReportReason.SPAM, None, None)
    await reports.forget_old()
    assert await rows(messaging_db, old)
    clock.advance(2 * 86_400)
    assert await reports.forget_old() >= 1
    assert await rows(messaging_db, old) == []
    assert await rows(messaging_db, new)


async def test_a_person_makes_so_many_reports_a_day(
    stack: Stack, messaging_db: Database, messaging_cache: Cache
) -> None:
    ann, bob = await people(stack, 2)
    message_id = UUID(await send_franked(ann, await ann.direct(bob)))
    limiter = RateLimiter(messaging_cache)
    reports = Reports(messaging_db, stack.clock, limiter, lambda: None, life=timedelta(days=365))
    who = bob.person.user_id
    first, _ = await reports.submit(message_id, who, ReportReason.SPAM, None, None)
    for _ in range(REPORTS_PER_DAY - 1):
        await limiter.check("reports", str(who), REPORTS_PER_DAY, 86_400)
    with pytest.raises(RateLimited):
        await reports.submit(uuid4(), who, ReportReason.SPAM, None, None)
    # A repeat whose answer was lost is answered all the same.
    assert await reports.submit(message_id, who, ReportReason.SPAM, None, None) == (first, False)
