"""Contacts, blocks, and what follows from them: who may write to whom, and who sees whose presence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from uuid import UUID

from whispr.kit.cache import RateLimiter
from whispr.kit.clock import Clock
from whispr.kit.db import Connection, Database
from whispr.services.user import store
from whispr.services.user.models import (
    BlockLimitReached,
    Contactability,
    ContactBlocked,
    ContactLimitReached,
    OwnAccount,
    Position,
    PresenceQuestion,
    PresenceVisibility,
    Purpose,
    Reason,
    RelatedProfile,
    Relation,
    RelationPage,
    UserNotFound,
)
from whispr.services.user.service.directory import Directory, check_batch
from whispr.services.user.service.hints import Hints
from whispr.services.user.service.profiles import ACTIVITY_GRAIN, admits, shown
from whispr.services.user.settings import UserSettings


class Relations:
    """Everything between two people."""

    def __init__(
        self,
        database: Database,
        directory: Directory,
        hints: Hints,
        limiter: RateLimiter,
        clock: Clock,
        settings: UserSettings,
    ) -> None:
        self._database = database
        self._directory = directory
        self._hints = hints
        self._limiter = limiter
        self._clock = clock
        self._settings = settings

    async def contacts(self, owner_id: UUID, after: Position | None, limit: int) -> RelationPage:
        """A page of the caller's contacts in the order of adding."""
        async with self._database.connection() as conn:
            rows = await store.contacts_after(conn, owner_id, after, limit + 1)
        return _page(owner_id, [Relation(shown(found, owner_id), at) for found, at in rows], limit)

    async def blocks(self, owner_id: UUID, after: Position | None, limit: int) -> RelationPage:
        """A page of the people the caller blocks in the order of blocking."""
        async with self._database.connection() as conn:
            rows = await store.blocks_after(conn, owner_id, after, limit + 1)
        return _page(owner_id, [Relation(shown(found, owner_id), at) for found, at in rows], limit)

    async def add_contact(self, owner_id: UUID, user_id: UUID) -> None:
        """Add a person; adding them again changes nothing.

        Raises OwnAccount, UserNotFound, ContactBlocked, ContactLimitReached, RateLimited. Having been blocked by the
        person is no obstacle and makes no difference that the caller could see.
        """
        await self._prepare(owner_id, user_id)
        async with self._database.transaction() as tx:
            await _lock_both(tx, owner_id, user_id)
            if await store.is_blocked(tx, owner_id, user_id):
                raise ContactBlocked
            added = await store.add_contact(tx, owner_id, user_id, self._clock.now())
            if added and await store.count_contacts(tx, owner_id) > self._settings.contacts_limit:
                raise ContactLimitReached(limit=self._settings.contacts_limit)
        if added:
            await self._hints.changed("relations", owner_id, user_id)

    async def remove_contact(self, owner_id: UUID, user_id: UUID) -> None:
        """Remove a contact, if it is one."""
        async with self._database.connection() as conn:
            removed = await store.remove_contact(conn, owner_id, user_id)
        if removed:
            await self._hints.changed("relations", owner_id, user_id)

    async def block(self, owner_id: UUID, user_id: UUID) -> None:
        """Keep a person away; blocking them again changes nothing.

        The person leaves the caller's contacts. The caller stays in theirs, where a missing entry would tell them.
        Raises OwnAccount, UserNotFound, BlockLimitReached, RateLimited.
        """
        await self._prepare(owner_id, user_id)
        async with self._database.transaction() as tx:
            await _lock_both(tx, owner_id, user_id)
            added = await store.add_block(tx, owner_id, user_id, self._clock.now())
            if added and await store.count_blocks(tx, owner_id) > self._settings.blocks_limit:
                raise BlockLimitReached(limit=self._settings.blocks_limit)
            await store.remove_contact(tx, owner_id, user_id)
        if added:
            await self._hints.changed("relations", owner_id, user_id)

    async def unblock(self, owner_id: UUID, user_id: UUID) -> None:
        """Lift a block, if there is one."""
        async with self._database.connection() as conn:
            removed = await store.remove_block(conn, owner_id, user_id)
        if removed:
            await self._hints.changed("relations", owner_id, user_id)

    async def contactability(
        self, sender_id: UUID, recipient_ids: Sequence[UUID], purpose: Purpose
    ) -> list[Contactability]:
        """May the sender write to each of at most 1,000 people, or add them to a group?"""
        people = list(dict.fromkeys(recipient_ids))
        return await self.contactability_of([(sender_id, user_id) for user_id in people], purpose)

    async def contactability_of(
        self, pairs: Sequence[tuple[UUID, UUID]], purpose: Purpose
    ) -> list[Contactability]:
        """May the sender write to the recipient, or add them to a group, for at most 1,000 pairs of the two, in order?"""
        check_batch(len(pairs))
        await self._touch(sender_id for sender_id, _ in pairs)
        found = await self._related(pairs)
        return [
            _contactability(sender_id, recipient_id, related, purpose)
            for (sender_id, recipient_id), related in zip(pairs, found, strict=True)
        ]

    async def presence_visibility(
        self, questions: Sequence[PresenceQuestion]
    ) -> list[list[PresenceVisibility]]:
        """What each viewer may see of each subject's presence, in the order of the questions.

        Raises BatchTooLarge above 1,000 questions or subjects.
        """
        check_batch(len(questions))
        check_batch(sum(len(question.subject_ids) for question in questions))
        await self._touch(question.viewer_id for question in questions)
        async with self._database.connection() as conn:
            contacts = await store.contacts_of(
                conn, [question.viewer_id for question in questions if not question.subject_ids]
            )
        asked = [
            (number, question.viewer_id, subject)
            for number, question in enumerate(questions)
            for subject in question.subject_ids or contacts.get(question.viewer_id, ())
        ]
        found = await self._related([(viewer, subject) for _, viewer, subject in asked])
        answers: list[list[PresenceVisibility]] = [[] for _ in questions]
        for (number, viewer, _), item in zip(asked, found, strict=True):
            if item is not None:
                answers[number].append(_visibility(viewer, item))
        return answers

    async def _touch(self, user_ids: Iterable[UUID]) -> None:
        now = self._clock.now()
        async with self._database.connection() as conn:
            await store.touch(conn, list(set(user_ids)), now, now - ACTIVITY_GRAIN)

    async def _related(self, pairs: Sequence[tuple[UUID, UUID]]) -> list[RelatedProfile | None]:
        """Each subject as it stands to the viewer; None where there is no such living person."""
        async with self._database.connection() as conn:
            found = await store.related_pairs(conn, pairs)
        strangers = {subject for (_, subject), item in zip(pairs, found, strict=True) if item is None}
        if strangers:
            # Contacts are never strangers, so that these are no more than were named.
            await self._directory.ensure(sorted(strangers))
            async with self._database.connection() as conn:
                found = await store.related_pairs(conn, pairs)
        return found

    async def _prepare(self, owner_id: UUID, user_id: UUID) -> None:
        if owner_id == user_id:
            raise OwnAccount
        # The same answers as a profile view, so the same limit: adding people is no way around it.
        await self._limiter.check("user-view", str(owner_id), self._settings.views_per_minute, 60)
        await self._directory.ensure([owner_id, user_id])


async def _lock_both(tx: Connection, owner_id: UUID, user_id: UUID) -> None:
    """Hold both people still: neither can be erased, and the owner's lists cannot grow, until the commit."""
    states = await store.lock_profiles(tx, [owner_id, user_id])
    if any(states.get(person, "erased") == "erased" for person in (owner_id, user_id)):
        raise UserNotFound


def _page(owner_id: UUID, items: list[Relation], limit: int) -> RelationPage:
    more = len(items) > limit
    items = items[:limit]
    return RelationPage(items, Position(items[-1].created_at, items[-1].user.user_id) if more else None)


def _contactability(
    sender_id: UUID, user_id: UUID, found: RelatedProfile | None, purpose: Purpose
) -> Contactability:
    return Contactability(
        user_id,
        _reason(sender_id, found, purpose),
        knows_sender=found is not None and found.knows_viewer,
    )


def _reason(sender_id: UUID, found: RelatedProfile | None, purpose: Purpose) -> Reason:
    if found is None:
        return "unknown"
    if found.profile.user_id == sender_id:
        return "ok"
    if found.apart:
        return "blocked"
    privacy = found.profile.privacy
    senders = privacy.messages if purpose == "message" else privacy.groups
    return "ok" if admits(senders, found) else "contacts_only"


def _visibility(viewer_id: UUID, found: RelatedProfile) -> PresenceVisibility:
    profile = found.profile
    if profile.user_id == viewer_id:
        return PresenceVisibility(viewer_id, online=True, last_seen=True)
    if found.apart:
        return PresenceVisibility(profile.user_id, online=False, last_seen=False)
    return PresenceVisibility(
        profile.user_id,
        online=admits(profile.privacy.online, found),
        last_seen=admits(profile.privacy.last_seen, found),
    )
