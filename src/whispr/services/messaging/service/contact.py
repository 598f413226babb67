"""Who may write to whom, and who must not hear of whom, as user says."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final, Literal, NamedTuple, Protocol
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


class _Relation(NamedTuple):
    """`news`: how much news of anybody had come when it was asked for."""

    reason: str
    news: int


class Contact:
    """Relations at hand for the hot path; see `ReadThrough` for how old they may be.

    News of a person makes what was asked before it worthless. It is compared when a relation is looked up: looking for
    all relations of the person whenever news comes would stop this process for milliseconds.
    """

    MAX_NEWS: Final = 10_000

    def __init__(self, source: ContactSource, clock: Clock) -> None:
        self._source = source
        self._relations: ReadThrough[Pair, _Relation] = ReadThrough(self._fetch, clock)
        self._news = 0
        self._last_news: dict[UUID, int] = {}

    def refusal(self, sender_id: UUID, recipient_id: UUID) -> type[Failure] | None:
        """Why `sender_id` may not write to `recipient_id`. Raises KeyError if that is not at hand."""
        reason = self._reason((sender_id, recipient_id))
        if reason is None:
            raise KeyError(recipient_id)
        return _REFUSALS.get(reason)

    def knows(self, recipient_id: UUID, sender_id: UUID) -> bool:
        """Whether `recipient_id`, who may be written to, has `sender_id` among their contacts. As far as it is at hand."""
        return self._reason((sender_id, recipient_id)) == _KNOWN

    async def load(self, sender_id: UUID, recipient_ids: Iterable[UUID], *, again: bool = False) -> None:
        """Make what `refusal` answers present; see `ReadThrough.load`."""
        pairs = [(sender_id, recipient_id) for recipient_id in recipient_ids]
        for pair in pairs:
            # What is worthless must not count as present.
            self._reason(pair)
        await self._relations.load(pairs, again=again)

    async def blocked(self, user_id: UUID, others: Collection[UUID]) -> frozenset[UUID]:
        """Those of `others` who are kept apart from `user_id`: neither hears of what the other does."""
        await self.load(user_id, others)
        # Even if news has come since: this was asked for a moment ago.
        relations = ((other, self._relations.peek((user_id, other))) for other in others)
        return frozenset(
            other for other, relation in relations if relation is not None and relation.reason == "blocked"
        )

    def changed(self, user_id: UUID) -> None:
        """A relation of `user_id` is not what it was."""
        if len(self._last_news) >= self.MAX_NEWS:
            self._last_news.clear()
            self._relations.expire()
        self._news += 1
        self._last_news[user_id] = self._news

    def forget_all(self) -> None:
        """No relation is to be relied on."""
        self._relations.expire()

    def _reason(self, pair: Pair) -> str | None:
        relation = self._relations.peek(pair)
        if relation is None:
            return None
        news = self._last_news
        if news and relation.news < max(news.get(pair[0], 0), news.get(pair[1], 0)):
            self._relations.forget(pair)
            return None
        return relation.reason

    async def _fetch(self, pairs: list[Pair]) -> dict[Pair, _Relation]:
        news = self._news
        answers = await self._source.check_pairs(pairs, "message")
        return {pair: _Relation(_told(answer), news) for pair, answer in zip(pairs, answers, strict=True)}


def _told(answer: Contactability) -> str:
    return _KNOWN if answer.reason == "ok" and answer.knows_sender else answer.reason
