"""Whose presence a person may see, as user says, remembered while the person is connected."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, Protocol
from uuid import UUID

from whispr.kit.batching import Batcher
from whispr.kit.clock import Clock
from whispr.kit.errors import Failure
from whispr.kit.telemetry import get_logger

log = get_logger(__name__)

# Changes are announced by hints, and what may have been missed while Valkey was away is made good at once. Only a hint that
# died with the process that had it to give is made good after this many seconds: asking for all the contacts of everybody
# more often would cost more than everything else that people who only listen cost.
_LIFETIME: Final = 3600.0

# Views that are asked for together would be due together, too.
_SPREAD: Final = 1 / 3

# Questions at once: each may be for some thousand contacts, and their answers have two seconds.
_ASKED_TOGETHER: Final = 25

# Seconds. A tenth of a second later nobody is shown too late, and where many come at once it spares `user` most calls.
_SPAN: Final = 0.1

# Within so many seconds everything that is in doubt is asked for again.
_DOUBT_SECONDS: Final = 60.0


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

    __slots__ = ("due_at", "hidden", "last_seen", "online", "subjects", "viewer_id")

    def __init__(self, viewer_id: UUID, subjects: frozenset[UUID] | None) -> None:
        self.viewer_id = viewer_id
        self.subjects = subjects
        self.due_at = float("-inf")
        self.online: frozenset[UUID] = frozenset()
        self.last_seen: frozenset[UUID] = frozenset()
        self.hidden: frozenset[UUID] = frozenset()

    @property
    def people(self) -> frozenset[UUID]:
        """Whose relations or privacy decide what it shows, besides the viewer's."""
        return self.online | self.hidden if self.subjects is None else self.subjects - {self.viewer_id}


class Visibility:
    """Fills views. While user cannot be asked a view stays what it was, at first empty: nobody is shown."""

    def __init__(self, source: PresenceSource, clock: Clock) -> None:
        # Everybody looks at once when a node starts and its people come back.
        self._questions = Batcher(source.presence_visibility, largest=_ASKED_TOGETHER, span=_SPAN)
        self._clock = clock

    def is_due(self, view: View) -> bool:
        """Whether the view is old enough to be asked for again."""
        return self._clock.time() >= view.due_at

    def suspect(self, view: View) -> None:
        """The view may be wrong; it is due soon."""
        view.due_at = min(view.due_at, self._clock.time() + random.uniform(0, _DOUBT_SECONDS))

    async def refresh(self, view: View) -> bool:
        """Ask for the view; whether it is another now."""
        view.due_at = self._clock.time() + _LIFETIME * random.uniform(1 - _SPREAD, 1)
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
            self.suspect(view)
            return False
        view.online = frozenset(answer.user_id for answer in answers if answer.online)
        view.last_seen = frozenset(answer.user_id for answer in answers if answer.last_seen)
        view.hidden = frozenset(answer.user_id for answer in answers if not answer.online)
        return before != (view.online, view.last_seen)
