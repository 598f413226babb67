"""The REST door of the user service, with people from the real `auth`."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import httpx
import pytest
from tests.stack import Person, Stack

from whispr.kit.http import encode_cursor

ME = "/api/v1/users/me"
BEFORE_TIME = encode_cursor({"created_at": "0001-01-01T00:00:00+14:00", "user_id": str(uuid4())})


async def ask(stack: Stack, person: Person | None, method: str, path: str, **options: Any) -> httpx.Response:
    headers = {**(person.headers if person else {}), **options.pop("headers", {})}
    return await stack.http.request(method, f"{stack.user.url}{path}", headers=headers, **options)


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["code"] == code
    assert body["status"] == status
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


async def test_every_route_wants_a_token(stack: Stack) -> None:
    paths = stack.user.running.service.http.openapi()["paths"]
    routes = [
        (method, path) for path, methods in paths.items() if path.startswith("/api/") for method in methods
    ]
    assert len(routes) == 12
    for method, path in routes:
        path = path.replace("{user_id}", str(uuid4()))
        problem(await ask(stack, None, method, path), 401, "unauthenticated")
        forged = {"Authorization": "Bearer eyJhbGciOiJub25lIn0.e30."}
        problem(await ask(stack, None, method, path, headers=forged), 401, "invalid_token")


async def test_a_new_person_has_a_profile_with_sane_defaults(stack: Stack) -> None:
    ada = await stack.register()
    answer = await ask(stack, ada, "GET", ME)
    assert answer.status_code == 200
    profile = answer.json()
    assert profile["id"] == profile["user_id"] == str(ada.user_id)
    assert profile["username"] == ada.username
    assert (profile["display_name"], profile["avatar_media_id"]) == (None, None)
    assert (profile["locale"], profile["time_zone"]) == ("en", "UTC")
    assert profile["privacy"] == {
        "last_seen": "contacts",
        "online": "everyone",
        "profile": "everyone",
        "read_receipts": True,
        "messages": "everyone",
        "groups": "everyone",
    }


async def test_a_profile_is_changed_in_parts(stack: Stack) -> None:
    ada, picture = await stack.register(), str(uuid4())
    changed = await ask(
        stack,
        ada,
        "PATCH",
        ME,
        json={
            "display_name": " Ada 👩‍💻 Лавлейс ",
            "avatar_media_id": picture,
            "locale": "FR-ca",
            "unknown": [1],
        },
    )
    assert changed.status_code == 200
    await ask(stack, ada, "PATCH", ME, json={"time_zone": "Europe/Paris", "privacy": {"online": "nobody"}})
    await ask(stack, ada, "PATCH", ME, json={"privacy": {"read_receipts": False}})
    profile = (await ask(stack, ada, "GET", ME)).json()
    assert profile["display_name"] == "Ada 👩‍💻 Лавлейс"
    assert (profile["avatar_media_id"], profile["locale"], profile["time_zone"]) == (
        picture,
        "fr-CA",
        "Europe/Paris",
    )
    assert (profile["privacy"]["online"], profile["privacy"]["read_receipts"]) == ("nobody", False)
    assert profile["privacy"]["messages"] == "everyone"
    cleared = await ask(stack, ada, "PATCH", ME, json={"display_name": None, "locale": None, "privacy": None})
    assert (cleared.json()["display_name"], cleared.json()["locale"]) == (None, "en")
    assert cleared.json()["privacy"] == profile["privacy"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"display_name": "x" * 65}, "invalid_display_name"),
        ({"display_name": ""}, "invalid_display_name"),
        ({"display_name": "a\u202eb"}, "invalid_display_name"),
        ({"locale": "no locale"}, "invalid_locale"),
        ({"time_zone": "Mars/Base"}, "invalid_time_zone"),
        ({"display_name": "x" * 5000}, "invalid_request"),
        ({"display_name": 7}, "invalid_request"),
        ({"display_name": "nul\0"}, "invalid_request"),
        ({"avatar_media_id": "no-uuid"}, "invalid_request"),
        ({"privacy": {"online": "friends"}}, "invalid_request"),
        ({"privacy": {"messages": "nobody"}}, "invalid_request"),
        ({"privacy": {"read_receipts": "yes"}}, "invalid_request"),
        ({"privacy": {"onlien": "nobody"}}, "invalid_request"),
        ({"privacy": "nobody"}, "invalid_request"),
        ([], "invalid_request"),
        ("text", "invalid_request"),
    ],
)
async def test_bad_changes_have_clear_codes(stack: Stack, ada: Person, change: Any, code: str) -> None:
    problem(await ask(stack, ada, "PATCH", ME, json=change), 422, code)


@pytest.fixture(scope="module")
async def ada(stack: Stack) -> Person:
    return await stack.register()


async def test_bad_bodies_have_clear_codes(stack: Stack, ada: Person) -> None:
    json_type = {"Content-Type": "application/json"}
    problem(await ask(stack, ada, "PATCH", ME, content=b"{", headers=json_type), 400, "malformed_json")
    problem(
        await ask(stack, ada, "PATCH", ME, content=b'{"a": "\xff"}', headers=json_type), 400, "malformed_json"
    )
    problem(
        await ask(stack, ada, "PATCH", ME, content=b"[" * 100_000, headers=json_type), 400, "malformed_json"
    )
    large = b'{"display_name": "' + b"x" * 300_000 + b'"}'
    problem(await ask(stack, ada, "PATCH", ME, content=large, headers=json_type), 413, "too_large")
    unpaired = b'{"display_name": "\\ud800"}'
    answer = await ask(stack, ada, "PATCH", ME, content=unpaired, headers=json_type)
    assert answer.status_code in (400, 422)


async def test_others_are_shown_what_privacy_admits(stack: Stack, ada: Person) -> None:
    bob = await stack.register()
    await ask(stack, bob, "PATCH", ME, json={"display_name": "Bob", "privacy": {"profile": "contacts"}})
    path = f"/api/v1/users/{bob.user_id}"
    assert (await ask(stack, ada, "GET", path)).json() == {
        "id": str(bob.user_id),
        "user_id": str(bob.user_id),
        "username": bob.username,
        "display_name": None,
        "avatar_media_id": None,
        "is_contact": False,
        "is_blocked": False,
    }
    assert (await ask(stack, bob, "PUT", f"{ME}/contacts/{ada.user_id}")).status_code == 204
    assert (await ask(stack, ada, "GET", path)).json()["display_name"] == "Bob"
    assert (await ask(stack, bob, "PUT", f"{ME}/blocks/{ada.user_id}")).status_code == 204
    assert (await ask(stack, ada, "GET", path)).json()["display_name"] is None
    problem(await ask(stack, ada, "GET", f"/api/v1/users/{uuid4()}"), 404, "user_not_found")
    problem(await ask(stack, ada, "GET", "/api/v1/users/not-a-uuid"), 422, "invalid_request")


async def test_search_is_exact_and_knows_people_who_never_came_here(stack: Stack, ada: Person) -> None:
    newcomer = await stack.register()
    found = (await ask(stack, ada, "GET", "/api/v1/users", params={"username": newcomer.username})).json()
    assert [item["id"] for item in found["items"]] == [str(newcomer.user_id)]
    assert found["next_cursor"] is None
    nobody = (
        await ask(stack, ada, "GET", "/api/v1/users", params={"username": newcomer.username[:-1]})
    ).json()
    assert nobody == {"items": [], "next_cursor": None}
    problem(await ask(stack, ada, "GET", "/api/v1/users"), 422, "invalid_request")
    problem(
        await ask(stack, ada, "GET", "/api/v1/users", params={"username": "no way!"}), 422, "invalid_username"
    )
    problem(
        await ask(stack, ada, "GET", "/api/v1/users", params={"username": "nul\0"}), 422, "invalid_request"
    )


async def test_contacts_page_through_a_cursor(stack: Stack) -> None:
    owner = await stack.register()
    others = [await stack.register() for _ in range(5)]
    for other in others:
        for _ in range(2):
            answer = await ask(stack, owner, "PUT", f"{ME}/contacts/{other.user_id}")
            assert (answer.status_code, answer.content) == (204, b"")
    seen: list[str] = []
    cursor: str | None = None
    for expected in (2, 2, 1):
        params = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = (await ask(stack, owner, "GET", f"{ME}/contacts", params=params)).json()
        assert len(page["items"]) == expected
        assert all(item["is_contact"] and item["added_at"] for item in page["items"])
        seen += [item["user_id"] for item in page["items"]]
        cursor = page["next_cursor"]
    assert cursor is None
    assert sorted(seen) == sorted(str(other.user_id) for other in others)
    for _ in range(2):
        assert (await ask(stack, owner, "DELETE", f"{ME}/contacts/{seen[0]}")).status_code == 204
    left = (await ask(stack, owner, "GET", f"{ME}/contacts")).json()
    assert [item["user_id"] for item in left["items"]] == seen[1:]


@pytest.mark.parametrize("path", ["contacts", "blocks"])
@pytest.mark.parametrize("cursor", ["nonsense", "eyJhIjoxfQ", "bnVsbA", "é", "A" * 600, BEFORE_TIME])
async def test_foreign_cursors_are_refused(stack: Stack, ada: Person, path: str, cursor: str) -> None:
    answer = await ask(stack, ada, "GET", f"{ME}/{path}", params={"cursor": cursor})
    assert answer.status_code == 422
    assert answer.json()["code"] in ("invalid_cursor", "invalid_request")


@pytest.mark.parametrize("limit", ["0", "101", "-1", "many", "9" * 40])
async def test_limits_have_bounds(stack: Stack, ada: Person, limit: str) -> None:
    problem(await ask(stack, ada, "GET", f"{ME}/contacts", params={"limit": limit}), 422, "invalid_request")


async def test_blocks_are_listed_lifted_and_never_told(stack: Stack) -> None:
    owner, other = await stack.register(), await stack.register()
    await ask(stack, other, "PUT", f"{ME}/contacts/{owner.user_id}")
    assert (await ask(stack, owner, "PUT", f"{ME}/blocks/{other.user_id}")).status_code == 204
    page = (await ask(stack, owner, "GET", f"{ME}/blocks")).json()
    assert [(item["user_id"], item["is_blocked"]) for item in page["items"]] == [(str(other.user_id), True)]
    assert page["items"][0]["blocked_at"]
    contacts = (await ask(stack, other, "GET", f"{ME}/contacts")).json()
    assert [item["user_id"] for item in contacts["items"]] == [str(owner.user_id)]
    assert not contacts["items"][0]["is_blocked"]
    problem(await ask(stack, owner, "PUT", f"{ME}/contacts/{other.user_id}"), 409, "contact_blocked")
    assert (await ask(stack, owner, "DELETE", f"{ME}/blocks/{other.user_id}")).status_code == 204
    assert (await ask(stack, owner, "PUT", f"{ME}/contacts/{other.user_id}")).status_code == 204


@pytest.mark.parametrize("kind", ["contacts", "blocks"])
async def test_oneself_and_strangers_are_refused(stack: Stack, ada: Person, kind: str) -> None:
    problem(await ask(stack, ada, "PUT", f"{ME}/{kind}/{ada.user_id}"), 422, "own_account")
    problem(await ask(stack, ada, "PUT", f"{ME}/{kind}/{uuid4()}"), 404, "user_not_found")
    problem(await ask(stack, ada, "PUT", f"{ME}/{kind}/me"), 422, "invalid_request")


async def test_quotas_show_limits_and_use(stack: Stack) -> None:
    owner, other = await stack.register(), await stack.register()
    await ask(stack, owner, "PUT", f"{ME}/contacts/{other.user_id}")
    assert (await ask(stack, owner, "GET", f"{ME}/quotas")).json() == {
        "storage_bytes": {"limit": 1024**3, "used": 0, "reserved": 0},
        "contacts": {"limit": 5000, "used": 1},
        "blocks": {"limit": 5000, "used": 0},
    }


async def test_limits_answer_when_to_come_back(stack: Stack, ada: Person) -> None:
    node = await stack.another_node("user", rate_limits="on")
    try:
        answers = await asyncio.gather(
            *(
                stack.http.get(
                    f"{node.url}/api/v1/users", params={"username": ada.username}, headers=ada.headers
                )
                for _ in range(70)
            )
        )
    finally:
        await node.running.stop()
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) >= 5
    for answer in refused:
        problem(answer, 429, "rate_limited")
        assert int(answer.headers["retry-after"]) >= 1


async def test_a_deleted_account_disappears_here_too(stack: Stack) -> None:
    leaving, friend = await stack.register(), await stack.register()
    await ask(stack, friend, "PUT", f"{ME}/contacts/{leaving.user_id}")
    deleted = await stack.http.request(
        "DELETE",
        f"{stack.auth.url}/api/v1/auth/account",
        headers=leaving.headers,
        json={"password": leaving.password},
    )
    assert deleted.status_code == 204, deleted.text
    async with asyncio.timeout(10):
        while (await ask(stack, friend, "GET", f"/api/v1/users/{leaving.user_id}")).status_code != 404:
            await asyncio.sleep(0.05)
    assert (await ask(stack, friend, "GET", f"{ME}/contacts")).json()["items"] == []
    search = await ask(stack, friend, "GET", "/api/v1/users", params={"username": leaving.username})
    assert search.json()["items"] == []
    problem(await ask(stack, friend, "PUT", f"{ME}/contacts/{leaving.user_id}"), 404, "user_not_found")


async def test_the_openapi_document_describes_every_route(stack: Stack) -> None:
    document = stack.user.running.service.http.openapi()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description"), (method, path)
            assert "401" in operation["responses"], (method, path)
