"""Who looks at whose presence on this node, found by either side: news of one person must not cost a look at everybody."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

from whispr.kit.channels import Channel
from whispr.services.messaging.service.visibility import View


class Watch:
    """A channel that follows presence, and what its viewer may see."""

    __slots__ = ("channel", "indexed", "is_outdated", "is_reviewed", "news", "topics", "view")

    def __init__(self, channel: Channel, view: View, topics: tuple[str, ...] | None) -> None:
        self.channel = channel
        self.view = view
        self.topics = topics
        self.is_outdated = False
        self.is_reviewed = False
        self.indexed: frozenset[UUID] = frozenset()
        # Whose news came while the view is asked for; None when it is not.
        self.news: set[UUID] | None = None


class Watches:
    """The watches of this node, one a channel."""

    def __init__(self) -> None:
        self._by_channel: dict[Channel, Watch] = {}
        self._by_viewer: dict[UUID, list[Watch]] = {}
        self._by_subject: dict[UUID, list[Watch]] = {}
        self._asking: set[Watch] = set()

    def __iter__(self) -> Iterator[Watch]:
        return iter(tuple(self._by_channel.values()))

    def __contains__(self, watch: Watch) -> bool:
        return self._by_channel.get(watch.channel) is watch

    def at(self, channel: Channel) -> Watch | None:
        """The channel's watch."""
        return self._by_channel.get(channel)

    def add(self, watch: Watch) -> None:
        """Keep it."""
        self._by_channel[watch.channel] = watch
        self._by_viewer.setdefault(watch.view.viewer_id, []).append(watch)
        self.index(watch)

    def remove(self, channel: Channel) -> None:
        """The channel is gone."""
        watch = self._by_channel.pop(channel, None)
        if watch is not None:
            _drop(self._by_viewer, watch.view.viewer_id, watch)
            for user_id in watch.indexed:
                _drop(self._by_subject, user_id, watch)

    def index(self, watch: Watch) -> None:
        """Find it from now on by whom its view shows now."""
        if watch not in self:
            return
        before, watch.indexed = watch.indexed, watch.view.people
        for user_id in before - watch.indexed:
            _drop(self._by_subject, user_id, watch)
        for user_id in watch.indexed - before:
            self._by_subject.setdefault(user_id, []).append(watch)

    def of(self, viewer_id: UUID) -> list[Watch]:
        """Those of one viewer."""
        return self._by_viewer.get(viewer_id, [])

    def having_contact(self, user_id: UUID) -> set[UUID]:
        """Which viewers have `user_id` among their contacts."""
        return {
            watch.view.viewer_id for watch in self._by_subject.get(user_id, ()) if watch.view.subjects is None
        }

    def begin(self, watch: Watch) -> None:
        """Its view is being asked for: whom the answer will show is not known yet."""
        watch.news = set()
        self._asking.add(watch)

    def end(self, watch: Watch) -> None:
        """The answer is there. If there was news of somebody in it meanwhile, it may be too old."""
        self._asking.discard(watch)
        news, watch.news = watch.news, None
        self.index(watch)
        if news and not news.isdisjoint(watch.view.people | {watch.view.viewer_id}):
            watch.is_outdated = True

    def concerned(self, user_id: UUID) -> list[Watch]:
        """Those that a change of `user_id`'s relations or privacy may change; those being asked for hear of it."""
        for watch in self._asking:
            assert watch.news is not None
            watch.news.add(user_id)
        found = [*self._by_viewer.get(user_id, ()), *self._by_subject.get(user_id, ())]
        return [watch for watch in dict.fromkeys(found) if watch.news is None]


def _drop(index: dict[UUID, list[Watch]], user_id: UUID, watch: Watch) -> None:
    watches = index[user_id]
    watches.remove(watch)
    if not watches:
        del index[user_id]
