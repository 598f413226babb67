"""A device that does not read is cut off before it costs memory, and gets what it missed when it comes back."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Iterator
from urllib.parse import urlsplit

from tests.services.messaging.line import Line
from tests.services.messaging.test_channels import conversation, message, new_door
from tests.stack import Node, Person, Stack

from whispr.kit.channels.core import Limits
from whispr.kit.channels.metrics import stats

TEXT, CLOSE = 1, 8
CONTENT = 60_000
KERNEL_BYTES = 8 * 2**20
"""What the kernel's own buffers of both ends may hold at most."""


class Deaf:
    """A connection that joins a conversation and then does not read until it is told to."""

    def __init__(self, node: Node, person: Person) -> None:
        parts = urlsplit(node.socket_url)
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect((parts.hostname, parts.port))
        self._socket.sendall(
            f"GET {parts.path}?vsn=2.0.0&token={person.token} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )

    def join(self, topic: str) -> None:
        frame = json.dumps(["1", "1", topic, "phx_join", {}]).encode()
        self._socket.sendall(bytes([0x81, 0x80 | len(frame)]) + bytes(4) + frame)

    def everything(self) -> list[tuple[int, bytes]]:
        """All frames until the end of the connection. Blocks."""
        self._socket.settimeout(20)
        data = bytearray()
        while chunk := self._socket.recv(1 << 16):
            data += chunk
        self._socket.close()
        return list(_frames(bytes(data).partition(b"\r\n\r\n")[2]))


def _frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 2 <= len(data):
        size, header = data[at + 1] & 127, 2
        if size == 126:
            (size,), header = struct.unpack_from(">H", data, at + 2), 4
        elif size == 127:
            (size,), header = struct.unpack_from(">Q", data, at + 2), 10
        yield data[at] & 15, data[at + header : at + header + size]
        at += header + size


async def test_a_device_that_does_not_read_is_cut_off_and_recovers_by_cursor(stack: Stack) -> None:
    anna, ben = await new_door(stack), await new_door(stack)
    topic_id = await anna.group(ben)
    topic = conversation(topic_id)
    line = await Line.open(stack.messaging, anna.person)
    epoch = (await line.join(topic))["epoch"]
    deaf = Deaf(stack.messaging, ben.person)
    deaf.join(topic)
    # Presence tells that the deaf device is in; what is sent from now on is pushed to it.
    await line.find(topic, lambda event, payload: event == "presence_diff" and ben.id in payload["joins"])

    cut_off, sent = stats.closes[1013], 0
    while stats.closes[1013] == cut_off:
        sent += 1
        assert sent * CONTENT < Limits().max_write_buffer + KERNEL_BYTES, "it is kept for all the same"
        await line.push(topic, "new_message", message(anna, topic_id, "x" * CONTENT))

    frames = await asyncio.to_thread(deaf.everything)
    kind, payload = frames[-1]
    assert (kind, struct.unpack_from(">H", payload)[0]) == (CLOSE, 1013)
    pushed = [json.loads(payload) for kind, payload in frames if kind == TEXT]
    seqs = [frame[4]["seq"] for frame in pushed if frame[3] == "new_message"]
    assert seqs == list(range(1, len(seqs) + 1)), "what it did get has no hole"
    assert len(seqs) < sent

    again = await Line.open(stack.messaging, ben.person)
    reply = await again.join(topic, {"cursor": {"epoch": epoch, "seq": seqs[-1]}})
    while True:
        seqs += [event["seq"] for event in reply["events"]]
        if not reply["more"]:
            break
        reply = await again.push(topic, "sync", {"after_seq": seqs[-1]})
    assert seqs == list(range(1, sent + 1))
    await line.close()
    await again.close()
