"""Who is looked for when there is news of a person: those whom it may concern, and nobody else."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from whispr.services.messaging.channels.watches import Watch, Watches
from whispr.services.messaging.service.visibility import View

PEOPLE = [uuid4() for _ in range(6)]
people = st.sampled_from(PEOPLE)
several = st.frozensets(people)


class Machine(RuleBasedStateMachine):
    """The index answers as a look at everything would."""

    @initialize()
    def begin(self) -> None:
        self.watches = Watches()
        self.kept: list[Watch] = []
        self.asked: dict[Watch, set[UUID]] = {}

    @rule(viewer=people, subjects=st.none() | several)
    def add(self, viewer: UUID, subjects: frozenset[UUID] | None) -> None:
        channel: Any = object()
        watch = Watch(channel, View(viewer, subjects), None)
        self.watches.add(watch)
        self.kept.append(watch)

    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        if self.kept:
            watch = data.draw(st.sampled_from(self.kept))
            self.kept.remove(watch)
            self.watches.remove(watch.channel)
            self.watches.remove(watch.channel)

    @rule(data=st.data())
    def ask(self, data: Any) -> None:
        idle = [watch for watch in self.kept if watch not in self.asked]
        if idle:
            watch = data.draw(st.sampled_from(idle))
            self.watches.begin(watch)
            self.asked[watch] = set()

    @rule(data=st.data(), online=several, hidden=several)
    def answer(self, data: Any, online: frozenset[UUID], hidden: frozenset[UUID]) -> None:
        if not self.asked:
            return
        watch = data.draw(st.sampled_from(list(self.asked)))
        watch.view.online, watch.view.hidden = online, hidden
        watch.is_outdated = False
        self.watches.end(watch)
        shown = watch.view.people | {watch.view.viewer_id}
        assert watch.is_outdated == bool(self.asked.pop(watch) & shown)

    @rule(user_id=people)
    def news(self, user_id: UUID) -> None:
        for heard in self.asked.values():
            heard.add(user_id)
        expected = [
            watch
            for watch in self.kept
            if watch not in self.asked and user_id in {watch.view.viewer_id, *watch.view.people}
        ]
        found = self.watches.concerned(user_id)
        assert set(found) == set(expected)
        assert len(found) == len(expected)

    @rule(user_id=people)
    def contacts(self, user_id: UUID) -> None:
        assert self.watches.having_contact(user_id) == {
            watch.view.viewer_id
            for watch in self.kept
            if watch.view.subjects is None and user_id in watch.view.people
        }

    @invariant()
    def holds_what_was_added(self) -> None:
        assert set(self.watches) == set(self.kept)
        for viewer in PEOPLE:
            assert len(self.watches.of(viewer)) == sum(watch.view.viewer_id == viewer for watch in self.kept)


TestWatches = Machine.TestCase
