from __future__ import annotations

import pytest

from whispr.kit.errors import Failure, Kind, RateLimited, Unavailable, from_wire


class Taken(Failure):
    """The name is taken.

    More words that are not the message.
    """

    kind = Kind.CONFLICT
    code = "name_taken"


def test_the_docstring_is_the_message() -> None:
    assert Taken().detail == "The name is taken."
    assert Taken("Use another.").detail == "Use another."


def test_the_channel_form_carries_code_and_fields() -> None:
    assert Taken(name="ada").reason() == {"reason": "name_taken", "name": "ada"}
    assert RateLimited(retry_after=3).reason() == {"reason": "rate_limited", "retry_after": 3}


@pytest.mark.parametrize("kind", list(Kind))
def test_a_failure_survives_the_wire(kind: Kind) -> None:
    failure = from_wire(kind, "some_code", "Some detail.", {"a": 1}, 2.0)
    assert (failure.kind, failure.code, failure.detail, failure.fields, failure.retry_after) == (
        kind, "some_code", "Some detail.", {"a": 1}, 2.0,
    )  # fmt: skip


def test_a_code_from_the_wire_does_not_leak_into_its_class() -> None:
    from_wire(Kind.UNAVAILABLE, "special", "")
    assert Unavailable().code == "unavailable"
