"""A person's calls of messaging's REST door, signed as a real client signs them."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from uuid import UUID, uuid4

import httpx
from tests.stack import Person, Stack, b64


def signature_of(person: Person, conversation_id: str, client_id: str, content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    signed = hashlib.sha256(
        b"whispr-message-v1"
        + UUID(conversation_id).bytes
        + UUID(client_id).bytes
        + hashlib.sha256(canonical).digest()
    ).digest()
    return b64(person.keys.signing_key.sign(signed).signature)


class Door:
    """`person`'s way in."""

    def __init__(self, stack: Stack, person: Person, url: str | None = None) -> None:
        self.stack = stack
        self.person = person
        self.url = url or stack.messaging.url

    @property
    def id(self) -> str:
        return str(self.person.user_id)

    async def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {**self.person.headers, **options.pop("headers", {})}
        return await self.stack.http.request(method, f"{self.url}/api/v1{path}", headers=headers, **options)

    async def get(self, path: str, **params: Any) -> httpx.Response:
        return await self.call("GET", path, params=params)

    async def ok(self, path: str, **params: Any) -> dict[str, Any]:
        answer = await self.get(path, **params)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return await self.call("POST", path, json=body, **options)

    async def patch(self, path: str, body: Any) -> httpx.Response:
        return await self.call("PATCH", path, json=body)

    async def delete(self, path: str) -> httpx.Response:
        return await self.call("DELETE", path)

    async def direct(self, other: Door) -> str:
        answer = await self.post("/conversations", {"type": "direct", "member_ids": [other.id]})
        assert answer.status_code in (200, 201), answer.text
        return str(answer.json()["id"])

    async def group(self, *others: Door, metadata: dict[str, Any] | None = None) -> str:
        body = {"type": "group", "member_ids": [other.id for other in others], "metadata": metadata or {}}
        answer = await self.post("/conversations", body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def draft(
        self,
        conversation_id: str,
        text: str = "hello",
        *,
        content: dict[str, Any] | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        client_id = str(uuid4())
        if content is None:
            content = {"ciphertext": b64(text.encode())}
        return {
            "conversation_id": conversation_id,
            "client_id": client_id,
            "message_type": "text",
            "content": content,
            "signature": signature_of(self.person, conversation_id, client_id, content),
            **changes,
        }

    async def send(self, conversation_id: str, text: str = "hello") -> dict[str, Any]:
        answer = await self.post("/messages", self.draft(conversation_id, text))
        assert answer.status_code == 201, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def log(self, conversation_id: str) -> list[dict[str, Any]]:
        """Every event this person can see."""
        events: list[dict[str, Any]] = []
        after = 0
        while True:
            page = await self.ok(f"/conversations/{conversation_id}/events", after_seq=after, limit=100)
            events += page["items"]
            if not page["more"]:
                return events
            after = page["items"][-1]["seq"]


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The answer is this failure, as problem+json; its body."""
    assert (answer.status_code, answer.json().get("code")) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    return body
