"""Refresh tokens: each works once, its answer may be had again for ten seconds, its reuse ends the family."""

from __future__ import annotations

import asyncio
import base64
from uuid import uuid4

import pytest
from tests.services.auth.house import AuthHouse, code, until

from whispr.kit.db import Connection

REUSED = (401, "refresh_reused")
REVOKED = (401, "session_revoked")
UNKNOWN = (401, "invalid_refresh_token")


async def test_each_refresh_gives_a_new_token_of_the_same_session(house: AuthHouse) -> None:
    person = await house.register()
    token, seen = person.session["refresh_token"], set()
    for _ in range(4):
        seen.add(token)
        answer = await house.refresh(token)
        assert answer.status_code == 200
        assert answer.json()["session_id"] == str(person.session_id)
        token = answer.json()["refresh_token"]
    assert token not in seen


async def test_the_answer_can_be_had_again_within_ten_seconds(house: AuthHouse) -> None:
    person = await house.register()
    first = (await house.refresh(person.session["refresh_token"])).json()
    house.clock.advance(10)
    again = (await house.refresh(person.session["refresh_token"], device_id=str(person.device_id))).json()
    assert again["refresh_token"] == first["refresh_token"]
    assert (await house.refresh(first["refresh_token"])).status_code == 200


async def test_sent_many_times_at_once_there_is_one_successor(house: AuthHouse) -> None:
    person = await house.register()
    answers = await asyncio.gather(*(house.refresh(person.session["refresh_token"]) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["refresh_token"] for answer in answers}) == 1


async def test_later_it_is_reuse_and_ends_the_family(house: AuthHouse) -> None:
    person = await house.register()
    successor = (await house.refresh(person.session["refresh_token"])).json()
    house.clock.advance(10.001)
    assert code(await house.refresh(person.session["refresh_token"])) == REUSED
    assert code(await house.refresh(successor["refresh_token"])) == REVOKED
    headers = {"Authorization": f"Bearer {successor['access_token']}"}
    assert code(await house.call("GET", "/devices", headers=headers)) == REVOKED


async def test_the_grace_is_for_the_last_token_only(house: AuthHouse) -> None:
    person = await house.register()
    second = (await house.refresh(person.session["refresh_token"])).json()
    assert (await house.refresh(second["refresh_token"])).status_code == 200
    assert code(await house.refresh(person.session["refresh_token"])) == REUSED


async def test_another_device_has_no_grace(house: AuthHouse) -> None:
    person = await house.register()
    second = await house.add_device(person)
    await house.refresh(person.session["refresh_token"])
    answer = await house.refresh(person.session["refresh_token"], device_id=str(second.device_id))
    assert code(answer) == REUSED
    assert (await house.refresh(second.session["refresh_token"])).status_code == 200


async def test_a_stolen_unused_token_named_to_another_device_ends_the_family(house: AuthHouse) -> None:
    person = await house.register()
    assert code(await house.refresh(person.session["refresh_token"], device_id=str(uuid4()))) == REUSED
    assert code(await house.refresh(person.session["refresh_token"])) == REVOKED


async def test_reuse_ends_only_its_family_and_is_announced(house: AuthHouse, rows: Connection) -> None:
    person = await house.register()
    other = (await house.log_in(person, device_id=str(person.device_id))).json()
    await house.refresh(person.session["refresh_token"])
    house.clock.advance(11)
    async with house.hints("auth:revocations") as heard:
        await house.refresh(person.session["refresh_token"])
        await until(lambda: heard)
    assert (heard[0]["subject"], heard[0]["id"]) == ("session", str(person.session_id))
    assert (await house.refresh(other["refresh_token"])).status_code == 200
    events = await rows.fetch("SELECT event FROM audit_events WHERE account_id = $1", person.user_id)
    assert "refresh_reused" in [row["event"] for row in events]


async def test_reuse_is_known_after_the_tokens_row_is_gone(house: AuthHouse, rows: Connection) -> None:
    person = await house.register()
    second = (await house.refresh(person.session["refresh_token"])).json()
    house.clock.advance(3 * 3600)
    async with house.as_service("scheduling") as scheduling:
        await scheduling.cleanup_expired_sessions(uuid4())
    kept = await rows.fetchval("SELECT count(*) FROM refresh_tokens WHERE session_id = $1", person.session_id)
    assert kept == 1
    assert code(await house.refresh(person.session["refresh_token"])) == REUSED
    assert code(await house.refresh(second["refresh_token"])) == REVOKED


async def test_a_session_nobody_used_expires(house: AuthHouse) -> None:
    person = await house.register()
    house.clock.advance(89 * 86400)
    # Seen with another session; the last one of a device stays as long as the device.
    await house.log_in(person, device_id=str(person.device_id))
    house.clock.advance(86400)
    assert code(await house.refresh(person.session["refresh_token"])) == (401, "refresh_token_expired")
    async with house.as_service("scheduling") as scheduling:
        sessions, _ = await scheduling.cleanup_expired_sessions(uuid4())
    assert sessions >= 1
    assert code(await house.refresh(person.session["refresh_token"])) == UNKNOWN


async def test_use_keeps_a_session_alive(house: AuthHouse) -> None:
    person = await house.register()
    token = person.session["refresh_token"]
    for _ in range(3):
        house.clock.advance(60 * 86400)
        answer = await house.refresh(token)
        assert answer.status_code == 200
        token = answer.json()["refresh_token"]


def altered(token: str, place: int) -> str:
    raw = bytearray(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    raw[place] ^= 1
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@pytest.mark.parametrize("place", [0, 15, 16, 47, 48, 63])
async def test_a_forged_token_is_unknown_and_harms_nobody(house: AuthHouse, place: int) -> None:
    person = await house.register()
    token = person.session["refresh_token"]
    assert code(await house.refresh(altered(token, place))) == UNKNOWN
    assert (await house.refresh(token)).status_code == 200


@pytest.mark.parametrize("token", ["x", "é", "a" * 512, "!!!!", "=" * 8])
async def test_what_is_no_token_is_unknown(house: AuthHouse, token: str) -> None:
    assert code(await house.refresh(token)) == UNKNOWN


async def test_another_spelling_of_a_token_is_unknown(house: AuthHouse) -> None:
    person = await house.register()
    token = person.session["refresh_token"]
    for spelling in (token + "=", token[:10] + "\n" + token[10:], token + "=="):
        assert code(await house.refresh(spelling)) == UNKNOWN


async def test_last_seen_is_kept_to_the_day(house: AuthHouse, rows: Connection) -> None:
    person = await house.register()
    house.clock.advance(2 * 86400)
    await house.refresh(person.session["refresh_token"])
    day = await rows.fetchval("SELECT last_seen_day FROM devices WHERE id = $1", person.device_id)
    assert day == house.clock.now().date()
