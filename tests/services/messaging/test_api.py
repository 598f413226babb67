"""The OpenAPI document of messaging is complete, and the answers are what it says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel
from tests.services.messaging.door import Door
from tests.services.messaging.test_changes import edit_of
from tests.stack import Stack, b64

from whispr.kit.http import Page
from whispr.services.messaging.api.shapes import (
    ConversationView,
    EventsView,
    MembersView,
    MemberView,
    MessagesView,
    MessageView,
    PinView,
    ReactionView,
    StatusView,
)

ROUTES = {
    ("POST", "/api/v1/conversations"): {"200", "201", "403", "404", "409", "413"},
    ("GET", "/api/v1/conversations"): {"200"},
    ("GET", "/api/v1/conversations/{conversation_id}"): {"200", "404"},
    ("PATCH", "/api/v1/conversations/{conversation_id}"): {"200", "403", "404", "409", "413"},
    ("DELETE", "/api/v1/conversations/{conversation_id}"): {"204", "403", "404"},
    ("POST", "/api/v1/conversations/{conversation_id}/members"): {"200", "201", "403", "404", "409"},
    ("PATCH", "/api/v1/conversations/{conversation_id}/members/{user_id}"): {"200", "403", "404", "409"},
    ("DELETE", "/api/v1/conversations/{conversation_id}/members/{user_id}"): {"204", "403", "404", "409"},
    ("POST", "/api/v1/messages"): {"200", "201", "202", "403", "404", "409", "413"},
    ("GET", "/api/v1/conversations/{conversation_id}/messages"): {"200", "404"},
    ("GET", "/api/v1/conversations/{conversation_id}/events"): {"200", "404"},
    ("POST", "/api/v1/conversations/{conversation_id}/read"): {"204", "404"},
    ("POST", "/api/v1/conversations/{conversation_id}/delivered"): {"204", "404"},
    ("GET", "/api/v1/messages/{message_id}/status"): {"200", "404"},
    ("POST", "/api/v1/messages/{message_id}/report"): {"200", "201", "404", "413"},
    ("GET", "/api/v1/scheduled-messages"): {"200"},
    ("GET", "/api/v1/scheduled-messages/{scheduled_id}"): {"200", "404"},
    ("PATCH", "/api/v1/scheduled-messages/{scheduled_id}"): {"200", "403", "404", "409", "413"},
    ("DELETE", "/api/v1/scheduled-messages/{scheduled_id}"): {"204", "404", "409"},
    ("GET", "/api/v1/restrictions"): {"200", "403"},
    ("DELETE", "/api/v1/restrictions/{user_id}"): {"204", "403", "404"},
    ("GET", "/api/v1/export/messaging"): {"200"},
    ("GET", "/api/v1/messages/{message_id}"): {"200", "404"},
    ("PATCH", "/api/v1/messages/{message_id}"): {"200", "403", "404", "409", "413"},
    ("DELETE", "/api/v1/messages/{message_id}"): {"204", "403", "404"},
    ("GET", "/api/v1/messages/{message_id}/reactions"): {"200", "404"},
    ("PUT", "/api/v1/messages/{message_id}/reactions/{reaction}"): {"204", "403", "404", "409"},
    ("DELETE", "/api/v1/messages/{message_id}/reactions/{reaction}"): {"204", "404"},
    ("GET", "/api/v1/conversations/{conversation_id}/pins"): {"200", "404"},
    ("PUT", "/api/v1/conversations/{conversation_id}/pins/{message_id}"): {"204", "403", "404", "409"},
    ("DELETE", "/api/v1/conversations/{conversation_id}/pins/{message_id}"): {"204", "403", "404", "409"},
}


@pytest.fixture
def document(stack: Stack) -> dict[str, Any]:
    openapi: dict[str, Any] = stack.messaging.running.service.http.openapi()
    return openapi


def test_every_route_documents_what_it_answers(document: dict[str, Any]) -> None:
    for (method, path), statuses in ROUTES.items():
        operation = document["paths"][path][method.lower()]
        documented = set(operation["responses"])
        assert statuses <= documented, (method, path)
        assert {"401", "422", "429", "503"} <= documented, (method, path)
        assert not {status for status in documented if status < "300"} - statuses, (method, path)
        assert operation["description"], (method, path)


def test_there_are_no_other_routes(document: dict[str, Any]) -> None:
    found = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
        if path.startswith("/api/")
    }
    assert found == set(ROUTES)


def test_content_is_documented_as_the_contract_has_it(document: dict[str, Any]) -> None:
    content = document["components"]["schemas"]["MessageCreation"]["properties"]["content"]
    assert [list(form["properties"]) for form in content["oneOf"]] == [
        ["ciphertext", "commitment"],
        ["envelopes", "commitment"],
    ]
    message_type = document["components"]["schemas"]["MessageCreation"]["properties"]["message_type"]
    assert message_type["enum"] == ["text", "media", "system"]


async def test_answers_have_the_documented_shapes(stack: Stack) -> None:
    ann, bob, cid = (
        Door(stack, person) for person in await asyncio.gather(*(stack.register() for _ in range(3)))
    )

    def is_shaped(shape: type[BaseModel], answer: Any) -> None:
        # The shapes forbid members they do not name, so this fails both ways.
        shape.model_validate_json(answer.content)

    body = {"type": "group", "member_ids": [bob.id], "metadata": {"a": [1]}}
    made = await ann.post("/conversations", body)
    is_shaped(ConversationView, made)
    path = f"/conversations/{made.json()['id']}"
    sent = await ann.post("/messages", ann.draft(made.json()["id"]))
    is_shaped(MessageView, sent)
    envelopes = {"envelopes": {str(bob.person.device_id): {"type": "prekey", "body": b64(b"x")}}}
    is_shaped(MessageView, await ann.post("/messages", ann.draft(made.json()["id"], content=envelopes)))
    is_shaped(MembersView, await ann.post(f"{path}/members", {"member_ids": [cid.id]}))
    is_shaped(MemberView, await ann.patch(f"{path}/members/{cid.id}", {"role": "admin"}))
    await ann.patch(path, {"metadata": {"b": 2}})
    message_path = f"/messages/{sent.json()['id']}"
    is_shaped(MessageView, await ann.patch(message_path, edit_of(ann, sent.json())))
    await bob.call("PUT", f"{message_path}/reactions/x")
    await ann.call("PUT", f"{path}/pins/{sent.json()['id']}")
    await ann.delete(f"{path}/members/{cid.id}")
    await bob.post(f"{path}/read", {"seq": 1})
    for door in (ann, bob):
        is_shaped(ConversationView, await door.get(path))
        is_shaped(Page[ConversationView], await door.get("/conversations"))
        is_shaped(MessagesView, await door.get(f"{path}/messages"))
        is_shaped(EventsView, await door.get(f"{path}/events"))
        is_shaped(StatusView, await door.get(f"{message_path}/status"))
        is_shaped(MessageView, await door.get(message_path))
        is_shaped(Page[ReactionView], await door.get(f"{message_path}/reactions"))
        is_shaped(Page[PinView], await door.get(f"{path}/pins"))
    names = [event["event"] for event in await bob.log(made.json()["id"])]
    assert names == [
        "new_message",
        "new_message",
        "member_added",
        "member_updated",
        "conversation_updated",
        "message_edited",
        "reaction_added",
        "message_pinned",
        "member_removed",
    ]


@pytest.mark.parametrize(
    "path", ["/conversations/not-a-uuid", "/messages/%00/status", "/conversations/x/events"]
)
async def test_ids_that_are_none(stack: Stack, path: str) -> None:
    ann = Door(stack, await stack.register())
    answer = await ann.get(path)
    assert answer.status_code in (404, 422)
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("key", ["", "a b", "x" * 129, "ü"])
async def test_idempotency_keys_that_are_none(stack: Stack, key: str) -> None:
    ann = Door(stack, await stack.register())
    answer = await ann.post(
        "/conversations",
        {"type": "group", "member_ids": []},
        headers={"Idempotency-Key": key.encode("latin-1")},
    )
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
