"""What messaging remembers of who may write to whom: news makes it worthless, also while it is being asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any
from uuid import UUID, uuid4

import pytest
from tests.services.messaging.rooms import Users

from whispr.kit.clock import ManualClock
from whispr.services.messaging.models import Blocked
from whispr.services.messaging.service.contact import Contact


class SlowUsers(Users):
    """Answers when told to, as things stood when it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.may_answer = asyncio.Event()

    async def check_pairs(self, pairs: Collection[tuple[UUID, UUID]], purpose: str) -> list[Any]:
        answers = await super().check_pairs(pairs, purpose)
        await self.may_answer.wait()
        return answers


@pytest.fixture
def users() -> Users:
    return Users()


async def test_news_of_either_makes_a_relation_unknown_and_leaves_others(users: Users) -> None:
    contact = Contact(users, ManualClock())
    ann, bob, carl = (uuid4() for _ in range(3))
    for person in (ann, bob):
        await contact.load(ann, [bob, carl])
        assert contact.refusal(ann, bob) is None
        contact.changed(person)
        with pytest.raises(KeyError):
            contact.refusal(ann, bob)
    await contact.load(ann, [bob, carl])
    asked = users.asked
    contact.changed(bob)
    assert contact.refusal(ann, carl) is None
    users.reasons[ann, bob] = "blocked"
    await contact.load(ann, [bob, carl])
    assert users.asked == asked + 1
    assert contact.refusal(ann, bob) is Blocked
    assert await contact.blocked(ann, [bob, carl]) == {bob}


async def test_an_answer_from_before_the_news_is_asked_for_again() -> None:
    users = SlowUsers()
    contact = Contact(users, ManualClock())
    ann, bob = uuid4(), uuid4()
    loading = asyncio.create_task(contact.load(ann, [bob]))
    while not users.asked:
        await asyncio.sleep(0)
    users.reasons[ann, bob] = "blocked"
    contact.changed(bob)
    users.may_answer.set()
    await loading
    with pytest.raises(KeyError):
        contact.refusal(ann, bob)
    await contact.load(ann, [bob])
    assert contact.refusal(ann, bob) is Blocked


async def test_more_news_than_is_remembered_makes_everything_unknown(users: Users) -> None:
    contact = Contact(users, ManualClock())
    ann, bob = uuid4(), uuid4()
    await contact.load(ann, [bob])
    for _ in range(Contact.MAX_NEWS):
        contact.changed(uuid4())
    assert contact.refusal(ann, bob) is None
    contact.changed(uuid4())
    with pytest.raises(KeyError):
        contact.refusal(ann, bob)
