"""The key server: uploads, checks, and one-time keys that are handed out once."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from typing import Any
from uuid import uuid4

import pytest
from tests.services.auth.house import (
    AuthHouse,
    a_caller,
    caller_of,
    code,
    new_device,
    one_time_key,
    pq_prekey,
    register,
    rules,
    until,
)
from tests.stack import DeviceKeys, Person, b64

from whispr.kit.clock import ManualClock
from whispr.kit.db import Connection
from whispr.services.auth.models import PrekeyUpload

LOW = "prekeys_low"


async def claim(
    house: AuthHouse, asker: Person, target: Person, device: Person | None = None
) -> list[dict[str, Any]]:
    path = f"/keys/{target.user_id}" + (f"/{device.device_id}" if device else "")
    answer = await house.call("GET", path, asker)
    assert answer.status_code == 200, answer.text
    assert answer.json()["user_id"] == str(target.user_id)
    return list(answer.json()["devices"])


async def upload(house: AuthHouse, person: Person, **body: Any) -> dict[str, Any]:
    answer = await house.call("PUT", "/keys", person, body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_a_bundle_opens_a_session_with_each_device(house: AuthHouse) -> None:
    asker, target = await house.register(), await house.register(one_time_prekeys=1)
    second = await house.add_device(target, registration_id=99)
    bundles = await claim(house, asker, target)
    assert [item["device_id"] for item in bundles] == [str(target.device_id), str(second.device_id)]
    first = bundles[0]
    assert set(first) == {
        "device_id", "registration_id", "identity_key", "signing_key", "signed_prekey", "one_time_prekey", "pq_prekey",
    }  # fmt: skip
    assert first["identity_key"] == b64(target.keys.identity_key.public_key().public_bytes_raw())
    signed = first["signed_prekey"]
    target.keys.signing_key.verify_key.verify(
        base64.b64decode(signed["public_key"]), base64.b64decode(signed["signature"])
    )
    assert first["one_time_prekey"]["key_id"] == 1
    assert first["pq_prekey"] is None
    assert bundles[1]["registration_id"] == 99
    assert bundles[1]["one_time_prekey"] is None


async def test_one_time_keys_come_oldest_first_and_run_out(house: AuthHouse) -> None:
    asker, target = await house.register(), await house.register(one_time_prekeys=2)
    await upload(house, target, one_time_prekeys=[target.keys.prekey(7), target.keys.prekey(3)])
    taken = [(await claim(house, asker, target))[0]["one_time_prekey"] for _ in range(5)]
    assert [key and key["key_id"] for key in taken] == [1, 2, 7, 3, None]


async def test_fifty_claimers_at_once_never_share_a_key(house: AuthHouse) -> None:
    target, askers = await house.register(one_time_prekeys=40), [await house.register() for _ in range(5)]
    answers = await asyncio.gather(*(claim(house, askers[n % 5], target) for n in range(50)))
    keys = [bundle["one_time_prekey"] for (bundle,) in answers]
    given = [key["public_key"] for key in keys if key is not None]
    assert len(given) == len(set(given)) == 40
    assert keys.count(None) == 10


async def test_claiming_ones_own_keys_skips_the_calling_device(house: AuthHouse) -> None:
    person = await house.register(one_time_prekeys=1)
    second = await house.add_device(person, one_time_prekeys=1)
    (bundle,) = await claim(house, person, person)
    assert bundle["device_id"] == str(second.device_id)
    assert bundle["one_time_prekey"] is not None
    (own,) = await claim(house, person, person, person)
    assert own["one_time_prekey"] is None
    assert (await house.call("GET", "/keys", person)).json()["one_time_prekeys"] == 1


async def test_claiming_from_one_device_leaves_the_others(house: AuthHouse) -> None:
    asker, target = await house.register(), await house.register(one_time_prekeys=1)
    second = await house.add_device(target, one_time_prekeys=1)
    (bundle,) = await claim(house, asker, target, second)
    assert bundle["device_id"] == str(second.device_id)
    assert (await house.call("GET", "/keys", target)).json()["one_time_prekeys"] == 1
    assert (await house.call("GET", "/keys", second)).json()["one_time_prekeys"] == 0


async def test_unknown_targets(house: AuthHouse) -> None:
    asker, target = await house.register(), await house.register()
    assert code(await house.call("GET", f"/keys/{uuid4()}", asker)) == (404, "user_not_found")
    for device_id in (uuid4(), asker.device_id):
        answer = await house.call("GET", f"/keys/{target.user_id}/{device_id}", asker)
        assert code(answer) == (404, "device_not_found")
    assert code(await house.call("GET", "/keys/nonsense", asker))[0] == 422


async def test_a_removed_device_hands_out_nothing(house: AuthHouse) -> None:
    asker, target = await house.register(), await house.register()
    second = await house.add_device(target, one_time_prekeys=1)
    await house.call("DELETE", f"/devices/{second.device_id}", target)
    assert [item["device_id"] for item in await claim(house, asker, target)] == [str(target.device_id)]
    assert code(await house.call("GET", f"/keys/{target.user_id}/{second.device_id}", asker))[0] == 404


async def test_uploads_add_one_time_keys_and_replace_lasting_ones(house: AuthHouse) -> None:
    person = await house.register(one_time_prekeys=2)
    keys = person.keys
    counts = await upload(
        house, person,
        signed_prekey=keys.signed_prekey(5),
        one_time_prekeys=[keys.prekey(10), keys.prekey(11)],
        pq_last_resort_prekey=pq_prekey(keys, 6),
        pq_one_time_prekeys=[pq_prekey(keys, 20)],
    )  # fmt: skip
    expected = {
        "one_time_prekeys": 4, "pq_one_time_prekeys": 1, "signed_prekey_id": 5, "pq_last_resort_prekey_id": 6,
    }  # fmt: skip
    assert counts == expected
    assert (await house.call("GET", "/keys", person)).json() == expected
    assert await upload(house, person) == expected


async def test_pq_keys_are_one_time_and_then_the_last_resort_for_ever(house: AuthHouse) -> None:
    asker, target = await house.register(), await house.register()
    keys = target.keys
    await upload(
        house, target, pq_last_resort_prekey=pq_prekey(keys, 1), pq_one_time_prekeys=[pq_prekey(keys, 2)]
    )
    ids = [(await claim(house, asker, target))[0]["pq_prekey"]["key_id"] for _ in range(3)]
    assert ids == [2, 1, 1]


async def test_repeating_an_upload_changes_nothing_even_after_a_claim(house: AuthHouse) -> None:
    asker, target = await house.register(), await house.register()
    body = {"one_time_prekeys": [target.keys.prekey(1), target.keys.prekey(2)]}
    assert (await upload(house, target, **body))["one_time_prekeys"] == 2
    assert (await upload(house, target, **body))["one_time_prekeys"] == 2
    first = (await claim(house, asker, target))[0]["one_time_prekey"]
    assert (await upload(house, target, **body))["one_time_prekeys"] == 1
    second = (await claim(house, asker, target))[0]["one_time_prekey"]
    assert (first["key_id"], second["key_id"]) == (1, 2)
    assert (await claim(house, asker, target))[0]["one_time_prekey"] is None


async def test_a_spent_key_stays_spent_while_it_is_being_claimed(rules_url: str, valkey_url: str) -> None:
    """The claim has taken the key and not committed when the same key is uploaded again."""
    async with rules(rules_url, valkey_url, ManualClock()) as auth:
        device = new_device(1)
        _, tokens = await register(auth, device)
        from whispr.services.auth import store

        async with auth.prekeys._db.transaction() as tx:
            taken = await store.prekeys.claim_one_time(
                tx, [tokens.device_id], "ec", auth.prekeys._clock.now()
            )
            again = PrekeyUpload(one_time_prekeys=device.one_time_prekeys)
            uploading = asyncio.create_task(auth.prekeys.upload(caller_of(tokens), again))
            await asyncio.sleep(0.2)
            assert not uploading.done()
        counts = await uploading
        assert len(taken) == 1
        assert counts.one_time_prekeys == 0


async def test_an_id_with_other_bytes_is_a_conflict(house: AuthHouse) -> None:
    person = await house.register()
    first = person.keys.prekey(1)
    await upload(house, person, one_time_prekeys=[first])
    for clash in (person.keys.prekey(1), {**first, "key_id": 2}):
        answer = await house.call(
            "PUT", "/keys", person, {"one_time_prekeys": [person.keys.prekey(9), clash]}
        )
        assert code(answer) == (409, "key_id_conflict")
        assert answer.json()["key_ids"] == [clash["key_id"]]
    assert (await house.call("GET", "/keys", person)).json()["one_time_prekeys"] == 1


@pytest.mark.parametrize("field", ["signed_prekey", "pq_last_resort_prekey", "pq_one_time_prekeys"])
async def test_uploaded_keys_must_be_signed_by_the_device(house: AuthHouse, field: str) -> None:
    person, other = await house.register(), DeviceKeys()
    key = other.signed_prekey(2) if field == "signed_prekey" else pq_prekey(other, 2)
    body = {
        "one_time_prekeys": [person.keys.prekey(1)],
        field: [key] if field == "pq_one_time_prekeys" else key,
    }
    assert code(await house.call("PUT", "/keys", person, body)) == (422, "bad_signature")
    counts = (await house.call("GET", "/keys", person)).json()
    assert (counts["one_time_prekeys"], counts["signed_prekey_id"]) == (0, 1)


async def test_upload_rules(house: AuthHouse) -> None:
    person = await house.register()
    keys = person.keys
    for body in (
        {"one_time_prekeys": [keys.prekey(n) for n in range(101)]},
        {"one_time_prekeys": [keys.prekey(1), keys.prekey(1)]},
        {"pq_last_resort_prekey": keys.signed_prekey(1)},
        {"signed_prekey": {**keys.signed_prekey(1), "key_id": 2**32}},
        {"one_time_prekeys": [{**keys.prekey(1), "public_key": b64(b"x" * 33)}]},
        {"one_time_prekeys": "many"},
    ):
        assert code(await house.call("PUT", "/keys", person, body)) == (422, "invalid_request")


async def test_a_device_stores_so_many_and_no_more(rules_url: str, valkey_url: str) -> None:
    from whispr.services.auth.models import TooManyPrekeys

    async with rules(rules_url, valkey_url, ManualClock(), max_one_time_prekeys=100) as auth:
        _, tokens = await register(auth, new_device(60))
        more = PrekeyUpload(one_time_prekeys=tuple(one_time_key(100 + n) for n in range(41)))
        with pytest.raises(TooManyPrekeys):
            await auth.prekeys.upload(caller_of(tokens), more)
        assert (await auth.prekeys.counts(caller_of(tokens))).one_time_prekeys == 60
        fits = PrekeyUpload(one_time_prekeys=more.one_time_prekeys[:40])
        assert (await auth.prekeys.upload(caller_of(tokens), fits)).one_time_prekeys == 100


def digest_of(keys: DeviceKeys, signed: dict[str, Any], last_resort: dict[str, Any] | None) -> str:
    def part(key: dict[str, Any]) -> bytes:
        return int(key["key_id"]).to_bytes(8, "big") + base64.b64decode(key["public_key"])

    identity = keys.identity_key.public_key().public_bytes_raw()
    return b64(
        hashlib.sha256(identity + part(signed) + (part(last_resort) if last_resort else bytes(8))).digest()
    )


async def test_a_device_can_check_what_is_handed_out(house: AuthHouse) -> None:
    person = await house.register()
    signed, last_resort = person.keys.signed_prekey(4), pq_prekey(person.keys, 5)
    await upload(house, person, signed_prekey=signed)

    async def check(digest: str) -> int:
        return (await house.call("POST", "/keys/check", person, {"digest": digest})).status_code

    assert await check(digest_of(person.keys, signed, None)) == 200
    await upload(house, person, pq_last_resort_prekey=last_resort)
    assert await check(digest_of(person.keys, signed, None)) == 409
    assert await check(digest_of(person.keys, signed, last_resort)) == 200
    assert await check(digest_of(person.keys, person.keys.signed_prekey(4), last_resort)) == 409
    assert await check("short") == 422


async def test_low_stock_is_told_once_per_crossing(house: AuthHouse) -> None:
    asker, target = await house.register(), await house.register(one_time_prekeys=12)

    def low(notices: list[Any]) -> list[Any]:
        return [item for item in notices if item["event"] == LOW and item["user_id"] == str(target.user_id)]

    async with house.hints("user:notices") as notices:
        for _ in range(2):
            await claim(house, asker, target)
        await asyncio.sleep(0.1)
        assert low(notices) == []
        await asyncio.gather(*(claim(house, asker, target) for _ in range(3)))
        await until(lambda: low(notices))
        (notice,) = low(notices)
        assert notice["device_id"] == notice["payload"]["device_id"] == str(target.device_id)
        assert notice["payload"]["key_type"] == "one_time_prekeys"
        assert notice["payload"]["remaining"] < 10
        await upload(house, target, one_time_prekeys=[target.keys.prekey(100 + n) for n in range(3)])
        await claim(house, asker, target)
        await until(lambda: len(low(notices)) == 2)


async def test_a_removed_device_cannot_upload(rules_url: str, valkey_url: str) -> None:
    from whispr.services.auth.models import DeviceNotFound

    async with rules(rules_url, valkey_url, ManualClock()) as auth:
        _, tokens = await register(auth)
        stranger = a_caller(tokens.user_id)
        with pytest.raises(DeviceNotFound):
            await auth.prekeys.upload(stranger, PrekeyUpload(one_time_prekeys=(one_time_key(1),)))
        await auth.devices.remove(caller_of(tokens), tokens.device_id)
        with pytest.raises(DeviceNotFound):
            await auth.prekeys.upload(caller_of(tokens), PrekeyUpload(one_time_prekeys=(one_time_key(1),)))


async def test_spent_keys_are_remembered_as_digests_only(house: AuthHouse, rows: Connection) -> None:
    asker, target = await house.register(), await house.register(one_time_prekeys=1)
    key = base64.b64decode((await claim(house, asker, target))[0]["one_time_prekey"]["public_key"])
    kept = await rows.fetch("SELECT * FROM spent_prekeys WHERE device_id = $1", target.device_id)
    assert [row["digest"] for row in kept] == [hashlib.sha256(key).digest()]


# --- post-quantum keys ---


def undecodable(keys: DeviceKeys, key_id: int = 1) -> dict[str, Any]:
    """Properly signed and of the right size, but its coefficients are none of the field's."""
    public = b"\xff" * 1184
    return {
        "key_id": key_id,
        "public_key": b64(public),
        "signature": b64(keys.signing_key.sign(public).signature),
    }


@pytest.mark.parametrize("field", ["pq_last_resort_prekey", "pq_one_time_prekeys"])
async def test_a_pq_key_must_be_one(house: AuthHouse, field: str) -> None:
    person, keys = await house.register(), DeviceKeys()

    def of(owner: DeviceKeys) -> dict[str, Any]:
        bad = undecodable(owner, 2)
        return {field: [pq_prekey(owner, 1), bad] if field == "pq_one_time_prekeys" else bad}

    assert code(await house.call("PUT", "/keys", person, of(person.keys))) == (422, "invalid_prekey")
    device = keys.registration(**of(keys))
    assert code(await house.log_in(person, device=device)) == (422, "invalid_prekey")
    counts = (await house.call("GET", "/keys", person)).json()
    assert (counts["pq_one_time_prekeys"], counts["pq_last_resort_prekey_id"]) == (0, None)


async def test_a_new_device_brings_its_pq_keys(house: AuthHouse) -> None:
    person, asker, keys = await house.register(), await house.register(), DeviceKeys()
    device = keys.registration(
        pq_last_resort_prekey=pq_prekey(keys, 1), pq_one_time_prekeys=[pq_prekey(keys, 2), pq_prekey(keys, 3)]
    )
    answer = await house.log_in(person, device=device)
    second = Person(person.username, person.password, keys, answer.json())
    ids = [(await claim(house, asker, person, second))[0]["pq_prekey"]["key_id"] for _ in range(3)]
    assert ids == [2, 3, 1]
    foreign = keys.registration(pq_last_resort_prekey=pq_prekey(DeviceKeys(), 1))
    assert code(await house.log_in(person, device=foreign)) == (422, "bad_signature")
    twice = keys.registration(pq_one_time_prekeys=[device["pq_one_time_prekeys"][0]] * 2)
    assert code(await house.log_in(person, device=twice)) == (422, "invalid_request")


async def test_devices_that_use_pq_keys_are_told_when_they_run_low(house: AuthHouse) -> None:
    asker, without, stocked, exhausted = [await house.register() for _ in range(4)]
    await upload(house, stocked, pq_one_time_prekeys=[pq_prekey(stocked.keys, n) for n in range(10)])
    await upload(house, exhausted, pq_last_resort_prekey=pq_prekey(exhausted.keys, 1))
    async with house.hints("user:notices") as notices:
        for target in (without, stocked, exhausted):
            await claim(house, asker, target)

        def low() -> dict[str, int]:
            kind = "pq_one_time_prekeys"
            return {
                item["user_id"]: item["payload"]["remaining"]
                for item in notices
                if item["event"] == LOW and item["payload"]["key_type"] == kind
            }

        await until(lambda: len(low()) == 2)
        assert low() == {str(stocked.user_id): 9, str(exhausted.user_id): 0}
