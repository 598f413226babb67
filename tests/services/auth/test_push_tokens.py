"""Push tokens: what is accepted, how they lie, and the rotation of the keys they lie under."""

from __future__ import annotations

import asyncio
from base64 import urlsafe_b64encode
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from tests.services.auth.house import ROOT, AuthHouse, caller_of, code, register, root_keys, rules
from tests.stack import Person

from whispr.kit import telemetry
from whispr.kit.clock import ManualClock
from whispr.kit.db import Connection, Database
from whispr.services.auth import jobs, store
from whispr.services.auth.client import DeliveryReport
from whispr.services.auth.models import NewPushToken, RootKeys
from whispr.services.auth.service import Auth

INVALID = (422, "invalid_push_token")


def unpadded(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def subscription(**changes: Any) -> dict[str, Any]:
    return {
        "endpoint": f"https://push.example.net/{uuid4().hex}",
        "keys": {"p256dh": unpadded(b"\x04" + b"k" * 64), "auth": unpadded(b"a" * 16)},
        "expirationTime": None,
        **changes,
    }


def apns(**changes: Any) -> dict[str, Any]:
    return {
        "channel": "apns", "token": uuid4().hex * 2, "app_id": "chat.whispr", "environment": "sandbox", **changes,
    }  # fmt: skip


def fcm(**changes: Any) -> dict[str, Any]:
    return {"channel": "fcm", "token": f"{uuid4().hex}:APA91b-_x", "app_id": "whispr", **changes}


async def put(house: AuthHouse, person: Person, body: dict[str, Any]) -> Any:
    return await house.call("PUT", f"/devices/{person.device_id}/push-token", person, body)


async def test_tokens_of_each_channel_reach_notification(house: AuthHouse) -> None:
    person = await house.register()
    web = subscription()
    bodies = [apns(), fcm(), {"channel": "webpush", "subscription": web}]
    for body in bodies:
        assert (await put(house, person, body)).status_code == 204
    async with house.as_service("notification") as notification:
        tokens = {item.channel: item for item in await notification.get_device_tokens([person.user_id])}
        by_device = await notification.get_device_tokens(device_ids=[person.device_id])
    assert tokens.keys() == {"apns", "fcm", "webpush"}
    assert len(by_device) == 3
    assert tokens["apns"].token == bodies[0]["token"]
    assert (tokens["apns"].environment, tokens["fcm"].environment) == ("sandbox", "production")
    assert tokens["fcm"].app_id == "whispr"
    assert msgspec.json.decode(tokens["webpush"].token) == {"endpoint": web["endpoint"], "keys": web["keys"]}
    assert tokens["apns"].updated_at == house.clock.now()


async def test_a_token_is_nowhere_in_clear(house: AuthHouse, rows: Connection) -> None:
    person = await house.register()
    body = fcm()
    await put(house, person, body)
    (kept,) = await rows.fetch("SELECT * FROM push_tokens WHERE device_id = $1", person.device_id)
    values = [value for value in kept.values() if isinstance(value, bytes)] + [str(dict(kept)).encode()]
    assert all(body["token"].encode() not in value for value in values)
    assert len(kept["nonce"]) == 12


async def test_a_row_moved_to_another_device_does_not_open(rules_url: str, valkey_url: str) -> None:
    async with rules(rules_url, valkey_url, ManualClock()) as auth:
        (_, mine), (_, other) = await register(auth), await register(auth)
        await auth.push_tokens.put(
            caller_of(mine), mine.device_id, NewPushToken("fcm", uuid4().hex, "", "production")
        )
        async with auth.push_tokens._db.connection() as connection:
            await connection.execute(
                "UPDATE push_tokens SET device_id = $2 WHERE device_id = $1", mine.device_id, other.device_id
            )
        assert await auth.push_tokens.of([other.user_id], []) == []


@pytest.mark.parametrize(
    "body",
    [
        apns(token="zz" * 32),
        apns(token="ab" * 20),
        apns(token=None),
        apns(app_id=""),
        apns(subscription=subscription()),
        fcm(token="has spaces in it, many of them"),
        fcm(token="short"),
        fcm(token=None),
        {"channel": "webpush"},
        {"channel": "webpush", "subscription": subscription(), "token": "x"},
        {"channel": "webpush", "subscription": subscription(endpoint="http://push.example.net/x")},
        {"channel": "webpush", "subscription": subscription(endpoint="https://user@push.example.net/x")},
        {"channel": "webpush", "subscription": subscription(endpoint="https://[::1/x")},
        {"channel": "webpush", "subscription": subscription(endpoint="https://push.example.net:99999/x")},
        {"channel": "webpush", "subscription": subscription(endpoint="ftp://push.example.net/x")},
        {"channel": "webpush", "subscription": subscription(endpoint="https:///x")},
        {"channel": "webpush", "subscription": subscription(endpoint="https://push.example.net/a b")},
        {"channel": "webpush", "subscription": subscription(keys={"p256dh": "eA", "auth": unpadded(b"a" * 16)})},
        {"channel": "webpush", "subscription": subscription(keys={"p256dh": unpadded(b"\x02" * 65), "auth": unpadded(b"a" * 16)})},
        {"channel": "webpush", "subscription": subscription(keys={"p256dh": unpadded(b"\x04" * 65), "auth": "é"})},
    ],
)  # fmt: skip
async def test_what_is_no_token_is_refused(house: AuthHouse, body: dict[str, Any]) -> None:
    person = await house.register()
    assert code(await put(house, person, body)) == INVALID


@pytest.mark.parametrize(
    "body", [{"channel": "pigeon"}, fcm(environment="moon"), fcm(app_id="a b"), fcm(token="x" * 4097), {}]
)
async def test_what_has_the_wrong_shape_is_refused(house: AuthHouse, body: dict[str, Any]) -> None:
    person = await house.register()
    assert code(await put(house, person, body)) == (422, "invalid_request")


async def test_plain_http_is_for_this_machine_and_never_in_production(house: AuthHouse) -> None:
    from whispr.services.auth.api.devices import InvalidPushToken, PushTokenForm, push_token

    form = PushTokenForm.model_validate(
        {"channel": "webpush", "subscription": subscription(endpoint="http://127.0.0.1:9999/push")}
    )
    assert "127.0.0.1" in push_token(form, loopback=True).token
    with pytest.raises(InvalidPushToken):
        push_token(form, loopback=False)


async def test_a_new_token_replaces_the_old_and_delete_removes_all(
    house: AuthHouse, rows: Connection
) -> None:
    person = await house.register()
    for body in (apns(), apns(), apns(app_id="chat.whispr.voip")):
        await put(house, person, body)
    count = "SELECT count(*) FROM push_tokens WHERE device_id = $1"
    assert await rows.fetchval(count, person.device_id) == 2
    assert (await house.call("GET", "/devices", person)).json()["items"][0]["has_push_token"]
    for _ in range(2):
        assert (
            await house.call("DELETE", f"/devices/{person.device_id}/push-token", person)
        ).status_code == 204
    assert await rows.fetchval(count, person.device_id) == 0


async def test_a_phone_that_changed_hands_leaves_the_old_account(house: AuthHouse) -> None:
    person, next_owner = await house.register(), await house.register()
    body = fcm()
    await put(house, person, body)
    await asyncio.gather(*(put(house, owner, body) for owner in (next_owner, next_owner)))
    async with house.as_service("notification") as notification:
        tokens = await notification.get_device_tokens([person.user_id, next_owner.user_id])
    assert [item.user_id for item in tokens] == [next_owner.user_id]


async def test_two_devices_setting_one_token_at_once_never_fail(house: AuthHouse) -> None:
    people, body = [await house.register() for _ in range(4)], fcm()
    answers = await asyncio.gather(*(put(house, person, body) for person in people for _ in range(2)))
    assert {answer.status_code for answer in answers} == {204}
    async with house.as_service("notification") as notification:
        assert len(await notification.get_device_tokens([person.user_id for person in people])) == 1


async def test_reports_of_push_services(house: AuthHouse) -> None:
    person = await house.register()
    await put(house, person, fcm())
    async with house.as_service("notification") as notification:

        async def token() -> Any:
            found = await notification.get_device_tokens([person.user_id])
            return found[0] if found else None

        async def report(outcome: Any, about: Any, operation: Any = None) -> int:
            one = DeliveryReport(person.device_id, "fcm", outcome, house.clock.now(), about)
            return await notification.report_device_delivery(operation or uuid4(), [one])

        old = (await token()).updated_at
        assert await report("ok", old) == 0
        assert await report("inactive", old) == 1
        assert await token() is None
        assert await report("ok", old) == 1
        house.clock.advance(5)
        await put(house, person, fcm())
        assert await report("invalid_token", old) == 0
        current = await token()
        operation = uuid4()
        assert await report("invalid_token", current.updated_at, operation) == 1
        assert await token() is None
        assert await report("invalid_token", current.updated_at, operation) == 1


# --- keys ---


async def with_tokens(auth: Auth, count: int) -> list[Any]:
    people = []
    for _ in range(count):
        _, tokens = await register(auth)
        token = NewPushToken("fcm", uuid4().hex, "", "production")
        await auth.push_tokens.put(caller_of(tokens), tokens.device_id, token)
        people.append((tokens.user_id, token.token))
    return people


async def in_clear(auth: Auth, people: list[Any]) -> list[Any]:
    found = await auth.push_tokens.of([user_id for user_id, _ in people], [])
    return [(item.user_id, item.token) for item in found]


async def test_data_keys_rotate_and_everything_is_brought_along(fresh_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(fresh_url, valkey_url, clock, reencrypt_batch=2) as auth:
        people = await with_tokens(auth, 5)
        (first,) = (await auth.housekeeping.tend_data_keys()).keys()
        clock.advance(89 * 86400)
        assert await auth.housekeeping.tend_data_keys() == {first: 5}
        clock.advance(86400)
        after = await auth.housekeeping.tend_data_keys()
        (second,) = [key_id for key_id in after if key_id != first]
        assert after == {first: 0, second: 5}
        assert await in_clear(auth, people) == people
        clock.advance(3601)
        assert await auth.housekeeping.tend_data_keys() == {second: 5}
        assert await in_clear(auth, people) == people


async def test_an_old_key_stays_while_a_row_needs_it(fresh_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(fresh_url, valkey_url, clock) as auth:
        people = await with_tokens(auth, 2)
        db = Database(fresh_url, pool_size=2)
        await db.open()
        async with db.connection() as connection:
            await connection.execute(
                "UPDATE push_tokens SET ciphertext = '\\x00' WHERE device_id = (SELECT min(device_id::text)::uuid FROM push_tokens)"
            )
        (first,) = (await auth.housekeeping.tend_data_keys()).keys()
        await auth.data_keys.rotate(force=True)
        clock.advance(7200)
        rows = await auth.housekeeping.tend_data_keys()
        assert rows[first] == 1
        assert sum(rows.values()) == 2
        assert len(await in_clear(auth, people)) == 1
        await db.close()


async def test_tokens_written_during_the_rotation_survive_it(fresh_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(fresh_url, valkey_url, clock, reencrypt_batch=1) as auth:
        people = await with_tokens(auth, 4)
        await auth.data_keys.rotate(force=True)
        _, more = await asyncio.gather(auth.housekeeping.tend_data_keys(), with_tokens(auth, 4))
        await auth.housekeeping.tend_data_keys()
        assert sorted(await in_clear(auth, people + more)) == sorted(people + more)


async def test_the_root_key_can_be_changed(fresh_url: str, valkey_url: str) -> None:
    clock, new = ManualClock(), root_keys()
    async with rules(fresh_url, valkey_url, clock) as auth:
        people = await with_tokens(auth, 2)
        jwks = await auth.source.jwks()
    both = RootKeys(new.primary, {**ROOT.keys, **new.keys})
    async with rules(fresh_url, valkey_url, clock, root=both) as auth:
        assert await in_clear(auth, people) == people
        await jobs.tend_keys(auth)
    async with rules(fresh_url, valkey_url, clock, root=new) as auth:
        assert await in_clear(auth, people) == people
        assert await auth.source.jwks() == jwks
        assert await auth.housekeeping.missing_roots() == []
    async with rules(fresh_url, valkey_url, clock, root=ROOT) as auth:
        assert await auth.housekeeping.missing_roots() == [new.primary]


async def test_rows_per_key_are_a_metric(fresh_url: str, valkey_url: str) -> None:
    async with rules(fresh_url, valkey_url, ManualClock()) as auth:
        await with_tokens(auth, 3)
        await jobs.tend_keys(auth)
        (key_id,) = await auth.housekeeping.tend_data_keys()
    assert f'whispr_auth_push_tokens{{key="{key_id}"}} 3.0' in telemetry.metrics.exposition().decode()


async def test_reports_name_tokens_by_their_time(rules_url: str, valkey_url: str) -> None:
    async with rules(rules_url, valkey_url, ManualClock()) as auth:
        _, tokens = await register(auth)
        token = NewPushToken("fcm", uuid4().hex, "", "production")
        await auth.push_tokens.put(caller_of(tokens), tokens.device_id, token)
        (kept,) = await auth.push_tokens.of([tokens.user_id], [])
        async with auth.push_tokens._db.connection() as connection:
            earlier = kept.updated_at - timedelta(microseconds=1)
            assert await store.push_tokens.drop_dead(connection, tokens.device_id, "fcm", earlier) == 0
            assert (
                await store.push_tokens.drop_dead(connection, tokens.device_id, "fcm", kept.updated_at) == 1
            )
        await auth.push_tokens.put(caller_of(tokens), tokens.device_id, replace(token, token=uuid4().hex))
