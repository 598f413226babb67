"""Linking a new device: both ends, what a stranger who saw the token can not do, and what ends a link."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from tests.services.auth.authenticator import set_up
from tests.services.auth.house import (
    ORIGIN,
    AuthHouse,
    caller_of,
    code,
    new_device,
    pq_prekey,
    register,
    rules,
    until,
)
from tests.stack import PASSWORD, DeviceKeys, Node, Person, b64

from whispr.kit.clock import ManualClock
from whispr.kit.db import Connection
from whispr.services.auth.models import Codes

WRONG_TOKEN = "A" * 43


@dataclass
class Newcomer:
    """A device without a session that holds a link's token."""

    house: AuthHouse
    token: str
    keys: DeviceKeys = field(default_factory=DeviceKeys)
    device: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = self.keys.registration(
            2,
            name="New phone",
            pq_last_resort_prekey=pq_prekey(self.keys, 1),
            pq_one_time_prekeys=[pq_prekey(self.keys, 2)],
        )

    async def claim(self) -> httpx.Response:
        body = {"token": self.token, "device": self.device}
        return await self.house.call("POST", "/devices/link/claim", json=body)

    async def finish(self, signer: DeviceKeys | None = None) -> httpx.Response:
        message = b"whispr-device-link-finish-v1" + self.token.encode()
        signature = (signer or self.keys).signing_key.sign(message).signature
        body = {"token": self.token, "signature": b64(signature)}
        return await self.house.call("POST", "/devices/link/finish", json=body)

    def check_code(self, link_id: str) -> str:
        """As the contract says both devices compute it."""
        keys = self.keys.identity_key.public_key().public_bytes_raw() + bytes(
            self.keys.signing_key.verify_key
        )
        message = b"whispr-device-link-v1" + UUID(link_id).bytes + keys
        digest = hmac.new(self.token.encode(), message, hashlib.sha256).digest()
        return f"{int.from_bytes(digest[:8], 'big') % 10**6:06}"


async def begin(house: AuthHouse, person: Person) -> tuple[str, Newcomer]:
    answer = await house.call("POST", "/devices/link", person, {"password": PASSWORD})
    assert answer.status_code == 201, answer.text
    assert answer.json()["expires_in"] == 60
    return answer.json()["link_id"], Newcomer(house, answer.json()["token"])


async def confirm(house: AuthHouse, person: Person, link_id: str, check_code: str) -> httpx.Response:
    return await house.call("POST", f"/devices/link/{link_id}/confirm", person, {"check_code": check_code})


async def confirmed(house: AuthHouse, person: Person) -> tuple[str, Newcomer]:
    link_id, newcomer = await begin(house, person)
    check_code = (await newcomer.claim()).json()["check_code"]
    assert (await confirm(house, person, link_id, check_code)).status_code == 204
    return link_id, newcomer


async def look(house: AuthHouse, person: Person, link_id: str) -> dict[str, Any]:
    answer = await house.call("GET", f"/devices/link/{link_id}", person)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def wrong(check_code: str) -> str:
    return f"{(int(check_code) + 1) % 10**6:06}"


async def test_a_device_is_linked(house: AuthHouse, rows: Connection) -> None:
    person, asker = await house.register(), await house.register()
    link_id, newcomer = await begin(house, person)
    assert await look(house, person, link_id) == {
        "link_id": link_id, "status": "waiting", "device": None, "check_code": None,
    }  # fmt: skip
    waiting = await newcomer.finish()
    assert (waiting.status_code, waiting.json()) == (202, {"status": "waiting"})

    async with house.hints("user:notices") as notices:
        claimed = await newcomer.claim()
        assert (claimed.status_code, claimed.json()["expires_in"]) == (202, 120)
        await until(lambda: notices)
    assert notices == [
        {
            "user_id": str(person.user_id),
            "event": "device_link_claimed",
            "payload": {
                "link_id": link_id,
                "device_id": str(person.device_id),
                "name": "New phone",
                "platform": "desktop",
            },
        }
    ]
    check_code = claimed.json()["check_code"]
    assert check_code == newcomer.check_code(link_id)
    seen = await look(house, person, link_id)
    assert (seen["status"], seen["check_code"]) == ("claimed", check_code)
    assert seen["device"] == {
        name: newcomer.device[name]
        for name in ("name", "platform", "registration_id", "identity_key", "signing_key")
    }
    assert (await newcomer.finish()).json() == {"status": "claimed"}
    assert len((await house.call("GET", "/devices", person)).json()["items"]) == 1

    assert (await confirm(house, person, link_id, check_code)).status_code == 204
    assert (await look(house, person, link_id))["status"] == "confirmed"
    async with house.hints("user:notices") as notices:
        finished = await newcomer.finish()
        assert finished.status_code == 201, finished.text
        await until(lambda: notices)
    assert (notices[0]["event"], notices[0]["payload"]["epoch"]) == ("device_list_changed", 2)
    second = Person(person.username, person.password, newcomer.keys, finished.json())
    assert second.user_id == person.user_id
    assert (await look(house, person, link_id))["status"] == "finished"
    listed = (await house.call("GET", "/devices", second)).json()["items"]
    assert [item["device_id"] for item in listed] == [str(person.device_id), str(second.device_id)]
    counts = (await house.call("GET", "/keys", second)).json()
    assert (counts["one_time_prekeys"], counts["pq_one_time_prekeys"]) == (2, 1)
    (_, bundle) = (await house.call("GET", f"/keys/{person.user_id}", asker)).json()["devices"]
    assert bundle["identity_key"] == newcomer.device["identity_key"]
    assert bundle["pq_prekey"]["key_id"] == 2
    assert (await house.refresh(second.session["refresh_token"])).status_code == 200
    stored = await rows.fetchrow("SELECT * FROM device_links WHERE id = $1", UUID(link_id))
    assert stored is not None
    assert stored["device"] is None
    assert newcomer.token not in repr(stored)


async def test_every_step_may_be_repeated(house: AuthHouse) -> None:
    person = await house.register()
    link_id, newcomer = await begin(house, person)
    claims = await asyncio.gather(*(newcomer.claim() for _ in range(3)))
    assert {answer.status_code for answer in claims} == {202}
    (check_code,) = {answer.json()["check_code"] for answer in claims}
    for _ in range(2):
        assert (await confirm(house, person, link_id, check_code)).status_code == 204
    assert (await newcomer.claim()).json()["check_code"] == check_code
    answers = await asyncio.gather(*(newcomer.finish() for _ in range(4)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["session_id"] for answer in answers}) == 1
    assert len((await house.call("GET", "/devices", person)).json()["items"]) == 2
    for answer in answers:
        assert (await house.refresh(answer.json()["refresh_token"])).status_code == 200
    assert (await confirm(house, person, link_id, check_code)).status_code == 204
    assert code(await newcomer.claim()) == (409, "link_used")
    house.clock.advance(61)
    assert code(await newcomer.finish()) == (409, "link_used")


async def test_beginning_may_be_repeated(house: AuthHouse) -> None:
    person = await house.register()
    app, _ = await set_up(house, person)
    headers = {"Idempotency-Key": uuid4().hex}
    body = {"password": PASSWORD, "totp_code": app.code(house.clock.time())}

    async def ask(**changes: Any) -> httpx.Response:
        return await house.call("POST", "/devices/link", person, {**body, **changes}, headers=headers)

    first = await ask()
    house.clock.advance(10)
    again = await ask()
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == {**first.json(), "expires_in": 50}
    assert code(await ask(password=PASSWORD + "x")) == (403, "wrong_password")
    assert code(await ask(totp_code=app.wrong(house.clock.time()))) == (403, "bad_totp_code")
    newcomer = Newcomer(house, first.json()["token"])
    assert (await newcomer.claim()).status_code == 202
    assert code(await ask()) == (403, "bad_totp_code"), "what was claimed is given to nobody again"
    house.clock.advance(60)
    fresh = await ask(totp_code=app.code(house.clock.time()))
    assert fresh.json()["token"] != first.json()["token"]


async def test_beginning_needs_the_password(house: AuthHouse) -> None:
    person = await house.register()
    answer = await house.call("POST", "/devices/link", person, {"password": PASSWORD + "x"})
    assert code(answer) == (403, "wrong_password")
    assert (await house.call("POST", "/devices/link", json={"password": PASSWORD})).status_code == 401


async def test_a_full_account_links_nothing(house: AuthHouse) -> None:
    person = await house.register()
    _, newcomer = await confirmed(house, person)
    for _ in range(9):
        await house.add_device(person)
    answer = await house.call("POST", "/devices/link", person, {"password": PASSWORD})
    assert code(answer) == (409, "too_many_devices")
    assert code(await newcomer.finish()) == (409, "too_many_devices")


async def test_only_the_device_that_began_it_sees_and_confirms(house: AuthHouse) -> None:
    person, stranger = await house.register(), await house.register()
    second = await house.add_device(person)
    link_id, newcomer = await begin(house, person)
    check_code = (await newcomer.claim()).json()["check_code"]
    for other in (second, stranger):
        assert code(await house.call("GET", f"/devices/link/{link_id}", other)) == (404, "link_not_found")
        assert code(await confirm(house, other, link_id, check_code)) == (404, "link_not_found")
    gone = await house.call("DELETE", f"/devices/link/{link_id}", stranger)
    assert code(gone) == (404, "link_not_found")
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/confirm")):
        path = f"/devices/link/{link_id}{path}"
        assert (await house.call(method, path, json={"check_code": check_code})).status_code == 401
    assert (await look(house, person, link_id))["status"] == "claimed"


async def test_whoever_saw_the_token_gets_no_session(house: AuthHouse) -> None:
    person = await house.register()
    link_id, newcomer = await begin(house, person)
    check_code = (await newcomer.claim()).json()["check_code"]
    thief = Newcomer(house, newcomer.token)
    assert code(await thief.claim()) == (409, "link_used")
    assert code(await thief.finish()) == (422, "bad_signature")
    await confirm(house, person, link_id, check_code)
    assert code(await thief.claim()) == (409, "link_used")
    assert code(await thief.finish()) == (422, "bad_signature")
    assert (await newcomer.finish()).status_code == 201
    assert code(await thief.finish()) == (422, "bad_signature")
    without = await house.call("POST", "/devices/link/finish", json={"token": newcomer.token})
    assert code(without) == (422, "invalid_request")


async def test_a_thief_who_is_first_shows_another_code(house: AuthHouse) -> None:
    person = await house.register()
    link_id, newcomer = await begin(house, person)
    thief = Newcomer(house, newcomer.token)
    assert (await thief.claim()).status_code == 202
    assert code(await newcomer.claim()) == (409, "link_used")
    assert (await look(house, person, link_id))["check_code"] != newcomer.check_code(link_id)
    assert code(await confirm(house, person, link_id, newcomer.check_code(link_id))) == (
        403,
        "wrong_check_code",
    )


async def test_the_third_wrong_code_ends_the_link(house: AuthHouse) -> None:
    person = await house.register()
    link_id, newcomer = await begin(house, person)
    assert code(await confirm(house, person, link_id, "000000")) == (409, "link_not_claimed")
    check_code = (await newcomer.claim()).json()["check_code"]
    for left in (2, 1, 0):
        answer = await confirm(house, person, link_id, wrong(check_code))
        assert code(answer) == (403, "wrong_check_code")
        assert answer.json()["attempts_left"] == left
    assert code(await confirm(house, person, link_id, check_code)) == (409, "link_refused")
    assert code(await newcomer.finish()) == (409, "link_refused")
    assert (await look(house, person, link_id))["status"] == "refused"


async def test_any_device_of_the_person_may_refuse(house: AuthHouse) -> None:
    person = await house.register()
    second = await house.add_device(person)
    link_id, newcomer = await confirmed(house, person)
    for _ in range(2):
        assert (await house.call("DELETE", f"/devices/link/{link_id}", second)).status_code == 204
    assert await look(house, person, link_id) == {
        "link_id": link_id, "status": "refused", "device": None, "check_code": None,
    }  # fmt: skip
    assert code(await newcomer.finish()) == (409, "link_refused")
    assert code(await newcomer.claim()) == (409, "link_refused")
    link_id, newcomer = await confirmed(house, person)
    assert (await newcomer.finish()).status_code == 201
    assert code(await house.call("DELETE", f"/devices/link/{link_id}", second)) == (409, "link_used")


async def test_each_step_has_its_time(house: AuthHouse) -> None:
    person = await house.register()
    link_id, newcomer = await begin(house, person)
    house.clock.advance(61)
    assert code(await newcomer.claim()) == (409, "link_expired")
    assert code(await newcomer.finish()) == (409, "link_expired")
    assert (await look(house, person, link_id))["status"] == "expired"

    link_id, newcomer = await begin(house, person)
    house.clock.advance(59)
    check_code = (await newcomer.claim()).json()["check_code"]
    house.clock.advance(119)
    assert (await confirm(house, person, link_id, check_code)).status_code == 204
    house.clock.advance(59)
    assert (await newcomer.finish()).status_code == 201

    link_id, newcomer = await begin(house, person)
    check_code = (await newcomer.claim()).json()["check_code"]
    house.clock.advance(121)
    assert code(await confirm(house, person, link_id, check_code)) == (409, "link_expired")
    assert code(await newcomer.finish()) == (409, "link_expired")


async def test_a_newer_link_of_the_device_ends_the_older(house: AuthHouse) -> None:
    person = await house.register()
    second = await house.add_device(person)
    _, first = await confirmed(house, person)
    _, others = await confirmed(house, second)
    await begin(house, person)
    assert code(await first.finish()) == (409, "link_refused")
    assert (await others.finish()).status_code == 201


@pytest.mark.parametrize("how", ["logout", "removal", "password"])
async def test_a_link_ends_with_the_session_that_began_it(house: AuthHouse, how: str) -> None:
    person = await house.register()
    second = await house.add_device(person)
    _, newcomer = await confirmed(house, second)
    if how == "logout":
        await house.call("POST", "/auth/logout", second)
    elif how == "removal":
        await house.call("DELETE", f"/devices/{second.device_id}", person)
    else:
        body = {"current_password": PASSWORD, "new_password": "also long enough"}
        assert (await house.call("PUT", "/auth/password", person, body)).status_code == 204
    assert code(await newcomer.finish()) == (409, "link_refused")
    assert code(await newcomer.claim()) == (409, "link_refused")


async def test_a_deleted_account_links_nothing(house: AuthHouse, rows: Connection) -> None:
    person = await house.register()
    _, newcomer = await confirmed(house, person)
    await house.call("DELETE", "/auth/account", person, {"password": PASSWORD})
    assert code(await newcomer.finish()) == (404, "link_not_found")
    assert code(await newcomer.claim()) == (404, "link_not_found")
    query = "SELECT count(*) FROM device_links WHERE account_id = $1"
    assert await rows.fetchval(query, person.user_id) == 0


async def test_the_claimed_keys_are_checked(house: AuthHouse) -> None:
    person = await house.register()
    _, newcomer = await begin(house, person)
    good = newcomer.device
    bad_pq = {
        "key_id": 1,
        "public_key": b64(b"\xff" * 1184),
        "signature": b64(newcomer.keys.signing_key.sign(b"\xff" * 1184).signature),
    }
    for change, refused in (
        ({"signed_prekey": DeviceKeys().signed_prekey()}, "bad_signature"),
        ({"pq_last_resort_prekey": pq_prekey(DeviceKeys(), 1)}, "bad_signature"),
        ({"pq_last_resort_prekey": bad_pq}, "invalid_prekey"),
        ({"registration_id": 0}, "invalid_request"),
    ):
        newcomer.device = {**good, **change}
        assert code(await newcomer.claim()) == (422, refused)
    newcomer.device = good
    assert (await newcomer.claim()).status_code == 202


async def test_unknown_tokens_and_links(house: AuthHouse) -> None:
    person = await house.register()
    nobody = Newcomer(house, WRONG_TOKEN)
    assert code(await nobody.claim()) == (404, "link_not_found")
    assert code(await nobody.finish()) == (404, "link_not_found")
    assert code(await house.call("GET", f"/devices/link/{uuid4()}", person)) == (404, "link_not_found")
    assert code(await confirm(house, person, str(uuid4()), "123456")) == (404, "link_not_found")


@pytest.fixture
async def limited(house: AuthHouse) -> AsyncIterator[Node]:
    names = {"WHISPR_AUTH_LINK_LIMIT": "2", "WHISPR_AUTH_LINK_IP_LIMIT": "3"}
    os.environ.update(names)
    node = await house.another_node("auth", rate_limits="on")
    yield node
    for name in names:
        del os.environ[name]


async def test_links_are_limited_by_person_and_by_address(house: AuthHouse, limited: Node) -> None:
    person = await house.register()
    url, at = f"{limited.url}/api/v1/devices/link", {"X-Forwarded-For": f"198.51.100.{uuid4().int % 200}"}

    async def ask(path: str, body: dict[str, Any], headers: dict[str, str]) -> int:
        return (await house.http.post(url + path, json=body, headers=headers)).status_code

    begun = [await ask("", {"password": PASSWORD}, person.headers) for _ in range(3)]
    assert begun == [201, 201, 429]
    finish = {"token": WRONG_TOKEN, "signature": b64(bytes(64))}
    claim = {"token": WRONG_TOKEN, "device": DeviceKeys().registration()}
    asked = [
        await ask("/claim", claim, at),
        await ask("/finish", finish, at),
        await ask("/finish", finish, at),
    ]
    assert asked == [404, 404, 404]
    assert await ask("/claim", claim, at) == await ask("/finish", finish, at) == 429


async def test_housekeeping_forgets_what_was_brought_and_old_links(rules_url: str, valkey_url: str) -> None:
    clock = ManualClock()
    async with rules(rules_url, valkey_url, clock) as auth:
        _, tokens = await register(auth)
        claimed = await auth.links.begin(caller_of(tokens), PASSWORD, Codes())
        await auth.links.claim(claimed.token, new_device(), ORIGIN)
        _, others = await register(auth)
        waiting = await auth.links.begin(caller_of(others), PASSWORD, Codes(), "a key")
        clock.advance(121)
        await auth.housekeeping.clean()
        async with auth.links._db.connection() as connection:
            query = "SELECT status, device, token_sealed FROM device_links WHERE id = $1"
            for link in (claimed, waiting):
                row = await connection.fetchrow(query, link.id)
                assert row is not None
                assert tuple(row) == ("expired", None, None)
            clock.advance(366 * 86400)
            await auth.housekeeping.clean()
            assert await connection.fetchrow(query, link.id) is None
