"""Login: new and known devices, one answer for everything wrong, limits."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from uuid import uuid4

import jwt
import pytest
from tests.services.auth.house import ORIGIN, AuthHouse, code, new_device, register, rules
from tests.stack import PASSWORD, DeviceKeys, Node

from whispr.kit.clock import ManualClock
from whispr.kit.db import Connection
from whispr.services.auth.models import Busy
from whispr.services.auth.service.passwords import Passwords
from whispr.services.auth.settings import AuthSettings

WRONG = (401, "invalid_credentials")


async def test_a_new_device_joins_the_account(house: AuthHouse) -> None:
    person = await house.register()
    second = await house.add_device(person)
    assert second.user_id == person.user_id
    assert second.device_id != person.device_id
    listed = (await house.call("GET", "/devices", person)).json()["items"]
    assert [item["device_id"] for item in listed] == [str(person.device_id), str(second.device_id)]


async def test_a_known_device_logs_in_again(house: AuthHouse) -> None:
    person = await house.register()
    answer = await house.log_in(person, device_id=str(person.device_id))
    assert answer.status_code == 200
    assert answer.json()["device_id"] == str(person.device_id)
    assert answer.json()["session_id"] != str(person.session_id)
    assert len((await house.call("GET", "/devices", person)).json()["items"]) == 1


async def test_a_known_device_may_show_its_keys_but_not_change_them(house: AuthHouse) -> None:
    person = await house.register()
    same = person.keys.registration(signed_prekey=person.keys.signed_prekey(9))
    assert (await house.log_in(person, device_id=str(person.device_id), device=same)).status_code == 200
    counts = (await house.call("GET", "/keys", person)).json()
    assert counts["signed_prekey_id"] == 1
    other = await house.log_in(person, device_id=str(person.device_id), device=DeviceKeys().registration())
    assert code(other) == (409, "device_keys_differ")


async def test_everything_wrong_has_one_answer(house: AuthHouse) -> None:
    person, stranger = await house.register(), await house.register()
    removed = await house.add_device(person)
    await house.call("DELETE", f"/devices/{removed.device_id}", person)
    device = DeviceKeys().registration()
    attempts = [
        {"username": "nobody_at_all", "password": PASSWORD, "device": device},
        {"username": "Ünknown name!", "password": PASSWORD, "device": device},
        {"username": person.username, "password": PASSWORD + "x", "device": device},
        {"username": person.username, "password": "short", "device": device},
        {"username": person.username, "password": PASSWORD, "device_id": str(stranger.device_id)},
        {"username": person.username, "password": PASSWORD, "device_id": str(removed.device_id)},
        {"username": person.username, "password": PASSWORD, "device_id": str(uuid4())},
        {"username": person.username.upper(), "password": PASSWORD, "device": device},
    ]
    bodies = []
    for attempt in attempts:
        answer = await house.call("POST", "/auth/login", json=attempt)
        assert code(answer) == WRONG
        bodies.append(
            {key: value for key, value in answer.json().items() if key not in ("request_id", "trace_id")}
        )
    assert all(body == bodies[0] for body in bodies)


async def test_an_unknown_name_costs_as_much_work(monkeypatch: pytest.MonkeyPatch) -> None:
    passwords = Passwords(AuthSettings(database_url="x", argon2_time_cost=1, argon2_memory_kib=64))
    verified: list[str] = []
    matches = passwords._matches

    def watched(password_hash: str, password: str) -> bool:
        verified.append(password_hash)
        return matches(password_hash, password)

    monkeypatch.setattr(passwords, "_matches", watched)
    assert not await passwords.verify(None, PASSWORD)
    assert verified[0].startswith("$argon2id$")
    passwords.close()


async def test_neither_device_nor_id_is_invalid(house: AuthHouse) -> None:
    person = await house.register()
    assert code(await house.log_in(person)) == (422, "invalid_request")


async def test_a_new_device_must_sign_its_prekey(house: AuthHouse) -> None:
    person = await house.register()
    device = DeviceKeys().registration(signed_prekey=DeviceKeys().signed_prekey())
    assert code(await house.log_in(person, device=device)) == (422, "bad_signature")


async def test_an_account_has_so_many_devices_and_no_more(house: AuthHouse) -> None:
    person = await house.register()
    answers = await asyncio.gather(
        *(house.log_in(person, device=DeviceKeys().registration()) for _ in range(12))
    )
    assert sorted(answer.status_code for answer in answers) == [200] * 9 + [409] * 3
    refused = next(answer for answer in answers if answer.status_code == 409)
    assert code(refused) == (409, "too_many_devices")
    await house.call("DELETE", f"/devices/{person.device_id}", person)
    assert (await house.log_in(person, device=DeviceKeys().registration())).status_code == 200


async def test_a_new_device_counts_the_epoch_and_is_announced(house: AuthHouse, rows: Connection) -> None:
    person = await house.register()
    before = await rows.fetchval("SELECT device_list_epoch FROM accounts WHERE id = $1", person.user_id)
    async with house.hints("user:notices") as notices, house.hints("cache:invalidate:messaging") as stale:
        await house.add_device(person)
        await asyncio.sleep(0.1)
    assert before == 1
    assert {
        "user_id": str(person.user_id),
        "event": "device_list_changed",
        "payload": {"user_id": str(person.user_id), "epoch": 2},
    } in notices
    assert {"kind": "devices", "user_id": str(person.user_id), "epoch": 2} in stale


async def test_repeating_a_login_gives_the_same_session(house: AuthHouse) -> None:
    person = await house.register()
    request, headers = {"device": DeviceKeys().registration()}, {"Idempotency-Key": uuid4().hex}
    body = {"username": person.username, "password": PASSWORD, **request}
    answers = await asyncio.gather(
        *(house.call("POST", "/auth/login", json=body, headers=headers) for _ in range(4))
    )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["session_id"] for answer in answers}) == 1
    assert len((await house.call("GET", "/devices", person)).json()["items"]) == 2
    other = {**body, "device": DeviceKeys().registration()}
    assert code(await house.call("POST", "/auth/login", json=other, headers=headers)) == (
        409,
        "idempotency_key_reused",
    )
    wrong = {**body, "password": PASSWORD + "x"}
    assert code(await house.call("POST", "/auth/login", json=wrong, headers=headers)) == WRONG


async def test_a_device_keeps_its_newest_sessions(rules_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(rules_url, valkey_url, clock, max_sessions_per_device=3) as auth:
        username, first = await register(auth)
        sessions = [first.session_id]
        for _ in range(3):
            tokens = await auth.entry.log_in(username, PASSWORD, ORIGIN, device_id=first.device_id)
            sessions.append(tokens.session_id)
        assert [await auth.sessions.is_live(session_id) for session_id in sessions] == [
            False,
            True,
            True,
            True,
        ]


async def test_old_hashes_are_renewed_at_login(rules_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(rules_url, valkey_url, clock) as auth:
        username, _ = await register(auth)
    async with rules(rules_url, valkey_url, clock, argon2_time_cost=2) as auth:
        await auth.entry.log_in(username, PASSWORD, ORIGIN, device=new_device())
        account = await auth.entry._credentials.find(username)
        assert account is not None
        assert ",t=2," in (account.password_hash or "")
        await auth.entry.log_in(username, PASSWORD, ORIGIN, device=new_device())


async def test_composed_and_decomposed_passwords_are_one(rules_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(rules_url, valkey_url, clock) as auth:
        username = f"u{uuid4().hex[:20]}"
        await auth.entry.register(username, "caf\u00e9 caf\u00e9 caf\u00e9", new_device(), ORIGIN)
        await auth.entry.log_in(username, "cafe\u0301 cafe\u0301 cafe\u0301", ORIGIN, device=new_device())


async def test_hashing_has_a_bounded_queue() -> None:
    settings = AuthSettings(database_url="x", argon2_memory_kib=64, hashing_threads=1, hashing_queue=2)
    passwords = Passwords(settings)
    results = await asyncio.gather(*(passwords.hash("x" * 10) for _ in range(10)), return_exceptions=True)
    assert sum(isinstance(result, Busy) for result in results) == 7
    assert (await passwords.hash("again, when it is quiet")).startswith("$argon2id$")
    passwords.close()


@pytest.fixture
async def limited(house: AuthHouse) -> AsyncIterator[Node]:
    """A second auth with its limits on and small."""
    changes = {
        "LOGIN_USERNAME_LIMIT": "3",
        "LOGIN_IP_LIMIT": "8",
        "REGISTER_LIMIT": "2",
        "REFRESH_LIMIT": "3",
    }
    changes |= {"JWKS_LIMIT": "3", "PASSWORD_LIMIT": "2", "CLAIM_LIMIT": "2"}
    names = {f"WHISPR_AUTH_{name}": value for name, value in changes.items()}
    os.environ.update(names)
    node = await house.another_node("auth", rate_limits="on")
    yield node
    for name in names:
        del os.environ[name]


async def test_open_routes_are_limited(house: AuthHouse, limited: Node) -> None:
    person = await house.register()
    at = {"X-Forwarded-For": f"198.51.100.{uuid4().int % 200}"}

    async def spend(
        method: str, path: str, count: int, body: object = None, headers: dict[str, str] = at
    ) -> list[int]:
        answers = [
            await house.http.request(method, f"{limited.url}{path}", json=body, headers=headers)
            for _ in range(count)
        ]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
        return [answer.status_code for answer in answers]

    login = {"username": person.username, "password": "wrong password", "device": DeviceKeys().registration()}
    assert await spend("POST", "/api/v1/auth/login", 4, login) == [401, 401, 401, 429]
    elsewhere = {"X-Forwarded-For": "203.0.113.9"}
    assert await spend("POST", "/api/v1/auth/login", 1, login, elsewhere) == [429]
    unknown = {**login, "username": "nobody_here"}
    assert await spend("POST", "/api/v1/auth/login", 5, unknown) == [401, 401, 401, 429, 429]
    bad = {"refresh_token": "x"}
    assert await spend("POST", "/api/v1/auth/refresh", 4, bad) == [401, 401, 401, 429]
    assert await spend("GET", "/.well-known/jwks.json", 4) == [200, 200, 200, 429]
    new = {"username": f"u{uuid4().hex[:20]}", "password": PASSWORD, "device": DeviceKeys().registration()}
    assert await spend("POST", "/api/v1/auth/register", 3, new) == [201, 409, 429]
    wrong = {"current_password": "wrong password", "new_password": "also long enough"}
    assert await spend("PUT", "/api/v1/auth/password", 3, wrong, person.headers) == [403, 403, 429]
    claim = f"/api/v1/keys/{person.user_id}"
    assert await spend("GET", claim, 3, None, person.headers) == [200, 200, 429]


async def test_roles_come_with_login_and_refresh(house: AuthHouse) -> None:
    from whispr.services.auth.app import grant_role, revoke_role

    person = await house.register()

    async def roles(token: str) -> list[str]:
        return list(jwt.decode(token, options={"verify_signature": False})["roles"])

    assert await grant_role(house.database_url, person.username, "admin")
    assert not await grant_role(house.database_url, person.username, "admin")
    session = (await house.refresh(person.session["refresh_token"])).json()
    assert await roles(session["access_token"]) == ["admin"]
    again = (await house.log_in(person, device_id=str(person.device_id))).json()
    assert await roles(again["access_token"]) == ["admin"]
    assert await revoke_role(house.database_url, person.username, "admin")
    session = (await house.refresh(session["refresh_token"])).json()
    assert await roles(session["access_token"]) == []
