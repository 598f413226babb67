"""Channels that do whatever a test asks them to, and an endpoint that serves them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

import msgspec

from whispr.kit.channels import Channel, ConnectRequest, Endpoint, Reply, Socket, UnknownEvent, decode_payload
from whispr.kit.clock import SystemClock
from whispr.kit.errors import Conflict, Forbidden, InvalidToken, RateLimited, Unauthenticated, Unavailable
from whispr.kit.identity import Caller


class Say(msgspec.Struct):
    text: str


SAY = msgspec.json.Decoder(Say)


def user_id(name: str) -> UUID:
    return uuid5(NAMESPACE_URL, name)


def authenticate(request: ConnectRequest) -> Caller:
    """Tokens are "person" or "person/device"; some persons have bad luck."""
    if request.token is None:
        raise Unauthenticated
    person, _, device = request.token.partition("/")
    match person:
        case "forged":
            raise InvalidToken
        case "banned":
            raise Forbidden
        case "busy":
            raise RateLimited(retry_after=7)
        case "lost":
            raise Unavailable(retry_after=2)
        case "bug":
            raise ZeroDivisionError
    return Caller(
        user_id=user_id(person),
        device_id=uuid5(NAMESPACE_URL, f"{person}/{device}"),
        session_id=uuid5(NAMESPACE_URL, f"session of {person}/{device}"),
        roles=frozenset(),
        issued_at=0.0,
        expires_at=9e9,
    )


class Room(Channel):
    __slots__ = ("gate", "terminations")

    rooms: list[Room]

    def __init__(self, socket: Socket, topic: str, topic_id: str) -> None:
        super().__init__(socket, topic, topic_id)
        if topic_id == "unmade":
            raise ZeroDivisionError
        if topic_id == "foreign":
            raise Forbidden
        self.gate = asyncio.Event()
        self.terminations = 0
        Room.rooms.append(self)

    async def join(self, params: dict[str, Any]) -> Any:
        self.subscribe()
        if params.get("wait"):
            self.push("early", {"n": 1})
            await self.gate.wait()
        if params.get("refuse"):
            raise Forbidden(member_of=["nothing"])
        if params.get("crash"):
            raise ZeroDivisionError
        if params.get("parse"):
            decode_payload(b'{"text":1}', SAY)
        if "shape" in params:
            msgspec.convert(params, Say)
        return {"id": self.topic_id, "params": params}

    async def joined(self) -> None:
        if self.topic_id == "greets":
            self.push("welcome")
        if self.topic_id == "greets-badly":
            raise ZeroDivisionError

    def receive(self, event: str, payload: msgspec.Raw, reply: Reply) -> Coroutine[Any, Any, None] | None:
        match event:
            case "echo":
                reply.ok(payload)
            case "say":
                reply.ok({"heard": decode_payload(payload, SAY).text})
            case "undecoded":
                SAY.decode(payload)
            case "shout":
                self.hub.broadcast(self.topic, "shouted", payload)
                reply.ok()
            case "whisper":
                self.hub.broadcast(self.topic, "whispered", payload, exclude=self)
                reply.ok()
            case "twice":
                reply.ok({"n": 1})
                reply.ok({"n": 2})
            case "refused":
                raise Conflict(holder="bob")
            case "crash":
                raise ZeroDivisionError
            case "close":
                self.close()
            case "later":
                return self._later(payload, reply)
            case _:
                return super().receive(event, payload, reply)
        return None

    def receive_binary(self, event: str, data: bytes, reply: Reply) -> Coroutine[Any, Any, None] | None:
        if event == "reverse":
            reply.ok_binary(data[::-1])
            return None
        if event == "scatter":
            self.hub.broadcast_binary(self.topic, "scattered", data)
            return None
        return super().receive_binary(event, data, reply)

    async def _later(self, payload: msgspec.Raw, reply: Reply) -> None:
        text = decode_payload(payload, SAY).text
        await self.gate.wait()
        if text == "refused":
            raise Conflict
        if text == "crash":
            raise ZeroDivisionError
        if text == "parse":
            SAY.decode(b"[]")
        reply.ok({"later": text})

    def terminated(self) -> None:
        self.terminations += 1
        if self.topic_id == "dies-badly":
            raise ZeroDivisionError


Room.rooms = []


class Lobby(Channel):
    __slots__ = ()

    async def join(self, params: dict[str, Any]) -> Any:
        self.subscribe("announcements")
        return msgspec.Raw(b'{"raw":true}')

    def receive(self, event: str, payload: msgspec.Raw, reply: Reply) -> None:
        raise UnknownEvent(event=event)


def make_endpoint(**options: Any) -> Endpoint:
    return Endpoint(
        [("room:*", Room), ("lobby", Lobby)],
        authenticate,
        clock=options.pop("clock", SystemClock()),
        **options,
    )
