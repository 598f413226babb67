"""The socket door: what it takes, what it refuses, what it tells whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import pytest
from tests.services.messaging.door import Door, signature_of
from tests.services.messaging.line import Line
from tests.stack import Node, Person, Stack, b64

Open = Callable[..., Awaitable[Line]]


@pytest.fixture
async def connect(stack: Stack) -> AsyncIterator[Open]:
    lines: list[Line] = []

    async def open_line(person: Person, node: Node | None = None, **params: Any) -> Line:
        line = await Line.open(node or stack.messaging, person, **params)
        lines.append(line)
        return line

    yield open_line
    for line in lines:
        await line.close()


async def new_door(stack: Stack) -> Door:
    return Door(stack, await stack.register())


def conversation(topic_id: str) -> str:
    return f"conversation:{topic_id}"


def message(door: Door, conversation_id: str, text: str = "hello", **changes: Any) -> dict[str, Any]:
    draft = door.draft(conversation_id, text, **changes)
    del draft["conversation_id"]
    return draft


async def test_message_from_socket_to_socket(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    topic = conversation(topic_id)
    at_anna, at_ben = await connect(anna.person), await connect(ben.person)
    joined = await at_anna.join(topic)
    assert (joined["head_seq"], joined["events"], joined["more"], joined["recovered"]) == (
        0,
        [],
        False,
        False,
    )
    assert {member["user_id"] for member in joined["members"]} == {anna.id, ben.id}
    await at_ben.join(topic)
    draft = message(anna, topic_id)
    ack = await at_anna.push(topic, "new_message", draft)
    assert (ack["seq"], ack["duplicate"]) == (1, False)
    at_bens = await at_ben.next(topic, "new_message")
    assert at_bens == await at_anna.next(topic, "new_message")
    assert at_bens["id"] == ack["id"]
    assert at_bens["sent_at"] == ack["sent_at"]
    assert (at_bens["content"], at_bens["client_id"]) == (draft["content"], draft["client_id"])
    by_rest = await ben.ok(f"/conversations/{topic_id}/messages")
    assert by_rest["items"] == [at_bens]
    assert await at_anna.push(topic, "new_message", draft) == {**ack, "duplicate": True}
    other = {**draft, "content": {"ciphertext": "YQ=="}}
    other["signature"] = signature_of(anna.person, topic_id, draft["client_id"], other["content"])
    assert (await at_anna.refused(topic, "new_message", other))["reason"] == "client_id_conflict"


async def test_message_by_rest_reaches_sockets_and_back(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.group(ben)
    at_ben = await connect(ben.person)
    await at_ben.join(conversation(topic_id))
    sent = await anna.post("/messages", anna.draft(topic_id))
    assert sent.status_code == 201
    assert await at_ben.next(conversation(topic_id), "new_message") == sent.json()


async def test_each_device_gets_its_own_envelope_only(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    ben_too = await stack.add_device(ben.person)
    topic_id = await anna.direct(ben)
    topic = conversation(topic_id)
    at_anna, at_ben, at_ben_too = [await connect(person) for person in (anna.person, ben.person, ben_too)]
    for line in (at_anna, at_ben, at_ben_too):
        await line.join(topic)
    devices = {str(ben.person.device_id): "YQ==", str(ben_too.device_id): "Yg=="}
    content = {"envelopes": {device: {"type": "message", "body": body} for device, body in devices.items()}}
    await at_anna.push(topic, "new_message", message(anna, topic_id, content=content))
    assert (await at_anna.next(topic, "new_message"))["content"] == {"envelopes": {}}
    for line, person in ((at_ben, ben.person), (at_ben_too, ben_too)):
        own = {str(person.device_id): content["envelopes"][str(person.device_id)]}
        assert (await line.next(topic, "new_message"))["content"] == {"envelopes": own}
    content["envelopes"].pop(str(ben_too.device_id))
    refusal = await at_anna.refused(topic, "new_message", message(anna, topic_id, content=content))
    assert refusal == {
        "reason": "devices_mismatch",
        "missing": [str(ben_too.device_id)],
        "owners": {str(ben_too.device_id): str(ben_too.user_id)},
        "extra": [],
        "stale": [],
    }


async def test_strangers_and_nonsense_topics_are_refused(stack: Stack, connect: Open) -> None:
    anna, ben, eve = [await new_door(stack) for _ in range(3)]
    topic_id = await anna.direct(ben)
    at_eve = await connect(eve.person)
    for foreign in (topic_id, str(uuid4()), "nonsense", topic_id.upper(), topic_id.replace("-", ""), ""):
        assert await at_eve.join_refused(conversation(foreign)) == {"reason": "forbidden"}, foreign
    at_anna = await connect(anna.person)
    # Two spellings of a conversation would be two topics.
    assert await at_anna.join_refused(conversation(topic_id.upper())) == {"reason": "forbidden"}
    assert await at_eve.join_refused(f"user:{anna.id}") == {"reason": "forbidden"}
    assert await at_eve.join_refused("user:") == {"reason": "forbidden"}
    assert await at_eve.join_refused("weather:paris") == {"reason": "unmatched topic"}
    assert await at_eve.refused(conversation(topic_id), "new_message", {}) == {"reason": "unmatched topic"}
    sent = await anna.post("/messages", anna.draft(topic_id))
    assert sent.status_code == 201
    await at_eve.settled()
    assert not any(at_eve.inbox.values())


@pytest.mark.parametrize(
    ("event", "payload", "reason"),
    [
        ("new_message", [], "invalid_payload"),
        ("new_message", None, "invalid_payload"),
        ("new_message", {}, "invalid_payload"),
        ("new_message", {"client_id": 1}, "invalid_payload"),
        ("new_message", {"client_id": "x"}, "invalid_payload"),
        ("new_message", {"signature": 5}, "invalid_payload"),
        ("new_message", {"signature": "%%%"}, "invalid_payload"),
        ("new_message", {"signature": "YQ=="}, "bad_signature"),
        ("new_message", {"message_type": 7}, "invalid_payload"),
        ("new_message", {"message_type": "poll"}, "invalid_message_type"),
        ("new_message", {"content": "hello"}, "invalid_content"),
        ("new_message", {"content": {"text": "hello"}}, "invalid_content"),
        ("new_message", {"content": {"ciphertext": "not base64"}}, "invalid_content"),
        ("new_message", {"content": {"ciphertext": "YQ=="}}, "bad_signature"),
        ("new_message", {"content": {"ciphertext": "A" * (96 * 1024)}}, "too_large"),
        ("new_message", {"reply_to_id": "x"}, "invalid_payload"),
        ("new_message", {"media_ids": ["x"]}, "invalid_payload"),
        ("new_message", {"media_ids": ["00000000-0000-0000-0000-000000000000"] * 101}, "invalid_payload"),
        ("new_message", {"expires_in": 0}, "invalid_payload"),
        ("new_message", {"expires_in": 2**31}, "invalid_payload"),
        ("new_message", {"send_at": "2030-01-01T00:00:00Z"}, "invalid_send_at"),
        ("mark_as_read", {"seq": -1}, "invalid_payload"),
        ("mark_as_read", {"seq": 2**63}, "invalid_payload"),
        ("mark_as_delivered", {"seq": "1"}, "invalid_payload"),
        ("mark_as_delivered", {}, "invalid_payload"),
        ("typing", {"state": "maybe"}, "invalid_payload"),
        ("sync", {"after_seq": None}, "invalid_payload"),
        ("sync", {}, "invalid_payload"),
        ("dance", {}, "unknown_event"),
    ],
)
async def test_bad_pushes_are_answered_and_the_channel_lives(
    pair: tuple[Door, str, Line], event: str, payload: Any, reason: str
) -> None:
    anna, topic_id, line = pair
    topic = conversation(topic_id)
    if event == "new_message" and payload:
        payload = {**message(anna, topic_id), **payload}
    assert (await line.refused(topic, event, payload))["reason"] == reason
    assert await line.push(topic, "sync", {"after_seq": 0}) == {"events": [], "more": False, "head_seq": 0}


@pytest.fixture(scope="module")
async def pair(stack: Stack) -> AsyncIterator[tuple[Door, str, Line]]:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    line = await Line.open(stack.messaging, anna.person)
    await line.join(conversation(topic_id))
    yield anna, topic_id, line
    await line.close()


async def test_oversized_frame_closes_with_1009(stack: Stack, connect: Open) -> None:
    line = await connect((await new_door(stack)).person)
    await line.raw('[null,"1","phoenix","x",{"a":"' + "x" * 300_000 + '"}]')
    assert await line.closed() == 1009


@pytest.mark.parametrize(
    "params",
    [
        {"cursor": 5},
        {"cursor": {"epoch": "x", "seq": 1}},
        {"cursor": {"seq": 1}},
        {"cursor": {"epoch": str(uuid4()), "seq": "1"}},
    ],
)
async def test_bad_cursors_are_refused(
    pair: tuple[Door, str, Line], stack: Stack, connect: Open, params: Any
) -> None:
    anna, topic_id, _ = pair
    line = await connect(anna.person)
    assert (await line.join_refused(conversation(topic_id), params))["reason"] == "invalid_payload"
    await line.join(conversation(topic_id), {"unknown": 1})


async def test_tokens(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    head, body, signature = anna.person.token.split(".")
    forged = f"{head}.{body}.{'A' * len(signature)}"
    foreign = f"{head}.{ben.person.token.split('.')[1]}.{signature}"
    for token in (forged, foreign, "x", "a.b.c"):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await connect(anna.person, token=token)
        assert refused.value.status == 401
    stack.clock.advance(700)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await connect(anna.person)
    assert refused.value.status == 401


async def test_revoked_session_closes_its_sockets_within_a_second(stack: Stack, connect: Open) -> None:
    anna = await new_door(stack)
    phone, tablet = await connect(anna.person), await connect(await stack.add_device(anna.person))
    await phone.join(f"user:{anna.id}")
    answer = await stack.http.post(f"{stack.auth.url}/api/v1/auth/logout", headers=anna.person.headers)
    assert answer.status_code == 204
    assert await phone.closed(1.0) == 1001
    await tablet.settled()
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await connect(anna.person)
    assert refused.value.status == 401


async def test_removed_member_is_told_then_closed_and_then_refused(stack: Stack, connect: Open) -> None:
    anna, ben, carl = [await new_door(stack) for _ in range(3)]
    topic_id = await anna.group(ben, carl)
    topic = conversation(topic_id)
    at_ben, at_carl = await connect(ben.person), await connect(carl.person)
    await at_ben.join(topic)
    await at_carl.join(topic)
    assert (await anna.delete(f"/conversations/{topic_id}/members/{ben.id}")).status_code == 204
    assert (await at_ben.next(topic, "member_removed"))["user_id"] == ben.id
    await at_ben.next(topic, "phx_close")
    assert (await anna.post("/messages", anna.draft(topic_id))).status_code == 201
    await at_carl.next(topic, "new_message")
    assert await at_ben.join_refused(topic, {"cursor": None}) == {"reason": "forbidden"}
    assert await at_ben.refused(topic, "new_message", message(ben, topic_id)) == {"reason": "unmatched topic"}
    assert not at_ben.has(topic, "new_message")


async def test_new_member_sees_what_comes_after(stack: Stack, connect: Open) -> None:
    anna, ben, carl = [await new_door(stack) for _ in range(3)]
    topic_id = await anna.group(ben)
    topic = conversation(topic_id)
    at_carl = await connect(carl.person)
    await at_carl.join(f"user:{carl.id}")
    await anna.post("/messages", anna.draft(topic_id, "before"))
    assert (await anna.post(f"/conversations/{topic_id}/members", {"member_ids": [carl.id]})).status_code in (
        200,
        201,
    )
    added = await at_carl.next(f"user:{carl.id}", "conversation_added")
    assert added["conversation"]["id"] == topic_id
    joined = await at_carl.join(topic)
    assert [event["event"] for event in joined["events"]] == ["member_added"]
    assert joined["head_seq"] == 2
    assert (await at_carl.push(topic, "sync", {"after_seq": 0}))["events"] == joined["events"]
    assert (await at_carl.push(topic, "new_message", message(carl, topic_id)))["seq"] == 3


async def test_blocked_people_cannot_write_and_hear_nothing_of_each_other(
    stack: Stack, connect: Open
) -> None:
    anna, ben, carl = [await new_door(stack) for _ in range(3)]
    direct, group = await anna.direct(ben), await anna.group(ben, carl)
    lines = [await connect(door.person) for door in (anna, ben, carl)]
    at_anna, at_ben, at_carl = lines
    for line in lines:
        await line.join(conversation(group))
    await at_anna.join(conversation(direct))
    await at_anna.push(conversation(direct), "new_message", message(anna, direct))
    blocking = await stack.http.put(
        f"{stack.user.url}/api/v1/users/me/blocks/{anna.id}", headers=ben.person.headers
    )
    assert blocking.status_code in (200, 201, 204)
    await asyncio.sleep(0.1)
    refusal = await at_anna.refused(conversation(direct), "new_message", message(anna, direct))
    assert refusal == {"reason": "blocked"}
    await at_anna.push(conversation(group), "new_message", message(anna, group))
    seq = (await at_carl.next(conversation(group), "new_message"))["seq"]
    await at_anna.push(conversation(group), "typing", {"state": "start"})
    await at_anna.push(conversation(group), "mark_as_read", {"seq": seq})
    assert (await at_carl.next(conversation(group), "typing"))["user_id"] == anna.id
    assert (await at_carl.next(conversation(group), "receipt"))["user_id"] == anna.id
    await at_ben.settled()
    assert not at_ben.has(conversation(group), "typing")
    assert not at_ben.has(conversation(group), "receipt")


async def test_receipts_reach_the_others_and_own_devices(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    topic = conversation(topic_id)
    at_anna, at_ben, at_tablet = [
        await connect(person) for person in (anna.person, ben.person, await stack.add_device(ben.person))
    ]
    await at_anna.join(topic)
    await at_ben.join(topic)
    await at_tablet.join(f"user:{ben.id}")
    for _ in range(3):
        await at_anna.push(topic, "new_message", message(anna, topic_id))
    marks = [at_ben.push(topic, "mark_as_delivered", {"seq": seq}) for seq in (1, 2, 3)]
    assert await asyncio.gather(*marks, at_ben.push(topic, "mark_as_read", {"seq": 2})) == [{}] * 4
    receipt = await at_anna.next(topic, "receipt")
    assert receipt == {"user_id": ben.id, "delivered_seq": 3, "read_seq": 2}
    assert not at_anna.has(topic, "receipt"), "coalesced into one"
    assert await at_tablet.next(f"user:{ben.id}", "read_synced") == {
        "conversation_id": topic_id,
        "read_seq": 2,
    }
    await at_ben.push(topic, "mark_as_read", {"seq": 1})
    await at_anna.settled()
    assert not at_anna.has(topic, "receipt"), "watermarks only grow"


async def test_private_readers_are_shown_as_having_received_only(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    hiding = await stack.http.patch(
        f"{stack.user.url}/api/v1/users/me",
        json={"privacy": {"read_receipts": False}},
        headers=ben.person.headers,
    )
    assert hiding.status_code == 200
    topic_id = await anna.direct(ben)
    topic = conversation(topic_id)
    at_anna, at_ben = await connect(anna.person), await connect(ben.person)
    await at_anna.join(topic)
    await at_ben.join(topic)
    await at_ben.join(f"user:{ben.id}")
    await at_anna.push(topic, "new_message", message(anna, topic_id))
    await at_ben.push(topic, "mark_as_read", {"seq": 1})
    assert await at_anna.next(topic, "receipt") == {"user_id": ben.id, "delivered_seq": 1, "read_seq": None}
    assert await at_ben.next(topic, "receipt") == {"user_id": ben.id, "delivered_seq": 1, "read_seq": 1}
    assert (await at_ben.next(f"user:{ben.id}", "read_synced"))["read_seq"] == 1


async def test_typing_starts_stops_and_runs_out(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.direct(ben)
    topic = conversation(topic_id)
    at_anna, at_ben = await connect(anna.person), await connect(ben.person)
    await at_anna.join(topic)
    await at_ben.join(topic)
    start, stop = [{"user_id": anna.id, "state": state, "expires_in": 6} for state in ("start", "stop")]
    await at_anna.push(topic, "typing", {"state": "start"})
    assert await at_ben.next(topic, "typing") == start
    for _ in range(3):
        await at_anna.push(topic, "typing", {"state": "start"})
    stack.clock.advance(7)
    assert await at_ben.next(topic, "typing") == stop, "repeated starts are told once, and run out"
    await at_anna.push(topic, "typing", {"state": "start"})
    assert await at_ben.next(topic, "typing") == start
    await at_anna.push(topic, "typing", {"state": "stop"})
    assert await at_ben.next(topic, "typing") == stop
    await at_anna.push(topic, "typing", {"state": "start"})
    assert await at_ben.next(topic, "typing") == start
    await at_anna.push(topic, "new_message", message(anna, topic_id))
    assert await at_ben.next(topic, "typing") == stop, "sent"
    await at_anna.push(topic, "typing", {"state": "start"})
    assert await at_ben.next(topic, "typing") == start
    await at_anna.close()
    assert await at_ben.next(topic, "typing") == stop, "gone"
    assert not at_anna.has(topic, "typing"), "nobody is told of their own typing"


async def test_user_topic_gets_own_notices(stack: Stack, connect: Open) -> None:
    anna = await new_door(stack)
    line = await connect(anna.person)
    joined = await line.join(f"user:{anna.id}")
    assert joined["devices"] == [str(anna.person.device_id)]
    UUID(joined["epoch"])
    await stack.add_device(anna.person)
    assert (await line.next(f"user:{anna.id}", "device_list_changed"))["epoch"] >= 2
    again = await line.join(f"user:{anna.id}")
    assert len(again["devices"]) == 2


async def test_signature_of_another_device_is_refused(stack: Stack, connect: Open) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    other = Door(stack, await stack.add_device(anna.person))
    topic_id = await anna.direct(ben)
    line = await connect(anna.person)
    await line.join(conversation(topic_id))
    refusal = await line.refused(conversation(topic_id), "new_message", message(other, topic_id))
    assert refusal["reason"] == "bad_signature"
    flipped = message(anna, topic_id)
    flipped["signature"] = b64(bytes(64))
    assert (await line.refused(conversation(topic_id), "new_message", flipped))["reason"] == "bad_signature"
    assert (await anna.ok(f"/conversations/{topic_id}/messages"))["items"] == []
