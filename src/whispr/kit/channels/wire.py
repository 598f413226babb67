"""Phoenix Channels frames, both serializer versions: bytes in, `Frame` out, and back.

Version 2 is a JSON array `[join_ref, ref, topic, event, payload]` or one of three binary layouts; version 1 is a JSON
object without binary frames. The payload is never parsed here: it travels as `msgspec.Raw`, checked to be well-formed
JSON in valid UTF-8, because a payload passed on unparsed would otherwise end the connection of whoever receives it.

A frame that goes to many is split: the *tail* (topic, event, payload) is encoded once, the *head* carries the join_ref
of each recipient.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Protocol

import msgspec

KIND_PUSH: Final = 0
KIND_REPLY: Final = 1
KIND_BROADCAST: Final = 2

MAX_NAME: Final = 255
"""Refs, topics and events are at most this long, in characters of a text frame and in bytes of a binary one."""

EMPTY_OBJECT: Final = b"{}"

_Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]

_encode = msgspec.json.encode

_STATUS: Final = {status: b',{"status":"%b","response":' % status.encode() for status in ("ok", "error")}


class Frame(msgspec.Struct, array_like=True, gc=False):
    """A frame from a client. `payload` is unparsed JSON, or the raw bytes of a binary frame."""

    join_ref: _Name | None
    ref: _Name | None
    topic: _Name
    event: _Name
    payload: msgspec.Raw


class _ObjectFrame(msgspec.Struct, gc=False):
    topic: _Name
    event: _Name
    payload: msgspec.Raw = msgspec.Raw(EMPTY_OBJECT)
    ref: _Name | None = None
    join_ref: _Name | None = None


class MalformedFrame(Exception):
    """These bytes are no frame. `ref`, `join_ref` and `topic` are set as far as they could be made out."""

    def __init__(
        self, reason: str, *, join_ref: str | None = None, ref: str | None = None, topic: str | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.join_ref = join_ref
        self.ref = ref
        self.topic = topic


class Serializer(Protocol):
    """One version of the wire. `binary` tells whether it has binary frames."""

    @property
    def vsn(self) -> str: ...
    @property
    def binary(self) -> bool: ...

    def heartbeat_answer(self, data: bytes) -> bytes | None:
        """The answer if `data` is a heartbeat in the form clients send, found without parsing; else None."""

    def decode(self, data: bytes) -> Frame:
        """A text frame. Raises `MalformedFrame` and nothing else."""

    def decode_binary(self, data: bytes) -> Frame:
        """A binary frame. Raises `MalformedFrame` and nothing else."""

    def head(self, join_ref: str | None) -> bytes:
        """What one recipient's frame starts with."""

    def tail(self, topic: str, event: str, payload: bytes) -> bytes:
        """The rest of it, the same for all recipients. `payload` is JSON text."""

    def reply(self, join_ref: str | None, ref: str, topic: str, status: str, response: bytes) -> bytes:
        """A whole `phx_reply`. `status` is "ok" or "error", `response` JSON text of an object."""

    def control(self, join_ref: str | None, topic: str, event: str, payload: bytes) -> bytes:
        """A whole `phx_close` or `phx_error`: its ref is the join_ref."""


def _decode_text(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    # msgspec skips over raw values without looking at their encoding.
    if not data.isascii():
        data.decode()
    return decoder.decode(data)


# The parser recurses over nested values and gives up with RecursionError; text that is no UTF-8 raises a ValueError.
_PARSE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def _text(name: bytes | None) -> str | None:
    if name is None:
        return None
    try:
        return name.decode()
    except UnicodeDecodeError:
        return None


class ArraySerializer:
    """Version 2.0: arrays, and binary frames."""

    vsn: Final = "2.0.0"
    binary: Final = True

    _frames: Final = msgspec.json.Decoder(Frame)
    # Finds refs and topic in front of a payload that does not parse.
    _start: Final = re.compile(
        rb'\s*\[\s*(?:null|"([^"\\]{0,255})")\s*,\s*(?:null|"([^"\\]{0,255})")\s*(?:,\s*"([^"\\]{0,255})")?'
    )

    _BEAT_HEAD: Final = b'[null,"'
    _BEAT_TAIL: Final = b'","phoenix","heartbeat",{}]'
    _BEAT_ANSWER: Final = b'","phoenix","phx_reply",{"status":"ok","response":{}}]'

    def heartbeat_answer(self, data: bytes) -> bytes | None:
        if data.endswith(self._BEAT_TAIL) and data.startswith(self._BEAT_HEAD):
            ref = data[len(self._BEAT_HEAD) : -len(self._BEAT_TAIL)]
            if ref.isalnum() and len(ref) <= MAX_NAME:
                return self._BEAT_HEAD + ref + self._BEAT_ANSWER
        return None

    def decode(self, data: bytes) -> Frame:
        try:
            frame: Frame = _decode_text(self._frames, data)
        except _PARSE_ERRORS as error:
            raise self._malformed(data, error) from None
        return frame

    def _malformed(self, data: bytes, error: Exception) -> MalformedFrame:
        match = self._start.match(data)
        if match is None:
            return MalformedFrame(f"{error}")
        join_ref, ref, topic = map(_text, match.groups())
        return MalformedFrame(f"{error}", join_ref=join_ref, ref=ref, topic=topic)

    def decode_binary(self, data: bytes) -> Frame:
        if len(data) < 5 or data[0] != KIND_PUSH:
            raise MalformedFrame("a binary frame starts with kind 0 and four sizes")
        names: list[str] = []
        start = 5
        for size in data[1:5]:
            end = start + size
            if end > len(data):
                raise MalformedFrame("a binary frame ends inside its header")
            try:
                names.append(data[start:end].decode())
            except UnicodeDecodeError:
                raise MalformedFrame("the header of a binary frame is no UTF-8") from None
            start = end
        join_ref, ref, topic, event = names
        return Frame(join_ref or None, ref or None, topic, event, msgspec.Raw(data[start:]))

    def head(self, join_ref: str | None) -> bytes:
        return b"[null,null," if join_ref is None else b"[%b,null," % _encode(join_ref)

    def tail(self, topic: str, event: str, payload: bytes) -> bytes:
        return b"%b,%b,%b]" % (_encode(topic), _encode(event), payload)

    def reply(self, join_ref: str | None, ref: str, topic: str, status: str, response: bytes) -> bytes:
        start = _encode((join_ref, ref, topic, "phx_reply"))[:-1]
        return b"".join((start, _STATUS[status], response, b"}]"))

    def control(self, join_ref: str | None, topic: str, event: str, payload: bytes) -> bytes:
        encoded = _encode(join_ref)
        return b"[%b,%b,%b,%b,%b]" % (encoded, encoded, _encode(topic), _encode(event), payload)


class ObjectSerializer:
    """Version 1.0: objects. Join refs are accepted and never sent."""

    vsn: Final = "1.0.0"
    binary: Final = False

    _frames: Final = msgspec.json.Decoder(_ObjectFrame)

    def heartbeat_answer(self, data: bytes) -> bytes | None:
        return None

    def decode(self, data: bytes) -> Frame:
        try:
            frame: _ObjectFrame = _decode_text(self._frames, data)
        except _PARSE_ERRORS as error:
            raise MalformedFrame(f"{error}") from None
        return Frame(frame.join_ref, frame.ref, frame.topic, frame.event, frame.payload)

    def decode_binary(self, data: bytes) -> Frame:
        raise MalformedFrame("version 1.0 has no binary frames")

    def head(self, join_ref: str | None) -> bytes:
        return b""

    def tail(self, topic: str, event: str, payload: bytes) -> bytes:
        return b'{"topic":%b,"event":%b,"payload":%b,"ref":null}' % (_encode(topic), _encode(event), payload)

    def reply(self, join_ref: str | None, ref: str, topic: str, status: str, response: bytes) -> bytes:
        return b'{"topic":%b,"event":"phx_reply","payload":{"status":"%b","response":%b},"ref":%b}' % (
            _encode(topic),
            status.encode(),
            response,
            _encode(ref),
        )

    def control(self, join_ref: str | None, topic: str, event: str, payload: bytes) -> bytes:
        return b'{"topic":%b,"event":%b,"payload":%b,"ref":%b}' % (
            _encode(topic),
            _encode(event),
            payload,
            _encode(join_ref),
        )


V1: Final = ObjectSerializer()
V2: Final = ArraySerializer()

DEFAULT_VSN: Final = "1.0.0"
"""A client that names no version means this one."""

_VSN = re.compile(r"([12])\.0\.\d{1,4}", re.ASCII)


def serializer_for(vsn: str) -> Serializer | None:
    """The serializer of a client's `vsn`, None for a version that is not spoken here."""
    match = _VSN.fullmatch(vsn)
    if match is None:
        return None
    return V1 if match[1] == "1" else V2


def encode_payload(payload: Any) -> bytes:
    """JSON text of a payload. Bytes and `msgspec.Raw` are JSON text already; None is the empty object."""
    if isinstance(payload, bytes):
        return payload
    if payload is None:
        return EMPTY_OBJECT
    if isinstance(payload, msgspec.Raw):
        return bytes(payload)
    return _encode(payload)


def _sized(*names: str) -> tuple[bytes, bytes]:
    encoded = [name.encode() for name in names]
    for name in encoded:
        if len(name) > MAX_NAME:
            raise ValueError("refs, topics and events of binary frames have at most 255 bytes")
    return bytes(map(len, encoded)), b"".join(encoded)


def binary_push(join_ref: str, topic: str, event: str, data: bytes) -> bytes:
    """A push of the server to one channel (kind 0, without a ref). Raises ValueError for names over 255 bytes."""
    sizes, names = _sized(join_ref, topic, event)
    return b"%c%b%b%b" % (KIND_PUSH, sizes, names, data)


def binary_reply(join_ref: str | None, ref: str, topic: str, status: str, data: bytes) -> bytes:
    """A reply with bytes (kind 1). Raises ValueError for names over 255 bytes."""
    sizes, names = _sized(join_ref or "", ref, topic, status)
    return b"%c%b%b%b" % (KIND_REPLY, sizes, names, data)


def binary_broadcast(topic: str, event: str, data: bytes) -> bytes:
    """A push without a join_ref (kind 2). Raises ValueError for names over 255 bytes."""
    sizes, names = _sized(topic, event)
    return b"%c%b%b%b" % (KIND_BROADCAST, sizes, names, data)
