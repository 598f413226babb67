"""Devices: removal with everything that hangs on one, and what services may know."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest
from tests.services.auth.house import AuthHouse, code
from tests.stack import b64

from whispr.kit.db import Connection
from whispr.kit.errors import NotFound

GONE = (404, "device_not_found")


async def test_devices_are_listed(house: AuthHouse) -> None:
    person = await house.register()
    (item,) = (await house.call("GET", "/devices", person)).json()["items"]
    assert item["id"] == item["device_id"] == str(person.device_id)
    assert item["signing_key"] == b64(bytes(person.keys.signing_key.verify_key))
    assert (item["name"], item["platform"], item["current"]) == ("Test device", "desktop", True)
    assert item["last_seen_on"] == house.clock.now().date().isoformat()


async def test_removing_a_device_takes_all_that_hangs_on_it(house: AuthHouse, rows: Connection) -> None:
    person = await house.register()
    second = await house.add_device(person, one_time_prekeys=5)
    token = {"channel": "fcm", "token": f"fcm:{uuid4().hex}"}
    await house.call("PUT", f"/devices/{second.device_id}/push-token", second, token)
    async with house.hints("auth:revocations") as heard, house.hints("user:notices") as notices:
        assert (await house.call("DELETE", f"/devices/{second.device_id}", person)).status_code == 204
        await asyncio.sleep(0.1)
    assert ("device", str(second.device_id)) in [(item["subject"], item["id"]) for item in heard]
    assert {
        "user_id": str(person.user_id),
        "event": "device_list_changed",
        "payload": {"user_id": str(person.user_id), "epoch": 3},
    } in notices
    for table in ("lasting_prekeys", "one_time_prekeys", "push_tokens"):
        assert (
            await rows.fetchval(f"SELECT count(*) FROM {table} WHERE device_id = $1", second.device_id) == 0
        )
    assert code(await house.call("GET", "/devices", second)) == (401, "session_revoked")
    assert code(await house.refresh(second.session["refresh_token"])) == (401, "session_revoked")
    assert len((await house.call("GET", "/devices", person)).json()["items"]) == 1


async def test_removing_again_changes_nothing(house: AuthHouse, rows: Connection) -> None:
    person = await house.register()
    second = await house.add_device(person)
    for _ in range(2):
        assert (await house.call("DELETE", f"/devices/{second.device_id}", person)).status_code == 204
    assert await rows.fetchval("SELECT device_list_epoch FROM accounts WHERE id = $1", person.user_id) == 3


async def test_nobody_touches_another_persons_device(house: AuthHouse) -> None:
    person, stranger = await house.register(), await house.register()
    token = {"channel": "fcm", "token": f"fcm:{uuid4().hex}"}
    for device_id in (stranger.device_id, uuid4()):
        assert code(await house.call("DELETE", f"/devices/{device_id}", person)) == GONE
        assert code(await house.call("PUT", f"/devices/{device_id}/push-token", person, token)) == GONE
        assert code(await house.call("DELETE", f"/devices/{device_id}/push-token", person)) == GONE
    assert (await house.call("GET", "/devices", stranger)).status_code == 200


async def test_services_see_active_devices_with_the_epoch(house: AuthHouse) -> None:
    person, other = await house.register(), await house.register()
    second = await house.add_device(person)
    async with house.as_service("messaging") as messaging:
        lists = await messaging.get_user_devices([person.user_id, other.user_id, uuid4()])
        assert lists.keys() == {person.user_id, other.user_id}
        assert lists[person.user_id].epoch == 2
        devices = lists[person.user_id].devices
        assert [item.device_id for item in devices] == [person.device_id, second.device_id]
        assert devices[0].signing_key == bytes(person.keys.signing_key.verify_key)
        await house.call("DELETE", f"/devices/{second.device_id}", person)
        lists = await messaging.get_user_devices([person.user_id])
        assert lists[person.user_id].epoch == 3
        assert [item.device_id for item in lists[person.user_id].devices] == [person.device_id]
        assert await messaging.get_user_devices([]) == {}


async def test_services_validate_a_device(house: AuthHouse) -> None:
    person, stranger = await house.register(), await house.register()
    second = await house.add_device(person)
    await house.call("DELETE", f"/devices/{second.device_id}", person)
    async with house.as_service("messaging") as messaging:
        assert await messaging.validate_device(person.user_id, person.device_id) == (True, "")
        assert await messaging.validate_device(person.user_id, second.device_id) == (False, "revoked")
        assert await messaging.validate_device(person.user_id, stranger.device_id) == (False, "foreign")
        assert await messaging.validate_device(person.user_id, uuid4()) == (False, "unknown")


async def test_a_removed_device_is_still_known_by_its_keys(house: AuthHouse) -> None:
    person = await house.register()
    second = await house.add_device(person)
    await house.call("DELETE", f"/devices/{second.device_id}", person)
    async with house.as_service("notification") as notification:
        device = await notification.get_device_info(second.device_id)
        assert not device.is_active
        assert device.signing_key == bytes(second.keys.signing_key.verify_key)
        with pytest.raises(NotFound) as failure:
            await notification.get_device_info(uuid4())
        assert failure.value.code == "device_not_found"


async def test_the_index_of_active_devices_is_partial(rows: Connection) -> None:
    definition = await rows.fetchval("SELECT indexdef FROM pg_indexes WHERE indexname = 'devices_active'")
    assert "WHERE (status = 'active'::text)" in definition
