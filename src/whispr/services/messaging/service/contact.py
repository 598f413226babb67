"""Who may write to whom, and who must not hear of whom, as user says."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final, Literal, Protocol
from uuid import UUID

from whispr.kit.clock import Clock
from whispr.kit.errors import Failure
from whispr.services.messaging.models import Blocked, ContactsOnly, UnknownUser
from whispr.services.messaging.service.readthrough import ReadThrough


class Contactability(Protocol):
    """May one person write to another? `reason` is ok, unknown, blocked or contacts_only."""

    @property
    def reason(self) -> str: ...
    @property
    def knows_sender(self) -> bool: ...


class ContactSource(Protocol):
    """Who knows relations: a client of user."""

    async def check_pairs(
        self, pairs: Sequence[tuple[UUID, UUID]], purpose: Literal["message", "group"]
    ) -> Sequence[Contactability]:
        """For pairs of sender and recipient, in order."""


Pair = tuple[UUID, UUID]
"""Who writes, and to whom."""

_REFUSALS: Final[dict[str, type[Failure]]] = {
    "blocked": Blocked,
    "contacts_only": ContactsOnly,
    "unknown": UnknownUser,
}


_KNOWN: Final = "known"
"""As `ok`, from somebody who has the sender among their contacts."""


class Contact:
    """Relations at hand for the hot path; see `ReadThrough` for how old they may be."""

    def __init__(self, source: ContactSource, clock: Clock) -> None:
        self._source = source
        self._reasons: ReadThrough[Pair, str] = ReadThrough(self._fetch, clock)

    def refusal(self, sender_id: UUID, recipient_id: UUID) -> type[Failure] | None:
        """Why `sender_id` may not write to `recipient_id`. Raises KeyError if that is not at hand."""
        reason = self._reasons.peek((sender_id, recipient_id))
        if reason is None:
            raise KeyError(recipient_id)
        return _REFUSALS.get(reason)

    def knows(self, recipient_id: UUID, sender_id: UUID) -> bool:
        """Whether `recipient_id`, who may be written to, has `sender_id` among their contacts. As far as it is at hand."""
        return self._reasons.peek((sender_id, recipient_id)) == _KNOWN

    async def load(self, sender_id: UUID, recipient_ids: Iterable[UUID], *, again: bool = False) -> None:
        """Make what `refusal` answers present; see `ReadThrough.load`."""
        await self._reasons.load(((sender_id, recipient_id) for recipient_id in recipient_ids), again=again)

    async def blocked(self, user_id: UUID, others: Collection[UUID]) -> frozenset[UUID]:
        """Those of `others` who are kept apart from `user_id`: neither hears of what the other does."""
        await self.load(user_id, others)
        return frozenset(other for other in others if self._reasons.peek((user_id, other)) == "blocked")

    def changed(self, user_id: UUID) -> None:
        """A relation of `user_id` is not what it was."""
        self._reasons.forget(lambda pair: user_id in pair)

    def forget_all(self) -> None:
        """No relation is to be relied on."""
        self._reasons.expire()

    async def _fetch(self, pairs: list[Pair]) -> dict[Pair, str]:
        answers = await self._source.check_pairs(pairs, "message")
        return {pair: _told(answer) for pair, answer in zip(pairs, answers, strict=True)}


def _told(answer: Contactability) -> str:
    return _KNOWN if answer.reason == "ok" and answer.knows_sender else answer.reason
