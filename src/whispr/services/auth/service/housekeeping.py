"""What is done at intervals or on demand: removing what has served its time, rotating keys."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.kit.identity import MAX_TOKEN_LIFETIME
from whispr.services.auth import store
from whispr.services.auth.service.data_keys import DataKeys
from whispr.services.auth.service.expiry import REMEMBERED
from whispr.services.auth.service.push_tokens import PushTokens
from whispr.services.auth.service.second_factor import SecondFactor
from whispr.services.auth.service.signing import SKEW, SigningKeys
from whispr.services.auth.service.vault import Vault
from whispr.services.auth.settings import AuthSettings

KeyKind = Literal["token_keys", "signing_keys"]

# Long enough to answer "who ended my session, and when"; the trail has it for ever.
KEEP_REVOKED = timedelta(days=7)
# The digest of a used token is needed for its grace only: its family key recognises it afterwards.
KEEP_USED_TOKENS = timedelta(hours=1)
# Far longer than any client repeats an upload.
KEEP_SPENT_PREKEYS = timedelta(days=90)
# The history of links is the person's, who may ask for it.
KEEP_LINKS = timedelta(days=365)
KEEP_OPERATIONS = timedelta(days=7)

_ROTATE = "RotateKeys"


@dataclass(frozen=True, slots=True)
class Cleaned:
    """How many rows a cleanup removed."""

    sessions: int
    revocations: int


class Housekeeping:
    """Safe to run in every process at once, and as often as anyone likes."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        vault: Vault,
        data_keys: DataKeys,
        push_tokens: PushTokens,
        second_factor: SecondFactor,
        signing: SigningKeys,
        settings: AuthSettings,
    ) -> None:
        self._db = db
        self._vault = vault
        self._clock = clock
        self._data_keys = data_keys
        self._push_tokens = push_tokens
        self._second_factor = second_factor
        self._signing = signing
        self._settings = settings

    async def clean(self) -> Cleaned:
        """Remove expired sessions, and traces that no answer depends on any more."""
        now = self._clock.now()
        sessions = 0
        async with self._db.connection() as connection:
            while batch := await store.housekeeping.drop_sessions(
                connection,
                now,
                now - KEEP_REVOKED,
                now - REMEMBERED,
                devices_expire=self._settings.device_expiry_days > 0,
            ):
                sessions += batch
            while await store.housekeeping.drop_used_refresh_tokens(connection, now - KEEP_USED_TOKENS):
                pass
            remembered = timedelta(seconds=self._settings.idempotency_seconds)
            await store.housekeeping.drop_idempotency_keys(connection, now - remembered)
            outlived = timedelta(seconds=MAX_TOKEN_LIFETIME) + SKEW
            revocations = await store.housekeeping.drop_revocations(connection, now - outlived)
            await store.housekeeping.drop_spent_prekeys(connection, now - KEEP_SPENT_PREKEYS)
            await store.housekeeping.expire_links(connection, now)
            await store.housekeeping.drop_links(connection, now - KEEP_LINKS)
            await store.housekeeping.drop_operations(connection, now - KEEP_OPERATIONS)
        return Cleaned(sessions, revocations)

    async def missing_roots(self) -> list[str]:
        """Root keys that something here is sealed under and that the ring does not hold."""
        async with self._db.connection() as connection:
            used = await store.keys.roots_in_use(connection)
        return [root_key_id for root_key_id in used if not self._vault.holds(root_key_id)]

    async def tend_data_keys(self) -> dict[str, int]:
        """Rotate when due, re-encrypt everything under old keys, drop keys without rows; push tokens per key left."""
        await self._data_keys.rotate(force=False)
        await self._data_keys.reseal()
        await self._push_tokens.reencrypt()
        await self._second_factor.reencrypt()
        await self._data_keys.drop_unused()
        return await self._push_tokens.per_key()

    async def rotate_keys(self, operation_id: UUID, kind: KeyKind, *, force: bool) -> tuple[bool, str]:
        """Rotate data keys or signing keys; whether a key was made, and the newest's id.

        Repeated with the same `operation_id` it answers the same and makes nothing.
        """
        async with self._db.connection() as connection:
            known = await store.housekeeping.answer_of(connection, operation_id, _ROTATE)
        if known is not None:
            return bool(known["rotated"]), str(known["key_id"])
        rotate = self._data_keys.rotate if kind == "token_keys" else self._signing.rotate
        rotated, key_id = await rotate(force=force)
        answer = {"rotated": rotated, "key_id": key_id}
        async with self._db.connection() as connection:
            await store.housekeeping.remember_answer(
                connection, operation_id, _ROTATE, answer, self._clock.now()
            )
        return rotated, key_id
