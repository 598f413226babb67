"""Contacts, blocks, and who may reach or see whom."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import product
from uuid import UUID, uuid4

import pytest
from tests.services.user.conftest import World

from whispr.services.user.models import (
    BatchTooLarge,
    BlockLimitReached,
    ContactBlocked,
    ContactLimitReached,
    OwnAccount,
    Position,
    PresenceQuestion,
    PresenceVisibility,
    UserNotFound,
)


async def seen(world: World, viewer: UUID, subjects: Sequence[UUID]) -> list[PresenceVisibility]:
    [answer] = await world.service.relations.presence_visibility([PresenceQuestion(viewer, tuple(subjects))])
    return answer


async def contact_ids(world: World, owner: UUID) -> list[UUID]:
    return [item.user.user_id for item in (await world.service.relations.contacts(owner, None, 100)).items]


async def block_ids(world: World, owner: UUID) -> list[UUID]:
    return [item.user.user_id for item in (await world.service.relations.blocks(owner, None, 100)).items]


async def reason(world: World, sender: UUID, recipient: UUID, purpose: str = "message") -> str:
    (result,) = await world.service.relations.contactability(sender, [recipient], purpose)  # type: ignore[arg-type]
    assert result.allowed == (result.reason == "ok")
    assert result.exists == (result.reason != "unknown")
    return result.reason


async def test_contacts_are_added_once_and_removed_once(world: World) -> None:
    owner, other = await world.person(), world.account()
    assert await world.hints(lambda: world.service.relations.add_contact(owner, other)) == [
        ("relations", owner),
        ("relations", other),
    ]
    assert await world.hints(lambda: world.service.relations.add_contact(owner, other)) == []
    assert await contact_ids(world, owner) == [other]
    assert await contact_ids(world, other) == []
    assert len(await world.hints(lambda: world.service.relations.remove_contact(owner, other))) == 2
    assert await world.hints(lambda: world.service.relations.remove_contact(owner, other)) == []
    assert await contact_ids(world, owner) == []


@pytest.mark.parametrize("action", ["add_contact", "block"])
async def test_nobody_relates_to_themselves_or_to_nobody(world: World, action: str) -> None:
    owner = await world.person()
    act = getattr(world.service.relations, action)
    with pytest.raises(OwnAccount):
        await act(owner, owner)
    for stranger in (uuid4(), world.account(status="deleted")):
        with pytest.raises(UserNotFound):
            await act(owner, stranger)
    erased = await world.person()
    await world.service.erasure.erase(erased)
    with pytest.raises(UserNotFound):
        await act(owner, erased)
    with pytest.raises(UserNotFound):
        await act(erased, owner)


async def test_pages_hold_everyone_exactly_once(world: World) -> None:
    owner = await world.person()
    others = [await world.person() for _ in range(7)]
    for number, other in enumerate(others):
        # Pairs share a moment: the position must tell them apart by their ids.
        world.clock.advance(number % 2)
        await world.service.relations.add_contact(owner, other)
    seen: list[UUID] = []
    after: Position | None = None
    sizes = []
    while True:
        page = await world.service.relations.contacts(owner, after, 3)
        seen += [item.user.user_id for item in page.items]
        sizes.append(len(page.items))
        after = page.next
        if after is None:
            break
    assert sizes == [3, 3, 1]
    assert sorted(seen) == sorted(others)
    exactly = await world.service.relations.contacts(owner, None, 7)
    assert exactly.next is None


async def test_blocking_removes_the_own_contact_only_and_tells_nobody(world: World) -> None:
    owner, other = await world.person(), await world.person()
    await world.service.relations.add_contact(owner, other)
    await world.service.relations.add_contact(other, owner)
    assert await world.hints(lambda: world.service.relations.block(owner, other)) == [
        ("relations", owner),
        ("relations", other),
    ]
    assert await contact_ids(world, owner) == []
    assert await contact_ids(world, other) == [owner], "a missing entry would tell the blocked person"
    assert await block_ids(world, owner) == [other]
    assert await block_ids(world, other) == []
    assert await world.hints(lambda: world.service.relations.block(owner, other)) == []
    with pytest.raises(ContactBlocked):
        await world.service.relations.add_contact(owner, other)
    # The blocked person may remove and add as before.
    await world.service.relations.remove_contact(other, owner)
    await world.service.relations.add_contact(other, owner)
    assert len(await world.hints(lambda: world.service.relations.unblock(owner, other))) == 2
    assert await world.hints(lambda: world.service.relations.unblock(owner, other)) == []
    await world.service.relations.add_contact(owner, other)


async def test_lists_are_full_at_their_limit_even_for_requests_at_once(world: World) -> None:
    service = world.make(contacts_limit=3, blocks_limit=3)
    owner = await world.person()
    others = [await world.person() for _ in range(6)]
    answers = await asyncio.gather(
        *(service.relations.add_contact(owner, other) for other in others), return_exceptions=True
    )
    assert sum(isinstance(answer, ContactLimitReached) for answer in answers) == 3
    kept = await contact_ids(world, owner)
    assert len(kept) == 3
    await service.relations.add_contact(owner, kept[0])
    answers = await asyncio.gather(
        *(service.relations.block(owner, other) for other in others), return_exceptions=True
    )
    assert sum(isinstance(answer, BlockLimitReached) for answer in answers) == 3
    assert len(await block_ids(world, owner)) == 3


async def test_two_people_acting_on_each_other_do_not_deadlock(world: World) -> None:
    left, right = await world.person(), await world.person()
    for _ in range(5):
        await asyncio.gather(
            world.service.relations.add_contact(left, right),
            world.service.relations.add_contact(right, left),
        )
        await asyncio.gather(
            world.service.relations.block(left, right),
            world.service.relations.block(right, left),
        )
        await asyncio.gather(
            world.service.relations.unblock(left, right),
            world.service.relations.unblock(right, left),
        )


async def test_contactability_in_every_case(world: World) -> None:
    sender = await world.person()
    for purpose, messages, groups, knows in product(
        ("message", "group"), ("everyone", "contacts"), ("everyone", "contacts"), (False, True)
    ):
        recipient = await world.person()
        await world.service.profiles.update(recipient, {"privacy": {"messages": messages, "groups": groups}})
        if knows:
            await world.service.relations.add_contact(recipient, sender)
        setting = messages if purpose == "message" else groups
        expected = "ok" if setting == "everyone" or knows else "contacts_only"
        assert await reason(world, sender, recipient, purpose) == expected, (purpose, messages, groups, knows)


@pytest.mark.parametrize("purpose", ["message", "group"])
async def test_a_block_in_either_direction_keeps_apart(world: World, purpose: str) -> None:
    one, other = await world.person(), await world.person()
    await world.service.relations.block(one, other)
    assert await reason(world, other, one, purpose) == "blocked"
    assert await reason(world, one, other, purpose) == "blocked"
    await world.service.relations.unblock(one, other)
    assert await reason(world, other, one, purpose) == "ok"


async def test_contactability_of_oneself_of_nobody_and_of_the_erased(world: World) -> None:
    sender = await world.person()
    await world.service.profiles.update(sender, {"privacy": {"messages": "contacts"}})
    erased = await world.person()
    await world.service.erasure.erase(erased)
    new = world.account()
    asked = [sender, erased, new, uuid4(), new]
    results = await world.service.relations.contactability(sender, asked, "message")
    assert [(item.user_id, item.reason) for item in results] == [
        (sender, "ok"),
        (erased, "unknown"),
        (new, "ok"),
        (asked[3], "unknown"),
    ]
    with pytest.raises(BatchTooLarge):
        await world.service.relations.contactability(sender, [uuid4() for _ in range(1001)], "group")


@pytest.mark.parametrize("audience", ["everyone", "contacts", "nobody"])
@pytest.mark.parametrize("knows", [False, True])
async def test_presence_in_every_case(world: World, audience: str, knows: bool) -> None:
    viewer, subject = await world.person(), await world.person()
    if knows:
        await world.service.relations.add_contact(subject, viewer)
    admitted = audience == "everyone" or (audience == "contacts" and knows)
    await world.service.profiles.update(subject, {"privacy": {"online": audience, "last_seen": "nobody"}})
    assert await seen(world, viewer, [subject]) == [
        PresenceVisibility(subject, online=admitted, last_seen=False)
    ]
    await world.service.profiles.update(subject, {"privacy": {"online": "nobody", "last_seen": audience}})
    assert await seen(world, viewer, [subject]) == [
        PresenceVisibility(subject, online=False, last_seen=admitted)
    ]


async def test_a_block_hides_presence_both_ways(world: World) -> None:
    one, other = await world.person(), await world.person()
    for person in (one, other):
        await world.service.profiles.update(
            person, {"privacy": {"online": "everyone", "last_seen": "everyone"}}
        )
    await world.service.relations.block(one, other)
    for viewer, subject in ((one, other), (other, one)):
        assert await seen(world, viewer, [subject]) == [
            PresenceVisibility(subject, online=False, last_seen=False)
        ]


async def test_presence_of_ones_contacts_and_of_oneself(world: World) -> None:
    viewer, contact, added_by = [await world.person() for _ in range(3)]
    await world.service.relations.add_contact(viewer, contact)
    await world.service.relations.add_contact(added_by, viewer)
    visible = await seen(world, viewer, [])
    assert [item.user_id for item in visible] == [contact]
    assert await seen(world, viewer, [viewer]) == [PresenceVisibility(viewer, True, True)]


async def test_questions_of_several_viewers_are_answered_in_their_order(world: World) -> None:
    one, other, shy = [await world.person() for _ in range(3)]
    await world.service.relations.add_contact(one, shy)
    await world.service.relations.add_contact(shy, one)
    await world.service.profiles.update(shy, {"privacy": {"online": "contacts", "last_seen": "contacts"}})
    answers = await world.service.relations.presence_visibility(
        [
            PresenceQuestion(other, (shy, uuid4(), one)),
            PresenceQuestion(one, ()),
            PresenceQuestion(other, ()),
            PresenceQuestion(one, (shy,)),
        ]
    )
    assert [[item.user_id for item in answer] for answer in answers] == [[shy, one], [shy], [], [shy]]
    assert answers[0][0] == PresenceVisibility(shy, False, False)
    assert answers[1] == answers[3] == [PresenceVisibility(shy, True, True)]


async def test_too_many_questions_at_once_are_refused(world: World) -> None:
    viewer = await world.person()
    with pytest.raises(BatchTooLarge):
        await world.service.relations.presence_visibility([PresenceQuestion(viewer, ())] * 1001)
    with pytest.raises(BatchTooLarge):
        await seen(world, viewer, [uuid4() for _ in range(1001)])


async def test_whoever_looks_at_presence_is_noted_as_active(world: World) -> None:
    viewers = [await world.person() for _ in range(2)]
    world.clock.advance(2 * 3600)
    await world.service.relations.presence_visibility([PresenceQuestion(viewer, ()) for viewer in viewers])
    async with world.database.connection() as conn:
        rows = await conn.fetch(
            "SELECT last_active_at FROM profiles WHERE user_id = ANY($1::uuid[])", viewers
        )
    assert [row["last_active_at"] for row in rows] == [world.clock.now()] * 2


async def test_erasure_removes_a_person_from_every_list(world: World) -> None:
    leaving, friend, enemy = [await world.person() for _ in range(3)]
    await world.service.relations.add_contact(friend, leaving)
    await world.service.relations.add_contact(leaving, friend)
    await world.service.relations.block(enemy, leaving)
    await world.service.relations.block(leaving, enemy)
    hints = await world.hints(lambda: world.service.erasure.erase(leaving))
    assert set(hints) == {("profile", leaving), ("relations", leaving)}
    await world.service.erasure.erase(leaving)
    assert await contact_ids(world, friend) == []
    assert await block_ids(world, enemy) == []
    async with world.database.connection() as conn:
        row = await conn.fetchrow("SELECT * FROM profiles WHERE user_id = $1", leaving)
        assert row is not None
        assert row["username"] is None
        assert row["privacy"] == {}
        for table in ("contacts", "blocks"):
            left = await conn.fetchval(
                f"SELECT count(*) FROM {table} WHERE owner_id = $1 OR user_id = $1", leaving
            )
            assert left == 0


async def test_adding_somebody_who_is_being_erased_leaves_nothing_behind(world: World) -> None:
    for _ in range(10):
        owner, leaving = await world.person(), await world.person()
        await asyncio.gather(
            world.service.relations.add_contact(owner, leaving),
            world.service.erasure.erase(leaving),
            world.service.relations.block(owner, leaving),
            return_exceptions=True,
        )
        assert await contact_ids(world, owner) == []
        assert await block_ids(world, owner) == []
