"""Which operating-system user PostgreSQL runs as, and which folders that user can reach."""

import os
import pwd
import stat
from pathlib import Path

from whispr.instance.children import Account
from whispr.instance.errors import InstanceError

CANDIDATES = ("postgres", "nobody")
SHARED_ROOT = Path("/var/lib/whispr")


def unprivileged_account(owner_of: Path | None = None) -> Account | None:
    """The user to drop to when this process is root; None when it is not, or when nothing must be dropped.

    PostgreSQL refuses to run as root and insists on a user with an entry in the password database. An existing data
    folder keeps the user it was made by.
    """
    if os.geteuid() != 0:
        return None
    if owner_of is not None and owner_of.exists():
        try:
            entry = pwd.getpwuid(owner_of.stat().st_uid)
        except KeyError:
            raise InstanceError(f"The owner of {owner_of} is not a user of this system any more.") from None
        if entry.pw_uid != 0:
            return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    for name in CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise InstanceError(
        "PostgreSQL does not run as root, and this system has neither a 'postgres' nor a 'nobody' user. "
        "Run whispr as a plain user."
    )


def reachable(folder: Path, account: Account | None) -> bool:
    """True when `account` may enter every folder on the way to `folder`, as far as it exists."""
    if account is None:
        return True
    resolved = folder.resolve()
    return all(_may_enter(part, account) for part in (resolved, *resolved.parents) if part.exists())


def _may_enter(folder: Path, account: Account) -> bool:
    facts = folder.stat()
    if facts.st_uid == account.uid:
        return bool(facts.st_mode & stat.S_IXUSR)
    if facts.st_gid == account.gid:
        return bool(facts.st_mode & stat.S_IXGRP)
    return bool(facts.st_mode & stat.S_IXOTH)
