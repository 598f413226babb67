"""Properties of the frame parser and encoders."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from whispr.kit.channels import wire

SERIALIZERS: list[wire.Serializer] = [wire.V1, wire.V2]

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=wire.MAX_NAME)
refs = st.none() | names
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | names,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
short_names = names.filter(lambda name: len(name.encode()) <= wire.MAX_NAME)

frame_like = st.lists(json_values, max_size=8) | st.dictionaries(
    st.sampled_from(["topic", "event", "payload", "ref", "join_ref", "other"]), json_values
)


def survives(parse: Any, data: bytes) -> None:
    """Whatever the bytes, there is a frame whose payload can be passed on, or the one exception."""
    try:
        frame = parse(data)
    except wire.MalformedFrame as error:
        for name in (error.join_ref, error.ref, error.topic):
            assert name is None or len(name) <= wire.MAX_NAME
        wire.encode_payload({"detail": error.reason, "ref": error.ref, "topic": error.topic})
        return
    assert isinstance(frame.topic, str)
    assert isinstance(frame.event, str)


@given(st.binary(max_size=400))
@example(b"")
@example(b"[" * 5000)
@example(b'["1","2","t","e",' + b'{"a":' * 5000)
@example(b'["1","2","t","e","\xff"]')
@example(b'["1","2","t","e","\\ud800"]')
@example(b'["1","2","\\ud800","e",{}]')
@example(b"[null,null,null,null,null]")
def test_any_bytes(data: bytes) -> None:
    for serializer in SERIALIZERS:
        survives(serializer.decode, data)
        survives(serializer.decode_binary, data)
        serializer.heartbeat_answer(data)


@given(frame_like, st.data())
def test_almost_frames(value: Any, data: st.DataObject) -> None:
    text = json.dumps(value, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass")
    cut = data.draw(st.integers(0, len(text)))
    noise = data.draw(st.binary(max_size=3))
    for serializer in SERIALIZERS:
        survives(serializer.decode, text)
        survives(serializer.decode, text[:cut] + noise + text[cut:])
        survives(serializer.decode, text[:cut])


@given(refs, refs, names, names, json_values)
def test_frames_of_version_2_are_read_as_json_reads_them(
    join_ref: str | None, ref: str | None, topic: str, event: str, payload: Any
) -> None:
    for ascii_only in (True, False):
        text = json.dumps([join_ref, ref, topic, event, payload], ensure_ascii=ascii_only).encode()
        frame = wire.V2.decode(text)
        assert (frame.join_ref, frame.ref, frame.topic, frame.event) == (join_ref, ref, topic, event)
        assert json.loads(bytes(frame.payload)) == payload


@given(refs, refs, names, names, json_values)
def test_frames_of_version_1_are_read_as_json_reads_them(
    join_ref: str | None, ref: str | None, topic: str, event: str, payload: Any
) -> None:
    whole = {"topic": topic, "event": event, "payload": payload, "ref": ref, "join_ref": join_ref}
    frame = wire.V1.decode(json.dumps(whole).encode())
    assert (frame.join_ref, frame.ref, frame.topic, frame.event) == (join_ref, ref, topic, event)
    assert json.loads(bytes(frame.payload)) == payload


@given(st.binary(max_size=200))
def test_a_payload_that_passes_is_json_that_others_can_read(data: bytes) -> None:
    text = b'["1","2","t","e",' + data + b"]"
    try:
        frame = wire.V2.decode(text)
    except wire.MalformedFrame:
        return
    json.loads(bytes(frame.payload).decode())


@given(refs, names, names, names, json_values, st.sampled_from(["ok", "error"]))
def test_what_is_sent_is_json(
    join_ref: str | None, ref: str, topic: str, event: str, payload: Any, status: str
) -> None:
    body = wire.encode_payload({"value": payload})
    value = {"value": payload}
    two = wire.V2
    assert json.loads(two.head(join_ref) + two.tail(topic, event, body)) == [
        join_ref,
        None,
        topic,
        event,
        value,
    ]
    reply = {"status": status, "response": value}
    assert json.loads(two.reply(join_ref, ref, topic, status, body)) == [
        join_ref,
        ref,
        topic,
        "phx_reply",
        reply,
    ]
    assert json.loads(two.control(join_ref, topic, event, body)) == [join_ref, join_ref, topic, event, value]
    one = wire.V1
    assert json.loads(one.head(join_ref) + one.tail(topic, event, body)) == {
        "topic": topic,
        "event": event,
        "payload": value,
        "ref": None,
    }
    assert json.loads(one.reply(join_ref, ref, topic, status, body)) == {
        "topic": topic,
        "event": "phx_reply",
        "payload": reply,
        "ref": ref,
    }


@given(short_names, short_names, short_names, short_names, st.binary(max_size=50))
def test_binary_frames_are_read_as_phoenix_js_writes_them(
    join_ref: str, ref: str, topic: str, event: str, data: bytes
) -> None:
    encoded = [name.encode() for name in (join_ref, ref, topic, event)]
    frame = wire.V2.decode_binary(bytes([0, *map(len, encoded)]) + b"".join(encoded) + data)
    assert (frame.join_ref or "", frame.ref or "", frame.topic, frame.event) == (join_ref, ref, topic, event)
    assert bytes(frame.payload) == data


@given(st.binary(max_size=20))
def test_heartbeats_found_by_their_bytes_are_heartbeats(ref: bytes) -> None:
    text = b'[null,"%b","phoenix","heartbeat",{}]' % ref
    answer = wire.V2.heartbeat_answer(text)
    if answer is not None:
        frame = wire.V2.decode(text)
        assert json.loads(answer)[1] == frame.ref
        assert (frame.join_ref, frame.topic, frame.event) == (None, "phoenix", "heartbeat")


@pytest.mark.parametrize("ref", ["1", "987654321", "a7"])
def test_common_heartbeats_need_no_parsing(ref: str) -> None:
    assert wire.V2.heartbeat_answer(f'[null,"{ref}","phoenix","heartbeat",{{}}]'.encode()) is not None


@pytest.mark.parametrize(
    "text", ['[null,"1"],["2","phoenix","heartbeat",{}]', '["1","1","phoenix","heartbeat",{}]']
)
def test_what_only_looks_like_a_heartbeat(text: str) -> None:
    assert wire.V2.heartbeat_answer(text.encode()) is None


def test_binary_names_over_255_bytes_are_refused() -> None:
    long = "é" * 128
    with pytest.raises(ValueError, match="255 bytes"):
        wire.binary_push("1", long, "e", b"")
    with pytest.raises(ValueError, match="255 bytes"):
        wire.binary_reply("1", "2", long, "ok", b"")
    with pytest.raises(ValueError, match="255 bytes"):
        wire.binary_broadcast("t", long, b"")


def test_payloads() -> None:
    assert wire.encode_payload(None) == b"{}"
    assert wire.encode_payload(b'{"a":1}') == b'{"a":1}'
    assert wire.encode_payload(msgspec.Raw(b'{"a":1}')) == b'{"a":1}'
    assert wire.encode_payload({"a": 1}) == b'{"a":1}'
    frame = wire.V2.decode(b'[null,null,"t","e",{"deep": [1]}]')
    assert wire.encode_payload(frame.payload) == b'{"deep": [1]}'
