"""Registration: what it takes, what it refuses, and that it can be repeated."""

from __future__ import annotations

import asyncio
import base64
from typing import Any
from uuid import UUID, uuid4

import jwt
import pytest
from tests.services.auth.house import AuthHouse, code
from tests.stack import PASSWORD, DeviceKeys, b64

from whispr.kit.db import Connection


def body(**changes: Any) -> dict[str, Any]:
    return {
        "username": f"u{uuid4().hex[:20]}",
        "password": PASSWORD,
        "device": DeviceKeys().registration(2),
        **changes,
    }


async def test_register_gives_a_session(house: AuthHouse) -> None:
    answer = await house.call("POST", "/auth/register", json=body())
    session = answer.json()
    assert answer.status_code == 201
    assert set(session) == {
        "user_id", "device_id", "session_id", "access_token", "token_type", "expires_in", "refresh_token",
    }  # fmt: skip
    assert session["token_type"] == "Bearer"
    assert session["expires_in"] == 600
    assert UUID(session["user_id"]).version == 7


async def test_access_token_says_who_and_for_how_long(house: AuthHouse) -> None:
    person = await house.register()
    header = jwt.get_unverified_header(person.token)
    keys = (await house.http.get(f"{house.auth.url}/.well-known/jwks.json")).json()["keys"]
    key = jwt.PyJWK(next(key for key in keys if key["kid"] == header["kid"]))
    claims = jwt.decode(
        person.token, key, algorithms=["EdDSA"], audience="whispr", issuer="whispr",
        options={"verify_iat": False, "verify_nbf": False, "verify_exp": False},
    )  # fmt: skip
    assert header["alg"] == "EdDSA"
    assert (claims["sub"], claims["did"], claims["sid"]) == tuple(
        person.session[name] for name in ("user_id", "device_id", "session_id")
    )
    assert claims["exp"] - claims["iat"] == 600
    assert claims["roles"] == []


async def test_password_is_kept_as_argon2id_only(house: AuthHouse, rows: Connection) -> None:
    person = await house.register()
    kept = await rows.fetchval("SELECT password_hash FROM accounts WHERE id = $1", person.user_id)
    assert kept.startswith("$argon2id$")
    assert PASSWORD not in kept


async def test_refresh_token_is_not_kept(house: AuthHouse, rows: Connection) -> None:
    person = await house.register()
    token = base64.urlsafe_b64decode(person.session["refresh_token"] + "==")
    kept = await rows.fetch("SELECT * FROM refresh_tokens WHERE session_id = $1", person.session_id)
    assert len(kept) == 1
    assert all(
        token[16:48] not in value for row in kept for value in row.values() if isinstance(value, bytes)
    )


@pytest.mark.parametrize(
    "username", ["ab", "a" * 33, "Alice1", "with space", "émile", "a-b-c", "abc\n", "", "abc\0"]
)
async def test_username_rules(house: AuthHouse, username: str) -> None:
    assert code(await house.call("POST", "/auth/register", json=body(username=username))) == (
        422,
        "invalid_request",
    )


@pytest.mark.parametrize("username", ["a_", "..", "a.b", "_0_", "z" * 27])
async def test_usernames_the_contract_allows(house: AuthHouse, username: str) -> None:
    unique = username + uuid4().hex[:5]
    assert (await house.call("POST", "/auth/register", json=body(username=unique))).status_code == 201


@pytest.mark.parametrize(
    "change",
    [
        {"password": "123456789"},
        {"password": "x" * 1025},
        {"password": None},
        {"device": None},
        {"username": 7},
    ],
)
async def test_body_rules(house: AuthHouse, change: dict[str, Any]) -> None:
    answer = await house.call("POST", "/auth/register", json=body(**change))
    assert code(answer) == (422, "invalid_request")
    assert answer.json()["errors"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "   "),
        ("name", "x" * 65),
        ("name", "line\nbreak"),
        ("platform", "toaster"),
        ("registration_id", 0),
        ("registration_id", 16381),
        ("registration_id", "7"),
        ("registration_id", True),
        ("identity_key", b64(b"x" * 31)),
        ("identity_key", b64(b"x" * 33)),
        ("identity_key", "not base64"),
        ("identity_key", b64(b"x" * 32).rstrip("=")),
        ("identity_key", b64(b"x" * 32)[:-2] + "9="),
        ("identity_key", base64.urlsafe_b64encode(b"\xff" * 32).decode()),
        ("signing_key", None),
        ("signed_prekey", {"key_id": 1, "public_key": b64(b"x" * 32)}),
        ("signed_prekey", {"key_id": -1, "public_key": b64(b"x" * 32), "signature": b64(b"x" * 64)}),
        ("one_time_prekeys", [{"key_id": n, "public_key": b64(n.to_bytes(32, "big"))} for n in range(101)]),
        ("one_time_prekeys", [{"key_id": 1, "public_key": b64(bytes([n]) * 32)} for n in range(2)]),
        ("one_time_prekeys", [{"key_id": n, "public_key": b64(bytes(32))} for n in range(2)]),
    ],
)
async def test_device_rules(house: AuthHouse, field: str, value: Any) -> None:
    device = {**DeviceKeys().registration(), field: value}
    answer = await house.call("POST", "/auth/register", json=body(device=device))
    assert code(answer) == (422, "invalid_request")


async def test_prekey_must_be_signed_by_the_signing_key(house: AuthHouse) -> None:
    device = DeviceKeys().registration(signed_prekey=DeviceKeys().signed_prekey())
    assert code(await house.call("POST", "/auth/register", json=body(device=device))) == (
        422,
        "bad_signature",
    )


async def test_prekeys_may_be_left_out(house: AuthHouse) -> None:
    device = DeviceKeys().registration()
    del device["one_time_prekeys"]
    assert (await house.call("POST", "/auth/register", json=body(device=device))).status_code == 201


async def test_a_username_is_given_once(house: AuthHouse) -> None:
    person = await house.register()
    answer = await house.call("POST", "/auth/register", json=body(username=person.username))
    assert code(answer) == (409, "username_taken")


async def test_repeating_with_the_key_gives_the_same_account_with_fresh_tokens(house: AuthHouse) -> None:
    request, headers = body(), {"Idempotency-Key": uuid4().hex}
    first, second = [
        (await house.call("POST", "/auth/register", json=request, headers=headers)).json() for _ in range(2)
    ]
    for name in ("user_id", "device_id", "session_id"):
        assert first[name] == second[name]
    assert first["refresh_token"] != second["refresh_token"]
    for session in (first, second):
        assert (await house.refresh(session["refresh_token"])).status_code == 200


async def test_twins_sent_at_once_make_one_account(house: AuthHouse, rows: Connection) -> None:
    request, headers = body(), {"Idempotency-Key": uuid4().hex}
    answers = await asyncio.gather(
        *(house.call("POST", "/auth/register", json=request, headers=headers) for _ in range(6))
    )
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["session_id"] for answer in answers}) == 1
    assert await rows.fetchval("SELECT count(*) FROM accounts WHERE username = $1", request["username"]) == 1


@pytest.mark.parametrize("change", [{"password": "another password"}, {"device": None}])
async def test_the_key_alone_is_no_way_in(house: AuthHouse, change: dict[str, Any]) -> None:
    request, headers = body(), {"Idempotency-Key": uuid4().hex}
    await house.call("POST", "/auth/register", json=request, headers=headers)
    if "device" in change:
        change = {"device": DeviceKeys().registration()}
    answer = await house.call("POST", "/auth/register", json={**request, **change}, headers=headers)
    assert code(answer) in [(409, "username_taken"), (409, "idempotency_key_reused")]


async def test_another_key_does_not_repeat(house: AuthHouse) -> None:
    request = body()
    for expected in (201, 409):
        answer = await house.call(
            "POST", "/auth/register", json=request, headers={"Idempotency-Key": uuid4().hex}
        )
        assert answer.status_code == expected


async def test_a_key_is_forgotten_after_a_day(house: AuthHouse) -> None:
    request, headers = body(), {"Idempotency-Key": uuid4().hex}
    await house.call("POST", "/auth/register", json=request, headers=headers)
    house.clock.advance(86_401)
    answer = await house.call("POST", "/auth/register", json=request, headers=headers)
    assert code(answer) == (409, "username_taken")


async def test_a_key_whose_session_ended_brings_none_back(house: AuthHouse) -> None:
    request, headers = body(), {"Idempotency-Key": uuid4().hex}
    first = (await house.call("POST", "/auth/register", json=request, headers=headers)).json()
    await house.call("POST", "/auth/logout", headers={"Authorization": f"Bearer {first['access_token']}"})
    answer = await house.call("POST", "/auth/register", json=request, headers=headers)
    assert code(answer) == (409, "idempotency_key_reused")
