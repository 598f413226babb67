"""What a group lets its members do, and who decides that."""

from __future__ import annotations

from typing import Any

import pytest
from tests.services.messaging.door import Door, assert_problem
from tests.services.messaging.test_members import people, roles
from tests.stack import Stack

DEFAULTS = {"send": "member", "add_members": "admin", "pin": "admin", "edit_metadata": "admin"}


async def ranks(stack: Stack, *more: Door) -> tuple[str, Door, Door, Door]:
    """A group with an owner, an admin and a member."""
    owner, admin, member = await people(stack, 3)
    group = await owner.group(admin, member, *more)
    answer = await owner.patch(f"/conversations/{group}/members/{admin.id}", {"role": "admin"})
    assert answer.status_code == 200
    return group, owner, admin, member


async def allow(door: Door, group: str, **permissions: str) -> dict[str, Any]:
    answer = await door.patch(f"/conversations/{group}", {"permissions": permissions})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def test_permissions_are_shown_complete(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    group = await ann.group(bob)
    for view in (await bob.ok(f"/conversations/{group}"), (await bob.ok("/conversations"))["items"][0]):
        assert (view["permissions"], view["retention_seconds"]) == (DEFAULTS, None)
    direct = await ann.direct(bob)
    assert (await bob.ok(f"/conversations/{direct}"))["permissions"] == {
        "send": "member",
        "add_members": "owner",
        "pin": "member",
        "edit_metadata": "member",
    }


async def test_the_owner_changes_some_and_the_rest_stays(stack: Stack) -> None:
    group, owner, _, member = await ranks(stack)
    view = await allow(owner, group, pin="member")
    assert view["permissions"] == {**DEFAULTS, "pin": "member"}
    view = await allow(owner, group, send="admin")
    assert view["permissions"] == {**DEFAULTS, "pin": "member", "send": "admin"}
    event = (await member.log(group))[-1]
    assert event["event"] == "conversation_updated"
    assert event["payload"] == {
        "seq": event["seq"],
        "is_active": True,
        "metadata": {},
        "permissions": view["permissions"],
        "retention_seconds": None,
        "updated_by": owner.id,
    }


async def test_the_same_permissions_again_are_no_event(stack: Stack) -> None:
    group, owner, admin, _ = await ranks(stack)
    await allow(owner, group, send="admin")
    before = await owner.log(group)
    await allow(owner, group, send="admin")
    await allow(owner, group)
    await allow(admin, group, send="admin")
    assert await owner.log(group) == before


async def test_metadata_and_permissions_change_in_one_event(stack: Stack) -> None:
    group, owner, _, _ = await ranks(stack)
    before = len(await owner.log(group))
    body = {"metadata": {"name": "x"}, "permissions": {"send": "owner"}}
    assert (await owner.patch(f"/conversations/{group}", body)).status_code == 200
    (event,) = (await owner.log(group))[before:]
    assert event["payload"]["metadata"] == {"name": "x"}
    assert event["payload"]["permissions"]["send"] == "owner"


async def test_nobody_else_lifts_a_limit(stack: Stack) -> None:
    group, owner, admin, member = await ranks(stack)
    (eve,) = await people(stack, 1)
    await allow(owner, group, edit_metadata="member")
    for door in (admin, member):
        answer = await door.patch(f"/conversations/{group}", {"permissions": {"add_members": "member"}})
        assert_problem(answer, 403, "not_allowed")
    answer = await eve.patch(f"/conversations/{group}", {"permissions": {"send": "member"}})
    assert_problem(answer, 404, "conversation_not_found")
    assert (await owner.ok(f"/conversations/{group}"))["permissions"]["add_members"] == "admin"
    # What came with it is not done either.
    body = {"metadata": {"x": 1}, "settings": {"y": 1}, "permissions": {"pin": "member"}}
    assert_problem(await admin.patch(f"/conversations/{group}", body), 403, "not_allowed")
    view = await admin.ok(f"/conversations/{group}")
    assert (view["metadata"], view["settings"]) == ({}, {})


async def test_who_may_send(stack: Stack) -> None:
    group, owner, admin, member = await ranks(stack)
    await allow(owner, group, send="admin")
    assert_problem(await member.post("/messages", member.draft(group)), 403, "not_allowed")
    await admin.send(group)
    await allow(owner, group, send="owner")
    assert_problem(await admin.post("/messages", admin.draft(group)), 403, "not_allowed")
    await owner.send(group)
    await allow(owner, group, send="member")
    await member.send(group)


async def test_who_may_add_people(stack: Stack) -> None:
    group, owner, admin, member = await ranks(stack)
    new, newer, newest = await people(stack, 3)
    path = f"/conversations/{group}/members"
    refusal = await member.post(path, {"member_ids": [new.id]})
    body = assert_problem(refusal, 403, "not_allowed")
    assert (body["action"], body["role"]) == ("add_members", "admin")
    await allow(owner, group, add_members="member")
    assert (await member.post(path, {"member_ids": [new.id]})).status_code == 201
    for role in ("admin", "owner"):
        answer = await member.post(path, {"member_ids": [newer.id], "role": role})
        assert_problem(answer, 403, "not_allowed")
    await allow(owner, group, add_members="owner")
    assert_problem(await admin.post(path, {"member_ids": [newer.id]}), 403, "not_allowed")
    assert (await owner.post(path, {"member_ids": [newest.id], "role": "admin"})).status_code == 201
    assert (await roles(owner, group))[newest.id] == "admin"


async def test_who_may_edit_metadata(stack: Stack) -> None:
    group, owner, admin, member = await ranks(stack)
    path, body = f"/conversations/{group}", {"metadata": {"name": "x"}}
    assert_problem(await member.patch(path, body), 403, "not_allowed")
    await allow(owner, group, edit_metadata="member")
    assert (await member.patch(path, body)).status_code == 200
    await allow(owner, group, edit_metadata="owner")
    assert_problem(await admin.patch(path, {"metadata": {"name": "y"}}), 403, "not_allowed")
    # Their own settings stay everybody's own business.
    assert (await member.patch(path, {"settings": {"colour": "red"}})).status_code == 200


async def test_permissions_follow_the_owner(stack: Stack) -> None:
    group, owner, admin, _ = await ranks(stack)
    await owner.patch(f"/conversations/{group}/members/{admin.id}", {"role": "owner"})
    assert_problem(
        await owner.patch(f"/conversations/{group}", {"permissions": {"send": "owner"}}), 403, "not_allowed"
    )
    await allow(admin, group, send="owner")
    # The heir of an owner who leaves is the owner in all things.
    await admin.delete(f"/conversations/{group}/members/{admin.id}")
    await allow(owner, group, send="member")


async def test_a_direct_conversation_has_no_permissions_to_change(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    direct = await ann.direct(bob)
    answer = await ann.patch(f"/conversations/{direct}", {"permissions": {"send": "owner"}})
    assert_problem(answer, 409, "not_a_group")
    assert (await ann.patch(f"/conversations/{direct}", {"metadata": {"x": 1}})).status_code == 200


async def test_a_closed_group_changes_no_more(stack: Stack) -> None:
    group, owner, _, _ = await ranks(stack)
    await owner.delete(f"/conversations/{group}")
    answer = await owner.patch(f"/conversations/{group}", {"permissions": {"send": "owner"}})
    assert_problem(answer, 409, "conversation_closed")


@pytest.mark.parametrize(
    "permissions", [{"send": "king"}, {"send": 1}, {"send": ["member"]}, [], "member", {"pin": ""}]
)
async def test_malformed_permissions(stack: Stack, permissions: Any) -> None:
    (ann,) = await people(stack, 1)
    group = await ann.group()
    answer = await ann.patch(f"/conversations/{group}", {"permissions": permissions})
    assert_problem(answer, 422, "invalid_request")
