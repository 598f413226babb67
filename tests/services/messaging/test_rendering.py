"""What clients see of the log comes from one encoder."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from uuid import UUID, uuid4

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from whispr.services.messaging.models import (
    CommittedEvent,
    Message,
    MessageHead,
    Reaction,
    edited_event,
    message_event,
    render_event,
    render_message,
    seen_above,
    split_content,
)


def message(content: bytes) -> Message:
    head = MessageHead(
        id=uuid4(),
        conversation_id=uuid4(),
        seq=7,
        sender_id=uuid4(),
        sender_device_id=uuid4(),
        client_id=uuid4(),
        message_type="text",
        signature=b"\xff\xfe",
        content_sha256=bytes(32),
        reply_to_id=None,
        media_ids=(),
        expires_in=None,
        sent_at=datetime(2026, 1, 2, 3, 4, 5, 678900, tzinfo=UTC),
        edited_at=None,
        is_deleted=False,
    )
    return Message(head, content)


def test_a_message_has_the_contracts_members_and_forms() -> None:
    body = json.loads(render_message(message(b'{"ciphertext":"QQ=="}'), uuid4()))
    assert list(body) == [
        "id",
        "conversation_id",
        "seq",
        "sender_id",
        "sender_device_id",
        "client_id",
        "message_type",
        "signature",
        "content_sha256",
        "reply_to_id",
        "media_ids",
        "expires_in",
        "sent_at",
        "edited_at",
        "is_deleted",
        "reactions",
        "content",
    ]
    assert (body["signature"], body["sent_at"]) == ("//4=", "2026-01-02T03:04:05.678900Z")
    assert body["content"] == {"ciphertext": "QQ=="}


@given(
    st.dictionaries(st.uuids(), st.fixed_dictionaries({"type": st.text(), "body": st.text()}), max_size=5),
    st.uuids(),
)
def test_a_device_gets_its_own_envelope_and_no_other(
    envelopes: dict[UUID, dict[str, str]], stranger: UUID
) -> None:
    stored = {"envelopes": {str(device): envelope for device, envelope in envelopes.items()}}
    content = split_content(json.dumps(stored).encode())
    for device, envelope in envelopes.items():
        assert json.loads(content.for_device(device)) == {"envelopes": {str(device): envelope}}
    if stranger not in envelopes:
        assert json.loads(content.for_device(stranger)) == {"envelopes": {}}


def test_events_carry_their_payload() -> None:
    device = uuid4()
    stored = message(b'{"ciphertext":"QQ=="}')
    event = json.loads(render_event(message_event(stored), device))
    assert event == {"seq": 7, "event": "new_message", "payload": json.loads(render_message(stored, device))}
    other = CommittedEvent(uuid4(), 3, "member_removed", b'{"seq":3}')
    assert json.loads(render_event(other, device)) == {
        "seq": 3,
        "event": "member_removed",
        "payload": {"seq": 3},
    }


def test_an_edit_holds_the_message_as_each_device_gets_it() -> None:
    one, two = uuid4(), uuid4()
    envelopes = {str(device): {"type": "message", "body": "QQ=="} for device in (one, two)}
    stored = message(json.dumps({"commitment": "Qg==", "envelopes": envelopes}).encode())
    stored = msgspec.structs.replace(
        stored,
        head=msgspec.structs.replace(
            stored.head, edited_device_id=two, reactions=(Reaction('"}', (one, two)),)
        ),
    )
    event = edited_event(9, stored)
    for device in (one, two, uuid4()):
        assert json.loads(render_event(event, device)) == {
            "seq": 9,
            "event": "message_edited",
            "payload": {"seq": 9, "message": json.loads(render_message(stored, device))},
        }


def test_an_edit_below_the_floor_shows_nothing() -> None:
    event = edited_event(9, message(b'{"ciphertext":"QQ=="}'))
    assert seen_above(event, 6) is event
    assert json.loads(render_event(seen_above(event, 7), uuid4())) == {
        "seq": 9,
        "event": "message_deleted",
        "payload": {
            "seq": 9,
            "message_id": json.loads(event.payload)["message"]["id"],
            "deleted_by": None,
        },
    }
    other = CommittedEvent(uuid4(), 3, "member_removed", b'{"seq":3}')
    assert seen_above(other, 7) is other
