"""The frames of the channel protocol, byte by byte, in both directions.

The vectors follow the ones in Phoenix' own tests (serializer_test.js, v2_json_serializer_test.exs): a change here is a change that
clients in the field would notice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from whispr.kit.channels import wire

VECTORS = json.loads(Path(__file__).with_name("frames.json").read_text(encoding="utf-8"))


def by_name(vector: dict[str, Any]) -> str:
    return str(vector["name"])


def serializer(vector: dict[str, Any]) -> wire.Serializer:
    found = wire.serializer_for(vector["vsn"])
    assert found is not None
    return found


@pytest.mark.parametrize("vector", VECTORS["from_client"], ids=by_name)
def test_from_client(vector: dict[str, Any]) -> None:
    if "hex" in vector:
        frame = serializer(vector).decode_binary(bytes.fromhex(vector["hex"]))
    else:
        frame = serializer(vector).decode(vector["text"].encode())
    assert [frame.join_ref, frame.ref, frame.topic, frame.event, bytes(frame.payload).decode()] == vector[
        "frame"
    ]


@pytest.mark.parametrize("vector", VECTORS["to_client"], ids=by_name)
def test_to_client(vector: dict[str, Any]) -> None:
    wired = serializer(vector)
    match vector:
        case {"reply": [join_ref, ref, topic, status, response]}:
            made: bytes | None = wired.reply(join_ref, ref, topic, status, response.encode())
        case {"push": [join_ref, topic, event, payload]}:
            made = wired.head(join_ref) + wired.tail(topic, event, payload.encode())
        case {"control": [join_ref, topic, event, payload]}:
            made = wired.control(join_ref, topic, event, payload.encode())
        case {"heartbeat": text}:
            made = wired.heartbeat_answer(text.encode())
        case {"binary_push": [join_ref, topic, event, data]}:
            made = wire.binary_push(join_ref, topic, event, data.encode())
        case {"binary_reply": [join_ref, ref, topic, status, data]}:
            made = wire.binary_reply(join_ref, ref, topic, status, data.encode())
        case {"binary_broadcast": [topic, event, data]}:
            made = wire.binary_broadcast(topic, event, data.encode())
        case _:
            pytest.fail(f"a vector of no known kind: {vector}")
    assert made == (bytes.fromhex(vector["hex"]) if "hex" in vector else vector["text"].encode())
