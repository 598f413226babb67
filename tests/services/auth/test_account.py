"""Deletion of an account: everything here, and word to every service."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.services.auth.house import AuthHouse, caller_of, code, register, rules, until
from tests.stack import PASSWORD, DeviceKeys, Stack

from whispr.kit.clock import ManualClock
from whispr.kit.db import Connection, Database
from whispr.kit.errors import Unavailable
from whispr.kit.outbox import Dispatcher
from whispr.services.auth import jobs
from whispr.services.auth.models import ERASING_SERVICES

TABLES = ("devices", "sessions", "account_roles")


async def test_deletion_needs_the_password(house: AuthHouse) -> None:
    person = await house.register()
    answer = await house.call("DELETE", "/auth/account", person, {"password": PASSWORD + "x"})
    assert code(answer) == (403, "wrong_password")
    assert (await house.call("GET", "/devices", person)).status_code == 200


async def test_nothing_is_left_of_a_deleted_account(house: AuthHouse, rows: Connection) -> None:
    person = await house.register(one_time_prekeys=3)
    second = await house.add_device(person)
    asker = await house.register()
    async with house.hints("auth:revocations") as heard:
        answer = await house.call("DELETE", "/auth/account", person, {"password": PASSWORD})
        assert answer.status_code == 204
        await until(lambda: heard)
    assert (heard[0]["subject"], heard[0]["id"]) == ("user", str(person.user_id))
    for held in (person, second):
        assert code(await house.call("GET", "/devices", held)) == (401, "session_revoked")
        assert code(await house.refresh(held.session["refresh_token"])) == (401, "invalid_refresh_token")
    assert code(await house.log_in(person, device=DeviceKeys().registration())) == (
        401,
        "invalid_credentials",
    )
    assert code(await house.call("GET", f"/keys/{person.user_id}", asker)) == (404, "user_not_found")
    for table in TABLES:
        assert await rows.fetchval(f"SELECT count(*) FROM {table} WHERE account_id = $1", person.user_id) == 0
    account = await rows.fetchrow("SELECT * FROM accounts WHERE id = $1", person.user_id)
    assert account is not None
    assert (account["status"], account["username"], account["password_hash"]) == ("deleted", None, None)


async def test_the_name_stays_taken(house: AuthHouse) -> None:
    person = await house.register()
    await house.call("DELETE", "/auth/account", person, {"password": PASSWORD})
    body = {"username": person.username, "password": PASSWORD, "device": DeviceKeys().registration()}
    assert code(await house.call("POST", "/auth/register", json=body)) == (409, "username_taken")


async def test_every_service_is_told_by_a_row_of_the_same_transaction(
    house: AuthHouse, rows: Connection
) -> None:
    person = await house.register()
    await house.call("DELETE", "/auth/account", person, {"password": PASSWORD})
    found = await rows.fetch(
        "SELECT topic, key, payload FROM outbox WHERE payload->>'user_id' = $1", str(person.user_id)
    )
    assert {row["topic"] for row in found} == {f"erase_user.{service}" for service in ERASING_SERVICES}
    assert len({row["key"] for row in found}) == len(ERASING_SERVICES)


class Target:
    """A service that is away at first."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.erased: list[tuple[UUID, UUID]] = []

    async def erase_user(self, user_id: UUID, operation_id: UUID) -> None:
        if self.failures:
            self.failures -= 1
            raise Unavailable
        self.erased.append((user_id, operation_id))


async def test_a_service_that_was_away_is_told_later(fresh_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    target, db = Target(failures=2), Database(fresh_url, pool_size=2)
    async with rules(fresh_url, valkey_url, clock) as auth:
        _, tokens = await register(auth)
        await auth.accounts.delete(caller_of(tokens), PASSWORD)
        await db.open()
        dispatcher = Dispatcher(db, clock, jobs.erasers({"user": target}))
        clock.advance(1)
        for _ in range(3):
            await dispatcher.drain_once()
            clock.advance(60)
        assert [user_id for user_id, _ in target.erased] == [tokens.user_id]
        async with db.connection() as connection:
            waiting = await connection.fetch("SELECT topic FROM outbox")
        assert {row["topic"] for row in waiting} == {
            f"erase_user.{s}" for s in ERASING_SERVICES if s != "user"
        }
    await db.close()


async def test_accounts_are_known_to_other_services(house: AuthHouse) -> None:
    person, gone = await house.register(), await house.register()
    await house.call("DELETE", "/auth/account", gone, {"password": PASSWORD})
    async with house.as_service("user") as user:
        by_name = await user.get_user_info(username=person.username)
        assert [(item.user_id, item.username, item.status) for item in by_name] == [
            (person.user_id, person.username, "active")
        ]
        assert await user.get_user_info(username=gone.username) == []
        by_id = {
            item.user_id: item for item in await user.get_user_info([person.user_id, gone.user_id, uuid4()])
        }
        assert by_id.keys() == {person.user_id, gone.user_id}
        assert (by_id[gone.user_id].status, by_id[gone.user_id].username) == ("deleted", "")


async def test_roles_are_for_names_that_exist_and_roles_that_exist(house: AuthHouse) -> None:
    from whispr.services.auth.app import grant_role
    from whispr.services.auth.models import InvalidRole, UserNotFound

    person = await house.register()
    with pytest.raises(InvalidRole):
        await grant_role(house.database_url, person.username, "emperor")
    with pytest.raises(UserNotFound):
        await grant_role(house.database_url, "nobody_at_all", "admin")
    assert await grant_role(house.database_url, person.username, "moderator")
    async with house.as_service("user") as user:
        (info,) = await user.get_user_info([person.user_id])
    assert info.roles == ("moderator",)


async def test_a_password_changed_meanwhile_proves_nothing(rules_url: str, valkey_url: str) -> None:
    async with rules(rules_url, valkey_url, ManualClock()) as auth:
        _, tokens = await register(auth)
        caller: Any = caller_of(tokens)
        account = await auth.accounts._credentials.prove_owner(caller, PASSWORD)
        await auth.accounts.change_password(caller, PASSWORD, "another good one")
        async with auth.accounts._db.transaction() as tx:
            assert not await auth.accounts._credentials.lock_unchanged(tx, account)


async def test_user_and_messaging_are_told_over_the_wire(stack: Stack) -> None:
    person, other = await stack.register(), await stack.register()
    mine = f"{stack.user.url}/api/v1/users/me"
    assert (await stack.http.get(mine, headers=person.headers)).status_code == 200
    theirs = f"{stack.user.url}/api/v1/users/{person.user_id}"
    assert (await stack.http.get(theirs, headers=other.headers)).status_code == 200
    answer = await stack.http.request(
        "DELETE", f"{stack.auth.url}/api/v1/auth/account", json={"password": PASSWORD}, headers=person.headers
    )
    assert answer.status_code == 204
    database = next(iter(stack.auth.running.context.databases.values()))

    async def waiting() -> set[str]:
        async with database.connection() as connection:
            query = "SELECT topic FROM outbox WHERE payload->>'user_id' = $1"
            return {row["topic"] for row in await connection.fetch(query, str(person.user_id))}

    for _ in range(100):
        stack.clock.advance(1)
        if await waiting() == {f"erase_user.{s}" for s in ERASING_SERVICES if s not in ("user", "messaging")}:
            break
        await asyncio.sleep(0.05)
    else:
        pytest.fail(f"still waiting: {await waiting()}")
    assert (await stack.http.get(theirs, headers=other.headers)).status_code == 404
    assert (await stack.http.get(mine, headers=person.headers)).status_code == 401
