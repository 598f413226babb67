"""Whose presence a person may see, as user says, remembered while the person is connected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol
from uuid import UUID

from whispr.kit.batching import Batcher
from whispr.kit.clock import Clock
from whispr.kit.errors import Failure
from whispr.kit.telemetry import get_logger

log = get_logger(__name__)

# Changes are announced by hints; a lost one is made good after this many seconds.
_LIFETIME: Final = 300.0


class PresenceVisibility(Protocol):
    """What one person may see of another."""

    @property
    def user_id(self) -> UUID: ...
    @property
    def online(self) -> bool: ...
    @property
    def last_seen(self) -> bool: ...


class PresenceSource(Protocol):
    """Who knows: a client of user."""

    async def presence_visibility(
        self, questions: Sequence[tuple[UUID, Sequence[UUID]]]
    ) -> Sequence[Sequence[PresenceVisibility]]:
        """For each question `(viewer_id, subject_ids)`: each subject; without subjects, each of the viewer's contacts."""


class View:
    """What one viewer may see of those it looks at. `subjects` None: of the viewer's contacts.

    `hidden`: those of them who do not show whether they are online.
    """

    __slots__ = ("asked_at", "hidden", "last_seen", "online", "subjects", "viewer_id")

    def __init__(self, viewer_id: UUID, subjects: frozenset[UUID] | None) -> None:
        self.viewer_id = viewer_id
        self.subjects = subjects
        self.asked_at = float("-inf")
        self.online: frozenset[UUID] = frozenset()
        self.last_seen: frozenset[UUID] = frozenset()
        self.hidden: frozenset[UUID] = frozenset()

    def has_contact(self, user_id: UUID) -> bool:
        """Whether this is the view of somebody's contacts, and `user_id` one of them."""
        return self.subjects is None and (user_id in self.online or user_id in self.hidden)

    def concerns(self, user_id: UUID) -> bool:
        """Whether a change of `user_id`'s relations or privacy may change this view."""
        return user_id == self.viewer_id or self.subjects is None or user_id in self.subjects


class Visibility:
    """Fills views. While user cannot be asked a view stays what it was, at first empty: nobody is shown."""

    def __init__(self, source: PresenceSource, clock: Clock) -> None:
        # Everybody looks at once when a node starts and its people come back.
        self._questions = Batcher(source.presence_visibility)
        self._clock = clock

    def is_due(self, view: View) -> bool:
        """Whether the view is old enough to be asked for again."""
        return self._clock.time() - view.asked_at >= _LIFETIME

    async def refresh(self, view: View) -> bool:
        """Ask for the view; whether it is another now."""
        view.asked_at = self._clock.time()
        before = view.online, view.last_seen
        try:
            subjects = () if view.subjects is None else tuple(view.subjects - {view.viewer_id})
            answers = (
                await self._questions.ask((view.viewer_id, subjects))
                if subjects or view.subjects is None
                else ()
            )
        except Failure as failure:
            log.warning("visibility_unknown", code=failure.code)
            view.asked_at = float("-inf")
            return False
        view.online = frozenset(answer.user_id for answer in answers if answer.online)
        view.last_seen = frozenset(answer.user_id for answer in answers if answer.last_seen)
        view.hidden = frozenset(answer.user_id for answer in answers if not answer.online)
        return before != (view.online, view.last_seen)
