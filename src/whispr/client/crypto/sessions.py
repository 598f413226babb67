"""Pairwise sessions with other devices, kept in the local store.

A device may have several sessions with the same peer: both sides may have begun one at the same moment, or the
peer was reinstalled. The session on which a message was opened last is the one to send on (as in Sesame), so both sides
meet on one session after a message each way; the others stay for messages that are still on their way.
"""

from __future__ import annotations

import hashlib
from typing import Final
from uuid import UUID

import msgspec

from whispr.client.failures import Undecryptable
from whispr.client.store import Store

from . import ratchet
from .agreement import Decapsulation, PrekeyBundle, answer, initiate
from .identity import DeviceIdentity
from .prekeys import PrekeyStock
from .ratchet import RatchetMessage

MAX_SESSIONS: Final = 8
X3DH: Final = 1
PQXDH: Final = 2
_SPACE = "sessions"


class Handshake(msgspec.Struct, frozen=True, array_like=True):
    """What the peer needs to answer the key agreement; sent along until the peer has been heard.

    `version` says which agreement it is; sessions begun before there was PQXDH have none, which means X3DH.
    """

    registration_id: int
    identity_key: bytes
    signing_key: bytes
    ephemeral_key: bytes
    signed_prekey_id: int
    one_time_prekey_id: int | None
    version: int = X3DH
    pq_prekey_id: int | None = None
    kem_ciphertext: bytes | None = None


class PairwiseMessage(msgspec.Struct, frozen=True, array_like=True):
    """The body of an envelope of type `prekey` (with handshake) or `message` (without), as msgpack."""

    message: RatchetMessage
    handshake: Handshake | None = None

    @classmethod
    def parse(cls, body: bytes) -> PairwiseMessage:
        """Raises Undecryptable (malformed)."""
        try:
            return msgspec.msgpack.decode(body, type=cls)
        except msgspec.DecodeError as error:
            raise Undecryptable("malformed") from error


class Session(msgspec.Struct):
    tag: bytes
    state: bytes
    associated_data: bytes
    peer_identity_key: bytes
    handshake: Handshake | None = None
    retired: bool = False
    post_quantum: bool = False


class Sessions:
    """Every method that changes something needs an open store transaction.

    With `require_post_quantum` no session begins, on either side, without a KEM key.
    """

    def __init__(
        self,
        store: Store,
        identity: DeviceIdentity,
        prekeys: PrekeyStock,
        *,
        require_post_quantum: bool = False,
    ) -> None:
        self._store = store
        self._identity = identity
        self._prekeys = prekeys
        self._require_post_quantum = require_post_quantum

    def ready(self, device_id: UUID) -> bool:
        """Whether there is a session to send on."""
        return any(not session.retired for session in self._load(device_id))

    def post_quantum(self, device_id: UUID) -> bool:
        """Whether the session to send on began with PQXDH."""
        return next((s.post_quantum for s in self._load(device_id) if not s.retired), False)

    def begin(self, device_id: UUID, bundle: PrekeyBundle, plaintext: bytes, data: bytes) -> PairwiseMessage:
        """Begin a session with the bundle's device and encrypt its first message. Raises BadBundle."""
        agreed = initiate(self._identity, bundle, require_post_quantum=self._require_post_quantum)
        tag = _tag(agreed.associated_data, agreed.ephemeral_key)
        state, message = ratchet.start(
            tag, agreed.secret, bundle.signed_prekey, plaintext, agreed.associated_data + data
        )
        handshake = Handshake(
            self._identity.registration_id,
            self._identity.identity_key,
            self._identity.signing_key,
            agreed.ephemeral_key,
            bundle.signed_prekey_id,
            bundle.one_time_prekey_id,
            X3DH if agreed.kem_ciphertext is None else PQXDH,
            bundle.pq_prekey_id,
            agreed.kem_ciphertext,
        )
        session = Session(
            tag,
            state,
            agreed.associated_data,
            bundle.identity_key,
            handshake,
            post_quantum=agreed.kem_ciphertext is not None,
        )
        self._save(device_id, [session, *self._load(device_id)])
        return PairwiseMessage(message, handshake)

    def encrypt(self, device_id: UUID, plaintext: bytes, data: bytes) -> PairwiseMessage:
        """Encrypt on the session in use. Raises Undecryptable (no_session)."""
        sessions = self._load(device_id)
        for session in sessions:
            if not session.retired:
                session.state, message = ratchet.encrypt(
                    session.tag, session.state, plaintext, session.associated_data + data
                )
                self._save(device_id, sessions)
                return PairwiseMessage(message, session.handshake)
        raise Undecryptable("no_session")

    def decrypt(
        self, device_id: UUID, pairwise: PairwiseMessage, data: bytes, *, superseded: bool = False
    ) -> bytes:
        """Open a message of that device. Raises Undecryptable, and nothing has changed then.

        `superseded`: it begins a session with an installation that another has taken the place of since, which could open
        nothing that is sent on it.
        """
        sessions = self._load(device_id)
        for session in sessions:
            if session.tag == pairwise.message.session:
                return self._continue(device_id, sessions, session, pairwise.message, data)
        if pairwise.handshake is None:
            raise Undecryptable("no_session")
        return self._answer(
            device_id, sessions, pairwise.handshake, pairwise.message, data, superseded=superseded
        )

    def retire(self, device_id: UUID) -> None:
        """Stop sending on the present sessions; they still open what is on its way."""
        sessions = self._load(device_id)
        for session in sessions:
            session.retired = True
        self._save(device_id, sessions)

    def _continue(
        self, device_id: UUID, sessions: list[Session], session: Session, message: RatchetMessage, data: bytes
    ) -> bytes:
        session.state, plaintext = ratchet.decrypt(session.state, message, session.associated_data + data)
        session.handshake = None
        if not session.retired:
            sessions.remove(session)
            sessions.insert(0, session)
        self._save(device_id, sessions)
        return plaintext

    def _answer(
        self,
        device_id: UUID,
        sessions: list[Session],
        handshake: Handshake,
        message: RatchetMessage,
        data: bytes,
        *,
        superseded: bool,
    ) -> bytes:
        signed_prekey = self._prekeys.signed(handshake.signed_prekey_id)
        one_time_key = None
        if handshake.one_time_prekey_id is not None:
            one_time_key = self._prekeys.one_time(handshake.one_time_prekey_id)
        if signed_prekey is None or (one_time_key is None and handshake.one_time_prekey_id is not None):
            raise Undecryptable("unknown_prekey")
        post_quantum = self._decapsulation(handshake)
        secret, agreed_data = answer(
            self._identity,
            signed_prekey,
            one_time_key,
            handshake.identity_key,
            handshake.signing_key,
            handshake.ephemeral_key,
            post_quantum,
        )
        tag = _tag(agreed_data, handshake.ephemeral_key)
        if tag != message.session:
            raise Undecryptable("failed")
        state, plaintext = ratchet.accept(secret, signed_prekey.private_key, message, agreed_data + data)
        if handshake.one_time_prekey_id is not None:
            self._prekeys.use(handshake.one_time_prekey_id)
        if post_quantum is not None:
            self._prekeys.use_post_quantum(post_quantum.prekey.key_id)
        session = Session(
            tag,
            state,
            agreed_data,
            handshake.identity_key,
            retired=superseded,
            post_quantum=post_quantum is not None,
        )
        self._save(device_id, [session, *sessions])
        return plaintext

    def _decapsulation(self, handshake: Handshake) -> Decapsulation | None:
        if handshake.version == X3DH:
            if self._require_post_quantum:
                raise Undecryptable("not_post_quantum")
            return None
        if handshake.version != PQXDH or handshake.pq_prekey_id is None or handshake.kem_ciphertext is None:
            raise Undecryptable("malformed")
        prekey = self._prekeys.post_quantum(handshake.pq_prekey_id)
        if prekey is None:
            raise Undecryptable("unknown_prekey")
        return Decapsulation(prekey, handshake.kem_ciphertext)

    def _load(self, device_id: UUID) -> list[Session]:
        return self._store.load(_SPACE, str(device_id), list[Session]) or []

    def _save(self, device_id: UUID, sessions: list[Session]) -> None:
        self._store.save(_SPACE, str(device_id), sessions[:MAX_SESSIONS])


def _tag(associated_data: bytes, ephemeral_key: bytes) -> bytes:
    return hashlib.sha256(b"whispr-session-v1" + associated_data + ephemeral_key).digest()[:8]
