"""Sessions, passwords, and how revocation travels."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import uuid4

import pytest
from tests.services.auth.house import ORIGIN, AuthHouse, caller_of, code, new_device, register, rules, until
from tests.stack import PASSWORD

from whispr.kit.clock import ManualClock
from whispr.kit.db import Connection
from whispr.kit.identity import Revocation

SOME_ID = "01a1fb8e-963b-71f9-ae9b-c029c90a02cf"

REVOKED = (401, "session_revoked")
APNS = {"channel": "apns", "token": "ab" * 32, "app_id": "chat.whispr", "environment": "production"}


async def test_sessions_are_listed_with_their_devices(house: AuthHouse) -> None:
    person = await house.register()
    second = await house.add_device(person, name="Phone", platform="ios")
    items = (await house.call("GET", "/auth/sessions", person)).json()["items"]
    assert [(item["session_id"], item["device_name"], item["current"]) for item in items] == [
        (str(person.session_id), "Test device", True),
        (str(second.session_id), "Phone", False),
    ]
    assert items[0]["id"] == items[0]["session_id"]


async def test_sessions_page_by_cursor(house: AuthHouse) -> None:
    person = await house.register()
    for _ in range(4):
        await house.log_in(person, device_id=str(person.device_id))
    seen, cursor = [], None
    while True:
        params = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = (await house.call("GET", "/auth/sessions", person, params=params)).json()
        assert len(page["items"]) <= 2
        seen += [item["session_id"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert len(seen) == len(set(seen)) == 5
    assert code(await house.call("GET", "/auth/sessions", person, params={"cursor": "nonsense"}))[0] == 422
    assert code(await house.call("GET", "/auth/sessions", person, params={"limit": 101}))[0] == 422


async def test_an_ended_session_is_over_at_once(house: AuthHouse) -> None:
    person = await house.register()
    second = await house.add_device(person)
    for _ in range(2):
        ended = await house.call("DELETE", f"/auth/sessions/{second.session_id}", person)
        assert ended.status_code == 204
    assert code(await house.call("GET", "/devices", second)) == REVOKED
    assert code(await house.refresh(second.session["refresh_token"])) == REVOKED
    assert (await house.call("GET", "/devices", person)).status_code == 200


async def test_nobody_ends_another_persons_session(house: AuthHouse) -> None:
    person, stranger = await house.register(), await house.register()
    for session_id in (stranger.session_id, uuid4()):
        answer = await house.call("DELETE", f"/auth/sessions/{session_id}", person)
        assert code(answer) == (404, "session_not_found")
    assert (await house.call("GET", "/devices", stranger)).status_code == 200


async def test_logging_out_ends_this_session_only(house: AuthHouse) -> None:
    person = await house.register()
    second = await house.add_device(person)
    assert (await house.call("POST", "/auth/logout", person)).status_code == 204
    assert code(await house.call("POST", "/auth/logout", person)) == REVOKED
    assert (await house.call("GET", "/devices", second)).status_code == 200


async def test_a_device_without_a_session_gets_no_pushes(house: AuthHouse, rows: Connection) -> None:
    person = await house.register()
    other = (await house.log_in(person, device_id=str(person.device_id))).json()
    put = await house.call(
        "PUT", f"/devices/{person.device_id}/push-token", person, APNS | {"token": uuid4().hex * 2}
    )
    assert put.status_code == 204

    async def tokens() -> int:
        return int(
            await rows.fetchval("SELECT count(*) FROM push_tokens WHERE device_id = $1", person.device_id)
        )

    await house.call("POST", "/auth/logout", headers={"Authorization": f"Bearer {other['access_token']}"})
    assert await tokens() == 1
    await house.call("POST", "/auth/logout", person)
    assert await tokens() == 0


async def test_a_revocation_is_hinted_and_can_be_read(house: AuthHouse) -> None:
    person = await house.register()
    since = house.clock.now()
    async with house.hints("auth:revocations") as heard:
        await house.call("POST", "/auth/logout", person)
        await until(lambda: heard)
    assert (heard[0]["subject"], heard[0]["id"]) == ("session", str(person.session_id))
    async with house.as_service("media") as media:
        told = await media.revocations(since - timedelta(seconds=1))
        assert Revocation(subject="session", id=person.session_id, at=since) in told
        assert person.session_id not in [
            item.id for item in await media.revocations(since + timedelta(seconds=1))
        ]


async def test_revocations_are_kept_as_long_as_a_token_could_live(house: AuthHouse) -> None:
    person = await house.register()
    since = house.clock.now() - timedelta(seconds=1)
    await house.call("POST", "/auth/logout", person)
    async with house.as_service("scheduling") as scheduling:
        house.clock.advance(3600)
        await scheduling.cleanup_expired_sessions(uuid4())
        assert person.session_id in [item.id for item in await scheduling.revocations(since)]
        house.clock.advance(600)
        _, removed = await scheduling.cleanup_expired_sessions(uuid4())
        assert removed >= 1
        assert person.session_id not in [item.id for item in await scheduling.revocations(since)]


async def test_another_process_refuses_within_a_second(house: AuthHouse) -> None:
    person = await house.register()
    other = await house.another_node("auth")
    url = f"{other.url}/api/v1/devices"
    assert (await house.http.get(url, headers=person.headers)).status_code == 200
    await house.call("POST", "/auth/logout", person)
    await asyncio.sleep(0.5)
    assert code(await house.http.get(url, headers=person.headers)) == REVOKED


async def test_changing_the_password_ends_all_other_sessions(house: AuthHouse) -> None:
    person = await house.register()
    second = await house.add_device(person)
    body = {"current_password": PASSWORD, "new_password": "a quite different one"}
    assert (await house.call("PUT", "/auth/password", person, body)).status_code == 204
    assert (await house.call("GET", "/devices", person)).status_code == 200
    assert (await house.refresh(person.session["refresh_token"])).status_code == 200
    assert code(await house.call("GET", "/devices", second)) == REVOKED
    assert code(await house.refresh(second.session["refresh_token"])) == REVOKED
    assert code(await house.log_in(person, device_id=str(second.device_id)))[0] == 401
    person.password = "a quite different one"
    assert (await house.log_in(person, device_id=str(second.device_id))).status_code == 200


async def test_the_current_password_is_needed(house: AuthHouse) -> None:
    person = await house.register()
    second = await house.add_device(person)
    body = {"current_password": PASSWORD + "x", "new_password": "a quite different one"}
    assert code(await house.call("PUT", "/auth/password", person, body)) == (403, "wrong_password")
    assert (await house.call("GET", "/devices", second)).status_code == 200
    short = {"current_password": PASSWORD, "new_password": "short"}
    assert code(await house.call("PUT", "/auth/password", person, short)) == (422, "invalid_request")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/auth/logout"),
        ("GET", "/auth/sessions"),
        ("DELETE", f"/auth/sessions/{SOME_ID}"),
        ("PUT", "/auth/password"),
        ("DELETE", "/auth/account"),
        ("GET", "/devices"),
        ("DELETE", f"/devices/{SOME_ID}"),
        ("PUT", f"/devices/{SOME_ID}/push-token"),
        ("DELETE", f"/devices/{SOME_ID}/push-token"),
        ("PUT", "/keys"),
        ("GET", "/keys"),
        ("POST", "/keys/check"),
        ("GET", f"/keys/{SOME_ID}"),
        ("GET", f"/keys/{SOME_ID}/{SOME_ID}"),
    ],
)
async def test_every_other_route_needs_a_token(house: AuthHouse, method: str, path: str) -> None:
    assert code(await house.call(method, path, json={}))[0] == 401
    forged = {"Authorization": "Bearer eyJhbGciOiJub25lIn0.e30."}
    assert code(await house.call(method, path, json={}, headers=forged)) == (401, "invalid_token")


async def test_an_access_token_expires(house: AuthHouse) -> None:
    person = await house.register()
    house.clock.advance(601)
    assert code(await house.call("GET", "/devices", person)) == (401, "token_expired")


async def test_without_valkey_nothing_fails_and_revocations_can_still_be_read(rules_url: str) -> None:
    clock = ManualClock()
    async with rules(rules_url, "redis://127.0.0.1:1/0", clock) as auth:
        username, tokens = await register(auth)
        await auth.entry.log_in(username, PASSWORD, ORIGIN, device=new_device())
        await auth.sessions.log_out(caller_of(tokens))
        told = await auth.source.revocations(clock.now())
        assert Revocation(subject="session", id=tokens.session_id, at=clock.now()) in told
