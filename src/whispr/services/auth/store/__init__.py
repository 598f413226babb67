"""Every SQL statement of auth, by subject, one function each.

Functions take a connection first. Those that lock say so; the order of locks is account, second factor, link, session, device, refresh
token, keys, audit, so that no two transactions wait for each other.
"""

from whispr.services.auth.store import (
    accounts,
    audit,
    data_keys,
    devices,
    export,
    housekeeping,
    keys,
    links,
    prekeys,
    push_tokens,
    second_factors,
    sessions,
)

__all__ = [
    "accounts",
    "audit",
    "data_keys",
    "devices",
    "export",
    "housekeeping",
    "keys",
    "links",
    "prekeys",
    "push_tokens",
    "second_factors",
    "sessions",
]
