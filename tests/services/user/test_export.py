"""People get all of their own, and nothing of others that they are not shown anyway."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.services.user.conftest import World
from tests.stack import Person, Stack

from whispr.kit.errors import RateLimited
from whispr.services.user.service import export as module
from whispr.services.user.service.export import EXPORTS_PER_DAY


async def exported(stack: Stack, person: Person) -> dict[str, Any]:
    answer = await stack.http.get(f"{stack.user.url}/api/v1/users/me/export", headers=person.headers)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def test_an_export_is_what_the_routes_show(stack: Stack) -> None:
    ada, ben, cay = await asyncio.gather(*(stack.register() for _ in range(3)))
    me = f"{stack.user.url}/api/v1/users/me"
    await stack.http.patch(
        me, json={"display_name": "Ada", "privacy": {"online": "nobody"}}, headers=ada.headers
    )
    await stack.http.put(f"{me}/contacts/{ben.user_id}", headers=ada.headers)
    await stack.http.put(f"{me}/blocks/{cay.user_id}", headers=ada.headers)
    await stack.http.put(f"{me}/blocks/{ada.user_id}", headers=ben.headers)
    body = await exported(stack, ada)

    async def shown(path: str) -> Any:
        return (await stack.http.get(f"{me}{path}", headers=ada.headers)).json()

    assert body["profile"] == await shown("")
    assert body["contacts"] == (await shown("/contacts"))["items"]
    assert body["blocks"] == (await shown("/blocks"))["items"]
    assert body["quotas"] == await shown("/quotas")
    assert [item["user_id"] for item in body["contacts"] + body["blocks"]] == [
        str(ben.user_id),
        str(cay.user_id),
    ]


async def test_who_blocked_or_added_the_person_is_not_in_it(stack: Stack) -> None:
    ada, ben = await asyncio.gather(stack.register(), stack.register())
    me = f"{stack.user.url}/api/v1/users/me"
    await stack.http.put(f"{me}/contacts/{ada.user_id}", headers=ben.headers)
    await stack.http.put(f"{me}/blocks/{ada.user_id}", headers=ben.headers)
    assert str(ben.user_id) not in str(await exported(stack, ada))


async def test_long_lists_are_whole(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAGE", 3)
    ada = await world.person()
    contacts = [await world.person() for _ in range(7)]
    blocks = [await world.person() for _ in range(6)]
    for user_id in contacts:
        await world.service.relations.add_contact(ada, user_id)
    for user_id in blocks:
        await world.service.relations.block(ada, user_id)
    data = await world.service.export.of(ada)
    assert {item.user.user_id for item in data.contacts} == set(contacts)
    assert len(data.contacts) == 7
    assert {item.user.user_id for item in data.blocks} == set(blocks)
    assert len(data.blocks) == 6


async def test_a_few_a_day_are_enough(world: World) -> None:
    ada, ben = await world.person(), await world.person()
    service = world.make(limited=True)
    for _ in range(EXPORTS_PER_DAY):
        await service.export.of(ada)
    with pytest.raises(RateLimited):
        await service.export.of(ada)
    await service.export.of(ben)
