"""When what a person may see of others is asked for again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID, uuid4

from whispr.kit.clock import ManualClock
from whispr.kit.errors import Unavailable
from whispr.services.messaging.service.visibility import View, Visibility


@dataclass
class Seen:
    user_id: UUID
    online: bool
    last_seen: bool


class Users:
    """Everybody sees everybody."""

    def __init__(self) -> None:
        self.away = False

    async def presence_visibility(self, questions: Sequence[tuple[UUID, Sequence[UUID]]]) -> list[list[Seen]]:
        if self.away:
            raise Unavailable
        return [[Seen(subject, True, False) for subject in subjects] for _, subjects in questions]


async def test_a_view_is_asked_for_again_within_an_hour_and_sooner_when_in_doubt() -> None:
    clock, users = ManualClock(), Users()
    visibility = Visibility(users, clock)
    viewer, other = uuid4(), uuid4()
    view = View(viewer, frozenset({viewer, other}))
    assert visibility.is_due(view)
    assert await visibility.refresh(view)
    assert view.online == {other}
    clock.advance(39 * 60)
    assert not visibility.is_due(view)
    clock.advance(21 * 60)
    assert visibility.is_due(view)
    assert not await visibility.refresh(view), "nothing has changed"
    visibility.suspect(view)
    clock.advance(60)
    assert visibility.is_due(view)
    users.away = True
    assert not await visibility.refresh(view)
    assert view.online == {other}, "what was known stays"
    clock.advance(60)
    assert visibility.is_due(view)
