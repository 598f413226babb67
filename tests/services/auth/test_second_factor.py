"""The second factor: set up, asked for wherever a password is, spent once, locked after guessing, encrypted at rest."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import httpx
import pytest
from tests.services.auth import authenticator
from tests.services.auth.authenticator import STEP, Authenticator, set_up
from tests.services.auth.house import ORIGIN, AuthHouse, caller_of, code, new_device, register, rules
from tests.stack import PASSWORD, DeviceKeys, Person

from whispr.kit.clock import ManualClock
from whispr.kit.db import Connection
from whispr.services.auth.models import BadTotpCode, Codes, TotpLocked

REQUIRED, BAD = "totp_required", "bad_totp_code"


async def state(house: AuthHouse, person: Person) -> tuple[bool, int]:
    answer = (await house.call("GET", "/auth/totp", person)).json()
    return answer["enabled"], answer["recovery_codes_left"]


async def log_in(house: AuthHouse, person: Person, **codes: Any) -> httpx.Response:
    return await house.log_in(person, device_id=str(person.device_id), **codes)


def test_the_tests_authenticator_agrees_with_the_rfc() -> None:
    # RFC 6238, appendix B, the last six of its eight digits.
    app = Authenticator("GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ")
    assert [app.code(at) for at in (59, 1111111109, 20000000000)] == ["287082", "081804", "353130"]


async def test_it_is_set_up_in_two_steps(house: AuthHouse) -> None:
    person = await house.register()
    assert await state(house, person) == (False, 0)
    begun = (await house.call("POST", "/auth/totp", person, {"password": PASSWORD})).json()
    uri = urlsplit(begun["otpauth_uri"])
    query = {name: value for name, (value,) in parse_qs(uri.query).items()}
    assert (uri.scheme, uri.netloc, uri.path) == ("otpauth", "totp", f"/Whispr:{person.username}")
    assert query == {
        "secret": begun["secret"],
        "issuer": "Whispr",
        "algorithm": "SHA1",
        "digits": "6",
        "period": "30",
    }
    assert await state(house, person) == (False, 0)
    assert (await log_in(house, person)).status_code == 200
    app = Authenticator(begun["secret"])
    now = house.clock.time()
    wrong = await house.call("POST", "/auth/totp/confirm", person, {"code": app.wrong(now)})
    assert code(wrong) == (403, BAD)
    confirmed = await house.call("POST", "/auth/totp/confirm", person, {"code": app.code(now)})
    recovery_codes = confirmed.json()["recovery_codes"]
    assert len(set(recovery_codes)) == 10
    assert await state(house, person) == (True, 10)
    assert code(await log_in(house, person)) == (401, REQUIRED)


async def test_setting_up_needs_the_password_and_a_beginning(house: AuthHouse) -> None:
    person = await house.register()
    wrong = await house.call("POST", "/auth/totp", person, {"password": PASSWORD + "x"})
    assert code(wrong) == (403, "wrong_password")
    nothing = await house.call("POST", "/auth/totp/confirm", person, {"code": "123456"})
    assert code(nothing) == (409, "totp_not_begun")
    for method, path in (
        ("POST", "/auth/totp"),
        ("POST", "/auth/totp/confirm"),
        ("GET", "/auth/totp"),
        ("DELETE", "/auth/totp"),
    ):
        assert (await house.call(method, path, json={})).status_code == 401


async def test_beginning_again_replaces_the_secret_until_it_is_on(house: AuthHouse) -> None:
    person = await house.register()
    apps = []
    for _ in range(2):
        begun = await house.call("POST", "/auth/totp", person, {"password": PASSWORD})
        apps.append(Authenticator(begun.json()["secret"]))
    first, second = apps
    now = house.clock.time()
    assert code(await house.call("POST", "/auth/totp/confirm", person, {"code": first.code(now)})) == (
        403,
        BAD,
    )
    answer = await house.call("POST", "/auth/totp/confirm", person, {"code": second.code(now)})
    assert answer.status_code == 200
    again = await house.call("POST", "/auth/totp", person, {"password": PASSWORD})
    assert code(again) == (409, "totp_enabled")


async def test_a_lost_beginning_may_be_repeated(house: AuthHouse) -> None:
    person, other = await house.register(), await house.register()
    headers = {"Idempotency-Key": uuid4().hex}

    async def begin(who: Person, headers: dict[str, str]) -> str:
        answer = await house.call("POST", "/auth/totp", who, {"password": PASSWORD}, headers=headers)
        return str(answer.json()["secret"])

    secret = await begin(person, headers)
    assert await begin(person, headers) == secret
    assert await begin(other, headers) != secret
    assert await begin(person, {"Idempotency-Key": uuid4().hex}) != secret
    assert await begin(person, headers) != secret, "it is forgotten by now"


async def test_a_lost_confirmation_may_be_repeated(house: AuthHouse) -> None:
    person = await house.register()
    begun = await house.call("POST", "/auth/totp", person, {"password": PASSWORD})
    app = Authenticator(begun.json()["secret"])
    body = {"code": app.code(house.clock.time())}
    lists = [(await house.call("POST", "/auth/totp/confirm", person, body)).json() for _ in range(2)]
    first, second = (set(item["recovery_codes"]) for item in lists)
    assert not first & second
    assert await state(house, person) == (True, 10)
    assert code(await log_in(house, person, recovery_code=first.pop())) == (401, BAD)
    assert (await log_in(house, person, recovery_code=second.pop())).status_code == 200
    house.clock.advance(121)
    assert code(await house.call("POST", "/auth/totp/confirm", person, body)) == (409, "totp_enabled")


async def test_login_asks_for_it_after_the_password(house: AuthHouse) -> None:
    person = await house.register()
    app, _ = await set_up(house, person)
    wrong = {"username": person.username, "password": PASSWORD + "x", "device_id": str(person.device_id)}
    for codes in ({}, {"totp_code": app.code(house.clock.time())}):
        answer = await house.call("POST", "/auth/login", json={**wrong, **codes})
        assert code(answer) == (401, "invalid_credentials")
    for device in ({"device_id": str(person.device_id)}, {"device": DeviceKeys().registration()}):
        assert code(await house.log_in(person, **device)) == (401, REQUIRED)
        assert code(await house.log_in(person, **device, totp_code=app.wrong(house.clock.time()))) == (
            401,
            BAD,
        )
        spent = await authenticator.spend(house, app)
        assert (await house.log_in(person, **device, **spent)).status_code == 200


async def test_a_code_works_once_and_so_do_those_before_it(house: AuthHouse) -> None:
    person = await house.register()
    app, _ = await set_up(house, person)
    now = house.clock.time()
    old, present, future = (app.code(now + n * STEP) for n in (-1, 0, 1))
    answers = await asyncio.gather(*(log_in(house, person, totp_code=present) for _ in range(3)))
    assert sorted(answer.status_code for answer in answers) == [200, 401, 401]
    assert code(await log_in(house, person, totp_code=old)) == (401, BAD)
    assert (await log_in(house, person, totp_code=future)).status_code == 200
    assert code(await log_in(house, person, totp_code=present)) == (401, BAD)


async def test_the_window_is_one_step_to_either_side(house: AuthHouse) -> None:
    person = await house.register()
    app, _ = await set_up(house, person)
    house.clock.advance(10 * STEP)
    now = house.clock.time()
    for steps, status in ((-2, 401), (2, 401), (-1, 200), (0, 200), (1, 200)):
        answer = await log_in(house, person, totp_code=app.code(now + steps * STEP))
        assert answer.status_code == status, steps


async def test_guessing_locks_the_codes_but_not_recovery(house: AuthHouse) -> None:
    person = await house.register()
    app, recovery_codes = await set_up(house, person)
    house.clock.advance(STEP)
    wrong = app.wrong(house.clock.time())
    for _ in range(5):
        assert code(await log_in(house, person, totp_code=wrong)) == (401, BAD)
    right = app.code(house.clock.time())
    locked = await log_in(house, person, totp_code=right)
    assert code(locked) == (429, "rate_limited")
    assert int(locked.headers["Retry-After"]) <= 60
    house.clock.advance(61)
    wrong = app.wrong(house.clock.time())
    assert code(await log_in(house, person, totp_code=wrong)) == (401, BAD)
    locked = await log_in(house, person, totp_code=app.code(house.clock.time()))
    assert 60 < int(locked.headers["Retry-After"]) <= 120
    assert (await log_in(house, person, recovery_code=recovery_codes[0])).status_code == 200
    house.clock.advance(STEP)
    assert (await log_in(house, person, totp_code=app.code(house.clock.time()))).status_code == 200


async def test_a_lock_lasts_an_hour_at_most(rules_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(rules_url, valkey_url, clock) as auth:
        _, tokens = await register(auth)
        caller = caller_of(tokens)
        made = await auth.second_factor.begin(caller, PASSWORD)
        app = Authenticator(made.secret)
        await auth.second_factor.confirm(caller, app.code(clock.time()))

        async def attempt(text: str) -> Any:
            async with auth.second_factor._db.transaction() as tx:
                return (await auth.second_factor.check(tx, caller.user_id, Codes(text))).refused

        longest = 0.0
        for _ in range(15):
            clock.advance(3600)
            assert isinstance(await attempt(app.wrong(clock.time())), BadTotpCode)
            refused = await attempt(app.code(clock.time()))
            if isinstance(refused, TotpLocked):
                assert refused.retry_after is not None
                longest = max(longest, refused.retry_after)
            else:
                # Not locked yet: the right code has forgotten the failures, so guess them anew in a row.
                for _ in range(5):
                    await attempt(app.wrong(clock.time()))
        assert longest == 3600


async def test_recovery_codes_work_once_however_they_are_typed(house: AuthHouse) -> None:
    person, other = await house.register(), await house.register()
    _, mine = await set_up(house, person)
    await set_up(house, other)
    typed = mine[0].lower().replace("-", " ")
    assert (await log_in(house, person, recovery_code=typed)).status_code == 200
    assert await state(house, person) == (True, 9)
    assert code(await log_in(house, person, recovery_code=mine[0])) == (401, BAD)
    assert code(await log_in(house, other, recovery_code=mine[1])) == (401, BAD)
    answers = await asyncio.gather(*(log_in(house, person, recovery_code=mine[1]) for _ in range(3)))
    assert sorted(answer.status_code for answer in answers) == [200, 401, 401]


async def test_a_login_that_comes_to_nothing_spends_nothing(house: AuthHouse) -> None:
    person = await house.register()
    app, _ = await set_up(house, person)
    codes = {"totp_code": app.code(house.clock.time())}
    assert code(await house.log_in(person, device_id=str(uuid4()), **codes)) == (401, "invalid_credentials")
    assert (await log_in(house, person, **codes)).status_code == 200


async def test_a_lost_login_is_repeated_with_the_code_it_had(house: AuthHouse) -> None:
    person = await house.register()
    app, _ = await set_up(house, person)
    headers = {"Idempotency-Key": uuid4().hex}
    body = {"username": person.username, "password": PASSWORD, "device_id": str(person.device_id)}
    body["totp_code"] = app.code(house.clock.time())
    answers = [await house.call("POST", "/auth/login", json=body, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len({answer.json()["session_id"] for answer in answers}) == 1
    body["totp_code"] = app.wrong(house.clock.time())
    answer = await house.call("POST", "/auth/login", json=body, headers=headers)
    assert code(answer) == (409, "idempotency_key_reused")


Ask = Callable[[dict[str, Any]], Awaitable[httpx.Response]]


@pytest.mark.parametrize("what", ["password", "account", "link"])
async def test_step_ups_ask_for_it_too(house: AuthHouse, what: str) -> None:
    person = await house.register()
    app, recovery_codes = await set_up(house, person)

    async def ask(codes: dict[str, Any]) -> httpx.Response:
        if what == "password":
            body = {"current_password": PASSWORD, "new_password": PASSWORD, **codes}
            return await house.call("PUT", "/auth/password", person, body)
        if what == "link":
            return await house.call("POST", "/devices/link", person, {"password": PASSWORD, **codes})
        return await house.call("DELETE", "/auth/account", person, {"password": PASSWORD, **codes})

    assert code(await ask({})) == (403, REQUIRED)
    assert code(await ask({"totp_code": app.wrong(house.clock.time())})) == (403, BAD)
    assert code(await ask({"recovery_code": "AAAA-AAAA-AAAA-AAAA"})) == (403, BAD)
    assert await state(house, person) == (True, 10)
    if what != "account":
        assert (await ask({"recovery_code": recovery_codes[0]})).is_success
    assert (await ask(await authenticator.spend(house, app))).is_success


async def test_it_is_removed_with_password_and_code(house: AuthHouse) -> None:
    person = await house.register()
    app, recovery_codes = await set_up(house, person)

    async def remove(password: str, text: str) -> httpx.Response:
        return await house.call("DELETE", "/auth/totp", person, {"password": password, "code": text})

    right = app.code(house.clock.time())
    assert code(await remove(PASSWORD + "x", right)) == (403, "wrong_password")
    assert code(await remove(PASSWORD, app.wrong(house.clock.time()))) == (403, BAD)
    assert code(await remove(PASSWORD, "AAAA-AAAA-AAAA-AAAA")) == (403, BAD)
    assert await state(house, person) == (True, 10)
    assert (await remove(PASSWORD, recovery_codes[3])).status_code == 204
    assert await state(house, person) == (False, 0)
    assert (await log_in(house, person)).status_code == 200
    assert (await remove(PASSWORD, right)).status_code == 204
    app, _ = await set_up(house, person)
    assert (await remove(PASSWORD, app.code(house.clock.time()))).status_code == 204


async def test_deleting_the_account_forgets_the_secret(house: AuthHouse, rows: Connection) -> None:
    person = await house.register()
    app, _ = await set_up(house, person)
    body = {"password": PASSWORD, "totp_code": app.code(house.clock.time())}
    assert (await house.call("DELETE", "/auth/account", person, body)).status_code == 204
    for table in ("second_factors", "recovery_codes"):
        assert await rows.fetchval(f"SELECT count(*) FROM {table} WHERE account_id = $1", person.user_id) == 0


async def test_what_happens_is_in_the_trail(house: AuthHouse, rows: Connection) -> None:
    person = await house.register()
    app, recovery_codes = await set_up(house, person)
    await log_in(house, person, totp_code=app.wrong(house.clock.time()))
    await log_in(house, person, recovery_code=recovery_codes[0])
    found = await rows.fetch(
        "SELECT event, details->>'second_factor' AS how FROM audit_events WHERE account_id = $1 ORDER BY number",
        person.user_id,
    )
    assert [tuple(row) for row in found][1:] == [
        ("second_factor_on", None),
        ("second_factor_failed", None),
        ("logged_in", "recovery_code"),
    ]


async def test_the_secret_lies_encrypted_and_moves_with_the_keys(fresh_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(fresh_url, valkey_url, clock, reencrypt_batch=1) as auth:
        apps = []
        for _ in range(3):
            username, tokens = await register(auth)
            caller = caller_of(tokens)
            app = Authenticator((await auth.second_factor.begin(caller, PASSWORD)).secret)
            await auth.second_factor.confirm(caller, app.code(clock.time()))
            apps.append((username, app))

        async def stored() -> list[Any]:
            async with auth.second_factor._db.connection() as connection:
                query = "SELECT data_key_id, ciphertext, nonce FROM second_factors ORDER BY account_id"
                return await connection.fetch(query)

        before = await stored()
        await auth.data_keys.rotate(force=True)
        clock.advance(7200)
        per_key = await auth.housekeeping.tend_data_keys()
        after = await stored()
        (newest,) = per_key
        assert {row["data_key_id"] for row in after} == {newest}
        assert newest not in {row["data_key_id"] for row in before}
        assert not {row["ciphertext"] for row in before} & {row["ciphertext"] for row in after}
        for username, app in apps:
            codes = Codes(app.code(clock.time()))
            await auth.entry.log_in(username, PASSWORD, ORIGIN, device=new_device(), codes=codes)


async def test_a_secret_copied_to_another_account_does_not_open_there(
    fresh_url: str, valkey_url: str
) -> None:
    from whispr.services.auth.service.vault import Unreadable

    clock = ManualClock()
    async with rules(fresh_url, valkey_url, clock) as auth:
        callers = []
        for _ in range(2):
            _, tokens = await register(auth)
            callers.append(caller_of(tokens))
            await auth.second_factor.begin(callers[-1], PASSWORD)
        async with auth.second_factor._db.connection() as connection:
            await connection.execute(
                """
                UPDATE second_factors f SET nonce = o.nonce, ciphertext = o.ciphertext
                FROM second_factors o WHERE f.account_id = $1 AND o.account_id = $2
                """,
                callers[0].user_id,
                callers[1].user_id,
            )
        with pytest.raises(Unreadable):
            await auth.second_factor.confirm(callers[0], "123456")
