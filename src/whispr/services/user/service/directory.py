"""Which people exist.

Accounts are made in `auth`; a profile starts here the first time somebody asks for the person. An erased person has a
tombstone in place of the profile, so that a request that was under way while they left does not bring them back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Protocol
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.services.user import store
from whispr.services.user.models import BATCH_LIMIT, Account, BatchTooLarge, InvalidUsername

_USERNAME = re.compile(r"[a-z0-9_.]{3,32}")


class AccountInfo(Protocol):
    """What `auth` answers about an account."""

    @property
    def user_id(self) -> UUID: ...
    @property
    def username(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def created_at(self) -> datetime: ...


class Accounts(Protocol):
    """What this service needs of `auth`."""

    async def get_user_info(
        self, user_ids: Sequence[UUID] = (), username: str | None = None
    ) -> Sequence[AccountInfo]:
        """The accounts of those ids, or of that exact username; unknown ones are left out."""


class Directory:
    """Makes sure that a profile stands for every account it is asked about."""

    def __init__(self, database: Database, accounts: Accounts, clock: Clock) -> None:
        self._database = database
        self._accounts = accounts
        self._clock = clock

    async def ensure(self, user_ids: Sequence[UUID]) -> None:
        """Start the profiles that are missing. Ids without an account stay without a profile.

        Raises BatchTooLarge, and Unavailable where an id is new here and `auth` cannot be asked.
        """
        check_batch(len(user_ids))
        async with self._database.connection() as conn:
            missing = set(user_ids) - await store.seen_ids(conn, user_ids)
        if missing:
            await self._start(await self._accounts.get_user_info(user_ids=sorted(missing)))

    async def find(self, username: str) -> UUID | None:
        """The person of exactly that name, in any case of letters. Raises InvalidUsername."""
        name = username.lower()
        if not _USERNAME.fullmatch(name):
            raise InvalidUsername
        async with self._database.connection() as conn:
            user_id = await store.user_id_of(conn, name)
        if user_id is not None:
            return user_id
        accounts = await self._accounts.get_user_info(username=name)
        await self._start(accounts)
        return accounts[0].user_id if accounts else None

    async def _start(self, accounts: Sequence[AccountInfo]) -> None:
        living = [
            Account(account.user_id, account.username, account.created_at)
            for account in accounts
            if account.status != "deleted"
        ]
        if living:
            async with self._database.connection() as conn:
                await store.create_profiles(conn, living, self._clock.now())


def check_batch(size: int) -> None:
    """Raises BatchTooLarge where more is asked for at once than may be."""
    if size > BATCH_LIMIT:
        raise BatchTooLarge
