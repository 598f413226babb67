"""Features that can be switched off while auth runs: their doors answer so, and what was begun goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from tests.services.auth.house import AuthHouse, code
from tests.services.auth.test_links import Newcomer
from tests.stack import PASSWORD, DeviceKeys, Node

OFF = (503, "feature_off")


class Switchboard:
    """A second auth that goes by a file."""

    def __init__(self, house: AuthHouse, node: Node, path: Path) -> None:
        self.house = house
        self.node = node
        self.path = path

    def switch(self, **flags: bool) -> None:
        self.path.write_text(json.dumps({"auth": flags}))
        self.node.running.context.live.reload()

    async def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        return await self.house.http.post(f"{self.node.url}/api/v1{path}", json=body, **options)


@pytest.fixture
async def board(house: AuthHouse, tmp_path: Path) -> Switchboard:
    path = tmp_path / "live.json"
    return Switchboard(house, await house.another_node("auth", live_settings=path), path)


async def test_registration_is_switched_off_and_login_is_not(house: AuthHouse, board: Switchboard) -> None:
    person = await house.register()
    new = {"username": f"u{uuid4().hex[:20]}", "password": PASSWORD, "device": DeviceKeys().registration()}
    board.switch(registration=False)
    refused = await board.post("/auth/register", new)
    assert code(refused) == OFF
    assert refused.json()["feature"] == "registration"
    known = {"username": person.username, "password": PASSWORD, "device_id": str(person.device_id)}
    assert (await board.post("/auth/login", known)).status_code == 200
    board.switch(registration=True)
    assert (await board.post("/auth/register", new)).status_code == 201


async def test_linking_is_switched_off_but_what_is_claimed_is_finished(
    house: AuthHouse, board: Switchboard
) -> None:
    person = await house.register()

    async def begin() -> httpx.Response:
        return await board.post("/devices/link", {"password": PASSWORD}, headers=person.headers)

    begun = (await begin()).json()
    newcomer = Newcomer(house, begun["token"])
    check_code = (await newcomer.claim()).json()["check_code"]
    board.switch(linking=False)
    assert code(await begin()) == OFF
    claim = {"token": "A" * 43, "device": newcomer.device}
    assert code(await board.post("/devices/link/claim", claim)) == OFF
    confirm = f"/devices/link/{begun['link_id']}/confirm"
    answer = await board.post(confirm, {"check_code": check_code}, headers=person.headers)
    assert answer.status_code == 204
    assert (await newcomer.finish()).status_code == 201
