"""What auth gives a person of their own: all of it, nobody else's, and no secret."""

from __future__ import annotations

import base64
import json
from typing import Any
from uuid import uuid4

from tests.services.auth.authenticator import set_up
from tests.services.auth.house import ORIGIN, AuthHouse, caller_of, code, pq_prekey, register, rules
from tests.stack import PASSWORD, Person, b64

from whispr.kit.clock import ManualClock
from whispr.kit.db import Connection
from whispr.services.auth import store


async def exported(house: AuthHouse, person: Person) -> dict[str, Any]:
    answer = await house.call("GET", "/auth/export", person)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_the_export_holds_what_auth_keeps(house: AuthHouse) -> None:
    person = await house.register(one_time_prekeys=2)
    second = await house.add_device(person, name="Phone", platform="ios")
    body = {
        "pq_last_resort_prekey": pq_prekey(person.keys, 70),
        "pq_one_time_prekeys": [pq_prekey(person.keys, 71)],
    }
    await house.call("PUT", "/keys", person, body)
    token = {"channel": "fcm", "token": f"fcm:{uuid4().hex}"}
    await house.call("PUT", f"/devices/{person.device_id}/push-token", person, token)
    await house.call("DELETE", f"/devices/{second.device_id}", person)
    await set_up(house, person)
    codes = {"recovery_code": "AAAA-AAAA-AAAA-AAAA"}
    await house.log_in(person, device_id=str(person.device_id), **codes)

    found = await exported(house, person)
    account = found["account"]
    assert (account["user_id"], account["username"]) == (str(person.user_id), person.username)
    assert (account["status"], account["roles"]) == ("active", [])
    assert (account["second_factor"], account["recovery_codes_left"]) == (True, 10)
    own, removed = found["devices"]
    assert own["device_id"] == str(person.device_id)
    assert own["signing_key"] == b64(bytes(person.keys.signing_key.verify_key))
    assert (own["status"], own["removed_at"], own["expired_at"]) == ("active", None, None)
    assert (own["signed_prekey_id"], own["pq_last_resort_prekey_id"]) == (1, 70)
    assert (own["one_time_prekey_ids"], own["pq_one_time_prekey_ids"]) == ([1, 2], [71])
    assert [item["channel"] for item in own["push_tokens"]] == ["fcm"]
    assert (removed["device_id"], removed["name"], removed["status"]) == (
        str(second.device_id),
        "Phone",
        "revoked",
    )
    assert [(item["session_id"], item["end_reason"]) for item in found["sessions"]] == [
        (str(person.session_id), None),
        (str(second.session_id), "device_removed"),
    ]
    events = [item["event"] for item in found["events"]]
    assert events == [
        "registered",
        "device_added",
        "logged_in",
        "push_token_set",
        "device_removed",
        "second_factor_on",
        "second_factor_failed",
    ]


async def test_links_are_in_it_with_how_they_ended(house: AuthHouse) -> None:
    person = await house.register()
    begun = (await house.call("POST", "/devices/link", person, {"password": PASSWORD})).json()
    assert [item["status"] for item in (await exported(house, person))["links"]] == ["waiting"]
    house.clock.advance(61)
    (link,) = (await exported(house, person))["links"]
    assert (link["link_id"], link["status"]) == (begun["link_id"], "expired")
    assert (link["by_device_id"], link["device_id"]) == (str(person.device_id), None)


async def test_no_secret_and_no_digest_is_in_it(house: AuthHouse, rows: Connection) -> None:
    person = await house.register(one_time_prekeys=1)
    push_token = f"fcm:{uuid4().hex}"
    body = {"channel": "fcm", "token": push_token}
    await house.call("PUT", f"/devices/{person.device_id}/push-token", person, body)
    app, recovery_codes = await set_up(house, person)
    text = json.dumps(await exported(house, person))
    secrets = [
        PASSWORD,
        push_token,
        app.secret,
        *recovery_codes,
        person.session["refresh_token"],
        person.token,
    ]
    for table, key in (
        ("accounts", "id"),
        ("sessions", "account_id"),
        ("second_factors", "account_id"),
        ("recovery_codes", "account_id"),
    ):
        for row in await rows.fetch(f"SELECT * FROM {table} WHERE {key} = $1", person.user_id):
            secrets += [value.hex() for value in row.values() if isinstance(value, bytes)]
            secrets += [
                base64.b64encode(value).decode() for value in row.values() if isinstance(value, bytes)
            ]
            secrets += [row["password_hash"]] if "password_hash" in row else []
    assert len(secrets) > 20
    assert not [secret for secret in secrets if secret in text]


async def test_nobody_else_gets_it(house: AuthHouse) -> None:
    person, stranger = await house.register(), await house.register()
    assert (await house.call("GET", "/auth/export")).status_code == 401
    text = json.dumps(await exported(house, stranger))
    for mine in (person.user_id, person.device_id, person.session_id, person.username):
        assert str(mine) not in text
    await house.call("POST", "/auth/logout", person)
    assert code(await house.call("GET", "/auth/export", person)) == (401, "session_revoked")


async def test_of_very_many_events_the_newest_are_given(rules_url: str, valkey_url: str) -> None:
    async with rules(rules_url, valkey_url, ManualClock()) as auth:
        username, tokens = await register(auth)
        for _ in range(3):
            await auth.entry.log_in(username, PASSWORD, ORIGIN, device_id=tokens.device_id)
        everything = await auth.export.of(caller_of(tokens))
        assert [item.event for item in everything.events] == ["registered", *["logged_in"] * 3]
        async with auth.devices._db.connection() as connection:
            newest = await store.export.events(connection, tokens.user_id, 2)
        assert newest == everything.events[-2:]
