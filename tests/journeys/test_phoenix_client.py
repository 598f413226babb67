"""The unmodified npm `phoenix` client against the whole stack, over a restart of messaging."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.node.driver import PhoenixClient, Unavailable, phoenix_client
from tests.services.messaging.door import Door
from tests.stack import Stack

QUICK = {"reconnectAfterMs": 50, "rejoinAfterMs": 50}


@pytest.fixture
async def phoenix() -> AsyncIterator[PhoenixClient]:
    try:
        async with phoenix_client() as client:
            yield client
    except Unavailable as reason:
        pytest.skip(str(reason))


def connect(phoenix: PhoenixClient, stack: Stack, socket: str, door: Door, **options: Any) -> None:
    url = stack.socket_url.removesuffix("/websocket")
    credentials = (
        {"authToken": door.person.token}
        if options.pop("by_protocol", False)
        else {"params": {"token": door.person.token}}
    )
    phoenix.do("connect", socket=socket, url=url, options={**credentials, **QUICK, **options})


def payload(door: Door, topic_id: str, text: str) -> dict[str, Any]:
    draft = door.draft(topic_id, text)
    del draft["conversation_id"]
    return draft


async def test_two_people_talk(stack: Stack, phoenix: PhoenixClient) -> None:
    anna, ben = [Door(stack, await stack.register()) for _ in range(2)]
    topic_id = await anna.direct(ben)
    topic = f"conversation:{topic_id}"
    connect(phoenix, stack, "anna", anna)
    connect(phoenix, stack, "ben", ben, by_protocol=True)
    for name in ("anna", "ben"):
        phoenix.do("join", socket=name, topic=topic)
        joined = await phoenix.wait("joined", socket=name, topic=topic)
        assert joined["response"]["head_seq"] == 0
    draft = payload(anna, topic_id, "hello")
    phoenix.do("push", socket="anna", topic=topic, event="new_message", payload=draft, tag=1)
    ack = (await phoenix.wait("reply", tag=1))["response"]
    assert (ack["seq"], ack["duplicate"]) == (1, False)
    for name in ("anna", "ben"):
        got = (await phoenix.wait("event", socket=name, event="new_message"))["payload"]
        assert (got["id"], got["seq"], got["content"]) == (ack["id"], 1, draft["content"])
    phoenix.do("push", socket="ben", topic=topic, event="mark_as_read", payload={"seq": 1}, tag=2)
    assert (await phoenix.wait("reply", tag=2))["status"] == "ok"
    receipt = (await phoenix.wait("event", socket="anna", event="receipt"))["payload"]
    assert receipt == {"user_id": ben.id, "delivered_seq": 1, "read_seq": 1}
    phoenix.do("push", socket="ben", topic=topic, event="typing", payload={"state": "start"})
    assert (await phoenix.wait("event", socket="anna", event="typing"))["payload"]["user_id"] == ben.id
    phoenix.do("push", socket="ben", topic=topic, event="new_message", payload={}, tag=3)
    refused = await phoenix.wait("reply", tag=3)
    assert (refused["status"], refused["response"]["reason"]) == ("error", "invalid_payload")
    while (await phoenix.wait("presence", socket="anna", topic=topic))["present"] != {anna.id: 1, ben.id: 1}:
        pass
    phoenix.do("disconnect", socket="ben")
    while (await phoenix.wait("presence", socket="anna", topic=topic))["present"] != {anna.id: 1}:
        pass


async def test_long_polling(stack: Stack, phoenix: PhoenixClient) -> None:
    anna, ben = [Door(stack, await stack.register()) for _ in range(2)]
    topic_id = await anna.direct(ben)
    topic = f"conversation:{topic_id}"
    url = f"{stack.messaging.url}/socket"
    options = {"params": {"access_token": anna.person.token}}
    phoenix.do("connect", socket="anna", url=url, transport="longpoll", options=options)
    phoenix.do("join", socket="anna", topic=topic)
    await phoenix.wait("joined", socket="anna", topic=topic)
    phoenix.do(
        "push", socket="anna", topic=topic, event="new_message", payload=payload(anna, topic_id, "x"), tag=1
    )
    assert (await phoenix.wait("reply", tag=1))["response"]["seq"] == 1
    await ben.send(topic_id)
    got = [
        (await phoenix.wait("event", socket="anna", event="new_message"))["payload"]["seq"] for _ in range(2)
    ]
    assert got == [1, 2]


async def test_client_recovers_when_messaging_starts_again(stack: Stack, phoenix: PhoenixClient) -> None:
    """It reconnects and rejoins by itself; what it asks for with `sync` fills what it missed."""
    anna, ben = [Door(stack, await stack.register()) for _ in range(2)]
    topic_id = await anna.direct(ben)
    topic = f"conversation:{topic_id}"
    for name, door in (("anna", anna), ("ben", ben)):
        connect(phoenix, stack, name, door)
        phoenix.do("join", socket=name, topic=topic)
        await phoenix.wait("joined", socket=name, topic=topic)
    for n in (1, 2):
        phoenix.do(
            "push",
            socket="anna",
            topic=topic,
            event="new_message",
            payload=payload(anna, topic_id, str(n)),
            tag=n,
        )
        assert (await phoenix.wait("reply", tag=n))["response"]["seq"] == n
        await phoenix.wait("event", socket="ben", event="new_message")
    await stack.restart("messaging")
    assert (await phoenix.wait("close", socket="ben"))["code"] == 1012
    # Buffered by the client while it is away, and sent when it has joined again.
    phoenix.do(
        "push", socket="anna", topic=topic, event="new_message", payload=payload(anna, topic_id, "3"), tag=3
    )
    joined = await phoenix.wait("joined", socket="ben", topic=topic)
    assert (await phoenix.wait("reply", tag=3))["response"]["seq"] == 3
    phoenix.do("push", socket="ben", topic=topic, event="sync", payload={"after_seq": 1}, tag=4)
    synced = (await phoenix.wait("reply", tag=4))["response"]
    seqs = [event["seq"] for event in synced["events"]]
    assert seqs in ([2], [2, 3])
    assert joined["response"]["head_seq"] in (2, 3)
    phoenix.do(
        "push", socket="anna", topic=topic, event="new_message", payload=payload(anna, topic_id, "4"), tag=5
    )
    assert (await phoenix.wait("reply", tag=5))["response"]["seq"] == 4
    while (await phoenix.wait("event", socket="ben", event="new_message"))["payload"]["seq"] != 4:
        pass


async def test_revoked_client_is_disconnected_and_stays_out(stack: Stack, phoenix: PhoenixClient) -> None:
    anna = Door(stack, await stack.register())
    connect(phoenix, stack, "anna", anna)
    await phoenix.wait("open", socket="anna")
    phoenix.do("join", socket="anna", topic=f"user:{anna.id}")
    await phoenix.wait("joined", socket="anna")
    answer = await stack.http.post(f"{stack.auth.url}/api/v1/auth/logout", headers=anna.person.headers)
    assert answer.status_code == 204
    assert (await phoenix.wait("close", timeout=2, socket="anna"))["code"] == 1001
    assert "401" in (await phoenix.wait("error", socket="anna"))["reason"]
