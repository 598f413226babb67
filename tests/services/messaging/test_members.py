"""Joining, leaving and roles of groups, every rule refused where it must be."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.services.messaging.door import Door, assert_problem
from tests.stack import Stack


async def people(stack: Stack, count: int) -> list[Door]:
    return [Door(stack, person) for person in await asyncio.gather(*(stack.register() for _ in range(count)))]


async def roles(door: Door, group: str) -> dict[str, str]:
    view = await door.ok(f"/conversations/{group}")
    return {member["user_id"]: member["role"] for member in view["members"]}


async def hierarchy(stack: Stack) -> tuple[str, Door, Door, Door, Door, Door]:
    """A group with an owner, two admins and two members."""
    owner, admin, admin2, member, member2 = await people(stack, 5)
    group = await owner.group(admin, admin2, member, member2)
    for person in (admin, admin2):
        answer = await owner.patch(f"/conversations/{group}/members/{person.id}", {"role": "admin"})
        assert answer.status_code == 200
    return group, owner, admin, admin2, member, member2


async def test_newcomers_see_what_happens_from_their_joining_on(stack: Stack) -> None:
    ann, bob, cid = await people(stack, 3)
    group = await ann.group(bob)
    await ann.send(group, "before")
    answer = await ann.post(f"/conversations/{group}/members", {"member_ids": [cid.id]})
    assert answer.status_code == 201
    (member,) = answer.json()["items"]
    assert (member["user_id"], member["role"]) == (cid.id, "member")
    after = await ann.send(group, "after")
    assert [event["seq"] for event in await ann.log(group)] == [1, 2, 3]
    log = await cid.log(group)
    assert [(event["seq"], event["event"]) for event in log] == [(2, "member_added"), (3, "new_message")]
    payload = log[0]["payload"]
    assert datetime.fromisoformat(payload.pop("joined_at")) == stack.clock.now()
    assert payload == {"seq": 2, "user_id": cid.id, "role": "member", "added_by": ann.id}
    view = await cid.ok(f"/conversations/{group}")
    assert (view["unread_count"], view["read_seq"], view["last_message"]["id"]) == (1, 1, after["id"])
    for query in ({}, {"before_seq": 3}, {"after_seq": 0}, {"before_seq": 1}):
        page = await cid.ok(f"/conversations/{group}/messages", **query)
        assert all(item["seq"] > 1 for item in page["items"])


async def test_the_past_is_hidden_from_newcomers_by_every_route(stack: Stack) -> None:
    ann, bob, cid = await people(stack, 3)
    group = await ann.group(bob)
    old = await ann.send(group, "before")
    await ann.post(f"/conversations/{group}/members", {"member_ids": [cid.id]})
    assert_problem(await cid.get(f"/messages/{old['id']}/status"), 404, "message_not_found")
    assert (await cid.ok(f"/conversations/{group}"))["last_message"] is None
    assert (await cid.ok("/conversations"))["items"][0]["last_message"] is None
    assert (await cid.ok(f"/conversations/{group}/messages"))["items"] == []


async def test_adding_members_again_changes_nothing(stack: Stack) -> None:
    ann, bob, cid = await people(stack, 3)
    group = await ann.group(bob)
    await ann.patch(f"/conversations/{group}/members/{bob.id}", {"role": "admin"})
    body = {"member_ids": [bob.id, cid.id, cid.id]}
    assert (await ann.post(f"/conversations/{group}/members", body)).status_code == 201
    again = await ann.post(f"/conversations/{group}/members", body)
    assert again.status_code == 200
    assert {item["user_id"]: item["role"] for item in again.json()["items"]} == {
        bob.id: "admin",
        cid.id: "member",
    }
    assert len(await ann.log(group)) == 2


async def test_someone_who_comes_back_does_not_see_what_was_missed(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    group = await ann.group(bob)
    await ann.send(group, "1")
    await ann.delete(f"/conversations/{group}/members/{bob.id}")
    missed = await ann.send(group, "missed")
    assert_problem(await bob.get(f"/conversations/{group}/messages"), 404, "conversation_not_found")
    await ann.post(f"/conversations/{group}/members", {"member_ids": [bob.id]})
    assert [event["event"] for event in await bob.log(group)] == ["member_added"]
    assert_problem(await bob.get(f"/messages/{missed['id']}/status"), 404, "message_not_found")


async def test_a_removed_member_is_out_at_once(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    group = await ann.group(bob)
    message = await bob.send(group)
    assert (await ann.delete(f"/conversations/{group}/members/{bob.id}")).status_code == 204
    for answer in (
        await bob.post("/messages", bob.draft(group)),
        await bob.get(f"/conversations/{group}"),
        await bob.get(f"/conversations/{group}/messages"),
        await bob.get(f"/conversations/{group}/events"),
        await bob.post(f"/conversations/{group}/read", {"seq": 1}),
        await bob.post(f"/conversations/{group}/members", {"member_ids": [bob.id]}),
    ):
        assert_problem(answer, 404, "conversation_not_found")
    assert_problem(await bob.get(f"/messages/{message['id']}/status"), 404, "message_not_found")
    event = (await ann.log(group))[-1]
    assert event["payload"] == {
        "seq": 2,
        "user_id": bob.id,
        "removed_by": ann.id,
        "reason": "removed",
        "rotate_sender_keys": True,
    }


@pytest.mark.parametrize(
    ("actor", "target", "role"),
    [
        ("member", "member2", "admin"),
        ("member", "member2", "member"),
        ("member", "member", "admin"),
        ("member", "owner", "member"),
        ("admin", "member", "admin"),
        ("admin", "member", "owner"),
        ("admin", "admin2", "member"),
        ("admin", "owner", "member"),
        ("admin", "admin", "owner"),
        ("owner", "owner", "member"),
        ("owner", "owner", "admin"),
    ],
)
async def test_roles_one_may_not_give(stack: Stack, actor: str, target: str, role: str) -> None:
    group, owner, admin, admin2, member, member2 = await hierarchy(stack)
    by_name = {"owner": owner, "admin": admin, "admin2": admin2, "member": member, "member2": member2}
    before = await roles(owner, group)
    answer = await by_name[actor].patch(
        f"/conversations/{group}/members/{by_name[target].id}", {"role": role}
    )
    assert_problem(answer, 403, "not_allowed")
    assert await roles(owner, group) == before


@pytest.mark.parametrize(
    ("actor", "target"),
    [
        ("member", "member2"),
        ("member", "admin"),
        ("member", "owner"),
        ("admin", "admin2"),
        ("admin", "owner"),
    ],
)
async def test_people_one_may_not_remove(stack: Stack, actor: str, target: str) -> None:
    group, owner, admin, admin2, member, member2 = await hierarchy(stack)
    by_name = {"owner": owner, "admin": admin, "admin2": admin2, "member": member, "member2": member2}
    answer = await by_name[actor].delete(f"/conversations/{group}/members/{by_name[target].id}")
    assert_problem(answer, 403, "not_allowed")
    assert len(await roles(owner, group)) == 5


async def test_who_may_add_and_with_which_role(stack: Stack) -> None:
    group, owner, admin, _, member, _ = await hierarchy(stack)
    new, newer, newest = await people(stack, 3)
    path = f"/conversations/{group}/members"
    assert_problem(await member.post(path, {"member_ids": [new.id]}), 403, "not_allowed")
    assert_problem(await admin.post(path, {"member_ids": [new.id], "role": "admin"}), 403, "not_allowed")
    assert_problem(await owner.post(path, {"member_ids": [new.id], "role": "owner"}), 403, "not_allowed")
    assert (await admin.post(path, {"member_ids": [new.id]})).status_code == 201
    assert (await owner.post(path, {"member_ids": [newer.id], "role": "admin"})).status_code == 201
    assert (await roles(owner, group))[newer.id] == "admin"
    assert_problem(await newest.post(path, {"member_ids": [newest.id]}), 404, "conversation_not_found")


async def test_what_roles_allow(stack: Stack) -> None:
    group, owner, admin, admin2, member, member2 = await hierarchy(stack)
    path = f"/conversations/{group}/members"
    assert (await admin.delete(f"{path}/{member.id}")).status_code == 204
    assert (await owner.delete(f"{path}/{admin2.id}")).status_code == 204
    assert (await admin.patch(f"{path}/{admin.id}", {"role": "member"})).status_code == 200
    assert (await owner.patch(f"{path}/{member2.id}", {"role": "admin"})).status_code == 200
    assert (await owner.patch(f"{path}/{member2.id}", {"role": "admin"})).status_code == 200
    assert await roles(owner, group) == {owner.id: "owner", admin.id: "member", member2.id: "admin"}


async def test_the_owner_hands_the_group_over(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    group = await ann.group(bob)
    answer = await ann.patch(f"/conversations/{group}/members/{bob.id}", {"role": "owner"})
    assert answer.json()["role"] == "owner"
    assert await roles(ann, group) == {ann.id: "admin", bob.id: "owner"}
    assert [(e["event"], e["payload"]["user_id"], e["payload"]["role"]) for e in await ann.log(group)] == [
        ("member_updated", bob.id, "owner"),
        ("member_updated", ann.id, "admin"),
    ]


async def test_an_owner_who_leaves_is_followed(stack: Stack) -> None:
    group, owner, admin, admin2, member, _ = await hierarchy(stack)
    path = f"/conversations/{group}/members"
    assert (await owner.delete(f"{path}/{owner.id}")).status_code == 204
    heir = next(user for user, role in (await roles(admin, group)).items() if role == "owner")
    assert heir in (admin.id, admin2.id)
    assert [event["event"] for event in (await member.log(group))[-2:]] == [
        "member_updated",
        "member_removed",
    ]
    assert_problem(await owner.get(f"/conversations/{group}"), 404, "conversation_not_found")


async def test_the_longest_member_follows_where_there_is_no_admin(stack: Stack) -> None:
    ann, bob, cid = await people(stack, 3)
    group = await ann.group()
    for person in (cid, bob):
        stack.clock.advance(1)
        await ann.post(f"/conversations/{group}/members", {"member_ids": [person.id]})
    await ann.delete(f"/conversations/{group}/members/{ann.id}")
    assert await roles(bob, group) == {cid.id: "owner", bob.id: "member"}


async def test_a_group_that_nobody_is_left_in_is_closed(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    group = await ann.group(bob)
    await bob.delete(f"/conversations/{group}/members/{bob.id}")
    assert (await ann.delete(f"/conversations/{group}/members/{ann.id}")).status_code == 204
    assert_problem(await ann.get(f"/conversations/{group}"), 404, "conversation_not_found")


async def test_a_direct_conversation_has_no_roles(stack: Stack) -> None:
    ann, bob, cid = await people(stack, 3)
    direct = await ann.direct(bob)
    path = f"/conversations/{direct}/members"
    for answer in (
        await ann.post(path, {"member_ids": [cid.id]}),
        await ann.patch(f"{path}/{bob.id}", {"role": "admin"}),
        await ann.delete(f"{path}/{bob.id}"),
        await ann.delete(f"{path}/{ann.id}"),
    ):
        assert_problem(answer, 409, "not_a_group")


async def test_people_who_are_not_there(stack: Stack) -> None:
    ann, bob, cid = await people(stack, 3)
    group = await ann.group(bob)
    path = f"/conversations/{group}/members/{cid.id}"
    assert_problem(await ann.patch(path, {"role": "admin"}), 404, "member_not_found")
    assert_problem(await ann.delete(path), 404, "member_not_found")


async def test_a_blocked_person_is_not_added(stack: Stack) -> None:
    ann, bob = await people(stack, 2)
    group = await ann.group()
    await stack.http.put(f"{stack.user.url}/api/v1/users/me/blocks/{ann.id}", headers=bob.person.headers)
    answer = await ann.post(f"/conversations/{group}/members", {"member_ids": [bob.id]})
    assert assert_problem(answer, 403, "blocked")["user_ids"] == [bob.id]
    assert await ann.log(group) == []


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"member_ids": []},
        {"member_ids": ["x"]},
        {"member_ids": "x"},
        {"member_ids": [None]},
        {"member_ids": None},
    ],
)
async def test_malformed_additions(stack: Stack, body: dict[str, Any]) -> None:
    ann = (await people(stack, 1))[0]
    group = await ann.group()
    assert_problem(await ann.post(f"/conversations/{group}/members", body), 422, "invalid_request")


async def test_concurrent_changes_keep_the_log_dense(stack: Stack) -> None:
    ann, *others = await people(stack, 6)
    group = await ann.group(*others[:2])
    path = f"/conversations/{group}/members"
    await asyncio.gather(
        *(ann.post(path, {"member_ids": [person.id]}) for person in others[2:]),
        *(ann.send(group, str(number)) for number in range(5)),
        *(person.delete(f"{path}/{person.id}") for person in others[:2]),
        ann.patch(f"/conversations/{group}", {"metadata": {"x": 1}}),
    )
    log = await ann.log(group)
    assert [event["seq"] for event in log] == list(range(1, 12))
    assert len(await roles(ann, group)) == 4


async def test_two_owners_never(stack: Stack) -> None:
    ann, bob, cid = await people(stack, 3)
    group = await ann.group(bob, cid)
    path = f"/conversations/{group}/members"
    answers = await asyncio.gather(
        ann.patch(f"{path}/{bob.id}", {"role": "owner"}), ann.patch(f"{path}/{cid.id}", {"role": "owner"})
    )
    assert sorted(answer.status_code for answer in answers) == [200, 403]
    assert sorted((await roles(ann, group)).values()) == ["admin", "member", "owner"]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["send", "add", "remove", "promote", "demote", "metadata", "hand_over"]),
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=12,
)


async def test_any_sequence_of_changes_is_dense_and_has_one_owner(stack: Stack) -> None:
    doors = await people(stack, 4)

    async def run(operations: list[tuple[str, int, int]]) -> None:
        group = await doors[0].group(doors[1])
        for name, actor, target in operations:
            await perform(doors[actor], group, name, doors[target])
        insiders = [door for door in doors if (await door.get(f"/conversations/{group}")).status_code == 200]
        for door in insiders:
            view = await door.ok(f"/conversations/{group}")
            log = await door.log(group)
            first = log[0]["seq"] if log else 1
            assert [event["seq"] for event in log] == list(range(first, view["head_seq"] + 1))
            assert all(event["payload"]["seq"] == event["seq"] for event in log)
            assert sorted(member["role"] for member in view["members"]).count("owner") == 1

    loop = asyncio.get_running_loop()

    # Hypothesis calls a plain function; it runs in a thread and hands each example to the loop of the stack.
    @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(operations=OPERATIONS)
    def example(operations: list[tuple[str, int, int]]) -> None:
        asyncio.run_coroutine_threadsafe(run(operations), loop).result(60)

    await asyncio.to_thread(example)


async def perform(actor: Door, group: str, name: str, target: Door) -> None:
    """Try one change; refusals are part of the game, errors of the server are not."""
    path = f"/conversations/{group}/members"
    if name == "send":
        answer = await actor.post("/messages", actor.draft(group))
    elif name == "add":
        answer = await actor.post(path, {"member_ids": [target.id]})
    elif name == "remove":
        answer = await actor.delete(f"{path}/{target.id}")
    elif name == "metadata":
        answer = await actor.patch(f"/conversations/{group}", {"metadata": {"by": actor.id}})
    else:
        role = {"promote": "admin", "demote": "member", "hand_over": "owner"}[name]
        answer = await actor.patch(f"{path}/{target.id}", {"role": role})
    assert answer.status_code < 500, answer.text
