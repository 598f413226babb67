"""The load generator: people with devices, and devices that send prebuilt signed messages over Phoenix Channels.

It shares the machine with what it measures, so it does as little as it can: messages are signed and encoded before
the clock starts, and frames are told apart by their bytes, not parsed.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID, uuid4

import httpx
from nacl.signing import SigningKey
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

CONTENT_BYTES = 256
"""Ciphertext of a short text message after padding."""


@dataclass(slots=True)
class Person:
    """Someone with one device."""

    user_id: str
    device_id: str
    token: str
    signing_key: SigningKey


T = TypeVar("T")


async def gather_bounded(jobs: Iterable[Callable[[], Awaitable[T]]], width: int = 16) -> list[T]:
    """Run `jobs`, `width` at a time; results in their order."""
    gate = asyncio.Semaphore(width)

    async def one(job: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await job()

    return await asyncio.gather(*(one(job) for job in jobs))


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def device_document(key: SigningKey) -> dict[str, Any]:
    """`DEVICE` of a registration. Its prekey is never used, so it is a random point with a true signature."""
    prekey = os.urandom(32)
    return {
        "name": "bench",
        "platform": "desktop",
        "registration_id": 1,
        "identity_key": _b64(os.urandom(32)),
        "signing_key": _b64(bytes(key.verify_key)),
        "signed_prekey": {
            "key_id": 1,
            "public_key": _b64(prekey),
            "signature": _b64(key.sign(prekey).signature),
        },
    }


async def register(http: httpx.AsyncClient, url: str) -> Person:
    """A new person."""
    key = SigningKey.generate()
    answer = await http.post(
        f"{url}/api/v1/auth/register",
        json={
            "username": f"b{uuid4().hex[:24]}",
            "password": "a password of the bench",
            "device": device_document(key),
        },
    )
    answer.raise_for_status()
    session = answer.json()
    return Person(session["user_id"], session["device_id"], session["access_token"], key)


async def register_many(url: str, count: int, width: int = 8) -> list[Person]:
    """`count` new people."""
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=width)) as http:
        return await gather_bounded([lambda: register(http, url)] * count, width)


async def open_conversation(http: httpx.AsyncClient, url: str, owner: Person, others: list[Person]) -> str:
    """A direct conversation for one other, a group for several; its id."""
    answer = await http.post(
        f"{url}/api/v1/conversations",
        json={
            "type": "direct" if len(others) == 1 else "group",
            "member_ids": [other.user_id for other in others],
        },
        headers={"Authorization": f"Bearer {owner.token}"},
    )
    answer.raise_for_status()
    return str(answer.json()["id"])


def signed_payload(
    sender: Person, conversation: str, devices: list[str] | None, *, client_id: UUID | None = None
) -> tuple[str, bytes]:
    """A `new_message` payload: `(client_id, JSON)`. With `devices`, one envelope each; else one shared ciphertext."""
    client_id = client_id or uuid4()
    body = _b64(os.urandom(CONTENT_BYTES))
    content: dict[str, Any] = (
        {"ciphertext": body}
        if devices is None
        else {"envelopes": {device: {"type": "message", "body": body} for device in devices}}
    )
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(
        b"whispr-message-v1" + UUID(conversation).bytes + client_id.bytes + hashlib.sha256(canonical).digest()
    ).digest()
    payload = {
        "client_id": str(client_id),
        "message_type": "text",
        "content": content,
        "signature": _b64(sender.signing_key.sign(digest).signature),
    }
    return str(client_id), json.dumps(payload, separators=(",", ":")).encode()


class Refused(RuntimeError):
    """The server answered a join or push with an error; `reason` is its code."""

    def __init__(self, event: str, topic: str, reply: dict[str, Any]) -> None:
        super().__init__(f"{event} of {topic} refused: {reply}")
        self.reason = reply["response"].get("reason")


class Device(WSListener):
    """One socket. `on_frame` sees each text frame's bytes; joins are awaited, everything else is up to the scenario."""

    def __init__(self) -> None:
        self.transport: WSTransport | None = None
        self.on_frame: Callable[[bytes], None] | None = None
        self.close_code = 0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._replies: dict[bytes, asyncio.Future[bytes]] = {}
        self._pushes = 0

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.TEXT:
            data = frame.get_payload_as_bytes()
            if self._replies and b'"phx_reply"' in data[:160]:
                waiting = self._replies.pop(data.split(b'"', 4)[3], None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(data)
                    return
            if self.on_frame is not None:
                self.on_frame(data)
        elif frame.msg_type == WSMsgType.CLOSE:
            self.close_code = frame.get_close_code().value
            transport.send_close(frame.get_close_code())
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def send(self, frame: bytes) -> None:
        """Send one text frame."""
        assert self.transport is not None
        self.transport.send(WSMsgType.TEXT, frame)

    def send_raw(self, frame: bytes) -> None:
        """Send what `client_frame` made, with the rest of what this turn of the loop sends."""
        assert self.transport is not None
        self.transport.underlying_transport.write(frame)

    async def join(
        self, topic: str, ref: str, timeout: float = 60, params: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Join `topic` with `ref` as its join_ref; the reply's response. Raises `Refused`."""
        return await self._ask(ref, topic, "phx_join", params or {}, timeout)

    async def push(
        self, topic: str, event: str, payload: dict[str, Any], timeout: float = 60
    ) -> dict[str, Any]:
        """Push on a topic joined as "1"; the reply's response. Raises `Refused`."""
        self._pushes += 1
        return await self._ask(f"p{self._pushes}", topic, event, payload, timeout)

    async def _ask(
        self, ref: str, topic: str, event: str, payload: dict[str, Any], timeout: float
    ) -> dict[str, Any]:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._replies[ref.encode()] = answer
        join_ref = ref if event == "phx_join" else "1"
        self.send(f'["{join_ref}","{ref}","{topic}","{event}",{json.dumps(payload)}]'.encode())
        reply = json.loads(await asyncio.wait_for(answer, timeout))[4]
        if reply["status"] != "ok":
            raise Refused(event, topic, reply)
        response: dict[str, Any] = reply["response"]
        return response

    def drop(self) -> None:
        """Cut the connection without a goodbye."""
        if self.transport is not None:
            self.transport.disconnect(graceful=False)


def client_frame(message: bytes) -> bytes:
    """A whole text frame of a client, made before its clock starts. The mask is zero, which leaves the message as it is."""
    size = len(message)
    length = b"%c" % (128 | size) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return b"\x81" + length + bytes(4) + message


async def connect(url: str, token: str, local_address: str | None = None) -> Device:
    """A connected device. `local_address` spreads connections over 127.0.0.0/8, or ports would run out.

    Raises OSError or picows.WSError when the server does not take it.
    """
    place: dict[str, Any] = {"local_addr": (local_address, 0)} if local_address else {}
    _, device = await ws_connect(
        Device,
        f"{url}?vsn=2.0.0&token={token}",
        websocket_handshake_timeout=60,
        read_buffer_init_size=1024,
        **place,
    )
    if not isinstance(device, Device):
        raise ConnectionResetError("the server cut the connection off before it was made")
    return device
