"""The rules of the user service.

`UserService` holds the four areas: `profiles`, `relations` (contacts, blocks and what follows from them), `storage`
(quotas) and `reports`; `export` shows a person all of their own, and `erasure` ends them in all of it. `Directory` knows
which people exist.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from whispr.kit.cache import RateLimiter
from whispr.kit.clock import Clock
from whispr.kit.db import Database
from whispr.services.user.service.directory import AccountInfo, Accounts, Directory
from whispr.services.user.service.erasure import Erasure
from whispr.services.user.service.export import Export
from whispr.services.user.service.hints import Hints
from whispr.services.user.service.profiles import Profiles
from whispr.services.user.service.relations import Relations
from whispr.services.user.service.reports import Reports
from whispr.services.user.service.storage import Storage
from whispr.services.user.settings import UserSettings

__all__ = ["AccountInfo", "Accounts", "UserService"]


class UserService:
    """Everything the doors of the service may do.

    `publish` sends a hint on a channel to the other processes; it may fail without harm.
    """

    def __init__(
        self,
        database: Database,
        accounts: Accounts,
        publish: Callable[[str, bytes], Awaitable[None]],
        limiter: RateLimiter,
        clock: Clock,
        settings: UserSettings,
    ) -> None:
        self.hints = hints = Hints(publish)
        directory = Directory(database, accounts, clock)
        self.profiles = Profiles(database, directory, hints, limiter, clock, settings)
        self.relations = Relations(database, directory, hints, limiter, clock, settings)
        self.storage = Storage(database, directory, clock, settings)
        self.export = Export(self.profiles, self.relations, self.storage, limiter, clock)
        self.reports = Reports(database, hints, clock, settings)
        self.erasure = Erasure(database, hints, clock)
