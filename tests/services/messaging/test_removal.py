"""Somebody who is not in a conversation any more reads nothing that is sent after they left, through any door."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from tests.kit.channels.test_longpoll import Session
from tests.services.messaging.door import Door, signature_of
from tests.services.messaging.line import Line
from tests.services.messaging.test_members import people
from tests.stack import Node, Person, Stack, b64

from whispr.kit.cache import Cache
from whispr.kit.db import Database
from whispr.services.messaging.models import ConversationNotFound
from whispr.services.messaging.service.directory import Directory
from whispr.services.messaging.service.history import History
from whispr.services.messaging.store import pins

Open = Callable[..., Awaitable[Line]]


@pytest.fixture
async def connect(stack: Stack) -> AsyncIterator[Open]:
    lines: list[Line] = []

    async def open_line(person: Person, node: Node | None = None) -> Line:
        line = await Line.open(node or stack.messaging, person)
        lines.append(line)
        return line

    yield open_line
    for line in lines:
        await line.close()


@pytest.fixture(scope="module")
async def deaf(stack: Stack) -> AsyncIterator[Node]:
    """A node that Valkey does not reach: what it remembers of members is only corrected by time."""
    node = await stack.another_node(valkey_url="redis://127.0.0.1:9")
    yield node
    await node.running.stop()


class Scene:
    """Ann's group; Bob was in it, and something was sent before he went and after."""

    def __init__(self, ann: Door, bob: Door, group: str) -> None:
        self.ann = ann
        self.bob = bob
        self.group = group
        self.topic = f"conversation:{group}"
        self.secret = f"secret of {uuid4()}"
        self.old: dict[str, Any] = {}
        self.own: dict[str, Any] = {}
        self.new: dict[str, Any] = {}

    @classmethod
    async def set(cls, stack: Stack) -> Scene:
        ann, bob, cid = await people(stack, 3)
        scene = cls(ann, bob, await ann.group(bob, cid))
        scene.old = await ann.send(scene.group, "old")
        scene.own = await bob.send(scene.group, "own")
        return scene

    async def remove(self) -> None:
        answer = await self.ann.delete(f"/conversations/{self.group}/members/{self.bob.id}")
        assert answer.status_code == 204

    async def go_on(self) -> None:
        """What Bob must not see: a message, an edit, a reaction and a pin."""
        self.new = await self.ann.send(self.group, self.secret)
        content = {"ciphertext": b64(f"edited: {self.secret}".encode())}
        edit = {
            "content": content,
            "signature": signature_of(self.ann.person, self.group, self.old["client_id"], content),
        }
        for answer in (
            await self.ann.patch(f"/messages/{self.old['id']}", edit),
            await self.ann.call("PUT", f"/messages/{self.new['id']}/reactions/{self.marks[0]}"),
            await self.ann.call("PUT", f"/conversations/{self.group}/pins/{self.new['id']}"),
            await self.ann.patch(f"/conversations/{self.group}", {"metadata": {"name": self.secret}}),
        ):
            assert answer.is_success, answer.text

    @property
    def marks(self) -> list[str]:
        """What would show up somewhere if it leaked."""
        return [
            self.secret.rsplit(" ", 1)[1],
            b64(self.secret.encode()),
            b64(f"edited: {self.secret}".encode()),
            self.new.get("id", "nothing yet"),
        ]

    def assert_unseen(self, text: str) -> None:
        for mark in self.marks:
            assert mark not in text

    def requests(self) -> list[tuple[str, str, Any]]:
        """Every request about the group and what is in it."""
        group = f"/conversations/{self.group}"
        found: list[tuple[str, str, Any]] = []
        for query in ("", "?after_seq=0", "?before_seq=99", "?after_seq=2&limit=1"):
            found.append(("GET", f"{group}/messages{query}", None))
        for after in (0, 1, 2, 3, 99):
            found.append(("GET", f"{group}/events?after_seq={after}", None))
        for message in (self.old, self.own, self.new):
            path = f"/messages/{message['id']}"
            content = {"ciphertext": "YQ=="}
            signature = signature_of(self.bob.person, self.group, message["client_id"], content)
            about: list[tuple[str, str, Any]] = [
                ("GET", f"{path}/status", None),
                ("GET", f"{path}/reactions", None),
                ("PUT", f"{path}/reactions/x", None),
                ("DELETE", f"{path}/reactions/x", None),
                ("PATCH", path, {"content": content, "signature": signature}),
                ("DELETE", path, None),
                ("POST", f"{path}/report", {"reason": "spam"}),
                ("PUT", f"{group}/pins/{message['id']}", None),
                ("DELETE", f"{group}/pins/{message['id']}", None),
            ]
            found += about
        draft = self.bob.draft(self.group)
        return [
            *found,
            ("GET", group, None),
            ("GET", f"{group}/pins", None),
            ("PATCH", group, {"settings": {"x": 1}}),
            ("PATCH", group, {"metadata": {"x": 1}}),
            ("PATCH", group, {"permissions": {"send": "member"}}),
            ("DELETE", group, None),
            ("POST", f"{group}/read", {"seq": 1}),
            ("POST", f"{group}/delivered", {"seq": 1}),
            ("POST", f"{group}/members", {"member_ids": [self.bob.id]}),
            ("PATCH", f"{group}/members/{self.bob.id}", {"role": "admin"}),
            ("DELETE", f"{group}/members/{self.bob.id}", None),
            ("POST", "/messages", draft),
            ("POST", "/messages", {**draft, "reply_to_id": self.new["id"]}),
            ("POST", "/messages", {**draft, "send_at": "2100-01-01T00:00:00Z"}),
        ]


async def test_no_request_is_answered(stack: Stack) -> None:
    scene = await Scene.set(stack)
    await scene.remove()
    await scene.go_on()
    head = (await scene.ann.ok(f"/conversations/{scene.group}"))["head_seq"]
    for method, path, body in scene.requests():
        answer = await scene.bob.call(method, path, json=body)
        case = method, path, answer.text
        if "send_at" in (body or {}):
            assert answer.status_code in (404, 422), case
            continue
        assert answer.status_code == 404, case
        assert answer.json()["code"] in ("conversation_not_found", "message_not_found"), case
        scene.assert_unseen(answer.text)
    listed = await scene.bob.get("/conversations")
    assert scene.group not in listed.text
    scene.assert_unseen(listed.text)
    assert (await scene.ann.ok(f"/conversations/{scene.group}"))["head_seq"] == head


async def test_an_export_holds_nothing_of_it(stack: Stack) -> None:
    scene = await Scene.set(stack)
    await scene.remove()
    await scene.go_on()
    text = (await scene.bob.get("/export/messaging")).text
    scene.assert_unseen(text)
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[-1]["is_complete"] is True
    # That one was there is one's own; what was said there is not handed out any more.
    assert [line["conversation_id"] for line in lines if line["type"] == "membership"] == [scene.group]
    assert not [line for line in lines if line["type"] in ("conversation", "message", "pin")]


@pytest.mark.parametrize("way", ["removed", "left"])
async def test_open_sockets_end_with_the_event_that_tells_why(
    stack: Stack, connect: Open, deaf: Node, way: str
) -> None:
    scene = await Scene.set(stack)
    other_device = await stack.add_device(scene.bob.person)
    node = await stack.another_node()
    lines = [await connect(scene.bob.person), await connect(other_device, node)]
    if way == "removed":
        lines.append(await connect(scene.bob.person, deaf))
    for line in lines:
        await line.join(f"user:{scene.bob.id}")
        await line.join(scene.topic)
    epoch = (await scene.bob.ok(f"/conversations/{scene.group}/events"))["epoch"]
    if way == "removed":
        await scene.remove()
    else:
        await scene.bob.delete(f"/conversations/{scene.group}/members/{scene.bob.id}")
    await scene.go_on()
    for line in lines:
        # The deaf node compares with PostgreSQL every ten seconds.
        told = await line.next(scene.topic, "member_removed", timeout=15)
        assert (told["user_id"], told["reason"]) == (scene.bob.id, way)
        await line.next(scene.topic, "phx_close")
        for event, payload in (
            ("sync", {"after_seq": 0}),
            ("new_message", {}),
            ("mark_as_read", {"seq": 1}),
            ("typing", {"state": "start"}),
            ("add_reaction", {"message_id": scene.new["id"], "reaction": "x"}),
        ):
            refusal = await line.refused(scene.topic, event, payload)
            assert refusal == {"reason": "unmatched topic"}
        for params in ({}, {"cursor": {"epoch": epoch, "seq": 2}}, {"cursor": {"epoch": epoch, "seq": 0}}):
            assert await line.join_refused(scene.topic, params) == {"reason": "forbidden"}
        await line.settled()
        scene.assert_unseen(json.dumps(line.frames))
    await node.running.stop()


async def test_connecting_again_brings_nothing_of_it(stack: Stack, connect: Open, deaf: Node) -> None:
    scene = await Scene.set(stack)
    direct = await scene.ann.direct(scene.bob)
    await scene.remove()
    await scene.go_on()
    await scene.ann.send(direct, "for the end of the backlog")
    for person in (scene.bob.person, await stack.add_device(scene.bob.person)):
        for node in (stack.messaging, deaf):
            line = await connect(person, node)
            await line.join(f"user:{scene.bob.id}")
            page = await line.next(f"user:{scene.bob.id}", "undelivered")
            assert page["conversation_id"] == direct
            await line.settled()
            scene.assert_unseen(json.dumps(line.frames))
            assert scene.group not in json.dumps(line.frames)


async def test_long_polling_ends_too(stack: Stack) -> None:
    scene = await Scene.set(stack)
    async with httpx.AsyncClient(base_url=stack.messaging.url, timeout=30) as client:
        session = await Session.open(client, token=scene.bob.person.token)
        await session.post(["1", "1", scene.topic, "phx_join", {}])
        status, frames = await session.poll()
        assert status == 200
        await scene.remove()
        await scene.go_on()
        seen = [*frames]
        async with asyncio.timeout(15):
            while not any(frame[3] == "phx_close" for frame in seen):
                seen += (await session.poll())[1]
        await session.post(
            ["1", "2", scene.topic, "sync", {"after_seq": 0}], ["3", "3", scene.topic, "phx_join", {}]
        )
        async with asyncio.timeout(15):
            while not any(frame[1] == "3" for frame in seen):
                seen += (await session.poll())[1]
    (answer,) = [frame[4] for frame in seen if frame[1] == "3"]
    assert answer == {"status": "error", "response": {"reason": "forbidden"}}
    scene.assert_unseen(json.dumps(seen))


async def test_a_node_that_heard_nothing_answers_no_request_either(stack: Stack, deaf: Node) -> None:
    scene = await Scene.set(stack)
    bob_there = Door(stack, scene.bob.person, deaf.url)
    # Now the other node remembers Bob as a member.
    scene.own = await bob_there.send(scene.group, "own, sent there")
    await scene.remove()
    await scene.go_on()
    for method, path, body in scene.requests():
        answer = await bob_there.call(method, path, json=body)
        scene.assert_unseen(answer.text)
        assert answer.status_code in (404, 422), (method, path, answer.text)
    assert scene.group not in (await bob_there.get("/conversations")).text
    events = [event["event"] for event in await scene.ann.log(scene.group)]
    assert events.count("new_message") == 4


async def test_a_membership_that_ended_since_it_was_checked_reads_nothing(
    stack: Stack, messaging_db: Database, messaging_cache: Cache
) -> None:
    scene = await Scene.set(stack)
    directory = Directory(messaging_db, messaging_cache, stack.clock)
    history = History(messaging_db)
    membership = await directory.reader(UUID(scene.group), scene.bob.person.user_id)
    assert len((await history.messages(membership)).items) == 2
    await scene.remove()
    await scene.go_on()
    with pytest.raises(ConversationNotFound):
        await history.messages(membership)
    with pytest.raises(ConversationNotFound):
        await history.events(membership, after_seq=0)
    async with messaging_db.connection() as connection:
        seen = await pins.list_page(connection, membership.conversation_id, membership.user_id, None, 10)
    assert seen == []
    # Back again, and the old proof does not show what was missed.
    await scene.ann.post(f"/conversations/{scene.group}/members", {"member_ids": [scene.bob.id]})
    assert (await history.messages(membership)).items == []
    page = await history.events(membership, after_seq=0)
    assert [event.event for event in page.items] == ["member_added"]


async def test_who_comes_back_sees_nothing_of_what_was_missed(stack: Stack, connect: Open) -> None:
    scene = await Scene.set(stack)
    await scene.remove()
    await scene.go_on()
    # The name of a group is its present name; whoever is in it sees it.
    await scene.ann.patch(f"/conversations/{scene.group}", {"metadata": {}})
    answer = await scene.ann.post(f"/conversations/{scene.group}/members", {"member_ids": [scene.bob.id]})
    assert answer.status_code == 201
    line = await connect(scene.bob.person)
    await line.join(f"user:{scene.bob.id}")
    joined = await line.join(scene.topic, {"cursor": None})
    # What was missed goes on changing, before the eyes of those who saw it.
    content = {"ciphertext": b64(f"edited: {scene.secret}".encode())}
    edit = {
        "content": content,
        "signature": signature_of(scene.ann.person, scene.group, scene.new["client_id"], content),
    }
    assert (await scene.ann.patch(f"/messages/{scene.new['id']}", edit)).status_code == 200
    last = await scene.ann.send(scene.group, "the last one")
    await line.seqs(scene.topic, last["seq"])
    contents = [b64(scene.secret.encode()), b64(f"edited: {scene.secret}".encode())]
    group = f"/conversations/{scene.group}"
    texts = [json.dumps(line.frames), json.dumps(joined)]
    texts += [json.dumps(await line.push(scene.topic, "sync", {"after_seq": 0}))]
    for path in (
        group,
        "/conversations",
        f"{group}/messages",
        f"{group}/events",
        f"{group}/pins",
        "/export/messaging",
    ):
        texts.append((await scene.bob.get(path)).text)
    for text in texts:
        for mark in contents:
            assert mark not in text
    new = f"/messages/{scene.new['id']}"
    for method, path, body in (
        ("GET", f"{new}/status", None),
        ("GET", f"{new}/reactions", None),
        ("PUT", f"{new}/reactions/x", None),
        ("POST", f"{new}/report", {"reason": "spam"}),
        ("DELETE", new, None),
        ("POST", "/messages", scene.bob.draft(scene.group, reply_to_id=scene.new["id"])),
    ):
        refusal = await scene.bob.call(method, path, json=body)
        assert refusal.status_code in (404, 422), (method, path, refusal.text)
        assert refusal.json()["code"] in ("message_not_found", "reply_not_found")
