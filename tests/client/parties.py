"""Devices that talk over lists instead of a network, with the few things of a server that cryptography needs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from whispr.client.crypto.agreement import PrekeyBundle
from whispr.client.crypto.directory import KnownDevice
from whispr.client.crypto.engine import (
    BundleNeeded,
    DistributionNeeded,
    Engine,
    Payload,
    Sealed,
    UnknownSender,
)
from whispr.client.crypto.identity import DeviceIdentity
from whispr.client.crypto.signing import content_sha256
from whispr.client.encoding import decode_base64, encode_base64
from whispr.client.failures import Undecryptable
from whispr.client.models import Content, Envelope, Message
from whispr.client.store import Store


@dataclass
class Keys:
    """What the key server has of one device."""

    identity: DeviceIdentity
    signed_prekey: tuple[int, bytes, bytes]
    one_time: list[tuple[int, bytes]]
    pq_last_resort: tuple[int, bytes, bytes] | None = None
    pq_one_time: list[tuple[int, bytes, bytes]] = field(default_factory=list)


class Party:
    """One device: its engine and a way to send and receive."""

    def __init__(
        self,
        world: World,
        user_id: UUID,
        device_id: UUID,
        one_time_keys: int = 5,
        *,
        post_quantum: bool = True,
        require_post_quantum: bool = False,
    ) -> None:
        self.world = world
        self.user_id, self.device_id = user_id, device_id
        self.store = Store()
        self.identity = DeviceIdentity.generate()
        self.engine = Engine(
            self.store,
            self.identity,
            user_id,
            device_id,
            lambda: world.time,
            require_post_quantum=require_post_quantum,
        )
        self.publish(one_time_keys, post_quantum=post_quantum)

    def publish(self, one_time_keys: int, *, post_quantum: bool = True) -> None:
        with self.store.transaction():
            signed = self.engine.prekeys.current()
            made = self.engine.prekeys.generate(one_time_keys)
            last_resort = self.engine.prekeys.last_resort()
            made_pq = self.engine.prekeys.generate_post_quantum(min(one_time_keys, 2)) if post_quantum else []
        self.world.keys[self.device_id] = Keys(
            self.identity,
            (signed.key_id, signed.public_key, signed.signature),
            [(key["key_id"], decode_base64(key["public_key"])) for key in made],
            (last_resort.key_id, last_resort.public_key, last_resort.signature) if post_quantum else None,
            [(k["key_id"], decode_base64(k["public_key"]), decode_base64(k["signature"])) for k in made_pq],
        )

    def knows(self, *others: Party) -> list[KnownDevice]:
        known = []
        for other in others:
            with self.store.transaction():
                if self.engine.directory.device(other.device_id) is None:
                    self.learn(other)
            device = self.engine.directory.device(other.device_id)
            assert device is not None
            known.append(device)
        return known

    def learn(self, other: Party) -> None:
        with self.store.transaction():
            self.engine.learn(other.user_id, {other.device_id: self.world.claim(other.device_id)})

    def seal(
        self, payload: Payload, *others: Party, group: bool = False, client_id: UUID | None = None
    ) -> Sent:
        """Encrypt for the others, fetching bundles as a client does."""
        client_id = client_id or uuid4()
        devices = self.knows(*others)
        try:
            with self.store.transaction():
                sealed = self.engine.seal(
                    self.world.conversation_id, client_id, payload, devices, group=group
                )
        except BundleNeeded as needed:
            for device in needed.devices:
                self.learn(self.world.parties[device.device_id])
            with self.store.transaction():
                sealed = self.engine.seal(
                    self.world.conversation_id, client_id, payload, self.knows(*others), group=group
                )
        return Sent(self, client_id, sealed)

    def text(self, text: str, *others: Party, group: bool = False, client_id: UUID | None = None) -> Sent:
        """What a client sends to say `text`: the sender key first, to those who lack it."""
        keys: list[Sent] = []
        while True:
            try:
                sent = self.seal(Payload("text", text), *others, group=group, client_id=client_id)
            except DistributionNeeded:
                keys.append(self.seal(Payload("sender_key"), *others, group=True))
                self.confirm(keys[-1])
            else:
                self.confirm(sent)
                sent.keys = keys
                return sent

    def confirm(self, sent: Sent) -> None:
        with self.store.transaction():
            self.engine.confirm(self.world.conversation_id, sent.sealed, 1)

    def open(self, sent: Sent) -> Payload:
        """In order: the key that went ahead, unless this device has had it already, and the message."""
        for key in sent.keys:
            with contextlib.suppress(Undecryptable):
                self._open(key)
        return self._open(sent)

    def _open(self, sent: Sent) -> Payload:
        message = sent.message_for(self.device_id)
        try:
            with self.store.transaction():
                return self.engine.open(message)
        except UnknownSender:
            self.learn(sent.sender)
            try:
                with self.store.transaction():
                    return self.engine.open(message)
            except UnknownSender as unknown:
                # Signed with keys the server does not name: made by an installation that is gone.
                raise Undecryptable("unknown_keys") from unknown

    def read(self, sent: Sent) -> str | None:
        return self.open(sent).text


@dataclass
class Sent:
    sender: Party
    client_id: UUID
    sealed: Sealed
    keys: list[Sent] = field(default_factory=list)

    @property
    def types(self) -> dict[UUID, str]:
        return {UUID(d): e["type"] for d, e in self.sealed.content.get("envelopes", {}).items()}

    def message_for(self, device_id: UUID, **changes: Any) -> Message:
        """As the server gives it to one device: with its own envelope only."""
        content = self.sealed.content
        envelopes = content.get("envelopes")
        own = (envelopes or {}).get(str(device_id))
        values: dict[str, Any] = {
            "id": uuid4(),
            "conversation_id": self.sender.world.conversation_id,
            "seq": 1,
            "sender_id": self.sender.user_id,
            "sender_device_id": self.sender.device_id,
            "client_id": self.client_id,
            "message_type": "text",
            "content": Content(
                content.get("ciphertext"),
                None if envelopes is None else {str(device_id): Envelope(**own)} if own else {},
                content.get("commitment"),
            ),
            "sent_at": datetime.now(UTC),
            "signature": encode_base64(self.sealed.signature),
            "content_sha256": encode_base64(content_sha256(content)),
        }
        return Message(**{**values, **changes})


@dataclass
class World:
    conversation_id: UUID = field(default_factory=uuid4)
    keys: dict[UUID, Keys] = field(default_factory=dict)
    parties: dict[UUID, Party] = field(default_factory=dict)
    claimed: list[tuple[bytes, int]] = field(default_factory=list)
    time: float = 1_800_000_000.0

    def party(
        self,
        user_id: UUID | None = None,
        device_id: UUID | None = None,
        one_time_keys: int = 5,
        **options: bool,
    ) -> Party:
        """A new device; with the id of an existing one, that device reinstalled."""
        party = Party(self, user_id or uuid4(), device_id or uuid4(), one_time_keys, **options)
        self.parties[party.device_id] = party
        return party

    def claim(self, device_id: UUID) -> PrekeyBundle:
        """A device's bundle; each one-time key is handed out once."""
        keys = self.keys[device_id]
        one_time = keys.one_time.pop(0) if keys.one_time else (None, None)
        if one_time[0] is not None:
            claim = (keys.identity.identity_key, one_time[0])
            assert claim not in self.claimed
            self.claimed.append(claim)
        pq = keys.pq_one_time.pop(0) if keys.pq_one_time else keys.pq_last_resort or (None, None, None)
        return PrekeyBundle(
            keys.identity.registration_id,
            keys.identity.identity_key,
            keys.identity.signing_key,
            *keys.signed_prekey,
            *one_time,
            *pq,
        )
