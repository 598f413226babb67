"""Reactions to messages.

A busy group reacts to one message all at once, and each change needs the conversation's lock: while one transaction is under
way, what arrives for the same conversation gathers, and the next one takes all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final
from uuid import UUID

import msgspec

from whispr.kit.batching import Batcher
from whispr.kit.errors import Failure
from whispr.services.messaging.models import (
    Actor,
    ConversationClosed,
    ConversationRow,
    InvalidReaction,
    MessageDeleted,
    NotAMember,
    TooManyReactions,
)
from whispr.services.messaging.service.changes import require_seen
from whispr.services.messaging.service.sending import Sending
from whispr.services.messaging.service.structure import Structure
from whispr.services.messaging.store import changes, conversations
from whispr.services.messaging.store import reactions as store

MAX_LENGTH: Final = 64
MAX_KINDS: Final = 20
"""Different reactions to one message."""
MAX_OWN: Final = 5
"""Reactions of one person to one message."""

_BATCH: Final = 200


class _Choice(msgspec.Struct, frozen=True):
    user_id: UUID
    message_id: UUID
    reaction: str
    is_wanted: bool

    @property
    def key(self) -> store.Key:
        return self.message_id, self.user_id, self.reaction


Lane = Batcher[_Choice, int | None | Failure]


class Reactions:
    """Adds and removes, each one event; what is so already needs none."""

    def __init__(
        self, structure: Structure, sending: Sending, *, ensure_on: Callable[[], None] = lambda: None
    ) -> None:
        self._ensure_on = ensure_on
        self._structure = structure
        self._sending = sending
        self._lanes: dict[UUID, tuple[Lane, int]] = {}

    async def add(self, actor: Actor, conversation_id: UUID, message_id: UUID, reaction: str) -> int | None:
        """React to a message; the event's `seq` if there had to be one.

        Raises `InvalidReaction`, `NotAMember`, `ConversationClosed`, `Blocked`, `ContactsOnly`, `MessageNotFound`,
        `MessageDeleted`, `TooManyReactions`, `RateLimited`, `Unavailable`, `FeatureOff`.
        """
        self._ensure_on()
        check_reaction(reaction)
        self._sending.count(actor.device_id, actor.user_id, conversation_id)
        await self._sending.ensure_open(conversation_id, actor.user_id)
        return await self._ask(conversation_id, _Choice(actor.user_id, message_id, reaction, True))

    async def remove(
        self, actor: Actor, conversation_id: UUID, message_id: UUID, reaction: str
    ) -> int | None:
        """Take a reaction back; the event's `seq` if there had to be one.

        That is possible where nothing new may be said. Raises `InvalidReaction`, `NotAMember`, `MessageNotFound`,
        `RateLimited`, `Unavailable`.
        """
        check_reaction(reaction)
        self._sending.count(actor.device_id, actor.user_id, conversation_id)
        return await self._ask(conversation_id, _Choice(actor.user_id, message_id, reaction, False))

    async def _ask(self, conversation_id: UUID, choice: _Choice) -> int | None:
        lane, users = self._lanes.get(conversation_id) or (
            Batcher(partial(self._apply, conversation_id), largest=_BATCH, lanes=1),
            0,
        )
        self._lanes[conversation_id] = lane, users + 1
        try:
            answer = await lane.ask(choice)
        finally:
            lane, users = self._lanes[conversation_id]
            if users == 1:
                del self._lanes[conversation_id]
            else:
                self._lanes[conversation_id] = lane, users - 1
        if isinstance(answer, Failure):
            raise answer
        return answer

    async def _apply(self, conversation_id: UUID, choices: list[_Choice]) -> Sequence[int | Failure | None]:
        now = self._structure.clock.now()
        async with self._structure.db.transaction() as tx:
            row = await conversations.lock(tx, conversation_id)
            if row is None:
                return [NotAMember() for _ in choices]
            people = {choice.user_id for choice in choices}
            messages = {choice.message_id for choice in choices}
            judge = _Judge(
                row,
                await store.floors(tx, conversation_id, people),
                await changes.targets(tx, conversation_id, list(messages)),
                await store.chosen(tx, conversation_id, messages, people),
                now=now,
            )
            verdicts = [judge.decide(choice) for choice in choices]
            changed = [choice for choice, verdict in zip(choices, verdicts, strict=True) if verdict is True]
            if not changed:
                return [verdict if isinstance(verdict, Failure) else None for verdict in verdicts]
            events = await conversations.append_events(
                tx, conversation_id, [_event(choice) for choice in changed], now
            )
            latest = {choice.key: (choice, event.seq) for choice, event in zip(changed, events, strict=True)}
            added = {key: seq for key, (choice, seq) in latest.items() if choice.is_wanted}
            removed = [key for key, (choice, _) in latest.items() if not choice.is_wanted]
            await store.change(tx, conversation_id, added, removed, now)
        self._structure.publish(events)
        seqs = iter(events)
        return [
            verdict if isinstance(verdict, Failure) else next(seqs).seq if verdict else None
            for verdict in verdicts
        ]


class _Judge:
    """Decides one choice after another as if each had its own transaction."""

    def __init__(
        self,
        row: ConversationRow,
        floors: dict[UUID, int],
        targets: dict[UUID, changes.Target],
        chosen: store.Chosen,
        *,
        now: datetime,
    ) -> None:
        self._row = row
        self._floors = floors
        self._targets = targets
        self._chosen = chosen
        self._now = now

    def decide(self, choice: _Choice) -> bool | Failure:
        """Whether it changes anything, or why it is refused."""
        try:
            return self._add(choice) if choice.is_wanted else self._remove(choice)
        except Failure as failure:
            return failure

    def _add(self, choice: _Choice) -> bool:
        self._require_seen(choice)
        if not self._row.is_active:
            raise ConversationClosed
        if choice.key in self._chosen.own:
            return False
        counts = self._chosen.counts.setdefault(choice.message_id, {})
        if choice.reaction not in counts and len(counts) >= MAX_KINDS:
            raise TooManyReactions(limit=MAX_KINDS)
        own = sum(
            message_id == choice.message_id and user_id == choice.user_id
            for message_id, user_id, _ in self._chosen.own
        )
        if own >= MAX_OWN:
            raise TooManyReactions(limit=MAX_OWN)
        self._chosen.own.add(choice.key)
        counts[choice.reaction] = counts.get(choice.reaction, 0) + 1
        return True

    def _remove(self, choice: _Choice) -> bool:
        try:
            self._require_seen(choice)
        except MessageDeleted:
            return False
        if choice.key not in self._chosen.own:
            return False
        self._chosen.own.discard(choice.key)
        counts = self._chosen.counts[choice.message_id]
        counts[choice.reaction] -= 1
        if not counts[choice.reaction]:
            del counts[choice.reaction]
        return True

    def _require_seen(self, choice: _Choice) -> None:
        floor = self._floors.get(choice.user_id)
        if floor is None:
            raise NotAMember
        require_seen(self._targets.get(choice.message_id), max(floor, self._row.purged_seq), self._now)


def check_reaction(reaction: str) -> None:
    """Raises `InvalidReaction`. An emoji is several characters, and clients may encrypt theirs, so any text will do."""
    if not 1 <= len(reaction) <= MAX_LENGTH or any(
        ord(char) < 0x20 or 0xD800 <= ord(char) < 0xE000 or ord(char) == 0x7F for char in reaction
    ):
        raise InvalidReaction


def _event(choice: _Choice) -> tuple[str, dict[str, Any]]:
    return "reaction_added" if choice.is_wanted else "reaction_removed", {
        "message_id": choice.message_id,
        "user_id": choice.user_id,
        "reaction": choice.reaction,
    }
