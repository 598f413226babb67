"""Making, showing, changing, leaving and closing conversations, through the REST door of the running stack."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from tests.services.messaging.door import Door, assert_problem
from tests.stack import Stack

from whispr.kit.db import Database
from whispr.kit.http import encode_cursor


async def people(stack: Stack, count: int) -> list[Door]:
    return [Door(stack, person) for person in await asyncio.gather(*(stack.register() for _ in range(count)))]


async def test_a_direct_conversation_is_made_once(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    first = await ann.post("/conversations", {"type": "direct", "member_ids": [bob.id], "metadata": {"a": 1}})
    again = await ann.post("/conversations", {"type": "direct", "member_ids": [bob.id]})
    other_side = await bob.post("/conversations", {"type": "direct", "member_ids": [ann.id, bob.id]})
    assert [first.status_code, again.status_code, other_side.status_code] == [201, 200, 200]
    assert {answer.json()["id"] for answer in (first, again, other_side)} == {first.json()["id"]}
    body = other_side.json()
    assert body["metadata"] == {"a": 1}
    assert {(m["user_id"], m["role"]) for m in body["members"]} == {(ann.id, "member"), (bob.id, "member")}
    assert body["head_seq"] == 0
    assert UUID(body["id"]).version == 7


async def test_a_race_for_a_direct_conversation_makes_one(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    answers = await asyncio.gather(
        *(ann.post("/conversations", {"type": "direct", "member_ids": [bob.id]}) for _ in range(4)),
        *(bob.post("/conversations", {"type": "direct", "member_ids": [ann.id]}) for _ in range(4)),
    )
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1


@pytest.mark.parametrize("member_ids", [[], ["self"], ["other", "third"]])
async def test_a_direct_conversation_is_with_one_other_person(stack: Stack, member_ids: list[str]) -> None:
    ann, bob, cid = await people(stack, 3)
    names = {"self": ann.id, "other": bob.id, "third": cid.id}
    body = {"type": "direct", "member_ids": [names[name] for name in member_ids]}
    assert_problem(await ann.post("/conversations", body), 422, "invalid_members")


@pytest.mark.parametrize("kind", ["channel", "secret", "Direct", "", None, 1, ["direct"]])
async def test_another_type_of_conversation_is_refused(stack: Stack, kind: Any) -> None:
    ann, bob = await people(stack, 2)
    answer = await ann.post("/conversations", {"type": kind, "member_ids": [bob.id]})
    problem = assert_problem(answer, 422, "invalid_request")
    assert {error["field"] for error in problem["errors"]} == {"body.type"}
    assert (await ann.ok("/conversations"))["items"] == []


async def test_the_database_refuses_another_type_of_conversation_and_of_message(
    stack: Stack, messaging_db: Database
) -> None:
    """Whatever door was forgotten: nothing of another type can be stored."""
    ann, bob = await people(stack, 2)
    conversation = UUID(await ann.group(bob))
    sent = await ann.post("/messages", ann.draft(str(conversation)))
    changes = (
        ("UPDATE conversations SET type = 'channel' WHERE id = $1", conversation),
        ("UPDATE messages SET message_type = 'poll' WHERE id = $1", UUID(sent.json()["id"])),
    )
    async with messaging_db.connection() as connection:
        for statement, row_id in changes:
            with pytest.raises(asyncpg.CheckViolationError):
                await connection.execute(statement, row_id)


async def test_unknown_people_are_named(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    nobody = str(uuid4())
    answer = await ann.post("/conversations", {"type": "group", "member_ids": [bob.id, nobody]})
    assert assert_problem(answer, 404, "user_not_found")["user_ids"] == [nobody]
    assert (await ann.ok("/conversations"))["items"] == []


async def test_blocked_people_are_kept_apart(stack: Stack) -> None:
    ann, bob, cid = await people(stack, 3)
    blocked = await stack.http.put(
        f"{stack.user.url}/api/v1/users/me/blocks/{ann.id}", headers=bob.person.headers
    )
    assert blocked.status_code == 204
    direct = await ann.post("/conversations", {"type": "direct", "member_ids": [bob.id]})
    assert_problem(direct, 403, "blocked")
    group = await ann.post("/conversations", {"type": "group", "member_ids": [cid.id, bob.id]})
    assert assert_problem(group, 403, "blocked")["user_ids"] == [bob.id]
    from_the_blocker = await bob.post("/conversations", {"type": "direct", "member_ids": [ann.id]})
    assert_problem(from_the_blocker, 403, "blocked")


async def test_people_may_allow_groups_to_contacts_only(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    await stack.http.patch(
        f"{stack.user.url}/api/v1/users/me",
        json={"privacy": {"groups": "contacts"}},
        headers=bob.person.headers,
    )
    answer = await ann.post("/conversations", {"type": "group", "member_ids": [bob.id]})
    assert_problem(answer, 403, "contacts_only")
    assert (await ann.post("/conversations", {"type": "direct", "member_ids": [bob.id]})).status_code == 201


async def test_a_group_with_its_roles(stack: Stack) -> None:
    ann, bob, cid = await people(stack, 3)
    group = await ann.group(bob, cid, bob, ann, metadata={"name": "ü\U0001f600"})
    body = await ann.ok(f"/conversations/{group}")
    roles = {member["user_id"]: member["role"] for member in body["members"]}
    assert roles == {ann.id: "owner", bob.id: "member", cid.id: "member"}
    assert (body["role"], body["member_count"], body["metadata"]) == ("owner", 3, {"name": "ü\U0001f600"})
    assert (await bob.ok(f"/conversations/{group}"))["role"] == "member"


async def test_an_idempotency_key_makes_one_group(stack: Stack) -> None:
    ann, bob, cid = await people(stack, 3)
    body = {"type": "group", "member_ids": [bob.id, cid.id], "metadata": {"b": 1, "a": 2}}
    same = {"type": "group", "member_ids": [cid.id, bob.id], "metadata": {"a": 2, "b": 1}}
    key = {"Idempotency-Key": "once"}
    answers = await asyncio.gather(
        ann.post("/conversations", body, headers=key), ann.post("/conversations", same, headers=key)
    )
    assert sorted(answer.status_code for answer in answers) == [200, 201]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    other = await ann.post("/conversations", {**body, "member_ids": [bob.id]}, headers=key)
    assert_problem(other, 409, "idempotency_conflict")
    by_somebody_else = await bob.post("/conversations", {**body, "member_ids": [ann.id]}, headers=key)
    assert by_somebody_else.status_code == 201
    without = await ann.post("/conversations", body)
    assert without.status_code == 201
    assert without.json()["id"] != answers[0].json()["id"]


async def test_a_key_does_not_bring_back_a_group_one_left(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    body = {"type": "group", "member_ids": [bob.id]}
    made = await ann.post("/conversations", body, headers={"Idempotency-Key": "k"})
    await ann.delete(f"/conversations/{made.json()['id']}/members/{ann.id}")
    again = await ann.post("/conversations", body, headers={"Idempotency-Key": "k"})
    assert_problem(again, 409, "idempotency_conflict")


async def test_a_group_holds_a_thousand_people(stack: Stack) -> None:
    ann = (await people(stack, 1))[0]
    member_ids = [str(uuid4()) for _ in range(1_000)]
    body = {"type": "group", "member_ids": member_ids}
    assert assert_problem(await ann.post("/conversations", body), 409, "too_many_members")["limit"] == 1_000
    # The owner and 999 others are asked about: none exists, so the bound itself did not refuse them.
    member_ids.pop()
    answer = assert_problem(await ann.post("/conversations", body), 404, "user_not_found")
    assert len(answer["user_ids"]) == 999


async def test_strangers_and_unknown_conversations_look_the_same(stack: Stack) -> None:
    ann, bob, eve = await people(stack, 3)
    group = await ann.group(bob)
    message = await ann.send(group)
    unknown = str(uuid4())
    for conversation in (group, unknown):
        answers = [
            await eve.get(f"/conversations/{conversation}"),
            await eve.patch(f"/conversations/{conversation}", {"metadata": {"x": 1}}),
            await eve.delete(f"/conversations/{conversation}"),
            await eve.post(f"/conversations/{conversation}/members", {"member_ids": [eve.id]}),
            await eve.patch(f"/conversations/{conversation}/members/{ann.id}", {"role": "member"}),
            await eve.delete(f"/conversations/{conversation}/members/{ann.id}"),
            await eve.delete(f"/conversations/{conversation}/members/{eve.id}"),
            await eve.get(f"/conversations/{conversation}/messages"),
            await eve.get(f"/conversations/{conversation}/events"),
            await eve.post(f"/conversations/{conversation}/read", {"seq": 1}),
            await eve.post(f"/conversations/{conversation}/delivered", {"seq": 1}),
            await eve.post("/messages", eve.draft(conversation)),
        ]
        for answer in answers:
            body = assert_problem(answer, 404, "conversation_not_found")
            assert body["detail"] == "There is no such conversation."
    for message_id in (message["id"], unknown):
        assert_problem(await eve.get(f"/messages/{message_id}/status"), 404, "message_not_found")
    assert (await eve.ok("/conversations"))["items"] == []


async def test_without_a_token_there_is_nothing(stack: Stack) -> None:
    for method, path in (
        ("GET", "/conversations"),
        ("POST", "/conversations"),
        ("POST", "/messages"),
        ("GET", f"/conversations/{uuid4()}/events"),
        ("GET", f"/messages/{uuid4()}/status"),
    ):
        answer = await stack.http.request(method, f"{stack.messaging.url}/api/v1{path}")
        assert_problem(answer, 401, "unauthenticated")


async def test_the_list_pages_by_latest_activity(stack: Stack) -> None:
    ann, *others = await people(stack, 4)
    made = []
    for other in others:
        stack.clock.advance(1)
        made.append(await ann.direct(other))
    stack.clock.advance(1)
    await others[0].send(made[0], "wake up")
    first = await ann.ok("/conversations", limit=2)
    second = await ann.ok("/conversations", limit=2, cursor=first["next_cursor"])
    assert [item["id"] for item in first["items"] + second["items"]] == [made[0], made[2], made[1]]
    assert second["next_cursor"] is None
    newest = first["items"][0]
    assert (newest["unread_count"], newest["last_message"]["sender_id"]) == (1, others[0].id)
    assert {member["user_id"] for member in newest["members"]} == {ann.id, others[0].id}


@pytest.mark.parametrize(
    "forged",
    [
        "nonsense",
        [],
        ["2026-01-01T00:00:00", str(uuid4())],
        ["0001-01-01T00:00:00+14:00", str(uuid4())],
        ["9999-12-31T23:59:59-14:00", str(uuid4())],
        ["2026-01-01T00:00:00Z", "x"],
        [0, str(uuid4())],
    ],
)
async def test_forged_cursors_are_refused(stack: Stack, forged: Any) -> None:
    ann = (await people(stack, 1))[0]
    cursor = forged if isinstance(forged, str) else encode_cursor(forged)
    assert_problem(await ann.get("/conversations", cursor=cursor), 422, "invalid_cursor")


async def test_groups_are_listed_without_their_members(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    await ann.group(bob)
    (item,) = (await bob.ok("/conversations"))["items"]
    assert (item["members"], item["member_count"]) == (None, 2)


async def test_messages_between_clients_are_not_shown_as_messages(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    direct = await ann.direct(bob)
    shown = await ann.send(direct)
    await ann.post("/messages", ann.draft(direct, message_type="system"))
    view = await bob.ok(f"/conversations/{direct}")
    assert (view["unread_count"], view["last_message"]["id"], view["head_seq"]) == (1, shown["id"], 2)


async def test_unread_counts_are_of_others_messages(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    direct = await ann.direct(bob)
    for number in range(3):
        await ann.send(direct, str(number))
    await bob.send(direct)
    assert (await bob.ok(f"/conversations/{direct}"))["unread_count"] == 3
    assert (await ann.ok(f"/conversations/{direct}"))["unread_count"] == 1
    await bob.post(f"/conversations/{direct}/read", {"seq": 2})
    assert (await bob.ok(f"/conversations/{direct}"))["unread_count"] == 1


async def test_metadata_is_the_owners_and_admins(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    group = await ann.group(bob, metadata={"name": "old"})
    assert_problem(await bob.patch(f"/conversations/{group}", {"metadata": {}}), 403, "not_allowed")
    await ann.patch(f"/conversations/{group}/members/{bob.id}", {"role": "admin"})
    changed = await bob.patch(f"/conversations/{group}", {"metadata": {"name": "new"}})
    assert changed.status_code == 200
    assert (await ann.ok(f"/conversations/{group}"))["metadata"] == {"name": "new"}
    event = (await ann.log(group))[-1]
    assert event["event"] == "conversation_updated"
    payload = event["payload"]
    assert (payload["seq"], payload["is_active"], payload["metadata"], payload["updated_by"]) == (
        2,
        True,
        {"name": "new"},
        bob.id,
    )
    unchanged = await bob.patch(f"/conversations/{group}", {"metadata": {"name": "new"}})
    assert unchanged.json()["head_seq"] == 2


async def test_both_people_change_a_direct_conversation(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    direct = await ann.direct(bob)
    assert (await bob.patch(f"/conversations/{direct}", {"metadata": {"theme": 2}})).status_code == 200


async def test_settings_are_ones_own(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    group = await ann.group(bob)
    answer = await bob.patch(f"/conversations/{group}", {"settings": {"pinned": True}})
    assert answer.json()["settings"] == {"pinned": True}
    assert (await ann.ok(f"/conversations/{group}"))["settings"] == {}
    assert await ann.log(group) == []


@pytest.mark.parametrize(
    ("document", "status", "code"),
    [
        ({"x": "y" * 9_000}, 413, "too_large"),
        ({"x": "a\u0000b"}, 422, "invalid_request"),
        ({"a\u0000": 1}, 422, "invalid_request"),
        ([], 422, "invalid_request"),
        ("text", 422, "invalid_request"),
    ],
)
async def test_documents_that_cannot_be_kept_are_refused(
    stack: Stack, document: Any, status: int, code: str
) -> None:
    ann, bob = await people(stack, 2)
    group = await ann.group(bob)
    for body in ({"metadata": document}, {"settings": document}):
        assert_problem(await ann.patch(f"/conversations/{group}", body), status, code)
    made = await ann.post("/conversations", {"type": "group", "member_ids": [], "metadata": document})
    assert_problem(made, status, code)


async def test_a_deep_document_is_refused(stack: Stack) -> None:
    ann = (await people(stack, 1))[0]
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"d": deep}
    answer = await ann.post("/conversations", {"type": "group", "member_ids": [], "metadata": deep})
    assert_problem(answer, 422, "invalid_metadata")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"type":"group","member_ids":[],"metadata":{"x":"\\ud800"}}',
        b'{"type":"group","member_ids":[],"metadata":{"x":NaN}}',
        b'{"type":"group","member_ids":[],"metadata":{"x":1e999}}',
        b'{"type":"group","member_ids":[],"metadata":{"x":"\xff"}}',
        b"{",
        b"",
    ],
)
async def test_bytes_that_are_no_json_are_refused(stack: Stack, raw: bytes) -> None:
    ann = (await people(stack, 1))[0]
    answer = await ann.call(
        "POST", "/conversations", content=raw, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["code"] in ("malformed_json", "invalid_request", "invalid_metadata")


async def test_odd_but_valid_documents_come_back_as_they_were(stack: Stack) -> None:
    ann = (await people(stack, 1))[0]
    document = {"": [], "ключ": "\u202e\u0007\U0010ffff", "n": -1.5e300, "big": 2**64 + 1, "__proto__": None}
    made = await ann.post("/conversations", {"type": "group", "member_ids": [], "metadata": document})
    assert made.status_code == 201, made.text
    assert made.json()["metadata"] == document


async def test_a_direct_conversation_is_taken_out_of_ones_own_list_only(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    direct = await ann.direct(bob)
    await bob.send(direct, "before")
    assert (await ann.delete(f"/conversations/{direct}")).status_code == 204
    assert (await ann.delete(f"/conversations/{direct}")).status_code == 204
    assert (await ann.ok("/conversations"))["items"] == []
    assert [item["id"] for item in (await bob.ok("/conversations"))["items"]] == [direct]
    assert (await ann.ok(f"/conversations/{direct}"))["is_active"] is True
    await bob.send(direct, "after")
    (item,) = (await ann.ok("/conversations"))["items"]
    assert item["unread_count"] == 2


async def test_making_a_hidden_conversation_again_shows_it(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    direct = await ann.direct(bob)
    await ann.delete(f"/conversations/{direct}")
    assert await ann.direct(bob) == direct
    assert [item["id"] for item in (await ann.ok("/conversations"))["items"]] == [direct]


async def test_a_member_leaves_a_group(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    group = await ann.group(bob)
    assert (await bob.delete(f"/conversations/{group}")).status_code == 204
    assert_problem(await bob.delete(f"/conversations/{group}"), 404, "conversation_not_found")
    event = (await ann.log(group))[-1]
    assert (event["event"], event["payload"]["user_id"], event["payload"]["reason"]) == (
        "member_removed",
        bob.id,
        "left",
    )
    assert (await ann.ok(f"/conversations/{group}"))["member_count"] == 1


async def test_the_owner_closes_a_group(stack: Stack) -> None:
    ann, bob, cid = await people(stack, 3)
    group = await ann.group(bob)
    message = await bob.send(group)
    assert (await ann.delete(f"/conversations/{group}")).status_code == 204
    assert (await ann.delete(f"/conversations/{group}")).status_code == 204
    event = (await bob.log(group))[-1]
    assert (event["event"], event["payload"]["is_active"]) == ("conversation_updated", False)
    assert (await ann.ok("/conversations"))["items"] == []
    assert (await bob.ok("/conversations"))["items"][0]["is_active"] is False
    for answer in (
        await bob.post("/messages", bob.draft(group)),
        await ann.post("/messages", ann.draft(group)),
        await ann.patch(f"/conversations/{group}", {"metadata": {"x": 1}}),
        await ann.post(f"/conversations/{group}/members", {"member_ids": [cid.id]}),
        await ann.patch(f"/conversations/{group}/members/{bob.id}", {"role": "admin"}),
        await ann.delete(f"/conversations/{group}/members/{bob.id}"),
    ):
        assert_problem(answer, 409, "conversation_closed")
    history = await bob.ok(f"/conversations/{group}/messages")
    assert [item["id"] for item in history["items"]] == [message["id"]]
    assert (await bob.post(f"/conversations/{group}/read", {"seq": 1})).status_code == 204
    assert (await bob.delete(f"/conversations/{group}")).status_code == 204
    assert (await bob.ok("/conversations"))["items"] == []


async def test_only_the_owner_closes(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    group = await ann.group(bob)
    await ann.patch(f"/conversations/{group}/members/{bob.id}", {"role": "admin"})
    assert (await bob.delete(f"/conversations/{group}")).status_code == 204
    view = await ann.ok(f"/conversations/{group}")
    assert (view["is_active"], view["member_count"]) == (True, 1)
