"""A device's socket: joins, pushes, and everything it was sent, by topic."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import aiohttp
from tests.stack import Node, Person

WAIT = 5.0


class ReplyError(Exception):
    """An error reply; `response` is its payload."""

    def __init__(self, response: dict[str, Any]) -> None:
        super().__init__(response)
        self.response = response
        self.reason = response["reason"]


class Line:
    """Frames other than replies wait in `inbox[topic]` until somebody looks for them."""

    def __init__(self, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._session = session
        self._socket = socket
        self._refs = itertools.count(1)
        self._replies: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._joins: dict[str, str] = {}
        self._news = asyncio.Event()
        self.inbox: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
        self.frames: list[list[Any]] = []
        self.close_code: int | None = None
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, node: Node, person: Person, *, token: str | None = None, **params: str) -> Line:
        session = aiohttp.ClientSession()
        try:
            socket = await session.ws_connect(
                node.socket_url,
                params={"vsn": "2.0.0", "token": token or person.token, **params},
                max_msg_size=1 << 24,
                autoping=True,
            )
        except BaseException:
            await session.close()
            raise
        return cls(session, socket)

    async def close(self) -> None:
        await self._socket.close()
        await self._session.close()
        await asyncio.gather(self._reader, return_exceptions=True)

    def cut(self) -> None:
        """Vanish without a word."""
        transport = self._socket._response.connection
        assert transport is not None
        transport.transport.abort()  # type: ignore[union-attr]

    async def raw(self, text: str) -> None:
        await self._socket.send_str(text)

    async def join(self, topic: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        ref = str(next(self._refs))
        self._joins[topic] = ref
        return await self._ask(ref, ref, topic, "phx_join", params or {})

    async def leave(self, topic: str) -> None:
        await self.push(topic, "phx_leave", {})

    async def push(self, topic: str, event: str, payload: Any) -> dict[str, Any]:
        return await self._ask(self._joins.get(topic), str(next(self._refs)), topic, event, payload)

    async def refused(self, topic: str, event: str, payload: Any) -> dict[str, Any]:
        try:
            answer = await self.push(topic, event, payload)
        except ReplyError as error:
            return error.response
        raise AssertionError(f"{event} was taken: {answer}")

    async def join_refused(self, topic: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = await self.join(topic, params)
        except ReplyError as error:
            return error.response
        raise AssertionError(f"the join was taken: {answer}")

    async def next(self, topic: str, event: str, timeout: float = WAIT) -> dict[str, Any]:
        """The first waiting `event` on `topic`, taken out."""
        return await self.find(topic, lambda name, _: name == event, timeout, event)

    async def find(
        self,
        topic: str,
        wanted: Callable[[str, dict[str, Any]], bool],
        timeout: float = WAIT,
        what: str = "?",
    ) -> dict[str, Any]:
        try:
            async with asyncio.timeout(timeout):
                while True:
                    for at, (name, payload) in enumerate(self.inbox[topic]):
                        if wanted(name, payload):
                            del self.inbox[topic][at]
                            return payload
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"no {what} on {topic}; waiting: {self.inbox[topic]}") from None

    async def seqs(self, topic: str, until: int, timeout: float = WAIT) -> list[int]:
        """The `seq` of every event pushed on `topic` so far, once the last one is `until`."""
        got: list[int] = []
        try:
            async with asyncio.timeout(timeout):
                while (got := [p["seq"] for _, p in self.inbox[topic] if "seq" in p])[-1:] != [until]:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"{until} did not come on {topic}: {got}") from None
        return got

    def has(self, topic: str, event: str) -> bool:
        return any(name == event for name, _ in self.inbox[topic])

    async def settled(self) -> None:
        """Everything sent to this device before now has arrived."""
        ref = str(next(self._refs))
        await self._ask(None, ref, "phoenix", "heartbeat", {})

    async def closed(self, timeout: float = WAIT) -> int | None:
        await asyncio.wait_for(asyncio.shield(self._reader), timeout)
        return self.close_code

    async def _ask(
        self, join_ref: str | None, ref: str, topic: str, event: str, payload: Any
    ) -> dict[str, Any]:
        answer = self._replies[ref] = asyncio.get_running_loop().create_future()
        await self._socket.send_str(json.dumps([join_ref, ref, topic, event, payload]))
        reply = await asyncio.wait_for(answer, WAIT)
        if reply["status"] != "ok":
            raise ReplyError(reply["response"])
        response: dict[str, Any] = reply["response"]
        return response

    async def _read(self) -> None:
        async for message in self._socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            frame = json.loads(message.data)
            join_ref, ref, topic, event, payload = frame
            self.frames.append(frame)
            if event == "phx_reply" and ref in self._replies:
                waiting = self._replies.pop(ref)
                if not waiting.done():
                    waiting.set_result(payload)
            elif join_ref == self._joins.get(topic):
                self.inbox[topic].append((event, payload))
            else:
                assert event == "phx_close", frame  # of an earlier join
            self._news.set()
        self.close_code = self._socket.close_code
