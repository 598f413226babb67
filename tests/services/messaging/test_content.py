"""The canonical form of content is what every client computes, for everything that is accepted."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.services.messaging.rooms import Device

from whispr.services.messaging.models import (
    MAX_CONTENT_BYTES,
    BadSignature,
    ContentTooLarge,
    InvalidContent,
    InvalidMessageType,
)
from whispr.services.messaging.service import signatures
from whispr.services.messaging.service.content import canonical_json, parse
from whispr.services.messaging.service.signatures import SignatureChecker

bodies = st.binary(min_size=1, max_size=60).map(lambda data: base64.b64encode(data).decode())
envelopes = st.fixed_dictionaries(
    {"type": st.sampled_from(["prekey", "message", "sender_key"]), "body": bodies},
    optional={"registration_id": st.integers(1, 16380)},
)
contents = st.one_of(
    st.fixed_dictionaries({"ciphertext": bodies}),
    st.fixed_dictionaries({"envelopes": st.dictionaries(st.uuids().map(str), envelopes, max_size=5)}),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | bodies,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["ciphertext", "envelopes", "type", "body"]) | st.uuids().map(str), inner
        )
    ),
    max_leaves=8,
)


def reference(value: Any) -> bytes:
    """Canonical JSON as contracts.md tells clients to make it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def escaped(text: str) -> str:
    """The same JSON strings spelled with an escape for every character."""
    return "".join(f"\\u{ord(character):04x}" for character in text)


@given(content=contents, indent=st.sampled_from([None, 1]), shuffled=st.booleans())
def test_canonical_form_is_the_sorted_compact_one(content: Any, indent: int | None, shuffled: bool) -> None:
    sent = {key: content[key] for key in reversed(list(content))} if shuffled else content
    assert canonical_json(json.dumps(sent, indent=indent).encode())[0] == reference(content)


@given(body=bodies)
def test_escapes_do_not_change_the_canonical_form(body: str) -> None:
    written = f'{{"ciphertext":"{escaped(body)}"}}'.encode()
    assert canonical_json(written)[0] == reference({"ciphertext": body})


@given(value=json_values)
def test_whatever_is_accepted_has_the_canonical_form_everybody_computes(value: Any) -> None:
    """Also for JSON no client should send: either it is refused, or both sides hash the same bytes."""
    try:
        written = json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    try:
        canonical, _ = canonical_json(written)
    except InvalidContent:
        return
    assert canonical == reference(value)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        None,
        "text",
        {"ciphertext": None},
        {"ciphertext": ""},
        {"ciphertext": "a"},
        {"ciphertext": "YQ"},
        {"ciphertext": "YQ==\n"},
        {"ciphertext": "Y Q=="},
        {"ciphertext": "YQ==", "envelopes": {}},
        {"ciphertext": "YQ==", "envelopes": None},
        {"ciphertext": "YQ==", "more": 1},
        {"ciphertext": 1},
        {"envelopes": []},
        {"envelopes": {"x": {"type": "message", "body": "YQ=="}}},
        {"envelopes": {str(UUID(int=10)).upper(): {"type": "message", "body": "YQ=="}}},
        {"envelopes": {"{" + str(uuid4()) + "}": {"type": "message", "body": "YQ=="}}},
        {"envelopes": {str(uuid4()): {"type": "other", "body": "YQ=="}}},
        {"envelopes": {str(uuid4()): {"type": "message"}}},
        {"envelopes": {str(uuid4()): {"type": "message", "body": "é"}}},
        {"envelopes": {str(uuid4()): {"type": "message", "body": "YQ==", "x": 1}}},
        {"envelopes": {str(uuid4()): {"type": "message", "body": "YQ==", "registration_id": 0}}},
        {"envelopes": {str(uuid4()): {"type": "message", "body": "YQ==", "registration_id": 1.0}}},
    ],
)
def test_other_content_is_refused(content: Any) -> None:
    with pytest.raises(InvalidContent):
        canonical_json(json.dumps(content).encode())


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"ciphertext":"YQ=="', b"\xff", b"[" * 100_000, b'{"ciphertext":"\\ud800"}']
)
def test_broken_json_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidContent):
        canonical_json(content)


def test_size_is_that_of_the_canonical_form() -> None:
    device = Device(uuid4())
    frame = len(reference({"ciphertext": ""}))
    largest = "A" * ((MAX_CONTENT_BYTES - frame) // 4 * 4)
    parse(device.draft(uuid4(), {"ciphertext": largest}))
    with pytest.raises(ContentTooLarge):
        parse(device.draft(uuid4(), {"ciphertext": largest + "AAAA"}))


def test_message_type_and_length_of_signature() -> None:
    device = Device(uuid4())
    with pytest.raises(InvalidMessageType):
        parse(device.draft(uuid4(), message_type="poll"))
    with pytest.raises(BadSignature):
        parse(device.draft(uuid4(), signature=b"short"))


def test_signature_covers_conversation_client_id_and_content() -> None:
    device, conversation_id, client_id = Device(uuid4()), uuid4(), uuid4()
    content = {"ciphertext": "YWJj"}
    parsed = parse(device.draft(conversation_id, content, client_id=client_id))
    digest = sha256(reference(content)).digest()
    assert parsed.content_sha256 == digest
    assert (
        parsed.signed
        == sha256(b"whispr-message-v1" + conversation_id.bytes + client_id.bytes + digest).digest()
    )


@pytest.mark.parametrize("processes", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 8, 41])
async def test_only_the_bad_signatures_of_a_batch_are_named(count: int, processes: int) -> None:
    checker = SignatureChecker(processes)
    await checker.start()
    device, other = Device(uuid4()), Device(uuid4())
    drafts = [parse(device.draft(uuid4())) for _ in range(count)]
    claims = [(device.signing_key, one.signed, one.draft.signature) for one in drafts]
    claims[0] = (other.signing_key, *claims[0][1:])
    for _ in range(2):
        assert await checker.check(claims) == [False] + [True] * (count - 1)
    odd = [(b"short", b"x", b"y" * 64), (bytes(32), b"x" * 32, bytes(64))]
    assert await checker.check(odd * 4) == [False] * 8
    await checker.close()


async def test_helper_that_dies_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures, "_RETRY_SECONDS", 0.0)
    checker = SignatureChecker(1)
    await checker.start()
    claims = a_batch()
    assert await checker.check(claims) == [True] * 20
    helper = helper_of(checker)
    assert helper is not None
    helper.kill()
    assert await checker.check(claims) == [True] * 20
    assert helper_of(checker) is None
    assert await checker.check(claims) == [True] * 20
    await checker.start()
    again = helper_of(checker)
    assert again is not None
    assert again.pid != helper.pid
    assert await checker.check(claims) == [True] * 20
    await checker.close()
    assert again.returncode is not None


async def test_nobody_waits_for_a_helper_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = SignatureChecker(1)
    claims = a_batch()
    assert await checker.check(claims) == [True] * 20
    assert helper_of(checker) is None, "it is being started"
    await checker.start()
    assert helper_of(checker) is not None
    await checker.close()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    without = SignatureChecker(1)
    await without.start()
    assert await without.check(claims) == [True] * 20
    await without.close()


def helper_of(checker: SignatureChecker) -> asyncio.subprocess.Process | None:
    return checker._helpers[0]._process


def a_batch() -> list[tuple[bytes, bytes, bytes]]:
    device = Device(uuid4())
    parsed = parse(device.draft(uuid4()))
    return [(device.signing_key, parsed.signed, parsed.draft.signature)] * 20


def test_msgspec_sorts_as_python_does() -> None:
    value = {"é": 1, "z": 2, "Z": 3, "😀": 4, "\uffff": 5}
    assert msgspec.json.encode(value, order="sorted") == reference(value)
