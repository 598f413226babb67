"""A conversation server built on the kit's channels, whose log, holes and refusals the tests control."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

import msgspec

from whispr.client.failures import SessionEnded
from whispr.kit.channels import Channel, ConnectRequest, Endpoint, Reply, Socket
from whispr.kit.clock import SystemClock
from whispr.kit.errors import Forbidden, InvalidToken, Unavailable
from whispr.kit.identity import Caller


class Log(Channel):
    __slots__ = ("server",)

    def __init__(self, socket: Socket, topic: str, topic_id: str) -> None:
        super().__init__(socket, topic, topic_id)
        self.server: PhoenixServer

    async def join(self, params: dict[str, Any]) -> Any:
        server = self.server
        server.joins.append(params)
        if server.refuse_joins:
            raise server.refuse_joins.pop(0)
        self.subscribe(self.topic)
        cursor = params.get("cursor") or {}
        recovered = cursor.get("epoch") == server.epoch
        after = cursor["seq"] if recovered else max(0, len(server.log) - 3)
        events = server.log[after : after + 3]
        return {
            "epoch": server.epoch,
            "head_seq": len(server.log),
            "recovered": recovered,
            "events": events,
            "more": after + 3 < len(server.log),
            "members": [],
        }

    def receive(self, event: str, payload: msgspec.Raw, reply: Reply) -> None:
        server = self.server
        data = msgspec.json.decode(payload)
        server.received.append((event, data))
        if event == "crash":
            raise RuntimeError("a defect of the server")
        if event == "silence":
            return
        if event == "sync":
            if server.sync_failures:
                reply.error(server.sync_failures.pop(0))
                return
            after = max(data["after_seq"], server.floor)
            reply.ok({"events": server.log[after : after + 4], "more": after + 4 < len(server.log)})
            return
        if event == "refuse":
            reply.error(Unavailable(retry_after=0.5) if data else Forbidden())
            return
        reply.ok({"echo": data})


class PhoenixServer:
    def __init__(self) -> None:
        self.epoch = str(uuid4())
        self.log: list[dict[str, Any]] = []
        self.floor = 0
        self.joins: list[dict[str, Any]] = []
        self.received: list[tuple[str, Any]] = []
        self.refuse_joins: list[Exception] = []
        self.sync_failures: list[Any] = []
        self.valid_tokens = {"token-1"}
        self.tokens_seen: list[str] = []
        self.endpoint: Endpoint
        self.port = 0

    async def start(self) -> None:
        def make(socket: Socket, topic: str, topic_id: str) -> Channel:
            channel = Log(socket, topic, topic_id)
            channel.server = self
            return channel

        self.endpoint = Endpoint([("conversation:*", make)], self._authenticate, clock=SystemClock())
        self.port = await self.endpoint.listen("127.0.0.1", self.port)

    async def stop(self) -> None:
        await self.endpoint.drain(window=0, grace=1)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/socket/websocket"

    def append(self, event: str = "new_message", *, topic: str = "conversation:1", push: bool = True) -> int:
        """Put an event into the log; without `push` live subscribers miss it."""
        seq = len(self.log) + 1
        payload = {"seq": seq, "n": seq}
        self.log.append({"seq": seq, "event": event, "payload": payload})
        if push:
            self.endpoint.hub.broadcast(topic, event, msgspec.json.encode(payload))
        return seq

    def _authenticate(self, request: ConnectRequest) -> Caller:
        token = request.token or ""
        self.tokens_seen.append(token)
        if token not in self.valid_tokens:
            raise InvalidToken
        now = time.time()
        return Caller(uuid4(), uuid4(), uuid4(), frozenset(), now, now + 600)


class Tokens:
    """Hands out a token; the next one when it was refused, or SessionEnded when there is none left."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = list(tokens)
        self.refusals: list[str] = []

    async def access_token(self, *, refused: str | None = None) -> str:
        if refused is not None:
            self.refusals.append(refused)
            if self.tokens and self.tokens[0] == refused:
                self.tokens.pop(0)
        if not self.tokens:
            raise SessionEnded("revoked")
        return self.tokens[0]
