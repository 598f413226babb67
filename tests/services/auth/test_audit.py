"""The audit trail: complete, append-only, and broken by any change made behind its back."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import asyncpg
import pytest
from tests.services.auth.house import ORIGIN, AuthHouse, caller_of, code, new_device, register, rules
from tests.stack import PASSWORD

from whispr.kit.clock import ManualClock
from whispr.kit.db import Connection
from whispr.kit.identity import Caller
from whispr.services.auth import store
from whispr.services.auth.models import InvalidCredentials, NewPushToken, RefreshReused
from whispr.services.auth.service import Auth


async def live(auth: Auth, clock: ManualClock) -> tuple[str, Caller]:
    """Everything that can happen to an account."""
    username, tokens = await register(auth)
    caller = caller_of(tokens)
    with pytest.raises(InvalidCredentials):
        await auth.entry.log_in(username, "wrong password", ORIGIN, device=new_device())
    second = await auth.entry.log_in(username, PASSWORD, ORIGIN, device=new_device())
    await auth.push_tokens.put(caller, tokens.device_id, NewPushToken("fcm", uuid4().hex, "", "production"))
    await auth.push_tokens.remove(caller, tokens.device_id)
    await auth.devices.remove(caller, second.device_id)
    await auth.accounts.change_password(caller, PASSWORD, "another good one")
    third = await auth.entry.log_in(username, "another good one", ORIGIN, device_id=tokens.device_id)
    await auth.sessions.end(caller, third.session_id)
    await auth.sessions.refresh(tokens.refresh_token, None, ORIGIN)
    clock.advance(11)
    with pytest.raises(RefreshReused):
        await auth.sessions.refresh(tokens.refresh_token, None, ORIGIN)
    fourth = await auth.entry.log_in(username, "another good one", ORIGIN, device_id=tokens.device_id)
    await auth.sessions.log_out(caller_of(fourth))
    await auth.accounts.delete(caller, "another good one")
    return username, caller


async def test_every_security_event_is_in_the_trail(fresh_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(fresh_url, valkey_url, clock) as auth:
        _, caller = await live(auth, clock)
        async with auth.sessions._db.connection() as connection:
            found = await store.export.events(connection, caller.user_id, 100)
            events = [item.event for item in found]
            assert await auth.audit.first_broken(connection) is None
    assert events == [
        "registered", "login_failed", "device_added", "logged_in", "push_token_set", "push_token_removed",
        "device_removed", "password_changed", "logged_in", "session_ended", "refresh_reused", "logged_in",
        "logged_out", "account_deleted",
    ]  # fmt: skip


async def test_the_trail_holds_no_secrets(fresh_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(fresh_url, valkey_url, clock) as auth:
        username, _ = await live(auth, clock)
        async with auth.sessions._db.connection() as connection:
            text = str([dict(row) for row in await connection.fetch("SELECT * FROM audit_events")])
    assert all(secret not in text for secret in (PASSWORD, "another good one", username, ORIGIN.ip))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_events SET event = 'nothing'",
        "DELETE FROM audit_events",
        "TRUNCATE audit_events",
    ],
)
async def test_the_trail_is_append_only(house: AuthHouse, rows: Connection, statement: str) -> None:
    await house.register()
    with pytest.raises(asyncpg.RaiseError, match="append-only"):
        await rows.execute(statement)


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE audit_events SET event = 'logged_in' WHERE number = 2",
        "UPDATE audit_events SET at = at + interval '1 second' WHERE number = 2",
        "UPDATE audit_events SET account_id = gen_random_uuid() WHERE number = 2",
        "UPDATE audit_events SET details = '{\"x\": 1}' WHERE number = 2",
        "DELETE FROM audit_events WHERE number = 2",
        "UPDATE audit_events SET previous_hash = hash WHERE number = 2",
    ],
)
async def test_a_change_behind_its_back_shows(fresh_url: str, valkey_url: str, tampering: str) -> None:
    async with rules(fresh_url, valkey_url, ManualClock()) as auth:
        for _ in range(3):
            await register(auth)
        async with auth.sessions._db.connection() as connection:
            await connection.execute("ALTER TABLE audit_events DISABLE TRIGGER ALL")
            await connection.execute(tampering)
            assert await auth.audit.first_broken(connection) == 2


async def test_events_written_at_once_make_one_chain(fresh_url: str, valkey_url: str) -> None:
    async with rules(fresh_url, valkey_url, ManualClock()) as auth:
        await asyncio.gather(*(register(auth) for _ in range(20)))
        async with auth.sessions._db.connection() as connection:
            assert await auth.audit.first_broken(connection) is None
            numbers = [
                row["number"] for row in await connection.fetch("SELECT number FROM audit_events ORDER BY 1")
            ]
    assert numbers == list(range(1, len(numbers) + 1))


async def test_a_refused_login_of_nobody_leaves_a_nameless_event(house: AuthHouse, rows: Connection) -> None:
    before = await rows.fetchval("SELECT count(*) FROM audit_events WHERE event = 'login_failed'")
    body = {"username": "nobody_at_all", "password": PASSWORD, "device_id": str(uuid4())}
    assert code(await house.call("POST", "/auth/login", json=body))[0] == 401
    newest = await rows.fetchrow(
        "SELECT * FROM audit_events WHERE event = 'login_failed' ORDER BY number DESC LIMIT 1"
    )
    assert await rows.fetchval("SELECT count(*) FROM audit_events WHERE event = 'login_failed'") == before + 1
    assert newest is not None
    assert newest["account_id"] is None
