"""Changes of messages through the unmodified npm `phoenix` client: edits, deletions, reactions, pins, scheduled messages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from tests.journeys.test_phoenix_client import connect, payload
from tests.node.driver import PhoenixClient, Unavailable, phoenix_client
from tests.services.messaging.door import Door, signature_of
from tests.stack import Stack, b64


@pytest.fixture
async def phoenix() -> AsyncIterator[PhoenixClient]:
    try:
        async with phoenix_client() as client:
            yield client
    except Unavailable as reason:
        pytest.skip(str(reason))


class Talk:
    """Two people in a conversation, each on a socket; what one pushes is answered, and what happens is heard by both."""

    def __init__(self, phoenix: PhoenixClient, anna: Door, ben: Door, topic_id: str) -> None:
        self.phoenix = phoenix
        self.people = {"anna": anna, "ben": ben}
        self.topic_id = topic_id
        self.topic = f"conversation:{topic_id}"
        self.tag = 0

    @classmethod
    async def begin(cls, stack: Stack, phoenix: PhoenixClient) -> Talk:
        anna, ben = [Door(stack, await stack.register()) for _ in range(2)]
        talk = cls(phoenix, anna, ben, await anna.direct(ben))
        for name, door in talk.people.items():
            connect(phoenix, stack, name, door)
            phoenix.do("join", socket=name, topic=talk.topic)
            await phoenix.wait("joined", socket=name, topic=talk.topic)
        return talk

    async def push(self, who: str, event: str, **body: Any) -> dict[str, Any]:
        """The reply: `{status, response}`."""
        self.tag += 1
        self.phoenix.do("push", socket=who, topic=self.topic, event=event, payload=body, tag=self.tag)
        return await self.phoenix.wait("reply", tag=self.tag)

    async def ok(self, who: str, event: str, **body: Any) -> dict[str, Any]:
        reply = await self.push(who, event, **body)
        assert reply["status"] == "ok", reply
        response: dict[str, Any] = reply["response"]
        return response

    async def refused(self, who: str, event: str, **body: Any) -> str:
        reply = await self.push(who, event, **body)
        assert reply["status"] == "error", reply
        return str(reply["response"]["reason"])

    async def both_hear(self, event: str) -> dict[str, Any]:
        heard = [
            (await self.phoenix.wait("event", socket=name, topic=self.topic, event=event))["payload"]
            for name in self.people
        ]
        assert heard[0] == heard[1]
        told: dict[str, Any] = heard[0]
        return told

    async def say(self, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Anna's draft and the message that both hear."""
        draft = payload(self.people["anna"], self.topic_id, text)
        await self.ok("anna", "new_message", **draft)
        return draft, await self.both_hear("new_message")

    def signed(self, who: str, client_id: str, text: str) -> dict[str, Any]:
        content = {"ciphertext": b64(text.encode())}
        signature = signature_of(self.people[who].person, self.topic_id, client_id, content)
        return {"content": content, "signature": signature}


async def test_an_edit_and_a_deletion_are_heard_and_seen_afterwards(
    stack: Stack, phoenix: PhoenixClient
) -> None:
    talk = await Talk.begin(stack, phoenix)
    draft, message = await talk.say("helo")
    edit = talk.signed("anna", draft["client_id"], "hello")
    await talk.ok("anna", "edit_message", message_id=message["id"], **edit)
    told = await talk.both_hear("message_edited")
    assert (told["seq"], told["message"]["seq"], told["message"]["id"]) == (2, 1, message["id"])
    assert told["message"]["content"] == edit["content"]
    assert told["message"]["edited_at"] is not None
    # Once more changes nothing; another's message is another's; a wrong signature is one.
    await talk.ok("anna", "edit_message", message_id=message["id"], **edit)
    bens = talk.signed("ben", draft["client_id"], "mine")
    assert await talk.refused("ben", "edit_message", message_id=message["id"], **bens) == "not_allowed"
    spoiled = {**talk.signed("anna", draft["client_id"], "x"), "signature": b64(bytes(64))}
    assert await talk.refused("anna", "edit_message", message_id=message["id"], **spoiled) == "bad_signature"
    assert await talk.refused("ben", "delete_message", message_id=message["id"]) == "not_allowed"
    await talk.ok("anna", "delete_message", message_id=message["id"])
    told = await talk.both_hear("message_deleted")
    assert told == {"seq": 3, "message_id": message["id"], "deleted_by": talk.people["anna"].id}
    assert await talk.refused("anna", "edit_message", message_id=message["id"], **edit) == "message_deleted"
    synced = await talk.ok("ben", "sync", after_seq=0)
    assert [event["event"] for event in synced["events"]] == [
        "new_message",
        "message_edited",
        "message_deleted",
    ]
    assert synced["events"][0]["payload"]["is_deleted"]
    assert synced["events"][0]["payload"]["content"] == {}


async def test_reactions_and_pins_are_heard_by_both(stack: Stack, phoenix: PhoenixClient) -> None:
    talk = await Talk.begin(stack, phoenix)
    _, message = await talk.say("eight o'clock?")
    about = {"message_id": message["id"]}
    ben = talk.people["ben"].id
    await talk.ok("ben", "add_reaction", **about, reaction="👍🏽")
    assert await talk.both_hear("reaction_added") == {"seq": 2, **about, "user_id": ben, "reaction": "👍🏽"}
    await talk.ok("ben", "add_reaction", **about, reaction="👍🏽")
    await talk.ok("ben", "pin_message", **about)
    pinned = await talk.both_hear("message_pinned")
    assert pinned == {"seq": 3, **about, "user_id": ben, "pinned_at": pinned["pinned_at"]}
    fresh = await talk.people["anna"].ok(f"/conversations/{talk.topic_id}/messages", after_seq=0)
    assert fresh["items"][0]["reactions"] == [{"reaction": "👍🏽", "user_ids": [ben]}]
    pins = await talk.people["anna"].ok(f"/conversations/{talk.topic_id}/pins")
    assert [(pin["message_id"], pin["pinned_by"]) for pin in pins["items"]] == [(message["id"], ben)]
    await talk.ok("ben", "remove_reaction", **about, reaction="👍🏽")
    assert await talk.both_hear("reaction_removed") == {"seq": 4, **about, "user_id": ben, "reaction": "👍🏽"}
    await talk.ok("anna", "unpin_message", **about)
    assert (await talk.both_hear("message_unpinned"))["seq"] == 5
    assert await talk.refused("ben", "add_reaction", **about, reaction="") == "invalid_reaction"
    assert await talk.refused("ben", "pin_message", message_id=talk.topic_id) == "message_not_found"


async def test_a_scheduled_message_comes_when_it_is_time(stack: Stack, phoenix: PhoenixClient) -> None:
    talk = await Talk.begin(stack, phoenix)
    anna = talk.people["anna"]
    later = (stack.clock.now() + timedelta(minutes=5)).isoformat()
    drafts = [payload(anna, talk.topic_id, text) for text in ("happy birthday", "never mind")]
    kept, dropped = [
        (await talk.ok("anna", "new_message", **draft, send_at=later))["scheduled_id"] for draft in drafts
    ]
    listed = (await anna.ok("/scheduled-messages"))["items"]
    assert {item["id"] for item in listed} >= {kept, dropped}
    assert (await anna.delete(f"/scheduled-messages/{dropped}")).status_code == 204
    bens = await talk.people["ben"].delete(f"/scheduled-messages/{kept}")
    assert bens.status_code == 404
    stack.clock.advance(301)
    told = await talk.both_hear("new_message")
    assert (told["seq"], told["client_id"], told["content"]) == (
        1,
        drafts[0]["client_id"],
        drafts[0]["content"],
    )
    assert (await anna.ok(f"/scheduled-messages/{kept}"))["status"] == "sent"
    assert [event["event"] for event in await anna.log(talk.topic_id)] == ["new_message"]
