"""Sealing and opening between devices: direct, simultaneous, lossy, reordered, reinstalled, groups, forgeries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.client.parties import Party, Sent, World
from whispr.client.crypto import franking
from whispr.client.crypto.engine import MAX_CONTENT, NOTHING, DistributionNeeded, Payload, UnknownSender
from whispr.client.crypto.padding import BLOCK, pad, unpad
from whispr.client.crypto.prekeys import KEEP_OLD, ROTATE_AFTER
from whispr.client.crypto.sender_keys import MAX_AGE
from whispr.client.crypto.sessions import PQXDH, X3DH, Handshake, PairwiseMessage
from whispr.client.crypto.signing import canonical_json
from whispr.client.encoding import decode_base64, encode_base64
from whispr.client.failures import BadBundle, TooManyDevices, Undecryptable
from whispr.client.models import Content, Envelope


def test_a_first_message_a_reply_and_a_conversation() -> None:
    world = World()
    alice, bob = world.party(), world.party()
    first = alice.text("hello", bob)
    assert first.types == {bob.device_id: "prekey"}
    assert bob.read(first) == "hello"
    reply = bob.text("hi", alice)
    assert reply.types == {alice.device_id: "message"}
    assert alice.read(reply) == "hi"
    assert alice.text("how are you?", bob).types == {bob.device_id: "message"}


def test_messages_stay_prekey_messages_until_the_peer_was_heard() -> None:
    world = World()
    alice, bob = world.party(), world.party()
    sent = [alice.text(str(n), bob) for n in range(3)]
    assert {kind for s in sent for kind in s.types.values()} == {"prekey"}
    assert [bob.read(s) for s in reversed(sent)] == ["2", "1", "0"]


def test_a_one_time_key_serves_once_and_none_is_needed() -> None:
    world = World()
    bob = world.party(one_time_keys=1)
    alice, carol = world.party(), world.party()
    with_key, without = alice.text("a", bob), carol.text("c", bob)
    assert world.claimed == [(bob.identity.identity_key, 1)]
    assert bob.engine.prekeys.one_time(1) is not None
    assert (bob.read(with_key), bob.read(without)) == ("a", "c")
    assert bob.engine.prekeys.one_time(1) is None


def test_a_replayed_first_message_is_refused_even_after_its_key_is_gone() -> None:
    world = World()
    alice, bob = world.party(), world.party()
    first = alice.text("once", bob)
    bob.read(first)
    with pytest.raises(Undecryptable) as refused:
        bob.read(first)
    assert refused.value.reason == "duplicate"


def test_both_begin_at_once_and_meet_on_one_session() -> None:
    world = World()
    alice, bob = world.party(), world.party()
    from_alice, from_bob = alice.text("a1", bob), bob.text("b1", alice)
    assert (bob.read(from_alice), alice.read(from_bob)) == ("a1", "b1")
    for n in range(4):
        assert bob.read(alice.text(f"a{n}", bob)) == f"a{n}"
        assert alice.read(bob.text(f"b{n}", alice)) == f"b{n}"
    one, other = alice.text("x", bob), bob.text("y", alice)
    tags = [decode_base64(next(iter(s.sealed.content["envelopes"].values()))["body"]) for s in (one, other)]
    assert tags[0][2:12] == tags[1][2:12]  # both send on the session with the same tag
    assert (bob.read(one), alice.read(other)) == ("x", "y")


def test_a_reinstalled_device_is_noticed_served_anew_and_told() -> None:
    world = World()
    alice, bob = world.party(), world.party()
    assert bob.read(alice.text("before", bob)) == "before"
    late = bob.text("late", alice)
    again = world.party(bob.user_id, bob.device_id)
    with alice.store.transaction():
        changes = alice.engine.learn(again.user_id, {again.device_id: world.claim(again.device_id)})
    assert [change.device_id for change in changes] == [bob.device_id]
    assert changes[0].old_fingerprint != changes[0].new_fingerprint
    sent = alice.text("after", again)
    assert sent.types == {bob.device_id: "prekey"}
    assert again.read(sent) == "after"
    # What the old installation had sent still opens and verifies with its old keys.
    assert alice.read(late) == "late"
    assert again.read(alice.text("more", again)) == "more"


def test_a_message_of_a_reinstalled_device_with_unknown_keys_asks_for_its_keys() -> None:
    world = World()
    alice, bob = world.party(), world.party()
    alice.read(bob.text("before", alice))
    again = world.party(bob.user_id, bob.device_id)
    sent = again.text("new keys", alice)
    with pytest.raises(UnknownSender) as unknown, alice.store.transaction():
        alice.engine.open(sent.message_for(alice.device_id))
    assert unknown.value.claimed is not None
    assert unknown.value.claimed.identity_key == again.identity.identity_key
    assert alice.read(sent) == "new keys"


def test_rotated_signed_prekeys_work_until_they_are_too_old() -> None:
    world = World()
    alice, bob, carol = world.party(), world.party(), world.party()
    early = alice.text("early", bob)
    too_late = carol.text("too late", bob)
    assert not bob.engine.prekeys.due()
    world.time += ROTATE_AFTER + 1
    assert bob.engine.prekeys.due()
    with bob.store.transaction():
        bob.engine.prekeys.rotate()
    assert bob.engine.prekeys.current().key_id == 2
    assert bob.read(early) == "early"
    world.time += KEEP_OLD + 1
    with bob.store.transaction():
        bob.engine.prekeys.rotate()
    assert bob.engine.prekeys.current().key_id == 3
    with pytest.raises(Undecryptable) as refused:
        bob.read(too_late)
    assert refused.value.reason == "unknown_prekey"


def test_nothing_moves_between_conversations_client_ids_devices_or_senders() -> None:
    world = World()
    alice, bob, carol = world.party(), world.party(), world.party()
    sent = alice.text("for bob", bob, carol)
    bob.learn(alice)
    good = sent.message_for(bob.device_id)
    envelope = sent.sealed.content["envelopes"][str(carol.device_id)]
    moved = [
        msgspec.structs.replace(good, conversation_id=uuid4()),
        msgspec.structs.replace(good, client_id=uuid4()),
        msgspec.structs.replace(good, content=Content(None, {str(bob.device_id): Envelope(**envelope)})),
        msgspec.structs.replace(good, signature=encode_base64(bytes(64))),
        msgspec.structs.replace(good, content_sha256=encode_base64(bytes(32))),
    ]
    for message in moved:
        with pytest.raises(Undecryptable), bob.store.transaction():
            bob.engine.open(message)
    with pytest.raises(UnknownSender), bob.store.transaction():
        bob.engine.open(msgspec.structs.replace(good, sender_id=uuid4()))
    assert bob.read(sent) == "for bob"


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["prekey", "message", "sender_key", "else"]))
def test_garbage_is_refused_and_harms_nothing(body: bytes, kind: str) -> None:
    # That one means that there is nothing in it for this device.
    assume({"type": kind, "body": encode_base64(body)} != NOTHING)
    world = World()
    alice, bob = world.party(), world.party()
    sent = alice.text("fine", bob)
    bob.learn(alice)
    message = sent.message_for(bob.device_id)
    envelopes = {str(bob.device_id): Envelope(kind, encode_base64(body))}
    with pytest.raises((Undecryptable, UnknownSender)), bob.store.transaction():
        bob.engine.open(msgspec.structs.replace(message, content=Content(None, envelopes)))
    assert bob.read(sent) == "fine"


def test_a_device_without_an_envelope_says_so() -> None:
    world = World()
    alice, bob, newcomer = world.party(), world.party(), world.party()
    sent = alice.text("before you came", bob)
    with pytest.raises(Undecryptable) as refused:
        newcomer.read(sent)
    assert refused.value.reason == "no_envelope"


def test_padding_hides_lengths() -> None:
    for size in (0, 1, BLOCK - 1, BLOCK, 1000):
        plain = b"\x80\x00" * size
        assert len(pad(plain)) % BLOCK == 0
        assert unpad(pad(plain)) == plain
    world = World()
    alice, bob = world.party(), world.party()
    sizes = {len(str(alice.text("x" * n, bob).sealed.content)) for n in (1, 45, 90)}
    assert len(sizes) == 1
    with pytest.raises(Undecryptable):
        unpad(bytes(160))


# Post-quantum


def test_a_post_quantum_one_time_key_serves_once_and_the_last_resort_always() -> None:
    world = World()
    bob = world.party(one_time_keys=1)
    senders = [world.party() for _ in range(3)]
    sent = [sender.text(str(n), bob) for n, sender in enumerate(senders)]
    last_resort = bob.engine.prekeys.last_resort().key_id
    used = [handshake_of(s, bob) for s in sent]
    assert [h.version for h in used] == [PQXDH] * 3
    assert [h.pq_prekey_id for h in used] == [last_resort + 1, last_resort, last_resort]
    assert [bob.read(s) for s in sent] == ["0", "1", "2"]
    assert bob.engine.prekeys.post_quantum(last_resort + 1) is None
    assert bob.engine.prekeys.post_quantum(last_resort) is not None
    assert all(s.engine.sessions.post_quantum(bob.device_id) for s in senders)
    assert all(bob.engine.sessions.post_quantum(s.device_id) for s in senders)


def test_a_device_without_post_quantum_keys_is_served_unless_they_are_required() -> None:
    world = World()
    old = world.party(post_quantum=False)
    alice, strict = world.party(), world.party(require_post_quantum=True)
    sent = alice.text("as before", old)
    assert (handshake_of(sent, old).version, handshake_of(sent, old).kem_ciphertext) == (X3DH, None)
    assert old.read(sent) == "as before"
    assert not alice.engine.sessions.post_quantum(old.device_id)
    with pytest.raises(BadBundle):
        strict.text("not without", old)
    assert strict.read(old.text("they offered one", strict)) == "they offered one"
    # A server that hides the strict device's KEM keys gets nothing opened.
    world.keys[strict.device_id].pq_last_resort = None
    world.keys[strict.device_id].pq_one_time = []
    with pytest.raises(Undecryptable) as refused:
        strict.read(alice.text("downgraded", strict))
    assert refused.value.reason == "not_post_quantum"


def test_a_session_from_before_post_quantum_goes_on() -> None:
    """Its stored handshake and its messages have six fields and no version."""
    world = World()
    alice, bob = world.party(), world.party(post_quantum=False)
    first = alice.text("first", bob)
    envelope = first.sealed.content["envelopes"][str(bob.device_id)]
    message, handshake = msgspec.msgpack.decode(decode_base64(envelope["body"]))
    first.sealed.content["envelopes"][str(bob.device_id)]["body"] = encode_base64(
        msgspec.msgpack.encode([message, handshake[:6]])
    )
    resigned = msgspec.structs.replace(
        first.sealed,
        signature=alice.engine.sign(world.conversation_id, first.client_id, first.sealed.content),
    )
    assert bob.read(Sent(alice, first.client_id, resigned)) == "first"
    raw = msgspec.msgpack.decode(alice.store.get("sessions", str(bob.device_id)) or b"")
    raw[0]["handshake"] = raw[0]["handshake"][:6]
    del raw[0]["post_quantum"]
    with alice.store.transaction():
        alice.store.save("sessions", str(bob.device_id), raw)
    assert bob.read(alice.text("second", bob)) == "second"
    assert alice.read(bob.text("reply", alice)) == "reply"


def test_post_quantum_keys_rotate_and_old_ones_open_what_was_on_its_way() -> None:
    world = World()
    alice, carol, bob = world.party(), world.party(), world.party(one_time_keys=0)
    early, too_late = alice.text("early", bob), carol.text("too late", bob)
    first = bob.engine.prekeys.last_resort().key_id
    world.time += ROTATE_AFTER + 1
    with bob.store.transaction():
        assert bob.engine.prekeys.rotate_last_resort().key_id > first
    assert bob.read(early) == "early"
    world.time += KEEP_OLD + 1
    with bob.store.transaction():
        bob.engine.prekeys.rotate_last_resort()
    with pytest.raises(Undecryptable) as refused:
        bob.read(too_late)
    assert refused.value.reason == "unknown_prekey"


def test_unknown_versions_of_the_agreement_and_half_of_one_are_refused() -> None:
    world = World()
    alice, bob = world.party(), world.party()
    sent = alice.text("fine", bob)
    envelope = sent.sealed.content["envelopes"][str(bob.device_id)]
    message, handshake = msgspec.msgpack.decode(decode_base64(envelope["body"]))
    for bad in (
        [*handshake[:6], 3, *handshake[7:]],
        handshake[:8],
        [*handshake[:6], X3DH],
        [*handshake[:8], b""],
    ):
        body = encode_base64(msgspec.msgpack.encode([message, bad]))
        content = {"envelopes": {str(bob.device_id): {**envelope, "body": body}}}
        sealed = msgspec.structs.replace(
            sent.sealed,
            content=content,
            signature=alice.engine.sign(world.conversation_id, sent.client_id, content),
        )
        with pytest.raises(Undecryptable):
            bob.read(Sent(alice, sent.client_id, sealed))
    assert bob.read(sent) == "fine"


def handshake_of(sent: Sent, recipient: Party) -> Handshake:
    body = sent.sealed.content["envelopes"][str(recipient.device_id)]["body"]
    handshake = PairwiseMessage.parse(decode_base64(body)).handshake
    assert handshake is not None
    return handshake


# Franking


@pytest.mark.parametrize("group", [False, True])
def test_a_recipient_can_prove_what_was_said_and_nothing_else(group: bool) -> None:
    world = World()
    alice, bob, carol = world.party(), world.party(), world.party()
    said = Payload("poll", data={"b": [1, 2.5, None], "a": uuid4(), "raw": b"bytes", "at": datetime.now(UTC)})
    first = alice.text("first", bob, carol, group=group)
    assert (bob.read(first), carol.read(first)) == ("first", "first")
    for _ in range(2):
        sent = alice.seal(said, bob, carol, group=group)
        commitment = decode_base64(sent.sealed.content["commitment"])
        for reader in (bob, carol):
            opened = reader.open(sent)
            assert opened.franking_key is not None
            assert franking.matches(commitment, opened.franking_key, opened.plaintext())
            assert msgspec.json.decode(opened.plaintext())["data"]["b"] == [1, 2.5, None]
            other = Payload("poll", data={**opened.data, "b": [1]})
            assert not franking.matches(commitment, opened.franking_key, other.plaintext())
            # HMAC takes a short key and the same key with zeros behind it for one.
            assert not franking.matches(commitment, opened.franking_key + b"\0", opened.plaintext())
    assert franking.matches(franking.commit(bytes(32), b"x"), bytes(32), b"x")


def test_a_message_nobody_could_report_is_refused() -> None:
    world = World()
    alice, bob = world.party(), world.party()
    sent = alice.text("you will not prove this", bob)
    honest = sent.sealed.content
    for commitment in (
        encode_base64(franking.commit(bytes(32), b"else")),
        encode_base64(bytes(32)),
        "not base64",
    ):
        content = {**honest, "commitment": commitment}
        signature = alice.engine.sign(world.conversation_id, sent.client_id, content)
        sealed = msgspec.structs.replace(sent.sealed, content=content, signature=signature)
        with pytest.raises(Undecryptable) as refused:
            bob.open(Sent(alice, sent.client_id, sealed))
        assert refused.value.reason in ("bad_commitment", "malformed")
    assert bob.read(sent) == "you will not prove this"


# Groups


def test_a_group_gets_one_key_and_then_one_ciphertext() -> None:
    world = World()
    alice, *others = [world.party() for _ in range(5)]
    first = alice.text("with the key", *others, group=True)
    (key,) = first.keys
    assert set(key.types.values()) == {"prekey"}
    assert set(first.types.values()) == {"sender_key"}
    assert [p.read(first) for p in others] == ["with the key"] * 4
    second = alice.text("shared", *others, group=True)
    assert set(second.types.values()) == {"sender_key"}
    assert len({e["body"] for e in second.sealed.content["envelopes"].values()}) == 1
    third = alice.text("late one", *others, group=True)
    assert [p.read(third) for p in others] == ["late one"] * 4
    assert [p.read(second) for p in others] == ["shared"] * 4
    with pytest.raises(Undecryptable) as refused:
        others[0].read(second)
    assert refused.value.reason == "duplicate"


def test_an_unconfirmed_distribution_is_sent_again() -> None:
    world = World()
    alice, bob = world.party(), world.party()
    alice.seal(Payload("sender_key"), bob, group=True)  # the server never took this
    sent = alice.text("this it took", bob, group=True)
    assert [key.types for key in sent.keys] == [{bob.device_id: "prekey"}]
    assert bob.read(sent) == "this it took"
    assert bob.read(alice.text("next", bob, group=True)) == "next"


def test_a_newcomer_reads_on_but_not_back() -> None:
    world = World()
    alice, bob, carol = world.party(), world.party(), world.party()
    before = alice.text("before", bob, group=True)
    middle = alice.text("middle", bob, group=True)
    joined = alice.text("welcome", bob, carol, group=True)
    (key,) = joined.keys
    assert key.types == {bob.device_id: "sender_key", carol.device_id: "prekey"}
    assert carol.read(joined) == "welcome"
    assert [bob.read(s) for s in (before, middle, joined)] == ["before", "middle", "welcome"]
    # Even handed the older ciphertext by the server, the newcomer's chain begins later.
    stolen = middle.message_for(carol.device_id)
    body = middle.sealed.content["envelopes"][str(bob.device_id)]
    forged = msgspec.structs.replace(stolen, content=Content(None, {str(carol.device_id): Envelope(**body)}))
    with pytest.raises(Undecryptable), carol.store.transaction():
        carol.engine.open(forged)


@pytest.mark.parametrize("how", ["left", "reinstalled", "old chain"])
def test_the_key_is_replaced_when_a_holder_leaves(how: str) -> None:
    world = World()
    alice, bob, carol = world.party(), world.party(), world.party()
    first = alice.text("first", bob, carol, group=True)
    assert (bob.read(first), carol.read(first)) == ("first", "first")
    remaining = [bob]
    if how == "reinstalled":
        again = world.party(carol.user_id, carol.device_id)
        alice.learn(again)
        remaining.append(again)
    elif how == "old chain":
        world.time += MAX_AGE + 1
    after = alice.text("after", *remaining, group=True)
    (key,) = after.keys
    assert "sender_key" not in key.types.values()
    assert [party.read(after) for party in remaining] == ["after"] * len(remaining)
    later = alice.text("later", *remaining, group=True)
    body = later.sealed.content["envelopes"][str(bob.device_id)]
    leaked = msgspec.structs.replace(
        later.message_for(carol.device_id), content=Content(None, {str(carol.device_id): Envelope(**body)})
    )
    with pytest.raises(Undecryptable) as refused, carol.store.transaction():
        carol.engine.open(leaked)
    assert refused.value.reason == "no_sender_key"


def test_a_member_who_holds_the_chain_cannot_forge_for_its_owner() -> None:
    world = World()
    alice, bob, carol = world.party(), world.party(), world.party()
    first = alice.text("first", bob, carol, group=True)
    assert (bob.read(first), carol.read(first)) == ("first", "first")
    genuine = alice.text("genuine", bob, carol, group=True)
    body = genuine.sealed.content["envelopes"][str(bob.device_id)]["body"]
    chain_id, number, ciphertext, signature = msgspec.msgpack.decode(decode_base64(body))
    spoiled = ciphertext[:-1] + bytes([ciphertext[-1] ^ 1])
    tampered = msgspec.msgpack.encode([chain_id, number, spoiled, signature])
    forged = msgspec.structs.replace(
        genuine.message_for(bob.device_id),
        content=Content(None, {str(bob.device_id): Envelope("sender_key", encode_base64(tampered))}),
    )
    with pytest.raises(Undecryptable) as refused, bob.store.transaction():
        bob.engine.open(forged)
    assert refused.value.reason == "bad_signature"
    assert bob.read(genuine) == "genuine"


def test_long_texts_go_as_one_shared_ciphertext_once_everybody_holds_the_key() -> None:
    world = World()
    alice = world.party()
    others = [world.party() for _ in range(6)]
    long = "long " * 6000
    with pytest.raises(DistributionNeeded):
        alice.seal(Payload("text", long), *others, group=True)
    key = alice.seal(Payload("sender_key"), *others, group=True)
    alice.confirm(key)
    for party in others:
        assert party.open(key).kind == "sender_key"
    sent = alice.text(long, *others, group=True)
    assert set(sent.sealed.content) == {"ciphertext", "commitment"}
    assert [party.read(sent) for party in others] == [long] * 6
    # A direct conversation with many devices takes the same way out.
    direct = alice.text(long, *others)
    assert set(direct.sealed.content) == {"ciphertext", "commitment"}
    swapped = msgspec.structs.replace(sent.message_for(others[0].device_id), content=Content("AAAA"))
    with pytest.raises(Undecryptable):
        others[0].engine.open(swapped)


def test_a_sender_key_reaches_more_devices_than_one_message_can_carry_it_to() -> None:
    world = World()
    alice = world.party()
    others = [world.party(one_time_keys=1) for _ in range(60)]
    sent = alice.text("to all", *others, group=True)
    assert len(sent.keys) == 2
    for key in sent.keys:
        assert len(canonical_json(key.sealed.content)) <= MAX_CONTENT
        assert len(key.types) == len(others)
    assert set(sent.types.values()) == {"sender_key"}
    assert [party.read(sent) for party in others] == ["to all"] * 60


def test_what_an_old_installation_sent_late_leads_no_answer_astray() -> None:
    world = World()
    alice, bob = world.party(), world.party()
    assert bob.read(alice.text("hello", bob)) == "hello"
    late = world.party(bob.user_id, bob.device_id)
    alice.learn(late)
    on_its_way = late.text("sent before the next one took its place", alice)
    again = world.party(bob.user_id, bob.device_id)
    alice.learn(again)
    assert again.read(alice.text("to the new one", again)) == "to the new one"
    assert alice.read(on_its_way) == "sent before the next one took its place"
    assert again.read(alice.text("to the new one still", again)) == "to the new one still"


def test_keys_of_a_new_installation_are_asked_for_where_its_first_message_was_missed() -> None:
    world = World()
    alice, bob = world.party(), world.party()
    assert bob.read(alice.text("from the old one", bob)) == "from the old one"
    again = world.party(alice.user_id, alice.device_id)
    again.learn(bob)
    again.text("with the key, and lost", bob, group=True)
    second = again.text("without it", bob, group=True)
    with pytest.raises(UnknownSender), bob.store.transaction():
        bob.engine.open(second.message_for(bob.device_id))
    bob.learn(again)
    with pytest.raises(Undecryptable) as refused, bob.store.transaction():
        bob.engine.open(second.message_for(bob.device_id))
    assert refused.value.reason == "no_sender_key"


def test_a_key_that_somebody_may_have_missed_is_replaced_when_history_is_purged() -> None:
    world = World()
    alice, bob = world.party(), world.party()
    sent = alice.text("with the key", bob, group=True)
    with alice.store.transaction():
        alice.engine.sender_keys.purged(world.conversation_id, 0)
    assert alice.text("the same", bob, group=True).keys == []
    with alice.store.transaction():
        alice.engine.sender_keys.purged(world.conversation_id, 1)
    assert len(alice.text("another", bob, group=True).keys) == 1
    assert bob.read(sent) == "with the key"


def test_more_devices_than_one_message_can_carry_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    alice = world.party()
    others = [world.party() for _ in range(4)]
    monkeypatch.setattr("whispr.client.crypto.engine.MAX_CONTENT", 2000)
    with pytest.raises(TooManyDevices):
        alice.seal(Payload("sender_key"), *others, group=True)


# Random histories


@dataclass(frozen=True)
class Delivery:
    sent: Sent
    text: str
    recipient: Party


class History:
    """Four people's devices and what is on its way to each of them."""

    def __init__(self) -> None:
        self.world = World()
        self.parties = [self.world.party(one_time_keys=3) for _ in range(4)]
        self.boxes: list[list[Delivery]] = [[], [], [], []]
        self.counter = 0

    def send(self, who: int, pick: int) -> None:
        self._send(who, [[n for n in range(4) if n != who][pick % 3]], group=False)

    def group(self, who: int, pick: int) -> None:
        self._send(who, [n for n in range(4) if n != who], group=True)

    def deliver(self, who: int, pick: int) -> None:
        if self.boxes[who]:
            self.open(self.boxes[who].pop(0))

    def drop(self, who: int, pick: int) -> None:
        if self.boxes[who]:
            self.boxes[who].pop(pick % len(self.boxes[who]))

    def swap(self, who: int, pick: int) -> None:
        if self.boxes[who]:
            self.boxes[who].append(self.boxes[who].pop(pick % len(self.boxes[who])))

    def reinstall(self, who: int, pick: int) -> None:
        old = self.parties[who]
        self.parties[who] = self.world.party(old.user_id, old.device_id, one_time_keys=3)

    def open(self, delivery: Delivery) -> None:
        """A text opens for the installation it was made for, and for no other, with two exceptions named below."""
        party = self.world.parties[delivery.recipient.device_id]
        try:
            opened = party.read(delivery.sent)
        except Undecryptable as error:
            allowed = party is not delivery.recipient
            if error.reason in ("unknown_keys", "bad_signature"):
                # The sender was reinstalled since, and the recipient had never seen its old keys.
                allowed |= delivery.sent.sender is not self.world.parties[delivery.sent.sender.device_id]
            elif error.reason == "no_sender_key":
                # The message with the key was dropped or comes later.
                allowed |= delivery.sent.types[party.device_id] == "sender_key"
            if not allowed:
                raise
        else:
            assert (party, opened) == (delivery.recipient, delivery.text)
            with pytest.raises(Undecryptable):
                party.read(delivery.sent)

    def _send(self, who: int, others: list[int], *, group: bool) -> None:
        self.counter += 1
        sender, text = self.parties[who], f"m{self.counter}"
        recipients = [self.parties[n] for n in others]
        for recipient in recipients:
            known = sender.engine.directory.device(recipient.device_id)
            if known and known.current.identity_key != recipient.identity.identity_key:
                sender.learn(recipient)  # what the server's `stale` leads to
        sent = sender.text(text, *recipients, group=group)
        for number, recipient in zip(others, recipients, strict=True):
            self.boxes[number].append(Delivery(sent, text, recipient))


ACTIONS = [History.send, History.group, History.deliver, History.drop, History.swap, History.reinstall]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3), st.integers(0, 9)), max_size=40))
def test_any_interleaving_with_loss_reordering_and_reinstalls(
    steps: list[tuple[Callable[[History, int, int], None], int, int]],
) -> None:
    history = History()
    for action, who, pick in steps:
        action(history, who, pick)
    for box in history.boxes:
        for delivery in box:
            history.open(delivery)
