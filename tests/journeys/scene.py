"""What the fuzz tests share: people with something to ask about, and requests sent byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import httpx
from tests.services.messaging.door import Door
from tests.stack import Person, Stack

SERVICES = ("auth", "user", "messaging")

# Asked for a service that does not run: the one 5xx that is the right answer.
MISSING_NEIGHBOURS = {"scheduling_unavailable"}

UNKNOWN_ID = "018f4e6a-7b1c-7def-8a90-123456789abc"


def document(stack: Stack, service: str) -> dict[str, Any]:
    described: dict[str, Any] = stack.nodes[service].running.service.http.openapi()
    return described


def routes(stack: Stack, service: str) -> Iterator[tuple[str, str]]:
    for path, methods in document(stack, service)["paths"].items():
        for method in methods:
            yield method.upper(), path


@dataclass
class Scene:
    """A person with a group, a message in it and another member: requests about them reach the database.

    Some requests end the session or delete the account they are made with, so each route gets a scene of its own.
    """

    person: Person
    other: Person
    conversation_id: str
    message_id: str

    @classmethod
    async def set(cls, stack: Stack) -> Scene:
        person, other = await stack.register(one_time_prekeys=2), await stack.register(one_time_prekeys=2)
        door = Door(stack, person)
        conversation_id = await door.group(Door(stack, other))
        message = await door.send(conversation_id)
        return cls(person, other, conversation_id, message["id"])

    @property
    def ids(self) -> dict[str, str]:
        """Path parameters by name."""
        return {
            "conversation_id": self.conversation_id,
            "message_id": self.message_id,
            "user_id": str(self.other.user_id),
            "device_id": str(self.person.device_id),
            "session_id": str(self.person.session_id),
        }

    def fill(self, path: str, value: str | None = None) -> str:
        """The template with each parameter replaced by `value`, or by something that exists."""
        for name in [part.partition("}")[0] for part in path.split("{")[1:]]:
            path = path.replace(
                "{" + name + "}", value if value is not None else self.ids.get(name, UNKNOWN_ID)
            )
        return path


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


async def send(
    stack: Stack,
    service: str,
    person: Person | None,
    method: str,
    path: str,
    *,
    content: bytes | None = None,
    headers: Mapping[str, str | bytes] = MappingProxyType({}),
) -> Answer | None:
    """Ask byte for byte as written: HTTP clients would tidy up, or refuse to send, what is meant here.

    None where the server hung up without an answer, as its HTTP parser may on what is not HTTP.
    """
    sent: dict[str, str | bytes] = {"Host": "127.0.0.1", "Connection": "close"}
    if person is not None:
        sent["Authorization"] = f"Bearer {person.token}"
    if content is not None:
        sent["Content-Length"] = str(len(content))
    sent.update(headers)
    lines = [f"{method} {path} HTTP/1.1".encode()]
    for name, value in sent.items():
        lines.append(name.encode() + b": " + (value if isinstance(value, bytes) else value.encode()))
    reply = await exchange(stack, service, b"\r\n".join(lines) + b"\r\n\r\n" + (content or b""))
    if not reply:
        return None
    head, _, body = reply.partition(b"\r\n\r\n")
    status, *fields = head.decode("latin-1").split("\r\n")
    pairs = (field.partition(": ") for field in fields)
    return Answer(int(status.split(" ")[1]), {name.lower(): value for name, _, value in pairs}, body)


async def exchange(stack: Stack, service: str, request: bytes, *, hang_up: bool = False) -> bytes:
    """What the service's REST port says to `request` before it closes the connection.

    `hang_up` ends the sending side: for what leaves a server waiting for more.
    """
    url = httpx.URL(stack.nodes[service].url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    reply = b""
    # A refusal may come, and the connection end, before a large request is written.
    with contextlib.suppress(ConnectionError):
        writer.write(request)
        if hang_up:
            writer.write_eof()
        async with asyncio.timeout(10):
            while chunk := await reader.read(65_536):
                reply += chunk
    writer.close()
    return reply


def refused_in_order(answer: Answer | None, what: object) -> int:
    """The status. A refusal is a problem document with a code; success is fine where the nonsense was harmless."""
    assert answer is not None, what
    if answer.status >= 500:
        assert json.loads(answer.body)["code"] in MISSING_NEIGHBOURS, (what, answer.status, answer.body[:500])
    if answer.status >= 400 and not is_the_parsers(answer):
        assert answer.headers.get("content-type") == "application/problem+json", (what, answer)
        assert json.loads(answer.body)["code"], what
    return answer.status


def is_the_parsers(answer: Answer) -> bool:
    """What is not HTTP is answered below the application, where there are no problem documents."""
    return answer.status == 400 and answer.body == b"Invalid HTTP request received."
