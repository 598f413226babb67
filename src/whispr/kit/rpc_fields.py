"""Fields of gRPC requests as the types the rules speak. Each raises `Invalid` naming its field."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TypeVar
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp

from whispr.kit.errors import Invalid

Choice = TypeVar("Choice")


def read_id(field: str, text: str) -> UUID:
    """A UUID from its text."""
    try:
        return UUID(text)
    except ValueError as error:
        raise Invalid(f"{field} is not a UUID.", field=field) from error


def read_ids(field: str, texts: Iterable[str]) -> list[UUID]:
    """UUIDs from their texts."""
    return [read_id(field, text) for text in texts]


def read_choice(field: str, value: str, choices: tuple[Choice, ...]) -> Choice:
    """The one of `choices` that equals `value`."""
    for choice in choices:
        if choice == value:
            return choice
    raise Invalid(f"{field} is not one of {', '.join(map(str, choices))}.", field=field)


def read_time(field: str, value: Timestamp) -> datetime:
    """An aware datetime in UTC."""
    try:
        return value.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise Invalid(f"{field} is not a time.", field=field) from error


def as_timestamp(moment: datetime) -> Timestamp:
    """What `read_time` reads."""
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
