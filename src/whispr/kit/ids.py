"""Identifiers made by Whispr: UUID version 7, so that new rows land next to each other in an index."""

from __future__ import annotations

from uuid import UUID

from uuid_utils.compat import uuid7 as _uuid7


def uuid7() -> UUID:
    """A new UUIDv7 (RFC 9562), increasing within a process."""
    return _uuid7()
