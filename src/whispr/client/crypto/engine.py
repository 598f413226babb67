"""Seals what this device sends and opens what it receives.

A payload travels in one of three forms: pairwise envelopes (direct conversations), envelopes with the group ciphertext for
devices that hold this device's sender key, and one shared ciphertext when envelopes would be too large. The key goes
ahead in messages of its own: had it travelled with a text, deleting or editing the text would take the key from devices
that were away, and with it all that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

import msgspec

from whispr.client.encoding import decode_base64, encode_base64
from whispr.client.failures import CryptoError, TooManyDevices, Undecryptable
from whispr.client.models import Message
from whispr.client.store import Store

from . import franking
from .directory import Directory, IdentityChanged, KnownDevice, PinnedKeys
from .identity import DeviceIdentity
from .padding import pad, unpad
from .prekeys import PrekeyStock
from .sender_keys import Distribution, GroupMessage, SenderKeys
from .sessions import PairwiseMessage, Sessions
from .signing import canonical_json, content_sha256, message_digest, verify

MAX_CONTENT: Final = 96 * 1024
# More than an envelope with a sender key needs, KEM ciphertext included.
ENVELOPE: Final = 4096
# The server wants an envelope for every device; in a distribution this is what those get whose turn is not now.
NOTHING: Final = {"type": "sender_key", "body": encode_base64(b"\0")}


class Payload(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is inside a message. `kind` says how to read it: `text`, `sender_key` (nothing but the key), or the
    application's own, with `data`."""

    kind: str
    text: str | None = None
    data: dict[str, Any] = {}
    sender_key: Distribution | None = None
    franking_key: bytes | None = None

    def plaintext(self) -> bytes:
        """What the sender commits to and a report reveals: JSON of `kind`, `text` and `data`, keys sorted."""
        said: dict[str, Any] = {"kind": self.kind, "text": self.text, "data": self.data}
        return msgspec.json.encode({name: value for name, value in said.items() if value}, order="sorted")


class Sealed(msgspec.Struct, frozen=True):
    """Content ready to be sent, and which devices hold the sender key once the server has taken it."""

    content: dict[str, Any]
    signature: bytes
    chain_id: bytes | None = None
    given: dict[UUID, int] = {}


class BundleNeeded(CryptoError):
    """There is neither a session nor an unused bundle for these devices."""

    def __init__(self, devices: Sequence[KnownDevice]) -> None:
        super().__init__("prekey bundles are needed")
        self.devices = devices


class DistributionNeeded(CryptoError):
    """Every device must hold the sender key first: send a payload of kind `sender_key`."""


class UnknownSender(CryptoError):
    """The sending device, or the keys it uses, are not known; ask the server for them.

    `claimed` are the keys the message itself names, if it names any.
    """

    def __init__(self, user_id: UUID, device_id: UUID, claimed: PinnedKeys | None) -> None:
        super().__init__("the sending device is not known")
        self.user_id = user_id
        self.device_id = device_id
        self.claimed = claimed


class Engine:
    """One device's cryptography. Everything that changes state needs an open store transaction."""

    def __init__(
        self,
        store: Store,
        identity: DeviceIdentity,
        user_id: UUID,
        device_id: UUID,
        now: Callable[[], float],
        *,
        require_post_quantum: bool = False,
    ) -> None:
        self.identity = identity
        self.user_id = user_id
        self.device_id = device_id
        self.prekeys = PrekeyStock(store, identity, now)
        self.sessions = Sessions(store, identity, self.prekeys, require_post_quantum=require_post_quantum)
        self.sender_keys = SenderKeys(store, now)
        self.directory = Directory(store)
        self._store = store

    def learn(self, user_id: UUID, bundles: dict[UUID, Any]) -> list[IdentityChanged]:
        """Take in bundles; sessions with devices whose keys changed are retired."""
        changes = self.directory.learn(user_id, bundles)
        for change in changes:
            self.sessions.retire(change.device_id)
        return changes

    def seal(
        self,
        conversation_id: UUID,
        client_id: UUID,
        payload: Payload,
        devices: Sequence[KnownDevice],
        *,
        group: bool,
    ) -> Sealed:
        """Encrypt for exactly `devices`, and sign.

        Raises BundleNeeded, DistributionNeeded (send a payload of kind `sender_key` first), TooManyDevices.
        """
        self._check_sessions(devices, group=group, conversation_id=conversation_id)
        payload, beside = _franked(payload)
        if not group:
            envelopes = {
                str(device.device_id): self._pairwise(conversation_id, client_id, device, payload)
                for device in devices
            }
            content = {"envelopes": envelopes, **beside}
            if len(canonical_json(content)) <= MAX_CONTENT:
                return Sealed(content, self.sign(conversation_id, client_id, content))
        return self._seal_for_group(conversation_id, client_id, payload, devices, beside)

    def sign(self, conversation_id: UUID, client_id: UUID, content: dict[str, Any]) -> bytes:
        return self.identity.sign(message_digest(conversation_id, client_id, content_sha256(content)))

    def confirm(self, conversation_id: UUID, sealed: Sealed, seq: int) -> None:
        """The server took the message as number `seq`: its readers hold the sender key now."""
        if sealed.chain_id is not None:
            self.sender_keys.distributed(conversation_id, sealed.chain_id, sealed.given, seq)

    def open(self, message: Message) -> Payload:
        """Verify and decrypt. Raises UnknownSender or Undecryptable."""
        sender = self.check_sender(message)
        envelope = (message.content.envelopes or {}).get(str(self.device_id))
        if envelope is not None and envelope.type != "sender_key":
            plaintext = self._open_pairwise(message, sender, _body(envelope.body))
        elif envelope is not None or message.content.ciphertext is not None:
            if envelope is not None and envelope.body == NOTHING["body"]:
                return Payload("sender_key")
            body = _body(envelope.body if envelope is not None else message.content.ciphertext or "")
            data = _group_data(message.conversation_id, message.client_id, sender.device_id)
            plaintext = self.sender_keys.decrypt(
                message.conversation_id, sender.device_id, GroupMessage.parse(body), data
            )
        else:
            raise Undecryptable("no_envelope")
        payload = _parse(plaintext)
        if payload.sender_key is not None:
            self.sender_keys.receive(message.conversation_id, sender.device_id, payload.sender_key)
        _check_commitment(message, payload)
        return payload

    def check_sender(self, message: Message) -> KnownDevice:
        """The device that signed the message as it is now. Raises UnknownSender or Undecryptable."""
        sender = self.directory.device(message.signing_device_id)
        if sender is None or sender.user_id != message.sender_id:
            raise UnknownSender(message.sender_id, message.signing_device_id, self._claimed(message))
        self._verify(message, sender)
        return sender

    def _seal_for_group(
        self,
        conversation_id: UUID,
        client_id: UUID,
        payload: Payload,
        devices: Sequence[KnownDevice],
        beside: Mapping[str, str],
    ) -> Sealed:
        self._rotate_if_someone_left(conversation_id, devices)
        holders = self.sender_keys.holders(conversation_id)
        newcomers = [device for device in devices if device.device_id not in holders]
        if newcomers and payload.kind != "sender_key":
            raise DistributionNeeded("the sender key must be distributed first")
        message, distribution = self.sender_keys.encrypt(
            conversation_id,
            pad(msgspec.msgpack.encode(payload)),
            _group_data(conversation_id, client_id, self.device_id),
        )
        content: dict[str, Any]
        if payload.kind == "sender_key":
            with_key = msgspec.structs.replace(payload, sender_key=distribution)
            content, given = self._hand_out(conversation_id, client_id, with_key, devices, newcomers)
            return Sealed(content, self.sign(conversation_id, client_id, content), message.chain_id, given)
        shared = encode_base64(msgspec.msgpack.encode(message))
        envelopes = {
            str(device.device_id): {
                "type": "sender_key",
                "body": shared,
                "registration_id": device.current.registration_id,
            }
            for device in devices
        }
        content = {"envelopes": envelopes, **beside}
        if len(canonical_json(content)) > MAX_CONTENT:
            content = {"ciphertext": shared, **beside}
        return Sealed(content, self.sign(conversation_id, client_id, content))

    def _hand_out(
        self,
        conversation_id: UUID,
        client_id: UUID,
        with_key: Payload,
        devices: Sequence[KnownDevice],
        newcomers: Sequence[KnownDevice],
    ) -> tuple[dict[str, Any], dict[UUID, int]]:
        """Content with the sender key for as many newcomers as fit, and who they are; the others' turn is later."""
        envelopes: dict[str, dict[str, Any]] = {str(device.device_id): NOTHING for device in devices}
        given: dict[UUID, int] = {}
        size = len(canonical_json({"envelopes": envelopes}))
        for device in newcomers:
            if size + ENVELOPE > MAX_CONTENT:
                break
            envelope = self._pairwise(conversation_id, client_id, device, with_key)
            size += len(canonical_json(envelope))
            envelopes[str(device.device_id)] = envelope
            given[device.device_id] = device.current.registration_id
        if newcomers and not given:
            raise TooManyDevices(f"{len(devices)} devices do not fit into one message")
        return {"envelopes": envelopes}, given

    def _rotate_if_someone_left(self, conversation_id: UUID, devices: Sequence[KnownDevice]) -> None:
        present = {device.device_id: device.current.registration_id for device in devices}
        for device_id, registration in self.sender_keys.holders(conversation_id).items():
            if present.get(device_id) != registration:
                # It is gone, or reinstalled: whoever kept its old storage could read on with the old chain.
                self.sender_keys.rotate(conversation_id)
                return

    def _check_sessions(self, devices: Sequence[KnownDevice], *, group: bool, conversation_id: UUID) -> None:
        needed: dict[UUID, KnownDevice] = {device.device_id: device for device in devices}
        if group:
            holders = self.sender_keys.holders(conversation_id)
            if all(needed.get(d) and needed[d].current.registration_id == r for d, r in holders.items()):
                for device_id in holders:
                    del needed[device_id]
        lacking = [
            device
            for device in needed.values()
            if device.bundle is None and not self.sessions.ready(device.device_id)
        ]
        if lacking:
            raise BundleNeeded(lacking)

    def _pairwise(
        self, conversation_id: UUID, client_id: UUID, device: KnownDevice, payload: Payload
    ) -> dict[str, Any]:
        plaintext = pad(msgspec.msgpack.encode(payload))
        data = _envelope_data(conversation_id, client_id, self.device_id, device.device_id)
        if self.sessions.ready(device.device_id):
            sealed = self.sessions.encrypt(device.device_id, plaintext, data)
        else:
            bundle = self.directory.take_bundle(device.device_id)
            if bundle is None:
                raise BundleNeeded([device])
            sealed = self.sessions.begin(device.device_id, bundle, plaintext, data)
        return {
            "type": "message" if sealed.handshake is None else "prekey",
            "body": encode_base64(msgspec.msgpack.encode(sealed)),
            "registration_id": device.current.registration_id,
        }

    def _open_pairwise(self, message: Message, sender: KnownDevice, body: bytes) -> bytes:
        pairwise = PairwiseMessage.parse(body)
        handshake, superseded = pairwise.handshake, False
        if handshake is not None:
            named = PinnedKeys(handshake.registration_id, handshake.identity_key, handshake.signing_key)
            if named not in sender.keys:
                raise UnknownSender(sender.user_id, sender.device_id, named)
            superseded = named != sender.current
        data = _envelope_data(message.conversation_id, message.client_id, sender.device_id, self.device_id)
        return self.sessions.decrypt(sender.device_id, pairwise, data, superseded=superseded)

    def _verify(self, message: Message, sender: KnownDevice) -> None:
        try:
            digest, signature = decode_base64(message.content_sha256), decode_base64(message.signature)
        except ValueError as error:
            raise Undecryptable("malformed") from error
        signed = message_digest(message.conversation_id, message.client_id, digest)
        if not any(verify(keys.signing_key, signed, signature) for keys in sender.keys):
            claimed = self._claimed(message)
            if claimed is None or claimed not in sender.keys:
                # Made by a new installation, perhaps, whose first message with its keys never came here.
                raise UnknownSender(sender.user_id, sender.device_id, claimed)
            raise Undecryptable("bad_signature")
        shared = message.content.ciphertext
        whole = shared is not None and not message.content.envelopes
        commitment = message.content.commitment
        beside = {} if commitment is None else {"commitment": commitment}
        if whole and content_sha256({"ciphertext": shared, **beside}) != digest:
            raise Undecryptable("bad_signature")

    def _claimed(self, message: Message) -> PinnedKeys | None:
        envelope = (message.content.envelopes or {}).get(str(self.device_id))
        if envelope is None or envelope.type != "prekey":
            return None
        handshake = PairwiseMessage.parse(_body(envelope.body)).handshake
        if handshake is None:
            return None
        return PinnedKeys(handshake.registration_id, handshake.identity_key, handshake.signing_key)


def _franked(payload: Payload) -> tuple[Payload, dict[str, str]]:
    """The payload with a franking key inside, and what stands beside the ciphertext for it."""
    if payload.kind == "sender_key":
        return payload, {}
    # As its reader will have it: what msgpack carries in another form would give another plaintext.
    payload = _parse(pad(msgspec.msgpack.encode(payload)))
    key = franking.new_key()
    commitment = franking.commit(key, payload.plaintext())
    return msgspec.structs.replace(payload, franking_key=key), {"commitment": encode_base64(commitment)}


def _check_commitment(message: Message, payload: Payload) -> None:
    if message.content.commitment is None:
        return
    # A commitment to something else would make a message that nobody can report.
    if not franking.matches(
        _body(message.content.commitment), payload.franking_key or b"", payload.plaintext()
    ):
        raise Undecryptable("bad_commitment")


def _body(text: str) -> bytes:
    try:
        return decode_base64(text)
    except ValueError as error:
        raise Undecryptable("malformed") from error


def _parse(plaintext: bytes) -> Payload:
    try:
        return msgspec.msgpack.decode(unpad(plaintext), type=Payload)
    except msgspec.DecodeError as error:
        raise Undecryptable("malformed") from error


# The place of a message is authenticated with it: an envelope moved into another conversation, under another
# client id, or to another device does not open.
def _envelope_data(conversation_id: UUID, client_id: UUID, sender: UUID, recipient: UUID) -> bytes:
    return b"whispr-envelope-v1" + conversation_id.bytes + client_id.bytes + sender.bytes + recipient.bytes


def _group_data(conversation_id: UUID, client_id: UUID, sender: UUID) -> bytes:
    return conversation_id.bytes + client_id.bytes + sender.bytes
