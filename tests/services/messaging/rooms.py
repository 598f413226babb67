"""A messaging node without its doors: real PostgreSQL and Valkey, neighbours answered from memory."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

import msgspec
from nacl.signing import SigningKey

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.errors import Unavailable
from whispr.kit.ids import uuid7
from whispr.services.messaging.models import ConversationType, Draft, Role
from whispr.services.messaging.store import conversations, members


@dataclass
class Device:
    user_id: UUID
    device_id: UUID = field(default_factory=uuid4)
    registration_id: int = 7
    key: SigningKey = field(default_factory=SigningKey.generate)

    @property
    def signing_key(self) -> bytes:
        return bytes(self.key.verify_key)

    def draft(self, conversation_id: UUID, content: Any = None, **changes: Any) -> Draft:
        """A signed draft; `content` is any JSON value, a new ciphertext by default."""
        value = {"ciphertext": base64.b64encode(uuid4().bytes).decode()} if content is None else content
        client_id = changes.pop("client_id", None) or uuid4()
        signature = changes.pop("signature", None) or self.sign(conversation_id, client_id, value)
        return Draft(
            conversation_id=conversation_id,
            sender_id=self.user_id,
            sender_device_id=self.device_id,
            client_id=client_id,
            message_type=changes.pop("message_type", "text"),
            content=msgspec.json.encode(value),
            signature=signature,
            **changes,
        )

    def sign(self, conversation_id: UUID, client_id: UUID, content: Any) -> bytes:
        canonical = msgspec.json.encode(content, order="sorted")
        digest = sha256(
            b"whispr-message-v1" + conversation_id.bytes + client_id.bytes + sha256(canonical).digest()
        ).digest()
        return self.key.sign(digest).signature


@dataclass
class _List:
    devices: Sequence[Device]


class Auth:
    """What auth knows of devices."""

    def __init__(self) -> None:
        self.devices: dict[UUID, list[Device]] = {}
        self.away = False
        self.asked = 0

    def add(self, user_id: UUID | None = None) -> Device:
        device = Device(user_id or uuid4())
        self.devices.setdefault(device.user_id, []).append(device)
        return device

    async def get_user_devices(self, user_ids: Collection[UUID]) -> Mapping[UUID, _List]:
        self.asked += 1
        if self.away:
            raise Unavailable
        return {
            user_id: _List(list(self.devices[user_id])) for user_id in user_ids if user_id in self.devices
        }


@dataclass
class _Answer:
    reason: str
    knows_sender: bool = False


class Users:
    """What user knows of relations."""

    def __init__(self) -> None:
        self.reasons: dict[tuple[UUID, UUID], str] = {}
        self.contacts: set[tuple[UUID, UUID]] = set()
        self.away = False
        self.asked = 0

    async def check_pairs(self, pairs: Collection[tuple[UUID, UUID]], purpose: str) -> list[_Answer]:
        assert purpose == "message"
        self.asked += 1
        if self.away:
            raise Unavailable
        return [
            _Answer(self.reasons.get((sender, other), "ok"), (other, sender) in self.contacts)
            for sender, other in pairs
        ]


async def make_conversation(
    db: Database, clock: Clock, user_ids: Sequence[UUID], kind: ConversationType = ConversationType.GROUP
) -> UUID:
    """A conversation with these members, the first of them its owner if it is a group."""
    conversation_id = uuid7()
    direct_key = ":".join(sorted(map(str, user_ids))) if kind is ConversationType.DIRECT else None
    async with db.transaction() as tx:
        await conversations.insert(
            tx, conversation_id, kind, user_ids[0], {}, clock.now(), direct_key=direct_key
        )
        roles = {
            user_id: Role.OWNER if at == 0 and kind is ConversationType.GROUP else Role.MEMBER
            for at, user_id in enumerate(user_ids)
        }
        await members.insert_founders(tx, conversation_id, list(roles.items()), clock.now())
    return conversation_id
