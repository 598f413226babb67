"""Devices that are away for too long leave the account, and are told so for a year."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
from tests.services.auth.house import ORIGIN, a_caller, caller_of, new_device, register, rules
from tests.stack import PASSWORD

from whispr.kit.clock import ManualClock
from whispr.kit.db import Connection
from whispr.kit.errors import Failure, SessionRevoked
from whispr.services.auth.models import DeviceExpired, InvalidCredentials, InvalidRefreshToken, NewPushToken
from whispr.services.auth.service import Auth

DAY = 86400.0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def auth(fresh_url: str, valkey_url: str, clock: ManualClock) -> AsyncIterator[Auth]:
    async with rules(fresh_url, valkey_url, clock) as built:
        yield built


async def refused(auth: Auth, token: str) -> type[Failure]:
    with pytest.raises(Failure) as failure:
        await auth.sessions.refresh(token, None, ORIGIN)
    return type(failure.value)


async def look(auth: Auth, query: str, *values: object) -> Any:
    async with auth.devices._db.connection() as connection:
        return await connection.fetchval(query, *values)


async def test_what_is_seen_stays_and_what_is_away_leaves(auth: Auth, clock: ManualClock) -> None:
    username, kept = await register(auth)
    away = await auth.entry.log_in(username, PASSWORD, ORIGIN, device=new_device(3))
    token = NewPushToken("fcm", "fcm:" + "x" * 30, "", "production")
    await auth.push_tokens.put(caller_of(away), away.device_id, token)
    refresh_token = kept.refresh_token
    for _ in range(9):
        clock.advance(10 * DAY)
        refresh_token = (await auth.sessions.refresh(refresh_token, None, ORIGIN)).refresh_token
        assert await auth.expiry.run() == 0
    clock.advance(DAY)
    epoch = (await auth.devices.lists([kept.user_id]))[0].epoch
    assert await auth.expiry.run() == 1
    (devices,) = await auth.devices.lists([kept.user_id])
    assert [device.id for device in devices.devices] == [kept.device_id]
    assert devices.epoch == epoch + 1
    for table in ("lasting_prekeys", "one_time_prekeys", "push_tokens"):
        query = f"SELECT count(*) FROM {table} WHERE device_id = $1"
        assert await look(auth, query, away.device_id) == 0
    bundles = await auth.prekeys.claim(a_caller(), kept.user_id)
    assert [bundle.device_id for bundle in bundles] == [kept.device_id]
    assert await auth.expiry.run() == 0
    assert (await auth.devices.lists([kept.user_id]))[0].epoch == epoch + 1
    query = "SELECT count(*) FROM audit_events WHERE event = 'device_expired' AND device_id = $1"
    assert await look(auth, query, away.device_id) == 1


async def test_a_login_counts_as_being_there(auth: Auth, clock: ManualClock) -> None:
    username, first = await register(auth)
    clock.advance(60 * DAY)
    await auth.entry.log_in(username, PASSWORD, ORIGIN, device_id=first.device_id)
    clock.advance(60 * DAY)
    assert await auth.expiry.run() == 0


async def test_it_is_told_for_a_year_why_it_is_out(auth: Auth, clock: ManualClock) -> None:
    username, tokens = await register(auth)

    async def log_in() -> type[Failure]:
        with pytest.raises(Failure) as failure:
            await auth.entry.log_in(username, PASSWORD, ORIGIN, device_id=tokens.device_id)
        return type(failure.value)

    # The refresh token and its session are over too, and cleaned, before the device is.
    clock.advance(90 * DAY + 1)
    await auth.housekeeping.clean()
    clock.advance(DAY)
    await auth.housekeeping.clean()
    await auth.expiry.run()
    assert await refused(auth, tokens.refresh_token) is DeviceExpired
    assert await log_in() is DeviceExpired
    with pytest.raises(InvalidCredentials):
        await auth.entry.log_in(username, PASSWORD + "x", ORIGIN, device_id=tokens.device_id)
    clock.advance(364 * DAY)
    await auth.housekeeping.clean()
    assert await refused(auth, tokens.refresh_token) is DeviceExpired
    assert await log_in() is DeviceExpired
    clock.advance(2 * DAY)
    await auth.housekeeping.clean()
    assert await refused(auth, tokens.refresh_token) is InvalidRefreshToken
    assert await log_in() is InvalidCredentials


async def test_a_removed_device_is_not_an_expired_one(auth: Auth, clock: ManualClock) -> None:
    username, kept = await register(auth)
    removed = await auth.entry.log_in(username, PASSWORD, ORIGIN, device=new_device())
    await auth.devices.remove(caller_of(kept), removed.device_id)
    clock.advance(200 * DAY)
    await auth.expiry.run()
    assert await refused(auth, removed.refresh_token) is SessionRevoked
    with pytest.raises(InvalidCredentials):
        await auth.entry.log_in(username, PASSWORD, ORIGIN, device_id=removed.device_id)


async def test_the_person_comes_back_on_a_new_device(auth: Auth, clock: ManualClock) -> None:
    username, tokens = await register(auth)
    clock.advance(91 * DAY)
    assert await auth.expiry.run() == 1
    again = await auth.entry.log_in(username, PASSWORD, ORIGIN, device=new_device())
    assert again.user_id == tokens.user_id
    assert again.device_id != tokens.device_id


async def test_old_sessions_of_devices_that_are_there_are_still_cleaned(
    auth: Auth, clock: ManualClock
) -> None:
    username, first = await register(auth)
    clock.advance(60 * DAY)
    await auth.entry.log_in(username, PASSWORD, ORIGIN, device_id=first.device_id)
    clock.advance(31 * DAY)
    assert (await auth.housekeeping.clean()).sessions == 1
    assert await refused(auth, first.refresh_token) is InvalidRefreshToken


async def test_days_are_a_setting_and_zero_is_never(fresh_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(fresh_url, valkey_url, clock, device_expiry_days=0) as auth:
        _, tokens = await register(auth)
        clock.advance(1000 * DAY)
        assert await auth.expiry.run() == 0
        assert (await auth.housekeeping.clean()).sessions == 1
        assert await refused(auth, tokens.refresh_token) is InvalidRefreshToken
    async with rules(fresh_url, valkey_url, clock, device_expiry_days=7) as auth:
        assert await auth.expiry.run() == 1


async def test_several_processes_expire_each_device_once(fresh_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with (
        rules(fresh_url, valkey_url, clock) as auth,
        rules(fresh_url, valkey_url, clock) as second,
        rules(fresh_url, valkey_url, clock) as third,
    ):
        people: list[UUID] = []
        for _ in range(6):
            username, tokens = await register(auth)
            await auth.entry.log_in(username, PASSWORD, ORIGIN, device=new_device())
            people.append(tokens.user_id)
        clock.advance(91 * DAY)
        counts = await asyncio.gather(auth.expiry.run(), second.expiry.run(), third.expiry.run())
        assert sum(counts) == 12
        assert {(item.epoch, item.devices) for item in await auth.devices.lists(people)} == {(3, ())}


async def test_a_refresh_at_that_moment_saves_the_device(
    auth: Auth, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found absent, and its refresh commits before its session is locked."""
    from whispr.services.auth import store

    _, tokens = await register(auth)
    clock.advance(91 * DAY)
    lock = store.sessions.lock_of_devices

    async def after_a_refresh(tx: Connection, device_ids: list[UUID]) -> list[tuple[UUID, UUID]]:
        async with auth.devices._db.connection() as connection:
            await store.devices.seen(connection, tokens.device_id, clock.now().date())
        return await lock(tx, device_ids)

    monkeypatch.setattr(store.sessions, "lock_of_devices", after_a_refresh)
    assert await auth.expiry.run() == 0
    assert len((await auth.devices.lists([tokens.user_id]))[0].devices) == 1
